"""Candidate cuts by partial runs, many at once: the same as by whole ones (`full_cuts.py`).

1. The current mask's run is kept as its buffer of differences, [source, row, d_model].
2. Sources before the cut edges' destinations do as before, so a candidate starts at that read.
3. From there on only what changes is run: destinations that keep an edge from a source that
   changes, in heads and MLPs that lead to the logits. What they read is their mix of the unchanged
   sources (the same for all candidates, made once) and of each candidate's own.
4. Candidates lie beside one another in the batch: [candidate * pair, pos].
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

from tl_edgeprune.forward.forward_pass import fitting
from tl_edgeprune.forward.half_blocks import Blocks
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import Read
from tl_edgeprune.hooks.shards import one_block_at_a_time
from tl_edgeprune.hooks.sites import AttentionSite
from tl_edgeprune.objectives import Objective, losses
from tl_edgeprune.runs.targets import Lesson
from tl_edgeprune.search.full_cuts import WholeCuts
from tl_edgeprune.search.partial_runs import _by_span, _Change, _Inputs, _mixed, _Part, _product

MAX_BYTES = 2**29
MAX_CANDIDATES = 16
MAX_LOGITS = 2**25


class PartCuts(WholeCuts):
    """Candidate cuts by partial runs. Memory: the differences of all pairs, and `max_bytes`."""

    def __init__(
        self,
        run: MaskedModel,
        lessons: Sequence[Lesson],
        loss_of: Objective,
        *,
        max_bytes: int = MAX_BYTES,
        max_candidates: int = MAX_CANDIDATES,
    ) -> None:
        super().__init__(run, lessons, loss_of)
        self.max_bytes, self.max_candidates = max_bytes, max_candidates
        self.blocks = Blocks(run)
        self._parts: list[_Part] = []
        self._changes: list[_Change] = []
        self._weights: list[Tensor] = []
        self._pool: list[Tensor] = []
        self._turn_to: Callable[[int], None] = lambda layer: None  # see `one_block_at_a_time`

    def set(self, mask: Bool[Tensor, " edge"]) -> None:
        self._parts, self._changes = [], []
        super().set(mask)

    def candidates(self, place: int) -> int:
        """As many as the buffers allow for the sources that may change."""
        size = self._row_bytes(place) * sum(part.n_rows for part in self._parts)
        return max(1, min(self.max_candidates, self.max_bytes // max(1, size)))

    def _row_bytes(self, place: int) -> int:
        like = self._parts[0].differences
        changing = self._may_change(place) + 2 * self.graph.attention_destinations
        return changing * like.shape[-1] * like.element_size()

    def _may_change(self, place: int) -> int:
        """How many sources a cut in this read may change."""
        read = self.graph.reads[place]
        if read.kind == "logits":
            return 0
        later = self._leads()[self._first_source(read) :]
        return int(later.sum()) if not self.heads_interact else len(later)

    def _leads(self) -> Bool[Tensor, " source"]:
        """Which sources lead to the logits from some span."""
        return self.alive().any(1)

    def _first_source(self, read: Read) -> int:
        graph = self.graph
        is_mlp = read.kind == "mlp"
        return graph.mlp_source(read.layer) if is_mlp else graph.first_head(read.layer)

    # -------------------------------------------------------------------------------- a partial run

    def _start(self, lesson: Lesson) -> Float[Tensor, " pair"]:
        batch, reference = lesson.batch, fitting(lesson.reference, lesson.batch.clean)
        pairs, pos = batch.clean.shape
        starts = torch.arange(pairs, device=self.device)[:, None] * pos
        mask = self.mask.to(self.device)
        differences = self.run.differences(batch.clean, lesson.reference, mask, batch.spans)
        rows = (batch.positions + starts).flatten()
        spans = batch.spans.flatten() if self.graph.spans and batch.spans is not None else None
        by_span = [_by_span(some) for some in (spans, None if spans is None else spans[rows])]
        part = _Part(lesson, reference, rows, differences, *by_span)
        self._parts.append(part)
        self._refresh()
        change = _Change(part, 1, differences[:0])
        change.keep_read_rows(0)
        return self._objective(change, self._mix(change, len(self.graph.reads) - 1, [0]))[0]

    def _losses(self, place: int, cuts: Tensor) -> Float[Tensor, "candidate pair"]:
        self._refresh()
        self._changes = []
        with one_block_at_a_time(self.run.model) as self._turn_to:
            return self._cat([self._part_losses(part, place, cuts) for part in self._parts])

    def _part_losses(
        self, part: _Part, place: int, cuts: Tensor
    ) -> Float[Tensor, "candidate pair"]:
        change = _Change(part, len(cuts), self._buffer(part, place, len(cuts)))
        self._changes.append(change)
        read = self.graph.reads[place]
        weights = self._weights[place]
        kept = weights * (~cuts).view(-1, *weights.shape).to(weights)
        if read.kind == "logits":
            change.keep_read_rows(0)
            return self._objective(change, self._mix_cut(change, place, kept, [0]))
        touched = [d for d in self._changed(place, cuts) if self._matters(read, d)]
        if touched:
            self._enter(change, read, touched, self._mix_cut(change, place, kept, touched))
        for later in range(place + 1, len(self.graph.reads) - 1):
            self._pass_on(change, later)
        change.keep_read_rows(0)
        return self._objective(change, self._mix(change, len(self.graph.reads) - 1, [0]))

    def _pass_on(self, change: _Change, place: int) -> None:
        """A later read: what its touched destinations now read, and what they then write."""
        read, weights = self.graph.reads[place], self._weights[place]
        seen = [s for s in change.sources if s < read.n_sources]
        if not seen:
            return
        hit = (weights[..., seen] != 0).flatten(1).any(1).nonzero().flatten().tolist()
        touched = [d for d in hit if self._matters(read, d)]
        if touched:
            if read.kind == "mlp" and read.layer == self.graph.n_layers - 1:
                change.keep_read_rows(1)
            self._enter(change, read, touched, self._mix(change, place, touched))

    def _enter(self, change: _Change, read: Read, touched: list[int], x: _Inputs) -> None:
        self._turn_to(read.layer)
        if read.kind == "mlp":
            self._mlp(change, read.layer, x)
        else:
            self._attention(change, read, touched, x)

    def _mlp(self, change: _Change, layer: int, inputs: _Inputs) -> None:
        x = torch.cat([inputs(candidate)[0] for candidate in range(change.candidates)])
        pairs = change.candidates * len(change.part.lesson.batch)
        self._record(change)
        y = self.blocks.mlp(layer, x.view(pairs, -1, x.shape[-1]))
        reference = change.part.reference.mlp[layer].flatten(0, 1)
        reference = reference[change.part.rows] if change.last else reference
        out = change.add([self.graph.mlp_source(layer)])[0]
        shape = (change.candidates, -1, x.shape[-1])
        torch.sub(y.reshape(shape), reference, out=out.view(shape))

    def _attention(self, change: _Change, read: Read, touched: list[int], x: _Inputs) -> None:
        layer, site, part = read.layer, self.run.sites.attention[read.layer], change.part
        heads = self._touched_heads(layer, touched)
        q, k, v = parts = self._empty_parts(change, site)
        rest = sorted(set(self._inputs_of(heads)) - set(touched))
        if rest:
            self._project(site, rest, self._mix_now(part, self._place(read), rest), parts)
        for candidate in range(change.candidates):
            own = [full[candidate][None] for full in parts]
            self._project(site, touched, x(candidate), own)
        self._record(change)
        z = self.blocks.attention(layer, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        z = z.reshape(-1, *z.shape[2:])  # [candidate * row, head, d_head]
        reference = part.reference.z[layer].flatten(0, 1)
        if layer == self.graph.n_layers - 1:
            z, reference = z[change.index()], reference[part.rows]
            change.keep_read_rows(len(heads) + 1)
        z = site.scaled(z).view(change.candidates, -1, *z.shape[1:]) - reference
        taken = _taking(heads, z.device)
        z = z.flatten(0, 1)[:, taken].transpose(0, 1)
        first = self.graph.first_head(layer)
        out = change.add([first + head for head in heads])
        torch.bmm(z, site.output[taken], out=out)
        if site.gain is not None:
            out.mul_(site.gain)
        bias = part.reference.head_bias(site)
        if bias is not None:
            out.add_(bias)

    def _empty_parts(
        self, change: _Change, site: AttentionSite
    ) -> list[Float[Tensor, "candidate pair pos _head d_head"]]:
        """Queries, keys and values of all candidates: zeros, as those that do not change stay."""
        shape = (change.candidates, *change.part.lesson.batch.clean.shape)
        return [w.new_zeros(*shape, w.shape[0], w.shape[2]) for w in site.weights]

    def _project(
        self,
        site: AttentionSite,
        destinations: list[int],
        x: Float[Tensor, "dst row d_model"],
        parts: list[Float[Tensor, "candidate pair pos _head d_head"]],
    ) -> None:
        """Write the destinations' queries, keys or values (an unsplit head's three) into the parts,
        the same for all their candidates.
        """
        x = site.norm(x)
        for part, (weight, bias, full) in enumerate(
            zip(site.weights, site.biases, parts, strict=True)
        ):
            placed = enumerate(self._head_of(part, d) for d in destinations)
            mine = [(i, head) for i, head in placed if head is not None]
            if not mine:
                continue
            first, heads = mine[0][0], [head for _, head in mine]  # one after another
            own = _taking(heads, x.device)
            values = torch.bmm(x[first : first + len(heads)], weight[own])
            if bias is not None:
                values += bias[own][:, None]
            shape = (len(heads), *full.shape[1:3], full.shape[-1])
            full[:, :, :, own] = values.view(shape).permute(1, 2, 0, 3)  # [pair, pos, head, …]

    # ------------------------------------------------------------------------------- the mixes

    def _mix(self, change: _Change, place: int, destinations: list[int]) -> _Inputs:
        """What destinations read: unchanged sources' mix, the same for all, and changed ones'."""
        weights = self._weights[place][destinations]
        n = weights.shape[-1]
        # Sources change in rising order, so those that a read sees come first.
        changed = [source for source in change.sources if source < n]
        same = weights.clone()
        same[..., changed] = 0
        base = _product(same, change.base, change.spans) + change.part.stream(place, change.last)
        weights, values = weights[..., changed], change.values[: len(changed)]
        if change.spans is None:
            weights = weights.to(values.device, non_blocking=True)
        return partial(_mixed, base, weights, values, change.n_rows, change.spans)

    def _mix_cut(
        self, change: _Change, place: int, kept: Tensor, destinations: list[int]
    ) -> _Inputs:
        """What destinations of the cut read itself now read, each candidate its own."""
        weights = kept[:, destinations]  # [candidate, dst, (span,) source]
        x = _product(weights.flatten(0, 1), change.base, change.spans)
        x = x.view(*weights.shape[:2], *x.shape[1:]) + change.part.stream(place, change.last)
        return lambda candidate: x[candidate]

    def _mix_now(
        self, part: _Part, place: int, destinations: list[int]
    ) -> Float[Tensor, "dst row d_model"]:
        """What destinations read in the current run."""
        mix = _product(self._weights[place][destinations], part.differences, part.spans)
        return mix + part.stream(place, False)

    def _objective(self, change: _Change, inputs: _Inputs) -> Float[Tensor, "candidate pair"]:
        """Each pair's objective where the logits read the inputs."""
        lesson = change.part.lesson
        pairs, read = lesson.batch.positions.shape
        most = max(1, MAX_LOGITS // (pairs * read * int(self.run.model.cfg.d_vocab)))
        found = []
        for some in torch.arange(change.candidates).split(most):
            x = torch.cat([inputs(candidate)[0] for candidate in some.tolist()])
            logits = self.blocks.logits(x.view(-1, read, x.shape[-1]))
            for one in logits.view(len(some), pairs, read, -1):
                found.append(losses(self.loss_of, one, lesson.full, lesson.batch))
        return torch.stack(found)

    # ------------------------------------------------------------------------------- bookkeeping

    def _advance(self, place: int, cuts: Tensor, candidate: int) -> None:
        """The candidate's sources become the current run's."""
        for change in self._changes:
            change.write_to_run(candidate)
        self._changes = []

    def _refresh(self) -> None:
        """The current mask as the blocks of its reads: on the CPU, since which edges are kept
        decides what is run, and asking a GPU would be to wait for it each time.
        """
        mask = self.mask.to(self.run.sites.attention[0].output.dtype)
        self._weights = [
            mask[read.edges].view(self.graph.block_shape(read)) for read in self.graph.reads
        ]

    def _changed(self, place: int, cuts: Tensor) -> list[int]:
        """Destinations that lose an edge in some candidate."""
        weights = self._weights[place].bool()
        lost = (cuts.view(-1, *weights.shape) & weights).flatten(2).any(2).any(0)
        return lost.nonzero().flatten().tolist()

    def _matters(self, read: Read, destination: int) -> bool:
        """Whether what a destination reads can change the logits."""
        if read.kind == "mlp":
            return bool(self._leads()[self.graph.mlp_source(read.layer)])
        first = self.graph.first_head(read.layer)
        heads = [first + h for h in self._heads_of(destination)]
        if self.heads_interact:
            heads = list(range(first, first + self.graph.n_heads))
        return bool(self._leads()[heads].any())

    def _touched_heads(self, layer: int, touched: list[int]) -> list[int]:
        if self.heads_interact:
            return list(range(self.graph.n_heads))
        first = self.graph.first_head(layer)
        heads, leads = {h for d in touched for h in self._heads_of(d)}, self._leads()
        return sorted(h for h in heads if leads[first + h])

    def _head_of(self, part: int, destination: int) -> int | None:
        """Which of the queries' (0), keys' (1) or values' (2) heads a destination is, if any."""
        graph = self.graph
        if not graph.split_qkv:
            return destination
        starts = (0, graph.n_heads, graph.n_heads + graph.n_kv_heads, graph.attention_destinations)
        inside = starts[part] <= destination < starts[part + 1]
        return destination - starts[part] if inside else None

    def _heads_of(self, destination: int) -> list[int]:
        graph = self.graph
        if destination < graph.n_heads:
            return [destination]
        group = (destination - graph.n_heads) % graph.n_kv_heads
        size = graph.n_heads // graph.n_kv_heads
        return list(range(group * size, (group + 1) * size))

    def _inputs_of(self, heads: list[int]) -> list[int]:
        wanted = set(heads)
        return [
            d for d in range(self.graph.attention_destinations) if wanted & set(self._heads_of(d))
        ]

    def _place(self, read: Read) -> int:
        return self.graph.reads.index(read)

    def _record(self, change: _Change) -> None:
        """Learn how the blocks are called at this many candidates."""
        self.blocks.record(change.part.lesson.batch.clean.repeat(change.candidates, 1))

    def _buffer(self, part: _Part, place: int, candidates: int) -> Tensor:
        """Room for the sources that may change, [source, candidate * row, d_model]."""
        like = part.differences
        shape = (self._may_change(place), candidates * part.n_rows, like.shape[-1])
        number = len(self._changes)
        while len(self._pool) <= number:
            self._pool.append(like.new_empty(0))
        if self._pool[number].numel() < math.prod(shape):
            self._pool[number] = like.new_empty(math.prod(shape))
        return self._pool[number][: math.prod(shape)].view(shape)


def _taking(rows: list[int], device: torch.device) -> slice | Tensor:
    """What takes these rows, without a copy where they are one after another."""
    first = rows[0]
    if rows == list(range(first, first + len(rows))):
        return slice(first, first + len(rows))
    return torch.tensor(rows).to(device, non_blocking=True)
