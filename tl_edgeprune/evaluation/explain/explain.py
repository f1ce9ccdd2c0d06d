"""What each edge of a circuit does.

1. The rise: how much the objective rises when the edge alone is cut from the circuit. Cuts run as
   in exact patching, several side by side, and only what they change (cuts.py).
2. The direct effect: the logit lens of the difference that the edge carries (logit_lens.py).
3. Where that difference is, and what the heads at the edge's ends attend to, in the circuit's own
   run, averaged over the prompts of one length (position_means.py).
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
from tl_edgeprune.circuits.metadata import ablation_of
from tl_edgeprune.evaluation.explain.explanation import Explanation, Row
from tl_edgeprune.evaluation.explain.logit_lens import Score, answer_direction, answer_score
from tl_edgeprune.evaluation.explain.position_means import Layout, Slots
from tl_edgeprune.forward.forward_pass import fitting
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.names import kind_of
from tl_edgeprune.hooks.attach import attached
from tl_edgeprune.objectives import Objective, find_objective
from tl_edgeprune.runs.provenance import check_origin, origin
from tl_edgeprune.runs.targets import Lesson, Teacher
from tl_edgeprune.runs.task_checks import check_tokens
from tl_edgeprune.search.cuts import find_cuts
from tl_edgeprune.search.edge_effects import each_rise
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
        circuit: its own run is looked at: other edges are replaced, as in `evaluate`.
        task: every pair is run once for each edge (from that edge on): some tens are enough.
        edges: names of those to explain; by default all that the circuit keeps, at most 500.
        objective: the task's own by default.
        ablation: the circuit's own by default, else counterfactual.

    An edge that the others make up for has no rise, and one that only keeps other answers down may
    have one below 0. Raises ValueError for more than 500 edges where none are named, for named ones
    that the circuit does not keep, and as `evaluate` does; KeyError for an unknown edge;
    NotImplementedError for a circuit whose edges have positions.
    """
    if circuit.graph.spans:
        raise NotImplementedError(
            "explain: this circuit's edges have positions, and only edges without are explained. "
            "Find a circuit without positions=…; exact scores of edges with them are "
            "discover(…, method='exact', positions=…)."
        )
    wanted = _wanted(circuit, edges)
    loss_of, score = find_objective(objective, task), answer_score(task)
    check_origin(model, circuit.graph, circuit.metadata)
    check_tokens(task, model)
    kind = ablation_of(circuit.metadata) if ablation is None else ablation
    with MaskedModel.attach(model, circuit.graph) as run:
        teacher = Teacher(run, task, kind, batch_size=batch_size, max_bytes=0)
        cuts = find_cuts(run, teacher, loss_of, batch_size=batch_size)
        cuts.set(circuit.mask)
        rises: dict[int, float] = {}
        with tqdm(total=len(wanted), desc="cutting", unit="edge", disable=not progress) as bar:
            for some, values in each_rise(cuts, wanted):
                rises |= zip(some, values.tolist(), strict=True)
                bar.update(len(some))
        look = _Look(run, circuit, _attending(circuit, wanted), score)
        for lesson in cuts.lessons:
            look.at(lesson)
        about = origin(model, task, objective=objective, ablation=kind)
        about |= {"value": cuts.value, "score": look.score}
    text_of = _text_of(getattr(model, "tokenizer", None))
    words = _Words(look, text_of, circuit.graph)
    rows = [words.row(edge, rises[edge]) for edge in wanted]
    return Explanation(tuple(rows), tuple(look.pattern_rows(text_of)), about)


class _Look:
    """The circuit's run, pair by pair: effects of sources, where they are, and heads' patterns."""

    def __init__(
        self, run: MaskedModel, circuit: Circuit, heads: Sequence[str], score: Score | None
    ) -> None:
        self.run, self.graph, self.answers = run, run.graph, score
        self.heads = tuple(heads)
        self.mask = circuit.mask.to(run.sites.attention[0].output.device)
        self.slots = Slots()
        self._effects: list[Float[Tensor, "source pair"]] = []
        self._scores: list[Float[Tensor, " pair"]] = []

    @torch.no_grad()
    def at(self, lesson: Lesson) -> None:
        """Take in one batch of pairs."""
        batch = lesson.batch
        seen: dict[int, Tensor] = {}
        layers = sorted({_layer_and_head(head)[0] for head in self.heads})
        with ExitStack() as undo:
            points = [(f"blocks.{n}.attn.hook_pattern", _keeper(seen, n)) for n in layers]
            undo.enter_context(attached(self.run.model, points))
            differences = self.run.differences(batch.clean, lesson.reference, self.mask)
        differences = differences.unflatten(1, batch.clean.shape)  # [source, pair, pos, d_model]
        self._effect(lesson, differences)
        sizes = differences.float().square().sum(-1).transpose(0, 1)  # [pair, source, pos]
        total = sizes.sum(-1, keepdim=True)
        values = {"carries": torch.where(total > 0, sizes / total, 0.0)}
        for head in self.heads:
            layer, number = _layer_and_head(head)
            if layer in seen:
                index = batch.positions[..., None].expand(-1, -1, batch.clean.shape[1])
                values[head] = seen[layer][:, number].gather(1, index)  # [pair, read, pos]
        self.slots.add(batch, values)

    def _effect(self, lesson: Lesson, differences: Tensor) -> None:
        if self.answers is None:
            return
        batch = lesson.batch
        index = batch.positions[..., None].expand(-1, -1, differences.shape[-1])
        carried = torch.stack([source.gather(1, index) for source in differences])
        stream = fitting(lesson.reference, batch.clean).streams[-1].gather(1, index)
        kept = self.mask[self.graph.reads[-1].edges].to(carried)
        x = stream + torch.einsum("s,sbrd->brd", kept, carried)
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


class _Words:
    """A row for an edge, with its texts in the most common layout."""

    def __init__(self, look: _Look, text_of: Callable[[int], str], graph: EdgeGraph) -> None:
        self.graph, self.effects = graph, look.effects
        layout: Layout = look.slots.commonest
        self.labels, self.means = layout.labels(text_of), layout.means
        self.place = {name: index for index, name in enumerate(graph.sources)}

    def row(self, edge: int, rise: float) -> Row:
        name = self.graph.edges[edge]
        source, _, destination = name.partition("->")
        place, kind = self.place[source], kind_of(destination)
        into = self.graph.owner(destination) if kind not in ("mlp", "logits") else ()
        return {
            "edge": name,
            "source": source,
            "destination": destination,
            "kind": kind,
            "rise": rise,
            "direct_effect": self.effects[place],
            "carries": self._text(self.means["carries"][place]),
            "attends": self._attended(into),
            "source_attends": self._attended((source,)),
        }

    def _attended(self, heads: Sequence[str]) -> str:
        """What heads attend to from the last read position, on average over them."""
        found = [self.means[head][-1] for head in heads if head in self.means]
        return self._text(torch.stack(found).mean(0)) if found else ""

    def _text(self, weights: Float[Tensor, " pos"]) -> str:
        top = weights.topk(min(NAMED, len(weights)))
        pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        return ", ".join(f"{self.labels[at]} {w:.2f}" for w, at in pairs if w >= LEAST)


def _wanted(circuit: Circuit, edges: Iterable[str] | None) -> list[int]:
    """Places of the edges to explain, in the graph's order."""
    if edges is None:
        if not 1 <= circuit.n_edges <= MOST_EDGES:
            raise ValueError(
                f"the circuit has {circuit.n_edges:,} edges, and each takes a run of its own: with "
                f"more than {MOST_EDGES} (or none) say which to explain, edges=…, such as those of "
                "a smaller circuit, result.top(200).edges."
            )
        return circuit.mask.nonzero().flatten().tolist()
    wanted = sorted({circuit.graph.index(edge) for edge in edges})
    missing = [circuit.graph.edges[edge] for edge in wanted if not circuit.mask[edge]]
    if missing or not wanted:
        raise ValueError(
            f"edges={missing[:4] if missing else []}: expected edges that the circuit keeps (see "
            "circuit.edges); one that is cut already has nothing to explain."
        )
    return wanted


def _attending(circuit: Circuit, wanted: Sequence[int]) -> list[str]:
    """The heads at either end of the edges, in the graph's order."""
    graph, found = circuit.graph, set()
    for edge in wanted:
        source, _, destination = graph.edges[edge].partition("->")
        found |= {source, *graph.owner(destination)}
    return [name for name in graph.sources if name in found and name.startswith("a")]


def _layer_and_head(name: str) -> tuple[int, int]:
    layer, _, head = name.removeprefix("a").partition(".h")
    return int(layer), int(head)


def _keeper(seen: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def keep(pattern: Tensor, hook: Any) -> None:
        seen[layer] = pattern.detach()

    return keep


def _text_of(tokenizer: Any) -> Callable[[int], str]:
    """Tokens as text: without the space before a word, and with line ends made visible."""

    def text(token: int) -> str:
        if tokenizer is None:
            return str(token)
        decoded = str(tokenizer.decode([token]))
        return decoded.strip() or repr(decoded)[1:-1]

    return text
