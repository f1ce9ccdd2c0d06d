"""Models that are nothing but a tokenizer: byte-level BPE, trained on the words of all tasks.

`words`: every word and two digits are a token each. `digits`: words, and single digits. `pieces`:
most words are several tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedTokenizerFast

from tl_edgeprune.tasks.library import (
    arithmetic,
    boolean_expressions,
    capitals,
    docstring,
    gendered_pronoun,
    greater_than,
    hypernymy,
    induction,
    ioi,
    mcqa,
    subject_verb_agreement,
)

MODULES = (
    *(arithmetic, boolean_expressions, capitals, docstring, gendered_pronoun, greater_than),
    *(hypernymy, induction, ioi, mcqa, subject_verb_agreement),
)
DIGITS = {"words": r" ?\d\d?", "digits": r"\d", "pieces": r" ?\d\d?"}
KINDS = tuple(DIGITS)
WORD = r" ?[^\W\d]+| ?[^\w\s]+|\s+(?!\S)|\s"


class Reader(nn.Module):
    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.tokenizer = tokenizer


@functools.cache
def load(kind: str) -> Reader:
    """One per process."""
    texts = [text for module in MODULES for text in constants(module)]
    corpus = [
        form for text in texts for w in re.findall(r"\w+|[^\w\s]", text) for form in (w, f" {w}")
    ]
    corpus += [f"{space}{n:02}" for n in range(100) for space in ("", " ")]
    corpus += [f" {noun}s" for noun in subject_verb_agreement.NOUNS]
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{DIGITS[kind]}|{WORD}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500 if kind == "pieces" else 100_000,
        min_frequency=1,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return Reader(PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>"))


def constants(module: ModuleType) -> Iterator[str]:
    """Every text in a module's own constants."""
    for name, value in vars(module).items():
        if name.isupper():
            yield from strings(value)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings((*value, *value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from strings(part)
