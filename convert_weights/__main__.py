"""python -m convert_weights: released checkpoints <-> this package's weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxla.cli.command_line import command_parser, parse_arguments, require_writable
from jaxla.cli.process import run_command
from jaxla.config import InputError, default_cache_dir, lookup

if TYPE_CHECKING:
    from jsonargparse import Namespace

# JAX takes seconds to import, and a command that shows its help must not wait for it: hence the imports within.


def main(arguments: list[str]) -> None:
    parser = command_parser(
        "convert_weights",
        "Convert a released checkpoint; the result knows its architecture, source and licence.",
    )
    parser.add_argument("--arch", type=str, help="architecture, or `list`")
    parser.add_argument(
        "--source", type=str, help="released checkpoint: .pth, .safetensors, index of shards, or a folder with one"
    )
    parser.add_argument("--download", action="store_true", help="fetch the released checkpoint in place of --source")
    parser.add_argument(
        "--plans", type=str, help="with --arch=nnunet: nnU-Net's nnUNetPlans.json, or a plan of jaxla.plan"
    )
    parser.add_argument("--configuration", type=str, help="with --arch=nnunet: 2d or 3d_fullres")
    parser.add_argument("--output", type=str, help=".safetensors file to write (default: where training looks for it)")
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    parser.add_argument("--verify", action="store_true", help="read the output again, check it, run it on an image")
    parser.add_argument("--to-torch", action="store_true", help="back: --source is a converted file, --output a .pth")
    options = parse_arguments(parser, arguments)

    if options.arch == "list":
        _print_architectures()
    elif options.to_torch:
        _convert_back(options)
    elif options.source or options.download:
        _convert(options)
    elif options.verify:
        _verify(options)
    else:
        raise InputError("option --source is required to convert, or --download; --help describes both")


def _print_architectures() -> None:
    from convert_weights.architectures import RELEASED
    from convert_weights.download import RELEASES
    from jaxla.models.backbones import resnet, vgg
    from jaxla.models.backbones.dinov3 import HUB_SPELLINGS
    from jaxla.nnunet.converted import NNUNET

    print(
        f"{NNUNET}: a network that nnU-Net trained, as its --plans and --configuration (2d, 3d_fullres) say; pass its "
        "checkpoint_final.pth as --source"
    )
    spellings = {arch: f"; also spelt {spelling}" for spelling, arch in HUB_SPELLINGS.items()}
    for arch, variant in RELEASED.items():
        match variant:
            case resnet.Variant():
                size = f"{sum(variant.blocks)} blocks"
            case vgg.Variant():
                size = f"{sum(map(len, variant.stages))} convolutions"
            case _:
                size = f"width {variant.width}, {variant.depth} blocks"
        got = "--download fetches them" if arch in RELEASES else "download them yourself and pass --source"
        print(f"{arch}: {size}, weights under {variant.licence}, {got}{spellings.get(arch, '')}")


def _convert(options: Namespace) -> None:
    if options.source and options.download:
        raise InputError("options --source and --download: give one of them")
    if not options.arch:
        verify = "; to verify a converted file, give it as --output" if options.verify and options.source else ""
        raise InputError(f"option --arch is required to convert; --arch=list names the architectures{verify}")
    from jaxla.nnunet.converted import NNUNET

    if options.arch == NNUNET:
        _convert_nnunet(options)
        return
    if options.plans or options.configuration:
        raise InputError(f"options --plans and --configuration go with --arch={NNUNET}; leave them out")
    arch = _released(options.arch)
    from convert_weights.architectures import released
    from convert_weights.checkpoint import find_checkpoint, open_checkpoint
    from convert_weights.convert import convert

    source = find_checkpoint(options.source) if options.source else None
    output = Path(options.output) if options.output else _default_output(arch)
    _require_free(output, ".safetensors", options.force)
    print(convert(released(arch), open_checkpoint(source or _downloaded(arch)), output))
    if options.verify:
        _print_verified(output)


def _convert_nnunet(options: Namespace) -> None:
    lacking = [name for name in ("plans", "configuration", "source", "output") if not options[name]]
    if lacking:
        raise InputError(
            f"option --{lacking[0]} is required with --arch=nnunet: --plans=nnUNetPlans.json --configuration=2d "
            "--source=checkpoint_final.pth --output=FILE.safetensors"
        )
    from convert_weights.architectures import nnunet
    from convert_weights.checkpoint import find_checkpoint, open_checkpoint
    from convert_weights.convert import convert
    from convert_weights.nnunet import STATE
    from jaxla.nnunet.plan import read_plan

    plan = read_plan(Path(options.plans))
    source, output = find_checkpoint(options.source), Path(options.output)
    plan.configuration(options.configuration, options.plans)
    _require_free(output, ".safetensors", options.force)
    checkpoint = open_checkpoint(source, under=STATE)
    print(convert(nnunet(plan, options.configuration, checkpoint), checkpoint, output))
    if options.verify:
        _print_verified(output)


def _downloaded(arch: str) -> Path:
    from convert_weights.checkpoint import require_torch
    from convert_weights.download import DINOV3_GATE, RELEASES, download
    from jaxla.data.cache import mark_cache_in_use
    from jaxla.models.backbones import dinov3

    if arch in dinov3.VARIANTS:
        raise InputError(f"--download: {DINOV3_GATE}")
    require_torch("option --download")  # all of them are PyTorch files
    cache_dir = default_cache_dir()
    with mark_cache_in_use(cache_dir):
        return download(RELEASES[arch], cache_dir / "downloads")


def _convert_back(options: Namespace) -> None:
    if options.download or options.verify:
        raise InputError("option --to-torch goes with --source and --output alone; --verify checks converted files")
    if not options.source or not options.output:
        raise InputError("option --to-torch needs --source, a converted .safetensors file, and --output, a .pth")
    source, output = Path(options.source), Path(options.output)
    arch = _arch_of(source, options.arch)
    _require_free(output, ".pth", options.force)

    from convert_weights.pytorch import to_pytorch

    print(f"{output}: {arch} from {source}, {to_pytorch(source, output)} tensors as their authors' state dict")


def _verify(options: Namespace) -> None:
    if options.force:
        raise InputError("option --force goes with a conversion; --verify alone writes nothing")
    if not options.output and not options.arch:
        raise InputError("option --verify needs --output, a converted file, or --arch for the one in the cache folder")
    output = Path(options.output) if options.output else _default_output(_released(options.arch))
    _arch_of(output, options.arch)
    _print_verified(output)


def _print_verified(output: Path) -> None:
    from convert_weights.verify import verify

    print(verify(output))


def _released(name: str) -> str:
    """The architecture that --arch names."""
    from convert_weights.architectures import RELEASED
    from jaxla.models.backbones.dinov3 import HUB_SPELLINGS
    from jaxla.nnunet.converted import NNUNET

    arch = HUB_SPELLINGS.get(name, name)
    lookup("--arch", arch, {**RELEASED, NNUNET: None})
    return arch


def _arch_of(path: Path, name: str | None) -> str:
    """The architecture of a converted file; that of --arch, if it is given."""
    from jaxla.models.weights_format import read_metadata

    arch = read_metadata(path)["arch"]
    if name not in (None, arch) and _released(name) != arch:
        raise InputError(f"{path}: holds {arch}, not {_released(name)}; leave --arch out")
    return arch


def _default_output(arch: str) -> Path:
    return default_cache_dir() / "weights" / f"{arch}.safetensors"


def _require_free(output: Path, ending: str, force: bool) -> None:
    """Before anything long: what would keep the output from being written."""
    if output.suffix != ending:
        raise InputError(f"--output={output}: the file's name must end in {ending}")
    if os.path.isdir(output):
        raise InputError(f"--output={output}: is a folder; give a file")
    try:
        if output.exists() and not force:
            raise InputError(f"{output}: exists already; choose another --output, or replace it with --force")
        require_writable("--output", output.parent)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise InputError(f"--output={output}: cannot be written ({error.strerror}); choose another") from error


if __name__ == "__main__":
    run_command(main)
