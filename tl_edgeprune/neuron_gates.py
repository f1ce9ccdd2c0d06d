"""Gates on neurons in a masked forward: what each hook does with them (neurons.py)."""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor

from tl_edgeprune.circuits.neurons import MLP


class NeuronGates:
    """The gates of one forward."""

    def __init__(self, kind: str, values: Shaped[Tensor, "place unit"], like: Tensor) -> None:
        """`like`: of the run's dtype and device."""
        self.of_hidden = kind == MLP
        self.values = values.to(like)
        self.fired = 0

    def hidden(
        self, h: Float[Tensor, "..."], reference: Float[Tensor, "batch pos d_mlp"], layer: int
    ) -> Float[Tensor, "..."]:
        """What the output weights of an MLP read in place of the activations h."""
        self.fired += 1
        reference = reference.reshape(h.shape)
        return reference + self.values[layer] * (h - reference)

    def gated(self, difference: Float[Tensor, "row d_model"], source: int) -> Tensor:
        """What a source writes in place of its difference."""
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
