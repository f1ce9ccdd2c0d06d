"""What a wheel and a source archive hold, and that the wheel works where it is installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tl_edgeprune"

pytest.importorskip("hatchling", reason="needs hatchling, which builds the package")


@pytest.fixture(scope="module")
def built(tmp_path_factory: Any) -> tuple[Path, Path]:
    """A wheel and a source archive."""
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    folder = str(tmp_path_factory.mktemp("dist"))
    wheel, archive = (
        Path(next(builder(str(ROOT)).build(directory=folder, versions=["standard"])))
        for builder in (WheelBuilder, SdistBuilder)
    )
    return wheel, archive


def test_the_wheel_holds_the_package_whole_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        commands = wheel.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    source = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"tl_edgeprune/py.typed", "tl_edgeprune/report/page/template.html"} <= source
    assert any(name.endswith(".safetensors") for name in source)
    assert {name for name in names if ".dist-info/" not in name} == source
    extras = {"demo", "tracr", "peers", "docs", "test", "lint", "dev"}
    assert extras == {
        line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")
    }
    assert "tl-edgeprune = tl_edgeprune.cli:main" in commands


def test_every_dependency_is_told_of(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA")))
    lines = [line for line in metadata.decode().splitlines() if line.startswith("Requires-Dist: ")]
    needed = {
        re.split("[<>=]", line.removeprefix("Requires-Dist: "))[0].lower()
        for line in lines
        if "extra ==" not in line
    }
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8").lower()
    assert len(needed) > 10
    assert [name for name in needed if f"| `{name}` |" not in page] == []


def test_the_source_archive_holds_what_the_tests_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")} <= names
    assert {"LICENSE", "Makefile", "constraints.txt", "docs/cli.md", "pyproject.toml"} <= names
    assert any(name.startswith("benchmarks/") for name in names)


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its dependencies are this environment's."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    (site,) = bare.glob("lib/python*/site-packages")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", bare / "bin" / "python", "install", "-q"),
            *("--no-deps", "--no-compile", "--no-index", "--disable-pip-version-check", built[0]),
        ],
        check=True,
    )
    here = [path for path in sys.path if path.endswith("site-packages")]
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in here)
    (site / "behind.pth").write_text(lines, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def told(*command: str | Path) -> str:
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = told(bare / "bin" / "python", "-c", "import tl_edgeprune as t; print(t.__file__)")
    assert Path(where.strip()).is_relative_to(bare)
    listed = json.loads(told(bare / "bin" / "python", "-m", "tl_edgeprune", "models", "--json"))
    assert "tracr-reverse" in listed
    assert "plan" in told(bare / "bin" / "tl-edgeprune", "--help")
    code = "from tl_edgeprune import models; print(models.load('tracr-reverse').cfg.n_layers)"
    assert told(bare / "bin" / "python", "-c", code).strip().endswith("4")


@pytest.mark.slow
def test_importing_takes_little_more_than_transformer_lens_does() -> None:
    """In seconds of a processor, which other programs do not change much; the best of three.

    TransformerLens 4 loads its TransformerBridge on first use: that is counted as its own.
    """

    def seconds(code: str) -> float:
        timed = f"import time; {code}; print(time.process_time())"
        run = [sys.executable, "-W", "ignore", "-c", timed]
        done = [subprocess.run(run, check=True, capture_output=True, text=True) for _ in range(3)]
        return min(float(each.stdout.split()[-1]) for each in done)

    theirs = seconds("from transformer_lens.model_bridge import TransformerBridge")
    assert seconds("from tl_edgeprune import EdgePruner, compare, tasks, models") < 1.5 * theirs
    assert seconds("import tl_edgeprune") < 0.5
    assert seconds("import sys; sys.argv = ['x', '--help']; import tl_edgeprune.cli") < 1.5
