"""Trains the semi-synthetic models of the package and writes their weights.

    python scripts/train_semi_synthetic.py    # into tl_edgeprune/models/semi_synthetic_weights/

Takes minutes on one core. A JSON file next to the weights holds sizes, circuit, settings, and how
often the model agrees with its causal model, with and without interventions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tl_edgeprune.models.semi_synthetic import WEIGHTS
from tl_edgeprune.siit.causal import CausalModel
from tl_edgeprune.siit.examples import EXAMPLES
from tl_edgeprune.siit.training import accuracies, sizes, train

STEPS = {"siit-sum": 1000, "siit-lookup": 500, "siit-branch": 800}


def write(causal: CausalModel, out: Path, seed: int) -> None:
    training = {"steps": STEPS[causal.name], "lr": 3e-3, "batch_size": 128, "seed": seed}
    state = train(causal, **training)
    shares = accuracies(state, causal)
    save_file(state, out / f"{causal.name}.safetensors")
    about = {
        "name": causal.name,
        "format": 1,
        "model": sizes(causal),
        "circuit": causal.edges,
        "training": training,
        "accuracy": shares,
    }
    text = json.dumps(about, indent=1)
    (out / f"{causal.name}.json").write_text(text + "\n", encoding="utf-8")
    print(causal.name, {kind: round(share, 4) for kind, share in shares.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder to write to")
    parser.add_argument("--only", nargs="*", help="names of models; all by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, causal in EXAMPLES.items():
        if not args.only or name in args.only:
            write(causal, args.out, args.seed)


if __name__ == "__main__":
    main()
