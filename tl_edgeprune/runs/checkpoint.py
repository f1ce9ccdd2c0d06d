"""The state of a run on disk: safetensors with a JSON note inside. Whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from tl_edgeprune.utils.reading import damaged, of_kind
from tl_edgeprune.utils.tensor_files import floats, read_tensors
from tl_edgeprune.utils.versions import versions
from tl_edgeprune.utils.writing import write_whole

FORMAT = 1
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam and AdamW keep of a parameter
States = dict[str, dict[str, Tensor]]


def save(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    optimizers: dict[str, torch.optim.Optimizer | None],
    note: dict[str, Any],
) -> None:
    """Write tensors, optimisers' states and a note of JSON values."""
    flat = {f"tensor/{name}": t.detach().cpu().contiguous() for name, t in tensors.items()}
    for label, optimizer in optimizers.items():
        for index, state in (optimizer.state_dict()["state"] if optimizer else {}).items():
            flat |= {
                f"{label}/{index}/{key}": t.detach().cpu().contiguous() for key, t in state.items()
            }
    document = {"format": FORMAT, "versions": versions(), "note": note}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_bytes(flat, {"tl_edgeprune": json.dumps(document)}))


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], States, dict[str, Any]]:
    """What `save` wrote: tensors, optimisers' states, note.

    Raises FileNotFoundError, and ValueError for a damaged file or one of another format.
    """
    flat, document = read_tensors(path, "tl_edgeprune", "checkpoint")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        version = document.get("format") if isinstance(document, dict) else None
        raise ValueError(
            f"checkpoint {path} has format {version!r:.100}, this version reads {FORMAT}: start the "
            "run anew."
        )
    with damaged(path):
        note = of_kind(document["note"], dict, "note")
    tensors = {n.removeprefix("tensor/"): t for n, t in flat.items() if n.startswith("tensor/")}
    states: States = {}
    for name, tensor in flat.items():
        label, _, key = name.partition("/")
        states.setdefault(label, {})[key] = tensor
    return tensors, {"optimizer": {}, "multipliers": {}, "constants": {}} | states, note


def load_optimizer(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Give an optimiser of the Adam kind the state that `load` read for it. Raises KeyError or
    ValueError for another's.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            key: floats(flat, f"{index}/{key}", () if key == "step" else tuple(parameter.shape))
            for key in MOMENTS
        }
        for index, parameter in enumerate(parameters)
        if any(f"{index}/{key}" in flat for key in MOMENTS)  # it has made a step
    }
    if len(flat) > len(MOMENTS) * len(state):
        raise ValueError(f"a state of an optimiser has {', '.join(flat)}")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def restore(parameter: Tensor, tensors: dict[str, Tensor], name: str) -> None:
    """Give a parameter what `load` read. Raises KeyError or ValueError for another's."""
    with torch.no_grad():
        parameter.copy_(floats(tensors, name, tuple(parameter.shape)))
