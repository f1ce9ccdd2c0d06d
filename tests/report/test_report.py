"""The pictures: what is written is the circuit, whole, inert and in the promised form."""

from __future__ import annotations

import io
import itertools
import json
import random
import re
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.evaluation.faithfulness import FaithfulnessCurve
from tl_edgeprune.evaluation.stability import Stability
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.names import parse_edge, parse_node
from tl_edgeprune.report import (
    draw_circuit,
    palette,
    plot_faithfulness,
    plot_heads,
    plot_history,
    plot_stability,
    write_html,
)
from tl_edgeprune.report.circuit import layout as layout_module
from tl_edgeprune.report.circuit.layout import Curve, Layout, circuit_layout, lay_out
from tl_edgeprune.report.plots.heads import flows
from tl_edgeprune.report.plots.history_curves import smooth
from tl_edgeprune.report.plots.series import legend_below, series_style

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
    circuit.report(tmp_path / "circuit.html", measures={"kl": 0.12}, settings={"lr": 0.3})
    data = Page(tmp_path / "circuit.html").data
    names = [node["name"] for node in data["nodes"]]
    ends = {end.partition("<")[0] for name in circuit.edges for end in name.split("->")}

    assert [edge["name"] for edge in data["edges"]] == list(circuit.edges)
    assert set(names) == ends and len(names) == len(ends)
    for edge in data["edges"]:
        source, destination = names[edge["source"]], names[edge["destination"]]
        assert edge["name"].partition("<")[0] == f"{source}->{destination}"
    alive = {edge["name"] for edge in data["edges"] if not edge["dead"]}
    assert alive == set(circuit.without_dead_edges().edges)
    assert data["graph_edges"] == circuit.graph.n_edges and data["mode"] == "one"
    assert data["settings"] == {"lr": "0.3"}
    assert data["circuits"][0]["measures"] == {"KL to the full model": "0.120 nats"}
    assert not data["scored"] and all(edge["score"] is None for edge in data["edges"])


def test_page_gives_each_edge_the_score_of_its_place_in_the_graph(tmp_path: Path) -> None:
    circuit = some_circuit(GRAPHS["grouped queries"])
    values = torch.arange(circuit.graph.n_edges, dtype=torch.float32) - 9000
    for scores in (EdgeScores(circuit.graph, values), values):
        circuit.report(tmp_path / "circuit.html", scores=scores)
        edges = Page(tmp_path / "circuit.html").data["edges"]
        for edge in edges:
            assert edge["score"] == circuit.graph.index(edge["name"]) - 9000
        by_rank = [edge["score"] for edge in sorted(edges, key=lambda edge: edge["rank"])]
        size = abs if isinstance(scores, EdgeScores) else float  # effects rank by magnitude
        assert by_rank == sorted(by_rank, key=size, reverse=True)


def test_page_tells_two_circuits_and_many_apart(tmp_path: Path) -> None:
    graph = GRAPHS["tracr"]
    one, two = some_circuit(graph, 9, seed=1), some_circuit(graph, 14, seed=2)
    one.report(tmp_path / "circuit.html", other=two)
    data = Page(tmp_path / "circuit.html").data
    assert data["mode"] == "overlay" and [c["name"] for c in data["circuits"]] == ["A", "B"]
    for edge in data["edges"]:
        has = [place for place, each in enumerate((one, two)) if edge["name"] in each]
        assert edge["circuits"] == has
    two.report(tmp_path / "circuit.html", circuits=[one], measures=[{"kl": 1}, {"kl": 2}])
    data = Page(tmp_path / "circuit.html").data
    assert data["mode"] == "sizes" and data["first"] == 1
    assert [c["n_edges"] for c in data["circuits"]] == [9, 14]
    assert [list(c["measures"].values()) for c in data["circuits"]] == [
        ["2.000 nats"],
        ["1.000 nats"],
    ]


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    circuit, path = circuit_of(GRAPHS["tracr"], XPROPORTION), tmp_path / "circuit.html"
    with pytest.raises(ValueError, match=r"\(5,\) for 23 edges"):
        circuit.report(path, scores=torch.zeros(5))
    scores = torch.zeros(23)
    scores[circuit.graph.index("m0->a1.h0<v>")] = float("nan")
    with pytest.raises(ValueError, match="m0->a1.h0<v>"):
        circuit.report(path, scores=scores)
    foreign = some_circuit(GRAPHS["parallel"])
    other_scores = EdgeScores(foreign.graph, torch.zeros(foreign.graph.n_edges))
    for wrong in ({"other": foreign}, {"circuits": [foreign]}, {"scores": other_scores}):
        with pytest.raises(ValueError, match="graph"):
            circuit.report(path, **wrong)
    with pytest.raises(ValueError, match="one of the two"):
        circuit.report(path, other=circuit, circuits=[circuit])
    with pytest.raises(ValueError, match="3 names for 2 circuits"):
        circuit.report(path, other=circuit, names=("a", "b", "c"))
    with pytest.raises(ValueError, match="3 measures for 1 circuits"):
        circuit.report(path, measures=[{}, {}, {}])
    with pytest.raises(ValueError, match=r"end its name in \.html"):
        circuit.report(path.with_suffix(".png"))
    assert not list(tmp_path.iterdir())


def test_numbers_that_json_lacks_are_told_as_text(tmp_path: Path) -> None:
    class Explanation:
        def by_edge(self) -> dict:
            facts = {"effect": float("inf"), "n": torch.tensor(2.0), "share": 1 / 3, "kind": "x"}
            return {"input->m0": facts}

    circuit = circuit_of(GRAPHS["tracr"], XPROPORTION)
    circuit.report(tmp_path / "circuit.html", explanation=Explanation())
    edges = {edge["name"]: edge for edge in Page(tmp_path / "circuit.html").data["edges"]}
    expected = {"effect": "inf", "n": 2, "share": 0.333333, "kind": "x"}
    assert edges["input->m0"]["facts"] == expected and not edges["m0->a1.h0<v>"]["facts"]


def test_long_trainings_are_thinned(tmp_path: Path) -> None:
    steps = [{"step": i, "loss": 1.0, "edges": 9.0, "target": None} for i in range(5003)]
    circuit_of(GRAPHS["tracr"], XPROPORTION).report(tmp_path / "c.html", history=steps)
    curves = Page(tmp_path / "c.html").data["curves"]
    assert 250 < len(curves["steps"]) <= 301 and curves["steps"][-1] == 5002
    assert set(curves["target"]) == {None} and not curves["jumps"]


@pytest.mark.parametrize(
    "text", ["</script><b>bold</b>", "<!--<script>", "\"&amp;\u2028'", "@@DATA@@", "\\u003c"]
)
def test_hostile_text_is_inert(text: str, tmp_path: Path) -> None:
    circuit = circuit_of(GRAPHS["tracr"], XPROPORTION)
    for name, words in (("plain", "plain"), ("hostile", text)):
        circuit.report(tmp_path / f"{name}.html", title=words, settings={words: words})
    plain, hostile = Page(tmp_path / "plain.html"), Page(tmp_path / "hostile.html")

    assert [tag for tag, _, _ in hostile.found] == [tag for tag, _, _ in plain.found]
    assert hostile.data["title"] == text and hostile.data["settings"] == {text: text}
    assert hostile.all("title") == [text]
    assert hostile.all("h1") == [text]


def test_page_loads_nothing(tmp_path: Path) -> None:
    write_html(some_circuit(GRAPHS["tracr"]), tmp_path / "circuit.html")
    page = Page(tmp_path / "circuit.html")
    assert not page.attributes("src") and not page.attributes("href")
    assert any("default-src 'none'" in (text or "") for text in page.attributes("content"))
    assert not any(word in text for text in page.all("style") for word in ("url(", "@import"))
    assert page.all("noscript")


def test_the_colours_of_the_page_are_those_of_the_figures() -> None:
    style = (Path(palette.__file__).parent / "page" / "style.css").read_text("utf-8")
    for name, color in (palette.KIND_COLORS | palette.SIDE_COLORS).items():
        assert re.search(rf"--{name}: light-dark\({color}, #[0-9a-f]{{6}}\)", style)


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
    assert width == pytest.approx(layout.width, abs=1.5) or layout.width < width < 450
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


def hidden(layout: Layout) -> int:
    """How often a curve runs behind the middle of a node that is none of its edge's own."""
    times = 0
    for edge, curve in zip(layout.edges, layout.curves, strict=True):
        own = (edge.source, edge.destination)
        others = [place for name, place in layout.places.items() if name not in own]
        along = [bezier(curve, step / 200) for step in range(201)]
        times += sum(
            any(abs(x - at.x) < 0.45 * layout.node_width and abs(y - at.y) < 8 for x, y in along)
            for at in others
        )
    return times


def bezier(curve: Curve, t: float) -> tuple[float, float]:
    """De Casteljau's construction."""
    points: list[tuple[float, float]] = list(curve)
    while len(points) > 1:
        points = [
            ((1 - t) * a[0] + t * b[0], (1 - t) * a[1] + t * b[1])
            for a, b in itertools.pairwise(points)
        ]
    return points[0]


def test_edges_go_around_other_nodes(monkeypatch) -> None:
    """Past nodes of their own column, of a column that they cross, and of the logits'."""
    names = ["input->a0.h1<q>", "a0.h1->a1.h1<q>", "a0.h1->logits", "a1.h1->logits"]
    names += ["a0.h0->a2.h2<v>", "a0.h0->a1.h1<k>", "a1.h0->a2.h2<q>", "a0.h0->logits"]
    circuit = circuit_of(GRAPHS["attention only"], names)
    assert hidden(circuit_layout(circuit)) == 0
    large = some_circuit(GRAPHS["grouped queries"])
    around = hidden(circuit_layout(large))
    monkeypatch.setattr(layout_module, "BENT_UP_TO", 0)
    assert hidden(circuit_layout(circuit)) > 0
    assert around < 0.5 * hidden(circuit_layout(large))


def test_key_value_node_stands_after_the_heads_of_its_group() -> None:
    graph = GRAPHS["grouped queries"]
    names = [f"input->a1.h{head}<q>" for head in range(9)] + ["input->a1.kv1<k>", "m0->a1.kv1<v>"]
    layout = circuit_layout(circuit_of(graph, names))
    layer = [name for name in layout.places if name.startswith("a1")]
    across = sorted(layer, key=lambda name: layout.places[name].x)
    assert across[:7] == [*(f"a1.h{head}" for head in range(6)), "a1.kv1"]
    assert layout.links == (("a1.kv1", "a1.h3", "a1.h4", "a1.h5"),)


def test_positions_are_columns() -> None:
    names = ["input->a0.h1<k>@S1", "input->a0.h1<q>@S2", "a0.h1->a3.h0<v>@S2", "m0->a3.h0<q>@END",
             "input->m0@END", "a3.h0->logits@END"]  # fmt: skip
    layout = lay_out(names, spans=("BOS", "S1", "S2", "END"))
    assert list(layout.spans) == ["S1", "S2", "END"]  # those in use, in the order given
    bands = list(layout.spans.values())
    assert all(one[1] <= two[0] for one, two in zip(bands, bands[1:], strict=False))
    for node in layout.nodes:
        left, right = layout.spans[node.span]
        assert left < layout.places[node.name].x < right
    assert {frozenset(link) for link in layout.links} == {
        frozenset({"a0.h1@S1", "a0.h1@S2"}),  # one attention, at both of its positions
        frozenset({"a3.h0@S2", "a3.h0@END"}),
    }
    assert parse_edge("a0.h1->a3.h0<v>@S 2") == (
        "a0.h1->a3.h0<v>@S 2",
        "a0.h1@S 2",
        "a3.h0@S 2",
        "v",
    )


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


# ------------------------------------------------------------------------------------------- plots


def test_no_two_of_many_lines_look_alike_and_the_legend_is_inside() -> None:
    styles = [series_style(place) for place in range(40)]
    looks = {(style["color"], style["marker"], str(style["linestyle"])) for style in styles}
    assert len(looks) == 40
    assert len({style["color"] for style in styles[:8]}) == 8
    figure = Figure(figsize=(9.6, 5), layout="constrained")
    axes = figure.subplots()
    for place in range(30):
        axes.plot([0, 1], [place, place], label=f"information-flow-routes-{place}", **styles[place])
    legend_below(figure, axes, columns=3)
    figure.savefig(io.BytesIO())
    [legend] = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0
    assert box.x1 <= figure.bbox.width and box.y1 < axes.bbox.y0


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS.keys())
def test_heat_maps_count_every_edge_of_a_head(graph: EdgeGraph, tmp_path: Path) -> None:
    circuit = some_circuit(graph)
    out_of, into = flows(graph, circuit.mask.double())
    for layer in range(graph.n_layers):
        for place in range(graph.sources_per_layer):
            name = f"m{layer}" if place == graph.n_heads else f"a{layer}.h{place}"
            group = place // (graph.n_heads // graph.n_kv_heads)
            names = {name, f"a{layer}.kv{group}"} if name.startswith("a") else {name}
            ends = [edge.split("->") for edge in circuit.edges]
            assert out_of[layer, place] == sum(source == name for source, _ in ends)
            assert into[layer, place] == sum(d.partition("<")[0] in names for _, d in ends)
    plot_heads(circuit, tmp_path / "heads.png", title="a $5 title", dpi=50)
    plot_heads(EdgeScores(graph, torch.ones(graph.n_edges)), tmp_path / "heads.svg")
    assert "sum of |score|" in (tmp_path / "heads.svg").read_text("utf-8")


def test_stability_and_faithfulness_are_drawn(tmp_path: Path) -> None:
    graph = GRAPHS["parallel"]
    circuits = tuple(some_circuit(graph, 60, seed) for seed in range(3))
    found = Stability(circuits, ((0, None), (1, None), (2, 5)))
    plot_stability(found, tmp_path / "stability.svg", title="<b>")
    text = (tmp_path / "stability.svg").read_text("utf-8")
    in_all = (circuits[0] & circuits[1] & circuits[2]).n_edges
    for words in ("seed 2, resample 5", f"mean {found.jaccard:.2f}", f">{in_all}<", "&lt;b&gt;"):
        assert words in text
    curves = {
        name: FaithfulnessCurve((0.001, 0.1, 1.0), (0, 40, 400), (0.0, 0.5 * i, 1.0), 1.0, 0.0)
        for i, name in enumerate(("eap", "a_$b$"))
    }
    plot_faithfulness(curves, tmp_path / "faithfulness.svg")
    text = (tmp_path / "faithfulness.svg").read_text("utf-8")
    areas = f"∫f {curves['a_$b$'].cpr:.2f}, ∫|1 − f| {curves['a_$b$'].cmd:.2f}"
    assert f"a_$b$ ({areas})" in text and "Edges kept" in text
    assert "CPR" not in text and "CMD" not in text  # MIB's, of one ranking each
    with pytest.raises(ValueError, match="no curves"):
        plot_faithfulness({}, tmp_path / "faithfulness.svg")


# --------------------------------------------------------------------------------- other languages


def test_two_circuits_in_one_static_drawing(tmp_path: Path) -> None:
    circuit = circuit_of(GRAPHS["tracr"], XPROPORTION)
    other = circuit_of(GRAPHS["tracr"], XPROPORTION[2:])
    circuit.draw(tmp_path / "two.svg", other=other, names=("one", "$two$ & <three>"))
    text = (tmp_path / "two.svg").read_text("utf-8")
    for words in ("in both (3)", "only in one (2)", "only in $two$ &amp; &lt;three&gt; (0)"):
        assert words in text
    circuit.draw(tmp_path / "two.png", other=other, names=("a" * 60, "b"), dpi=72)
    assert png_size(tmp_path / "two.png")[0] > 600  # the legend has room


def test_dot_has_every_node_and_edge_and_quotes_what_is_given(circuit: Circuit) -> None:
    hostile = 'a "b" \\N <i> ]; evil -> node;\nx'
    named = Circuit(circuit.graph, circuit.mask, {"task": hostile})
    text = named.to_dot()
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', "S", text)
    assert "evil" not in outside and outside.count("{") == outside.count("}")
    plain = [string.replace('\\"', '"').replace("\\\\", "\\") for string in strings]
    assert any('a "b" \\N <i> ]; evil -> node;' in string for string in plain)
    arrows = re.findall(r'^  "([^"]+)" -> "([^"]+)" \[color="[^"]+", tooltip="([^"]+)"', text, re.M)
    assert [name for _, _, name in arrows] == list(circuit.edges)
    for source, destination, name in arrows:
        assert name.partition("<")[0] == f"{source}->{destination}"
    dead = circuit.n_edges - circuit.without_dead_edges().n_edges
    assert text.count("style=dashed") == dead


def test_a_cell_of_a_notebook_draws_small_circuits_and_names_large_ones() -> None:
    circuit = circuit_of(GRAPHS["tracr"], XPROPORTION)
    cell = circuit._repr_html_()
    assert cell.startswith("<iframe srcdoc=") and 'sandbox="allow-scripts' in cell
    assert "allow-same-origin" not in cell
    graph = GRAPHS["grouped queries"]
    large = Circuit(graph, torch.ones(graph.n_edges, dtype=torch.bool), {"task": "<b>"})
    assert "iframe" not in large._repr_html_() and "&lt;b&gt;: 10,981 edges" in large._repr_html_()
