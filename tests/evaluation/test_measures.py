"""Per-pair figures against arithmetic on lists, and tasks with sets of right and wrong tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import model_zoo

from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.evaluation.evaluate import evaluate
from tl_edgeprune.evaluation.measures import jensen_shannon, standard_error, wrong_agreement
from tl_edgeprune.forward.context import masked
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.objectives import find_objective, has_prob_diff, negative_prob_diff
from tl_edgeprune.tasks import Task
from tl_edgeprune.tasks.answer_logits import prob_diff
from tl_edgeprune.tasks.batch import NO_TOKEN

VOCAB = model_zoo.VOCAB


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = sum(math.exp(x - top) for x in row)
    return [math.exp(x - top) / total for x in row]


def draw_logits(batch: int, read: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(2, batch, read, 7, generator=generator, dtype=torch.double)


def years(sets: list[tuple[list[int], list[int]]], lengths=(4,)) -> Task:
    """A task of random prompts with these sets of right and wrong tokens."""
    sizes = [lengths[pair % len(lengths)] for pair in range(len(sets))]
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = (
        [torch.randint(VOCAB, (size,), generator=generator) for size in sizes] for _ in "ab"
    )
    return Task(
        "years",
        clean,
        corrupted,
        [torch.tensor([size - 1]) for size in sizes],
        right=[torch.tensor(right, dtype=torch.long) for right, _ in sets],
        wrong=[torch.tensor(wrong, dtype=torch.long) for _, wrong in sets],
        objective="prob-diff",
    )


SETS = [([1], [0]), ([2, 3, 4], [5]), ([6], [7, 8, 9]), ([0, 1], [2, 3])]

token_sets = st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=6, unique=True).flatmap(
    lambda tokens: st.integers(1, len(tokens) - 1).map(lambda cut: (tokens[:cut], tokens[cut:]))
)


# --------------------------------------------------------------------------------- divergence


@given(batch=st.integers(1, 3), read=st.integers(1, 3), seed=st.integers(0, 999))
def test_jensen_shannon_is_its_sum_over_the_vocabulary(batch, read, seed):
    logits, full = draw_logits(batch, read, seed)
    for row, value in enumerate(jensen_shannon(logits, full).tolist()):
        expected = 0.0
        for place in range(read):
            p, q = softmax(full[row, place].tolist()), softmax(logits[row, place].tolist())
            for a, b in zip(p, q, strict=True):
                m = (a + b) / 2
                expected += (a * math.log(a / m) + b * math.log(b / m)) / 2 / read
        assert value == pytest.approx(expected, abs=1e-10)
    assert torch.allclose(jensen_shannon(full, logits), jensen_shannon(logits, full))
    assert float(jensen_shannon(full + 5, full).max()) < 1e-10


def test_jensen_shannon_of_outputs_that_share_nothing_is_ln_2():
    apart = torch.tensor([[[1000.0, 0.0]], [[0.0, 1000.0]]])
    assert jensen_shannon(apart, apart.flip(0)).tolist() == pytest.approx([math.log(2)] * 2)
    half = jensen_shannon(apart.bfloat16(), apart.flip(0).bfloat16())
    assert half.dtype == torch.float32


# --------------------------------------------------------------------------------- sets of tokens


@given(st.lists(token_sets, min_size=1, max_size=5), st.integers(0, 99))
def test_probability_difference_is_a_sum_over_the_sets(sets, seed):
    task = years(sets, lengths=(3, 4))
    generator = torch.Generator().manual_seed(seed)
    for batch in task.batches(8):
        logits = 2 * torch.randn(len(batch), 1, VOCAB, generator=generator)
        for row, pair in enumerate(batch.indices.tolist()):
            p = softmax(logits[row, 0].tolist())
            right, wrong = sets[pair]
            expected = sum(p[token] for token in right) - sum(p[token] for token in wrong)
            assert float(prob_diff(logits, batch)[row]) == pytest.approx(expected, abs=1e-6)
        assert torch.equal(negative_prob_diff(logits, logits, batch), -prob_diff(logits, batch))
    assert find_objective(None, task) is negative_prob_diff and task.metric == "prob-diff"


def test_sets_follow_their_pairs():
    task = years(SETS, lengths=(3, 5))
    part = task.subset([3, 1, 3])
    assert [tokens.tolist() for tokens in part.right] == [[0, 1], [2, 3, 4], [0, 1]]
    assert [tokens.tolist() for tokens in task[2:].wrong] == [[7, 8, 9], [2, 3]]
    first, second = task.split(0.5)
    assert len(first.right) == len(second.wrong) == 2
    short, long = task.batches(8)
    assert short.right.tolist() == [[1], [6]]
    assert short.wrong.tolist() == [[0, NO_TOKEN, NO_TOKEN], [7, 8, 9]]
    assert long.to("cpu").right.tolist() == [[2, 3, 4], [0, 1, NO_TOKEN]]
    assert next(years([([], [])]).batches(1)).right is None
    aligned = Task.aligned(
        "years", [*task.clean[:1], torch.tensor([1])], task.corrupted[:2], task.read_positions[:2],
        right=task.right[:2], wrong=task.wrong[:2],
    )  # fmt: skip
    assert [tokens.tolist() for tokens in aligned.right] == [[1]]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (([1, 1], [2]), r"right \[1, 1\] and wrong \[2\], expected token ids from 0 up, none of"),
        (([1], [2, 1]), "twice or in both"),
        (([-1], [2]), "from 0 up"),
        (([*range(10)], [9]), r"right \[0, 1, 2, 3, 4, 5, 6, 7, …\]"),
    ],
)
def test_sets_that_contradict_themselves_are_refused(sets, message):
    with pytest.raises(ValueError, match=message):
        years([SETS[0], sets])


def test_sets_need_one_read_position_and_one_set_a_pair():
    prompt = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="pair 0: right and wrong tokens for 2 read positions"):
        Task("two", [prompt], [prompt], [torch.tensor([1, 2])], right=[torch.tensor([4])])
    with pytest.raises(ValueError, match="1 clean prompts, but 2 right"):
        Task("two", [prompt], [prompt], [torch.tensor([2])], right=[torch.tensor([4])] * 2)


def test_the_objective_is_refused_without_both_sets():
    task = years([SETS[0], ([3], [])])
    assert not has_prob_diff(task)
    with pytest.raises(ValueError, match="'prob-diff' needs right and wrong tokens, but pair 1 .*"):
        find_objective("prob-diff", task)
    with pytest.raises(ValueError, match="token 40, but the model knows 0 to"):
        model = model_zoo.load("native-ln")
        evaluate(model, half(model), years([([40], [1])]))


def half(model) -> Circuit:
    graph = EdgeGraph.from_model(model)
    generator = torch.Generator().manual_seed(1)
    return Circuit(graph, torch.rand(graph.n_edges, generator=generator) < 0.6)


def test_an_evaluation_of_sets_is_the_mean_over_pairs():
    model = model_zoo.load("native-ln")
    task, circuit = years(SETS), half(model)
    rows = []
    for pair, (right, wrong) in enumerate(SETS):
        clean, corrupted = task.clean[pair][None], task.corrupted[pair][None]
        with torch.no_grad():
            runs = [model(clean)[0, -1], model(corrupted)[0, -1]]
            with masked(model, circuit, corrupted=corrupted):
                runs.append(model(clean)[0, -1])
        chances = [softmax(run.double().tolist()) for run in runs]
        rows.append([sum(p[t] for t in right) - sum(p[t] for t in wrong) for p in chances])
    full, empty, own = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    found = evaluate(model, circuit, task, batch_size=3)
    assert found.prob_diff == pytest.approx(own, abs=1e-5)
    assert found.prob_diff_full == pytest.approx(full, abs=1e-5)
    assert found.prob_diff_empty == pytest.approx(empty, abs=1e-5)
    assert found.faithfulness == pytest.approx((own - empty) / (full - empty), abs=1e-4)
    assert found.accuracy == sum(row[2] > 0 for row in rows) / len(rows)
    assert found.n_wrong == sum(row[0] <= 0 for row in rows)
    assert "prob diff" in str(found) and found.logit_diff is None


# --------------------------------------------------------------------------------- over pairs


def test_agreement_is_over_the_pairs_that_the_model_gets_wrong():
    right, same = torch.tensor([1.0, 0, 0, 1, 0]), torch.tensor([1.0, 1, 0, 0, 0])
    assert wrong_agreement(right, same) == pytest.approx(1 / 3)
    assert wrong_agreement(torch.ones(5), same) is None


def test_the_standard_error_of_a_mean():
    values = [1.0, 2.0, 4.0]
    mean = sum(values) / 3
    variance = sum((value - mean) ** 2 for value in values) / 2
    assert standard_error(torch.tensor(values)) == pytest.approx(math.sqrt(variance / 3))
    assert standard_error(torch.tensor([1.0])) is None
