"""The pages' code: its blocks, small stand-ins for the models that they name, and what is checked
of a block that is not run.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from support import model_zoo, tokenizer_models
from tl_edgeprune import EdgePruner, models, tasks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
LANGUAGES = ("python", "json", "yaml", "bash", "sh", "text")
NOT_RUN = "Not run in CI"  # what such a block's title begins with, for the reader to see
FENCE = re.compile(
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    line: int
    language: str
    title: str
    code: str

    @property
    def runs(self) -> bool:
        return self.language == "python" and not self.title.startswith(NOT_RUN)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            text[: match.start("code")].count("\n") + 1,
            match["language"],
            match["title"] or "",
            match["code"],
        )
        for match in FENCE.finditer(text)
    ]


def run(page: Path) -> None:
    """Run a page's blocks, in the working folder."""
    run_blocks(page, [b for b in blocks(page) if b.runs or (b.language == "json" and b.title)])


def run_blocks(page: Path, chosen: list[Block]) -> None:
    """Run blocks in one namespace; errors name the page's line. JSON is a file of its title."""
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in chosen:
        if block.language == "json":
            Path(block.title).write_text(block.code, encoding="utf-8")
        else:
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, str(page), "exec"), namespace)


# -------------------------------------------------------------------------------------- stand-ins


@functools.cache
def stand_in() -> Any:
    """A small random language model of 1,108 edges; its tokenizer has all tasks' words and single
    digits.
    """
    tokenizer = tokenizer_models.load("digits").tokenizer
    sizes = {"d_model": 16, "d_head": 4, "n_heads": 4, "n_layers": 6, "d_mlp": 16, "n_ctx": 256}
    config = sizes | {"d_vocab": len(tokenizer), "act_fn": "gelu_new", "normalization_type": "LN"}
    model = TransformerBridge.boot_native(config, dtype=torch.float32, device="cpu")
    model_zoo.randomise(model.original_model, seed=1)
    model.tokenizer = tokenizer
    return model.eval()


def shorten(monkeypatch: pytest.MonkeyPatch, *, stand_ins: tuple[str, ...], n: int) -> None:
    """Stand-ins for these models; with a language model tasks of at most n pairs and runs of two
    steps. Compiled programs are run as the page says. No progress bars.
    """
    load, load_task, stream = models.load, tasks.load, tasks.stream
    init, fit = EdgePruner.__init__, EdgePruner.fit

    def load_model(name: Any, **settings: Any) -> Any:
        return stand_in() if name in stand_ins else load(name, **settings)

    def load_fewer(name: str, model: Any, n_pairs: int = n, seed: int = 0, **options: Any) -> Any:
        wanted = options.pop("n", n_pairs)
        wanted = min(wanted, n) if speaks(model) else wanted
        return load_task(name, model, wanted, seed, **options)

    def stream_fewer(name: str, model: Any, n: int, seed: int = 0, **options: Any) -> Any:
        return stream(name, model, min(n, 64), seed, **options)

    @functools.wraps(init)
    def quiet(self: EdgePruner, *args: Any, **settings: Any) -> None:
        init(self, *args, **({"progress": False} | settings))

    @functools.wraps(fit)
    def fit_shorter(self: EdgePruner, model: Any, task: Any, **settings: Any) -> Any:
        if speaks(model):
            self.steps = min(self.steps, 2)
        return fit(self, model, task, **settings)

    monkeypatch.setattr(models, "load", load_model)
    if "smollm2-135m" in stand_ins:  # which solves nothing
        monkeypatch.setattr(tasks, "keep_solved", lambda model, task: task)
    monkeypatch.setattr(tasks, "load", load_fewer)
    monkeypatch.setattr(tasks, "stream", stream_fewer)
    monkeypatch.setattr(EdgePruner, "__init__", quiet)
    monkeypatch.setattr(EdgePruner, "fit", fit_shorter)
    if "gpt2" in stand_ins:
        monkeypatch.setattr(
            TransformerBridge, "boot_transformers", lambda name, **settings: stand_in()
        )


def speaks(model: Any) -> bool:
    return getattr(model, "tokenizer", None) is not None


# ---------------------------------------------------------------------------- what is not run


def check(code: str) -> None:
    """Raise for code that does not compile, imports what is not there, or calls a function of the
    package with arguments that it does not take.

    What a call returns is known where it is an instance of a class; what is not known is left out.
    """
    names: dict[str, Any] = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            _import(node, names)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = _found(node.value, names)
        elif isinstance(node, ast.Call):
            _bind(node, names)


def _import(node: ast.Import | ast.ImportFrom, names: dict[str, Any]) -> None:
    """Import what is the package's own; others may not be installed."""
    modules = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    if all(str(module).partition(".")[0] == "tl_edgeprune" for module in modules):
        exec(compile(ast.Module([node], []), "imports", "exec"), names)


def _found(node: ast.AST, names: dict[str, Any]) -> Any:
    """The object that an expression names; of an instance its class; None where it is unknown."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _found(node.value, names)
        known = inspect.isclass(owner) or isinstance(owner, ModuleType)
        if not known or node.attr in getattr(owner, "__annotations__", {}):
            return None
        return getattr(owner, node.attr)
    if isinstance(node, ast.Call):
        called = _found(node.func, names)
        return called if inspect.isclass(called) else None
    return None


def _bind(call: ast.Call, names: dict[str, Any]) -> None:
    called = _found(call.func, names)
    if not str(getattr(called, "__module__", "")).startswith("tl_edgeprune"):
        return
    own = isinstance(call.func, ast.Attribute) and _found(call.func.value, names)
    given = [None] * (len(call.args) + (inspect.isclass(own) and inspect.isfunction(called)))
    inspect.signature(called).bind(*given, **{k.arg: None for k in call.keywords if k.arg})
