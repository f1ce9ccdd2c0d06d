"""The pages' code runs, block after block, as a reader would run it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import typer
from support import doc_examples
from support.doc_examples import DOCS, NOT_RUN, PAGES, ROOT, name_of

import tl_edgeprune
from tl_edgeprune import cli, tasks
from tl_edgeprune.ablation.kinds import ABLATIONS
from tl_edgeprune.evaluation.measures import MEASURES
from tl_edgeprune.methods.registry import METHODS
from tl_edgeprune.models import smollm2

LANGUAGE_MODELS = ("smollm2-135m", "gpt2")
RUN = [page for page in PAGES if any(block.runs for block in doc_examples.blocks(page))]
WITH_SMOLLM2 = [page for page in RUN if "smollm2-135m" in page.read_text(encoding="utf-8")]
each = {"ids": name_of}


@contextmanager
def registers_restored() -> Iterator[None]:
    """What a page registers is forgotten after it."""
    with ExitStack() as undo:
        for register in (tasks.BUILDERS, tasks.STREAMS, METHODS, MEASURES, ABLATIONS):
            undo.enter_context(patch.dict(register))
        yield


@pytest.mark.parametrize("page", RUN, **each)
def test_blocks_run(page, tmp_path, monkeypatch):
    """With a tiny model in place of language models; compiled programs are the page's own."""
    monkeypatch.chdir(tmp_path)
    doc_examples.shorten(monkeypatch, stand_ins=LANGUAGE_MODELS, n=8)
    with registers_restored():
        doc_examples.run(page)


@pytest.mark.slow
@pytest.mark.skipif(smollm2.wheel_folder() is None, reason=f"needs {smollm2.REQUIREMENT}")
@pytest.mark.parametrize("page", WITH_SMOLLM2, **each)
def test_blocks_run_with_smollm2(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    doc_examples.shorten(monkeypatch, stand_ins=("gpt2",), n=24)
    with registers_restored():
        doc_examples.run(page)


@pytest.mark.slow
def test_blocks_that_compile_and_train_run():
    pytest.importorskip("tracr.rasp", reason="needs tl_edgeprune[tracr]")
    page = DOCS / "ground_truth.md"
    doc_examples.run_blocks(
        page, [b for b in doc_examples.blocks(page) if b.title.startswith(NOT_RUN)]
    )


@pytest.mark.parametrize("page", PAGES, **each)
def test_blocks_that_are_not_run_name_what_is_there(page):
    for block in doc_examples.blocks(page):
        assert block.language in doc_examples.LANGUAGES, f"line {block.line}"
        if block.language == "python" and not block.runs:
            doc_examples.check(block.code)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("from tl_edgeprune import EdgePruner\nEdgePruner(n_edge=1)", TypeError),
        ("from tl_edgeprune import EdgePruner\np = EdgePruner(1)\np.fit(model)", TypeError),
        ("from tl_edgeprune import Task\nTask.aline('a', [], [], [])", AttributeError),
        ("from tl_edgeprune import tasks\ntasks.loads('ioi')", AttributeError),
        ("from tl_edgeprune import pruners", ImportError),
        ("if True\n    pass", SyntaxError),
    ],
)
def test_what_is_not_there_is_found_without_running(code, error):
    with pytest.raises(error):
        doc_examples.check(code)


@pytest.mark.parametrize("page", PAGES, **each)
def test_commands_of_the_pages_exist(page):
    """tl-edgeprune's commands and options, make's targets, scripts of the repository."""
    commands = typer.main.get_command(cli.app).commands
    targets = re.findall(r"^([\w-]+)(?=.*:)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in shell_lines(page):
        heads = [i for i, word in enumerate(words) if re.search(r"tl[-_]edgeprune$", word)]
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), words
        elif heads and "install" not in words:
            command = commands[words[heads[0] + 1]]
            known = {name for option in command.params for name in option.opts} | {"--help"}
            given = {word for word in words[heads[0] + 2 :] if word.startswith("--")}
            assert given <= known, words
        for word in words:
            if word.startswith("benchmarks/") and word.endswith(".py"):
                assert (ROOT / word).is_file(), word


def shell_lines(page: Path) -> list[list[str]]:
    """The words of each command on a page, without comments."""
    code = "\n".join(b.code for b in doc_examples.blocks(page) if b.language in ("sh", "bash"))
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_method_is_told_on_its_page():
    """What it computes, its equation, its cost, when it misleads."""
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^### `([\w-]+)`[^\n]*\n(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL))
    assert set(parts) == set(METHODS)
    for name, part in parts.items():
        for needed in ("```text", "**Cost.**", "**When it misleads.**"):
            assert needed in part, f"{name}: no {needed}"


def test_every_public_name_is_in_the_reference():
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert [name for name in tl_edgeprune.__all__ if not re.search(rf"\b{name}\b", page)] == []


def test_lines_that_tables_put_beside_others_are_run():
    """Where a table's last column is "here", its lines stand in the page's blocks."""
    for page in PAGES:
        run = "".join(
            "".join(block.code for block in doc_examples.blocks(page) if block.runs).split()
        )
        tables = re.findall(r"^\|.*\| here \|\n(?:\|.*\n)+", page.read_text("utf-8"), re.MULTILINE)
        for row in [row for table in tables for row in table.splitlines()[2:]]:
            for code in re.findall(r"`(\w+ = [^`]+\(.*?)`", row.rsplit("| ", 1)[1]):
                assert "".join(code.split()) in run, f"{name_of(page)}: {code}"


@pytest.mark.parametrize("page", PAGES, **each)
def test_links_and_pictures_of_the_docs_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_navigation():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": ([\w/]+\.md)$", settings, re.MULTILINE))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_what_is_not_run_says_so_and_is_little():
    hidden = [
        b.title for page in PAGES for b in doc_examples.blocks(page) if b.title.startswith(NOT_RUN)
    ]
    assert len(hidden) <= 4
    assert all(": needs " in title for title in hidden)
