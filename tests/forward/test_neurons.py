"""Gates on neurons: held to brute force, which changes each source's output by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import brute_force as bf
from support import model_zoo
from torch import Tensor

from tl_edgeprune import (
    Circuit,
    Constants,
    EdgeGraph,
    EdgePruner,
    ExactBudget,
    Lagrangian,
    Neurons,
    Penalty,
    evaluate,
    masked,
)
from tl_edgeprune.attribution.mask_gradient import gate_scores
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.forward.recompute import RecomputedModel
from tl_edgeprune.objectives import kl
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.training import gate_group
from tl_edgeprune.training.trainer import Trainer

KINDS = ("mlp", "dimensions")
HOOKED = {"hooked-llama-gqa", "hooked-pythia"} & {*model_zoo.ARCHITECTURES}
QUICK = {"bridge-gpt2", "bridge-llama-gqa", "bridge-pythia", "native-no-norm"}
POST_NORM = ("gemma2", "gemma3", "olmo2")
NO_HIDDEN = ("mixtral", "attn-only")
MODEL = "hooked-gpt2-lnpre" if model_zoo.HookedTransformer is not None else "bridge-gpt2"
CASES = [
    pytest.param(name, kind, marks=[] if name in (HOOKED or QUICK) else [pytest.mark.slow])
    for name in model_zoo.ARCHITECTURES
    for kind in KINDS
    if kind == "dimensions" or not name.endswith((*NO_HIDDEN, *POST_NORM))
]


def places(graph: EdgeGraph, kind: str) -> list[str]:
    return [s for s in graph.sources if kind == "dimensions" or s.startswith("m")]


def shape_of(model: Any, kind: str) -> tuple[int, int]:
    width = model.cfg.d_model if kind == "dimensions" else model.blocks[0].mlp.W_out.shape[0]
    return len(places(EdgeGraph.from_model(model), kind)), width


def with_hidden(model: Any, seen: dict[str, Tensor], run: Callable[[], Tensor]) -> Tensor:
    """What `run` gives, and every MLP's hidden activations in it into `seen`."""
    with ExitStack() as undo:
        for layer in range(model.cfg.n_layers):
            point = model.hook_dict[f"blocks.{layer}.mlp.hook_post"]
            point.add_hook(lambda h, hook, layer=layer: seen.__setitem__(f"m{layer}", h))
            undo.callback(point.remove_hooks)
        return run()


def naive(model: Any, clean: Tensor, corrupted: Tensor, mask: Tensor, gates: Tensor) -> Tensor:
    """Each source's output changed by hand: an MLP's by what its removed neurons' output weights
    make of their differences, h W_out being a sum over neurons.
    """
    graph = EdgeGraph.from_model(model)
    kind = "mlp" if len(gates) == graph.n_layers else "dimensions"
    row_of = {name: row for row, name in enumerate(places(graph, kind))}
    h, h_ref = {}, {}
    if kind == "mlp":
        with_hidden(model, h_ref, lambda: model(corrupted))
    replacement = bf.source_outputs(model, corrupted)

    def gated(name: str, y: Tensor) -> Tensor:
        if kind == "dimensions":
            return replacement[name] + gates[row_of[name]] * (y - replacement[name])
        if name not in row_of:
            return y
        weight = model.blocks[row_of[name]].mlp.W_out.detach()
        removed = (1 - gates[row_of[name]]) * (h[name] - h_ref[name])
        return y - removed @ weight

    edges = dict(zip(graph.edges, mask.unbind(), strict=True))

    def run() -> Tensor:
        return bf.masked_logits(model, clean, edges, replacement, gated=gated)

    return with_hidden(model, h, run) if kind == "mlp" else run()


@pytest.mark.parametrize(("name", "kind"), CASES)
@settings(max_examples=2)
@given(seed=st.integers(0, 2**16))
def test_gates_are_their_definition(name: str, kind: str, seed: int) -> None:
    """Logits, and the gradients of edges' masks and of gates."""
    dtype = model_zoo.dtypes(name)[-1]
    model, tolerance = model_zoo.load(name, dtype), model_zoo.tolerance(name, dtype)
    graph = EdgeGraph.from_model(model)
    clean, corrupted = model_zoo.tokens(model, seed=seed), model_zoo.tokens(model, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = uniform(graph.n_edges).requires_grad_()
    gates = uniform(*shape_of(model, kind)).requires_grad_()
    weights = torch.randn(*clean.shape, model_zoo.VOCAB, generator=generator, dtype=dtype)
    with masked(model, mask, corrupted=corrupted, neurons=gates):
        logits = model(clean)
    expected = naive(model, clean, corrupted, mask, gates)
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
    found, wanted = (
        torch.autograd.grad((x * weights).sum(), (mask, gates)) for x in (logits, expected)
    )
    for actual, slope in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            actual, slope, atol=10 * tolerance * float(slope.abs().max()), rtol=0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gates_are_finite_differences(kind: str) -> None:
    torch.manual_seed(0)
    model = model_zoo.load("native-no-norm", torch.float64)
    mask = torch.rand(EdgeGraph.from_model(model).n_edges, dtype=torch.float64)
    gates = torch.rand(shape_of(model, kind), dtype=torch.float64, requires_grad=True)
    step = 1e-6 * torch.randn_like(gates)
    with masked(model, mask, corrupted=model_zoo.tokens(model, seed=1), neurons=gates):
        model(model_zoo.tokens(model)).logsumexp(-1).sum().backward()
    ends = []
    with torch.no_grad():
        for at in (gates + step, gates - step):
            with masked(model, mask, corrupted=model_zoo.tokens(model, seed=1), neurons=at):
                ends.append(model(model_zoo.tokens(model)).logsumexp(-1).sum())
    slope = (ends[0] - ends[1]) / 2
    torch.testing.assert_close((gates.grad * step).sum(), slope, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean", "mean-positional"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_open_gates_are_the_model_and_closed_ones_cut_their_edges(kind: str, ablation: Any) -> None:
    """Under zero ablation an MLP without neurons keeps its output bias, which is no neuron's."""
    model = model_zoo.load(MODEL)
    graph, tokens = EdgeGraph.from_model(model), model_zoo.tokens(model)
    given: dict[str, Any] = {"ablation": ablation}
    if ablation == "counterfactual":
        given["corrupted"] = model_zoo.tokens(model, seed=1)
    elif ablation != "zero":
        given["prompts"] = model_zoo.tokens(model, seed=1)
    gates, kept = torch.ones(shape_of(model, kind)), torch.ones(graph.n_edges)
    whole = model(tokens)
    with masked(model, kept, neurons=gates, **given):
        torch.testing.assert_close(model(tokens), whole, atol=1e-4, rtol=0)
    gates[places(graph, kind).index("m1")] = 0
    without = torch.tensor([not edge.startswith("m1->") for edge in graph.edges])
    with masked(model, kept, neurons=gates, **given):
        found = model(tokens)
    with masked(model, without, **given):
        expected = model(tokens)
    if (kind, ablation) == ("mlp", "zero"):
        bias = model.blocks[1].mlp.b_out
        assert bias.abs().max() > 0.1
        expected = bf.masked_logits(
            model,
            tokens,
            {},
            bf.zero_outputs(model),
            gated=lambda name, y: bias.expand_as(y) if name == "m1" else y,
        )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_gates_are_the_same_in_every_span(kind: str) -> None:
    model = model_zoo.load(MODEL)
    graph = EdgeGraph.from_model(model)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    mask, gates = torch.rand(graph.n_edges), torch.rand(shape_of(model, kind))
    with masked(model, mask, corrupted=corrupted, neurons=gates):
        expected = model(clean)
    spanned = graph.at(["A", "B"])
    values = dict(zip(graph.edges, mask.tolist(), strict=True))
    everywhere = torch.tensor([values[edge.partition("@")[0]] for edge in spanned.edges])
    spans = torch.randint(2, clean.shape)
    with masked(model, everywhere, corrupted=corrupted, neurons=gates, graph=spanned, spans=spans):
        torch.testing.assert_close(model(clean), expected, atol=1e-4, rtol=1e-4)


def test_scores_of_gates_are_the_gradient_along_their_path() -> None:
    """Held to one masked forward a point, without the shortcut for whole masks."""
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 3)
    for kind in KINDS:
        with MaskedModel.attach(model, None, kind) as run:
            found = gate_scores(run, Targets(run, task), kl, steps=2, batch_size=1)
        total = torch.zeros_like(found)
        for batch in task.batches(1):
            full = model(batch.clean)[:, -1:].detach()
            for at in (0.25, 0.75):
                gates = torch.full(found.shape, at, requires_grad=True)
                kept = torch.ones(EdgeGraph.from_model(model).n_edges)
                with masked(model, kept, corrupted=batch.corrupted, neurons=gates):
                    loss = kl(model(batch.clean)[:, -1:], full, batch).sum()
                total -= torch.autograd.grad(loss, gates)[0] / 6
        size = float(total.abs().max())
        torch.testing.assert_close(found, total, atol=1e-4 * size, rtol=0)


# ---------------------------------------------------------------------------------------- training


def pruner(**changes: Any) -> EdgePruner:
    settings: dict[str, Any] = {"n_edges": 30, "steps": 5, "batch_size": 4, "progress": False}
    return EdgePruner(**(settings | {"neurons": "mlp", "n_neurons": 20} | changes))


def planted(model: Any, keep: int = 4) -> set[str]:
    """Make a few neurons of every MLP matter, the others nearly not."""
    names: set[str] = set()
    generator = torch.Generator().manual_seed(0)
    for layer, block in enumerate(model.blocks):
        out = block.mlp.out.original_component.weight  # [neuron, d_model]
        chosen = torch.randperm(len(out), generator=generator)[:keep]
        scale = torch.full((len(out), 1), 0.02).index_fill(0, chosen, 1.0)
        with torch.no_grad():
            out.mul_(scale)
        names |= {f"m{layer}.n{int(unit)}" for unit in chosen}
    return names


def test_training_finds_the_neurons_that_matter() -> None:
    """Of 288 neurons 12 are planted, some of which these few prompts hardly use; half of them would
    be found by chance once in a million runs.
    """
    model = model_zoo.build("bridge-gpt2")
    names, task = planted(model), model_zoo.pairs(model)
    graph = EdgeGraph.from_model(model)
    result = pruner(n_edges=graph.n_edges - 1, n_neurons=len(names), steps=20).fit(model, task)
    assert len(names & {*result.neurons.names}) >= len(names) / 2

    def kl_of(neurons: Neurons) -> float:
        found = evaluate(model, result.circuit, task, neurons=neurons)
        assert (found.n_neurons, found.n_neurons_full) == (neurons.n_neurons, 288)
        return found.kl

    assert kl_of(result.neurons) < 0.5 * kl_of(Neurons(graph, "mlp", ~result.neurons.mask))


SETTINGS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "dimensions": {"neurons": "dimensions", "node_masks": True, "ablation": "zero"},
    "lagrangian": {"neuron_controller": Lagrangian(), "ablation": "mean"},
}


@pytest.mark.parametrize(
    "name", ["mlp", "dimensions", pytest.param("lagrangian", marks=pytest.mark.slow)]
)
def test_resuming_gives_the_bits_of_a_run_never_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path, settings = model_zoo.load(MODEL), tmp_path / "run.safetensors", SETTINGS[name]
    task = model_zoo.pairs(model, 4)
    whole = pruner(**settings).fit(model, task)
    assert whole.neurons.n_neurons == 20 and whole.circuit.n_edges == 30
    assert {"neurons", "neuron_target"} <= {*whole.history[-1]}
    note = Trainer._record

    def stop(self: Trainer, step: int, *figures: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt
        note(self, step, *figures)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_record", stop)
        pruner(**settings, checkpoint=path, checkpoint_every=1).fit(model, task)
    rest = pruner(**settings).fit(model, task, resume=path)
    assert rest.log_alpha.equal(whole.log_alpha)
    assert rest.neuron_log_alpha.equal(whole.neuron_log_alpha)
    with pytest.raises(ValueError, match="its settings"):
        pruner(**settings | {"n_neurons": 21}).fit(model, task, resume=path)


def test_one_run_ranks_for_every_number_of_neurons() -> None:
    model = model_zoo.load(MODEL)
    result = pruner(n_edges=None, n_neurons=None).fit(model, model_zoo.pairs(model))
    assert {result.top_neurons(k).n_neurons for k in (1, 7, 30)} == {1, 7, 30}
    with pytest.raises(ValueError, match=r"use result.top_neurons\(k\)"):
        _ = result.neurons
    plain = pruner(neurons=None, n_neurons=None, steps=1).fit(model, model_zoo.pairs(model))
    assert plain.neurons is None and plain.neuron_log_alpha is None
    with pytest.raises(ValueError, match="no gates on neurons"):
        plain.top_neurons(3)


def test_all_neurons_are_none_removed() -> None:
    model = model_zoo.load(MODEL)
    graph, task = EdgeGraph.from_model(model), model_zoo.pairs(model, 4)
    circuit = Circuit.top(graph, torch.rand(graph.n_edges), 40)
    every = Neurons(graph, "mlp", torch.ones(shape_of(model, "mlp"), dtype=torch.bool))
    found = evaluate(model, circuit, task, neurons=every)
    expected = evaluate(model, circuit, task)
    assert found.kl == pytest.approx(expected.kl, rel=1e-4) and expected.n_neurons is None
    assert not any(point.has_hooks() for point in model.hook_dict.values())


# -------------------------------------------------------------------------- Neurons, and its files


def test_neurons_have_names_and_files(tmp_path: Path) -> None:
    graph = EdgeGraph(n_layers=2, n_heads=2, n_kv_heads=2)
    names = ("m0.n3", "m1.n0", "m1.n4")
    neurons = Neurons.from_names(graph, "mlp", names, 5, task="x")
    assert neurons.names == names and "m1.n4" in neurons and "m1.n1" not in neurons
    assert (len(neurons), neurons.n_neurons_full) == (3, 10)
    assert neurons.counts == {"m0": 1, "m1": 2} and repr(neurons) == "Neurons(mlp: 3 of 10)"
    neurons.save(tmp_path / "n.json")
    loaded = Neurons.load(tmp_path / "n.json")
    assert loaded == neurons and loaded.metadata == {"task": "x"}
    assert hash(loaded) == hash(neurons)
    of_sources = Neurons.from_names(graph, "dimensions", ["input.d1", "a1.h0.d2"], 3)
    assert of_sources.names == ("input.d1", "a1.h0.d2") and of_sources.mask.shape == (7, 3)
    of_sources.save(tmp_path / "d.json")
    assert Neurons.load(tmp_path / "d.json") == of_sources != neurons
    best = Neurons.top(graph, "mlp", torch.arange(10.0).view(2, 5), 2)
    assert best.names == ("m1.n3", "m1.n4")


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    graph, path = EdgeGraph(n_layers=2, n_heads=2, n_kv_heads=2), tmp_path / "n.json"
    Neurons.from_names(graph, "mlp", ["m0.n3"], 5).save(path)
    document = json.loads(path.read_text())
    for change, message in (
        ({"kind": "tl_edgeprune circuit"}, "is no file of neurons"),
        ({"format": 9}, "has format 9"),
        ({"kept": {"m0": [5]}}, "is damaged: .*no neuron 'm0.n5'"),
        ({"neurons": "heads"}, "is damaged"),
        ({"n_neurons": 2}, "says 2 neurons and lists 1"),
    ):
        path.write_text(json.dumps(document | change))
        with pytest.raises(ValueError, match=message):
            Neurons.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Neurons.load(path)


# ------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neurons": "heads"}, "neurons='heads': expected 'mlp'"),
        ({"neurons": None}, "need neurons='mlp' or 'dimensions'"),
        ({"neurons": None, "n_neurons": None, "neuron_controller": ExactBudget()}, "need neurons="),
        ({"n_neurons": None, "neuron_controller": ExactBudget()}, "without n_neurons: "),
        ({"n_neurons": 0}, "n_neurons=0: expected at least one"),
        ({"recompute": True}, "recompute=True is not supported"),
        ({"ablation": "optimal"}, "ablation of constants is not supported"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruner(**changes)


def test_runs_that_cannot_have_neurons_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_zoo.load(MODEL)
    graph, task = EdgeGraph.from_model(model), model_zoo.pairs(model)
    corrupted, kept = model_zoo.tokens(model, seed=1), torch.ones(graph.n_edges)
    monkeypatch.setattr(Targets, "__init__", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="n_neurons=100000: expected a whole number from 1 to"):
        pruner(n_neurons=100_000).fit(model, task)
    with pytest.raises(ValueError, match="scores of edges cannot hold gates"):
        pruner().scores(model, task, "edge-pruning")
    for gates, message in (
        (torch.ones(5, 7), r"gates of shape \(5, 7\): expected"),
        (torch.ones(graph.n_layers, 7), r"have shape \(\d, 7\), expected"),
        (torch.full(shape_of(model, "mlp"), float("nan")), "hold NaN"),
        (torch.ones(shape_of(model, "mlp"), dtype=torch.long), "torch.int64, expected floats"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            masked(model, kept, corrupted=corrupted, neurons=gates),
        ):
            pass
    other = Neurons(replace(graph, n_layers=9), "mlp", torch.ones(9, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="another model or graph"):
        evaluate(model, Circuit(graph, kept.bool()), task, neurons=other)
    with (
        pytest.raises(NotImplementedError, match="takes no gates on neurons"),
        RecomputedModel.attach(model, None, "mlp"),
    ):
        pass
    with MaskedModel.attach(model) as run:
        reference = run.reference("zero")
        with pytest.raises(ValueError, match="attach it with neurons"):
            run(corrupted, kept, reference, neurons=torch.ones(shape_of(model, "mlp")))
    constants = Constants(graph, torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1))
    with (
        MaskedModel.attach(model, None, "mlp") as run,
        pytest.raises(ValueError, match="none are learned for hidden neurons"),
    ):
        run.reference(constants)
    with pytest.raises(ValueError, match=r"mask of neurons of kind 'mlp' is bool \[\d, units\]"):
        Neurons(graph, "mlp", torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(KeyError, match=r"expected names such as m0.n0, with numbers below 4"):
        Neurons.from_names(graph, "mlp", ["m0.d1"], 4)


def test_mlps_without_one_layer_of_neurons_are_refused() -> None:
    for name in ("bridge-mixtral", "hooked-mixtral"):
        if name in model_zoo.ARCHITECTURES:
            with pytest.raises(NotImplementedError, match="a mixture of experts"):
                pruner().fit(model_zoo.load(name), model_zoo.pairs(model_zoo.load(name)))
    model = model_zoo.load("native-attn-only")
    with pytest.raises(ValueError, match="needs MLPs, and this model has none"):
        pruner().fit(model, model_zoo.pairs(model))
    assert (
        pruner(neurons="dimensions", steps=1).fit(model, model_zoo.pairs(model)).neurons is not None
    )


def test_files_of_eap_ig_with_neurons_say_why_they_are_not_read(tmp_path: Path) -> None:
    graph, path = EdgeGraph(n_layers=1, n_heads=2, n_kv_heads=2), tmp_path / "c.json"
    Circuit.from_edges(graph, ["input->m0"]).to_mib(path, d_model=4)
    document = json.loads(path.read_text())
    document["nodes"]["m0"]["neurons"] = [True, False, True, True]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="is a circuit of neurons.*cuts no edge"):
        Circuit.from_mib(path, graph)


def test_hard_neurons_have_their_number_under_a_price_too(monkeypatch):
    sizes, hard = [], gate_group.top_gates

    def watched(shifted, ranking, count):
        sizes.append(count)
        return hard(shifted, ranking, count)

    monkeypatch.setattr(gate_group, "top_gates", watched)
    model = model_zoo.load("bridge-gpt2")
    settings = {"neurons": "mlp", "n_neurons": 7, "neuron_controller": Penalty(1.0), "steps": 5}
    EdgePruner(20, progress=False, **settings).fit(model, model_zoo.pairs(model, 2))
    assert sizes == [20, 7, 20, 7]  # edges, neurons
