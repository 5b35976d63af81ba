"""Which mask values are which class."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxla.config import OTHERS_ARE_BACKGROUND, InputError


@dataclass(frozen=True)
class Labels:
    """Which mask values are which class.

    Attributes:
        names: of the foreground classes; class c (1-based) is `names[c - 1]`.
        values: the mask values of each of them; None where any non-zero value is the one class.
        ignored: mask values that count as background; None where all do that are no class.
        one_value: where any non-zero value is the class, a mask must not hold two different ones.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...] | None = None
    ignored: tuple[int, ...] | None = ()
    one_value: bool = False

    @property
    def outputs(self) -> int:
        """Channels of the logits: 1 for one class (sigmoid), else background and classes (softmax)."""
        return 1 if len(self.names) == 1 else len(self.names) + 1

    def to_classes(self, mask: np.ndarray, source: Path) -> np.ndarray:
        """Mask values -> class indices (0 is background), uint8, same shape.

        Raises:
            InputError: `mask` holds a value that is no class.
        """
        if self.values is None:
            if self.one_value and len(found := np.unique(mask[mask != 0])) > 1:
                raise InputError(
                    f"{source}: holds the label values {_first(found)}; say which is which class, such as "
                    f"--data.labels='a:{found[0]};b:{found[1]}' (;{OTHERS_ARE_BACKGROUND} sets all others aside)"
                )
            return (mask != 0).astype(np.uint8)
        classes = np.zeros(mask.shape, np.uint8)
        known = mask == 0
        for index, values in enumerate(self.values, start=1):
            of_class = np.isin(mask, values)
            classes[of_class] = index
            known |= of_class
        if self.ignored is None:
            return classes
        known |= np.isin(mask, self.ignored)
        if not known.all():
            beyond = _first(np.unique(mask[~known]))
            raise InputError(
                f"{source}: holds the label values {beyond} beyond the classes {self.describe()}; "
                "mend the mask, or name them with --data.labels (background:<value> leaves a value out, "
                "background:rest all others)"
            )
        return classes

    def to_values(self, classes: np.ndarray) -> np.ndarray:
        """Class indices -> the values that this data set's masks use (the first one of each class)."""
        values = [0, *(v[0] for v in self.values)] if self.values else [0, 1]
        dtype = next(t for t in (np.uint8, np.int16, np.int32) if max(values) <= np.iinfo(t).max)
        return np.array(values, dtype)[classes]

    def describe(self) -> str:
        if self.values is None:
            return f"{self.names[0]}: {'the one' if self.one_value else 'any'} non-zero value"
        named = ", ".join(
            f"{name}: {'/'.join(map(str, values))}" for name, values in zip(self.names, self.values, strict=True)
        )
        return named if self.ignored is not None else f"{named}; all other values are background"


def _first(values: np.ndarray) -> str:
    """The first five of them, and how many there are beside."""
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return f"{values[:5].tolist()}{more}"


def parse_labels(text: str) -> Labels:
    """`LA:1`, `anterior:1;posterior:2`, `hippocampus:1,2`, `LA:1;background:2,3`, `LA:1;background:rest` -> Labels.

    Raises:
        InputError: not of that form, or a value is named twice.
    """
    how = (
        f"--data.labels={text!r}: expected name:value[,value…] with ';' between classes, such as LA:1 or a:1;b:2; "
        f"{OTHERS_ARE_BACKGROUND} at the end sets all other values aside"
    )
    names, values = [], []
    *parts, last = text.split(";")
    others_are_background = last.replace(" ", "") == OTHERS_ARE_BACKGROUND
    for part in parts if others_are_background else [*parts, last]:
        match = re.fullmatch(r"\s*([\w -]+?)\s*:\s*(\d+(?:\s*,\s*\d+)*)\s*", part)
        if not match:
            raise InputError(how)
        names.append(match[1])
        values.append(tuple(int(value) for value in match[2].split(",")))
    flat = [value for group in values for value in group]
    if len(set(flat)) < len(flat) or len(set(names)) < len(names):
        raise InputError(f"{how}; a name or value stands twice")
    labels = labels_of(dict(zip(names, values, strict=True)), how)
    return replace(labels, ignored=None) if others_are_background else labels


def labels_of(named: dict[str, Sequence[int]], where: str) -> Labels:
    ignored = tuple(value for value in named.get("background", ()) if value != 0)
    classes = {name: tuple(values) for name, values in named.items() if name != "background"}
    if not classes:
        raise InputError(f"{where}: names no class but the background")
    if any(0 in values for values in classes.values()):
        raise InputError(f"{where}: the value 0 is the background and cannot be a class")
    return Labels(tuple(classes), tuple(classes.values()), ignored)


def require_one_value(labels: Labels, root: Path, mask_values: Mapping[str, Iterable[int]]) -> None:
    """Where any non-zero value is the one class: raise an InputError if two masks hold different ones.

    Args:
        mask_values: case id -> the values of its mask besides 0.
    """
    values = {value: case for case, found in mask_values.items() for value in found}
    if labels.one_value and len(values) > 1:
        (a, case_a), (b, case_b) = list(values.items())[:2]
        raise InputError(
            f"{root}: the mask of case {case_a} holds the value {a}, that of {case_b} the value {b}; say "
            f"whether they are one class, --data.labels='a:{a},{b}', or two, --data.labels='a:{a};b:{b}'"
        )
