"""The split residual stream, held to `read_naive` and to autograd through a naive one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tl_edgeprune.forward.buffers import BufferPool
from tl_edgeprune.forward.residual import Stream, read_naive
from tl_edgeprune.hooks.norms import identity
from tl_edgeprune.hooks.sites import AttentionSite, PostNorm

SIZES = st.integers(1, 4)
SEEDS = st.integers(0, 2**16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


def writing_site(
    output: Tensor, gain: Tensor | None = None, bias: Tensor | None = None
) -> AttentionSite:
    """An attention of which only what its heads write matters."""
    post = None if gain is None else PostNorm(gain, 1e-5)
    return AttentionSite("q", "k", "v", "z", identity, (), (), output, bias, post)


class NaiveStream:
    """The same operations on lists and autograd."""

    def __init__(self) -> None:
        self.differences: list[Tensor] = []

    def write(self, source: int, difference: Tensor) -> None:
        assert source == len(self.differences)
        self.differences.append(difference)

    def write_heads(
        self, first: int, z: Tensor, site: AttentionSite, *, bias_in_heads: bool = False
    ) -> None:
        for head in range(len(z)):
            y = z[head] @ site.output[head]
            y = y if site.post is None else y * site.post.gain
            bias = site.output_bias if bias_in_heads else None
            self.write(first + head, y if bias is None else y + bias / len(z))

    def read(self, mask: Tensor, reference: Tensor, rows: Tensor | None = None) -> Tensor:
        x = read_naive(torch.stack(self.differences[: mask.shape[1]]), reference, mask)
        return x if rows is None else x[:, rows]


@dataclass
class Program:
    """Layers of heads and an MLP on a stream, with random weights: the chain of a masked
    forward.
    """

    layers: int
    heads: int
    rows: int
    width: int
    head_width: int
    gain: bool
    bias: bool
    some_rows: bool
    ahead: bool
    seed: int
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def leaf(self, name: str, *shape: int) -> Tensor:
        if name not in self.leaves:
            noise = normal(*shape, seed=self.seed + len(self.leaves))
            self.leaves[name] = noise.requires_grad_()
        return self.leaves[name]

    def run(self, stream: Stream | NaiveStream) -> Tensor:
        gain = normal(self.width, seed=self.seed + 100) if self.gain else None
        bias = normal(self.width, seed=self.seed + 101) if self.bias else None
        weight = normal(self.heads, self.head_width, self.width, seed=self.seed + 102)
        site = writing_site(weight, gain, bias)
        down = normal(self.heads, self.width, self.head_width, seed=self.seed + 103)
        stream.write(0, self.leaf("input", self.rows, self.width))
        read = self.reader(stream)
        n = 1
        for layer in range(self.layers):
            x = read(f"attention {layer}")
            stream.write_heads(n, torch.tanh(x @ down), site, bias_in_heads=self.bias)
            n += self.heads
            stream.write(n, torch.sin(read(f"mlp {layer}")[0]))
            n += 1
        rows = torch.arange(self.rows - 1, -1, -2) if self.some_rows else None
        reference = normal(self.rows, self.width, seed=self.seed + 300)
        return stream.read(self.leaf("logits", 1, n), reference, rows)

    def reader(self, stream: Stream | NaiveStream) -> Callable[[str], Tensor]:
        """Reads by name: each alone, or in two parts of which the first is read for all at once."""
        masks, references, n = {}, {}, 1
        for layer in range(self.layers):
            masks[f"attention {layer}"] = self.leaf(f"attention {layer}", self.heads, n)
            n += self.heads
            masks[f"mlp {layer}"] = self.leaf(f"mlp {layer}", 1, n)
            n += 1
        for place, name in enumerate(masks):
            references[name] = normal(self.rows, self.width, seed=self.seed + 200 + place)
        if not self.ahead or isinstance(stream, NaiveStream):
            return lambda name: stream.read(masks[name], references[name])
        stream.read_ahead(torch.cat([mask[:, :1] for mask in masks.values()]))
        return lambda name: stream.read_rest(masks[name][:, 1:], references[name])

    @property
    def n_sources(self) -> int:
        return 1 + self.layers * (self.heads + 1)

    def stream(self, pool: BufferPool | None = None) -> Stream:
        like = normal(self.rows, self.width)
        return Stream(self.n_sources, like, BufferPool() if pool is None else pool)

    def gradients(self, output: Tensor) -> dict[str, Tensor]:
        loss = (output * normal(*output.shape, seed=self.seed + 400)).sum()
        grads = torch.autograd.grad(loss, list(self.leaves.values()))
        return dict(zip(self.leaves, grads, strict=True))


programs = st.builds(
    Program,
    layers=st.integers(1, 3),
    heads=SIZES,
    rows=SIZES,
    width=SIZES,
    head_width=SIZES,
    gain=st.booleans(),
    bias=st.booleans(),
    some_rows=st.booleans(),
    ahead=st.booleans(),
    seed=SEEDS,
)


@given(SIZES, st.integers(0, 3), SIZES, SIZES, SIZES, SEEDS)
def test_a_read_is_the_naive_read(
    sources: int, unread: int, destinations: int, rows: int, width: int, seed: int
) -> None:
    stream = Stream(sources + unread, normal(rows, width), BufferPool())
    differences = normal(sources, rows, width, seed=seed)
    for source, difference in enumerate(differences):
        stream.write(source, difference)
    mask = normal(destinations, sources, seed=seed + 1)
    reference = normal(rows, width, seed=seed + 2)
    expected = read_naive(differences, reference, mask)
    close(stream.read(mask, reference), expected)
    some = torch.tensor([rows - 1, 0, rows - 1])  # in any order, and repeated
    close(stream.read(mask, reference, some), expected[:, some])


@given(programs)
def test_a_chain_of_writes_and_reads_has_the_gradients_of_the_naive_chain(program: Program) -> None:
    expected = program.run(NaiveStream())
    actual = program.run(program.stream())
    close(actual, expected)
    naive = program.gradients(expected)
    for name, gradient in program.gradients(actual).items():
        close(gradient, naive[name])


@given(programs, SEEDS)
def test_some_masks_may_be_constant(program: Program, seed: int) -> None:
    program.run(NaiveStream())
    for index, leaf in enumerate(program.leaves.values()):
        leaf.requires_grad_(bool(seed >> index & 1))
    wanted = {name: leaf for name, leaf in program.leaves.items() if leaf.requires_grad}
    actual, expected = program.run(program.stream()), program.run(NaiveStream())
    close(actual, expected)
    if not wanted:
        assert not actual.requires_grad
        return
    program.leaves = wanted
    naive = program.gradients(expected)
    for name, gradient in program.gradients(actual).items():
        close(gradient, naive[name])


@given(programs)
def test_one_pool_serves_many_forwards(program: Program) -> None:
    """Gradients from used buffers are those from fresh ones, bit for bit."""
    pool = BufferPool()
    first = program.gradients(program.run(program.stream(pool)))
    for _ in range(2):
        other = Program(**(vars(program) | {"seed": program.seed + 7, "leaves": {}}))
        other.gradients(other.run(other.stream(pool)))
        again = program.gradients(program.run(program.stream(pool)))
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_mask_is_contracted_with_given_differences() -> None:
    """`contract` replaces the differences in the mask's gradient, and in nothing else."""
    program = Program(2, 2, 3, 4, 2, gain=False, bias=False, some_rows=False, ahead=False, seed=3)
    differences = normal(program.n_sources, 3, 4, seed=9)
    plain, contracted = program.stream(), program.stream()
    contracted.contract = differences
    out, other = program.run(plain), program.run(contracted)
    assert torch.equal(out, other)
    plain_grads, grads = program.gradients(out), program.gradients(other)
    assert torch.equal(plain_grads["input"], grads["input"])
    weights = normal(*out.shape, seed=program.seed + 400)  # d loss / d output
    close(grads["logits"], torch.einsum("drm,srm->ds", weights, differences))


def test_buffers_are_taken_again() -> None:
    pool, like = BufferPool(), normal(4, 3)
    pool.start(like)
    buffer = pool.take(2, like)
    pool.give(buffer, None)
    assert pool.take(2, like) is buffer
    pool.give(buffer)
    assert pool.take(3, like) is not buffer
    assert pool.take(2, like, apart=5).stride(0) == 4 * 3 + 5
    pool.start(like)
    assert pool.take(2, like) is buffer
    pool.give(buffer)
    pool.start(like.float())  # a forward of another kind
    assert pool.take(2, like.float()).dtype == torch.float32


def test_a_forward_without_gradient_frees_its_buffers_at_once() -> None:
    pool = BufferPool()
    program = Program(1, 2, 3, 4, 2, gain=False, bias=False, some_rows=False, ahead=False, seed=0)
    stream = program.stream(pool)
    buffer = stream.differences
    with torch.no_grad():
        program.run(stream)
    stream.close()
    assert program.stream(pool).differences is buffer


# ------------------------------------------------------------------------------------------ misuse


def a_chain() -> tuple[Program, Tensor]:
    program = Program(2, 2, 3, 4, 2, gain=True, bias=True, some_rows=True, ahead=True, seed=1)
    return program, program.run(program.stream())


def test_a_second_backward_raises() -> None:
    _program, output = a_chain()
    output.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Run the forward again for each backward"):
        output.sum().backward()


def test_a_second_backward_of_a_part_raises() -> None:
    program, output = a_chain()
    torch.autograd.grad(output.sum(), program.leaves["logits"], retain_graph=True)
    with pytest.raises(RuntimeError, match="Run the forward again for each backward"):
        output.sum().backward()


def test_a_double_backward_raises() -> None:
    program, output = a_chain()
    grads = torch.autograd.grad(output.sum(), list(program.leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError):
        sum(g.square().sum() for g in grads).backward()


def test_a_mask_changed_before_backward_raises() -> None:
    program, output = a_chain()
    with torch.no_grad():
        program.leaves["mlp 0"].mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_reading_what_nobody_wrote_raises() -> None:
    stream = Stream(3, normal(2, 4), BufferPool())
    stream.write(0, normal(2, 4))
    with pytest.raises(RuntimeError, match="2 of the 3 sources that a destination reads have not"):
        stream.read(normal(1, 3), normal(2, 4))


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda s: s.write(1, normal(2, 4)), id="write"),
        pytest.param(
            lambda s: s.write_heads(1, normal(2, 2, 3), writing_site(normal(2, 3, 4))), id="heads"
        ),
    ],
)
def test_writing_twice_raises(write: Callable[[Stream], None]) -> None:
    stream = Stream(3, normal(2, 4), BufferPool())
    write(stream)
    with pytest.raises(RuntimeError, match="source 1 writes twice in one forward"):
        write(stream)
