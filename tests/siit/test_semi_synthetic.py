"""Semi-synthetic models: the circuit that they were trained to have is there, and no other is."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tl_edgeprune import Circuit, EdgeGraph, EdgePruner, discover, masked, models, roc, tasks
from tl_edgeprune.models import semi_synthetic
from tl_edgeprune.siit import EXAMPLES, CausalModel, Variable, network, training

try:
    from transformer_lens import HookedTransformer
except ImportError:  # TransformerLens 4
    HookedTransformer = None

CLASSES = ("bridge", "hooked") if HookedTransformer else ("bridge",)
NAMES = semi_synthetic.NAMES
QUICKEST = [n if n == "siit-lookup" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]


@cache
def load(name: str, cls: str = "bridge") -> Any:
    return models.load(name, cls=cls, device="cpu")


def prompts(name: str, n: int, seed: int) -> Tensor:
    return EXAMPLES[name].draw(n, torch.Generator().manual_seed(seed))


def tokens_under(model: Any, mask: Tensor, clean: Tensor, other: Tensor) -> Tensor:
    """What the model says at the last position, cut edges carrying the other prompts' outputs."""
    with torch.no_grad(), masked(model, mask, corrupted=other):
        return model(clean)[:, -1].argmax(-1)


# ----------------------------------------------------------------------------------- causal models


@pytest.mark.parametrize("name", NAMES)
def test_swapping_nothing_or_every_first_read(name):
    causal = EXAMPLES[name]
    clean, other = prompts(name, 64, 0), prompts(name, 64, 1)
    none = torch.zeros(64, len(causal.edges), dtype=torch.bool)
    assert causal.interchange(clean, other, none).equal(causal.answers(clean))
    assert causal.interchange(clean, other, ~none).equal(causal.answers(other))
    from_input = torch.tensor([edge.startswith("input->") for edge in causal.edges])
    assert causal.interchange(clean, other, none | from_input).equal(causal.answers(other))


def test_answers_by_hand():
    total = torch.tensor([[3, 2, 0, 4], [1, 0, 3, 4]])
    assert EXAMPLES["siit-sum"].answers(total).tolist() == [1, 3]
    lookup = torch.tensor([[2, 5, 0, 8, 1, 3, 0]])
    assert EXAMPLES["siit-lookup"].answers(lookup).tolist() == [8]
    branch = torch.tensor([[3, 2, 1, 2], [3, 2, 1, 0]])
    assert EXAMPLES["siit-branch"].answers(branch).tolist() == [(3 + 2) % 4, (1 + 2) % 4]


def variable(name: str = "answer", node: str = "logits", reads: tuple = ("input",)) -> Variable:
    return Variable(name, node, reads, lambda tokens: tokens[:, -1])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ((variable(reads=("nothing",)),), "an earlier variable, one of"),
        ((variable("a", "m0"), variable("b", "m0")), "used by an earlier variable"),
        ((variable("a", "m0"),), "must be at the node 'logits'"),
        ((variable("a", "a0.h0"), variable()), "no a0.h0"),
        ((variable("a", "m7"), variable()), "no m7"),
    ],
)
def test_causal_models_that_cannot_be_are_refused(variables, message):
    graph = EdgeGraph(n_layers=1, n_heads=2, n_kv_heads=2)
    with pytest.raises(ValueError, match=message):
        CausalModel("wrong", graph, 3, lambda n, generator: torch.zeros(n, 2), variables)


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("cls", CLASSES)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_what_is_trained_is_what_the_package_masks(cls, seed, share):
    """Cuts in the training's own network are those of the masked model, edge by edge."""
    name, generator = "siit-branch", torch.Generator().manual_seed(seed)
    graph, model = EXAMPLES[name].graph, load(name, cls)
    state = semi_synthetic.read_state(name)
    clean, other = prompts(name, 3, seed), prompts(name, 3, seed + 1)
    cut = torch.rand(graph.n_edges, generator=generator) < share
    _, said = network.run(state, graph, other)
    logits, _ = network.run(state, graph, clean, cut.expand(3, -1), said)
    with torch.no_grad(), masked(model, ~cut, corrupted=other):
        torch.testing.assert_close(model(clean)[:, -1], logits, atol=1e-4, rtol=0)


def test_training_repeats_and_refuses():
    causal = EXAMPLES["siit-lookup"]
    first, second = (training.train(causal, steps=2, batch_size=8, progress=False) for _ in "ab")
    assert all(first[key].equal(second[key]) for key in first)
    with pytest.raises(ValueError, match="d_model divisible by 4 heads"):
        models.train_semi_synthetic(causal, d_model=30)


@pytest.mark.slow
def test_a_model_of_ones_own_learns_its_circuit():
    trained = models.train_semi_synthetic(
        EXAMPLES["siit-lookup"], steps=500, seed=3, device="cpu", progress=False
    )
    assert min(trained.accuracy.values()) >= 0.99


# --------------------------------------------------------------------------------- shipped circuits


@pytest.mark.parametrize("name", NAMES)
def test_the_circuit_alone_does_the_task(name):
    model, causal = load(name), EXAMPLES[name]
    circuit = Circuit.from_edges(causal.graph, models.known_circuit(name, "counterfactual"))
    assert circuit.edges and set(circuit.edges) == set(causal.edges)
    clean, other = prompts(name, 512, 5), prompts(name, 512, 6)
    for mask in (torch.ones(causal.graph.n_edges), circuit.mask.float()):
        said = tokens_under(model, mask, clean, other)
        assert (said == causal.answers(clean)).double().mean() >= 0.99


@pytest.mark.parametrize("name", NAMES)
def test_every_edge_of_the_circuit_carries_its_variable(name):
    """Cut alone, the model says what the causal model says, which often is another answer."""
    model, causal = load(name), EXAMPLES[name]
    clean, other = prompts(name, 256, 7), prompts(name, 256, 8)
    for column, edge in enumerate(causal.edges):
        mask = torch.ones(causal.graph.n_edges)
        mask[causal.graph.index(edge)] = 0
        swapped = torch.zeros(256, len(causal.edges), dtype=torch.bool)
        swapped[:, column] = True
        said = tokens_under(model, mask, clean, other)
        wanted = causal.interchange(clean, other, swapped)
        assert (said == wanted).double().mean() >= 0.99, edge
        assert (said == causal.answers(clean)).double().mean() < 0.9, edge


@pytest.mark.parametrize("name", NAMES)
def test_nodes_outside_the_circuit_do_nothing(name):
    """Each patched alone with its output on another prompt."""
    model, causal = load(name), EXAMPLES[name]
    graph = causal.graph
    circuit = Circuit.from_edges(graph, causal.edges)
    outside = [node for node in graph.sources if node not in circuit.nodes]
    assert len(outside) >= 5
    clean, other = prompts(name, 128, 9), prompts(name, 128, 10)
    for node in outside:
        mask = torch.tensor([float(not edge.startswith(f"{node}->")) for edge in graph.edges])
        said = tokens_under(model, mask, clean, other)
        assert (said == causal.answers(clean)).double().mean() >= 0.99, node


@pytest.mark.parametrize("name", NAMES)
def test_what_training_measured_is_above_its_bound(name):
    about = semi_synthetic.read_config(name)
    assert set(about["accuracy"]) == {"task", "interchange", "strict", "both"}
    assert min(about["accuracy"].values()) >= 0.99


@pytest.mark.parametrize("name", NAMES)
def test_both_classes_say_the_same(name):
    clean = prompts(name, 16, 0)
    with torch.no_grad():
        logits = [load(name, cls)(clean) for cls in CLASSES]
    assert all(torch.allclose(logits[0], other, atol=1e-4) for other in logits)


@pytest.mark.parametrize("name", NAMES)
def test_tasks_are_right_and_differ(name):
    task = tasks.load(name, load(name), 40, seed=2)
    clean, corrupted = torch.stack(task.clean), torch.stack(task.corrupted)
    assert torch.cat(task.answers).equal(EXAMPLES[name].answers(clean))
    assert torch.cat(task.distractors).equal(EXAMPLES[name].answers(corrupted))
    assert not (torch.cat(task.answers) == torch.cat(task.distractors)).any()
    with pytest.raises(ValueError, match="n_layers|d_vocab"):
        tasks.load(name, models.load("tracr-hist", device="cpu"), 4)
    with pytest.raises(ValueError, match="no BOS"):
        tasks.load(name, load(name), 4, prepend_bos=True)


def test_zero_ablation_has_no_known_circuit():
    with pytest.raises(ValueError, match=r"siit-sum, .* \(counterfactual\)"):
        models.known_circuit("siit-sum", "zero")


# ----------------------------------------------------------------------------------------- methods


def known(name: str) -> Circuit:
    return Circuit.from_edges(EXAMPLES[name].graph, EXAMPLES[name].edges)


@pytest.mark.parametrize("name", QUICKEST)
def test_exact_patching_ranks_the_circuit_first(name):
    task = tasks.load(name, load(name), 32)
    assert roc(discover(load(name), task, method="exact"), known(name)).auc > 0.99


@pytest.mark.parametrize("name", QUICKEST)
def test_gradients_rank_the_circuit_high_and_chance_does_not(name):
    task = tasks.load(name, load(name), 64)
    scores = discover(load(name), task, method="eap-ig")
    assert roc(scores, known(name)).auc > 0.9
    random = [discover(load(name), task, method="random", seed=s) for s in range(20)]
    mean = sum(roc(scores, known(name)).auc for scores in random) / 20
    assert abs(mean - 0.5) < 0.1


@pytest.mark.parametrize("name", QUICKEST)
def test_edge_pruning_finds_the_circuit(name):
    wanted = known(name)
    pruner = EdgePruner(wanted.n_edges, steps=60, batch_size=16, seed=0, progress=False)
    result = pruner.fit(load(name), tasks.load(name, load(name), 64))
    assert roc(result.scores, wanted, absolute=False).auc > 0.97
