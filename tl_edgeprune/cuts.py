"""What cutting edges does to the objective: one mask, many candidate cuts, no gradients.

A `Cuts` holds a current mask. `losses` tells, for candidate cuts of edges of one read (the
destinations that read together), each pair's objective if those edges were removed as well;
`commit` makes the current mask one of the candidates just told of.

`WholeCuts` is the definition: set the mask, run the masked model, take the objective. `PartCuts`
gives the same from a partial run:

1. The current mask's run is kept as its buffer of differences, [source, row, d_model].
2. Sources before the cut edges' destinations do as before, so a candidate starts at that read.
3. From there on only what changes is run: destinations that keep an edge from a source that
   changes, in heads and MLPs that lead to the logits. What they read is their mix of the unchanged
   sources (the same for all candidates, made once) and of each candidate's own.
4. Candidates lie beside one another in the batch: [candidate * pair, pos].
5. From the last block's heads on, only the positions that the task reads are run.

Half blocks are run by `blocks.py`. A check on a few tokens holds the partial run to the whole one;
where a model's blocks cannot be run so, `find_cuts` gives the definition: the same, slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_edgeprune.ablation import Reference
from tl_edgeprune.blocks import Blocks
from tl_edgeprune.first_look import relative, tolerance
from tl_edgeprune.forward import fitting
from tl_edgeprune.graph import EdgeGraph, Read
from tl_edgeprune.hooks import AttentionSite
from tl_edgeprune.masked import MaskedModel
from tl_edgeprune.objectives import Objective, losses
from tl_edgeprune.sharding import in_turns
from tl_edgeprune.teacher import Lesson, Teacher

_Inputs = Callable[[int], Tensor]  # candidate -> what destinations read, [dst, row, d_model]
MAX_BYTES = 2**29
MAX_CANDIDATES = 16
MAX_LOGITS = 2**25


def find_cuts(
    run: MaskedModel,
    teacher: Teacher,
    loss_of: Objective,
    *,
    batch_size: int = 8,
    max_bytes: int = MAX_BYTES,
) -> WholeCuts:
    """The fastest engine that this model allows, on all of the teacher's pairs."""
    lessons = [teacher.lesson(batch) for batch in teacher.task.batches(batch_size)]
    if partial_run_agrees(run, lessons[0]):
        return PartCuts(run, lessons, loss_of, max_bytes=max_bytes)
    return WholeCuts(run, lessons, loss_of)


class WholeCuts:
    """Candidate cuts by definition: whole masked runs, one candidate at a time."""

    def __init__(self, run: MaskedModel, lessons: Sequence[Lesson], loss_of: Objective) -> None:
        self.run, self.graph, self.loss_of = run, run.graph, loss_of
        self.lessons = list(lessons)
        self.device = run.sites.attention[0].output.device
        self.heads_interact = heads_interact(run, self.lessons[0])
        self.runs = 0
        self.mask: Bool[Tensor, " edge"] = torch.ones(self.graph.n_edges, dtype=torch.bool)
        self.per_pair: Float[Tensor, " pair"] = torch.zeros(0)
        self._told: tuple[int, Tensor, Tensor] | None = None
        self._alive: Tensor | None = None  # of the current mask

    @property
    def value(self) -> float:
        """The objective of the current mask, mean over the pairs."""
        return float(self.per_pair.mean())

    @torch.no_grad()
    def set(self, mask: Bool[Tensor, " edge"]) -> None:
        """Start from this mask: one whole run."""
        self.mask, self._told, self._alive = mask.detach().cpu().clone(), None, None
        self.runs += 1
        self.per_pair = self._cat([self._start(lesson) for lesson in self.lessons])

    @torch.no_grad()
    def losses(
        self, place: int, cuts: Bool[Tensor, "candidate destination source"]
    ) -> Float[Tensor, "candidate pair"]:
        """Each pair's objective if a candidate's edges of read `place` were removed (in float64).

        Pairs are in the order of the lessons. Edges that are removed already may be cut again.
        """
        cuts = cuts.cpu()
        self.runs += len(cuts)
        told = self._losses(place, cuts)
        self._told = place, cuts, told
        return told

    def values(self, place: int, cuts: Bool[Tensor, "candidate destination source"]) -> list[float]:
        """The mean objective of each candidate."""
        return self.losses(place, cuts).mean(1).tolist()

    @torch.no_grad()
    def commit(self, candidate: int) -> None:
        """Remove what this candidate of the last `losses` cuts. Its figures are the current ones
        now.
        """
        if self._told is None:
            raise RuntimeError("nothing to commit: ask for losses first.")
        place, cuts, told = self._told
        self._told = None
        self._advance(place, cuts, candidate)
        self._remove(place, cuts[candidate])
        self.per_pair = told[candidate]

    def drop(self, edges: Int[Tensor, " dropped"]) -> None:
        """Remove edges that carry nothing to the logits: no run is needed."""
        self.mask[edges] = False
        self._alive = None

    def alive(self) -> Bool[Tensor, "source span"]:
        """Which sources, in which span, lead to the logits by kept edges."""
        if self._alive is None:
            self._alive = lead_to_logits(self.graph, self.mask)
        return self._alive

    def candidates(self, place: int) -> int:
        """How many candidates of a read to ask for at once."""
        return 1

    # ---------------------------------------------------------------------------- one mask, one run

    def _start(self, lesson: Lesson) -> Float[Tensor, " pair"]:
        return self._whole(lesson, self.mask)

    def _losses(self, place: int, cuts: Tensor) -> Float[Tensor, "candidate pair"]:
        rows = []
        for cut in cuts:
            mask = self.mask.clone()
            mask[self.graph.reads[place].edges] &= ~cut.flatten()
            rows.append(self._cat([self._whole(lesson, mask) for lesson in self.lessons]))
        return torch.stack(rows)

    def _advance(self, place: int, cuts: Tensor, candidate: int) -> None:
        """Nothing is kept between runs here."""

    def _remove(self, place: int, cut: Tensor) -> None:
        self._alive = None
        self.mask[self.graph.reads[place].edges] &= ~cut.flatten()

    def _whole(self, lesson: Lesson, mask: Tensor) -> Float[Tensor, " pair"]:
        batch = lesson.batch
        logits = _logits(self.run, lesson, mask.to(self.device))
        return losses(self.loss_of, logits, lesson.full, batch)

    @staticmethod
    def _cat(parts: list[Tensor]) -> Float[Tensor, "*candidate pair"]:
        return torch.cat([part.double().cpu() for part in parts], dim=-1)


class _Rows(NamedTuple):
    """The rows of a span."""

    span: int
    rows: Int[Tensor, " row"]


@dataclass
class _Part:
    """One batch of pairs with the current mask's run on it. Rows are batch * pos."""

    lesson: Lesson
    reference: Reference  # expanded to the batch
    rows: Int[Tensor, " read"]
    differences: Float[Tensor, "source row d_model"]
    spans: list[_Rows] | None  # of all rows, and of those that the task reads
    read_spans: list[_Rows] | None

    @property
    def n_rows(self) -> int:
        return self.differences.shape[1]

    def stream(self, place: int, last: bool) -> Float[Tensor, "row d_model"]:
        """The reference stream at a read; `last`: at the rows that the task reads only."""
        stream = self.reference.streams[place].flatten(0, 1)
        return stream[self.rows] if last else stream


class _Change:
    """The sources that differ from the current run, for several candidates side by side."""

    def __init__(self, part: _Part, candidates: int, buffer: Tensor) -> None:
        self.part, self.candidates = part, candidates
        self.sources: list[int] = []
        self.last = False  # whether only the read rows are left
        self.base = part.differences
        self._rows = buffer  # [source, candidate * row, d_model]
        self._whole: Tensor | None = None  # the same before only the read rows were left

    @property
    def n_rows(self) -> int:
        """Rows of one candidate."""
        return self.base.shape[1]

    @property
    def spans(self) -> list[_Rows] | None:
        """The spans of one candidate's rows."""
        return self.part.read_spans if self.last else self.part.spans

    @property
    def values(self) -> Float[Tensor, "source row d_model"]:
        """New differences of `sources`, all candidates' rows one after another."""
        return self._rows[: len(self.sources)]

    def add(self, sources: Sequence[int]) -> Float[Tensor, "source row d_model"]:
        """Where these sources' new differences are to be written."""
        first = len(self.sources)
        self.sources += sources
        return self._rows[first : len(self.sources)]

    def index(self) -> Int[Tensor, " row"]:
        """The read rows among all candidates' rows."""
        starts = torch.arange(self.candidates, device=self.part.rows.device) * self.part.n_rows
        return (starts[:, None] + self.part.rows).flatten()

    def write_to_run(self, candidate: int) -> None:
        """This candidate's differences become the current run's."""
        differences = self.part.differences
        whole = self.values if self._whole is None else self._whole
        n = self.part.n_rows
        differences[self.sources[: len(whole)]] = whole[:, candidate * n : (candidate + 1) * n]
        late = torch.tensor(self.sources[len(whole) :], dtype=torch.long, device=whole.device)
        if len(late):
            n = self.n_rows
            new = self.values[len(whole) :, candidate * n : (candidate + 1) * n]
            differences[late[:, None], self.part.rows] = new

    def keep_read_rows(self, more: int) -> None:
        """From here on, only the rows that the task reads; `more`: sources still to come."""
        if self.last:
            return
        self._whole = self.values
        kept = self._whole.index_select(1, self.index())
        self._rows = kept.new_empty(len(kept) + more, *kept.shape[1:])
        self._rows[: len(kept)] = kept
        self.base, self.last = self.part.differences.index_select(1, self.part.rows), True


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
        self._turn_to: Callable[[int], None] = lambda layer: None  # see `in_turns`

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
        with in_turns(self.run.model) as self._turn_to:
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


def _mixed(
    base: Float[Tensor, "dst row d_model"],
    weights: Float[Tensor, "dst *span source"],
    values: Float[Tensor, "source candidate_rows d_model"],
    n_rows: int,
    spans: list[_Rows] | None,
    candidate: int,
) -> Float[Tensor, "dst row d_model"]:
    """base + weights @ the candidate's own rows of the values."""
    rows = values[:, candidate * n_rows : (candidate + 1) * n_rows]
    if spans is not None:
        return base + _product(weights, rows, spans)
    return torch.addmm(base.flatten(1), weights, rows.flatten(1)).view(base.shape)


def _by_span(spans: Int[Tensor, " row"] | None) -> list[_Rows] | None:
    """The rows of each span that there is."""
    if spans is None:
        return None
    return [_Rows(span, (spans == span).nonzero()[:, 0]) for span in spans.unique().tolist()]


def _taking(rows: list[int], device: torch.device) -> slice | Tensor:
    """What takes these rows, without a copy where they are one after another."""
    first = rows[0]
    if rows == list(range(first, first + len(rows))):
        return slice(first, first + len(rows))
    return torch.tensor(rows).to(device, non_blocking=True)


def _product(
    weights: Float[Tensor, "dst *span source"],
    values: Float[Tensor, "any_source row d_model"],
    spans: list[_Rows] | None = None,
) -> Float[Tensor, "dst row d_model"]:
    """weights (on the CPU) @ the first sources, span by span; of sparse weights, only the sources
    that any of them wants.
    """
    n = weights.shape[-1]
    if spans is not None:
        product = values.new_empty(len(weights), *values.shape[1:])
        for span, rows in spans:
            product[:, rows] = _product(weights[:, span], values[:n, rows])
        return product
    wanted = (weights != 0).any(0).nonzero().flatten()
    block = values[:n]
    if 2 * len(wanted) < n:
        weights, block = weights[:, wanted], values[wanted.to(values.device, non_blocking=True)]
    weights = weights.to(values.device, non_blocking=True)
    return (weights @ block.flatten(1)).view(len(weights), *values.shape[1:])


# ----------------------------------------------------------------------------------- structure


def lead_to_logits(graph: EdgeGraph, mask: Bool[Tensor, " edge"]) -> Bool[Tensor, "source span"]:
    """Which sources, in which span, have a path of kept edges to the logits (in any span)."""
    alive = torch.zeros(graph.n_sources, graph.n_spans, dtype=torch.bool)
    for read in reversed(graph.reads):
        block = mask[read.edges].view(-1, graph.n_spans, read.n_sources)
        leads = leading(graph, read, alive).view(-1, graph.n_spans, 1)
        alive[: read.n_sources] |= (block & leads).any(0).T
    return alive


def leading(
    graph: EdgeGraph, read: Read, alive: Bool[Tensor, "source span"]
) -> Bool[Tensor, " destination"]:
    """Which destinations of a read flow into a source that leads to the logits.

    Keys and values may be read from every span.
    """
    if read.kind == "logits":
        return torch.ones(graph.n_spans, dtype=torch.bool)
    if read.kind == "mlp":
        return alive[graph.mlp_source(read.layer)]
    first = graph.first_head(read.layer)
    heads = alive[first : first + graph.n_heads]
    groups = heads.view(graph.n_kv_heads, -1).any(1).repeat_interleave(graph.n_spans)
    return torch.cat([heads.flatten(), groups, groups]) if graph.split_qkv else groups


def leading_edges(graph: EdgeGraph, mask: Bool[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
    """Which edges, kept or not, end in a destination that leads to the logits by kept edges."""
    alive = lead_to_logits(graph, mask)
    parts = [leading(graph, read, alive).repeat_interleave(read.n_sources) for read in graph.reads]
    return torch.cat(parts)


@torch.no_grad()
def heads_interact(run: MaskedModel, lesson: Lesson) -> bool:
    """Whether what one head reads changes what another head of its layer writes.

    So it is where a norm follows the sum of the heads (Gemma 2), or where one norm is over all
    heads' queries or keys (OLMo 2). Then a head that leads nowhere still changes the logits.
    """
    graph = run.graph
    if graph.n_heads == 1:
        return False
    if any(site.post is not None for site in run.sites.attention):
        return True
    lesson = _some(lesson)
    mask = torch.ones(graph.n_edges, dtype=torch.bool, device=lesson.full.device)
    last = graph.reads[-1].edges
    mask[last].view(graph.n_spans, -1)[:, graph.first_head(0)] = False
    block = mask[graph.reads[0].edges].view(-1, graph.reads[0].n_sources)
    for read in graph.reads[1:-1]:  # a0.h0 leads nowhere
        mask[read.edges].view(-1, read.n_sources)[:, graph.first_head(0) :][:, :1] = False
    before = _logits(run, lesson, mask)
    block[: graph.n_spans] = False  # nor does it read anything, with its queries
    return float((_logits(run, lesson, mask) - before).abs().max()) > 1e-4 * float(
        before.abs().max()
    )


def _some(lesson: Lesson, pairs: int = 2) -> Lesson:
    """The first pairs of a lesson."""
    batch = lesson.batch.first(pairs)
    rows = torch.arange(len(batch), device=lesson.full.device)
    fixed = lesson.reference.any_batch
    reference = lesson.reference if fixed else lesson.reference.select(rows)
    return Lesson(batch, lesson.full[:pairs], reference)


def _logits(run: MaskedModel, lesson: Lesson, mask: Tensor) -> Float[Tensor, "batch read vocab"]:
    batch = lesson.batch
    return run(batch.clean, mask, lesson.reference, batch.positions, spans=batch.spans)


@torch.no_grad()
def partial_run_agrees(run: MaskedModel, lesson: Lesson) -> bool:
    """Whether partial runs give whole runs' logits, for random cuts of some pairs' first read and
    of a middle one.
    """
    lesson = _some(lesson)
    seen: list[Tensor] = []

    def keep(logits: Tensor, full: Tensor, batch: object) -> Tensor:
        seen.append(logits)
        return logits.new_zeros(len(logits))

    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(run.graph.n_edges, generator=generator) < 0.8
    whole, part = WholeCuts(run, [lesson], keep), PartCuts(run, [lesson], keep)
    figures = []
    for cuts in (whole, part):
        try:
            cuts.set(mask)
            for place in (0, len(run.graph.reads) // 2):
                read = run.graph.reads[place]
                shape = (2, read.n_destinations, read.n_sources)
                random = torch.Generator().manual_seed(place)
                cuts.losses(place, torch.rand(shape, generator=random) < 0.5)
                cuts.commit(1)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError):
            if cuts is whole:
                raise
            return False
        figures.append(torch.stack(seen))
        seen.clear()
    return relative(figures[1], figures[0]) <= tolerance(figures[0].dtype)
