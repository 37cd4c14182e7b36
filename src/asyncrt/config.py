"""The configuration: file, environment and arguments, with the origin of every value.

    defaults < configuration file < environment variables < arguments

Within the file, and within the environment, the section of the backend in use (``k8s``, ``local``)
comes over the section ``asyncrt``. Nothing else reads the environment.
"""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from asyncrt import configlithops
from asyncrt.configenv import read_environment
from asyncrt.configfile import Entry, read_file
from asyncrt.configkeys import (
    SECTIONS,
    Origin,
    accepts,
    keys_for_option,
    no_deadline,
    placed,
    unknown_key,
    unknown_section,
    valid_keys,
)
from asyncrt.configtypes import K8sConfig, LocalConfig, LocalStorageConfig, S3Config
from asyncrt.errors import ConfigError
from asyncrt.options import Retry, Settings, check_names, option_defaults

__all__ = [
    "Config",
    "EffectiveValue",
    "K8sConfig",
    "LocalConfig",
    "LocalStorageConfig",
    "Origin",
    "S3Config",
    "load_config",
]

logger = logging.getLogger(__name__)

# What a worker has on Kubernetes if nobody says otherwise; elsewhere it has no limit.
K8S_DEFAULTS: Final[Mapping[str, Any]] = {"cpu": 0.5, "memory": "256Mi"}

_NOTHING: Final[Mapping[str, Any]] = types.MappingProxyType({})
_ARGUMENT: Final = Origin("argument")
_DEFAULT: Final = Origin("default")


@dataclass(frozen=True)
class EffectiveValue:
    """A value that holds, for people to read.

    Attributes:
        value: As it was written, of types that JSON knows; secrets are ``"***"``.
        origin: Where it comes from.
    """

    value: Any
    origin: str


@dataclass(frozen=True, kw_only=True)
class Config:
    """A checked configuration, without the arguments.

    Attributes:
        path: The file it was read from; ``None`` if there is none.
        options: What file and environment say about options, by their names. Not in the ``repr``:
            ``env`` may hold credentials.
        k8s: The section of that name, as the next ones. A key that the environment overrules
            through its option (``ASYNCRT_MEMORY`` over ``k8s.runtime_memory``) is not in it.
        local: Workers on this machine.
        s3: An object store; ``None`` without the section.
        local_storage: A directory as the store; ``None`` without the section.
        placed: Origins of the values that were given, by dotted key.
        notes: Keys that were accepted and ignored, with their lines.
    """

    path: Path | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: _NOTHING, repr=False)
    k8s: K8sConfig = K8sConfig()
    local: LocalConfig = LocalConfig()
    s3: S3Config | None = None
    local_storage: LocalStorageConfig | None = None
    placed: Mapping[str, Origin] = field(default_factory=lambda: _NOTHING, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def origins(self) -> Mapping[str, str]:
        """The origin of every value by dotted key, for example ``file /app/.asyncrt.yaml:3``."""
        return {
            f"{section}.{key}": str(self.placed.get(f"{section}.{key}", _DEFAULT))
            for section, keys in valid_keys().items()
            for key in keys
        }

    def settings(self, options: Mapping[str, Any] = _NOTHING) -> Settings:
        """Return what holds for an executor.

        Args:
            options: Its arguments; they come over everything else.

        Raises:
            ConfigError: An unknown name, a bad value, or values that do not go together.
        """
        check_names(options)
        layered = self._layered(options)
        try:
            return Settings().updated({name: value for name, (value, _) in layered.items()})
        except ConfigError as error:
            name = str(error.key)
            origin = layered[name][1] if name in layered else _DEFAULT
            if origin.source is None:
                raise
            raise placed(error, origin.key or f"asyncrt.{name}", origin) from error

    def effective(self, options: Mapping[str, Any] = _NOTHING) -> dict[str, EffectiveValue]:
        """Return every option, and what was given in the other sections, by dotted key.

        Raises:
            ConfigError: As ``settings``.
        """
        self.settings(options)
        layered = self._layered(options)
        shown: dict[str, EffectiveValue] = {}
        for name, default in option_defaults().items():
            value, origin = layered.get(name, (default, _DEFAULT))
            shown[f"asyncrt.{name}"] = EffectiveValue(_readable(name, value), str(origin))
        for section_name in SECTIONS:
            section = getattr(self, section_name)
            for item in fields(section) if section is not None else ():
                value = getattr(section, item.name)
                if value is not None:
                    key = f"{section_name}.{item.name}"
                    text = _readable(item.name, value) if item.repr else "***"
                    shown[key] = EffectiveValue(text, str(self.placed.get(key, _ARGUMENT)))
        return shown

    def _layered(self, options: Mapping[str, Any]) -> dict[str, tuple[Any, Origin]]:
        """Return each option that was given anywhere, as the uppermost layer says it."""
        backend = options.get("backend", self.options.get("backend", "local"))
        layered: dict[str, tuple[Any, Origin]] = {}
        by_backend: Mapping[Any, K8sConfig | LocalConfig] = {"k8s": self.k8s, "local": self.local}
        section = by_backend.get(backend) if isinstance(backend, str) else None
        if backend == "k8s":
            layered.update((name, (value, _DEFAULT)) for name, value in K8S_DEFAULTS.items())
        for name, value in self.options.items():
            layered[name] = (value, self.placed.get(f"asyncrt.{name}", _ARGUMENT))
        if section is not None:
            keys = {option: f"{backend}.{key}" for key, option in section.OPTIONS.items()}
            for name, value in section.options().items():
                origin = self.placed.get(keys[name], _ARGUMENT)
                key = origin.key or keys[name]
                layered[name] = (value, replace(origin, key=key))
        layered.update((name, (value, _ARGUMENT)) for name, value in options.items())
        return layered


def load_config(
    path: str | os.PathLike[str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> Config:
    """Read the configuration file, if there is one, and the environment.

    The file is the first of ``path``, ``$ASYNCRT_CONFIG``, ``./.asyncrt.yaml``,
    ``~/.config/asyncrt/config.yaml`` and ``/etc/asyncrt/config.yaml``. This blocks: in async code,
    call it in a thread.

    Args:
        path: A file, which must exist.
        environ: Stands in for this process's environment.
        cwd: Stands in for this process's working directory.

    Raises:
        ConfigError: A file that was asked for does not exist; a file cannot be read or is no YAML;
            an unknown section, key or variable; a value that its key does not accept.
    """
    environ = os.environ if environ is None else environ
    folders = _Folders(
        Path.cwd() if cwd is None else Path(cwd).absolute(),
        Path(environ["HOME"]) if environ.get("HOME") else None,
    )
    found, sections = _find(path, environ.get("ASYNCRT_CONFIG"), folders)
    values: dict[str, _Value] = {}
    notes: list[str] = []
    if found is not None:
        beside = _Folders(found.parent, folders.home)
        for key, value in _read_sections(sections, found, notes):
            values[key] = beside.resolve(key, value)
    if notes:
        logger.warning("%s: ignored, without meaning to asyncrt: %s", found, ", ".join(notes))
    from_environment = {
        key: folders.resolve(key, _Value(raw, origin))
        for key, raw, origin in read_environment(environ)
    }
    for key in from_environment:
        section, name = key.split(".", 1)
        for overruled in keys_for_option(name) if section == "asyncrt" else ():
            values.pop(overruled, None)
    return _build(values | from_environment, found, tuple(notes))


@dataclass(frozen=True)
class _Value:
    """A value on its way into the configuration, and the keys inside if it is a mapping."""

    raw: Any = field(repr=False)
    origin: Origin
    items: Mapping[str, Entry] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class _Folders:
    """Where relative paths begin, and where ``~`` is."""

    working: Path
    home: Path | None

    def absolute(self, path: str | os.PathLike[str]) -> Path:
        first, *rest = Path(path).parts or ("",)
        if first == "~" and self.home is not None:
            return self.home.joinpath(*rest)
        return self.working / path

    def resolve(self, key: str, value: _Value) -> _Value:
        if Path not in accepts(key) or not isinstance(value.raw, str) or not value.raw:
            return value
        return _Value(self.absolute(value.raw), value.origin)


def _find(
    path: str | os.PathLike[str] | None, named: str | None, folders: _Folders
) -> tuple[Path | None, Mapping[str, Entry]]:
    """Return the file that holds, and its sections."""
    asked_for = (named or None) if path is None else path
    if asked_for is not None:
        found = folders.absolute(asked_for)
        sections = read_file(found)
        if sections is None:
            by = " (named by ASYNCRT_CONFIG)" if path is None else ""
            raise ConfigError(
                f"{found} does not exist{by}", source=str(found), expected="a YAML file"
            )
        return found, sections
    candidates = [folders.working / ".asyncrt.yaml", Path("/etc/asyncrt/config.yaml")]
    if folders.home is not None:
        candidates.insert(1, folders.home / ".config/asyncrt/config.yaml")
    for candidate in candidates:
        sections = read_file(candidate)
        if sections is not None:
            return candidate, sections
    return None, {}


def _read_sections(
    sections: Mapping[str, Entry], path: Path, notes: list[str]
) -> Iterator[tuple[str, _Value]]:
    """Yield what a file says, Lithops' own sections first, so that ours come over them."""
    source = str(path)
    for name, section in sections.items():
        if name in configlithops.IGNORED_SECTIONS:
            continue
        if name not in valid_keys() and name not in configlithops.SECTIONS:
            origin = Origin("file", source, section.line)
            raise unknown_section(name, origin)
        if section.value is not None and section.items is None:
            raise ConfigError(
                f"{source}:{section.line}: {name} must be a section: keys with values",
                source=source,
                line=section.line,
                key=name,
                expected="a mapping of keys to values",
            )
    for target, entry in configlithops.translate(sections):
        if target is None:
            notes.append(f"{entry.key} (line {entry.line})")
        else:
            origin = Origin("file", source, entry.line, entry.key)
            yield target, _Value(entry.value, origin, entry.items)
    for name, keys in valid_keys().items():
        entries = sections[name].items if name in sections else None
        for key, entry in (entries or {}).items():
            origin = Origin("file", source, entry.line)
            if configlithops.is_ignored(name, key):
                notes.append(f"{entry.key} (line {entry.line})")
            elif key in keys:
                yield entry.key, _Value(entry.value, origin, entry.items)
            elif entry.key == "asyncrt.deadline":
                raise no_deadline(entry.key, origin)
            else:
                raise unknown_key(entry.key, origin)


def _build(values: Mapping[str, _Value], path: Path | None, notes: tuple[str, ...]) -> Config:
    """Check each value by itself, so that an error names its place, then put them together."""
    given: dict[str, dict[str, Any]] = {"asyncrt": {}}
    for key, value in values.items():
        section, name = key.split(".", 1)
        if key == "asyncrt.env":
            _check_texts(value)
        try:
            _check(key, value)
        except ConfigError as error:
            raise placed(error, value.origin.key or key, value.origin) from error
        given.setdefault(section, {})[name] = value.raw
    return Config(
        path=path,
        options=types.MappingProxyType(given["asyncrt"]),
        k8s=K8sConfig(**given.get("k8s", {})),
        local=LocalConfig(**given.get("local", {})),
        s3=S3Config(**given["s3"]) if "s3" in given else None,
        local_storage=LocalStorageConfig(**given["local_storage"])
        if "local_storage" in given
        else None,
        placed=types.MappingProxyType({key: value.origin for key, value in values.items()}),
        notes=notes,
    )


def _check(key: str, value: _Value) -> None:
    section, name = key.split(".", 1)
    if section != "asyncrt":
        SECTIONS[section](**{name: value.raw})
        return
    if value.origin.key == "lithops.backend":
        return  # One that only Lithops has is an error if it is used: an argument may come over it.
    Settings().updated({name: value.raw})


def _check_texts(value: _Value) -> None:
    """Refuse environment variables that are no texts, each with its own line."""
    for item in (value.items or {}).values():
        if not isinstance(item.value, str):
            raise placed(
                ConfigError(
                    f"{item.key} must be a text: put it in quotes", key=item.key, expected="str"
                ),
                item.key,
                replace(value.origin, line=item.line),
            )


def _readable(name: str, value: Any) -> Any:
    """Return a value as JSON can hold it, without what may be a credential."""
    if isinstance(value, Mapping):
        return {
            key: "***" if name == "env" else _readable(key, item) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_readable(name, item) for item in value]
    if isinstance(value, Retry):
        return value.attempts
    if isinstance(value, list | tuple):
        return list(value)
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)
