"""What the files here are of: models, pairs and settings, by the file's name.

make.py wrote the files from these, and tests/test_earlier_files.py goes on with them. Only public
names are imported. A case does not change: its file is of these settings.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

from tl_edgeprune import (
    Attachment,
    Comparison,
    Constants,
    EdgePruner,
    EdgeScores,
    ExactBudget,
    Lagrangian,
    Optimizer,
    Penalty,
    Task,
    compare,
    models,
    tasks,
)

DATA = Path(__file__).parent
SIIT, TRACR = "siit-sum", "tracr-reverse"
N_PAIRS = 10


@functools.cache
def load(name: str) -> tuple[Any, Task]:
    """A shipped model, whose weights are the same on every machine, and its pairs."""
    model = models.load(name, device="cpu")
    return model, tasks.load(name, model, N_PAIRS)


def scores() -> EdgeScores:
    """A ranking of siit-sum's edges."""
    return EdgeScores.load(DATA / "scores.safetensors")


def constants() -> Constants:
    """Constants for siit-sum's sources."""
    return Constants.load(DATA / "constants.safetensors")


# ------------------------------------------------------------------------------- EdgePruner's runs

BUDGET = {"n_edges": 12}
PRUNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": (SIIT, BUDGET | {"checkpoint_every": 9}),  # by then a ranking has been judged
    "nodes": (
        SIIT,
        BUDGET
        | {"controller": Lagrangian(), "init_scores": None, "attachment": Attachment(0.5)}
        | {"node_masks": True, "node_controller": Lagrangian(target_sparsity=0.3)}
        | {"optimizer": Optimizer(clip=1.0, warmup=2, decay=True)},
    ),
    "neurons": (SIIT, BUDGET | {"neurons": "mlp", "n_neurons": 30, "node_masks": True}),
    "dimensions": (
        SIIT,
        {"neurons": "dimensions", "neuron_controller": Lagrangian(target_sparsity=0.5)}
        | {"ablation": "zero", "bias_in_heads": True},
    ),
    "learned-constants": (SIIT, {"ablation": "optimal"}),
    "given-constants": (SIIT, BUDGET | {"controller": Penalty(3.0), "objective": "logit-diff"}),
    "spans": (TRACR, {"n_edges": 15, "positions": "span", "candidates": 0}),
    "recomputed": (SIIT, BUDGET | {"recompute": True, "accumulate": 2, "ablation": "mean"}),
}


def pruner(name: str, checkpoint: Path | None) -> EdgePruner:
    """The EdgePruner of a case; of 10 steps, after 5 of which it saves."""
    settings: dict[str, Any] = {"steps": 10, "batch_size": 4, "checkpoint_every": 5, "seed": 1}
    settings |= PRUNERS[name][1]
    if name == "given-constants":
        settings["ablation"] = constants()
    if name == "recomputed":
        settings["init_scores"] = scores()
    return EdgePruner(**settings, checkpoint=checkpoint, progress=False)


# ------------------------------------------------------------------------------------ the searches

FEW: dict[str, Any] = {"batch_size": 4}
TRAINING: dict[str, Any] = FEW | {"steps": 10, "checkpoint_every": 5}
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "eap": ("eap", FEW),
    "eap-ig": ("eap-ig", FEW | {"steps": 2}),
    "eap-ig-activations": ("eap-ig-activations", FEW | {"steps": 2}),
    "clean-corrupted": ("clean-corrupted", FEW),
    "mask-ig": ("mask-ig", FEW | {"ablation": "zero"}),
    "eap-graddrop": ("eap-graddrop", FEW),
    "relp": ("relp", FEW),
    "hisp": ("hisp", {}),
    "ifr": ("ifr", {}),
    "greedy-output": ("greedy-output", FEW),
    "subspace-nodes": ("subspace-nodes", FEW),
    "exact": ("exact", FEW),
    "acdc": ("acdc", FEW | {"threshold": 0.02}),
    "acdc-groups": ("acdc", FEW | {"threshold": 0.02, "search": "bisect"}),
    "acdc-singles": ("acdc", FEW | {"threshold": 0.02, "search": "bisect"}),
    "ugs": ("ugs", TRAINING),
    "subnetwork-probing": ("subnetwork-probing", TRAINING),
}
"""Of siit-sum. acdc-groups stops while it removes groups, acdc-singles while it tries each edge."""
ELIMINATION: dict[str, Any] = {"start": 30, "stop": 20, "share": 0.1, "batch_size": 4}

# ------------------------------------------------------------------------------------- comparisons

COMPARISONS: dict[str, dict[str, dict[str, Any]]] = {
    "compare": {"eap": FEW, "edge-pruning": TRAINING, "acdc": {"threshold": [0.02, 0.1]}},
    "compare-stopped": {"eap": FEW, "edge-pruning": TRAINING, "hisp": {}},  # in the second
}


def comparison(name: str, path: Path | None) -> Comparison:
    """A comparison of these methods on half of siit-sum's pairs, judged on the other half."""
    model, task = load(SIIT)
    train, held_out = task.split(0.5)
    own = COMPARISONS[name]
    return compare(
        model,
        train,
        held_out,
        list(own),
        sizes=(10, 30),
        settings=own,
        seed=1,
        path=path,
        progress=False,
    )


# -------------------------------------------------------------------------------------- run folders

INPUTS = f"{SIIT} {SIIT} --pairs 24 --device cpu --seed 1 --no-progress"
COMMANDS = {
    "prune": f"prune {INPUTS} --n-edges 12 --steps 10 --batch-size 4 --neurons mlp --n-neurons 30",
    "prune-stopped": f"prune {INPUTS} --n-edges 12 --steps 10 --batch-size 4 --checkpoint-every 5 "
    "--controller lagrangian --optimizer warmup=2 --attachment 0.5",
    "discover": f"discover {INPUTS} --method eap-ig --set steps=2 --n-edges 12",
    "discover-stopped": f"discover {INPUTS} --method acdc --set threshold=0.02 --set batch_size=4",
    "compare-stopped": f"compare {INPUTS} --methods eap,edge-pruning --sizes 10,30 "
    "--set edge-pruning.steps=10 --set edge-pruning.checkpoint_every=5",
}

# ---------------------------------------------------------------------------------------- settings


def pruners() -> dict[str, EdgePruner]:
    """EdgePruners whose `settings()` are kept: fingerprints of runs are made of them."""
    return {
        "default": EdgePruner(20),
        "paper": EdgePruner.paper(1000),
        "every size": EdgePruner(
            steps=100,
            controller=ExactBudget("sampled", start_share=0.5, anneal=0.2),
            init_scores=scores(),
            candidates=0,
            seed=3,
        ),
        "gates": EdgePruner(
            40,
            controller=Lagrangian(1.1, warmup=0.5),
            node_masks=True,
            node_controller=Penalty(2.0, torch.sigmoid),
            attachment=Attachment(0.5),
            optimizer=Optimizer(weight_decay=0.01, warmup=5),
            neurons="mlp",
            n_neurons=7,
            positions="span",
            objective="logit-diff",
            hard_share=0.2,
            average_share=0.3,
        ),
        "constants": EdgePruner(
            5,
            ablation=constants(),
            init_scores=torch.arange(5) / 3,
            dtype=torch.bfloat16,
            device="cpu",
            accumulate=2,
            recompute=True,
            lr=0.05,
        ),
        "zero": EdgePruner(
            7,
            ablation="zero",
            bias_in_heads=True,
            init_scores=None,
            split_qkv=False,
            split_embeddings=True,
            neurons="dimensions",
        ),
    }


# ------------------------------------------------------------------------------------------- probe


def probe() -> str:
    """A digest of the bits that this machine computes: equal ones promise equal results.

    Of both models: logits and gradients for batches of every size. Of PyTorch: elementary
    functions, sums, random numbers and AdamW.
    """
    found = hashlib.sha256()
    for name in (SIIT, TRACR):
        model, task = load(name)
        for size in (1, 2, 4, N_PAIRS):
            batch = next(task.batches(size))
            logits = model(batch.clean)
            parts = [p for p in model.parameters() if p.requires_grad]
            grads = torch.autograd.grad(logits.square().mean(), parts, allow_unused=True)
            for tensor in (logits, *(grad for grad in grads if grad is not None)):
                found.update(tensor.detach().contiguous().numpy().tobytes())
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(110, generator=generator).requires_grad_()
    optimizer = torch.optim.AdamW([numbers], lr=0.1, weight_decay=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        kept = torch.sigmoid(numbers)
        (kept.log() * kept + numbers.exp().log_softmax(-1)).sum().backward()
        optimizer.step()
    found.update(numbers.detach().numpy().tobytes())
    return found.hexdigest()
