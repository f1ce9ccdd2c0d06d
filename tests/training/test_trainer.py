"""A run is repeatable, resumable, stoppable, exact in its size, and better than attribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import model_zoo
from support.interrupts import StopAfter
from torch import Tensor

from tl_edgeprune import (
    Circuit,
    EdgeGraph,
    EdgePruner,
    ExactBudget,
    Lagrangian,
    Task,
    discover,
    evaluate,
    masked,
)
from tl_edgeprune.evaluation.evaluate import evaluate_all
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.training import first_gates, trainer
from tl_edgeprune.training.trainer import Trainer

MODEL = "bridge-gpt2"


def pruner(n_edges: int | None = 20, **changes: Any) -> EdgePruner:
    settings: dict[str, Any] = {"steps": 8, "batch_size": 4, "progress": False} | changes
    return EdgePruner(n_edges, **settings)


SETTINGS = {
    "default": {},
    "sampled": {"controller": ExactBudget("sampled")},
    "fixed-cold": {"controller": ExactBudget("fixed"), "init_scores": None},
    "nodes-lagrangian": {
        "controller": Lagrangian(),
        "node_masks": True,
        "node_controller": Lagrangian(target_sparsity=0.3),
    },
    "zero": {"ablation": "zero", "accumulate": 2},
    "mean": {"ablation": "mean"},
    "logit-diff": {"objective": "logit-diff"},
    "unsplit": {"split_qkv": False},
    "two-embeddings": {"split_embeddings": True},
}
QUICK = ("default", "sampled", "nodes-lagrangian", "two-embeddings")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[pytest.mark.slow] * (name not in QUICK))
        for name, settings in SETTINGS.items()
    ],
)
def test_a_run_keeps_exactly_the_budget_and_repeats_to_the_bit(settings: dict[str, Any]) -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model)
    first, second = (pruner(**settings).fit(model, task) for _ in range(2))
    assert first.circuit.n_edges == 20
    assert first.log_alpha.equal(second.log_alpha)
    assert [h["loss"] for h in first.history] == [h["loss"] for h in second.history]
    assert not first.log_alpha.equal(pruner(seed=1, **settings).fit(model, task).log_alpha)


@pytest.mark.parametrize(
    "name", ["sampled", "nodes-lagrangian", pytest.param("zero", marks=pytest.mark.slow)]
)
def test_resuming_gives_the_bits_of_a_run_never_stopped(name: str, tmp_path: Path) -> None:
    model, settings = model_zoo.load(MODEL), SETTINGS[name]
    task, path = model_zoo.pairs(model), tmp_path / "run.safetensors"
    whole = pruner(**settings).fit(model, task)
    stop = StopAfter(5)
    cut = pruner(**settings, checkpoint=path, checkpoint_every=5, objective=stop)
    stop.accumulate = cut.accumulate
    whole_with_same_objective = pruner(**settings, objective=StopAfter(10**9)).fit(model, task)
    assert whole.log_alpha.equal(whole_with_same_objective.log_alpha)
    part = cut.fit(model, task)
    assert not part.finished and len(part.history) == 5
    stop.left = 10**9
    rest = cut.fit(model, task, resume=path)
    assert rest.finished and rest.log_alpha.equal(whole.log_alpha)
    assert [h["loss"] for h in rest.history] == [h["loss"] for h in whole.history]


@pytest.mark.parametrize("n_edges, averaged", [(None, 5), (20, 1)], ids=["any-size", "one-size"])
def test_the_ranking_is_the_mean_over_the_last_part(
    n_edges: int | None, averaged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trail, update = [], Trainer._update

    def noting(self: Trainer) -> None:
        update(self)
        trail.append(self.edges.log_alpha.detach().clone())

    monkeypatch.setattr(Trainer, "_update", noting)
    model = model_zoo.load(MODEL)
    result = pruner(n_edges).fit(model, model_zoo.pairs(model))
    expected = torch.stack(trail[-averaged:]).mean(0)
    torch.testing.assert_close(result.log_alpha, expected, rtol=1e-6, atol=1e-6)
    assert averaged == 1 or not result.log_alpha.allclose(trail[-1], atol=1e-3)


def test_ctrl_c_leaves_the_model_as_it_was() -> None:
    model = model_zoo.build(MODEL)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    result = pruner(objective=StopAfter(2)).fit(model, model_zoo.pairs(model))
    assert not result.finished and result.circuit.n_edges == 20
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_ctrl_c_inside_an_update_saves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = model_zoo.load(MODEL), tmp_path / "run.safetensors"
    task = model_zoo.pairs(model)
    whole = pruner().fit(model, task)
    note = Trainer._record

    def stop(self: Trainer, step: int, *figures: float) -> None:
        if step == 2:  # the optimiser has made its step
            raise KeyboardInterrupt
        note(self, step, *figures)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_record", stop)
        cut = pruner(checkpoint=path, checkpoint_every=1).fit(model, task)
    assert not cut.finished and len(cut.history) == 2
    rest = pruner().fit(model, task, resume=path)
    assert rest.finished and rest.log_alpha.equal(whole.log_alpha)


def test_a_checkpoint_is_looked_at_before_any_run_and_spares_the_warm_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = model_zoo.load(MODEL), tmp_path / "run.safetensors"
    task = model_zoo.pairs(model)
    warm = {"init_scores": "mask-ig", "checkpoint": path}
    first = pruner(**warm).scores(model, task, "edge-pruning")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a run of the model")

    monkeypatch.setattr(first_gates, "path_scores", refuse)
    assert pruner(**warm).scores(model, task, "edge-pruning").tensor.equal(first.tensor)
    monkeypatch.setattr(trainer, "Targets", refuse)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        pruner().fit(model, task, resume=tmp_path / "none")
    with pytest.raises(ValueError, match="its settings"):
        pruner(21, **warm).scores(model, task, "edge-pruning")


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    model, path = model_zoo.load(MODEL), tmp_path / "run.safetensors"
    task = model_zoo.pairs(model)
    pruner(checkpoint=path).fit(model, task)
    with pytest.raises(ValueError, match="its settings"):
        pruner(21).fit(model, task, resume=path)
    with pytest.raises(ValueError, match="its task"):
        pruner().fit(model, task[:6], resume=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        pruner().fit(model, task, resume=path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        pruner().fit(model, task, resume=tmp_path / "none")


def test_a_run_goes_on_by_itself_and_writes_over_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = model_zoo.load(MODEL), tmp_path / "run.safetensors"
    task = model_zoo.pairs(model)
    whole = pruner().fit(model, task)
    stop = StopAfter(5)
    assert not pruner(checkpoint=path, objective=stop).fit(model, task).finished
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"another run: its settings.n_edges is 20, this run's 21"):
        pruner(21, checkpoint=path, objective=stop).fit(model, task)
    other = tmp_path / "other.safetensors"
    pruner(21, checkpoint=other).fit(model, task)
    with pytest.raises(ValueError, match="another run: its settings.n_edges is 20"):  # of the two
        pruner(21, checkpoint=path).fit(model, task, resume=other)
    assert path.read_bytes() == before
    stop.left, made, step = 10**9, [], Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, n: (made.append(n), step(self, n)))
    for _ in range(2):  # the second time nothing is left to do
        rest = pruner(checkpoint=path, objective=stop).fit(model, task)
        assert rest.finished and rest.log_alpha.equal(whole.log_alpha)
        assert made == list(range(5, len(whole.history)))


def test_of_a_checkpoint_of_other_settings_what_differs_is_told(tmp_path: Path) -> None:
    model, path = model_zoo.load(MODEL), tmp_path / "run.safetensors"
    task = model_zoo.pairs(model)
    pruner(checkpoint=path, steps=1).fit(model, task)
    with pytest.raises(ValueError, match="of another run") as told:
        pruner(checkpoint=path, steps=2).fit(model, task)
    assert str(told.value) == (
        f"checkpoint {path} is of another run: its settings.steps is 1, this run's 2. Give another "
        "file, or remove this one to start again."
    )


def test_a_model_with_nan_weights_is_refused() -> None:
    model = model_zoo.build(MODEL)
    task = model_zoo.pairs(model)
    with MaskedModel.attach(model):
        pass  # the model's first look, while it is whole
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "mlp" in n).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        pruner().fit(model, task)


def test_a_circuit_found_with_the_biases_in_the_heads_is_evaluated_so() -> None:
    model, task = model_zoo.load(MODEL), model_zoo.pairs(model_zoo.load(MODEL), 4)
    settings = {"ablation": "zero", "bias_in_heads": True, "init_scores": None}
    circuit = pruner(9, **settings).fit(model, task).circuit
    assert circuit.metadata["ablation"] == "zero-with-biases"

    def last(tokens: Tensor) -> Tensor:
        return model(tokens[None])[0, -1].log_softmax(-1)

    with torch.no_grad():
        full = torch.stack([last(tokens) for tokens in task.clean])
        with masked(model, circuit, ablation="zero-with-biases"):
            ours = torch.stack([last(tokens) for tokens in task.clean])
    kl = evaluate(model, circuit, task).kl
    assert kl == pytest.approx(float((full.exp() * (full - ours)).sum(-1).mean()), rel=1e-4)
    assert kl != pytest.approx(evaluate(model, circuit, task, ablation="zero").kl, rel=1e-3)


def test_the_published_preset_has_the_published_settings() -> None:
    paper = EdgePruner.paper(1000)
    assert (paper.steps, paper.lr, paper.batch_size) == (3000, 0.8, 32)
    assert paper.init_scores is None and paper.init_log_alpha == (10.0, 0.01)
    assert paper.node_masks and paper.node_controller is None and paper.split_embeddings
    assert paper.bias_in_heads and paper.hard_share == 0
    rules = paper.optimizer
    assert (rules.weight_decay, rules.clip, rules.warmup, rules.decay) == (0.01, 1.0, 200, True)
    assert (rules.betas, rules.controller_lr) == ((0.9, 0.999), 0.8)
    assert [round(rules.rate(s, 3000), 6) for s in (0, 100, 200, 1600, 3000)] == [0, 0.5, 1, 0.5, 0]
    model = model_zoo.load(MODEL)
    result = EdgePruner.paper(20, steps=4, batch_size=4, progress=False).fit(
        model, model_zoo.pairs(model)
    )
    assert result.circuit.n_edges == 20 and result.graph.split_embeddings


# ----------------------------------------------------------------------------------- real weights


NAMES = "Lily Tom Mia Ben Anna Sam Lucy Max Sue Tim Jane Jack Emma Bob Amy Dan Sara Mark Kate Joe"


def she_or_he(stories: Any) -> Task:
    """ "{name} went to the park." and then " She" or " He"; corrupted by another name."""
    prompts = [f"Once upon a time, {name} went to the park." for name in NAMES.split()]
    tokens = [stories.to_tokens(prompt, prepend_bos=True)[0] for prompt in prompts]
    pairs = [
        (a, b)
        for i, a in enumerate(tokens)
        for j, b in enumerate(tokens)
        if i != j and len(a) == len(b) and (i + 2 * j) % 3 == 0
    ]
    clean, corrupted = zip(*pairs, strict=True)
    return Task("she-he", clean, corrupted, [torch.tensor([len(c) - 1]) for c in clean])


def test_pruning_beats_attribution_and_chance_on_real_weights(stories: Any) -> None:
    """Held-out KL at 60 edges of stories260K: the mean of two short runs."""
    train, held_out = she_or_he(stories).split(0.5)
    runs = [pruner(60, steps=80, batch_size=8, seed=seed).fit(stories, train) for seed in (0, 1)]
    rivals = [discover(stories, train, method=method).top(60) for method in ("mask-ig", "eap-ig")]
    graph = runs[0].graph
    noise = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(0))
    chance = Circuit.top(graph, noise, 60)
    circuits = [*(run.circuit for run in runs), *rivals, chance]
    *ours, mask_ig, eap_ig, random = (e.kl for e in evaluate_all(stories, circuits, held_out))
    mean = sum(ours) / len(ours)
    assert mean < min(mask_ig, eap_ig) and mean < 0.5 * random


def test_masks_and_circuits_agree_with_evaluate() -> None:
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model, 6)
    circuit = pruner(40).fit(model, task).circuit
    report, kls = evaluate(model, circuit, task), []
    for batch in task.batches(3):
        with torch.no_grad():
            full = model(batch.clean)[:, -1].log_softmax(-1)
            with masked(model, circuit, corrupted=batch.corrupted):
                own = model(batch.clean)[:, -1].log_softmax(-1)
        kls.append((full.exp() * (full - own)).sum(-1))
    assert report.kl == pytest.approx(float(torch.cat(kls).mean()), rel=1e-4)
    assert report.n_edges == 40 and report.n_edges_full == EdgeGraph.from_model(model).n_edges
