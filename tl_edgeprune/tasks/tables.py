"""Your own prompt pairs from a table: a DataFrame, a Hugging Face dataset, or any mappings.

A row has the columns of a JSON-lines file (`jsonl.py`): "clean" and "corrupted", and optionally
"right", "wrong" and "split". Other columns are ignored. A missing value (None, NaN) means that the
row does not have the column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from torch import nn

from tl_edgeprune.tasks.jsonl import checked_record, read_pairs, task_of
from tl_edgeprune.tasks.task import SET_FIELDS, Task

COLUMNS = ("clean", "corrupted", "split", *SET_FIELDS)


def from_pandas(
    frame: Any,
    model: nn.Module,
    *,
    name: str = "pairs",
    prepend_bos: bool | None = None,
    split: str | None = None,
) -> Task:
    """A task from a DataFrame with one pair per row (columns: see the module's docstring).

    Args:
        frame: a pandas DataFrame.
        model: its tokenizer reads the texts.
        name: what the task is called in results.
        prepend_bos: None means as the model's tokenizer does by default.
        split: only the rows of this split and those without one; None takes all rows.

    Raises:
        TypeError: not a DataFrame.
        ValueError: a column is missing; or, with the row, what `from_jsonl` refuses.
    """
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(
            f"from_pandas takes a DataFrame, not a {type(frame).__name__}: for other "
            "tables of rows, use tasks.from_hf_dataset."
        )
    _check_columns("DataFrame", frame.columns)
    columns = [column for column in COLUMNS if column in frame.columns]
    rows = frame[columns].astype(object).to_dict("records")
    entries = zip((f"row {index}" for index in frame.index), rows, strict=True)
    pairs, prepend_bos = read_pairs("DataFrame", entries, _record, model, prepend_bos, split)
    return task_of(name, pairs, prepend_bos, name)


def from_hf_dataset(
    dataset: Any,
    model: nn.Module,
    *,
    name: str = "pairs",
    prepend_bos: bool | None = None,
    split: str | None = None,
) -> Task:
    """A task from a `datasets.Dataset`, a dictionary of them by split, or any mappings.

    Args:
        dataset: one pair per row (columns: see the module's docstring).
        model, name, prepend_bos: as for `from_pandas`.
        split: chooses from a dictionary of datasets, otherwise rows by their "split".

    Raises:
        TypeError: the argument has no rows, such as a dataset's name.
        ValueError: an unknown split; a column is missing; or, with the row, what `from_jsonl`
            refuses.
    """
    if isinstance(dataset, Mapping):
        dataset, split = _chosen(dataset, split), None
    if isinstance(dataset, (str, bytes)) or not isinstance(dataset, Iterable):
        raise TypeError(
            f"from_hf_dataset takes a loaded dataset or rows, not {dataset!r}: load it first, with "
            "datasets.load_dataset(…)."
        )
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        _check_columns("dataset", columns)
    entries = ((f"row {number}", row) for number, row in enumerate(dataset))
    pairs, prepend_bos = read_pairs("dataset", entries, _record, model, prepend_bos, split)
    return task_of(name, pairs, prepend_bos, name)


def _chosen(splits: Mapping[str, Any], split: str | None) -> Any:
    if split is None or split not in splits:
        raise ValueError(
            f"dataset: split={split!r}, expected one of its splits: {', '.join(map(str, splits))}."
        )
    return splits[split]


def _check_columns(source: str, columns: Iterable[Any]) -> None:
    columns = [*columns]
    missing = [column for column in ("clean", "corrupted") if column not in columns]
    if missing:
        raise ValueError(
            f"{source}: no column {' and '.join(map(repr, missing))} among "
            f"{', '.join(map(repr, columns))}: rename its columns to 'clean' and 'corrupted'."
        )


def _record(row: Any) -> dict[str, Any]:
    """A row as the record of a JSON line."""
    if not isinstance(row, Mapping):
        raise ValueError(
            f"a {type(row).__name__}, expected a mapping with 'clean' and 'corrupted'."
        )
    values = {column: _plain(row[column]) for column in COLUMNS if column in row}
    return checked_record({column: v for column, v in values.items() if not _is_missing(v)})


def _plain(value: Any) -> Any:
    """Arrays and tuples as lists, NumPy's scalars as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _is_missing(value: Any) -> bool:
    return not isinstance(value, list) and bool(pd.isna(value))
