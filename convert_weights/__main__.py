"""python -m convert_weights: released PyTorch checkpoints -> this package's weights."""

from __future__ import annotations

from pathlib import Path

from jaxla.config import (
    InputError,
    command_parser,
    default_cache_dir,
    lookup,
    parse_arguments,
    require_writable,
    run_command,
)


def main(arguments: list[str]) -> None:
    parser = command_parser(
        "convert_weights",
        "Convert a released PyTorch checkpoint; the result knows its architecture, source and licence.",
    )
    parser.add_argument("--arch", type=str, required=True, help="architecture, or `list`")
    parser.add_argument("--source", type=str, help="the released .pth file")
    parser.add_argument(
        "--output", type=str, help="the .safetensors file to write (default: where training looks for it)"
    )
    options = parse_arguments(parser, arguments)

    from jaxla.models.backbones import VARIANTS

    released = {arch: variant for arch, variant in VARIANTS.items() if variant.licence}
    if options.arch == "list":
        for arch, variant in released.items():
            print(f"{arch}: width {variant.width}, {variant.depth} blocks, weights under {variant.licence}")
        return
    variant = lookup("--arch", options.arch, released)
    if not options.source:
        raise InputError("option --source is required to convert")
    default = default_cache_dir() / "weights" / f"{options.arch}.safetensors"
    output = Path(options.output) if options.output else default
    if output.exists():
        raise InputError(f"{output}: exists already; choose another --output or remove it")
    if output.suffix != ".safetensors":
        raise InputError(f"--output={output}: the file's name must end in .safetensors")

    require_writable("--output", output.parent)

    from convert_weights.checkpoint import read_checkpoint
    from convert_weights.dinov2 import IGNORED, from_reference, reference_shapes
    from jaxla.models.weights_format import file_sha256, save_weights

    source = Path(options.source)
    reference = read_checkpoint(source, reference_shapes(variant), IGNORED, options.arch)
    metadata = {
        "arch": options.arch,
        "source": source.name,
        "source_sha256": file_sha256(source),
        "licence": variant.licence,
    }
    save_weights(output, from_reference(reference, variant), metadata)
    print(f"{output}: {options.arch} from {source.name}, sha256 of the result {file_sha256(output)}")


if __name__ == "__main__":
    run_command(main)
