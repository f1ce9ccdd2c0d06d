"""What a removed edge carries: the reference output of its source.

A `Reference` holds, for every source, its reference output, and for every read the residual stream
of the reference run. Heads are held before their output weights (z, d_head numbers), since the
difference of two heads' outputs is the difference of their z times W_O: a d_model-sized copy of
every head is never made.

- counterfactual: the outputs on a corrupted prompt, position by position (one run).
- zero: nothing; the stream then holds only the attention output biases.
- zero-with-biases: nothing, and each head writes a share of its block's output bias (as in the
  published code), so that the stream holds no bias either.
- mean: the mean over prompts and positions. mean-positional: over prompts, position by position.

Bhaskar et al. 2024, section 3 (zero and interchange ablation); Wang et al. 2022 (mean).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

ZERO_WITH_BIASES = "zero-with-biases"


@dataclass(frozen=True)
class Reference:
    """Reference outputs of every source, and the reference stream at every read.

    Attributes:
        bias_in_heads: each head writes its share of the output bias, which the streams lack.
        any_batch, any_position: one prompt's, or one position's, for all prompts or positions.
        hidden: what the MLPs' output weights read, in runs with gates on their neurons.
    """

    inputs: Float[Tensor, "input batch pos d_model"]
    z: Float[Tensor, "layer batch pos head d_head"]
    mlp: Float[Tensor, "mlp batch pos d_model"]
    streams: Float[Tensor, "read batch pos d_model"]
    bias_in_heads: bool = False
    any_batch: bool = False
    any_position: bool = False
    hidden: Float[Tensor, "mlp batch pos d_mlp"] | None = None

    @property
    def batch(self) -> int:
        return self.inputs.shape[1]

    @property
    def n_positions(self) -> int:
        return self.inputs.shape[2]

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def expand(self, batch: int, pos: int) -> Reference:
        """One prompt's reference (or one position's) for every prompt and position."""
        if not self.any_position and pos > self.n_positions:
            raise ValueError(
                f"the prompts have {pos} positions, but the means by position were taken over "
                f"prompts of at most {self.n_positions}: give longer prompts, or use "
                "ablation='mean'."
            )
        return self._with(
            t[:, :, :pos].expand(-1, batch, pos, *t.shape[3:]) for t in self._tensors()
        )

    def select(self, rows: Int[Tensor, " row"]) -> Reference:
        """The references of some prompts."""
        return self._with(t.index_select(1, rows) for t in self._tensors())

    @staticmethod
    def cat(references: Sequence[Reference]) -> Reference:
        """Prompts of several references, one after another."""
        columns = zip(*(reference._tensors() for reference in references), strict=True)
        return references[0]._with(torch.cat(column, dim=1) for column in columns)

    def _tensors(self) -> tuple[Tensor, ...]:
        hidden = () if self.hidden is None else (self.hidden,)
        return self.inputs, self.z, self.mlp, self.streams, *hidden

    def _with(self, tensors: Iterable[Tensor]) -> Reference:
        inputs, z, mlp, streams, *optional = tensors
        hidden = optional[0] if optional else None
        return replace(self, inputs=inputs, z=z, mlp=mlp, streams=streams, hidden=hidden)
