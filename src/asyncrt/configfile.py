"""Reads a YAML file into a tree that knows the line of every key. The only home of ``yaml``.

No error quotes a value: it may be a password.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from asyncrt.errors import ConfigError

_TAG: Final = "tag:yaml.org,2002:"
# Aliases of aliases can stand for more keys than there are atoms.
_MOST_ENTRIES: Final = 100_000
# What yaml quotes of the file: names of aliases, anchors and tags. Single characters and yaml's own
# words ('<block end>') are kept.
_QUOTED: Final = re.compile(r"('[^']*'|\"[^\"]*\")")


@dataclass(frozen=True)
class Entry:
    """A key of the file and what it says.

    Attributes:
        key: Dotted path of the key.
        line: Line of the key, from 1.
        value: The value: text, number, bool, date, ``None``, list or dict.
        items: The keys inside, if the value is a mapping.
    """

    key: str
    line: int
    value: Any = field(repr=False)
    items: Mapping[str, Entry] | None = field(default=None, repr=False)


def read_file(path: Path) -> dict[str, Entry] | None:
    """Return the file's top-level keys; ``None`` if there is no such file.

    Raises:
        ConfigError: It cannot be read, or is not a YAML mapping with each key once.
    """
    text = _read_text(path)
    if text is None:
        return None
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            return _Reader(path, loader).read(root)
        finally:
            loader.dispose()
    # `from None`: what yaml raises quotes the lines around the mistake.
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _invalid(path, line, "found a control character") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = _QUOTED.sub(_without_words, error.problem or "")
        raise _invalid(
            path,
            mark.line + 1 if mark else None,
            f"{problem} (texts with special characters need quotes)",
        ) from None
    except RecursionError:
        raise _invalid(path, None, "nested too deeply, or an alias that contains itself") from None


def _read_text(path: Path) -> str | None:
    source = str(path)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        raise ConfigError(
            f"{path} is a directory, not a configuration file",
            source=source,
            expected="a YAML file",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", source=source, expected="a readable file"
        ) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 (byte 0x{content[error.start]:02x})",
            source=source,
            line=line,
            expected="UTF-8 text",
        ) from None


def _without_words(quoted: re.Match[str]) -> str:
    return quoted[0] if len(quoted[0]) <= len("'\\t'") or quoted[0][1] == "<" else "..."


def _invalid(path: Path, line: int | None, problem: str) -> ConfigError:
    where = f"{path}:{line}" if line else str(path)
    return ConfigError(
        f"{where}: not valid YAML: {problem}", source=str(path), line=line, expected="YAML"
    )


class _Reader:
    """Turns the nodes of one file into entries."""

    def __init__(self, path: Path, loader: yaml.SafeLoader) -> None:
        self._path = path
        self._loader = loader
        self._left = _MOST_ENTRIES

    def read(self, root: yaml.Node | None) -> dict[str, Entry]:
        if root is None or root.tag == f"{_TAG}null":
            return {}
        if root.tag != f"{_TAG}map":
            raise self._error(
                root, "", "must be a mapping of sections", "sections, each with its keys"
            )
        return self._mapping(root, "")

    def _mapping(self, node: yaml.Node, prefix: str) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        merged: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                merged = self._merged(value_node, prefix) | merged
                continue
            if key_node.tag != f"{_TAG}str":
                raise self._error(
                    key_node, prefix, "has a key that is not a text: put it in quotes", "a text"
                )
            key = f"{prefix}.{key_node.value}" if prefix else key_node.value
            first = entries.get(key_node.value)
            if first is not None:
                raise self._error(
                    key_node, key, f"is already given in line {first.line}", "each key once"
                )
            line = key_node.start_mark.line + 1
            entries[key_node.value] = self._entry(key, line, value_node)
        return merged | entries

    def _merged(self, node: yaml.Node, prefix: str) -> dict[str, Entry]:
        """Return what ``<<:`` brings in; of several mappings the first one wins."""
        merged: dict[str, Entry] = {}
        for source in node.value if node.tag == f"{_TAG}seq" else [node]:
            if source.tag != f"{_TAG}map":
                raise self._error(
                    source, f"{prefix}.<<", "must name a mapping, or several", "a mapping"
                )
            merged = self._mapping(source, prefix) | merged
        return merged

    def _entry(self, key: str, line: int, node: yaml.Node) -> Entry:
        self._left -= 1
        if self._left < 0:
            raise self._error(
                node, key, f"is one of more than {_MOST_ENTRIES} entries", "a shorter file"
            )
        if node.tag == f"{_TAG}map":
            items = self._mapping(node, key)
            return Entry(key, line, {name: item.value for name, item in items.items()}, items)
        if node.tag == f"{_TAG}seq":
            listed = [
                self._entry(f"{key}[{index}]", item.start_mark.line + 1, item)
                for index, item in enumerate(node.value)
            ]
            return Entry(key, line, [item.value for item in listed])
        return Entry(key, line, self._scalar(key, node))

    def _scalar(self, key: str, node: yaml.Node) -> Any:
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError):  # an unknown tag, or a date such as 2026-02-31
            raise self._error(
                node,
                key,
                "cannot be read: put the value in quotes",
                "a text, a number, true, false or null",
            ) from None

    def _error(self, node: yaml.Node, key: str, problem: str, expected: str) -> ConfigError:
        line = node.start_mark.line + 1
        return ConfigError(
            f"{self._path}:{line}: {key or 'the file'} {problem}",
            source=str(self._path),
            line=line,
            key=key or None,
            expected=expected,
        )
