"""Results of a run, computed from box masks with the package's metrics, and a parser of HTML pages."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from jaxla.evaluation.summary import score_case, summarise_test
from jaxla.reporting.overlays import Panel

SPACING = (2.5, 1.5, 0.75)  # mm along slices, rows, columns
SHAPE = (10, 20, 30)


def make_box_mask(rows, classes=1, columns=(5, 20)):
    """Return a mask [S, H, W] with a box of each class in slices 1 to 8, side by side; `rows` (0, 0) gives no box."""
    array = np.zeros(SHAPE, np.uint8)
    for value in range(1, classes + 1):
        start = columns[0] + 4 * (value - 1)
        array[1:9, rows[0] : rows[1], start : start + (4 if classes > 1 else columns[1] - columns[0])] = value
    return array


REFERENCE, ATLAS = (4, 14), (8, 18)  # rows of their boxes


def make_outcome(predictions, names=("LA",), references=None):
    """Return the arguments of `write_report` for a run.

    Args:
        predictions: test case -> rows of its predicted box.
        references: test case -> rows of its reference box, if they are not `REFERENCE`.
    """
    k = len(names)
    references = {name: REFERENCE for name in predictions} | (references or {})
    rows, slice_rows, atlas_rows, panels = [], [], [], []
    rng = np.random.default_rng(0)
    for name, rows_of_box in predictions.items():
        predicted, reference = make_box_mask(rows_of_box, k), make_box_mask(references[name], k)
        rows += score_case(name, predicted, reference, SPACING, names)
        slice_rows += score_case(name, predicted, reference, SPACING, names, "slice")
        atlas_rows += score_case(name, make_box_mask(ATLAS, k), reference, SPACING, names)
        image = rng.integers(0, 900, SHAPE).astype(np.int16)
        panels.append(Panel(f"{name}, shown", image, predicted, reference, SPACING))
    rows, summary = summarise_test(rows, slice_rows, atlas_rows, names)
    summary["atlas"]["threshold"] = 0.45
    summary |= {"best_epoch": 2, "backbone": "vit_mini8 (random weights, trained)"}
    record = {
        "experiment": {
            "name": "tiny", "summary": "boxes", "method": "vit_mini8", "seed": 7,
            "data": {"root": "/scans", "labels": ""}, "model": {"decoder_widths": [64, 32]},
            "training": {"batch_size": 8, "checkpoint": "best"},
        },
        "label": "vit_mini8",
        "network": "vit_mini8 (random weights, trained)",
        "input": "96 × 96 pixels",
        "unit": "per volume",
        "labels": {"names": list(names), "values": [[i + 1] for i in range(k)], "ignored": [9], "one_value": False},
        "weights": "random",
        "weights_sha256": "",
        "split_sha256": "5" * 64,
        "data_sha256": "d" * 64,
        "features": "Every step ran the backbone.",
        "resumed": [],
        "begun": "2026-01-02T03:04:05+00:00",
        "command": "python -m jaxla.train --exp=tiny --run-dir=runs/a --seed=7",
        "environment": {
            "versions": {"jaxla": "0.1.0", "jax": "0.10.2"}, "python": "3.11.7", "platform": "Linux-x",
            "device": "cpu: cpu", "processor": "Z80, 1 cores", "devices": 1, "processes": 1,
        },
    }  # fmt: skip
    history = [
        {"epoch": 1, "train_loss": 0.5, "val_loss": 0.6, "val_dice": 0.4, "val_iou": 0.31, "seconds": 30.0},
        {"epoch": 2, "train_loss": 0.3, "val_loss": 0.4, "val_dice": 0.7, "val_iou": 0.56, "seconds": 30.0},
        {"epoch": 3, "train_loss": 0.2, "val_loss": 0.5, "val_dice": 0.6, "val_iou": 0.47, "seconds": 30.0},
    ]
    cost = {
        "parameters": 1_234_567, "trained_parameters": 234_567, "multiply_adds": 5_678_000_000,
        "step_bytes": 2_340_000_000, "step_slices": 8, "peak_host_bytes": 3_450_000_000, "peak_device_bytes": None,
        "inference_seconds": [1.0, 2.0, 3.5], "inference_slices": [10, 20, 30],
    }  # fmt: skip
    split = {"train": ["t1", "t2"], "val": ["v1"], "test": list(predictions), "unused": ["u1"]}
    return {
        "record": record, "split": split, "history": history, "rows": rows, "summary": summary,
        "cost": cost, "panels": [panels[0]],
    }  # fmt: skip


class Page(HTMLParser):
    """A parsed page: its tags with attributes, its text, and its tables as lists of rows of cell texts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.tables, self.marked, self.text, self.style = [], [], [], "", ""
        self._in_cell = self._in_style = False
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
            if dict(attributes).get("class") == "below":
                self.marked.append(self.tables[-1][-1])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True
        if tag == "style":
            self._in_style = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1][-1] = " ".join(self.tables[-1][-1][-1].split())
            self._in_cell = False
        if tag == "style":
            self._in_style = False

    def handle_data(self, data):
        if self._in_style:
            self.style += data
            return
        self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def table(self, first_heading):
        """Return the rows and the headings of the table whose first column has this heading."""
        headings, *rows = next(table for table in self.tables if table[0][0] == first_heading)
        return rows, headings

    def svgs(self):
        """Return the SVG text of every image."""
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        return [base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")).decode() for source in sources]


def embedded_images(svg):
    """Return the raster images inside an SVG as arrays."""
    found = re.findall(r"data:image/png;base64,([^\"]+)", svg)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]
