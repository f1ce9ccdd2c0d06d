"""A model's weights temporarily in another dtype or on another device.

The model itself is converted and put back, not a copy of it: modules that have run may keep
closures over themselves, and a deep copy would then run half in the copy and half in the original.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from tl_edgeprune.hooks.modules import all_modules, all_parameters
from tl_edgeprune.hooks.shards import is_sharded

# Rotary frequencies: transformers keeps them in float32 whatever the weights' dtype.
FLOAT32_BUFFERS = ("inv_freq", "original_inv_freq")


@contextmanager
def model_placed(
    model: Any,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    leave: Container[int] = (),
) -> Iterator[Any]:
    """The model with weights of this dtype on this device; None leaves either as it is.

    On leaving, also by an exception, parameters, buffers and configuration are the original ones:
    the same tensors, not converted back.

    Args:
        leave: ids of parameters that stay as they are.

    Raises ValueError if a sharded model would have to change.
    """
    weight = next(p for p in all_parameters(model) if id(p) not in leave)
    dtype = dtype or weight.dtype
    device = torch.empty(0, device=device or weight.device).device  # "cuda" is the current GPU
    if dtype == weight.dtype and device == weight.device:
        yield model
        return
    if is_sharded(model):
        raise ValueError(
            "a sharded model cannot change its dtype or device: cast it before sharding, and give "
            "the device to sharded(model, device)."
        )
    with ExitStack() as undo:
        for parameter in all_parameters(model):
            if id(parameter) in leave:
                continue
            undo.callback(setattr, parameter, "data", parameter.data)
            parameter.data = _converted(parameter.data, dtype, device)
        for module in all_modules(model):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    undo.callback(module._buffers.__setitem__, name, buffer)
                    buffer_dtype = buffer.dtype if name in FLOAT32_BUFFERS else dtype
                    module._buffers[name] = _converted(buffer, buffer_dtype, device)
        for config in _configs(model):
            undo.callback(vars(config).update, {k: getattr(config, k) for k in ("dtype", "device")})
            config.dtype = dtype
            config.device = str(device)
        yield model


def _converted(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _configs(model: Any) -> list[Any]:
    """TransformerLens' configurations of the model and its parts, each once."""
    configs = [getattr(module, "cfg", None) for module in all_modules(model)]
    by_id = {id(c): c for c in configs if hasattr(c, "dtype") and hasattr(c, "device")}
    return list(by_id.values())
