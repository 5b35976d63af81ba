"""The commands as a user runs them, and what every refusal must be."""

import contextlib
import importlib
import io
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from jaxla.cli.process import run_command

ROOT = Path(__file__).parents[1]


def in_a_new_process(folder, module, *options, **environment):
    """`python -m <module> <options>`, in `folder`; -> the process that ended, its output as text."""
    command = [sys.executable, "-m", module, *map(str, options)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | environment, timeout=900
    )


def run_module(module, *options, check=True):
    """The same in the folder of the tests; unless it need not, it must succeed."""
    done = in_a_new_process(None, module, *options)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def in_this_process(folder, module, *options):
    """The same without the seconds of starting Python and JAX; NumPy's warnings, a second line, are raised."""
    main = importlib.import_module(module).main
    log = logging.getLogger("jaxla")
    arguments, handlers, level = sys.argv, log.handlers[:], log.level
    sys.argv = [module, *map(str, options)]
    stdout = io.StringIO()
    log.addHandler(logging.StreamHandler(stdout))  # pytest's own keep the command's from being set up
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(io.StringIO()) as stderr,
            warnings.catch_warnings(action="error", category=RuntimeWarning),
            pytest.raises(SystemExit) as left,
        ):
            run_command(main)
    finally:
        sys.argv, log.handlers[:] = arguments, handlers
        log.setLevel(level)
    return subprocess.CompletedProcess(sys.argv, left.value.code, stdout.getvalue(), stderr.getvalue())


def tree(folder, but="cache"):
    """Everything in a folder but what is named so at its top, with contents and times of files."""
    paths = (path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != but)
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None for path in paths}


def refuse(folder, module, *options, run=in_this_process, but="cache"):
    """Run a command in `folder`; -> its one line of error, after checking that it left all but `but` as it was."""
    before = tree(folder, but)
    done = run(folder, module, *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stdout
    assert tree(folder, but) == before
    return done.stderr.rstrip("\n")


def refuse_to_train(folder, *options, run=in_this_process):
    """`refuse` for quickstart on the folder `data`; a later option of the same name wins."""
    places = [f"--data.root={folder / 'data'}", f"--cache-dir={folder / 'cache'}", f"--run-dir={folder / 'run'}"]
    return refuse(folder, "jaxla.train", "--exp=quickstart", *places, *options, run=run)
