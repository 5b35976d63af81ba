"""The report of `jaxla.verify` on a folder of scans, as human-readable text or as JSON."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jaxla.cli.terminal import escape_controls, plural
from jaxla.data.cases import Finding
from jaxla.data.inventory import MIN_OUTLIER_CASES, OUTLIER_RULE, VOLUME_OUTLIER, CaseFacts, Inventory, format_sides

MAX_FINDINGS_PER_KIND = 10  # in the text; --json lists all
JSON_KEYS = {"problem": "what", "fix": "mend"}  # programs read the document by these names
MAX_EQUAL_FINDINGS = 3  # findings with the same problem and fix that the text lists
MAX_DISTINCT_VALUES = 4  # shapes or spacings that the text lists


def to_json(inventory: Inventory) -> dict[str, Any]:
    """Return the document that `--json` prints, with every case and every finding."""

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
    """Return every mask value that the masks or the labels hold, with its class and the number of cases with it."""
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
    unnamed = "no class" if labels else "unknown"
    return [
        {"value": value, "taken_for": meanings.get(value, unnamed), "cases": counts[value]}
        for value in sorted(counts.keys() | meanings.keys())
    ]


def to_text(inventory: Inventory) -> str:
    """Return the report as text: a summary, then findings by level. Paths are relative to the root."""
    errors = inventory.errors
    warnings = inventory.findings[len(errors) :]
    summary = list(_summary(inventory))
    width = max(len(name) for name, _ in summary) + 2
    lines = [f"  {name:{width}}{value}" for name, value in summary]
    for level, findings in (("errors", errors), ("warnings", warnings)):
        if findings:
            lines += ["", f"{level} ({len(findings)})", *_finding_lines(findings)]
    counts = f"{plural(len(errors), 'error')}, {plural(len(warnings), 'warning')}"
    lines += ["", f"Training {'cannot' if errors else 'can'} start: {counts}."]
    for folder in (inventory.root, inventory.root.resolve()):
        lines = [re.sub(rf"(?<!\S){re.escape(str(folder))}/", "", line) for line in lines]
    return "\n".join(map(escape_controls, (str(inventory.root), *lines)))


def _summary(inventory: Inventory) -> Iterator[tuple[str, str]]:
    yield "layout", inventory.layout
    split = inventory.split
    sizes = f"{len(split.train)} training, {len(split.val)} validation, {len(split.test)} test" if split else ""
    yield "cases", f"{len(inventory.cases)}{sizes and f'; default split: {sizes}'}"
    yield "classes", inventory.labels.describe() if inventory.labels else "unknown"
    values = label_values(inventory)
    shown = [f"{v['value']} {v['taken_for']} in {plural(v['cases'], 'case')}" for v in values[:MAX_FINDINGS_PER_KIND]]
    yield "label values", (", ".join(shown) or "only 0") + _more(len(values) - MAX_FINDINGS_PER_KIND)

    if readable := [case for case in inventory.cases if case.shape]:
        yield from _summarise_geometry(readable)
    has_volumes = False
    for name in inventory.labels.names if inventory.labels else ():
        if volumes := {c.id: c.volumes[name] for c in inventory.cases if c.volumes and c.volumes[name]}:
            has_volumes = True
            smallest, largest = min(volumes, key=volumes.get), max(volumes, key=volumes.get)
            ends = (f"{volumes[case]:.3g} ({case})" for case in (smallest, largest))
            yield f"{name} ml", f"median {np.median(list(volumes.values())):.3g}, from {' to '.join(ends)}"
    if has_volumes:
        outliers = list(dict.fromkeys(f.case for f in inventory.findings if f.kind == VOLUME_OUTLIER))
        shown = ", ".join(outliers[:MAX_FINDINGS_PER_KIND]) + _more(len(outliers) - MAX_FINDINGS_PER_KIND)
        if len(inventory.cases) < MIN_OUTLIER_CASES:
            shown = f"not checked with fewer than {MIN_OUTLIER_CASES} cases"
        yield "outliers", shown or "none"
    if unread := inventory.unread:
        shown = ", ".join(str(path) for path in unread[:3])
        yield "not read", f"{plural(len(unread), 'scan')} without a case: {shown}{_more(len(unread) - 3)}"


def _summarise_geometry(cases: Sequence[CaseFacts]) -> Iterator[tuple[str, str]]:
    shapes = [format_sides(case.shape) for case in cases]
    extent = ""
    if len(set(shapes)) > 1:
        smallest, largest = (choose(cases, key=lambda case: np.prod(case.shape)) for choose in (min, max))
        extremes = (f"{format_sides(case.shape)} ({case.id})" for case in (smallest, largest))
        extent = "; from " + " to ".join(extremes)
    yield "shapes", _distinct(shapes) + extent
    yield "spacings mm", _distinct(format_sides(case.spacing) for case in cases)
    orientations = Counter(case.orientation for case in cases).most_common()
    yield "orientations", ", ".join(f"{orientation} ({count})" for orientation, count in orientations)
    slices = [case.slices for case in cases]
    extent = f"{min(slices)} to {max(slices)}" if len(set(slices)) > 1 else f"{slices[0]}"
    yield "slices along", f"{_distinct(case.slice_axis for case in cases)}; {extent} per case, {sum(slices)} in total"


def _finding_lines(findings: Iterable[Finding]) -> Iterator[str]:
    """Yield a line for each finding, by kind; of equal findings, list the first few and the cases of the others."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    for kind, group in kinds.items():
        printed: Counter[tuple[str, str]] = Counter()
        unlisted = []
        for finding in group:
            text = (finding.problem, finding.fix)
            if printed[text] < MAX_EQUAL_FINDINGS and printed.total() < MAX_FINDINGS_PER_KIND:
                yield f"  {finding.file}: {finding.problem}. {finding.fix}"
                printed[text] += 1
            else:
                unlisted.append(finding.case)
        if unlisted:
            cases = ", ".join(unlisted[:MAX_FINDINGS_PER_KIND]) + _more(len(unlisted) - MAX_FINDINGS_PER_KIND)
            yield f"  and {len(unlisted)} more of this kind ({kind}): {cases}; --json lists all"


def _distinct(values: Iterable[str]) -> str:
    """Return the values with their counts; of many values, only those that occur more than once."""
    counts = Counter(values).most_common()
    shown = counts if len(counts) <= MAX_DISTINCT_VALUES else [(v, n) for v, n in counts[:MAX_DISTINCT_VALUES] if n > 1]
    text = ", ".join(f"{value} ({n})" for value, n in shown)
    return text + _more(len(counts) - len(shown)) if shown else f"{len(counts)} different values"


def _more(count: int) -> str:
    return f", … {count} more" if count > 0 else ""
