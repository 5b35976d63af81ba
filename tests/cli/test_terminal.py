"""Progress in the log, and counts and times in words."""

import pytest

from jaxla.cli.terminal import format_duration, plural, track

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("cases", "logged"),
    [(0, []), (1, [1]), (3, [1, 2, 3]), (6, [2, 3, 5, 6]), (100, [25, 50, 75, 100])],
)
def test_each_quarter_logs_a_line(cases, logged, caplog):
    with caplog.at_level("INFO", "jaxla"):
        assert list(track(iter(range(cases)), "testing")) == list(range(cases))
    assert caplog.messages == [f"testing: {number} of {cases} cases" for number in logged]


def test_plural_depends_on_the_count():
    assert [plural(count, "case") for count in (0, 1, 2)] == ["0 cases", "1 case", "2 cases"]


@pytest.mark.parametrize(("seconds", "text"), [(20.4, "20 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")])
def test_durations_are_rounded_to_readable_units(seconds, text):
    assert format_duration(seconds) == text
