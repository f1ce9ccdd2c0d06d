"""The pages' code runs, block after block, as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from tl_edgeprune import EdgePruner, tasks
from tl_edgeprune.models import smollm2

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
EVALUATION = ROOT / "docs" / "evaluation.md"
POSITIONS = ROOT / "docs" / "positions.md"
FENCE = re.compile(
    r'(?P<slow><!-- slow -->\n)?^```(?P<language>python|json)(?: title="(?P<title>[^"]+)")?\n'
    r"(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    line: int
    language: str
    title: str | None
    slow: bool
    code: str


def blocks(page: Path = TUTORIAL) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            text[: match.start("code")].count("\n") + 1,
            match["language"],
            match["title"],
            bool(match["slow"]),
            match["code"],
        )
        for match in FENCE.finditer(text)
    ]


def run(chosen: list[Block], page: Path = TUTORIAL) -> None:
    """Run blocks in one namespace, in the working folder; errors name the page's line."""
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in chosen:
        if block.title:
            Path(block.title).write_text(block.code, encoding="utf-8")
        else:
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, str(page), "exec"), namespace)


def change_defaults(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Other defaults of EdgePruner, for a quick and quiet run."""
    original = EdgePruner.__init__

    def changed(self: EdgePruner, *args: Any, **settings: Any) -> None:
        original(self, *args, **(changes | settings))

    monkeypatch.setattr(EdgePruner, "__init__", changed)


def test_quick_blocks_of_the_tutorial_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change_defaults(monkeypatch, progress=False)
    quick = [block for block in blocks() if not block.slow]
    assert len(quick) >= 10
    run(quick)
    assert (tmp_path / "circuit.html").stat().st_size > 10_000


def test_blocks_on_evaluation_run():
    every = blocks(EVALUATION)
    assert len(every) >= 6
    run(every, EVALUATION)


def test_blocks_on_positions_run():
    every = blocks(POSITIONS)
    assert len(every) >= 4
    run(every, POSITIONS)


def test_quick_blocks_on_ground_truth_run(monkeypatch):
    page = ROOT / "docs" / "ground_truth.md"
    change_defaults(monkeypatch, progress=False)
    quick = [block for block in blocks(page) if not block.slow]
    assert len(quick) >= 2
    run(quick, page)


@pytest.mark.slow
def test_slow_blocks_on_ground_truth_run(monkeypatch):
    pytest.importorskip("tracr", reason="needs tl_edgeprune[tracr]")
    page = ROOT / "docs" / "ground_truth.md"
    run([block for block in blocks(page) if block.slow], page)


@pytest.mark.slow
@pytest.mark.skipif(smollm2.wheel_folder() is None, reason=f"needs {smollm2.REQUIREMENT}")
def test_slow_blocks_of_the_tutorial_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change_defaults(monkeypatch, progress=False, steps=4)
    load = tasks.load
    monkeypatch.setattr(tasks, "load", lambda name, model, n, seed: load(name, model, 24, seed))
    every = blocks()
    run(every[:1] + [block for block in every if block.slow or block.title])


@pytest.mark.slow
@pytest.mark.skipif(smollm2.wheel_folder() is None, reason=f"needs {smollm2.REQUIREMENT}")
def test_blocks_on_tasks_run():
    with patch.dict(tasks.BUILDERS), patch.dict(tasks.STREAMS):
        every = blocks(ROOT / "docs" / "tasks.md")
        assert len(every) >= 4
        run(every)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_links_and_pictures_of_the_docs_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
