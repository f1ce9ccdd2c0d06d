"""What runs on a GPU: the whole package on a device pretended on the CPU (second_device.py).

Results must be the CPU's, to float tolerance, and on the CPU themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import model_zoo, second_device
from support.second_device import CPU, GPU, OtherDevice, place_of
from torch import Tensor

from tl_edgeprune import (
    Circuit,
    EdgeGraph,
    EdgePruner,
    EdgeScores,
    Lagrangian,
    Task,
    compare,
    completeness,
    discover,
    eliminate,
    equivalence_test,
    evaluate,
    explain,
    faithfulness_curve,
    independence_test,
    masked,
    minimality,
    minimality_test,
    optimal_constants,
    polish,
    stability,
)
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.forward.recompute import RecomputedModel
from tl_edgeprune.methods.registry import METHODS
from tl_edgeprune.objectives import kl
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.search.cuts import find_cuts
from tl_edgeprune.search.partial_cuts import PartialCuts
from tl_edgeprune.training.trainer import Trainer

pytestmark = pytest.mark.skipif(
    not second_device.supported(), reason="this torch does not let a device be pretended"
)

SMALL = "bridge-llama-mqa"
MODELS = ["bridge-gpt2", "bridge-llama-gqa"]
MODELS += ["hooked-llama-gqa"] if "hooked-llama-gqa" in model_zoo.BUILDERS else []
# What others of the quick ones run too.
SLOW = (
    "clean-corrupted",
    "eap-graddrop",
    "eap-ig-activations",
    "hisp",
    "subnetwork-probing",
    "ugs",
)
SLOW += ("completeness", "independence", "minimality", "minimality-test", "stability")
RUN: dict[str, Any] = {"steps": 2, "batch_size": 3, "progress": False}


def quick_first(names: Iterable[str]) -> list[Any]:
    """Names as parameters, some of them for slow tests."""
    return [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in names]


@contextmanager
def moved(model: Any) -> Iterator[OtherDevice]:
    """The model on the other device."""
    with OtherDevice() as device:
        model.to("cuda")
        device.waits.clear()
        try:
            yield device
        finally:
            waits = device.waits.copy()
            model.to("cpu")
            device.waits = waits


def numbers(found: Any) -> list[Any]:
    """Everything that can be compared of a result."""
    if isinstance(found, Tensor):
        return [found.detach().cpu()]
    if is_dataclass(found):
        found = {f.name: getattr(found, f.name) for f in fields(found)}
        found.pop("graph", None)
    if isinstance(found, dict):
        skip = ("seconds", "peak_mb", "metadata")
        return [n for key, value in found.items() if key not in skip for n in numbers(value)]
    if isinstance(found, list | tuple):
        return [n for value in found for n in numbers(value)]
    return [torch.tensor(float(found))] if isinstance(found, int | float) else []


def same_on_both(model: Any, work: Callable[[], Any]) -> Any:
    """What the work gives on the other device, which is what it gives on the CPU."""
    expected = numbers(work())
    with moved(model):
        found = work()
        torch.testing.assert_close(
            numbers(found), expected, rtol=1e-4, atol=1e-5, equal_nan=True, check_dtype=False
        )
    assert expected
    return found


def pairs(model: Any, n: int = 3) -> Task:
    """Pairs whose positions fall into two spans."""
    task = model_zoo.pairs(model, n)
    values = vars(task) | {"span_names": ("first", "rest")}
    return Task(**(values | {"spans": [(torch.arange(len(c)) > 1).long() for c in task.clean]}))


# ------------------------------------------------------------------------------ the device itself

REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "two devices": lambda x, there: x + there,
    "a number there": lambda x, there: x + there.sum(),
    "in place": lambda x, there: x.add_(there),
    "cat": lambda x, there: torch.cat([x, there]),
    "product": lambda x, there: x @ there,
    "out": lambda x, there: torch.mm(there, there, out=torch.empty(2, 2)),
    "index": lambda x, there: x[torch.tensor([0], device="cuda")],
    "mask": lambda x, there: x[there > 0],
    "value": lambda x, there: there.index_put_((torch.tensor([0]),), x[0]),
    "numpy": lambda x, there: there.numpy(),
    "generator": lambda x, there: there.normal_(generator=torch.Generator()),
    "integers": lambda x, there: there.long() @ there.long(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_device_refuses_what_a_gpu_refuses(name: str) -> None:
    with OtherDevice():
        x, there = torch.ones(2, 2), torch.ones(2, 2, device="cuda")
        with pytest.raises((RuntimeError, TypeError)):
            REFUSED[name](x, there)


def test_the_mark_goes_wherever_the_memory_goes() -> None:
    with OtherDevice() as device:
        linear = torch.nn.Linear(3, 3).to("cuda")
        optimizer = torch.optim.AdamW(linear.parameters())
        x = torch.ones(3, requires_grad=True)
        (linear(x.to("cuda")) * 2.0 + torch.tensor(1.0)).softmax(0)[0].backward()
        optimizer.step()
        weight = linear.weight
        there = [weight.data, weight.grad, weight[0], weight.T.detach(), weight.new_zeros(2)]
        there += [optimizer.state[weight]["exp_avg"], torch.zeros_like(weight)]
        assert {t.device for t in there} == {GPU}
        assert {t.device for t in (x.grad, weight.cpu(), torch.zeros(2))} == {CPU}
        assert linear.weight.is_cuda and weight.device.type == "cuda"
    assert sum(device.waits.values()) == 4  # weight, bias and x to the device, the weight back


# ------------------------------------------------------------------------------------- the package


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "ablation", ["counterfactual", "zero", "zero-with-biases", "mean-positional"]
)
def test_masked_runs_and_their_gradients(name: str, ablation: str) -> None:
    model = model_zoo.build(name)
    clean, other = model_zoo.tokens(model, 2, 6, 0), model_zoo.tokens(model, 2, 6, 1)
    mask = torch.rand(EdgeGraph.from_model(model).n_edges, generator=torch.Generator())
    given: dict[str, Any] = {"ablation": ablation}
    given |= {"corrupted": other} if ablation == "counterfactual" else {}
    given |= {"prompts": other} if ablation.startswith("mean") else {}

    def run() -> list[Tensor]:
        device = next(model.parameters()).device
        z = mask.to(device).detach().clone().requires_grad_()
        with masked(model, z, **given):
            logits = model(clean.to(device))
            logits.logsumexp(-1).sum().backward()
        assert z.grad is not None and logits.device == z.grad.device == device
        return [logits, z.grad]

    same_on_both(model, run)


RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "recompute": {"recompute": True},
    "nodes": {"node_masks": True, "controller": Lagrangian(), "node_controller": Lagrangian(0.3)},
    "spans": {"positions": "span"},
    "neurons": {"neurons": "mlp", "n_neurons": 9},
    "optimal": {"ablation": "optimal"},
    "bfloat16": {"dtype": torch.bfloat16},
}
OF_ALL = ("default", "recompute")
SLOW_RUNS = ((MODELS[0], "recompute"), (MODELS[1], "default"), (SMALL, "nodes"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(
            name,
            settings,
            id=f"{name}-{label}",
            marks=[pytest.mark.slow] * ((name, label) in SLOW_RUNS),
        )
        for name in [*MODELS, SMALL]
        for label, settings in RUNS.items()
        if (label in OF_ALL) == (name in MODELS)
    ],
)
def test_edge_pruning(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = model_zoo.build(name)
    task = pairs(model)

    def fit() -> list[Any]:
        result = EdgePruner(20, **(RUN | settings)).fit(model, task)
        found = [result.log_alpha, result.history]
        if result.constants is not None:
            found += [result.constants.inputs, result.constants.z]
        if result.neuron_log_alpha is not None:
            found.append(result.neuron_log_alpha)
        assert all(place_of(t) == CPU for t in found if isinstance(t, Tensor))
        result.circuit.save(tmp_path / "circuit.json")
        assert Circuit.load(tmp_path / "circuit.json") == result.circuit
        result.scores.save(tmp_path / "scores.safetensors")
        assert EdgeScores.load(tmp_path / "scores.safetensors").tensor.equal(result.log_alpha)
        return found

    same_on_both(model, fit)


def test_the_paper_s_run() -> None:
    model = model_zoo.build(SMALL)
    run = EdgePruner.paper(20, **RUN)
    same_on_both(model, lambda: run.fit(model, pairs(model)).log_alpha)


@pytest.mark.parametrize("recompute", [False, True], ids=["whole", "recompute"])
def test_a_model_on_the_cpu_runs_on_the_device_and_comes_back(recompute: bool) -> None:
    model = model_zoo.build(SMALL)
    task, before = pairs(model), {n: p.data_ptr() for n, p in model.named_parameters()}
    there, here = (
        EdgePruner(20, **RUN, recompute=recompute, device=device) for device in ("cuda", None)
    )
    expected = here.fit(model, task).log_alpha
    with OtherDevice():
        torch.testing.assert_close(there.fit(model, task).log_alpha, expected)
        assert {place_of(p) for p in model.parameters()} == {CPU}
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_a_run_goes_on_from_a_checkpoint_on_another_device(first: str, tmp_path: Path) -> None:
    model = model_zoo.build(SMALL)
    task, calls = pairs(model), [0]

    def stopped(logits: Tensor, full: Tensor, batch: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return kl(logits, full, batch)

    settings = RUN | {"init_scores": None, "checkpoint_every": 1, "objective": stopped}
    settings |= {"steps": 3}
    run = EdgePruner(20, **settings, checkpoint=tmp_path / "run.safetensors")
    with OtherDevice():
        model.to(first)
        assert len(run.fit(model, task).history) == 2
        model.to("cuda" if first == "cpu" else "cpu")
        resumed = run.fit(model, task, resume=run.checkpoint)
        model.to("cpu")
    calls[0] = 9
    expected = EdgePruner(20, **settings).fit(model, task)
    torch.testing.assert_close(resumed.log_alpha, expected.log_alpha)


@pytest.mark.parametrize("method", quick_first(METHODS))
def test_every_method(method: str) -> None:
    model = model_zoo.build(SMALL)
    settings: dict[str, Any] = dict(RUN) if METHODS[method].trained else {}
    settings |= {"n_edges": 20} if method == "edge-pruning" else {}
    settings |= {"threshold": 0.3} if method == "acdc" else {}
    settings |= {"steps": 2} if method in ("eap-ig", "eap-ig-activations", "mask-ig") else {}
    task = pairs(model, 2)

    def search() -> Tensor:
        found = discover(model, task, method, **settings)
        scores = found.mask if isinstance(found, Circuit) else found.tensor
        assert place_of(scores) == CPU
        return scores

    same_on_both(model, search)


LOOKS: dict[str, Callable[[Any, Task, EdgeScores], Any]] = {
    "evaluate": lambda m, t, s: evaluate(m, s.top(30), t),
    "compare": lambda m, t, s: (
        compare(
            m,
            t,
            t,
            ["eap", "random"],
            [9],
            progress=False,
            settings={"eap": {"objective": "logit-diff"}},
        )
        .table["kl"]
        .tolist()
    ),
    "eliminate": lambda m, t, s: eliminate(m, t, s, start=9, stop=8).tensor,
    "polish": lambda m, t, s: polish(m, t, s.top(30), rounds=2).mask,
    "explain": lambda m, t, s: explain(m, s.top(4), t),
    "completeness": lambda m, t, s: completeness(m, s.top(30), t, n_random=2),
    "minimality": lambda m, t, s: minimality(m, s.top(4), t),
    "equivalence": lambda m, t, s: equivalence_test(m, s.top(30), t),
    "independence": lambda m, t, s: independence_test(m, s.top(30), t, permutations=9),
    "minimality-test": lambda m, t, s: minimality_test(m, s.top(3), t, n_random=2),
    "curve": lambda m, t, s: faithfulness_curve(m, s, t, shares=(0.1, 0.5)),
    "stability": lambda m, t, s: stability(
        m, t, "eap", size=9, objective="logit-diff", bootstraps=2
    ),
    "constants": lambda m, t, s: evaluate(
        m, s.top(30), t, ablation=optimal_constants(m, t, s.top(30), steps=2, progress=False)
    ),
}


@pytest.mark.parametrize("look", quick_first(LOOKS))
def test_every_look_at_a_circuit(look: str) -> None:
    model = model_zoo.build(SMALL)
    task = pairs(model)
    scores = discover(model, task, "eap", objective="logit-diff")
    same_on_both(model, lambda: LOOKS[look](model, task, scores))


# ------------------------------------------------------------------------------------------- waits


def test_a_step_waits_for_the_device_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_zoo.build(SMALL)
    task, steps, own = model_zoo.pairs(model, 4), [], Trainer._step
    with moved(model) as device:

        def counted(self: Trainer, step: int) -> None:
            before = Counter(device.waits)
            own(self, step)
            steps.append(device.waits - before)

        monkeypatch.setattr(Trainer, "_step", counted)
        EdgePruner(20, **RUN, candidates=0).fit(model, task)
    # The shift to the budget asks at each of Newton's steps whether it is there
    # (training/gates.py); beside that the mask and the read positions are checked, and the loss and
    # the edges are noted.
    assert all(
        sum(n for line, n in waits.items() if not line.startswith("training/gates.py")) <= 5
        for waits in steps
    )


def attach_recomputed(model: Any, task: Task) -> None:
    with RecomputedModel.attach(model):
        pass


def look_for_cuts(model: Any, task: Task) -> None:
    with MaskedModel.attach(model) as run:
        assert isinstance(find_cuts(run, Targets(run, task), kl), PartialCuts)


@pytest.mark.parametrize("check", [attach_recomputed, look_for_cuts])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_check_that_runs_out_of_memory_says_nothing_about_the_model(
    check: Callable[[Any, Task], None], share: float
) -> None:
    model = model_zoo.build(SMALL)
    task = model_zoo.pairs(model, 2)
    with moved(model) as device:
        needed = allocations(device, lambda: check(model, task))
    model = model_zoo.build(SMALL)
    with moved(model) as device:
        device.most_allocations = device.allocations + int(share * needed)
        with pytest.raises(torch.OutOfMemoryError, match="is full"):
            check(model, task)
        device.most_allocations = None
        first, second = (allocations(device, lambda: check(model, task)) for _ in range(2))
    assert second < first  # nothing was remembered of the check that failed


def allocations(device: OtherDevice, work: Callable[[], object]) -> int:
    before = device.allocations
    work()
    return device.allocations - before


def test_partial_runs_do_not_ask_the_device_what_is_kept() -> None:
    model = model_zoo.build(SMALL)
    task = model_zoo.pairs(model, 2)
    with moved(model) as device, MaskedModel.attach(model) as run:
        cuts = find_cuts(run, Targets(run, task, max_bytes=0), kl)
        assert isinstance(cuts, PartialCuts)
        cuts.set(torch.ones(run.graph.n_edges, dtype=torch.bool))
        device.waits.clear()
        read = run.graph.reads[0]
        cuts.values(0, torch.eye(read.n_destinations, read.n_sources, dtype=torch.bool)[None])
    assert sum(device.waits.values()) == len(cuts.target_batches)  # each pair's objective
