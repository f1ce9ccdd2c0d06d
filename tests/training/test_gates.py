"""Hard-concrete gates and the two sparsity controllers, against scalar arithmetic and sampling."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_edgeprune.training.controllers import ExactBudget, Lagrangian, Penalty
from tl_edgeprune.training.gates import budget_shift, gates_at, open_probability, sample_gates

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
LOG_ALPHAS = st.floats(-12, 12)


def scalar_gate(log_alpha: float, u: float) -> float:
    """Louizos et al. 2018, equations 10 and 11, one number at a time."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / BETA))
    return min(1.0, max(0.0, s * (ZETA - GAMMA) + GAMMA))


def scalar_open(log_alpha: float) -> float:
    """Equation 12: P(z != 0)."""
    return 1 / (1 + math.exp(-(log_alpha - BETA * math.log(-GAMMA / ZETA))))


# ------------------------------------------------------------------------------------------- gates


@given(log_alpha=LOG_ALPHAS, u=st.floats(1e-4, 1 - 1e-4))
def test_a_gate_is_the_published_formula(log_alpha, u):
    gate = gates_at(*(torch.tensor([x], dtype=torch.float64) for x in (log_alpha, u)))
    assert float(gate[0]) == pytest.approx(scalar_gate(log_alpha, u), abs=1e-12)


@given(log_alpha=LOG_ALPHAS)
def test_open_probability_is_the_published_formula(log_alpha):
    assert float(open_probability(torch.tensor(log_alpha, dtype=torch.float64))) == pytest.approx(
        scalar_open(log_alpha), abs=1e-12
    )


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 1.5])
def test_open_probability_is_how_often_a_sample_is_not_zero(log_alpha):
    n = 200_000
    gates = sample_gates(torch.full((n,), log_alpha), torch.Generator().manual_seed(0))
    p = scalar_open(log_alpha)
    assert float((gates > 0).float().mean()) == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))
    assert 0 <= float(gates.min()) and float(gates.max()) <= 1


@given(log_alpha=LOG_ALPHAS, u=st.floats(0.02, 0.98))
def test_a_gates_gradient_is_its_finite_difference(log_alpha, u):
    at = torch.tensor([log_alpha], dtype=torch.float64, requires_grad=True)
    gates_at(at, torch.tensor([u]).double()).sum().backward()
    h = 1e-6
    expected = (scalar_gate(log_alpha + h, u) - scalar_gate(log_alpha - h, u)) / (2 * h)
    if 0 < scalar_gate(log_alpha - h, u) and scalar_gate(log_alpha + h, u) < 1:  # not at a kink
        assert float(at.grad[0]) == pytest.approx(expected, abs=1e-6)


def test_the_same_generator_draws_the_same_gates_and_none_are_nan_at_the_extremes():
    log_alpha = torch.tensor([-1e4, -80.0, 0.0, 80.0, 1e4])
    first = sample_gates(log_alpha, torch.Generator().manual_seed(3))
    assert torch.equal(first, sample_gates(log_alpha, torch.Generator().manual_seed(3)))
    assert first[[0, 1, 3, 4]].tolist() == [0, 0, 1, 1]


# ------------------------------------------------------------------------------------ exact budget


@st.composite
def alphas_and_budgets(draw):
    size = draw(st.integers(2, 400))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    log_alpha = scale * (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)
    return log_alpha, draw(st.floats(0.01, 0.99)) * size


@given(drawn=alphas_and_budgets())
def test_the_shift_makes_the_expected_number_of_open_gates_the_budget(drawn):
    log_alpha, budget = drawn
    tau = budget_shift(log_alpha, budget)
    assert float(open_probability(log_alpha + tau).sum()) == pytest.approx(budget, rel=1e-9)


def test_the_shift_in_float32_is_as_good_as_float32():
    log_alpha = 3 * torch.randn(70_651, generator=torch.Generator().manual_seed(0))
    for budget in (1.0, 1000.0, 70_650.0):
        kept = open_probability((log_alpha + budget_shift(log_alpha, budget)).double()).sum()
        assert float(kept) == pytest.approx(budget, rel=1e-4)


@given(drawn=alphas_and_budgets(), shift=st.floats(-20, 20))
def test_the_shift_undoes_a_shift_of_all_log_alphas(drawn, shift):
    log_alpha, budget = drawn
    moved = log_alpha + shift + budget_shift(log_alpha + shift, budget)
    torch.testing.assert_close(
        moved, log_alpha + budget_shift(log_alpha, budget), atol=1e-8, rtol=0
    )


@given(drawn=alphas_and_budgets())
def test_the_shifts_gradient_is_its_finite_difference(drawn):
    log_alpha, budget = drawn
    log_alpha = log_alpha[:12].clamp(-6, 6).requires_grad_()
    budget = budget * len(log_alpha) / drawn[0].numel()
    budget_shift(log_alpha, budget).backward()
    for gate in range(len(log_alpha)):
        step = torch.zeros_like(log_alpha)
        step[gate] = 1e-4
        with torch.no_grad():
            difference = budget_shift(log_alpha + step, budget) - budget_shift(
                log_alpha - step, budget
            )
        assert float(log_alpha.grad[gate]) == pytest.approx(float(difference) / 2e-4, abs=1e-6)


@pytest.mark.parametrize("budget", [0.0, -1.0, 5.0, 6.5, float("nan")])
def test_a_budget_outside_the_gates_is_refused(budget):
    with pytest.raises(ValueError, match=r"of 5 gates: expected a number above 0 and below"):
        budget_shift(torch.zeros(5), budget)


def started(controller, n_edges=1000, budget=50):
    controller.start(n_edges, budget)
    return controller


SHARES = [place / 200 for place in range(200)]


@given(
    start=st.floats(0.05, 1.0),
    anneal=st.floats(0.05, 1.0),
    n_edges=st.integers(2, 100_000),
    share=st.floats(0, 1),
)
def test_an_annealed_budget_falls_and_ends_at_the_budget(start, anneal, n_edges, share):
    budget = max(1, round(share * n_edges))
    controller = started(ExactBudget(start_share=start, anneal=anneal), n_edges, budget)
    targets = [controller.target(progress, 0.7) for progress in SHARES]
    final = min(budget, n_edges - 0.5)
    assert all(a >= b - 1e-9 * n_edges for a, b in itertools.pairwise(targets))
    assert targets[0] == pytest.approx(min(max(start * n_edges, budget), n_edges - 0.5))
    assert targets[0] <= n_edges - 0.5  # a sum that budget_shift can reach
    after = [t for p, t in zip(SHARES, targets, strict=True) if p >= anneal]
    assert after == pytest.approx([final] * len(after))
    assert controller.target(1.0, 0.0) == pytest.approx(final)


def test_a_fixed_budget_is_the_budget_from_the_first_step():
    assert {started(ExactBudget("fixed")).target(p, 0.3) for p in SHARES} == {50.0}


@given(
    draw=st.floats(0, 1, exclude_max=True),
    n_edges=st.integers(2, 100_000),
    progress=st.floats(0, 1, exclude_max=True),
    anneal=st.floats(0.05, 1.0),
)
def test_a_sampled_budget_is_log_uniform_above_an_end_that_falls(draw, n_edges, progress, anneal):
    controller = ExactBudget("sampled", start_share=0.3, low_share=0.002, anneal=anneal)
    controller.start(n_edges, None)
    low = max(1.0, 0.002 * n_edges)
    high = max(0.3 * n_edges, low)
    fallen = min(1.0, progress / anneal)
    lower = math.log(high) + fallen * (math.log(low) - math.log(high))
    wanted = min(math.exp(lower + draw * (math.log(high) - lower)), n_edges - 0.5)
    assert controller.target(progress, draw) == pytest.approx(wanted)
    assert controller.target(0.0, draw) == pytest.approx(min(high, n_edges - 0.5))
    assert controller.target(anneal, 0.0) == pytest.approx(min(low, n_edges - 0.5))


def test_exact_budget_gates_hold_the_budget_and_cost_nothing():
    controller = started(ExactBudget())
    log_alpha = torch.randn(1000)
    gates = controller.gates(log_alpha, 77.0)
    assert float(open_probability(gates).sum()) == pytest.approx(77, rel=1e-4)
    assert controller.penalty(torch.rand(1000), gates, 77.0) == 0 and controller.learned() == {}


def test_an_unknown_schedule_and_a_missing_budget_are_refused():
    controller = ExactBudget()
    controller.schedule = "linear"  # past the annotation's own check
    with pytest.raises(ValueError, match="expected annealed, sampled or fixed"):
        controller.__post_init__()
    for schedule in ("annealed", "fixed"):
        with pytest.raises(ValueError, match="needs n_edges"):
            ExactBudget(schedule).start(10, None)


# -------------------------------------------------------------------------------------- Lagrangian


def test_the_lagrangians_target_rises_linearly_to_the_sparsity():
    controller = started(Lagrangian(start_sparsity=0.2, warmup=0.5))
    sparsities = [1 - controller.target(p, 0.9) / 1000 for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert sparsities == pytest.approx([0.2, 0.575, 0.95, 0.95, 0.95])
    over = started(Lagrangian(target_sparsity=1.02), budget=None)
    assert 1 - over.target(1.0, 0.0) / 1000 == pytest.approx(1.02)


@given(share=st.floats(0, 1), l1=st.floats(-2, 2), l2=st.floats(-2, 2), target=st.floats(0, 1000))
def test_the_penalty_is_the_papers(share, l1, l2, target):
    controller = started(Lagrangian())
    with torch.no_grad():
        controller.lambda1.fill_(l1)
        controller.lambda2.fill_(l2)
    mask = torch.full((1000,), share)
    t, s = 1 - target / 1000, 1 - share
    expected = l1 * (t - s) + l2 * (t - s) ** 2
    assert float(controller.penalty(mask, mask, target).detach()) == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize(("kept", "grows"), [(0.9, True), (0.01, False)])
def test_lambda1_grows_while_the_mask_is_too_dense(kept, grows):
    controller = started(Lagrangian())
    ascent = torch.optim.SGD(controller.learned().values(), lr=0.1, maximize=True)
    for _ in range(5):
        ascent.zero_grad()
        controller.penalty(torch.full((1000,), kept), torch.zeros(1000), 50.0).backward()
        ascent.step()
    assert (float(controller.lambda1.detach()) > 0) is grows
    assert float(controller.lambda2.detach()) > 0  # a squared gap only ever raises it


def test_a_positive_lambda_pushes_the_mask_down_while_it_is_too_dense():
    controller = started(Lagrangian())
    with torch.no_grad():
        controller.lambda1.fill_(1.0)
        controller.lambda2.fill_(1.0)
    mask = torch.full((1000,), 0.9, requires_grad=True)
    controller.penalty(mask, mask.detach(), 50.0).backward()
    assert bool((mask.grad > 0).all())


def test_each_start_forgets_the_last_runs_multipliers():
    controller = started(Lagrangian())
    with torch.no_grad():
        controller.lambda1.fill_(5.0)
    controller.start(1000, 50)
    assert [float(value.detach()) for value in controller.learned().values()] == [0, 0]


def test_a_lagrangian_without_a_sparsity_to_aim_at_is_refused():
    with pytest.raises(ValueError, match="needs n_edges or target_sparsity"):
        Lagrangian().start(10, None)


# ------------------------------------------------------------------------------------- fixed price


@pytest.mark.parametrize(
    ("settings", "chance"),
    [({}, scalar_open), ({"probability": torch.sigmoid}, lambda x: 1 / (1 + math.exp(-x)))],
    ids=["hard-concrete", "sigmoid"],
)
@given(log_alphas=st.lists(LOG_ALPHAS, min_size=1, max_size=9), weight=st.floats(0.1, 50))
def test_a_penalty_prices_the_expected_number_of_open_gates(settings, chance, log_alphas, weight):
    """The whole graph costs `weight`, so a gate that is surely open costs its share of it."""
    gates = torch.tensor(log_alphas, dtype=torch.float64, requires_grad=True)
    penalty = Penalty(weight, **settings)
    penalty.start(len(log_alphas), None)
    assert penalty.gates(gates, penalty.target(0.5, 0.5)) is gates and not penalty.learned()
    price = penalty.penalty(torch.ones_like(gates), gates, penalty.target(0.5, 0.5))
    (slope,) = torch.autograd.grad(price, gates)
    each = weight / len(log_alphas)
    expected = [chance(x) for x in log_alphas]
    assert price.item() == pytest.approx(each * sum(expected), rel=1e-9)
    assert slope.tolist() == pytest.approx([each * p * (1 - p) for p in expected], rel=1e-6)
