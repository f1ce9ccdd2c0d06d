"""What every test shares: annotations checked at run time, one thread, no network, profiles.

HYPOTHESIS_PROFILE=all runs many examples of every property, drawn anew each time; the default, ci,
runs few and always the same.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("tl_edgeprune", "beartype.beartype")  # before anything imports the package

import pytest
import torch
from hypothesis import Phase, settings

torch.set_num_threads(1)
# Not Phase.explain: it traces every line, which takes a minute of a failing test.
phases = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
settings.register_profile("ci", max_examples=8, deadline=None, derandomize=True, phases=phases)
settings.register_profile("all", max_examples=40, deadline=None, phases=phases)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# What touches no TransformerLens class, or only what other tests look at on both: with
# TransformerLens 3 these are slow tests, since with TransformerLens 4 they run every time.
CLASSLESS = (
    *(
        "chance_warning",
        "hypothesis_tests",
        "cli",
        "cli_compare",
        "cli_config",
        "cli_discover",
        "cli_wrong",
    ),
    *("compare", "definitions", "demo", "distributed"),
    *("docs", "faithfulness", "local_folder", "full_disk", "killed", "packaging"),
    *("mib", "knockouts", "learned_constants", "gates", "measures", "objectives"),
    *("cost_model", "polish", "pruner", "report", "report_page", "residual", "roc", "scores"),
    "earlier_files",
    *("stability", "stream", "solved", "task_families", "task_tables", "trainer"),
    *("reading", "two_runs", "wrong_settings"),
)
# Of these, only what is of a HookedTransformer, or of both classes, is quick there.
HALF = (
    *("acdc", "evaluate", "explain", "ground_truth", "methods", "notebooks", "spans"),
    *("semi_synthetic", "neurons", "second_device", "tracr"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not version("transformer-lens").startswith("3."):
        return
    for item in items:
        stem = item.path.stem.removeprefix("test_")
        of_it = "hooked" in item.name or "both_classes" in item.name
        if stem in CLASSLESS or (stem in HALF and not of_it):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of fixtures: real weights, for tests only."""
    folder = os.environ.get("TL_EDGEPRUNE_FIXTURES")
    if not folder:
        pytest.skip("needs TL_EDGEPRUNE_FIXTURES, a folder that holds stories260K")
    return Path(folder)


@pytest.fixture(scope="session")
def stories(fixtures: Path) -> Any:
    """stories260K: a Llama of 260 K real parameters, as a TransformerBridge in float32."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = fixtures / "stories260K"
    hf_model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    return build_bridge_from_module(
        hf_model,
        "LlamaForCausalLM",
        hf_config=hf_model.config,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        model_name="stories260K",
    )


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama, for commands."""
    from support import command_line

    return command_line.model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gifts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of pairs that this Llama reads."""
    from support import command_line

    return command_line.task(tmp_path_factory.mktemp("gifts"))
