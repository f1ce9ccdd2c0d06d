"""Plug-ins: modules that register methods, measures or ablations from outside the package.

They are imported before a command runs: those that installed packages name as entry points of the
group `tl_edgeprune.plugins`, and those of --plugin (or of TL_EDGEPRUNE_PLUGINS, with spaces).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated

import typer

GROUP = "tl_edgeprune.plugins"
Plugin = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        envvar="TL_EDGEPRUNE_PLUGINS",
        help="A module or a .py file that registers methods, measures or ablations; may be "
        "repeated.",
    ),
]


def load_plugins(names: Iterable[str]) -> None:
    """Import all plug-ins. Raises ImportError for a name that is no module, and for no file."""
    for point in entry_points(group=GROUP):
        point.load()
    for name in names:
        if name.endswith(".py"):
            _import_file(Path(name))
            continue
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(f"--plugin {name}: no such module. Give a .py file?") from None


def _import_file(path: Path) -> None:
    name = f"{GROUP}.{path.stem}"
    if name in sys.modules:
        return
    spec = spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ImportError(f"--plugin {path}: no such file.")
    sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise
