"""Scores of the gradient methods follow their definitions, written out by brute force.

A definition here takes the gradient at every destination's own input, in a run whose residual
inputs are summed source by source, and contracts it with clean less corrupted outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import brute_force as bf
from support import model_zoo
from torch import Tensor

from tl_edgeprune import discover, models, tasks
from tl_edgeprune.forward.forward_pass import HeldSources
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.objectives import mean_squared_error
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.runs.totals import each_target_batch
from tl_edgeprune.tasks.stream import TaskStream

MODEL = "bridge-gpt2"
KINDS = (MODEL, "bridge-gemma2")  # the second with shared keys, and norms after heads and MLP
STEPS = 2
Change = Callable[[str, Tensor], Tensor]  # (source, its output) -> what destinations read of it
Outputs = dict[str, Tensor]


def test_eap_is_difference_times_gradient_by_brute_force() -> None:
    """-d loss/dz at z = 1, with the gradient taken through brute-force path patching."""
    model = model_zoo.load(MODEL, torch.float64)
    task = model_zoo.pairs(model, 4)
    scores = discover(model, task, method="eap")
    expected = torch.zeros(scores.graph.n_edges, dtype=torch.float64)
    for clean, corrupted in zip(task.clean, task.corrupted, strict=True):
        mask = {
            e: torch.ones((), dtype=torch.float64, requires_grad=True) for e in scores.graph.edges
        }
        replacement = {k: v.detach() for k, v in bf.source_outputs(model, corrupted[None]).items()}
        logits = bf.masked_logits(model, clean[None], mask, replacement)[0, -1]
        (logits[3] - logits[5]).backward()
        expected += torch.stack([z.grad for z in mask.values()]) / len(task)
    torch.testing.assert_close(scores.tensor.double(), expected, atol=1e-5, rtol=1e-4)


def test_mask_ig_follows_its_definition() -> None:
    model, steps = model_zoo.load(MODEL), 3
    task = model_zoo.pairs(model, 2)
    scores = discover(model, task, method="mask-ig", steps=steps, objective="logit-diff")
    expected = torch.zeros(scores.graph.n_edges)
    for clean, corrupted in zip(task.clean, task.corrupted, strict=True):
        theirs = detached_outputs(model, corrupted)
        for step in range(steps):
            z = {e: torch.tensor((step + 0.5) / steps, requires_grad=True) for e in bf.edges(model)}
            logits = bf.masked_logits(model, clean[None], z, theirs)[0, -1]
            (logits[3] - logits[5]).backward()
            expected += torch.stack([value.grad for value in z.values()]) / (steps * len(task))
    torch.testing.assert_close(scores.tensor, expected, atol=2e-4, rtol=2e-3)


# ---------------------------------------------------------- gradients at destinations' own inputs


def detached_outputs(model: Any, tokens: Tensor) -> Outputs:
    return {name: y.detach() for name, y in bf.source_outputs(model, tokens[None]).items()}


def input_gradients(model: Any, tokens: Tensor, change: Change) -> Outputs:
    """d logit difference / d input of each destination, the destinations reading changed outputs.

    A change that gives a constant lets no gradient into that source.
    """
    written: Outputs = {}
    inputs: Outputs = {}
    prefixes, biases = bf.reads(model), bf.output_biases(model)

    def write(source: str, y: Tensor) -> None:
        written[source] = change(source, y)

    def read(destination: str, own: Tensor) -> Tensor:
        x = torch.zeros_like(own, requires_grad=True)
        for layer in range(bf.biases_before(model, destination)):
            x = x + biases[layer]
        for source in prefixes[destination]:
            x = x + written[source]
        x.retain_grad()
        inputs[destination] = x
        return x

    logits = bf.run(model, tokens[None], read, write)[0, -1]
    (logits[3] - logits[5]).backward()
    model.zero_grad()
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in inputs.items()}


def contracted(model: Any, gradients: Outputs, clean: Outputs, corrupted: Outputs) -> Tensor:
    """(clean - corrupted) output of an edge's source . gradient at its destination."""
    pairs = [edge.split("->") for edge in bf.edges(model)]
    return torch.stack([((clean[s] - corrupted[s]) * gradients[d]).sum() for s, d in pairs])


def unchanged(source: str, y: Tensor) -> Tensor:
    return y


def constant(values: Outputs) -> Change:
    return lambda source, y: values.get(source, y)


def dropped(sources: list[str]) -> Change:
    return lambda source, y: y.detach() if source in sources else y


def between(clean: Outputs, corrupted: Outputs, sources: list[str], share: float) -> Outputs:
    return {s: share * clean[s] + (1 - share) * corrupted[s] for s in sources}


def layers_of_sources(model: Any) -> list[list[str]]:
    """Each layer's heads and MLP."""
    return [
        [s for s in bf.sources(model) if s == f"m{layer}" or s.startswith(f"a{layer}.")]
        for layer in range(model.cfg.n_layers)
    ]


# ------------------------------------------------------------------------------- the definitions

Run = tuple[str, Change]  # (which prompt, what destinations read)


def eap_ig_runs(model: Any, clean: Outputs, corrupted: Outputs) -> Iterator[Run]:
    """The input on the way from corrupted to clean."""
    for step in range(1, STEPS + 1):
        yield "clean", constant(between(clean, corrupted, ["input"], step / STEPS))


def eap_ig_activations_runs(model: Any, clean: Outputs, corrupted: Outputs) -> Iterator[Run]:
    """One group of outputs on the way, all others as they come."""
    groups = [["input"]]
    for layer in layers_of_sources(model):
        groups += [[s for s in layer if ".h" in s], [s for s in layer if ".h" not in s]]
    for group in groups:
        for step in range(1, STEPS + 1):
            yield "clean", constant(between(clean, corrupted, group, step / STEPS))


def clean_corrupted_runs(model: Any, clean: Outputs, corrupted: Outputs) -> Iterator[Run]:
    """Both prompts as they are."""
    yield "clean", unchanged
    yield "corrupted", unchanged


DEFINITIONS = {
    "eap-ig": eap_ig_runs,
    "eap-ig-activations": eap_ig_activations_runs,
    "clean-corrupted": clean_corrupted_runs,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", DEFINITIONS)
def test_gradients_are_averaged_over_runs(method: str, kind: str) -> None:
    """Hanna et al. 2024 and EAP-IG's code: their mean, against clean less corrupted outputs."""
    model = model_zoo.load(kind)
    task = model_zoo.pairs(model, 2)
    steps = {} if method == "clean-corrupted" else {"steps": STEPS}
    scores = discover(model, task, method=method, objective="logit-diff", **steps)
    expected = torch.zeros(scores.graph.n_edges)
    for clean, corrupted in zip(task.clean, task.corrupted, strict=True):
        ours, theirs = detached_outputs(model, clean), detached_outputs(model, corrupted)
        prompts = {"clean": clean, "corrupted": corrupted}
        runs = list(DEFINITIONS[method](model, ours, theirs))
        for prompt, change in runs:
            gradients = input_gradients(model, prompts[prompt], change)
            expected += contracted(model, gradients, ours, theirs) / (len(runs) * len(task))
    assert_equal_up_to_rounding(scores.tensor, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_graddrop_is_the_mean_magnitude_over_dropped_layers(kind: str) -> None:
    """Kramár et al. 2024, AtP*: no gradient through one layer's outputs, each in turn."""
    model = model_zoo.load(kind)
    task = model_zoo.pairs(model, 2)
    scores = discover(model, task, method="eap-graddrop", batch_size=1)
    expected = torch.zeros(scores.graph.n_edges)
    layers = layers_of_sources(model)
    for clean, corrupted in zip(task.clean, task.corrupted, strict=True):
        ours, theirs = detached_outputs(model, clean), detached_outputs(model, corrupted)
        for layer in layers:
            gradients = input_gradients(model, clean, dropped(layer))
            expected += contracted(model, gradients, ours, theirs).abs()
    assert_equal_up_to_rounding(scores.tensor, expected / (len(layers) - 1) / len(task))


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-4 of the largest score."""
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


# ---------------------------------------------------------------------------------- the short way


@pytest.mark.parametrize("kind", [*KINDS, "bridge-pythia"])
@pytest.mark.parametrize(
    "held", [None, HeldSources(range(0, 1), 0.5), HeldSources(range(1, 5))], ids=repr
)
def test_a_mask_of_ones_gives_the_same_by_running_sums(kind: str, held: HeldSources | None) -> None:
    """Logits and mask gradient, at positions that repeat, against the reads' products."""
    model = model_zoo.load(kind, torch.float64)
    clean, corrupted = (model_zoo.tokens(model, seed=seed) for seed in (0, 1))
    positions = torch.tensor([[6, 2, 6], [5, 6, 1]])
    results = []
    with MaskedModel.attach(model) as run:
        reference = run.reference("counterfactual", corrupted=corrupted)
        contract = run.differences(clean, reference)
        for whole in (False, True):
            mask = torch.ones(run.graph.n_edges, dtype=torch.float64, requires_grad=True)
            logits = run(clean, mask, reference, positions, held, contract, whole=whole)
            (gradient,) = torch.autograd.grad(logits.square().sum(), mask)
            results.append((logits.detach(), gradient))
    for short, products in zip(*reversed(results), strict=True):
        torch.testing.assert_close(short, products, rtol=1e-5, atol=1e-5 * float(products.max()))


@pytest.mark.parametrize(
    ("n", "size", "most"), [(36, 16, 32), (34, 16, 10), (9, 4, 32), (80, 8, 32)]
)
def test_a_first_look_is_at_as_many_pairs_as_asked_for(n: int, size: int, most: int) -> None:
    """The last batch of a length may hold a pair alone: it counts as one, not as a batch."""
    model = model_zoo.load("bridge-gpt2")
    with MaskedModel.attach(model) as run:
        targets = Targets(run, model_zoo.pairs(model, n), visits=0)
        target_batches = list(each_target_batch(targets, batch_size=size, max_pairs=most))
    places = [
        place for target_batch in target_batches for place in target_batch.batch.indices.tolist()
    ]
    assert len(set(places)) == len(places) >= min(most, n)
    assert len(places) - len(target_batches[-1].batch) < most


@pytest.mark.parametrize(("objective", "runs"), [("logit-diff", 2), ("log-prob", 2), ("kl", 3)])
def test_the_full_model_runs_only_where_its_answers_are_read(objective: str, runs: int) -> None:
    """A batch costs a corrupted run and a masked one, and a clean one for the KL's targets."""
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 2).subset([0])
    discover(model, task, method="mask-ig", steps=1)  # the first time, the model is checked
    seen: list[torch.Size] = []
    point = model.hook_dict["blocks.0.ln2.hook_out"]
    point.add_hook(lambda y, hook: seen.append(y.shape))
    try:
        discover(model, task, method="mask-ig", steps=1, objective=objective)
    finally:
        point.remove_hooks()
    assert len(seen) == runs


@pytest.mark.parametrize("kind", sorted({*KINDS, "hooked-gpt2-ln"} & {*model_zoo.ARCHITECTURES}))
def test_a_recording_gives_logits_where_they_are_wanted(kind: str) -> None:
    model = model_zoo.load(kind)
    tokens, positions = model_zoo.tokens(model), torch.tensor([[6, 0], [3, 3]])
    with torch.no_grad():
        expected = model(tokens)
    with MaskedModel.attach(model) as run:
        recordings = [run.record(tokens, wanted) for wanted in (None, positions, positions[:, :0])]
    everywhere, some, none = (logits for _, logits in recordings)
    torch.testing.assert_close(everywhere, expected)
    torch.testing.assert_close(some, expected[torch.arange(2)[:, None], positions])
    assert none.numel() == 0
    for reference, _ in recordings[1:]:
        assert reference.streams.equal(recordings[0][0].streams)


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("objective", [None, "kl"])
def test_eap_refuses_an_objective_without_a_gradient(objective: str | None) -> None:
    model = models.load("tracr-xproportion")
    task = tasks.load("tracr-xproportion", model, 8)
    with pytest.raises(ValueError, match="gradient there is zero"):
        discover(model, task, method="eap", objective=objective)


RULED = [
    *("bridge-llama-gqa", "bridge-pythia"),
    *(name for name in ("hooked-gpt2-ln",) if name in model_zoo.ARCHITECTURES),
]


@pytest.mark.parametrize("name", RULED)
def test_relevance_is_eaps_gradient_through_modules_that_follow_the_rules(name: str) -> None:
    """Norms with a detached scale and activations as x * constant, put into the model itself."""
    model = model_zoo.build(name)
    task = model_zoo.pairs(model, 2)
    scores = discover(model, task, "relp")
    before = model(task.clean[0][None])
    _follow_rules(model)
    torch.testing.assert_close(model(task.clean[0][None]), before, atol=1e-4, rtol=1e-4)
    expected = torch.zeros(scores.graph.n_edges)
    for clean, corrupted in zip(task.clean, task.corrupted, strict=True):
        mask = {e: torch.ones((), requires_grad=True) for e in scores.graph.edges}
        replacement = {k: v.detach() for k, v in bf.source_outputs(model, corrupted[None]).items()}
        logits = bf.masked_logits(model, clean[None], mask, replacement)[0, -1]
        (logits[3] - logits[5]).backward()
        expected += torch.stack([z.grad for z in mask.values()]) / len(task)
    torch.testing.assert_close(scores.tensor, expected, atol=2e-4, rtol=2e-3)


UNRULED = {
    "bridge-gemma2": "blocks.0 has a norm after its parts",
    "bridge-olmo2": "blocks.0 has a norm after",
    "hooked-olmo2": "blocks.0 has a norm after attention",
    "bridge-olmo1": "blocks.0.ln2 has a norm of an unknown kind (OlmoLayerNorm)",
    "bridge-mixtral": "blocks.0.mlp is a mixture of experts",
    "hooked-mixtral": "blocks.0.mlp is no plain or gated MLP",
}


@pytest.mark.parametrize("name", sorted({*UNRULED} & {*model_zoo.BUILDERS}))
def test_relevance_is_refused_by_the_part_that_has_no_rule(name: str) -> None:
    model = model_zoo.load(name)
    with pytest.raises(NotImplementedError, match=re.escape(f"relp: {UNRULED[name]}")):
        discover(model, model_zoo.pairs(model, 2), "relp")
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def _follow_rules(model: Any) -> None:
    """Change the model's own modules: their forward passes stay, their gradients do not."""
    if not bf.is_bridge(model):
        for block in model.blocks:
            block.mlp.act_fn = _as_factor(block.mlp.act_fn)
        for norm in (model.ln_final, *(n for b in model.blocks for n in (b.ln1, b.ln2))):
            norm.weight, norm.bias, centred = norm.w, norm.b, True
            norm.forward = _constant_division(norm, centred)
        return
    for module in model.original_model.modules():
        kind = type(module).__name__
        if (
            "Norm" in kind
            and hasattr(module, "weight")
            and not hasattr(module, "original_component")
        ):
            module.forward = _constant_division(module)
        elif kind.endswith("MLP") and hasattr(module, "gate_proj"):
            module.forward = _halved_gate(module)
        elif "act" in getattr(module, "_modules", {}):
            module.act.forward = _as_factor(module.act.forward)


def _constant_division(norm: Any, centred: bool | None = None) -> Any:
    centred = isinstance(norm, torch.nn.LayerNorm) if centred is None else centred
    eps = norm.eps if centred else norm.variance_epsilon

    def forward(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if centred else x
        y = x / (x.detach().square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
        return y + norm.bias if centred else y

    return forward


def _as_factor(function: Any) -> Any:
    return lambda x: x * (function(x) / x).detach()


def _halved_gate(mlp: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        gate, up = _as_factor(mlp.act_fn)(mlp.gate_proj(x)), mlp.up_proj(x)
        halved = 0.5 * (gate * up.detach() + gate.detach() * up)
        return mlp.down_proj(halved)

    return forward


def test_a_tasks_own_objective_is_taken_where_it_has_a_gradient() -> None:
    model = model_zoo.load("bridge-gpt2")
    sets = {"right": [torch.tensor([1])] * 4, "wrong": [torch.tensor([2])] * 4}
    task = replace(
        model_zoo.pairs(model, 4), answers=(), distractors=(), objective="prob-diff", **sets
    )
    own = discover(model, task, "eap").tensor
    assert torch.equal(own, discover(model, task, "eap", objective="prob-diff").tensor)
    with pytest.raises(ValueError, match="'mean_squared_error' is smallest at the full model"):
        discover(model, task, "eap", objective=mean_squared_error)


def test_a_stream_is_refused_by_what_looks_at_every_pair() -> None:
    model = model_zoo.load("bridge-gpt2")
    task = model_zoo.pairs(model, 4)
    stream = TaskStream("s", 4, lambda places: task.subset(list(places)), "s")
    for method in ("eap", "exact", "ifr"):
        with pytest.raises(TypeError, match=f"{method} takes a Task, got a TaskStream"):
            discover(model, stream, method)
