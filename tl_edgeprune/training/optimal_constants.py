"""Optimal ablation: removed edges carry a constant per source, learned to hurt least.

A circuit's loss under any ablation mixes two things: the information of the removed sources, and
the wrong information of what replaces them. The constants that minimise the loss leave the first.

1. The constants start at the means over the task's clean prompts.
2. A step runs the circuit (or a random one) with the constants instead of removed edges, and moves
   them down the objective's gradient.

`EdgePruner(ablation="optimal")` learns them together with the circuit instead.
Li and Janson 2024, "Optimal Ablation for Interpretability", section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.ablation.constants import Constants
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.objectives import Objective, losses
from tl_edgeprune.runs.session import open_session
from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.tasks.stream import AnyTask
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.training.learned_constants import LearnedConstants
from tl_edgeprune.utils.grad_mode import needs_gradients


@needs_gradients("optimal_constants")
def optimal_constants(
    model: Any,
    task: Task,
    circuit: Circuit | None = None,
    *,
    objective: str | Objective | None = None,
    graph: EdgeGraph | None = None,
    steps: int = 100,
    lr: float = 0.05,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Constants:
    """Learn the constants that lower a circuit's objective most, starting from the means.

    Args:
        task: pairs, of which the clean prompts are used.
        circuit: the circuit that the constants are for; None for constants for any circuit: every
            step then keeps edges at random, a share of them drawn from 0 to 1.
        objective: as for EdgePruner; the task's own by default.
        graph: the graph, if there is no circuit and it is not EdgeGraph.from_model(model).
        steps: of Adam.
        lr: of Adam, in units of each kind's root mean square.
        seed: of the batches and the random masks.

    Raises ValueError for a circuit of another model, steps below 1 and a loss that is not finite.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: expected 1 or more.")
    generator = torch.Generator().manual_seed(seed)
    with open_session(
        model,
        task,
        graph=graph if circuit is None else circuit.graph,
        objective=objective,
        ablation="mean",
        batch_size=batch_size,
        max_bytes=0,
    ) as session:
        learned = LearnedConstants(session.run, task.clean, lr)
        batches = _endless_batches(session.targets.task, batch_size, seed)
        bar = tqdm(range(steps), "learning constants", disable=not progress)
        for step in bar:
            target_batch = session.targets.prepare(next(batches))
            mask = _mask_of_step(circuit, session.graph, generator).to(session.run.device)
            logits = session.run.logits(target_batch, mask, learned.reference())
            loss = losses(session.loss_of, logits, target_batch.full, target_batch.batch).mean()
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the objective is {loss.item()} at step {step}: try a lower lr.")
            loss.backward()
            learned.step()
            bar.set_postfix_str(f"objective {float(loss.detach()):.3f}")
        note = {"model": getattr(model.cfg, "model_name", ""), "task": task.name, "seed": seed}
        note |= {"n_pairs": len(task), "steps": steps, "lr": lr, "loss": float(loss.detach())}
        return learned.constants(note).detached()


def _endless_batches(task: AnyTask, batch_size: int, seed: int) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from task.batches(batch_size, True, seed + epoch)
        epoch += 1


def _mask_of_step(circuit: Circuit | None, graph: EdgeGraph, generator: torch.Generator) -> Tensor:
    if circuit is not None:
        return circuit.mask
    share = torch.rand((), generator=generator)
    return torch.rand(graph.n_edges, generator=generator) < share
