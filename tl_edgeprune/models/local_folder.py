"""Loads a folder of safetensors, as transformers saves it, straight to the device.

The module is created on the meta device and filled tensor by tensor in the requested dtype, so that
a model larger than the machine's main memory can still be loaded to a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def is_model_folder(name: str) -> bool:
    """Whether the name is a folder with a transformers model."""
    return (Path(name) / "config.json").is_file()


def load_folder(folder: str | Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A TransformerBridge from a folder with a configuration and safetensors.

    Args:
        folder: its tokenizer is used, if it has one.
        device: of the weights.
        dtype: of the weights.

    Raises:
        FileNotFoundError: no safetensors in the folder (pickled weights are not read).
    """
    import transformers
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    folder = Path(folder)
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} has no *.safetensors: pickled weights are not read. Save the model with "
            "save_pretrained (safetensors is its default)."
        )
    module = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": torch.device(device)},
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
    )
    module.requires_grad_(False)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = None
    if has_tokenizer:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = build_bridge_from_module(
        module.eval(),
        architecture=type(module).__name__,
        hf_config=module.config,
        tokenizer=tokenizer,
        model_name=folder.name,
    )
    model.cfg.device = str(device)
    return model
