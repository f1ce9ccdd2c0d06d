"""Edges with a mask in every span: held to brute force, which weighs each position by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import brute_force as bf
from support import model_zoo, tokenizer_models
from torch import Tensor

from tl_edgeprune import (
    Circuit,
    EdgeGraph,
    EdgePruner,
    EdgeScores,
    Task,
    discover,
    evaluate,
    masked,
    models,
    tasks,
)
from tl_edgeprune.forward.buffers import BufferPool
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.forward.residual import Stream
from tl_edgeprune.forward.span_masks import Spans, read_at_spans_naive
from tl_edgeprune.objectives import OBJECTIVES
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.runs.task_checks import task_for
from tl_edgeprune.search.full_cuts import FullCuts
from tl_edgeprune.search.partial_cuts import PartialCuts
from tl_edgeprune.tasks.library import gendered_pronoun, greater_than
from tl_edgeprune.tasks.library import ioi as ioi_task

NAMES = ("A", "B", "rest")
QUICK = {"bridge-gpt2", "bridge-olmo2", "native-no-norm"}
HOOKED = {"hooked-gpt2-ln", "hooked-llama-gqa"} & {*model_zoo.ARCHITECTURES}
MODELS = [
    pytest.param(name, marks=[] if name in (HOOKED or QUICK) else [pytest.mark.slow])
    for name in model_zoo.ARCHITECTURES
]
PARTIAL = ["bridge-gpt2", "bridge-llama-gqa", "bridge-olmo2", "native-no-norm"]
TINY = "hooked-gpt2-lnpre" if model_zoo.HookedTransformer is not None else "native-ln"


def random_spans(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(len(NAMES), shape, generator=torch.Generator().manual_seed(seed))


def spanned(model: Any, n: int = 4) -> Task:
    """Random pairs of two lengths, their tokens in random spans."""
    task = model_zoo.pairs(model, n)
    spans = [random_spans(tokens.shape, seed) for seed, tokens in enumerate(task.clean)]
    return replace(task, span_names=NAMES, spans=spans)


def by_position(graph: EdgeGraph, mask: Tensor, spans: Tensor) -> dict[str, Tensor]:
    """For each edge of the model, the mask that each position has, [batch, pos, 1]."""
    values = dict(zip(graph.edges, mask.unbind(), strict=True))
    return {
        edge: torch.stack([values[f"{edge}@{name}"] for name in graph.spans])[spans][..., None]
        for edge in graph.at(()).edges
    }


# ------------------------------------------------------------------------------------ products


def run_stream(stream: Stream | None, rows: dict[str, Tensor], ordered: Spans) -> list[Tensor]:
    """Two sources; a read ahead, its rest after a third source, and a read at some rows.

    Without a stream, by definition.
    """
    y, r, first, last = (rows[name] for name in ("y", "r", "first", "last"))
    some = torch.tensor([3, 0, 3])
    if stream is None:
        flat = rows["spans"].flatten()
        x = read_at_spans_naive(y, r, last, flat)
        return [read_at_spans_naive(y, r, first, flat), x, x[:, some]]
    for source in range(2):
        stream.write(source, ordered.ordered(y[source]))
    stream.read_ahead(first[..., :2])
    stream.write(2, ordered.ordered(y[2]))
    base = ordered.ordered(r)
    found = [stream.read_rest(first[..., 2:], base), stream.read(last, base)]
    found = [torch.stack([ordered.restored(x) for x in one]) for one in found]
    return [*found, stream.read(last, base, ordered.back[some])]


@given(seed=st.integers(0, 2**16), n_spans=st.integers(1, 4), pos=st.integers(2, 5))
def test_products_by_span_are_those_by_row(seed, n_spans, pos):
    """What destinations read, and every gradient, in spans that may be empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    n_rows, width = 2 * pos, 3
    rows = {"y": normal(3, n_rows, width), "r": normal(n_rows, width)}
    rows |= {"first": normal(2, n_spans, 3), "last": normal(1, n_spans, 3)}
    leaves = list(rows.values())
    rows["spans"] = torch.randint(n_spans, (2, pos), generator=generator)
    ordered = Spans(rows["spans"], n_spans)
    like = rows["r"].detach()
    stream = Stream(3, like, BufferPool(), products=ordered.products)
    found, expected = (run_stream(one, rows, ordered) for one in (stream, None))
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in expected]
    gradients = []
    for one in (found, expected):
        loss = sum(((x * w).sum() for x, w in zip(one, weights, strict=True)), torch.zeros(()))
        gradients.append(torch.autograd.grad(loss, leaves))
    for actual, wanted in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=1e-12)


# ------------------------------------------------------------------------------- masked forwards


@pytest.mark.parametrize("name", MODELS)
def test_masks_in_spans_are_masks_at_their_positions(name):
    dtype = model_zoo.dtypes(name)[-1]
    model, tolerance = model_zoo.load(name, dtype), model_zoo.tolerance(name, dtype)
    graph = EdgeGraph.from_model(model).at(NAMES)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    spans, generator = random_spans(clean.shape), torch.Generator().manual_seed(0)
    start = torch.rand(graph.n_edges, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.randn(2, 7, model_zoo.VOCAB, generator=generator, dtype=dtype)
    with torch.no_grad():
        replacement = bf.source_outputs(model, corrupted)
    results = []
    for fast in (True, False):
        mask = start.clone().requires_grad_()
        if fast:
            with masked(model, mask, corrupted=corrupted, spans=spans, graph=graph):
                logits = model(clean)
        else:
            of_edge = by_position(graph, mask, spans)
            logits = bf.masked_logits(model, clean, of_edge, replacement)
        results.append((logits, *torch.autograd.grad((logits * weights).sum(), mask)))
    (logits, gradient), (expected, slope) = results
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        gradient, slope, atol=10 * tolerance * float(slope.abs().max()), rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(HOOKED) or ["bridge-gpt2"])
def test_all_none_and_one_edge_less(name):
    """All masks 1 are the model, all 0 the corrupted prompt; one edge cut in a span is its source
    patched where the destination reads in that span.
    """
    model = model_zoo.load(name, torch.float64)
    graph = EdgeGraph.from_model(model).at(NAMES)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    spans, mask = random_spans(clean.shape), torch.ones(graph.n_edges, dtype=torch.float64)
    ys, others = (bf.source_outputs(model, prompt) for prompt in (clean, corrupted))
    last = torch.full((2, 1), 6)
    close = {"atol": 1e-10, "rtol": 1e-10}
    with masked(model, mask, corrupted=corrupted, spans=spans, graph=graph):
        every = model(clean)
        mask.zero_()
        none = model(clean)
    torch.testing.assert_close(every, model(clean), **close)
    torch.testing.assert_close(none, model(corrupted), **close)
    for edge in ("input->m1@A", "a0.h1->a1.h0<q>@rest", "m0->a1.h2<v>@B", "m1->logits@A"):
        if edge not in graph.edges:  # keys and values that heads share
            edge = edge.replace("h2<v>", "kv1<v>")
        mask.fill_(1)[graph.index(edge)] = 0
        source, _, destination = edge.partition("@")[0].partition("->")
        at = (spans == NAMES.index(edge.partition("@")[2]))[..., None]
        change = torch.where(at, others[source] - ys[source], 0.0)

        def read(which, own, destination=destination, change=change):
            return own + change if which == destination else own

        expected = bf.run(model, clean, read, lambda *_: None)
        with masked(model, mask, corrupted=corrupted, spans=spans, graph=graph):
            torch.testing.assert_close(model(clean), expected, **close)
        positions = {"positions": last, "spans": spans, "graph": graph}
        with masked(model, mask, corrupted=corrupted, **positions):
            torch.testing.assert_close(model(clean), expected[:, 6:], **close)


# ----------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", ["eap", "eap-ig", "mask-ig", "relp"])
def test_scores_of_spans(method):
    """Gradients add up over spans, which the methods tell apart."""
    model = model_zoo.load("bridge-gpt2")
    task = spanned(model, 3)
    chosen = {"objective": "logit-diff"} | ({"steps": 2} if method.endswith("ig") else {})
    found = discover(model, task, method=method, positions="span", **chosen)
    assert found.graph == EdgeGraph.from_model(model).at(NAMES)
    per_edge = sums(found)
    plain = discover(model, task, method=method, **chosen)
    torch.testing.assert_close(per_edge, plain.tensor, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(per_edge, found.graph.n_spans * parts(found)["A"], atol=1e-3)


def parts(scores: EdgeScores) -> dict[str, Tensor]:
    """The scores of each span, in the order of the model's edges."""
    place = {name: i for i, name in enumerate(scores.graph.edges)}
    plain = scores.graph.at(()).edges
    return {
        span: scores.tensor[[place[f"{edge}@{span}"] for edge in plain]]
        for span in scores.graph.spans
    }


def sums(scores: EdgeScores) -> Tensor:
    return sum(parts(scores).values(), torch.zeros(()))


def test_eap_in_a_span_is_its_definition():
    """(ref - y) . gradient at the destination, over the span's positions."""
    model = model_zoo.load("bridge-llama-gqa")
    task = spanned(model, 3)
    found = discover(model, task, method="eap", positions="span")
    expected = torch.zeros_like(found.tensor)
    for batch in task.batches(1):
        with torch.no_grad():
            replacement = bf.source_outputs(model, batch.corrupted)
        mask = torch.ones(found.graph.n_edges, requires_grad=True)
        of_edge = by_position(found.graph, mask, batch.spans)
        logits = bf.masked_logits(model, batch.clean, of_edge, replacement)[:, -1]
        expected += torch.autograd.grad((logits[:, 3] - logits[:, 5]).sum(), mask)[0] / 3
    torch.testing.assert_close(found.tensor, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", [TINY])
def test_acdc_is_the_sequence_by_definition(name):
    model, threshold = model_zoo.load(name), 0.02
    task = spanned(model, 3).subset([0, 2])  # of one length
    task = replace(task, span_names=NAMES[:2], spans=[row.clamp(max=1) for row in task.spans])
    found = discover(model, task, method="acdc", positions="span", threshold=threshold)
    graph, mask = found.graph, torch.ones(found.graph.n_edges)
    (batch,) = task.batches(2)
    full = model(batch.clean)[:, -1].log_softmax(-1)

    @torch.no_grad()
    def value() -> float:
        own = logits_of(batch.clean)[:, -1].log_softmax(-1)
        return float((full.exp() * (full - own)).sum(-1).mean())

    with masked(
        model, mask, corrupted=batch.corrupted, spans=batch.spans, graph=graph
    ) as logits_of:
        current = value()
        for edge in reversed(range(graph.n_edges)):
            mask[edge] = 0
            new = value()
            mask[edge] = float(new - current >= threshold)
            current = current if mask[edge] else new
    assert found.metadata["partial_runs"]
    assert torch.equal(found.mask, mask.bool())
    assert 0 < found.n_edges < graph.n_edges


@settings(max_examples=settings.default.max_examples // 2)
@given(name=st.sampled_from(PARTIAL), seed=st.integers(0, 1000))
def test_partial_runs_give_what_whole_runs_give(name, seed):
    model, generator = model_zoo.load(name), torch.Generator().manual_seed(seed)
    task = spanned(model, 3)
    with MaskedModel.attach(model, EdgeGraph.from_model(model).at(NAMES)) as run:
        targets = Targets(run, task, max_bytes=0)
        target_batches = [targets.prepare(batch) for batch in targets.task.batches(2)]
        engines = [kind(run, target_batches, OBJECTIVES["kl"]) for kind in (FullCuts, PartialCuts)]
        mask = torch.rand(run.graph.n_edges, generator=generator) < 0.4 + 0.6 * (seed % 2)
        places = [int(torch.randint(len(run.graph.reads), (), generator=generator)), -1]
        told = [[] for _ in engines]
        for engine in engines:
            engine.set(mask)
        for place in (place % len(run.graph.reads) for place in places):
            read = run.graph.reads[place]
            shape = (2, read.n_destinations, read.n_sources)
            candidates = torch.rand(shape, generator=generator) < 0.3
            for engine, losses in zip(engines, told, strict=True):
                losses.append(engine.losses(place, candidates))
                engine.commit(1)
    for whole, part in zip(*told, strict=True):
        torch.testing.assert_close(part, whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [TINY])
def test_training_gives_its_edges_and_evaluates(name, tmp_path):
    model = model_zoo.load(name)
    task = spanned(model, 8)
    chosen = {"n_edges": 40, "steps": 12, "batch_size": 4, "positions": "span"}
    result = EdgePruner(**chosen, progress=False).fit(model, task)
    circuit = result.circuit
    assert circuit.n_edges == 40
    assert {edge.partition("@")[2] for edge in circuit.edges} <= {*NAMES}
    assert result.metadata["settings"]["positions"] == "span"
    circuit.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json") == circuit
    result.scores.save(tmp_path / "scores.safetensors")
    assert EdgeScores.load(tmp_path / "scores.safetensors").graph.spans == NAMES
    held_out = spanned(model, 3)
    report = evaluate(model, circuit, held_out)
    turned = replace(
        held_out,
        span_names=("rest", "B", "A"),
        spans=[torch.tensor([2, 1, 0])[row] for row in held_out.spans],
    )
    assert evaluate(model, circuit, turned).kl == pytest.approx(report.kl)
    everything = Circuit(circuit.graph, torch.ones_like(circuit.mask))
    assert evaluate(model, everything, held_out).kl == pytest.approx(0, abs=1e-5)
    assert report.kl > 0


def test_a_resumed_run_is_the_same(tmp_path):
    model = model_zoo.load(TINY)
    task = spanned(model, 4)
    chosen = {"n_edges": 30, "steps": 4, "positions": "span", "progress": False}
    chosen |= {"checkpoint_every": 2, "batch_size": 2}
    path = tmp_path / "run.pt"
    whole = EdgePruner(**chosen, checkpoint=path).fit(model, task)
    again = EdgePruner(**chosen).fit(model, task, resume=path)
    assert torch.equal(whole.log_alpha, again.log_alpha)
    moved = replace(task, spans=[row.flip(0) for row in task.spans])
    with pytest.raises(ValueError, match="its task is"):
        EdgePruner(**chosen).fit(model, moved, resume=path)


# ----------------------------------------------------------------------------- what is known


@pytest.mark.parametrize(
    "found", ["acdc", "edge-pruning", pytest.param("by groups", marks=pytest.mark.slow)]
)
def test_positions_that_a_compiled_program_needs(found):
    """xproportion needs three edges, each at every token and none at BOS, which never differs."""
    model = models.load("tracr-xproportion", device="cpu")
    task = tasks.load("tracr-xproportion", model, n=24)  # of all lengths
    known = {"input->m0", "m0->a1.h0<v>", "a1.h0->logits"}
    if found == "edge-pruning":
        chosen = {"n_edges": 15, "steps": 60, "positions": "span", "progress": False}
        circuit = EdgePruner(**chosen).fit(model, task).circuit
    else:
        search = {"acdc": "exact", "by groups": "bisect"}[found]
        chosen = {"threshold": 1e-6, "search": search, "positions": "span"}
        circuit = discover(model, task, method="acdc", **chosen)
    assert {*circuit.edges} == {f"{edge}@t{at}" for edge in known for at in range(1, 6)}
    assert evaluate(model, circuit, task).mse < 1e-12
    for edge in ("m0->a1.h0<v>@t2", "a1.h0->logits@t5"):
        without = circuit - Circuit.from_edges(circuit.graph, [edge])
        assert evaluate(model, without, task).mse > 1e-5


def test_positions_by_number():
    model = models.load("tracr-reverse", device="cpu")
    task = tasks.load("tracr-reverse", model, n=60)
    task = task.subset([i for i, tokens in enumerate(task.clean) if len(tokens) == 6])
    graph = EdgeGraph.from_model(model).at(map(str, range(6)))
    edges = [f"{edge}@{at}" for edge in ("input->a3.h0<v>", "a3.h0->logits") for at in range(1, 6)]
    circuit = Circuit.from_edges(graph, edges)
    assert evaluate(model, circuit, task).mse < 1e-10
    assert evaluate(model, Circuit.from_edges(graph, edges[1:]), task).mse > 1e-3
    batch = next(task.batches(4))
    with masked(model, circuit, corrupted=batch.corrupted):  # positions need no spans=
        logits = model(batch.clean)
    torch.testing.assert_close(logits[:, 1:], model(batch.clean)[:, 1:], atol=1e-5, rtol=0)
    scores = discover(model, task, method="exact", positions="position", edges=edges[:1])
    assert scores.graph == graph
    assert scores[edges[0]] > 1e-3


def test_dead_edges_are_dead_in_their_span():
    graph = EdgeGraph(2, 1, 1).at(NAMES)
    here = Circuit.from_edges(graph, ["input->m0@A", "m0->logits@A"])
    there = Circuit.from_edges(graph, ["input->m0@A", "m0->logits@B"])
    moved = Circuit.from_edges(
        graph, ["input->m0@A", "m0->a1.h0<v>@A", "a1.h0->logits@B", "input->a1.h0<q>@A"]
    )
    assert here.without_dead_edges() == here
    assert there.without_dead_edges().n_edges == 0
    assert set(moved.edges) - set(moved.without_dead_edges().edges) == {"input->a1.h0<q>@A"}
    scores = EdgeScores(graph, torch.rand(graph.n_edges))
    greedy = scores.greedy(20)
    leads = Circuit(graph, greedy.mask | torch.tensor([e[:5] == "input" for e in graph.edges]))
    assert not (greedy - leads.without_dead_edges()).n_edges


# -------------------------------------------------------------------------------------- tasks


def texts(model: Any, tokens: Tensor, task: Task, pair: int, name: str) -> list[str]:
    at = task.spans[pair] == task.span_names.index(name)
    return [model.tokenizer.decode([token]).strip() for token in tokens[at].tolist()]


@pytest.mark.parametrize("kind", ["words", "digits"])
def test_spans_of_the_tasks(kind):
    model = tokenizer_models.load(kind)
    ioi = tasks.load("ioi", model, n=20, prepend_bos=True)
    assert set(ioi.span_names) == {"IO", "S1", "S1+1", "S2", "END", "rest"}
    for pair, clean in enumerate(ioi.clean):
        answer, subject = (
            model.tokenizer.decode(tokens[pair]).strip()
            for tokens in (ioi.answers, ioi.distractors)
        )
        found = {name: texts(model, clean, ioi, pair, name) for name in ioi.span_names}
        assert found["IO"] == [answer]
        assert found["S1"] == found["S2"] == [subject]
        assert len(found["S1+1"]) == len(found["END"]) == 1
        assert ioi.spans[pair][-1] == ioi.span_names.index("END")
        after = (ioi.spans[pair] == ioi.span_names.index("S1")).nonzero()[0, 0] + 1
        assert ioi.spans[pair][after] == ioi.span_names.index("S1+1")
        others = texts(model, ioi.corrupted[pair], ioi, pair, "S1")
        assert others[0] in ioi_task.NAMES and others != [subject]
    stream = tasks.stream("ioi-t1", model, n=3)
    assert stream.chunk(0).span_names == ioi.span_names
    years = tasks.load("greater-than", model, n=10)
    for pair, clean in enumerate(years.clean):
        (noun,) = texts(model, clean, years, pair, "noun")
        assert noun in greater_than.EVENTS
        assert "".join(texts(model, clean, years, pair, "XX")) in map(str, range(11, 20))
        assert "".join(texts(model, years.corrupted[pair], years, pair, "YY")) == "01"
    people = tasks.load("gendered-pronoun", model, n=10)
    first, second = people.split(0.5)
    assert first.span_names == second.span_names == people.span_names
    for pair, clean in enumerate(people.clean):
        (name,) = texts(model, clean, people, pair, "name")
        assert name in gendered_pronoun.GIRLS + gendered_pronoun.BOYS


PAIR = {
    "clean": "Mary met John",
    "corrupted": "Anna met Paul",
    "right": [" and"],
    "wrong": [" the"],
}


def write(tmp_path: Any, *spans: Any) -> Any:
    path = tmp_path / "pairs.jsonl"
    lines = [PAIR | ({} if given is None else {"spans": given}) for given in spans]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_spans_of_json_lines(tmp_path):
    model = tokenizer_models.load("words")
    path = write(tmp_path, {"verb": [1, 2], "names": [2, 3]}, {"names": [0, 1]})
    task = tasks.from_jsonl(path, model)
    assert task.span_names == ("verb", "names", "rest")
    assert [row.tolist() for row in task.spans] == [[2, 0, 1], [1, 2, 2]]
    assert tasks.stream_jsonl(path, model).chunk(0).spans[0].tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"name": [0, 4]}, r"'name': \[0, 4\].*end <= 3"),
        ({"name": [2, 2]}, "start < end"),
        ({"name": [0.0, 1]}, "expected \\[start, end\\]"),
        ({"a": [0, 2], "b": [1, 3]}, "token 1 is in 'a' and in 'b'"),
        ({"a@b": [0, 2]}, "spans 'a@b': expected names"),
        ([0, 2], "expected {"),
    ],
)
def test_impossible_spans_in_json_lines(tmp_path, spans, message):
    path = write(tmp_path, {"name": [0, 1]}, spans)
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        tasks.from_jsonl(path, tokenizer_models.load("words"))


# --------------------------------------------------------------------------------- wrong input


def test_spans_that_do_not_exist(tmp_path):
    model, other = model_zoo.load(TINY), model_zoo.pairs(model_zoo.load(TINY), 2)
    task = spanned(model, 2)
    graph = EdgeGraph.from_model(model).at(NAMES)
    with pytest.raises(KeyError, match="no span 'S9'. Its spans are A, B, rest"):
        graph.index("m0->logits@S9")
    with pytest.raises(KeyError, match="edges in spans only"):
        Circuit.from_edges(graph, ["m0->logits"])
    with pytest.raises(KeyError, match="no span 'A'. Its spans are none"):
        graph.at(()).index("m0->logits@A")
    with pytest.raises(KeyError, match="m7.*Nearest: m1->logits@A|m7.*Nearest: m0->logits@A"):
        graph.index("m7->logits@A")
    for names in (["A", "A"], ["a b"], ["x->y"], [""]):
        with pytest.raises(ValueError, match="expected names that differ"):
            graph.at(names)
    circuit = Circuit.from_edges(graph, ["m0->logits@A"])
    with pytest.raises(ValueError, match="has no spans. Those of ioi"):
        evaluate(model, circuit, other)
    renamed = replace(task, span_names=("A", "S2", "rest"))
    with pytest.raises(ValueError, match="no S2. Use a circuit found on such a task"):
        evaluate(model, circuit, renamed)
    with pytest.raises(ValueError, match="spans 0, 1, 2|spans \\["):
        replace(task, span_names=("A",))
    with pytest.raises(ValueError, match="but 0 spans"):
        replace(task, spans=())
    circuit.save(tmp_path / "circuit.json")
    text = (tmp_path / "circuit.json").read_text().replace("@A", "@S9")
    (tmp_path / "circuit.json").write_text(text)
    with pytest.raises(ValueError, match="damaged.*no span 'S9'"):
        Circuit.load(tmp_path / "circuit.json")


def test_positions_that_cannot_be_used():
    model, plain = model_zoo.load(TINY), model_zoo.pairs(model_zoo.load(TINY), 3)
    task = spanned(model, 3)
    graph = EdgeGraph.from_model(model).at(NAMES)
    with pytest.raises(ValueError, match="positions='word': expected 'span'"):
        EdgePruner(10, positions="word")
    with pytest.raises(ValueError, match="recompute=True is not supported"):
        EdgePruner(10, positions="span", recompute=True)
    with pytest.raises(ValueError, match="has no spans"):
        discover(model, plain, method="eap", positions="span")
    with pytest.raises(ValueError, match="have 5 to 6 tokens"):
        discover(model, plain, method="acdc", positions="position", threshold=0.1)
    numbered = replace(task, span_names=("0", "1", "2"))
    with pytest.raises(ValueError, match="names of positions"):
        discover(model, numbered, method="eap", positions="span")
    with pytest.raises(ValueError, match="ifr takes no positions"):
        discover(model, task, method="ifr", positions="span")
    for method in ("ifr", "hisp", "greedy-output", "subspace-nodes"):
        with pytest.raises(ValueError, match=f"{method} takes edges that are the same"):
            discover(model, task, method=method, graph=graph)
    prompt = model_zoo.tokens(model)
    mask = torch.ones(graph.n_edges)
    with pytest.raises(ValueError, match=r"3 spans.*give spans="):
        with masked(model, mask, corrupted=prompt, graph=graph):
            model(prompt)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        with masked(model, mask, corrupted=prompt, graph=graph, spans=prompt * 0 + 3):
            model(prompt)
    with pytest.raises(ValueError, match="of the tokens' shape"):
        with masked(model, mask, ablation="zero", graph=graph, spans=prompt[:1] * 0):
            model(prompt)
    ones = torch.ones(graph.at(()).n_edges)
    with pytest.raises(ValueError, match="leave spans out"):
        with masked(model, ones, corrupted=prompt, spans=prompt * 0):
            model(prompt)
    short = graph.at(map(str, range(5)))
    with pytest.raises(ValueError, match="5 positions.*a prompt of 6 tokens"):
        task_for(plain, short)
    with pytest.raises(ValueError, match="the same at every position"):
        Circuit(graph, mask.bool()).to_mib("circuit.json")
