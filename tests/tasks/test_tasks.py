"""Prompt pairs: what a Task promises, Tracr's prompts, IOI for SmolLM2, pairs from a file."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import model_zoo
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tl_edgeprune import Circuit, EdgeGraph, discover, evaluate, masked, models, tasks
from tl_edgeprune.models import smollm2, tracr
from tl_edgeprune.tasks import Task
from tl_edgeprune.tasks.library import ioi

needs_wheel = pytest.mark.skipif(
    smollm2.wheel_folder() is None, reason=f"needs {smollm2.REQUIREMENT}"
)


def rows(tensors) -> list[tuple[int, ...]]:
    return [tuple(tensor.tolist()) for tensor in tensors]


def number_task(prompts: list[list[int]]) -> Task:
    """A task of arbitrary prompts, read at the last position; corrupted is the prompt plus 100."""
    clean = [torch.tensor(prompt) for prompt in prompts]
    return Task(
        "numbers",
        clean,
        [tokens + 100 for tokens in clean],
        read_positions=[torch.tensor([len(tokens) - 1]) for tokens in clean],
        answers=[tokens[-1:] for tokens in clean],
        groups=tuple(f"length-{len(tokens)}" for tokens in clean),
    )


prompt = st.lists(st.integers(0, 2), min_size=1, max_size=4)
prompt_lists = st.lists(prompt, min_size=2, max_size=30)


# --------------------------------------------------------------------------------------------- Task


@settings(deadline=None)
@given(prompt_lists, st.floats(0.1, 0.9), st.integers(0, 5))
def test_split_shares_no_prompt_and_loses_no_pair(prompts, share, seed):
    task = number_task(prompts)
    try:
        first, second = task.split(share, seed)
    except ValueError as error:
        assert "one side empty" in str(error)
        return
    assert not set(rows(first.clean)) & set(rows(second.clean))
    assert sorted(rows(first.clean) + rows(second.clean)) == sorted(rows(task.clean))
    assert len(first) <= round(share * len(task))
    again, _ = task.split(share, seed)
    assert rows(again.clean) == rows(first.clean) and again.groups == first.groups


def test_split_of_different_prompts_has_the_share_asked_for():
    task = number_task([[a, b] for a in range(10) for b in range(4)])
    first, second = task.split(0.25, seed=3)
    assert (len(first), len(second)) == (10, 30)
    assert rows(first.clean) != rows(task.split(0.25, seed=4)[0].clean)


@settings(deadline=None)
@given(prompt_lists, st.integers(1, 9), st.booleans(), st.integers(0, 3))
def test_batches_hold_every_pair_once_unpadded(prompts, size, shuffle, seed):
    task = number_task(prompts)
    seen = []
    for batch in task.batches(size, shuffle, seed):
        assert 1 <= len(batch) <= size and batch.clean.shape == batch.corrupted.shape
        assert batch.distractors.shape == (len(batch), 0)
        for row, pair in enumerate(batch.indices.tolist()):
            for field in ("clean", "corrupted", "read_positions", "answers"):
                assert torch.equal(getattr(batch, field)[row], getattr(task, field)[pair])
        seen += batch.indices.tolist()
    assert sorted(seen) == list(range(len(task)))


def test_shuffling_changes_the_order_and_keeps_to_the_seed():
    task = number_task([[n] for n in range(50)])
    order = [batch.indices.tolist() for batch in task.batches(8, shuffle=True, seed=1)]
    assert order == [batch.indices.tolist() for batch in task.batches(8, shuffle=True, seed=1)]
    assert order != [batch.indices.tolist() for batch in task.batches(8, shuffle=True, seed=2)]
    assert [batch.indices.tolist() for batch in task.batches(50)] == [list(range(50))]


def test_slices_and_subsets_keep_pairs_together():
    task = number_task([[0], [1, 2], [2], [3, 4, 5]])
    part = task[1:3]
    assert rows(part.clean) == [(1, 2), (2,)] and rows(part.corrupted) == [(101, 102), (102,)]
    assert part.groups == ("length-2", "length-1") and part.name == "numbers"
    with pytest.raises(TypeError):
        task[0]


PAIR = {
    "clean": [torch.tensor([1, 2, 3])],
    "corrupted": [torch.tensor([4, 5, 6])],
    "read_positions": [torch.tensor([1, 2])],
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clean": [], "corrupted": [], "read_positions": []}, "no prompt pairs"),
        ({"corrupted": []}, "1 clean prompts, but 0 corrupted"),
        ({"read_positions": [torch.tensor([3])]}, r"\[3\], expected .* 0 to 2"),
        ({"read_positions": [torch.tensor([-1])]}, "from 0 to 2"),
        ({"read_positions": [torch.tensor([2, 1])]}, "rising"),
        ({"read_positions": [torch.tensor([1, 1])]}, "rising"),
        ({"read_positions": [torch.tensor([], dtype=torch.long)]}, "one or more"),
        ({"answers": [torch.tensor([7])]}, "1 answers for 2 read positions"),
        ({"distractors": [torch.tensor([7, 8, 9])]}, "3 distractors for 2 read"),
        ({"groups": ("a", "b")}, "2 groups"),
    ],
)
def test_what_is_not_aligned_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Task("bad", **PAIR | change)


def test_lengths_that_differ_name_the_pair_and_can_be_dropped():
    clean = [torch.arange(2), torch.arange(15), torch.arange(3)]
    corrupted = [torch.arange(2), torch.arange(16), torch.arange(3)]
    positions = [torch.tensor([0]), torch.tensor([7]), torch.tensor([1])]
    with pytest.raises(ValueError, match="pair 1: clean has 15 tokens, corrupted has 16") as error:
        Task("ragged", clean, corrupted, positions)
    assert "Task.aligned()" in str(error.value)
    task = Task.aligned("ragged", clean, corrupted, positions, groups=("a", "b", "c"))
    assert task.groups == ("a", "c") and rows(task.read_positions) == [(0,), (1,)]


# --------------------------------------------------------------------------------------- registry


def test_unknown_tasks_and_counts_are_refused():
    with pytest.raises(ValueError, match="there are arithmetic, .*ioi-t1, .*tracr-xproportion"):
        tasks.load("iio", nn.Identity(), n=2)
    with pytest.raises(ValueError, match="at least one pair"):
        tasks.load("ioi", nn.Identity(), n=0)
    with pytest.raises(ValueError, match="already registered"):
        tasks.register("ioi")(lambda *_: None)
    with pytest.raises(ValueError, match="has no tokenizer"):
        tasks.load("ioi", nn.Identity(), n=2)


# ------------------------------------------------------------------------------------------- Tracr


@pytest.mark.parametrize("name, possible", [("tracr-xproportion", 1364), ("tracr-reverse", 363)])
def test_tracr_tasks_use_every_prompt_before_any_again(name, possible):
    model = models.load(name)
    task = tasks.load(name, model, n=2 * possible, seed=1)
    pairs = list(zip(rows(task.clean), rows(task.corrupted), strict=True))
    assert len(set(rows(task[:possible].clean))) == possible
    assert len(set(pairs)) == 2 * possible and all(a != b for a, b in pairs)
    assert rows(task.read_positions) == [tuple(range(1, len(tokens))) for tokens in task.clean]
    assert task.objective == "mse" and task.prepend_bos
    assert len({len(tokens) for tokens in task[:10].clean}) == 5  # lengths take turns
    bos = tracr.read_config(name)["bos"]
    assert all(tokens[0] == bos and bos not in tokens[1:] for tokens in task.clean)


def test_reverse_has_the_models_own_answers():
    model = models.load("tracr-reverse")
    for batch in tasks.load("tracr-reverse", model, n=100).batches(32):
        with torch.no_grad():
            logits = model(batch.clean)
        read = logits.gather(
            1, batch.read_positions[..., None].expand(-1, -1, 3)
        )  # [batch, read, 3]
        assert torch.equal(read.argmax(-1), batch.answers)


def test_tracr_tasks_refuse_another_model():
    with pytest.raises(ValueError, match=r"models\.load\('tracr-reverse'\)"):
        tasks.load("tracr-reverse", models.load("tracr-xproportion"), n=4)
    with pytest.raises(ValueError, match="needs BOS"):
        tasks.load("tracr-reverse", models.load("tracr-reverse"), 4, prepend_bos=False)


# --------------------------------------------------------------------------------------------- IOI


@pytest.fixture(scope="module")
def model():
    return models.load("smollm2-135m", device="cpu")


@needs_wheel
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), name=st.sampled_from(["ioi", "ioi-t1"]))
def test_ioi_pairs_differ_in_the_three_names_alone(model, seed, name):
    task = tasks.load(name, model, n=48, seed=seed)
    names = {f" {n}": n for n in ioi.single_token_names(model.tokenizer)}
    for pair in range(len(task)):
        clean, corrupted = task.clean[pair], task.corrupted[pair]
        slots = (clean != corrupted).nonzero()[:, 0]
        used = [model.tokenizer.decode([token]) for token in clean[slots]]
        others = [model.tokenizer.decode([token]) for token in corrupted[slots]]
        answer = model.tokenizer.decode(task.answers[pair])
        distractor = model.tokenizer.decode(task.distractors[pair])
        assert len(used) == 3 and {*used, *others} <= names.keys()
        assert len(set(others)) == 3 and not set(others) & set(used)
        first_two = [answer, distractor] if "ABBA" in task.groups[pair] else [distractor, answer]
        assert used == [*first_two, distractor] and answer != distractor
        assert task.read_positions[pair].tolist() == [len(clean) - 1]
    first, second = task.split(0.5, seed)
    assert not set(rows(first.clean)) & set(rows(second.clean)) and len(first) == len(second)


@needs_wheel
def test_ioi_is_the_same_for_a_seed_and_mixes_templates(model):
    task = tasks.load("ioi", model, n=300)
    assert rows(task.clean) == rows(tasks.load("ioi", model, n=300).clean)
    assert rows(task.clean) != rows(tasks.load("ioi", model, n=300, seed=1).clean)
    assert set(task.groups) == {template.label for template in ioi.TEMPLATES}
    assert len(set(rows(task.clean))) == 300 and len({len(tokens) for tokens in task.clean}) > 3
    assert len(set(tasks.load("ioi-t1", model, n=50).groups)) == 1


@needs_wheel
def test_smollm2_does_ioi(model):
    task = tasks.load("ioi", model, n=32)
    differences: list[Tensor] = []
    for batch in task.batches(16):
        with torch.no_grad():
            logits = model(batch.clean)[:, -1]
        differences.append(logits.gather(1, batch.answers) - logits.gather(1, batch.distractors))
    difference = torch.cat(differences)
    assert difference.mean() > 3 and (difference > 0).float().mean() > 0.95


@needs_wheel
def test_ioi_prepends_bos_where_asked(model):
    plain, with_bos = (tasks.load("ioi", model, n=4, prepend_bos=bos) for bos in (None, True))
    assert not plain.prepend_bos and with_bos.prepend_bos
    bos = model.tokenizer.bos_token_id
    for without, tokens in zip(plain.clean, with_bos.clean, strict=True):
        assert tokens.tolist() == [bos, *without.tolist()]
    assert rows(plain.answers) == rows(with_bos.answers)


@needs_wheel
def test_ioi_says_how_many_pairs_there_are(model):
    with pytest.raises(ValueError, match=r"only [\d,]+ different prompts"):
        tasks.load("ioi-t1", model, n=10**9)


# ------------------------------------------------------------------------------------------- JSONL

SETS = {"clean": "Mary met", "corrupted": "Anna met", "right": [" John"], "wrong": [" Eva"]}
WORDS = "<unk> <s> ▁Mary ▁John ▁Anna ▁Paul ▁Eva ▁Luke ▁met ▁thanked ▁thank ▁New ▁York ▁Los ▁Angeles"


class Texts(nn.Module):
    """A model that is nothing but a tokenizer: a word with the space before it is one token."""

    def __init__(self) -> None:
        super().__init__()
        vocab = {word: index for index, word in enumerate(WORDS.split())}
        words = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Metaspace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")


def write(tmp_path, *records: dict | str):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def ids(text: str) -> tuple[int, ...]:
    return tuple(WORDS.split().index(f"▁{word}") for word in text.split())


def test_one_token_answers_are_read_at_the_last_position(tmp_path):
    pair = {
        "clean": "Mary met John thanked<predict> Mary</predict> met",
        "corrupted": "Anna met Paul thanked<predict> Eva</predict>",
    }
    task = tasks.from_jsonl(write(tmp_path, pair), Texts())
    assert rows(task.clean) == [ids("Mary met John thanked")] and task.name == "pairs"
    assert rows(task.corrupted) == [ids("Anna met Paul thanked")]
    assert rows(task.read_positions) == [(3,)] and not task.prepend_bos
    assert (rows(task.answers), rows(task.distractors)) == ([ids("Mary")], [ids("Eva")])


def test_longer_answers_are_teacher_forced(tmp_path):
    pair = {
        "clean": "Mary met <predict>New York</predict>",
        "corrupted": "Anna met <predict>Los Angeles</predict>",
    }
    untagged = pair | {"corrupted": "Anna met"}
    path = write(tmp_path, pair, "", untagged)
    task = tasks.from_jsonl(path, Texts(), prepend_bos=True)
    assert rows(task.clean) == [(1, *ids("Mary met New"))] * 2
    assert rows(task.corrupted) == [(1, *ids("Anna met Los")), (1, *ids("Anna met New"))]
    assert rows(task.read_positions) == [(2, 3)] * 2 and rows(task.answers) == [ids("New York")] * 2
    assert rows(task.distractors) == [ids("Los Angeles"), ()]


def test_sets_of_right_and_wrong_answers(tmp_path):
    """With tags and without; the sets' tokens are those that follow the prompt."""
    pair = {
        "clean": "Mary met John thanked ",
        "corrupted": "Anna met Paul thanked",
        "right": [" Mary", " Anna"],
        "wrong": [" John", " Paul", " Eva"],
    }
    marked = pair | {"clean": "Mary met John thanked <predict>Luke</predict>"}
    plain = {"clean": "Mary met<predict> John</predict>", "corrupted": "Anna met"}
    task = tasks.from_jsonl(write(tmp_path, pair, marked, plain), Texts(), prepend_bos=True)
    assert rows(task.clean[:2]) == [(1, *ids("Mary met John thanked"))] * 2
    assert rows(task.read_positions) == [(4,), (4,), (2,)]
    assert rows(task.right) == [ids("Mary Anna")] * 2 + [()]
    assert rows(task.wrong) == [ids("John Paul Eva")] * 2 + [()]
    assert rows(task.answers) == [(), ids("Luke"), ids("John")]


def test_a_file_with_sets_is_judged_by_probabilities_and_accuracy_among_them(tmp_path):
    pair = {"clean": "Mary met", "corrupted": "Anna met", "right": [" John"], "wrong": [" Eva"]}
    task = tasks.from_jsonl(write(tmp_path, pair), Texts())
    model = model_zoo.load("bridge-gpt2")
    graph = EdgeGraph.from_model(model)
    report = evaluate(model, Circuit(graph, torch.ones(graph.n_edges, dtype=torch.bool)), task)
    with torch.no_grad():
        probabilities = model(task.clean[0][None])[0, -1].softmax(-1)
    john, eva = (float(probabilities[ids(name)[0]]) for name in ("John", "Eva"))
    assert report.prob_diff == pytest.approx(john - eva, abs=1e-5)
    assert report.accuracy == float(john > eva)
    assert bool(discover(model, task, "eap", objective="prob-diff").tensor.abs().sum() > 0)


def test_lines_without_a_split_serve_every_split(tmp_path):
    line = {"clean": "Mary met<predict> John</predict>", "corrupted": "Anna met"}
    path = write(tmp_path, line | {"split": "train"}, line, line | {"split": "validation"})
    counts = [len(tasks.from_jsonl(path, Texts(), split=s)) for s in (None, "train", "validation")]
    assert counts == [3, 2, 2]
    path = write(tmp_path, line | {"split": "train"})
    with pytest.raises(ValueError, match="split='test'; splits found: train"):
        tasks.from_jsonl(path, Texts(), split="test")


def test_separator_characters_inside_a_text_do_not_end_the_line(tmp_path):
    line = (
        '{"clean": "Mary met<predict> John</predict>", "corrupted": "Anna met", "note": "\u2028"}'
    )
    assert len(tasks.from_jsonl(write(tmp_path, line, line), Texts())) == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not valid JSON"),
        ("[1]", "a JSON list, expected an object"),
        ({"clean": "Mary"}, '"corrupted" is None, expected a text'),
        (
            {"clean": "Mary met<predict> John</predict>", "corrupted": "Anna met", "split": 3},
            '"split" is 3, expected a text',
        ),
        ({"clean": "Mary met", "corrupted": "Anna met"}, "marks no answer"),
        ({**SETS, "wrong": "Eva"}, "\"wrong\" is 'Eva', expected a list of one or more texts"),
        ({**SETS, "right": []}, r'"right" is \[\], expected a list of one or more texts'),
        ({**SETS, "right": [3]}, r'"right" is \[3\], expected a list of one or more texts'),
        ({**SETS, "wrong": None}, 'Give both "right" and "wrong", or neither'),
        ({**SETS, "right": [" New York"]}, r'"right" has \' New York\', which is 2 tokens'),
        ({**SETS, "wrong": [" John"]}, 'whose token 3 is in "right" already'),
        ({**SETS, "right": ["ed"]}, "does not tokenise as prompt"),
        ({**SETS, "clean": "Mary met<predict> Eva</predict>"}, "answer ' Eva' is in \"wrong\""),
        (
            {**SETS, "clean": "Mary met<predict> New York</predict>"},
            "has 2 tokens, and .right. and .wrong. are for one read position",
        ),
        ({"clean": "a<predict>b<predict>c</predict></predict>", "corrupted": "x"}, "nested"),
        ({"clean": "a</predict>b<predict>", "corrupted": "x"}, "expected one <predict>"),
        ({"clean": "a<predict> </predict>", "corrupted": "x"}, "must not be empty"),
        ({"clean": "<predict>Mary</predict>", "corrupted": "x"}, "must not be empty"),
        (
            {"clean": "Mary thank<predict>ed</predict>", "corrupted": "Anna thank"},
            "does not tokenise as prompt",
        ),
        (
            {"clean": "Mary met<predict> John</predict>", "corrupted": "Anna Eva met"},
            "clean has 2 tokens and corrupted has 3",
        ),
        (
            {
                "clean": "Mary met<predict> New York Mary</predict>",
                "corrupted": "Anna met<predict> Eva</predict>",
            },
            "has 3 tokens and the corrupted one has 1",
        ),
        (
            {
                "clean": "Mary met<predict> Eva</predict>",
                "corrupted": "Anna met<predict> Eva</predict>",
            },
            "both texts mark the answer ' Eva'",
        ),
    ],
)
def test_what_cannot_be_read_names_its_line(tmp_path, line, message):
    good = {"clean": "Mary met<predict> John</predict>", "corrupted": "Anna met"}
    with pytest.raises(ValueError, match=f"line 2: .*({message})"):
        tasks.from_jsonl(write(tmp_path, good, line), Texts())


def test_an_empty_file_is_called_empty(tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"none.jsonl is empty: expected prompt pairs"):
        tasks.from_jsonl(path, Texts())


def test_an_answer_that_is_its_distractor_is_refused():
    prompts, last = [torch.tensor([1, 2, 3])] * 2, [torch.tensor([1, 2])] * 2
    same, other = torch.tensor([4, 5]), torch.tensor([4, 6])
    with pytest.raises(
        ValueError, match=r"prompt pair 1: the answer \[4, 5\] is also the distractor"
    ):
        tasks.Task("made", prompts, prompts, last, [same] * 2, [other, same])
    tasks.Task("made", prompts, prompts, last, [same] * 2, [other] * 2)  # they part at the second


def test_a_bos_that_the_tokenizer_has_not(tmp_path):
    path = write(tmp_path, {"clean": "Mary met<predict> John</predict>", "corrupted": "Anna met"})
    model = Texts()
    model.tokenizer.bos_token = None
    message = "line 1: prepend_bos=True, but the tokenizer has no BOS token: use False"
    with pytest.raises(ValueError, match=message):
        tasks.from_jsonl(path, model, prepend_bos=True)
    assert not tasks.from_jsonl(path, model).prepend_bos


def test_too_few_one_token_names_are_reported():
    tokenizer = Texts().tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # letters
    with pytest.raises(ValueError, match="has 0; it splits Aaron"):
        ioi.single_token_names(tokenizer)


def test_the_former_name_of_read_positions_still_works():
    prompts = [torch.tensor([1, 2, 3])]
    with pytest.warns(DeprecationWarning, match="positions is now called read_positions"):
        task = Task("former", prompts, prompts, positions=[torch.tensor([2])])
    with pytest.warns(DeprecationWarning, match="positions is now called read_positions"):
        assert rows(task.positions) == rows(task.read_positions) == [(2,)]
    batch = next(task.batches(1))
    with pytest.warns(DeprecationWarning):
        assert batch.positions.equal(batch.read_positions)
    read = [torch.tensor([1])]
    with pytest.warns(DeprecationWarning):
        assert rows(Task.aligned("b", prompts, prompts, positions=read).read_positions) == [(1,)]
    with pytest.raises(TypeError, match="are both given"):
        Task("both", prompts, prompts, read_positions=read, positions=read)
    model = models.load("tracr-reverse")
    tokens, last = torch.tensor([[3, 0, 1]]), torch.tensor([[2]])
    mask = torch.ones(EdgeGraph.from_model(model).n_edges)
    with pytest.warns(DeprecationWarning):
        with masked(model, mask, ablation="zero", positions=last):
            assert model(tokens).shape[1] == 1
