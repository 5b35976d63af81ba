"""CSV files: text that a spreadsheet would evaluate as a formula, and damaged files."""

import csv

import pytest

from jaxla.cli.csv_files import read_csv, write_csv

pytestmark = pytest.mark.quick

NAMES = ["case_1", "=1+1", "+1", "-1", "@x", "\tx", "'=x", "''=x", "'x", "a=b", 'a,"b"\nc', "é", ""]


def test_formulas_are_written_with_an_apostrophe_and_read_without_it(tmp_path):
    path = tmp_path / "table.csv"
    write_csv(path, ["case", "=dice", "none"], [{"case": name, "=dice": -0.1 + 0.4} for name in NAMES])
    assert read_csv(path) == [{"case": name, "=dice": "0.30000000000000004", "none": ""} for name in NAMES]
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["case", "'=dice", "none"]
    changed = {name: row[0] for name, row in zip(NAMES, rows, strict=True) if row[0] != name}
    assert changed == {name: f"'{name}" for name in ["=1+1", "+1", "-1", "@x", "\tx", "'=x", "''=x"]}


def test_negative_numbers_stay_numbers(tmp_path):
    write_csv(tmp_path / "table.csv", ["bias"], [{"bias": -0.25}])
    assert (tmp_path / "table.csv").read_text() == "bias\n-0.25\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n1\n", "table.csv: row 3 does not have 2 cells"),
        (b"a,b\n1,2,3\n", "table.csv: row 2 does not have 2 cells"),
        (b"a,a\n1,2\n", "table.csv: two columns have the same name"),
        (b"a\n" + b"x" * 131_073, "table.csv: field larger than field limit"),
        (b"a\n\xff\n", "invalid start byte"),
    ],
)
def test_a_damaged_file_is_a_value_error(tmp_path, content, message):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_csv(tmp_path / "table.csv")
