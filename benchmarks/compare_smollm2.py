"""Discovery methods side by side on SmolLM2-135M, indirect object identification.

    python benchmarks/compare_smollm2.py [--task ioi-t1] [--pairs 256] [--steps 200] [--out …]

Edge Pruning, EAP, EAP-IG, mask-IG, UGS, ACDC and random scores, each at five sizes (ACDC at the
sizes that its thresholds give), all evaluated on the same held-out pairs. The folder holds every
method's scores, table.csv, table.json, comparison.png and .svg. A killed run continues if started
with the same arguments.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from tl_edgeprune import Attachment, compare, models, tasks

METHODS = ("edge-pruning", "eap", "eap-ig", "mask-ig", "ugs", "acdc", "random")
SIZES = (200, 500, 1000, 2300, 10_000)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = found.add_argument
    add("--task", default="ioi-t1", choices=["ioi-t1", "ioi"], help="default: ioi-t1")
    add("--pairs", type=int, default=256, help="half for training, half held out (default: 256)")
    add("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help="default: all")
    add("--sizes", nargs="+", type=int, default=list(SIZES), metavar="EDGES")
    add("--steps", type=int, default=200, help="Edge Pruning's and UGS's (default: 200)")
    add("--ig-steps", type=int, default=5, help="EAP-IG's and mask-IG's (default: 5)")
    add("--thresholds", nargs="+", type=float, default=[0.03, 0.01], help="ACDC's")
    add("--per-size", action="store_true", help="one Edge Pruning run per size")
    add("--attachment", type=float, default=None, help="a weight for Edge Pruning's Attachment")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=None, help="default: torch's")
    add("--device", default="cpu")
    add("--out", type=Path, default=None, help="default: runs/compare-{task}")
    return found


def settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each method's settings."""
    every = {
        "edge-pruning": {"steps": options.steps, "per_size": options.per_size},
        "eap-ig": {"steps": options.ig_steps},
        "mask-ig": {"steps": options.ig_steps},
        "ugs": {"steps": options.steps},
        "acdc": {"search": "bisect", "threshold": options.thresholds},
    }
    if options.attachment is not None:
        every["edge-pruning"]["attachment"] = Attachment(options.attachment)
    return {name: own for name, own in every.items() if name in options.methods}


def main() -> None:
    options = parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    out = options.out or Path("runs") / f"compare-{options.task}"
    started = time.monotonic()
    model = models.load("smollm2-135m", device=options.device)
    task = tasks.load(options.task, model, options.pairs, options.seed)
    train, held_out = task.split(0.5, options.seed)
    print(f"{len(train)} pairs to find circuits on, {len(held_out)} held out.", flush=True)
    comparison = compare(
        model,
        train,
        held_out,
        options.methods,
        options.sizes,
        settings=settings(options),
        seed=options.seed,
        path=out,
    )
    comparison.table.to_csv(out / "table.csv", index=False)
    comparison.table.to_json(out / "table.json", orient="records", indent=1)
    for ending in ("png", "svg"):
        comparison.plot(out / f"comparison.{ending}")
    print(f"\n{comparison}\n\nTook {(time.monotonic() - started) / 60:.1f} minutes; all in {out}/.")


if __name__ == "__main__":
    main()
