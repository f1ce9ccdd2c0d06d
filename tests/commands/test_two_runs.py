"""Two runs in one folder, or on one checkpoint, do not mix: the second is refused."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import model_zoo
from support.command_line import SMALL, mistake, told

from tl_edgeprune import EdgePruner, compare, discover
from tl_edgeprune.utils.locks import locked_file, locked_folder

HOLD = """
import sys
from pathlib import Path
from tl_edgeprune.utils import locks
with getattr(locks, sys.argv[1])(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""
MODEL = "bridge-gpt2"


@contextmanager
def other_process(lock: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process at work there, until it is killed."""
    command = [sys.executable, "-c", HOLD, lock, str(path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def fit(path: Path) -> None:
    model = model_zoo.load(MODEL)
    settings: dict[str, Any] = {"steps": 2, "batch_size": 2, "init_scores": None}
    pruner = EdgePruner(20, **settings, checkpoint=path, progress=False)
    pruner.fit(model, model_zoo.pairs(model, 4))


def acdc(path: Path) -> None:
    model = model_zoo.load(MODEL)
    discover(model, model_zoo.pairs(model, 2), "acdc", threshold=5.0, checkpoint=path)


@pytest.mark.parametrize("run", [fit, acdc])
def test_a_checkpoint_has_one_writer(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with other_process("locked_file", path):
        with pytest.raises(BlockingIOError, match=f"another run writes {path}: wait"):
            run(path)
        assert not path.exists()
    with pytest.warns(UserWarning) if run is acdc else locked_folder(tmp_path):
        run(path)  # the other one was killed: its lock went with it


def test_a_comparisons_folder_has_one_process(tmp_path: Path) -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 4)

    def run() -> Any:
        return compare(model, task, task, ["random"], sizes=[5], path=tmp_path, progress=False)

    with other_process("locked_folder", tmp_path):
        with pytest.raises(BlockingIOError, match="another process works in"):
            run()
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert len(run().rows) == 1


def test_every_command_that_writes_a_folder_is_refused(
    llama: str, gifts: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    prune = ["prune", llama, gifts, *SMALL, "--steps", 2, "--out", out]
    assert told(*prune).exit_code == 0
    (out / "circuit.json").unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    commands = {
        "resume": ["resume", out],
        "discover": ["discover", llama, gifts, "--method", "random", "--out", tmp_path / "found"],
        "compare": ["compare", llama, gifts, "--methods", "random", "--sizes", 3],
    }
    commands["compare"] += ["--out", tmp_path / "found"]
    (tmp_path / "found").mkdir()
    with other_process("locked_folder", out), other_process("locked_folder", tmp_path / "found"):
        for arguments in commands.values():
            assert "another process works in" in mistake(*arguments)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in (tmp_path / "found").iterdir()] == [".lock"]
    assert told(*commands["resume"]).exit_code == 0


def test_a_thread_is_another_and_the_same_one_may_hold_it_twice(tmp_path: Path) -> None:
    refused: list[BaseException] = []

    def second() -> None:
        try:
            with locked_folder(tmp_path):
                pass
        except BlockingIOError as error:
            refused.append(error)

    with locked_folder(tmp_path), locked_folder(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1
    with locked_folder(tmp_path):
        pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """A stranger's folder could name any file of the user's as its lock."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for lock, hold in ((".lock", locked_folder), (".x.lock", locked_file)):
        (tmp_path / lock).symlink_to(precious)
        with pytest.raises(FileExistsError, match="not this program's lock file"):
            with hold(tmp_path if hold is locked_folder else tmp_path / "x"):
                pass
    assert precious.read_text() == "mine"
