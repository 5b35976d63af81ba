"""CSV files whose cells a spreadsheet does not evaluate as formulas.

A spreadsheet reads text that begins with one of `= + - @` as a formula. Such text is written with a leading apostrophe,
which `read_csv` removes.
"""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxla.cli.files import atomic_file

# The start of text to escape. Leading apostrophes are included, so that reading is unambiguous.
FORMULA = re.compile(r"'*[=+\-@\t\r]")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows under a line of column names, atomically. Missing values and None become empty cells."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(_escape, columns))
        writer.writerows([_escape(row.get(column)) for column in columns] for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a file that `write_csv` wrote; every value is text.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a CSV file, or a row has more or fewer cells than there are columns.
    """
    with path.open(encoding="utf-8", newline="") as file:
        try:
            columns, *rows = [list(map(_unescape, row)) for row in csv.reader(file)] or [[]]
        except csv.Error as error:  # such as a cell of more than 131,072 characters
            raise ValueError(f"{path.name}: {error}") from error
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path.name}: two columns have the same name")
    if bad := [number for number, row in enumerate(rows, start=2) if len(row) != len(columns)]:
        raise ValueError(f"{path.name}: row {bad[0]} does not have {len(columns)} cells")
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _escape(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def _unescape(text: str) -> str:
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text
