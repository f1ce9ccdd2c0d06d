"""Edge Pruning: find a circuit by training a mask on every edge.

1. Every edge has a hard-concrete gate (gates.py). A step draws the gates, runs the masked model on
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
from tl_edgeprune.hooks.placement import placed
from tl_edgeprune.objectives import find_objective
from tl_edgeprune.runs.fingerprint import of_weights
from tl_edgeprune.runs.task_checks import check_tokens, graph_at
from tl_edgeprune.tasks.stream import AnyTask, checked, sample
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.training.controllers import Lagrangian
from tl_edgeprune.training.result import PruneResult
from tl_edgeprune.training.settings import Optimizer, PrunerSettings
from tl_edgeprune.training.trainer import Training
from tl_edgeprune.utils.grad_mode import needs_gradients
from tl_edgeprune.utils.locks import held_file


class EdgePruner(PrunerSettings):
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
            circuit on up to 32 pairs of the task: the best is the result (best_ranking.py). 0 for
            the last step's; so with neurons and with ablation="optimal".
        split_qkv, split_embeddings: of the graph.
        positions: "span" for edges with a mask in each span of the task, "position" with one at
            each position (runs/task_checks.py); None for one mask everywhere. n_edges counts them
            all.
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

    def _check_pairs(self, model: Any) -> Callable[[Task], None]:
        def check(pairs: Task) -> None:
            find_objective(self.objective, pairs)
            check_tokens(pairs, model)

        return check

    def _has_two_embeddings(self, model: Any) -> bool:
        # The published graph has two embedding sources where the model has two embeddings.
        return self.split_embeddings and find_sites(model).has_positions
