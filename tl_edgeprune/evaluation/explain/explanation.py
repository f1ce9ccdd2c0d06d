"""What `explain` found: a row for each edge, and the attention of the heads at their ends."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_edgeprune.utils.lazy import late
from tl_edgeprune.utils.reading import check_type, of_format, read_json, reporting_damage
from tl_edgeprune.utils.writing import write_whole

FORMAT = 1
KIND = "tl_edgeprune explanation"
HINT = "Expected one of Explanation.save, as .json."
COLUMNS: tuple[str, ...] = ("edge", "source", "destination", "kind", "rise", "direct_effect")
COLUMNS += ("carries", "attends", "source_attends")
PATTERN_COLUMNS = ("head", "length", "n_pairs", "read", "position", "token", "weight")
Row = dict[str, Any]
_whole_frame = late("tl_edgeprune.utils.dataframe", "WholeFrame")


@dataclass(frozen=True, repr=False)
class Explanation:
    """A circuit's edges, one by one, on a task. Made by `explain`.

    rows: one mapping from COLUMNS to values per edge, in the graph's order. patterns: likewise from
    PATTERN_COLUMNS, one for each position that a head's read position can attend to. about: plain
    JSON values: model, task, n_pairs, ablation, objective, value (the objective of the whole
    circuit) and score (its answer score, which direct effects are parts of).
    """

    rows: tuple[Row, ...]
    patterns: tuple[Row, ...]
    about: dict[str, Any]

    @property
    def table(self) -> Any:
        """A pandas DataFrame, one row an edge.

        kind: what the edge enters: q, k, v (attn for a head that has one input), mlp or logits.
        rise: of the objective, mean over the pairs, when the edge alone is cut. direct_effect: in
        logits, what the edge's difference adds to the answer's score at the read positions, seen
        through the final norm and the unembedding (NaN where the task has no answers); exact for
        edges into the logits but for the norm's scale, and for the others what it would add there.
        carries: where the difference is largest: tokens with their share of its squared norm.
        attends: what the head that the edge enters attends to from the last read position (a
        group's heads on average); source_attends: what the head that it leaves does. Texts are of
        the most common prompt length; a token in brackets varies from prompt to prompt.
        """
        import pandas

        return pandas.DataFrame(list(self.rows), columns=list(COLUMNS))

    @property
    def pattern_table(self) -> Any:
        """A pandas DataFrame: attention weights from read positions, in the circuit's own run.

        head; length of the prompts and n_pairs of that length; read: the position that attends;
        position, and its token (in brackets where it varies: the first prompt's); weight: mean over
        those pairs.
        """
        import pandas

        return pandas.DataFrame(list(self.patterns), columns=list(PATTERN_COLUMNS))

    def by_edge(self) -> dict[str, dict[str, float | str]]:
        """Each edge's numbers and texts by its name, without what it has none of: for pictures."""
        skip = ("edge", "source", "destination", "kind")
        return {
            row["edge"]: {k: v for k, v in row.items() if k not in skip and _says(v)}
            for row in self.rows
        }

    def top(self, k: int = 10, by: str = "rise") -> Any:
        """The rows of the table that are highest by a column's size, shown whole when printed."""
        table = self.table
        order = table[by].abs().sort_values(ascending=False).index[:k]
        return _whole_frame(table.reindex(order))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write .json, from which `load` reads all of it, or .csv, the table of the edges alone.

        Whole or not at all. Raises ValueError for another ending.
        """
        path = Path(path)
        if path.suffix not in (".json", ".csv"):
            raise ValueError(f"{path}: expected a name that ends in .json or .csv.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            write_whole(path, self.table.to_csv(index=False).encode())
            return
        rows = [{k: v if _says(v) else None for k, v in row.items()} for row in self.rows]
        document = {"format": FORMAT, "kind": KIND, "about": self.about}
        document |= {"edges": rows, "patterns": self.patterns}
        write_whole(path, json.dumps(document, allow_nan=False).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation:
        """Read what `save` wrote as .json. Raises ValueError for any other file."""
        document = read_json(path, "explanation", HINT)
        document = of_format(document, path, "explanation", kind=KIND, format=FORMAT, hint=HINT)
        with reporting_damage(path):
            rows = tuple(_filled(row) for row in check_type(document["edges"], list, "edges"))
            patterns = tuple(map(_pattern, check_type(document["patterns"], list, "patterns")))
            return cls(rows, patterns, check_type(document["about"], dict, "about"))

    def __repr__(self) -> str:
        about = self.about
        return (
            f"Explanation({len(self.rows):,} edges, {about.get('task')}, {about.get('n_pairs')} "
            f"pairs, {about.get('objective')} {about.get('value', math.nan):.3g})"
        )


def _says(value: Any) -> bool:
    """Whether a value is a number or a text with something in it."""
    return bool(value) if isinstance(value, str) else not math.isnan(value)


def _filled(row: Any) -> Row:
    """A row as it was before `save` wrote None for what was missing."""
    kinds = {name: float if name in ("rise", "direct_effect") else str for name in COLUMNS}
    empty: dict[type, float | str] = {float: math.nan, str: ""}
    return {
        name: empty[kind] if row[name] is None else check_type(row[name], kind, name)
        for name, kind in kinds.items()
    }


def _pattern(row: Any) -> Row:
    kinds = {"head": str, "token": str, "weight": float}
    return {name: check_type(row[name], kinds.get(name, int), name) for name in PATTERN_COLUMNS}
