"""Edge Pruning: find a circuit by training a mask on every edge.

1. Every edge has a hard-concrete gate (gates.py). A step draws the gates, runs the masked model on
   a batch of pairs and lowers the objective, by default the KL to the full model's output.
2. A controller makes the gates sparse: `ExactBudget` holds the expected number of open gates at a
   budget that falls from 30 % of all edges to the requested size; `Lagrangian` is the paper's.
3. Neurons may have gates too (circuits/neurons.py), with a controller and a budget of their own.
4. In the last part of the run the forward pass keeps exactly the top edges, as the final circuit
   will, while the gradient is that of the soft gates.
5. The circuit is the edges of highest log alpha.

`EdgePruner()` has our settings, `EdgePruner.paper()` those of the published code.
Bhaskar, Wettig, Friedman and Chen 2024, "Finding Transformer Circuits with Edge Pruning".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_edgeprune.ablation.kinds import check_ablation
from tl_edgeprune.circuits.circuit import check_budget
from tl_edgeprune.circuits.neurons import check_budget as check_neuron_budget
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.distributed import Ranks
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.forward.recompute import RecomputedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.find import find_sites
from tl_edgeprune.hooks.modules import model_kind
from tl_edgeprune.hooks.placement import model_placed
from tl_edgeprune.objectives import find_objective
from tl_edgeprune.runs.fingerprint import of_weights
from tl_edgeprune.runs.task_checks import check_tokens, graph_at
from tl_edgeprune.tasks.stream import AnyTask, check_pairs, sample
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.training.controllers import Lagrangian
from tl_edgeprune.training.result import PruneResult
from tl_edgeprune.training.settings import Optimizer, PrunerSettings
from tl_edgeprune.training.trainer import Trainer
from tl_edgeprune.utils.grad_mode import needs_gradients
from tl_edgeprune.utils.locks import locked_file


class EdgePruner(PrunerSettings):
    """Finds a circuit of exactly `n_edges` edges in a model, for a task.

    Args:
        n_edges: edges to keep; None (with a sampled budget) for a ranking of all edges.
        steps: training steps.
        lr: learning rate of the log alphas; by default 0.2, under sampled budgets 0.3.
        batch_size: pairs per forward pass.
        accumulate: forward passes per step.
        ablation: what removed edges carry: "counterfactual", "zero", "zero-with-biases", "mean" or
            "mean-positional" (over the task's corrupted prompts), Constants, or "optimal":
            constants learned together with the masks, returned as `result.constants`.
        objective: a name in `objectives.OBJECTIVES`, a function, or None for the task's own.
        controller: ExactBudget() by default (without n_edges ExactBudget("sampled", anneal=0.4)),
            Lagrangian() or Penalty().
        init_scores: what the first log alphas are ranked by: "mask-ig" (five gradients),
            EdgeScores, a tensor [n_edges] (by magnitude), or None for a random order.
        init_log_alpha: mean and standard deviation of the first log alphas.
        node_masks: whether to also learn a mask for each source, which multiplies its edges.
        node_controller: makes the node masks sparse; None for node masks without a price.
        optimizer: the options of AdamW.
        sampler: draws a mask from log alphas; by default hard-concrete gates.
        attachment: a price on edges between badly connected nodes (regularisers.py).
        hard_share: final fraction of the run whose forward pass keeps exactly the top edges, as
            many as the step's budget; 0 without a budget.
        average_share: final fraction of the run whose log alphas are averaged for the ranking
            (Izmailov et al. 2018); by default 0.6 under sampled budgets, otherwise 0.
        candidates: rankings evaluated in the last fifth of the run, each by its circuit on up to 32
            pairs; the best is the result. Not with neurons or ablation="optimal".
        split_qkv: whether edges into queries, keys and values are separate.
        split_embeddings: whether token and position embeddings are two sources.
        positions: "span" for a mask on every edge in each span of the task, "position" at each
            position, None for one mask everywhere. n_edges counts the edges of all.
        neurons: also learn gates: "mlp" for the MLPs' hidden neurons, "dimensions" for the
            dimensions of each source. They are returned as `result.neurons`.
        n_neurons: neurons to keep; None for a ranking of all neurons.
        neuron_controller: makes the gates on neurons sparse; defaults as for `controller`.
        bias_in_heads: "zero" becomes "zero-with-biases": each head is removed with its share of the
            output bias.
        recompute: recompute blocks in the backward pass: memory is two buffers and half a block,
            whatever the depth (forward/recompute.py).
        dtype: of the run; None for the model's own. Both copies of the weights are in memory.
        device: of the run; None for the model's own.
        seed: same seed, same machine, same bits.
        checkpoint: a file for the run's state; if it exists, the run continues from it.
        checkpoint_every: steps between checkpoints.
        progress: show a progress bar.

    Raises ValueError for settings that cannot work and TypeError for values of another kind.
    """

    @classmethod
    def paper(cls, n_edges: int | None = None, **changes: Any) -> EdgePruner:
        """The published method and hyperparameters (GPT-2, IOI), for comparison.

        AdamW with its default weight decay (0.01) and gradients clipped at 1, as the published code
        runs; learning rate 0.8 for log alphas and multipliers, warmed up over 200 steps and decayed
        linearly; log alpha from N(10, 0.01); 3,000 steps of 32 pairs; sparsity target warmed up
        over 2,500 steps; node masks drawn but not penalised; two embedding sources; b_O divided
        among the heads. Its padding to 64 tokens is omitted: all prompts of a batch have one
        length. `changes` override single settings.
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

        Ctrl-C during the steps ends the run with what it has found so far (`finished` is False).
        A resumed run gives the same bits (on a CPU) as one that was never stopped. Inside a process
        group (distributed.py) the processes divide each batch's pairs, and all get the same result.

        Args:
            model: the TransformerLens model.
            task: the pairs to train on.
            resume: the checkpoint to continue from; by default the pruner's own, if it exists.

        Raises ValueError for a checkpoint of other settings, another task, graph or model, which is
        not overwritten either; BlockingIOError if another run writes the same checkpoint;
        LostProcess if another process of the group ends or hangs.
        """
        model_kind(model)
        task = check_pairs(task, self._check_pairs(model))
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
            locked_file(writes) if writes else nullcontext(),
            model_placed(model, self.dtype, self.device),
            engine.attach(model, graph, self.neurons) as run,
        ):
            if self.n_neurons is not None:
                check_neuron_budget(self.n_neurons, math.prod(run.neuron_shape))
            trainer = Trainer(self, run, task, loss_of, weights, resume)
            trainer.synchronise()
            return trainer.result(finished=trainer.train())

    def scores(
        self, model: Any, task: AnyTask, method: str, *, resume: str | Path | None = None
    ) -> EdgeScores:
        """The log alphas of `fit` as edge scores.

        The scores of a run that Ctrl-C ended early have "finished": False in their metadata.

        Args:
            model, task, resume: as for `fit`.
            method: the name of the method in the scores' metadata.

        Raises ValueError for ablation="optimal" and for neurons, since scores hold neither
        constants nor gates on neurons.
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

    def _check_pairs(self, model: Any) -> Callable[[Task], None]:
        def check(pairs: Task) -> None:
            find_objective(self.objective, pairs)
            check_tokens(pairs, model)

        return check

    def _has_two_embeddings(self, model: Any) -> bool:
        # The published graph has two embedding sources where the model has two embeddings.
        return self.split_embeddings and find_sites(model).has_positions
