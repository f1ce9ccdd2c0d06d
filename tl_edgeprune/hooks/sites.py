"""Where a model's sources and destinations are: the only file that knows TransformerLens' classes.

A `Sites` names the hook points of one model and holds what the masked forward pass applies itself:
each block's attention norm and its query, key, value and output weights. Heads are read and written
after their projections, at `hook_q`, `hook_k`, `hook_v` and `hook_z`: those points exist on both
classes and for every attention, with or without TransformerLens' split inputs, and nothing of
[batch, pos, head, d_model] is copied for the model to normalise and project again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.norms import Norm, inverse_rms

# Points of a block that lie on the model's own residual stream or before its projections: what
# hooks do there goes unread under masks.
LOST = (
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
        """The factor by which every head's output is scaled, at the heads' current sum."""
        return inverse_rms(summed.float() if summed.dtype != torch.float64 else summed, self.eps)


@dataclass(frozen=True)
class AttentionSite:
    """One layer's attention. Weights: q, k, v as [head, d_model, d_head], output [head, d_head,
    d_model].
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
    positions: Float[Tensor, "ctx d_model"] | None = None  # shortformer's, for queries and keys

    def placed(
        self, part: int, x: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries (part 0), keys (1) or values (2) with their positions, where attention itself
        adds those to the normalised input (shortformer).
        """
        if self.positions is None or part == 2:
            return x
        places = self.positions[: x.shape[1]].unsqueeze(0)  # [1, pos, d_model]
        return x + (places @ self.weights[part]).transpose(0, 1)

    def scaled(self, z: Float[Tensor, "row head d_head"]) -> Float[Tensor, "row head d_head"]:
        """z, times the post-norm's scale where there is one: heads' outputs are then linear in
        it.
        """
        if self.post is None:
            return z
        summed = z.flatten(1) @ self.output.flatten(0, 1)
        return z * self.post.scale(summed).unsqueeze(-1).to(z.dtype)

    @property
    def gain(self) -> Float[Tensor, " d_model"] | None:
        return None if self.post is None else self.post.gain


@dataclass(frozen=True)
class MlpSite:
    """One layer's MLP: where it reads, the norm that we must apply there (if any), where it
    writes.
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
    hidden: tuple[str, ...] = ()  # where W_out reads, in runs with gates on the MLPs' neurons

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
        """The hook points, by name, whose hooks the masked forward pass would overrule or lose."""
        names = {self.embed, self.final, self.cut}
        names |= {name for site in self.attention for name in (site.q, site.k, site.v, site.z)}
        names |= {name for site in self.mlp for name in (site.read, site.write)}
        names |= {f"{block}.{name}" for block in self.blocks for name in LOST}
        points = model.hook_dict.items()  # once: the Bridge makes it anew at each look
        return {name: point for name, point in points if name in names and name != self.embed}
