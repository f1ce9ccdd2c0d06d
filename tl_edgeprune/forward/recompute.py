"""Masked forwards that keep no block's activations: backward runs each half block again.

1. Forward runs half block after half block without gradients. What it keeps is the buffer of
   differences, [source, row, d_model]: the only state between half blocks.
2. Backward goes from the last half block to the first. It mixes the half block's inputs from the
   buffer again (the sources before it are all there), runs it again with gradients, and sends the
   gradients of what it wrote back through it to its inputs.
3. The inputs' gradients give the mask's (times the differences) and are added to the gradient
   buffer (times the mask), as in `residual.py`.
4. The mixes of a few neighbouring reads share one pass over the buffer, and lie in `slots`. In
   backward a read's gradient takes the place of its mix, for the pass that they share.

Memory is two buffers, the slots and one half block's activations, whatever the depth; the price is
one more forward. Half blocks are run by `half_blocks.py`; a check on a few tokens holds logits and
gradients to `MaskedModel`'s the first time that a model is seen.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", where one buffer of differences
is what has to be kept.
"""

from __future__ import annotations

import math
import weakref
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
from tl_edgeprune.forward.forward_pass import Held, checked_positions, fitting
from tl_edgeprune.forward.half_blocks import Blocks
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.forward.self_check import probe_tokens, relative, tolerance
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.shards import one_block_at_a_time
from tl_edgeprune.hooks.sites import AttentionSite, Sites

# Numbers that are normalised at once: what a processor's cache holds; on a GPU enough to fill it.
PIECE, PIECE_ON_GPU = 2**20, 2**26


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
        self._trusted = False

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
            run._trusted = True
            yield run

    def release_buffers(self) -> None:
        """Free the buffers that are kept for the next forward."""
        self.pool = BufferPool()

    def __call__(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Shaped[Tensor, " edge"],
        reference: Reference,
        positions: Int[Tensor, "batch read"] | None = None,
        held: Held | None = None,
        contract: Float[Tensor, "source row d_model"] | None = None,
        whole: bool = False,
        spans: Int[Tensor, "batch pos"] | None = None,
        neurons: Shaped[Tensor, "place unit"] | None = None,
    ) -> Float[Tensor, "batch read d_vocab"]:
        """As `MaskedModel`'s; `whole` changes nothing, and there are no spans and no neurons."""
        if not (self._trusted and torch.is_grad_enabled()):
            return super().__call__(tokens, mask, reference, positions, held, contract, whole)
        self._checked_call(tokens, {})
        check_mask(mask, self.graph)
        self.gates_of(neurons)  # refused: none are attached
        self.halves.record(tokens)
        with torch.no_grad():
            resid, embedding = self.halves.embedded(tokens)
            inputs = split_inputs(self.graph, resid, embedding)
        positions = checked_positions(positions, tokens, resid.device)
        reference = fitting(reference, tokens)
        job = _Job(self, inputs, reference, positions, held, contract)
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
        positions: Int[Tensor, "batch read"] | None,
        held: Held | None,
        contract: Float[Tensor, "source row d_model"] | None,
    ) -> None:
        self.run, self.graph, self.inputs = run, run.graph, inputs
        self.reference, self.held, self.contract = reference, held, contract
        self.batch, self.pos, self.d_model = inputs.shape[1:]
        self.rows: Int[Tensor, " read"] | None = None
        if positions is not None:
            starts = torch.arange(self.batch, device=inputs.device)[:, None] * self.pos
            self.rows = (positions + starts).flatten()
        self.differences: Tensor | None = None

    def release(self) -> None:
        """Give the buffer back; a backward after this raises."""
        self.run.pool.give(self.differences)
        self.differences = None

    def forward(
        self, mask: Shaped[Tensor, " edge"], tensors: tuple[Tensor, ...]
    ) -> Float[Tensor, "batch read d_model"]:
        """What the logits read. `tensors`: the reference's."""
        reference = self._of(tensors)
        like = self.inputs[0].flatten(0, 1)  # [row, d_model]
        self.run.pool.start(like)
        self.differences = self.run.pool.take(self.graph.n_sources, like, SOURCES_APART)
        for source, value in enumerate(self.inputs - reference.inputs):
            torch.mul(value.flatten(0, 1), self._share(source), out=self.differences[source])
        reads = _Reads(self, mask, reference)
        with one_block_at_a_time(self.run.model) as turn_to:
            for group in reads.groups:
                reads.mix_ahead(group)
                for place in group:
                    turn_to(self.graph.reads[place].layer)
                    self._write(place, self._half(place, reads.mixed(place), reference))
        x = reads.logits()
        reads.close()
        return x.view(self.batch, -1, self.d_model)

    def backward(
        self,
        mask: Shaped[Tensor, " edge"],
        tensors: tuple[Tensor, ...],
        grad: Float[Tensor, "batch read d_model"],
        wanted: tuple[bool, ...],
    ) -> list[Tensor | None]:
        """Gradients of the mask, and of the reference's four tensors where wanted."""
        if self.differences is None:
            raise RuntimeError(
                "backward through a masked forward that has been backpropagated before: its "
                "buffers are gone. Run the forward again for each backward."
            )
        reference = self._of(tensors)
        back = _Gradients(self, mask, reference, wanted)
        back.add_logits(grad.flatten(0, 1))
        with one_block_at_a_time(self.run.model) as turn_to:
            for group in reversed(back.groups):
                back.mix_ahead(group)
                for place in reversed(group):
                    turn_to(self.graph.reads[place].layer)
                    self._back_through(place, back, reference)
                back.add_ahead(group)
        return back.finish()

    def _back_through(self, place: int, back: _Gradients, reference: Reference) -> None:
        """Run a half block again and send the gradient of what it wrote to what it read."""
        if self._is_held(self._first_source(place)):
            back.add_nothing(place)
            return
        x, grad = back.mixed(place), self._grad_written(place, back)
        back.add_reference(place, grad)
        if self.graph.reads[place].kind == "mlp":
            self._back_through_mlp(place, x, grad, reference)
        else:
            self._back_through_attention(place, x, grad, reference)
        back.add(place, x)

    # ------------------------------------------------------------------------------ half blocks

    def _half(
        self, place: int, x: Float[Tensor, "destination row d_model"], reference: Reference
    ) -> Tensor:
        """What a half block that reads x writes, less its reference: heads before their output
        weights, [head, row, d_head], or an MLP, [1, row, d_model].
        """
        read = self.graph.reads[place]
        if read.kind == "mlp":
            return self._mlp(read.layer, x, reference)
        site = self.run.sites.attention[read.layer]
        parts = project(x, site, self.graph.split_qkv)
        return self._heads(read.layer, [self._by_head(part) for part in parts], reference)

    def _mlp(
        self, layer: int, x: Float[Tensor, "1 row d_model"], reference: Reference
    ) -> Float[Tensor, "1 row d_model"]:
        y = self.run.halves.mlp(layer, x.view(self.batch, self.pos, self.d_model))
        return (y - reference.mlp[layer]).flatten(0, 1)[None]

    def _heads(
        self, layer: int, parts: list[Tensor], reference: Reference
    ) -> Float[Tensor, "head row d_head"]:
        """From queries, keys and values, [batch, pos, head, d_head] each."""
        z = self.run.halves.attention(layer, *parts)
        scaled = self.run.sites.attention[layer].scaled(z.reshape(-1, *z.shape[2:]))
        return (scaled - reference.z[layer].flatten(0, 1)).transpose(0, 1)

    def _back_through_mlp(self, place: int, x: Tensor, grad: Tensor, reference: Reference) -> None:
        """Overwrite x by its gradient."""
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            written = self._mlp(self.graph.reads[place].layer, leaf, reference)
        x.copy_(torch.autograd.grad(written, leaf, grad)[0])

    def _back_through_attention(
        self, place: int, x: Tensor, grad: Tensor, reference: Reference
    ) -> None:
        """Overwrite x by its gradient."""
        layer = self.graph.reads[place].layer
        site, split = self.run.sites.attention[layer], self.graph.split_qkv
        leaves = [self._by_head(p).detach().requires_grad_() for p in project(x, site, split)]
        with torch.enable_grad():
            written = self._heads(layer, leaves, reference)
        grads = torch.autograd.grad(written, leaves, grad)
        del written, leaves
        project_back(x, [g.flatten(0, 1).transpose(0, 1) for g in grads], site, split)

    def _write(self, place: int, written: Tensor) -> None:
        """What a half block gave, into its sources' rows of the buffer."""
        read, rows = self.graph.reads[place], self._sources(self.differences, place)
        share = self._share(self._first_source(place))
        written = written if share == 1 else written * share
        if read.kind == "mlp":
            rows.copy_(written)
            return
        site = self.run.sites.attention[read.layer]
        torch.bmm(written.to(rows.dtype), site.output, out=rows)
        if site.gain is not None:
            rows.mul_(site.gain)
        bias = self.reference.head_bias(site)
        if bias is not None:
            rows.add_(bias)

    def _grad_written(self, place: int, back: _Gradients) -> Tensor:
        """The gradient of what `_half` gave, from the gradient buffer."""
        read, rows = self.graph.reads[place], self._sources(back.gradients, place)
        if read.kind == "mlp":
            return rows
        site = self.run.sites.attention[read.layer]
        rows = rows if site.gain is None else rows * site.gain
        return torch.bmm(rows, site.output.transpose(1, 2))

    # ---------------------------------------------------------------------------------- details

    def _of(self, tensors: tuple[Tensor, ...]) -> Reference:
        return self.reference._with(tensor.detach() for tensor in tensors)

    def _by_head(
        self, x: Float[Tensor, "head row d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        return x.transpose(0, 1).reshape(self.batch, self.pos, x.shape[0], x.shape[2])

    def _first_source(self, place: int) -> int:
        """The first source that the half block of a read writes."""
        read = self.graph.reads[place]
        of_mlp = read.kind == "mlp"
        return self.graph.mlp_source(read.layer) if of_mlp else self.graph.first_head(read.layer)

    def _sources(self, buffer: Tensor | None, place: int) -> Float[Tensor, "source row d_model"]:
        """A buffer's rows of the sources that the half block of a read writes."""
        assert buffer is not None
        first = self._first_source(place)
        of_mlp = self.graph.reads[place].kind == "mlp"
        return buffer[first : first + (1 if of_mlp else self.graph.n_heads)]

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
        flat = mask.detach().to(self.differences)
        self.blocks = [
            flat[read.edges].view(read.n_destinations, read.n_sources) for read in self.reads
        ]
        places, size = list(range(len(self.reads) - 1)), job.run.together
        self.groups = [places[start : start + size] for start in range(0, len(places), size)]
        most = max(sum(self.reads[p].n_destinations for p in group) for group in self.groups)
        self.memory = job.run.pool.take(most, self.differences[0])
        self.slots: dict[int, Tensor] = {}
        self.first = 0  # how many sources the group's shared pass goes over

    def mix_ahead(self, group: list[int]) -> None:
        """Mix, for all destinations of a group, the sources that its first read sees."""
        self.first = self.reads[group[0]].n_sources
        whole, together = self._together(group)
        torch.mm(together, self.differences[: self.first].flatten(1), out=whole.flatten(1))
        parts = whole.split([self.reads[place].n_destinations for place in group])
        self.slots = dict(zip(group, parts, strict=True))

    def mixed(self, place: int) -> Float[Tensor, "destination row d_model"]:
        """What the destinations of a read of this group read (in its slot)."""
        x = self.slots[place].add_(self.streams[place].flatten(0, 1))
        rest = self.differences[self.first : self.reads[place].n_sources]
        if len(rest):
            x.flatten(1).addmm_(self.blocks[place][:, self.first :], rest.flatten(1))
        return x

    def logits(self) -> Float[Tensor, "row d_model"]:
        """What the logits read, at the read positions."""
        stream, block = self.streams[-1].flatten(0, 1), self._at_rows(self.differences)
        stream = stream if self.job.rows is None else stream[self.job.rows]
        x = torch.addmm(stream.reshape(1, -1), self.blocks[-1], block.flatten(1))
        return x.view(-1, self.differences.shape[-1])

    def close(self) -> None:
        self.job.run.pool.give(self.memory)

    def _together(self, group: list[int]) -> tuple[Tensor, Tensor]:
        """The slots of a group, and its destinations' weights of the sources before it."""
        blocks = torch.cat([self.blocks[place][:, : self.first] for place in group])
        return self.memory[: len(blocks)], blocks

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
        wanted: tuple[bool, ...],
    ) -> None:
        super().__init__(job, mask, reference)
        count, like = len(self.differences), self.differences[0]
        self.gradients = job.run.pool.take(count, like, SOURCES_APART).zero_()
        self.against = self.differences if job.contract is None else job.contract
        self.of_mask = torch.empty_like(mask)
        tensors = reference._tensors()
        self.of_reference = [
            torch.zeros_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)
        ]

    def add_logits(self, grad: Float[Tensor, "row d_model"]) -> None:
        """From the logits' read."""
        rows, flat = self.job.rows, grad.reshape(1, -1)
        self._of_block(-1).copy_(flat @ self._at_rows(self.against).flatten(1).T)
        if rows is None:
            self.gradients.flatten(1).addmm_(self.blocks[-1].T, flat)
        else:
            more = self.blocks[-1].T.unsqueeze(-1) * grad  # [source, read, d_model]
            add_rows(self.gradients, rows, more)
        stream = self._of_stream(-1)
        if stream is not None:
            everywhere = torch.arange(len(stream), device=grad.device)
            stream.index_add_(0, everywhere if rows is None else rows, grad)

    def add(self, place: int, grad: Float[Tensor, "destination row d_model"]) -> None:
        """From a read whose slot holds the gradient, of the group's own sources; of those before
        them, `add_ahead` does.
        """
        n, first, flat = self.reads[place].n_sources, self.first, grad.flatten(1)
        if n > first:
            self._of_block(place)[:, first:] = flat @ self.against[first:n].flatten(1).T
            own = self.gradients[first:n].flatten(1)
            own.addmm_(self.blocks[place][:, first:].T, flat)
        stream = self._of_stream(place)
        if stream is not None:
            stream.copy_(grad.sum(0))

    def add_nothing(self, place: int) -> None:
        """For a read that no gradient comes from."""
        self._of_block(place)[:, self.first :] = 0
        self.slots[place].zero_()

    def add_ahead(self, group: list[int]) -> None:
        """From all reads of a group, of the sources before it, in one pass over both buffers."""
        slots, together = self._together(group)
        own = slots.flatten(1) @ self.against[: self.first].flatten(1).T
        sizes = [self.reads[place].n_destinations for place in group]
        for place, part in zip(group, own.split(sizes), strict=True):
            self._of_block(place)[:, : self.first] = part
        self.gradients[: self.first].flatten(1).addmm_(together.T, slots.flatten(1))

    def add_reference(self, place: int, grad: Tensor) -> None:
        """A half block's reference, which its differences are less."""
        read = self.reads[place]
        of_parts = self.of_reference[2 if read.kind == "mlp" else 1]
        if of_parts is not None:
            part = of_parts[read.layer].flatten(0, 1)
            part.copy_(-grad[0] if read.kind == "mlp" else -grad.transpose(0, 1))

    def finish(self) -> list[Tensor | None]:
        """All gradients; the buffers go back to where they came from."""
        of_inputs, count = self.of_reference[0], self.job.graph.n_inputs
        if of_inputs is not None:
            of_inputs.copy_(-self.gradients[:count].reshape_as(of_inputs))
        self.job.run.pool.give(self.gradients)
        self.job.release()
        self.close()
        return [self.of_mask, *self.of_reference]

    def _of_block(self, place: int) -> Float[Tensor, "destination source"]:
        """The mask's gradient, as the block of a read."""
        read = self.reads[place]
        return self.of_mask[read.edges].view(read.n_destinations, read.n_sources)

    def _of_stream(self, place: int) -> Float[Tensor, "row d_model"] | None:
        streams = self.of_reference[3]
        return None if streams is None else streams[place].flatten(0, 1)


# -------------------------------------------------------------- queries, keys and values, in pieces


def project(
    x: Float[Tensor, "destination row d_model"], site: AttentionSite, split: bool
) -> list[Float[Tensor, "_head row d_head"]]:
    """Queries, keys and values from attention's inputs, normalised a few destinations at a time.

    `split`: whether they have a destination each.
    """
    parts = [x.new_empty(len(w), x.shape[1], w.shape[2]) for w in site.weights]
    for own, users in _pieces(x, site, split):
        normalised = site.norm(x[own])
        for part, heads in users:
            torch.bmm(normalised, site.weights[part][heads], out=parts[part][heads])
    for projected, bias in zip(parts, site.biases, strict=True):
        if bias is not None:
            projected.add_(bias[:, None])
    return parts


def project_back(
    x: Float[Tensor, "destination row d_model"],
    grads: list[Tensor],
    site: AttentionSite,
    split: bool,
) -> None:
    """Overwrite attention's inputs by their gradient, from that of queries, keys and values,
    [head, row, d_head] each.
    """
    for own, users in _pieces(x, site, split):
        leaf = x[own].detach().requires_grad_()
        grad = torch.zeros_like(leaf) if len(users) > 1 else torch.empty_like(leaf)
        for part, heads in users:
            weight = site.weights[part][heads].transpose(1, 2)
            if len(users) == 1:
                torch.bmm(grads[part][heads], weight, out=grad)
            else:
                grad.baddbmm_(grads[part][heads], weight)
        with torch.enable_grad():
            normalised = site.norm(leaf)
        if normalised is not leaf:
            (grad,) = torch.autograd.grad(normalised, leaf, grad)
        x[own] = grad


def _pieces(
    x: Float[Tensor, "destination row d_model"], site: AttentionSite, split: bool
) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """A few destinations at a time, and the parts (query 0, key 1, value 2) and heads that they
    are.
    """
    most = PIECE if x.device.type == "cpu" else PIECE_ON_GPU
    size = max(1, most // x[0].numel())
    first = 0
    for part in range(3 if split else 1):
        heads = len(site.weights[part])
        for start in range(0, heads, size):
            stop = min(start + size, heads)
            own = slice(start, stop)
            users = [(part, own)] if split else [(p, own) for p in range(3)]
            yield slice(first + start, first + stop), users
        first += heads


# ---------------------------------------------------------------------------------- the first look


_agreed: weakref.WeakKeyDictionary[Any, set[torch.dtype]] = weakref.WeakKeyDictionary()


def _check_once(run: RecomputedModel) -> None:
    """Raise NotImplementedError unless half blocks give the whole model's logits and gradients."""
    dtype = run.sites.attention[0].output.dtype
    if dtype in _agreed.get(run.model, ()) or run.active_dropout():
        return
    name = getattr(run.model.cfg, "model_name", "this model")
    advice = "Leave recompute out for it."
    try:
        errors = _errors(run)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise NotImplementedError(
            f"{name}: its blocks cannot be run by halves, as recompute=True asks ({error}). "
            f"{advice}"
        ) from error
    if not max(errors) <= tolerance(dtype):
        raise NotImplementedError(
            f"{name}: run by halves, as recompute=True asks, its logits are off by "
            f"{errors[0]:.2g} of their size and its gradients by {errors[1]:.2g}. {advice}"
        )
    _agreed.setdefault(run.model, set()).add(dtype)


def _errors(run: RecomputedModel) -> list[float]:
    """How far logits and gradients are off on a few tokens, in units of their size."""
    tokens = probe_tokens(run)
    positions = torch.full((len(tokens), 1), tokens.shape[1] - 1, device=tokens.device)
    reference, _ = run.record(tokens.flip(0))
    uniform = torch.rand(run.graph.n_edges, generator=torch.Generator().manual_seed(0))
    figures = []
    for run._trusted in (False, True):
        mask = uniform.to(tokens.device).requires_grad_()
        with torch.enable_grad():
            logits = run(tokens, mask, reference, positions)
            (grad,) = torch.autograd.grad(logits.float().logsumexp(-1).sum(), mask)
        figures.append((logits.detach(), grad))
    run._trusted = False
    return [relative(mine, theirs) for theirs, mine in zip(*figures, strict=True)]
