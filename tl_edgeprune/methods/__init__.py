"""Discovery methods, one file each. `registry.discover` finds them by name.

A method's file has its definition, its paper and what it needs, and registers itself; the machinery
is in `attribution`, `training` and `search`. Every file of this folder is imported here.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
