"""Run commands as a user does, in this process or in a new one, and check that they refuse bad input in one line."""

import contextlib
import importlib
import io
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from jaxla.cli.process import run_command

ROOT = Path(__file__).parents[1]

# The options of the fixture `small_run`. Runs with the same options share its compiled programs.
SMALL_RUN_OPTIONS = ("--method=vit_mini8", "--preprocessing.image_size=48", "--training.epochs=3", "--seed=1")


def run_in_new_process(folder, module, *options, **environment):
    """Run `python -m <module> <options>` in `folder`, and return the finished process with its output as text."""
    command = [sys.executable, "-m", module, *map(str, options)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | environment, timeout=900
    )


def run_module(module, *options, check=True):
    """Run a command in a new process, in the current folder; it must succeed unless `check` is false."""
    done = run_in_new_process(None, module, *options)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_in_this_process(folder, module, *options):
    """Run a command like `run_in_new_process`, but in this process, which saves the startup time of Python and JAX.

    NumPy's warnings, which would add a line to stderr, are raised. The command must remove the handlers that it adds to
    the package's logger.
    """
    main = importlib.import_module(module).main
    package = logging.getLogger("jaxla")
    arguments, handlers, level = sys.argv, package.handlers[:], package.level
    sys.argv = [module, *map(str, options)]
    stdout = io.StringIO()
    terminal = logging.StreamHandler(stdout)  # pytest's handlers keep the command from adding its own
    package.addHandler(terminal)
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(io.StringIO()) as stderr,
            warnings.catch_warnings(action="error", category=RuntimeWarning),
            pytest.raises(SystemExit) as exit_info,
        ):
            run_command(main)
        assert package.handlers == [*handlers, terminal]
    finally:
        sys.argv, package.handlers[:] = arguments, handlers
        package.setLevel(level)
    return subprocess.CompletedProcess(sys.argv, exit_info.value.code, stdout.getvalue(), stderr.getvalue())


def succeed(folder, module, *options):
    """Run a command in this process and return what it printed and logged; it must succeed."""
    done = run_in_this_process(folder, module, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def snapshot(folder, ignored="cache"):
    """Return path -> content and modification time of each file (None for folders), without the top entry `ignored`."""
    paths = (path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != ignored)
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None for path in paths}


def refuse(folder, module, *options, run=run_in_this_process, ignored="cache"):
    """Run a command that must refuse its input, and return the one line that it prints.

    It must exit with code 2, without a traceback, and leave `folder`, except the entry `ignored`, unchanged.
    """
    before = snapshot(folder, ignored)
    done = run(folder, module, *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stdout
    assert snapshot(folder, ignored) == before
    return done.stderr.rstrip("\n")


def refuse_to_train(folder, *options, run=run_in_this_process):
    """Run `refuse` with the quickstart on the folder `data`; `options` override its options."""
    folders = [f"--data.root={folder / 'data'}", f"--cache-dir={folder / 'cache'}", f"--run-dir={folder / 'run'}"]
    names_experiment = any(option.startswith("--exp=") for option in map(str, options))
    experiment = () if names_experiment else ("--exp=quickstart", "--method=vit_mini8")
    return refuse(folder, "jaxla.train", *experiment, *folders, *options, run=run)


@contextlib.contextmanager
def hold_in_another_process(statements, *arguments):
    """Yield another Python process, which stays inside the context manager `hold` that `statements` define."""
    code = f"import sys; {statements}\nwith hold:\n print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"\n"
        yield process
        process.stdin.close()


def parse_bytes(text):
    """Return the number of bytes that a text such as `1.05kB` states; three digits are exact to 0.5 %."""
    number, unit = re.fullmatch(r"([\d.]+)([kMG]?)B", text).groups()
    return float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[unit]
