"""What a removed edge carries: the reference output of its source.

A `Reference` holds, for every source, its reference output, and for every read the residual stream
of the reference run. Heads are held before their output weights (z, d_head numbers), since the
difference of two heads' outputs is the difference of their z times W_O: a d_model-sized copy of
every head is never made.

- counterfactual: the outputs on a corrupted prompt, position by position (one run).
- zero: nothing; the stream then holds only the attention output biases.
- zero-with-biases: not these either: each head writes a share of its block's (published code).
- mean: the mean over prompts and positions. mean-positional: over prompts, position by position.

Bhaskar et al. 2024, section 3 (zero and interchange ablation); Wang et al. 2022 (mean).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_edgeprune.hooks.sites import AttentionSite

ZERO_WITH_BIASES = "zero-with-biases"


@dataclass(frozen=True)
class Reference:
    """Reference outputs of every source, and the reference stream at every read.

    `bias_in_heads`: the output biases are no part of the streams; each head writes its share.
    `any_batch`, `any_position`: one prompt's that stands for all, one position's that stands for
    all. `hidden`: what the MLPs' output weights read, in runs with gates on their neurons.
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

    def head_bias(self, site: AttentionSite) -> Float[Tensor, " d_model"] | None:
        """What each head of a block writes of its output bias."""
        if not self.bias_in_heads or site.output_bias is None:
            return None
        return site.output_bias / site.output.shape[0]

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def expand(self, batch: int, pos: int) -> Reference:
        """One prompt's reference for every prompt (and, from one position, for every position)."""
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
    def cat(parts: Sequence[Reference]) -> Reference:
        """Prompts of several references, one after another."""
        columns = zip(*(part._tensors() for part in parts), strict=True)
        return parts[0]._with(torch.cat(column, dim=1) for column in columns)

    def _tensors(self) -> tuple[Tensor, ...]:
        hidden = () if self.hidden is None else (self.hidden,)
        return self.inputs, self.z, self.mlp, self.streams, *hidden

    def _with(self, tensors: Iterable[Tensor]) -> Reference:
        inputs, z, mlp, streams, *rest = tensors
        hidden = rest[0] if rest else None
        return replace(self, inputs=inputs, z=z, mlp=mlp, streams=streams, hidden=hidden)
