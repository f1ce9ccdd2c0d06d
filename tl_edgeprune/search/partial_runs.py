"""The state of partial runs: what a batch's cuts share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_edgeprune.ablation.reference import Reference
from tl_edgeprune.runs.targets import Lesson

_Inputs = Callable[[int], Tensor]  # candidate -> what destinations read, [dst, row, d_model]


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
