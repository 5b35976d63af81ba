"""An experiment in a YAML file: --config and --print_config of `jaxla.train`."""

import pytest
from jaxla.experiments import EXPERIMENTS, METHODS

from jaxla import __version__
from jaxla.cli.command_line import config_values, parse_experiment
from jaxla.cli.config_file import write_config
from jaxla.config import InputError
from tests.commands import refuse, succeed

pytestmark = pytest.mark.quick


def parse(*arguments):
    return parse_experiment(list(arguments), EXPERIMENTS, METHODS)


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        return f"--config={tmp_path / 'config.yaml'}"

    return write


@pytest.mark.parametrize("method", ["vit_mini8", "fusion_vitb14", "windows_vit_mini8", "unet", "nnunet_3d"])
def test_a_printed_config_gives_the_same_experiment(method, write):
    changed = ("--data.root=/scans/größe: #1", "--data.labels=LA:1;wall:2", "--seed=3", "--fold=all")
    experiment = parse("--exp=fewshot_5patients", f"--method={method}", *changed).experiment
    assert parse(write(write_config(config_values(experiment)))).experiment == experiment


def test_print_config_prints_a_file_with_the_options_of_the_command_line(write, tmp_path):
    words = ("--exp=quickstart", "--method=unet", "--model.widths=[8,16]", "--training.learning_rate=3e-5")
    text = succeed(tmp_path, "jaxla.train", *words, "--print_config")
    assert text.startswith(f"jaxla: {__version__}\nexp: quickstart\nmethod: unet\nseed: 0\nfold: ''\ndata:\n")
    assert "\n  widths: [8, 16]\n" in text
    assert parse(write(text)).experiment == parse(*words).experiment
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]


def test_the_command_line_overrides_the_file_and_names_the_overridden_lines(write, tmp_path):
    config = write("exp: quickstart\nmethod: unet\ntraining:\n  epochs: 4\n  batch_size: 2\nmodel.widths: [8, 16]\n")
    options = parse(config, "--training.epochs=5", "--method", "attention_unet", "--model.widths=[4]")
    assert options.experiment.method.name == "attention_unet"
    assert (options.experiment.method.training.epochs, options.experiment.method.training.batch_size) == (5, 2)
    assert options.experiment.method.model.widths == (4,)
    path = tmp_path / "config.yaml"
    assert options.overridden == (
        f"{path}:2: method=unet is overridden on the command line",
        f"{path}:4: training.epochs=4 is overridden on the command line",
        f"{path}:6: model.widths=[8,16] is overridden on the command line",
    )
    assert parse(config, "--seed=1").overridden == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exp: quickstart\ntraining:\n  lr: 3\n",
         "3: training.lr: unknown option (did you mean --training.learning_rate?). See --help for all options."),
        ("exp: quickstart\ntraining:\n  epochs: many\n", "3: .*training.epochs"),
        ("exp: quickstart\nmethod: unet\nmodel:\n  blocks: [1]\n", "4: model.blocks: method unet has no such option; "),
        ("seed: 1\nexp: quickstrat\n", "2: exp=quickstrat: unknown name (did you mean quickstart?). Known: quicks"),
        ("exp: quickstart\nresume: true\n", "2: resume is an option of a single command, not of an experiment. Pass"),
        ("exp: quickstart\nseed: 1\nseed: 2\n", "3: seed is repeated; it is also on line 2. Remove one of the two."),
        ("training:\n  epochs: 1\ntraining.epochs: 1\n", "3: training.epochs is repeated; it is also on line 2."),
        ("exp: quickstart\n  seed: 1\n", "2: not valid YAML (mapping values are not allowed here). Fix this line."),
        ("exp: [quickstart\n", "2: not valid YAML (.*). Fix this line."),
        ("exp: quickstart\n\tseed: 1\n", "2: not valid YAML (.*). Fix this line."),
        ("- exp\n", "1: expected options as `name: value`, or groups of options."),
        ("exp: quickstart\ntraining:\n", "2: training is a group of options. Indent its options below it."),
        ("model:\n  widths: {a: 1}\n", "2: model.widths: expected a value or a list of values."),
        ("model:\n  widths: [[1], 2]\n", "2: model.widths: expected a value or a list of values."),
        ("? [exp]\n: quickstart\n", "1: expected the name of an option."),
        ("exp: &a quickstart\nmethod: *b\n", "2: not valid YAML (found undefined alias 'b'). Fix this line."),
        ("jaxla: 999.0.0\nexp: quickstart\ntraining: {future: 1}\n",
         f"1: written by jaxla 999.0.0, which is newer than the installed {__version__}. Update jaxla."),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_file_and_line(text, message, write, tmp_path):
    config = write(text)
    line = refuse(tmp_path, "jaxla.train", "--exp=quickstart" if "exp:" not in text else "--seed=1", config)
    start, *rest = message.split(".*")
    assert line.startswith(f"error: {tmp_path / 'config.yaml'}:{start}")
    assert all(part in line for part in rest)


def test_a_missing_config_and_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "config.yaml"
    line = refuse(tmp_path, "jaxla.train", f"--config={path}")
    assert line == f"error: --config={path}: cannot be read (No such file or directory). Pass a YAML file."
    path.write_bytes(b"exp: \xff\xfe\n")
    assert refuse(tmp_path, "jaxla.train", f"--config={path}").startswith(f"error: {path}: not valid YAML (")


def test_a_config_of_an_older_version_is_read(write):
    assert parse(write("jaxla: 0.0.9\nexp: quickstart\n")).experiment == EXPERIMENTS["quickstart"]


def test_an_empty_config_changes_nothing(write):
    assert parse("--exp=quickstart", write("# nothing\n")).experiment == EXPERIMENTS["quickstart"]


def test_a_study_refuses_a_config():
    from jaxla.study import divide_options

    with pytest.raises(InputError, match=r"^--config: the study sets this option for each run. Remove the option.$"):
        divide_options(["--config=a.yaml"], ["unet"])
