"""The experiments, methods and studies, by name: data, no logic."""

from jaxla.experiments import paper1, quickstart

EXPERIMENTS = quickstart.EXPERIMENTS | paper1.EXPERIMENTS
METHODS = quickstart.METHODS | paper1.METHODS
STUDIES = paper1.STUDIES
PUBLISHED = paper1.PUBLISHED
