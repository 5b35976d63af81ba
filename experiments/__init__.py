"""The experiments, methods and studies, by name.

Each file in this folder holds only data: lists named EXPERIMENTS, METHODS or STUDIES, and a dict PUBLISHED with a
paper's results by method and experiment. Its docstring gives the command, the time it takes and the expected result.
"""

import pkgutil
from importlib import import_module

# The quickstart comes first, then the papers: --exp=list and the colours of figures follow this order.
_NAMES = sorted(
    (file.name for file in pkgutil.iter_modules(__path__)),
    key=lambda name: (name != "quickstart", not name.startswith("paper"), name == "laptop", name),
)
_FILES = [import_module(f"{__name__}.{name}") for name in _NAMES]


def _collect(kind: str) -> dict:
    """Return the entries of one kind from all files, by name."""
    collected = {}
    for file in _FILES:
        entries = getattr(file, kind, ())
        for name, entry in entries.items() if isinstance(entries, dict) else [(e.name, e) for e in entries]:
            if name in collected:
                raise ValueError(f"{__name__}: two {kind} are named {name}. Rename one.")
            collected[name] = entry
    return collected


EXPERIMENTS = _collect("EXPERIMENTS")
METHODS = _collect("METHODS")
STUDIES = _collect("STUDIES")
PUBLISHED = _collect("PUBLISHED")
