"""Versions of the package and of the libraries that results depend on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__version__ = version("tl_edgeprune")


def versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    versions_of = {"tl_edgeprune": __version__}
    for name in ("transformer-lens", "transformers", "torch"):
        try:
            versions_of[name] = version(name)
        except PackageNotFoundError:
            versions_of[name] = "unknown"
    return versions_of
