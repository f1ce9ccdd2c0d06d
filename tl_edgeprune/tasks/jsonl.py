"""Your own prompt pairs: one JSON object per line, the format of the Edge Pruning code.

    {"clean": "Mary met John. John thanked<predict> Mary</predict>",
     "corrupted": "Anna met Paul. Luke thanked<predict> Eva</predict>", "split": "train"}

1. The text between the tags is the answer. Its k tokens give k read positions: each is the position
   that predicts the token, with the answer's earlier tokens before it (targets forcing). A space
   before the opening tag belongs to the answer. What follows the closing tag is dropped: a causal
   model does not see it from there.
2. The corrupted text may also mark an answer: its tokens are the distractors if there are as many.
   Without tags, the corrupted text is what precedes the answer, and the clean answer follows it.
3. Both texts must have the same number of tokens before the answer.
4. If several answers are right, "right" and "wrong" list them, each as it follows the prompt and of
   one token: {"clean": "The war lasted from 1742 to 17", …, "right": ["43"], "wrong": ["01", "02"]}
   Such a line needs no tags (both texts then end where the answer begins), but may have them.
5. Named spans of the prompt, for edges with a mask per span: {…, "spans": {"name": [1, 3]}}, from a
   first token up to, but not including, a last one, counted as the model receives them (with BOS).
   If one line has spans, all must. Tokens in no named span form the span "rest".
6. A line with "split" belongs to that split; a line without belongs to every split.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tl_edgeprune.graph.names import check_span_names
from tl_edgeprune.tasks.task import SET_FIELDS, Task, lay_out_spans
from tl_edgeprune.tasks.tokens import (
    answer_in_context,
    encode,
    resolve_prepend_bos,
    tokenizer_of,
)
from tl_edgeprune.utils.reading import parse_json, read_text

OPEN, CLOSE = "<predict>", "</predict>"


class Text(NamedTuple):
    """A text cut at its answer; the answer is None if no tags mark one."""

    prompt: str
    answer: str | None


class Encoded(NamedTuple):
    prompt: list[int]
    answer: list[int]


def from_jsonl(
    path: str | Path, model: nn.Module, *, prepend_bos: bool | None = None, split: str | None = None
) -> Task:
    """A task from a file of prompt pairs (the module's docstring describes the format).

    Args:
        path: the file, UTF-8; empty lines are skipped.
        model: its tokenizer reads the texts.
        prepend_bos: None means as the model's tokenizer does by default.
        split: only the lines of this split and those without one; None takes all lines.

    Raises:
        ValueError: with the file and the line: no JSON object, a missing key, no answer or more
            than one, an answer that merges with the prompt or is also the corrupted text's, texts
            of different lengths, right and wrong texts that are not one token each, repeat or
            overlap, or spans outside the prompt or overlapping.
    """
    path = Path(path)
    lines = enumerate(read_text(path, "file of prompt pairs").split("\n"), start=1)
    entries = ((f"line {number}", line) for number, line in lines if line.strip())
    pairs, prepend_bos = read_pairs(str(path), entries, record_of, model, prepend_bos, split)
    return task_of(path.stem, pairs, prepend_bos, str(path))


def read_pairs(
    source: str,
    entries: Iterable[tuple[str, Any]],
    parse: Callable[[Any], dict[str, Any]],
    model: nn.Module,
    prepend_bos: bool | None,
    split: str | None,
) -> tuple[list[dict[str, Any]], bool]:
    """Encoded pairs of a split, and whether they begin with BOS.

    Args:
        source: its name, for errors.
        entries: (location in the source, for errors; entry).
        parse: makes a checked record of an entry.
        model, prepend_bos, split: as for `from_jsonl`.

    Raises:
        ValueError: with source and location, as `from_jsonl` does.
    """
    tokenizer, prepend_bos = tokenizer_of(model), resolve_prepend_bos(model, prepend_bos)
    pairs, splits = [], set()
    for location, entry in entries:
        try:
            record = parse(entry)
            splits.add(record.get("split"))
            if split is None or record.get("split") in (None, split):
                pairs.append(encode_pair(record, tokenizer, prepend_bos))
        except ValueError as error:
            raise ValueError(f"{source}, {location}: {error}") from error
    if not splits:
        raise ValueError(
            f'{source} is empty: expected prompt pairs, each a record of "clean" and "corrupted".'
        )
    if not pairs:
        names = ", ".join(sorted(map(str, splits))) or "none"
        raise ValueError(f"{source}: no prompt pairs for split={split!r}; splits found: {names}.")
    return pairs, prepend_bos


def task_of(name: str, pairs: list[dict[str, Any]], prepend_bos: bool, source: str) -> Task:
    """Encoded pairs as a task. source: where they were read from, for errors."""
    fields: dict[str, Any] = {field: [pair[field] for pair in pairs] for field in pairs[0]}
    try:
        fields |= lay_out_spans(fields.pop("spans"), [*map(len, fields["clean"])])
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return Task(name, **fields, prepend_bos=prepend_bos)


def record_of(line: str) -> dict[str, Any]:
    """A line's JSON object. Raises ValueError if it is not one, or lacks a text."""
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{error}.") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object.")
    if r"\ud" in line.lower():
        json.dumps(
            record, ensure_ascii=False
        ).encode()  # raises ValueError for an unpaired surrogate
    return checked_record(record)


def checked_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record. Raises ValueError if it lacks a text."""
    for key in ("clean", "corrupted"):
        if not isinstance(record.get(key), str):
            raise ValueError(f'"{key}" is {record.get(key)!r:.200}, expected a text.')
    if not isinstance(record.get("split"), str | None):
        raise ValueError(f'"split" is {record["split"]!r:.200}, expected a text.')
    return record


def encode_pair(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, prepend_bos: bool
) -> dict[str, Any]:
    """A record's token ids and spans, by a Task's fields.

    Raises:
        ValueError: the texts do not form a pair.
    """
    text = cut(record["clean"])
    sets = _sets(record, tokenizer, text.prompt)
    if text.answer is None and not sets["right"]:
        raise ValueError(
            f'"clean" marks no answer: put it between {OPEN} and {CLOSE}, or list "right" and '
            '"wrong" ones.'
        )
    clean = _encoded(tokenizer, text, prepend_bos)
    corrupted = _encoded(tokenizer, cut(record["corrupted"]), prepend_bos)
    _check_lengths(clean, corrupted)
    if sets["right"]:
        _check_marked(clean.answer, text.answer, sets)
    forced = max(0, len(clean.answer) - 1)
    read_positions = torch.arange(len(clean.prompt) - 1, len(clean.prompt) + forced)
    same_count = len(corrupted.answer) == len(clean.answer)
    if clean.answer and clean.answer == corrupted.answer:
        raise ValueError(
            f"both texts mark the answer {text.answer!r}, so it equals its distractor: "
            'mark another one in "corrupted", or none.'
        )
    tokens = clean.prompt + clean.answer[:forced]
    return {
        "clean": torch.tensor(tokens),
        "corrupted": torch.tensor(corrupted.prompt + (corrupted.answer or clean.answer)[:forced]),
        "read_positions": read_positions,
        "answers": torch.tensor(clean.answer, dtype=torch.long),
        "distractors": torch.tensor(corrupted.answer if same_count else [], dtype=torch.long),
        **{name: torch.tensor(tokens, dtype=torch.long) for name, tokens in sets.items()},
        "spans": _spans(record.get("spans"), len(tokens)),
    }


def _sets(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, prompt: str
) -> dict[str, list[int]]:
    """The tokens of "right" and "wrong" after the prompt; none if the line has neither."""
    if not any(name in record for name in SET_FIELDS):
        return {name: [] for name in SET_FIELDS}
    owner: dict[int, str] = {}
    for name in SET_FIELDS:
        texts = record.get(name)
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(
                f'"{name}" is {texts!r}, expected a list of one or more texts. Give both "right" '
                'and "wrong", or neither.'
            )
        for text in texts:
            tokens = answer_in_context(tokenizer, prompt, text)
            if len(tokens) > 1:
                pieces = [tokenizer.decode([token]) for token in tokens]
                raise ValueError(
                    f'"{name}" has {text!r}, which is {len(tokens)} tokens after the prompt '
                    f"({pieces}), expected one: give the text of its first token, or omit it."
                )
            if tokens[0] in owner:
                raise ValueError(
                    f'"{name}" has {text!r}, whose token {tokens[0]} is in "{owner[tokens[0]]}" '
                    "already: give each token once, as right or as wrong."
                )
            owner[tokens[0]] = name
    return {name: [token for token, its in owner.items() if its == name] for name in SET_FIELDS}


def _spans(spans: Any, length: int) -> dict[str, tuple[int, int]]:
    """A record's "spans", {name: (start, end)} in tokens. Raises ValueError for invalid ones."""
    if spans is None:
        return {}
    if not isinstance(spans, dict) or not spans:
        raise ValueError(f'"spans" is {spans!r}, expected {{"name": [start, end], …}} in tokens.')
    check_span_names(tuple(spans))
    name_of_token: dict[int, str] = {}
    for name, ends in spans.items():
        is_pair = (
            isinstance(ends, list) and len(ends) == 2 and all(type(end) is int for end in ends)
        )
        if not is_pair or not 0 <= ends[0] < ends[1] <= length:
            raise ValueError(
                f'"spans" has {name!r}: {ends!r}, expected [start, end] with 0 <= start < end <= '
                f"{length}, the prompt's tokens."
            )
        overlapping = [at for at in range(*ends) if name_of_token.setdefault(at, name) != name]
        if overlapping:
            raise ValueError(
                f'"spans": token {overlapping[0]} is in {name_of_token[overlapping[0]]!r} and in '
                f"{name!r}; each token belongs to one span."
            )
    return {name: (start, end) for name, (start, end) in spans.items()}


def _check_marked(answer: list[int], text: str | None, sets: dict[str, list[int]]) -> None:
    """Raise ValueError for a marked answer that does not fit the sets of tokens."""
    if len(answer) > 1:
        raise ValueError(
            f'the answer {text!r} has {len(answer)} tokens, and "right" and "wrong" are for one '
            "read position: mark one token, or none."
        )
    if answer and answer[0] in sets["wrong"]:
        raise ValueError(f'the marked answer {text!r} is in "wrong": it should be right.')


def cut(text: str) -> Text:
    """Cut a text at its answer; spaces before the opening tag belong to the answer.

    Raises:
        ValueError: tags that are nested, repeated, unbalanced, or with nothing inside or before.
    """
    if OPEN not in text and CLOSE not in text:
        return Text(text.rstrip(" "), None)
    prompt, _, after_opening = text.partition(OPEN)
    answer = after_opening.partition(CLOSE)[0]
    balanced = text.count(OPEN) == text.count(CLOSE) == 1 and CLOSE not in prompt
    if not balanced:
        raise ValueError(
            f"expected one {OPEN} and one {CLOSE} after it, not nested or repeated, in {text!r}."
        )
    if not answer.strip() or not prompt.strip():
        raise ValueError(f"the answer and the prompt before it must not be empty in {text!r}.")
    spaces = prompt[len(prompt.rstrip(" ")) :]
    return Text(prompt.rstrip(" "), spaces + answer)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: Text, prepend_bos: bool) -> Encoded:
    answer = [] if text.answer is None else answer_in_context(tokenizer, text.prompt, text.answer)
    return Encoded(encode(tokenizer, text.prompt, prepend_bos), answer)


def _check_lengths(clean: Encoded, corrupted: Encoded) -> None:
    if len(clean.prompt) != len(corrupted.prompt):
        raise ValueError(
            f"before the answer, clean has {len(clean.prompt)} tokens and corrupted has "
            f"{len(corrupted.prompt)}. Edge masks mix the two runs position by position: change "
            f"one text, and mark the corrupted text's answer with {OPEN} too if it holds one."
        )
    if corrupted.answer and len(corrupted.answer) < len(clean.answer) - 1:
        raise ValueError(
            f"the clean answer has {len(clean.answer)} tokens and the corrupted one has "
            f"{len(corrupted.answer)}, too few to align with it: choose answers of the same "
            "length, or omit the corrupted answer."
        )
