"""The state of a run on disk: safetensors with a JSON note inside. Whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from tl_edgeprune.circuit import versions
from tl_edgeprune.files import write_whole

FORMAT = 1
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
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {}).get("tl_edgeprune", "null"))
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no checkpoint, or a damaged one ({error}).") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else None
        raise ValueError(
            f"checkpoint {path} has format {found!r}, this version reads {FORMAT}: start the run "
            "anew."
        )
    tensors = {n.removeprefix("tensor/"): t for n, t in flat.items() if n.startswith("tensor/")}
    states: States = {}
    for name, tensor in flat.items():
        label, _, rest = name.partition("/")
        states.setdefault(label, {})[rest] = tensor
    return tensors, {"optimizer": {}, "multipliers": {}, "constants": {}} | states, document["note"]


def load_optimizer(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Give an optimiser the state that `load` read for it."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def digest(value: Any) -> str:
    """A short name for JSON values, equal for equal values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
