"""EdgePruner's settings: what a step sees, what a run keeps to, what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support import model_zoo

from tl_edgeprune import (
    Attachment,
    Circuit,
    EdgeGraph,
    EdgePruner,
    ExactBudget,
    Lagrangian,
    Penalty,
    Task,
    evaluate,
    models,
    tasks,
)
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.hooks.placement import model_placed
from tl_edgeprune.objectives import kl
from tl_edgeprune.training import gate_group
from tl_edgeprune.training.gates import rank_quantiles
from tl_edgeprune.training.pruner import Optimizer
from tl_edgeprune.training.trainer import Trainer

MODEL = "bridge-gpt2"
LENGTHS = (5, 6, 8)


def pairs(model, n: int = 12, read: int = 1, **fields) -> Task:
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(n)]
    clean, corrupted = (
        [model_zoo.tokens(model, 1, length, 50 * k + i)[0] for i, length in enumerate(lengths)]
        for k in (1, 2)
    )
    positions = [torch.arange(length - read, length) for length in lengths]
    return Task("random", clean, corrupted, positions, **fields)


def pruner(n_edges=20, **changes) -> EdgePruner:
    return EdgePruner(n_edges, **({"steps": 6, "batch_size": 4, "progress": False} | changes))


class Watch:
    """The KL, which notes the pairs that it is asked about."""

    __name__ = "watch"

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, logits, full, batch):
        self.seen.append(batch.indices.tolist())
        return kl(logits, full, batch)


# ------------------------------------------------------------------------------- what a step sees


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_step_sees_accumulate_batches_of_one_length_each(accumulate):
    model = model_zoo.load(MODEL)
    watch, task = Watch(), pairs(model)
    pruner(objective=watch, accumulate=accumulate, init_scores=None, candidates=0).fit(model, task)
    assert len(watch.seen) == 6 * accumulate
    for batch in watch.seen:
        assert len(batch) == 4 and len({len(task.clean[pair]) for pair in batch}) == 1


def test_every_pair_is_seen_once_before_any_is_seen_again():
    model = model_zoo.load(MODEL)
    watch = Watch()
    pruner(objective=watch, init_scores=None, candidates=0).fit(
        model, pairs(model)
    )  # 3 batches a round
    rounds = [sum(watch.seen[:3], []), sum(watch.seen[3:], [])]
    assert [sorted(pairs) for pairs in rounds] == [list(range(12))] * 2
    assert rounds[0] != rounds[1]


def test_accumulated_gradients_are_the_mean_of_their_batches(monkeypatch):
    """Two batches of one pair give the optimiser what one batch of both pairs gives it."""
    model, seen = model_zoo.load(MODEL), []
    update = Trainer._update

    def watched(training):
        seen.append(training.edges.log_alpha.grad.clone())
        update(training)

    monkeypatch.setattr(Trainer, "_update", watched)
    task = pairs(model, 4).subset([0, 3])  # two pairs of one length
    common = {"init_scores": None, "controller": ExactBudget("fixed"), "hard_share": 1.0}
    whole = pruner(**common, batch_size=2, accumulate=1, steps=1).fit(model, task)
    parts = pruner(**common, batch_size=1, accumulate=2, steps=1).fit(model, task)
    assert float(seen[0].abs().max()) > 1e-4
    torch.testing.assert_close(seen[1], seen[0], atol=1e-7, rtol=1e-4)
    assert parts.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=1e-5)


def test_each_step_keeps_its_target_and_the_last_ones_the_budget():
    model = model_zoo.load(MODEL)
    history = pruner(steps=10).fit(model, pairs(model)).history
    assert [entry["step"] for entry in history] == list(range(10))
    for entry in history:
        assert entry["edges"] == pytest.approx(entry["target"], rel=1e-3)
        assert entry["loss"] >= 0
    assert history[-1]["target"] == 20 and history[0]["target"] > 20
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(history, history[1:], strict=False))


def test_the_hard_part_scores_the_final_circuit_itself():
    """With one budget and no step, the loss of a hard step is that of the circuit of that size."""
    model = model_zoo.load(MODEL)
    task = pairs(model, 4)
    settings = {"controller": ExactBudget("fixed"), "hard_share": 1.0, "lr": 1e-9, "steps": 3}
    result = pruner(**settings).fit(model, task)
    by_pair = [evaluate(model, result.circuit, task.subset([i])).kl for i in range(4)]
    means = [by_pair[1], by_pair[2], (by_pair[0] + by_pair[3]) / 2]  # lengths 6, 8 and 5
    assert sorted(e["loss"] for e in result.history) == pytest.approx(sorted(means), rel=1e-3)


# -------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional"])
def test_other_ablations_train_and_are_noted(ablation):
    model = model_zoo.load(MODEL)
    task = pairs(model)
    circuit = pruner(ablation=ablation).fit(model, task).circuit
    assert circuit.n_edges == 20 and circuit.metadata["ablation"] == ablation
    assert evaluate(model, circuit, task) == evaluate(model, circuit, task, ablation=ablation)


def test_a_mean_is_that_of_the_corrupted_prompts():
    model = model_zoo.load(MODEL)
    task = pairs(model)
    other = dataclasses.replace(task, corrupted=task.clean)
    first, second = (pruner(ablation="mean").fit(model, t).log_alpha for t in (task, other))
    assert not torch.equal(first, second)


def test_a_function_is_an_objective():
    def last_logit(logits, full, batch):
        """Keep token 3's logit."""
        return (logits - full)[:, :, 3].square().mean(-1)

    model = model_zoo.load(MODEL)
    result = pruner(objective=last_logit).fit(model, pairs(model))
    assert result.circuit.metadata["settings"]["objective"] == "last_logit"


@pytest.mark.parametrize("architecture", model_zoo.ARCHITECTURES)
def test_a_run_in_bfloat16_gives_the_weights_back(architecture):
    """Every architecture, after it has run: what modules then keep must not outlive the run."""
    model = model_zoo.load(architecture)
    task = pairs(model)
    before = model(task.clean[0][None])
    state = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    result = pruner(steps=2, dtype=torch.bfloat16).fit(model, task)
    assert result.circuit.n_edges == 20 and result.log_alpha.dtype == torch.float32
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == state
    assert model.cfg.dtype == torch.float32
    assert torch.equal(model(task.clean[0][None]), before)


def test_an_exception_gives_the_weights_back():
    model = model_zoo.load(MODEL)
    with pytest.raises(KeyError), model_placed(model, torch.float64):
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        raise KeyError
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_float64_trains_as_float32_does():
    model = model_zoo.load(MODEL)
    task = pairs(model)
    single, double = (pruner(steps=3, dtype=d).fit(model, task) for d in (None, torch.float64))
    for ours, theirs in zip(single.history, double.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_nodes_close_under_their_own_controller():
    """A node controller alone: an edge is ranked as it and its source being open together."""
    model = model_zoo.load(MODEL)
    controllers = {"controller": Lagrangian(), "node_controller": Lagrangian(target_sparsity=0.9)}
    settings = {"steps": 30, "lr": 0.5, "init_scores": None, "hard_share": 0.0}
    rules = Optimizer(controller_lr=5.0)
    with_nodes = pruner(**settings, **controllers, node_masks=True, optimizer=rules)
    graph = EdgeGraph.from_model(model)
    result = with_nodes.fit(model, pairs(model))
    assert bool(torch.isfinite(result.log_alpha).all())
    outgoing = torch.zeros(graph.n_sources)
    for index in result.circuit.mask.nonzero().flatten().tolist():
        outgoing[graph.pairs[index][0]] += 1
    assert int((outgoing == 0).sum()) > 0


def test_attachment_gathers_a_circuits_edges_at_fewer_nodes():
    model = model_zoo.load(MODEL)

    def nodes(price: Attachment | None) -> int:
        circuit = pruner(30, steps=40, attachment=price).fit(model, pairs(model)).circuit
        return len({node for edge in circuit.edges for node in edge.split("->")})

    assert nodes(Attachment(300.0)) < nodes(None)


@pytest.mark.parametrize("given", ["scores", "tensor"])
def test_a_run_starts_from_the_ranks_of_given_scores(given):
    model = model_zoo.load(MODEL)
    graph = EdgeGraph.from_model(model)
    scores = torch.randn(graph.n_edges, generator=torch.Generator().manual_seed(0))
    start = EdgeScores(graph, scores) if given == "scores" else scores
    result = pruner(init_scores=start, init_log_alpha=(1.0, 2.0), lr=1e-9).fit(model, pairs(model))
    expected = 1 + 2 * rank_quantiles(scores.abs())
    torch.testing.assert_close(result.log_alpha, expected, atol=1e-5, rtol=0)
    assert result.circuit == EdgeScores(graph, scores).top(20)


def test_rank_quantiles_are_normal_whatever_the_scale():
    scores = torch.tensor([1e-30, 5.0, 1e30, 0.0])
    expected = torch.distributions.Normal(0, 1).icdf(torch.tensor([0.375, 0.625, 0.875, 0.125]))
    torch.testing.assert_close(rank_quantiles(scores), expected, atol=1e-6, rtol=0)


def test_a_result_for_every_size():
    model = model_zoo.load(MODEL)
    result = pruner(None).fit(model, pairs(model))
    assert result.top(3).n_edges == 3 and result.top(30).n_edges == 30
    assert (result.top(3) - result.top(30)).n_edges == 0
    with pytest.raises(ValueError, match=r"this run had no single size \(n_edges=None\)"):
        _ = result.circuit
    assert torch.equal(result.scores.tensor, result.log_alpha)


def test_a_result_tells_where_it_came_from(tmp_path):
    model = model_zoo.load(MODEL)
    circuit = pruner(seed=3).fit(model, pairs(model)).circuit
    expected = {"method": "edge-pruning", "task": "random", "n_pairs": 12, "seed": 3}
    expected |= {"ablation": "counterfactual", "folded": False, "prepend_bos": False}
    assert expected.items() <= circuit.metadata.items()
    assert circuit.metadata["settings"]["controller"]["kind"] == "ExactBudget"
    assert json.loads(json.dumps(circuit.metadata)) == circuit.metadata
    circuit.save(tmp_path / "c.json")
    assert Circuit.load(tmp_path / "c.json").metadata == circuit.metadata


def test_one_pruner_fits_twice_alike():
    """The controller that was given is not used up by a run."""
    model = model_zoo.load(MODEL)
    shared = pruner(controller=Lagrangian(), init_scores=None)
    first, second = (shared.fit(model, pairs(model)).log_alpha for _ in range(2))
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------ Lagrangian


def test_the_papers_controller_reaches_its_sparsity_on_a_tracr_model():
    """Its own schedule, shortened, on the program that the paper prunes to 5 of 23 edges."""
    model = models.load("tracr-xproportion", device="cpu")
    task = tasks.load("tracr-xproportion", model, 60)
    paper = EdgePruner.paper(
        steps=500,
        ablation="zero",
        batch_size=16,
        split_embeddings=False,
        bias_in_heads=False,
        controller=Lagrangian(target_sparsity=0.7, warmup=0.6),
        optimizer=Optimizer((0.9, 0.999), 0.01, 1.0, warmup=10, decay=True, controller_lr=0.8),
        node_masks=False,
        progress=False,
    )
    result = paper.fit(model, task)
    graph, last = result.graph, result.history[-1]
    assert last["target"] == pytest.approx(0.3 * graph.n_edges)
    assert 1 - last["edges"] / graph.n_edges == pytest.approx(0.7, abs=0.12)
    dense = result.history[0]["edges"] / graph.n_edges
    assert dense > 0.99  # log alphas start at 10
    assert result.circuit.n_edges == pytest.approx(last["edges"], abs=4)


def test_a_sparsity_above_one_pushes_to_the_end_with_hard_steps_too():
    model = model_zoo.load(MODEL)
    run = pruner(controller=Lagrangian(target_sparsity=1.2, warmup=0.5), init_scores=None)
    assert run.hard_share > 0
    result = run.fit(model, pairs(model))
    assert result.finished and result.circuit.n_edges == 20 and result.history[-1]["target"] < 0


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0: expected 1 or more"),
        ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
        ({"accumulate": 0}, "accumulate=0: expected 1 or more"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1: expected 1 or more"),
        ({"lr": 0.0}, "lr=0.0: expected a number above 0"),
        ({"lr": float("nan")}, "lr=nan: expected a number above 0"),
        ({"hard_share": 1.5}, "hard_share=1.5: expected a share from 0 to 1"),
        ({"average_share": -1.0}, "average_share=-1.0: expected a share from 0 to 1"),
        ({"init_scores": "eap"}, "init_scores='eap': expected 'mask-ig'"),
        ({"node_controller": Lagrangian(0.5)}, "node_controller needs node_masks=True"),
        ({"n_edges": 0}, "n_edges=0: a circuit needs at least one edge"),
        ({"n_edges": -5}, "n_edges=-5: a circuit needs at least one edge"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_that_cannot_work_are_refused_before_any_run(settings, message):
    with pytest.raises(ValueError, match=message):
        pruner(**settings)


def test_what_is_no_model_no_task_and_no_number_is_refused():
    model = model_zoo.load(MODEL)
    with pytest.raises(
        TypeError, match="expected a HookedTransformer or a TransformerBridge, got str"
    ):
        pruner().fit("gpt2", pairs(model))
    with pytest.raises(TypeError, match="task"):
        pruner().fit(model, "ioi")
    with pytest.raises(TypeError, match="n_edges"):
        pruner("10")


def test_a_size_above_the_graph_is_refused():
    model = model_zoo.load(MODEL)
    above = EdgeGraph.from_model(model).n_edges + 1
    with pytest.raises(ValueError, match=f"n_edges={above}: expected a whole number from 1 to"):
        pruner(above).fit(model, pairs(model))


def test_the_whole_graph_is_a_circuit():
    model = model_zoo.load(MODEL)
    n_edges = EdgeGraph.from_model(model).n_edges
    result = pruner(n_edges, steps=2).fit(model, pairs(model))
    assert result.circuit.n_edges == n_edges


def test_the_logit_difference_is_refused_for_answers_of_several_tokens():
    model = model_zoo.load(MODEL)
    answers = [torch.tensor([1, 2])] * 12
    others = [torch.tensor([1, 3])] * 12
    task = pairs(model, read=2, answers=answers, distractors=others)
    with pytest.raises(ValueError, match="needs one answer token and one distractor token"):
        pruner(objective="logit-diff").fit(model, task)
    assert pruner(objective="log-prob").fit(model, task).circuit.n_edges == 20


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(7), r"init_scores has shape \(7,\), expected"),
        (torch.full((10_000,), float("nan")), "init_scores holds NaN or infinite values"),
        ("other graph", "init_scores are for another graph"),
    ],
    ids=["shape", "nan", "graph"],
)
def test_scores_that_do_not_fit_are_refused(scores, message):
    model = model_zoo.load(MODEL)
    if isinstance(scores, str):
        graph = EdgeGraph.from_model(model_zoo.load("bridge-llama-gqa"))
        scores = EdgeScores(graph, torch.zeros(graph.n_edges))
    elif scores.isnan().any():
        scores = scores[: EdgeGraph.from_model(model).n_edges]
    with pytest.raises(ValueError, match=message):
        pruner(init_scores=scores).fit(model, pairs(model))


def test_an_objective_that_turns_nan_names_the_step():
    model, calls = model_zoo.load(MODEL), []

    def breaks(logits, full, batch):
        calls.append(1)
        return kl(logits, full, batch) * (float("nan") if len(calls) > 2 else 1.0)

    with pytest.raises(ValueError, match="the objective is nan at step 2"):
        pruner(objective=breaks, init_scores=None).fit(model, pairs(model))


def test_every_embedding_source_needs_two_embeddings():
    """paper() asks for two embedding sources; a rotary model has one."""
    model = model_zoo.load("bridge-llama-gqa")
    result = EdgePruner.paper(20, steps=2, batch_size=4, progress=False).fit(model, pairs(model))
    assert not result.graph.split_embeddings and result.circuit.n_edges == 20


# ---------------------------------------------------------------- the hard part, other controllers


@pytest.mark.parametrize("controller", [Penalty(1.0), Lagrangian(target_sparsity=1.02)])
def test_hard_masks_have_the_circuits_size_without_a_budget_too(controller, monkeypatch):
    sizes = []
    hard = gate_group.top_gates

    def watched(shifted, ranking, count):
        sizes.append(count)
        return hard(shifted, ranking, count)

    monkeypatch.setattr(gate_group, "top_gates", watched)
    model = model_zoo.load(MODEL)
    result = pruner(controller=controller, init_scores=None, steps=10).fit(model, pairs(model))
    assert sizes == [20] * 4 and result.circuit.n_edges == 20


def test_nodes_rest_while_masks_are_hard(monkeypatch):
    model, nodes = model_zoo.load(MODEL), []
    note = Trainer._record

    def watched(self, *arguments):
        nodes.append(self.sources.log_alpha.detach().clone())
        note(self, *arguments)

    monkeypatch.setattr(Trainer, "_record", watched)
    settings = {"node_masks": True, "node_controller": Penalty(1.0), "steps": 10}
    pruner(**settings).fit(model, pairs(model))
    assert not torch.equal(nodes[0], nodes[5])
    assert all(torch.equal(later, nodes[5]) for later in nodes[6:])


def test_nodes_count_once_in_the_size_that_a_lagrangian_leaves():
    model = model_zoo.load(MODEL)
    settings = {"controller": Lagrangian(target_sparsity=0.5), "init_scores": None, "lr": 0.3}
    with_nodes = pruner(None, node_masks=True, steps=30, **settings).fit(model, pairs(model))
    without = pruner(None, steps=30, **settings).fit(model, pairs(model))
    assert with_nodes.circuit.n_edges < with_nodes.graph.n_edges
    assert abs(with_nodes.circuit.n_edges - without.circuit.n_edges) < 12


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: ExactBudget(anneal=0.0), "anneal=0.0: expected a share of the run, above 0"),
        (lambda: Lagrangian(warmup=0.0), "warmup=0.0: expected a share of the run, above 0"),
    ],
)
def test_shares_of_nothing_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()
