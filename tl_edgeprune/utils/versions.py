"""Versions of the package and of the libraries that results depend on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__version__ = version("tl_edgeprune")


def versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    library_versions = {"tl_edgeprune": __version__}
    for name in ("transformer-lens", "transformers", "torch"):
        try:
            library_versions[name] = version(name)
        except PackageNotFoundError:
            library_versions[name] = "unknown"
    return library_versions
