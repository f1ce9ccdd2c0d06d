"""Exchange edges of a circuit, as long as its objective falls.

1. The mask's gradient at the circuit guesses, for every kept edge, the rise if it went, and for
   every other, the fall if it came.
2. As many of the best others come as of the least needed go, so the size stays: a share of the
   circuit, `swap`.
3. The exchange stays if the objective, mean over all pairs of the task, falls. If it does not, half
   as many as were exchanged are.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.attribution.mask_gradient import path_scores
from tl_edgeprune.attribution.paths import at
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.metadata import ablation_of
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.objectives import Objective, find_objective, losses
from tl_edgeprune.runs.provenance import check_origin
from tl_edgeprune.runs.targets import Teacher
from tl_edgeprune.runs.task_checks import check_tokens
from tl_edgeprune.runs.totals import each_lesson
from tl_edgeprune.tasks.task import Task


def polish(
    model: Any,
    task: Task,
    circuit: Circuit,
    *,
    rounds: int = 8,
    swap: float = 0.05,
    held_out: Task | None = None,
    objective: str | Objective | None = None,
    ablation: Ablation | None = None,
    batch_size: int = 8,
) -> Circuit:
    """The circuit after at most `rounds` exchanges of edges, of the same size: those that do not
    hurt for others that help, never worse on `task` (or on `held_out`).

    Args:
        swap: the share of the circuit's edges that are exchanged at first.
        held_out: other pairs, on which an exchange has to lower the objective; `task` proposes it.
            What the circuit is worth is then to be told by others still.
        objective: what should fall; the task's own by default.
        ablation: what removed edges carry; by default what the circuit was found with.

    A round costs a forward, a backward and a forward over all pairs. Metadata gain "polish": the
    objective before and after, and how many edges were exchanged. Raises ValueError for a share
    outside (0, 1], for fewer than one round, for an empty or a full circuit, as `evaluate` does for
    another model's, and for pairs that lack the objective's tokens.
    """
    _check(circuit, rounds, swap)
    loss_of = find_objective(objective, task)
    check_tokens(task, model)
    kind = ablation_of(circuit.metadata) if ablation is None else ablation
    check_origin(model, circuit.graph, circuit.metadata)
    if held_out is not None:
        find_objective(objective or task.objective, held_out)  # its pairs have to suffice for it
        check_tokens(held_out, model)
    with MaskedModel.attach(model, circuit.graph) as run:
        teacher = judge = Teacher(run, task, kind, batch_size=batch_size)
        if held_out is not None:
            judge = Teacher(run, held_out, kind, batch_size=batch_size)
        mask = circuit.mask.clone()
        first = value = _mean_loss(run, judge, mask, loss_of, batch_size)
        count, guess = max(1, round(swap * int(mask.sum()))), None
        for _ in range(rounds):
            if guess is None:
                guess = path_scores(run, teacher, at(mask), loss_of, batch_size=batch_size)
            other = exchanged(mask, guess, count)
            moved = int((other & ~mask).sum())
            if moved == 0:
                break
            found = _mean_loss(run, judge, other, loss_of, batch_size)
            if found < value:
                mask, value, guess = other, found, None
            elif moved == 1:
                break
            else:
                count = (moved + 1) // 2
    new = int((mask & ~circuit.mask).sum())
    note: dict[str, Any] = {"polish": {"before": first, "after": value, "exchanged": new}}
    note["ablation"] = str(kind)
    return Circuit(circuit.graph, mask, circuit.metadata | note)


def exchanged(
    mask: Bool[Tensor, " edge"], guess: Float[Tensor, " edge"], count: int
) -> Bool[Tensor, " edge"]:
    """The mask with its `count` lowest edges exchanged for the highest others, where that rises."""
    kept = guess.masked_fill(~mask, torch.inf)
    others = guess.masked_fill(mask, -torch.inf)
    count = min(count, int(mask.sum()), int((~mask).sum()))
    going, coming = kept.topk(count, largest=False), others.topk(count)
    better = coming.values > going.values
    other = mask.clone()
    other[going.indices[better]] = False
    other[coming.indices[better]] = True
    return other


def _check(circuit: Circuit, rounds: int, swap: float) -> None:
    if not 0 < swap <= 1:
        raise ValueError(f"swap={swap}: expected a share of the circuit's edges, above 0 to 1.")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected 1 or more.")
    if circuit.n_edges in (0, circuit.graph.n_edges):
        raise ValueError(
            f"the circuit has {circuit.n_edges} of {circuit.graph.n_edges} edges: there is nothing "
            "to exchange."
        )


@torch.no_grad()
def _mean_loss(
    run: MaskedModel,
    teacher: Teacher,
    mask: Bool[Tensor, " edge"],
    loss_of: Objective,
    batch_size: int,
) -> float:
    total, on_device = 0.0, mask.float().to(teacher.device)
    for lesson in each_lesson(teacher, batch_size=batch_size):
        batch = lesson.batch
        logits = run(batch.clean, on_device, lesson.reference, batch.positions, spans=batch.spans)
        total += float(losses(loss_of, logits, lesson.full, batch).sum())
    return total / len(teacher.task)
