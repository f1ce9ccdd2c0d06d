"""One run of an EdgePruner: the training loop.

A step draws masks and accumulates the gradients of a few batches, moves the log alphas down and the
controllers' multipliers up, and records its figures. Gates are in gate_group.py, the state on disk
in trainer_state.py, the ranking that the run ends with in best_ranking.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.ablation.constants import OPTIMAL, Constants
from tl_edgeprune.distributed import LostProcess, Ranks
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_indices import edge_ends
from tl_edgeprune.objectives import Objective, losses
from tl_edgeprune.runs import checkpoint as checkpoints
from tl_edgeprune.runs.checkpoint import Stateful
from tl_edgeprune.runs.fingerprint import digest
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.runs.task_checks import any_task_for
from tl_edgeprune.tasks.stream import AnyTask, sample
from tl_edgeprune.training.batch_stream import BatchStream
from tl_edgeprune.training.best_ranking import BestRanking, FinalRanking
from tl_edgeprune.training.first_gates import first_gates
from tl_edgeprune.training.gate_group import GateGroup
from tl_edgeprune.training.gates import mixed_seed, open_probability
from tl_edgeprune.training.learned_constants import LearnedConstants
from tl_edgeprune.training.result import PruneResult, run_metadata
from tl_edgeprune.training.settings import PrunerSettings
from tl_edgeprune.training.trainer_state import RunIdentity, TrainerState

EPOCHS = 10_000_000  # the seeds of epochs are beyond those of steps


class GateTargets(NamedTuple):
    """The number of gates of each kind that a step aims to keep open."""

    edges: float
    sources: float
    neurons: float


class Trainer:
    """One run of an EdgePruner.

    Args:
        pruner: its settings.
        run: the model with hooks attached.
        task: the pairs to train on.
        loss_of: the objective.
        weights: the fingerprint of the model's weights, for checkpoints.
        resume: the checkpoint to continue from; by default the pruner's own, if there is one.

    Checkpoints are read before the model runs. Raises FileNotFoundError or ValueError for one that
    cannot be resumed.
    """

    def __init__(
        self,
        pruner: PrunerSettings,
        run: MaskedModel,
        task: AnyTask,
        loss_of: Objective,
        weights: str | None = None,
        resume: str | Path | None = None,
    ) -> None:
        started = time.monotonic()
        self.pruner, self.run, self.loss_of = pruner, run, loss_of
        self.ranks = Ranks.current()
        self.progress = pruner.progress and self.ranks.first
        self.graph, self.task = run.graph, any_task_for(task, run.graph)
        self.identity = RunIdentity.of(pruner, self.graph, self.task, weights)
        saved = self.identity.state_to_resume(pruner.checkpoint, resume)

        self.constants = _learned_constants(pruner, run, task)
        self.targets = Targets(
            run,
            task,
            pruner.ablation if self.constants is None else self.constants.constants().detached(),
            batch_size=pruner.batch_size,
            progress=self.progress,
            visits=pruner.steps * pruner.accumulate * self.ranks.most_rows(pruner.batch_size),
        )
        self.source_of_edge = edge_ends(self.graph, self.targets.device)[0]

        self.edges, self.sources, self.neurons = first_gates(
            pruner, run, self.targets, loss_of, progress=self.progress, resumes=saved is not None
        )
        self._groups = [g for g in (self.edges, self.sources, self.neurons) if g is not None]
        best, edges_only = None, self.constants is None and self.neurons is None
        if pruner.n_edges is not None and pruner.candidates and edges_only:
            best = BestRanking(
                run, self.targets, loss_of, pruner.n_edges, pruner.batch_size, self.ranks
            )
        self.final_ranking = FinalRanking(self.edges.log_alpha, pruner, best)
        self.optimizers, self._rates = _make_optimizers(pruner, self._groups)

        self.stream = BatchStream(
            self.task, pruner.batch_size, lambda epoch: mixed_seed(pruner.seed, EPOCHS + epoch)
        )
        stateful: list[Stateful] = [self.final_ranking, *self._groups]
        optimizers = dict(self.optimizers)
        if self.constants is not None:
            stateful.append(self.constants)
            optimizers["constants"] = self.constants.optimizer
        self.state = TrainerState(self.identity, stateful, optimizers, self.stream, started)
        self.history = self.state.history
        self.between_steps = True
        if saved is not None:
            self.state.load_state_dict(saved)

    def synchronise(self) -> None:
        """Check that all processes do the same run, and give all the first one's masks."""
        run = digest([self.identity.shared, len(self.history)])
        self.ranks.check_same(run, self.targets.device)
        self.ranks.broadcast(self._learned())

    # -------------------------------------------------------------------------------- the loop

    def train(self) -> bool:
        """Run the remaining steps; False if Ctrl-C ended them early."""
        pruner, n_done = self.pruner, len(self.history)
        bar = tqdm(total=pruner.steps, initial=n_done, desc="pruning", disable=not self.progress)
        try:
            for step in range(n_done, pruner.steps):
                self._step(step)
                self._show(bar)
                if pruner.checkpoint and (step + 1) % pruner.checkpoint_every == 0:
                    self.save(pruner.checkpoint)
            finished = True
        except KeyboardInterrupt:
            finished = False
        except LostProcess as error:
            raise LostProcess(f"{error} {self._save_after_loss()}") from error
        finally:
            bar.close()
        if pruner.checkpoint and self.history:
            self.save(pruner.checkpoint)
        return finished

    def _step(self, step: int) -> None:
        pruner, progress = self.pruner, step / self.pruner.steps
        rate = pruner.optimizer.rate(step, pruner.steps)
        generator = torch.Generator().manual_seed(mixed_seed(pruner.seed, step))
        gate_targets = self._targets(progress, generator)
        for label, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._rates[label] * rate
            optimizer.zero_grad()
        batch_losses = [
            self._backward(gate_targets, progress, generator) for _ in range(pruner.accumulate)
        ]
        loss = self.ranks.all_reduce(self._learned(), sum(batch_losses) / len(batch_losses))
        self._check_loss(loss, step)
        self.between_steps = False
        self._update()
        if self.constants is not None:
            self.constants.step(rate)
        self.ranks.broadcast(self._learned())
        self.final_ranking.add(self._ranking_now(), step)
        self._record(step, loss, gate_targets)
        self.state.finish_step()
        self.between_steps = True

    def _targets(self, progress: float, generator: torch.Generator) -> GateTargets:
        def uniform() -> float:
            return float(torch.rand((), generator=generator))

        return GateTargets(
            self.edges.target(progress, uniform()),
            0.0 if self.sources is None else self.sources.target(progress, 0.0),
            0.0 if self.neurons is None else self.neurons.target(progress, uniform()),
        )

    def _backward(
        self, gate_targets: GateTargets, progress: float, generator: torch.Generator
    ) -> float:
        """Add the gradients of one batch; returns this process's part of its loss."""
        batch = next(self.stream)
        rows, share = self.ranks.rows(len(batch))
        target_batch = self.targets.prepare(batch.select(rows))
        mask, neuron_gates, penalty = self._draw(gate_targets, progress, generator)
        reference = None if self.constants is None else self.constants.reference()
        logits = self.run.logits(target_batch, mask, reference, neurons=neuron_gates)
        loss = losses(self.loss_of, logits, target_batch.full, target_batch.batch).mean() * share
        ((loss + penalty / self.ranks.size) / self.pruner.accumulate).backward()
        return float(loss.detach())

    def _draw(
        self, gate_targets: GateTargets, progress: float, generator: torch.Generator
    ) -> tuple[Float[Tensor, " edge"], Float[Tensor, "place unit"] | None, Tensor | float]:
        """A mask and gates on neurons for one forward pass, and the penalty on them."""
        hard = self.edges.is_hard(progress)
        edges = self.edges.draw(
            gate_targets.edges, generator, self._ranking_now() if hard else None
        )
        mask, penalty = edges.gates, edges.penalty
        if self.pruner.attachment is not None:
            open_share = open_probability(edges.log_alpha)
            penalty = penalty + self.pruner.attachment(open_share, self.graph)
        if self.sources is not None and not hard:  # the gates of sources don't reach a hard mask
            sources = self.sources.draw(gate_targets.sources, generator)
            mask = mask * sources.gates[self.source_of_edge]  # [edge]
            penalty = penalty + sources.penalty
        if self.neurons is None:
            return mask, None, penalty
        hard = self.neurons.is_hard(progress)
        neurons = self.neurons.draw(
            gate_targets.neurons, generator, self.neurons.log_alpha.detach() if hard else None
        )
        neuron_gates = neurons.gates.view(self.run.neuron_shape)  # [place, unit]
        return mask, neuron_gates, penalty + neurons.penalty

    def _update(self) -> None:
        clip = self.pruner.optimizer.clip
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters(), clip)
        for optimizer in self.optimizers.values():
            optimizer.step()

    def _parameters(self) -> list[Tensor]:
        """The log alphas and the multipliers."""
        groups = [group for o in self.optimizers.values() for group in o.param_groups]
        return [parameter for group in groups for parameter in group["params"]]

    def _learned(self) -> list[Tensor]:
        """Everything that a step changes."""
        return self._parameters() + ([] if self.constants is None else self.constants.moves)

    def _check_loss(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the objective is {loss} at step {step}: the model gives NaN or "
                "infinite logits under masks. Try float32, or a lower learning rate."
            )

    def _record(self, step: int, loss: float, gate_targets: GateTargets) -> None:
        entry = {
            "step": step,
            "loss": loss,
            "edges": self.edges.expected_open(self.edges.last_drawn),
            "target": gate_targets.edges,
            "seconds": self.state.seconds(),
        }
        if self.neurons is not None:
            n_open = self.neurons.expected_open(self.neurons.shifted(gate_targets.neurons))
            entry |= {"neurons": n_open, "neuron_target": gate_targets.neurons}
        self.history.append(entry)

    def _show(self, bar: Any) -> None:
        entry, recent = self.history[-1], [entry["loss"] for entry in self.history[-10:]]
        bar.set_postfix_str(
            f"{getattr(self.loss_of, '__name__', 'loss')} {sum(recent) / len(recent):.3f}, "
            f"{entry['edges']:,.0f} edges, target {entry['target']:,.0f}"
        )
        bar.update()

    # ------------------------------------------------------------------------------- the state

    def save(self, path: str | Path) -> None:
        """Write the state of the last whole step.

        In the middle of an update (Ctrl-C, a lost process) the last checkpoint stays as it is.
        """
        if self.ranks.first and self.between_steps:
            checkpoints.save(path, self.state.state_dict())

    def _save_after_loss(self) -> str:
        """Save the state when another process is lost; returns how the run can continue."""
        path, n_steps = self.pruner.checkpoint, len(self.history)
        if not path or not n_steps:
            return f"The run ends after {n_steps} steps, without a checkpoint."
        self.save(path)
        return f"The run ends after {n_steps} steps; continue it with fit(…, resume={str(path)!r})."

    # ------------------------------------------------------------------------------ the result

    def _ranking_now(self) -> Float[Tensor, " edge"]:
        """The edges' log alphas; with node masks, the log-odds that edge and source are open."""
        log_alpha = self.edges.log_alpha.detach()
        if self.sources is None:
            return log_alpha
        sources = open_probability(self.sources.log_alpha.detach())[self.source_of_edge]
        both_open = open_probability(log_alpha.double()) * sources.double()
        return torch.logit(both_open, eps=1e-12).float()

    def ranking(self) -> Float[Tensor, " edge"]:
        """The ranking of edges that the run ends with, on the CPU."""
        return self.final_ranking.after(len(self.history), self._ranking_now()).cpu()

    def result(self, finished: bool) -> PruneResult:
        """What the run has found by now."""
        pruner = self.pruner
        ranking = self.ranking()
        metadata = run_metadata(pruner, self.run, self.task)
        probability = torch.sigmoid(ranking)
        if self.sources is not None:
            sources = torch.sigmoid(self.sources.log_alpha.detach())[self.source_of_edge]
            probability = torch.sigmoid(self.edges.log_alpha.detach()) * sources
        constants = pruner.ablation if isinstance(pruner.ablation, Constants) else None
        if self.constants is not None:
            constants = self.constants.constants(metadata).detached()
        by_neuron, n_neurons = None, None
        if self.neurons is not None:
            by_neuron = self.neurons.log_alpha.detach().cpu().view(self.run.neuron_shape)
            n_neurons = self.neurons.final_size(torch.sigmoid(by_neuron))
        return PruneResult(
            graph=self.graph,
            log_alpha=ranking,
            history=self.history,
            n_edges=self.edges.final_size(probability),
            metadata=metadata,
            finished=finished,
            constants=constants,
            neuron_kind=pruner.neurons,
            neuron_log_alpha=by_neuron,
            n_neurons=n_neurons,
        )


def _learned_constants(
    pruner: PrunerSettings, run: MaskedModel, task: AnyTask
) -> LearnedConstants | None:
    if pruner.ablation != OPTIMAL:
        return None
    return LearnedConstants(run, sample(task).corrupted, pruner.optimizer.constants_lr)


def _make_optimizers(
    pruner: PrunerSettings, groups: Sequence[GateGroup]
) -> tuple[dict[str, torch.optim.Optimizer], dict[str, float]]:
    """The optimisers of log alphas and of multipliers, and their learning rates."""
    settings = pruner.optimizer
    common: dict[str, Any] = {"betas": settings.betas, "weight_decay": settings.weight_decay}
    rates = {"optimizer": pruner.lr, "multipliers": settings.controller_lr}
    log_alphas = [group.log_alpha for group in groups]
    multipliers = [m for group in groups for m in group.multipliers().values()]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "optimizer": torch.optim.AdamW(log_alphas, lr=rates["optimizer"], **common)
    }
    if multipliers:
        optimizers["multipliers"] = torch.optim.AdamW(
            multipliers, lr=rates["multipliers"], maximize=True, **common
        )
    return optimizers, rates
