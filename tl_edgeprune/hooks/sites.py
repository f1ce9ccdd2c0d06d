"""What the masked forward pass uses of a model: hook points, norms and weights.

A `Sites` names the hook points of one model and holds what the masked forward pass applies itself:
each block's attention norm and its query, key, value and output weights. Heads are read and written
after their projections, at `hook_q`, `hook_k`, `hook_v` and `hook_z`. Both classes have those
points for every attention, with or without TransformerLens' split inputs, and no tensor of
[batch, pos, head, d_model] is made for the model to normalise and project again.

`AttentionSite.read` and `.write` are the one place that says how heads are read and written: the
stream, the recomputed pass, partial runs and ablations all call them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.norms import Norm, inverse_rms
from tl_edgeprune.hooks.projections import (
    project,
    project_in_pieces,
    project_in_pieces_back,
    project_some,
)

# A block's hook points on the model's own residual stream or before its projections: under masks
# nothing reads what hooks do there.
UNREAD_HOOK_POINTS = (
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_in", "hook_out"),
    *("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_out"),
    *("ln1.hook_in", "ln1.hook_scale", "ln1.hook_normalized", "ln1.hook_out", "hook_mlp_in"),
    *("attn.hook_in", "attn.q.hook_in", "attn.k.hook_in", "attn.v.hook_in"),
    *("attn.hook_result", "attn.o.hook_out", "attn.hook_out", "attn.hook_hidden_states"),
    *("ln1_post.hook_in", "ln1_post.hook_scale", "ln1_post.hook_normalized", "ln1_post.hook_out"),
)


@dataclass(frozen=True)
class PostNorm:
    """A root-mean-square norm over the summed heads (Gemma 2): y = o * scale(o) * gain."""

    gain: Float[Tensor, " d_model"]
    eps: float

    def scale(self, summed: Float[Tensor, "row d_model"]) -> Float[Tensor, "row 1"]:
        """The factor by which every head's output is scaled, given the heads' sum."""
        return inverse_rms(summed.float() if summed.dtype != torch.float64 else summed, self.eps)


@dataclass(frozen=True)
class AttentionSite:
    """One layer's attention: its hook points, and how its heads read and write the stream.

    Attributes:
        q, k, v, z: names of the hook points of queries, keys, values and heads' outputs.
        norm: the norm before the projections.
        weights, biases: of queries, keys and values, [head, d_model, d_head] and [head, d_head].
        output, output_bias: W_O and b_O.
        post: the norm after attention, if there is one.
        positions: shortformer's position embeddings, added to the inputs of queries and keys.
    """

    q: str
    k: str
    v: str
    z: str
    norm: Norm
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    output: Float[Tensor, "head d_head d_model"]
    output_bias: Float[Tensor, " d_model"] | None
    post: PostNorm | None
    positions: Float[Tensor, "ctx d_model"] | None = None

    # ----------------------------------------------------------------------------------- reading

    def read(
        self, x: Float[Tensor, "destination row d_model"], split_qkv: bool
    ) -> list[Float[Tensor, "_head row d_head"]]:
        """Queries, keys and values from what the destinations read, before `add_positions`.

        `split_qkv`: the destinations are queries, then keys, then values; otherwise heads.
        """
        return project(x, self.norm, self.weights, self.biases, split_qkv)

    def read_in_pieces(
        self, x: Float[Tensor, "destination row d_model"], split_qkv: bool
    ) -> list[Float[Tensor, "_head row d_head"]]:
        """As `read`, without gradients and with little memory beside the result."""
        return project_in_pieces(x, self.norm, self.weights, self.biases, split_qkv)

    def read_in_pieces_back(
        self,
        x: Float[Tensor, "destination row d_model"],
        grads: Sequence[Float[Tensor, "_head row d_head"]],
        split_qkv: bool,
    ) -> None:
        """Overwrite what the destinations read by its gradient, from that of `read_in_pieces`."""
        project_in_pieces_back(x, grads, self.norm, self.weights, split_qkv)

    def read_some(
        self, x: Float[Tensor, "read row d_model"], destinations: Sequence[int], split_qkv: bool
    ) -> Iterator[tuple[int, slice | Tensor, Float[Tensor, "_head row d_head"]]]:
        """As `read`, from the reads of some destinations in rising order, without gradients.

        Yields: 0, 1 or 2 for queries, keys or values; their heads' index; their values.
        """
        return project_some(x, destinations, self.norm, self.weights, self.biases, split_qkv)

    def add_positions(
        self, index: int, x: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries (index 0), keys (1) or values (2), plus the projected position embeddings if
        attention itself adds those to its normalised input (shortformer).
        """
        if self.positions is None or index == 2:
            return x
        embeddings = self.positions[: x.shape[1]].unsqueeze(0)  # [1, pos, d_model]
        return x + (embeddings @ self.weights[index]).transpose(0, 1)  # [pos, head, d_head]

    # ----------------------------------------------------------------------------------- writing

    def scaled(self, z: Float[Tensor, "row head d_head"]) -> Float[Tensor, "row head d_head"]:
        """z, times the post-norm's scale if there is one. What heads write is linear in it."""
        if self.post is None:
            return z
        summed = z.flatten(1) @ self.output.flatten(0, 1)  # [row, d_model]
        return z * self.post.scale(summed).unsqueeze(-1).to(z.dtype)

    def write(
        self,
        z: Float[Tensor, "head row d_head"],
        out: Float[Tensor, "head row d_model"],
        *,
        bias_in_heads: bool = False,
        heads: slice | Tensor = slice(None),
    ) -> None:
        """What heads write of (scaled) z, into `out`.

        Args:
            bias_in_heads: each head also writes its share of the output bias.
            heads: the heads that z is of; all by default.
        """
        torch.bmm(z.to(out.dtype), self.output[heads], out=out)
        if self.post is not None:
            out.mul_(self.post.gain)
        bias = self._bias_share(bias_in_heads)
        if bias is not None:
            out.add_(bias)

    def write_back(
        self, grad: Float[Tensor, "head row d_model"]
    ) -> Float[Tensor, "head row d_head"]:
        """The gradient of z, from that of what all heads wrote."""
        grad = grad if self.post is None else grad * self.post.gain
        return torch.bmm(grad, self.output.transpose(1, 2))

    def write_dot(
        self,
        z: Float[Tensor, "head row d_head"],
        grad: Float[Tensor, "head row d_model"],
        *,
        bias_in_heads: bool = False,
    ) -> Float[Tensor, "head d_model"]:
        """The sum over rows of `grad` times what all heads write, which is not computed by row."""
        dot = (self.output * torch.bmm(z.transpose(1, 2), grad)).sum(1)
        dot = dot if self.post is None else dot * self.post.gain
        bias = self._bias_share(bias_in_heads)
        return dot if bias is None else dot + bias * grad.sum(1)

    def stream_after(
        self, stream: Float[Tensor, "row d_model"], z: Float[Tensor, "row head d_head"]
    ) -> Float[Tensor, "row d_model"]:
        """The stream plus what all heads write and the output bias."""
        summed = torch.einsum("rhd,hdm->rm", z, self.output)
        stream = stream + (summed if self.post is None else summed * self.post.gain)
        return stream if self.output_bias is None else stream + self.output_bias

    def _bias_share(self, bias_in_heads: bool) -> Float[Tensor, " d_model"] | None:
        if not bias_in_heads or self.output_bias is None:
            return None
        return self.output_bias / self.output.shape[0]


@dataclass(frozen=True)
class MlpSite:
    """One layer's MLP: the hook points where it reads and writes, and the norm that masked runs
    apply to what it reads.
    """

    read: str
    norm: Norm
    write: str


@dataclass(frozen=True)
class Sites:
    """Every hook point that the masked forward pass uses, in one model."""

    blocks: tuple[str, ...]
    attention: tuple[AttentionSite, ...]
    mlp: tuple[MlpSite, ...]
    embed: str
    final: str
    cut: str | None
    parallel: bool
    has_positions: bool
    n_kv_heads: int
    hidden: tuple[str, ...] = ()  # what W_out reads, in runs with gates on the MLPs' neurons

    def graph(self, *, split_qkv: bool, split_embeddings: bool) -> EdgeGraph:
        """The model's edge graph with these options."""
        if split_embeddings and not self.has_positions:
            raise ValueError(
                "split_embeddings=True needs learned position embeddings, but this model has only "
                "token embeddings (positions enter inside attention). Use split_embeddings=False."
            )
        return EdgeGraph(
            n_layers=len(self.blocks),
            n_heads=self.attention[0].output.shape[0],
            n_kv_heads=self.n_kv_heads,
            has_mlp=bool(self.mlp),
            parallel=self.parallel and bool(self.mlp),
            split_qkv=split_qkv,
            split_embeddings=split_embeddings,
        )

    def overwritten(self, model: Any) -> dict[str, Any]:
        """The hook points, by name, at which a user's hooks would be overwritten or have no effect
        in a masked forward pass.
        """
        names = {self.embed, self.final, self.cut}
        names |= {name for site in self.attention for name in (site.q, site.k, site.v, site.z)}
        names |= {name for site in self.mlp for name in (site.read, site.write)}
        names |= {f"{block}.{name}" for block in self.blocks for name in UNREAD_HOOK_POINTS}
        points = model.hook_dict.items()  # once: the Bridge builds it at each access
        return {name: point for name, point in points if name in names and name != self.embed}
