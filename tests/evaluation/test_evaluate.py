"""Evaluation: what must hold at both ends, and every figure computed again from `masked`'s
logits.
"""

from __future__ import annotations

import dataclasses
import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import model_zoo
from support.prompt_pairs import pronouns, random_task

from tl_edgeprune import EdgePruner, explain, minimality, models, polish, tasks
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.evaluation.evaluate import check_circuit, evaluate, evaluate_all, evaluate_groups
from tl_edgeprune.forward.context import masked
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.tasks import Task

TINY = ["bridge-gpt2", "bridge-llama-gqa", "bridge-pythia", "native-ln"]
ONE_BY_ONE = [*TINY[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in TINY[2:])]


def random_circuit(model, share: float = 0.5, seed: int = 0, **metadata) -> Circuit:
    graph = EdgeGraph.from_model(model)
    generator = torch.Generator().manual_seed(seed)
    return Circuit(graph, torch.rand(graph.n_edges, generator=generator) < share, metadata)


# ------------------------------------------------------------------------------------- both ends


@pytest.mark.parametrize("name", TINY)
def test_the_full_circuit_is_the_model(name):
    model = model_zoo.load(name)
    task = random_task(model)
    result = evaluate(model, random_circuit(model, 1.1), task)
    assert result.kl == pytest.approx(0, abs=1e-6) and result.mse == pytest.approx(0, abs=1e-8)
    assert result.exact_match == 1 and result.faithfulness == pytest.approx(1, abs=1e-4)
    assert result.recovered == pytest.approx(1, abs=1e-4)
    assert result.n_edges == result.n_alive == result.n_edges_full
    assert result.n_pairs == len(task)


@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean"])
def test_the_empty_circuit_is_faithful_in_nothing(ablation):
    model = model_zoo.load("bridge-gpt2")
    task = random_task(model)
    result = evaluate(model, random_circuit(model, 0.0), task, ablation=ablation)
    assert result.faithfulness == 0 and result.n_edges == result.n_alive == 0
    assert result.logit_diff == result.logit_diff_empty
    assert result.kl > 0


def test_the_empty_counterfactual_circuit_gives_the_corrupted_prompts_logits():
    model = model_zoo.load("bridge-llama-gqa")
    task = random_task(model)
    result = evaluate(model, random_circuit(model, 0.0), task)
    swapped = dataclasses.replace(task, clean=task.corrupted)
    assert result.logit_diff == pytest.approx(
        evaluate(model, random_circuit(model, 1.1), swapped).logit_diff, abs=1e-4
    )


# ---------------------------------------------------------------------------------- every figure


def by_hand(model, circuit: Circuit, task: Task, **ablation) -> dict[str, float]:
    """The figures, pair by pair, from the logits that `masked` gives."""
    rows = []
    for pair in range(len(task)):
        clean, corrupted = task.clean[pair][None], task.corrupted[pair][None]
        own = {} if ablation else {"corrupted": corrupted}
        read = task.read_positions[pair]
        with torch.no_grad():
            full = model(clean)[0, read].double()
            with masked(model, circuit, **own, **ablation):
                logits = model(clean)[0, read].double()
            with masked(model, Circuit(circuit.graph, circuit.mask & False), **own, **ablation):
                empty = model(clean)[0, read].double()
        log_p, log_q, log_e = (x.log_softmax(-1) for x in (full, logits, empty))
        row = {
            "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
            "kl_empty": float((log_p.exp() * (log_p - log_e)).sum(-1).mean()),
            "mse": float((logits - full).square().mean()),
            "mse_empty": float((empty - full).square().mean()),
            "exact_match": float((logits.argmax(-1) == full.argmax(-1)).all()),
        }
        middle = (log_p.exp() + log_q.exp()) / 2
        parts = [x.exp() * (x - middle.log()) for x in (log_p, log_q)]
        row["js"] = float(sum(parts).sum(-1).mean() / 2)
        if len(task.distractors[pair]):
            a, d = int(task.answers[pair][0]), int(task.distractors[pair][0])
            row |= {
                f"ld{end}": float(x[0, a] - x[0, d])
                for end, x in (("", logits), ("_full", full), ("_empty", empty))
            }
            row["accuracy"], row["wrong"] = float(row["ld"] > 0), float(row["ld_full"] <= 0)
        elif len(task.answers[pair]):
            row["accuracy"], row["wrong"] = (
                float((x.argmax(-1) == task.answers[pair]).all() == want)
                for x, want in ((logits, True), (full, False))
            )
        row["same_wrong"] = row.get("wrong", 0.0) * row["exact_match"]
        rows.append(row)
    means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    spread = sum((row["kl"] - means["kl"]) ** 2 for row in rows) / (len(rows) - 1)
    return means | {"kl_sem": (spread / len(rows)) ** 0.5, "n_pairs": len(rows)}


def check_figures(result, expected: dict[str, float], tolerance: float = 2e-4) -> None:
    def same(found, wanted):
        assert found == pytest.approx(wanted, abs=tolerance, rel=tolerance)

    for name in ("kl", "kl_sem", "js", "mse", "exact_match"):
        same(getattr(result, name), expected[name])
    assert result.accuracy == pytest.approx(expected["accuracy"])
    assert result.n_wrong == round(expected["wrong"] * expected["n_pairs"])
    if result.n_wrong:
        same(result.wrong_agreement, expected["same_wrong"] / expected["wrong"])
    else:
        assert result.wrong_agreement is None
    if "ld" in expected:
        same(result.logit_diff, expected["ld"])
        same(result.logit_diff_full, expected["ld_full"])
        same(result.logit_diff_empty, expected["ld_empty"])
        same(result.recovered, expected["ld"] / expected["ld_full"])
        span = expected["ld_full"] - expected["ld_empty"]
        same(result.faithfulness * span, expected["ld"] - expected["ld_empty"])


@pytest.mark.parametrize("name", ONE_BY_ONE)
@given(share=st.floats(0.1, 0.9), seed=st.integers(0, 99))
def test_every_figure_is_the_mean_over_pairs(name, share, seed):
    model = model_zoo.load(name)
    task = random_task(model, seed=seed)
    circuit = random_circuit(model, share, seed)
    check_figures(evaluate(model, circuit, task, batch_size=2), by_hand(model, circuit, task))


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional"])
def test_every_figure_under_other_ablations(ablation):
    model = model_zoo.load("bridge-gpt2")
    task = random_task(model, lengths=(6,))
    circuit = random_circuit(model, 0.5, ablation=ablation)
    prompts = {} if ablation == "zero" else {"prompts": list(task.corrupted)}
    expected = by_hand(model, circuit, task, ablation=ablation, **prompts)
    check_figures(evaluate(model, circuit, task), expected)  # the circuit's own ablation
    check_figures(evaluate(model, random_circuit(model, 0.5), task, ablation=ablation), expected)


def test_answers_of_several_tokens_have_no_logit_difference():
    model = model_zoo.load("bridge-gpt2")
    task = random_task(model, read=2, lengths=(6, 8), distractors=())
    circuit = random_circuit(model)
    result, expected = evaluate(model, circuit, task), by_hand(model, circuit, task)
    check_figures(result, expected)
    assert (result.logit_diff, result.recovered, result.logit_diff_full) == (None, None, None)
    assert result.faithfulness == pytest.approx(1 - expected["kl"] / expected["kl_empty"], abs=1e-4)


def test_faithfulness_is_by_the_tasks_own_objective():
    """By hand: the log-probability of the answer, where nothing tells it apart from others."""
    model = model_zoo.load("bridge-gpt2")
    task = random_task(model, distractors=(), objective="log-prob")
    circuit = random_circuit(model)
    nothing = Circuit(circuit.graph, circuit.mask & False)
    means = []
    for run in (None, circuit, nothing):
        found = []
        for clean, corrupted, read, answer in zip(
            task.clean, task.corrupted, task.read_positions, task.answers, strict=True
        ):
            with nullcontext() if run is None else masked(model, run, corrupted=corrupted[None]):
                logits = model(clean[None])[0, read]
            found.append(logits.double().log_softmax(-1)[0, answer].item())
        means.append(sum(found) / len(found))
    full, own, empty = means
    result = evaluate(model, circuit, task)
    assert result.faithfulness == pytest.approx((own - empty) / (full - empty), abs=1e-4)
    assert result.faithfulness != pytest.approx(1 - result.kl / result.kl_empty, abs=1e-2)


def test_objectives_that_the_answers_do_not_suffice_for_are_refused():
    model = model_zoo.load("bridge-gpt2")
    task = random_task(model, answers=(), distractors=(), objective="log-prob")
    with pytest.raises(ValueError, match="'log-prob': pair 0 of task 'random' has no answer"):
        evaluate(model, random_circuit(model), task)


def test_an_evaluation_prints_what_its_figures_are_judged_by():
    model = model_zoo.load("bridge-gpt2")
    task, circuit = random_task(model), random_circuit(model)
    expected = by_hand(model, circuit, task)
    result = evaluate(model, circuit, task)
    assert result.kl_empty == pytest.approx(expected["kl_empty"], abs=1e-4)
    assert result.mse_empty == pytest.approx(expected["mse_empty"], rel=1e-4)
    shown = str(result).splitlines()
    assert f"KL              {result.kl:.3f} (no edges {expected['kl_empty']:.3f})" in shown
    assert f"faithfulness    {result.faithfulness:.3f} (full model 1, no edges 0)" in shown
    tiny = dataclasses.replace(result, kl=-1e-7, faithfulness=-1e-7, logit_diff=-1e-7)
    assert "-0.0" not in str(tiny)


def test_tasks_without_answers_are_judged_by_their_own_objective():
    model = models.load("tracr-xproportion")
    task = tasks.load("tracr-xproportion", model, 30, seed=1)
    circuit = Circuit.from_edges(EdgeGraph.from_model(model), ["input->m0", "m0->a1.h0<v>"])
    result = evaluate(model, circuit, task)
    expected = by_hand(model, circuit, task)
    assert result.accuracy is None and result.logit_diff is None
    assert result.mse == pytest.approx(expected["mse"], abs=1e-7)
    assert result.faithfulness == pytest.approx(
        1 - expected["mse"] / expected["mse_empty"], abs=1e-5
    )
    assert result.n_alive == 0
    assert f"squared error   {result.mse:.3g}" in str(result)
    assert (result.kl, result.kl_sem, result.js, result.exact_match) == (None, None, None, None)
    assert "KL" not in str(result) and "exact match" not in str(result)


def test_answers_of_some_pairs_alone_are_no_accuracy():
    model = model_zoo.load("bridge-gpt2")
    task = random_task(model, distractors=())
    none = torch.empty(0, dtype=torch.long)
    some = dataclasses.replace(task, answers=[*task.answers[:3], none, none])
    result = evaluate(model, random_circuit(model), some, batch_size=2)
    assert result.accuracy is None and result.n_wrong is None
    whole = evaluate(model, random_circuit(model), task, batch_size=2)
    assert result.kl == pytest.approx(whole.kl, rel=1e-5)


@pytest.mark.parametrize("objective", ["kl", "log-prob"])
def test_one_number_has_no_probabilities(objective):
    model = models.load("tracr-xproportion")
    numbers = tasks.load("tracr-xproportion", model, 4, seed=1)
    task = dataclasses.replace(
        numbers,
        objective=objective,
        answers=[torch.zeros(len(p), dtype=torch.long) for p in numbers.read_positions],
    )
    circuit = Circuit.from_edges(EdgeGraph.from_model(model), ["input->m0", "m0->a1.h0<v>"])
    assert evaluate(model, circuit, task) == evaluate(model, circuit, numbers)
    with pytest.raises(ValueError, match="one number, which has no probabilities"):
        EdgePruner(n_edges=3, steps=2, progress=False).fit(model, task)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_every_figure_on_real_weights(stories, share):
    task = pronouns(stories)
    circuit = random_circuit(stories, share, 3)
    result = evaluate(stories, circuit, task)
    check_figures(result, by_hand(stories, circuit, task))
    full = evaluate(stories, random_circuit(stories, 1.1), task)
    assert full.accuracy == 1 and full.logit_diff > 2
    assert "KL" in str(result) and result.to_dict()["kl"] == result.kl


def test_several_circuits_at_once_are_each_one_alone():
    model = model_zoo.load("bridge-llama-gqa")
    task = random_task(model)
    circuits = [random_circuit(model, share, 7) for share in (0.2, 0.8)]
    together = evaluate_all(model, circuits, task)
    assert together == [evaluate(model, circuit, task) for circuit in circuits]
    assert evaluate_all(model, [], task) == []


def test_batches_do_not_change_a_figure():
    model = model_zoo.load("bridge-gpt2")
    task = random_task(model, n=7)
    circuit = random_circuit(model)
    one, all_ = (evaluate(model, circuit, task, batch_size=size).to_dict() for size in (1, 64))
    assert one == pytest.approx(all_, abs=1e-5)


def test_groups_are_evaluated_apart(stories):
    task = pronouns(stories)
    circuit = random_circuit(stories, 0.9, 1)
    found = evaluate_groups(stories, [circuit], task)
    assert set(found) == {"boy", "girl"}
    for group, (result,) in found.items():
        alone = task.subset([i for i, g in enumerate(task.groups) if g == group])
        assert result == evaluate(stories, circuit, alone)
    assert sum(r.n_pairs for (r,) in found.values()) == len(task)


def test_an_evaluation_leaves_the_model_as_it_was():
    model = model_zoo.build("bridge-gpt2")
    tokens = model_zoo.tokens(model)
    before = model(tokens).detach()
    evaluate(model, random_circuit(model), random_task(model))
    assert torch.equal(model(tokens), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


# ------------------------------------------------------------------------------------- refusals


def test_a_circuit_for_another_model_is_refused():
    circuit = random_circuit(model_zoo.load("bridge-llama-gqa"))
    model = model_zoo.load("bridge-gpt2")
    with pytest.raises(
        ValueError, match=r"the circuit is for another model: its graph is EdgeGraph"
    ):
        evaluate(model, circuit, random_task(model))


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_folded_weights_are_refused_where_they_change_the_ablation(ablation):
    folded, unfolded = model_zoo.load("bridge-gpt2-lnpre"), model_zoo.load("bridge-gpt2")
    found_on_unfolded = random_circuit(unfolded, folded=False, ablation=ablation)
    with pytest.raises(
        ValueError, match=rf"under {ablation} ablation on a model with unfolded norm"
    ):
        evaluate(folded, found_on_unfolded, random_task(folded))
    with pytest.raises(ValueError, match="with folded norm"):
        check_circuit(unfolded, random_circuit(unfolded, folded=True, ablation=ablation))
    check_circuit(unfolded, found_on_unfolded)
    check_circuit(folded, random_circuit(unfolded, folded=False, ablation="counterfactual"))


def test_circuits_of_two_graphs_are_not_evaluated_together():
    model = model_zoo.load("bridge-gpt2")
    graph = EdgeGraph.from_model(model, split_qkv=False)
    other = Circuit(graph, torch.ones(graph.n_edges, dtype=torch.bool))
    with pytest.raises(ValueError, match="different graphs cannot be evaluated together"):
        evaluate_all(model, [random_circuit(model), other], random_task(model))
    assert evaluate(model, other, random_task(model)).kl == pytest.approx(0, abs=1e-6)


def test_circuits_of_two_ablations_are_not_evaluated_together():
    model = model_zoo.load("bridge-gpt2")
    circuits = [random_circuit(model, ablation=kind) for kind in ("zero", "counterfactual")]
    task = random_task(model)
    with pytest.raises(ValueError, match=r"different ablations \(counterfactual, zero\)"):
        evaluate_all(model, circuits, task)
    first, second = evaluate_all(model, circuits, task, ablation="zero")
    assert first.kl == second.kl == evaluate(model, circuits[0], task).kl


@pytest.mark.parametrize("found", [explain, minimality, evaluate])
def test_a_combination_is_run_under_its_parts_ablation_or_the_one_that_is_given(found):
    model, task = model_zoo.load("bridge-gpt2"), random_task(model_zoo.load("bridge-gpt2"), n=2)
    zero, other = (random_circuit(model, 0.02, seed, ablation="zero") for seed in (0, 1))
    both = zero | other
    assert evaluate(model, both, task) == evaluate(model, both, task, ablation="zero")
    mixed = zero | random_circuit(model, 0.02, 1, ablation="counterfactual")
    with pytest.raises(
        ValueError, match=r"different ablations \(counterfactual, zero\), .* give ab"
    ):
        found(model, mixed, task)
    with pytest.raises(
        ValueError, match=r"different ablations \(counterfactual, zero\), .* give ab"
    ):
        polish(model, task, mixed)
    assert evaluate(model, mixed, task, ablation="zero") == evaluate(model, both, task)


def test_a_combination_of_circuits_of_folded_and_other_weights_fits_neither():
    for name in ("bridge-gpt2", "bridge-gpt2-lnpre"):
        model = model_zoo.load(name)
        mixed = random_circuit(model, ablation="zero", folded=True)
        mixed |= random_circuit(model, ablation="zero", folded=False)
        with pytest.raises(ValueError, match="with unfolded and one with folded norm weights"):
            evaluate(model, mixed, random_task(model))


def test_tokens_outside_the_vocabulary_are_refused():
    model = model_zoo.load("bridge-gpt2")
    prompt = torch.tensor([1, 2, model_zoo.VOCAB])
    task = Task("big", [prompt], [prompt], [torch.tensor([2])])
    with pytest.raises(
        ValueError, match=f"task 'big' has token {model_zoo.VOCAB}, but the model knows"
    ):
        evaluate(model, random_circuit(model), task)


def test_pairs_of_one_prompt_are_told():
    model = model_zoo.load("bridge-gpt2")
    task = random_task(model, n=3)
    one = dataclasses.replace(task, corrupted=[task.clean[0], *task.corrupted[1:]])
    same = dataclasses.replace(task, corrupted=task.clean)
    circuit = random_circuit(model)
    with pytest.warns(UserWarning, match="'random': in every pair both prompts are the same"):
        assert evaluate(model, circuit, same).kl == pytest.approx(0, abs=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(model, circuit, one).kl > 0
        assert evaluate(model, circuit, same, ablation="zero").kl > 0


# ------------------------------------------------------------------------------------- what runs


@pytest.mark.parametrize(
    "name", sorted({*TINY, *(n for n in model_zoo.ARCHITECTURES if "hooked" in n)})
)
def test_a_recording_gives_the_logits_of_the_positions_asked_for(name):
    model = model_zoo.load(name)
    tokens, positions = model_zoo.tokens(model), torch.tensor([[1, 4], [0, 6]])
    with MaskedModel.attach(model) as run:
        everywhere, logits = run.record(tokens)
        reference, read = run.record(tokens, positions)
    expected = torch.stack([row[at] for row, at in zip(logits, positions, strict=True)])
    assert torch.allclose(read, expected, atol=1e-5)
    for ours, theirs in zip(vars(reference).values(), vars(everywhere).values(), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


def test_each_circuit_costs_one_masked_forward_a_batch(monkeypatch):
    model = model_zoo.load("native-ln")
    task = random_task(model, n=4)  # two batches, one of each length
    circuits = [random_circuit(model, share) for share in (0.3, 0.6, 0.0)]
    evaluate(model, circuits[0], task)  # the first look at the model is over
    calls = []
    run_once = MaskedModel.__call__

    def counted(self, *args, **others):
        calls.append(args[0].shape)
        return run_once(self, *args, **others)

    monkeypatch.setattr(MaskedModel, "__call__", counted)
    evaluate_all(model, circuits, task)
    assert len(calls) == 2 * 2  # no edges: the corrupted prompts' own run
