"""The experiments, methods and studies, by name.

The files of this folder are data, without logic; each is read here for what it has of EXPERIMENTS, METHODS and STUDIES,
lists, and PUBLISHED, numbers of a paper by method and experiment.
"""

import pkgutil
from importlib import import_module

# the quickstart first, then the papers: --exp=list shows them in this order, and figures' colours follow it
_NAMES = sorted(
    (file.name for file in pkgutil.iter_modules(__path__)),
    key=lambda name: (name != "quickstart", not name.startswith("paper"), name),
)
_FILES = [import_module(f"{__name__}.{name}") for name in _NAMES]


def _together(kind: str) -> dict:
    found = {}
    for file in _FILES:
        part = getattr(file, kind, ())
        for name, item in part.items() if isinstance(part, dict) else [(item.name, item) for item in part]:
            if name in found:
                raise ValueError(f"{name} stands twice among the {kind} of {__name__}; give one another name")
            found[name] = item
    return found


EXPERIMENTS = _together("EXPERIMENTS")
METHODS = _together("METHODS")
STUDIES = _together("STUDIES")
PUBLISHED = _together("PUBLISHED")
