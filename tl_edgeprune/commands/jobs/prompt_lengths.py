"""How long a run's prompts are, without its model: by the tokenizer alone, where it is here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tl_edgeprune.commands.common.inputs import Inputs

ASSUMED = 64
MOST = 1000  # pairs that are looked at


class Lengths(NamedTuple):
    """Tokens of a prompt: their mean (rounded down, as for a bound from below), and the longest."""

    mean: int
    longest: int
    known: bool = True


def prompt_lengths(inputs: Inputs, given: int | None) -> Lengths:
    """Those of the task's own pairs; as given, or ASSUMED where the pairs need the model itself."""
    if given is not None:
        return Lengths(given, given)
    lengths = _own(inputs)
    if not lengths:
        return Lengths(ASSUMED, ASSUMED, known=False)
    return Lengths(sum(lengths) // len(lengths), max(lengths))


def _own(inputs: Inputs) -> list[int]:
    """Of each pair; nothing where they cannot be made here. What is wrong the run itself tells."""
    try:
        reader = _reader(inputs.model)
        pairs = replace(inputs, pairs=min(inputs.n_pairs(), MOST)).load_pairs(reader)
    except Exception:  # tasks and tokenizers have errors of many kinds
        return []
    return [len(tokens) for tokens in pairs.clean]


def _reader(model: str) -> Any:
    """A model of no weights that has the tokenizer: it is never looked for beyond this machine."""
    from torch import nn
    from transformers import AutoTokenizer

    from tl_edgeprune.models import cache
    from tl_edgeprune.models.quiet import quiet

    folder = cache.cache_root() / model
    source = folder if not Path(model).is_dir() and folder.is_dir() else model
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    reader = nn.Module()
    reader.tokenizer = tokenizer
    return reader
