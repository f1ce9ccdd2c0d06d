"""Streams: pairs by place, each once an epoch, resumable anywhere, at a cost that is flat in n."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import ioi_model, model_zoo
from torch import Tensor

from tl_edgeprune import EdgePruner, tasks
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.objectives import kl
from tl_edgeprune.runs.targets import Targets, sizes
from tl_edgeprune.tasks import Task, TaskStream
from tl_edgeprune.tasks.permutation import Order
from tl_edgeprune.training.batch_stream import BatchStream

MODEL = "bridge-gpt2"


def numbers(n_pairs: int, chunk_size: int = 8, made: list[range] | None = None) -> TaskStream:
    """Pair i holds the number i, in prompts of three lengths; `made` notes what is read."""

    def read(places: range) -> Task:
        if made is not None:
            made.append(places)
        clean = [torch.full((3 + place % 3,), place) for place in places]
        positions = [torch.tensor([len(tokens) - 1]) for tokens in clean]
        return Task("numbers", clean, [tokens + 1 for tokens in clean], positions)

    return TaskStream("numbers", n_pairs, read, f"numbers {n_pairs}", chunk_size=chunk_size)


def pruner(n_edges: int = 20, **changes) -> EdgePruner:
    return EdgePruner(n_edges, **({"steps": 8, "batch_size": 4, "progress": False} | changes))


def streamed(model, n: int, chunk_size: int = 8) -> TaskStream:
    """The zoo's random pairs, as a stream."""
    whole = model_zoo.pairs(model, n)

    def read(places: range) -> Task:
        return whole.subset(places)

    return TaskStream("random", n, read, f"random {n}", chunk_size=chunk_size)


# ---------------------------------------------------------------------------------------- the order


@given(st.integers(1, 3000), st.integers(0, 5))
def test_an_order_has_every_number_once(size, seed):
    order = Order(size, seed)
    assert sorted(order[place] for place in range(size)) == list(range(size))


def test_an_order_is_shuffled_and_goes_by_its_seed():
    first, second = ([Order(10_000, seed)[i] for i in range(1000)] for seed in (0, 1))
    assert first != second
    mean = sum(first) / 1000
    assert abs(mean - 5000) < 4 * 10_000 / (12 * 1000) ** 0.5  # four standard errors
    neighbours = sum(abs(a - b) == 1 for a, b in zip(first, first[1:], strict=False))
    assert neighbours < 5  # 0.2 expected
    with pytest.raises(IndexError, match="index 5 of an order of 5"):
        Order(5, 0)[5]


@given(st.integers(1, 60), st.integers(1, 10), st.integers(1, 7), st.booleans(), st.integers(0, 3))
def test_batches_have_every_pair_once_in_batches_of_one_shape(n, chunk, size, shuffle, seed):
    stream = numbers(n, chunk)
    batches = list(stream.batches(size, shuffle, seed))
    places = [place for batch in batches for place in batch.indices.tolist()]
    assert sorted(places) == list(range(n))
    assert [int(row[0]) for batch in batches for row in batch.clean] == places
    assert all(1 <= len(batch) <= size for batch in batches)
    again = [batch.indices.tolist() for batch in stream.batches(size, shuffle, seed)]
    assert again == [batch.indices.tolist() for batch in batches]


def test_another_seed_is_another_order_of_chunks_and_of_pairs():
    first, second = (
        [b.indices.tolist() for b in numbers(200).batches(2, True, seed)] for seed in (0, 1)
    )
    assert first != second
    assert [b[0] // 8 for b in first] != sorted(b[0] // 8 for b in first)


@given(st.integers(1, 40), st.integers(0, 60), st.booleans())
def test_a_feed_goes_on_from_any_place_and_makes_no_other_chunk(n, steps, whole):
    made: list[range] = []
    task = numbers(n, 8, made)
    task = task.read(range(n)) if whole else task
    through = BatchStream(task, 3, lambda epoch: 100 + epoch)
    list(islice(through, steps))
    made.clear()
    there = BatchStream(task, 3, lambda epoch: 100 + epoch, through.cursor)
    expected = [batch.clean for batch in islice(through, 2)]
    made.clear()
    for batch, clean in zip(islice(there, 2), expected, strict=True):
        assert batch.clean.equal(clean)
    assert len(made) <= 4  # at most two batches' chunks, and those that just ended


def test_chunks_that_are_not_there():
    with pytest.raises(IndexError, match="chunk 3 of TaskStream"):
        numbers(24).chunk(3)
    with pytest.raises(ValueError, match="0 pairs in chunks of 8, expected at least one"):
        numbers(0)


# ------------------------------------------------------------------------------------- made of IOI


def test_ioi_pairs_go_by_their_place_and_clean_prompts_differ():
    model = ioi_model.model()
    stream, other = (
        replace(tasks.stream("ioi", model, 700, seed), chunk_size=300) for seed in (0, 1)
    )
    cut = replace(stream, chunk_size=30).chunk(8)
    whole = stream.chunk(0)
    for field in ("clean", "corrupted", "read_positions", "answers", "distractors"):
        for ours, theirs in zip(getattr(cut, field), getattr(whole, field)[240:270], strict=True):
            assert ours.equal(theirs)
    assert cut.groups == whole.groups[240:270] and len(set(whole.groups)) > 20
    assert stream.chunk(2).clean[0].tolist() != other.chunk(2).clean[0].tolist()
    assert len(stream.chunk(2)) == 100
    prompts = {tuple(tokens.tolist()) for tokens in whole.clean}
    assert len(prompts) == 300
    unknown = model.tokenizer.unk_token_id
    for clean, corrupted, answer, distractor in zip(
        whole.clean, whole.corrupted, whole.answers, whole.distractors, strict=True
    ):
        names = {int(answer), int(distractor)}
        assert names <= set(clean.tolist()) and not names & set(corrupted.tolist())
        assert unknown not in clean.tolist() + corrupted.tolist()


def test_what_cannot_be_streamed_is_refused():
    model = ioi_model.model()
    with pytest.raises(ValueError, match=r"no such stream; there are arithmetic, .*ioi, ioi-t1"):
        tasks.stream("tracr-reverse", model, 4)
    with pytest.raises(ValueError, match=r"stream\('ioi', n=0\): a stream needs at least one"):
        tasks.stream("ioi", model, 0)
    with pytest.raises(ValueError, match=r"n=1000000000\): only [\d,]+ different prompts"):
        tasks.stream("ioi-t1", model, 10**9)


# ------------------------------------------------------------------------------------- from a file


def lines(n: int) -> list[dict[str, str]]:
    names = ("Mary", "John", "Anna", "Paul")
    return [
        {
            "clean": f"Then, {names[i % 4]} went to<predict> {names[i // 4 % 4]}</predict>",
            "corrupted": f"Then, {names[(i + 1) % 4]} went to<predict> Eric</predict>",
            "split": "train" if i % 3 else "test",
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("split", [None, "train"])
def test_a_streamed_file_has_the_pairs_of_the_file(tmp_path, split):
    path = tmp_path / "pairs.jsonl"
    texts = [json.dumps(line) for line in lines(50)]
    texts.insert(20, "")
    path.write_text("\n".join(texts), encoding="utf-8")
    model = ioi_model.model()
    stream = tasks.stream_jsonl(path, model, split=split, chunk_size=7)
    whole = tasks.from_jsonl(path, model, split=split)
    assert (len(stream), stream.name) == (len(whole), whole.name)
    for size in (7, 3, 20):  # as it was opened, and otherwise
        cut = replace(stream, chunk_size=size)
        for index in reversed(range(cut.n_chunks)):
            chunk = cut.chunk(index)
            for field in ("clean", "corrupted", "read_positions", "answers", "distractors"):
                part = getattr(whole, field)[size * index : size * index + size]
                assert all(a.equal(b) for a, b in zip(getattr(chunk, field), part, strict=True))


def test_wrong_lines_name_file_and_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    model = ioi_model.model()
    texts = [json.dumps(line) for line in lines(10)]
    path.write_text("\n".join([*texts, "{"]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 11: not valid JSON"):
        tasks.stream_jsonl(path, model)
    path.write_text("\n".join(texts), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no prompt pairs for split='other'; splits found: test"):
        tasks.stream_jsonl(path, model, split="other")
    uneven = {"clean": "Mary met<predict> John</predict>", "corrupted": "Mary"}
    path.write_text("\n".join([*texts, json.dumps(uneven)]), encoding="utf-8")
    stream = tasks.stream_jsonl(path, model, chunk_size=4)
    stream.chunk(0)
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 11: before the answer, clean has 2"):
        stream.check()
    path.write_text("\n".join(texts[:9]), encoding="utf-8")
    with pytest.raises(ValueError, match="has changed since it was opened"):
        stream.chunk(0)


# ---------------------------------------------------------------------------------- the targets


@pytest.mark.parametrize("visits", [None, 3], ids=["kept", "lazy"])
def test_a_teacher_gives_the_same_kept_or_anew(visits):
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model)
    with MaskedModel.attach(model) as run:
        targets = Targets(run, task, visits=visits)
        for batch in task.batches(3, shuffle=True):
            target_batch = targets.prepare(batch)
            logits = model(batch.clean)
            read = logits.gather(
                1, batch.read_positions[..., None].expand(-1, -1, logits.shape[-1])
            )
            torch.testing.assert_close(target_batch.full, read, atol=1e-5, rtol=1e-5)
            reference = run.reference("counterfactual", corrupted=batch.corrupted)
            torch.testing.assert_close(target_batch.reference.streams, reference.streams)


def test_a_teachers_size_is_known_before_it_is_made():
    model = model_zoo.load(MODEL)
    task = model_zoo.pairs(model)
    with MaskedModel.attach(model) as run:
        kept = Targets(run, task)
        targets, references = sizes(run, task)
        assert targets == sum(t.numel() * t.element_size() for t in kept._full.values())
        assert references == sum(r.n_bytes for r in kept._references.values())
        for most, keeps in (
            (targets + references, (True, True)),
            (targets + references - 1, (True, False)),
            (targets - 1, (False, False)),
        ):
            targets = Targets(run, task, visits=10**6, max_bytes=most)
            assert (targets._full is not None, targets._references is not None) == keeps
        assert Targets(run, task, visits=len(task) - 1)._full is None


# ------------------------------------------------------------------------------------------- fit


@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_a_streamed_run_resumes_to_the_same_bits(tmp_path, stop):
    """In the first epoch and in the second (of six batches each, two lengths), with two a step."""
    model = model_zoo.load(MODEL)
    task = streamed(model, 20)
    whole = pruner(accumulate=2).fit(model, task)
    path = tmp_path / "state"
    ends = Ends(stop * 2)
    halted = pruner(accumulate=2, checkpoint=path, checkpoint_every=1, objective=ends)
    halted.objective = ends
    partly = halted.fit(model, task)
    assert not partly.finished and len(partly.history) == stop
    resumed = pruner(accumulate=2, objective=ends).fit(model, task, resume=path)
    assert resumed.log_alpha.equal(whole.log_alpha)
    assert [h["loss"] for h in resumed.history] == [h["loss"] for h in whole.history]


class Ends:
    """The KL, until Ctrl-C in the forward after so many of the training (and the warm start's)."""

    __name__ = "kl"

    def __init__(self, after: int) -> None:
        self.left = after + 5 * 6  # five points of six batches to start with

    def __call__(self, logits, full, batch):
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        return kl(logits, full, batch)


def test_a_checkpoint_of_another_stream_is_refused(tmp_path):
    model = model_zoo.load(MODEL)
    path = tmp_path / "state"
    pruner(checkpoint=path, steps=1, init_scores=None).fit(model, streamed(model, 20))
    with pytest.raises(ValueError, match="its task is"):
        pruner(steps=1, init_scores=None).fit(model, streamed(model, 24), resume=path)


def test_every_streamed_pair_is_seen_once_an_epoch():
    model, seen = model_zoo.load(MODEL), []

    def watch(logits, full, batch):
        seen.extend(batch.indices.tolist())
        return kl(logits, full, batch)

    task = streamed(model, 20)
    n_batches = len(list(task.batches(4)))
    pruner(objective=watch, init_scores=None, steps=2 * n_batches, candidates=0).fit(model, task)
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20)) and seen[:20] != seen[20:]


def test_a_streamed_task_learns_what_the_whole_task_does():
    """One chunk that holds all its pairs is the task itself, batch by batch."""
    model = model_zoo.load(MODEL)
    whole, stream = model_zoo.pairs(model, 20), streamed(model, 20, 20)
    theirs, mine = (
        pruner(steps=6, batch_size=10).fit(model, task).log_alpha for task in (whole, stream)
    )
    torch.testing.assert_close(mine, theirs)
    start = pruner(steps=1, batch_size=10, lr=1e-9).fit(model, stream).log_alpha
    assert float((mine - start).abs().mean()) > 0.5


def test_a_later_chunk_with_pairs_that_do_not_fit_is_refused():
    model = model_zoo.load(MODEL)
    stream = numbers(60)  # tokens of the model's vocabulary of 40, at first
    with pytest.raises(ValueError, match="but the model knows 0 to 39"):
        pruner(init_scores=None, steps=30).fit(model, stream)


# ------------------------------------------------------------------------------------ flat in n


class Live:
    """The KL, which notes at each step the bytes of all live tensors."""

    __name__ = "live"

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def __call__(self, logits, full, batch):
        tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.bytes.append(sum(storages.values()))
        return kl(logits, full, batch)


def test_live_bytes_do_not_grow_with_the_number_of_pairs():
    """A hundred times the pairs, in the same memory, over several chunks."""
    model, most = ioi_model.model(), []
    for n in (1_000, 100_000):
        live = Live()
        stream = replace(tasks.stream("ioi", model, n), chunk_size=64)
        pruner(5, steps=12, batch_size=16, objective=live, init_scores=None).fit(model, stream)
        most.append(max(live.bytes))
    assert most[1] < 1.1 * most[0], most


COST = """
import json, sys, talkative
from tl_edgeprune import EdgePruner, tasks
from tl_edgeprune.cost import measured
model = ioi_model.model()
pruner = EdgePruner(5, steps=100, batch_size=32, progress=False, init_scores=None)
pruner.fit(model, tasks.stream("ioi", model, 1000))  # to warm up
with measured() as cost:
    pruner.fit(model, tasks.stream("ioi", model, int(sys.argv[1])))
print(json.dumps({"ms": 1000 * cost.seconds / 100, "mb": cost.peak_mb}))
"""


@pytest.mark.slow
def test_time_and_peak_memory_do_not_grow_with_the_number_of_pairs():
    """Whole processes, 100 steps of 32: three epochs of 1,000 pairs, a thirtieth of 100,000."""
    found = []
    for n in (1_000, 100_000):
        command = [sys.executable, "-c", COST, str(n)]
        paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        here = os.environ | {"PYTHONPATH": paths}
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=here)
        found.append(json.loads(run.stdout))
    few, many = found
    print(found)
    assert many["mb"] < few["mb"] + 20, found
    assert many["ms"] < 2 * few["ms"], found
