"""Strict interchange intervention training: a transformer with only a given circuit.

Every step draws pairs of prompts and, pair by pair,

1. reads of the causal model to swap: none, one, all reads of one variable, or any set;
2. edges outside the circuit to cut: none, all, or any share of them.

The transformer runs with all those edges carrying their sources' outputs on the other prompt, and
must answer as the causal model does with the swapped reads. The loss is the cross-entropy. Without
swaps and cuts, this is the task itself; swaps make every edge of the circuit carry its variable;
cuts make every other edge carry nothing.

Gupta, Arcuschin, Kwa and Garriga-Alonso 2024, "InterpBench" (arXiv 2407.14494), section 3, swap and
cut nodes. Here edges are swapped and cut (among them all edges of a node at once), since circuits
consist of edges in this package; this also separates a head's queries, keys and values. Interchange
intervention training: Geiger et al. 2022, arXiv 2112.00826.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from tl_edgeprune.graph.names import split_edge
from tl_edgeprune.siit.causal import CausalModel
from tl_edgeprune.siit.network import State, fresh_weights, run
from tl_edgeprune.utils.grad_mode import needs_gradients

SWAPS = (0.35, 0.3, 0.2, 0.15)  # none, one read, one variable's, any set
CUTS = (0.25, 0.5, 0.25)  # none, any share, all


@dataclass(frozen=True)
class Interventions:
    """Swapped reads of the causal model, and the transformer's edges that are cut."""

    swapped: Bool[Tensor, "batch read"]
    cut: Bool[Tensor, "batch edge"]


class Draws:
    """Random pairs of prompts and interventions on them, from one seed."""

    def __init__(self, causal: CausalModel, seed: int) -> None:
        self.causal = causal
        self.generator = torch.Generator().manual_seed(seed)
        self.circuit = torch.tensor([causal.graph.index(edge) for edge in causal.edges])
        sources = [split_edge(edge)[0] for edge in causal.edges]
        self.from_same = torch.tensor([[a == b for b in sources] for a in sources])

    def prompts(self, n: int) -> Tensor:
        return self.causal.draw(n, self.generator)

    def interventions(self, n: int) -> Interventions:
        """Swaps and cuts for n pairs, as the module's docstring describes."""
        n_reads, n_edges = len(self.causal.edges), self.causal.graph.n_edges
        read_indices = torch.randint(n_reads, (n,), generator=self.generator)
        kinds = torch.stack(
            [
                torch.zeros(n, n_reads, dtype=torch.bool),
                torch.eye(n_reads, dtype=torch.bool)[read_indices],
                self.from_same[read_indices],
                torch.rand(n, n_reads, generator=self.generator) < 0.5,
            ]
        )
        swapped = kinds[self._kind(SWAPS, n), torch.arange(n)]
        share = torch.rand(n, generator=self.generator)
        share = torch.stack([torch.zeros(n), share, torch.ones(n)])
        share = share[self._kind(CUTS, n), torch.arange(n)]
        cut = torch.rand(n, n_edges, generator=self.generator) < share[:, None]
        cut[:, self.circuit] = swapped
        return Interventions(swapped, cut)

    def _kind(self, chances: tuple[float, ...], n: int) -> Tensor:
        weights = torch.tensor(chances)
        return torch.multinomial(weights, n, replacement=True, generator=self.generator)


def sizes(causal: CausalModel, d_model: int = 32) -> dict[str, int]:
    """A transformer's sizes for a causal model, as a HookedTransformerConfig names them."""
    prompt = causal.draw(1, torch.Generator().manual_seed(0))
    return {
        "n_layers": causal.graph.n_layers,
        "n_heads": causal.graph.n_heads,
        "d_model": d_model,
        "d_head": d_model // causal.graph.n_heads,
        "d_mlp": 2 * d_model,
        "n_ctx": prompt.shape[1],
        "d_vocab": causal.n_tokens,
        "d_vocab_out": causal.n_tokens,
    }


@needs_gradients("training a semi-synthetic model")
def train(
    causal: CausalModel,
    *,
    d_model: int = 32,
    steps: int = 1000,
    lr: float = 3e-3,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> State:
    """Weights of a transformer with the causal model's circuit, under TransformerLens' names.

    The learning rate rises for a tenth of the steps, then falls.
    """
    generator = torch.Generator().manual_seed(seed)
    state = fresh_weights(sizes(causal, d_model), generator)
    for tensor in state.values():
        tensor.requires_grad_(True)
    optimizer = torch.optim.Adam(state.values(), lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, anneal_strategy="cos"
    )
    draws = Draws(causal, seed)
    with tqdm(range(steps), desc=causal.name, disable=not progress) as bar:
        for _ in bar:
            loss = _loss(state, draws, batch_size)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(state.values(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return {name: tensor.detach() for name, tensor in state.items()}


def _loss(state: State, draws: Draws, n: int) -> Tensor:
    clean, corrupted = draws.prompts(n), draws.prompts(n)
    logits, expected = _answers(state, draws.causal, clean, corrupted, draws.interventions(n))
    return cross_entropy(logits, expected)


def _answers(
    state: State, causal: CausalModel, clean: Tensor, other: Tensor, interventions: Interventions
) -> tuple[Tensor, Tensor]:
    """The transformer's logits under interventions, and the causal model's token."""
    _, other_outputs = run(state, causal.graph, other)
    logits, _ = run(state, causal.graph, clean, interventions.cut, other_outputs)
    return logits, causal.interchange(clean, other, interventions.swapped)


def accuracies(state: State, causal: CausalModel, n: int = 4096, seed: int = 1) -> dict[str, float]:
    """Shares of n new pairs on which the transformer agrees with the causal model.

    task: without interventions. interchange: some reads swapped. strict: some or all edges outside
    the circuit cut. both: both at once.
    """
    draws = Draws(causal, seed)
    clean, corrupted, interventions = draws.prompts(n), draws.prompts(n), draws.interventions(n)
    nothing = torch.zeros_like(interventions.swapped)
    cut_outside = interventions.cut.clone()
    cut_outside[:, draws.circuit] = False
    cut_inside = interventions.cut & ~cut_outside
    kinds = {
        "task": Interventions(nothing, torch.zeros_like(interventions.cut)),
        "interchange": Interventions(interventions.swapped, cut_inside),
        "strict": Interventions(nothing, cut_outside),
        "both": interventions,
    }
    shares = {}
    with torch.no_grad():
        for kind, of_kind in kinds.items():
            logits, expected = _answers(state, causal, clean, corrupted, of_kind)
            correct = (logits.argmax(-1) == expected).double()
            acted = slice(None) if kind == "task" else of_kind.cut.any(1)
            shares[kind] = correct[acted].mean().item()
    return shares
