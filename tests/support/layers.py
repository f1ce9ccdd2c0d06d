"""The layers of the package: a lower one never imports a higher one.

The one place that has the table. `docs/design.md` shows it (`python tests/support/layers.py` prints
it), and `test_layers.py` holds the imports to it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = "tl_edgeprune"
# From the lowest to the highest. What stands in one layer does not import each other.
LAYERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("utils",), "files, locks, versions, measurements"),
    (("graph", "distributed"), "names, order and counts of edges; processes"),
    (("circuits", "siit", "counts"), "results and their files; known causal models"),
    (("models",), "models by name"),
    (("tasks",), "prompt pairs"),
    (("objectives",), "losses"),
    (("hooks",), "where a TransformerLens model is hooked, how heads are read, what is refused"),
    (("ablation", "sharding"), "what a removed edge carries; weights over processes"),
    (("forward",), "the masked forward pass"),
    (("runs",), "a task's pairs through the masked model: targets, totals, state on disk"),
    (("attribution",), "scores from the mask's gradient"),
    (("training", "search"), "Edge Pruning; cuts: ACDC's searches, elimination, polish"),
    (("methods",), "one file per method, and the registry"),
    (("evaluation",), "how good a circuit is, and what each edge does"),
    (("report",), "pictures"),
    (("commands",), "what the command line does"),
    (("cli",), "the command line"),
    (("__init__", "__main__"), "the public names"),
)
# The doors: what a user finds on an object though a higher layer does it, imported when called.
DOORS = {
    ("graph.edge_graph", "hooks.find"): "EdgeGraph.from_model",
    ("circuits.circuit", "report"): "Circuit.report, .draw and .to_dot",
    ("circuits.circuit", "report.circuit.html_page"): "a circuit in a notebook",
    ("evaluation.comparison", "report"): "Comparison.plot",
}


class Import(NamedTuple):
    """A file of the package, and one that it imports. `where`: "module", "function" or "typing"."""

    importer: str
    imported: str
    where: str


def files() -> dict[str, Path]:
    """The package's files by dotted name, without the package's own."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> Iterator[Import]:
    """Every import of one file of the package by another, of whatever kind."""
    known = files()
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node, where in _imports_in(tree, "module"):
            for imported in _targets(node, known):
                if imported != name:
                    yield Import(name, imported, where)


def late_imports() -> Iterator[tuple[str, str]]:
    """Every door: a file, and the module that `late(…)` imports there."""
    for name, path in files().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "late":
                module = node.args[0]
                assert isinstance(module, ast.Constant), f"{name}: late() takes a constant"
                yield name, str(module.value).removeprefix(f"{PACKAGE}.")


def rank(name: str) -> int:
    """The layer of a file. Raises KeyError for one that is in none."""
    top = name.partition(".")[0]
    for index, (packages, _) in enumerate(LAYERS):
        if top in packages:
            return index
    raise KeyError(f"{name} is in no layer: add {top} to LAYERS")


def circles(arrows: set[tuple[str, str]]) -> list[set[str]]:
    """The strongly connected sets of more than one node."""
    after: dict[str, set[str]] = {}
    for start, end in arrows:
        after.setdefault(start, set()).add(end)
    reached = {node: _reached(node, after) for node in after}
    found: list[set[str]] = []
    for node in sorted(after):
        circle = {other for other in reached[node] if node in reached.get(other, ())}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def table() -> str:
    """The layers as a table of Markdown, the lowest first."""
    rows = ["| layer | packages | what for |", "|---|---|---|"]
    for index, (packages, purpose) in enumerate(LAYERS, start=1):
        names = ", ".join(f"`{name}`" for name in packages)
        rows.append(f"| {index} | {names} | {purpose} |")
    return "\n".join(rows)


def _imports_in(node: ast.AST, where: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, where
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _imports_in(child, "function")
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports_in(child, "typing")
        else:
            yield from _imports_in(child, where)


def _targets(node: ast.Import | ast.ImportFrom, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif node.module == PACKAGE:
        names = [f"{PACKAGE}.{alias.name}" for alias in node.names]
    else:
        names = [
            f"{node.module}.{alias.name}"
            if f"{node.module}.{alias.name}".removeprefix(f"{PACKAGE}.") in known
            else str(node.module)
            for alias in node.names
        ]
    for name in names:
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            inside = name.removeprefix(PACKAGE).removeprefix(".")
            yield inside if inside in known else "__init__"


def _reached(start: str, after: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    stack = [start]
    while stack:
        for node in after.get(stack.pop(), ()):
            if node not in found:
                found.add(node)
                stack.append(node)
    return found


if __name__ == "__main__":
    print(table())
