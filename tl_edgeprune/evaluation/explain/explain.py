"""What each edge of a circuit does.

1. The rise: how much the objective rises if only this edge is cut from the circuit. Several cuts
   run side by side, as in exact patching, and only what they change is computed (search/cuts.py).
2. The direct effect: the logit lens of the difference that the edge carries (logit_lens.py).
3. At which tokens that difference is, and what the heads at the edge's ends attend to in the
   circuit's own run, averaged over the prompts of one length (position_means.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.evaluation.explain.explanation import Explanation, Row
from tl_edgeprune.evaluation.explain.logit_lens import Score, answer_direction, answer_score
from tl_edgeprune.evaluation.explain.position_means import Layout, PositionMeans
from tl_edgeprune.forward.forward_pass import reference_for
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.names import kind_of, split_edge
from tl_edgeprune.hooks.attach import hooks_attached
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.session import open_session
from tl_edgeprune.runs.targets import TargetBatch
from tl_edgeprune.search.cuts import find_cuts
from tl_edgeprune.search.edge_effects import each_effect
from tl_edgeprune.tasks.task import Task

MOST_EDGES = 500
NAMED = 3  # positions named in a text
LEAST = 0.05  # share or weight that is worth naming


def explain(
    model: Any,
    circuit: Circuit,
    task: Task,
    *,
    edges: Iterable[str] | None = None,
    objective: str | Objective | None = None,
    ablation: Ablation | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Explanation:
    """Each kept edge's rise of the objective, direct effect on the answer and heads' attention.

    Args:
        circuit: the circuit, whose own run is explained: other edges are replaced, as in
            `evaluate`.
        task: pairs. Each is run once per edge (from that edge on): some tens are enough.
        edges: names of the edges to explain; by default all that the circuit keeps, at most 500.
        objective: the task's own by default.
        ablation: the circuit's own by default, else counterfactual.

    The rise is about 0 for an edge that the others make up for, and may be below 0 for one that
    only suppresses other answers.

    Raises ValueError for more than 500 edges if none are named, for named edges that the circuit
    does not keep, and as `evaluate` does; KeyError for an unknown edge; NotImplementedError for a
    circuit whose edges have positions.
    """
    if circuit.graph.spans:
        raise NotImplementedError(
            "explain: this circuit's edges have positions, and only edges without are explained. "
            "Find a circuit without positions=…; exact scores of edges with them are "
            "discover(…, method='exact', positions=…)."
        )
    explained = _edges_to_explain(circuit, edges)
    with open_session(
        model,
        task,
        result=circuit,
        objective=objective,
        ablation=ablation,
        batch_size=batch_size,
        max_bytes=0,
    ) as session:
        cuts = find_cuts(session.run, session.targets, session.loss_of, batch_size=batch_size)
        cuts.set(circuit.mask)
        rises: dict[int, float] = {}
        with tqdm(total=len(explained), desc="cutting", unit="edge", disable=not progress) as bar:
            for chunk, effects in each_effect(cuts, explained):
                rises |= zip(chunk.tolist(), effects.tolist(), strict=True)
                bar.update(len(chunk))
        heads = _heads_at_the_ends(circuit, explained)
        circuit_run = _CircuitRun(session.run, circuit, heads, answer_score(task))
        for target_batch in cuts.target_batches:
            circuit_run.add(target_batch)
    about = session.metadata | {"value": cuts.value, "score": circuit_run.score}
    text_of = _text_of(getattr(model, "tokenizer", None))
    texts = _RowText(circuit_run, text_of, circuit.graph)
    rows = [texts.row(edge, rises[edge]) for edge in explained]
    return Explanation(tuple(rows), tuple(circuit_run.pattern_rows(text_of)), about)


class _CircuitRun:
    """The circuit's run, batch by batch: the direct effects of sources, the tokens at which their
    differences are, and the heads' attention patterns.
    """

    def __init__(
        self, run: MaskedModel, circuit: Circuit, heads: Sequence[str], score: Score | None
    ) -> None:
        self.run, self.graph, self.answers = run, run.graph, score
        self.heads = tuple(heads)
        self.mask = circuit.mask.to(run.device)
        self.slots = PositionMeans()
        self._effects: list[Float[Tensor, "source pair"]] = []
        self._scores: list[Float[Tensor, " pair"]] = []

    @torch.no_grad()
    def add(self, target_batch: TargetBatch) -> None:
        """Run one batch of pairs, and add it to the means."""
        batch = target_batch.batch
        patterns: dict[int, Tensor] = {}  # by layer
        layers = sorted({_layer_and_head(head)[0] for head in self.heads})
        with ExitStack() as undo:
            points = [(f"blocks.{n}.attn.hook_pattern", _keep_pattern(patterns, n)) for n in layers]
            undo.enter_context(hooks_attached(self.run.model, points))
            differences = self.run.differences(batch.clean, target_batch.reference, self.mask)
        differences = differences.unflatten(1, batch.clean.shape)  # [source, pair, pos, d_model]
        self._add_direct_effects(target_batch, differences)
        sizes = differences.float().square().sum(-1).transpose(0, 1)  # [pair, source, pos]
        total = sizes.sum(-1, keepdim=True)
        values = {"carries": torch.where(total > 0, sizes / total, 0.0)}
        for head in self.heads:
            layer, number = _layer_and_head(head)
            if layer in patterns:
                index = batch.read_positions[..., None].expand(-1, -1, batch.clean.shape[1])
                values[head] = patterns[layer][:, number].gather(1, index)  # [pair, read, pos]
        self.slots.add(batch, values)

    def _add_direct_effects(self, target_batch: TargetBatch, differences: Tensor) -> None:
        if self.answers is None:
            return
        batch = target_batch.batch
        index = batch.read_positions[..., None].expand(-1, -1, differences.shape[-1])
        carried = torch.stack([source.gather(1, index) for source in differences])
        stream = reference_for(target_batch.reference, batch.clean).streams[-1].gather(1, index)
        into_logits = self.mask[self.graph.reads[-1].edges].to(carried)
        x = stream + torch.einsum("s,sbrd->brd", into_logits, carried)
        scores, direction = answer_direction(self.run.model, x, batch, self.answers)
        effects = torch.einsum("sbrd,brd->sb", carried.double(), direction.double())
        self._effects.append(effects.cpu())
        self._scores.append(scores.double().cpu())

    @property
    def effects(self) -> list[float]:
        """By source: the direct effect of its difference, mean over the pairs."""
        if not self._effects:
            return [math.nan] * self.graph.n_sources
        return torch.cat(self._effects, 1).mean(1).tolist()

    @property
    def score(self) -> float | None:
        """The answers' score in the circuit's run, mean over the pairs."""
        return float(torch.cat(self._scores).mean()) if self._scores else None

    def pattern_rows(self, text_of: Callable[[int], str]) -> list[Row]:
        """Every head's attention from the read positions, by prompt length."""
        rows = []
        for layout in self.slots.layouts.values():
            labels, means = layout.labels(text_of), layout.means
            for head in (head for head in self.heads if head in means):
                for read, weights in zip(layout.read.tolist(), means[head].tolist(), strict=True):
                    rows += [
                        {
                            "head": head,
                            "length": len(labels),
                            "n_pairs": layout.n_pairs,
                            "read": read,
                            "position": position,
                            "token": label,
                            "weight": weight,
                        }
                        for position, (label, weight) in enumerate(
                            zip(labels, weights, strict=True)
                        )
                    ]
        return rows


class _RowText:
    """The row of an edge, whose texts name the tokens of the most common layout."""

    def __init__(
        self, circuit_run: _CircuitRun, text_of: Callable[[int], str], graph: EdgeGraph
    ) -> None:
        self.graph, self.effects = graph, circuit_run.effects
        layout: Layout = circuit_run.slots.commonest
        self.labels, self.means = layout.labels(text_of), layout.means
        self.source_index = {name: index for index, name in enumerate(graph.sources)}

    def row(self, edge: int, rise: float) -> Row:
        name = self.graph.edges[edge]
        source, destination = split_edge(name)
        index, kind = self.source_index[source], kind_of(destination)
        into = self.graph.owner(destination) if kind not in ("mlp", "logits") else ()
        return {
            "edge": name,
            "source": source,
            "destination": destination,
            "kind": kind,
            "rise": rise,
            "direct_effect": self.effects[index],
            "carries": self._text(self.means["carries"][index]),
            "attends": self._attended_by(into),
            "source_attends": self._attended_by((source,)),
        }

    def _attended_by(self, heads: Sequence[str]) -> str:
        """What heads attend to from the last read position, on average over them."""
        patterns = [self.means[head][-1] for head in heads if head in self.means]
        return self._text(torch.stack(patterns).mean(0)) if patterns else ""

    def _text(self, weights: Float[Tensor, " pos"]) -> str:
        top = weights.topk(min(NAMED, len(weights)))
        pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        return ", ".join(f"{self.labels[pos]} {w:.2f}" for w, pos in pairs if w >= LEAST)


def _edges_to_explain(circuit: Circuit, edges: Iterable[str] | None) -> list[int]:
    """Indices of the edges to explain, in the graph's order."""
    if edges is None:
        if not 1 <= circuit.n_edges <= MOST_EDGES:
            raise ValueError(
                f"the circuit has {circuit.n_edges:,} edges, and each takes a run: with more "
                f"than {MOST_EDGES} (or none) say which to explain, edges=…, such as those of a "
                "smaller circuit, result.top(200).edges."
            )
        return circuit.mask.nonzero().flatten().tolist()
    indices = sorted({circuit.graph.index(edge) for edge in edges})
    missing = [circuit.graph.edges[edge] for edge in indices if not circuit.mask[edge]]
    if missing or not indices:
        raise ValueError(
            f"edges={missing[:4] if missing else []}: expected edges that the circuit keeps (see "
            "circuit.edges); there is nothing to explain of an edge that is cut already."
        )
    return indices


def _heads_at_the_ends(circuit: Circuit, edges: Sequence[int]) -> list[str]:
    """The heads that the edges leave or enter, in the graph's order."""
    graph, ends = circuit.graph, set()
    for edge in edges:
        source, destination = split_edge(graph.edges[edge])
        ends |= {source, *graph.owner(destination)}
    return [name for name in graph.sources if name in ends and name.startswith("a")]


def _layer_and_head(name: str) -> tuple[int, int]:
    layer, _, head = name.removeprefix("a").partition(".h")
    return int(layer), int(head)


def _keep_pattern(patterns: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def keep(pattern: Tensor, hook: Any) -> None:
        patterns[layer] = pattern.detach()  # [pair, head, pos, pos]

    return keep


def _text_of(tokenizer: Any) -> Callable[[int], str]:
    """Tokens as text: without the space before a word, and with line ends made visible."""

    def text(token: int) -> str:
        if tokenizer is None:
            return str(token)
        decoded = str(tokenizer.decode([token]))
        return decoded.strip() or repr(decoded)[1:-1]

    return text
