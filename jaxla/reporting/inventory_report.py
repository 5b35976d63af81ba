"""What `jaxla.verify` says of a folder of scans: for a person as text, for a program as JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jaxla.cli.terminal import plural
from jaxla.data.cases import Finding
from jaxla.data.inventory import OUTLIER_RULE, Inventory, format_sides

MOST_OF_A_KIND = 10  # findings in the text; --json has them all
MOST_ALIKE = 3  # of these, with the same words
MOST_DISTINCT = 4  # shapes, spacings
JSON_KEYS = {"problem": "what", "fix": "mend"}  # programs read the document by these names


def to_json(inventory: Inventory) -> dict[str, Any]:
    """The document that `--json` prints: every case and every finding."""

    def plain(record: object) -> dict[str, Any]:
        return {
            JSON_KEYS.get(key, key): str(value) if isinstance(value, Path) else value
            for key, value in asdict(record).items()
        }

    return {
        "root": str(inventory.root),
        "training_could_start": not inventory.errors,
        "layout": inventory.layout,
        "labels": plain(inventory.labels) if inventory.labels else None,
        "label_values": label_values(inventory),
        "default_split": plain(inventory.split) if inventory.split else None,
        "outlier_rule": OUTLIER_RULE,
        "findings": [plain(finding) for finding in inventory.findings],
        "cases": [plain(case) for case in inventory.cases],
        "unread": [str(path) for path in inventory.unread],
    }


def label_values(inventory: Inventory) -> list[dict[str, Any]]:
    """Every mask value that is found or named, what it is taken for, and in how many cases it is."""
    labels = inventory.labels
    counts = Counter(value for case in inventory.cases for value in case.mask_values or ())
    meanings: dict[int, str] = {}
    if labels and labels.values is not None:
        for name, values in zip(labels.names, labels.values, strict=True):
            meanings |= dict.fromkeys(values, name)
        ignored = counts.keys() - meanings.keys() if labels.ignored is None else labels.ignored
        meanings |= dict.fromkeys(ignored, "ignored (background)")
    elif labels:
        meanings = dict.fromkeys(counts, labels.names[0])
    unnamed = "no class" if labels else "not known"
    return [
        {"value": value, "taken_for": meanings.get(value, unnamed), "cases": counts[value]}
        for value in sorted(counts.keys() | meanings.keys())
    ]


def to_text(inventory: Inventory) -> str:
    """The report for a person: a summary, then the findings by level; files are named from the root on."""
    errors = inventory.errors
    warnings = inventory.findings[len(errors) :]
    summary = list(_summary(inventory))
    width = max(len(name) for name, _ in summary) + 2
    lines = [f"  {name:{width}}{value}" for name, value in summary]
    for level, findings in (("errors", errors), ("warnings", warnings)):
        if findings:
            lines += ["", f"{level} ({len(findings)})", *_lines(findings)]
    counted = f"{plural(len(errors), 'error')}, {plural(len(warnings), 'warning')}"
    lines += ["", f"Training {'cannot' if errors else 'can'} start: {counted}."]
    text = "\n".join(lines)
    for folder in (inventory.root, inventory.root.resolve()):
        text = re.sub(rf"(?<!\S){re.escape(str(folder))}/", "", text)
    return f"{inventory.root}\n{text}"


def _summary(inventory: Inventory) -> Iterable[tuple[str, str]]:
    yield "layout", inventory.layout
    split = inventory.split
    parts = f"; by default {len(split.train)} train, {len(split.val)} validate, {len(split.test)} test" if split else ""
    yield "cases", f"{len(inventory.cases)}{parts}"
    yield "classes", inventory.labels.describe() if inventory.labels else "not known"
    values = label_values(inventory)
    shown = [f"{v['value']} {v['taken_for']} in {plural(v['cases'], 'case')}" for v in values[:MOST_OF_A_KIND]]
    yield "label values", (", ".join(shown) or "none but 0") + _more(len(values) - MOST_OF_A_KIND)

    read = [case for case in inventory.cases if case.shape]
    if read:
        shapes = [format_sides(case.shape) for case in read]
        extent = ""
        if len(set(shapes)) > 1:
            least, most = (choose(read, key=lambda case: np.prod(case.shape)) for choose in (min, max))
            extent = f"; from {format_sides(least.shape)} ({least.id}) to {format_sides(most.shape)} ({most.id})"
        yield "shapes", _distinct(shapes) + extent
        yield "spacings mm", _distinct(format_sides(case.spacing) for case in read)
        orientations = Counter(case.orientation for case in read).most_common()
        yield "orientations", ", ".join(f"{orientation} ({count})" for orientation, count in orientations)
        slices = [case.slices for case in read]
        extent = f"{min(slices)} to {max(slices)} a case" if len(set(slices)) > 1 else f"{slices[0]} a case"
        yield "slices along", f"{_distinct(case.slice_axis for case in read)}; {extent}, {sum(slices)} in all"

    judged = False
    for name in inventory.labels.names if inventory.labels else ():
        volumes = {c.id: c.volumes[name] for c in inventory.cases if c.volumes and c.volumes[name]}
        if volumes:
            judged = True
            least, most = min(volumes, key=volumes.get), max(volumes, key=volumes.get)
            yield (
                f"{name} ml",
                f"median {np.median(list(volumes.values())):.3g}, from {volumes[least]:.3g} ({least}) "
                f"to {volumes[most]:.3g} ({most})",
            )
    if judged:
        yield "outliers", OUTLIER_RULE
    if unread := inventory.unread:
        shown = ", ".join(str(path) for path in unread[:3])
        yield "not read", f"{plural(len(unread), 'NIfTI file')} of no case: {shown}{_more(len(unread) - 3)}"


def _lines(findings: Iterable[Finding]) -> Iterable[str]:
    """One line each, by kind; of many that say the same the first few, then which cases the others are."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    for kind, group in kinds.items():
        said: Counter[tuple[str, str]] = Counter()
        left = []
        for finding in group:
            text = (finding.problem, finding.fix)
            if said[text] < MOST_ALIKE and said.total() < MOST_OF_A_KIND:
                yield f"  {finding.file}: {finding.problem}. {finding.fix}"
                said[text] += 1
            else:
                left.append(finding.case)
        if left:
            cases = ", ".join(left[:MOST_OF_A_KIND]) + _more(len(left) - MOST_OF_A_KIND)
            yield f"  and {len(left)} more like these ({kind}): {cases}; --json lists them all"


def _distinct(values: Iterable[str]) -> str:
    """The values and how often they occur; where there are many, those that occur more than once."""
    counts = Counter(values).most_common()
    shown = counts if len(counts) <= MOST_DISTINCT else [(v, n) for v, n in counts[:MOST_DISTINCT] if n > 1]
    text = ", ".join(f"{value} ({n})" for value, n in shown)
    return text + _more(len(counts) - len(shown)) if shown else f"{len(counts)} different ones"


def _more(count: int) -> str:
    return f", … {count} more" if count > 0 else ""
