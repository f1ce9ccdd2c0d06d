"""Masked forwards that keep no block's activations: backward runs each half block again.

1. Forward runs half block after half block without gradients. What it keeps is the buffer of
   differences, [source, row, d_model]: the only state between half blocks.
2. Backward goes from the last half block to the first. It mixes the half block's inputs from the
   buffer again (the sources before it are all there), runs it again with gradients, and sends the
   gradients of what it wrote back through it to its inputs.
3. The inputs' gradients give the mask's (times the differences) and are added to the gradient
   buffer (times the mask), as in `residual.py`.
4. The mixes of a few neighbouring reads share one pass over the buffer, and are kept in `slots`. In
   backward a read's gradient overwrites its mix, for the pass that they share.

Memory is two buffers, the slots and one half block's activations, whatever the depth; the price is
one more forward. Half blocks are run by `half_blocks.py`. The first time that a model is attached,
a check on a few tokens compares logits and gradients with `MaskedModel`'s.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". Here only the buffer of
differences has to be kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_edgeprune.ablation.recording import split_inputs
from tl_edgeprune.ablation.reference import Reference
from tl_edgeprune.circuits.neurons import Neurons
from tl_edgeprune.forward.buffers import SOURCES_APART, BufferPool, add_rows
from tl_edgeprune.forward.call_checks import check_mask
from tl_edgeprune.forward.forward_pass import (
    HeldSources,
    checked_positions,
    mask_blocks,
    reference_for,
    rows_of,
)
from tl_edgeprune.forward.half_blocks import Blocks, BrokenHalves, reporting_broken_halves
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.forward.residual import Products, joint_mask, read_groups
from tl_edgeprune.forward.self_check import (
    model_name,
    once_per_model,
    probe_tokens,
    relative,
    tolerance,
)
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.shards import one_block_at_a_time
from tl_edgeprune.hooks.sites import Sites


def reads_together(graph: EdgeGraph) -> int:
    """How many reads share one pass over the buffer: those of a few blocks, as many as take about
    a quarter of the buffer's memory.
    """
    destinations = graph.attention_destinations + int(graph.has_mlp)
    blocks = min(graph.n_layers, math.ceil(graph.n_sources / (4 * destinations)))
    return blocks * (2 if graph.has_mlp else 1)


class RecomputedModel(MaskedModel):
    """A MaskedModel whose gradients take the memory of two buffers and one half block."""

    def __init__(self, model: Any, sites: Sites, graph: EdgeGraph) -> None:
        super().__init__(model, sites, graph)
        self.halves = Blocks(self)
        self.together = reads_together(graph)
        self._by_halves = False

    @classmethod
    @contextmanager
    def attach(
        cls,
        model: Any,
        graph: EdgeGraph | None = None,
        neurons: Neurons | Tensor | str | None = None,
    ) -> Iterator[RecomputedModel]:
        """As `MaskedModel.attach`. Raises NotImplementedError for a model whose blocks cannot be
        run by halves, for a graph with spans, and for gates on neurons.
        """
        if neurons is not None:
            raise NotImplementedError(
                "recompute=True takes no gates on neurons: use recompute=False, or leave neurons "
                "out."
            )
        if graph is not None and graph.spans:
            raise NotImplementedError(
                "recompute=True has one mask for all positions, and this graph has masks of their "
                "own in its spans: use recompute=False, or leave positions out."
            )
        with super().attach(model, graph) as run:
            assert isinstance(run, RecomputedModel)
            _check_once(run)
            run._by_halves = True
            yield run

    def release_buffers(self) -> None:
        """Free the buffers that are kept for the next forward."""
        self.pool = BufferPool()

    def __call__(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Shaped[Tensor, " edge"],
        reference: Reference,
        read_positions: Int[Tensor, "batch read"] | None = None,
        held: HeldSources | None = None,
        contract: Float[Tensor, "source row d_model"] | None = None,
        whole: bool = False,
        spans: Int[Tensor, "batch pos"] | None = None,
        neurons: Shaped[Tensor, "place unit"] | None = None,
    ) -> Float[Tensor, "batch read d_vocab"]:
        """As `MaskedModel`'s; `whole` changes nothing, and there are no spans and no neurons."""
        if not (self._by_halves and torch.is_grad_enabled()):
            return super().__call__(tokens, mask, reference, read_positions, held, contract, whole)
        self._checked_call(tokens, {})
        check_mask(mask, self.graph)
        self.gates_of(neurons)  # refused: none are attached
        self.halves.record(tokens)
        with torch.no_grad():
            resid, embedding = self.halves.embedded(tokens)
            inputs = split_inputs(self.graph, resid, embedding)
        read_positions = checked_positions(read_positions, tokens, resid.device)
        reference = reference_for(reference, tokens)
        job = _Job(self, inputs, reference, read_positions, held, contract)
        return self.halves.logits(_HalfByHalf.apply(job, mask, *reference._tensors()))


class _HalfByHalf(torch.autograd.Function):
    """Mask and reference to what the logits read, [batch, read, d_model]."""

    @staticmethod
    def forward(ctx: Any, job: _Job, mask: Tensor, *reference: Tensor) -> Tensor:
        ctx.job = job
        ctx.save_for_backward(mask, *reference)
        x = job.forward(mask, reference)  # without gradients, as all forwards of functions are
        if not any(ctx.needs_input_grad):
            job.release()
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, *reference = ctx.saved_tensors
        return None, *ctx.job.backward(mask, tuple(reference), grad, ctx.needs_input_grad[2:])


class _Job:
    """One masked forward, and its backward."""

    def __init__(
        self,
        run: RecomputedModel,
        inputs: Float[Tensor, "input batch pos d_model"],
        reference: Reference,
        read_positions: Int[Tensor, "batch read"] | None,
        held: HeldSources | None,
        contract: Float[Tensor, "source row d_model"] | None,
    ) -> None:
        self.run, self.graph, self.inputs = run, run.graph, inputs
        self.reference, self.held, self.contract = reference, held, contract
        self.batch, self.pos, self.d_model = inputs.shape[1:]
        self.rows = None if read_positions is None else rows_of(read_positions, self.pos)
        self.differences: Tensor | None = None

    def release(self) -> None:
        """Give the buffer back; a backward after this raises."""
        self.run.pool.give(self.differences)
        self.differences = None

    def forward(
        self, mask: Shaped[Tensor, " edge"], tensors: tuple[Tensor, ...]
    ) -> Float[Tensor, "batch read d_model"]:
        """What the logits read. `tensors`: the reference's."""
        reference = self._reference_of(tensors)
        like = self.inputs[0].flatten(0, 1)  # [row, d_model]
        self.run.pool.start(like)
        self.differences = self.run.pool.take(self.graph.n_sources, like, SOURCES_APART)
        for source, value in enumerate(self.inputs - reference.inputs):
            torch.mul(value.flatten(0, 1), self._share(source), out=self.differences[source])
        reads = _Reads(self, mask, reference)
        with one_block_at_a_time(self.run.model) as turn_to:
            for group in reads.groups:
                reads.mix_ahead(group)
                for index in group:
                    turn_to(self.graph.reads[index].layer)
                    self._write(index, self._half(index, reads.mixed(index), reference))
        x = reads.logits()
        reads.close()
        return x.view(self.batch, -1, self.d_model)  # [batch, read, d_model]

    def backward(
        self,
        mask: Shaped[Tensor, " edge"],
        tensors: tuple[Tensor, ...],
        grad: Float[Tensor, "batch read d_model"],
        needs_grad: tuple[bool, ...],
    ) -> list[Tensor | None]:
        """Gradients of the mask, and of those of the reference's four tensors that need one."""
        if self.differences is None:
            raise RuntimeError(
                "backward through a masked forward that has been backpropagated before: its "
                "buffers are gone. Run the forward again for each backward."
            )
        reference = self._reference_of(tensors)
        back = _Gradients(self, mask, reference, needs_grad)
        back.add_logits(grad.flatten(0, 1))
        with one_block_at_a_time(self.run.model) as turn_to:
            for group in reversed(back.groups):
                back.mix_ahead(group)
                for index in reversed(group):
                    turn_to(self.graph.reads[index].layer)
                    self._back_through(index, back, reference)
                back.add_ahead(group)
        return back.finish()

    def _back_through(self, index: int, back: _Gradients, reference: Reference) -> None:
        """Run a half block again and send the gradient of what it wrote to what it read."""
        if self._is_held(self._sources(index).start):
            back.add_nothing(index)
            return
        x, grad = back.mixed(index), self._grad_written(index, back)
        back.add_reference(index, grad)
        if self.graph.reads[index].kind == "mlp":
            self._back_through_mlp(index, x, grad, reference)
        else:
            self._back_through_attention(index, x, grad, reference)
        back.add(index, x)

    # ------------------------------------------------------------------------------ half blocks

    def _half(
        self, index: int, x: Float[Tensor, "destination row d_model"], reference: Reference
    ) -> Tensor:
        """What a half block that reads x writes, less its reference: heads before their output
        weights, [head, row, d_head], or an MLP, [1, row, d_model].
        """
        read = self.graph.reads[index]
        if read.kind == "mlp":
            return self._mlp(read.layer, x, reference)
        return self._heads(read.layer, self._qkv(read.layer, x), reference)

    def _mlp(
        self, layer: int, x: Float[Tensor, "1 row d_model"], reference: Reference
    ) -> Float[Tensor, "1 row d_model"]:
        y = self.run.halves.mlp(layer, x.view(self.batch, self.pos, self.d_model))
        return (y - reference.mlp[layer]).flatten(0, 1)[None]

    def _qkv(
        self, layer: int, x: Float[Tensor, "destination row d_model"]
    ) -> list[Float[Tensor, "batch pos _head d_head"]]:
        qkv = self.run.sites.attention[layer].read_in_pieces(x, self.graph.split_qkv)
        rows = [heads.transpose(0, 1) for heads in qkv]  # [row, head, d_head] each
        return [heads.reshape(self.batch, self.pos, *heads.shape[1:]) for heads in rows]

    def _heads(
        self,
        layer: int,
        qkv: list[Float[Tensor, "batch pos _head d_head"]],
        reference: Reference,
    ) -> Float[Tensor, "head row d_head"]:
        z = self.run.halves.attention(layer, *qkv)
        scaled = self.run.sites.attention[layer].scaled(z.flatten(0, 1))  # [row, head, d_head]
        return (scaled - reference.z[layer].flatten(0, 1)).transpose(0, 1)

    def _back_through_mlp(self, index: int, x: Tensor, grad: Tensor, reference: Reference) -> None:
        """Overwrite x by its gradient."""
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            written = self._mlp(self.graph.reads[index].layer, leaf, reference)
        x.copy_(torch.autograd.grad(written, leaf, grad)[0])

    def _back_through_attention(
        self, index: int, x: Tensor, grad: Tensor, reference: Reference
    ) -> None:
        """Overwrite x by its gradient."""
        layer = self.graph.reads[index].layer
        leaves = [heads.detach().requires_grad_() for heads in self._qkv(layer, x)]
        with torch.enable_grad():
            written = self._heads(layer, leaves, reference)
        grads = torch.autograd.grad(written, leaves, grad)
        del written, leaves
        by_head = [g.flatten(0, 1).transpose(0, 1) for g in grads]  # [head, row, d_head]
        self.run.sites.attention[layer].read_in_pieces_back(x, by_head, self.graph.split_qkv)

    def _write(self, index: int, written: Tensor) -> None:
        """What a half block gave, into its sources' rows of the buffer."""
        assert self.differences is not None
        read, sources = self.graph.reads[index], self._sources(index)
        rows, share = self.differences[sources.start : sources.stop], self._share(sources.start)
        written = written if share == 1 else written * share
        if read.kind == "mlp":
            rows.copy_(written)
        else:
            site, bias_in_heads = self.run.sites.attention[read.layer], self.reference.bias_in_heads
            site.write(written, rows, bias_in_heads=bias_in_heads)

    def _grad_written(self, index: int, back: _Gradients) -> Tensor:
        """The gradient of what `_half` gave, from the gradient buffer."""
        read, sources = self.graph.reads[index], self._sources(index)
        rows = back.gradients[sources.start : sources.stop]
        return rows if read.kind == "mlp" else self.run.sites.attention[read.layer].write_back(rows)

    # ---------------------------------------------------------------------------------- details

    def _reference_of(self, tensors: tuple[Tensor, ...]) -> Reference:
        return self.reference._with(tensor.detach() for tensor in tensors)

    def _sources(self, index: int) -> range:
        """The sources that the half block of a read writes."""
        return self.graph.sources_written(self.graph.reads[index])

    def _is_held(self, source: int) -> bool:
        return self.held is not None and source in self.held.sources

    def _share(self, source: int) -> float:
        return self.held.share if self.held is not None and self._is_held(source) else 1.0


class _Reads:
    """What destinations read, from the buffer, a group of neighbouring reads at a time."""

    def __init__(self, job: _Job, mask: Shaped[Tensor, " edge"], reference: Reference) -> None:
        self.job, self.reads, self.streams = job, job.graph.reads, reference.streams
        assert job.differences is not None
        self.differences = job.differences
        self.products = Products()
        self.blocks = mask_blocks(job.graph, mask.detach().to(self.differences))
        self.groups = read_groups(len(self.reads), job.run.together)
        sizes = [sum(len(self.blocks[index]) for index in group) for group in self.groups]
        self.memory = job.run.pool.take(max(sizes), self.differences[0])
        self.slots: dict[int, Tensor] = {}
        self.n_mixed = 0  # how many sources the group's shared pass goes over

    def mix_ahead(self, group: range) -> None:
        """Mix, for all destinations of a group, the sources that its first read sees."""
        self.n_mixed = self.reads[group[0]].n_sources
        mask, slots = self._joint(group)
        self.products.mix(mask, self.differences[: self.n_mixed], slots)
        parts = slots.split([len(self.blocks[index]) for index in group])
        self.slots = dict(zip(group, parts, strict=True))

    def mixed(self, index: int) -> Float[Tensor, "destination row d_model"]:
        """What the destinations of a read of this group read (in its slot)."""
        x = self.slots[index].add_(self.streams[index].flatten(0, 1))
        recent = self.differences[self.n_mixed : self.reads[index].n_sources]
        if len(recent):
            self.products.add(self.blocks[index][:, self.n_mixed :], recent, x)
        return x

    def logits(self) -> Float[Tensor, "read_row d_model"]:
        """What the logits read, at the read positions."""
        rows, stream = self.job.rows, self.streams[-1].flatten(0, 1)
        stream, block = stream if rows is None else stream[rows], self._at_rows(self.differences)
        return self.products.mixed(self.blocks[-1], stream, block, rows)[0]

    def close(self) -> None:
        self.job.run.pool.give(self.memory)

    def _joint(self, group: range) -> tuple[Tensor, Tensor]:
        """The masks of a group's destinations over the sources before it, and their slots."""
        mask = joint_mask(self.blocks, group)
        return mask, self.memory[: len(mask)]

    def _at_rows(self, buffer: Tensor) -> Tensor:
        return buffer if self.job.rows is None else buffer[:, self.job.rows]


class _Gradients(_Reads):
    """The reads once more, and what their gradients add to the gradient buffer, to the mask's
    gradient and to the reference's.
    """

    def __init__(
        self,
        job: _Job,
        mask: Shaped[Tensor, " edge"],
        reference: Reference,
        needs_grad: tuple[bool, ...],
    ) -> None:
        super().__init__(job, mask, reference)
        n_sources, like = len(self.differences), self.differences[0]
        self.gradients = job.run.pool.take(n_sources, like, SOURCES_APART).zero_()
        self.against = self.differences if job.contract is None else job.contract
        self.of_mask = torch.empty_like(mask)
        self.of_blocks = mask_blocks(job.graph, self.of_mask)
        tensors = reference._tensors()
        self.of_reference = [
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip(tensors, needs_grad, strict=True)
        ]

    def add_logits(self, grad: Float[Tensor, "read_row d_model"]) -> None:
        """From the logits' read."""
        rows, mask = self.job.rows, self.blocks[-1]
        against = self._at_rows(self.against)
        self.of_blocks[-1].copy_(self.products.of_mask(mask, grad[None], against, rows))
        if rows is None:
            self.products.add_back(mask, grad[None], self.gradients)
        else:
            add_rows(self.gradients, rows, mask.T.unsqueeze(-1) * grad)  # [source, read, d_model]
        stream = self._of_stream(-1)
        if stream is not None:
            everywhere = torch.arange(len(stream), device=grad.device)
            stream.index_add_(0, everywhere if rows is None else rows, grad)

    def add(self, index: int, grad: Float[Tensor, "destination row d_model"]) -> None:
        """From a read whose slot holds the gradient, of the sources since the group's shared pass;
        `add_ahead` does those before.
        """
        first, stop = self.n_mixed, self.reads[index].n_sources
        if stop > first:
            mask, against = self.blocks[index][:, first:], self.against[first:stop]
            self.of_blocks[index][:, first:] = self.products.of_mask(mask, grad, against, None)
            self.products.add_back(mask, grad, self.gradients[first:stop])
        stream = self._of_stream(index)
        if stream is not None:
            stream.copy_(grad.sum(0))

    def add_nothing(self, index: int) -> None:
        """For a read that no gradient comes from."""
        self.of_blocks[index][:, self.n_mixed :] = 0
        self.slots[index].zero_()

    def add_ahead(self, group: range) -> None:
        """From all reads of a group, of the sources before it, in one pass over both buffers."""
        mask, grads = self._joint(group)
        of_mask = self.products.of_mask(mask, grads, self.against[: self.n_mixed], None)
        sizes = [len(self.blocks[index]) for index in group]
        for index, of_block in zip(group, of_mask.split(sizes), strict=True):
            self.of_blocks[index][:, : self.n_mixed] = of_block
        self.products.add_back(mask, grads, self.gradients[: self.n_mixed])

    def add_reference(self, index: int, grad: Tensor) -> None:
        """The gradient of a half block's reference, which is subtracted from what it writes."""
        read = self.reads[index]
        tensor = self.of_reference[2 if read.kind == "mlp" else 1]
        if tensor is not None:
            rows = tensor[read.layer].flatten(0, 1)
            rows.copy_(-grad[0] if read.kind == "mlp" else -grad.transpose(0, 1))

    def finish(self) -> list[Tensor | None]:
        """All gradients; the buffers go back to where they came from."""
        of_inputs, n_inputs = self.of_reference[0], self.job.graph.n_inputs
        if of_inputs is not None:
            of_inputs.copy_(-self.gradients[:n_inputs].reshape_as(of_inputs))
        self.job.run.pool.give(self.gradients)
        self.job.release()
        self.close()
        return [self.of_mask, *self.of_reference]

    def _of_stream(self, index: int) -> Float[Tensor, "row d_model"] | None:
        streams = self.of_reference[3]
        return None if streams is None else streams[index].flatten(0, 1)


# -------------------------------------------------------------------------------------- the check


def _check_once(run: RecomputedModel) -> None:
    """Raise NotImplementedError unless half blocks give the whole model's logits and gradients."""
    if not run.active_dropout():
        once_per_model(run, "half blocks", lambda: _check_halves(run))


def _check_halves(run: RecomputedModel) -> None:
    name, advice = model_name(run), "Leave recompute out for it."
    try:
        with reporting_broken_halves():
            logits_error, gradient_error = _errors(run)
    except BrokenHalves as error:
        raise NotImplementedError(
            f"{name}: its blocks cannot be run by halves, as recompute=True asks ({error}). "
            f"{advice}"
        ) from error
    if not max(logits_error, gradient_error) <= tolerance(run.dtype):
        raise NotImplementedError(
            f"{name}: run by halves, as recompute=True asks, its logits are off by "
            f"{logits_error:.2g} of their size and its gradients by {gradient_error:.2g}. {advice}"
        )


def _errors(run: RecomputedModel) -> list[float]:
    """How far logits and gradients are off on a few tokens, in units of their size."""
    tokens = probe_tokens(run)
    read_positions = torch.full((len(tokens), 1), tokens.shape[1] - 1, device=tokens.device)
    reference, _ = run.record(tokens.flip(0))
    uniform = torch.rand(run.graph.n_edges, generator=torch.Generator().manual_seed(0))

    def logits_and_gradient(by_halves: bool) -> tuple[Tensor, Tensor]:
        run._by_halves = by_halves
        mask = uniform.to(tokens.device).requires_grad_()
        with torch.enable_grad():
            logits = run(tokens, mask, reference, read_positions)
            (grad,) = torch.autograd.grad(logits.float().logsumexp(-1).sum(), mask)
        return logits.detach(), grad

    expected, actual = logits_and_gradient(False), logits_and_gradient(True)
    return [relative(a, e) for a, e in zip(actual, expected, strict=True)]
