"""Options and keys from environment variables, which are texts."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from asyncrt.configkeys import Origin, accepts, no_deadline, unknown_variable, valid_keys

_PREFIX: Final = "ASYNCRT_"
_OTHERS: Final = frozenset({"ASYNCRT_CONFIG", "ASYNCRT_SECRET"})
_OTHER_PREFIXES: Final = ("ASYNCRT_TEST_", "ASYNCRT_CLUSTER_")
# Kubernetes describes a Service named "asyncrt" or "asyncrt-x" to the pods of its namespace so.
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE_LINK: Final = re.compile(
    r"ASYNCRT_(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_.+)?)?)"
)
_TRUTHS: Final = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def variables() -> dict[str, str]:
    """Return the dotted key that each variable sets, by the variable's name."""
    return {
        _PREFIX + ("" if section == "asyncrt" else f"{section}_").upper() + key.upper(): (
            f"{section}.{key}"
        )
        for section, keys in valid_keys().items()
        for key in keys
    }


def read_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, Any, Origin]]:
    """Yield dotted key, value and origin of each variable that is set. An empty one is not.

    Raises:
        ConfigError: A variable that begins with ``ASYNCRT_`` and that nobody knows.
    """
    known = variables()
    for name in sorted(environ):
        if not name.startswith(_PREFIX) or name in _OTHERS or name.startswith(_OTHER_PREFIXES):
            continue
        if _SERVICE_LINK.fullmatch(name):
            continue
        origin = Origin("environment", name)
        if name == "ASYNCRT_DEADLINE":
            raise no_deadline("asyncrt.deadline", origin)
        if name not in known:
            raise unknown_variable(name, known, origin)
        if environ[name]:
            key = known[name]
            yield key, _parse(environ[name], accepts(key)), origin


def _parse(text: str, kinds: tuple[Any, ...]) -> Any:
    """Return what a text means for types; the text itself if it fits none, for the check to refuse.

    ``none`` is ``None`` wherever that is a value. A list may be JSON, or names with commas between.
    """
    word = text.strip().lower()
    if word == "none" and types.NoneType in kinds:
        return None
    if bool in kinds:
        return _TRUTHS.get(word, text)
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    is_list = Sequence in kinds
    if is_list or any(isinstance(kind, type) and issubclass(kind, Mapping) for kind in kinds):
        try:
            return json.loads(text)
        except ValueError:
            if not is_list or text.lstrip()[:1] in ("[", "{"):
                return text
            return [name.strip() for name in text.split(",") if name.strip()]
    return text
