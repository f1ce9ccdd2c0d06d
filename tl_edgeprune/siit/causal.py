"""A causal model: a task as variables that read one another, each at its place in a transformer.

1. A variable has a node (a head, an MLP, the logits) and reads other variables or the tokens. Each
   read is one edge of the transformer, so the variables together are a circuit.
2. To *swap* a read is to give it the value that its variable has on another prompt. The model's
   answer is then what a transformer with this circuit must answer if the same edge carries its
   source's output on the other prompt.

Interchange interventions: Geiger et al. 2021, "Causal Abstractions of Neural Networks"
(arXiv 2106.02997); here the intervention is on a single edge, as in path patching.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph

INPUT = "input"
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Variable:
    """One step of the task.

    Args:
        name: any name.
        node: where it is computed: a source ("a0.h1", "m0") or "logits".
        reads: names of the variables that it reads ("input": the tokens); for a head with the input
            that reads it, "keys<k>".
        compute: from the values of the reads, each [batch, ...], in that order, to its value.
    """

    name: str
    node: str
    reads: tuple[str, ...]
    compute: Callable[..., Tensor]


@dataclass(frozen=True)
class CausalModel:
    """Variables in the order in which they are computed, and the transformer that they lie in.

    The last variable is at the logits: its value is the correct token after the prompt.

    Args:
        name: what the model is called.
        graph: the transformer's edges.
        n_tokens: size of its vocabulary.
        draw: (n, generator) -> random prompts [n, pos], all of the same length.
        variables: see `Variable`.

    Raises:
        ValueError: a variable that reads a later one, a name or a node used twice, an edge that the
            graph does not have, or a last variable that is not at the logits.
    """

    name: str
    graph: EdgeGraph
    n_tokens: int
    draw: Callable[[int, torch.Generator], Tensor]
    variables: tuple[Variable, ...]

    def __post_init__(self) -> None:
        nodes = {INPUT: INPUT}
        for variable in self.variables:
            for read in variable.reads:
                if _name(read) not in nodes:
                    raise ValueError(
                        f"variable {variable.name!r} reads {_name(read)!r}: expected an earlier "
                        f"variable, one of {', '.join(nodes)}."
                    )
            if variable.name in nodes or variable.node in nodes.values():
                raise ValueError(
                    f"variable {variable.name!r} at {variable.node!r}: its name or its node is "
                    "used by an earlier variable."
                )
            nodes[variable.name] = variable.node
        if not self.variables or self.variables[-1].node != "logits":
            raise ValueError(f"the last variable of {self.name!r} must be at the node 'logits'.")
        for edge in self.edges:
            try:
                self.graph.index(edge)
            except KeyError as error:
                raise ValueError(f"causal model {self.name!r}: {error.args[0]}") from None

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Names of the circuit's edges: one for each read of each variable, in order."""
        nodes = {INPUT: INPUT} | {v.name: v.node for v in self.variables}
        return tuple(
            f"{nodes[_name(read)]}->{variable.node}{read.removeprefix(_name(read))}"
            for variable in self.variables
            for read in variable.reads
        )

    def answers(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
        """The correct token after each prompt."""
        return self._values(tokens)[self.variables[-1].name]

    def interchange(
        self,
        tokens: Int[Tensor, "batch pos"],
        other: Int[Tensor, "batch pos"],
        swapped: Bool[Tensor, "batch edge"],
    ) -> Int[Tensor, " batch"]:
        """The correct token if swapped reads get their variable's value on the other prompt.

        Args:
            tokens: prompts.
            other: the prompts to swap from.
            swapped: which reads are swapped; columns as in `edges`.
        """
        return self._values(tokens, self._values(other), swapped)[self.variables[-1].name]

    def _values(
        self, tokens: Tensor, other: Values | None = None, swapped: Tensor | None = None
    ) -> Values:
        values, edge = {INPUT: tokens}, 0
        for variable in self.variables:
            reads = []
            for name in map(_name, variable.reads):
                value = values[name]
                if other is not None and swapped is not None:
                    rows = swapped[:, edge].view(-1, *[1] * (value.dim() - 1))
                    value = torch.where(rows, other[name], value)
                reads.append(value)
                edge += 1
            values[variable.name] = variable.compute(*reads)
        return values


def _name(read: str) -> str:
    """The variable of a read: "keys" of "keys<k>"."""
    return read.partition("<")[0]
