"""What every discovery method keeps to, and what its scores are worth on real weights."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import model_zoo
from torch import Tensor

from tl_edgeprune import EdgeGraph, Task, compare, discover, evaluate, tasks
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.methods.hisp import node_to_edge_scores
from tl_edgeprune.methods.ifr import proximity
from tl_edgeprune.methods.registry import METHODS, find_method
from tl_edgeprune.methods.ugs import sample_window
from tl_edgeprune.objectives import find_objective
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.training.regularisers import Attachment
from tl_edgeprune.training.trainer import Trainer

MODEL = "bridge-gpt2"
TRAINED = ("edge-pruning", "ugs", "subnetwork-probing")
SCORING = sorted(set(METHODS) - {"acdc"})  # acdc alone gives a circuit
EFFECTS = (
    *("eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "mask-ig", "eap-graddrop"),
    *("hisp", "relp"),
)


def settings(method: str) -> dict[str, Any]:
    return {"steps": 5, "batch_size": 4, "progress": False} if method in TRAINED else {}


# ------------------------------------------------------------------------------------ the contract


@pytest.mark.parametrize("method", SCORING)
def test_a_method_scores_every_edge_and_says_where_from(method: str) -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 6)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    scores = discover(model, task, method, **settings(method))
    assert scores.graph == EdgeGraph.from_model(model)
    assert bool(torch.isfinite(scores.tensor).all()) and float(scores.tensor.std()) > 0
    known = {"method": method, "task": "random", "n_pairs": 6, "ablation": "counterfactual"}
    assert known.items() <= scores.metadata.items()
    assert scores.top(7).n_edges == 7
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any(point.has_hooks() for point in model.hook_dict.values())


@pytest.mark.parametrize("method", SCORING)
def test_a_method_repeats_to_the_bit(method: str) -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 4)
    first, second = (discover(model, task, method, **settings(method)) for _ in range(2))
    assert torch.equal(first.tensor, second.tensor)


@pytest.mark.parametrize("method", sorted(set(SCORING) - set(TRAINED) - {"exact"}))
def test_a_method_takes_grouped_heads_parallel_blocks_and_both_classes(method: str) -> None:
    hooked = [
        name for name in model_zoo.ARCHITECTURES if name in ("hooked-llama-gqa", "hooked-gpt2-ln")
    ]
    for name in ("bridge-llama-gqa", "bridge-pythia", *hooked):
        model = model_zoo.load(name)
        scores = discover(model, model_zoo.pairs(model, 2), method)
        assert scores.tensor.shape == (EdgeGraph.from_model(model).n_edges,)


@pytest.mark.parametrize("method", SCORING)
def test_a_method_in_bfloat16_ranks_much_as_in_float32(method: str) -> None:
    single, half = model_zoo.load(MODEL), model_zoo.load(MODEL, torch.bfloat16)
    task = model_zoo.pairs(single, 2)
    wanted, found = (discover(model, task, method, **settings(method)) for model in (single, half))
    assert found.tensor.shape == (found.graph.n_edges,) and found.tensor.dtype == torch.float32
    assert bool(torch.isfinite(found.tensor).all())
    assert rank_correlation(wanted.ranking(), found.ranking()) > 0.9
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("search", [pytest.param("exact", marks=pytest.mark.slow), "bisect"])
def test_acdc_in_bfloat16_keeps_much_the_same_edges(search: str) -> None:
    single, half = model_zoo.load(MODEL), model_zoo.load(MODEL, torch.bfloat16)
    task = model_zoo.pairs(single, 2)
    wanted, found = (
        discover(model, task, "acdc", threshold=0.05, search=search) for model in (single, half)
    )
    assert abs(found.n_edges - wanted.n_edges) < 0.3 * wanted.n_edges
    assert found.iou(wanted) > 0.4  # chance: 0.05; a removal depends on those before it
    assert found.metadata["objective_at_end"] < 10


def test_all_methods_show_progress_where_it_takes_long(capsys, monkeypatch) -> None:
    for method in sorted(set(METHODS) - {"random"}):
        assert find_method(method).parameters["progress"].default is True
    model, task = model_zoo.load("native-ln"), model_zoo.pairs(model_zoo.load("native-ln"), 1)
    slow = {"acdc": {"threshold": 0.5, "search": "bisect"}, "exact": {}, "eap": {}}
    for after in (60.0, 0.0):
        for module in ("methods.acdc", "methods.exact", "runs.targets"):
            home = importlib.import_module(f"tl_edgeprune.{module}")
            monkeypatch.setattr(home, "BAR_AFTER", after)
        for method, own in slow.items():
            discover(model, task, method, **own)
            assert bool(capsys.readouterr().err) == (after == 0)
            discover(model, task, method, progress=False, **own)
            assert not capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["eap-gi", "edge_pruning", "zzz"])
def test_an_unknown_name_is_told_the_nearest(wrong: str) -> None:
    near = {"eap-gi": "eap-ig", "edge_pruning": "edge-pruning"}.get(wrong)
    model = model_zoo.load(MODEL)
    ends = rf"ugs\.( Did you mean {near}\?)$" if near else r"ugs\.$"
    with pytest.raises(ValueError, match=ends):
        discover(model, model_zoo.pairs(model, 2), wrong)
    with pytest.raises(ValueError, match=ends):
        compare(model, model_zoo.pairs(model, 2), model_zoo.pairs(model, 2), [wrong], [5])
    with pytest.raises(ValueError, match=r"Did you mean greater-than\?$"):
        tasks.load("greaterthan", model, 3)


@pytest.mark.parametrize("method", ["eap", "edge-pruning", "acdc", "ifr"])
def test_pairs_of_one_prompt_have_no_counterfactual(method: str) -> None:
    """One pair that differs is enough; zeros differ from any; ifr looks at no corrupted prompt."""
    model = model_zoo.load("bridge-gpt2")
    task = model_zoo.pairs(model, 3)
    same = replace(task, corrupted=task.clean)
    one = replace(task, clean=task.corrupted[:2] + task.clean[2:])
    quick = {"edge-pruning": {"steps": 2, "progress": False}, "acdc": {"threshold": 0.5}}
    own = quick.get(method, {})
    if method == "ifr":
        assert torch.equal(
            discover(model, same, method).tensor, discover(model, task, method).tensor
        )
        return
    with pytest.raises(ValueError, match="'random': in every pair both prompts are the same"):
        discover(model, same, method, **own)
    if method != "acdc":
        discover(model, same, method, ablation="zero", **own)
        discover(model, one, method, **own)


def test_an_unknown_method_is_told_the_known_ones() -> None:
    model = model_zoo.load(MODEL)
    with pytest.raises(ValueError, match=r"unknown method 'magic'.*eap-ig.*ugs"):
        discover(model, model_zoo.pairs(model, 2), "magic")


@pytest.mark.parametrize(
    ("method", "setting"),
    [("ifr", "ablation"), ("eap", "steps"), ("ugs", "threshold"), ("random", "objective")],
)
def test_a_setting_that_a_method_does_not_take_is_refused(method: str, setting: str) -> None:
    model = model_zoo.load(MODEL)
    with pytest.raises(ValueError, match=f"{method} takes no {setting}: expected some of"):
        discover(model, model_zoo.pairs(model, 2), method, **{setting: 1})


# -------------------------------------------------------------------------------- on real weights

NAMES = "Lily Tom Mia Ben Anna Sam Lucy Max Sue Tim Jane Jack Emma Bob Amy Dan Sara Mark Kate Joe"


@pytest.fixture(scope="module")
def she_he(stories: Any) -> Task:
    """ "{name} went to the park." and then " She" or " He", with the other as distractor."""
    prompts = [f"Once upon a time, {name} went to the park." for name in NAMES.split()]
    tokens = [stories.to_tokens(prompt, prepend_bos=True)[0] for prompt in prompts]
    answers = [stories(t[None])[0, -1].argmax()[None] for t in tokens]
    pairs = [
        (i, j)
        for i in range(len(tokens))
        for j in range(len(tokens))
        if len(tokens[i]) == len(tokens[j]) and int(answers[i]) != int(answers[j])
    ][::3]
    clean, corrupted = ([tokens[pair[side]] for pair in pairs] for side in (0, 1))
    right, wrong = ([answers[pair[side]] for pair in pairs] for side in (0, 1))
    last = [torch.tensor([len(t) - 1]) for t in clean]
    return Task("she-he", clean, corrupted, last, right, wrong)


@pytest.fixture(scope="module")
def effects(stories: Any, she_he: Task) -> tuple[Tensor, Tensor]:
    """A sample of edges, and what cutting each alone does to minus the logit difference."""
    graph = EdgeGraph.from_model(stories)
    sample = torch.randperm(graph.n_edges, generator=torch.Generator().manual_seed(0))[:100]
    loss_of, rises = find_objective("logit-diff", she_he), torch.zeros(len(sample))
    with torch.no_grad(), MaskedModel.attach(stories) as run:
        targets = Targets(run, she_he)
        for batch in she_he.batches(16):
            target_batch = targets.prepare(batch)

            def loss(mask: Tensor, target_batch: Any = target_batch) -> Tensor:
                batch = target_batch.batch
                logits = run(batch.clean, mask, target_batch.reference, batch.read_positions)
                return loss_of(logits, target_batch.full, batch).sum()

            whole = loss(torch.ones(graph.n_edges))
            for place, edge in enumerate(sample):
                mask = torch.ones(graph.n_edges)
                mask[edge] = 0
                rises[place] += loss(mask) - whole
    return sample, rises / len(she_he)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "eap-ig-activations"))
        for name in sorted(set(EFFECTS) & set(METHODS))
    ],
)
def test_effects_correlate_with_cutting_and_beat_chance(
    method: str, stories: Any, she_he: Task, effects: tuple[Tensor, Tensor]
) -> None:
    """Magnitudes against |rise of the loss|; signs too where the method has them. HISP knows only
    nodes.
    """
    sample, rises = effects
    scores = discover(stories, she_he, method)
    least = 0.2 if method == "hisp" else 0.4
    assert rank_correlation(scores.tensor[sample].abs(), rises.abs()) > least
    if bool((scores.tensor < 0).any()):
        assert rank_correlation(scores.tensor[sample], rises) > 0.3
    size = scores.graph.n_edges // 20
    chance = discover(stories, she_he, "random").top(size)
    ours, theirs = (evaluate(stories, c, she_he).kl for c in (scores.top(size), chance))
    assert ours < 0.6 * theirs


@pytest.mark.parametrize("method", ["ifr", "greedy-output", "subspace-nodes"])
def test_methods_without_an_objective_still_tell_something(
    method: str, stories: Any, she_he: Task, effects: tuple[Tensor, Tensor]
) -> None:
    sample, rises = effects
    scores = discover(stories, she_he, method)
    assert rank_correlation(scores.tensor[sample], rises.abs()) > 0.15


@pytest.mark.parametrize("method", ["ugs", "subnetwork-probing"])
def test_trained_masks_beat_chance(method: str, stories: Any, she_he: Task) -> None:
    train, held_out = she_he.split(0.5)
    scores = discover(stories, train, method, steps=80, progress=False)
    size = scores.graph.n_edges // 10
    chance = discover(stories, train, "random").top(size)
    ours, theirs = (evaluate(stories, c, held_out).kl for c in (scores.top(size), chance))
    assert ours < 0.6 * theirs


# ------------------------------------------------------------------------------------ definitions


def test_proximity_shares_what_is_near() -> None:
    """Two sources that make up x by 3/4 and 1/4; a third that points away counts for nothing."""
    x = torch.tensor([[4.0, -4.0]])
    shares = proximity(torch.stack([0.75 * x, 0.25 * x, -x]), x)
    torch.testing.assert_close(shares[:, 0], torch.tensor([0.75, 0.25, 0.0]))


def test_top_edges_of_node_scores_join_top_nodes() -> None:
    graph = EdgeGraph(n_layers=2, n_heads=2, n_kv_heads=2)
    sources = torch.tensor([0.1, 5.0, 1.0, 4.0, 3.0, 2.0, 0.5])  # input, a0.*, m0, a1.*, m1
    scores = dict(zip(graph.edges, node_to_edge_scores(graph, sources).tolist(), strict=True))
    assert scores["a0.h0->m0"] == 4.0 and scores["a0.h1->m0"] == 1.0
    assert scores["input->m0"] == 4.0 and scores["m0->logits"] == 4.0
    assert scores["input->logits"] == pytest.approx(0.1)


def test_window_draws_have_their_chances_and_an_unbiased_gradient() -> None:
    """P(z = 1) = theta - w/2, P(0 < z < 1) = w; the mean gradient of f(z) is w * (f(1) - f(0))."""
    generator = torch.Generator().manual_seed(0)
    log_alpha = torch.full((200_000,), 0.8, requires_grad=True)
    z = sample_window(log_alpha, generator)
    theta = float(torch.sigmoid(torch.tensor(0.8)))
    width = theta * (1 - theta)
    assert float((z == 1).double().mean()) == pytest.approx(theta - width / 2, abs=5e-3)
    assert float(((z > 0) & (z < 1)).double().mean()) == pytest.approx(width, abs=5e-3)
    (grad,) = torch.autograd.grad((z**3).sum(), log_alpha)
    assert float(grad.double().mean()) == pytest.approx(width * (1**3 - 0**3), abs=8e-3)


def test_attachment_prices_lonely_edges_above_well_connected_ones() -> None:
    graph = EdgeGraph(n_layers=2, n_heads=2, n_kv_heads=2)
    share = torch.full((graph.n_edges,), 1e-3)
    hub = [i for i, (source, _) in enumerate(graph.pairs) if source == 0]
    share[hub] = 1.0
    share.requires_grad_()
    (price,) = torch.autograd.grad(Attachment(float(graph.n_edges))(share, graph), share)
    connected, lonely = graph.index("input->m0"), graph.index("a0.h1->m0")
    assert 0 < float(price[connected]) < float(price[lonely]) < 1


def test_settings_that_make_a_method_what_it_is_are_none_of_its_own() -> None:
    model = model_zoo.load("bridge-gpt2")
    for method, name in [("ugs", "sampler"), ("subnetwork-probing", "controller")]:
        assert (
            name not in find_method(method).parameters and "steps" in find_method(method).parameters
        )
        with pytest.raises(ValueError, match=f"{method} takes no {name}"):
            discover(model, model_zoo.pairs(model, 1), method, **{name: None})


def test_ugs_history_counts_edges_by_its_own_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    model, noted = model_zoo.load("bridge-gpt2"), []
    note = Trainer._record

    def watched(self: Trainer, *arguments: Any) -> None:
        note(self, *arguments)
        noted.append(
            (self.history[-1]["edges"], float(self.edges.log_alpha.detach().sigmoid().sum()))
        )

    monkeypatch.setattr(Trainer, "_record", watched)
    discover(model, model_zoo.pairs(model, 2), "ugs", steps=3, progress=False)
    assert len(noted) == 3 and all(edges == pytest.approx(sum_) for edges, sum_ in noted)
