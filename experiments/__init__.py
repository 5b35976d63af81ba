"""The experiments and methods, by name: data, no logic."""

from jaxla.experiments import paper1, quickstart

EXPERIMENTS = quickstart.EXPERIMENTS | paper1.EXPERIMENTS
METHODS = quickstart.METHODS | paper1.METHODS
