"""The experiments, methods and studies, by name: data, no logic.

Every file of this folder is read, for what it has of EXPERIMENTS, METHODS and STUDIES, lists, and PUBLISHED, numbers
of a paper by method and experiment.
"""

import pkgutil
from importlib import import_module

# the quickstart first: --exp=list shows them in this order
_NAMES = sorted((file.name for file in pkgutil.iter_modules(__path__)), key=lambda name: (name != "quickstart", name))
_FILES = [import_module(f"{__name__}.{name}") for name in _NAMES]


def _by_name(kind: str) -> dict:
    found = {}
    for item in (item for file in _FILES for item in getattr(file, kind, ())):
        if item.name in found:
            raise ValueError(f"{item.name} stands twice among the {kind} of {__name__}; give one another name")
        found[item.name] = item
    return found


EXPERIMENTS = _by_name("EXPERIMENTS")
METHODS = _by_name("METHODS")
STUDIES = _by_name("STUDIES")
PUBLISHED = {}
for _file in _FILES:
    if twice := PUBLISHED.keys() & (_published := getattr(_file, "PUBLISHED", {})).keys():
        raise ValueError(f"{min(twice)} stands twice among the PUBLISHED of {__name__}")
    PUBLISHED |= _published
