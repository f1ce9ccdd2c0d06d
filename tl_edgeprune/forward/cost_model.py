"""What a recomputed training step takes before it is run: bytes buffer by buffer, and the floors of
every pass (operations, bytes moved) that no implementation of these formulas goes below.

A product of [m, k] and [k, n] counts 2 m k n operations; norms, softmax and activations count
nothing. `rows` are pairs times positions, `edges` and `sources` the graph's. Memory is that of
`recompute.py`, blocks recomputed. `docs/performance.md` prints these figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tl_edgeprune.forward.recompute import reads_together
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.projections import PIECE, PIECE_ON_GPU

GATES = 4  # bytes of a gate: float32 whatever the weights


@dataclass(frozen=True)
class Shape:
    """A language model's sizes. `gated`: an MLP of three matrices; `tied`: one embedding matrix;
    `joint`: queries, keys and values in one matrix, which the Bridge holds a second time, split.
    """

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int = 0  # learned positions
    gated: bool = True
    tied: bool = False
    joint: bool = False

    @cached_property
    def graph(self) -> EdgeGraph:
        return EdgeGraph(self.n_layers, self.n_heads, self.n_kv_heads)

    @property
    def projections(self) -> int:
        """Weights of a block's query, key and value projections."""
        return self.d_model * self.d_head * (self.n_heads + 2 * self.n_kv_heads)

    @property
    def output(self) -> int:
        """Weights of a block's attention output."""
        return self.d_model * self.d_head * self.n_heads

    @property
    def mlp(self) -> int:
        """Weights of a block's MLP."""
        return (3 if self.gated else 2) * self.d_model * self.d_mlp

    @property
    def block_weights(self) -> int:
        return self.n_layers * (self.projections + self.output + self.mlp)

    @property
    def weights(self) -> int:
        """All weights that are held (biases and norms left out)."""
        embeddings = (1 if self.tied else 2) * self.d_vocab + self.n_ctx
        twice = self.n_layers * self.projections if self.joint else 0
        return self.block_weights + twice + embeddings * self.d_model


_GPT2 = {"gated": False, "tied": True, "joint": True}
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("gpt2", 12, 12, 12, 768, 64, 3072, 50257, n_ctx=1024, **_GPT2),
        Shape("smollm2-135m", 30, 9, 3, 576, 64, 1536, 49152, tied=True),
        Shape("llama-3-8b", 32, 32, 8, 4096, 128, 14336, 128256),
        Shape("codellama-13b", 40, 40, 40, 5120, 128, 13824, 32016),
        # Small enough for any machine.
        Shape("tiny-gpt2", 3, 4, 4, 32, 8, 128, 97, n_ctx=64, **_GPT2),
        Shape("tiny-llama", 4, 8, 2, 64, 8, 160, 97),
    )
}


def find_shape(name: str) -> Shape:
    """A shape by name. Raises ValueError for one that is not known."""
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}: expected one of {', '.join(SHAPES)}.")
    return SHAPES[name]


@dataclass(frozen=True)
class Work:
    """What one forward sees: pairs of `pos` tokens, of which `reads` give logits; `element`: bytes
    of a weight and of an activation (4: float32, 2: bfloat16).
    """

    pairs: int
    pos: int
    reads: int = 1
    element: int = 4
    on_gpu: bool = False

    @property
    def rows(self) -> int:
        return self.pairs * self.pos


# ------------------------------------------------------------------------------------------ memory


def buffer_bytes(shape: Shape, work: Work) -> int:
    """One buffer, [source, row, d_model]; a step has two: differences and gradients."""
    return shape.graph.n_sources * stream_bytes(shape, work)


def stream_bytes(shape: Shape, work: Work) -> int:
    """One residual stream, [row, d_model]."""
    return work.rows * shape.d_model * work.element


def slot_bytes(shape: Shape, work: Work) -> int:
    """The inputs of the destinations that share a pass over the buffer."""
    return max(sum(destinations) for destinations, _ in _groups(shape)) * stream_bytes(shape, work)


def reference_bytes(shape: Shape, work: Work) -> int:
    """A counterfactual reference: the input, every MLP, every read's stream, every head's z."""
    streams = (1 + shape.n_layers + len(shape.graph.reads)) * stream_bytes(shape, work)
    heads = shape.n_layers * work.rows * shape.n_heads * shape.d_head * work.element
    return streams + heads


def half_bytes(shape: Shape, work: Work) -> int:
    """The larger half block's activations and their gradients, in backward."""
    return max(_attention_bytes(shape, work), _mlp_bytes(shape, work))


def _attention_bytes(shape: Shape, work: Work) -> int:
    """The pieces that are normalised at once, in float32 (in, out and gradients: 5), and queries,
    keys and values (as projected, by head, their gradients), scores (5) and z (3).
    """
    most = PIECE_ON_GPU if work.on_gpu else PIECE
    one = work.rows * shape.d_model
    piece = min(max(1, most // one), shape.n_heads) * one
    parts = work.rows * shape.d_head * (shape.n_heads + 2 * shape.n_kv_heads)
    scores = work.pairs * shape.n_heads * work.pos**2
    z = work.rows * shape.d_head * shape.n_heads
    heads = (3 * parts + 5 * scores + 3 * z) * work.element
    return max(heads, 5 * 4 * piece + 3 * parts * work.element)


def _mlp_bytes(shape: Shape, work: Work) -> int:
    """Hidden activations kept for backward, and two of their gradients; streams beside them."""
    kept = 4 if shape.gated else 5
    hidden = work.rows * shape.d_mlp * work.element
    return (kept + 2) * hidden + 4 * stream_bytes(shape, work)


def logit_bytes(shape: Shape, work: Work) -> int:
    """Target, logits and their gradients in float32, and what the logits read of the buffer."""
    reads = work.pairs * work.reads
    return reads * (
        4 * shape.d_vocab * 4 + 2 * shape.graph.n_sources * shape.d_model * work.element
    )


def gate_bytes(shape: Shape) -> int:
    """Log alphas, their gradient and two moments, and what drawing the gates keeps (8 more)."""
    return 12 * GATES * shape.graph.n_edges


def step_bytes(shape: Shape, work: Work) -> dict[str, int]:
    """Peak memory of a training step with blocks recomputed, buffer by buffer."""
    return {
        "weights": shape.weights * work.element,
        "differences": buffer_bytes(shape, work),
        "gradients": buffer_bytes(shape, work),
        "slots": slot_bytes(shape, work),
        "reference": reference_bytes(shape, work),
        "half block": max(half_bytes(shape, work), logit_bytes(shape, work)),
        "gates": gate_bytes(shape),
    }


def fitting_pairs(
    shape: Shape, pos: int, memory: int, *, element: int = 4, on_gpu: bool = False
) -> int:
    """The largest number of pairs a forward that fits into `memory` bytes; 0 if none does."""

    def fits(pairs: int) -> bool:
        work = Work(pairs, pos, element=element, on_gpu=on_gpu)
        return sum(step_bytes(shape, work).values()) <= memory

    if not fits(1):
        return 0
    most = 1
    while fits(2 * most):
        most *= 2
    step = most
    while step := step // 2:
        most += step if fits(most + step) else 0
    return most


def _groups(shape: Shape) -> list[tuple[list[int], list[int]]]:
    """Destinations and sources of the reads that share a pass over the buffer."""
    reads, size = shape.graph.reads[:-1], reads_together(shape.graph)
    groups = [reads[start : start + size] for start in range(0, len(reads), size)]
    return [([r.n_destinations for r in g], [r.n_sources for r in g]) for g in groups]


# ------------------------------------------------------------------------------------------ floors


class Floor(NamedTuple):
    """What a pass has to do at least."""

    operations: int
    bytes: int

    def __add__(self, other: Floor) -> Floor:  # type: ignore[override]
        return Floor(self.operations + other.operations, self.bytes + other.bytes)

    def seconds(self, operations_a_second: float, bytes_a_second: float) -> float:
        """The least time on a machine of these speeds."""
        return max(self.operations / operations_a_second, self.bytes / bytes_a_second)


def products(shape: Shape, work: Work, weights: int) -> Floor:
    """A pass of every row through so many weights, each read once."""
    return Floor(2 * work.rows * weights, weights * work.element)


def attention(shape: Shape, work: Work) -> Floor:
    """Scores and their mix of values, in every layer; [pairs, head, pos, pos] stays in cache."""
    width = shape.n_heads * shape.d_head
    moved = 4 * work.rows * width * work.element
    return Floor(4 * work.rows * work.pos * width * shape.n_layers, moved * shape.n_layers)


def unembedding(shape: Shape, work: Work, rows: int) -> Floor:
    """Logits of so many rows."""
    moved = (shape.d_model * shape.d_vocab + rows * shape.d_vocab) * work.element
    return Floor(2 * rows * shape.d_model * shape.d_vocab, moved)


def mixing(shape: Shape, work: Work, passes: int = 1) -> Floor:
    """Mask times differences for every read but the logits', the buffer passed once a group.

    `passes`: how often the prefix of a buffer goes through memory (an addition in place: 2).
    """
    graph = shape.graph
    rows = sum(passes * max(n) + 2 * sum(d) for d, n in _groups(shape))
    edges = graph.n_edges - graph.n_sources
    return Floor(2 * edges * work.rows * shape.d_model, rows * stream_bytes(shape, work))


def logits_mix(shape: Shape, work: Work) -> Floor:
    """The logits' read, at the read positions."""
    moved = shape.graph.n_sources * shape.d_model * work.pairs * work.reads
    return Floor(2 * moved, moved * work.element)


def plain_forward(shape: Shape, work: Work) -> Floor:
    """The model as it is, logits at every position."""
    body = products(shape, work, shape.block_weights) + attention(shape, work)
    return body + unembedding(shape, work, work.rows)


def plain_backward(shape: Shape, work: Work) -> Floor:
    """Gradients of activations; weights are frozen, so theirs are not taken."""
    scores = attention(shape, work)
    return plain_forward(shape, work) + scores


def masked_forward(shape: Shape, work: Work) -> Floor:
    """Half blocks, the mixes that they read, their differences written, logits where read."""
    body = products(shape, work, shape.block_weights) + attention(shape, work)
    written = Floor(0, buffer_bytes(shape, work))
    reads = mixing(shape, work) + logits_mix(shape, work)
    return body + written + reads + unembedding(shape, work, work.pairs * work.reads)


def masked_backward(shape: Shape, work: Work) -> Floor:
    """Two products a read: the mask's gradient (one pass) and the gradient buffer's (two)."""
    body = products(shape, work, shape.block_weights) + attention(shape, work)
    body += attention(shape, work)
    reads = mixing(shape, work) + mixing(shape, work, passes=2)
    reads += logits_mix(shape, work) + logits_mix(shape, work)
    return body + reads + unembedding(shape, work, work.pairs * work.reads)


def recompute_cost(shape: Shape, work: Work) -> Floor:
    """What recomputation adds: mixes and half blocks again, heads only up to their z."""
    weights = shape.block_weights - shape.n_layers * shape.output
    return products(shape, work, weights) + attention(shape, work) + mixing(shape, work)


def reference_run(shape: Shape, work: Work) -> Floor:
    """The corrupted prompts' run, without logits."""
    body = products(shape, work, shape.block_weights) + attention(shape, work)
    return body + Floor(0, reference_bytes(shape, work))


def eap(shape: Shape, work: Work) -> Floor:
    """Reference, forward and backward at mask 1 (sums, no mixes), the mask's gradient."""
    body = products(shape, work, 2 * shape.block_weights) + attention(shape, work)
    body += attention(shape, work) + attention(shape, work)
    gradient = mixing(shape, work) + logits_mix(shape, work)
    logits = unembedding(shape, work, 2 * work.pairs * work.reads)
    written = Floor(0, 2 * buffer_bytes(shape, work))
    return reference_run(shape, work) + body + gradient + logits + written


def one_circuit(shape: Shape, work: Work) -> Floor:
    """A circuit's evaluation: the reference's run and a masked forward."""
    return reference_run(shape, work) + masked_forward(shape, work)


PASSES = {
    "plain forward": plain_forward,
    "plain backward": plain_backward,
    "masked forward": masked_forward,
    "masked backward": masked_backward,
    "recomputed": recompute_cost,
    "reference recording": reference_run,
    "EAP": eap,
    "one circuit": one_circuit,
}


def step_floor(shape: Shape, work: Work) -> Floor:
    """A training step with blocks recomputed, its reference recorded anew."""
    forward = reference_run(shape, work) + masked_forward(shape, work)
    return forward + recompute_cost(shape, work) + masked_backward(shape, work)


# ------------------------------------------------------------------------------------------ tables


def floors_table(shape: Shape, work: Work) -> str:
    """Every pass' floor as a Markdown table, in operations and bytes moved, 10^9 each."""
    floors = {name: passed(shape, work) for name, passed in PASSES.items()}
    floors |= {"one training step": step_floor(shape, work)}
    rows = [
        f"| {name} | {f.operations / 1e9:,.1f} | {f.bytes / 1e9:,.2f} |"
        for name, f in floors.items()
    ]
    return "\n".join(["| pass | GFLOP | GB |", "|---|---:|---:|", *rows])


def memory_table(shape: Shape, work: Work) -> str:
    """A training step's memory, buffer by buffer, as a Markdown table in MB (10^6 bytes)."""
    planned = step_bytes(shape, work)
    planned |= {"in all": sum(planned.values())}
    rows = [f"| {name} | {size / 1e6:,.1f} |" for name, size in planned.items()]
    return "\n".join(["| | MB |", "|---|---:|", *rows])
