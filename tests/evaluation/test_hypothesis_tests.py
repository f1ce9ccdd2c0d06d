"""The tests of the circuit hypothesis: right on numbers whose answer is known, and on programs
whose circuits are.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import model_zoo

from tl_edgeprune import evaluate, models, tasks
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.evaluation.hypothesis_tests import (
    MinimalityTest,
    equivalence_test,
    independence_test,
    inflate,
    minimality_test,
    random_path,
)
from tl_edgeprune.evaluation.statistics import (
    EquivalenceTest,
    IndependenceTest,
    binomial,
    exceedance_test,
    holm,
    hsic_test,
    sign_test,
)
from tl_edgeprune.graph.edge_graph import EdgeGraph

GRAPH = EdgeGraph(n_layers=2, n_heads=2, n_kv_heads=1)
# reverse has twice the edges, and is a slow one
CASES = [
    pytest.param(case, marks=[pytest.mark.slow] * (case[0] == "tracr-reverse"), id="-".join(case))
    for case in itertools.product(
        ("tracr-xproportion", "tracr-reverse"), ("zero", "counterfactual")
    )
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


# ------------------------------------------------------------------------------- the binomial


@given(st.integers(1, 40), st.floats(0.01, 0.99))
def test_binomial_probabilities(n, share):
    expected = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    assert binomial(n, share).tolist() == pytest.approx(expected, rel=1e-8, abs=1e-14)


def test_binomial_at_the_ends():
    assert binomial(3, 0.0).tolist() == [1, 0, 0, 0]
    assert binomial(3, 1.0).tolist() == pytest.approx([0, 0, 0, 1])


# ------------------------------------------------------------------------------- the sign test


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 9), st.floats(0, 0.4))
def test_sign_test_is_a_sum_over_outcomes_as_far_from_half(better, worse, ties, epsilon):
    n = better + worse + ties
    if n == 0:
        return
    values = torch.tensor([1.0] * better + [-1.0] * worse + [0.0] * ties)
    found = sign_test(values, epsilon=epsilon)
    distance = abs(better + ties / 2 - n / 2)
    chance = sum(
        math.comb(n, k) * (0.5 + epsilon) ** k * (0.5 - epsilon) ** (n - k)
        for k in range(n + 1)
        if abs(k - n / 2) >= distance
    )
    assert found.p_value == pytest.approx(min(1, chance), abs=1e-9)
    assert found.share_better == pytest.approx((better + ties / 2) / n)
    assert sign_test(-values, epsilon=epsilon).p_value == pytest.approx(found.p_value)


def test_sign_test_keeps_its_level_and_has_power():
    equal = [sign_test(normal(101, seed=seed), epsilon=0.0).p_value for seed in range(400)]
    assert all(
        sum(p <= level for p in equal) <= level * 400 + 3 * math.sqrt(level * 400)
        for level in (0.01, 0.05, 0.2, 0.5)
    )
    assert sum(p <= 0.5 for p in equal) > 120  # nor is it far below its level
    worse = [sign_test(normal(101, seed=seed) - 1.0).p_value for seed in range(50)]
    assert max(worse) < 0.05


def test_sign_test_of_ties_and_wrong_settings():
    assert sign_test(torch.full((30,), -1e-6), tie=1e-4).p_value == pytest.approx(1)
    assert sign_test(torch.full((30,), -1e-6)).p_value < 1e-6
    with pytest.raises(ValueError, match="epsilon=0.5: expected a number from 0 to below 0.5"):
        sign_test(torch.zeros(3), epsilon=0.5)


# ------------------------------------------------------------------------------- HSIC


def hsic_by_definition(x: list[float], y: list[float]) -> float:
    """trace(K H L H) / n², entry by entry."""

    def gaussian(values):
        n = len(values)
        squares = [(a - b) ** 2 for a, b in itertools.permutations(values, 2)]
        width = sorted(squares)[(len(squares) - 1) // 2]
        rows = [[math.exp(-((a - b) ** 2) / (2 * width)) for b in values] for a in values]
        return torch.tensor(rows, dtype=torch.double).view(n, n)

    n = len(x)
    centring = torch.eye(n, dtype=torch.double) - 1 / n
    return float(torch.trace(gaussian(x) @ centring @ gaussian(y) @ centring)) / n**2


@given(st.integers(4, 12), st.integers(0, 99))
def test_hsic_is_its_trace(n, seed):
    x, y = normal(2, n, seed=seed)
    found = hsic_test(x, y, permutations=1)
    assert found.hsic == pytest.approx(hsic_by_definition(x.tolist(), y.tolist()), abs=1e-10)


def test_hsic_p_values_are_uniform_for_independent_scores():
    found = [
        hsic_test(*normal(2, 24, seed=seed), permutations=99, seed=seed).p_value
        for seed in range(200)
    ]
    for level in (0.05, 0.25, 0.5, 0.75):
        spread = math.sqrt(200 * level * (1 - level))
        assert abs(sum(p <= level for p in found) - 200 * level) < 4 * spread


@pytest.mark.parametrize(
    "function", [torch.sin, torch.square, torch.abs], ids=lambda function: function.__name__
)
def test_hsic_sees_dependence_without_correlation(function):
    x = normal(60)
    assert hsic_test(x, function(2 * x) + 0.05 * normal(60, seed=1)).p_value < 0.01


def test_constant_scores_are_independent_of_everything():
    noise = 1e-6 * normal(20)
    assert hsic_test(noise, normal(20), tie=1e-4).p_value == 1
    assert hsic_test(torch.ones(20), normal(20)).hsic == 0
    mostly = torch.zeros(20, dtype=torch.double)
    mostly[0] = 1.0
    assert hsic_test(mostly, normal(20)).p_value > 0


# ------------------------------------------------------------------------------- excess, correction


def test_an_effect_is_counted_against_the_others():
    others = [float(n) for n in range(10)]
    assert exceedance_test(9.5, others, 0.9) == pytest.approx(1)
    assert exceedance_test(8.5, others, 0.9) == pytest.approx(1 - 0.9**10)
    assert exceedance_test(-1.0, others, 0.9) == pytest.approx(0.1**10)
    assert exceedance_test(0.0, others, 0.9) == exceedance_test(-1.0, others, 0.9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.5))
def test_holm_rejects_step_by_step(p_values, level):
    rejected: set[int] = set()
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if min(1.0, p_values[place] * (len(p_values) - rank)) > level:
            break
        rejected.add(place)
    corrected = holm(p_values)
    assert {place for place, p in enumerate(corrected) if p <= level} == rejected
    bonferroni = {place for place, p in enumerate(p_values) if p * len(p_values) <= level}
    assert bonferroni <= rejected and all(a <= b for a, b in zip(p_values, corrected, strict=True))


# ------------------------------------------------------------------------------- random paths


@given(st.integers(0, 500))
def test_random_paths_lead_from_the_input_to_the_logits(seed):
    path = Circuit(GRAPH, torch.zeros(GRAPH.n_edges, dtype=torch.bool))
    edges = random_path(GRAPH, random.Random(seed))
    path.mask[edges] = True
    assert path.without_dead_edges() == path
    names = [GRAPH.edges[edge].split("->") for edge in edges]
    assert names[0][0] == "input" and names[-1][1] == "logits"
    for (_, destination), (source, _) in itertools.pairwise(names):
        assert source in GRAPH.owner(destination)


def test_each_edge_of_a_random_path_is_drawn_from_all_that_leave_its_node():
    """The first edge of a path and, after input->m0, the second: as often as any other."""
    paths = [random_path(GRAPH, random.Random(seed)) for seed in range(6000)]
    m0 = GRAPH.index("input->m0")
    for steps in ([path[0] for path in paths], [path[1] for path in paths if path[0] == m0]):
        source = GRAPH.edges[steps[0]].split("->")[0]
        leaving = {e for e, name in enumerate(GRAPH.edges) if name.startswith(f"{source}->")}
        assert set(steps) == leaving
        expected = len(steps) / len(leaving)
        assert all(abs(steps.count(e) - expected) < 5 * math.sqrt(expected) for e in leaving)


@given(st.integers(0, 500), st.sets(st.integers(0, GRAPH.n_edges - 1), max_size=GRAPH.n_edges - 1))
def test_an_inflated_circuit_has_a_path_more_and_names_an_edge_of_it(seed, edges):
    circuit = Circuit(GRAPH, torch.tensor([e in edges for e in range(GRAPH.n_edges)]))
    mask, edge = inflate(circuit, random.Random(seed))
    assert bool((mask | ~circuit.mask).all()) and bool(mask[edge]) and edge not in edges
    added = Circuit(GRAPH, mask).without_dead_edges()
    assert bool(added.mask[edge])


# ------------------------------------------------------------------------------- on programs


@pytest.fixture(scope="module", params=CASES)
def program(request):
    name, ablation = request.param
    model = models.load(name)
    task = tasks.load(name, model, 150, seed=1)
    task = task.subset([i for i, tokens in enumerate(task.clean) if len(tokens) >= 5])
    edges = models.known_circuit(name, ablation)
    known = Circuit.from_edges(EdgeGraph.from_model(model), edges, ablation=ablation)
    return model, task, known


def test_the_known_circuit_is_equivalent_and_without_any_edge_it_is_not(program):
    model, task, known = program
    whole = equivalence_test(model, known, task)
    assert whole.p_value == pytest.approx(1) and whole.n_pairs == len(task)
    for edge in known.edges[:3]:
        cut = known - Circuit.from_edges(known.graph, [edge], **known.metadata)
        assert equivalence_test(model, cut, task).p_value < 0.01
        full = Circuit(known.graph, ~known.mask | cut.mask, known.metadata)
        assert equivalence_test(model, full, task).p_value < 0.01


def test_the_known_circuit_is_minimal_and_with_spare_edges_it_is_not(program):
    model, task, known = program
    spare = [edge for edge in known.graph.edges if edge not in known][3::9][:2]
    task = task[:8]
    found = minimality_test(model, known, task, n_random=15)
    assert found.p_value > 0.5 and not found.spare()
    assert len(found.spare_effects) == 15 and found.edges == known.edges
    larger = known | Circuit.from_edges(known.graph, spare, **known.metadata)
    more = minimality_test(model, larger, task, n_random=15, edges=[*spare, known.edges[0]])
    assert set(more.spare()) == set(spare) and more.p_value < 0.01


def test_an_edges_effect_is_a_root_mean_square_over_pairs():
    model = models.load("tracr-xproportion")
    task = tasks.load("tracr-xproportion", model, 3, seed=1)
    edges = sorted(models.known_circuit("tracr-xproportion", "zero"))
    whole, cut = (
        Circuit.from_edges(EdgeGraph.from_model(model), names, ablation="zero")
        for names in (edges, edges[1:])
    )
    found = minimality_test(model, whole, task, edges=edges[:1], n_random=1)
    squares = [  # the score is minus the squared error
        sum(sign * evaluate(model, c, task[i : i + 1]).mse for sign, c in ((1, whole), (-1, cut)))
        ** 2
        for i in range(3)
    ]
    assert found.effects == (pytest.approx(math.sqrt(sum(squares) / 3)),)


def answer_logit(logits, full, batch):
    """Minus the first output column at the last position: a number that the program computes."""
    return -logits[:, -1, 0]


def test_the_complement_of_the_known_circuit_knows_nothing():
    model = models.load("tracr-xproportion")
    task = tasks.load("tracr-xproportion", model, 150, seed=1)
    task = task.subset([i for i, tokens in enumerate(task.clean) if len(tokens) == 5])
    edges = models.known_circuit("tracr-xproportion", "zero")
    known = Circuit.from_edges(EdgeGraph.from_model(model), edges, ablation="zero")
    kept = independence_test(model, known, task, measure=answer_logit)
    assert kept.p_value > 0.05 and kept.n_pairs == len(task)
    empty = known - known
    found = independence_test(model, empty, task, measure=answer_logit, ablation="zero")
    assert found.p_value < 0.01 and found.hsic > kept.hsic


def test_scores_that_never_vary_cannot_be_tested_for_independence():
    model = models.load("tracr-xproportion")
    task = tasks.load("tracr-xproportion", model, 10, seed=1)
    circuit = Circuit.from_edges(EdgeGraph.from_model(model), ["input->m0"])
    with pytest.raises(ValueError, match="score is the same on every pair"):
        independence_test(model, circuit, task)


def test_what_cannot_be_tested_for_minimality_is_refused():
    model = model_zoo.load("native-ln")
    graph, task = EdgeGraph.from_model(model), model_zoo.pairs(model, 2)
    full = Circuit(graph, torch.ones(graph.n_edges, dtype=torch.bool))
    for circuit in (full, full - full):
        with pytest.raises(ValueError, match="needs edges inside, and others outside"):
            minimality_test(model, circuit, task)
    one = Circuit.from_edges(graph, ["input->logits"])
    with pytest.raises(KeyError, match="m0->logits is not in the circuit"):
        minimality_test(model, one, task, edges=["m0->logits"])
    with pytest.raises(ValueError, match="no other path to add"):
        inflate(full, random.Random(0))


def test_scores_that_are_no_numbers_are_refused():
    nothing, some = torch.full((20,), math.nan), torch.arange(20.0)
    for tested in (lambda: sign_test(nothing), lambda: hsic_test(nothing, some)):
        with pytest.raises(ValueError, match="NaN or infinite on some pair"):
            tested()


def test_one_pair_shows_no_independence():
    model = models.load("tracr-xproportion")
    circuit = Circuit.from_edges(EdgeGraph.from_model(model), ["input->m0"])
    with pytest.raises(ValueError, match="independence_test on 1 pair: give two or more"):
        independence_test(model, circuit, tasks.load("tracr-xproportion", model, 1))


def test_results_are_shown_in_a_line():
    sign = EquivalenceTest(p_value=0.0123, share_better=0.25, epsilon=0.1, n_pairs=40)
    shown = "EquivalenceTest(p = 0.0123, circuit better on 25.0% of 40 pairs, epsilon 0.1)"
    assert repr(sign) == str(sign) == shown
    assert (
        repr(IndependenceTest(0.5, 0.012, 7)) == "IndependenceTest(p = 0.5, HSIC 0.012 on 7 pairs)"
    )
    edges = tuple(f"m{n}->logits" for n in range(300))
    found = MinimalityTest(edges, (1.0,) * 300, (0.01,) * 2 + (1.0,) * 298, (0.1,) * 50, 0.9)
    assert repr(found) == (
        "MinimalityTest(p = 0.01, 2 of 300 edges spare at 0.05, 50 spare effects)"
    )
