"""Pairs from a DataFrame or a dataset are those of a JSON-lines file with the same rows."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest
from support import tokenizer_models

from tl_edgeprune import tasks
from tl_edgeprune.tasks import Task

ROWS = [
    {"clean": "The car is<predict> red</predict>", "corrupted": "The hat is", "split": "train"},
    {"clean": "The car is", "corrupted": "The hat is", "right": [" red"], "wrong": [" blue"]},
    {"clean": "The cup is<predict> blue</predict>", "corrupted": "The pen is", "split": "test"},
]
FILLED = [{"right": None, "wrong": None, "split": None} | row for row in ROWS]  # one set of columns


def contents(task: Task) -> list:
    fields = ("clean", "corrupted", "read_positions", "answers", "distractors", "right", "wrong")
    return [[tokens.tolist() for tokens in getattr(task, field)] for field in fields]


@pytest.fixture(scope="module")
def model():
    return tokenizer_models.load("words")


@pytest.fixture
def from_file(tmp_path, model):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return lambda split: contents(tasks.from_jsonl(path, model, split=split))


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_tables_give_what_the_file_gives(from_file, model, split):
    expected = from_file(split)
    frame = pd.DataFrame(ROWS).assign(note=1.5)  # what a row lacks is NaN there
    assert contents(tasks.from_pandas(frame, model, split=split)) == expected
    arrays = [
        {k: np.array(v) if k in ("right", "wrong") else v for k, v in r.items()} for r in ROWS
    ]
    assert contents(tasks.from_pandas(pd.DataFrame(arrays), model, split=split)) == expected
    assert contents(tasks.from_hf_dataset(iter(ROWS), model, split=split)) == expected
    assert contents(tasks.from_hf_dataset(FILLED, model, split=split)) == expected


def test_datasets_and_dictionaries_of_them(from_file, model):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(FILLED)
    for split in (None, "train"):
        assert contents(tasks.from_hf_dataset(dataset, model, split=split)) == from_file(split)
    both = datasets.DatasetDict(train=dataset.select([0]), test=dataset.select([1, 2]))
    task = tasks.from_hf_dataset(both, model, split="test", name="colours", prepend_bos=True)
    assert task.name == "colours" and len(task) == 2 and task.prepend_bos
    with pytest.raises(ValueError, match="split=None, expected one of its splits: train, test"):
        tasks.from_hf_dataset(both, model)
    with pytest.raises(ValueError, match="dataset: no column 'clean' among 'prompt', 'corrupted'"):
        renamed = dataset.rename_column("clean", "prompt").select_columns(["prompt", "corrupted"])
        tasks.from_hf_dataset(renamed, model)


def test_datasets_are_not_imported_for_rows(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(tasks.from_hf_dataset(ROWS, model)) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clean": None}, 'row b: "clean" is None, expected a text'),
        ({"clean": 3}, 'row b: "clean" is 3, expected a text'),
        ({"clean": "The car is"}, 'row b: "clean" marks no answer'),
        ({"corrupted": "The red hat is"}, "row b: .*clean has 3 tokens and corrupted has 4"),
        ({"right": " red"}, "row b: \"right\" is ' red', expected a list"),
    ],
)
def test_errors_name_the_row(model, change, message):
    frame = pd.DataFrame([ROWS[0], ROWS[0] | change], index=["a", "b"])
    with pytest.raises(ValueError, match=f"DataFrame, {message}"):
        tasks.from_pandas(frame, model)
    with pytest.raises(ValueError, match=f"dataset, {message.replace('row b', 'row 1')}"):
        tasks.from_hf_dataset([ROWS[0], ROWS[0] | change], model)


def test_what_is_no_table(model):
    with pytest.raises(TypeError, match="takes a DataFrame, not a list"):
        tasks.from_pandas(ROWS, model)
    with pytest.raises(ValueError, match="no column 'corrupted' among 'clean': rename"):
        tasks.from_pandas(pd.DataFrame({"clean": ["a"]}), model)
    for wrong in ("some/dataset", 3):
        with pytest.raises(TypeError, match="datasets.load_dataset"):
            tasks.from_hf_dataset(wrong, model)
    with pytest.raises(ValueError, match="dataset, row 0: a str, expected a mapping"):
        tasks.from_hf_dataset(["text"], model)
    with pytest.raises(ValueError, match="split='dev'; splits found: test, train"):
        tasks.from_pandas(pd.DataFrame(ROWS[::2]), model, split="dev")
