"""The state of a search on disk, saved every half minute, from which a stopped search continues."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_edgeprune.distributed import Ranks
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.hooks.shards import is_sharded
from tl_edgeprune.runs import checkpoint as checkpoints
from tl_edgeprune.runs.checkpoint import SavedState
from tl_edgeprune.runs.fingerprint import differences, of_setting, of_task, of_weights
from tl_edgeprune.tasks.stream import AnyTask
from tl_edgeprune.utils.locks import locked_file
from tl_edgeprune.utils.reading import check_type, reporting_damage

SAVE_SECONDS = 30.0
HINT = "Remove it to start again."


class Saved:
    """The file with a search's tensors and JSON values; without a path, nothing is saved.

    Args:
        path: the file, or None.
        about: JSON values that identify the search; the state of another search is refused.
        writes: whether this process saves the state.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, about: dict[str, Any], *, writes: bool = True
    ) -> None:
        self._path, self._writes = None if path is None else Path(path), writes
        self._about = json.loads(json.dumps(about))
        self._last = time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The saved tensors and values of this search; None if there are none.

        Raises ValueError for a damaged file and for the state of another search.
        """
        if self._path is None or not self._path.exists():
            return None
        tensors, _, note, _ = checkpoints.load(self._path)
        if "about" not in note:
            raise ValueError(f"{self._path} is of a run of EdgePruner: give another path.")
        with self.damaged():
            about = check_type(note["about"], dict, "about")
            state = check_type(note["state"], dict, "state")
        if about != self._about:
            names = sorted(differences(about, self._about))
            raise ValueError(
                f"checkpoint {self._path} is of another run ({', '.join(names)} differ): give "
                "another path, or remove it to start again."
            )
        return tensors, state

    def damaged(self) -> AbstractContextManager[None]:
        """Turns errors from wrong values in this block into a ValueError that names the file."""
        return nullcontext() if self._path is None else reporting_damage(self._path, HINT)

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Write the state, unless it was written less than SAVE_SECONDS ago."""
        if self._path is None or not self._writes:
            return
        if time.monotonic() - self._last < SAVE_SECONDS:
            return
        note = {"about": self._about, "state": values}
        checkpoints.save(self._path, SavedState(tensors, {}, note))
        self._last = time.monotonic()


UNSAVED = Saved(None, {})


@contextmanager
def saved_state(
    path: str | os.PathLike[str] | None,
    about: dict[str, Any],
    settings: dict[str, Any],
    run: MaskedModel,
    task: AnyTask,
) -> Iterator[Saved]:
    """The saved state of a search with these settings, model, graph and pairs.

    Of several processes that share a model's weights, only the first writes it. Raises
    BlockingIOError if another process writes it.
    """
    if path is None:
        yield UNSAVED
        return
    identity = about | {"settings": of_setting(settings), "graph": run.graph.to_dict()}
    identity |= {"pairs": of_task(task), "weights": of_weights(run.model)}
    writes = Ranks.current().first or not is_sharded(run.model)
    with locked_file(path) if writes else nullcontext():
        yield Saved(path, identity, writes=writes)
