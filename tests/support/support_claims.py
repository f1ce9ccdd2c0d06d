"""What makes a model supported: four statements, each held to brute force on one tiny model.

1. With every edge kept, the model gives its own logits.
2. With none kept, it gives those of the corrupted prompt.
3. Without one edge, it gives what path patching of that edge by hooks gives: an edge into queries,
   into keys, into values, into an MLP and into the logits each.
4. EAP gives every edge the difference of its source's outputs times the gradient of the loss at
   its destination's input.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from support import brute_force as bf
from support import model_zoo
from tl_edgeprune import EdgeGraph, Task, discover, masked

ANSWER, DISTRACTOR = 3, 5


class Statements:
    """The statements on one model of the zoo. Each raises AssertionError where it does not hold."""

    def __init__(self, name: str) -> None:
        self.name, dtype = name, model_zoo.dtypes(name)[-1]
        self.model = model_zoo.build(name, dtype)
        self.tolerance = model_zoo.tolerance(name, dtype)
        self.graph = EdgeGraph.from_model(self.model)
        self.clean, self.corrupted = (model_zoo.tokens(self.model, seed=seed) for seed in (0, 1))
        with torch.no_grad():
            self.logits = self.model(self.clean)
            self.own = bf.source_outputs(self.model, self.clean)
            self.theirs = bf.source_outputs(self.model, self.corrupted)

    def all_kept_is_the_model(self) -> None:
        self._equal(self.under_masks["all"], self.logits)

    @torch.no_grad()
    def none_kept_is_the_corrupted_prompt(self) -> None:
        corrupted = self.model(self.corrupted)
        assert (corrupted - self.logits).abs().max() > 0.1
        self._equal(self.under_masks["none"], corrupted)

    @torch.no_grad()
    def one_edge_is_brute_force_patching(self) -> None:
        for edge in self.one_edge_of_each_kind():
            expected = self._patched(edge)
            assert (expected - self.logits).abs().max() > 1e-4, f"{edge} does nothing"
            self._equal(self.under_masks[edge], expected)

    def eap_is_its_definition(self) -> None:
        task = Task(
            "random",
            *(list(self.clean), list(self.corrupted)),
            *([torch.tensor([n])] * len(self.clean) for n in (6, ANSWER, DISTRACTOR)),
        )
        scores = discover(self.model, task, method="eap", progress=False).tensor
        expected = self._eap_by_brute_force()
        assert expected.abs().min() > 0
        tolerance = 10 * max(self.tolerance, 1e-6) * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(scores.double(), expected.double(), atol=tolerance, rtol=0)

    def one_edge_of_each_kind(self) -> list[str]:
        """The last layer's, from the middle of what their destination reads."""
        ends = ("<q>", "<k>", "<v>", f"m{self.graph.n_layers - 1}", "logits")
        edges = ([edge for edge in self.graph.edges if edge.endswith(end)] for end in ends)
        return [of_end[2 * len(of_end) // 3] for of_end in edges if of_end]

    @functools.cached_property
    @torch.no_grad()
    def under_masks(self) -> dict[str, Tensor]:
        """The masked model's logits with all edges, with none, and without one edge at a time."""
        mask = torch.ones(self.graph.n_edges)
        logits = {}
        with masked(self.model, mask, corrupted=self.corrupted):
            logits["all"] = self.model(self.clean)
            for edge in self.one_edge_of_each_kind():
                mask[self.graph.index(edge)] = 0
                logits[edge] = self.model(self.clean)
                mask[self.graph.index(edge)] = 1
            mask.zero_()
            logits["none"] = self.model(self.clean)
        return logits

    def _patched(self, edge: str) -> Tensor:
        source, destination = edge.split("->")
        difference = self.theirs[source] - self.own[source]

        def read(name: str, own: Tensor) -> Tensor:
            return own + difference if name == destination else own

        return bf.run(self.model, self.clean, read, lambda source, y: None)

    def _eap_by_brute_force(self) -> Tensor:
        probes = {
            name: torch.zeros_like(self.own["input"]).requires_grad_()
            for name in bf.destinations(self.model)
        }
        logits = bf.run(self.model, self.clean, lambda d, x: x + probes[d], lambda s, y: None)
        loss = (logits[:, -1, DISTRACTOR] - logits[:, -1, ANSWER]).mean()
        at = dict(zip(probes, torch.autograd.grad(loss, list(probes.values())), strict=True))
        pairs = (edge.split("->") for edge in self.graph.edges)
        return torch.stack([((self.theirs[s] - self.own[s]) * at[d]).sum() for s, d in pairs])

    def _equal(self, actual: Tensor, expected: Tensor) -> None:
        tolerance = self.tolerance
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@functools.cache
def refusal(name: str) -> str | None:
    """Why the package refuses this model of the zoo; None where all four statements hold."""
    try:
        of = Statements(name)
    except NotImplementedError as error:
        return str(error)
    of.all_kept_is_the_model()
    of.none_kept_is_the_corrupted_prompt()
    of.one_edge_is_brute_force_patching()
    of.eap_is_its_definition()
    return None
