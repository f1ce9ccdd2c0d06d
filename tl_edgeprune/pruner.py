"""Edge Pruning: find a circuit by training a mask on every edge.

1. Every edge has a hard-concrete gate (masks.py). A step draws the gates, runs the masked model on
   a batch of pairs and lowers the objective, by default the KL to the full model's output.
2. A controller makes the gates sparse: `ExactBudget` holds the expected number of open gates at a
   budget that falls from 30 % of all edges to the size asked for; `Lagrangian` is the paper's.
3. Neurons may have gates of their own beside the edges' (neurons.py), with a budget of their own.
4. In the last part of the run the forward pass keeps exactly the top edges, as the final circuit
   will, while the gradient is that of the soft gates.
5. The circuit is the edges of highest log alpha.

`EdgePruner()` has our settings, `EdgePruner.paper()` those of the published code.
Bhaskar, Wettig, Friedman and Chen 2024, "Finding Transformer Circuits with Edge Pruning".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.ablation import ZERO_WITH_BIASES
from tl_edgeprune.circuit import Circuit, check_budget
from tl_edgeprune.constants import OPTIMAL, Ablation, Constants
from tl_edgeprune.distributed import Ranks
from tl_edgeprune.grad_mode import needs_gradients
from tl_edgeprune.graph import EdgeGraph
from tl_edgeprune.hooks import find_sites, model_kind
from tl_edgeprune.identities import digest, of_setting, of_weights
from tl_edgeprune.kinds import check_kinds
from tl_edgeprune.locks import held_file
from tl_edgeprune.masked import MaskedModel, check_ablation
from tl_edgeprune.masks import (
    Controller,
    ExactBudget,
    Lagrangian,
    sample_gates,
)
from tl_edgeprune.neurons import Neurons, check_constants, check_kind
from tl_edgeprune.neurons import check_budget as check_neuron_budget
from tl_edgeprune.objectives import Objective, find_objective
from tl_edgeprune.placement import placed
from tl_edgeprune.positions import check_positions, graph_at
from tl_edgeprune.prompts import check_tokens
from tl_edgeprune.recompute import RecomputedModel
from tl_edgeprune.regularisers import Attachment
from tl_edgeprune.scores import EdgeScores
from tl_edgeprune.tasks.stream import AnyTask, checked, sample
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.training import History, Training

Sampler = Callable[[Tensor, torch.Generator], Tensor]


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
    to evaluate the circuit with. `neuron_log_alpha` ranks every neuron of a run with
    neurons="mlp" or "dimensions"; `neurons` are as many as asked for.
    """

    graph: EdgeGraph
    log_alpha: Float[Tensor, " edge"]
    history: History
    n_edges: int | None
    metadata: dict[str, Any]
    finished: bool = True
    constants: Constants | None = None
    neuron_kind: str | None = None
    neuron_log_alpha: Float[Tensor, "place unit"] | None = None
    n_neurons: int | None = None

    @property
    def circuit(self) -> Circuit:
        """The top edges by log alpha, exactly as many as asked for."""
        if self.n_edges is None:
            raise ValueError("this run was for no one size (n_edges=None): use result.top(k).")
        return self.top(self.n_edges)

    @property
    def neurons(self) -> Neurons | None:
        """The top neurons by log alpha, exactly as many as asked for; None in a run without."""
        if self.neuron_log_alpha is None:
            return None
        if self.n_neurons is None:
            raise ValueError(
                "this run was for no one number of neurons (n_neurons=None): use "
                "result.top_neurons(k)."
            )
        return self.top_neurons(self.n_neurons)

    def top_neurons(self, k: int) -> Neurons:
        """The k neurons of highest log alpha. Raises ValueError in a run without neurons."""
        if self.neuron_kind is None or self.neuron_log_alpha is None:
            raise ValueError("this run had no gates on neurons: use EdgePruner(neurons=…).")
        scores, kind = self.neuron_log_alpha, self.neuron_kind
        return Neurons.top(self.graph, kind, scores, k, **self.metadata)

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
        steps, batch_size: of the training; a step sees `batch_size * accumulate` pairs.
        lr: of the log alphas; by default 0.2, and 0.3 under sampled budgets.
        ablation: "counterfactual", "zero", "zero-with-biases", "mean" or "mean-positional" (means
            over the task's corrupted prompts), Constants (optimal ablation), or "optimal":
            constants learned together with the masks, from the means on, which come back as
            `result.constants`.
        objective: a name of `objectives.OBJECTIVES`, a function, or None for the task's own.
        controller: ExactBudget() by default (without n_edges ExactBudget("sampled", anneal=0.4)),
            Lagrangian() or Penalty().
        init_scores: where log alphas start: "mask-ig" (five gradients, the default), EdgeScores
            (ranked as their `top` does) or a tensor [n_edges] (by magnitude), or None for all alike
            at `init_log_alpha`.
        node_masks: also learn a mask for each source, which multiplies its edges; node_controller
            makes those sparse.
        sampler: draws a mask from log alphas; hard-concrete gates.
        attachment: a price on edges between badly connected nodes (regularisers.py).
        hard_share: the last part of the run whose forward pass keeps exactly the top edges (as many
            as the step's budget; none without one).
        average_share: the last part of the run whose log alphas are averaged for the ranking
            (Izmailov et al. 2018); by default 0.6 under sampled budgets, which pull a step's log
            alphas each its own way, and 0, the last step's alone, otherwise.
        candidates: how many rankings of the last fifth of a run for a size are judged, each by its
            circuit on up to 32 pairs of the task: the best is the result (candidates.py). 0 for the
            last step's; so with neurons and with ablation="optimal".
        split_qkv, split_embeddings: of the graph.
        positions: "span" for edges with a mask in each span of the task, "position" with one at
            each position (positions.py); None for one mask everywhere. n_edges counts them all.
        neurons: "mlp" for a gate on each hidden neuron of the MLPs too, "dimensions" for one on
            each source's dimensions (neurons.py), trained with the edges; n_neurons of them are
            kept (None: a ranking of all), which come back as `result.neurons`; neuron_controller:
            as controller, of their own.
        bias_in_heads: "zero-with-biases" in place of "zero": each head's share of the output bias
            is removed with it.
        recompute: run blocks again in backward, from the buffer of differences alone: memory is
            then two buffers and one half block, whatever the depth (recompute.py).
        dtype, device: the run's; None for the model's own. The weights are put back after it, and
            meanwhile both are in memory.
        seed: same seed, same machine, same bits.
        checkpoint: a file to write the run's state to every `checkpoint_every` steps, atomically;
            if it is there, the run goes on.
        progress: show a progress bar.

    Raises ValueError for settings that cannot work and TypeError for those of another kind, before
    any run.
    """

    def __init__(
        self,
        n_edges: int | None = None,
        *,
        steps: int = 200,
        lr: float | None = None,
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
        hard_share: float = 0.4,
        average_share: float | None = None,
        candidates: int = 10,
        split_qkv: bool = True,
        split_embeddings: bool = False,
        positions: str | None = None,
        neurons: str | None = None,
        n_neurons: int | None = None,
        neuron_controller: Controller | None = None,
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
        self.steps = steps
        self.batch_size, self.accumulate = batch_size, accumulate
        self.ablation, self.objective = ablation, objective
        if bias_in_heads and ablation == "zero":
            self.ablation = ZERO_WITH_BIASES
        self.controller = controller or default_budget(n_edges)
        self.init_scores, self.init_log_alpha = init_scores, init_log_alpha
        self.node_masks, self.node_controller = node_masks, node_controller
        self.optimizer = optimizer or Optimizer()
        self.sampler, self.attachment = sampler, attachment
        has_budget = n_edges is not None or isinstance(self.controller, ExactBudget)
        self.hard_share = hard_share if has_budget else 0.0
        sampled = getattr(self.controller, "schedule", None) == "sampled"
        self.lr = (0.3 if sampled else 0.2) if lr is None else lr
        self.average_share = (0.6 if sampled else 0.0) if average_share is None else average_share
        self.candidates = candidates
        self.split_qkv, self.split_embeddings = split_qkv, split_embeddings
        self.positions = positions
        self.neurons, self.n_neurons = neurons, n_neurons
        self.neuron_controller = neuron_controller
        if neurons is not None and neuron_controller is None:
            self.neuron_controller = default_budget(n_neurons)
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
            "average_share": 0.0,
            "candidates": 0,
            "split_embeddings": True,
            "bias_in_heads": True,
        }
        return cls(n_edges, **(settings | changes))

    # --------------------------------------------------------------------------------------- fit

    @needs_gradients("EdgePruner.fit")
    def fit(self, model: Any, task: AnyTask, *, resume: str | Path | None = None) -> PruneResult:
        """Train the masks on the pairs of a Task or a TaskStream.

        Ctrl-C ends the run with what it has found so far (`finished` is then False); during the
        warm start, before the steps, it is a KeyboardInterrupt as anywhere. A run goes on from its
        `checkpoint` where that is there, or from `resume`, to the same bits (on a CPU) as one that
        was never stopped. A checkpoint of other settings, another task, graph or model is neither
        gone on from nor written over (ValueError). A second run that writes the same `checkpoint`
        at the same time is refused (BlockingIOError).

        Inside a process group (distributed.py) the processes share out each batch's pairs, and all
        get the same result; LostProcess where one of them ends or hangs.
        """
        model_kind(model)
        task = checked(task, self._check_pairs(model))
        loss_of = find_objective(self.objective, sample(task))
        graph = EdgeGraph.from_model(
            model, split_qkv=self.split_qkv, split_embeddings=self._has_two_embeddings(model)
        )
        graph = graph_at(model, graph, task, self.positions) or graph
        if self.n_edges is not None:
            check_budget(self.n_edges, graph)
        engine = RecomputedModel if self.recompute else MaskedModel
        writes = self.checkpoint if Ranks.current().first else None
        weights = of_weights(model) if self.checkpoint or resume else None
        with (
            held_file(writes) if writes else nullcontext(),
            placed(model, self.dtype, self.device),
            engine.attach(model, graph, self.neurons) as run,
        ):
            if self.n_neurons is not None:
                check_neuron_budget(self.n_neurons, math.prod(run.neuron_shape))
            fit = Training(self, run, task, loss_of, weights, resume)
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
            self.neurons,
            None if fit.neurons is None else fit.neurons.ranking(),
            None if fit.neurons is None else fit.neurons.final_size(),
        )

    def scores(
        self, model: Any, task: AnyTask, method: str, *, resume: str | Path | None = None
    ) -> EdgeScores:
        """`fit`, as scores by that method's name. Goes on from `resume`, by default from the
        pruner's checkpoint where that is there, as `fit` and every method do.

        Those of a run that Ctrl-C ended early say so in their metadata ("finished": False). Raises
        ValueError for ablation="optimal", whose constants scores cannot hold, and for neurons.
        """
        check_ablation(self.ablation)
        if self.neurons is not None:
            raise ValueError(
                f"neurons={self.neurons!r}: scores of edges cannot hold gates on neurons. Use "
                "EdgePruner(…).fit(model, task), which gives both (result.circuit, "
                "result.neurons)."
            )
        result = self.fit(model, task, resume=resume)
        early = {} if result.finished else {"finished": False}
        scores = result.scores
        return replace(scores, metadata=scores.metadata | {"method": method} | early)

    def settings(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        skip = ("checkpoint", "checkpoint_every", "progress", "init_scores", "objective")
        values = {k: of_setting(v) for k, v in vars(self).items() if k not in skip}
        values["init_scores"] = _plain_scores(self.init_scores)
        values["objective"], values["sampler"] = _named(self.objective), _named(self.sampler)
        return values

    def _check(self) -> None:
        check_kinds(vars(self))
        if self.n_edges is not None and self.n_edges < 1:
            raise ValueError(f"n_edges={self.n_edges}: a circuit needs at least one edge.")
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more.")
        if self.candidates < 0:
            raise ValueError(f"candidates={self.candidates}: expected 0 or more.")
        if self.ablation != OPTIMAL:
            check_ablation(self.ablation)
        if self.checkpoint is not None and Path(self.checkpoint).is_dir():
            raise ValueError(f"checkpoint={str(self.checkpoint)!r} is a folder: give a file in it.")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: expected a number above 0.")
        for name in ("hard_share", "average_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share from 0 to 1.")
        if isinstance(self.init_scores, str) and self.init_scores != "mask-ig":
            raise ValueError(
                f"init_scores={self.init_scores!r}: expected 'mask-ig', EdgeScores, a tensor or "
                "None."
            )
        check_positions(self.positions)
        if self.positions is not None and self.recompute:
            raise ValueError(
                f"positions={self.positions!r} with recompute=True is not supported: recomputed "
                "blocks have one mask for all positions. Leave one of the two out."
            )
        if self.node_controller is not None and not self.node_masks:
            raise ValueError("node_controller needs node_masks=True.")
        self._check_neurons()

    def _check_neurons(self) -> None:
        check_kind(self.neurons)
        if self.neurons is None:
            if self.n_neurons is not None or self.neuron_controller is not None:
                raise ValueError(
                    "n_neurons and neuron_controller need neurons='mlp' or 'dimensions'."
                )
            return
        if self.n_neurons is not None and self.n_neurons < 1:
            raise ValueError(f"n_neurons={self.n_neurons}: expected at least one neuron, or None.")
        assert self.neuron_controller is not None
        try:
            copy.deepcopy(self.neuron_controller).start(2, self.n_neurons and 1)
        except ValueError as error:
            raise ValueError(f"neuron_controller without n_neurons: {error}") from None
        if self.recompute:
            raise ValueError(
                f"neurons={self.neurons!r} with recompute=True is not supported: recomputed blocks "
                "take no gates on neurons. Leave one of the two out."
            )
        check_constants(self.neurons, self.ablation)

    def _check_pairs(self, model: Any) -> Callable[[Task], None]:
        def check(pairs: Task) -> None:
            find_objective(self.objective, pairs)
            check_tokens(pairs, model)

        return check

    def _has_two_embeddings(self, model: Any) -> bool:
        # The published graph has two embedding sources where the model has two embeddings.
        return self.split_embeddings and find_sites(model).has_positions


def default_budget(size: int | None) -> ExactBudget:
    """Towards a size, or for every size."""
    return ExactBudget("sampled", anneal=0.4) if size is None else ExactBudget()


def _plain_scores(scores: Any) -> Any:
    if isinstance(scores, EdgeScores):
        return {"scores": scores.metadata, "digest": digest(scores.tensor.tolist())}
    return digest(scores.tolist()) if isinstance(scores, Tensor) else scores


def _named(function: Callable[..., Any] | str | None) -> str | None:
    return getattr(function, "__name__", repr(function)) if callable(function) else function
