"""Gates on neurons in a masked forward: what each hook does with them (circuits/neurons.py)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tl_edgeprune.ablation.constants import OPTIMAL
from tl_edgeprune.circuits.neurons import MLP


class NeuronGates:
    """The gates of one forward."""

    def __init__(self, kind: str, values: Shaped[Tensor, "place unit"], like: Tensor) -> None:
        """`like`: a tensor of the run's dtype and device."""
        self.of_hidden = kind == MLP
        self.values = values.to(like)
        self.fired = 0

    def hidden(
        self, h: Float[Tensor, "..."], reference: Float[Tensor, "batch pos d_mlp"], layer: int
    ) -> Float[Tensor, "..."]:
        """What the output weights of an MLP read instead of the activations h."""
        self.fired += 1
        reference = reference.reshape(h.shape)
        return reference + self.values[layer] * (h - reference)

    def gated(self, difference: Float[Tensor, "row d_model"], source: int) -> Tensor:
        """What a source writes instead of its difference."""
        return difference if self.of_hidden else difference * self.values[source]

    def of_heads(self, first: int, count: int) -> Float[Tensor, "head d_model"] | None:
        """The gates of what some heads write."""
        return None if self.of_hidden else self.values[first : first + count]

    def finish(self, n_layers: int) -> None:
        """After the forward: every MLP has passed its gates."""
        if self.of_hidden and self.fired != n_layers:
            raise RuntimeError(
                f"{self.fired} of {n_layers} MLPs passed their hidden neurons' hook point in this "
                "forward: its hook was removed inside the context (model.reset_hooks?)."
            )


def check_constants(kind: str | None, ablation: Any) -> None:
    """Raise ValueError for hidden neurons under an ablation of given or learned constants."""
    if kind == MLP and (not isinstance(ablation, str) or ablation == OPTIMAL):
        raise ValueError(
            "neurons='mlp' with an ablation of constants is not supported: constants replace the "
            "outputs of whole sources, and none are learned for hidden neurons. Use another "
            "ablation, or neurons='dimensions'."
        )


def check_gates(gates: Shaped[Tensor, "..."], shape: tuple[int, int]) -> None:
    """Raise ValueError unless these are floats or bools of this shape, without NaN."""
    if gates.shape != shape:
        raise ValueError(f"gates of neurons have shape {tuple(gates.shape)}, expected {shape}.")
    if not (gates.is_floating_point() or gates.dtype == torch.bool):
        raise ValueError(f"gates of neurons are {gates.dtype}, expected floats in [0, 1] or bool.")
    if not bool(torch.isfinite(gates).all()):
        raise ValueError("gates of neurons hold NaN or infinite values; expected [0, 1].")
