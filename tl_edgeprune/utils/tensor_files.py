"""Reads untrusted safetensors files with a JSON document in their metadata (see `reading`)."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_edgeprune.utils.reading import WRONG, AnyPath, check_file, first_line, parse_json

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def read_tensors(
    path: AnyPath, key: str, what: str, hint: str = ""
) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a safetensors file, and the JSON in its metadata under `key`."""
    check_file(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            document = parse_json((file.metadata() or {}).get(key, "null"))
            return {name: file.get_tensor(name) for name in file.keys()}, document  # noqa: SIM118
    except (SafetensorError, RuntimeError, *WRONG) as error:
        message = f"{path} is no {what}, or a damaged one ({first_line(error)}). {hint}"
        raise ValueError(message.rstrip()) from None


def floats(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """The named tensor, checked to be finite floats of this shape. Raises KeyError if missing."""
    tensor = tensors[name]
    if tuple(tensor.shape) != shape or tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected floats of {shape}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinite values")
    return tensor
