"""What a command works on, by name: a model, a task's pairs, and how they are held.

Names are checked before anything is loaded: a wrong one is told at once.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tl_edgeprune.commands.common.values import check_values
from tl_edgeprune.utils.reading import check_type
from tl_edgeprune.utils.suggest import did_you_mean

PAIRS, HELD_OUT = 256, 0.25
DTYPES, CLASSES = ("float32", "bfloat16", "float16"), ("bridge", "hooked")
HINTS: dict[str, Any] = {str(t): t for t in (bool | None, str | None)} | {
    t.__name__: t for t in (bool, int, str)
}


@dataclass(frozen=True)
class Inputs:
    """A model and a task by name. `pairs`: how many; None for a file's all, or PAIRS of a task.

    held_out: the share of the pairs that a circuit is judged on and not found on. cls: of the
    model, "bridge" or "hooked". options: the task's own.
    """

    model: str
    task: str
    pairs: int | None = None
    held_out: float = HELD_OUT
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    cls: str = "bridge"
    options: dict[str, Any] = field(default_factory=dict)

    def resolve(self) -> Inputs:
        """The same with paths made whole, the device chosen, and everything checked that can be
        without loading. Raises ValueError and FileNotFoundError.
        """
        if self.pairs is not None and self.pairs < 2:
            raise ValueError(f"--pairs {self.pairs}: expected 2 or more, some to be held out.")
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"--held-out {self.held_out:g}: expected a share of the pairs between 0 and 1, "
                f"such as {HELD_OUT}."
            )
        task = checked_task(self.task)
        return replace(
            self,
            model=checked_model(self.model),
            task=task,
            device=checked_device(self.device),
            options=check_values("--task-set", self.options, task_options(task)),
        )

    def load_model(self) -> Any:
        """The model, on its device."""
        import torch

        from tl_edgeprune import models

        dtype = getattr(torch, self.dtype)
        return models.load(self.model, cls=self.cls, device=self.device, dtype=dtype)

    def load_pairs(self, model: Any) -> Any:
        """The Task, for this model: all its pairs."""
        from tl_edgeprune import tasks

        if not is_file_task(self.task):
            return tasks.load(self.task, model, self.pairs or PAIRS, self.seed, **self.options)
        task = tasks.from_jsonl(self.task, model, **self.options)
        if self.pairs is not None and self.pairs > len(task):
            raise ValueError(
                f"--pairs {self.pairs}: {self.task} holds {len(task)}. Ask for fewer, or leave "
                "--pairs out."
            )
        return task if self.pairs is None else task[: self.pairs]

    def split(self, pairs: Any) -> tuple[Any, Any]:
        """Two Tasks: pairs to find a circuit on, and pairs to judge it on."""
        held_out, train = pairs.split(self.held_out, self.seed)
        return train, held_out

    def n_pairs(self) -> int:
        """How many pairs there will be, at most."""
        if not is_file_task(self.task):
            return self.pairs or PAIRS
        with open(self.task, encoding="utf-8") as lines:
            n_lines = sum(bool(line.strip()) for line in lines)
        return min(self.pairs or n_lines, n_lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Any) -> Inputs:
        """The inputs that `to_dict` described. Raises ValueError or TypeError for other fields."""
        values = check_type(fields, dict, "inputs")
        kinds = {"held_out": float, "seed": int, "pairs": int, "options": dict}
        for name, value in values.items():
            if value is not None or name not in ("pairs", "device"):
                check_type(value, kinds.get(name, str), name)
        for name, choices in (("dtype", DTYPES), ("cls", CLASSES)):
            if values.get(name, choices[0]) not in choices:
                raise ValueError(f"{name} {values[name]!r}, expected one of {', '.join(choices)}")
        return cls(**values)


def is_file_task(task: str) -> bool:
    """Whether the task is a file of prompt pairs."""
    return task.endswith(".jsonl") or Path(task).is_file()


def checked_model(name: str) -> str:
    """The name, or the folder's whole path. A name of the Hugging Face hub shows when it loads."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(
                f"model {name!r}: the folder has no config.json. Give a folder that "
                "save_pretrained wrote."
            )
        return str(Path(name).resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"model {name!r}: no such folder. Give one that save_pretrained wrote, or a name "
            "(tl-edgeprune models lists some)."
        )
    return name


def checked_task(name: str) -> str:
    """The name of a task that there is, or a file's whole path."""
    from tl_edgeprune import tasks

    if is_file_task(name):
        if not Path(name).is_file():
            raise FileNotFoundError(
                f"task {name!r}: no such file. Expected prompt pairs, one JSON object a line with "
                '"clean" and "corrupted".'
            )
        return str(Path(name).resolve())
    if name not in tasks.list():
        raise ValueError(
            f"unknown task {name!r}: expected one of {', '.join(tasks.list())}, or a .jsonl file "
            f"of prompt pairs.{did_you_mean(name, tasks.list())}"
        )
    return name


def task_options(name: str) -> dict[str, Any]:
    """A task's own options, and their types as far as they are plain."""
    from tl_edgeprune import tasks

    builder = tasks.from_jsonl if is_file_task(name) else tasks.BUILDERS[name]
    hints: dict[str, Any] = {"prepend_bos": bool | None}
    for option in inspect.signature(builder).parameters.values():
        if option.kind is option.KEYWORD_ONLY:
            hints[option.name] = HINTS.get(str(option.annotation), object)
    return hints


def checked_device(name: str | None) -> str:
    """A device that this machine has; the GPU, where there is one, for None."""
    import torch

    default = "cuda" if torch.cuda.is_available() else "cpu"
    if name is None:
        return default
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r}: expected cpu, cuda or cuda:1 (say).") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: this machine has {torch.cuda.device_count()} GPUs that PyTorch can "
            f"use. Give --device {default}, or leave it out."
        )
    return name
