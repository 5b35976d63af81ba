"""The dataclasses of an experiment, and how a command line overrides them."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

if TYPE_CHECKING:
    from types import FrameType

    from jsonargparse import ArgumentParser, Namespace

T = TypeVar("T")


class InputError(ValueError):
    """Bad input or usage. The message is one line: which file or option, what is wrong, how to mend it."""


class Stopped(Exception):
    """The process was asked to end, and what is needed to go on is saved; the message says where it stopped."""


@dataclass(frozen=True)
class Data:
    """Which scans, and how their patients are divided.

    Args:
        root: Folder of scans, or `phantom` for synthetic ones.
        labels: Which mask values are which class, such as `LA:1` or `anterior:1;posterior:2` or `hippocampus:1,2`;
            empty takes them from the data set.
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
    split: str = ""
    split_seed: int = 0
    train_patients: int = 0
    train_percent: float = 100.0
    subset_seed: int = 0
    phantom_size: Literal["small", "full"] = "full"
    phantom_cases: int = 20


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
        decoder_widths: Channels of the decoder's ×2 stages, coarsest first; on a transformer after those of the token
            classifier.
        widths: Channels of each level of a U-Net without pretrained encoder, finest first.
    """

    arch: str = "dinov2_vitb14"
    weights: str = ""
    backbone: Literal["frozen", "finetuned"] = "frozen"
    decoder: Literal["convolutional", "linear"] = "convolutional"
    decoder_widths: tuple[int, ...] = (512, 256, 128, 64, 32)
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)


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
    """

    opening: int = 0
    closing: int = 0


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the training slices, drawn anew for every slice of every step; 0 and false leave one out.

    Args:
        rotation: Largest angle in degrees, either way.
        scale: Largest change of size: 0.2 is from 1/1.2 to 1.2 times as large.
        flips: Whether rows and columns are reversed, each for every other slice.
        intensity: Largest change of brightness (as a share of the grey range), contrast and gamma (as `scale`).
        elastic: Standard deviation of smooth random displacements, in percent of the input's side.
    """

    rotation: float = 0.0
    scale: float = 0.0
    flips: bool = False
    intensity: float = 0.0
    elastic: float = 0.0


@dataclass(frozen=True)
class Training:
    """The recipe.

    Args:
        epochs: Most epochs to train; one epoch is ceil(slices / batch size) steps.
        batch_size: Slices in a step.
        learning_rate: Adam's rate for whatever starts from random values.
        backbone_learning_rate: Adam's rate for a backbone that is trained.
        schedule: Rate over time: `constant`, or `cosine` (2 % warm-up, then a cosine down to zero at the last epoch).
        patience: Epochs without a lower validation loss after which training stops.
        cache_features: Whether what a frozen backbone makes of a slice is computed once and kept in the cache folder.
    """

    epochs: int = 35
    batch_size: int = 32
    learning_rate: float = 1e-3
    backbone_learning_rate: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    patience: int = 10
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


@dataclass(frozen=True)
class Experiment:
    """A protocol and a method, under one name.

    Args:
        seed: Seed of initial parameters and of the order of slices.
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
    """A row of a published table, in percent; `iou` and the deviations are None where none was printed."""

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


def experiment_of(name: str, summary: str, data: Data, method: Method) -> Experiment:
    """The experiment that runs `method` under the protocol `data`."""
    return Experiment(
        name, summary, method.name, 0, data, model=method.model, preprocessing=method.preprocessing,
        training=method.training, postprocessing=method.postprocessing,
    )  # fmt: skip


def with_method(experiment: Experiment, method: Method) -> Experiment:
    """`experiment` with its method exchanged; the protocol stays."""
    return replace(experiment_of(experiment.name, experiment.summary, experiment.data, method), seed=experiment.seed)


def experiment_to_json(experiment: Experiment) -> dict[str, Any]:
    return asdict(experiment)


def experiment_from_json(values: Mapping[str, Any]) -> Experiment:
    """The inverse of `experiment_to_json`, for a run folder's own file."""
    values = {key: PARTS[key](**value) if key in PARTS else value for key, value in values.items()}
    model = values["model"]
    widths = {name: tuple(getattr(model, name)) for name in ("decoder_widths", "widths")}
    return Experiment(**{**values, "model": replace(model, **widths)})


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


def command_parser(module: str, description: str) -> ArgumentParser:
    """The parser of a command; its options are taken as spelt, never completed."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        prog=f"python -m {module}",
        usage=f"python -m {module} --option=value ...",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )


def require_writable(option: str, path: Path) -> None:
    """Raise an InputError unless the folder `path` can be made or written; leaves nothing behind."""
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{option}={path}: cannot be written, for {parent} is no writable folder; choose another")


def add_devices_option(parser: ArgumentParser) -> None:
    parser.add_argument("--devices", type=int, default=0, help="how many devices to use in all (0: all there are)")


def add_processes_options(parser: ArgumentParser) -> None:
    parser.add_argument("--coordinator", type=str, default="", help="HOST:PORT of process 0, where several meet")
    parser.add_argument("--processes", type=int | None, default=None, help="how many run this together (srun tells)")
    parser.add_argument("--process", type=int | None, default=None, help="which of them this one is, from 0 to N - 1")
    parser.add_argument("--wait", type=float, default=300, help="seconds to wait for the other processes at the start")


def parse_arguments(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """`parser.parse_args`, with every mistake an InputError of one line that names the option."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        message = " ".join(str(error).split())
    known = [option for action in parser._actions for option in action.option_strings]
    if unrecognised := re.match(r"unrecognized arguments: (.*)", message, re.IGNORECASE):
        option = unrecognised[1].split("=")[0].split(" ")[0]
        if not option.startswith("-"):
            raise InputError(f"{option!r} is no option; options are given as --name=value")
        raise InputError(f"option {option} is unknown{nearest(option, known)} --help lists them all")
    if wrong := re.match(r'Parser key "(.*?)": Does not validate .*?Literal\[(.*?)\].* Given value: (.*)', message):
        raise InputError(f"option --{wrong[1]} expects one of {wrong[2]}, got {wrong[3]!r}")
    if wrong := re.match(r'Parser key "(.*?)": Expected an? (.*)\. Got value: ?(.*)', message):
        expected = re.sub(r"<class '(.*?)'>", r"\1", wrong[2]).replace("typing.Literal", "one of ")
        expected = "a list such as [64,32]" if expected.startswith("tuple") else expected
        raise InputError(f"option --{wrong[1]} expects {expected}, got {wrong[3]!r}")
    if lacking := re.match(r"the following arguments are required: (.*)", message):
        options = ", ".join(f"--{name}" if f"--{name}" in known else name.upper() for name in lacking[1].split(", "))
        raise InputError(f"required and not given: {options}; --help describes them")
    raise InputError(f"{message}; --help lists all options")


class Options(NamedTuple):
    """A resolved command line."""

    experiment: Experiment
    run_dir: Path | None
    cache_dir: Path
    resume: bool
    dry_run: bool
    devices: int
    shard_params: bool
    coordinator: str
    processes: int | None
    process: int | None
    wait: float


def parse_experiment(
    module: str,
    arguments: list[str],
    experiments: Mapping[str, Experiment],
    methods: Mapping[str, Method],
    listing: Callable[[bool], str],
) -> Options:
    """The experiment that a command line names, with its method and options exchanged as it says.

    Prints the listing, with details for `--exp=list`, and leaves the process for that, and for `--help` without an
    experiment.

    Raises:
        InputError: an unknown experiment, method or option, or a value of the wrong kind.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--exp")
    first.add_argument("--method")
    try:
        named, _ = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error
    if named.exp == "list" or (named.exp is None and {"-h", "--help"} & set(arguments)):
        print(f"usage: python -m {module} --exp=NAME [--option=value ...]; --exp=NAME --help shows every option")
        print(listing(named.exp == "list"))
        sys.exit(0)
    if named.exp is None:
        raise InputError(f"option --exp is required; --exp=list describes them: {', '.join(experiments)}")
    experiment = lookup("experiment", named.exp, experiments)
    if named.method is not None:
        if named.method not in methods and (named.method.startswith("dinov3_") or named.method.endswith("_reg")):
            raise InputError(
                f"method {named.method!r} is unknown; a backbone is given to any method as "
                f"--model.arch={named.method}; methods: {', '.join(methods)}"
            )
        experiment = with_method(experiment, lookup("method", named.method, methods))

    summary = f"{experiment.name}: {experiment.summary}; method {experiment.method}. Options and their values:"
    parser = command_parser(module, summary)
    parser.add_argument("--exp", type=str, help="experiment, or `list`")
    parser.add_argument("--method", type=str, help="method in place of the experiment's own")
    parser.add_argument("--run-dir", type=str, help="folder for the run (default: runs/<experiment>_<time>)")
    parser.add_argument("--cache-dir", type=str, help="folder that runs share (default: the user's cache folder)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, which was ended")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would take, and leave it at that")
    add_devices_option(parser)
    parser.add_argument("--shard-params", action="store_true", help="divide large parameters over the devices")
    add_processes_options(parser)
    fixed = {"name": experiment.name, "summary": experiment.summary, "method": experiment.method}
    parser.add_class_arguments(Experiment, None, skip=set(fixed))
    parser.set_defaults({key: value for key, value in asdict(experiment).items() if key not in fixed})
    parsed = parser.instantiate(parse_arguments(parser, arguments))

    values = {key: parsed[key] for key in ("seed", *PARTS)}
    return Options(
        experiment=Experiment(**fixed, **values),
        run_dir=Path(parsed.run_dir) if parsed.run_dir else None,
        cache_dir=Path(parsed.cache_dir) if parsed.cache_dir else default_cache_dir(),
        resume=parsed.resume,
        dry_run=parsed.dry_run,
        devices=parsed.devices,
        shard_params=parsed.shard_params,
        coordinator=parsed.coordinator,
        processes=parsed.processes,
        process=parsed.process,
        wait=parsed.wait,
    )


def without_folder_and_process(command: str) -> str:
    """A run's command line without what ties it to its folder and to one of several processes."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        if word in ("--run-dir", "--coordinator", "--processes", "--process"):
            next(words, None)  # its value
        elif word != "--resume" and not word.startswith(("--run-dir=", "--coordinator=", "--process")):
            kept.append(word)
    return shlex.join(kept)


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command's `main` and leave the process: 0 on success, 2 with one line on bad input, 1 otherwise.

    SIGTERM ends it as Ctrl-C does: what is half-written is removed on the way out.
    """
    log_to_terminal()
    sys.unraisablehook = _report_unraisable
    logging.raiseExceptions = False  # a log file on a full disk loses lines, and the error itself is what is said
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(sys.argv[1:])
    except (InputError, Stopped, KeyboardInterrupt) as error:
        code, line = outcome(error)
        print(line, file=sys.stderr, flush=True)
        if not isinstance(error, InputError):  # XLA's threads may still compile, and would crash as Python goes down
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)
    sys.exit(0)


def log_to_terminal() -> None:
    """Say on the terminal what the package logs, and of others what is worth a warning."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("jaxla").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax: each option, and tracebacks of errors that it raises


def outcome(error: BaseException) -> tuple[int, str]:
    """The exit code of a command that this ends, and the line to print."""
    if isinstance(error, InputError):
        return 2, "error: " + " ".join(str(error).split())
    return 1, f"stopped {error}" if isinstance(error, Stopped) else "interrupted"


def _report_unraisable(report: sys.UnraisableHookArgs) -> None:
    if str(report.exc_value) != "Event loop is closed":  # Orbax's writers, to a loop that an error has ended
        sys.__unraisablehook__(report)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within it, SIGTERM and the first Ctrl-C only set a flag, which the yielded function reads; a second one ends."""
    if threading.current_thread() is not threading.main_thread():  # Python takes signals only there
        yield lambda: False
        return
    requested = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def request(number: int, frame: FrameType | None) -> None:
        requested.set()
        signal.signal(number, signal.default_int_handler)

    for number in before:
        signal.signal(number, request)
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
