"""Which keys there are, of which type, and how errors and origins name them."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from asyncrt.checks import nearest
from asyncrt.configtypes import K8sConfig, LocalConfig, LocalStorageConfig, S3Config
from asyncrt.errors import ConfigError
from asyncrt.options import ExecutorOptions

Section = K8sConfig | LocalConfig | S3Config | LocalStorageConfig

SECTIONS: Final[Mapping[str, type[Section]]] = {
    "k8s": K8sConfig,
    "local": LocalConfig,
    "s3": S3Config,
    "local_storage": LocalStorageConfig,
}

# What can be shown of a name that nobody knows: `docker_password:hunter2` is one word to YAML.
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Attributes:
        kind: One of the four layers.
        source: Path of the file, or name of the variable; ``None`` for the other layers.
        line: Line in the file, from 1.
        key: The key there, if it has another name than here.
    """

    kind: Literal["default", "file", "environment", "argument"] = "default"
    source: str | None = None
    line: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        where = f"{self.kind} {self.place}" if self.source else self.kind
        return f"{where} ({self.key})" if self.key else where

    @property
    def place(self) -> str:
        """The file with the line, or the variable."""
        return f"{self.source}:{self.line}" if self.line else str(self.source)


@functools.cache
def valid_keys() -> Mapping[str, Mapping[str, Any]]:
    """Return the keys of each section with their types."""
    options = get_type_hints(ExecutorOptions)
    del options["deadline"]  # see no_deadline
    keys: dict[str, Mapping[str, Any]] = {"asyncrt": options}
    for name, section in SECTIONS.items():
        hints = get_type_hints(section)
        keys[name] = {item.name: hints[item.name] for item in fields(section)}
    return keys


def accepts(key: str) -> tuple[Any, ...]:
    """Return the types that a dotted key accepts."""
    section, name = key.split(".", 1)
    hint = valid_keys()[section][name]
    members = get_args(hint) if get_origin(hint) in {Union, types.UnionType} else (hint,)
    return tuple(get_origin(member) or member for member in members)


def keys_for_option(name: str) -> list[str]:
    """Return the keys of backends' sections that stand for an option."""
    return [
        f"{section_name}.{key}"
        for section_name, section in (("k8s", K8sConfig), ("local", LocalConfig))
        for key, option in section.OPTIONS.items()
        if option == name
    ]


def nearest_key(section: str, name: str) -> str | None:
    """Return the key that someone who wrote ``name`` in a section most likely meant.

    That is the section's own word for an option, or the same name in another section (dotted), or
    a similar name in this one.
    """
    for key in keys_for_option(name):
        if key.startswith(f"{section}."):
            return key.removeprefix(f"{section}.")
    for other, keys in valid_keys().items():
        if name in keys:
            return f"{other}.{name}"
    return nearest(name, valid_keys()[section])


def unknown_key(entry_key: str, origin: Origin) -> ConfigError:
    """Return the error for a dotted key that its section does not have."""
    section, name = entry_key.split(".", 1)
    near = nearest_key(section, name)
    return _unknown("key", entry_key, near, valid_keys()[section], origin)


def unknown_section(name: str, origin: Origin) -> ConfigError:
    """Return the error for a section that there is not."""
    valid = {*valid_keys(), "lithops"}
    return _unknown("section", name, nearest(name, valid), valid, origin)


def unknown_variable(name: str, valid: Collection[str], origin: Origin) -> ConfigError:
    """Return the error for a variable that begins like ours and is none."""
    return _unknown("variable", name, nearest(name, valid), valid, origin)


def _unknown(
    what: str, name: str, near: str | None, valid: Collection[str], origin: Origin
) -> ConfigError:
    plain = _PLAIN_NAME.fullmatch(name) is not None
    known = f"valid are {', '.join(sorted(valid))}"
    problem = f"unknown {what}{f' {name!r}' if plain else ''}"
    hint = f"did you mean {near!r}?" if near else known
    place = f"{origin.place}: " if origin.line else ""
    return ConfigError(
        f"{place}{problem}; {hint}",
        source=origin.source,
        line=origin.line,
        key=name if plain else None,
        expected=f"one of {', '.join(sorted(valid))}",
        suggestion=near,
    )


def placed(error: ConfigError, key: str, origin: Origin) -> ConfigError:
    """Return an error about a value that also says where the value is.

    Args:
        error: From a check, which knows the value only. Its message begins with its key.
        key: Its dotted key in the file.
        origin: Where it was written.
    """
    message = key + str(error).removeprefix(str(error.key))
    return ConfigError(
        f"{origin.place}: {message}",
        source=origin.source,
        line=origin.line,
        key=key,
        expected=error.expected,
        suggestion=error.suggestion,
    )


def no_deadline(key: str, origin: Origin) -> ConfigError:
    """Return the error for the one option that neither a file nor a variable can hold."""
    return ConfigError(
        f"{origin.place}: {key} is a moment on the clock of the running program: "
        "it can be given in code only; did you mean 'timeout'?",
        source=origin.source,
        line=origin.line,
        key=key,
        expected="no such key",
        suggestion="timeout",
    )
