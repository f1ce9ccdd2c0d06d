"""A tiny random model with a tokenizer that reads IOI's sentences: a word is a token."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from support import model_zoo
from tl_edgeprune.tasks.library import ioi

SIZES = {"d_model": 16, "d_head": 4, "n_heads": 2, "n_layers": 1, "d_mlp": 16, "n_ctx": 24}


@functools.cache
def model() -> Any:
    """One per process, in float32."""
    texts = [sentence.format(*[""] * 3, place="", object="") for sentence in ioi.SENTENCES]
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    words |= {*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS}
    vocab = ["<unk>", "<s>", ",", ".", "▁"] + [f"▁{word}" for word in sorted(words)]
    config = SIZES | {"d_vocab": len(vocab), "act_fn": "gelu_new", "normalization_type": "LN"}
    model = TransformerBridge.boot_native(config, dtype=torch.float32, device="cpu")
    model_zoo.randomise(model.original_model, seed=1)
    model.tokenizer = tokenizer(vocab)
    return model.eval()


def tokenizer(vocab: list[str]) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
