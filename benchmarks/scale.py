"""Memory and time of a step with recomputation at a named model's shape, measured and planned.

    python benchmarks/scale.py [gpt2 | llama-3-8b | codellama-13b | …] [--pairs 32] [--pos 64]
        [--device cuda] [--dtype bfloat16] [--steps 5] [--out results/scale.jsonl]

The weights are random and made on the device. Prints edges, bytes of each buffer, seconds per
step, tokens per second and peak memory: on a GPU the allocator's peak, otherwise the counted bytes
of live tensors (in an extra step, since counting takes time) plus the weights. --out appends the
result to a file as a line of JSON, with the date, the CPU or GPU, and the versions.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_edgeprune.forward.cost_model import Shape, Work, find_shape, step_bytes, step_floor
from tl_edgeprune.forward.recompute import RecomputedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.modules import all_parameters
from tl_edgeprune.training.gates import sample_gates
from tl_edgeprune.utils.profiling import LiveBytes
from tl_edgeprune.utils.versions import versions


def config_of(shape: Shape) -> transformers.PretrainedConfig:
    """transformers' configuration of a shape: GPT-2's, or Llama's for gated MLPs."""
    if not shape.gated:
        return transformers.GPT2Config(
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_embd=shape.d_model,
            n_inner=shape.d_mlp,
            n_positions=shape.n_ctx,
            vocab_size=shape.d_vocab,
        )
    return transformers.LlamaConfig(
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        hidden_size=shape.d_model,
        head_dim=shape.d_head,
        intermediate_size=shape.d_mlp,
        vocab_size=shape.d_vocab,
        tie_word_embeddings=shape.tied,
    )


def random_model(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """A TransformerBridge with random weights, made on the device in this dtype."""
    config = config_of(shape)
    config._attn_implementation = "eager"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = transformers.AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)
    name = type(module).__name__
    config.architectures = [name]
    module.requires_grad_(False)
    model = build_bridge_from_module(
        module, architecture=name, hf_config=config, tokenizer=None, model_name=shape.name
    )
    model.cfg.device = device
    return model


class Steps:
    """Training steps on random tokens: gates drawn, reference recorded, forward, backward, Adam."""

    def __init__(self, run: RecomputedModel, work: Work, vocab: int, device: str) -> None:
        self.run, self.work = run, work
        shape = (work.pairs, work.pos)
        self.clean, self.corrupted = torch.randint(vocab, (2, *shape), device=device)
        self.positions = torch.full((work.pairs, work.reads), work.pos - 1, device=device)
        self.log_alpha = torch.zeros(run.graph.n_edges, device=device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.log_alpha], lr=0.3)
        self.generator = torch.Generator().manual_seed(0)
        self.target = run.record(self.clean, self.positions)[1].float().log_softmax(-1)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        reference = self.run.reference("counterfactual", corrupted=self.corrupted)
        mask = sample_gates(self.log_alpha, self.generator)
        logits = self.run(self.clean, mask, reference, self.positions)
        ours = logits.float().log_softmax(-1)
        (self.target.exp() * (self.target - ours)).sum(-1).mean().backward()
        self.optimizer.step()


def measure(
    shape: Shape, work: Work, device: str, dtype: torch.dtype, steps: int
) -> dict[str, Any]:
    """Median seconds per step, peak bytes including the weights, and the number of edges."""
    model = random_model(shape, dtype, device)
    weights = sum(p.numel() * p.element_size() for p in set(all_parameters(model)))
    with RecomputedModel.attach(model, EdgeGraph.from_model(model)) as run:
        step = Steps(run, work, shape.d_vocab, device)
        counted = 0
        run.release_buffers()
        counting: AbstractContextManager[Any] = nullcontext()
        if device == "cpu":
            counting = live = LiveBytes()
        else:
            torch.cuda.reset_peak_memory_stats()
        with counting:
            step()
        if device == "cpu":
            states = 3 * step.log_alpha.numel() * 4  # made before the count: log alpha and moments
            counted = live.peak + weights + states
        times = [_seconds(step, device) for _ in range(steps)]
        peak = counted if device == "cpu" else torch.cuda.max_memory_allocated()
    return {"edges": run.graph.n_edges, "seconds": statistics.median(times), "peak": peak}


def _seconds(step: Steps, device: str) -> float:
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", nargs="?", default="tiny-llama", type=find_shape)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--pos", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, help="append the result to this JSON-lines file")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    work = Work(options.pairs, options.pos, element=dtype.itemsize, on_gpu=options.device != "cpu")
    shape, planned = options.shape, step_bytes(options.shape, work)
    print(f"{shape.name}: {shape.graph.n_edges:,} edges, {work.pairs} pairs of {work.pos} tokens")
    for name, size in planned.items():
        print(f"  {name:12}{size / 1e9:12.4f} GB")
    print(f"  {'planned':12}{sum(planned.values()) / 1e9:12.4f} GB", flush=True)
    found = measure(shape, work, options.device, dtype, options.steps)
    assert found["edges"] == shape.graph.n_edges, found
    print(f"  {'measured':12}{found['peak'] / 1e9:12.4f} GB at the peak")
    print(f"  {found['seconds']:.3f} s per step, {2 * work.rows / found['seconds']:,.0f} tokens/s")
    print(f"  {step_floor(shape, work).operations / found['seconds'] / 1e12:.3f} TFLOP/s")
    if options.out is not None:
        asked = {"shape": shape.name, "dtype": options.dtype, **asdict(work)}
        line = asked | found | {"planned": sum(planned.values())} | machine(options.device)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def machine(device: str) -> dict[str, Any]:
    """Date, hardware and versions."""
    name = platform.processor() or platform.machine()
    if device != "cpu":
        name = torch.cuda.get_device_name(device)
    return {"date": date.today().isoformat(), "device": name, "versions": versions()}


if __name__ == "__main__":
    main()
