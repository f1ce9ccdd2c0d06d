"""One run of an EdgePruner: the loop, its parameters, its optimisers, its state on disk."""

from __future__ import annotations

import copy
import json
import math
import time
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.ablation.constants import OPTIMAL, Constants
from tl_edgeprune.attribution.mask_gradient import gate_scores, path_scores
from tl_edgeprune.attribution.paths import mask_path
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.distributed import LostProcess, Ranks
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_indices import edge_ends
from tl_edgeprune.hooks.modules import is_folded
from tl_edgeprune.objectives import Objective
from tl_edgeprune.objectives import losses as losses_of
from tl_edgeprune.runs import checkpoint as checkpoints
from tl_edgeprune.runs.fingerprint import differences, digest, of_setting, of_task
from tl_edgeprune.runs.targets import Teacher
from tl_edgeprune.runs.task_checks import any_task_for
from tl_edgeprune.tasks.stream import AnyTask, sample
from tl_edgeprune.training.batch_stream import Feed
from tl_edgeprune.training.best_ranking import Candidates
from tl_edgeprune.training.controllers import ExactBudget
from tl_edgeprune.training.gate_group import LearnedNeurons
from tl_edgeprune.training.gates import first_log_alpha, open_probability, sample_gates, top_gates
from tl_edgeprune.training.learned_constants import LearnedConstants
from tl_edgeprune.training.result import History, _entry
from tl_edgeprune.training.settings import PrunerSettings
from tl_edgeprune.utils.reading import damaged, of_kind

WARM_STEPS, WARM_PAIRS = 5, 32
EPOCHS = 10_000_000  # epochs' seeds lie beyond those of steps


class Left(NamedTuple):
    """What a checkpoint holds of a run."""

    path: str | Path
    tensors: dict[str, Tensor]
    states: checkpoints.States
    note: dict[str, Any]


class Training:
    """One run of an EdgePruner: its parameters, its optimisers, its history."""

    def __init__(
        self,
        pruner: PrunerSettings,
        run: MaskedModel,
        task: AnyTask,
        loss_of: Objective,
        weights: str | None = None,
        resume: str | Path | None = None,
    ) -> None:
        """weights: what tells the model's own from another's in checkpoints. resume: the checkpoint
        to go on from; None for the pruner's own, where that is there. They are looked at before any
        run of the model.
        """
        self.weights = weights
        self.ranks = Ranks.current()
        self.pruner, self.run = pruner, run
        self.progress = pruner.progress and self.ranks.first
        self.loss_of = loss_of
        self.graph, self.task = run.graph, any_task_for(task, run.graph)
        left = self._left(resume)
        self.started = time.monotonic()
        self.history: History = []
        self.seconds_before = 0.0
        self.between_steps = True
        self.constants = None
        if pruner.ablation == OPTIMAL:
            self.constants = LearnedConstants(
                run, sample(task).corrupted, pruner.optimizer.constants_lr
            )
        self.teacher = Teacher(
            run,
            task,
            pruner.ablation if self.constants is None else self.constants.constants().detached(),
            batch_size=pruner.batch_size,
            progress=self.progress,
            visits=pruner.steps * pruner.accumulate * self.ranks.most_rows(pruner.batch_size),
        )
        self.device = self.teacher.device
        self.controller = copy.deepcopy(pruner.controller)
        self.controller.start(self.graph.n_edges, pruner.n_edges)
        self.node_controller = copy.deepcopy(pruner.node_controller)
        if self.node_controller is not None:
            self.node_controller.start(self.graph.n_sources, None)
        first = self._first_log_alpha() if left is None else torch.zeros(self.graph.n_edges)
        self.log_alpha = first.to(self.device).requires_grad_()
        self.gates = self.log_alpha.detach()  # log alphas that the last mask was drawn from
        self.node_log_alpha = self._node_log_alpha()
        self.neurons = self._learned_neurons(begun=left is not None)
        self.source_of_edge = edge_ends(self.graph, self.device)[0]
        self.average = torch.zeros_like(self.log_alpha, requires_grad=False)
        self.candidates = self._candidates()
        self.optimizer, self.multipliers = self._optimizers()
        self.feed = Feed(
            self.task, pruner.batch_size, lambda epoch: _mixed(pruner.seed, EPOCHS + epoch)
        )
        self.place = self.feed.place
        if left is not None:
            self.go_on(left)

    # -------------------------------------------------------------------------------- the loop

    def train(self) -> bool:
        """Run the steps that are left; False if Ctrl-C ended them early."""
        first = len(self.history)
        bar = tqdm(
            total=self.pruner.steps, initial=first, desc="pruning", disable=not self.progress
        )
        try:
            for step in range(first, self.pruner.steps):
                self._step(step)
                self._show(bar)
                if self.pruner.checkpoint and (step + 1) % self.pruner.checkpoint_every == 0:
                    self.save(self.pruner.checkpoint)
            finished = True
        except KeyboardInterrupt:
            finished = False
        except LostProcess as error:
            raise LostProcess(f"{error} {self._left_behind()}") from error
        finally:
            bar.close()
        if self.pruner.checkpoint and self.history:
            self.save(self.pruner.checkpoint)
        return finished

    def _step(self, step: int) -> None:
        progress = step / self.pruner.steps
        generator = torch.Generator().manual_seed(_mixed(self.pruner.seed, step))
        target = self.controller.target(progress, float(torch.rand((), generator=generator)))
        neurons = None if self.neurons is None else self.neurons.target(progress, generator)
        self._set_rates(step)
        self._zero_grad()
        losses = []
        for _ in range(self.pruner.accumulate):
            batch = next(self.feed)
            rows, share = self.ranks.rows(len(batch))
            lesson = self.teacher.lesson(batch.select(rows))
            mask, penalty = self._draw(target, progress, generator)
            gates = None
            if self.neurons is not None and neurons is not None:
                gates, price = self.neurons.draw(neurons, progress, generator)
                penalty = penalty + price
            reference = lesson.reference if self.constants is None else self.constants.reference()
            batch = lesson.batch
            logits = self.run(
                batch.clean, mask, reference, batch.positions, spans=batch.spans, neurons=gates
            )
            loss = losses_of(self.loss_of, logits, lesson.full, lesson.batch).mean() * share
            ((loss + penalty / self.ranks.size) / self.pruner.accumulate).backward()
            losses.append(float(loss.detach()))
        mean = self.ranks.add_up(self._learned(), sum(losses) / len(losses))
        self._check_loss(mean, step)
        self.between_steps = False
        self._update()
        if self.constants is not None:
            self.constants.step(self.pruner.optimizer.rate(step, self.pruner.steps))
        self.ranks.hand_out(self._learned())
        self._take_in(step)
        self._note(step, mean, target, neurons)
        self.place = self.feed.place
        self.between_steps = True

    def _draw(
        self, target: float, progress: float, generator: torch.Generator
    ) -> tuple[Float[Tensor, " edge"], Tensor | float]:
        """A mask for one forward, and what the loss gains for it."""
        shifted = self.controller.gates(self.log_alpha, target)
        self.gates = shifted.detach()
        mask = self.pruner.sampler(shifted, generator)
        penalty = self.controller.penalty(mask, shifted, target)
        if self.pruner.attachment is not None:
            penalty = penalty + self.pruner.attachment(open_probability(shifted), self.graph)
        if progress >= 1 - self.pruner.hard_share:  # nodes rest, which no longer reach the loss
            return top_gates(shifted, self._ranking_now(), self._hard_size(target)), penalty
        if self.node_log_alpha is not None:
            nodes = sample_gates(self.node_log_alpha, generator)
            mask = mask * nodes[self.source_of_edge]
            if self.node_controller is not None:
                wanted = self.node_controller.target(progress, 0.0)
                penalty = penalty + self.node_controller.penalty(nodes, self.node_log_alpha, wanted)
        return mask, penalty

    def _hard_size(self, target: float) -> int:
        """Edges of a hard mask: the step's budget; the circuit's size where there is none."""
        if isinstance(self.controller, ExactBudget) or self.pruner.n_edges is None:
            return max(1, round(target))
        return self.pruner.n_edges

    def _update(self) -> None:
        settings = self.pruner.optimizer
        if settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters(), settings.clip)
        self.optimizer.step()
        if self.multipliers is not None:
            self.multipliers.step()

    def _parameters(self) -> list[Tensor]:
        """What the masks are made of, and the multipliers."""
        optimizers = [o for o in (self.optimizer, self.multipliers) if o is not None]
        return [p for o in optimizers for group in o.param_groups for p in group["params"]]

    def _learned(self) -> list[Tensor]:
        """Everything that a step changes."""
        return self._parameters() + ([] if self.constants is None else self.constants.moves)

    # -------------------------------------------------------------------------------- starting

    def meet(self) -> None:
        """With other processes: see that all do the same run, from the same masks."""
        done = digest([self.identity, len(self.history)])
        self.ranks.check_same(done, self.device)
        self.ranks.hand_out(self._learned())

    def _first_log_alpha(self) -> Float[Tensor, " edge"]:
        generator = torch.Generator().manual_seed(_mixed(self.pruner.seed, -1))
        spread, count = self.pruner.init_log_alpha, self.graph.n_edges
        if self.pruner.init_scores is None:
            return first_log_alpha(spread, count, None, generator)
        scores = self._warm_scores()
        if scores.shape != (self.graph.n_edges,):
            raise ValueError(
                f"init_scores has shape {tuple(scores.shape)}, expected ({self.graph.n_edges},)."
            )
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("init_scores holds NaN or infinite values.")
        return first_log_alpha(spread, count, scores, generator)

    def _warm_scores(self) -> Float[Tensor, " edge"]:
        """What the first log alphas are ranked by."""
        scores = self.pruner.init_scores
        if isinstance(scores, EdgeScores):
            if scores.graph != self.graph:
                raise ValueError(
                    f"init_scores are of another graph: {scores.graph}, this run's is {self.graph}."
                )
            return scores.ranking().float()
        if isinstance(scores, Tensor):
            return scores.detach().cpu().float().abs()
        return path_scores(
            self.run,
            self.teacher,
            mask_path(WARM_STEPS),
            self.loss_of,
            batch_size=self.pruner.batch_size,
            max_pairs=WARM_PAIRS,
            progress=self.progress,
        ).abs()

    def _node_log_alpha(self) -> Float[Tensor, " source"] | None:
        if not self.pruner.node_masks:
            return None
        mean, std = (10.0, 0.01) if self.pruner.init_scores is None else (2.0, 0.01)
        generator = torch.Generator().manual_seed(_mixed(self.pruner.seed, -2))
        start = mean + std * torch.randn(self.graph.n_sources, generator=generator)
        return start.to(self.device).requires_grad_()

    def _learned_neurons(self, *, begun: bool) -> LearnedNeurons | None:
        if self.pruner.neurons is None:
            return None
        scores = None
        if self.pruner.init_scores is not None and not begun:
            scores = gate_scores(
                self.run,
                self.teacher,
                self.loss_of,
                steps=WARM_STEPS,
                batch_size=self.pruner.batch_size,
                max_pairs=WARM_PAIRS,
                progress=self.progress,
            )
        generator = torch.Generator().manual_seed(_mixed(self.pruner.seed, -3))
        return LearnedNeurons(self.pruner, self.run, scores, generator)

    def _optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer | None]:
        settings = self.pruner.optimizer
        common: dict[str, Any] = {"betas": settings.betas, "weight_decay": settings.weight_decay}
        learned = list(self._log_alphas().values())
        optimizer = torch.optim.AdamW(learned, lr=self.pruner.lr, **common)
        multipliers = list(self._multipliers().values())
        if not multipliers:
            return optimizer, None
        ascent = torch.optim.AdamW(multipliers, lr=settings.controller_lr, maximize=True, **common)
        return optimizer, ascent

    def _state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds, but for optimisers' and constants'."""
        judged = {} if self.candidates is None else self.candidates.state()
        return {"average": self.average, **judged, **self._log_alphas(), **self._multipliers()}

    def _log_alphas(self) -> dict[str, Tensor]:
        learned = {"log_alpha": self.log_alpha}
        if self.node_log_alpha is not None:
            learned["node_log_alpha"] = self.node_log_alpha
        if self.neurons is not None:
            learned["neuron_log_alpha"] = self.neurons.log_alpha
        return learned

    def _multipliers(self) -> dict[str, Tensor]:
        learned = dict(self.controller.learned())
        if self.node_controller is not None:
            learned |= {f"node_{k}": v for k, v in self.node_controller.learned().items()}
        if self.neurons is not None:
            learned |= {f"neuron_{k}": v for k, v in self.neurons.controller.learned().items()}
        return learned

    def _candidates(self) -> Candidates | None:
        """Where one circuit is looked for, and all that it needs is its ranking."""
        size, alone = self.pruner.n_edges, self.constants is None and self.neurons is None
        if size is None or not self.pruner.candidates or not alone:
            return None
        return Candidates(
            self.run, self.teacher, self.loss_of, size, self.pruner.batch_size, self.ranks
        )

    # ------------------------------------------------------------------------------- finishing

    def ranking(self) -> Float[Tensor, " edge"]:
        """log alpha of every edge, the mean over the run's last part, of the best step that was
        judged; with node masks, that of edge and node being open together.
        """
        best = None if self.candidates is None else self.candidates.found()
        return (self._ranking_after(len(self.history)) if best is None else best).cpu()

    def _ranking_after(self, done: int) -> Float[Tensor, " edge"]:
        """What the run would give if it ended now, after so many steps."""
        return self.average if self._n_averaged(done) > 0 else self._ranking_now()

    def _ranking_now(self) -> Float[Tensor, " edge"]:
        log_alpha = self.log_alpha.detach()
        if self.node_log_alpha is None:
            return log_alpha
        nodes = open_probability(self.node_log_alpha.detach())[self.source_of_edge]
        both = open_probability(log_alpha.double()) * nodes.double()
        return torch.logit(both, eps=1e-12).float()

    def _take_in(self, step: int) -> None:
        """This step's ranking into the mean, and before the judges."""
        n = self._n_averaged(step + 1)
        if n > 0:
            self.average += (self._ranking_now() - self.average) / n
        pruner = self.pruner
        if self.candidates is not None and self.candidates.due(
            step, pruner.steps, pruner.candidates
        ):
            self.candidates.take_in(self._ranking_after(step + 1))

    def _n_averaged(self, done: int) -> int:
        """How many steps the mean is of, after so many steps."""
        before = self.pruner.steps - round(self.pruner.average_share * self.pruner.steps)
        return done - before

    def final_size(self) -> int | None:
        """Edges of the circuit: as asked, or as many as a Lagrangian run expects to keep."""
        if self.pruner.n_edges is not None or isinstance(self.controller, ExactBudget):
            return self.pruner.n_edges
        if self.node_log_alpha is None:
            return max(1, round(float(torch.sigmoid(self.ranking()).sum())))
        edges, nodes = (torch.sigmoid(a.detach()) for a in (self.log_alpha, self.node_log_alpha))
        return max(1, round(float((edges * nodes[self.source_of_edge]).sum())))

    def final_constants(self) -> Constants | None:
        """What removed edges carry, where it is constants."""
        if self.constants is None:
            return self.pruner.ablation if isinstance(self.pruner.ablation, Constants) else None
        return self.constants.constants(self.metadata()).detached()

    def metadata(self) -> dict[str, Any]:
        cfg = self.run.model.cfg
        return {
            "method": "edge-pruning",
            "model": getattr(cfg, "model_name", type(self.run.model).__name__),
            "task": self.task.name,
            "n_pairs": len(self.task),
            "prepend_bos": self.task.prepend_bos,
            "seed": self.pruner.seed,
            "ablation": str(self.pruner.ablation),
            "folded": is_folded(self.run.model),
            "d_model": int(cfg.d_model),
            "settings": self.pruner.settings(),
        }

    def save(self, path: str | Path) -> None:
        """Write the state of the last whole step; in the middle of an update (Ctrl-C, a lost
        process), the last checkpoint stays as it is.
        """
        if not (self.ranks.first and self.between_steps):
            return
        tensors = self._state()
        optimizers = {"optimizer": self.optimizer, "multipliers": self.multipliers}
        if self.constants is not None:
            tensors |= self.constants.tensors()
            optimizers["constants"] = self.constants.optimizer
        seconds = self.seconds_before + time.monotonic() - self.started
        note = {"history": self.history, "seconds": seconds, "place": self.place}
        note |= {"weights": self.weights, **self.identity}
        checkpoints.save(path, tensors, optimizers, note)

    def _left_behind(self) -> str:
        """Save what there is, and say how the run goes on."""
        path, step = self.pruner.checkpoint, len(self.history)
        if not path or not step:
            return f"The run ends after {step} steps, without a checkpoint."
        self.save(path)
        return f"The run ends after {step} steps; it goes on by fit(…, resume={str(path)!r})."

    def _left(self, resume: str | Path | None) -> Left | None:
        """What there is to go on from. A file that this run would write over must be of it too."""
        own, given = self.pruner.checkpoint, None if resume is None else self.left_by(resume)
        if own is None or not Path(own).exists():
            return given
        left = self.left_by(own)
        return left if given is None else given

    def left_by(self, path: str | Path) -> Left:
        """What a checkpoint holds. Raises FileNotFoundError, and ValueError for a damaged one and
        one of another run.
        """
        left = Left(path, *checkpoints.load(path))
        note = left.note
        if "about" in note:
            raise ValueError(f"checkpoint {path} is of a search, not of EdgePruner.")
        expected = self.identity
        if None not in (self.weights, note.get("weights")):  # else no process had all of them
            expected = expected | {"weights": self.weights}
        different = differences(note, expected)
        if different:
            told = "; its ".join(
                f"{name} is {theirs!s:.100}, this run's {own!s:.100}"
                for name, (theirs, own) in different.items()
            )
            raise ValueError(
                f"checkpoint {path} is of another run: its {told}. Give another file, or remove "
                "this one to start anew."
            )
        return left

    def go_on(self, left: Left) -> None:
        """Go on from a checkpoint. Raises ValueError for a damaged one."""
        with damaged(left.path, "Start the run anew."):
            self._restore(left.tensors, left.states, left.note)

    def _restore(
        self, tensors: dict[str, Tensor], states: checkpoints.States, note: dict[str, Any]
    ) -> None:
        self.history = [
            _entry(*each) for each in enumerate(of_kind(note["history"], list, "history"))
        ]
        self.seconds_before = of_kind(note["seconds"], float, "seconds")
        for name, tensor in self._state().items():
            checkpoints.restore(tensor, tensors, name)
        checkpoints.load_optimizer(self.optimizer, states["optimizer"])
        if self.multipliers is not None:
            checkpoints.load_optimizer(self.multipliers, states["multipliers"])
        if self.constants is not None:
            self.constants.restore(tensors, states["constants"])
        epoch, chunk, done = (
            of_kind(n, int, "place") for n in of_kind(note["place"], list, "place")
        )
        if min(epoch, chunk, done) < 0 or max(epoch, chunk, done) > 2**53:
            raise ValueError(f"place is {note['place']}")
        self.place = (epoch, chunk, done)
        self.feed.go_to(self.place)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that it resumes have in common."""
        return {
            "settings": json.loads(json.dumps(self.pruner.settings())),
            "functions": [of_setting(self.pruner.objective), of_setting(self.pruner.sampler)],
            "graph": self.graph.to_dict(),
            "task": of_task(self.task),
        }

    # --------------------------------------------------------------------------------- details

    def _set_rates(self, step: int) -> None:
        settings, pruner = self.pruner.optimizer, self.pruner
        factor = settings.rate(step, pruner.steps)
        for optimizer, lr in (
            (self.optimizer, pruner.lr),
            (self.multipliers, settings.controller_lr),
        ):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = lr * factor

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad()
        if self.multipliers is not None:
            self.multipliers.zero_grad()

    def _check_loss(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the objective is {loss} at step {step}: the model gives NaN or "
                "infinite logits under masks. Try float32, or a lower learning rate."
            )

    def _note(self, step: int, loss: float, target: float, neurons: float | None) -> None:
        of_gates = getattr(self.controller, "probability", open_probability)
        edges = float(of_gates(self.gates).sum())
        seconds = self.seconds_before + time.monotonic() - self.started
        entry = {"step": step, "loss": loss, "edges": edges, "target": target, "seconds": seconds}
        if self.neurons is not None and neurons is not None:
            entry |= {"neurons": self.neurons.expected(neurons), "neuron_target": neurons}
        self.history.append(entry)

    def _show(self, bar: Any) -> None:
        last = self.history[-1]
        recent = [entry["loss"] for entry in self.history[-10:]]
        bar.set_postfix_str(
            f"{self.loss_of.__name__ if hasattr(self.loss_of, '__name__') else 'loss'} "
            f"{sum(recent) / len(recent):.3f}, {last['edges']:,.0f} edges, target "
            f"{last['target']:,.0f}"
        )
        bar.update()


def _mixed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step * 7_919 + 12_345) % 2**63
