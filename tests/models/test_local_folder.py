"""Models from a folder of safetensors, straight to a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import llama_folder, model_zoo

from tl_edgeprune import models
from tl_edgeprune.hooks.modules import all_parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_gives_the_model_that_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    original = llama_folder.llama(tmp_path, 40)
    loaded: Any = models.load(str(tmp_path), device="cpu", dtype=dtype)
    assert {p.dtype for p in all_parameters(loaded)} == {dtype}
    assert not any(p.is_meta for p in all_parameters(loaded))
    tokens = model_zoo.tokens(loaded)
    with torch.no_grad():
        expected = original(tokens).logits
        error = (loaded(tokens).float() - expected).norm() / expected.norm()
    assert float(error) < (1e-5 if dtype == torch.float32 else 0.05)


def test_stories(fixtures: Path, stories: Any) -> None:
    loaded: Any = models.load(str(fixtures / "stories260K"), device="cpu")
    tokens = torch.tensor([[1, 403, 407]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), stories(tokens))
    assert loaded.tokenizer is not None


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors"):
        models.load(str(tmp_path), device="cpu")
