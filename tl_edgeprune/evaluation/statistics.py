"""Tests on numbers: sign, independence (HSIC), exceedance, and Holm over several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, repr=False)
class EquivalenceTest:
    """p_value of the hypothesis that neither is better on more than 1/2 + epsilon of the pairs.

    share_better: of pairs on which the circuit scores higher than the model, ties counting half.
    """

    p_value: float
    share_better: float
    epsilon: float
    n_pairs: int

    def __repr__(self) -> str:
        return (
            f"EquivalenceTest(p = {self.p_value:.3g}, circuit better on {self.share_better:.1%} of "
            f"{self.n_pairs} pairs, epsilon {self.epsilon:g})"
        )


@dataclass(frozen=True, repr=False)
class IndependenceTest:
    """p_value of the hypothesis that the complement's scores are independent of the model's.

    hsic: the Hilbert-Schmidt independence criterion of the two, 0 for constant scores.
    """

    p_value: float
    hsic: float
    n_pairs: int

    def __repr__(self) -> str:
        return (
            f"IndependenceTest(p = {self.p_value:.3g}, HSIC {self.hsic:.3g} on {self.n_pairs} "
            "pairs)"
        )


# ------------------------------------------------------------------------------- on numbers


def sign_test(
    differences: Float[Tensor, " pair"], *, epsilon: float = 0.1, tie: float = 0.0
) -> EquivalenceTest:
    """Whether the share of positive differences is within epsilon of 1/2.

    Shi et al.'s equivalence test. The statistic is its distance from 1/2; the p-value is the chance
    of one at least as large if the share were 1/2 + epsilon, the worst case that the hypothesis
    allows. Ours: a tie (at most `tie` apart) is half a pair on each side, so a circuit that equals
    the model always passes.
    """
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"epsilon={epsilon}: expected a number from 0 to below 0.5.")
    _check_finite(differences)
    n = len(differences)
    better = int((differences > tie).sum()) + int((differences.abs() <= tie).sum()) / 2
    distance = abs(better - n / 2)
    counts = torch.arange(n + 1, dtype=torch.double)
    as_extreme = (counts - n / 2).abs() >= distance
    p_value = float(binomial(n, 0.5 + epsilon)[as_extreme].sum())
    return EquivalenceTest(min(1.0, p_value), better / n, epsilon, n)


def hsic_test(
    x: Float[Tensor, " pair"],
    y: Float[Tensor, " pair"],
    *,
    permutations: int = 1000,
    tie: float = 0.0,
    seed: int = 0,
) -> IndependenceTest:
    """Whether two scores are independent: HSIC against its values under permutations.

    HSIC = trace(K H L H) / n² with Gaussian kernels and H the centring matrix (Gretton et al. 2007,
    "A kernel statistical test of independence"). The p-value is the share of permutations with as
    large a value. Ours: the data itself is among them, and each kernel has the width of its own
    score's median distance, so that the test sees neither scores' scale nor mean. A score that
    spreads over no more than `tie` is constant, and so independent of anything.
    """
    _check_finite(x, y)
    n = len(x)
    if min(_spread(x), _spread(y)) <= tie:
        return IndependenceTest(1.0, 0.0, n)
    kernel_x, kernel_y = _centred(_gaussian(x)), _gaussian(y)
    observed = (kernel_x * kernel_y).sum()
    generator = torch.Generator().manual_seed(seed)
    as_large = 1
    for _ in range(permutations):
        order = torch.randperm(n, generator=generator)
        as_large += int((kernel_x * kernel_y[order][:, order]).sum() >= observed * (1 - 1e-12))
    return IndependenceTest(as_large / (permutations + 1), float(observed) / n**2, n)


def exceedance_test(effect: float, others: Sequence[float], quantile: float) -> float:
    """p-value of: an effect exceeds others with probability at least `quantile` (binomial, one
    side: few excesses speak against it).
    """
    exceeded = sum(effect > random_effect for random_effect in others)
    return min(1.0, float(binomial(len(others), quantile)[: exceeded + 1].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the k-th smallest of n times n + 1 - k."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def binomial(n: int, share: float) -> Float[Tensor, " count"]:
    """Probabilities of 0 to n successes of n."""
    k = torch.arange(n + 1, dtype=torch.double)
    total = torch.tensor(float(n), dtype=torch.double)
    log_ways = torch.lgamma(total + 1) - torch.lgamma(k + 1) - torch.lgamma(total - k + 1)
    return (log_ways + torch.xlogy(k, share) + torch.xlogy(total - k, 1 - share)).exp()


def _check_finite(*scores: Float[Tensor, " pair"]) -> None:
    for score in scores:
        if not bool(torch.isfinite(score).all()):
            raise ValueError("a score is NaN or infinite on some pair: nothing can be told of it.")


def _spread(values: Float[Tensor, " pair"]) -> float:
    return float(values.max() - values.min())


def _gaussian(x: Float[Tensor, " pair"]) -> Float[Tensor, "pair pair"]:
    squares = (x[:, None] - x[None, :]).double().square()
    off_diagonal = squares[~torch.eye(len(x), dtype=torch.bool)]
    width = off_diagonal.median()
    width = width if width > 0 else off_diagonal.mean()  # most pairs alike
    return (-squares / (2 * width)).exp()


def _centred(kernel: Float[Tensor, "pair pair"]) -> Float[Tensor, "pair pair"]:
    return kernel - kernel.mean(0, keepdim=True) - kernel.mean(1, keepdim=True) + kernel.mean()
