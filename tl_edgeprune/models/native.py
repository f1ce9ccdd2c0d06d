"""Small transformers from given weights, in either of TransformerLens' classes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

State = dict[str, Float[Tensor, "..."]]


def build(
    name: str,
    settings: dict[str, Any],
    state: State,
    cls: str,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """A model of these sizes with these weights.

    Args:
        name: what the model is called.
        settings: of a HookedTransformerConfig.
        state: weights under a HookedTransformer's names; missing biases are zero.
        cls: "bridge" or "hooked" (TransformerLens 3).
        device, dtype: of the weights.
    """
    make = _hooked if cls == "hooked" else _bridge
    return make(name, settings, state, device, dtype)


def _bridge(
    name: str, settings: dict[str, Any], state: State, device: torch.device, dtype: torch.dtype
) -> TransformerBridge:
    """A TransformerBridge around TransformerLens' own small transformer."""
    native = {"architecture": "TransformerLensNative", "init_weights": False}
    model = TransformerBridge.boot_native(
        settings | native, model_name=name, device=device, dtype=dtype
    )
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.load_state_dict(_native_state(state, expected))
    return model


def _hooked(
    name: str, settings: dict[str, Any], state: State, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        **settings, model_name=name, device=str(device), dtype=dtype, init_weights=False
    )
    model = HookedTransformer(config)
    initial = model.state_dict()
    zeros = {key: torch.zeros_like(initial[key]) for key in initial if ".b_" in key}
    model.load_state_dict(initial | zeros | state)
    return model


def _native_state(state: State, expected: dict[str, torch.Size]) -> State:
    """The weights under the Bridge's names, in the layout of torch.nn.Linear."""
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
    """For example, blocks.0.mlp.W_in becomes blocks.0.mlp.in.weight."""
    kind = "bias" if matrix.startswith("b") else "weight"
    if matrix in ("W_E", "W_pos", "W_U", "w", "b"):  # of embeddings and norms
        return f"{module}.{kind}"
    return f"{module}.{matrix.partition('_')[2].lower()}.{kind}"
