"""The state of partial runs: what the cuts of one batch of pairs share, and their mixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_edgeprune.ablation.reference import Reference
from tl_edgeprune.runs.targets import TargetBatch

Inputs = Callable[[int], Tensor]  # candidate -> what destinations read, [dst, row, d_model]


class SpanRows(NamedTuple):
    """The rows of one span."""

    span: int
    rows: Int[Tensor, " row"]


@dataclass
class BatchRun:
    """The current mask's run on one batch of pairs. Rows are batch * pos.

    Attributes:
        reference: expanded to the batch.
        rows: those that the task reads.
        spans, read_spans: the spans of all rows, and of those that the task reads.
    """

    target_batch: TargetBatch
    reference: Reference
    rows: Int[Tensor, " read_row"]
    differences: Float[Tensor, "source row d_model"]
    spans: list[SpanRows] | None
    read_spans: list[SpanRows] | None

    @property
    def n_rows(self) -> int:
        return self.differences.shape[1]

    def stream(self, read_index: int, read_rows_only: bool) -> Float[Tensor, "row d_model"]:
        """The reference stream at a read, at all rows or only at those that the task reads."""
        stream = self.reference.streams[read_index].flatten(0, 1)
        return stream[self.rows] if read_rows_only else stream


class Change:
    """The sources that differ from the current run, for several candidates side by side."""

    def __init__(
        self,
        batch_run: BatchRun,
        n_candidates: int,
        buffer: Float[Tensor, "source candidate_row d_model"],
    ) -> None:
        self.batch_run, self.n_candidates = batch_run, n_candidates
        self.sources: list[int] = []
        self.read_rows_only = False
        self.base = batch_run.differences
        self._buffer = buffer
        self._at_all_rows: Tensor | None = None  # values of the sources that changed at all rows

    @property
    def n_rows(self) -> int:
        """Rows of one candidate."""
        return self.base.shape[1]

    @property
    def spans(self) -> list[SpanRows] | None:
        """The spans of one candidate's rows."""
        return self.batch_run.read_spans if self.read_rows_only else self.batch_run.spans

    @property
    def values(self) -> Float[Tensor, "source candidate_row d_model"]:
        """New differences of `sources`, all candidates' rows one after another."""
        return self._buffer[: len(self.sources)]

    def add(self, sources: Sequence[int]) -> Float[Tensor, "source candidate_row d_model"]:
        """Where these sources' new differences are to be written."""
        first = len(self.sources)
        self.sources += sources
        return self._buffer[first : len(self.sources)]

    def read_rows(self) -> Int[Tensor, " candidate_row"]:
        """The rows that the task reads, among all candidates' rows."""
        rows = self.batch_run.rows
        starts = torch.arange(self.n_candidates, device=rows.device) * self.batch_run.n_rows
        return (starts[:, None] + rows).flatten()

    def write_to_run(self, candidate: int) -> None:
        """This candidate's differences become the current run's."""
        differences, rows = self.batch_run.differences, self.batch_run.rows
        early = self.values if self._at_all_rows is None else self._at_all_rows
        n = self.batch_run.n_rows
        differences[self.sources[: len(early)]] = early[:, candidate * n : (candidate + 1) * n]
        late = torch.tensor(self.sources[len(early) :], dtype=torch.long, device=early.device)
        if len(late):
            n = self.n_rows
            new = self.values[len(early) :, candidate * n : (candidate + 1) * n]
            differences[late[:, None], rows] = new

    def keep_read_rows(self, n_to_come: int) -> None:
        """From here on, only the rows that the task reads; `n_to_come` more sources may change."""
        if self.read_rows_only:
            return
        self._at_all_rows = self.values
        at_read_rows = self._at_all_rows.index_select(1, self.read_rows())
        n_sources = len(at_read_rows)
        self._buffer = at_read_rows.new_empty(n_sources + n_to_come, *at_read_rows.shape[1:])
        self._buffer[:n_sources] = at_read_rows
        self.base = self.batch_run.differences.index_select(1, self.batch_run.rows)
        self.read_rows_only = True


def mixed_inputs(
    base: Float[Tensor, "dst row d_model"],
    weights: Float[Tensor, "dst *span source"],
    values: Float[Tensor, "source candidate_row d_model"],
    n_rows: int,
    spans: list[SpanRows] | None,
    candidate: int,
) -> Float[Tensor, "dst row d_model"]:
    """base + weights @ the candidate's own rows of the values."""
    rows = values[:, candidate * n_rows : (candidate + 1) * n_rows]
    if spans is not None:
        return base + mix_of_sources(weights, rows, spans)
    return torch.addmm(base.flatten(1), weights, rows.flatten(1)).view(base.shape)


def rows_by_span(spans: Int[Tensor, " row"] | None) -> list[SpanRows] | None:
    """The rows of each span that occurs."""
    if spans is None:
        return None
    return [SpanRows(span, (spans == span).nonzero()[:, 0]) for span in spans.unique().tolist()]


def mix_of_sources(
    weights: Float[Tensor, "dst *span source"],
    values: Float[Tensor, "any_source row d_model"],
    spans: list[SpanRows] | None = None,
) -> Float[Tensor, "dst row d_model"]:
    """weights (on the CPU) @ the first sources, span by span. Sources whose weights are all zero
    are left out if they are the majority.
    """
    n = weights.shape[-1]
    if spans is not None:
        product = values.new_empty(len(weights), *values.shape[1:])
        for span, rows in spans:
            product[:, rows] = mix_of_sources(weights[:, span], values[:n, rows])
        return product
    used = (weights != 0).any(0).nonzero().flatten()
    block = values[:n]
    if 2 * len(used) < n:
        weights, block = weights[:, used], values[used.to(values.device, non_blocking=True)]
    weights = weights.to(values.device, non_blocking=True)
    return (weights @ block.flatten(1)).view(len(weights), *values.shape[1:])
