"""Edge Pruning: find a circuit by training a mask on every edge.

1. Every edge has a hard-concrete gate (masks.py). A step draws the gates, runs the masked model on
   a batch of pairs and lowers the objective, by default the KL to the full model's output.
2. A controller makes the gates sparse: `ExactBudget` holds the expected number of open gates at a
   budget that falls from 30 % of all edges to the size asked for; `Lagrangian` is the paper's.
3. In the last part of the run the forward pass keeps exactly the top edges, as the final circuit
   will, while the gradient is that of the soft gates.
4. The circuit is the edges of highest log alpha.

`EdgePruner()` has our settings, `EdgePruner.paper()` those of the published code.
Bhaskar, Wettig, Friedman and Chen 2024, "Finding Transformer Circuits with Edge Pruning".
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune import checkpoints
from tl_edgeprune.circuit import Circuit, check_budget
from tl_edgeprune.constants import OPTIMAL, Ablation, Constants
from tl_edgeprune.distributed import LostProcess, Ranks
from tl_edgeprune.ends import edge_ends
from tl_edgeprune.feed import Feed
from tl_edgeprune.graph import EdgeGraph
from tl_edgeprune.hooks import find_sites, is_folded
from tl_edgeprune.learned_constants import LearnedConstants
from tl_edgeprune.masked import MaskedModel, check_ablation
from tl_edgeprune.masks import (
    Controller,
    ExactBudget,
    Lagrangian,
    open_probability,
    sample_gates,
)
from tl_edgeprune.methods.gradients import path_scores
from tl_edgeprune.methods.mask_ig import mask_path
from tl_edgeprune.objectives import Objective, find_objective
from tl_edgeprune.placement import placed
from tl_edgeprune.recompute import RecomputedModel
from tl_edgeprune.regularisers import Attachment
from tl_edgeprune.scores import EdgeScores
from tl_edgeprune.tasks.stream import AnyTask, checked, identity, sample
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.teacher import Teacher, check_vocabulary

Sampler = Callable[[Tensor, torch.Generator], Tensor]
History = list[dict[str, float | int]]
WARM_STEPS, WARM_PAIRS = 5, 32
EPOCHS = 10_000_000  # epochs' seeds lie beyond those of steps


@dataclass(frozen=True)
class Optimizer:
    """How log alphas are learned. `warmup` steps of rising rate; `decay` to 0 linearly after.

    `controller_lr`: of a Lagrangian's multipliers. `constants_lr`: of the constants of
    ablation="optimal", in units of their sources' root mean square.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float | None = None
    warmup: int = 0
    decay: bool = False
    controller_lr: float = 0.3
    constants_lr: float = 0.05

    def rate(self, step: int, steps: int) -> float:
        """The factor on the learning rate at this step."""
        if step < self.warmup:
            return step / max(1, self.warmup)
        if self.decay:
            return max(0.0, (steps - step) / max(1, steps - self.warmup))
        return 1.0


@dataclass(frozen=True, repr=False)
class PruneResult:
    """What a run found. `log_alpha` ranks every edge; `circuit` has the size asked for.

    `constants`: what removed edges carried, under ablation="optimal" or Constants: the `ablation`
    to evaluate the circuit with.
    """

    graph: EdgeGraph
    log_alpha: Float[Tensor, " edge"]
    history: History
    n_edges: int | None
    metadata: dict[str, Any]
    finished: bool = True
    constants: Constants | None = None

    @property
    def circuit(self) -> Circuit:
        """The top edges by log alpha, exactly as many as asked for."""
        if self.n_edges is None:
            raise ValueError("this run was for no one size (n_edges=None): use result.top(k).")
        return self.top(self.n_edges)

    @property
    def scores(self) -> EdgeScores:
        """log alpha as edge scores, ranked as they are (`top` takes no magnitudes)."""
        return EdgeScores(self.graph, self.log_alpha, dict(self.metadata), by_magnitude=False)

    def top(self, k: int) -> Circuit:
        """The k edges of highest log alpha."""
        return Circuit.top(self.graph, self.log_alpha, k, **self.metadata)

    def __repr__(self) -> str:
        steps = len(self.history)
        size = f"{self.n_edges:,} edges" if self.n_edges else "any size"
        early = "" if self.finished else ", stopped early"
        return f"PruneResult({size} of {self.graph.n_edges:,}, {steps} steps{early})"


class EdgePruner:
    """Finds a circuit of exactly `n_edges` edges in a model, for a task.

    Args:
        n_edges: edges to keep; None (with a sampled budget) for a ranking of all edges.
        steps, lr, batch_size: of the training; a step sees `batch_size * accumulate` pairs.
        ablation: "counterfactual", "zero", "mean" or "mean-positional" (means over the task's
            corrupted prompts), Constants (optimal ablation), or "optimal": constants learned
            together with the masks, from the means on, which come back as `result.constants`.
        objective: a name of `objectives.OBJECTIVES`, a function, or None for the task's own.
        controller: ExactBudget() by default, or Lagrangian().
        init_scores: where log alphas start: "mask-ig" (five gradients, the default), EdgeScores
            (ranked as their `top` does) or a tensor [n_edges] (by magnitude), or None for all alike
            at `init_log_alpha`.
        node_masks: also learn a mask for each source, which multiplies its edges; node_controller
            makes those sparse.
        sampler: draws a mask from log alphas; hard-concrete gates.
        attachment: a price on edges between badly connected nodes (regularisers.py).
        hard_share: the last part of the run whose forward pass keeps exactly the top edges; None
            for 0.4, or for 0 without n_edges.
        split_qkv, split_embeddings: of the graph.
        bias_in_heads: under zero ablation, remove each head's share of the output bias with it.
        recompute: run blocks again in backward, from the buffer of differences alone: memory is
            then two buffers and one half block, whatever the depth (recompute.py).
        dtype, device: the run's; None for the model's own (the weights are put back after it).
        seed: same seed, same machine, same bits.
        checkpoint: a file to write the run's state to every `checkpoint_every` steps, atomically.
        progress: show a progress bar.

    Raises ValueError for settings that cannot work, before any run.
    """

    def __init__(
        self,
        n_edges: int | None = None,
        *,
        steps: int = 200,
        lr: float = 0.3,
        batch_size: int = 8,
        accumulate: int = 1,
        ablation: Ablation = "counterfactual",
        objective: str | Objective | None = None,
        controller: Controller | None = None,
        init_scores: str | EdgeScores | Tensor | None = "mask-ig",
        init_log_alpha: tuple[float, float] = (0.0, 1.0),
        node_masks: bool = False,
        node_controller: Controller | None = None,
        optimizer: Optimizer | None = None,
        sampler: Sampler = sample_gates,
        attachment: Attachment | None = None,
        hard_share: float | None = None,
        split_qkv: bool = True,
        split_embeddings: bool = False,
        bias_in_heads: bool = False,
        recompute: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 25,
        progress: bool = True,
    ) -> None:
        self.n_edges = n_edges
        self.steps, self.lr = steps, lr
        self.batch_size, self.accumulate = batch_size, accumulate
        self.ablation, self.objective = ablation, objective
        schedule = "annealed" if n_edges is not None else "sampled"
        self.controller = controller or ExactBudget(schedule)  # type: ignore[arg-type]
        self.init_scores, self.init_log_alpha = init_scores, init_log_alpha
        self.node_masks, self.node_controller = node_masks, node_controller
        self.optimizer = optimizer or Optimizer()
        self.sampler, self.attachment = sampler, attachment
        if hard_share is None:
            hard_share = 0.0 if n_edges is None else 0.4
        self.hard_share = hard_share
        self.split_qkv, self.split_embeddings = split_qkv, split_embeddings
        self.bias_in_heads, self.recompute = bias_in_heads, recompute
        self.dtype, self.device = dtype, device
        self.seed, self.checkpoint, self.checkpoint_every = seed, checkpoint, checkpoint_every
        self.progress = progress
        self._check()

    @classmethod
    def paper(cls, n_edges: int | None = None, **changes: Any) -> EdgePruner:
        """The published method and hyperparameters (GPT-2, IOI), for comparison.

        AdamW with its default weight decay (0.01) and gradients clipped at 1, as the published code
        runs; learning rate 0.8 for log alphas and multipliers, risen over 200 steps and decayed
        linearly; log alpha from N(10, 0.01); 3,000 steps of 32 pairs; sparsity target warmed up
        over 2,500 steps; node masks drawn but not penalised; two embedding sources; b_O shared out
        over the heads. Its padding to 64 tokens is left out: batches hold one length. `changes`
        override single settings.
        """
        settings: dict[str, Any] = {
            "steps": 3000,
            "lr": 0.8,
            "batch_size": 32,
            "controller": Lagrangian(warmup=2500 / 3000),
            "init_scores": None,
            "init_log_alpha": (10.0, 0.01),
            "node_masks": True,
            "optimizer": Optimizer(
                (0.9, 0.999), 0.01, 1.0, warmup=200, decay=True, controller_lr=0.8
            ),
            "hard_share": 0.0,
            "split_embeddings": True,
            "bias_in_heads": True,
        }
        return cls(n_edges, **(settings | changes))

    # --------------------------------------------------------------------------------------- fit

    def fit(self, model: Any, task: AnyTask, *, resume: str | Path | None = None) -> PruneResult:
        """Train the masks on the pairs of a Task or a TaskStream.

        Ctrl-C ends the run with what it has found so far (`finished` is then False). `resume`
        continues from a checkpoint, to the same bits (on a CPU) as a run that was never stopped;
        its settings, task and graph must be those of the checkpoint (ValueError).

        Inside a process group (distributed.py) the processes share out each batch's pairs, and all
        get the same result; LostProcess where one of them ends or hangs.
        """
        task = checked(task, self._check_pairs(int(model.cfg.d_vocab)))
        loss_of = find_objective(self.objective, sample(task))
        graph = EdgeGraph.from_model(
            model, split_qkv=self.split_qkv, split_embeddings=self._has_two_embeddings(model)
        )
        if self.n_edges is not None:
            check_budget(self.n_edges, graph)
        engine = RecomputedModel if self.recompute else MaskedModel
        with placed(model, self.dtype, self.device), engine.attach(model, graph) as run:
            fit = _Fit(self, run, task, loss_of)
            if resume is not None:
                fit.restore(resume)
            fit.meet()
            finished = fit.train()
        return PruneResult(
            graph,
            fit.ranking(),
            fit.history,
            fit.final_size(),
            fit.metadata(),
            finished,
            fit.final_constants(),
        )

    def scores(
        self, model: Any, task: AnyTask, method: str, *, resume: str | Path | None = None
    ) -> EdgeScores:
        """`fit`, as scores by that method's name.

        Those of a run that Ctrl-C ended early say so in their metadata ("finished": False). Raises
        ValueError for ablation="optimal", whose constants scores cannot hold.
        """
        check_ablation(self.ablation)
        result = self.fit(model, task, resume=resume)
        early = {} if result.finished else {"finished": False}
        scores = result.scores
        return replace(scores, metadata=scores.metadata | {"method": method} | early)

    def settings(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        skip = ("checkpoint", "checkpoint_every", "progress", "init_scores", "objective")
        values = {k: _plain(v) for k, v in vars(self).items() if k not in skip}
        values["init_scores"] = _plain_scores(self.init_scores)
        values["objective"] = _plain_objective(self.objective)
        return values

    def _check(self) -> None:
        if self.n_edges is not None and self.n_edges < 1:
            raise ValueError(f"n_edges={self.n_edges}: a circuit needs at least one edge.")
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more.")
        if self.ablation != OPTIMAL:
            check_ablation(self.ablation)
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: expected a number above 0.")
        if not 0 <= self.hard_share <= 1:
            raise ValueError(f"hard_share={self.hard_share}: expected a share from 0 to 1.")
        if isinstance(self.init_scores, str) and self.init_scores != "mask-ig":
            raise ValueError(
                f"init_scores={self.init_scores!r}: expected 'mask-ig', EdgeScores, a tensor or "
                "None."
            )
        if self.node_controller is not None and not self.node_masks:
            raise ValueError("node_controller needs node_masks=True.")

    def _check_pairs(self, vocab: int) -> Callable[[Task], None]:
        def check(pairs: Task) -> None:
            find_objective(self.objective, pairs)
            check_vocabulary(pairs, vocab)

        return check

    def _has_two_embeddings(self, model: Any) -> bool:
        # The published graph has two embedding sources where the model has two embeddings.
        return self.split_embeddings and find_sites(model).has_positions


class _Fit:
    """One run of an EdgePruner: its parameters, its optimisers, its history."""

    def __init__(
        self, pruner: EdgePruner, run: MaskedModel, task: AnyTask, loss_of: Objective
    ) -> None:
        self.ranks = Ranks.current()
        self.pruner, self.run = self.ranks.own(pruner), run
        self.task, self.loss_of = task, loss_of
        self.graph = run.graph
        self.started = time.monotonic()
        self.history: History = []
        self.seconds_before = 0.0
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
            bias_in_heads=pruner.bias_in_heads,
            progress=self.pruner.progress,
            visits=pruner.steps * pruner.accumulate * self.ranks.most(pruner.batch_size),
        )
        self.device = self.teacher.device
        self.controller = copy.deepcopy(pruner.controller)
        self.controller.start(self.graph.n_edges, pruner.n_edges)
        self.node_controller = copy.deepcopy(pruner.node_controller)
        if self.node_controller is not None:
            self.node_controller.start(self.graph.n_sources, None)
        self.log_alpha = self._first_log_alpha().to(self.device).requires_grad_()
        self.node_log_alpha = self._node_log_alpha()
        self.source_of_edge = edge_ends(self.graph, self.device)[0]
        self.optimizer, self.multipliers = self._optimizers()
        self.feed = Feed(task, pruner.batch_size, lambda epoch: _mixed(pruner.seed, EPOCHS + epoch))
        self.place = self.feed.place

    # -------------------------------------------------------------------------------- the loop

    def train(self) -> bool:
        """Run the steps that are left; False if Ctrl-C ended them early."""
        first = len(self.history)
        bar = tqdm(
            total=self.pruner.steps, initial=first, desc="pruning", disable=not self.pruner.progress
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
        self._set_rates(step)
        self._zero_grad()
        losses = []
        for _ in range(self.pruner.accumulate):
            batch, share = self.ranks.part(next(self.feed))
            lesson = self.teacher.lesson(batch)
            mask, penalty = self._draw(target, progress, generator)
            reference = lesson.reference if self.constants is None else self.constants.reference()
            logits = self.run(lesson.batch.clean, mask, reference, lesson.batch.positions)
            loss = self.loss_of(logits, lesson.full, lesson.batch).mean() * share
            ((loss + penalty / self.ranks.size) / self.pruner.accumulate).backward()
            losses.append(float(loss.detach()))
        mean = self.ranks.add_up(self._learned(), sum(losses) / len(losses))
        self._check_loss(mean, step)
        self._update()
        if self.constants is not None:
            self.constants.step(self.pruner.optimizer.rate(step, self.pruner.steps))
        self.ranks.hand_out(self._learned())
        self._note(step, mean, target)
        self.place = self.feed.place

    def _draw(
        self, target: float, progress: float, generator: torch.Generator
    ) -> tuple[Float[Tensor, " edge"], Tensor | float]:
        """A mask for one forward, and what the loss gains for it."""
        shifted = self.controller.gates(self.log_alpha, target)
        mask = self.pruner.sampler(shifted, generator)
        penalty = self.controller.penalty(mask, shifted, target)
        if self.pruner.attachment is not None:
            penalty = penalty + self.pruner.attachment(open_probability(shifted), self.graph)
        if self.node_log_alpha is not None:
            nodes = sample_gates(self.node_log_alpha, generator)
            mask = mask * nodes[self.source_of_edge]
            if self.node_controller is not None:
                wanted = self.node_controller.target(progress, 0.0)
                penalty = penalty + self.node_controller.penalty(nodes, self.node_log_alpha, wanted)
        if progress >= 1 - self.pruner.hard_share:
            mask = self._hard(shifted, max(1, round(target)))  # a Lagrangian may aim below 0
        return mask, penalty

    def _hard(self, shifted: Tensor, budget: int) -> Tensor:
        """Exactly the budget's top edges forward, the soft gates' gradient backward."""
        soft = open_probability(shifted)
        top = torch.zeros_like(soft)
        top[self.ranking().to(self.device).topk(budget).indices] = 1.0
        return top + soft - soft.detach()

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
        done = checkpoints.digest([self.identity, len(self.history)])
        self.ranks.check_same(done, self.device)
        self.ranks.hand_out(self._learned())

    def _first_log_alpha(self) -> Float[Tensor, " edge"]:
        mean, std = self.pruner.init_log_alpha
        generator = torch.Generator().manual_seed(_mixed(self.pruner.seed, -1))
        noise = torch.randn(self.graph.n_edges, generator=generator)
        if self.pruner.init_scores is None:
            return mean + std * noise
        scores = self._warm_scores()
        if scores.shape != (self.graph.n_edges,):
            raise ValueError(
                f"init_scores has shape {tuple(scores.shape)}, expected ({self.graph.n_edges},)."
            )
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("init_scores holds NaN or infinite values.")
        return mean + std * rank_quantiles(scores)

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
            progress=self.pruner.progress,
        ).abs()

    def _node_log_alpha(self) -> Float[Tensor, " source"] | None:
        if not self.pruner.node_masks:
            return None
        mean, std = (10.0, 0.01) if self.pruner.init_scores is None else (2.0, 0.01)
        generator = torch.Generator().manual_seed(_mixed(self.pruner.seed, -2))
        start = mean + std * torch.randn(self.graph.n_sources, generator=generator)
        return start.to(self.device).requires_grad_()

    def _optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer | None]:
        settings = self.pruner.optimizer
        common: dict[str, Any] = {"betas": settings.betas, "weight_decay": settings.weight_decay}
        learned = [self.log_alpha] + ([] if self.node_log_alpha is None else [self.node_log_alpha])
        optimizer = torch.optim.AdamW(learned, lr=self.pruner.lr, **common)
        multipliers = list(self._multipliers().values())
        if not multipliers:
            return optimizer, None
        ascent = torch.optim.AdamW(multipliers, lr=settings.controller_lr, maximize=True, **common)
        return optimizer, ascent

    def _multipliers(self) -> dict[str, Tensor]:
        learned = dict(self.controller.learned())
        if self.node_controller is not None:
            learned |= {f"node_{k}": v for k, v in self.node_controller.learned().items()}
        return learned

    # ------------------------------------------------------------------------------- finishing

    def ranking(self) -> Float[Tensor, " edge"]:
        """log alpha of every edge; with node masks, that of edge and node being open together."""
        log_alpha = self.log_alpha.detach()
        if self.node_log_alpha is None:
            return log_alpha.cpu()
        nodes = open_probability(self.node_log_alpha.detach())[self.source_of_edge]
        both = open_probability(log_alpha.double()) * nodes.double()
        return torch.logit(both, eps=1e-12).float().cpu()

    def final_size(self) -> int | None:
        """Edges of the circuit: as asked, or as many as a Lagrangian run expects to keep."""
        if self.pruner.n_edges is not None or isinstance(self.controller, ExactBudget):
            return self.pruner.n_edges
        return max(1, round(float(torch.sigmoid(self.ranking()).sum())))

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
        if not self.ranks.first:
            return
        tensors = {"log_alpha": self.log_alpha.detach(), **self._multipliers()}
        if self.node_log_alpha is not None:
            tensors["node_log_alpha"] = self.node_log_alpha.detach()
        optimizers = {"optimizer": self.optimizer, "multipliers": self.multipliers}
        if self.constants is not None:
            tensors |= self.constants.tensors()
            optimizers["constants"] = self.constants.optimizer
        seconds = self.seconds_before + time.monotonic() - self.started
        note = {"history": self.history, "seconds": seconds, "place": self.place, **self.identity}
        checkpoints.save(path, tensors, optimizers, note)

    def _left_behind(self) -> str:
        """Save what there is, and say how the run goes on."""
        path, step = self.pruner.checkpoint, len(self.history)
        if not path or not step:
            return f"The run ends after {step} steps, without a checkpoint."
        self.save(path)
        return f"The run ends after {step} steps; it goes on by fit(…, resume={str(path)!r})."

    def restore(self, path: str | Path) -> None:
        tensors, states, note = checkpoints.load(path)
        for key, value in self.identity.items():
            if note[key] != value:
                raise ValueError(
                    f"checkpoint {path} is of another run: its {key} is {note[key]}, this run's "
                    f"{value}."
                )
        self.history, self.seconds_before = note["history"], note["seconds"]
        mine = {"log_alpha": self.log_alpha, **self._multipliers()}
        if self.node_log_alpha is not None:
            mine["node_log_alpha"] = self.node_log_alpha
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(tensors[name])
        checkpoints.load_optimizer(self.optimizer, states["optimizer"])
        if self.multipliers is not None:
            checkpoints.load_optimizer(self.multipliers, states["multipliers"])
        if self.constants is not None:
            self.constants.restore(tensors, states["constants"])
        self.place = tuple(note["place"])
        self.feed.go_to(self.place)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that it resumes have in common."""
        return {
            "settings": json.loads(json.dumps(self.pruner.settings())),
            "graph": self.graph.to_dict(),
            "task": checkpoints.digest(identity(self.task)),
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

    def _note(self, step: int, loss: float, target: float) -> None:
        with torch.no_grad():
            gates = self.controller.gates(self.log_alpha.detach(), target)
            edges = float(open_probability(gates).sum())
        seconds = self.seconds_before + time.monotonic() - self.started
        self.history.append(
            {"step": step, "loss": loss, "edges": edges, "target": target, "seconds": seconds}
        )

    def _show(self, bar: Any) -> None:
        last = self.history[-1]
        recent = [entry["loss"] for entry in self.history[-10:]]
        bar.set_postfix_str(
            f"{self.loss_of.__name__ if hasattr(self.loss_of, '__name__') else 'loss'} "
            f"{sum(recent) / len(recent):.3f}, {last['edges']:,.0f} edges, target "
            f"{last['target']:,.0f}"
        )
        bar.update()


def rank_quantiles(scores: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """Standard normal quantiles by rank: the scale of scores differs from method to method."""
    order = torch.argsort(scores.double(), stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    return torch.special.ndtri((ranks.double() + 0.5) / len(order)).float()


def _mixed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step * 7_919 + 12_345) % 2**63


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    if is_dataclass(value) and not isinstance(value, type):
        fields = {k: _plain(v) for k, v in vars(value).items() if not isinstance(v, Tensor)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _plain_scores(scores: Any) -> Any:
    if isinstance(scores, EdgeScores):
        return {"scores": scores.metadata, "digest": checkpoints.digest(scores.tensor.tolist())}
    return checkpoints.digest(scores.tolist()) if isinstance(scores, Tensor) else scores


def _plain_objective(objective: Callable[..., Any] | str | None) -> str | None:
    return getattr(objective, "__name__", repr(objective)) if callable(objective) else objective
