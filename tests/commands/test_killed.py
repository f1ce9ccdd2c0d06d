"""Runs that are killed at any moment go on to the same bits, and leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import killed_runs


@pytest.mark.parametrize("runs", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_runs_go_on_to_the_same_bits(runs: int, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, killed_runs.__file__, str(tmp_path), str(runs), "0"],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["different"] == []
    assert sum(told["kills"].values()) >= runs
    if runs == 100:
        assert set(told["kills"]) == set(killed_runs.MOMENTS)
