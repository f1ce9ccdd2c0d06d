"""Semi-synthetic models: trained weights with a known circuit.

`siit-sum`, `siit-lookup`, `siit-branch`: what each computes, and by which heads and MLPs, is
defined in siit/examples.py; scripts/train_semi_synthetic.py trained them (siit/training.py) and
wrote their accuracies beside the weights. They have layer norms, GELU MLPs, learned positions
and causal attention, and answer at the last position.

InterpBench: Gupta, Arcuschin, Kwa and Garriga-Alonso 2024, arXiv 2407.14494.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from tl_edgeprune.models import native as plain
from tl_edgeprune.models.classes import placed_device
from tl_edgeprune.models.quiet import quiet
from tl_edgeprune.siit import training
from tl_edgeprune.siit.causal import CausalModel

NAMES = ("siit-sum", "siit-lookup", "siit-branch")
WEIGHTS = Path(__file__).parent / "semi_synthetic_weights"


def read_config(name: str) -> dict[str, Any]:
    """The file beside the weights: sizes, circuit, settings, accuracies."""
    return json.loads((WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))


def known_circuit(name: str, ablation: str) -> frozenset[str] | None:
    """The circuit that the model was trained to have; None unless ablation is counterfactual."""
    return frozenset(read_config(name)["circuit"]) if ablation == "counterfactual" else None


class Trained(NamedTuple):
    """A trained model, and the shares of new pairs on which it agrees with its causal model.

    accuracy: "task": without interventions; "interchange": with swapped reads; "strict": with edges
    outside the circuit removed; "both".
    """

    model: nn.Module
    accuracy: dict[str, float]


def train_semi_synthetic(
    causal: CausalModel,
    *,
    steps: int = 1000,
    lr: float = 3e-3,
    batch_size: int = 128,
    d_model: int = 32,
    seed: int = 0,
    cls: str = "bridge",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Trained:
    """Train a transformer in which only the causal model's circuit does its task.

    Its circuit under counterfactual ablation is `causal.edges`. Check `accuracy` before you rely on
    that: if it is below 0.99, train longer or increase d_model. See siit/training.py.

    Args:
        steps, lr, batch_size, seed: of the training, which runs on the CPU in float32.
        d_model: the width, a multiple of the number of heads.
        cls, device, dtype: as for `models.load`.

    Raises:
        ValueError: sizes that do not fit together, or an unknown class.
        ImportError: as of `models.load`.
    """
    device = placed_device("models.train_semi_synthetic", cls, device)
    if steps < 1 or batch_size < 1 or d_model % causal.graph.n_heads:
        raise ValueError(
            f"steps={steps}, batch_size={batch_size}, d_model={d_model}: expected 1 or more, and a "
            f"d_model divisible by {causal.graph.n_heads} heads."
        )
    state = training.train(
        causal,
        d_model=d_model,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    with quiet():
        sizes = training.sizes(causal, d_model)
        model = build(causal.name, sizes, state, cls, device, dtype or torch.float32).eval()
    return Trained(model, training.accuracies(state, causal))


def read_state(name: str) -> plain.State:
    """The trained weights of a shipped model."""
    return load_file(WEIGHTS / f"{name}.safetensors")


def load(name: str, cls: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A shipped model as a TransformerBridge ("bridge") or a HookedTransformer ("hooked")."""
    return build(name, read_config(name)["model"], read_state(name), cls, device, dtype)


def build(
    name: str,
    sizes: dict[str, Any],
    state: plain.State,
    cls: str,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """A transformer from trained weights."""
    settings = sizes | {
        "act_fn": "gelu",
        "attention_dir": "causal",
        "normalization_type": "LN",
        "default_prepend_bos": False,
    }
    return plain.build(name, settings, state, cls, device, dtype)
