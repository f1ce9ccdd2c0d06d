"""Methods that look at nodes, outputs and reads follow their definitions, by brute force.

A definition here is a loop over prompts, edges and sources, on what `brute_force.run` reads and
writes. The gradient methods' are in test_attribution.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import brute_force as bf
from support import model_zoo
from torch import Tensor

from tl_edgeprune import EdgeScores, Task, discover
from tl_edgeprune.methods.greedy_output import greedy_gains
from tl_edgeprune.methods.subspace_nodes import variance_left
from tl_edgeprune.training.trainer import Trainer

KINDS = ("bridge-gpt2", "bridge-gemma2")  # the second with shared keys, and norms after heads


@torch.no_grad()
def reads_and_outputs(model: Any, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each destination reads and each source writes in the model's own run, [pos, d_model]."""
    inputs, outputs = {}, {}

    def read(name: str, own: Tensor) -> Tensor:
        inputs[name] = own[0]
        return own

    bf.run(model, tokens[None], read, lambda name, y: outputs.__setitem__(name, y[0]))
    return inputs, outputs


def differences(model: Any, task: Task) -> Tensor:
    """Clean less corrupted output of every source over all pairs, [source, all positions * d]."""
    parts = []
    for clean, corrupted in zip(task.clean, task.corrupted, strict=True):
        ours, theirs = (reads_and_outputs(model, tokens)[1] for tokens in (clean, corrupted))
        parts.append(torch.stack([(ours[s] - theirs[s]).flatten() for s in bf.sources(model)]))
    return torch.cat(parts, dim=1).double()


def assert_scores(scores: EdgeScores, expected: dict[str, float]) -> None:
    """Within 1e-4 of the largest score."""
    assert set(expected) == set(scores.graph.edges)
    wanted = torch.tensor([expected[edge] for edge in scores.graph.edges])
    assert wanted.std() > 0
    assert (scores.tensor - wanted).abs().max() <= 1e-4 * wanted.abs().max()


# ------------------------------------------------------------------------ from nodes to edges


def owners(model: Any, destination: str) -> list[str]:
    """The sources that a destination is an input of: several for keys that heads share."""
    node = destination.split("<")[0]
    if ".kv" not in node:
        return [] if node == "logits" else [node]
    layer, group = node.split(".kv")
    size = model.cfg.n_heads // bf.n_kv_heads(model)
    return [f"{layer}.h{head}" for head in range(int(group) * size, (int(group) + 1) * size)]


def between_nodes(model: Any, nodes: dict[str, float]) -> dict[str, float]:
    """The lesser of an edge's ends, the input and the logits aside: they are in every circuit."""
    scores = {}
    for edge in bf.edges(model):
        source, destination = edge.split("->")
        ends = [] if source == "input" else [nodes[source]]
        into = owners(model, destination)
        if into:
            ends.append(max(nodes[owner] for owner in into))
        scores[edge] = min(ends, default=nodes["input"])
    return scores


# ------------------------------------------------------------------------------------ the methods


@pytest.mark.parametrize("kind", KINDS)
def test_hisp_is_the_mean_magnitude_of_difference_times_gradient(kind: str) -> None:
    """The gradient at a source's own output, through all that reads it."""
    model = model_zoo.load(kind)
    task = model_zoo.pairs(model, 3)
    nodes = dict.fromkeys(bf.sources(model), 0.0)
    for clean, corrupted in zip(task.clean, task.corrupted, strict=True):
        ours, theirs = (reads_and_outputs(model, tokens)[1] for tokens in (clean, corrupted))
        added = {name: torch.zeros_like(y, requires_grad=True) for name, y in ours.items()}

        def gated(name: str, y: Tensor, added: dict[str, Tensor] = added) -> Tensor:
            return y + added[name]

        logits = bf.masked_logits(model, clean[None], {}, theirs, gated=gated)[0, -1]
        gradients = torch.autograd.grad(logits[3] - logits[5], list(added.values()))
        for name, gradient in zip(added, gradients, strict=True):
            effect = ((ours[name] - theirs[name]) * gradient).sum()
            nodes[name] += abs(float(effect)) / len(task)
    assert_scores(discover(model, task, "hisp"), between_nodes(model, nodes))


@pytest.mark.parametrize("kind", KINDS)
def test_ifr_is_each_sources_share_of_what_is_read(kind: str) -> None:
    """Ferrando and Voita 2024, equations 3 and 4, position by position."""
    model = model_zoo.load(kind)
    task = model_zoo.pairs(model, 3)
    expected = dict.fromkeys(bf.edges(model), 0.0)
    for clean in task.clean:
        inputs, outputs = reads_and_outputs(model, clean)
        for destination, sources in bf.reads(model).items():
            for place, x in enumerate(inputs[destination]):
                near = {
                    s: max(0.0, float(x.abs().sum() - (x - outputs[s][place]).abs().sum()))
                    for s in sources
                }
                for source, value in near.items():
                    share = value / sum(near.values())
                    expected[f"{source}->{destination}"] += share / len(clean) / len(task)
    scores = discover(model, task, "ifr")
    assert_scores(scores, expected)
    for destination, sources in bf.reads(model).items():
        shares = [float(scores.tensor[scores.graph.index(f"{s}->{destination}")]) for s in sources]
        assert sum(shares) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_scores_are_gains_in_what_each_destination_reads(kind: str) -> None:
    model = model_zoo.load(kind)
    task = model_zoo.pairs(model, 3)
    rows = differences(model, task)
    of_first = {n: gains_by_distance(rows[:n]).tolist() for n in {*map(len, _sources(model))}}
    expected = {
        f"{source}->{destination}": of_first[len(sources)][place]
        for destination, sources in bf.reads(model).items()
        for place, source in enumerate(sources)
    }
    assert_scores(discover(model, task, "greedy-output"), expected)


def _sources(model: Any) -> list[list[str]]:
    """The sources of each destination: always the first so many of all."""
    prefixes = list(bf.reads(model).values())
    assert all(prefix == bf.sources(model)[: len(prefix)] for prefix in prefixes)
    return prefixes


@pytest.mark.parametrize("kind", KINDS)
def test_subspace_nodes_scores_are_the_variance_that_nodes_add(kind: str) -> None:
    model = model_zoo.load(kind)
    task = model_zoo.pairs(model, 3)
    left = variance_by_gram_schmidt(differences(model, task)).tolist()
    nodes = dict(zip(bf.sources(model), left, strict=True))
    assert_scores(discover(model, task, "subspace-nodes"), between_nodes(model, nodes))


def nothing(logits: Tensor, full: Tensor, batch: Any) -> Tensor:
    """An objective that all circuits meet."""
    return 0 * logits.sum((1, 2))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("method", "chance"),
    [("ugs", sigmoid), ("subnetwork-probing", lambda x: sigmoid(x - 2 / 3 * math.log(0.1 / 1.1)))],
)
def test_a_trained_method_pays_for_the_expected_share_of_edges(
    method: str, chance: Callable[[float], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the objective is nothing, a step's gradient is the price's alone."""
    model, seen = model_zoo.load(KINDS[0]), []
    monkeypatch.setattr(
        Trainer,
        "_update",
        lambda run: seen.append((run.edges.log_alpha.detach(), run.edges.log_alpha.grad)),
    )
    settings = {"objective": nothing, "steps": 1, "progress": False}
    discover(model, model_zoo.pairs(model, 2), method, weight=7.0, **settings)
    ((gates, gradient),) = seen
    chances = [chance(x) for x in gates.tolist()]
    expected = torch.tensor([7.0 / len(gates) * p * (1 - p) for p in chances])
    torch.testing.assert_close(gradient, expected, atol=0, rtol=1e-3)


# ------------------------------------------------------------------------------- their arithmetic


def gains_by_distance(rows: Tensor) -> Tensor:
    """Try every row that is left by distance to the sum of all, take the best; gains never rise."""
    whole, chosen = rows.sum(0), []
    gains = torch.zeros(len(rows), dtype=rows.dtype)
    before, least = float(whole.square().sum()), float("inf")
    while len(chosen) < len(rows):
        rest = [j for j in range(len(rows)) if j not in chosen]
        left = {j: float((whole - rows[[*chosen, j]].sum(0)).square().sum()) for j in rest}
        best = min(left, key=lambda j: left[j])
        least = min(least, (before - left[best]) / float(whole.square().sum()))
        gains[best], before = least, left[best]
        chosen.append(best)
    return gains


def variance_by_gram_schmidt(rows: Tensor) -> Tensor:
    """What is left of each row when it is chosen, the largest first, as a share of all."""
    n, width = rows.shape
    whole, left, shares = rows.square().sum(), rows.clone(), torch.zeros(n, dtype=rows.dtype)
    for _ in range(min(n, width)):
        norms = left.square().sum(1)
        best = int(norms.argmax())
        shares[best] = norms[best] / whole
        unit = left[best] / norms[best].sqrt()
        left = left - torch.outer(left @ unit, unit)
        left[best] = 0
    return shares


def random_rows(seed: int, n: int, width: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 7), width=st.integers(1, 9))
def test_greedy_gains_are_what_each_choice_takes_off_the_distance(
    seed: int, n: int, width: int
) -> None:
    rows = random_rows(seed, n, width)
    found = greedy_gains(rows @ rows.T)
    torch.testing.assert_close(found, gains_by_distance(rows), atol=1e-9, rtol=1e-7)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 7), width=st.integers(1, 9))
def test_variance_left_is_gram_schmidts(seed: int, n: int, width: int) -> None:
    rows = random_rows(seed, n, width)
    found = variance_left(rows @ rows.T)
    torch.testing.assert_close(found, variance_by_gram_schmidt(rows), atol=1e-8, rtol=1e-6)
