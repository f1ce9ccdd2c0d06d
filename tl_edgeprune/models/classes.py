"""TransformerLens' two model classes, and the device of a new model."""

from __future__ import annotations

import torch

CLASSES = ("bridge", "hooked")


def placed_device(call: str, cls: str, device: str | torch.device | None) -> torch.device:
    """The device for a new model. Raises, as `load` does, if its class is unknown or missing."""
    if cls not in CLASSES:
        raise ValueError(f"{call}(cls={cls!r}): expected one of {', '.join(CLASSES)}.")
    if cls == "hooked":
        _require_hooked(call)
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _require_hooked(call: str) -> None:
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'{call}(cls="hooked"): this TransformerLens has no HookedTransformer (4.0 removed '
            'it). Use cls="bridge", or install "transformer-lens>=3.9,<4".'
        ) from error
