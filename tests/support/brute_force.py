"""Masked forward passes and path patching by definition: slow, obvious, one edge at a time.

The package computes x_i = r_i + sum_j z_ij (y_j - ref_j) with products over buffers and, where it
must, overwrites projected queries, keys and values. Nothing here does either:

1. A run calls `read(destination, own)` for the residual input of each destination, `own` being what
   the model itself would read there, and puts what comes back in its place; it calls
   `write(source, y)` for what each source adds to the residual stream.
2. Where TransformerLens can split a block's inputs, the run uses its own hook points for them
   (`hook_q_input`, ..., `hook_mlp_in`, and `hook_result` for the heads).
3. Where it cannot (boot_native, GPT-J, GPT-Neo, OPT), the run hooks the modules: the projection's
   output is put together from one whole norm and projection per head, each on that head's input.
4. At the end every destination was read once and every source written once, or the run raises.

Gradients flow from the logits to masks and replacements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[str, Tensor], Tensor]  # (destination, its own input) -> its input
Write = Callable[[str, Tensor], None]  # (source, its contribution)

# ------------------------------------------------------------------------------------------- names


def n_kv_heads(model: Any) -> int:
    return model.cfg.n_key_value_heads or model.cfg.n_heads


def _head_names(model: Any, layer: int, which: str) -> list[str]:
    heads = [f"a{layer}.h{head}<{which}>" for head in range(model.cfg.n_heads)]
    if which == "q" or n_kv_heads(model) == model.cfg.n_heads:
        return heads
    return [f"a{layer}.kv{group}<{which}>" for group in range(n_kv_heads(model))]


def reads(model: Any) -> dict[str, list[str]]:
    """The sources that each destination reads, destinations and sources in the order of the run."""
    cfg = model.cfg
    before, result = ["input"], {}
    for layer in range(cfg.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(cfg.n_heads)]
        for which in "qkv":
            for name in _head_names(model, layer, which):
                result[name] = list(before)
        if not cfg.attn_only:
            result[f"m{layer}"] = before + ([] if cfg.parallel_attn_mlp else heads)
        before = before + heads + ([] if cfg.attn_only else [f"m{layer}"])
    result["logits"] = before
    return result


def sources(model: Any) -> list[str]:
    return reads(model)["logits"]


def destinations(model: Any) -> list[str]:
    return list(reads(model))


def edges(model: Any) -> list[str]:
    return [f"{src}->{dst}" for dst, prefix in reads(model).items() for src in prefix]


def biases_before(model: Any, destination: str) -> int:
    """How many blocks have added their b_O to what a destination reads: those of layers < this."""
    if destination == "logits":
        return model.cfg.n_layers
    layer = int(destination.split(".")[0][1:])
    own_block = destination.startswith("m") and not model.cfg.parallel_attn_mlp
    return layer + own_block


# ------------------------------------------------------------------------------- what to read where


def is_bridge(model: Any) -> bool:
    return hasattr(model, "original_model")


def output_biases(model: Any) -> list[Tensor]:
    """b_O of every block, [d_model] each: zeros where the model has none."""
    biases = []
    for block in model.blocks:
        bias = block.attn.o.original_component.bias if is_bridge(model) else block.attn.b_O
        biases.append(torch.zeros(model.cfg.d_model) if bias is None else bias)
    return biases


def _post_norm(model: Any, layer: int) -> nn.Module | None:
    """The norm between the sum of the heads and the residual stream, if there is one."""
    block = model.blocks[layer]
    if not is_bridge(model):
        after = model.cfg.original_architecture in ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
        return block.ln1 if after else getattr(block, "ln1_post", None)
    owner = block.hook_aliases["hook_attn_out"].split(".")[0]  # ln1 for OLMo 2 on 3.9
    return None if owner == "attn" else getattr(block, owner).original_component


def _normed(contributions: list[Tensor], bias: Tensor, norm: nn.Module) -> list[Tensor]:
    """Each head's share of an RMS norm of their sum: the scale is one of the sum, for all heads."""
    total = sum(contributions) + bias
    epsilon = next(
        getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)
    )
    scale = (total.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    weight = norm(torch.full_like(total[0, 0], 1e6))  # weights or 1 + weights: on equal entries
    return [y * scale * weight for y in contributions]


def _write_heads(model: Any, layer: int, contributions: list[Tensor], write: Write) -> None:
    norm = _post_norm(model, layer)
    if norm is not None:
        contributions = _normed(contributions, output_biases(model)[layer], norm)
    for head, y in enumerate(contributions):
        write(f"a{layer}.h{head}", y)


# --------------------------------------------------------------------------------- the two ways in

_FLAGS = ("use_split_qkv_input", "use_attn_result", "use_hook_mlp_in")


@contextmanager
def _split_inputs(model: Any) -> Iterator[None]:
    """TransformerLens' own split inputs; raises NotImplementedError where it refuses them."""
    flags = [flag for flag in _FLAGS if not (model.cfg.attn_only and flag == "use_hook_mlp_in")]
    before = {flag: bool(getattr(model.cfg, flag)) for flag in flags}
    try:
        for flag in flags:
            getattr(model, f"set_{flag}")(True)
        yield
    finally:
        for flag in reversed(flags):
            getattr(model, f"set_{flag}")(before[flag])


def can_split(model: Any) -> bool:
    try:
        with _split_inputs(model):
            return True
    except NotImplementedError:
        return False


def _run_split(model: Any, tokens: Tensor, read: Read, write: Write) -> Tensor:
    cfg, bridge = model.cfg, is_bridge(model)

    def read_heads(layer: int, which: str) -> Callable:
        def hook(own: Tensor, hook: Any) -> Tensor:  # [batch, pos, head, d_model]
            names = _head_names(model, layer, which)
            assert own.shape[2] == len(names), (hook.name, own.shape)
            return torch.stack([read(name, own[:, :, h]) for h, name in enumerate(names)], dim=2)

        return hook

    def write_heads(layer: int) -> Callable:
        def hook(result: Tensor, hook: Any) -> None:  # [batch, pos, head, d_model]
            assert result.shape[2] == cfg.n_heads, (hook.name, result.shape)
            _write_heads(model, layer, list(result.unbind(dim=2)), write)

        return hook

    def read_one(name: str) -> Callable:
        return lambda own, hook: read(name, own)

    def write_one(name: str) -> Callable:
        return lambda y, hook: write(name, y)

    hooks = [("blocks.0.hook_in" if bridge else "blocks.0.hook_resid_pre", write_one("input"))]
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        for which in "qkv":
            point = f"{block}.attn.hook_{which}_input" if bridge else f"{block}.hook_{which}_input"
            hooks.append((point, read_heads(layer, which)))
        hooks.append((f"{block}.attn.hook_result", write_heads(layer)))
        if not cfg.attn_only:
            hooks.append((f"{block}.hook_mlp_in", read_one(f"m{layer}")))
            hooks.append((f"{block}.hook_mlp_out", write_one(f"m{layer}")))
    last = "ln_final.hook_in" if bridge else f"blocks.{cfg.n_layers - 1}.hook_resid_post"
    hooks.append((last, read_one("logits")))
    with _split_inputs(model):
        return model.run_with_hooks(tokens, fwd_hooks=hooks)


def _run_modules(model: Any, tokens: Tensor, read: Read, write: Write) -> Tensor:
    """As `_run_split`, with torch's hooks on a Bridge's modules. `.forward` bypasses the hooks."""
    cfg, shape = model.cfg, (*tokens.shape, model.cfg.d_model)
    handles, block_input = [], {}

    def before(module: nn.Module, hook: Callable[[Tensor], Tensor | None]) -> None:
        def pre_hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            given = args[0] if args else kwargs.pop("hidden_states")
            new = hook(given.reshape(shape) if given.shape[-1] == cfg.d_model else given)
            return (given if new is None else new.reshape(given.shape), *args[1:]), kwargs

        handles.append(module.register_forward_pre_hook(pre_hook, with_kwargs=True))

    def after(module: nn.Module, hook: Callable[[Tensor], Tensor | None]) -> None:
        handles.append(module.register_forward_hook(lambda module, args, output: hook(output)))

    def hook_block(layer: int) -> None:
        block = model.blocks[layer]
        attn, norm = block.attn, block.ln1.original_component

        def project(which: str) -> Callable[[Tensor], Tensor]:
            linear, names = (
                getattr(attn, which).original_component,
                _head_names(model, layer, which),
            )

            def hook(own: Tensor) -> Tensor:
                parts = []
                for head, name in enumerate(names):
                    x = read(name, block_input[layer])
                    columns = slice(head * cfg.d_head, (head + 1) * cfg.d_head)
                    parts.append(linear.forward(norm(x))[..., columns])
                return torch.cat(parts, dim=-1)

            return hook

        def heads(z: Tensor) -> None:
            weight = attn.o.original_component.weight  # [d_model, n_heads * d_head]
            columns = [slice(h * cfg.d_head, (h + 1) * cfg.d_head) for h in range(cfg.n_heads)]
            _write_heads(model, layer, [z[..., c] @ weight[:, c].T for c in columns], write)

        before(block, lambda x: block_input.__setitem__(layer, x))
        for which in "qkv":
            after(getattr(attn, which).original_component, project(which))
        before(attn.o.original_component, heads)
        if cfg.attn_only:
            return
        if hasattr(block, "ln2"):
            before(block.ln2, lambda own: read(f"m{layer}", own))
        else:  # GPT-J: one norm for attention and MLP
            before(block.mlp, lambda own: norm(read(f"m{layer}", block_input[layer])))
        last = block.mlp.out.original_component
        after(last, lambda y: write(f"m{layer}", y.reshape(shape)))

    before(model.blocks[0], lambda x: write("input", x))
    for layer in range(cfg.n_layers):
        hook_block(layer)
    before(model.ln_final, lambda own: read("logits", own))
    try:
        return model(tokens)
    finally:
        for handle in handles:
            handle.remove()


def run(model: Any, tokens: Tensor, read: Read, write: Write) -> Tensor:
    """One forward with every destination's input replaced by `read`, every source told to `write`.

    Returns the logits, [batch, pos, vocab].
    """
    read_names, written_names = [], []

    def counted_read(name: str, own: Tensor) -> Tensor:
        read_names.append(name)
        x = read(name, own)
        assert x.shape == own.shape == (*tokens.shape, model.cfg.d_model), (
            name,
            x.shape,
            own.shape,
        )
        return x

    def counted_write(name: str, y: Tensor) -> None:
        written_names.append(name)
        write(name, y)

    # With one norm for attention and MLP (Phi-2), a split Bridge has no hook_mlp_in.
    one_norm = model.cfg.parallel_attn_mlp and not hasattr(model.blocks[0], "ln2")
    way = _run_modules if one_norm or not can_split(model) else _run_split
    logits = way(model, tokens, counted_read, counted_write)
    if sorted(read_names) != sorted(destinations(model)):
        raise AssertionError(f"read {read_names}, expected {destinations(model)}, each once")
    if sorted(written_names) != sorted(sources(model)):
        raise AssertionError(f"written {written_names}, expected {sources(model)}, each once")
    return logits


# ------------------------------------------------------------------------------------------ surface


def source_outputs(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """What each source adds to the stream in the model's own run, [batch, pos, d_model] each."""
    outputs: dict[str, Tensor] = {}
    run(model, tokens, lambda name, own: own, outputs.__setitem__)
    return outputs


def mean_outputs(
    model: Any, prompts: Tensor | Sequence[Tensor], *, positional: bool = False
) -> dict[str, Tensor]:
    """The mean of each source over prompts: [1, 1, d_model] over prompts and positions alike, or
    [1, pos, d_model] over prompts at each position (then all have one length)."""
    runs = [source_outputs(model, prompt.reshape(1, -1)) for prompt in prompts]
    means = {}
    for name in sources(model):
        if positional:
            means[name] = torch.stack([outputs[name] for outputs in runs]).mean(0)
        else:
            means[name] = torch.cat([o[name] for o in runs], dim=1).mean(1, keepdim=True)
    return means


def zero_outputs(model: Any) -> dict[str, Tensor]:
    """Zero ablation's replacement: [1, 1, d_model] of zeros for each source."""
    zero = torch.zeros(1, 1, model.cfg.d_model, dtype=output_biases(model)[0].dtype)
    return {name: zero for name in sources(model)}


def path_patch(
    model: Any, clean: Tensor, removed_edge: str, replacement: Mapping[str, Tensor]
) -> Tensor:
    """The clean run's logits where one destination reads one source's replacement instead of it."""
    source, destination = removed_edge.split("->")
    if removed_edge not in edges(model):
        raise ValueError(f"no edge {removed_edge!r} in this model")
    difference = replacement[source] - source_outputs(model, clean)[source]

    def read(name: str, own: Tensor) -> Tensor:
        return own + difference if name == destination else own

    return run(model, clean, read, lambda name, y: None)


def masked_logits(
    model: Any,
    clean: Tensor,
    mask: Mapping[str, float | Tensor],
    replacement: Mapping[str, Tensor],
    reference_bias: Sequence[Tensor] | None = None,
    gated: Callable[[str, Tensor], Tensor] = lambda name, y: y,
) -> Tensor:
    """Logits of x_i = sum_j z_ij y_j + (1 - z_ij) ref_j + sum of b_O before i, at every i.

    y_j is what source j gives in this same masked run (after `gated`, which may change it). mask:
    one number per edge's name, kept whole (1) where it has none. reference_bias: b_O of each block,
    the model's own by default.
    """
    unknown = set(mask) - set(edges(model))
    if unknown:
        raise ValueError(f"no such edges in this model: {sorted(unknown)[:5]}")
    biases = output_biases(model) if reference_bias is None else reference_bias
    prefixes, written = reads(model), {}

    def read(destination: str, own: Tensor) -> Tensor:
        x = torch.zeros_like(own)
        for layer in range(biases_before(model, destination)):
            x = x + biases[layer]
        for source in prefixes[destination]:
            z = mask.get(f"{source}->{destination}", 1.0)
            x = x + z * written[source] + (1 - z) * replacement[source]
        return x

    return run(model, clean, read, lambda name, y: written.__setitem__(name, gated(name, y)))
