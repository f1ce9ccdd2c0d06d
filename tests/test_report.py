"""The pictures: what is written is the circuit, whole, inert and in the promised form."""

from __future__ import annotations

import json
import random
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
import torch

from tl_edgeprune.circuit import Circuit
from tl_edgeprune.graph import EdgeGraph
from tl_edgeprune.report import draw_circuit, plot_history, write_html
from tl_edgeprune.report.history import smooth
from tl_edgeprune.report.layout import circuit_layout, parse_edge, parse_node

XPROPORTION = (
    "input->m0",
    "m0->a1.h0<v>",
    "a1.h0->logits",
    "input->a1.h0<q>",
    "input->a1.h0<k>",
)
GRAPHS = {
    "tracr": EdgeGraph(n_layers=2, n_heads=1, n_kv_heads=1),
    "attention only": EdgeGraph(n_layers=3, n_heads=4, n_kv_heads=4, has_mlp=False),
    "split embeddings": EdgeGraph(n_layers=2, n_heads=3, n_kv_heads=3, split_embeddings=True),
    "one input per head": EdgeGraph(n_layers=3, n_heads=4, n_kv_heads=4, split_qkv=False),
    "parallel": EdgeGraph(n_layers=3, n_heads=4, n_kv_heads=4, parallel=True),
    "grouped queries": EdgeGraph(n_layers=12, n_heads=9, n_kv_heads=3),
}
HISTORY = [
    {"step": i, "loss": 4.0 / (1 + i), "edges": 900.0 / (1 + i), "target": 880.0 / (1 + i)}
    for i in range(40)
]


class Page(HTMLParser):
    """The texts and attributes of a page's elements, by tag, as a browser's tokenizer sees them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[list[str]] = []
        self.feed(path.read_text("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1][2].append(data)

    def all(self, tag: str) -> list[str]:
        return ["".join(text).strip() for name, _, text in self.found if name == tag]

    def attributes(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes, _ in self.found if name in attributes]

    @property
    def data(self) -> dict:
        [text] = [t for tag, a, t in self.found if tag == "script" and a.get("id") == "circuit"]
        return json.loads("".join(text))


def circuit_of(graph: EdgeGraph, names: tuple[str, ...] | list[str]) -> Circuit:
    mask = torch.zeros(graph.n_edges, dtype=torch.bool)
    mask[[graph.index(name) for name in names]] = True
    return Circuit(graph, mask, {})


def some_circuit(graph: EdgeGraph, n_edges: int = 60, seed: int = 0) -> Circuit:
    edges = random.Random(seed).sample(graph.edges, min(n_edges, graph.n_edges))
    return circuit_of(graph, edges)


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


@pytest.fixture(params=GRAPHS.values(), ids=GRAPHS.keys())
def circuit(request: pytest.FixtureRequest) -> Circuit:
    return some_circuit(request.param)


def test_page_holds_every_edge_and_node_of_the_circuit(circuit: Circuit, tmp_path: Path) -> None:
    write_html(circuit, tmp_path / "circuit.html", summary={"KL": "0.12"})
    data = Page(tmp_path / "circuit.html").data
    names = [node["name"] for node in data["nodes"]]
    ends = {end.partition("<")[0] for name in circuit.edges for end in name.split("->")}

    assert [edge["name"] for edge in data["edges"]] == list(circuit.edges)
    assert set(names) == ends and len(names) == len(ends)
    for edge in data["edges"]:
        source, destination = names[edge["source"]], names[edge["destination"]]
        assert edge["name"].partition("<")[0] == f"{source}->{destination}"
    alive = {edge["name"] for edge in data["edges"] if edge["alive"]}
    assert alive == set(circuit.without_dead_edges().edges)
    assert data["graph_edges"] == circuit.graph.n_edges
    assert data["summary"] == {"KL": "0.12"}
    assert not data["weighted"] and all(edge["weight"] is None for edge in data["edges"])


def test_page_gives_each_edge_the_weight_of_its_place_in_the_graph(tmp_path: Path) -> None:
    circuit = some_circuit(GRAPHS["grouped queries"])
    weights = torch.arange(circuit.graph.n_edges, dtype=torch.float32)
    write_html(circuit, tmp_path / "circuit.html", weights=weights)
    for edge in Page(tmp_path / "circuit.html").data["edges"]:
        assert edge["weight"] == circuit.graph.index(edge["name"])


def test_weights_are_for_the_graph_and_finite(tmp_path: Path) -> None:
    circuit = circuit_of(GRAPHS["tracr"], XPROPORTION)
    with pytest.raises(ValueError, match=r"\[5\].* 23 edges"):
        write_html(circuit, tmp_path / "circuit.html", weights=torch.zeros(5))
    weights = torch.zeros(23)
    weights[circuit.graph.index("m0->a1.h0<v>")] = float("nan")
    with pytest.raises(ValueError, match=r"'m0->a1.h0<v>' is not finite"):
        write_html(circuit, tmp_path / "circuit.html", weights=weights)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["</script><b>bold</b>", "<!--<script>", "\"&amp;\u2028'", "@@DATA@@", "\\u003c"]
)
def test_hostile_text_is_inert(text: str, tmp_path: Path) -> None:
    circuit = circuit_of(GRAPHS["tracr"], XPROPORTION)
    write_html(circuit, tmp_path / "plain.html", title="plain", summary={"plain": "plain"})
    write_html(circuit, tmp_path / "hostile.html", title=text, summary={text: text})
    plain, hostile = Page(tmp_path / "plain.html"), Page(tmp_path / "hostile.html")

    assert [tag for tag, _, _ in hostile.found] == [tag for tag, _, _ in plain.found]
    assert hostile.data["title"] == text and hostile.data["summary"] == {text: text}
    assert hostile.all("title") == [text]
    assert hostile.all("h1") == [text]


def test_page_loads_nothing(tmp_path: Path) -> None:
    write_html(some_circuit(GRAPHS["tracr"]), tmp_path / "circuit.html")
    page = Page(tmp_path / "circuit.html")
    assert not page.attributes("src") and not page.attributes("href")
    assert any("default-src 'none'" in (text or "") for text in page.attributes("content"))
    assert not any(word in text for text in page.all("style") for word in ("url(", "@import"))
    assert page.all("noscript")


def test_page_of_an_empty_circuit(tmp_path: Path) -> None:
    write_html(circuit_of(GRAPHS["tracr"], ()), tmp_path / "circuit.html")
    data = Page(tmp_path / "circuit.html").data
    assert data["edges"] == []
    draw_circuit(circuit_of(GRAPHS["tracr"], ()), tmp_path / "circuit.png")


def test_same_circuit_same_files(tmp_path: Path) -> None:
    circuit = some_circuit(GRAPHS["parallel"])
    for write, ending in ((write_html, "html"), (draw_circuit, "svg"), (draw_circuit, "png")):
        first, second = tmp_path / f"first.{ending}", tmp_path / f"second.{ending}"
        for path in (first, second):
            write(circuit, path, title="one title")
        assert first.read_bytes() == second.read_bytes()


def test_files_are_replaced_whole_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    circuit = some_circuit(GRAPHS["tracr"])
    names = {"circuit.html", "circuit.svg", "history.png"}
    for _ in range(2):
        write_html(circuit, tmp_path / "circuit.html")
        draw_circuit(circuit, str(tmp_path / "circuit.svg"))
        plot_history(HISTORY, tmp_path / "history.png")
        assert {path.name for path in tmp_path.iterdir()} == names

    def fail(*_: object) -> None:
        raise OSError("disk full")

    before = (tmp_path / "circuit.html").read_bytes()
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_html(circuit, tmp_path / "circuit.html", title="another")
    assert (tmp_path / "circuit.html").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("graph", ["tracr", "grouped queries"])
def test_drawing_grows_with_its_layout(graph: str, tmp_path: Path) -> None:
    circuit = some_circuit(GRAPHS[graph])
    draw_circuit(circuit, tmp_path / "circuit.png", dpi=72)
    width, height = png_size(tmp_path / "circuit.png")
    layout = circuit_layout(circuit)
    assert width == pytest.approx(max(layout.width, 330), abs=1.5)
    assert height > layout.height


def test_figures_leave_pyplot_and_style_alone(tmp_path: Path) -> None:
    def style() -> dict:  # reading "backend" would itself import pyplot
        return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}

    pyplot, before = sys.modules.get("matplotlib.pyplot"), style()
    draw_circuit(some_circuit(GRAPHS["tracr"]), tmp_path / "circuit.png")
    plot_history(HISTORY, tmp_path / "history.png")
    assert style() == before
    assert sys.modules.get("matplotlib.pyplot") is pyplot


def test_static_drawing_names_every_node(tmp_path: Path) -> None:
    circuit = circuit_of(GRAPHS["tracr"], XPROPORTION)
    draw_circuit(circuit, tmp_path / "circuit.svg", title="xproportion <5 edges>")
    text = (tmp_path / "circuit.svg").read_text("utf-8")
    for name in ("input", "m0", "a1.h0", "logits", "query", "xproportion &lt;5 edges&gt;"):
        assert f">{name}<" in text


def test_layout_goes_upwards_and_keeps_nodes_apart(circuit: Circuit) -> None:
    layout = circuit_layout(circuit)
    for edge, curve in zip(layout.edges, layout.curves, strict=True):
        assert layout.places[edge.source].y > layout.places[edge.destination].y
        assert curve[0].y > curve[3].y
    places = list(layout.places.values())
    for i, one in enumerate(places):
        assert 0 < one.x < layout.width and 0 < one.y < layout.height
        for other in places[:i]:
            assert abs(one.x - other.x) > layout.node_width or abs(one.y - other.y) > 17


def test_key_value_node_stands_after_the_heads_of_its_group() -> None:
    graph = GRAPHS["grouped queries"]
    names = [f"input->a1.h{head}<q>" for head in range(9)] + ["input->a1.kv1<k>", "m0->a1.kv1<v>"]
    layout = circuit_layout(circuit_of(graph, names))
    layer = [name for name in layout.places if name.startswith("a1")]
    across = sorted(layer, key=lambda name: layout.places[name].x)
    assert across[:7] == [*(f"a1.h{head}" for head in range(6)), "a1.kv1"]
    assert layout.groups == {"a1.kv1": ("a1.h3", "a1.h4", "a1.h5")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a0.h3->a5.h2<q>", "q"),
        ("tok->a5.kv1<k>", "k"),
        ("m0->a11.h12<v>", "v"),
        ("m0->a11.h12", "attn"),
        ("pos->m3", "mlp"),
        ("a11.h10->logits", "logits"),
    ],
)
def test_edge_names_are_parsed(name: str, kind: str) -> None:
    edge = parse_edge(name)
    assert edge.kind == kind
    assert name.startswith(f"{edge.source}->{edge.destination}")


@pytest.mark.parametrize("name", ["", "a1", "a1.q2", "h0", "logit", "m"])
def test_unknown_node_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"node name '{name}'"):
        parse_node(name)


def test_history_errors_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        plot_history([], tmp_path / "history.png")
    with pytest.raises(ValueError, match=r"history\[0\].*no edges"):
        plot_history([{"step": 0, "loss": 1.0}], tmp_path / "history.png")
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf"):
        plot_history(HISTORY, tmp_path / "history.jpeg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n", [1, 300])
def test_history_of_any_length_without_a_target(n: int, tmp_path: Path) -> None:
    steps = [{"step": i, "loss": (-1.0) ** i, "edges": 23.0, "target": None} for i in range(n)]
    plot_history(steps, tmp_path / "history.png")
    assert png_size(tmp_path / "history.png") == (1440, 1080)


def test_running_mean_is_unbiased_and_skips_gaps() -> None:
    assert smooth([3.0] * 10, 5) == pytest.approx([3.0] * 10)
    assert smooth([1.0, float("nan"), 1.0], 3) == pytest.approx([1.0] * 3)
    assert smooth([1.0, 5.0, 2.0], 1) == [1.0, 5.0, 2.0]
