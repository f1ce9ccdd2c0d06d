"""RASP programs compiled to transformers: `from_tracr`, with the extra tl_edgeprune[tracr].

1. Tracr (Lindner et al. 2023, arXiv 2301.05062) compiles a RASP program to transformer weights.
2. The weights are renamed and reshaped to TransformerLens' names; the unembedding is the
   projection on the program's output, so logits are what the program computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from tl_edgeprune.models import tracr
from tl_edgeprune.models.classes import placed_device
from tl_edgeprune.models.quiet import quiet
from tl_edgeprune.models.tracr import Compiled

BOS, PAD = "BOS", "compiler_pad"


def from_tracr(
    program: Any,
    *,
    vocab: Iterable[str] | Iterable[int],
    max_seq_len: int,
    name: str = "tracr",
    causal: bool = False,
    mlp_exactness: float = 100.0,
    cls: str = "bridge",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A transformer that computes a RASP program, ready for circuit discovery.

    `tasks.load("tracr", model, n)` makes its prompts; the circuit: `possible_edges` tells from the
    weights which edges can carry anything, `necessary_edges` which it takes. Logits are the
    program's output: a number, or one column for each value that it can have
    (`models.tracr.config_of(model)["outputs"]`), at all positions but BOS.

    Args:
        program: a tracr.rasp.rasp.SOp, such as those of tracr.compiler.lib.
        vocab: the tokens, two or more, all strings or all numbers.
        max_seq_len: the most tokens after BOS.
        name: what the model is called in results.
        causal: whether positions see only those before them (the program is then Tracr's causal
            one).
        mlp_exactness: how sharp the steps of compiled numerical functions are.
        cls, device: as for `models.load`.
        dtype: None means float64: the steps magnify rounding by mlp_exactness, and a program that
            stands on an edge of one says something else in float32.

    Raises:
        ImportError: Tracr is not installed; the message says how.
        TypeError: `program` is no SOp.
        ValueError: fewer than two tokens, max_seq_len below 1, a program that needs no layer.
        NotImplementedError: what Tracr cannot compile, in its own words.
    """
    device = placed_device("models.from_tracr", cls, device)
    compiled = compile_program(
        program,
        vocab=vocab,
        max_seq_len=max_seq_len,
        name=name,
        causal=causal,
        mlp_exactness=mlp_exactness,
    )
    with quiet():
        return tracr.build(compiled, cls, device, dtype or torch.float64).eval()


def compile_program(
    program: Any,
    *,
    vocab: Iterable[str] | Iterable[int],
    max_seq_len: int,
    name: str,
    causal: bool = False,
    mlp_exactness: float = 100.0,
) -> Compiled:
    """The program as weights and configuration. Takes and raises what `from_tracr` does."""
    compiler, rasp = _tracr()
    tokens = sorted(set(vocab), key=lambda token: (str(type(token)), token))
    if not isinstance(program, rasp.SOp):
        raise TypeError(
            f"models.from_tracr: got {type(program).__name__}, expected a tracr.rasp.rasp.SOp, "
            "such as tracr.compiler.lib.make_hist()."
        )
    if isinstance(program, rasp.TokensType | rasp.IndicesType):
        raise ValueError(
            f"models.from_tracr: {program.label} is in the embedding already and needs no layer, "
            "so there is no circuit to find."
        )
    if len(tokens) < 2 or max_seq_len < 1:
        raise ValueError(
            f"models.from_tracr: {len(tokens)} different tokens and max_seq_len={max_seq_len}; "
            "expected at least two tokens (corrupting a prompt needs another one) and "
            "max_seq_len of 1 or more."
        )
    made = compiler.compile_rasp_to_model(
        program,
        vocab=set(tokens),
        max_seq_len=max_seq_len,
        causal=causal,
        compiler_bos=BOS,
        compiler_pad=PAD,
        mlp_exactness=mlp_exactness,
    )
    values = list(getattr(made.output_encoder, "encoding_map", {}))
    labels = [f"{program.label}:{value}" for value in values] or [program.label]
    rows = [made.residual_labels.index(label) for label in labels]
    ids = made.input_encoder.encoding_map
    config = {
        "name": name,
        "format": 1,
        "versions": {p: version(p) for p in ("tracr-pypi", "jax", "dm-haiku")},
        "model": _sizes(made, max_seq_len, len(rows)),
        "causal": causal,
        "bos": ids[BOS],
        "tokens": sorted(ids[token] for token in tokens),
        "vocab": {str(token): index for token, index in ids.items()},
        "outputs": values,
        "residual_labels": list(made.residual_labels),
    }
    arrays = _weights(made, rows)
    return Compiled(config, {key: torch.from_numpy(array) for key, array in arrays.items()})


def _tracr() -> tuple[ModuleType, ModuleType]:
    """Tracr's compiler and language. Raises ImportError, with instructions, if missing."""
    try:
        from tracr.compiler import compiling
        from tracr.rasp import rasp
    except ImportError as error:
        raise ImportError(
            f"models.from_tracr needs Tracr, which cannot be imported ({error}): "
            'pip install "tl_edgeprune[tracr]" (tracr-pypi, JAX and dm-haiku).'
        ) from error
    return compiling, rasp


def _sizes(compiled: Any, max_seq_len: int, n_outputs: int) -> dict[str, int]:
    shape = compiled.model_config
    return {
        "n_layers": shape.num_layers,
        "n_heads": shape.num_heads,
        "d_model": len(compiled.residual_labels),
        "d_head": shape.key_size,
        "d_mlp": shape.mlp_hidden_size,
        "n_ctx": max_seq_len + 1,
        "d_vocab": len(compiled.input_encoder.encoding_map),
        "d_vocab_out": n_outputs,
    }


def _weights(compiled: Any, outputs: list[int]) -> dict[str, np.ndarray]:
    """Tracr's parameters under TransformerLens' names, without the biases (all zero).

    outputs: rows of the residual stream that hold the program's output.
    """
    params = {name: {k: np.asarray(v) for k, v in p.items()} for name, p in compiled.params.items()}
    n_heads, d_head = compiled.model_config.num_heads, compiled.model_config.key_size
    d_model = len(compiled.residual_labels)
    state = {
        "embed.W_E": params["token_embed"]["embeddings"],
        "pos_embed.W_pos": params["pos_embed"]["embeddings"],
        "unembed.W_U": np.eye(d_model, dtype=np.float32)[:, outputs],
    }
    for layer in range(compiled.model_config.num_layers):
        source, target = f"transformer/layer_{layer}", f"blocks.{layer}"
        for parameter, letter in (("query", "Q"), ("key", "K"), ("value", "V")):
            heads = params[f"{source}/attn/{parameter}"]["w"].reshape(d_model, n_heads, d_head)
            state[f"{target}.attn.W_{letter}"] = heads.transpose(1, 0, 2)  # [head, d_model, d_head]
        output = params[f"{source}/attn/linear"]["w"]
        state[f"{target}.attn.W_O"] = output.reshape(n_heads, d_head, d_model)
        state[f"{target}.mlp.W_in"] = params[f"{source}/mlp/linear_1"]["w"]
        state[f"{target}.mlp.W_out"] = params[f"{source}/mlp/linear_2"]["w"]
    _check_no_bias(params)
    return {name: np.array(array, dtype=np.float32, order="C") for name, array in state.items()}


def _check_no_bias(params: dict[str, dict[str, np.ndarray]]) -> None:
    for name, parameter in params.items():
        if np.any(parameter.get("b", 0)):
            raise ValueError(f"{name} has a bias, but compiled programs are expected to have none")
