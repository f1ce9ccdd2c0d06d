"""Compiled programs with known circuits: seven shipped ones, and your own.

| name | output at each position except BOS |
|---|---|
| `tracr-xproportion` | the share of tokens so far that are x (a number) |
| `tracr-reverse` | the tokens in reverse order |
| `tracr-hist` | how many tokens are the same as this one |
| `tracr-sort` | the tokens in order |
| `tracr-length` | how many tokens there are |
| `tracr-pair-balance` | the share of tokens so far that are "(", minus that of ")" (a number) |
| `tracr-shuffle-dyck` | whether the parentheses are balanced |

All are bidirectional, have no norms, ReLU MLPs, and read BOS and one to `n_ctx - 1` tokens. Logits
are the program's output: a number, or one column per value; at BOS they are meaningless.
rasp.py makes such models from RASP programs; scripts/compile_tracr.py writes the shipped ones.

Tracr: Lindner et al. 2023, arXiv 2301.05062. The circuits: see `known_circuit`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from tl_edgeprune.models import native as plain

NAMES = tuple(
    f"tracr-{program}"
    for program in "xproportion reverse hist sort length pair-balance shuffle-dyck".split()
)
WEIGHTS = Path(__file__).parent / "tracr_weights"


class Compiled(NamedTuple):
    """A compiled program.

    config: sizes, token ids, output values, versions, examples.
    state: weights under a HookedTransformer's names.
    """

    config: dict[str, Any]
    state: plain.State


def read_config(name: str) -> dict[str, Any]:
    """The file beside the weights: sizes, token ids, versions, checked examples."""
    return json.loads((WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))


def known_circuit(name: str, ablation: str) -> frozenset[str] | None:
    """The shipped circuit, or None if there is none for that ablation."""
    edges = read_config(name)["circuits"].get(ablation)
    return None if edges is None else frozenset(edges)


def load_shipped(name: str) -> Compiled:
    """A program that comes with the package."""
    return Compiled(read_config(name), load_file(WEIGHTS / f"{name}.safetensors"))


def build(compiled: Compiled, cls: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The compiled program as a TransformerBridge ("bridge") or a HookedTransformer ("hooked").

    It keeps its configuration: see `config_of`.
    """
    config = compiled.config
    settings = config["model"] | {
        "act_fn": "relu",
        "attention_dir": "causal" if config.get("causal") else "bidirectional",
        "normalization_type": None,
        "default_prepend_bos": False,
    }
    model = plain.build(config["name"], settings, compiled.state, cls, device, dtype)
    model.compiled_program = config  # type: ignore[assignment]
    return model


def config_of(model: Any) -> dict[str, Any] | None:
    """The configuration of a model made by `build`; None for any other model."""
    return getattr(model, "compiled_program", None)
