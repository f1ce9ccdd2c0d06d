"""The split residual stream: every source writes its difference, every destination reads a mix.

1. A source writes y - y_ref into its row of one buffer, [source, batch*pos, d_model].
2. A destination reads r + M @ buffer[:n], its mask row M over the n sources before it,
   on top of the reference stream r.
3. Backward adds M.T @ grad into a second buffer of the same shape, in place, and a source's
   gradient is its row of that buffer once every later reader has added to it.
4. The buffer is read whole only once for several layers: `read_ahead` mixes, for all destinations
   of the next few layers, the sources that have written so far; each read then adds the few since.
5. A token passes from each operation to the next, so that autograd runs them backward in exactly
   the reverse order.

Where every edge is kept, a read is the running sum of what was written, and a source's gradient the
running sum of its readers' (`WholeStream`): no products but those of the mask's own gradient.

So memory is two buffers, whatever the depth. A `Stream` is the state of one forward; a second
backward through it raises, since its gradient buffer would be added to twice. `read_naive` is the
definition; tests hold `Stream.read` to it.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def read_naive(
    differences: Float[Tensor, "source row d_model"],
    reference: Float[Tensor, "row d_model"],
    mask: Float[Tensor, "destination source"],
) -> Float[Tensor, "destination row d_model"]:
    """Residual input of each destination: the reference stream plus the kept part of each
    difference.
    """
    return reference + einsum(mask, differences, "dst src, src row d -> dst row d")


class BufferPool:
    """Buffers of finished forwards, kept for the next ones: a fresh one costs a page fault a
    page.
    """

    def __init__(self, keep: int = 2) -> None:
        self.keep = keep
        self._free: list[Tensor] = []

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape with the dtype and device of `like`."""
        for place, buffer in enumerate(self._free):
            same_kind = buffer.dtype == like.dtype and buffer.device == like.device
            if buffer.shape == shape and same_kind:
                return self._free.pop(place)
        self._free.clear()
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def give(self, *buffers: Tensor | None) -> None:
        """Take back buffers that nothing will read again."""
        # One made in inference mode could not be written to outside of it.
        self._free.extend(b for b in buffers if b is not None and not b.is_inference())
        del self._free[: max(0, len(self._free) - self.keep)]


class Stream:
    """The split residual stream of one forward: its buffers, its token, its order of operations."""

    def __init__(
        self,
        n_sources: int,
        like: Float[Tensor, "row d_model"],
        pool: BufferPool,
        contract: Float[Tensor, "source row d_model"] | None = None,
    ) -> None:
        """`like`: rows, width, dtype and device. `contract`: differences that the mask's gradient
        is taken against in place of this forward's own (EAP-IG: the run is interpolated, they are
        not).
        """
        self._pool = pool
        self.contract = contract
        self._shape = (n_sources, *like.shape)
        self.differences: Tensor | None = pool.take(self._shape, like)
        self._gradients: Tensor | None = None
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
        weight: Float[Tensor, "head d_head d_model"],
        gain: Float[Tensor, " d_model"] | None = None,
        bias: Float[Tensor, " d_model"] | None = None,
    ) -> None:
        """Heads `first`, `first + 1`, … add `z @ weight` (times `gain`, plus `bias`) to the
        stream.
        """
        self._mark(first, z.shape[0])
        self._token = _WriteHeads.apply(self._token, z, weight, gain, bias, self, first)

    def read(
        self,
        mask: Float[Tensor, "destination source"],
        reference: Float[Tensor, "row d_model"],
        rows: Int[Tensor, " read"] | None = None,
    ) -> Float[Tensor, "destination read d_model"]:
        """What destinations with these mask rows read, at all rows or only at `rows`."""
        return self._read(mask, reference, None, 0, rows)

    def read_ahead(
        self, mask: Float[Tensor, "destination source"]
    ) -> Float[Tensor, "destination row d_model"]:
        """The part of later destinations' reads that the sources so far make up."""
        return self._read(mask, None, None, 0, None)

    def read_rest(
        self,
        mask: Float[Tensor, "destination source"],
        reference: Float[Tensor, "row d_model"],
        ahead: Float[Tensor, "destination row d_model"],
        first: int,
    ) -> Float[Tensor, "destination row d_model"]:
        """A read of which `ahead` holds the sources before `first`; `mask` is of those from there
        on.
        """
        return self._read(mask, reference, ahead, first, None)

    def _read(
        self,
        mask: Tensor,
        reference: Tensor | None,
        ahead: Tensor | None,
        first: int,
        rows: Tensor | None,
    ) -> Tensor:
        unwritten = self._written[first : first + mask.shape[1]].count(False)
        if unwritten:
            raise RuntimeError(
                f"{unwritten} of the {mask.shape[1]} sources that a destination reads have not "
                "written: a hook did not fire, or was removed inside the context."
            )
        x, self._token = _Read.apply(self._token, mask, reference, ahead, self, first, rows)
        return x

    @property
    def n_rows(self) -> int:
        return self._shape[1]

    def close(self) -> None:
        """End the forward: no more operations. Where no gradient will flow, the buffers are free.

        The token goes: it holds the graph, whose nodes hold this stream, a cycle that nothing
        frees.
        """
        if not self._token.requires_grad:
            self.release()
        self._token = self._token.detach()

    def release(self) -> None:
        """Give the buffers back; a later backward through this forward raises."""
        self._pool.give(self.differences, self._gradients)
        self.differences = self._gradients = None

    def number(self, ctx: Any) -> None:
        """Number an operation that autograd will run backward; the others need no order."""
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
        """Rows `first`, … of the buffer are written now."""

    def mixed(
        self,
        mask: Tensor,
        reference: Tensor | None,
        ahead: Tensor | None,
        first: int,
        rows: Tensor | None,
    ) -> Tensor:
        """What a read gives, [destination, row, d_model]."""
        block = self.block(first, mask.shape[1], rows).flatten(1)  # [source, row*d_model]
        if reference is None:
            x = mask @ block
        elif ahead is None:
            base = reference if rows is None else reference[rows]
            x = torch.addmm(base.reshape(1, -1), mask, block)
        else:
            x = (ahead + reference).flatten(1)
            x = x.addmm_(mask, block) if mask.shape[1] else x
        return x.view(mask.shape[0], -1, self._shape[-1])

    def block(self, first: int, count: int, rows: Tensor | None, contract: bool = False) -> Tensor:
        """The differences of some sources, or what the mask's gradient takes in their place."""
        differences = self.contract if contract and self.contract is not None else self.differences
        assert differences is not None
        block = differences[first : first + count]
        return block if rows is None else block.index_select(1, rows)

    def gradient_of(self, first: int, count: int) -> Float[Tensor, "source row d_model"]:
        """The gradients of some sources, once every later reader has added to them."""
        return self.gradients()[first : first + count]

    def add_gradients(self, mask: Tensor, grad: Tensor, first: int, rows: Tensor | None) -> None:
        """gradients[first : first + n] += mask.T @ grad, at `rows` where given."""
        block = self.gradients()[first : first + mask.shape[1]]
        if rows is not None:
            block.index_add_(1, rows, torch.einsum("ds,drm->srm", mask, grad))
        else:
            block.flatten(1).addmm_(mask.T, grad.reshape(grad.shape[0], -1))

    def _new_gradients(self) -> Tensor:
        assert self.differences is not None
        return self._pool.take(self._shape, self.differences)

    def _mark(self, first: int, count: int) -> None:
        if any(self._written[first : first + count]):
            raise RuntimeError(f"source {first} writes twice in one forward: a hook fired twice.")
        self._written[first : first + count] = [True] * count


class WholeStream(Stream):
    """The stream of a mask that is 1 everywhere: running sums in place of products."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        assert self.differences is not None
        self._sum = self.differences.new_zeros(self._shape[1:])  # [row, d_model]
        self._flow: Tensor | None = None  # the gradient of every destination that has run backward

    def wrote(self, first: int, count: int) -> None:
        assert self.differences is not None
        self._sum += self.differences[first : first + count].sum(0)

    def mixed(
        self,
        mask: Tensor,
        reference: Tensor | None,
        ahead: Tensor | None,
        first: int,
        rows: Tensor | None,
    ) -> Tensor:
        assert reference is not None and ahead is None
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
        wanted = ctx.needs_input_grad[1]
        grad = ctx.stream.gradient_of(ctx.source, 1)[0].clone() if wanted else None
        ctx.stream.end_backward(ctx.operation)
        return grad_token, grad, None, None


class _WriteHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        z: Tensor,
        weight: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        stream: Stream,
        first: int,
    ) -> Tensor:
        stream.number(ctx)
        ctx.first, ctx.weight, ctx.gain = first, weight, gain
        assert stream.differences is not None
        rows = stream.differences[first : first + z.shape[0]]
        torch.bmm(z, weight, out=rows)
        if gain is not None:
            rows.mul_(gain)
        if bias is not None:
            rows.add_(bias)
        stream.wrote(first, z.shape[0])
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_token: Tensor) -> tuple[Tensor | None, ...]:
        ctx.stream.begin_backward(ctx.operation)
        grad = None
        if ctx.needs_input_grad[1]:
            rows = ctx.stream.gradient_of(ctx.first, ctx.weight.shape[0])
            rows = rows if ctx.gain is None else rows * ctx.gain
            grad = torch.bmm(rows, ctx.weight.transpose(1, 2))
        ctx.stream.end_backward(ctx.operation)
        return grad_token, grad, None, None, None, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        mask: Tensor,
        reference: Tensor | None,
        ahead: Tensor | None,
        stream: Stream,
        first: int,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        stream.number(ctx)
        ctx.save_for_backward(mask)
        ctx.first, ctx.rows = first, rows
        return stream.mixed(mask, reference, ahead, first, rows), token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_token: Tensor) -> tuple[Tensor | None, ...]:
        ctx.stream.begin_backward(ctx.operation)
        (mask,) = ctx.saved_tensors
        grad_mask = None
        if ctx.needs_input_grad[1]:
            against = ctx.stream.block(ctx.first, mask.shape[1], ctx.rows, contract=True)
            grad_mask = grad.reshape(grad.shape[0], -1) @ against.flatten(1).T
        if mask.shape[1]:
            ctx.stream.add_gradients(mask, grad, ctx.first, ctx.rows)
        grad_reference = None
        if ctx.needs_input_grad[2]:
            grad_reference = grad.sum(0)
            if ctx.rows is not None:
                shape = (ctx.stream.n_rows, grad.shape[-1])
                grad_reference = grad.new_zeros(shape).index_add_(0, ctx.rows, grad_reference)
        ctx.stream.end_backward(ctx.operation)
        return (
            grad_token,
            grad_mask,
            grad_reference,
            grad if ctx.needs_input_grad[3] else None,
            None,
            None,
            None,
        )
