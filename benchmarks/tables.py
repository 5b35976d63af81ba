"""python -m benchmarks.tables [--unpack=FILE]: write the tables of docs/benchmarks.md from benchmarks/results.

A table is between the lines `<!-- table: NAME -->` and `<!-- end of table -->`. `--unpack` first extracts a GPU's
results, from the archive that `run.sh` wrote on the GPU machine, to a folder in benchmarks/results named after the GPU.
Results of stages that ran again replace earlier ones.
"""

import json
import re
import tarfile
import tempfile
from pathlib import Path

from benchmarks.parity import COLUMNS, format_value
from benchmarks.timing import write_result
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.files import write_atomically
from jaxla.cli.process import run_command
from jaxla.cli.terminal import format_bytes
from jaxla.config import InputError
from tests.golden.errors import BOUND

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
TABLE = re.compile(r"(?<=<!-- table: )(\w+)( -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
SPEED_COLUMNS = (
    "stage", "jaxla", "PyTorch's fastest", "PyTorch / jaxla", "memory: jaxla", "memory: PyTorch", "of the peak",
)  # fmt: skip
NO_VALUE = "–"


def main(arguments):
    parser = command_parser("benchmarks.tables", "Write the tables of docs/benchmarks.md from benchmarks/results.")
    added = "results.tar.gz of a GPU run; its results are added before the tables are written"
    parser.add_argument("--unpack", type=Path, help=added)
    options = parse_arguments(parser, arguments)
    if options.unpack:
        print(f"results are in {unpack(options.unpack, RESULTS)}")
    write_atomically(PAGE, render(PAGE.read_text(encoding="utf-8"), RESULTS))


def unpack(archive, results):
    """Add the results in an archive to the folder `results`; return the folder of their GPU."""
    if not archive.is_file():
        raise InputError(f"--unpack={archive}", "no such file", "Pass the results.tar.gz that run.sh wrote.")
    with tempfile.TemporaryDirectory() as name:
        with tarfile.open(archive) as tar:
            tar.extractall(name, filter="data")
        found = {path.stem: read_json(path) for path in sorted(Path(name).glob("*.json"))}
    outcomes = found.pop("stages", {"tiny": True})
    if outcomes["tiny"] or not found:
        raise InputError(f"--unpack={archive}", "contains no full-size results", "Rerun run.sh without --tiny.")
    device = next(iter(found.values()))["device"]
    folder = results / re.sub(r"\W+", "_", device.lower())
    folder.mkdir(exist_ok=True)
    earlier = read_json(folder / "stages.json") if (folder / "stages.json").exists() else {"stages": []}
    rows = {row["stage"]: row for row in earlier["stages"]}
    for row in outcomes["stages"]:
        name = row["stage"]
        if row["status"] == "not started" and name in rows:
            continue
        rows[name] = row
        (folder / f"{name}.json").unlink(missing_ok=True)
        if name in found:
            write_result(found[name], folder / f"{name}.json")
    write_result({"tiny": False, "stages": list(rows.values())}, folder / "stages.json")
    return folder


def render(page, results):
    """Return the page's text with every table rendered again."""
    return TABLE.sub(lambda match: f"{match[1]}{match[2]}{TABLES[match[1]](results)}\n", page)


def parity_table(results):
    """Return the table of the backbones' errors on CPU."""
    rows = read_json(results / "parity_epyc.json")["rows"]
    return table(COLUMNS, [[f"`{row['architecture']}`", *map(format_value, list(row.values())[1:])] for row in rows])


def gpu_tables(results):
    """Return the tables of every GPU that has results."""
    folders = [path.parent for path in sorted(results.glob("*/stages.json"))]
    return "\n\n".join(map(device_tables, folders)) or "`jaxla` has not run on a GPU yet."


def device_tables(folder):
    """Return the tables of one GPU."""
    found = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    outcomes = {row["stage"]: row for row in found.pop("stages")["stages"]}
    device = found.get("device")
    first = next(iter(found.values()), None)
    parts = [f"### {first['device'] if first else folder.name}"]
    if device:
        versions = ", ".join(f"{name} {device['versions'][name]}" for name in ("jax", "flax", "torch", "transformers"))
        products = ", ".join(f"{value:.0f} ({name})" for name, value in device["tflops"].items())
        bandwidth = f"memory at {device['bytes_per_second'] / 1e12:.2f} TB/s"
        parts.append(f"{device['date']}; {versions}. Matrix products in TFLOP/s: {products}; {bandwidth}.")
    peak = device and device["tflops"]["jax bfloat16"]
    speeds = [row for name, result in found.items() for row in speed_rows(name, result, peak)]
    checks = [row for name, result in found.items() for row in check_rows(name, result)]
    runs = [run_row(result) for result in found.values() if "options" in result]
    if speeds:
        parts.append(table(SPEED_COLUMNS, speeds))
    if checks:
        parts.append(table(("check", "relative L2", "bound"), checks))
    if runs:
        parts.append(table(("options of `jaxla.train`", "time", "Dice", "atlas", "HD95", "n"), runs))
    missing = [f"`{name}` ({row['status']})" for name, row in outcomes.items() if row["status"] != "finished"]
    if missing:
        parts.append(f"Stages without a complete result: {', '.join(missing)}.")
    return "\n\n".join(parts)


def speed_rows(name, result, peak):
    """Return the rows of a result for the table of speeds."""
    peak_fraction = f"{result['tflops']['jaxla'] / peak:.0%}" if peak and name.startswith("backbone") else NO_VALUE
    memory = [result.get("jaxla_program_bytes", result.get("jaxla_peak_bytes")), result.get("torch_peak_bytes")]
    memory = [format_bytes(value) if value else NO_VALUE for value in memory]
    if "epoch" in result:
        timings = {"features": result["features_once"]}
        timings |= {f"{mode} epoch": timing for mode, timing in result["epoch"].items()}
    elif "windows" in result:
        last = result["windows"][-1]
        modes = {"jaxla": "two passes", "torch": "torch two passes"}
        seconds = {name: last["median_seconds"][mode] for name, mode in modes.items()}
        timings = {f"{last['windows']} windows": {"median_seconds": seconds}}
    elif "median_seconds" in result:
        timings = {"": result}
    else:
        return []
    return [[f"{name} {part}".strip(), *speeds(timing), *memory, peak_fraction] for part, timing in timings.items()]


def speeds(timing):
    """Return this package's time, PyTorch's shortest, and their ratio."""
    medians = timing["median_seconds"]
    ours, theirs = medians["jaxla"], min(value for name, value in medians.items() if name.startswith("torch"))
    return f"{1000 * ours:.4g} ms", f"{1000 * theirs:.4g} ms", f"{theirs / ours:.2f}"


def check_rows(name, result):
    """Return the rows of a result for the table of checks."""
    if name.startswith("parity"):
        error, cosine = COLUMNS[4], COLUMNS[-1]
        template = "{architecture}, {image}: tokens in float32; in bfloat16, lowest cosine {cosine:.5f}"
        return [
            [template.format(**row, cosine=row[cosine]), format_value(row[error]), f"{BOUND.relative_l2:g}"]
            for row in result["rows"]
        ]
    if name == "resume":
        return [[key, format_value(value), NO_VALUE] for key, value in result["relative_l2_from_uninterrupted"].items()]
    checks = result.get("checks", {})
    return [[key, format_value(check["relative_l2"]), f"{check['bound']:g}"] for key, check in checks.items()]


def run_row(result):
    options = " ".join(f"`{word}`" for word in result["options"] if not word.startswith("--data."))
    scores = [f"{value:.3f}" for value in (result["dice"], result["atlas"]["dice"])]
    return [options, f"{result['seconds']:.0f} s", *scores, f"{result['hd95_mm']:.1f} mm", str(result["n"])]


def table(columns, rows):
    """Return a Markdown table."""
    header, *lines = (f"| {' | '.join(map(str, line))} |" for line in (columns, *rows))
    return "\n".join([header, f"|{'---|' * len(columns)}", *lines])


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


TABLES = {"parity": parity_table, "gpu": gpu_tables}

if __name__ == "__main__":
    run_command(main)
