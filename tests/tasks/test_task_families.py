"""The tasks that are made of text: what holds for all of them, and that their answers are true."""

from __future__ import annotations

import ast
import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tokenizer_models

from tl_edgeprune import tasks
from tl_edgeprune.tasks.library import (
    boolean_expressions,
    capitals,
    gendered_pronoun,
    hypernymy,
    subject_verb_agreement,
)
from tl_edgeprune.tasks.recipe import Example, Recipe

NAMES = tuple(name for name in tasks.list() if not name.startswith(("tracr", "siit")))
FAMILIES = [(name, {}) for name in NAMES] + [
    ("arithmetic", {"operation": "minus"}),
    ("boolean-expressions", {"form": "few-shot", "shots": 2}),
    ("boolean-expressions", {"depth": 5}),
    ("hypernymy", {"form": "instruction"}),
    ("hypernymy", {"form": "few-shot", "shots": 2}),
    ("induction", {"length": 12}),
    ("mcqa", {"choices": 2}),
]
WITH_SETS = ("greater-than", "subject-verb-agreement")
family = pytest.mark.parametrize("name, options", FAMILIES, ids=lambda x: str(x).strip("{}"))
tokenised = pytest.mark.parametrize("kind", ["words", "digits"])
seeds = st.integers(0, 10_000)


def rows(tensors) -> list[tuple[int, ...]]:
    return [tuple(tensor.tolist()) for tensor in tensors]


def contents(task) -> list:
    fields = ("clean", "corrupted", "read_positions", "answers", "distractors", "right", "wrong")
    return [rows(getattr(task, field)) for field in fields] + [task.groups]


def recipe_of(name: str, kind: str = "words", **options) -> Recipe:
    """What `tasks.load` makes its pairs with."""
    return tasks.registry.BUILDERS[name].__wrapped__(
        tokenizer_models.load(kind).tokenizer, **options
    )


def examples(name: str, n: int, kind: str = "words", **options) -> list[Example]:
    recipe, generator = recipe_of(name, kind, **options), random.Random(1)
    numbers = generator.sample(range(recipe.count), n)
    return [recipe.make(number, generator) for number in numbers]


# -------------------------------------------------------------------------------------- all of them


@family
@tokenised
@settings(max_examples=2)
@given(seed=seeds, n=st.integers(2, 24))
def test_pairs_are_of_one_length_and_read_at_the_end(name, options, kind, seed, n):
    model = tokenizer_models.load(kind)
    task = tasks.load(name, model, n, seed, **options)
    assert len(task) == len(set(rows(task.clean))) == n
    assert all(len(a) == len(b) for a, b in zip(task.clean, task.corrupted, strict=True))
    assert all(a != b for a, b in zip(rows(task.clean), rows(task.corrupted), strict=True))
    assert rows(task.read_positions) == [(len(tokens) - 1,) for tokens in task.clean]
    assert all(task.groups) and task.objective == "kl" and not task.prepend_bos
    expected = "prob-diff" if name in WITH_SETS else "logit-diff"
    assert task.metric == expected
    for answer, distractor, right, wrong in zip(*contents(task)[3:7], strict=True):
        assert not set(right) & set(wrong)
        if name in WITH_SETS:
            assert not answer and not distractor and right and wrong
        else:
            assert len(answer) == len(distractor) == 1 and answer != distractor
            assert (right, set(distractor) <= set(wrong)) == (answer, True) or not right + wrong


@family
def test_a_seed_is_a_task(name, options):
    model = tokenizer_models.load("words")
    task = tasks.load(name, model, 20, 3, **options)
    assert contents(task) == contents(tasks.load(name, model, 20, 3, **options))
    assert contents(task) != contents(tasks.load(name, model, 20, 4, **options))


@family
def test_a_thousand_prompts_differ_and_more_than_there_are_is_refused(name, options):
    n = 200 if options else 1000
    assert len({example.clean for example in examples(name, n, **options)}) == n
    count = recipe_of(name, **options).count
    for make in (tasks.load, tasks.stream):
        with pytest.raises(ValueError, match=f"only {count:,} different prompts can be made"):
            make(name, tokenizer_models.load("words"), count + 1, **options)


@family
def test_streams_go_by_place(name, options):
    stream = replace(
        tasks.stream(name, tokenizer_models.load("digits"), 30, 1, **options), chunk_size=10
    )
    other = replace(stream, chunk_size=15).chunk(1)
    assert contents(stream.chunk(2)) == contents(other.subset(range(5, 15)))
    again = tasks.stream(name, tokenizer_models.load("digits"), 30, 2, **options)
    assert stream.identity != again.identity


def test_bos_is_prepended_where_asked():
    model = tokenizer_models.load("words")
    for name in NAMES:
        plain, with_bos = (tasks.load(name, model, 3, prepend_bos=bos) for bos in (None, True))
        bos = model.tokenizer.bos_token_id
        assert rows(with_bos.clean) == [(bos, *tokens) for tokens in rows(plain.clean)]
        assert rows(with_bos.corrupted) == [(bos, *tokens) for tokens in rows(plain.corrupted)]
        assert rows(with_bos.read_positions) == [(p + 1,) for (p,) in rows(plain.read_positions)]
        assert contents(plain)[3:] == contents(with_bos)[3:] and with_bos.prepend_bos


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ioi", {"form": "few-shot"}, r"load\('ioi'\): no option form; it has none"),
        ("mcqa", {"n_choices": 3}, "no option n_choices; its options are choices"),
        ("mcqa", {"choices": 1}, "choices=1, expected 2 to 12"),
        ("arithmetic", {"operation": "times"}, "'times'.*expected 'plus', 'minus' or 'both'"),
        ("arithmetic", {"digits": 3}, "1 or 2 digits"),
        ("boolean-expressions", {"form": "chat"}, "form='chat'.*'instruction' or 'few-shot'"),
        ("boolean-expressions", {"depth": 0}, "depth 1 to 6"),
        ("boolean-expressions", {"shots": 0}, "at least one shot"),
        ("induction", {"length": 4}, "length=4, expected 5 to 20"),
    ],
)
def test_options_that_are_not_there(name, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.load(name, tokenizer_models.load("words"), 4, **options)


# -------------------------------------------------------------------------- words of several tokens


@pytest.mark.parametrize("name", NAMES)
def test_split_words_work_or_are_refused(name):
    """Where answers have to be one token, the error says what is split."""
    try:
        task = tasks.load(name, tokenizer_models.load("pieces"), 40)
    except ValueError as error:
        assert re.search("this tokenizer (has|writes|splits)", str(error)), error
        assert name not in ("gendered-pronoun", "capitals", "arithmetic", "greater-than")
    else:
        assert rows(task.answers) != rows(task.distractors) or name in WITH_SETS


def test_what_answers_begin_with_alike_goes_to_the_prompts():
    tokenizer = tokenizer_models.load("digits").tokenizer
    example = Example("group", "3 and 4", "5 and 2", answer=" 17", distractor=" 16")
    task = tasks.recipe.task_of("name", [example], tokenizer, False)
    assert tokenizer.decode(task.clean[0]) == "3 and 4 1"
    assert tokenizer.decode(task.corrupted[0]) == "5 and 2 1"
    assert tokenizer.decode([*task.answers[0], *task.distractors[0]]) == "76"
    same = example._replace(distractor=" 1")
    with pytest.raises(ValueError, match="' 17' and distractor ' 1' have no token that"):
        tasks.recipe.task_of("name", [same], tokenizer, False)


def test_years_in_other_pieces_are_refused():
    with pytest.raises(ValueError, match=r"17\|42.*this tokenizer writes 'in 1742' as"):
        tasks.load("greater-than", three_digits(), 4)


def three_digits() -> tokenizer_models.Reader:
    """Writes 1742 as 174|2."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [str(n) for n in range(1000)] + [f"{n:02}" for n in range(10)] + ["<unk>"]
    numbers = Tokenizer(models.WordLevel({t: i for i, t in enumerate(texts)}, unk_token="<unk>"))
    numbers.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}|\D+"), "isolated")
    return tokenizer_models.Reader(
        PreTrainedTokenizerFast(tokenizer_object=numbers, unk_token="<unk>")
    )


# ----------------------------------------------------------------------------- the answers are true


def truth(text: str) -> bool:
    """The value of a Boolean expression, by Python's own reading of it."""
    allowed = (ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.Constant)
    tree = ast.parse(text, mode="eval")
    assert all(isinstance(node, allowed) for node in ast.walk(tree)), text
    return eval(compile(tree, "expression", "eval"), {"__builtins__": {}})


def nesting(text: str) -> int:
    """How deep brackets go."""
    depths, depth = [0], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        depths.append(depth)
    assert depth == 0 and min(depths) == 0, text
    return max(depths)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_expressions_of_a_depth_are_all_different_and_half_are_true(depth):
    count = boolean_expressions.count(depth)
    numbers = range(count) if count < 1000 else random.Random(0).sample(range(count), 1000)
    texts = [str(boolean_expressions.expression(number, depth)) for number in numbers]
    assert len(set(texts)) == len(texts)
    assert all(nesting(text) == depth - 1 for text in texts)
    values = [truth(text) for text in texts]
    assert abs(sum(values) / len(values) - 0.5) < (1e-9 if len(values) == count else 0.08)


def test_boolean_expressions_have_pythons_values():
    for options in ({}, {"form": "few-shot", "shots": 3}, {"depth": 6}):
        made = examples("boolean-expressions", 60, **options)
        for example in made:
            for text, answer in (
                (example.clean, example.answer),
                (example.corrupted, example.distractor),
            ):
                if "form" in options:
                    *shots, last = text.split("\n")
                    solved = [re.fullmatch("(.*) is (True|False)", shot).groups() for shot in shots]
                    assert [str(truth(e)) for e, _ in solved] == [value for _, value in solved]
                    assert len(shots) == 3 and last.removesuffix(" is") not in dict(solved)
                    expression = last.removesuffix(" is")
                else:
                    expression = re.search("Expression: (.*)\nAnswer:$", text)[1]
                assert f" {truth(expression)}" == answer
            assert example.answer != example.distractor
            shapes = (
                re.sub("True|False", "x", re.sub(r"\b(and|or)\b", "op", text))
                for text in (example.clean, example.corrupted)
            )
            assert len(set(shapes)) == 1
        assert 15 < sum(example.answer == " True" for example in made) < 45


@tokenised
def test_sums_and_differences(kind):
    task = tasks.load("arithmetic", tokenizer_models.load(kind), 60, seed=2)
    decode = tokenizer_models.load(kind).tokenizer.decode
    for clean, corrupted, answer, distractor in zip(
        *contents(task)[:2], *contents(task)[3:5], strict=True
    ):
        for prompt, token in ((clean, answer), (corrupted, distractor)):
            a, sign, b = re.search(r"(\d+) (\+|-|plus|minus) (\d+)", decode(prompt)).groups()
            result = str(int(a) + int(b) if sign in ("+", "plus") else int(a) - int(b))
            assert len(a) == len(b) == len(result) == 2
            assert decode(token).strip() == (result if kind == "words" else result[0])


def test_one_digit_sums():
    for example in examples("arithmetic", 100, digits=1):
        assert len(example.answer) == len(example.distractor) == 2
    assert recipe_of("arithmetic", digits=1, operation="plus").count == 3 * 36  # 1 to 9 both


@tokenised
def test_years_end_after_they_begin(kind):
    task = tasks.load("greater-than", tokenizer_models.load(kind), 60)
    decode = tokenizer_models.load(kind).tokenizer.decode
    for clean, corrupted, right, wrong in zip(
        *contents(task)[:2], *contents(task)[5:7], strict=True
    ):
        century, start, again = re.search(r"(\d\d)(\d\d)\D+(\d\d)$", decode(clean)).groups()
        assert century == again and re.search(rf"{century}01\D+{century}$", decode(corrupted))
        later, earlier = ({decode([token]) for token in tokens} for tokens in (right, wrong))
        years = {f"{year:02}" for year in range(100)}
        if kind == "words":
            assert later == {year for year in years if year > start} and earlier == years - later
        else:  # every year of a right decade is later, of a wrong one earlier
            assert later == {year[0] for year in years} - {y[0] for y in years if y <= start} - {
                start[0]
            }
            assert earlier == {d for d in "0123456789" if f"{d}9" < start}


def test_verbs_have_their_subjects_number():
    model = tokenizer_models.load("words")
    task = tasks.load("subject-verb-agreement", model, 100)
    decode = model.tokenizer.decode
    for clean, corrupted, right, wrong in zip(
        *contents(task)[:2], *contents(task)[5:7], strict=True
    ):
        subjects = [
            re.match(r"Look: the (\w+) ", decode(tokens))[1] for tokens in (clean, corrupted)
        ]
        singular, plural = sorted(subjects, key=len)
        assert plural == f"{singular}s" and singular in subject_verb_agreement.NOUNS
        sets = [{decode([token]) for token in tokens} for tokens in (right, wrong)]
        verbs = [{" is", " was", " has", " does"}, {" are", " were", " have", " do"}]
        assert sets == (verbs if subjects[0] == singular else verbs[::-1])
        assert sum(a != b for a, b in zip(clean, corrupted, strict=True)) == 1
    assert len(set(task.groups)) == 4


def test_docstrings_describe_the_third_argument_next():
    for example in examples("docstring", 60):
        definitions = [
            ast.parse(f'{text} x: y"""').body[0] for text in (example.clean, example.corrupted)
        ]
        arguments, others = ([a.arg for a in d.args.args[1:]] for d in definitions)
        described = re.findall(r":param (\w+):", example.clean)
        assert described == arguments[:2] and f" {arguments[2]}" == example.answer
        assert f" {arguments[3]}" == example.distractor and not set(arguments) & set(others)
        assert ast.get_docstring(definitions[0]) == ast.get_docstring(definitions[1])


def test_induction_repeats_what_followed_the_last_word():
    for example in examples("induction", 60, length=7):
        words, others = (text.split()[1:] for text in (example.clean, example.corrupted))
        before = words.index(words[-1])
        assert before < len(words) - 1 and f" {words[before + 1]}" == example.answer
        assert f" {words[before + 1]}" != example.distractor and example.distractor[1:] in words
        assert others.index(others[-1]) == len(others) - 1  # nothing was seen before
        assert len(set(words[:7])) == 7 and not set(words[:7]) & set(others[:7])
        assert words[7:] == others[7:] == words[: len(words) - 7]


def test_letters_name_the_colour():
    for example in examples("mcqa", 60, choices=5):
        listed = []
        for text, answer in (
            (example.clean, example.answer),
            (example.corrupted, example.distractor),
        ):
            choices = dict(re.findall(r"^([A-Z])\. (\w+)$", text, re.MULTILINE))
            assert [*choices] == [*"ABCDE"] and len({*choices.values()}) == 5
            question = text.splitlines()[0]
            named = [letter for letter, colour in choices.items() if f" {colour}" in question]
            assert named == [answer.strip()]
            listed.append(sorted(choices.values()))
        assert listed[0] == listed[1] and len(example.wrong) == 4


def test_pronouns_go_with_names():
    everyone = gendered_pronoun.GIRLS + gendered_pronoun.BOYS
    for example in examples("gendered-pronoun", 100):
        for text, pronoun in (
            (example.clean, example.answer),
            (example.corrupted, example.distractor),
        ):
            named = {*re.findall(r"\w+", text)} & {*everyone}
            assert len(named) == 1 and named <= {*gendered_pronoun.PRONOUNS[pronoun.strip()]}
    assert len({*everyone}) == len(everyone)


def test_kinds_do_not_overlap():
    members = [word for words in hypernymy.KINDS.values() for word in words.split()]
    assert len(set(members)) == len(members) and not set(members) & hypernymy.KINDS.keys()
    for example in examples("hypernymy", 60):
        for text, kind in (
            (example.clean, example.answer),
            (example.corrupted, example.distractor),
        ):
            named = [word for word in re.findall(r"\w+", text) if word in members]
            assert len(set(named)) == 2 and {*named} <= {*hypernymy.KINDS[kind.strip()].split()}
        assert example.answer != example.distractor


def test_forms_of_hypernymy_ask_the_same_and_show_other_kinds():
    asked, shown = (examples("hypernymy", 60, form=form) for form in ("instruction", "few-shot"))
    assert {e.clean.split("\n")[-1] for e in asked} == {e.clean.split("\n")[-1] for e in shown}
    assert all(e.clean.startswith("Say what kind of things these are.\nBoth") for e in asked)
    for example in shown:
        *shots, query = example.clean.split("\n")
        *same, other = example.corrupted.split("\n")
        assert shots == same and len(shots) == 3 and query != other
        kinds = []
        for line in shots:
            a, b, kind = re.fullmatch(r"Both (\w+) and (\w+) are (\w+)", line).groups()
            assert {a, b} <= {*hypernymy.KINDS[kind].split()}
            kinds.append(f" {kind}")
        assert len({*kinds, example.answer, example.distractor}) == 5
    for options in ({"form": "chat"}, {"form": "few-shot", "shots": 0}):
        with pytest.raises(ValueError, match="expected form 'sentence', 'instruction', 'few-shot'"):
            recipe_of("hypernymy", **options)
    with pytest.raises(ValueError, match="and 18 are needed"):
        recipe_of("hypernymy", form="few-shot", shots=16)


def test_capitals_are_of_one_country_each():
    cities = [*capitals.CAPITALS.values()]
    assert len(set(cities)) == len(cities)
    assert not any(country in city for country, city in capitals.CAPITALS.items())
    for example in examples("capitals", 60):
        for text, city in (
            (example.clean, example.answer),
            (example.corrupted, example.distractor),
        ):
            named = [c for c in capitals.CAPITALS if re.search(rf"\b{c}\b", text)]
            assert [capitals.CAPITALS[country] for country in named] == [city.strip()]
