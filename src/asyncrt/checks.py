"""Checks of single values, with errors that name the option and what would have been accepted."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Final, cast

from asyncrt.errors import ConfigError

# About 30 years. Beyond it, the operating system's own timeouts overflow.
LONGEST_SECONDS: Final = 1e9
_USER_INFO: Final = re.compile("(?:[A-Za-z][A-Za-z0-9+.-]*://)?[^/?#]*@")


def is_int(value: object) -> bool:
    """Tell whether a value is a whole number; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Tell whether a value is a number that can be compared: no bool, no NaN."""
    if isinstance(value, float):
        return not math.isnan(value)
    return is_int(value)


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid name that someone who wrote ``name`` most likely meant, if any is near."""
    near = difflib.get_close_matches(name, sorted(valid), n=1)
    return near[0] if near else None


def check_bool(name: str, value: object, *, optional: bool = False) -> None:
    """Refuse all but ``True`` and ``False``.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(value, bool) and not (optional and value is None):
        raise ConfigError(f"{name} must be True or False, not {value!r}", key=name, expected="bool")


def check_text(name: str, value: object, *, optional: bool, secret: bool = False) -> None:
    """Refuse all but texts of at least one character.

    Args:
        secret: Keep the value out of the error.

    Raises:
        ConfigError: It is something else.
    """
    if not (isinstance(value, str) and value) and not (optional and value is None):
        shown = f"a value of type {type(value).__name__}" if secret else repr(value)
        kind = "an empty text" if value == "" else shown
        raise ConfigError(f"{name} must be a text, not {kind}", key=name, expected="str")


def check_no_credentials(name: str, value: str | None) -> None:
    """Refuse URLs that carry a user or a password: they would end up in logs.

    Raises:
        ConfigError: It does. The value is not in the error.
    """
    if value is not None and _USER_INFO.match(value):
        raise ConfigError(
            f"{name} must not contain a user or a password: they have keys of their own",
            key=name,
            expected="a URL without credentials",
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse all but the given texts.

    Raises:
        ConfigError: With the nearest valid one.
    """
    if value not in choices:
        near = nearest(str(value), choices)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(
            f"{name} must be one of {', '.join(choices)}, not {value!r}{hint}",
            key=name,
            expected=" | ".join(choices),
            suggestion=near,
        )


def check_module_names(name: str, value: object) -> None:
    """Refuse all but lists of dotted names.

    Raises:
        ConfigError: It is something else, such as a single text.
    """
    expected = "a list of modules' dotted names"
    if isinstance(value, str) or not isinstance(value, Sequence):
        hint = f"; did you mean [{value!r}]?" if isinstance(value, str) else ""
        raise ConfigError(
            f"{name} must be {expected}, not {value!r}{hint}", key=name, expected=expected
        )
    for item in value:
        if not isinstance(item, str) or not all(part.isidentifier() for part in item.split(".")):
            raise ConfigError(
                f"{name} must be {expected}, and {item!r} is none", key=name, expected=expected
            )


def check_count(
    name: str, value: object, *, least: int = 1, optional: bool = False, expected: str | None = None
) -> None:
    """Refuse all but whole numbers from ``least``.

    Raises:
        ConfigError: It is something else.
    """
    if optional and value is None:
        return
    if not is_int(value) or cast("int", value) < least:
        expected = expected or f"a whole number from {least}"
        raise ConfigError(f"{name} must be {expected}, not {value!r}", key=name, expected=expected)


def check_number(name: str, value: object, *, least: float, most: float | None = None) -> None:
    """Refuse all but numbers of a range, its ends included.

    Raises:
        ConfigError: It is something else.
    """
    if is_number(value):
        number = cast("float", value)
        if least <= number and (most is None or number <= most):
            return
    expected = f"a number from {least:g}" + (f" to {most:g}" if most is not None else "")
    raise ConfigError(f"{name} must be {expected}, not {value!r}", key=name, expected=expected)


def check_seconds(name: str, value: object, *, optional: bool = False, zero: bool = False) -> None:
    """Refuse all but finite durations.

    Args:
        zero: Zero is a duration too.

    Raises:
        ConfigError: It is something else, or infinite: "no limit" is written ``None``.
    """
    if optional and value is None:
        return
    if is_number(value):
        seconds = cast("float", value)
        if 0 < seconds <= LONGEST_SECONDS or (zero and seconds == 0):
            return
    least = "from 0" if zero else "above 0"
    limit = f"{least} and up to {LONGEST_SECONDS:.0e}" if _is_long(value) else least
    hint = "; for no limit use None" if optional and _is_long(value) else ""
    raise ConfigError(
        f"{name} must be seconds {limit}, not {value!r}{hint}",
        key=name,
        expected=f"seconds {least}",
    )


def _is_long(value: object) -> bool:
    return is_number(value) and cast("float", value) > LONGEST_SECONDS
