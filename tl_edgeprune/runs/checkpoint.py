"""The file that holds a run's state: safetensors with a JSON note, written whole or not at all.

Only this module knows the file's layout: "tensor/<name>" for the run's tensors,
"<label>/<parameter>/<moment>" for its optimisers' states, and the note in the file's metadata.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from tl_edgeprune.utils.reading import check_type, reporting_damage
from tl_edgeprune.utils.tensor_files import floats, read_tensors
from tl_edgeprune.utils.versions import versions
from tl_edgeprune.utils.writing import write_whole

FORMAT = 1
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # Adam's and AdamW's state of one parameter


class SavedState(NamedTuple):
    """The state of a run: its tensors by name, its optimisers' states by label, JSON values."""

    tensors: dict[str, Tensor]
    optimizers: dict[str, dict[str, Tensor]]
    note: dict[str, Any]
    path: str | os.PathLike[str] = ""  # the file that it was read from


class Stateful:
    """An object whose state is tensors, which `load_state_dict` overwrites in place."""

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by their names in a checkpoint."""
        raise NotImplementedError

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Continue from a checkpoint's tensors.

        Raises KeyError for a missing tensor and ValueError for one of another shape.
        """
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                tensor.copy_(floats(tensors, name, tuple(tensor.shape)))


def save(path: str | os.PathLike[str], state: SavedState) -> None:
    """Write a run's state."""
    groups = {"tensor": state.tensors, **state.optimizers}
    flat = {
        f"{label}/{name}": tensor.detach().cpu().contiguous()
        for label, tensors in groups.items()
        for name, tensor in tensors.items()
    }
    document = {"format": FORMAT, "versions": versions(), "note": state.note}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_bytes(flat, {"tl_edgeprune": json.dumps(document)}))


def load(path: str | os.PathLike[str]) -> SavedState:
    """Read what `save` wrote.

    Raises FileNotFoundError, and ValueError for a damaged file or one of another format.
    """
    flat, document = read_tensors(path, "tl_edgeprune", "checkpoint")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        file_format = document.get("format") if isinstance(document, dict) else None
        raise ValueError(
            f"checkpoint {path} has format {file_format!r:.100}, this version reads {FORMAT}: "
            "start the run again."
        )
    with reporting_damage(path):
        note = check_type(document["note"], dict, "note")
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        label, _, key = name.partition("/")
        groups.setdefault(label, {})[key] = tensor
    return SavedState(groups.pop("tensor", {}), groups, note, path)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimiser's parameters, by "<parameter>/<moment>"."""
    return {
        f"{index}/{key}": tensor
        for index, moments in optimizer.state_dict()["state"].items()
        for key, tensor in moments.items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """Give an optimiser of the Adam kind the state that `optimizer_state` returned.

    Raises KeyError or ValueError for the state of another optimiser.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            key: floats(moments, f"{index}/{key}", () if key == "step" else tuple(parameter.shape))
            for key in MOMENTS
        }
        for index, parameter in enumerate(parameters)
        if any(f"{index}/{key}" in moments for key in MOMENTS)  # it has made a step
    }
    if len(moments) > len(MOMENTS) * len(state):
        raise ValueError(f"the state of an optimiser holds {', '.join(moments)}")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
