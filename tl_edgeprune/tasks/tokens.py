"""From text to token ids: decides about BOS and tokenises answers in context."""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tl_edgeprune.models.quiet import quiet


class Part(NamedTuple):
    """A named part of a text, in characters."""

    name: str
    start: int
    end: int


def filled(template: str, **values: str) -> tuple[str, dict[str, list[Part]]]:
    """template.format(**values), and every span of each field's value."""
    text, spans = "", defaultdict(list)
    for literal, field, _, _ in string.Formatter().parse(template):
        text += literal
        if field is not None:
            start = len(text)
            text += values[field]
            spans[field].append(Part(field, start, len(text)))
    return text, spans


def tokenizer_of(model: nn.Module) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ValueError if it has none."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"this {type(model).__name__} has no tokenizer, but the task consists of text: give "
            "the model one, or build a Task from token ids yourself."
        )
    return tokenizer


def resolve_prepend_bos(model: nn.Module, prepend_bos: bool | None) -> bool:
    """Whether prompts begin with BOS; None means as the model's tokenizer does by default.

    TransformerLens reloads tokenizers with BOS switched on, so the published tokenizer decides.
    """
    if prepend_bos is not None:
        return prepend_bos
    tokenizer = tokenizer_of(model)
    ids = _as_published(tokenizer)("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _as_published(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if not tokenizer.name_or_path:
        return tokenizer
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    except (OSError, ValueError):  # its files are gone: use the loaded one
        return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str, prepend_bos: bool) -> list[int]:
    """Token ids of a text, with BOS if requested and no other special token."""
    return encode_parts(tokenizer, text, prepend_bos, ())[0]


def encode_parts(
    tokenizer: PreTrainedTokenizerBase, text: str, prepend_bos: bool, parts: Iterable[Part]
) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """`encode`, and the range of tokens [start, end) that covers each part.

    No parts if the tokenizer does not report character offsets (slow tokenizers, in Python).
    """
    encoded = tokenizer(text, add_special_tokens=False)
    ids, token_spans = encoded["input_ids"], {}
    for part in parts if encoded.is_fast else ():
        tokens = [encoded.char_to_token(at) for at in range(part.start, part.end)]
        token_indices = [token + prepend_bos for token in tokens if token is not None]
        token_spans[part.name] = (min(token_indices), max(token_indices) + 1)
    return _with_bos(tokenizer, ids, prepend_bos), token_spans


def _with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int], prepend_bos: bool) -> list[int]:
    if not prepend_bos:
        return ids
    if tokenizer.bos_token_id is None:
        raise ValueError("prepend_bos=True, but the tokenizer has no BOS token: use False.")
    return [tokenizer.bos_token_id, *ids]


def answers_in_context(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Iterable[str]
) -> dict[str, list[int]]:
    """`answer_in_context` for many answers to one prompt at once.

    Answers that merge with the prompt or contain the tokenizer's unknown token are left out.
    """
    answers = [*answers]
    texts = [prompt, *(prompt + answer for answer in answers)]
    prompt_ids, *ids_of_texts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {
        answer: ids[len(prompt_ids) :]
        for answer, ids in zip(answers, ids_of_texts, strict=True)
        if ids[: len(prompt_ids)] == prompt_ids
        and len(ids) > len(prompt_ids)
        and tokenizer.unk_token_id not in ids[len(prompt_ids) :]
    }


def answer_in_context(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> list[int]:
    """The tokens that `answer` adds after `prompt`: not always those of the answer by itself.

    Raises:
        ValueError: the tokens of prompt + answer do not begin with the prompt's (the tokenizer
            merges across the border), or the answer adds no token.
    """
    prompt_ids = encode(tokenizer, prompt, prepend_bos=False)
    ids = encode(tokenizer, prompt + answer, prepend_bos=False)
    if ids[: len(prompt_ids)] != prompt_ids or len(ids) == len(prompt_ids):
        pieces = [tokenizer.decode([token]) for token in ids[max(0, len(prompt_ids) - 1) :]]
        raise ValueError(
            f"answer {answer!r} does not tokenise as prompt + answer: after {prompt[-40:]!r} the "
            f"tokens continue as {pieces}. Move the border between prompt and answer to the end of "
            "a token (a space usually belongs to the answer)."
        )
    return ids[len(prompt_ids) :]
