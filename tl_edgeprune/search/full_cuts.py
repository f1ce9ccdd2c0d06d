"""Candidate cuts by definition: set the mask, run the masked model, take the objective.

`losses` gives, for candidate cuts of edges of one read (the destinations that read together), each
pair's objective if those edges were removed as well. `commit` removes the edges of one of the
candidates of the last `losses`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_edgeprune.forward.forward_pass import mask_blocks
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.reachability import lead_to_logits
from tl_edgeprune.objectives import Objective, losses
from tl_edgeprune.runs.targets import TargetBatch


class FullCuts:
    """Candidate cuts by definition: whole masked runs, one candidate at a time."""

    def __init__(
        self, run: MaskedModel, target_batches: Sequence[TargetBatch], loss_of: Objective
    ) -> None:
        self.run, self.graph, self.loss_of = run, run.graph, loss_of
        self.target_batches = list(target_batches)
        self.device = run.device
        self.heads_interact = heads_interact(run, self.target_batches[0])
        self.runs = 0
        self.mask: Bool[Tensor, " edge"] = torch.ones(self.graph.n_edges, dtype=torch.bool)
        self.per_pair: Float[Tensor, " pair"] = torch.zeros(0)
        self._last: tuple[int, Tensor, Tensor] | None = None  # read, cuts and their losses
        self._alive: Tensor | None = None  # of the current mask

    @property
    def value(self) -> float:
        """The objective of the current mask, mean over the pairs."""
        return float(self.per_pair.mean())

    @torch.no_grad()
    def set(self, mask: Bool[Tensor, " edge"]) -> None:
        """Start from this mask: one whole run."""
        self.mask, self._last, self._alive = mask.detach().cpu().clone(), None, None
        self.runs += 1
        self.per_pair = self._cat(
            [self._start(target_batch) for target_batch in self.target_batches]
        )

    @torch.no_grad()
    def losses(
        self, read_index: int, cuts: Bool[Tensor, "candidate destination source"]
    ) -> Float[Tensor, "candidate pair"]:
        """Each pair's objective (in float64) if a candidate's edges of this read were removed.

        Pairs are in the order of the batches. Edges that are removed already may be cut again.
        """
        cuts = cuts.cpu()
        self.runs += len(cuts)
        per_pair = self._losses(read_index, cuts)
        self._last = read_index, cuts, per_pair
        return per_pair

    def values(
        self, read_index: int, cuts: Bool[Tensor, "candidate destination source"]
    ) -> list[float]:
        """The mean objective of each candidate."""
        return self.losses(read_index, cuts).mean(1).tolist()

    @torch.no_grad()
    def commit(self, candidate: int) -> None:
        """Remove what this candidate of the last `losses` cuts, and keep its objective."""
        if self._last is None:
            raise RuntimeError("nothing to commit: ask for losses first.")
        read_index, cuts, per_pair = self._last
        self._last = None
        self._advance(read_index, cuts, candidate)
        self._remove(read_index, cuts[candidate])
        self.per_pair = per_pair[candidate]

    def drop(self, edges: Int[Tensor, " dropped"]) -> None:
        """Remove edges that carry nothing to the logits: no run is needed."""
        self.mask[edges] = False
        self._alive = None

    def alive(self) -> Bool[Tensor, "source span"]:
        """Which sources, in which span, lead to the logits by kept edges."""
        if self._alive is None:
            self._alive = lead_to_logits(self.graph, self.mask)
        return self._alive

    def candidates(self, read_index: int) -> int:
        """How many candidates of a read to evaluate at once."""
        return 1

    # ---------------------------------------------------------------------------- one mask, one run

    def _start(self, target_batch: TargetBatch) -> Float[Tensor, " pair"]:
        return self._whole(target_batch, self.mask)

    def _losses(self, read_index: int, cuts: Tensor) -> Float[Tensor, "candidate pair"]:
        rows = []
        for cut in cuts:
            mask = self.mask.clone()
            mask[self.graph.reads[read_index].edges] &= ~cut.flatten()
            rows.append(
                self._cat([self._whole(target_batch, mask) for target_batch in self.target_batches])
            )
        return torch.stack(rows)

    def _advance(self, read_index: int, cuts: Tensor, candidate: int) -> None:
        """Nothing is kept between runs here."""

    def _remove(self, read_index: int, cut: Tensor) -> None:
        self._alive = None
        self.mask[self.graph.reads[read_index].edges] &= ~cut.flatten()

    def _whole(self, target_batch: TargetBatch, mask: Tensor) -> Float[Tensor, " pair"]:
        logits = self.run.logits(target_batch, mask.to(self.device))
        return losses(self.loss_of, logits, target_batch.full, target_batch.batch)

    @staticmethod
    def _cat(batches: list[Tensor]) -> Float[Tensor, "*candidate pair"]:
        return torch.cat([batch.double().cpu() for batch in batches], dim=-1)


@torch.no_grad()
def heads_interact(run: MaskedModel, target_batch: TargetBatch) -> bool:
    """Whether what one head reads changes what another head of its layer writes.

    It does if a norm follows the sum of the heads (Gemma 2), or if one norm is over all heads'
    queries or keys (OLMo 2). Then a head that leads nowhere still changes the logits.
    """
    graph = run.graph
    if graph.n_heads == 1:
        return False
    if any(site.post is not None for site in run.sites.attention):
        return True
    target_batch = first_pairs(target_batch)
    mask = torch.ones(graph.n_edges, dtype=torch.bool, device=target_batch.full.device)
    first_head, blocks = graph.first_head(0), mask_blocks(graph, mask)
    blocks[-1][..., first_head] = False
    for block in blocks[1:-1]:  # a0.h0 leads nowhere
        block[..., first_head : first_head + 1] = False  # none, if the block reads no heads
    expected = run.logits(target_batch, mask)
    blocks[0][0] = False  # and its queries read nothing
    difference = (run.logits(target_batch, mask) - expected).abs().max()
    return float(difference) > 1e-4 * float(expected.abs().max())


def first_pairs(target_batch: TargetBatch, pairs: int = 2) -> TargetBatch:
    """The first pairs of a target_batch."""
    batch = target_batch.batch.first(pairs)
    rows = torch.arange(len(batch), device=target_batch.full.device)
    fixed = target_batch.reference.any_batch
    reference = target_batch.reference if fixed else target_batch.reference.select(rows)
    return TargetBatch(batch, target_batch.full[:pairs], reference)
