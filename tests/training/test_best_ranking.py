"""Late rankings of a run, judged: the best by the model's own runs is the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import model_zoo
from torch import Tensor

from tl_edgeprune import Circuit, EdgePruner, evaluate
from tl_edgeprune.distributed import Ranks
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.objectives import kl
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.training.best_ranking import LATE, N_PAIRS, BestRanking
from tl_edgeprune.training.trainer import Trainer

MODEL = "bridge-gpt2"


def pruner(**changes: Any) -> EdgePruner:
    settings = {"steps": 20, "batch_size": 4, "lr": 1.0, "init_scores": None, "progress": False}
    return EdgePruner(20, **(settings | changes))


@given(st.integers(1, 3000), st.integers(1, 50))
def test_the_last_step_is_judged_and_no_more_than_asked_for_in_the_last_fifth(steps, count):
    due = [step for step in range(steps) if BestRanking.due(step, steps, count)]
    assert due[-1] == steps - 1
    assert len(due) <= count
    assert steps - due[0] <= max(1, round(LATE * steps))
    assert len(set(map(int.__sub__, due[1:], due))) <= 1  # evenly


@pytest.mark.parametrize("average_share", [0.0, 0.5])
def test_the_best_of_the_judged_rankings_is_the_result(monkeypatch, average_share):
    model, task = model_zoo.load(MODEL), model_zoo.pairs(model_zoo.load(MODEL), 12)
    judged: list[Tensor] = []
    consider = BestRanking.consider

    def watched(self: BestRanking, ranking: Tensor) -> None:
        judged.append(ranking.clone())
        consider(self, ranking)

    monkeypatch.setattr(BestRanking, "consider", watched)
    result = pruner(candidates=4, average_share=average_share).fit(model, task)
    circuits = [Circuit.top(result.graph, ranking, 20) for ranking in judged]
    kls = [evaluate(model, circuit, task).kl for circuit in circuits]
    assert len(judged) == 4 and (average_share or len(set(kls)) > 1)
    assert evaluate(model, result.circuit, task).kl == pytest.approx(min(kls), rel=1e-5)
    assert any(result.log_alpha.equal(ranking) for ranking in judged)


@pytest.mark.parametrize(("n", "batch_size"), [(33, 32), (20, 8), (70, 64), (6, 4)])
def test_as_many_pairs_judge_however_they_are_batched_and_shared_out(n, batch_size):
    """Batches hold one length, so the last of each length may hold a pair alone."""
    model, task = model_zoo.load(MODEL), model_zoo.pairs(model_zoo.load(MODEL), n)
    found = []
    with MaskedModel.attach(model) as run:
        targets = Targets(run, task, visits=0)
        for ranks in (Ranks(), Ranks(0, 2), Ranks(1, 2), Ranks(4, 5)):
            judges = BestRanking(run, targets, kl, 20, batch_size, ranks)._evaluation_batches()
            assert max(map(len, judges)) <= ranks.most_rows(batch_size)
            found.append(sorted(place for batch in judges for place in batch.indices.tolist()))
    assert len(set(found[0])) == len(found[0]) == min(N_PAIRS, n)
    assert all(places == found[0] for places in found)


def test_without_candidates_the_last_step_is_the_result():
    model, task = model_zoo.load(MODEL), model_zoo.pairs(model_zoo.load(MODEL), 12)
    last = pruner(candidates=0).fit(model, task)
    judged = pruner(candidates=1).fit(model, task)  # the last step alone
    assert last.log_alpha.equal(judged.log_alpha)
    with pytest.raises(ValueError, match="candidates=-1: expected 0 or more"):
        pruner(candidates=-1)


def test_a_resumed_run_remembers_the_best(tmp_path, monkeypatch):
    model, task, path = (
        model_zoo.load(MODEL),
        model_zoo.pairs(model_zoo.load(MODEL), 12),
        tmp_path / "state",
    )
    found: list[float] = []
    consider = BestRanking.consider

    def better_before(self: BestRanking, ranking: Tensor) -> None:
        """The first is the best, whatever it is worth."""
        consider(self, ranking)
        self.loss.copy_(-torch.ones(()))
        found.append(float(self.ranking.sum()))

    with monkeypatch.context() as patch:
        patch.setattr(BestRanking, "consider", better_before)
        patch.setattr(Trainer, "_record", stopping_at(18))
        cut = pruner(checkpoint=path, checkpoint_every=1).fit(model, task)
    assert not cut.finished and len(cut.history) == 18 and len(found) == 3  # the last is not saved
    resumed = pruner().fit(model, task, resume=path)
    assert resumed.finished and float(resumed.log_alpha.sum()) == pytest.approx(found[0])


def stopping_at(last: int) -> Any:
    """`Trainer._record`, interrupted at this step."""
    note = Trainer._record

    def stop(self: Trainer, step: int, *figures: float) -> None:
        if step == last:
            raise KeyboardInterrupt
        note(self, step, *figures)

    return stop


def test_a_circuit_with_neurons_or_learned_constants_is_the_last_steps():
    model, task = model_zoo.load(MODEL), model_zoo.pairs(model_zoo.load(MODEL), 4)
    for settings in ({"neurons": "mlp", "n_neurons": 5}, {"ablation": "optimal"}):
        found = [pruner(steps=5, candidates=n, **settings).fit(model, task) for n in (0, 10)]
        assert found[0].log_alpha.equal(found[1].log_alpha)
