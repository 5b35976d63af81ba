"""python -m benchmarks.few_patients --data.root=DIR: accuracy after training on few patients for a few minutes.

For each number of training patients and each seed, compares three methods on the same held-out patients:

- `laptop`: `python -m jaxla.train --exp=laptop`, run in a separate process.
- `monai`: MONAI's two-dimensional BasicUNet with its default widths, trained on slices of the same size and with the
  same grey values as for `laptop`, without augmentation. The loss is MONAI's Dice and cross-entropy, the optimiser Adam
  with a learning rate of 0.001, the batch size 16. As in `laptop`, only the largest connected component is kept.
- `atlas`: the mean training mask (`jaxla.evaluation.atlas`).

`laptop` and `monai` train for the same number of minutes, not counting startup, compilation and testing. One patient is
used for validation, which only chooses the threshold of the atlas: `laptop` keeps its last weights. Seed k selects the
k-th subset of the training patients and initialises both networks. All scores are per volume.

Prints JSON: for each number of training patients and each seed, the mean Dice, the worst Dice and the mean HD95 over
the held-out patients.
"""

import csv
import json
import logging
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxla.experiments import EXPERIMENTS
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet

from benchmarks.timing import environment, print_result, require_folder
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.files import default_cache_dir
from jaxla.cli.process import run_command
from jaxla.config import Data, InputError
from jaxla.data.batches import SliceSource
from jaxla.data.cases import find_cases
from jaxla.data.dataset import prepare_data
from jaxla.data.inputs import Canvas, input_to_slice
from jaxla.evaluation.summary import score_case
from jaxla.nnunet.postprocessing import keep_largest

log = logging.getLogger("jaxla.benchmarks")
SIZE, BATCH_SIZE, LEARNING_RATE = 96, 16, 1e-3  # for MONAI
POOL_SEED = 7  # draws the held-out patients


def main(arguments):
    parser = command_parser("benchmarks.few_patients", "Train on few patients for a few minutes, with jaxla and MONAI.")
    parser.add_argument("--data.root", type=str, required=True, help="folder of scans with masks")
    parser.add_argument("--patients", type=list[int], default=[1, 4, 12], help="numbers of training patients")
    parser.add_argument("--minutes", type=float, default=8, help="training time of each network")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds for each number of patients")
    parser.add_argument("--output", type=str, default="", help="file for the JSON")
    options = parse_arguments(parser, arguments)
    require_folder(options.output)
    root = options.data.root
    most = max(options.patients)
    dataset = find_cases(root)
    ids = [case.id for case in dataset.cases]
    if len(dataset.labels.names) > 1:
        raise InputError(f"--data.root={root}", "has several structures", "Use scans with one structure.")
    if most + 2 > len(ids):
        problem = f"needs {most + 2} scans ({most} for training, 1 for validation, 1 held out), but found {len(ids)}"
        raise InputError(f"--patients={options.patients}", problem, "Use fewer patients.")
    ids = [ids[i] for i in np.random.default_rng(POOL_SEED).permutation(len(ids))]
    split = {"train": ids[:most], "val": ids[most : most + 1], "test": ids[most + 1 :]}
    result = {
        **environment("jax", "flax", "torch", "monai"),
        "data": Path(root).name,
        "minutes": options.minutes,
        "held_out": len(split["test"]),
        "unit": "volume",
        "runs": [],
    }
    with TemporaryDirectory(prefix="jaxla-few-") as folder:
        split_file = Path(folder) / "split.json"
        split_file.write_text(json.dumps(split))
        for count in options.patients:
            for seed in range(options.seeds):
                data = Data(root=root, split=str(split_file), train_patients=count, subset_seed=seed)
                scores = train_laptop(data, seed, options.minutes, Path(folder) / f"{count}_{seed}")
                scores["monai"] = train_monai(data, seed, options.minutes)
                result["runs"].append({"patients": count, "seed": seed, **scores})
                log.info("%d patients, seed %d: %s", count, seed, scores)
    print_result(result, options.output)


def train_laptop(data, seed, minutes, folder):
    """Run `jaxla.train --exp=laptop` in `folder`; return the scores of the network and of the atlas."""
    values = {f"data.{name}": getattr(data, name) for name in ("root", "split", "train_patients", "subset_seed")}
    values |= {"seed": seed, "training.minutes": minutes, "run-dir": folder}
    words = [f"--{name}={value}" for name, value in values.items()]
    subprocess.run([sys.executable, "-m", "jaxla.train", "--exp=laptop", *words], check=True)
    with (folder / "test" / "cases.csv").open() as file:
        rows = [{name: float(row[name]) for name in ("dice", "hd95_mm")} for row in csv.DictReader(file)]
    summary = json.loads((folder / "test" / "summary.json").read_text())
    atlas = {"mean_dice": summary["atlas"]["dice"]["mean"], "mean_hd95_mm": summary["atlas"]["hd95_mm"]["mean"]}
    return {"laptop": describe(rows), "atlas": atlas}


def train_monai(data, seed, minutes):
    """Train MONAI's network, and return its scores."""
    prepared = prepare_data(replace(EXPERIMENTS["laptop"], data=data), default_cache_dir())
    train, test = (prepared.select_volumes(ids) for ids in (prepared.split.train, prepared.split.test))
    source = SliceSource(train, Canvas(SIZE))
    rows = [source[i] for i in range(len(source))]
    images = torch.from_numpy(np.stack([row["input"][..., 0] for row in rows])[:, None])
    masks = torch.from_numpy(np.stack([row["mask"] for row in rows])[:, None].astype(np.float32))
    torch.manual_seed(seed)
    network = BasicUNet(spatial_dims=2, in_channels=1, out_channels=1)
    loss = DiceCELoss(sigmoid=True)
    optimiser = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    rng = np.random.default_rng(seed)
    steps = 0
    end = time.perf_counter() + 60 * minutes
    while time.perf_counter() < end:
        chosen = torch.from_numpy(rng.integers(0, len(images), BATCH_SIZE))
        optimiser.zero_grad()
        loss(network(images[chosen]), masks[chosen]).backward()
        optimiser.step()
        steps += 1
    network.eval()
    return {"steps": steps} | describe([score(network, volume, prepared.dataset.labels.names) for volume in test])


def score(network, volume, names):
    source = SliceSource([volume], Canvas(SIZE))
    with torch.inference_mode():
        slices = [torch.from_numpy(source[i]["input"][None, None, ..., 0]) for i in range(len(source))]
        probabilities = [torch.sigmoid(network(image)).numpy()[0, 0, ..., None] for image in slices]
    resized = [input_to_slice(each, source.frames[0], volume.shape[1:])[..., 0] for each in probabilities]
    predicted = keep_largest((np.stack(resized) > 0.5).astype(np.uint8), [(1,)])
    return score_case(volume.id, predicted, volume.mask, volume.spacing, names)[0]


def describe(rows):
    dice, hd95 = ([row[name] for row in rows] for name in ("dice", "hd95_mm"))
    return {"mean_dice": np.mean(dice), "worst_dice": np.min(dice), "mean_hd95_mm": np.mean(hd95)}


if __name__ == "__main__":
    run_command(main)
