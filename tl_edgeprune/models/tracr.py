"""Two compiled programs with known circuits; scripts/compile_tracr.py makes their weights.

`tracr-xproportion`: at each position, the fraction of tokens so far that are x (token 3).
`tracr-reverse`: the tokens after BOS in reverse order, as one-hot columns (token i is column i).
Both are bidirectional, have no layer norm, ReLU MLPs, and read BOS and one to five tokens.
Logits are the program's output itself; the output at BOS means nothing.

Tracr: Lindner et al. 2023, arXiv 2301.05062. The circuits: see `known_circuit`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

NAMES = ("tracr-xproportion", "tracr-reverse")
WEIGHTS = Path(__file__).parent / "tracr_weights"
State = dict[str, Float[Tensor, "..."]]

KNOWN_CIRCUITS = {
    ("tracr-xproportion", "zero"): (
        "input->m0 m0->a1.h0<v> a1.h0->logits input->a1.h0<q> input->a1.h0<k>"
    ),
    ("tracr-xproportion", "counterfactual"): "input->m0 m0->a1.h0<v> a1.h0->logits",
    ("tracr-reverse", "zero"): (
        "a0.h0->m0 a3.h0->logits input->a0.h0<v> input->a3.h0<k> input->a3.h0<v> input->m0 "
        "input->m1 m0->m1 m1->m2 m2->a3.h0<q>"
    ),
    ("tracr-reverse", "counterfactual"): "input->a3.h0<v> a3.h0->logits",
}


def read_config(name: str) -> dict[str, Any]:
    """What the compiler wrote beside the weights: sizes, token ids, versions, checked examples."""
    return json.loads((WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))


def known_circuit(name: str, ablation: str = "zero") -> frozenset[str]:
    """Names of the edges of a compiled program's circuit.

    Cutting any one edge raises the mean squared error (all positions but BOS, prompts of one to
    five tokens after BOS), and the set alone keeps it below 1e-12. The zero-ablation sets are
    those that Conmy et al. 2023 (ACDC, arXiv 2304.14997) publish.

    Args:
        name: "tracr-xproportion" or "tracr-reverse".
        ablation: "zero", or "counterfactual" (then what all prompts share needs no edge).

    Raises:
        ValueError: no circuit is known for that model or that ablation.
    """
    if (name, ablation) not in KNOWN_CIRCUITS:
        known = ", ".join(f"{model} ({kind})" for model, kind in KNOWN_CIRCUITS)
        raise ValueError(
            f"known_circuit({name!r}, ablation={ablation!r}): circuits are known for {known}."
        )
    return frozenset(KNOWN_CIRCUITS[name, ablation].split())


def load_bridge(name: str, device: torch.device, dtype: torch.dtype) -> TransformerBridge:
    """The compiled program as a TransformerBridge around TransformerLens' own small transformer."""
    settings = {"architecture": "TransformerLensNative", "init_weights": False}
    model = TransformerBridge.boot_native(
        _settings(name) | settings, model_name=name, device=device, dtype=dtype
    )
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.load_state_dict(_native_state(_read_state(name), expected))
    return model


def load_hooked(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The compiled program as a HookedTransformer (TransformerLens 3)."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        **_settings(name), model_name=name, device=str(device), dtype=dtype, init_weights=False
    )
    model = HookedTransformer(config)
    state = model.state_dict()
    zeros = {key: torch.zeros_like(state[key]) for key in state if ".b_" in key}
    model.load_state_dict(state | zeros | _read_state(name))
    return model


def _settings(name: str) -> dict[str, Any]:
    """Sizes from the compiler; the rest is the same for every Tracr program."""
    return read_config(name)["model"] | {
        "act_fn": "relu",
        "attention_dir": "bidirectional",
        "normalization_type": None,
        "default_prepend_bos": False,
    }


def _read_state(name: str) -> State:
    return load_file(WEIGHTS / f"{name}.safetensors")


def _native_state(state: State, expected: dict[str, torch.Size]) -> State:
    """The same weights under the Bridge's names, as torch.nn.Linear keeps them; biases are zero."""
    native = {key: torch.zeros(shape) for key, shape in expected.items() if key.endswith(".bias")}
    for key, tensor in state.items():
        module, matrix = key.rsplit(".", 1)
        if matrix in ("W_Q", "W_K", "W_V"):
            tensor = tensor.transpose(1, 2).flatten(0, 1)  # [head * d_head, d_model]
        elif matrix == "W_O":
            tensor = tensor.flatten(0, 1).T  # [d_model, head * d_head]
        elif matrix in ("W_in", "W_out", "W_U"):
            tensor = tensor.T
        native[_native_name(module, matrix)] = tensor.contiguous()
    return native


def _native_name(module: str, matrix: str) -> str:
    if matrix in ("W_E", "W_pos", "W_U"):
        return f"{module}.weight"
    return f"{module}.{matrix.removeprefix('W_').lower()}.weight"
