"""What is said of the work on cases where nobody watches."""

import pytest

from jaxla.cli.terminal import plural, track


@pytest.mark.parametrize(
    ("cases", "said"),
    [(0, []), (1, [1]), (3, [1, 2, 3]), (6, [2, 3, 5, 6]), (100, [25, 50, 75, 100])],
)
def test_a_line_at_each_quarter(cases, said, caplog):
    with caplog.at_level("INFO", "jaxla"):
        assert list(track(iter(range(cases)), "testing")) == list(range(cases))
    assert caplog.messages == [f"testing: {number} of {cases} cases" for number in said]


def test_one_is_no_plural():
    assert [plural(count, "case") for count in (0, 1, 2)] == ["0 cases", "1 case", "2 cases"]
