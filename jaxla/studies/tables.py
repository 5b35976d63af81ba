"""The tables of a study (results, comparisons, cost): CSV in full precision, Markdown and LaTeX to print."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from jaxla.cli.csv_files import write_csv
from jaxla.cli.terminal import plural
from jaxla.config import Published
from jaxla.evaluation.metrics import COLUMNS
from jaxla.evaluation.statistics import Comparison, compare
from jaxla.reporting.page import Pair, format_metric
from jaxla.runs.machine import describe_device
from jaxla.studies.results import REPORTED_METRICS, Mean, Results, Unit

ATLAS = "atlas baseline"
MEAN = "mean"  # over several classes
MIN_CASES_FOR_INTERVALS = 10  # with fewer cases, bootstrap samples are nearly all alike
UNITS: tuple[Unit, ...] = ("volume", "slice")
COST_COLUMNS = {  # quantity -> title and unit of its column
    "parameters": ("parameters, M", 1e6),
    "trained_parameters": ("trained, M", 1e6),
    "multiply_adds": ("multiply-adds, G", 1e9),
    "epoch_seconds": ("s per epoch", 1),
    "epochs": ("epochs", 1),
    "inference_seconds": ("s per volume", 1),
    "step_bytes": ("step, GB", 1e9),
    "peak_bytes": ("peak, GB", 1e9),
}
LATEX_ESCAPES = str.maketrans({sign: f"\\{sign}" for sign in "_%&#$"})
LATEX_SIGNS = str.maketrans({"±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$"})

PublishedRows = Mapping[tuple[str, str], Published]  # by method and protocol


class Table(NamedTuple):
    """A table to print; its files are `name` with a suffix."""

    name: str
    caption: str
    rows: list[dict[str, str]]  # column title -> cell, for each row; the first column names the row
    records: list[dict[str, Any]]  # the same in full precision: column -> value, for each line of the CSV file

    @property
    def cells(self) -> list[list[str]]:
        return [list(row.values()) for row in self.rows]

    @property
    def columns(self) -> list[list[str]]:
        """Each column with its title: the rows of the transposed table, which suits a narrow screen."""
        return [[title, *(row[title] for row in self.rows)] for title in self.rows[0]]


def results_table(results: Results, protocol: str, published: PublishedRows) -> Table:
    """Make Table 1 of a protocol: Dice, IoU, HD95 and ASSD of every method, with the atlas baseline's Dice and IoU."""
    classes = _averaged_classes(results)
    printed = {m: published[m, protocol] for m in results.methods if len(classes) == 1 and (m, protocol) in published}
    rows, records = [], []
    for unit, (class_title, class_name), method in product(UNITS, classes.items(), [*results.methods, ATLAS]):
        means = {metric: _mean(results, protocol, method, metric, unit, class_name) for metric in REPORTED_METRICS}
        if means["dice"] is None:  # the atlas baseline has no values per slice
            continue
        paper = printed.get(method) if unit == "volume" else None
        row = {"method": method} | ({"class": class_title} if len(classes) > 1 else {}) | {"per": unit}
        row |= {COLUMNS[metric].title: _format_mean(mean, metric) for metric, mean in means.items()}
        if len(results.seeds) > 1:
            row["sd over seeds"] = format_metric(means["dice"].sd_over_seeds, "dice")
        is_compared = unit == "volume" and method != ATLAS
        row["above atlas"] = count_above_atlas(results, protocol, method, class_name) if is_compared else "–"
        if printed:
            row["published Dice"] = _format_published(paper and paper.dice, paper and paper.dice_sd)
            row["published IoU"] = _format_published(paper and paper.iou, paper and paper.iou_sd)
        rows.append(row)
        about = {"protocol": protocol, "method": method, "class": class_title}
        records += [about | _mean_record(mean, metric, paper) for metric, mean in means.items() if mean]
    return Table(f"table1_{protocol}", _results_caption(results, protocol, list(printed.values())), rows, records)


def _results_caption(results: Results, protocol: str, printed: Sequence[Published]) -> str:
    volumes, slices = (len(results.runs[0].values[unit]["dice"]) for unit in UNITS)
    seeds = len(results.seeds)
    word = results.runs[0].record.experiment.data.case_word
    caption = (
        f"Protocol {protocol} ({plural(results.count_training_patients(protocol), f'training {word}')}): mean ± sd "
        f"over {plural(volumes, 'test volume')} and over their {slices} slices; {_seed_note(results)}"
        f"{f' ({MEAN}: also over classes)' if len(results.classes) > 1 else ''}. "
        "HD95 is the larger of the two directed 95th percentiles, not the percentile of the pooled distances. If both "
        "masks of a volume or slice are empty, its metrics are perfect; if only one is, they are the worst possible. "
    )
    if absent := results.runs[0].absent_classes:
        caption += f"No reference contains {', '.join(absent)}, so the mean over classes leaves it out. "
    if seeds > 1:
        caption += f"Sd over seeds: sd of the mean Dice of {seeds} seeds. "
    caption += "The atlas baseline does not use the image. "
    caption += "Above atlas: test cases with a higher Dice than the baseline's."
    if printed:
        sources, caveats = ("; ".join(dict.fromkeys(text)) for text in zip(*(row[:2] for row in printed), strict=True))
        caption += f" Published: {sources}, with the paper's own recipe, which may differ from this study's; {caveats}."
    return caption


def count_above_atlas(results: Results, protocol: str, method: str, class_name: str) -> str:
    """Return how many test cases have a higher Dice than the atlas baseline, averaged over seeds: `5 of 6`."""
    dice, atlas = (results.case_means(protocol, method, metric, class_name) for metric in ("dice", "atlas_dice"))
    return f"{sum(dice[case] > atlas[case] for case in dice)} of {len(dice)}"


def comparison_table(results: Results) -> Table:
    """Compare every pair of methods under every protocol. Only the CSV file has all metrics and classes."""
    rows, records = [], []
    classes = _averaged_classes(results)
    for protocol, (class_title, class_name), metric in product(results.protocols, classes.items(), REPORTED_METRICS):
        for pair in compare({m: results.case_means(protocol, m, metric, class_name) for m in results.methods}):
            about = {"protocol": protocol, "class": class_title, "metric": metric}
            values = {name: value for name, value in vars(pair).items() if name != "interval"}
            low, high = pair.interval or (None, None)
            records.append(about | values | {"ci95_low": low, "ci95_high": high})
            if metric == "dice" and class_title == next(iter(classes)):
                rows.append({"protocol": protocol} | _comparison_cells(pair))
    cases = len(results.test_cases)
    caption = (
        f"Difference in Dice per volume{_averaging_note(results)}, first − second: mean over {cases} test volumes; "
        f"{_seed_note(results)}. 95 % bootstrap interval; Wilcoxon signed-rank test, with Holm's correction within a "
        "protocol; rank-biserial effect size."
    )
    if cases < MIN_CASES_FOR_INTERVALS:
        caption += f" With fewer than {MIN_CASES_FOR_INTERVALS} cases, the interval is little more than their range."
    return Table("comparisons", caption, rows, records)


def cost_table(results: Results) -> Table:
    """Make the table with the cost of each method, under the protocol with the most training patients."""
    protocol = results.largest_protocol
    rows, records = [], []
    for method in results.methods:
        cost = results.cost(protocol, method)
        dice = results.mean(protocol, method, "dice").mean
        records.append({"protocol": protocol, "method": method} | cost | {"dice": dice})
        cells = {title: _three_digits(cost[name], scale) for name, (title, scale) in COST_COLUMNS.items()}
        rows.append({"method": method} | cells | {"Dice": format_metric(dice, "dice")})
    return Table("cost", _cost_caption(results, protocol), rows, records)


def _cost_caption(results: Results, protocol: str) -> str:
    runs = results.select(protocol)
    volumes = _format_range([len(run.cost.inference_slices) for run in runs], "test volume")
    slices = _format_range([count for run in runs for count in run.cost.inference_slices], "slice")
    caption = (
        f"Cost under protocol {protocol} on {describe_devices(results, protocol)}. Multiply-adds: one slice through "
        f"the whole network. Time of an epoch includes its validation; epochs and their time are means over "
        f"{plural(len(results.seeds), 'seed')}. Time per volume: from the scan in memory to its mask, mean over "
        f"{volumes} of {slices} in each run. Memory of a training step is as reported by XLA; peak memory is the "
        f"highest of the process in any run. Dice is per volume{_averaging_note(results)}."
    )
    if cached := [m for m in results.methods if results.select(protocol, m)[0].record.features_cached]:
        caption += (
            f" The epochs of {', '.join(cached)} read cached features of the frozen backbone. These are computed once "
            "for all runs; this takes about as long as inference on every slice and is not included."
        )
    return caption


def describe_devices(results: Results, protocol: str) -> str:
    """Describe the device of a protocol's runs; if they used several, state this and name the methods on each."""
    methods: dict[str, list[str]] = {}
    for run in results.select(protocol):
        for environment in (run.record.environment, *(session["environment"] for session in run.record.resumed)):
            names = methods.setdefault(describe_device(environment), [])
            names += [run.method] * (run.method not in names)
    if len(methods) == 1:
        return next(iter(methods))
    devices = "; ".join(f"{', '.join(names)}: {device}" for device, names in methods.items())
    return f"different devices, so times and memory cannot be compared ({devices})"


def dice_iou_pairs(result_tables: Sequence[Table]) -> list[Pair]:
    """Return every pair of mean Dice and mean IoU in tables of results, including published ones."""
    has_classes = "class" in result_tables[0].rows[0]
    means: dict[str, dict[str, float]] = {}
    for record in (record for table in result_tables for record in table.records):
        run = f"{record['protocol']}, {record['method']}"
        metric = record["metric"]
        class_name = f", {record['class']}" if has_classes else ""
        means.setdefault(f"{run}{class_name}, per {record['unit']}", {})[metric] = record["mean"]
        if record["published_mean"] is not None:
            means.setdefault(f"{run}, published", {})[metric] = record["published_mean"]
    return [Pair(name, by_metric["dice"], by_metric["iou"]) for name, by_metric in means.items() if "iou" in by_metric]


def write_tables(tables: Sequence[Table], folder: Path) -> None:
    """Write each table as `<name>.csv`, `.md` and `.tex`."""
    for table in tables:
        write_csv(folder / f"{table.name}.csv", list(table.records[0]), table.records)
        alignment = ["left"] + ["right"] * (len(table.rows[0]) - 1)
        plain = tabulate(table.rows, "keys", "pipe", colalign=alignment, disable_numparse=True)
        (folder / f"{table.name}.md").write_text(f"{plain}\n\n{table.caption}\n", encoding="utf-8")
        latex = tabulate(table.rows, "keys", "latex_booktabs", colalign=alignment, disable_numparse=True)
        caption = table.caption.translate(LATEX_ESCAPES)
        text = f"\\begin{{table}}\n\\caption{{{caption}}}\n{latex}\n\\end{{table}}\n"
        (folder / f"{table.name}.tex").write_text(text.translate(LATEX_SIGNS), encoding="utf-8")


def _averaged_classes(results: Results) -> dict[str, str]:
    """Return title -> class name for everything that is averaged; the name is empty for the mean over classes."""
    classes = {name: name for name in results.classes}
    return classes if len(classes) == 1 else {MEAN: ""} | classes


def _seed_note(results: Results) -> str:
    return f"values are averaged over {len(results.seeds)} seeds first" if len(results.seeds) > 1 else "one seed"


def _averaging_note(results: Results) -> str:
    return ", averaged over classes" if len(results.classes) > 1 else ""


def _mean(results: Results, protocol: str, method: str, metric: str, unit: Unit, class_name: str) -> Mean | None:
    """Return a mean, or None for a value that the atlas baseline does not have."""
    if method != ATLAS:
        return results.mean(protocol, method, metric, unit, class_name)
    if unit == "slice" or metric not in ("dice", "iou"):
        return None
    return results.mean(protocol, results.methods[0], f"atlas_{metric}", unit, class_name)


def _mean_record(mean: Mean, metric: str, paper: Published | None) -> dict[str, Any]:
    percents = {"published_mean": getattr(paper, metric, None), "published_sd": getattr(paper, f"{metric}_sd", None)}
    published = {name: None if percent is None else percent / 100 for name, percent in percents.items()}
    return {"metric": metric} | mean._asdict() | published


def _comparison_cells(pair: Comparison) -> dict[str, str]:
    return {
        "first": pair.first,
        "second": pair.second,
        "difference": _signed(pair.difference),
        "95 % interval": "–" if pair.interval is None else " to ".join(map(_signed, pair.interval)),
        "p": f"{pair.p:.2g}",
        "p (Holm)": f"{pair.p_holm:.2g}",
        "effect": _signed(pair.effect, 2),
    }


def _format_mean(mean: Mean | None, metric: str) -> str:
    """Return `0.855 ± 0.046`, or a dash if there is no value."""
    if mean is None or mean.sd is None:
        return format_metric(mean and mean.mean, metric)
    return f"{format_metric(mean.mean, metric)} ± {format_metric(mean.sd, metric)}"


def _format_published(percent: float | None, sd_percent: float | None) -> str:
    if percent is None:
        return "–"
    return f"{percent / 100:.3f}" + ("" if sd_percent is None else f" ± {sd_percent / 100:.3f}")


def _format_range(counts: Sequence[int], noun: str) -> str:
    """Return `3 slices`, or `3 to 5 slices` if the counts differ."""
    low, high = min(counts), max(counts)
    return plural(low, noun) if low == high else f"{low} to {plural(high, noun)}"


def _signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _three_digits(value: float | None, scale: float) -> str:
    if value is None:
        return "–"
    return f"{value / scale:.0f}" if value / scale >= 100 else f"{value / scale:.3g}"
