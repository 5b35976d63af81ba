"""Progress in the log and on a terminal, the width of lines, and counts and times in words."""

import logging
import os
import pty
import re
import select
import termios
from contextlib import contextmanager, redirect_stdout

import pytest

from jaxla.cli.terminal import WrappedFormatter, format_duration, plural, show_elapsed, track, wrap

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("cases", "logged"),
    [(0, []), (1, [1]), (3, [1, 2, 3]), (6, [2, 3, 5, 6]), (100, [25, 50, 75, 100])],
)
def test_each_quarter_logs_a_line(cases, logged, caplog):
    with caplog.at_level("INFO", "jaxla"):
        assert list(track(iter(range(cases)), "testing")) == list(range(cases))
    assert caplog.messages == [f"testing: {number} of {cases} cases" for number in logged]


@contextmanager
def stdout_on_a_terminal():
    """Make stdout a terminal, and yield a function that reads what it shows."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 200))
    with open(writer, "w", encoding="utf-8") as stdout, redirect_stdout(stdout):

        def read():
            shown = b""
            while select.select([reader], [], [], 0.3)[0]:  # what was written may arrive in parts
                shown += os.read(reader, 10_000)
            return shown.decode()

        yield read
    os.close(reader)


WORDS = " ".join(["word"] * 40)


@pytest.mark.parametrize(("columns", "width"), [("200", 100), ("60", 60)])
def test_lines_fit_the_terminal_and_100_columns(columns, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    path = "/" + 120 * "x"
    record = logging.LogRecord("jaxla", logging.INFO, "", 0, "%s", (WORDS,), None)
    with stdout_on_a_terminal():
        first, *rest = wrap(f"{WORDS} --data-root {path}\nshort", indent="   ").splitlines()
        assert WrappedFormatter().format(record) == wrap(WORDS) != WORDS
    assert width - 5 < len(first) <= width
    assert [line[:3] for line in rest] == ["   "] * (len(rest) - 1) + ["sho"]
    assert all(len(line) <= width for line in rest if path not in line)
    assert " ".join(line.strip() for line in (first, *rest)) == f"{WORDS} --data-root {path} short"


def test_lines_are_not_wrapped_in_a_file(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert wrap(WORDS) == WORDS


def test_control_characters_of_file_names_are_escaped_in_the_log():
    record = logging.LogRecord("jaxla", logging.INFO, "", 0, "%s: read", ("\x1b[2Jé\u3000\u202e\ndone.nii",), None)
    assert WrappedFormatter().format(record) == "\\x1b[2Jé\u3000\\u202e\\ndone.nii: read"


def test_a_terminal_shows_the_time_that_a_step_takes_and_clears_the_line():
    with stdout_on_a_terminal() as read:
        with show_elapsed("compiling the training step"):
            assert "compiling the training step … 00:0" in read()
        assert re.search("\r +\r$", read())


def test_elapsed_time_is_not_written_to_a_file(capsys):
    with show_elapsed("compiling the training step"):
        pass
    assert capsys.readouterr() == ("", "")


def test_plural_depends_on_the_count():
    assert [plural(count, "case") for count in (0, 1, 2)] == ["0 cases", "1 case", "2 cases"]


@pytest.mark.parametrize(("seconds", "text"), [(20.4, "20 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")])
def test_durations_are_rounded_to_readable_units(seconds, text):
    assert format_duration(seconds) == text
