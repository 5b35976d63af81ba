"""The end of a command: exit codes, tracebacks, and pipes."""

import os
import subprocess
import sys

import pytest


def run(main, stdout=subprocess.DEVNULL):
    """Run a command whose `main` is one statement, in a new process."""
    code = f"from jaxla.cli.process import run_command\ndef main(arguments): {main}\nrun_command(main)"
    return subprocess.run([sys.executable, "-u", "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.quick
def test_a_closed_stdout_ends_a_command_silently():
    """As in `... | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = run("print('a line')", writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("raise BrokenPipeError('another process')", "BrokenPipeError: another process"),
        ("open('nowhere.npy')", "FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.npy'"),
    ],
)
def test_a_programming_error_shows_its_traceback(statement, error):
    done = run(statement)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith(f"{error}\n")


@pytest.mark.quick
def test_bad_input_is_one_line():
    done = run("from jaxla.config import InputError, option; raise InputError(option('seed', 1), 'odd', 'Use 2.')")
    assert (done.returncode, done.stderr) == (2, "error: --seed=1: odd. Use 2.\n")
