"""What a run cost, `cost.json`: to be read beside how good it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxla.cli.files import write_atomically


@dataclass(frozen=True)
class Cost:
    """Parameters, multiply-adds, memory and seconds of one run.

    Attributes:
        parameters: of the whole network.
        trained_parameters: those of them that training changes.
        multiply_adds: for one slice, at the network's input size, by the whole network; of a volume its share.
        step_bytes: device memory of a training step, by XLA's account.
        peak_host_bytes: most memory that the process had on the host at any time, so on CPU all it had; None where the
            system does not say.
        peak_device_bytes: most that it had on a GPU; None on CPU.
        inference_seconds: for each test volume that was timed, from the scan in memory to the mask on its grid, by the
            whole network, compiled before.
        inference_slices: how many slices each of these has.
        step_slices: how many slices a training step sees.
    """

    parameters: int
    trained_parameters: int
    multiply_adds: int
    step_bytes: int
    peak_host_bytes: int | None
    peak_device_bytes: int | None
    inference_seconds: tuple[float, ...]
    inference_slices: tuple[int, ...]
    step_slices: int = 0


def write_cost(cost: Cost, path: Path) -> None:
    write_atomically(path, json.dumps(asdict(cost), indent=1) + "\n")
