"""The split residual stream: every source writes its difference, every destination reads a mix.

1. A source writes y - y_ref into its row of one buffer, [source, batch*pos, d_model].
2. A destination reads r + M @ buffer[:n], its mask row M over the n sources before it,
   on top of the reference stream r.
3. Backward adds M.T @ grad into a second buffer of the same shape, in place, and a source's
   gradient is its row of that buffer once every later reader has added to it.
4. The whole buffer is read only once for several layers: `read_ahead` mixes, for all destinations
   of the next few layers, the sources that have written so far. Each read then adds the few sources
   since, in place. In backward the reads' gradients are collected until one product passes all of
   them back.
5. A token passes from each operation to the next, so that autograd runs them backward in exactly
   the reverse order.

If every edge is kept, a read is the running sum of what was written, and a source's gradient the
running sum of its readers' (`WholeStream`). Then only the mask's gradient needs products.

So memory is two buffers, whatever the depth. A `Stream` is the state of one forward; a second
backward through it raises, since its gradient buffer would be added to twice. `read_naive` is the
definition; tests hold `Stream.read` to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_edgeprune.forward.buffers import SOURCES_APART, BufferPool, add_rows
from tl_edgeprune.hooks.sites import AttentionSite


def read_naive(
    differences: Float[Tensor, "source row d_model"],
    reference: Float[Tensor, "row d_model"],
    mask: Float[Tensor, "destination source"],
) -> Float[Tensor, "destination row d_model"]:
    """Residual input of each destination: the reference stream plus the kept part of each
    difference.
    """
    return reference + einsum(mask, differences, "dst src, src row d -> dst row d")


def read_groups(n_reads: int, size: int) -> list[range]:
    """Groups of up to `size` neighbouring reads that share one pass over the buffer: all but the
    last read, which is the logits'.
    """
    stop = n_reads - 1
    return [range(first, min(first + size, stop)) for first in range(0, stop, size)]


def joint_mask(
    blocks: Sequence[Float[Tensor, "_destination *span _source"]], group: Sequence[int]
) -> Float[Tensor, "destination *span source"]:
    """The mask rows of all destinations of a group, over the sources before its first read."""
    n_sources = blocks[group[0]].shape[-1]
    return torch.cat([blocks[index][..., :n_sources] for index in group])


class Products:
    """What a read and its backward multiply: here all rows by one mask [destination, source]."""

    def mixed(
        self, mask: Tensor, base: Tensor, block: Tensor, rows: Tensor | None
    ) -> Float[Tensor, "destination row d_model"]:
        """base + mask @ block; `rows`: which rows of the forward these are, if not all."""
        x = torch.addmm(base.reshape(1, -1), mask, block.flatten(1))
        return x.view(len(mask), *base.shape)

    def mix(self, mask: Tensor, block: Tensor, out: Tensor) -> None:
        """out[:] = mask @ block."""
        torch.mm(mask, block.flatten(1), out=out.flatten(1))

    def add(self, mask: Tensor, block: Tensor, x: Tensor) -> None:
        """x += mask @ block."""
        x.flatten(1).addmm_(mask, block.flatten(1))

    def add_back(self, mask: Tensor, grad: Tensor, gradients: Tensor) -> None:
        """gradients += mask.T @ grad."""
        gradients.flatten(1).addmm_(mask.T, grad.reshape(len(grad), -1))

    def back_at(
        self, mask: Tensor, grad: Tensor, rows: Int[Tensor, " read"]
    ) -> Float[Tensor, "source read d_model"]:
        """mask.T @ grad, for these rows of the forward."""
        return torch.einsum("ds,drm->srm", mask, grad)

    def of_mask(
        self, mask: Tensor, grad: Tensor, block: Tensor, rows: Tensor | None
    ) -> Float[Tensor, "destination *span source"]:
        """The mask's gradient, grad @ block.T."""
        return grad.reshape(len(grad), -1) @ block.flatten(1).T


@dataclass
class _Ahead:
    """A shared pass: the mixes of the sources before `first` for the destinations of the next
    reads, and in backward those reads' gradients. `n_read`: destinations that have read.
    """

    first: int
    values: Tensor  # [destination, row, d_model]
    n_read: int = 0
    gradients: Tensor | None = None


class Stream:
    """The split residual stream of one forward: its buffers, its token, its order of operations."""

    def __init__(
        self,
        n_sources: int,
        like: Float[Tensor, "row d_model"],
        pool: BufferPool,
        contract: Float[Tensor, "source row d_model"] | None = None,
        products: Products | None = None,
    ) -> None:
        """
        Args:
            like: a tensor of the rows, width, dtype and device.
            contract: differences that the mask's gradient is taken against instead of this
                forward's own (EAP-IG: the run is interpolated, they are not).
            products: those of masks that differ from span to span (span_masks.py).
        """
        self._pool = pool
        self.products = products or Products()
        self.contract = contract
        self._shape = (n_sources, *like.shape)
        pool.start(like)
        self.differences: Tensor | None = pool.take(n_sources, like, SOURCES_APART)
        self._gradients: Tensor | None = None
        self._ahead: _Ahead | None = None
        self._mixes: list[Tensor] = []
        self._written = [False] * n_sources
        self._operations = 0
        self._last_backward: int | None = None
        self._token = torch.empty(0, dtype=like.dtype, device=like.device)

    def write(self, source: int, difference: Float[Tensor, "row d_model"]) -> None:
        """Source `source` adds `difference` (its output less its reference) to the stream."""
        self._mark(source, 1)
        self._token = _Write.apply(self._token, difference, self, source)

    def write_heads(
        self,
        first: int,
        z: Float[Tensor, "head row d_head"],
        site: AttentionSite,
        gates: Float[Tensor, "head d_model"] | None = None,
        *,
        bias_in_heads: bool = False,
    ) -> None:
        """Heads `first`, `first + 1`, … add what `site.write` gives for z (times `gates`)."""
        self._mark(first, z.shape[0])
        self._token = _WriteHeads.apply(self._token, z, gates, site, bias_in_heads, self, first)

    def read(
        self,
        mask: Float[Tensor, "destination *span source"],
        reference: Float[Tensor, "row d_model"],
        rows: Int[Tensor, " read"] | None = None,
    ) -> Float[Tensor, "destination read d_model"]:
        """What destinations with these mask rows read, at all rows or only at `rows`."""
        self._check_written(0, mask.shape[-1])
        x, self._token = _Read.apply(self._token, mask, reference, self, rows)
        return x

    def read_ahead(self, mask: Float[Tensor, "destination *span source"]) -> None:
        """Mix the sources so far for the destinations of the next reads, in their order."""
        self._check_written(0, mask.shape[-1])
        values = self._take(len(mask))
        self._mixes.append(values)
        self._ahead = _Ahead(mask.shape[-1], values)
        self._token = _ReadAhead.apply(self._token, mask, self, self._ahead)

    def read_rest(
        self,
        mask: Float[Tensor, "destination *span source"],
        reference: Float[Tensor, "row d_model"],
    ) -> Float[Tensor, "destination row d_model"]:
        """The next destinations' read: `mask` is of the sources since `read_ahead`."""
        ahead = self._ahead
        assert ahead is not None and ahead.n_read + len(mask) <= len(ahead.values)
        self._check_written(ahead.first, mask.shape[-1])
        x, self._token = _ReadRest.apply(self._token, mask, reference, self, ahead, ahead.n_read)
        ahead.n_read += len(mask)
        return x

    def _check_written(self, first: int, count: int) -> None:
        unwritten = self._written[first : first + count].count(False)
        if unwritten:
            raise RuntimeError(
                f"{unwritten} of the {count} sources that a destination reads have not "
                "written: a hook did not fire, or was removed inside the context."
            )

    @property
    def n_rows(self) -> int:
        return self._shape[1]

    def close(self) -> None:
        """End the forward: no more operations. If no gradient will flow, the buffers are released.

        The token is detached: it holds the graph, whose nodes hold this stream, and nothing would
        free that cycle.
        """
        if not self._token.requires_grad:
            self.release()
        self._token = self._token.detach()

    def release(self) -> None:
        """Give the buffers back; a later backward through this forward raises."""
        self._pool.give(self.differences, self._gradients, *self._mixes)
        self.differences = self._gradients = self._ahead = None
        self._mixes = []

    def take_ahead_gradients(self, ahead: _Ahead) -> Tensor:
        """The buffer that collects the gradients of the reads of this pass."""
        if ahead.gradients is None:
            ahead.gradients = self._take(len(ahead.values))
        return ahead.gradients

    def give_ahead_gradients(self, ahead: _Ahead) -> None:
        """Release the gradients of this pass, once they have been passed back."""
        self._pool.give(ahead.gradients)
        ahead.gradients = None

    def number(self, ctx: Any) -> None:
        """Number an operation that autograd will run backward; other operations need no order."""
        ctx.stream, ctx.operation = self, self._operations
        self._operations += any(ctx.needs_input_grad)

    def begin_backward(self, operation: int) -> None:
        """Check that `operation` is the next one in backward order."""
        repeated = self._last_backward is not None and operation >= self._last_backward
        if self.differences is None or repeated:
            raise RuntimeError(
                "backward through a masked forward that has been backpropagated before: its "
                "buffers hold that pass's gradients. Run the forward again for each backward."
            )
        self._last_backward = operation

    def end_backward(self, operation: int) -> None:
        if operation == 0:
            self.release()

    def gradients(self) -> Tensor:
        """The gradient buffer, all zero if no reader has added to it."""
        if self._gradients is None:
            self._gradients = self._new_gradients().zero_()
        return self._gradients

    def wrote(self, first: int, count: int) -> None:
        """Called after `count` sources from `first` on have written to the buffer."""

    def mixed(self, mask: Tensor, reference: Tensor, rows: Tensor | None) -> Tensor:
        """What destinations read, [destination, row, d_model]."""
        base = reference if rows is None else reference[rows]
        return self.products.mixed(mask, base, self.block(0, mask.shape[-1], rows), rows)

    def block(self, first: int, count: int, rows: Tensor | None, contract: bool = False) -> Tensor:
        """The differences of some sources, or those that the mask's gradient is taken against."""
        differences = self.contract if contract and self.contract is not None else self.differences
        assert differences is not None
        block = differences[first : first + count]
        return block if rows is None else block[:, rows]  # index_select would copy the whole

    def gradient_of(self, first: int, count: int) -> Float[Tensor, "source row d_model"]:
        """The gradients of some sources, once every later reader has added to them."""
        return self.gradients()[first : first + count]

    def add_gradients(self, mask: Tensor, grad: Tensor, first: int, rows: Tensor | None) -> None:
        """gradients[first : first + n] += mask.T @ grad, at `rows` or everywhere."""
        gradients = self.gradients()[first : first + mask.shape[-1]]
        if rows is not None:
            add_rows(gradients, rows, self.products.back_at(mask, grad, rows))
        else:
            self.products.add_back(mask, grad, gradients)

    def _new_gradients(self) -> Tensor:
        assert self.differences is not None
        return self._pool.take(self._shape[0], self.differences[0], SOURCES_APART)

    def _take(self, count: int) -> Tensor:
        assert self.differences is not None
        return self._pool.take(count, self.differences[0])

    def _mark(self, first: int, count: int) -> None:
        if any(self._written[first : first + count]):
            raise RuntimeError(f"source {first} writes twice in one forward: a hook fired twice.")
        self._written[first : first + count] = [True] * count


class WholeStream(Stream):
    """The stream of a mask that is 1 everywhere: running sums instead of products."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        assert self.differences is not None
        self._sum = self.differences.new_zeros(self._shape[1:])  # [row, d_model]
        self._flow: Tensor | None = None  # the gradient of every destination that has run backward

    def wrote(self, first: int, count: int) -> None:
        assert self.differences is not None
        self._sum += self.differences[first : first + count].sum(0)

    def mixed(self, mask: Tensor, reference: Tensor, rows: Tensor | None) -> Tensor:
        x = self._sum + reference
        return (x if rows is None else x[rows]).expand(mask.shape[0], -1, -1)

    def gradient_of(self, first: int, count: int) -> Float[Tensor, "source row d_model"]:
        return self._gradient().expand(count, -1, -1)

    def add_gradients(self, mask: Tensor, grad: Tensor, first: int, rows: Tensor | None) -> None:
        if rows is None:
            self._gradient().add_(grad.sum(0))
        else:
            self._gradient().index_add_(0, rows, grad.sum(0))

    def _gradient(self) -> Tensor:
        if self._flow is None:
            self._flow = torch.zeros_like(self._sum)
        return self._flow


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, difference: Tensor, stream: Stream, source: int) -> Tensor:
        stream.number(ctx)
        ctx.source = source
        assert stream.differences is not None
        stream.differences[source].copy_(difference)
        stream.wrote(source, 1)
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_token: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        ctx.stream.begin_backward(ctx.operation)
        grad = None
        if ctx.needs_input_grad[1]:
            grad = ctx.stream.gradient_of(ctx.source, 1)[0].clone()  # [row, d_model]
        ctx.stream.end_backward(ctx.operation)
        return grad_token, grad, None, None


class _WriteHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        z: Tensor,
        gates: Tensor | None,
        site: AttentionSite,
        bias_in_heads: bool,
        stream: Stream,
        first: int,
    ) -> Tensor:
        stream.number(ctx)
        ctx.first, ctx.site, ctx.bias_in_heads = first, site, bias_in_heads
        if gates is not None:
            ctx.save_for_backward(z, gates)
        assert stream.differences is not None
        rows = stream.differences[first : first + z.shape[0]]  # [head, row, d_model]
        site.write(z, rows, bias_in_heads=bias_in_heads)
        if gates is not None:
            rows.mul_(gates.unsqueeze(1))
        stream.wrote(first, z.shape[0])
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_token: Tensor) -> tuple[Tensor | None, ...]:
        ctx.stream.begin_backward(ctx.operation)
        grad_z = grad_gates = None
        z, gates = ctx.saved_tensors or (None, None)
        if any(ctx.needs_input_grad[1:3]):
            grad = ctx.stream.gradient_of(ctx.first, len(ctx.site.output))  # [head, row, d_model]
            if ctx.needs_input_grad[2]:
                grad_gates = ctx.site.write_dot(z, grad, bias_in_heads=ctx.bias_in_heads)
            if ctx.needs_input_grad[1]:
                grad_z = ctx.site.write_back(grad if gates is None else grad * gates.unsqueeze(1))
        ctx.stream.end_backward(ctx.operation)
        return grad_token, grad_z, grad_gates, None, None, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        mask: Tensor,
        reference: Tensor,
        stream: Stream,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        stream.number(ctx)
        ctx.save_for_backward(mask)
        ctx.rows = rows
        return stream.mixed(mask, reference, rows), token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_token: Tensor) -> tuple[Tensor | None, ...]:
        ctx.stream.begin_backward(ctx.operation)
        (mask,) = ctx.saved_tensors
        grad_mask = _mask_gradient(ctx, mask, grad, 0, ctx.rows)
        ctx.stream.add_gradients(mask, grad, 0, ctx.rows)
        grad_reference = None
        if ctx.needs_input_grad[2]:
            grad_reference = grad.sum(0)
            if ctx.rows is not None:
                shape = (ctx.stream.n_rows, grad.shape[-1])
                grad_reference = grad.new_zeros(shape).index_add_(0, ctx.rows, grad_reference)
        ctx.stream.end_backward(ctx.operation)
        return grad_token, grad_mask, grad_reference, None, None


class _ReadAhead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, mask: Tensor, stream: Stream, ahead: _Ahead) -> Tensor:
        stream.number(ctx)
        ctx.save_for_backward(mask)
        ctx.ahead = ahead
        stream.products.mix(mask, stream.block(0, mask.shape[-1], None), ahead.values)
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_token: Tensor) -> tuple[Tensor | None, ...]:
        ctx.stream.begin_backward(ctx.operation)
        (mask,) = ctx.saved_tensors
        grad_mask = None
        if ctx.ahead.gradients is not None:
            grad = ctx.ahead.gradients
            grad_mask = _mask_gradient(ctx, mask, grad, 0, None)
            ctx.stream.add_gradients(mask, grad, 0, None)
            ctx.stream.give_ahead_gradients(ctx.ahead)
        ctx.stream.end_backward(ctx.operation)
        return grad_token, grad_mask, None, None


class _ReadRest(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        mask: Tensor,
        reference: Tensor,
        stream: Stream,
        ahead: _Ahead,
        first: int,
    ) -> tuple[Tensor, Tensor]:
        stream.number(ctx)
        ctx.save_for_backward(mask)
        ctx.ahead, ctx.destinations = ahead, slice(first, first + len(mask))
        # `.data`: autograd must not see a view, since later reads write to its neighbours.
        x = ahead.values[ctx.destinations].data.add_(reference)
        if mask.shape[-1]:
            stream.products.add(mask, stream.block(ahead.first, mask.shape[-1], None), x)
        return x, token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_token: Tensor) -> tuple[Tensor | None, ...]:
        stream, ahead = ctx.stream, ctx.ahead
        stream.begin_backward(ctx.operation)
        (mask,) = ctx.saved_tensors
        gradients = stream.take_ahead_gradients(ahead)
        gradients[ctx.destinations].copy_(grad)
        grad_mask = _mask_gradient(ctx, mask, grad, ahead.first, None)
        if mask.shape[-1]:
            stream.add_gradients(mask, grad, ahead.first, None)
        grad_reference = grad.sum(0) if ctx.needs_input_grad[2] else None
        stream.end_backward(ctx.operation)
        return grad_token, grad_mask, grad_reference, None, None, None


def _mask_gradient(
    ctx: Any, mask: Tensor, grad: Tensor, first: int, rows: Tensor | None
) -> Tensor | None:
    """The gradient of a read's mask, input 1 of its operation."""
    if not ctx.needs_input_grad[1]:
        return None
    against = ctx.stream.block(first, mask.shape[-1], rows, contract=True)
    return ctx.stream.products.of_mask(mask, grad, against, rows)
