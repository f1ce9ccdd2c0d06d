"""The result of a comparison: a table of measures, as text and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.evaluation.measures import MEASURES
from tl_edgeprune.utils.lazy import late

Row = dict[str, Any]
_plot_comparison = late("tl_edgeprune.report", "plot_comparison")


def columns_of_measures() -> dict[str, str]:
    """Columns of the table that measures fill, with their formats."""
    return {m.name: m.column for m in MEASURES.values() if m.column is not None}


def column_formats() -> dict[str, str]:
    """The table's columns, with the formats of their values."""
    return {
        **{"method": "", "size": ",", "threshold": "g", "n_edges": ",", "n_alive": ","},
        **columns_of_measures(),
        **{"seconds": ",.1f", "peak_mb": ",.0f"},
    }


@dataclass(frozen=True, repr=False)
class Comparison:
    """What a comparison found: a row of measures for each circuit, and the circuits themselves.

    rows: one mapping from column names to values per circuit, in the order of the methods.
    circuits: aligned with rows. scores: of each method that gives them, by name. measure: the
    distance of a circuit from the model: "kl", or "mse" if the task's output is a number.
    """

    rows: tuple[Row, ...]
    circuits: tuple[Circuit, ...]
    scores: dict[str, EdgeScores] = field(default_factory=dict)
    measure: str = "kl"
    title: str = ""

    @property
    def table(self) -> Any:
        """A pandas DataFrame, one row for each circuit.

        method; size: the edges asked for, missing for ACDC, which sets the size by its threshold;
        threshold: ACDC's; n_edges, n_alive, kl (nats), mse, logit_diff, recovered, faithfulness,
        exact_match, accuracy: as in `Evaluation`, NaN if the task has none, and measures that were
        registered from outside; seconds: wall time of the run that the circuit came from; peak_mb
        (10^6 bytes): its peak memory, the same in every row of one run.
        """
        import pandas

        columns = list(column_formats())
        table = pandas.DataFrame(list(self.rows), columns=columns)
        numbers = {name: float for name in columns[2:] if name not in ("n_edges", "n_alive")}
        return table.astype({"size": "Int64"} | numbers)

    def plot(
        self, path: str | os.PathLike[str], *, title: str | None = None, dpi: int = 200
    ) -> None:
        """Draw the figures against size and time: see `report.plot_comparison`."""
        title = title or self.title or None
        _plot_comparison(self.table, path, measure=self.measure, title=title, dpi=dpi)

    def __repr__(self) -> str:
        head = f"Comparison({self.title})" if self.title else "Comparison"
        return f"{head}\n{_text(self.rows)}"


def _text(rows: Sequence[Row]) -> str:
    """The columns that hold a value, aligned; the first to the left."""
    texts = [
        {
            name: "" if row.get(name) is None else format(row[name], how)
            for name, how in column_formats().items()
        }
        for row in rows
    ]
    names = [name for name in column_formats() if any(row[name] for row in texts)] or ["method"]
    lines = [names, *([row[name] for name in names] for row in texts)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
