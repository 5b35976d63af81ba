"""The lists of experiments and methods that `python -m jaxla.train --exp=list` prints."""

from __future__ import annotations

from jaxla.config import Method
from jaxla.experiments import EXPERIMENTS, METHODS
from jaxla.models.networks.base import parameter_count


def list_experiments(with_details: bool) -> str:
    """Return the experiments and methods as lines; with each method's parameters, input and recipe on request."""
    width = max(map(len, [*EXPERIMENTS, *METHODS]))
    lines = ["Experiments (--exp=NAME):"]
    lines += [f"  {e.name:{width}} {e.summary}; method {e.method.name}" for e in EXPERIMENTS.values()]
    lines += ["Methods (--method=NAME):"]
    for method in METHODS.values():
        lines.append(f"  {method.name:{width}} {method.summary}")
        if with_details:
            lines.append(f"  {'':{width}} {describe_method(method)}")
    return "\n".join(lines)


def describe_method(method: Method) -> str:
    """Return a method's parameters, input and recipe in one line."""
    recipe = method.training
    rate = f"{'Adam' if recipe.optimiser == 'adam' else 'SGD'} {recipe.learning_rate:g}"
    if method.model.needs_plan:
        return f"planned from the data; {rate}, {recipe.epochs} epochs of {recipe.steps} steps"
    size = method.preprocessing.image_size
    length = f"{recipe.minutes:g} minutes" if recipe.minutes else f"at most {recipe.epochs} epochs"
    return (
        f"{parameter_count(method.model) / 1e6:.1f} M parameters; {size}×{size} pixels; {rate}, {length}, "
        f"batches of {recipe.batch_size}"
    )
