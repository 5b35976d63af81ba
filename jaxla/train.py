"""python -m jaxla.train --exp=NAME: train a method under a protocol, test it, and write the run's folder."""

from __future__ import annotations

import shlex

from jaxla.cli.command_line import named_experiment, parse_experiment
from jaxla.cli.process import run_command
from jaxla.distributed import join_processes
from jaxla.experiments import EXPERIMENTS, METHODS


def main(arguments: list[str]) -> None:
    """Train, test, report.

    Raises:
        InputError: anything wrong with the options, the data or the weights; all of it before training starts.
        Stopped: the process was asked to end; the message has the command to go on with.
    """
    exp = named_experiment(arguments).exp
    if exp == "list" or (exp is None and {"-h", "--help"} & set(arguments)):
        print("usage: python -m jaxla.train --exp=NAME [--option=value ...]; --exp=NAME --help shows every option")
        print(list_experiments(details=exp == "list"))
        return
    options = parse_experiment(arguments, EXPERIMENTS, METHODS)

    from jaxla.pipeline.checks import checked

    options = options._replace(experiment=checked(options.experiment))
    from jaxla.pipeline.cross_validation import run_experiment  # brings all that a run needs

    with join_processes(options.coordinator, options.processes, options.process, options.wait):
        run_experiment(options, shlex.join(["python", "-m", "jaxla.train", *arguments]))


def list_experiments(details: bool) -> str:
    """The experiments and methods; with each method's parameters, input and recipe where asked for details."""
    width = max(map(len, [*EXPERIMENTS, *METHODS]))
    lines = ["Experiments (--exp=NAME):"]
    lines += [f"  {e.name:{width}} {e.summary}; method {e.method}" for e in EXPERIMENTS.values()]
    lines += ["Methods (--method=NAME):"]
    if not details:
        return "\n".join([*lines, *(f"  {m.name:{width}} {m.summary}" for m in METHODS.values())])

    import jax

    from jaxla.models.build import is_planned, parameter_count

    jax.config.update("jax_platforms", "cpu")  # to count takes no GPU from others
    for method in METHODS.values():
        size, recipe = method.preprocessing.image_size, method.training
        lines.append(f"  {method.name:{width}} {method.summary}")
        rate = f"{'Adam' if recipe.optimiser == 'adam' else 'SGD'} {recipe.learning_rate:g}"
        if is_planned(method.model):
            about = f"planned from the data; {rate}, {recipe.epochs} epochs of {recipe.steps} steps"
        else:
            about = (
                f"{parameter_count(method.model) / 1e6:.1f} M parameters; {size}×{size} pixels; {rate}, at most "
                f"{recipe.epochs} epochs, batches of {recipe.batch_size}"
            )
        lines.append(f"  {'':{width}} {about}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
