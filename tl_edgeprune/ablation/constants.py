"""Constants, one per source, that removed edges carry: what optimal ablation learns.

Heads' constants live before their output weights (d_head numbers, as a head's outputs do).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import save as to_bytes
from torch import Tensor

from tl_edgeprune.ablation.fixed import constant_reference
from tl_edgeprune.ablation.reference import Reference
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.sites import Sites
from tl_edgeprune.utils.reading import check_type, reporting_damage
from tl_edgeprune.utils.tensor_files import floats, read_tensors
from tl_edgeprune.utils.writing import write_whole

FORMAT = 1
KIND = "tl_edgeprune constants"
HINT = "Expected one written by Constants.save."
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
        tensors = [getattr(self, name).to(weight) for name in NAMES]
        return constant_reference(sites, graph, *tensors)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        note = {"kind": KIND, "format": FORMAT, "graph": self.graph.to_dict()}
        note["metadata"] = self.metadata
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in NAMES}
        write_whole(path, to_bytes(tensors, {"note": json.dumps(note)}))

    @classmethod
    def load(cls, path: str | Path) -> Constants:
        """Read what `save` wrote. Raises FileNotFoundError, and ValueError for a damaged file or
        another kind of file.
        """
        tensors, note = read_tensors(path, "note", "file of constants", HINT)
        if not isinstance(note, dict) or (note.get("kind"), note.get("format")) != (KIND, FORMAT):
            values = note if isinstance(note, dict) else {}
            raise ValueError(
                f"{path} is {values.get('kind')!r:.100} of format {values.get('format')!r:.100}, "
                f"expected {KIND!r} of format {FORMAT}."
            )
        with reporting_damage(path):
            graph = EdgeGraph.from_dict(note["graph"])
            n_mlps = graph.n_layers if graph.has_mlp else 0
            heads = (graph.n_layers, graph.n_heads)
            sources = {"inputs": (graph.n_inputs,), "z": heads, "mlp": (n_mlps,)}
            widths = {name: tensors[name].shape[-1] for name in NAMES}
            if graph.has_mlp and widths["mlp"] != widths["inputs"]:
                raise ValueError(f"inputs and mlp are of two widths, {widths}")
            by_name = {n: floats(tensors, n, (*sources[n], widths[n])) for n in NAMES}
            return cls(graph, **by_name, metadata=check_type(note["metadata"], dict, "metadata"))

    def detached(self) -> Constants:
        """The same numbers on the CPU, without the graph that learned them."""
        return replace(self, **{name: getattr(self, name).detach().cpu() for name in NAMES})

    def __str__(self) -> str:
        return OPTIMAL

    def __repr__(self) -> str:
        return f"Constants({self.graph.n_sources} sources, {self.metadata.get('task', '')})"


# What removed edges carry: a name of ablation.ABLATIONS, or constants that were learned.
Ablation = str | Constants
