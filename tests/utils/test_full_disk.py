"""A full disk and a read-only folder: an error with the path, and what was there is as it was."""

from __future__ import annotations

import errno
import math
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import model_zoo
from support.command_line import SMALL, mistake, told

from tl_edgeprune import Circuit, Constants, EdgeGraph, EdgePruner, EdgeScores, Explanation
from tl_edgeprune.commands.common.run_folder import write_json
from tl_edgeprune.evaluation.comparison_folder import Folder, Run
from tl_edgeprune.evaluation.explain.explanation import COLUMNS
from tl_edgeprune.runs import checkpoint as checkpoints
from tl_edgeprune.utils.writing import clear_leftovers

GRAPH = EdgeGraph(2, 2, 2)


@contextmanager
def full_disk(room: int = 64) -> Iterator[None]:
    """No file can grow above so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def scores(seed: int) -> EdgeScores:
    noise = torch.randn(GRAPH.n_edges, generator=torch.Generator().manual_seed(seed))
    return EdgeScores(GRAPH, noise, {"d_model": 8, "seed": seed})


def circuit(seed: int) -> Circuit:
    return scores(seed).top(9)


def constants(seed: int) -> Constants:
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(2, 2, 2, generator=generator)
    return Constants(GRAPH, torch.rand(1, 4), z, torch.rand(2, 4))


def explanation(seed: int) -> Explanation:
    row = dict.fromkeys(COLUMNS, "x") | {"rise": float(seed), "direct_effect": math.nan}
    return Explanation((row,), (), {"task": "x"})


def compared(path: Path, seed: int) -> None:
    """A comparison's note."""
    model = model_zoo.load("bridge-gpt2")
    task = model_zoo.pairs(model, 4)
    folder = Folder(path.parent, model, task, task)
    fields = {"cost": None, "found": None, "figures": seed}
    folder._write_note(Run(path.stem, "eap", {}, (3,)), fields)


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "circuit.json": lambda path, seed: circuit(seed).save(path),
    "scores.safetensors": lambda path, seed: scores(seed).save(path),
    "constants.safetensors": lambda path, seed: constants(seed).save(path),
    "explanation.json": lambda path, seed: explanation(seed).save(path),
    "explanation.csv": lambda path, seed: explanation(seed).save(path),
    "checkpoint.safetensors": lambda path, seed: checkpoints.save(
        path, checkpoints.SavedState({"log_alpha": scores(seed).tensor}, {}, {"history": []})
    ),
    "evaluation.json": lambda path, seed: write_json(path, {"kl": [seed] * 50}),
    "circuit.html": lambda path, seed: circuit(seed).report(path),
    "circuit.svg": lambda path, seed: circuit(seed).draw(path),
    "mib.json": lambda path, seed: circuit(seed).to_mib(path),
    "mib.pt": lambda path, seed: circuit(seed).to_mib(path),
    "eap.json": compared,
}


def told_and_left(path: Path, attempt: Callable[[], Any], kind: type[OSError], number: int) -> None:
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(kind, match="could not be written") as error:
        attempt()
    assert error.value.errno == number and str(path) in str(error.value)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_earlier_file(name: str, tmp_path: Path) -> None:
    path, write = tmp_path / name, WRITERS[name]
    write(path, 0)
    with full_disk():
        told_and_left(path, lambda: write(path, 1), OSError, errno.EFBIG)
    write(path, 1)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_folder_leaves_the_earlier_file(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, whom permissions do not stop: the system's answer is put in its place."""
    path, write = tmp_path / name, WRITERS[name]
    write(path, 0)
    mkdir = os.mkdir

    def refuse(made: Any, *mode: Any, **options: Any) -> None:
        if Path(made).parent == tmp_path:
            raise OSError(number, os.strerror(number), str(made))
        mkdir(made, *mode, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    told_and_left(path, lambda: write(path, 1), OSError, number)


def test_a_run_whose_disk_fills_goes_on_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = model_zoo.load("bridge-gpt2"), tmp_path / "run.safetensors"
    task = model_zoo.pairs(model, 6)

    def pruner() -> EdgePruner:
        settings: dict[str, Any] = {"steps": 6, "batch_size": 2, "checkpoint_every": 2}
        return EdgePruner(20, **settings, init_scores=None, checkpoint=path, progress=False)

    whole = pruner().fit(model, task)
    path.unlink()
    save, saved = checkpoints.save, []

    def second_fails(*arguments: Any) -> None:
        saved.append(1)
        with full_disk() if len(saved) == 2 else full_disk(2**30):
            save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", second_fails)
        with pytest.raises(OSError, match=r"could not be written.*run\.safetensors"):
            pruner().fit(model, task)
    assert len(checkpoints.load(path).note["history"]) == 2
    rest = pruner().fit(model, task, resume=path)
    assert rest.log_alpha.equal(whole.log_alpha)


def test_the_command_line_tells_it_in_one_line(llama: str, gifts: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = ["prune", llama, gifts, *SMALL, "--steps", 3, "--out", out, "--json"]
    with full_disk():
        line = mistake(*asked)
    assert "could not be written (File too large)" in line and str(out / "settings.json") in line
    assert [path.name for path in out.iterdir()] == [".lock"]
    with full_disk(8000):  # room for the checkpoint, and none for the picture
        line = mistake(*asked)
    assert "could not be written" in line and str(out / "history.png") in line
    assert all(path.is_file() for path in out.iterdir()) and not (out / "circuit.json").exists()
    assert told("resume", out).exit_code == 0
    circuit(0).save(tmp_path / "c.json")
    with full_disk():
        line = mistake("show", tmp_path / "c.json", "--out", tmp_path / "c.html")
    assert "could not be written" in line and str(tmp_path / "c.html") in line


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name, write in WRITERS.items():
        path = tmp_path / name
        path.symlink_to(outside)
        write(path, 0)
        assert not path.is_symlink() and outside.read_text() == "mine"


def test_leftovers_of_killed_writers_alone_are_removed(tmp_path: Path) -> None:
    for name in (".a.json.abcd_123", ".b.json.abcd_123", ".a.json.other123"):
        (tmp_path / name).mkdir()
    (tmp_path / ".a.json.abcd_123" / "a.json").touch()
    (tmp_path / ".a.json.other123" / "mine").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".a.json.abcd_456").symlink_to(tmp_path / "elsewhere")
    clear_leftovers(tmp_path, "a.json")
    left = {".b.json.abcd_123", ".a.json.other123", ".a.json.abcd_456", "elsewhere"}
    assert {path.name for path in tmp_path.iterdir()} == left
