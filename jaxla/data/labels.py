"""Mask values <-> class indices."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxla.config import OTHERS_ARE_BACKGROUND, InputError, option

MAX_CLASSES = 255  # class indices are uint8
MAX_VALUE = 65535  # largest label value of a mask
REST_RULE = f"{OTHERS_ARE_BACKGROUND} at the end makes all other values background."


@dataclass(frozen=True)
class Labels:
    """The classes of a data set and their mask values.

    The names of the attributes are part of the hash `jaxla.data.prepared.content_key`.
    """

    names: tuple[str, ...]  # the foreground classes; class c (1-based) is `names[c - 1]`
    values: tuple[tuple[int, ...], ...] | None = None  # mask values of each class; None: one class, all non-zero values
    ignored: tuple[int, ...] | None = ()  # values that are background; None if every value without a class is
    one_value: bool = False  # a mask must not hold two different non-zero values; only if `values` is None

    @property
    def outputs(self) -> int:
        """Channels of the logits: 1 for one class (sigmoid), otherwise background and classes (softmax)."""
        return 1 if len(self.names) == 1 else len(self.names) + 1

    def to_classes(self, mask: np.ndarray, source: Path) -> np.ndarray:
        """Convert mask values to class indices, uint8 of the same shape; 0 is background.

        Raises:
            InputError: `mask` holds a value that belongs to no class. It names the file `source`.
        """
        if self.values is None:
            if self.one_value and len(found := np.unique(mask[mask != 0])) > 1:
                example = option("data.labels", f"'a:{found[0]};b:{found[1]}'")
                problem = f"holds the label values {_first_values(found)}, but the data set does not name its classes"
                raise InputError(source, problem, f"Define the classes, for example {example}; {REST_RULE}")
            return (mask != 0).astype(np.uint8)
        classes = np.zeros(mask.shape, np.uint8)
        known = mask == 0
        for index, values in enumerate(self.values, start=1):
            class_voxels = np.isin(mask, values)
            classes[class_voxels] = index
            known |= class_voxels
        if self.ignored is None:
            return classes
        known |= np.isin(mask, self.ignored)
        if not known.all():
            unknown = _first_values(np.unique(mask[~known]))
            problem = f"label values {unknown} are not among the classes ({self.describe()})"
            fix = f"Correct the mask, or list the values in {option('data.labels')}: background:<value> ignores one "
            raise InputError(source, problem, f"{fix}value, {OTHERS_ARE_BACKGROUND} all others.")
        return classes

    def to_values(self, classes: np.ndarray) -> np.ndarray:
        """Convert class indices to mask values of this data set, the first value of each class."""
        values = [0, *(v[0] for v in self.values)] if self.values else [0, 1]
        dtype = next(t for t in (np.uint8, np.int16, np.int32) if max(values) <= np.iinfo(t).max)
        return np.array(values, dtype)[classes]

    def describe(self) -> str:
        """Return the classes and their values in words: `LA: 1, wall: 2/3`."""
        if self.values is None:
            return f"{self.names[0]}: {'the one' if self.one_value else 'any'} non-zero value"
        pairs = zip(self.names, self.values, strict=True)
        named = ", ".join(f"{name}: {'/'.join(map(str, values))}" for name, values in pairs)
        return named if self.ignored is not None else f"{named}; all other values are background"


def _first_values(values: np.ndarray) -> str:
    """Return up to five values as text, and how many more there are."""
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return f"{', '.join(map(str, values[:5].tolist()))}{more}"


def parse_labels(text: str) -> Labels:
    """Parse `LA:1`, `anterior:1;posterior:2`, `hippocampus:1,2`, `LA:1;background:2,3` or `LA:1;background:rest`.

    Raises:
        InputError: the text has none of these forms, or names a class or value twice.
    """
    where = option("data.labels", repr(text))
    fix = f"Use LA:1, for example, or a:1;b:2 for two classes; {REST_RULE}"
    names, values = [], []
    *parts, last = text.split(";")
    others_are_background = last.replace(" ", "") == OTHERS_ARE_BACKGROUND
    for part in parts if others_are_background else [*parts, last]:
        match = re.fullmatch(r"\s*([\w -]+?)\s*:\s*(\d{1,9}(?:\s*,\s*\d{1,9})*)\s*", part)
        if not match:
            raise InputError(where, f"expected name:value[,value…], got {part!r}", fix)
        names.append(match[1])
        values.append(tuple(int(value) for value in match[2].split(",")))
    listed = [value for group in values for value in group]
    if len(set(listed)) < len(listed) or len(set(names)) < len(names):
        raise InputError(where, "a name or value occurs twice", fix)
    labels = make_labels(dict(zip(names, values, strict=True)), where, fix)
    return replace(labels, ignored=None) if others_are_background else labels


def make_labels(values_by_name: Mapping[str, Sequence[int]], where: str, fix: str) -> Labels:
    """Return the labels for class name -> mask values; the values of `background` are ignored.

    Raises:
        InputError: background is the only class, a class has the value 0, or there are more classes or larger values
            than masks can have. The error has this `where` and `fix`.
    """
    ignored = tuple(value for value in values_by_name.get("background", ()) if value != 0)
    classes = {name: tuple(values) for name, values in values_by_name.items() if name != "background"}
    if not classes:
        raise InputError(where, "names no class except the background", fix)
    if any(0 in values for values in classes.values()):
        raise InputError(where, "the value 0 is the background and cannot be a class", fix)
    if len(classes) > MAX_CLASSES:
        raise InputError(where, f"names {len(classes)} classes, but at most {MAX_CLASSES} are supported", fix)
    if (largest := max((*ignored, *(value for values in classes.values() for value in values)))) > MAX_VALUE:
        raise InputError(where, f"the value {largest:g} is more than a mask can hold ({MAX_VALUE})", fix)
    return Labels(tuple(classes), tuple(classes.values()), ignored)


def require_one_value(labels: Labels, root: Path, mask_values: Mapping[str, Iterable[int]]) -> None:
    """Raise an InputError if `labels.one_value` is set and two masks, case id -> values, hold different values."""
    case_by_value = {value: case for case, found in mask_values.items() for value in found}
    if not labels.one_value or len(case_by_value) < 2:
        return
    (a, case_a), (b, case_b), *more = case_by_value.items()
    values = f"{a} in case {case_a}, {b} in case {case_b}"
    if more:
        count, others = len(case_by_value), np.array(sorted(value for value, _ in more))
        problem = f"the masks contain {count} different values ({values}; also {_first_values(others)}), but no classes"
        fix = f"List all {count} values in {option('data.labels')}; {REST_RULE}"
        raise InputError(root, f"{problem} are defined", fix)
    problem = f"the masks contain different values ({values}), but no classes are defined"
    one, two = (option("data.labels", text) for text in (f"'a:{a},{b}'", f"'a:{a};b:{b}'"))
    raise InputError(root, problem, f"Set {one} if both are the same class, or {two} if not.")
