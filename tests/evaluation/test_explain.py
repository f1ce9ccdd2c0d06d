"""What `explain` says of an edge, held to runs written by brute force and to the model's cache."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pandas
import pytest
import torch
from support import brute_force as bf
from support import model_zoo

from tl_edgeprune import Circuit, EdgeGraph, Explanation, explain, masked, models, tasks
from tl_edgeprune.evaluation.explain.explain import MOST_EDGES, kind_of
from tl_edgeprune.evaluation.explain.position_means import PositionMeans
from tl_edgeprune.tasks.task import Task

KINDS = [
    name
    for name in ("bridge-gpt2", "bridge-gemma2", "hooked-gpt2-ln", "hooked-llama-gqa")
    if name in model_zoo.ARCHITECTURES
]
ANSWER, OTHER = 3, 5
both_classes = pytest.mark.parametrize("name", KINDS)


def half(model, seed: int = 0) -> Circuit:
    """Half of the edges, at random."""
    graph = EdgeGraph.from_model(model)
    noise = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(seed))
    return Circuit.top(graph, noise, graph.n_edges // 2)


def kept_whole(model) -> Circuit:
    graph = EdgeGraph.from_model(model)
    return Circuit(graph, torch.ones(graph.n_edges, dtype=torch.bool))


def brute_run(model, pair: tuple, circuit: Circuit, cut: str | None = None):
    """Logits at the last position and what they read, what each source wrote, and what it writes
    when corrupted.
    """
    clean, corrupted = pair[0][None], pair[1][None]
    theirs = bf.source_outputs(model, corrupted)
    mask = dict(zip(circuit.graph.edges, circuit.mask.double().tolist(), strict=True))
    mask |= {} if cut is None else {cut: 0.0}
    seen: dict = {}
    original = bf.run

    def spy(model, tokens, read, write):
        def kept_read(name, own):
            seen[f"into {name}"] = read(name, own)
            return seen[f"into {name}"]

        def kept_write(name, y):
            seen[name] = y
            write(name, y)

        return original(model, tokens, kept_read, kept_write)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bf, "run", spy)
        logits = bf.masked_logits(model, clean, mask, theirs)
    return logits[0, -1], seen, theirs


def pairs_of(task: Task):
    return list(zip(task.clean, task.corrupted, strict=True))


# ----------------------------------------------------------------------------------------- the rise


@both_classes
@torch.no_grad()
def test_the_rise_is_that_of_a_cut_by_brute_force(name):
    model = model_zoo.load(name)
    task, circuit = model_zoo.pairs(model, 3), half(model)
    some = circuit.edges[:: circuit.n_edges // 5]
    found = explain(model, circuit, task, edges=some).table.set_index("edge")
    assert tuple(found.index) == some
    for edge in some:
        expected = 0.0
        for pair in pairs_of(task):
            full = model(pair[0][None])[0, -1].double().log_softmax(-1)
            losses = [
                float((full.exp() * (full - logits.double().log_softmax(-1))).sum())
                for logits in (brute_run(model, pair, circuit, cut)[0] for cut in (edge, None))
            ]
            expected += (losses[0] - losses[1]) / len(task)
        assert found.rise[edge] == pytest.approx(expected, abs=2e-4)


# ----------------------------------------------------------------------------------- direct effects


@both_classes
@torch.no_grad()
def test_the_direct_effect_is_the_difference_through_norm_and_unembedding_by_hand(name):
    model = model_zoo.load(name, torch.float64)
    task, circuit = model_zoo.pairs(model, 2), half(model, 1)
    found = explain(model, circuit, task).table
    expected = {source: 0.0 for source in circuit.graph.sources}
    cap = max(0.0, float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0))
    for pair in pairs_of(task):
        logits, seen, theirs = brute_run(model, pair, circuit)
        x, unembed = seen["into logits"][0, -1], model.W_U
        centred = x - x.mean() if "gpt2" in name else x
        scale = (centred.square().mean() + 1e-5).sqrt()
        # Of a soft cap c tanh(l / c), the tangent at this run's logits.
        slope = 1 - (logits / cap) ** 2 if cap else torch.ones_like(logits)
        direction = unembed[:, ANSWER] * slope[ANSWER] - unembed[:, OTHER] * slope[OTHER]
        for source in expected:
            difference = (seen[source] - theirs[source])[0, -1]
            if "gpt2" in name:
                difference = difference - difference.mean()
            expected[source] += float(difference / scale * final_weight(model) @ direction) / len(
                task
            )
    for row in found.itertuples():
        assert row.direct_effect == pytest.approx(expected[row.source], abs=1e-4)


def final_weight(model):
    """What the last norm multiplies by."""
    original = getattr(model.ln_final, "original_component", None)
    if original is None:
        return model.ln_final.w
    return original.weight + (1.0 if "Gemma" in type(original).__name__ else 0.0)


@pytest.mark.parametrize("name", ["native-no-norm", "hooked-no-norm"])
def test_without_a_norm_the_direct_effect_is_that_of_the_cut(name):
    if name not in model_zoo.ARCHITECTURES:
        pytest.skip("TransformerLens 3 only")
    model = model_zoo.load(name)
    found = explain(model, half(model), model_zoo.pairs(model, 4), objective="logit-diff").table
    last = found[found.kind == "logits"]
    assert len(last) > 2
    assert last.direct_effect.tolist() == pytest.approx(last.rise.tolist(), abs=1e-3)
    assert last.direct_effect.abs().max() > 0.01


def test_direct_effects_into_the_logits_add_up_to_what_the_circuit_does_over_none():
    model = model_zoo.load("native-no-norm")
    circuit, task = half(model), model_zoo.pairs(model, 4)
    found = explain(model, circuit, task)
    with torch.no_grad():
        empty = [model(corrupted[None])[0, -1] for corrupted in task.corrupted]
    without = float(torch.stack([logits[ANSWER] - logits[OTHER] for logits in empty]).mean())
    last = found.table[found.table.kind == "logits"]
    assert found.about["score"] == pytest.approx(without + last.direct_effect.sum(), abs=1e-3)


def test_answers_alone_and_sets_of_tokens_have_scores_of_their_own():
    model = model_zoo.load("native-no-norm")
    task = model_zoo.pairs(model, 3)
    alone = replace(task, distractors=())
    nothing = [torch.empty(0, dtype=torch.long)] * 3
    sets = replace(task, answers=nothing, distractors=nothing)
    sets = replace(sets, right=[torch.tensor([3, 4])] * 3, wrong=[torch.tensor([5])] * 3)
    neither = replace(task, answers=nothing, distractors=nothing)
    with torch.no_grad():
        logits = torch.stack([model(clean[None])[0, -1] for clean in task.clean])
    expected = {
        "alone": float((logits[:, ANSWER] - logits.mean(1)).mean()),
        "sets": float((logits[:, [3, 4]].mean(1) - logits[:, 5]).mean()),
    }
    for label, one in (("alone", alone), ("sets", sets)):
        score = explain(model, kept_whole(model), one, edges=["m1->logits"]).about["score"]
        assert score == pytest.approx(expected[label], abs=1e-4)
    found = explain(model, half(model), neither)
    assert found.about["score"] is None and found.table.direct_effect.isna().all()


# ---------------------------------------------------------------------------------------- attention


@both_classes
@torch.no_grad()
def test_patterns_are_those_of_the_models_own_cache(name):
    model = model_zoo.load(name)
    task = model_zoo.pairs(model, 4)
    for circuit in (kept_whole(model), half(model)):
        some = [edge for edge in circuit.edges if "->a1" in edge][:4]
        found = explain(model, circuit, task, edges=some)
        table = found.pattern_table
        heads = {h for e in some for h in circuit.graph.owner(e.split("->")[1])}
        heads |= {e.split("->")[0] for e in some if e.startswith("a")}
        assert set(table["head"]) == heads
        for length in (5, 6):
            own = [pair for pair in pairs_of(task) if len(pair[0]) == length]
            patterns = {}
            for head in heads:
                layer, number = head[1:].split(".h")
                point = f"blocks.{layer}.attn.hook_pattern"
                rows = []
                for clean, corrupted in own:
                    with masked(model, circuit, corrupted=corrupted[None]):
                        _, cache = model.run_with_cache(clean[None], names_filter=[point])
                    rows.append(cache[point][0, int(number), -1])
                    if circuit.n_edges == circuit.graph.n_edges:
                        _, cache = model.run_with_cache(clean[None], names_filter=[point])
                        torch.testing.assert_close(rows[-1], cache[point][0, int(number), -1])
                patterns[head] = torch.stack(rows).mean(0)
            part = table[table.length == length]
            assert (part.n_pairs == len(own)).all() and (part.read == length - 1).all()
            for head, rows in part.groupby("head"):
                assert rows.position.tolist() == list(range(length))
                assert rows.weight.tolist() == pytest.approx(patterns[head].tolist(), abs=1e-5)


def test_texts_name_tokens_that_all_prompts_share_and_bracket_those_that_vary():
    clean = [torch.tensor([7, 1, 9, 9]), torch.tensor([7, 2, 9, 9]), torch.tensor([7, 1, 9])]
    read = [torch.tensor([3]), torch.tensor([3]), torch.tensor([2])]
    task = Task("slots", clean, clean, read)
    slots = PositionMeans()
    for batch in task.batches(8):
        weights = batch.clean.double() * torch.arange(1, len(batch) + 1)[:, None]
        slots.add(batch, {"weights": weights})
    layout = slots.commonest
    assert (layout.n_pairs, len(slots.layouts)) == (2, 2)
    assert layout.labels(str) == ["7", "(1)", "9[2]", "9[3]"]
    assert layout.means["weights"].tolist() == [10.5, 2.5, 13.5, 13.5]


def test_pairs_of_a_batch_may_be_read_at_different_positions():
    clean = [torch.tensor([1, 2, 3])] * 3
    task = Task("reads", clean, clean, [torch.tensor([1]), torch.tensor([2]), torch.tensor([1])])
    slots = PositionMeans()
    for batch in task.batches(8):
        slots.add(batch, {"at": batch.read_positions.double().expand(-1, 3)})
    found = {
        tuple(x.read.tolist()): (x.n_pairs, x.means["at"][0].item()) for x in slots.layouts.values()
    }
    assert found == {(1,): (2, 1.0), (2,): (1, 2.0)}


# ------------------------------------------------------------------------------- on a known program


@pytest.fixture(scope="module")
def reverse():
    model = models.load("tracr-reverse")
    task = tasks.load("tracr-reverse", model, 60, seed=1)
    graph = EdgeGraph.from_model(model)
    circuit = Circuit.from_edges(graph, models.known_circuit("tracr-reverse", "counterfactual"))
    return model, task, circuit


def test_a_known_circuit_needs_each_edge_and_its_head_looks_at_the_mirrored_position(reverse):
    model, task, circuit = reverse
    found = explain(model, circuit, task)
    assert (found.table.rise > 0.1).all() and found.about["value"] == pytest.approx(0, abs=1e-9)
    table = found.pattern_table
    head = table[(table["head"] == "a3.h0") & (table.length == table.length.max())]
    length = int(table.length.max())
    for read in range(1, length):
        row = head[head.read == read]
        assert int(row.position.iloc[row.weight.argmax()]) == length - read


def test_it_comes_back_from_disk_and_goes_into_a_picture_as_plain_values(reverse, tmp_path):
    model, task, circuit = reverse
    found = explain(model, circuit, replace(task[:8], answers=()))
    found.save(tmp_path / "explained.json")
    again = Explanation.load(tmp_path / "explained.json")
    assert again.table.equals(found.table) and again.pattern_table.equals(found.pattern_table)
    assert again.about == found.about and repr(again) == repr(found)
    plain = found.by_edge()
    assert list(plain) == list(circuit.edges)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert all({"rise", "carries"} <= set(of) for of in plain.values())
    assert not any("direct_effect" in of for of in plain.values())  # nothing is the answer
    found.save(tmp_path / "explained.csv")
    assert pandas.read_csv(tmp_path / "explained.csv").edge.tolist() == list(circuit.edges)
    assert len(found.top(1)) == 1 and found.top(1).rise.iloc[0] == found.table.rise.max()
    long = replace(
        found, rows=tuple(row | {"carries": "a token 0.50, " * 20} for row in found.rows)
    )
    for shown in (long.top(2), long.top(2)[["edge", "carries"]]):
        _columns, *lines = repr(shown).split("\n")
        assert len(lines) == 2 and "…" not in repr(shown) and "..." not in repr(shown)
        assert all(long.rows[0]["carries"].strip() in line for line in lines)
        assert shown._repr_html_().count(long.rows[0]["carries"].strip()) == 2


# -------------------------------------------------------------------------------------- wrong input


def test_what_cannot_be_explained_is_refused(tmp_path):
    model = model_zoo.load("bridge-gpt2")
    task, circuit = model_zoo.pairs(model, 2), half(model)
    gone = next(edge for edge in circuit.graph.edges if edge not in circuit)
    with pytest.raises(ValueError, match="expected edges that the circuit keeps"):
        explain(model, circuit, task, edges=[gone])
    with pytest.raises(ValueError, match=r"edges=\[\]"):
        explain(model, circuit, task, edges=[])
    with pytest.raises(KeyError, match="unknown edge 'm9->logits'"):
        explain(model, circuit, task, edges=["m9->logits"])
    with pytest.raises(ValueError, match="the circuit has 0 edges"):
        explain(model, circuit - circuit, task)
    with pytest.raises(ValueError, match="is for another model"):
        explain(model_zoo.load("bridge-llama-gqa"), circuit, task)
    in_spans = EdgeGraph.from_model(model).at(["a", "b"])
    with pytest.raises(NotImplementedError, match="this circuit's edges have positions"):
        explain(model, Circuit.from_edges(in_spans, in_spans.edges[:2]), task)
    found = explain(model, circuit, task, edges=circuit.edges[:1])
    with pytest.raises(ValueError, match="ends in .json or .csv"):
        found.save(tmp_path / "explained.txt")
    for content in ("{", "[]", '{"kind": "tl_edgeprune explanation", "format": 9}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json (is no explanation|has format 9)"):
            Explanation.load(tmp_path / "bad.json")


def test_very_many_edges_are_refused_unless_some_are_named(monkeypatch):
    model = model_zoo.load("bridge-gpt2")
    monkeypatch.setattr(sys.modules["tl_edgeprune.evaluation.explain.explain"], "MOST_EDGES", 10)
    with pytest.raises(ValueError, match=r"with more than 10 \(or none\) say which to explain"):
        explain(model, half(model), model_zoo.pairs(model, 2))
    assert MOST_EDGES >= 100


@pytest.mark.parametrize(
    "destination, kind",
    [("a3.h1<q>", "q"), ("a3.kv0<v>", "v"), ("a3.h1", "attn"), ("m7", "mlp"), ("logits", "logits")],
)
def test_kinds_of_destinations(destination, kind):
    assert kind_of(destination) == kind
