"""An MkDocs hook that generates pages of the documentation site during the build.

The README, the changelog, CONTRIBUTING.md and the notebook become pages. Options come from the commands' own parsers.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxla.experiments import EXPERIMENTS, METHODS
from mkdocs.structure.files import File, Files

from jaxla.__main__ import COMMANDS
from jaxla.cli.command_line import experiment_parser
from jaxla.cli.completion import read_help
from jaxla.cli.terminal import MAX_COLUMNS
from jaxla.config import METHOD_GROUPS

ROOT = Path(__file__).parents[1]
PYTHON = """# Python

The public interface of `jaxla`. Axes: B batch, H W image, h w patch grid, C channels, K classes.

::: jaxla
"""
SAME = "`jaxla COMMAND` and `python -m jaxla.COMMAND` are the same; `jaxla convert` is `python -m convert_weights`."
TRAIN = """# Options of `jaxla train`

`jaxla train --exp=NAME --method=METHOD --help` prints the options of one method, with that method's defaults.
`--print_config` prints these options as a YAML file, which `--config=FILE.yaml` reads. The methods are described in
[Experiments and methods](../experiments.md).
"""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "notebook.md": describe_notebook(ROOT / "docs" / "tutorial.ipynb"),
        "reference/commands.md": describe_commands(),
        "reference/train.md": describe_train(),
        "reference/python.md": PYTHON,
    }
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Rewrite links between files of the repository as links within the site.

    Links to code, which is not on the site, are replaced by their text.
    """
    markdown = markdown.replace("](docs/", "](").replace("](../README.md", "](index.md")
    markdown = markdown.replace("](CONTRIBUTING.md)", "](contributing.md)")
    markdown = markdown.replace("](tutorial.ipynb)", "](notebook.md)")
    return re.sub(r"\[([^\]]+)\]\(\.\./(?:jaxla|benchmarks|tests)/[^)]*\)", r"\1", markdown)


def describe_notebook(path: Path) -> str:
    """Return a notebook's text, code and stored outputs as Markdown."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```\n{''.join(output['text'])}```")
            elif "image/png" in (data := output.get("data", {})):
                parts.append(f"![output](data:image/png;base64,{''.join(''.join(data['image/png']).split())})")
    download = '<a href="../tutorial.ipynb" download>Download the notebook</a>'
    return "\n\n".join([*parts, download]) + "\n"


def describe_commands() -> str:
    """Return the help of every command."""
    os.environ["COLUMNS"] = str(MAX_COLUMNS)
    sections = ["# Commands", SAME]
    for name, (module, summary) in COMMANDS.items():
        sections += [f"## jaxla {name}", f"{summary[0].upper()}{summary[1:]}.", f"```\n{read_help(module, [])}```"]
    return "\n\n".join(sections) + "\n"


def describe_train() -> str:
    """Return a list of options for each group: meaning, default, and the methods that have the option."""
    options: dict[str, dict[str, list[tuple[str, Any]]]] = {}  # name -> meaning -> methods and actions
    for method in METHODS.values():
        for action in experiment_parser(replace(EXPERIMENTS["paper1"], method=method))._actions:
            if action.help and action.option_strings[-1].removeprefix("--") not in ("data", *METHOD_GROUPS):
                meanings = options.setdefault(action.option_strings[-1], {})
                meanings.setdefault(action.help, []).append((method.name, action))
    groups: dict[str, list[str]] = {}
    for option, meanings in options.items():
        group = option.removeprefix("--").rpartition(".")[0] or "run"
        groups.setdefault(group, []).extend(describe_option(option, found) for found in meanings.values())
    return TRAIN + "".join(f"\n## {group}\n\n" + "\n".join(lines) + "\n" for group, lines in groups.items())


def describe_option(option: str, found: list[tuple[str, Any]]) -> str:
    """Return a line for an option, from the methods that have it and their parsers' actions."""
    meaning = found[0][1].help.replace("%%", "%").rstrip(".")
    meaning = re.sub(r"`[^`]*`|<", lambda match: "&lt;" if match[0] == "<" else match[0], meaning)
    line = f"- `{option}`: {meaning}."
    defaults = [list(action.default) if isinstance(action.default, tuple) else action.default for _, action in found]
    defaults = set(map(str, defaults))
    if "Default:" in line:  # the help text already states the default
        pass
    elif len(defaults) > 1:
        line += " Default: depends on the method."
    elif (default := defaults.pop()) not in ("None", "", "False", "==SUPPRESS=="):
        line += f" Default: `{default}`."
    return line if len(found) == len(METHODS) else f"{line} Methods: {shorten_names([name for name, _ in found])}."


def shorten_names(names: list[str]) -> str:
    """Return a comma-separated list of method names, with `dinov2*` in place of a family that is complete."""
    families = {name: name.partition("_")[0] for name in METHODS}
    incomplete = {family for name, family in families.items() if name not in names}
    return ", ".join(dict.fromkeys(n if families[n] in incomplete else f"`{families[n]}*`" for n in names))
