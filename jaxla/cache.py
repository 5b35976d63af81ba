"""python -m jaxla.cache [--clear=<kind>|all]: list or clear the cache folder."""

from pathlib import Path
from typing import Literal

from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.files import default_cache_dir
from jaxla.cli.process import run_command
from jaxla.cli.terminal import format_bytes
from jaxla.data.cache import CLEARABLE, KINDS, clear_cache, list_cache


def main(arguments: list[str]) -> None:
    """List the cache folder, or clear a part of it."""
    parser = command_parser("jaxla.cache", "List the cache folder, or clear what can be computed or downloaded again.")
    parser.add_argument("--cache-dir", type=str, help="the cache folder (default: the user's cache folder)")
    kinds = Literal["features", "volumes", "planned", "phantoms", "compiled", "downloads", "all"]
    clear = "remove the entries of this kind, or of `all` six kinds; converted weights are always kept"
    parser.add_argument("--clear", type=kinds | None, default=None, help=clear)
    options = parse_arguments(parser, arguments)
    cache_dir = Path(options.cache_dir) if options.cache_dir else default_cache_dir()

    if options.clear:
        removed = clear_cache(cache_dir, options.clear)
        cleared = options.clear if options.clear != "all" else ", ".join(CLEARABLE)
        print(f"{cache_dir}: {cleared} cleared, {format_bytes(sum(entry.size for entry in removed))} freed")
        return
    entries = list_cache(cache_dir)
    for kind, content in KINDS.items():
        kind_entries = [entry for entry in entries if entry.kind == kind]
        if kind_entries:
            print(f"{format_bytes(sum(entry.size for entry in kind_entries)):>8}  {kind}: {content}")
        for entry in kind_entries:
            print(f"{format_bytes(entry.size):>12}  {entry.description}")
    print(f"{format_bytes(sum(entry.size for entry in entries)):>8}  in total, in {cache_dir}")


if __name__ == "__main__":
    run_command(main)
