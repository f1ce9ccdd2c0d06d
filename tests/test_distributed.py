"""Two processes (gloo, on the CPU) are one: the same masks, and an end when one of them dies."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import model_zoo, two_processes
from support.two_processes import DIES_AT, SETTINGS, STEPS, model_and_task, pruner

from tl_edgeprune import evaluate
from tl_edgeprune.distributed import LostProcess, Ranks, started
from tl_edgeprune.sharding import sharded

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits")
    assert two_processes.start("fits", folder) == [0, 0]
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_find_the_masks_of_one(fitted, name):
    model, task = model_and_task()
    alone = pruner(**SETTINGS[name]).fit(model, task)
    (first, losses), (second, _) = (
        torch.load(fitted / f"{name}-{rank}", weights_only=True) for rank in (0, 1)
    )
    assert first.equal(second)
    torch.testing.assert_close(first, alone.log_alpha, atol=1e-5, rtol=0)
    mine = torch.tensor([entry["loss"] for entry in alone.history], dtype=torch.float64)
    torch.testing.assert_close(losses, mine, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("job", "most"), [("killed", 40), ("stalled", 40)])
def test_a_lost_process_ends_the_run_with_a_checkpoint_that_resumes(tmp_path, job, most):
    begun = time.monotonic()
    assert two_processes.start(job, tmp_path) == [0, 1]
    assert time.monotonic() - begun < most
    message = (tmp_path / "error-0").read_text()
    assert "process 0 of 2: another process has ended or does not answer" in message
    assert f"The run ends after {DIES_AT} steps; continue it with fit(…, resume='" in message
    model, task = model_and_task()
    settings = {"init_scores": None, "objective": NamedKl()}
    resumed = pruner(**settings).fit(model, task, resume=tmp_path / "state")
    alone = pruner(**settings).fit(model, task)
    torch.testing.assert_close(resumed.log_alpha, alone.log_alpha, atol=1e-5, rtol=0)
    assert [entry["step"] for entry in resumed.history] == list(range(STEPS))


class NamedKl:
    """The objective of the broken run, which is known by its name, as objects are."""

    __name__ = "kl"

    def __call__(self, logits, full, batch):
        return two_processes.kl(logits, full, batch)


def test_processes_with_different_settings_are_refused(tmp_path):
    assert two_processes.start("unlike", tmp_path) == [0, 0]
    message = (tmp_path / "error-1").read_text()
    assert "process 1 of 2 has different settings, pairs, graph or steps" in message


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    assert two_processes.start("shards", folder) == [0, 0]
    return folder


@pytest.mark.parametrize("name", two_processes.ARCHITECTURES)
def test_shared_out_weights_find_the_same_masks(shards, name):
    (first, halves, note, figures), (second, _, _, others) = (
        torch.load(shards / f"{name}-{rank}", weights_only=True) for rank in (0, 1)
    )
    left, most, same, twice, by_turns = note.tolist()
    assert left == 0 and same  # let go after each step, whole again however the context ends
    assert by_turns  # also where blocks are run by halves
    assert most <= 2 and twice  # and a second context was refused
    model = model_zoo.load(name, torch.float64)
    task = model_zoo.pairs(model)
    alone = pruner().fit(model, task)
    assert first.equal(second) and figures.equal(others)
    torch.testing.assert_close(first, alone.log_alpha, atol=1e-5, rtol=0)
    recomputed = pruner(steps=2, recompute=True).fit(model, task)
    torch.testing.assert_close(halves, recomputed.log_alpha, atol=1e-5, rtol=0)
    mine = evaluate(model, alone.circuit, task)
    assert figures.tolist() == pytest.approx([mine.kl, mine.logit_diff], rel=1e-5)


def test_one_process_keeps_its_weights_whole():
    model, task = model_and_task()
    weights = [p.data_ptr() for p in model.parameters()]
    with sharded(model, device="cpu") as inside:
        assert inside is model and [p.data_ptr() for p in model.parameters()] == weights
        first = pruner(init_scores=None, steps=2).fit(model, task).log_alpha
    assert first.equal(pruner(init_scores=None, steps=2).fit(model, task).log_alpha)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_pair_goes_to_one_process(size):
    batch = next(model_zoo.pairs(model_zoo.load("bridge-gpt2")).batches(4))
    rows = [Ranks(rank, size).rows(len(batch)) for rank in range(size)]
    parts = [(batch.select(mine), share) for mine, share in rows]
    dealt = [place for part, share in parts if share for place in part.indices.tolist()]
    assert sorted(dealt) == sorted(batch.indices.tolist())
    assert sum(share for _, share in parts) == pytest.approx(1)
    for part, share in parts:
        assert len(part) == max(1, round(share * 4)) <= Ranks(0, size).most_rows(4)
        for place, tokens in zip(part.indices, part.clean, strict=True):
            assert batch.clean[batch.indices.tolist().index(int(place))].equal(tokens)


def test_weights_cut_up_by_others_are_refused():
    from tl_edgeprune import EdgeGraph

    model = model_zoo.build("bridge-gpt2")
    next(model.parameters()).placements = ()  # as a DTensor has them
    with pytest.raises(NotImplementedError, match="its weights are DTensors"):
        EdgeGraph.from_model(model)


def test_without_torchrun_it_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with started() as ranks:
        assert ranks == Ranks(0, 1) and ranks.first
    assert issubclass(LostProcess, RuntimeError)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from support.two_processes import model_and_task, pruner
from tl_edgeprune.distributed import started
with started(timeout=60) as ranks:
    circuit = pruner(init_scores=None).fit(*model_and_task()).circuit
    if ranks.first:
        circuit.save({out!r})
"""


@pytest.mark.slow
def test_torchrun_starts_them(tmp_path):
    from tl_edgeprune import Circuit

    script, out = tmp_path / "run.py", tmp_path / "circuit.json"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script.write_text(SCRIPT.format(paths=paths, out=str(out)), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run([*torchrun, "--nproc-per-node", "2", str(script)], check=True, timeout=300)
    alone = pruner(init_scores=None).fit(*model_and_task()).circuit
    assert Circuit.load(out) == alone
