"""A tiny Llama of random weights in a folder, with a tokenizer whose tokens are given words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from support import model_zoo


def llama(folder: Path, vocab_size: int, *, seed: int = 1) -> Any:
    """The transformers model that is saved in the folder."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(config).eval()
    model_zoo.randomise(model, seed=seed)
    model.save_pretrained(folder)
    return model


def talking_llama(folder: Path, words: Sequence[str], *, seed: int = 1) -> Any:
    """`llama` with a token for each word; the first is for unknown ones, the second is BOS."""
    unknown, bos = words[:2]
    vocabulary = {word: number for number, word in enumerate(words)}
    levels = tokenizers.models.WordLevel(vocabulary, unk_token=unknown)
    tokenizer = tokenizers.Tokenizer(levels)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=bos, eos_token=bos
    ).save_pretrained(folder)
    return llama(folder, len(words), seed=seed)
