"""Constants, one per source, that removed edges carry: what optimal ablation learns.

Heads' constants live before their output weights (d_head numbers, as a head's outputs do).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from tl_edgeprune.ablation import Reference, constant_reference
from tl_edgeprune.files import write_whole
from tl_edgeprune.graph import EdgeGraph
from tl_edgeprune.hooks import Sites

FORMAT = 1
KIND = "tl_edgeprune constants"
NAMES = ("inputs", "z", "mlp")
OPTIMAL = "optimal"
"""The ablation of what was found under constants; to EdgePruner, that it shall learn them."""


@dataclass(frozen=True, eq=False, repr=False)
class Constants:
    """What every removed edge carries: one constant per source. An `ablation` wherever one is asked
    for.

    metadata: plain JSON values, such as model, task, seed and the loss at the end.
    """

    graph: EdgeGraph
    inputs: Float[Tensor, "input d_model"]
    z: Float[Tensor, "layer head d_head"]
    mlp: Float[Tensor, "mlp d_model"]
    metadata: dict[str, Any] = field(default_factory=dict)

    def reference(self, sites: Sites, graph: EdgeGraph) -> Reference:
        """The constants as the reference of every prompt and position; differentiable in them.

        Raises ValueError for a model with another graph.
        """
        if graph.at(()) != self.graph.at(()):  # sources are the same in every span
            raise ValueError(
                f"the constants are for another graph: {self.graph}, this run's is {graph}. Learn "
                "them anew with optimal_constants."
            )
        weight = sites.attention[0].output
        parts = [getattr(self, name).to(weight) for name in NAMES]
        return constant_reference(sites, graph, *parts)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        note = {"kind": KIND, "format": FORMAT, "graph": self.graph.to_dict()}
        note["metadata"] = self.metadata
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in NAMES}
        write_whole(path, to_bytes(tensors, {"note": json.dumps(note)}))

    @classmethod
    def load(cls, path: str | Path) -> Constants:
        """Read what `save` wrote. Raises ValueError for a damaged or another kind of file."""
        try:
            with safe_open(path, framework="pt") as file:
                note = json.loads((file.metadata() or {})["note"])
                tensors = {name: file.get_tensor(name) for name in NAMES}
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged or no file of constants: {error}") from None
        if note.get("kind") != KIND or note.get("format") != FORMAT:
            raise ValueError(
                f"{path} is {note.get('kind')!r} of format {note.get('format')!r}, expected "
                f"{KIND!r} of format {FORMAT}."
            )
        return cls(EdgeGraph.from_dict(note["graph"]), **tensors, metadata=note["metadata"])

    def detached(self) -> Constants:
        """The same numbers, without the graph that learned them."""
        return replace(self, **{name: getattr(self, name).detach() for name in NAMES})

    def __str__(self) -> str:
        return OPTIMAL

    def __repr__(self) -> str:
        return f"Constants({self.graph.n_sources} sources, {self.metadata.get('task', '')})"


# What removed edges carry: a name of ablation.ABLATIONS, or constants that were learned.
Ablation = str | Constants
