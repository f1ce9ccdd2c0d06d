"""Exchange edges of a circuit, as long as its objective falls.

1. The mask's gradient at the circuit estimates how much the objective rises if a kept edge is
   removed, and how much it falls if a removed edge is added.
2. The least needed kept edges are exchanged for as many of the best removed ones, at first a share
   `swap` of the circuit. So the size stays.
3. The exchange is accepted if the objective, mean over all pairs of the task, falls. If it does
   not, half as many edges are tried.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.attribution.mask_gradient import path_scores
from tl_edgeprune.attribution.paths import path_at
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.objectives import Objective, losses
from tl_edgeprune.runs.session import open_session
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.runs.totals import each_target_batch
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
    """The circuit after at most `rounds` exchanges of edges that do not matter for edges that help.
    Its size stays, and its objective on `task` (or on `held_out`) is never higher.

    Args:
        swap: the share of the circuit's edges that are exchanged at first.
        held_out: other pairs, on which an exchange must lower the objective; `task` then only
            proposes it. Evaluate the circuit on pairs that are in neither.
        objective: what should fall; the task's own by default.
        ablation: what removed edges carry; by default what the circuit was found with.

    A round costs a forward, a backward and a forward over all pairs. Metadata gain "polish": the
    objective before and after, and how many edges were exchanged.

    Raises ValueError for a share outside (0, 1], fewer than one round, an empty or a full circuit,
    as `evaluate` does for another model's circuit, and for pairs that lack the objective's tokens.
    """
    _check(circuit, rounds, swap)
    with open_session(
        model,
        task,
        result=circuit,
        objective=objective,
        ablation=ablation,
        batch_size=batch_size,
    ) as session:
        run, loss_of = session.run, session.loss_of
        judge = session.targets if held_out is None else session.targets_of(held_out)
        mask = circuit.mask.clone()
        at_start = value = _mean_loss(run, judge, mask, loss_of, batch_size)
        count, scores = max(1, round(swap * int(mask.sum()))), None
        for _ in range(rounds):
            if scores is None:
                path = path_at(mask)
                scores = path_scores(run, session.targets, path, loss_of, batch_size=batch_size)
            new_mask = exchange_edges(mask, scores, count)
            n_exchanged = int((new_mask & ~mask).sum())
            if n_exchanged == 0:
                break
            new_value = _mean_loss(run, judge, new_mask, loss_of, batch_size)
            if new_value < value:
                mask, value, scores = new_mask, new_value, None
            elif n_exchanged == 1:
                break
            else:
                count = (n_exchanged + 1) // 2
    n_exchanged = int((mask & ~circuit.mask).sum())
    note = {"before": at_start, "after": value, "exchanged": n_exchanged}
    metadata = circuit.metadata | {"polish": note, "ablation": str(session.ablation)}
    return Circuit(circuit.graph, mask, metadata)


def exchange_edges(
    mask: Bool[Tensor, " edge"], scores: Float[Tensor, " edge"], count: int
) -> Bool[Tensor, " edge"]:
    """The mask, with up to `count` of its lowest edges exchanged for higher removed ones."""
    count = min(count, int(mask.sum()), int((~mask).sum()))
    lowest = scores.masked_fill(~mask, torch.inf).topk(count, largest=False)
    highest = scores.masked_fill(mask, -torch.inf).topk(count)
    better = highest.values > lowest.values
    new_mask = mask.clone()
    new_mask[lowest.indices[better]] = False
    new_mask[highest.indices[better]] = True
    return new_mask


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
    targets: Targets,
    mask: Bool[Tensor, " edge"],
    loss_of: Objective,
    batch_size: int,
) -> float:
    total, device_mask = 0.0, mask.float().to(run.device)
    for target_batch in each_target_batch(targets, batch_size=batch_size):
        logits = run.logits(target_batch, device_mask)
        total += float(losses(loss_of, logits, target_batch.full, target_batch.batch).sum())
    return total / len(targets.task)
