"""Candidate cuts by partial runs, many at once: the same results as whole runs (`full_cuts.py`).

1. The current mask's run is kept as its buffer of differences, [source, row, d_model].
2. Sources before the cut edges' destinations do not change, so a candidate starts at that read.
3. From there on only what changes is run: destinations that keep an edge from a source that
   changes, in heads and MLPs that lead to the logits. They read the mix of the unchanged sources
   (the same for all candidates, computed once) plus that of each candidate's changed ones.
4. Candidates are stacked along the batch: [candidate * pair, pos].
5. From the last block's heads on, only the positions that the task reads are run.

Half blocks are run by `forward/half_blocks.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.forward.forward_pass import mask_blocks, reference_for, rows_of
from tl_edgeprune.forward.half_blocks import Blocks
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import Read
from tl_edgeprune.hooks.projections import head_index
from tl_edgeprune.hooks.shards import one_block_at_a_time
from tl_edgeprune.hooks.sites import AttentionSite
from tl_edgeprune.objectives import Objective, losses
from tl_edgeprune.runs.targets import TargetBatch
from tl_edgeprune.search.full_cuts import FullCuts
from tl_edgeprune.search.partial_runs import (
    BatchRun,
    Change,
    Inputs,
    mix_of_sources,
    mixed_inputs,
    rows_by_span,
)

MAX_BYTES = 2**29
MAX_CANDIDATES = 16
MAX_LOGITS = 2**25


class PartialCuts(FullCuts):
    """Candidate cuts by partial runs. Memory: the differences of all pairs, and `max_bytes`."""

    def __init__(
        self,
        run: MaskedModel,
        target_batches: Sequence[TargetBatch],
        loss_of: Objective,
        *,
        max_bytes: int = MAX_BYTES,
        max_candidates: int = MAX_CANDIDATES,
    ) -> None:
        super().__init__(run, target_batches, loss_of)
        self.max_bytes, self.max_candidates = max_bytes, max_candidates
        self.blocks = Blocks(run)
        self._batch_runs: list[BatchRun] = []
        self._changes: list[Change] = []
        self._weights: list[Tensor] = []
        self._pool: list[Tensor] = []
        self._turn_to: Callable[[int], None] = lambda layer: None  # see `one_block_at_a_time`

    def set(self, mask: Bool[Tensor, " edge"]) -> None:
        self._batch_runs, self._changes = [], []
        super().set(mask)

    def candidates(self, read_index: int) -> int:
        """As many as the buffers allow for the sources that may change."""
        n_rows = sum(batch_run.n_rows for batch_run in self._batch_runs)
        size = self._row_bytes(read_index) * n_rows
        return max(1, min(self.max_candidates, self.max_bytes // max(1, size)))

    def _row_bytes(self, read_index: int) -> int:
        like = self._batch_runs[0].differences
        n_changing = self._n_changing(read_index) + 2 * self.graph.attention_destinations
        return n_changing * like.shape[-1] * like.element_size()

    def _n_changing(self, read_index: int) -> int:
        """The largest number of sources that a cut in this read may change."""
        read = self.graph.reads[read_index]
        if read.kind == "logits":
            return 0
        later = self._leads()[self.graph.sources_written(read).start :]
        return int(later.sum()) if not self.heads_interact else len(later)

    def _leads(self) -> Bool[Tensor, " source"]:
        """Which sources lead to the logits from some span."""
        return self.alive().any(1)

    # -------------------------------------------------------------------------------- a partial run

    def _start(self, target_batch: TargetBatch) -> Float[Tensor, " pair"]:
        batch, reference = (
            target_batch.batch,
            reference_for(target_batch.reference, target_batch.batch.clean),
        )
        mask = self.mask.to(self.device)
        differences = self.run.differences(batch.clean, target_batch.reference, mask, batch.spans)
        rows = rows_of(batch.read_positions, batch.clean.shape[1])
        spans = batch.spans.flatten() if self.graph.spans and batch.spans is not None else None
        read_spans = None if spans is None else spans[rows]
        batch_run = BatchRun(
            target_batch,
            reference,
            rows,
            differences,
            rows_by_span(spans),
            rows_by_span(read_spans),
        )
        self._batch_runs.append(batch_run)
        self._refresh()
        change = Change(batch_run, 1, differences[:0])
        change.keep_read_rows(0)
        return self._objective(change, self._mix(change, len(self.graph.reads) - 1, [0]))[0]

    def _losses(self, read_index: int, cuts: Tensor) -> Float[Tensor, "candidate pair"]:
        self._refresh()
        self._changes = []
        with one_block_at_a_time(self.run.model) as turn_to:
            self._turn_to = turn_to
            return self._cat(
                [self._batch_losses(batch_run, read_index, cuts) for batch_run in self._batch_runs]
            )

    def _batch_losses(
        self, batch_run: BatchRun, read_index: int, cuts: Tensor
    ) -> Float[Tensor, "candidate pair"]:
        change = Change(batch_run, len(cuts), self._buffer(batch_run, read_index, len(cuts)))
        self._changes.append(change)
        read = self.graph.reads[read_index]
        weights = self._weights[read_index]
        uncut = weights * (~cuts).view(-1, *weights.shape).to(weights)  # [candidate, dst, source]
        if read.kind == "logits":
            change.keep_read_rows(0)
            return self._objective(change, self._mix_cut(change, read_index, uncut, [0]))
        touched = [d for d in self._changed(read_index, cuts) if self._matters(read, d)]
        if touched:
            inputs = self._mix_cut(change, read_index, uncut, touched)
            self._run_half(change, read_index, touched, inputs)
        for later in range(read_index + 1, len(self.graph.reads) - 1):
            self._propagate(change, later)
        change.keep_read_rows(0)
        return self._objective(change, self._mix(change, len(self.graph.reads) - 1, [0]))

    def _propagate(self, change: Change, read_index: int) -> None:
        """A later read: what its touched destinations now read, and what they then write."""
        read, weights = self.graph.reads[read_index], self._weights[read_index]
        changed = [source for source in change.sources if source < read.n_sources]
        if not changed:
            return
        hit = (weights[..., changed] != 0).flatten(1).any(1).nonzero().flatten().tolist()
        touched = [d for d in hit if self._matters(read, d)]
        if touched:
            if read.kind == "mlp" and read.layer == self.graph.n_layers - 1:
                change.keep_read_rows(1)
            self._run_half(change, read_index, touched, self._mix(change, read_index, touched))

    def _run_half(
        self, change: Change, read_index: int, touched: list[int], inputs: Inputs
    ) -> None:
        """Run the attention or MLP whose touched destinations read the inputs."""
        read = self.graph.reads[read_index]
        self._turn_to(read.layer)
        if read.kind == "mlp":
            self._mlp(change, read.layer, inputs)
        else:
            self._attention(change, read_index, touched, inputs)

    def _mlp(self, change: Change, layer: int, inputs: Inputs) -> None:
        x = torch.cat([inputs(candidate)[0] for candidate in range(change.n_candidates)])
        n_prompts = change.n_candidates * len(change.batch_run.target_batch.batch)
        self._record(change)
        y = self.blocks.mlp(layer, x.view(n_prompts, -1, x.shape[-1]))
        reference = change.batch_run.reference.mlp[layer].flatten(0, 1)
        reference = reference[change.batch_run.rows] if change.read_rows_only else reference
        out = change.add([self.graph.mlp_source(layer)])[0]
        shape = (change.n_candidates, -1, x.shape[-1])  # [candidate, row, d_model]
        torch.sub(y.reshape(shape), reference, out=out.view(shape))

    def _attention(
        self, change: Change, read_index: int, touched: list[int], inputs: Inputs
    ) -> None:
        layer, batch_run = self.graph.reads[read_index].layer, change.batch_run
        site = self.run.sites.attention[layer]
        heads = self._touched_heads(layer, touched)
        qkv = self._empty_qkv(change, site)
        unchanged = sorted(set(self._inputs_of(heads)) - set(touched))
        if unchanged:
            self._fill(site, unchanged, self._mix_now(batch_run, read_index, unchanged), qkv)
        for candidate in range(change.n_candidates):
            of_candidate = [tensor[candidate][None] for tensor in qkv]
            self._fill(site, touched, inputs(candidate), of_candidate)
        self._record(change)
        q, k, v = (tensor.flatten(0, 1) for tensor in qkv)  # [candidate * pair, pos, head, d_head]
        z = self.blocks.attention(layer, q, k, v).flatten(0, 1)  # [candidate * row, head, d_head]
        reference = batch_run.reference.z[layer].flatten(0, 1)
        if layer == self.graph.n_layers - 1:
            z, reference = z[change.read_rows()], reference[batch_run.rows]
            change.keep_read_rows(len(heads) + 1)
        z = site.scaled(z).view(change.n_candidates, -1, *z.shape[1:]) - reference
        chosen = head_index(heads, z.device)
        z = z.flatten(0, 1)[:, chosen].transpose(0, 1)  # [head, candidate * row, d_head]
        first = self.graph.first_head(layer)
        out = change.add([first + head for head in heads])
        site.write(z, out, bias_in_heads=batch_run.reference.bias_in_heads, heads=chosen)

    def _empty_qkv(
        self, change: Change, site: AttentionSite
    ) -> list[Float[Tensor, "candidate pair pos _head d_head"]]:
        """Queries, keys and values of all candidates: zeros, which heads that are not run keep."""
        shape = (change.n_candidates, *change.batch_run.target_batch.batch.clean.shape)
        return [w.new_zeros(*shape, w.shape[0], w.shape[2]) for w in site.weights]

    def _fill(
        self,
        site: AttentionSite,
        destinations: list[int],
        x: Float[Tensor, "dst row d_model"],
        qkv: list[Float[Tensor, "candidate pair pos _head d_head"]],
    ) -> None:
        """Write what some destinations read into their queries, keys or values, the same for all
        candidates.
        """
        for index, heads, values in site.read_some(x, destinations, self.graph.split_qkv):
            pairs, pos, d_head = *qkv[index].shape[1:3], qkv[index].shape[-1]
            values = values.view(-1, pairs, pos, d_head)  # [head, pair, pos, d_head]
            qkv[index][:, :, :, heads] = values.permute(1, 2, 0, 3)  # [pair, pos, head, d_head]

    # ------------------------------------------------------------------------------- the mixes

    def _mix(self, change: Change, read_index: int, destinations: list[int]) -> Inputs:
        """What destinations read: the unchanged sources' mix, the same for all candidates, plus the
        changed ones'.
        """
        weights = self._weights[read_index][destinations]
        n_sources = weights.shape[-1]
        # Sources change in rising order, so those that a read sees come first.
        changed = [source for source in change.sources if source < n_sources]
        unchanged_weights = weights.clone()
        unchanged_weights[..., changed] = 0
        base = mix_of_sources(unchanged_weights, change.base, change.spans)
        base = base + change.batch_run.stream(read_index, change.read_rows_only)
        weights, values = weights[..., changed], change.values[: len(changed)]
        if change.spans is None:
            weights = weights.to(values.device, non_blocking=True)
        return partial(mixed_inputs, base, weights, values, change.n_rows, change.spans)

    def _mix_cut(
        self, change: Change, read_index: int, uncut: Tensor, destinations: list[int]
    ) -> Inputs:
        """What destinations of the cut read now read, under each candidate's own weights."""
        weights = uncut[:, destinations]  # [candidate, dst, (span,) source]
        x = mix_of_sources(weights.flatten(0, 1), change.base, change.spans)
        x = x.view(*weights.shape[:2], *x.shape[1:])  # [candidate, dst, row, d_model]
        x = x + change.batch_run.stream(read_index, change.read_rows_only)
        return lambda candidate: x[candidate]

    def _mix_now(
        self, batch_run: BatchRun, read_index: int, destinations: list[int]
    ) -> Float[Tensor, "dst row d_model"]:
        """What destinations read in the current run."""
        weights = self._weights[read_index][destinations]
        mix = mix_of_sources(weights, batch_run.differences, batch_run.spans)
        return mix + batch_run.stream(read_index, False)

    def _objective(self, change: Change, inputs: Inputs) -> Float[Tensor, "candidate pair"]:
        """Each pair's objective if the logits read the inputs."""
        target_batch = change.batch_run.target_batch
        pairs, read = target_batch.batch.read_positions.shape
        size = max(1, MAX_LOGITS // (pairs * read * int(self.run.model.cfg.d_vocab)))
        values = []
        for chunk in torch.arange(change.n_candidates).split(size):
            x = torch.cat([inputs(candidate)[0] for candidate in chunk.tolist()])
            logits = self.blocks.logits(x.view(-1, read, x.shape[-1]))
            for of_candidate in logits.view(len(chunk), pairs, read, -1):
                values.append(
                    losses(self.loss_of, of_candidate, target_batch.full, target_batch.batch)
                )
        return torch.stack(values)

    # ------------------------------------------------------------------------------- bookkeeping

    def _advance(self, read_index: int, cuts: Tensor, candidate: int) -> None:
        """The candidate's sources become the current run's."""
        for change in self._changes:
            change.write_to_run(candidate)
        self._changes = []

    def _refresh(self) -> None:
        """The current mask as the blocks of its reads. They are on the CPU, since which edges are
        kept decides what is run, and asking a GPU would mean waiting for it each time.
        """
        self._weights = mask_blocks(self.graph, self.mask.to(self.run.dtype))

    def _changed(self, read_index: int, cuts: Tensor) -> list[int]:
        """Destinations that lose an edge in some candidate."""
        weights = self._weights[read_index].bool()
        lost = (cuts.view(-1, *weights.shape) & weights).flatten(2).any(2).any(0)
        return lost.nonzero().flatten().tolist()

    def _matters(self, read: Read, destination: int) -> bool:
        """Whether what a destination reads can change the logits."""
        sources = list(self.graph.sources_written(read))
        if read.kind == "attention" and not self.heads_interact:
            sources = [sources[head] for head in self._heads_of(destination)]
        return bool(self._leads()[sources].any())

    def _touched_heads(self, layer: int, touched: list[int]) -> list[int]:
        if self.heads_interact:
            return list(range(self.graph.n_heads))
        first = self.graph.first_head(layer)
        heads, leads = {h for d in touched for h in self._heads_of(d)}, self._leads()
        return sorted(h for h in heads if leads[first + h])

    def _heads_of(self, destination: int) -> list[int]:
        """The heads that a destination of attention is read for: those of a group if keys and
        values are shared.
        """
        graph = self.graph
        if destination < graph.n_heads:
            return [destination]
        group = (destination - graph.n_heads) % graph.n_kv_heads
        size = graph.n_heads // graph.n_kv_heads
        return list(range(group * size, (group + 1) * size))

    def _inputs_of(self, heads: list[int]) -> list[int]:
        """The destinations of attention that are read for these heads."""
        return [
            destination
            for destination in range(self.graph.attention_destinations)
            if not set(heads).isdisjoint(self._heads_of(destination))
        ]

    def _record(self, change: Change) -> None:
        """Record how the blocks are called with this many candidates."""
        self.blocks.record(change.batch_run.target_batch.batch.clean.repeat(change.n_candidates, 1))

    def _buffer(self, batch_run: BatchRun, read_index: int, n_candidates: int) -> Tensor:
        """Room for the sources that may change, [source, candidate * row, d_model]."""
        like = batch_run.differences
        shape = (self._n_changing(read_index), n_candidates * batch_run.n_rows, like.shape[-1])
        number, size = len(self._changes), math.prod(shape)
        while len(self._pool) <= number:
            self._pool.append(like.new_empty(0))
        if self._pool[number].numel() < size:
            self._pool[number] = like.new_empty(size)
        return self._pool[number][:size].view(shape)
