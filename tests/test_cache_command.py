"""python -m jaxla.cache: what it lists, what it clears, and when it refuses to clear."""

import os
import re
import shutil
import signal

import pytest

from jaxla.data.cases import find_cases
from jaxla.data.inputs import Canvas
from jaxla.data.phantoms import ensure_phantoms
from jaxla.data.prepared import prepare_cases
from jaxla.models.networks.base import build_network
from jaxla.models.networks.transformer_segmenter import TransformerSegmenterOptions
from jaxla.models.weights_format import save_weights
from jaxla.nnunet.preprocessing import preprocess_volumes
from jaxla.training.features import FeatureCache
from tests.commands import hold_in_another_process, parse_bytes, run_in_this_process
from tests.data.nifti import write_flat_pairs
from tests.nnunet.test_preprocessing import make_tiny_plan

pytestmark = pytest.mark.usefixtures("fast_compilation")

USES_THE_CACHE = (
    "from pathlib import Path; from jaxla.data.cache import mark_cache_in_use;"
    "hold = mark_cache_in_use(Path(sys.argv[1]))"
)


def count_bytes(folder):
    return sum(path.stat().st_size for path in (folder, *folder.rglob("*")) if path.is_file())


def contents(folder):
    """Return relative path -> content of every file, except those that mark the cache as in use."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "in-use")
    return {path.relative_to(folder): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory):
    """A cache folder with entries of every kind: two volumes, one of them with features."""
    folder = tmp_path_factory.mktemp("cache_command")
    cache = folder / "cache"
    volumes = prepare_cases(find_cases(write_flat_pairs(folder / "data", 2), ""), cache)
    network = build_network(TransformerSegmenterOptions("vit_mini8", "random", decoder_widths=(8,)), 1, seed=0)
    FeatureCache(cache, network, "vit_mini8", Canvas(16)).features(volumes[:1])
    preprocess_volumes(volumes[:1], *make_tiny_plan((2.5, 0.75, 0.75)), cache)
    ensure_phantoms(cache, "small", 1)
    save_weights(cache / "weights" / "mine.safetensors", {}, {"arch": "vit_mini8", "source": "", "licence": ""})
    (cache / "compiled" / "processor").mkdir(parents=True)
    for name, size in {"jit_step-0a-cache": 4000, "jit_step-0a-atime": 8}.items():  # as JAX names them
        (cache / "compiled" / "processor" / name).write_bytes(bytes(size))
    (cache / "downloads").mkdir()
    for name, size in {"a.pth": 3000, "b.pth.part": 2000, "b.pth.lock": 0}.items():  # `b` was interrupted
        (cache / "downloads" / name).write_bytes(bytes(size))
    return cache


@pytest.fixture
def cache(filled_cache, tmp_path):
    return shutil.copytree(filled_cache, tmp_path / "cache")


def run_cache(cache, *options):
    """Run the command, which must succeed, and return the lines that it prints."""
    done = run_in_this_process(cache.parent, "jaxla.cache", f"--cache-dir={cache}", *options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def refuse(cache, *options):
    """Run the command, check that it fails without removing anything, and return its error."""
    before = contents(cache)
    done = run_in_this_process(cache.parent, "jaxla.cache", f"--cache-dir={cache}", *options)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert contents(cache) == before
    return done.stderr


# --- listing ---------------------------------------------------------------------------------------------------------


def test_every_kind_is_listed_with_its_size(cache):
    lines = [line.split(maxsplit=1) for line in run_cache(cache)]
    (backbone,) = (cache / "features").iterdir()
    listed = [  # text of each line, and the folder or file whose size it shows
        ("volumes: prepared volumes", cache / "volumes"),
        ("2 volumes", cache / "volumes"),
        ("planned: volumes resampled for nnU-Net", cache / "planned"),
        ("1 volumes", cache / "planned"),
        ("features: features of frozen backbones", cache / "features"),
        ("vit_mini8, 16 px, float32, 1 volumes: patch tokens after the final norm", backbone),
        ("phantoms: synthetic scans", cache / "phantoms"),
        ("small-1-v1", cache / "phantoms"),
        ("compiled: compiled programs", cache / "compiled"),
        ("1 program for one kind of processor", cache / "compiled"),
        ("weights: converted weights", cache / "weights"),
        ("mine.safetensors", cache / "weights"),
        ("downloads: released checkpoints as downloaded", cache / "downloads"),
        ("a.pth", cache / "downloads" / "a.pth"),
        ("b.pth, partly downloaded", cache / "downloads" / "b.pth.part"),
    ]
    assert [text for _, text in lines[:-1]] == [text for text, _ in listed]
    for (shown, text), (_, folder) in zip(lines, listed, strict=False):
        assert parse_bytes(shown) == pytest.approx(count_bytes(folder), rel=0.005), text
    assert parse_bytes(lines[-1][0]) == pytest.approx(sum(map(len, contents(cache).values())), rel=0.005)
    assert lines[-1][1] == f"in total, in {cache}"


def test_listing_changes_nothing(cache):
    before = sorted(cache.rglob("*"))
    run_cache(cache)
    assert sorted(cache.rglob("*")) == before


def test_leftovers_of_a_killed_process_are_listed_and_not_counted_as_volumes(cache):
    (cache / "volumes" / f".{32 * 'a'}.volume").mkdir()
    (cache / "volumes" / f".{32 * 'a'}.volume" / "image.npy").write_bytes(bytes(5000))
    lines = [line.strip() for line in run_cache(cache)]
    assert "5.00kB  incomplete, from a killed process" in lines
    assert any(line.endswith("B  2 volumes") for line in lines)


@pytest.mark.parametrize("exists", [True, False], ids=["empty", "missing"])
def test_an_empty_cache_is_listed_and_cleared(tmp_path, exists):
    cache = tmp_path / "cache"
    if exists:
        cache.mkdir()
    (line,) = run_cache(cache)
    assert line.split(maxsplit=1) == ["0.00B", f"in total, in {cache}"]
    assert run_cache(cache, "--clear=all") == [
        f"{cache}: volumes, planned, features, phantoms, compiled, downloads cleared, 0.00B freed"
    ]
    assert cache.exists() == exists


# --- clearing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "cleared"),
    [
        ("features", {"features"}),
        ("volumes", {"volumes"}),
        ("planned", {"planned"}),
        ("phantoms", {"phantoms"}),
        ("compiled", {"compiled"}),
        ("downloads", {"downloads"}),
        ("all", {"features", "volumes", "planned", "phantoms", "compiled", "downloads"}),
    ],
)
def test_only_the_named_kind_is_cleared_and_never_weights(cache, option, cleared):
    before = contents(cache)
    (line,) = run_cache(cache, f"--clear={option}")
    after = contents(cache)
    assert after == {path: content for path, content in before.items() if path.parts[0] not in cleared}
    assert after[next(path for path in before if path.name == "mine.safetensors")]
    kinds, freed = re.fullmatch(rf"{cache}: (.*) cleared, (\S+) freed", line).groups()
    assert set(kinds.split(", ")) == cleared
    freed_bytes = sum(map(len, before.values())) - sum(map(len, after.values()))
    assert parse_bytes(freed) == pytest.approx(freed_bytes, rel=0.005)
    listed = {line.split()[1].rstrip(":") for line in run_cache(cache)}
    assert not listed & cleared


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--clear=weights", 'command line: .*"clear".*features.*volumes.*phantoms.*downloads.*all.*weights'),
        ("--clear=feature", 'command line: .*"clear".*features.*volumes.*phantoms.*downloads.*all.*: feature'),
        ("--clean=all", r"--clean: unknown option \(did you mean --clear\?\)"),
        ("all", "command line: unexpected argument 'all'"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_cleared(cache, option, message):
    assert re.search(f"^error: {message}", refuse(cache, option))


def test_a_cache_in_use_is_not_cleared_until_the_process_has_ended(cache):
    with hold_in_another_process(USES_THE_CACHE, cache) as user:
        error = refuse(cache, "--clear=all")
        assert f"--cache-dir={cache}: process {os.uname().nodename}-{user.pid} uses it" in error
        assert len(run_cache(cache)) == 16  # lines: the cache can still be listed
    run_cache(cache, "--clear=all")
    assert not any((cache / "volumes").iterdir())


def test_a_killed_process_does_not_keep_the_cache_from_being_cleared(cache):
    with hold_in_another_process(USES_THE_CACHE, cache) as user:
        user.send_signal(signal.SIGKILL)
        user.wait()
    (mark,) = (cache / "in-use").iterdir()  # left behind by the killed process
    run_cache(cache, "--clear=all")
    assert not mark.exists()
    assert not any((cache / "volumes").iterdir())


def test_one_remaining_process_keeps_the_cache_from_being_cleared(cache):
    with (
        hold_in_another_process(USES_THE_CACHE, cache) as killed,
        hold_in_another_process(USES_THE_CACHE, cache) as alive,
    ):
        killed.kill()
        killed.wait()
        assert f"-{alive.pid} uses it" in refuse(cache, "--clear=features")
