"""The benchmarks: commands show their help, GPU stages are independent, and tables show the stored results."""

import json
import shlex
import tarfile

import pytest

from benchmarks import tables
from benchmarks.gpu import STAGES, Stage, run_stages
from tests.commands import refuse, succeed

# All commands except compile_for_gpu and scaling, which choose XLA's devices for their process.
OTHER_COMMANDS = ("few_patients", "gpu", "mesh", "nnunet_training --exp=paper1 --method=nnunet_3d", "tables")
COMMANDS = (*OTHER_COMMANDS, *dict.fromkeys(stage.module for stage in STAGES))
TINY_DEVICE = next(stage.tiny for stage in STAGES if stage.name == "device")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_its_help(tmp_path, command):
    module, *options = command.split()
    assert "--" in succeed(tmp_path, f"benchmarks.{module}", *options, "--help")


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_commands_take_the_options_of_their_stages(tmp_path, stage):
    for options in (stage.options, stage.tiny):
        succeed(tmp_path, f"benchmarks.{stage.module}", *shlex.split(options), "--output=x.json", "--help")


def test_failed_and_hanging_stages_do_not_stop_the_next(tmp_path):
    hangs = Stage("hanging", 0.5, "device", "--repeats=1000000000")
    stages = [Stage("failing", 60, "absent"), hangs, Stage("device", 120, "device", TINY_DEVICE)]
    outcomes = run_stages(stages, tmp_path, 300, is_tiny=True)
    assert [outcome["status"] for outcome in outcomes] == ["failed", "stopped", "finished"]
    assert json.loads((tmp_path / "stages.json").read_text()) == {"tiny": True, "stages": outcomes}
    assert "No module named benchmarks.absent" in (tmp_path / "failing.log").read_text()
    assert json.loads((tmp_path / "device.json").read_text())["array_bytes"] == 10**6


def test_stages_are_not_started_without_time(tmp_path):
    outcomes = run_stages([Stage("device", 120, "device", TINY_DEVICE)], tmp_path, 0.5, is_tiny=True)
    assert [outcome["status"] for outcome in outcomes] == ["not started"]
    assert not (tmp_path / "device.json").exists()


def test_benchmark_page_shows_the_stored_results():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert "<!-- table: gpu -->" in page
    assert tables.render(page, tables.RESULTS) == page


COMMON = {"date": "2026-12-01", "device": "NVIDIA H200"}
DEVICE = COMMON | {
    "versions": {"jax": "0.11.2", "flax": "0.12.12", "torch": "2.11.0", "transformers": "5.17.0"},
    "tflops": {"jax bfloat16": 800.0, "torch bfloat16": 790.4},
    "bytes_per_second": 4.25e12,
}
BACKBONE = COMMON | {
    "median_seconds": {"jaxla": 0.1, "torch": 0.2, "torch.compile": 0.125},
    "tflops": {"jaxla": 480.0},
    "jaxla_program_bytes": 5 * 10**9,
    "torch_peak_bytes": 6 * 10**9,
}
PARITY = COMMON | {
    "rows": [
        {"architecture": "dinov2_vitb14", "image": "98×98", "reference": "authors' code", "max abs": 2e-6}
        | {"relative L2": 4.4e-7, "bfloat16: lowest cosine": 0.99994}
    ]
}
CHECKED = COMMON | {"checks": {"attention": {"relative_l2": 3e-3, "bound": 0.02}}}
RUN = COMMON | {
    "options": ["--exp=laptop", "--data.root=/scans"], "seconds": 150.4, "dice": 0.85, "hd95_mm": 2.04, "n": 12,
    "atlas": {"dice": 0.7155, "hd95_mm": 3.0},
}  # fmt: skip
EXPECTED = """### NVIDIA H200

2026-12-01; jax 0.11.2, flax 0.12.12, torch 2.11.0, transformers 5.17.0. Matrix products in TFLOP/s: \
800 (jax bfloat16), 790 (torch bfloat16); memory at 4.25 TB/s.

| stage | jaxla | PyTorch's fastest | PyTorch / jaxla | memory: jaxla | memory: PyTorch | of the peak |
|---|---|---|---|---|---|---|
| backbone_vitb | 100 ms | 125 ms | 1.25 | 5.00GB | 6.00GB | 60% |

| check | relative L2 | bound |
|---|---|---|
| attention | 3.0e-3 | 0.02 |
| dinov2_vitb14, 98×98: tokens in float32; in bfloat16, lowest cosine 0.99994 | 4.4e-7 | 1.5e-06 |

| options of `jaxla.train` | time | Dice | atlas | HD95 | n |
|---|---|---|---|---|---|
| `--exp=laptop` | 150 s | 0.850 | 0.716 | 2.0 mm | 12 |

Stages without a complete result: `windows` (stopped)."""


def write_archive(folder, outcomes, is_tiny=False, **results):
    """Write the archive of a run with these outcomes, stage -> status; return its path."""
    folder.mkdir()
    rows = [{"stage": name, "status": status, "seconds": 1} for name, status in outcomes.items()]
    for name, content in (results | {"stages": {"tiny": is_tiny, "stages": rows}}).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    with tarfile.open(folder / "results.tar.gz", "w:gz") as tar:
        for path in folder.glob("*.json"):
            tar.add(path, path.name)
    return folder / "results.tar.gz"


def test_results_of_a_gpu_are_unpacked_and_shown_in_tables(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    page = "before\n<!-- table: gpu -->\nold\n<!-- end of table -->\nafter\n"
    found = {"device": DEVICE, "backbone_vitb": BACKBONE, "correctness": CHECKED, "parity_dinov2": PARITY}
    found["accuracy_laptop"] = RUN
    outcomes = dict.fromkeys(found, "finished") | {"windows": "stopped"}
    assert tables.unpack(write_archive(tmp_path / "first", outcomes, **found), results) == results / "nvidia_h200"
    assert tables.render(page, results) == page.replace("old", EXPECTED)

    # a later run replaces the stages that it ran, and keeps the others
    outcomes = {"device": "not started", "backbone_vitb": "failed", "correctness": "finished", "windows": "not started"}
    changed = COMMON | {"checks": {"attention": {"relative_l2": 4e-3, "bound": 0.02}}}
    tables.unpack(write_archive(tmp_path / "second", outcomes, correctness=changed), results)
    rendered = tables.render(page, results)
    assert "| attention | 4.0e-3 | 0.02 |" in rendered
    assert "| `--exp=laptop` | 150 s |" in rendered
    assert "backbone_vitb |" not in rendered
    assert "Stages without a complete result: `backbone_vitb` (failed), `windows` (stopped)." in rendered


def test_tiny_results_are_refused(tmp_path):
    archive = write_archive(tmp_path / "run", {"device": "finished"}, is_tiny=True, device=DEVICE)
    message = refuse(tmp_path, "benchmarks.tables", f"--unpack={archive}")
    assert message.endswith("results.tar.gz: contains no full-size results. Rerun run.sh without --tiny.")
