"""What the core refuses, each with a message that says what was given and what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from support import model_zoo
from torch import Tensor, nn

from tl_edgeprune import Circuit, EdgeGraph, EdgePruner, Task, discover, evaluate, masked
from tl_edgeprune.evaluation.evaluate import check_circuit
from tl_edgeprune.hooks import unsupported as refusals
from tl_edgeprune.hooks.modules import dropouts, longest_prompt
from tl_edgeprune.runs.task_checks import check_tokens

NAMES = [name for name in ("bridge-gpt2", "hooked-gpt2-ln") if name in model_zoo.ARCHITECTURES]
each_class = pytest.mark.parametrize("name", NAMES)


def ones(model: Any) -> Tensor:
    return torch.ones(EdgeGraph.from_model(model).n_edges)


def refused(message: str, error: type[Exception] = ValueError) -> Any:
    """A message given as plain text, `…` for what may stand between."""
    return pytest.raises(error, match=".*".join(map(re.escape, message.split("…"))))


def enter(model: Any, mask: Any, **options: Any) -> None:
    """Enter and leave, which must never be reached."""
    with masked(model, mask, **options):
        pytest.fail("not refused")


# ------------------------------------------------------------------------------------------ masks


@each_class
def test_masks_that_do_not_fit(name: str) -> None:
    model = model_zoo.load(name)
    mask = ones(model)
    n = len(mask)
    with refused(f"the mask has shape ({n - 1},), expected ({n},): one value for each edge"):
        enter(model, mask[1:], ablation="zero")
    with refused(f"the mask has shape (1, {n}), expected ({n},)"):
        enter(model, mask[None], ablation="zero")
    with refused("the mask has dtype torch.int64, expected floats in [0, 1] or bool"):
        enter(model, mask.long(), ablation="zero")
    mask[3] = float("nan")
    with refused("the mask holds NaN or infinite values; expected numbers in [0, 1]"):
        enter(model, mask, ablation="zero")
    with refused("expected a Circuit or a mask tensor [n_edges], got list", TypeError):
        enter(model, [1.0] * n, ablation="zero")
    with refused("expected a Circuit, got a list: take result.circuit", TypeError):
        check_circuit(model, ["m0->logits"])


@each_class
def test_a_mask_that_turns_nan_inside(name: str) -> None:
    model = model_zoo.load(name)
    mask = ones(model)
    with masked(model, mask, ablation="zero"):
        model(model_zoo.tokens(model))
        mask[0] = float("nan")
        with refused("the mask holds NaN or infinite values"):
            model(model_zoo.tokens(model))


@each_class
def test_circuits_of_another_graph(name: str) -> None:
    model = model_zoo.load(name)
    graph = EdgeGraph(n_layers=12, n_heads=12, n_kv_heads=12)
    empty = Circuit(graph, torch.zeros(graph.n_edges, dtype=torch.bool))
    with refused(
        "is for another model: its graph is EdgeGraph(n_layers=12…this model's EdgeGraph("
    ):
        enter(model, empty, ablation="zero")
    with refused(
        "is for another model: its graph is EdgeGraph(n_layers=12…this model's EdgeGraph("
    ):
        enter(model, empty.mask, graph=graph, ablation="zero")


def test_unknown_edges() -> None:
    graph = EdgeGraph.from_model(model_zoo.load("bridge-gpt2"))
    with refused("unknown edge 'a0.h9->m1': this graph has no a0.h9. Nearest: a0.h", KeyError):
        Circuit.from_edges(graph, ["input->m0", "a0.h9->m1"])


# ---------------------------------------------------------------------------------------- ablation


@each_class
@pytest.mark.parametrize(
    "clean, corrupted",
    [((2, 7), (2, 6)), ((2, 6), (2, 7)), ((2, 7), (1, 7)), ((1, 7), (2, 7)), ((2, 7), (1, 1))],
    ids=str,
)
def test_prompts_of_another_shape_than_the_corrupted(
    name: str, clean: tuple[int, int], corrupted: tuple[int, int]
) -> None:
    model = model_zoo.load(name)
    with masked(model, ones(model), corrupted=model_zoo.tokens(model, *corrupted)):
        with refused(f"the tokens have shape {clean}, the corrupted prompts {corrupted}"):
            model(model_zoo.tokens(model, *clean))


@each_class
@pytest.mark.parametrize("token", [-1, model_zoo.VOCAB])
def test_tokens_that_the_model_does_not_know(name: str, token: int) -> None:
    model = model_zoo.load(name)
    wrong = model_zoo.tokens(model)
    wrong[1, 3] = token
    known = f"has token {token}, but the model knows 0 to {model_zoo.VOCAB - 1}."
    with refused(f"corrupted {known}"):
        enter(model, ones(model), corrupted=wrong)
    with refused(f"prompts {known}"):
        enter(model, ones(model), ablation="mean", prompts=[*wrong])
    with masked(model, ones(model), ablation="zero"), refused(f"the batch {known}"):
        model(wrong)
    clean, read = model_zoo.tokens(model), [torch.tensor([6])] * 2
    with refused(f"task 'wrong' {known}"):
        discover(model, Task("wrong", [*clean], [*wrong], read), "mask-ig")
    with refused(f"task 'wrong' {known}"):
        EdgePruner(9, progress=False).fit(model, Task("wrong", [*wrong], [*clean], read))


@pytest.mark.parametrize("name", model_zoo.ARCHITECTURES)
def test_prompts_past_the_last_position(name: str) -> None:
    """Refused where the model itself cannot run them."""
    model = model_zoo.load(name)
    long, limit = model_zoo.tokens(model, pos=model_zoo.N_CTX + 1), longest_prompt(model)
    if limit is None:
        if not name.endswith(("gptj", "native-rms-rotary-gqa")):  # which refuse them themselves
            model(long)
        return
    assert limit == model_zoo.N_CTX
    model(long[:, 1:])
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(long)
    too_long = f"has a prompt of {limit + 1} tokens, but the model has positions for {limit}"
    with refused(f"corrupted {too_long}"):
        enter(model, ones(model), corrupted=long)
    with masked(model, ones(model), ablation="zero"), refused(f"the batch {too_long}"):
        model(long)
    with refused(f"task 'long' {too_long}"):
        check_tokens(Task("long", [*long], [*long], [torch.tensor([0])] * 2), model)


def test_ablations_without_what_they_need() -> None:
    model = model_zoo.load("bridge-gpt2")
    mask, corrupted = ones(model), model_zoo.tokens(model)
    with refused("unknown ablation 'resample': expected one of counterfactual, zero, zero-with"):
        enter(model, mask, ablation="resample")
    with refused("counterfactual ablation needs corrupted=…, tokens [batch, pos]"):
        enter(model, mask)
    with refused("corrupted=… belongs to counterfactual ablation, but ablation='zero'"):
        enter(model, mask, ablation="zero", corrupted=corrupted)
    for ablation in ("mean", "mean-positional"):
        with refused(f"ablation='{ablation}' needs prompts=…"):
            enter(model, mask, ablation=ablation)
        with refused("needs prompts to take the means over, and got none"):
            enter(model, mask, ablation=ablation, prompts=[])


@pytest.mark.parametrize("longest", [1, 5])
def test_means_by_position_end_with_the_longest_prompt(longest: int) -> None:
    model = model_zoo.load("bridge-gpt2")
    prompts = [model_zoo.tokens(model, 1, longest)[0], model_zoo.tokens(model, 1, 1)[0]]
    with masked(model, ones(model), ablation="mean-positional", prompts=prompts):
        model(model_zoo.tokens(model, pos=longest))
        with refused(f"the prompts have 7 positions…over prompts of at most {longest}"):
            model(model_zoo.tokens(model))


# ------------------------------------------------------------------------------------------- calls


@each_class
def test_positions_that_do_not_fit(name: str) -> None:
    model = model_zoo.load(name)
    clean = model_zoo.tokens(model)
    for positions, message in (
        (torch.tensor([[0, 7], [1, 2]]), "positions go from 0 to 7, expected 0 to 6"),
        (torch.tensor([[-1], [2]]), "positions go from -1 to 2, expected 0 to 6"),
        (torch.tensor([[1], [2], [3]]), "positions has shape (3, 1), expected whole numbers [2,"),
    ):
        with masked(model, ones(model), ablation="zero", read_positions=positions):
            with refused(message):
                model(clean)


@each_class
def test_losses_of_some_positions(name: str) -> None:
    """A loss compares each position with the next token: it has no meaning for a few of them."""
    model = model_zoo.load(name)
    positions = torch.tensor([[6, 1], [2, 3]])
    with masked(model, ones(model), ablation="zero", read_positions=positions):
        for return_type in ("loss", "both"):
            with refused("a loss needs the logits at every position"):
                model(model_zoo.tokens(model), return_type=return_type)
        with refused("a loss needs the logits at every position"):
            model(model_zoo.tokens(model), "loss")


@each_class
def test_a_loss_of_every_position_is_the_models(name: str) -> None:
    model = model_zoo.load(name)
    expected = model(model_zoo.tokens(model), return_type="loss")
    with masked(model, ones(model), ablation="zero"):
        torch.testing.assert_close(model(model_zoo.tokens(model), return_type="loss"), expected)


@each_class
def test_inputs_other_than_whole_batches_of_tokens(name: str) -> None:
    model = model_zoo.load(name)
    clean = model_zoo.tokens(model)
    with masked(model, ones(model), ablation="zero"):
        for given, shown in (
            ("Once upon a time", "str"),
            (clean[0], "(7,)"),
            (torch.randn(2, 7, 24), "(2, 7, 24)"),
        ):
            with refused(f"expected tokens [batch, pos] inside masked, got {shown}"):
                model(given)


@each_class
@pytest.mark.parametrize(
    "option, message",
    [
        ({"past_key_values": object()}, "a KV cache is not supported inside masked"),
        ({"past_kv_cache": object()}, "a KV cache is not supported inside masked"),
        ({"use_cache": True}, "a KV cache is not supported inside masked"),
        ({"start_at_layer": 1}, "start_at_layer is not supported inside masked"),
        ({"stop_at_layer": 1}, "stop_at_layer is not supported inside masked"),
        ({"inputs_embeds": torch.ones(2, 7, 24)}, "inputs_embeds is not supported inside masked"),
        ({"position_ids": torch.arange(7)[None]}, "position_ids is not supported inside masked"),
        (
            {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])},
            "padding masks are not supported inside masked: give prompts of one length per batch",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_calls_that_masks_do_not_cover(name: str, option: dict[str, Any], message: str) -> None:
    model = model_zoo.load(name)
    with masked(model, ones(model), ablation="zero"), refused(message):
        model(model_zoo.tokens(model), **option)


@each_class
def test_an_attention_mask_of_ones_is_no_padding(name: str) -> None:
    model = model_zoo.load(name)
    clean = model_zoo.tokens(model)
    expected = model(clean)
    with masked(model, ones(model), ablation="zero"):
        actual = model(clean, attention_mask=torch.ones_like(clean))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_tokens_padded_on_the_left(stories: Any) -> None:
    tokenizer = stories.tokenizer
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        padding = torch.full((1, 3), tokenizer.pad_token_id)
        tokens = torch.cat([padding, torch.full((1, 4), 7)], dim=1)
        with masked(stories, ones(stories), ablation="zero"):
            with refused(
                "tokens start with padding: give prompts of one length per batch, unpadded"
            ):
                stories(tokens)
    finally:
        tokenizer.padding_side = side


@each_class
def test_generation(name: str) -> None:
    model = model_zoo.load(name)
    with masked(model, ones(model), ablation="zero"):
        for generate in ("generate", "generate_stream", "hf_generate"):
            if hasattr(model, generate):
                with refused("generate is not supported inside masked: its prompts grow"):
                    getattr(model, generate)(model_zoo.tokens(model), max_new_tokens=2)


# -------------------------------------------------------------------------------- the model's state


@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-opt"])
def test_active_dropout(name: str) -> None:
    """As one module outside of the Bridge's tree (GPT-2), or as a rate in a block (OPT)."""
    model = model_zoo.build(name)
    if name == "bridge-gpt2":
        for module in dropouts(model):
            module.p = 0.0
        model.original_model.transformer.drop.p = 0.1
    assert dropouts(model)
    model.train()
    with masked(model, ones(model), ablation="zero"):
        with refused("dropout is active…training mode…Call model.eval() first"):
            model(model_zoo.tokens(model))
        model.eval()
        model(model_zoo.tokens(model))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", ["fit", "evaluate", "masked", "means"])
def test_active_dropout_is_refused_before_any_run(how: str, monkeypatch: Any) -> None:
    model = model_zoo.build("bridge-gpt2").train()
    task, graph = model_zoo.pairs(model, 30), EdgeGraph.from_model(model)
    calls = {
        "fit": lambda: EdgePruner(9, progress=False).fit(model, task),
        "evaluate": lambda: evaluate(model, Circuit.top(graph, ones(model), 9), task),
        "masked": lambda: enter(model, ones(model), corrupted=model_zoo.tokens(model)),
        "means": lambda: enter(
            model, ones(model), ablation="mean", prompts=model_zoo.tokens(model)
        ),
    }

    def run(*_: Any, **__: Any) -> None:
        pytest.fail("a run with dropout")

    monkeypatch.setattr(model, "forward", run)
    with refused("dropout is active…training mode…Call model.eval() first"):
        calls[how]()


@each_class
def test_training_mode_without_dropout(name: str) -> None:
    model = model_zoo.build(name)
    for module in dropouts(model):
        module.p = 0.0
    expected = model(model_zoo.tokens(model))
    model.train()
    with masked(model, ones(model), ablation="zero"):
        actual = model(model_zoo.tokens(model))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@each_class
def test_hooks_that_would_be_lost(name: str) -> None:
    model = model_zoo.build(name)

    def hook(tensor: Tensor, hook: Any) -> None: ...

    for point in ("blocks.1.attn.hook_z", "blocks.0.hook_resid_pre", "blocks.0.attn.hook_q"):
        for is_permanent in (False, True):
            model.hook_dict[point].add_hook(hook, is_permanent=is_permanent)
            with refused(f"hooks of your own on…{point}…would be lost. Remove them first"):
                enter(model, ones(model), ablation="zero")
            model.reset_hooks(including_permanent=True)
        with masked(model, ones(model), ablation="zero"):
            with refused(f"hooks of your own on…{point}…would be lost. Remove them first") as told:
                model.run_with_hooks(model_zoo.tokens(model), fwd_hooks=[(point, hook)])
            assert "after leaving masked: reset_hooks inside" in str(told.value)
            model(model_zoo.tokens(model))


def test_a_hook_before_a_norm_after_attention() -> None:
    """The masked run has that norm's output from the heads."""
    model = model_zoo.load("bridge-gemma2")
    point = "blocks.0.attn.hook_out"
    with masked(model, ones(model), ablation="zero"), refused(f"hooks of your own on {point}"):
        model.run_with_hooks(model_zoo.tokens(model), fwd_hooks=[(point, lambda x, hook: x + 1)])


@each_class
def test_one_context_inside_another(name: str) -> None:
    model = model_zoo.load(name)
    with masked(model, ones(model), ablation="zero"):
        with refused("masked already: leave that context before entering another"):
            enter(model, ones(model), ablation="zero")
        model(model_zoo.tokens(model))
    with masked(model, ones(model), ablation="zero"):
        model(model_zoo.tokens(model))


@each_class
def test_one_shared_attention_input(name: str) -> None:
    model = model_zoo.build(name)
    model.set_use_attn_in(True)
    with refused("use_attn_in is on…Call model.set_use_attn_in(False) first"):
        enter(model, ones(model), ablation="zero")


@each_class
@pytest.mark.parametrize("points", ["all", "attn.hook_q", "attn.hook_z", "hook_resid_pre"])
def test_hooks_removed_inside(name: str, points: str) -> None:
    model = model_zoo.build(name)
    with masked(model, ones(model), corrupted=model_zoo.tokens(model, seed=1)):
        if points == "all":
            model.reset_hooks()
        else:
            model.hook_dict[f"blocks.1.{points}"].remove_hooks()
        with refused("removed inside the context", RuntimeError):
            model(model_zoo.tokens(model))
    model(model_zoo.tokens(model))


# ------------------------------------------------------------------------------ models that do not
# fit


@pytest.mark.parametrize("given", [nn.Linear(2, 2), "gpt2", None], ids=lambda x: type(x).__name__)
def test_not_a_transformer_lens_model(given: Any) -> None:
    with refused(
        "expected a HookedTransformer or a TransformerBridge, got "
        f"{type(given).__name__}…boot_transformers",
        TypeError,
    ):
        EdgeGraph.from_model(given)
    with refused("expected a HookedTransformer or a TransformerBridge", TypeError):
        enter(given, torch.ones(3), ablation="zero")


def bridge(config: transformers.PretrainedConfig, name: str, **options: Any) -> Any:
    """A TransformerBridge around a tiny random model that the zoo has not."""
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model_zoo.randomise(model, 0)
    return model_zoo.build_bridge_from_module(
        model, type(model).__name__, hf_config=config, model_name=name
    )


def scaled_residuals() -> Any:
    """Granite multiplies what a block adds: the stream is no sum of its outputs. Its configuration
    says so, and it would be refused by that; here it does not.
    """
    sizes = model_zoo._SIZES | {"num_key_value_heads": 2}
    model = bridge(transformers.GraniteConfig(**sizes, residual_multiplier=0.22), "tiny-granite")
    model.cfg.residual_multiplier = 1.0
    return model


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_stream_that_is_no_sum(training: bool) -> None:
    model = scaled_residuals().train(training)
    graph = EdgeGraph(n_layers=2, n_heads=4, n_kv_heads=2)
    for _ in range(2):  # not only the first time
        with refused(
            "tiny-granite: its residual stream is not the sum of its input, heads and MLPs (with "
            "every edge kept the logits are off by…so it is refused",
            NotImplementedError,
        ):
            enter(model, torch.ones(graph.n_edges), ablation="zero")
    model(model_zoo.tokens(model))


@each_class
def test_a_fresh_model_that_gives_nan(name: str) -> None:
    model = model_zoo.build(name)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    with refused("gives NaN or infinite logits on any tokens: check its weights and dtype"):
        enter(model, ones(model), ablation="zero")


def test_heads_whose_keys_come_from_elsewhere() -> None:
    """A model whose attention looks at hook_k and uses the keys of the plain run all the same
    would pass with every edge kept.
    """
    model = model_zoo.build("bridge-llama")
    attention = model.blocks[1].attn
    forward = attention.forward
    keys: list[torch.Tensor] = []

    def of_the_plain_run(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        keys.append(output)  # the plain run, that on corrupted prompts, then masked ones
        return output if len(keys) < 3 else keys[0]

    def with_keys_of_its_own(*args: Any, **kwargs: Any) -> Any:
        point = model.hook_dict["blocks.1.attn.hook_k"]
        handle = point.register_forward_hook(of_the_plain_run)
        try:
            return forward(*args, **kwargs)
        finally:
            handle.remove()

    attention.__dict__["forward"] = with_keys_of_its_own
    with refused(
        "its heads or MLPs do not read what their edges carry (with every edge into them cut the "
        "logits are off by…so it is refused",
        NotImplementedError,
    ):
        enter(model, ones(model), ablation="zero")


def test_latent_attention() -> None:
    config = transformers.DeepseekV3Config(
        vocab_size=model_zoo.VOCAB,
        **{"hidden_size": 20, "intermediate_size": 28, "moe_intermediate_size": 8},
        **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
        **{"v_head_dim": 8, "max_position_embeddings": model_zoo.N_CTX, "pad_token_id": None},
    )
    with refused(
        "tiny-deepseek is not supported: multi-head latent attention…its keys and values come",
        NotImplementedError,
    ):
        EdgeGraph.from_model(bridge(config, "tiny-deepseek"))


def test_gated_queries() -> None:
    model = model_zoo.build("bridge-gpt2")
    model.cfg.gated_q_proj = True
    with refused("gpt2 is not supported: its query projections are gated", NotImplementedError):
        EdgeGraph.from_model(model)


def test_blocks_without_attention() -> None:
    config = transformers.MambaConfig(
        vocab_size=model_zoo.VOCAB, hidden_size=16, num_hidden_layers=1
    )
    with refused("tiny-mamba is not supported: its blocks have no attention", NotImplementedError):
        EdgeGraph.from_model(bridge(config, "tiny-mamba"))


def test_a_hook_point_that_does_not_fire(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bloom's MLP reads what TransformerLens does not hand out."""
    monkeypatch.delitem(refusals.BRIDGED, "BloomForCausalLM")
    config = transformers.BloomConfig(
        vocab_size=model_zoo.VOCAB, hidden_size=16, n_layer=1, n_head=2
    )
    model = bridge(config, "tiny-bloom")
    with refused(
        "tiny-bloom: its hook point blocks.0.hook_mlp_in does not fire", NotImplementedError
    ):
        enter(model, ones(model), ablation="zero")


def test_rates_of_dropout_held_in_modules() -> None:
    """Falcon keeps a module under the name that other models give a number."""
    sizes = {"vocab_size": model_zoo.VOCAB, "hidden_size": 16, "num_hidden_layers": 1}
    config = transformers.FalconConfig(**sizes, num_attention_heads=2, alibi=False)
    model = bridge(config, "tiny-falcon")
    with torch.no_grad(), masked(model, ones(model), ablation="zero"):
        actual = model(model_zoo.tokens(model))
    torch.testing.assert_close(actual, model(model_zoo.tokens(model)), atol=1e-4, rtol=0)
