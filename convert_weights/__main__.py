"""Convert released checkpoints into this package's weights, and back: `python -m convert_weights`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxla.cli.command_line import command_parser, parse_arguments, require_writable
from jaxla.cli.files import default_cache_dir
from jaxla.cli.process import run_command
from jaxla.config import InputError, lookup

if TYPE_CHECKING:
    from jsonargparse import Namespace

# JAX takes seconds to import. Functions import what needs it, so that --help does not wait.


def main(arguments: list[str]) -> None:
    parser = command_parser(
        "convert_weights", "Convert a released checkpoint. The result states its architecture, source and licence."
    )
    parser.add_argument("--arch", type=str, help="architecture; `list` prints all of them")
    parser.add_argument("--source", type=str, help="checkpoint: .pth, .bin, .safetensors, index of shards, or folder")
    parser.add_argument("--download", action="store_true", help="download the checkpoint instead of reading --source")
    parser.add_argument(
        "--plans", type=str, help="for --arch=nnunet: nnUNetPlans.json, or a plan written by jaxla.plan"
    )
    parser.add_argument("--configuration", type=str, help="for --arch=nnunet: 2d or 3d_fullres")
    parser.add_argument("--output", type=str, help=".safetensors file to write (default: where training finds it)")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--verify", action="store_true", help="check the output and run its network on one image")
    parser.add_argument(
        "--to-torch", action="store_true", help="convert a converted file, --source, back into a .pth file, --output"
    )
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
        problem = "required to convert a checkpoint"
        raise InputError("--source", problem, "Pass --source=FILE or --download; see --help.")


def _print_architectures() -> None:
    from convert_weights.architectures import RELEASED
    from convert_weights.download import RELEASES
    from jaxla.models.backbones import resnet, vgg
    from jaxla.models.backbones.dinov3 import HUB_SPELLINGS
    from jaxla.nnunet.converted import NNUNET

    print(
        f"{NNUNET}: a network trained by nnU-Net; pass its checkpoint_final.pth as --source, its nnUNetPlans.json as "
        "--plans, and --configuration=2d or 3d_fullres"
    )
    aliases = {arch: f"; also called {alias}" for alias, arch in HUB_SPELLINGS.items()}
    for arch, variant in RELEASED.items():
        match variant:
            case resnet.Variant():
                size = f"{sum(variant.blocks)} blocks"
            case vgg.Variant():
                size = f"{sum(map(len, variant.stages))} convolutions"
            case _:
                size = f"width {variant.width}, {variant.depth} blocks"
        origin = "use --download" if arch in RELEASES else "download them yourself and use --source"
        print(f"{arch}: {size}, weights under {variant.licence}, {origin}{aliases.get(arch, '')}")


def _convert(options: Namespace) -> None:
    if options.source and options.download:
        raise InputError("--download", "cannot be combined with --source", "Pass only one of the two options.")
    if not options.arch:
        verify = " To verify a converted file, pass it as --output." if options.verify and options.source else ""
        raise InputError("--arch", "required to convert a checkpoint", f"--arch=list shows the names.{verify}")
    from convert_weights.architectures import nnunet_architecture, released_architecture
    from convert_weights.checkpoint import find_checkpoint, open_checkpoint
    from convert_weights.convert import convert
    from jaxla.nnunet.converted import NNUNET

    if options.arch == NNUNET:
        from convert_weights.nnunet import STATE_DICT_KEY
        from jaxla.nnunet.plan import read_plan

        example = "--plans=nnUNetPlans.json --configuration=2d --source=checkpoint_final.pth --output=FILE.safetensors"
        _require_options(options, ("plans", "configuration", "source", "output"), "--arch=nnunet", example)
        plan = read_plan(Path(options.plans))
        source, output = find_checkpoint(options.source), Path(options.output)
        plan.configuration(options.configuration, options.plans)
        _require_free(output, ".safetensors", options.force)
        checkpoint = open_checkpoint(source, STATE_DICT_KEY)
        architecture = nnunet_architecture(plan, options.configuration, checkpoint)
    else:
        for name in ("plans", "configuration"):
            if options[name]:
                raise InputError(f"--{name}", f"applies only to --arch={NNUNET}", "Remove the option.")
        arch = _resolve_arch(options.arch)
        source = find_checkpoint(options.source) if options.source else None
        output = Path(options.output) if options.output else _default_output(arch)
        _require_free(output, ".safetensors", options.force)
        architecture, checkpoint = released_architecture(arch), open_checkpoint(source or _download(arch))
    print(convert(architecture, checkpoint, output))
    if options.verify:
        _print_verified(output)


def _require_options(options: Namespace, names: tuple[str, ...], use: str, example: str) -> None:
    for name in names:
        if not options[name]:
            raise InputError(f"--{name}", f"required with {use}", f"Pass {example}.")


def _download(arch: str) -> Path:
    from convert_weights.download import RELEASES, download
    from convert_weights.torch_file import require_torch
    from jaxla.data.cache import mark_cache_in_use
    from jaxla.models.backbones import dinov3

    if arch in dinov3.VARIANTS:
        problem = "DINOv3 has to be downloaded by hand, because you must accept Meta's licence first"
        where = "at https://ai.meta.com/dinov3/ or on the model's Hugging Face page"
        fix = f"Accept it {where}, download the file, and pass it as --source."
        raise InputError("--download", problem, fix)
    require_torch("--download")  # every released file is a PyTorch file
    cache_dir = default_cache_dir()
    with mark_cache_in_use(cache_dir):
        return download(RELEASES[arch], cache_dir / "downloads")


def _convert_back(options: Namespace) -> None:
    for name in ("download", "verify"):
        if options[name]:
            raise InputError(f"--{name}", "cannot be combined with --to-torch", "Remove the option.")
    example = "--source=FILE.safetensors and --output=FILE.pth"
    _require_options(options, ("source", "output"), "--to-torch", example)
    source, output = Path(options.source), Path(options.output)
    arch = _read_arch(source, options.arch)
    _require_free(output, ".pth", options.force)

    from convert_weights.pytorch import to_pytorch

    print(f"{output}: {arch} from {source}, {to_pytorch(source, output)} tensors of the authors' state dict")


def _verify(options: Namespace) -> None:
    if options.force:
        raise InputError("--force", "applies only to a conversion", "Remove the option.")
    if not options.output and not options.arch:
        fix = "Pass --output=FILE.safetensors, or --arch=ARCH for the file in the cache folder."
        raise InputError("--verify", "needs a converted file", fix)
    output = Path(options.output) if options.output else _default_output(_resolve_arch(options.arch))
    _read_arch(output, options.arch)
    _print_verified(output)


def _print_verified(output: Path) -> None:
    from convert_weights.verify import verify
    from jaxla.hardware import require_devices

    require_devices()
    print(verify(output))


def _resolve_arch(name: str) -> str:
    """Return this package's name for the architecture in --arch."""
    from convert_weights.architectures import RELEASED
    from jaxla.models.backbones.dinov3 import HUB_SPELLINGS
    from jaxla.nnunet.converted import NNUNET

    arch = HUB_SPELLINGS.get(name, name)
    lookup("--arch", arch, {**RELEASED, NNUNET: None})
    return arch


def _read_arch(path: Path, name: str | None) -> str:
    """Return the architecture of a converted file, which must match --arch if that is set."""
    from jaxla.models.weights_format import read_metadata

    arch = read_metadata(path)["arch"]
    if name not in (None, arch) and _resolve_arch(name) != arch:
        raise InputError(path, f"contains {arch}, not {_resolve_arch(name)}", "Remove --arch.")
    return arch


def _default_output(arch: str) -> Path:
    return default_cache_dir() / "weights" / f"{arch}.safetensors"


def _require_free(output: Path, suffix: str, force: bool) -> None:
    """Raise an InputError if the output cannot be written; called before any long work."""
    where = f"--output={output}"
    if output.suffix != suffix:
        raise InputError(where, f"the file name does not end in {suffix}", f"Choose a name that ends in {suffix}.")
    if os.path.isdir(output):
        raise InputError(where, "is a folder", "Pass the name of a file.")
    try:
        if output.exists() and not force:
            raise InputError(where, "already exists", "Choose another --output, or add --force to replace it.")
        require_writable("--output", output.parent)
    except OSError as error:  # the name is too long, or the folder cannot be entered
        raise InputError(where, f"cannot be written ({error.strerror})", "Choose another --output.") from error


if __name__ == "__main__":
    run_command(main)
