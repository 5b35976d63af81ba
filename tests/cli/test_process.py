"""A command as a process: what ends it."""

import os
import subprocess
import sys


def run(main, stdout):
    code = f"from jaxla.cli.process import run_command\ndef main(arguments): {main}\nrun_command(main)"
    return subprocess.run([sys.executable, "-u", "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_a_reader_that_has_left_ends_it_without_a_word():
    """As in `… | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = run("print('a line')", writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_another_pipe_that_breaks_is_shown():
    done = run("raise BrokenPipeError('of another process')", subprocess.DEVNULL)
    assert done.returncode == 1
    assert done.stderr.endswith("BrokenPipeError: of another process\n")
