"""Which prompts a model does right, held to a loop over the pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import ioi_model, model_zoo
from torch import Tensor, nn

from tl_edgeprune import Circuit, EdgeGraph, evaluate, tasks
from tl_edgeprune.tasks import Task

VOCAB = 9


class Summing(nn.Module):
    """Logits at a position: the sum of random rows of all tokens up to there, with dropout."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rows = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=generator))
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.rows[tokens]).cumsum(1)


def task_of(*pairs: dict) -> Task:
    """Pairs by their fields; what one leaves out is empty. Corrupted prompts do not matter here."""
    fields = ("answers", "distractors", "right", "wrong")
    return Task(
        "numbers",
        [torch.tensor(pair["clean"]) for pair in pairs],
        [torch.zeros(len(pair["clean"])).long() for pair in pairs],
        [torch.tensor(pair.get("positions", [len(pair["clean"]) - 1])) for pair in pairs],
        **{f: [torch.tensor(pair.get(f, []), dtype=torch.long) for pair in pairs] for f in fields},
    )


def right_by_definition(model: Summing, pair: dict) -> bool:
    logits = model.rows[torch.tensor(pair["clean"])].cumsum(0).tolist()
    rows = [logits[position] for position in pair.get("positions", [-1])]
    if not pair.get("answers"):
        odds = torch.tensor(rows[0]).exp().tolist()
        return sum(odds[t] for t in pair["right"]) > sum(odds[t] for t in pair["wrong"])
    for i, (row, answer) in enumerate(zip(rows, pair["answers"], strict=True)):
        rivals = {*pair.get("distractors", [])[i : i + 1], *pair.get("wrong", [])}
        if not all(row[answer] > row[token] for token in rivals or {*range(VOCAB)} - {answer}):
            return False
    return True


@st.composite
def pairs(draw) -> dict:
    clean = draw(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=3))
    different = st.permutations(range(VOCAB))
    tokens, cut = draw(different), draw(st.integers(2, 5))
    sets = {"right": tokens[:cut], "wrong": tokens[cut : draw(st.integers(cut + 1, VOCAB))]}
    kind = draw(st.sampled_from(["sets", "distractor", "answer", "all", "positions"]))
    if kind == "sets":
        return {"clean": clean, **sets}
    if kind == "positions":
        read = {"positions": [0, 1], "answers": tokens[:2]}
        return {"clean": clean, **read, "distractors": draw(st.sampled_from([[], tokens[2:4]]))}
    pair = {"clean": clean, "answers": tokens[:1]}
    if kind != "answer":
        pair["distractors"] = tokens[-1:]
    return pair | sets if kind == "all" else pair


@given(st.lists(pairs(), min_size=1, max_size=12), st.integers(0, 3), st.integers(1, 5))
def test_solved_is_its_definition_pair_by_pair(some, seed, batch_size):
    model = Summing(seed)
    solved = tasks.solved(model, task_of(*some), batch_size=batch_size)
    assert solved.tolist() == [right_by_definition(model, pair) for pair in some]


def test_keep_solved_keeps_those_in_their_order():
    model = Summing()
    some = [{"clean": [a, b], "answers": [a], "distractors": [b]} for a in range(5) for b in (7, 8)]
    expected = [pair["clean"] for pair in some if right_by_definition(model, pair)]
    kept = tasks.keep_solved(model, task_of(*some))
    assert [tokens.tolist() for tokens in kept.clean] == expected and 0 < len(kept) < len(some)
    assert tasks.solved(model, kept).all()


def test_the_model_is_left_as_it_was():
    model = Summing().train()
    model.rows.requires_grad_(True)
    state = torch.get_rng_state()
    tasks.solved(model, task_of({"clean": [1, 2], "answers": [3]}))
    assert model.training and model.dropout.training and model.rows.grad is None
    assert torch.is_grad_enabled() and torch.equal(state, torch.get_rng_state())
    model.dropout.eval()
    with pytest.raises(IndexError):  # a token that the model has not
        tasks.solved(model, task_of({"clean": [1, VOCAB], "answers": [3]}))
    assert model.training and not model.dropout.training


def test_nothing_right_and_nothing_to_be_right_about():
    model = Summing()
    with torch.no_grad():
        model.rows[:, 3] = 100.0
    with pytest.raises(ValueError, match=r"none of the 2 prompts of task 'numbers' right"):
        tasks.keep_solved(model, task_of(*[{"clean": [a], "answers": [4]} for a in (0, 1)]))
    fine, empty = {"clean": [1], "answers": [4]}, {"clean": [1], "right": [2]}
    with pytest.raises(ValueError, match="pair 1 of task 'numbers' has neither an answer nor"):
        tasks.solved(model, task_of(fine, empty))


CLASSES = [
    name for name in model_zoo.ARCHITECTURES if name.endswith(("-gpt2", "-llama", "native-ln"))
]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_model_is_asked_as_it_is(name):
    model = model_zoo.load(name)
    task = model_zoo.pairs(model, 12)
    with torch.no_grad():
        logits = [model(tokens[None])[0, -1] for tokens in task.clean]
    expected = [bool(row[3] > row[5]) for row in logits]
    assert tasks.solved(model, task).tolist() == expected


def test_it_agrees_with_the_full_models_accuracy():
    model = ioi_model.model()
    task = tasks.load("ioi", model, 40)
    solved = tasks.solved(model, task)
    graph = EdgeGraph.from_model(model)
    whole = Circuit(graph, torch.ones(graph.n_edges, dtype=torch.bool))
    assert 0 < solved.float().mean() < 1
    assert evaluate(model, whole, task).accuracy == pytest.approx(float(solved.float().mean()))
