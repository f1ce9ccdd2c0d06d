"""Files from strangers: a reader gives what a file says or an error that names it, and does nothing
else: no crash, no hang, no file written.

CI draws few cases; the slow test draws 10,000 over all readers.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ioi_model, model_zoo
from support.corrupted_files import RAW, harmed_bytes, harmed_json, harmed_safetensors

from tl_edgeprune import (
    Circuit,
    Constants,
    EdgeGraph,
    EdgePruner,
    EdgeScores,
    Explanation,
    Neurons,
    tasks,
)
from tl_edgeprune.commands.common import config
from tl_edgeprune.commands.common.inputs import Inputs
from tl_edgeprune.commands.common.run_folder import Run as CommandRun
from tl_edgeprune.commands.common.run_folder import write_json
from tl_edgeprune.commands.show import _figures
from tl_edgeprune.evaluation.comparison_folder import Folder, Run
from tl_edgeprune.evaluation.evaluate import Evaluation
from tl_edgeprune.evaluation.explain.explanation import COLUMNS, PATTERN_COLUMNS
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import MOST_EDGES
from tl_edgeprune.methods import acdc, exact
from tl_edgeprune.objectives import find_objective
from tl_edgeprune.runs import totals
from tl_edgeprune.runs.resume import Saved
from tl_edgeprune.training.trainer import Trainer
from tl_edgeprune.utils.profiling import Cost
from tl_edgeprune.utils.reading import MOST_BYTES, parse_json

CASES = 10_000  # over all readers, in the slow test
SECONDS = 10.0  # of the processor, for any one file: it is a hang that is looked for
GRAPH = EdgeGraph(2, 2, 2)
GRAPHS = {"plain": GRAPH, "spans": EdgeGraph(1, 2, 1, spans=("S1", "S1+1", "IO"))}
ABOUT = {"method": "x", "n_pairs": 4, "settings": {"steps": 3, "betas": [0.9, 0.999]}}
Harm = Callable[[bytes], st.SearchStrategy[bytes]]


class Reader(NamedTuple):
    """How a file comes to be, in a folder; what reads it there; the ways to harm it."""

    file: str
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    harm: Harm


def of_json(content: bytes) -> st.SearchStrategy[bytes]:
    return harmed_json(json.loads(content)).map(str.encode)


def of_lines(content: bytes) -> st.SearchStrategy[bytes]:
    """One line of several harmed."""
    first, *rest = content.split(b"\n")
    return of_json(first).map(lambda line: b"\n".join([line, *rest]))


def of_words(content: bytes) -> st.SearchStrategy[bytes]:
    """A line's value replaced by what YAML and TOML make much of."""
    lines = content.split(b"\n")
    laughs = b"[" + b"*a," * 9 + b"]"
    hard = [
        b"&a [*a]",
        b"!!python/object/apply:os.system [id]",
        b"2024-99-99",
        b"1e999",
        b"{? [1]: 2}",
    ]
    hard += [
        b"[" * 10**4,
        b"&a [1,1,1]\nb: &b " + laughs,
        b"!!binary x",
        b'"\\ud800"',
        b"inf",
        b"1:1:1",
    ]
    values = st.sampled_from([*hard, *(raw.encode() for raw in RAW.values())])

    def put(place: int, value: bytes) -> bytes:
        key = re.split(rb"[:=]", lines[place])[0]
        sign = b" = " if b"=" in content else b": "
        return b"\n".join([*lines[:place], key + sign + value, *lines[place + 1 :]])

    return st.builds(put, st.integers(0, len(lines) - 1), values)


def scores(graph: EdgeGraph) -> EdgeScores:
    noise = torch.randn(graph.n_edges, generator=torch.Generator().manual_seed(0))
    return EdgeScores(graph, noise, dict(ABOUT, d_model=8))


def constants() -> Constants:
    parts = {"inputs": torch.rand(1, 4), "z": torch.rand(2, 2, 2), "mlp": torch.rand(2, 4)}
    return Constants(GRAPH, **parts, metadata=dict(ABOUT))


def neurons() -> Neurons:
    return Neurons.from_names(GRAPH, "mlp", ["m0.n3", "m1.n0"], 5, **ABOUT)


def explanation() -> Explanation:
    row = dict.fromkeys(COLUMNS, "x") | {
        "edge": "input->m0",
        "rise": 1.0,
        "direct_effect": math.nan,
    }
    pattern = dict.fromkeys(PATTERN_COLUMNS, 1) | {"head": "a0.h0", "token": "a", "weight": 0.5}
    return Explanation((row, row), (pattern,), {"task": "x", "n_pairs": 3, "value": 0.1})


def lines(path: Path) -> None:
    john = "When Mary and John went to the store , John gave a drink to"
    anna = "When Mary and Anna went to the store , Anna gave a drink to"
    pair = {"clean": john + "<predict> Mary</predict>", "corrupted": anna, "split": "train"}
    pair["spans"] = {"S1": [3, 4], "S2": [8, 9]}
    path.write_text("\n".join([json.dumps(pair)] * 2), encoding="utf-8")


@pytest.fixture(scope="module")
def training() -> Iterator[Trainer]:
    """A run that has begun, to go on from checkpoints."""
    model = model_zoo.load("bridge-gpt2")
    task, pruner = model_zoo.pairs(model, 4), trained(None)
    with MaskedModel.attach(model, EdgeGraph.from_model(model)) as run:
        yield Trainer(pruner, run, task, find_objective(None, task))


def trained(checkpoint: Path | None) -> EdgePruner:
    return EdgePruner(
        20, steps=3, batch_size=2, init_scores=None, checkpoint=checkpoint, progress=False
    )


@pytest.fixture(scope="module")
def folder_of() -> Callable[[Path], Folder]:
    """The comparison of a folder."""
    model = model_zoo.load("bridge-gpt2")
    task = model_zoo.pairs(model, 4)
    shared = Folder(Path("nowhere"), model, task, task).shared

    def made(path: Path) -> Folder:
        folder = Folder.__new__(Folder)
        folder.path, folder.shared = path, shared
        return folder

    return made


RUN = Run("eap", "eap", {}, (3,))
FIGURES = Evaluation(*(4, 3, 2, 40), *(0.5,) * 6, 1, *(0.5,) * 9)
SETTINGS = CommandRun(
    "prune", Inputs("gpt2", "ioi"), {"steps": 3}, {"torch": "2"}, "tl-edgeprune …"
)
YAML = b"model: gpt2\npairs: 256\nprune:\n  n-edges: 1000\n  controller: {kind: lagrangian}"
TOML = b"model = 'gpt2'\npairs = 256\n[prune]\nn-edges = 1000\nlr = 0.1"


@pytest.fixture(scope="module")
def readers(training: Trainer, folder_of: Any) -> dict[str, Reader]:
    """Every reader of files, by what it reads."""
    about = {"method": "acdc", "threshold": 0.1}
    singles = {"reads_left": 2, "removed": 1, "narrow": True}
    decided = {"decided_from": 5, "runs": 3, "reach": 0.3, "singles": singles}
    summed = {"batches": 2, "pairs": 7}
    n_edges = GRAPH.n_edges
    rises = torch.rand(n_edges).double()
    model = ioi_model.model()

    def checkpoint(path: Path) -> None:
        trained(path).fit(model_zoo.build("bridge-gpt2"), training.task)  # the other is in its run

    def resumed(path: Path) -> None:
        training.state.load_state_dict(training.identity.read(path))

    def compared(path: Path) -> None:
        folder_of(path.parent).write(RUN, scores(GRAPH), Cost(1.0, 2.0), [FIGURES])

    def state(about: Any, tensors: Any, values: Any) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            saved = Saved(path, about)
            saved._last = -math.inf
            saved.save(tensors, values)

        return write

    def text(content: bytes) -> Callable[[Path], Any]:
        return lambda path: path.write_bytes(content)

    def mib(path: Path) -> Any:
        return EdgeScores.from_mib(path, GRAPH, shared="sum"), Circuit.from_mib(path, GRAPH)

    def mib_of(path: Path) -> None:
        scores(GRAPH).top(9).to_mib(path)

    return {
        "circuit": Reader("c.json", lambda p: scores(GRAPH).top(9).save(p), Circuit.load, of_json),
        "circuit with spans": Reader(
            "c.json", lambda p: scores(GRAPHS["spans"]).top(9).save(p), Circuit.load, of_json
        ),
        "scores": Reader("s.safetensors", scores(GRAPH).save, EdgeScores.load, harmed_safetensors),
        "constants": Reader("k.safetensors", constants().save, Constants.load, harmed_safetensors),
        "explanation": Reader("e.json", explanation().save, Explanation.load, of_json),
        "neurons": Reader("n.json", neurons().save, Neurons.load, of_json),
        "checkpoint": Reader("r.safetensors", checkpoint, resumed, harmed_safetensors),
        "acdc": Reader(
            "a.safetensors",
            state(about, {"kept": torch.arange(n_edges) % 3 > 0, "rises": rises}, decided),
            lambda p: acdc._saved_search(Saved(p, about), GRAPH),
            harmed_safetensors,
        ),
        "exact": Reader(
            "x.safetensors",
            state(about, {"scores": torch.rand(n_edges).double()}, {"done": 3, "runs": 3}),
            lambda p: exact._saved_scores(Saved(p, about), GRAPH, n_edges),
            harmed_safetensors,
        ),
        "sums": Reader(
            "t.safetensors",
            state(about, {"total": torch.rand(n_edges)}, summed),
            lambda p: totals._saved_total(Saved(p, about), torch.zeros(n_edges)),
            harmed_safetensors,
        ),
        "comparison": Reader(
            "eap.json", compared, lambda p: folder_of(p.parent).read(RUN), of_json
        ),
        "settings": Reader(
            "settings.json",
            lambda p: write_json(p, SETTINGS.to_dict()),
            lambda p: CommandRun.read(p.parent),
            of_json,
        ),
        "evaluation": Reader(
            "evaluation.json", lambda p: write_json(p, FIGURES.to_dict()), _figures, of_json
        ),
        "yaml": Reader("x.yaml", text(YAML), config.read, of_words),
        "toml": Reader("x.toml", text(TOML), config.read, of_words),
        "mib json": Reader("m.json", mib_of, mib, of_json),
        "mib pt": Reader("m.pt", mib_of, mib, harmed_bytes),
        "lines": Reader("t.jsonl", lines, lambda p: tasks.from_jsonl(p, model), of_lines),
        "stream": Reader(
            "t.jsonl", lines, lambda p: tasks.stream_jsonl(p, model).check(), of_lines
        ),
    }


NAMES = [
    "circuit",
    "circuit with spans",
    "scores",
    "constants",
    "explanation",
    "neurons",
    "checkpoint",
    "acdc",
    "exact",
    "sums",
]
NAMES += ["comparison", "settings", "evaluation", "yaml", "toml", "mib json", "mib pt", "lines"]
NAMES += ["stream"]
STATES = ("acdc", "exact", "sums")
UNNAMED = ("yaml", "toml")  # the command line puts the file's name before the error


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A reader that blocks fails its test."""

    def stop(*_: Any) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(1200)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def check(name: str, reader: Reader, path: Path) -> Exception | None:
    """The error that the file gives, if it gives one."""
    before, began = listing(path.parent.parent), time.process_time()
    told: Exception | None = None
    try:
        reader.read(path)
    except (ValueError, OSError) as error:
        told = error
        assert name in UNNAMED or str(path) in str(error) or str(path.parent) in str(error), error
        assert len(str(error)) < 5000
    assert time.process_time() - began < SECONDS
    assert listing(path.parent.parent) == before
    return told


def listing(root: Path) -> list[tuple[str, int]]:
    return sorted((str(p.relative_to(root)), p.lstat().st_size) for p in root.rglob("*"))


def written(reader: Reader, root: Path) -> Path:
    """A whole file, in a folder of its own."""
    path = root / "inner" / reader.file
    path.parent.mkdir()
    reader.write(path)
    for lock in path.parent.glob(".*.lock"):
        lock.unlink()
    return path


def attack(name: str, reader: Reader, root: Path, cases: int) -> int:
    """Read so many harmed files; how many were refused."""
    path = written(reader, root)
    content, refused = path.read_bytes(), []
    assert check(name, reader, path) is None

    @settings(max_examples=cases, suppress_health_check=list(HealthCheck))
    @given(harmed=reader.harm(content) | harmed_bytes(content))
    def read_harmed(harmed: bytes) -> None:
        path.unlink()  # tensors of the file before may still be mapped
        path.write_bytes(harmed)
        if check(name, reader, path) is not None:
            refused.append(harmed)

    read_harmed()
    return len(refused)


@pytest.mark.parametrize("name", NAMES)
def test_a_harmed_file_is_refused_or_read(
    name: str, readers: dict[str, Reader], tmp_path: Path
) -> None:
    assert attack(name, readers[name], tmp_path, 20) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_harmed_files(name: str, readers: dict[str, Reader], tmp_path: Path) -> None:
    assert attack(name, readers[name], tmp_path, CASES // len(NAMES)) > 50


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_refused(name: str, readers: dict[str, Reader], tmp_path: Path) -> None:
    reader = readers[name]
    path = written(reader, tmp_path)
    whole = path.read_bytes()

    def refused() -> bool:
        return check(name, reader, path) is not None

    for special in ("folder", "pipe", "socket", "loop", "device"):
        path.unlink()
        if special == "folder":
            path.mkdir()
        elif special == "pipe":
            os.mkfifo(path)
        elif special == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(os.path.relpath(path))
        elif special == "loop":
            path.symlink_to(path)
        else:
            path.symlink_to("/dev/zero")
        # A comparison's run without a note is one to be made, a search without one starts anew.
        gone = name in ("comparison", "evaluation") or (name in STATES and special == "loop")
        assert refused() or gone, special
        if special == "folder":
            path.rmdir()
            path.touch()
    path.unlink()
    path.write_bytes(b"")
    os.truncate(path, 2**40)  # a terabyte of nothing
    assert refused()
    path.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(whole)
    path.symlink_to(elsewhere)
    assert not refused()


# ---------------------------------------------------------------------------------- single dangers


@pytest.mark.parametrize(
    "fields",
    [
        {"n_layers": 10**9},
        {"n_heads": 10**9, "n_kv_heads": 10**9},
        {"n_layers": 10**1000},
        {"n_layers": 1000, "n_heads": 1000, "n_kv_heads": 1000},
        {"n_layers": 1, "n_heads": 2**25, "n_kv_heads": 1},
        {"spans": [f"s{i}" for i in range(2**17)]},
    ],
)
def test_a_huge_graph_is_refused_before_anything_is_made_of_it(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    scores(GRAPH).top(3).save(path)
    document = json.loads(path.read_text())
    document["graph"] |= fields
    path.write_text(json.dumps(document))
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ValueError, match=rf"c\.json is damaged.*{MOST_EDGES:,}"):
        Circuit.load(path)
    assert time.process_time() - began < SECONDS
    assert tracemalloc.get_traced_memory()[1] < 10**8
    tracemalloc.stop()


@pytest.mark.parametrize("has_mlp", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
def test_the_size_of_a_graph_is_known_from_its_fields(
    has_mlp: bool, parallel: bool, embeddings: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`_check_size` counts edges by a formula: it is exact."""
    graph = EdgeGraph(5, 4, 2, has_mlp, parallel, split_embeddings=embeddings, spans=("a", "b"))
    monkeypatch.setattr("tl_edgeprune.graph.edge_graph.MOST_EDGES", graph.n_edges)
    assert EdgeGraph.from_dict(graph.to_dict()) == graph
    monkeypatch.setattr("tl_edgeprune.graph.edge_graph.MOST_EDGES", graph.n_edges - 1)
    with pytest.raises(ValueError, match="most that a file may have"):
        EdgeGraph.from_dict(graph.to_dict())


def test_a_file_of_text_has_a_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.touch()
    os.truncate(path, MOST_BYTES + 1)
    with pytest.raises(ValueError, match=f"{MOST_BYTES + 1:,} bytes, expected"):
        Circuit.load(path)


def test_a_packed_pt_file_is_refused(tmp_path: Path) -> None:
    """A zip of a megabyte may hold a terabyte of zeros."""
    import zipfile

    path, packed = tmp_path / "m.pt", tmp_path / "packed.pt"
    scores(GRAPH).to_mib(path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"packed\.pt.*it is compressed"):
        EdgeScores.from_mib(packed, GRAPH)


def test_tensors_that_say_more_than_there_is_of_them_are_not_read_beyond(tmp_path: Path) -> None:
    import zipfile

    whole, path = tmp_path / "m.pt", tmp_path / "short.pt"
    scores(GRAPH).top(9).to_mib(whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:1] if "/data/" in name else old.read(name))
    with pytest.raises(ValueError, match=r"short\.pt"):
        Circuit.from_mib(path, GRAPH)


@given(depth=st.integers(1, 300))
def test_depth_is_counted(depth: int) -> None:
    text = "[" * depth + "]" * depth
    if depth <= 100:
        parse_json(text)
    else:
        with pytest.raises(ValueError, match="nested too deep"):
            parse_json(text)


# ---------------------------------------------------------------------------------------- the page

HOSTILE = [
    *(
        "</script><script>alert(1)</script>",
        "<!--",
        "--><img src=x onerror=alert(1)>",
        "\u2028\u2029",
    ),
    *(
        "\ud800",
        "\udfff</title>",
        "@@DATA@@",
        "@@SCRIPT@@",
        '"\\',
        "&lt;",
        "]]>",
        "\0",
        "javascript:x",
    ),
]


class Tags(HTMLParser):
    """What a browser would run: scripts, and attributes that run code."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.handlers: list[str] = []
        self.title, self.inside = "", ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            kind, before = self.scripts[-1]
            self.scripts[-1] = (kind, before + data)
        if self.inside == "title":
            self.title += data


def parsed(page: Path) -> Tags:
    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    return tags


@given(task=st.sampled_from(HOSTILE), more=st.sampled_from(HOSTILE))
def test_a_strangers_circuit_makes_a_page_that_runs_nothing_of_it(
    task: str, more: str, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("page")
    metadata = {"task": task, "model": more, more: {task: [more, math.nan, {task: None}]}}
    metadata |= {"held_out": {more: task, "kl": more, "js": 10**400, "exact_match": [1]}}
    Circuit(GRAPH, scores(GRAPH).top(9).mask, metadata).save(folder / "c.json")
    found = Circuit.load(folder / "c.json")
    found.report(folder / "c.html")
    Circuit(GRAPH, found.mask, {}).report(folder / "plain.html")
    page, plain = parsed(folder / "c.html"), parsed(folder / "plain.html")
    assert [kind for kind, _ in page.scripts] == [kind for kind, _ in plain.scripts]
    assert page.handlers == plain.handlers == []
    for (kind, script), (_, expected) in zip(page.scripts, plain.scripts, strict=True):
        if kind.get("type") == "application/json":
            document = json.loads(script)
            assert document["title"] == f"{task} in {more}: 9 edges"
        else:
            assert script == expected
    found.draw(folder / "c.svg")
    (folder / "c.dot").write_bytes(found.to_dot().encode("utf-8", "replace"))
