"""Prompt pairs: what a circuit is found and evaluated on.

A task is a list of pairs. The two prompts of a pair have the same length, because edge masks mix
the clean and the corrupted run position by position. Lengths may differ between pairs, so a batch
takes pairs of one shape, and prompts are never padded.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_edgeprune.graph.names import check_span_names
from tl_edgeprune.tasks.batch import NO_TOKEN, Batch
from tl_edgeprune.utils.renamed import renamed_argument, renamed_field, warn_of_former_name

Tokens = Sequence[Int[Tensor, " _pos"]]
PAIR_FIELDS = ("clean", "corrupted", "read_positions", "answers", "distractors")
SET_FIELDS = ("right", "wrong")
OPTIONAL_FIELDS = ("groups", "spans")  # one per pair, or none at all
REST = "rest"  # the span of tokens in no named span


@renamed_field("positions", "read_positions")
@dataclass(frozen=True, repr=False)
class Task:
    """Clean and corrupted prompts, the positions that are read, and the right answers.

    Args:
        name: what the task is called in results.
        clean, corrupted: token ids of each prompt [pos]; equal lengths within a pair.
        read_positions: positions of each prompt at which the logits are read [read], ascending. The
            argument and attribute `positions` are its former name.
        answers: the right token at each read position [read]. Empty (as a whole, or per pair) if
            the output is not a token.
        distractors: the token to compare the answer with, likewise; may be empty.
        right, wrong: sets of tokens [token] of any size, for tasks with many right answers (every
            later year): right and wrong at the pair's single read position. May be empty (as a
            whole, or per pair).
        objective: name of the loss that fits the task: "kl", "mse", "logit-diff", "log-prob" or
            "prob-diff".
        prepend_bos: whether the prompts begin with the tokenizer's BOS token (it is in `clean`).
        groups: a label per pair, such as its template; may be empty.
        span_names: names of spans of the prompt ("IO", "S1", …), for edges with a mask per span;
            may be empty.
        spans: the span of each token, as its index in span_names [pos].

    Raises:
        ValueError: no pairs; two lengths in a pair; positions out of range or not ascending;
            answers, distractors, groups or spans that are not aligned; a distractor that is the
            answer itself; sets of tokens that repeat or share a token, or for several read
            positions; spans without a name.
    """

    name: str
    clean: Tokens
    corrupted: Tokens
    read_positions: Tokens
    answers: Tokens = ()
    distractors: Tokens = ()
    objective: str = "kl"
    prepend_bos: bool = False
    groups: tuple[str, ...] = ()
    right: Tokens = ()
    wrong: Tokens = ()
    span_names: tuple[str, ...] = ()
    spans: Tokens = ()

    def __post_init__(self) -> None:
        if len(self.clean) == 0:
            raise ValueError(f"task {self.name!r} has no prompt pairs: at least one is needed.")
        for field in (*PAIR_FIELDS, *SET_FIELDS, "spans"):
            object.__setattr__(self, field, _as_long(getattr(self, field), field))
        for field in ("answers", "distractors", *SET_FIELDS):
            if not getattr(self, field):
                nothing = (torch.empty(0, dtype=torch.long),) * len(self)
                object.__setattr__(self, field, nothing)
        for field in ("groups", "span_names"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        check_span_names(self.span_names)
        _check_counts(self)
        for pair in range(len(self)):
            _check_pair(self, pair)
            _check_sets(self, pair)
            _check_spans(self, pair)

    @classmethod
    @renamed_argument("positions", "read_positions")
    def aligned(
        cls, name: str, clean: Tokens, corrupted: Tokens, read_positions: Tokens, **fields: Any
    ) -> Task:
        """A task of the pairs whose two prompts have equal lengths; the others are dropped.

        Takes the arguments of `Task`. Raises ValueError if no pair remains.
        """
        fields |= {"clean": clean, "corrupted": corrupted, "read_positions": read_positions}
        lengths = zip(map(len, clean), map(len, corrupted), strict=True)
        aligned = [pair for pair, (a, b) in enumerate(lengths) if a == b]
        for field in (*PAIR_FIELDS, *SET_FIELDS, *OPTIONAL_FIELDS):
            if len(fields.get(field, ())):
                fields[field] = tuple(fields[field][pair] for pair in aligned)
        return cls(name, **fields)

    @property
    def positions(self) -> Tokens:
        """The former name of `read_positions`."""
        warn_of_former_name("positions", "read_positions")
        return self.read_positions

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def metric(self) -> str:
        """The name (in `objectives`) of the measure for this task.

        "logit-diff" if every pair has one answer and one distractor, otherwise "prob-diff" if every
        pair has right and wrong tokens, otherwise the task's objective.
        """
        answer_pairs = zip(self.answers, self.distractors, strict=True)
        if all(len(answer) == len(distractor) == 1 for answer, distractor in answer_pairs):
            return "logit-diff"
        sets = zip(self.right, self.wrong, strict=True)
        has_sets = all(len(right) > 0 and len(wrong) > 0 for right, wrong in sets)
        return "prob-diff" if has_sets else self.objective

    def __getitem__(self, pairs: slice) -> Task:
        if not isinstance(pairs, slice):
            raise TypeError(
                f"task[{pairs!r}]: slice a task (task[:8] is a Task); one prompt is task.clean[i]."
            )
        return self.subset(range(len(self))[pairs])

    def __repr__(self) -> str:
        lengths = sorted({len(tokens) for tokens in self.clean})
        return (
            f"Task({self.name!r}, {len(self)} pairs of {lengths[0]} to {lengths[-1]} tokens, "
            f"objective={self.objective!r}, prepend_bos={self.prepend_bos})"
        )

    def subset(self, indices: Iterable[int]) -> Task:
        """The task with only these pairs, in this order."""
        indices = tuple(indices)
        fields: dict[str, Any] = {
            f: tuple(getattr(self, f)[i] for i in indices) for f in (*PAIR_FIELDS, *SET_FIELDS)
        }
        for field in OPTIONAL_FIELDS:
            values = getattr(self, field)
            fields[field] = tuple(values[i] for i in indices) if values else ()
        return replace(self, **fields)

    def split(self, share: float, seed: int = 0) -> tuple[Task, Task]:
        """Two tasks, the first with a random `share` of the pairs.

        Pairs with the same clean prompt stay together, so with repeated prompts the first task may
        be smaller than requested.

        Args:
            share: between 0 and 1.
            seed: of the random choice.

        Raises:
            ValueError: one side would be empty.
        """
        n_first = round(share * len(self))
        first: list[int] = []
        for same_prompt in _shuffled(self._pairs_by_prompt(), seed):
            if len(first) + len(same_prompt) <= n_first:
                first += same_prompt
        second = sorted(set(range(len(self))) - set(first))
        if not first or not second:
            raise ValueError(
                f"split({share}) of {self!r} leaves one side empty: use a share between 0 and 1, "
                f"and more different clean prompts ({len(self._pairs_by_prompt())} here)."
            )
        return self.subset(sorted(first)), self.subset(second)

    def batches(self, size: int, shuffle: bool = False, seed: int = 0) -> Iterator[Batch]:
        """Every pair once, in batches of at most `size` pairs of one shape.

        Args:
            size: the largest number of pairs in a batch.
            shuffle: shuffle the pairs of a shape, and the order of the batches.
            seed: of the shuffle.

        Raises:
            ValueError: `size` below 1.
        """
        if size < 1:
            raise ValueError(f"batches(size={size}): a batch needs at least one pair.")
        chunks = []
        for same_shape in self._pairs_by_shape():
            pairs = _shuffled(same_shape, seed) if shuffle else same_shape
            chunks += [pairs[i : i + size] for i in range(0, len(pairs), size)]
        return map(self._batch, _shuffled(chunks, seed) if shuffle else chunks)

    def _batch(self, pairs: list[int]) -> Batch:
        fields = {f: torch.stack([getattr(self, f)[i] for i in pairs]) for f in PAIR_FIELDS}
        right, wrong = (_padded([getattr(self, f)[i] for i in pairs]) for f in SET_FIELDS)
        spans = torch.stack([self.spans[i] for i in pairs]) if self.spans else None
        return Batch(**fields, indices=torch.tensor(pairs), right=right, wrong=wrong, spans=spans)

    def _pairs_by_prompt(self) -> list[list[int]]:
        return _grouped(tuple(tokens.tolist()) for tokens in self.clean)

    def _pairs_by_shape(self) -> list[list[int]]:
        fields = (getattr(self, field) for field in PAIR_FIELDS)
        return _grouped(tuple(map(len, pair)) for pair in zip(*fields, strict=True))


def _grouped(keys: Iterable[tuple]) -> list[list[int]]:
    """Indices of equal keys, in order of first appearance."""
    groups = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    return [*groups.values()]


def _shuffled(items: Sequence, seed: int) -> list:
    return random.Random(seed).sample(items, len(items))


def _padded(sets: list[Tensor]) -> Tensor | None:
    """Sets of tokens as rows, padded with NO_TOKEN; None if all are empty."""
    if not any(map(len, sets)):
        return None
    return torch.nn.utils.rnn.pad_sequence(sets, batch_first=True, padding_value=NO_TOKEN)


def _as_long(tensors: Sequence, field: str) -> tuple[Tensor, ...]:
    long = []
    for pair, tensor in enumerate(tensors):
        tensor = torch.as_tensor(tensor).cpu()
        if tensor.ndim != 1 or (len(tensor) and tensor.is_floating_point()):
            raise ValueError(
                f"{field}[{pair}] has shape {tuple(tensor.shape)} and type {tensor.dtype}: "
                "expected one dimension of integers."
            )
        long.append(tensor.long())
    return tuple(long)


def _check_counts(task: Task) -> None:
    for field in (*PAIR_FIELDS[1:], *SET_FIELDS, *OPTIONAL_FIELDS):
        count = len(getattr(task, field))
        needless = field == "groups" or (field == "spans" and not task.span_names)
        if count != len(task) and not (needless and count == 0):
            raise ValueError(
                f"task {task.name!r}: {len(task)} clean prompts, but {count} {field}: give one "
                "per pair."
            )


def _check_pair(task: Task, pair: int) -> None:
    clean, corrupted, read_positions = (
        task.clean[pair],
        task.corrupted[pair],
        task.read_positions[pair],
    )
    if len(clean) != len(corrupted):
        raise ValueError(
            f"prompt pair {pair}: clean has {len(clean)} tokens, corrupted has {len(corrupted)}. "
            "Edge masks mix the two runs position by position, so both must have the same length: "
            "change the prompt, or drop the pair with Task.aligned()."
        )
    in_range = (
        len(read_positions) and read_positions.min() >= 0 and read_positions.max() < len(clean)
    )
    if not in_range or (read_positions.diff() <= 0).any():
        raise ValueError(
            f"prompt pair {pair}: read positions {read_positions.tolist()}, expected one or more "
            f"rising positions from 0 to {len(clean) - 1} (the prompt has {len(clean)} tokens)."
        )
    for field in ("answers", "distractors"):
        count = len(getattr(task, field)[pair])
        if count not in (0, len(read_positions)):
            raise ValueError(
                f"prompt pair {pair}: {count} {field} for {len(read_positions)} read positions. "
                "Give one at each read position, or none."
            )
    answer, distractor = task.answers[pair], task.distractors[pair]
    if len(answer) and torch.equal(answer, distractor):
        raise ValueError(
            f"prompt pair {pair}: the answer {_short(answer.tolist())} is also the distractor: "
            "give another distractor, or drop the pair."
        )


def prompts_differ(task: Task) -> bool:
    """Whether the prompts of any pair differ; if not, counterfactual ablation has no effect."""
    pairs = zip(task.clean, task.corrupted, strict=True)
    return not all(torch.equal(clean, corrupted) for clean, corrupted in pairs)


def _check_sets(task: Task, pair: int) -> None:
    right, wrong = task.right[pair].tolist(), task.wrong[pair].tolist()
    tokens = right + wrong
    if not tokens:
        return
    if len(task.read_positions[pair]) != 1:
        raise ValueError(
            f"prompt pair {pair}: right and wrong tokens for {len(task.read_positions[pair])} read "
            "positions. Sets need exactly one: give answers to read several positions."
        )
    if min(tokens) < 0 or len(set(tokens)) < len(tokens):
        raise ValueError(
            f"prompt pair {pair}: right {_short(right)} and wrong {_short(wrong)}, expected token "
            "ids from 0 up, none of them twice or in both."
        )


def _check_spans(task: Task, pair: int) -> None:
    if not task.spans:
        return
    spans, length, names = task.spans[pair], len(task.clean[pair]), task.span_names
    if len(spans) != length or spans.min() < 0 or spans.max() >= len(names):
        raise ValueError(
            f"prompt pair {pair}: spans {_short(spans.tolist())} for {length} tokens, expected one "
            f"for each, from 0 to {len(names) - 1}: places in span_names ({', '.join(names)})."
        )


def lay_out_spans(
    marked: Sequence[Mapping[str, tuple[int, int]]], lengths: Sequence[int]
) -> dict[str, Any]:
    """Named spans of each prompt, {name: (start, end)} in tokens, as a Task's fields.

    A token in two spans belongs to the first, a token in none to REST. If no prompt has spans, no
    fields are returned.

    Raises:
        ValueError: only some prompts have spans.
    """
    without = [pair for pair, spans_of_pair in enumerate(marked) if not spans_of_pair]
    if len(without) == len(marked):
        return {}
    if without:
        raise ValueError(
            f"prompt pair {without[0]} has no spans, but others have: give spans for every pair."
        )
    names = [name for name in dict.fromkeys(chain.from_iterable(marked)) if name != REST]
    span_index = {name: number for number, name in enumerate([*names, REST])}
    spans = []
    for spans_of_pair, length in zip(marked, lengths, strict=True):
        row = torch.full((length,), span_index[REST])
        for name, (start, end) in reversed([*spans_of_pair.items()]):
            row[start:end] = span_index[name]
        spans.append(row)
    return {"span_names": tuple(span_index), "spans": spans}


def _short(tokens: list[int]) -> str:
    first_tokens = ", ".join(map(str, tokens[:8]))
    return f"[{first_tokens}{', …' if len(tokens) > 8 else ''}]"
