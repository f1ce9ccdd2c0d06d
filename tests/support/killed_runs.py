"""Short pruning runs that are killed (SIGKILL) at random moments, and go on until they end.

`python killed_runs.py FOLDER RUNS SEED` imports everything once; each attempt is a process forked
from it, which trains no model itself. It prints one JSON object: the kills by their moments, and
the runs whose end differs from that of the run that was never killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from support import model_zoo
from tl_edgeprune import EdgePruner, Lagrangian

MODEL, STEPS = "bridge-gpt2", 8
SETTINGS: list[dict[str, Any]] = [
    {},
    {"controller": Lagrangian(), "node_masks": True, "init_scores": None},
]
CHECKPOINT = "run.safetensors"
MOMENTS = ("any", "half written", "not renamed", "just renamed")


def fit(folder: Path, settings: dict[str, Any]) -> None:
    """Begin the run, or go on with it; what it finds, to the bit, in `found`."""
    path, model = folder / CHECKPOINT, model_zoo.load(MODEL)
    resume = path if path.is_file() else None
    common: dict[str, Any] = {"steps": STEPS, "batch_size": 2, "checkpoint_every": 2}
    pruner = EdgePruner(20, **common, **settings, checkpoint=path, progress=False)
    result = pruner.fit(model, model_zoo.pairs(model, 6), resume=resume)
    losses = [entry["loss"].hex() for entry in result.history]
    found = [result.log_alpha.numpy().tobytes().hex(), losses, result.circuit.edges]
    (folder / "found").write_text(json.dumps(found))


def killed_in_write(moment: str, number: int) -> None:
    """Have this process killed around the write of its checkpoint of this number."""
    write, replace = Path.write_bytes, os.replace
    left = number

    def now(wanted: str) -> bool:
        return moment == wanted and left == 0

    def write_bytes(path: Path, content: bytes) -> int:
        nonlocal left
        left -= 1
        if now("half written"):
            write(path, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)

    def rename(source: Any, target: Any) -> None:
        if now("not renamed"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if now("just renamed"):
            os.kill(os.getpid(), signal.SIGKILL)

    Path.write_bytes, os.replace = write_bytes, rename  # type: ignore[method-assign, assignment]


def forked(work: Callable[[], None], kill_after: float | None = None) -> bool:
    """Run this in a process of its own; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGKILL
    assert os.WEXITSTATUS(status) == 0, "the run failed"
    return False


def killed_run(folder: Path, settings: dict[str, Any], seconds: float, dice: random.Random) -> Any:
    """A run that ends after one to three attempts to kill it; the moments of the kills."""
    folder.mkdir()
    kills: Counter[str] = Counter()
    for _ in range(dice.randint(1, 3)):
        moment, number = dice.choice(MOMENTS), dice.randint(1, STEPS // 2)

        def attempt(moment: str = moment, number: int = number) -> None:
            killed_in_write(moment, number)
            fit(folder, settings)

        after = dice.uniform(0, seconds) if moment == "any" else None
        if not forked(attempt, after):
            break
        kills[moment] += 1
    forked(lambda: fit(folder, settings))
    left = sorted(path.name for path in folder.iterdir())
    assert left == [f".{CHECKPOINT}.lock", "found", CHECKPOINT], left
    return kills


def main(root: Path, runs: int, seed: int) -> None:
    torch.set_num_threads(1)
    model_zoo.load(MODEL)
    whole, seconds = [], []
    for number, settings in enumerate(SETTINGS):
        folder, began = root / f"whole{number}", time.monotonic()
        folder.mkdir()
        forked(lambda folder=folder, settings=settings: fit(folder, settings))  # type: ignore[misc]
        seconds.append(time.monotonic() - began)
        whole.append((folder / "found").read_bytes())
    kills: Counter[str] = Counter()
    different = []
    for run in range(runs):
        kind, dice = run % len(SETTINGS), random.Random(seed * 10_000 + run)
        folder = root / f"run{run}"
        kills += killed_run(folder, SETTINGS[kind], seconds[kind], dice)
        if (folder / "found").read_bytes() != whole[kind]:
            different.append(run)
    print(json.dumps({"kills": kills, "different": different}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
