"""ACDC and exact patching: the same circuits and scores as whole masked runs, one at a time, give.

The engine (`cuts`) is held to its definition, ACDC to one written here in a loop over edges, exact
patching to brute-force path patching, and both searches to circuits that are known.
"""

from __future__ import annotations

import json
import math
import warnings
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import brute_force as bf
from support import model_zoo
from support.prompt_pairs import pronouns, random_task
from torch import Tensor
from tqdm import tqdm

from tl_edgeprune import Circuit, EdgeGraph, Task, masked, models, tasks
from tl_edgeprune.ablation.reference import ZERO_WITH_BIASES
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.hooks.find import find_sites
from tl_edgeprune.methods import acdc as acdc_module
from tl_edgeprune.methods.acdc import acdc
from tl_edgeprune.methods.exact import exact
from tl_edgeprune.objectives import OBJECTIVES, kl
from tl_edgeprune.runs import resume as saved_module
from tl_edgeprune.runs.resume import Saved
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.search import cuts
from tl_edgeprune.search import partial_cuts as part_cuts
from tl_edgeprune.search.full_cuts import FullCuts
from tl_edgeprune.search.grouped import Stage
from tl_edgeprune.search.partial_cuts import PartialCuts
from tl_edgeprune.search.single_edges import SingleEdges

ABLATIONS = ("counterfactual", "zero")
TINY = [
    *("bridge-gpt2", "bridge-llama-gqa", "bridge-pythia", "bridge-olmo2", "native-attn-only"),
    *(name for name in ("hooked-gpt2-ln", "hooked-gemma2") if name in model_zoo.ARCHITECTURES),
]
QUICK = {
    ("bridge-gpt2", "zero"),
    ("native-attn-only", "counterfactual"),
    ("hooked-gpt2-ln", "zero"),
}
SEQUENCES = [
    pytest.param(name, ablation, marks=[] if (name, ablation) in QUICK else [pytest.mark.slow])
    for name in TINY
    for ablation in ABLATIONS
]


def engines(run: MaskedModel, task: Task, ablation: str, batch_size: int = 2) -> tuple[Any, Any]:
    """The definition and the fast engine, on the same pairs."""
    targets = Targets(run, task, ablation, max_bytes=0)
    target_batches = [targets.prepare(batch) for batch in task.batches(batch_size)]
    loss_of = OBJECTIVES[task.objective]
    return FullCuts(run, target_batches, loss_of), PartialCuts(run, target_batches, loss_of)


def graph_of(model: Any, split_qkv: bool = True) -> EdgeGraph:
    if not split_qkv and find_sites(model).n_kv_heads != model.cfg.n_heads:
        split_qkv = True  # such graphs have no unsplit form
    return EdgeGraph.from_model(model, split_qkv=split_qkv)


# ------------------------------------------------------------------------------------ the engine


@given(
    name=st.sampled_from(model_zoo.ARCHITECTURES),
    ablation=st.sampled_from((*ABLATIONS, ZERO_WITH_BIASES)),
    split_qkv=st.booleans(),
    read=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_partial_runs_give_what_whole_runs_give(name, ablation, split_qkv, read, seed):
    """Any mask, any cuts of any read, and again after some of them were made."""
    model = model_zoo.load(name)
    task = random_task(model, n=3, lengths=(4, 5), seed=seed, read=read)
    generator = torch.Generator().manual_seed(seed)
    with MaskedModel.attach(model, graph_of(model, split_qkv)) as run:
        whole, part = engines(run, task, ablation)
        mask = torch.rand(run.graph.n_edges, generator=generator) < 0.3 + 0.7 * (seed % 3) / 2
        whole.set(mask)
        part.set(mask)
        torch.testing.assert_close(part.per_pair, whole.per_pair, atol=2e-5, rtol=1e-4)
        places = torch.randint(len(run.graph.reads), (2,), generator=generator).tolist()
        for place in [*places, len(run.graph.reads) - 1]:
            shape = (3, run.graph.reads[place].n_destinations, run.graph.reads[place].n_sources)
            candidates = torch.rand(shape, generator=generator) < 0.3
            expected = whole.losses(place, candidates)
            found = part.losses(place, candidates)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
            whole.commit(1)
            part.commit(1)
            assert torch.equal(part.mask, whole.mask)


@pytest.mark.parametrize("name", model_zoo.ARCHITECTURES)
def test_every_architecture_runs_from_the_middle(name):
    model = model_zoo.load(name)
    with MaskedModel.attach(model) as run:
        targets = Targets(run, model_zoo.pairs(model, 2))
        target_batch = targets.prepare(next(targets.task.batches(2)))
        assert cuts.problem_of_partial_runs(run, target_batch) is None


@pytest.mark.slow
def test_a_partial_run_that_is_wrong_is_not_used(monkeypatch):
    """If half blocks give something else, or cannot be run, whole runs do the work and say so."""
    model, task = model_zoo.load("bridge-gpt2"), model_zoo.pairs(model_zoo.load("bridge-gpt2"), 2)
    fast = acdc(model, task, threshold=0.05)
    assert fast.metadata["partial_runs"]

    def wrong(self, layer, x):
        return x

    def impossible(self, layer, x):
        raise TypeError("this block wants more")

    for replacement, message in (wrong, "give logits that are off"), (impossible, "wants more"):
        monkeypatch.setattr(part_cuts.Blocks, "mlp", replacement)
        model = model_zoo.build("bridge-gpt2")  # each model is checked once
        for _ in range(2):
            with pytest.warns(UserWarning, match=f"partial runs .*{message}"):
                slow = acdc(model, task, threshold=0.05)
            assert not slow.metadata["partial_runs"]
            assert slow == fast


def test_heads_act_on_one_another_where_a_norm_follows_their_sum():
    for name in TINY:
        model = model_zoo.load(name)
        with MaskedModel.attach(model) as run:
            whole, _ = engines(run, model_zoo.pairs(model, 2), "counterfactual")
        assert whole.heads_interact == any(word in name for word in ("gemma", "olmo2")), name


def test_the_model_is_left_as_it_was():
    model = model_zoo.load("bridge-gpt2")
    prompt = model_zoo.tokens(model)
    before = model(prompt)
    acdc(model, model_zoo.pairs(model, 2), threshold=0.05)
    assert torch.equal(model(prompt), before)
    attention = model.blocks[0].attn
    linear = [attention, *(getattr(attention, part).original_component for part in "qkv")]
    assert all("forward" not in vars(module) for module in linear)


# -------------------------------------------------------------------------------------- ACDC


def naive_value(model: Any, task: Task, mask: Tensor, ablation: str, graph: EdgeGraph) -> float:
    """KL to the full model, mean over the pairs, each run by itself."""
    losses = []
    for batch in task.batches(1):
        other = {"corrupted": batch.corrupted} if ablation == "counterfactual" else {}
        place = batch.read_positions.unsqueeze(-1)
        with torch.no_grad():
            full = model(batch.clean)
            with masked(model, mask, ablation=ablation, graph=graph, **other):
                logits = model(batch.clean)
        index = place.expand(-1, -1, full.shape[-1])
        losses.append(float(kl(logits.gather(1, index), full.gather(1, index), batch)))
    return sum(losses) / len(losses)


def naive_acdc(
    model: Any, task: Task, threshold: float, ablation: str, graph: EdgeGraph
) -> Circuit:
    """One edge at a time, from the last to the first; edges into nodes that lead nowhere go."""
    mask = torch.ones(graph.n_edges, dtype=torch.bool)
    value = naive_value(model, task, mask, ablation, graph)
    joined = any(word in model.cfg.model_name for word in ("gemma", "olmo")) or any(
        site.post is not None for site in find_sites(model).attention
    )
    for name in reversed(graph.edges):
        destination = name.partition("->")[2]
        owners = graph.owner(destination)
        leading = Circuit(graph, mask).edges
        useful = {"logits"}
        for edge in reversed(leading):  # a source's readers come after it
            source, _, reader = edge.partition("->")
            if reader in useful or set(graph.owner(reader)) & useful:
                useful.add(source)
        if destination != "logits" and not set(owners) & useful and not joined:
            mask[graph.index(name)] = False
            continue
        without = mask.clone()
        without[graph.index(name)] = False
        tried = naive_value(model, task, without, ablation, graph)
        if tried - value < threshold:
            mask, value = without, tried
    return Circuit(graph, mask)


@pytest.mark.parametrize(("name", "ablation"), SEQUENCES)
def test_acdc_is_the_naive_sequence(name, ablation):
    model = model_zoo.load(name)
    task = random_task(model, n=2, lengths=(4, 5), seed=3)
    graph = graph_of(model, split_qkv=False)
    for threshold in (0.02, 0.2):
        found = acdc(model, task, threshold=threshold, ablation=ablation, graph=graph, batch_size=1)
        assert found == naive_acdc(model, task, threshold, ablation, graph)
        assert found.n_edges < graph.n_edges


@pytest.mark.slow
def test_side_by_side_is_one_at_a_time(monkeypatch):
    model = model_zoo.load("bridge-llama-gqa")
    task = random_task(model, n=2, lengths=(4, 5), seed=1)
    found = [acdc(model, task, threshold=0.01)]
    monkeypatch.setattr(PartialCuts, "candidates", lambda self, place: 1)
    found.append(acdc(model, task, threshold=0.01, batch_size=1))
    monkeypatch.setattr(PartialCuts, "candidates", lambda self, place: 5)
    found.append(acdc(model, task, threshold=0.01, batch_size=2))
    assert found[0] == found[1] == found[2]
    assert found[0].metadata["objective_at_end"] == pytest.approx(
        naive_value(model, task, found[0].mask, "counterfactual", found[0].graph), rel=1e-4
    )


@pytest.mark.parametrize("search", acdc_module.SEARCHES)
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", ["tracr-xproportion", "tracr-reverse"])
def test_acdc_recovers_the_published_circuits(name, ablation, search):
    model = models.load(name, device="cpu")
    task = tasks.load(name, model, 60, 0)
    circuit = acdc(model, task, threshold=1e-6, ablation=ablation, search=search, batch_size=16)
    assert set(circuit.edges) == models.known_circuit(name, ablation)
    assert circuit.metadata["objective"] == "mse"
    assert circuit.metadata["objective_at_end"] < 1e-6


def test_metadata_say_where_a_circuit_is_from():
    model = model_zoo.load("bridge-gpt2")
    circuit = acdc(model, model_zoo.pairs(model, 2), threshold=0.5, ablation="zero")
    wanted = {"method": "acdc", "threshold": 0.5, "task": "random", "ablation": "zero"}
    wanted |= {"objective": "kl", "search": "exact", "folded": False, "n_pairs": 2}
    assert wanted.items() <= circuit.metadata.items()
    assert circuit.metadata["runs"] > 0
    json.dumps(circuit.metadata)


def stopped_after(monkeypatch, most: float) -> list[int]:
    """Groups of candidates that are tried from here on; the run is interrupted after so many."""
    tried: list[int] = []
    losses = PartialCuts.losses

    def counted(self, place, candidates):
        if len(tried) >= most:
            raise KeyboardInterrupt
        tried.append(place)
        return losses(self, place, candidates)

    monkeypatch.setattr(PartialCuts, "losses", counted)
    return tried


@pytest.mark.parametrize(("search", "share"), [("exact", 0.6), ("bisect", 0.6), ("bisect", 0.95)])
def test_a_killed_run_goes_on_where_it_was(search, share, tmp_path, monkeypatch):
    model = model_zoo.load("bridge-gpt2")
    task, path = model_zoo.pairs(model, 2), tmp_path / "acdc.safetensors"

    def found(most: float, **settings):
        with monkeypatch.context() as patch:
            tried = stopped_after(patch, most)
            return acdc(model, task, threshold=0.1, search=search, **settings), len(tried)

    whole, all_of_them = found(math.inf)
    monkeypatch.setattr(saved_module, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        found(int(share * all_of_them), checkpoint=path)
    resumed, rest = found(math.inf, checkpoint=path)
    assert resumed == whole
    assert rest < (1.12 - share) * all_of_them
    assert resumed.metadata["runs"] == pytest.approx(whole.metadata["runs"], rel=0.3)


SMALL = EdgeGraph(1, 2, 2)
RISES = st.lists(st.floats(), min_size=SMALL.n_edges, max_size=SMALL.n_edges)
SINGLES = st.builds(
    SingleEdges,
    RISES.map(lambda values: torch.tensor(values, dtype=torch.float64)),
    st.integers(0, len(SMALL.reads)),
    st.integers(0, 9),
    st.booleans(),
)


@given(st.builds(Stage, st.none() | st.floats(0, 1e30), st.none() | SINGLES))
@example(Stage(0.0))  # groups of edges that are guessed to cost nothing
def test_a_checkpoint_brings_every_stage_back(tmp_path_factory, stage):
    graph, path = SMALL, tmp_path_factory.mktemp("acdc") / "acdc.safetensors"
    state = Mock(spec=FullCuts, mask=torch.arange(graph.n_edges) % 3 > 0, runs=7, value=0.5)
    saved = Saved(path, {"method": "acdc"})
    saved._last = -math.inf
    acdc_module._reporter(state, tqdm(total=graph.n_edges, disable=True), saved)(4, stage)
    mask, *rest = acdc_module._saved_search(Saved(path, {"method": "acdc"}), graph)
    assert torch.equal(mask, state.mask) and rest == [4, 7, stage]
    if stage.singles is not None:
        assert rest[-1].singles.rises.numpy().tobytes() == stage.singles.rises.numpy().tobytes()


def test_a_checkpoint_of_another_run_and_a_damaged_one_are_refused(tmp_path, monkeypatch):
    model = model_zoo.load("bridge-gpt2")
    task, path = model_zoo.pairs(model, 3), tmp_path / "acdc.safetensors"
    monkeypatch.setattr(saved_module, "SAVE_SECONDS", 0.0)
    acdc(model, task, threshold=0.5, checkpoint=path)
    with pytest.raises(ValueError, match="another run \\(threshold differ\\)"):
        acdc(model, task, threshold=0.03, checkpoint=path)
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        acdc(model, task, threshold=0.5, checkpoint=path)


def test_each_edge_of_a_search_by_groups_costs_a_threshold_by_itself():
    model, threshold = model_zoo.load("bridge-gpt2"), 0.1
    task = model_zoo.pairs(model, 2)
    circuit = acdc(model, task, threshold=threshold, search="bisect")
    value = naive_value(model, task, circuit.mask, "counterfactual", circuit.graph)
    assert value == pytest.approx(circuit.metadata["objective_at_end"], rel=1e-3)
    assert 0 < circuit.n_edges < circuit.graph.n_edges / 2
    for edge in circuit.mask.nonzero().flatten().tolist():
        without = circuit.mask.clone()
        without[edge] = False
        tried = naive_value(model, task, without, "counterfactual", circuit.graph)
        assert tried - value > threshold * (1 - 1e-3)


# ------------------------------------------------------------------------------- many at a time


@pytest.mark.slow
def test_groups_do_no_worse_than_the_sequence_on_real_weights(stories):
    task = pronouns(stories)
    one, many = (acdc(stories, task, threshold=0.1, search=s) for s in acdc_module.SEARCHES)
    assert many.metadata["runs"] < one.metadata["runs"]
    assert many.n_edges <= 1.05 * one.n_edges
    assert many.metadata["objective_at_end"] <= 1.05 * one.metadata["objective_at_end"]
    value = naive_value(stories, task, many.mask, "counterfactual", many.graph)
    assert value == pytest.approx(many.metadata["objective_at_end"], rel=1e-3)
    for edge in many.mask.nonzero().flatten().tolist():
        without = many.mask.clone()
        without[edge] = False
        tried = naive_value(stories, task, without, "counterfactual", many.graph)
        assert tried - value > 0.1 * (1 - 1e-3)


# -------------------------------------------------------------------------------- exact patching


@pytest.mark.parametrize("name", ["bridge-gpt2", "native-attn-only"])
def test_exact_is_path_patching_by_brute_force(name):
    model = model_zoo.load(name, torch.float64)
    task = model_zoo.pairs(model, 2)
    scores = exact(model, task, objective="logit-diff")
    expected = torch.zeros(scores.graph.n_edges, dtype=torch.float64)
    with torch.no_grad():
        for clean, corrupted in zip(task.clean, task.corrupted, strict=True):
            other = bf.source_outputs(model, corrupted[None])
            full = model(clean[None])[0, -1]
            for index, edge in enumerate(scores.graph.edges):
                logits = bf.path_patch(model, clean[None], edge, other)[0, -1]
                rise = (full[3] - full[5]) - (logits[3] - logits[5])
                expected[index] += rise / len(task)
    torch.testing.assert_close(scores.tensor.double(), expected, atol=1e-5, rtol=1e-4)


def test_exact_scores_the_edges_asked_for():
    model = model_zoo.load("bridge-gpt2")
    task = model_zoo.pairs(model, 2)
    full = exact(model, task, ablation="zero")
    some = ["a0.h0->logits", "m1->a2.h3<q>"]
    part = exact(model, task, ablation="zero", edges=some)
    assert [part[edge] for edge in some] == pytest.approx([full[edge] for edge in some], abs=1e-5)
    assert int((part.tensor != 0).sum()) <= 2
    assert part.metadata["runs"] == 3
    with pytest.raises(KeyError, match="unknown edge 'm9->logits'"):
        exact(model, task, edges=["m9->logits"])


# ----------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_a_threshold_below_zero_is_refused(threshold):
    model = model_zoo.load("bridge-gpt2")
    with pytest.raises(ValueError, match="expected 0 or more"):
        acdc(model, model_zoo.pairs(model, 2), threshold=threshold)


def test_wrong_words_are_refused():
    model = model_zoo.load("bridge-gpt2")
    task = model_zoo.pairs(model, 2)
    with pytest.raises(ValueError, match="unknown search 'greedy': expected one of exact, bisect"):
        acdc(model, task, threshold=0.1, search="greedy")
    with pytest.raises(ValueError, match="unknown objective"):
        exact(model, task, objective="loss")


@pytest.mark.parametrize("search", acdc_module.SEARCHES)
def test_a_threshold_that_keeps_nothing_warns(search):
    model = model_zoo.load("native-ln")
    with pytest.warns(UserWarning, match="keeps no edge: a lower threshold"):
        circuit = acdc(model, model_zoo.pairs(model, 2), threshold=1e6, search=search)
    assert circuit.n_edges == 0


def test_a_threshold_that_keeps_all_warns():
    model = models.load("tracr-xproportion", device="cpu")
    task = tasks.load("tracr-xproportion", model, 4)
    with pytest.warns(UserWarning, match="keeps every edge: a higher threshold"):
        acdc(model, task, threshold=0.0, objective=_never_worse_without())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        acdc(model, task, threshold=1e-6)


def _never_worse_without() -> Any:
    """An objective that rises with every run."""
    runs = iter(range(10**6))

    def rising(logits: Tensor, full: Tensor, batch: Any) -> Tensor:
        return logits.new_full((len(logits),), float(next(runs)))

    return rising
