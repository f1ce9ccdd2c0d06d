"""This package and auto-circuit side by side: the same model, the same pairs, one process.

    python benchmarks/against_peers.py [--repeats 5] [--markdown]

A HookedTransformer of GPT-2 small's shape with random weights, 8 pairs of 16 tokens, float32, one
thread; needs TransformerLens 3 and auto-circuit (peers/README.md). Times are relative to a plain
forward and backward of the same model: medians of CPU time over rounds that run every row
once. Memory is the peak above the loaded model over three steps, each in a fresh process. ACDC runs
on the same shape with two layers, since twelve take auto-circuit hours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from methods import UNIT, acdc_rows, own_rows, peer_rows, plain_rows, training_step
from shapes import load, pairs
from step_cost import forget_peak, peak_bytes
from timing import medians

# The comparison's name, our row's name, auto-circuit's.
ROWS = (
    ("a training step", "edge pruning, per step", "auto-circuit: subnetwork probing, per step"),
    ("EAP on the 8 pairs", "eap", "auto-circuit: eap"),
    ("a circuit's logits", "a circuit", "auto-circuit: a circuit"),
)
ACDC = ("ACDC, per edge (2 layers)", "acdc, per edge", "auto-circuit: acdc, per edge")
Line = tuple[str, str, str, str]
RULE = ("---", "---:", "---:", "---:")  # the line below a Markdown table's header


def times(layers: int, repeats: int) -> list[Line]:
    """Training, attribution and evaluation, relative to plain passes."""
    model, task = load("hooked", layers), pairs()
    wanted = {UNIT, *(row for _, *both in ROWS for row in both)}
    steps = plain_rows(model, task) | own_rows(model, task) | peer_rows(model, task)
    found = medians({name: step for name, step in steps.items() if name in wanted}, repeats)
    return [line(name, found[own], found[peer], found[UNIT]) for name, own, peer in ROWS]


def acdc_times() -> list[Line]:
    """ACDC, relative to plain passes of the model with two layers."""
    model, task = load("hooked", 2), pairs()
    found = medians(plain_rows(model, task) | acdc_rows(model, task), 1)
    name, own, peer = ACDC
    return [line(name, found[own], found[peer], found[UNIT])]


def memory(layers: int) -> list[Line]:
    """Peak memory of three training steps above the model, in megabytes."""
    own, peer = (apart(who, layers) / 1e6 for who in ("own", "peer"))
    return [("memory of a step, MB", f"{own:.0f}", f"{peer:.0f}", f"{peer / own:.1f}")]


def line(name: str, own: float, peer: float, unit: float) -> Line:
    return name, f"{own / unit:.2f}", f"{peer / unit:.2f}", f"{peer / own:.1f}"


def apart(who: str, layers: int) -> int:
    command = [sys.executable, __file__, "--memory", who, "--layers", str(layers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def peak_of(who: str, layers: int) -> int:
    """Peak bytes of three training steps above the loaded model, in this process."""
    model: Any = load("hooked", layers)
    task = pairs()
    if who == "own":
        before = forget_peak()
        training_step(model, task)
        return peak_bytes() - before
    from peers import auto_circuit as peer

    wrapped, batches = peer.wrapped(model), peer.loader(task)
    del model
    before = forget_peak()
    peer.subnetwork_probing(wrapped, batches, 3)
    return peak_bytes() - before


def show(lines: Iterable[Line], markdown: bool) -> None:
    """Prints each row as soon as it is measured."""
    head = [("", "tl_edgeprune", "auto-circuit", "ratio"), *([RULE] if markdown else [])]
    for row in chain(head, lines):
        show_row(row, markdown)


def show_row(row: Line, markdown: bool) -> None:
    plain = f"{row[0]:28}{row[1]:>14}{row[2]:>14}{row[3]:>8}"
    print("| " + " | ".join(row) + " |" if markdown else plain, flush=True)


def measured(layers: int, repeats: int) -> Iterator[Line]:
    yield from times(layers, repeats)
    yield from memory(layers)
    yield from acdc_times()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--memory", choices=["own", "peer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(peak_of(options.memory, options.layers))
        return
    show(measured(options.layers, options.repeats), options.markdown)


if __name__ == "__main__":
    main()
