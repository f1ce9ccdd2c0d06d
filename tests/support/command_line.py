"""The command line as tests call it, on a tiny Llama in a folder and a file of pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from support import llama_folder
from tl_edgeprune.cli import app

WORDS = "[UNK] <s> when and went to the shop gave book John Mary Tom Anna Bob Eve Lucy Paul".split()
NAMES = WORDS[-8:]
SMALL = "--n-edges 20 --batch-size 4".split()


def model(folder: Path) -> str:
    """A folder with a Llama of 82 edges and a word-level tokenizer."""
    llama_folder.talking_llama(folder / "tiny", WORDS, seed=2)
    return str(folder / "tiny")


def task(folder: Path) -> str:
    """A file of 16 pairs."""
    path = folder / "gifts.jsonl"
    lines = []
    for i in range(16):
        a, b, c, d = (NAMES[(i + k + i // 8 * k) % 8] for k in range(4))
        text = "when {} and {} went to the shop {} gave the book to<predict> {}</predict>"
        pair = {"clean": text.format(a, b, a, b), "corrupted": text.format(c, d, c, d)}
        lines.append(json.dumps(pair))
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def left(folder: Path) -> set[str]:
    """Names of the files in a folder, but for locks."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def told(*arguments: object) -> Any:
    """The command's result, its output apart from its errors. A defect is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def mistake(*arguments: object) -> str:
    """What a command that fails with exit code 1 tells in one line on stderr: JSON with --json."""
    result = told(*arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    (line,) = result.stderr.strip().split("\n")
    assert "Traceback" not in line
    if "--json" not in arguments:
        assert line.startswith("tl-edgeprune: ")
        return line.removeprefix("tl-edgeprune: ")
    error = json.loads(line)
    assert error["exit_code"] == 1 and error["kind"].endswith("Error")
    return error["error"]
