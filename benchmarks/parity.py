"""python -m benchmarks.parity [--arch=…] [--sizes=…] [--output=FILE]: compare the backbones with their authors' code.

Prints one row for each golden file in tests/golden, which the authors' own code computed, and rows at 448 pixels and
more, whose reference is computed during the benchmark: the `transformers` model with the same parameters and the
authors' position grid. Both models compute in float32 (ours at `highest` matmul precision) with synthetic weights,
written as the authors' checkpoint and converted by `python -m convert_weights`. The last column is the lowest cosine
similarity between our tokens in bfloat16, which GPUs use, and in float32.

Each error is the maximum over all arrays of a row: class token, registers and patches after the final norm, and the
patch tokens after earlier blocks. The next columns are PyTorch's own rounding error: the `transformers` model in
float32 against itself in float64, at the same size.
"""

import sys
from typing import Literal

import jax

from benchmarks.timing import environment, require_folder, write_result
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import lookup
from jaxla.models.backbones import TRANSFORMERS, dinov3
from tests.golden.checkpoints import golden_backbone, golden_files, golden_image
from tests.golden.errors import (
    BOUND,
    COSINE_BOUND,
    Deviation,
    beyond_bounds,
    deviation,
    golden_errors,
    live_errors,
    lowest_bfloat16_cosine,
)
from tests.golden.fake_weights import fake_image
from tests.golden.live import live_model, live_tokens

MAX_SMALL_WIDTH = 768  # width of the largest architecture that a CPU runs at full size within minutes
ROUNDING = "PyTorch's own float32"
COLUMNS = (
    "architecture", "image", "reference", "max abs", "relative L2", f"{ROUNDING}: max abs", f"{ROUNDING}: relative L2",
    "bfloat16: lowest cosine",
)  # fmt: skip


def main(arguments):
    parser = command_parser("benchmarks.parity", "Compare every backbone with its authors' PyTorch code.")
    which = "an architecture, `all-small`, or `all` (13 GB of memory, 9 GB of disk)"
    parser.add_argument("--arch", type=str, default="all-small", help=which)
    sizes = "`all` sizes, or only the sizes of the `golden` files"
    parser.add_argument("--sizes", type=Literal["all", "golden"], default="all", help=sizes)
    parser.add_argument("--output", type=str, help="also write the rows to this file as JSON")
    options = parse_arguments(parser, arguments)
    require_folder(options.output)
    architectures = select_architectures(options.arch)

    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    rows = []
    for arch in architectures:
        for row in measure(arch, live_sizes=options.sizes == "all"):
            rows.append(row)
            print(f"| {' | '.join(map(format_value, row.values()))} |", flush=True)

    if options.output:
        versions = environment("jax", "flax", "torch", "transformers")
        write_result({**versions, "weights": "synthetic", "rows": rows}, options.output)
    failed = [row for row in rows if not is_within_bounds(row)]
    bounds = f"max abs {BOUND[0]:g}, relative L2 {BOUND[1]:g}, bfloat16 cosine {COSINE_BOUND:g}"
    print(f"\nSynthetic weights; {len(rows) - len(failed)} of {len(rows)} rows within the bounds ({bounds}).")
    if failed:
        sys.exit(1)


def select_architectures(option):
    # ViT-7B takes 27 GB; tests/parity compares two of its blocks
    available = {name: row for name, row in TRANSFORMERS.items() if row.licence and name != "dinov3_vit7b16"}
    if option == "all":
        return list(available)
    if option == "all-small":
        return [name for name, row in available.items() if row.width <= MAX_SMALL_WIDTH]
    arch = dinov3.HUB_SPELLINGS.get(option, option)
    lookup("--arch", arch, available)
    return [arch]


def measure(arch, live_sizes):
    """Yield the rows of one architecture, each a dict with the columns as keys; `live_sizes` adds larger sizes."""
    files = {golden_image(file).shape[1:3]: file for file in golden_files(arch)}
    sizes = dict.fromkeys(files or [(98, 98)])
    if live_sizes and TRANSFORMERS[arch].width <= MAX_SMALL_WIDTH:
        sizes |= dict.fromkeys([(448, 448), (518, 518)] if TRANSFORMERS[arch].grid else [(448, 448), (512, 512)])

    vit = golden_backbone(arch)
    model = live_model(vit)
    float32_tokens, errors, cosines = {}, {}, {}
    with jax.default_matmul_precision("highest"):
        for size in sizes:
            images = fake_image(*size).transpose(0, 2, 3, 1)
            float32_tokens[size] = live_tokens(model, images)
            if size in files:
                array_errors = golden_errors(vit, files[size])
            else:
                array_errors = live_errors(vit, images, *float32_tokens[size])
            errors[size] = worst(array_errors.values())
            cosines[size] = lowest_bfloat16_cosine(vit, images)

    del vit  # the model in float64 needs the memory
    model = model.double()
    for size in sizes:
        tokens, block_tokens = live_tokens(model, fake_image(*size).transpose(0, 2, 3, 1))
        rounded, rounded_block_tokens = float32_tokens[size]
        rounding = worst([deviation(rounded, tokens), *map(deviation, rounded_block_tokens, block_tokens)])
        source = (arch, f"{size[0]}×{size[1]}", "authors' code" if size in files else "`transformers`")
        yield dict(zip(COLUMNS, (*source, *errors[size], *rounding, cosines[size]), strict=True))


def is_within_bounds(row):
    errors = {"": Deviation(row["max abs"], row["relative L2"])}
    return not beyond_bounds(errors) and row[COLUMNS[-1]] >= COSINE_BOUND


def worst(errors):
    return Deviation(*map(max, zip(*errors, strict=True)))


def format_value(value):
    if isinstance(value, str):
        return value
    return f"{value:.1e}".replace("e-0", "e-") if value < 0.1 else f"{value:.5f}"


if __name__ == "__main__":
    run_command(main)
