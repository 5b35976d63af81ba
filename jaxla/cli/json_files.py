"""JSON files that commands read: every value is checked against the type that the reader expects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from jaxla.config import InputError

T = TypeVar("T")

# Numbers that are refused outside their range.
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Float32 = Annotated[float, msgspec.Meta(ge=-3.5e38, le=3.5e38)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Count = Annotated[int, msgspec.Meta(ge=0)]
PositiveCount = Annotated[int, msgspec.Meta(ge=1)]

RESTORE = "Restore it from a backup."
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors on Windows write it


def read_json(path: Path, expected_type: type[T], fix: str = RESTORE) -> T:
    """Return the content of a JSON file as `expected_type`, such as a dataclass, a TypedDict or `dict[str, str]`.

    Raises:
        FileNotFoundError, NotADirectoryError: the file is missing.
        InputError: it cannot be read, is not JSON (which has no NaN or infinity), or a value has a different type:
            a truth value is not a number, and 1.0 is not an integer.
    """
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", fix) from error
    return parse_json(text, expected_type, path, fix)


def parse_json(text: bytes, expected_type: type[T], where: object, fix: str = RESTORE) -> T:
    """Return what `read_json` returns for a file with this text; `where` names it in the error."""
    try:
        return decode_json(text, expected_type)
    except ValueError as error:
        raise InputError(where, f"damaged: {error}", fix) from error


def decode_json(text: bytes, expected_type: type[T]) -> T:
    """Return what `read_json` returns for a file with this text; raise a ValueError if it is damaged."""
    try:
        return msgspec.json.decode(text.removeprefix(BYTE_ORDER_MARK), type=expected_type)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def describe_damage(error: Exception) -> str:
    """Return what is wrong with content of the right types, from the error that was raised when reading it."""
    return f"{error} is missing or unknown" if isinstance(error, KeyError) else str(error)


def check_types(content: Any, expected_type: type[T], where: object, fix: str = RESTORE) -> T:
    """Return parsed JSON as `expected_type`; raise an InputError about `where` if a value has a different type."""
    try:
        return msgspec.convert(content, expected_type)
    except (ValueError, RecursionError) as error:
        raise InputError(where, f"damaged: {error}", fix) from error
