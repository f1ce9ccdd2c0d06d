"""The result of a comparison: a table of figures, as text and as a picture."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.utils.lazy import late

FIGURES = (
    *("n_edges", "n_alive", "kl", "mse", "logit_diff", "recovered", "faithfulness"),
    *("exact_match", "accuracy"),
)
COLUMNS = ("method", "size", "threshold", *FIGURES, "seconds", "peak_mb")
Row = dict[str, Any]
_plot_comparison = late("tl_edgeprune.report", "plot_comparison")


@dataclass(frozen=True, repr=False)
class Comparison:
    """What a comparison found: a row of figures for each circuit, and the circuits themselves.

    rows: one mapping from COLUMNS to values per circuit, in the order of the methods. circuits:
    aligned with rows. scores: of each method that gives them, by name. measure: the figure that
    tells how far a circuit is from the model: "kl", or "mse" where the task's output is a number.
    """

    rows: tuple[Row, ...]
    circuits: tuple[Circuit, ...]
    scores: dict[str, EdgeScores] = field(default_factory=dict)
    measure: str = "kl"
    title: str = ""

    @property
    def table(self) -> Any:
        """A pandas DataFrame, one row for each circuit.

        method; size: edges asked for, missing where the method itself decides (ACDC), by its
        threshold, which others have none of; n_edges,
        n_alive, kl (nats), mse, logit_diff, recovered, faithfulness, exact_match, accuracy: as in
        `Evaluation`, NaN where the task has none; seconds: wall time of the run that the circuit
        came from, and peak_mb (10^6 bytes): its peak memory, the same in every row of one run.
        """
        import pandas

        table = pandas.DataFrame(list(self.rows), columns=list(COLUMNS))
        numbers = {name: float for name in COLUMNS[2:] if name not in ("n_edges", "n_alive")}
        return table.astype({"size": "Int64"} | numbers)

    def plot(
        self, path: str | os.PathLike[str], *, title: str | None = None, dpi: int = 200
    ) -> None:
        """Draw the figures against size and time: see `report.plot_comparison`."""
        title = title or self.title or None
        _plot_comparison(self.table, path, measure=self.measure, title=title, dpi=dpi)

    def __repr__(self) -> str:
        head = f"Comparison({self.title})" if self.title else "Comparison"
        return f"{head}\n{_text([_written(row) for row in self.rows])}"


def _written(row: Row) -> Row:
    """A row's values as they are shown."""

    def figure(name: str, form: str) -> str:
        return "" if row[name] is None else format(row[name], form)

    texts = {"method": row["method"]}
    texts |= {name: figure(name, ",") for name in ("size", "n_edges", "n_alive")}
    texts |= {"threshold": figure("threshold", "g")}
    texts |= {name: figure(name, ".3g") for name in ("kl", "mse")}
    texts |= {name: figure(name, ".2f") for name in ("logit_diff", "recovered", "faithfulness")}
    texts |= {name: figure(name, ".1%") for name in ("exact_match", "accuracy")}
    return texts | {"seconds": figure("seconds", ",.1f"), "peak_mb": figure("peak_mb", ",.0f")}


def _text(rows: list[Row]) -> str:
    """Columns that hold something, aligned; the first to the left."""
    names = [name for name in COLUMNS if any(row[name] for row in rows)] or list(COLUMNS[:1])
    lines = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
