"""Circuits from the weights and from cuts: what can carry something, and what is necessary."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from support import model_zoo

from tl_edgeprune import Circuit, EdgeGraph, masked, models, necessary_edges, possible_edges, tasks
from tl_edgeprune.models import rasp as compiled
from tl_edgeprune.models import tracr

ABLATIONS = ("zero", "counterfactual")
QUICK = ("tracr-hist", "tracr-length", "tracr-pair-balance")
PROGRAMS = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in tracr.NAMES]


@pytest.mark.parametrize("name", tracr.NAMES)
def test_what_is_necessary_is_possible(name):
    possible = set(possible_edges(models.load(name, device="cpu")).edges)
    for ablation in ABLATIONS:
        assert models.known_circuit(name, ablation) <= possible


@pytest.mark.parametrize("name", tracr.NAMES)
def test_impossible_edges_carry_nothing(name):
    """All of them cut at once, in favour of nothing or of another prompt: nothing changes."""
    model = models.load(name, device="cpu", dtype=torch.float64)
    possible = possible_edges(model)
    assert 0 < possible.n_edges < possible.graph.n_edges
    batch = next(tasks.load("tracr", model, 40, seed=3).batches(16))
    with torch.no_grad():
        full = model(batch.clean)
        for other in ({"ablation": "zero"}, {"corrupted": batch.corrupted}):
            with masked(model, possible, **other):
                torch.testing.assert_close(model(batch.clean), full, atol=1e-9, rtol=0)


def test_weights_that_do_not_meet_carry_nothing():
    """In a random model without norms every edge can carry something, until weights are 0."""
    model = model_zoo.build("native-no-norm")
    whole = possible_edges(model)
    assert whole.n_edges == whole.graph.n_edges
    weights = model.state_dict()  # the weights themselves
    for name in ("0.mlp.in.weight", "0.mlp.in.bias", "0.mlp.out.bias", "1.attn.q.weight"):
        weights[f"blocks.{name}"].zero_()
    weights["blocks.1.attn.q.bias"].zero_()
    gone = whole - possible_edges(model)
    expected = [edge for edge in whole.graph.edges if edge.startswith("m0->") or "->m0" in edge]
    expected += [e for e in whole.graph.edges if "->a1" in e and e.endswith(("<q>", "<k>"))]
    assert set(gone.edges) == set(expected)


@pytest.mark.parametrize("name", ["native-ln", "bridge-llama-gqa"])
def test_models_whose_weights_do_not_tell_are_refused(name):
    with pytest.raises(NotImplementedError, match="norms"):
        possible_edges(model_zoo.load(name))


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_cutting_every_edge_alone_finds_the_shipped_circuit(name, ablation):
    model = models.load(name, device="cpu")
    task = tasks.load("tracr", model, 60, seed=7)
    found = necessary_edges(model, task, ablation=ablation, tolerance=1e-7)
    assert set(found.edges) == models.known_circuit(name, ablation)


def test_edges_that_stand_in_for_one_another_are_not_necessary():
    """Two MLPs write the same: the answer stays where either is cut, and goes where both are."""
    model = model_zoo.build("native-no-norm")
    weights = model.state_dict()  # the weights themselves
    for weight in weights.values():
        weight.zero_()
    weights["blocks.0.mlp.out.bias"][0] = weights["blocks.1.mlp.out.bias"][0] = 1
    weights["unembed.weight"][3, 0], weights["unembed.bias"][5] = 1, 0.5
    task = model_zoo.pairs(model, 4)

    def flips(logits, full, batch):
        return (logits.argmax(-1) != full.argmax(-1)).float().mean(-1)

    assert necessary_edges(model, task, ablation="zero", objective=flips).n_edges == 0
    possible = possible_edges(model)
    assert set(possible.edges) == {"m0->logits", "m1->logits"}
    with masked(model, Circuit.from_edges(possible.graph, []), ablation="zero"):
        assert model(task.clean[0][None])[0, -1].argmax() == 5


# --------------------------------------------------------------------------------------- from_tracr


def test_without_tracr_the_error_says_what_to_install(monkeypatch):
    for name in ("tracr", "tracr.compiler", "tracr.rasp"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "tl_edgeprune\[tracr\]"'):
        models.from_tracr(object(), vocab="ab", max_seq_len=3)


def test_from_tracr_refuses_before_it_compiles():
    with pytest.raises(ValueError, match="bridge, hooked"):
        models.from_tracr(object(), vocab="ab", max_seq_len=3, cls="jax")


def test_the_task_of_a_program_needs_a_program():
    with pytest.raises(ValueError, match=r"models\.from_tracr"):
        tasks.load("tracr", model_zoo.load("native-no-norm"), 4)
    model = models.load("tracr-hist", device="cpu")
    assert (
        tasks.load("tracr", model, 9, 2)
        .clean[5]
        .equal(tasks.load("tracr-hist", model, 9, 2).clean[5])
    )
    with pytest.raises(ValueError, match="needs BOS"):
        tasks.load("tracr", model, 4, prepend_bos=False)


def test_long_programs_have_some_of_their_prompts():
    config = tracr.read_config("tracr-hist")
    wide = config | {"model": config["model"] | {"n_ctx": 16}}
    from tl_edgeprune.tasks.library.tracr import build

    task = build(wide, 60, 0, None)
    assert max(map(len, task.clean)) == 16
    assert len({tuple(t.tolist()) for t in task.clean if len(t) > 8}) == sum(
        len(t) > 8 for t in task.clean
    )


@pytest.fixture(scope="module")
def rasp() -> Any:
    pytest.importorskip("tracr.rasp", reason="needs tl_edgeprune[tracr]")
    from tracr.rasp import rasp

    return rasp


def test_from_tracr_refuses_what_it_cannot_compile(rasp):
    with pytest.raises(TypeError, match="got str"):
        models.from_tracr("tokens", vocab="ab", max_seq_len=3)
    with pytest.raises(ValueError, match="two tokens"):
        models.from_tracr(rasp.tokens == "a", vocab="a", max_seq_len=3)
    with pytest.raises(ValueError, match="no circuit"):
        models.from_tracr(rasp.tokens, vocab="ab", max_seq_len=3)


def test_a_program_of_ones_own_is_computed_and_its_circuit_known(rasp):
    """Whether the next token is the same: compiled here, against the program itself."""
    after = rasp.Aggregate(
        rasp.Select(rasp.indices, rasp.indices, lambda k, q: k == q + 1), rasp.tokens, default=None
    )
    program = rasp.SequenceMap(lambda a, b: a == b, after, rasp.tokens).named("twins")
    model = models.from_tracr(program, vocab="abc", max_seq_len=4, device="cpu", name="twins")
    config = tracr.config_of(model)
    tokens = {index: token for token, index in config["vocab"].items()}
    task = tasks.load("tracr", model, 60, seed=1)
    assert task.name == "twins"
    for prompt in task.clean:
        said = program([tokens[index] for index in prompt[1:].tolist()])
        with torch.no_grad():
            columns = model(prompt[None])[0, 1:].argmax(-1).tolist()
        for column, value in zip(columns, said, strict=True):
            assert value is None or config["outputs"][column] == value  # None: RASP has no opinion
    necessary = necessary_edges(model, task)
    assert 0 < necessary.n_edges and (necessary - possible_edges(model)).n_edges == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", tracr.NAMES)
def test_shipped_weights_are_what_the_script_compiles(rasp, name):
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[2] / "scripts" / "compile_tracr.py"
    spec = importlib.util.spec_from_file_location("compile_tracr", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["compile_tracr"] = script
    spec.loader.exec_module(script)
    program = next(p for p in script.PROGRAMS if p.name == name)
    made = compiled.compile_program(
        program.program, vocab=program.vocab, max_seq_len=program.max_tokens, name=name
    )
    for key, tensor in tracr.load_shipped(name).state.items():
        # directions are sorted by label, and labels have counters: equal up to their order
        torch.testing.assert_close(
            tensor.flatten().sort().values, made.state[key].flatten().sort().values
        )


def test_known_circuits_are_of_their_graphs():
    for name in tracr.NAMES:
        graph = EdgeGraph.from_model(models.load(name, device="cpu"))
        for ablation in ABLATIONS:
            known = models.known_circuit(name, ablation)
            assert set(Circuit.from_edges(graph, known).edges) == known <= set(graph.edges)
