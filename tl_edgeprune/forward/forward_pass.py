"""One masked forward: what each hook of `masked_model.py` reads from the stream and writes to it.

1. At a block's start, attention's destinations read their mixes, which are normalised and projected
   (`AttentionSite.read`); the hooks at queries, keys and values hand them to the block.
2. Heads and MLPs write their difference from the reference into the stream.
3. The logits read at the read positions only.

The rest are the tensors of one forward that recomputed and partial runs prepare in the same way:
its reference, positions, rows, spans and mask blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_edgeprune.ablation.recording import split_inputs
from tl_edgeprune.ablation.reference import Reference
from tl_edgeprune.forward.buffers import BufferPool
from tl_edgeprune.forward.neuron_gates import NeuronGates
from tl_edgeprune.forward.residual import Stream, WholeStream, joint_mask, read_groups
from tl_edgeprune.forward.span_masks import Spans
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.sites import AttentionSite, Sites

# Reads that share one pass over the buffer: those of four blocks with an MLP. More would save
# little (few passes are left) and cost memory (mixes are kept until they are read).
READS_AHEAD = 8


@dataclass(frozen=True)
class HeldSources:
    """Sources that write `share` of their difference, as constants: no gradient flows into them.

    The heads of a layer are held together. An input held at a share lies on the straight path from
    the corrupted (0) to the clean one (1).
    """

    sources: range
    share: float = 1.0


@dataclass(frozen=True)
class ForwardInputs:
    """What one forward runs with."""

    mask: Tensor
    reference: Reference
    read_positions: Tensor | None
    held: HeldSources | None = None
    contract: Tensor | None = None
    whole: bool = False
    spans: Tensor | None = None
    neurons: Tensor | None = None


class Forward:
    """One masked forward: the stream, and what each hook does with it."""

    def __init__(
        self,
        graph: EdgeGraph,
        sites: Sites,
        pool: BufferPool,
        neuron_kind: str | None,
        inputs: ForwardInputs,
        tokens: Tensor,
    ) -> None:
        self.graph, self.sites, self.pool = graph, sites, pool
        self.batch, self.pos = tokens.shape
        self.reference = reference_for(inputs.reference, tokens)
        weight = self.sites.attention[0].output  # mask and positions may come from another device
        self.read_positions = checked_positions(inputs.read_positions, tokens, weight.device)
        self.spans = spans_of(inputs.spans, tokens, self.graph, weight.device)
        self.held, self.contract = inputs.held, inputs.contract
        if self.contract is not None and self.spans is not None:
            self.contract = self.contract.index_select(1, self.spans.order)
        self.gates: NeuronGates | None = None
        if inputs.neurons is not None and neuron_kind is not None:
            self.gates = NeuronGates(neuron_kind, inputs.neurons, weight)
        # In a parallel block the MLP reads after the heads wrote, but not what they wrote.
        self.whole = inputs.whole and not self.graph.parallel
        self.blocks = mask_blocks(self.graph, inputs.mask.to(weight))
        self.groups = read_groups(len(self.graph.reads), READS_AHEAD)
        self.read_of: dict[tuple[str, int], int] = {
            (read.kind, read.layer): index for index, read in enumerate(self.graph.reads)
        }
        self.embedding: Tensor | None = None
        self.stream: Stream | None = None
        self.qkv: QkvHandover | None = None
        self.reads = 0

    def embed(self, tensor: Tensor) -> None:
        self.embedding = tensor

    def enter_block(self, resid: Tensor, layer: int) -> None:
        """At a block's start: the input writes (block 0), and attention's destinations read."""
        if layer == 0:
            self._write_inputs(resid)
        site = self.sites.attention[layer]
        x = self._read("attention", layer)  # [destination, row, d_model]
        qkv = site.read(x, self.graph.split_qkv)  # [head, row, d_head] each
        self.qkv = QkvHandover(site, layer, [self._by_head(heads) for heads in qkv])

    def projected(self, tensor: Tensor, layer: int, index: int) -> Tensor:
        """At hook_q, hook_k, hook_v: the projections of what the destinations read."""
        if self.qkv is None or self.qkv.layer != layer:
            raise RuntimeError(
                f"hook_{'qkv'[index]} of block {layer} fired without the block's read: its "
                "hook_resid_pre was removed inside the context (model.reset_hooks?)."
            )
        return self.qkv.take(tensor, index)

    def heads(self, z: Tensor, layer: int) -> Tensor:
        """At hook_z: the heads write. The model continues with a copy that has no gradient."""
        if self.qkv is not None:
            self.qkv.check_all_taken()
        site = self.sites.attention[layer]
        z_rows = site.scaled(z.flatten(0, 1))  # [row, head, d_head]
        differences = self._ordered(z_rows - self.reference.z[layer].flatten(0, 1))
        first = self.graph.first_head(layer)
        differences = self._or_held(first, differences.transpose(0, 1))  # [head, row, d_head]
        gates = None if self.gates is None else self.gates.of_heads(first, len(differences))
        bias_in_heads = self.reference.bias_in_heads
        self._stream.write_heads(first, differences, site, gates, bias_in_heads=bias_in_heads)
        return z.detach()

    def mlp_in(self, tensor: Tensor, layer: int) -> Tensor:
        x = self._restored(self._read("mlp", layer)[0])  # [row, d_model]
        return self.sites.mlp[layer].norm(x).view(tensor.shape)

    def hidden(self, h: Tensor, layer: int) -> Tensor | None:
        """At what an MLP's output weights read."""
        if self.gates is None or self.reference.hidden is None:
            return None
        return self.gates.hidden(h, self.reference.hidden[layer], layer)

    def mlp_out(self, y: Tensor, layer: int) -> Tensor:
        source = self.graph.mlp_source(layer)
        self._write(source, (y - self.reference.mlp[layer]).flatten(0, 1))
        return y.detach()

    def _write(self, source: int, difference: Tensor) -> None:
        difference = self._or_held(source, self._ordered(difference))
        if self.gates is not None:
            difference = self.gates.gated(difference, source)
        self._stream.write(source, difference)

    def _or_held(self, source: int, difference: Tensor) -> Tensor:
        if self.held is None or source not in self.held.sources:
            return difference
        return self.held.share * difference.detach()

    def logits_in(self, resid: Tensor) -> Tensor:
        """At the last residual stream: what the logits read, at the read positions only."""
        if self.read_positions is None:
            return self._restored(self._read("logits", self.graph.n_layers)[0]).view(resid.shape)
        rows = rows_of(self.read_positions, self.pos)
        if self.sites.cut is None:
            x = self._read("logits", self.graph.n_layers, rows)[0]  # [batch * read, d_model]
            return x.view(self.batch, -1, x.shape[-1])
        # The Bridge must see the input's length until after its last norm; `cut` undoes this.
        rows = rows.unique()  # index_copy would give a repeated row its gradient twice
        x = self._read("logits", self.graph.n_layers, rows)[0]  # [row, d_model]
        everywhere = x.new_zeros(self.batch * self.pos, x.shape[-1]).index_copy(0, rows, x)
        return everywhere.view(resid.shape)

    def cut(self, normalised: Tensor) -> Tensor | None:
        if self.read_positions is None:
            return None
        index = self.read_positions.unsqueeze(-1).expand(-1, -1, normalised.shape[-1])
        return normalised.gather(1, index)

    def finish(self, output: Any, keep: list[Tensor] | None) -> None:
        """After the forward: check that every destination has read and the logits' shape.

        Args:
            keep: a list that gets a copy of the sources' differences.
        """
        if self.reads != len(self.graph.reads):
            raise RuntimeError(
                f"{self.reads} of {len(self.graph.reads)} reads happened in this forward: a hook "
                "point did not fire, or its hook was removed inside the context "
                "(model.reset_hooks?)."
            )
        if self.gates is not None:
            self.gates.finish(self.graph.n_layers)
        logits = getattr(output, "logits", output)
        if isinstance(logits, Tensor) and logits.dim() == 3:
            expected = (
                self.batch,
                self.pos if self.read_positions is None else self.read_positions.shape[1],
            )
            if logits.shape[:2] != expected:
                raise RuntimeError(
                    f"the model gave logits of shape {tuple(logits.shape)}, expected {expected} "
                    "first."
                )
        if keep is not None:
            assert self._stream.differences is not None
            differences = self._stream.differences
            back = None if self.spans is None else self.spans.back
            keep.append(differences.clone() if back is None else differences.index_select(1, back))
        self._stream.close()

    def abandon(self) -> None:
        """After a forward that failed half-way: free its autograd graph."""
        if self.stream is not None:
            self.stream.close()

    @property
    def _stream(self) -> Stream:
        if self.stream is None:
            raise RuntimeError("block 0 did not run: its hook_resid_pre did not fire.")
        return self.stream

    def _write_inputs(self, resid: Tensor) -> None:
        if resid.shape[:2] != (self.batch, self.pos):
            raise RuntimeError(
                f"block 0 got shape {tuple(resid.shape)} for tokens [{self.batch}, {self.pos}]."
            )
        kind = WholeStream if self.whole else Stream
        products = None if self.spans is None else self.spans.products
        like = resid.flatten(0, 1)
        self.stream = kind(self.graph.n_sources, like, self.pool, self.contract, products)
        inputs = split_inputs(self.graph, resid, self.embedding)
        for source, (value, reference) in enumerate(
            zip(inputs, self.reference.inputs, strict=True)
        ):
            self._write(source, (value - reference).flatten(0, 1))

    def _read(self, kind: str, layer: int, rows: Tensor | None = None) -> Tensor:
        index = self.read_of[kind, layer]
        self.reads += 1
        mask = self.blocks[index]
        reference = self._ordered(self.reference.streams[index].flatten(0, 1))
        if rows is not None and self.spans is not None:
            rows = self.spans.back[rows]
        if kind == "logits" or self.whole:
            return self._stream.read(mask, reference, rows)
        group = self.groups[index // READS_AHEAD]
        if index == group[0]:
            self._stream.read_ahead(joint_mask(self.blocks, group))
        n_mixed = self.graph.reads[group[0]].n_sources
        return self._stream.read_rest(mask[..., n_mixed:], reference)

    def _by_head(
        self, x: Float[Tensor, "head row d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        rows = self._restored(x.transpose(0, 1))  # [row, head, d_head]
        return rows.reshape(self.batch, self.pos, x.shape[0], x.shape[2])

    def _ordered(self, rows: Tensor) -> Tensor:
        """Rows as the stream has them."""
        return rows if self.spans is None else self.spans.ordered(rows)

    def _restored(self, rows: Tensor) -> Tensor:
        """Rows of the stream as the model has them."""
        return rows if self.spans is None else self.spans.restored(rows)


class QkvHandover:
    """The queries, keys and values of one block, which its hooks hand to the model once each."""

    def __init__(
        self,
        site: AttentionSite,
        layer: int,
        qkv: Sequence[Float[Tensor, "batch pos _head d_head"]],
    ) -> None:
        self.site, self.layer = site, layer
        self._waiting = dict(enumerate(qkv))

    def take(self, tensor: Tensor, index: int) -> Float[Tensor, "batch pos _head d_head"]:
        """What replaces `tensor` at the hook of queries (0), keys (1) or values (2)."""
        if index not in self._waiting:
            raise RuntimeError(
                f"hook_{'qkv'[index]} of block {self.layer} fired twice in one forward."
            )
        return self.site.add_positions(index, self._waiting.pop(index).to(tensor.dtype))

    def check_all_taken(self) -> None:
        """Raise RuntimeError if a hook has not fired."""
        if self._waiting:
            raise RuntimeError(
                f"hook_{'qkv'[min(self._waiting)]} of block {self.layer} did not fire, or its hook "
                "was removed inside the context (model.reset_hooks?)."
            )


# ------------------------------------------------------------------------ what a forward runs with


def mask_blocks(
    graph: EdgeGraph, mask: Shaped[Tensor, " edge"]
) -> list[Shaped[Tensor, "_destination *span _source"]]:
    """The mask of each read, as views."""
    blocks = mask.split([read.n_destinations * read.n_sources for read in graph.reads])
    shapes = [graph.block_shape(read) for read in graph.reads]
    return [block.view(shape) for block, shape in zip(blocks, shapes, strict=True)]


def rows_of(
    read_positions: Int[Tensor, "batch read"], n_positions: int
) -> Int[Tensor, " read_row"]:
    """The rows (batch * pos) of the read positions."""
    starts = torch.arange(len(read_positions), device=read_positions.device)[:, None] * n_positions
    return (read_positions + starts).flatten()  # [batch * read]


def reference_for(reference: Reference, tokens: Tensor) -> Reference:
    """The reference for these tokens' shape: expanded if it is a mean or zero."""
    batch, pos = tokens.shape
    if (reference.batch, reference.n_positions) == (batch, pos):
        return reference
    if reference.any_batch:
        return reference.expand(batch, pos)
    raise ValueError(
        f"the tokens have shape {(batch, pos)}, the corrupted prompts "
        f"{(reference.batch, reference.n_positions)}. Edge masks mix the two runs position by "
        "position, so both must have the same shape."
    )


def checked_positions(
    read_positions: Tensor | None, tokens: Tensor, device: torch.device
) -> Tensor | None:
    if read_positions is None:
        return None
    batch, pos = tokens.shape
    if (
        read_positions.dim() != 2
        or read_positions.shape[0] != batch
        or read_positions.is_floating_point()
    ):
        raise ValueError(
            f"read_positions has shape {tuple(read_positions.shape)}, expected whole numbers "
            f"[{batch}, read]."
        )
    first, last = (
        torch.stack(read_positions.aminmax()).tolist() if read_positions.numel() else (0, 0)
    )
    if not 0 <= first <= last < pos:
        raise ValueError(f"read_positions go from {first} to {last}, expected 0 to {pos - 1}.")
    return read_positions.to(device, torch.long)


def spans_of(
    spans: Tensor | None, tokens: Tensor, graph: EdgeGraph, device: torch.device
) -> Spans | None:
    """Where the spans of these tokens are, if the graph has any."""
    if not graph.spans:
        return None
    batch, pos = tokens.shape
    if spans is None and graph.by_position and pos <= graph.n_spans:
        spans = torch.arange(pos, device=device).expand(batch, pos)
    if spans is None:
        raise ValueError(
            f"the edges of this graph have masks of their own in {graph.n_spans} spans "
            f"({', '.join(graph.spans[:8])}), so a run needs to know which positions (of {pos}) "
            "are whose: give spans=…, [batch, pos], such as batch.spans of a task that has them."
        )
    if spans.shape != tokens.shape or spans.is_floating_point():
        raise ValueError(
            f"spans has shape {tuple(spans.shape)} and type {spans.dtype}, expected whole numbers "
            f"of the tokens' shape, {tuple(tokens.shape)}."
        )
    return Spans(spans.to(device, torch.long), graph.n_spans)
