"""YAML files that describe an experiment: `--config=FILE.yaml` reads one, `--print_config` writes one.

    jaxla: 0.1.0            # the version that wrote the file
    exp: fewshot_5patients
    method: unet
    training:
      epochs: 20

A file holds any of an experiment's options. The command line overrides the file; all other options keep the
experiment's own values. Options of a single command, such as --run-dir and --resume, belong on the command line.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxla.cli.files import report_os_errors
from jaxla.config import InputError
from jaxla.version import __version__

VERSION_KEY = "jaxla"


class Entry(NamedTuple):
    """An option in a file: its name without dashes, its value as the command line takes it, and its line."""

    name: str
    value: str
    line: int

    @property
    def word(self) -> str:
        """The option as a word of a command line."""
        return f"--{self.name}={self.value}"


def read_config(path: Path) -> list[Entry]:
    """Return the options in a file, in its order.

    Raises:
        InputError: the file cannot be read, is not YAML of this kind, repeats an option, or was written by a newer
            version.
    """
    with report_os_errors("read", f"--config={path}", "Pass a YAML file."):
        content = path.read_bytes()
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise InputError(_where(path, mark), f"not valid YAML ({reason})", "Fix this line.") from error
    entries = [] if root is None else list(_read_mapping(path, root, ""))
    first_lines: dict[str, int] = {}
    for entry in entries:
        if (first := first_lines.setdefault(entry.name, entry.line)) != entry.line:
            problem = f"{entry.name} is repeated; it is also on line {first}"
            raise InputError(f"{path}:{entry.line}", problem, "Remove one of the two.")
        if entry.name == VERSION_KEY:
            _require_known_version(path, entry)
    return [entry for entry in entries if entry.name != VERSION_KEY]


def write_config(values: Mapping[str, Any]) -> str:
    """Return options, by dotted name, as the text of a file: first those without a group, then each group."""
    content: dict[str, Any] = {VERSION_KEY: __version__}
    for name, value in values.items():
        group, _, field = name.rpartition(".")
        target = content.setdefault(group, {}) if group else content
        target[field] = list(value) if isinstance(value, tuple) else value
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def find_overridden(entries: Sequence[Entry], arguments: Sequence[str]) -> list[Entry]:
    """Return the options of a file that the command line overrides."""
    given = {word.removeprefix("--").split("=")[0] for word in arguments if word.startswith("--")}
    return [entry for entry in entries if entry.name in given]


def _read_mapping(path: Path, node: yaml.Node, group: str) -> Sequence[Entry]:
    if not isinstance(node, yaml.MappingNode):
        problem = "expected options as `name: value`, or groups of options"
        raise InputError(_where(path, node.start_mark), problem, "--print_config prints a file as an example.")
    entries: list[Entry] = []
    for key, value in node.value:
        where = _where(path, key.start_mark)
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(where, "expected the name of an option", "Write `name: value`.")
        name = f"{group}{key.value}"
        if isinstance(value, yaml.MappingNode) and not group:
            entries += _read_mapping(path, value, f"{name}.")
        else:
            entries.append(Entry(name, _to_word(where, name, value), key.start_mark.line + 1))
    return entries


def _to_word(where: str, name: str, node: yaml.Node) -> str:
    """Return a value as text for the command line, unchanged, so that both are parsed in the same way."""
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return "[" + ",".join(item.value for item in node.value) + "]"
    raise InputError(where, f"{name}: expected a value or a list of values", "See --help for the option's values.")


def _require_known_version(path: Path, entry: Entry) -> None:
    version, own = (tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (entry.value, __version__))
    if version > own:
        problem = f"written by jaxla {entry.value}, which is newer than the installed {__version__}"
        raise InputError(f"{path}:{entry.line}", problem, "Update jaxla.")


def _where(path: Path, mark: yaml.Mark | None) -> str:
    return f"{path}:{mark.line + 1}" if mark else str(path)


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)
