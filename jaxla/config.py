"""The dataclasses of an experiment, and what bad input is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")

OTHERS_ARE_BACKGROUND = "background:rest"  # in labels


class InputError(ValueError):
    """Bad input or usage. Printed as one line: `{where}: {problem}. {fix}`.

    Attributes:
        where: the file or option at fault.
        problem: what is wrong with it, without a full stop.
        fix: what to do about it, as whole sentences; empty if there is nothing to advise.
    """

    def __init__(self, where: object, problem: str = "", fix: str = "") -> None:
        self.where, self.problem, self.fix = str(where), problem, fix
        text = f"{self.where}: {problem}. {fix}".rstrip() if problem else self.where
        super().__init__(" ".join(text.split()))


_speaks_command_line = False


@contextmanager
def command_line_wording() -> Iterator[None]:
    """Within it, messages name options as a command takes them (see `option`)."""
    global _speaks_command_line
    before, _speaks_command_line = _speaks_command_line, True
    try:
        yield
    finally:
        _speaks_command_line = before


def option(name: str, value: object = None) -> str:
    """Return how a message names an option.

    Libraries raise the same errors in commands and in notebooks: a command's user reads `--data.labels=LA:1`, a
    notebook's user reads `data.labels=LA:1`.
    """
    dashes = "--" if _speaks_command_line else ""
    return f"{dashes}{name}" if value is None else f"{dashes}{name}={value}"


@dataclass(frozen=True)
class Data:
    """Which scans, and how their patients are divided.

    Args:
        root: Folder of scans, or `phantom` for synthetic ones.
        labels: Which mask values are which class, such as `LA:1` or `anterior:1;posterior:2` or `hippocampus:1,2`;
            empty takes them from the data set.
        other_labels: What becomes of mask values that `labels` does not name: they are `refused`, or `background`, as
            `;background:rest` behind the labels says too.
        split: A `split.json` to use instead of drawing a split.
        split_seed: Seed of the patient-level 70/10/20 split.
        train_patients: Number of training patients to use (nested: the 10 contain the 1); 0 is all of them.
        train_percent: Percent of the training patients to use, at least one (nested too).
        subset_seed: Seed of which training patients these are; 0 takes the first ones of the split. Validation and test
            patients are the same for all seeds.
        phantom_size: With root=phantom: `full` is the whole chest, `small` a window on the heart.
        phantom_cases: With root=phantom: number of synthetic patients.
    """

    root: str = ""
    labels: str = ""
    other_labels: Literal["refused", "background"] = "refused"
    split: str = ""
    split_seed: int = 0
    train_patients: int = 0
    train_percent: float = 100.0
    subset_seed: int = 0
    phantom_size: Literal["small", "full"] = "full"
    phantom_cases: int = 20

    @property
    def all_labels(self) -> str:
        """`labels`, and that all other values are background where that is so."""
        return f"{self.labels};{OTHERS_ARE_BACKGROUND}" if self.other_labels == "background" else self.labels


@dataclass(frozen=True)
class Model:
    """The network.

    Args:
        arch: Architecture of the backbone or encoder (`python -m convert_weights --arch=list` lists those with released
            weights), or of a whole network that has none.
        weights: A converted `.safetensors` file, or `random`; empty is `<cache>/weights/<arch>.safetensors`.
        backbone: Whether the backbone's parameters stay as loaded or are trained too.
        decoder: On a transformer: `convolutional` is paper 1's, `linear` is DINOv2's own 1×1 convolution with bilinear
            upsampling.
        decoder_widths: Channels of the decoder's ×2 stages, coarsest first; on a transformer after those of its first
            level (paper 1's token classifier). Of windows four.
        blocks: Of a fusion, the blocks whose features are fused: 0 is the first, -1 the last; empty takes all.
        block_weights: Of a fusion, the weights of the blocks: learned for each level of the decoder (`per_level`), once
            for all levels (`shared`), or equal and not learned (`uniform`).
        image_stages: Of a fusion, the decoder's stages that see the image again: `all`, the `last` alone, or `none`.
        windows: Into how many windows (sub-cubes) the features of a volume are divided, which are decoded one after the
            other: along the slices, `2`; or along slices, rows and columns, `2x2x2`.
        depth_places: Of windows, places of the depth embedding, which is interpolated to the slices of a volume; 0
            leaves it out.
        convolutions: Of windows, whether those of the decoder reach neighbouring slices (`3d`), or each slice is
            decoded by itself (`2d`).
        widths: Channels of each level of a U-Net without pretrained encoder, finest first.
        plan: Of nnU-Net, the file of its plan: one that `python -m jaxla.plan` wrote, or nnU-Net's own; empty makes it
            from the run's training and validation cases.
        memory_gb: Of nnU-Net, the memory of the GPU that is planned for, in GB: less makes its patches smaller.
        network: What is built on the architecture: a file of `jaxla/models/networks`. It is the method's own.
    """

    arch: str = "dinov2_vitb14"
    weights: str = ""
    backbone: Literal["frozen", "finetuned"] = "frozen"
    decoder: Literal["convolutional", "linear"] = "convolutional"
    decoder_widths: tuple[int, ...] = (512, 256, 128, 64, 32)
    blocks: tuple[int, ...] = ()
    block_weights: Literal["per_level", "shared", "uniform"] = "per_level"
    image_stages: Literal["all", "last", "none"] = "all"
    windows: str = "1"
    depth_places: int = 32
    convolutions: Literal["3d", "2d"] = "3d"
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    plan: str = ""
    memory_gb: float = 8.0
    network: str = "transformer_segmenter"


@dataclass(frozen=True)
class Preprocessing:
    """From a slice to the network's input.

    Args:
        image_size: Side of the square input in pixels.
        pad_to: What a slice is padded to before it is resized to the input, its aspect in mm kept: `square` is the
            smallest square that holds it; `largest` the one that holds the largest training slice, in mm, so that a
            pixel is as large in all scans. Of a larger slice the centre is cut out.
    """

    image_size: int = 448
    pad_to: Literal["square", "largest"] = "square"


@dataclass(frozen=True)
class Postprocessing:
    """From the predicted classes of a slice, on its own pixels, to its mask.

    Args:
        opening: Side in pixels of the square by which each class is opened (what is narrower goes away); 0 leaves that
            out.
        closing: Side of the square by which it is then closed (what is narrower between is filled); 0 leaves that out.
        largest: Whether of all structures together, or of each, only the largest connected part is kept: `never`, or
            `if_better` (nnU-Net's), where the mean Dice of the validation cases says that it helps.
    """

    opening: int = 0
    closing: int = 0
    largest: Literal["never", "if_better"] = "never"


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the training slices, drawn anew for every slice of every step; 0 and false leave one out.

    Args:
        nnunet: Whether patches of nnU-Net are augmented as it does it; its methods read none of the other options.
        rotation: Largest angle in degrees, either way.
        scale: Largest change of size: 0.2 is from 1/1.2 to 1.2 times as large.
        flips: Whether rows and columns are reversed, each for every other slice.
        intensity: Largest change of brightness (as a share of the grey range), contrast and gamma (as `scale`).
        elastic: Standard deviation of smooth random displacements, in percent of the input's side.
    """

    nnunet: bool = False
    rotation: float = 0.0
    scale: float = 0.0
    flips: bool = False
    intensity: float = 0.0
    elastic: float = 0.0


@dataclass(frozen=True)
class Training:
    """The recipe.

    Args:
        epochs: Most epochs to train.
        steps: Steps of an epoch; 0 takes each slice (of windows each volume) once, ceil(slices / batch size).
        batch_size: Slices in a step, of nnU-Net patches, of windows volumes; 0, which is nnU-Net's alone, is what the
            plan says.
        optimiser: `adam`; or `sgd`, nnU-Net's: Nesterov's momentum 0.99, weight decay 3e-5, gradients of a norm of at
            most 12.
        learning_rate: Rate for whatever starts from random values.
        backbone_learning_rate: Rate for a backbone that is trained.
        schedule: Rate over time: `constant`; `cosine` (2 % warm-up, then a cosine down to zero at the last epoch); or
            `poly`, nnU-Net's (1 - epochs / all epochs) to the power of 0.9.
        loss: `cross_entropy`; or `dice_cross_entropy`, nnU-Net's, less the soft Dice of the structures (of a batch of
            slices together; of windows of each whole volume).
        gradient: How gradients are taken: of the `whole` network at once; or, of windows alone, in `two_pass`es over
            them, the same in the memory of one window.
        patience: Epochs without a lower validation loss after which training stops; 0 never stops it early.
        checkpoint: Which epoch is kept: the `best`, of the highest validation Dice, or the `last`.
        cache_features: Whether what a frozen backbone makes of a slice is computed once and kept in the cache folder.
    """

    epochs: int = 35
    steps: int = 0
    batch_size: int = 32
    optimiser: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-3
    backbone_learning_rate: float = 1e-5
    schedule: Literal["constant", "cosine", "poly"] = "constant"
    loss: Literal["cross_entropy", "dice_cross_entropy"] = "cross_entropy"
    gradient: Literal["whole", "two_pass"] = "whole"
    patience: int = 10
    checkpoint: Literal["best", "last"] = "best"
    cache_features: bool = True


@dataclass(frozen=True)
class Method:
    """A network with its preprocessing, training recipe and postprocessing: one row of Table 1."""

    name: str
    summary: str
    model: Model
    preprocessing: Preprocessing
    training: Training
    postprocessing: Postprocessing = Postprocessing()
    augmentation: Augmentation = Augmentation()


@dataclass(frozen=True)
class Experiment:
    """A protocol and a method, under one name.

    Args:
        seed: Seed of initial parameters and of the order of slices.
        fold: Of five-fold cross-validation over the training and validation patients, which fold validates, `0` to `4`;
            `all` trains the five, one after the other, and tests them together; empty takes the split as it is.
        data: The protocol.
        model: The network.
        preprocessing: From a slice to the network's input.
        augmentation: Random changes of the training slices.
        training: The recipe.
        postprocessing: From predicted classes to a mask.
    """

    name: str
    summary: str
    method: str
    seed: int = 0
    fold: Literal["", "0", "1", "2", "3", "4", "all"] = ""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    augmentation: Augmentation = field(default_factory=Augmentation)
    training: Training = field(default_factory=Training)
    postprocessing: Postprocessing = field(default_factory=Postprocessing)


@dataclass(frozen=True)
class Study:
    """Protocols and methods to compare: a run for each pair of them and each seed.

    Attributes:
        experiments: whose protocols are run.
        methods: to run under each, unless others are asked for.
    """

    name: str
    summary: str
    experiments: tuple[str, ...]
    methods: tuple[str, ...]


class Published(NamedTuple):
    """A row of a published table, in percent; `iou` and the deviations are None where none was printed.

    `source` says where it stands, `caveat` what to bear in mind; both become part of a sentence.
    """

    source: str
    caveat: str
    dice: float
    dice_sd: float | None = None
    iou: float | None = None
    iou_sd: float | None = None


PARTS = {
    "data": Data,
    "model": Model,
    "preprocessing": Preprocessing,
    "augmentation": Augmentation,
    "training": Training,
    "postprocessing": Postprocessing,
}


def make_experiment(name: str, summary: str, data: Data, method: Method) -> Experiment:
    """The experiment that runs `method` under the protocol `data`."""
    return Experiment(
        name, summary, method.name, data=data, model=method.model, preprocessing=method.preprocessing,
        augmentation=method.augmentation, training=method.training, postprocessing=method.postprocessing,
    )  # fmt: skip


def with_method(experiment: Experiment, method: Method) -> Experiment:
    """`experiment` with its method exchanged; the protocol stays."""
    with_it = make_experiment(experiment.name, experiment.summary, experiment.data, method)
    return replace(with_it, seed=experiment.seed, fold=experiment.fold)


def experiment_from_json(values: Mapping[str, Any]) -> Experiment:
    """An experiment from what `dataclasses.asdict` makes of it, as it stands in a run folder's own file."""

    def part(of: type, content: Mapping[str, Any]) -> Any:
        return of(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})

    return Experiment(**{key: part(PARTS[key], value) if key in PARTS else value for key, value in values.items()})


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
    """`table[name]`, or an InputError that names the nearest entry."""
    if name in table:
        return table[name]
    raise InputError(f"{kind} {name!r} is unknown{nearest(name, table)} Known: {', '.join(table)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or a full stop where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."


def default_cache_dir() -> Path:
    """The one cache folder that all runs share, unless `--cache-dir` names another."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("jaxla"))
