"""Kubernetes quantities ("256Mi", "500m") become integers here, and nowhere else.

Grammar: https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from asyncrt.errors import ConfigError

_SUFFIXES: Final = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "Ki": Decimal(2**10),
    "Mi": Decimal(2**20),
    "Gi": Decimal(2**30),
    "Ti": Decimal(2**40),
    "Pi": Decimal(2**50),
}
# Digits are [0-9], not \d: Kubernetes knows no others. An exponent takes the place of a suffix.
_QUANTITY: Final = re.compile(
    r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([+-]?[0-9]{1,3})|([A-Za-z]*))"
)
_SMALLEST_MEMORY_BYTES: Final = 4 * 2**20
# Kubernetes keeps quantities in 64 bits.
_LARGEST_MEMORY_BYTES: Final = 2**63 - 1
# No machine has as many. Someone wrote "500M" for "500m".
_MOST_CPUS: Final = 100_000


def parse_memory(value: str | float, *, key: str = "memory") -> int:
    """Return a memory quantity in bytes.

    Args:
        value: ``"256Mi"``, ``"1G"``, or a number of bytes.
        key: Name to use in errors.

    Raises:
        ConfigError: Not a quantity, or under 4 MiB, where no Python starts (a number of bytes that
            was meant as MiB).
    """
    size_bytes = int(_parse(value, key=key, example="'256Mi'"))
    if size_bytes < _SMALLEST_MEMORY_BYTES:
        digits = re.match("[0-9]+", str(value).strip())
        meant = f"{int(digits[0])}Mi" if digits and 4 <= int(digits[0]) < 2**20 else "256Mi"
        raise ConfigError(
            f"{key}={value!r} is {size_bytes} bytes, too little to start Python; "
            f"for MiB write {meant!r}",
            key=key,
            expected="a quantity such as '256Mi'",
            suggestion=meant,
        )
    if size_bytes > _LARGEST_MEMORY_BYTES:
        raise ConfigError(
            f"{key}={value!r} is more than a quantity can hold (8 EiB)",
            key=key,
            expected="a quantity such as '256Mi'",
        )
    return size_bytes


def parse_limit(value: str | float, *, key: str) -> int:
    """Return a quantity of bytes that bounds something.

    Args:
        value: ``"64Mi"``, ``"1G"``, or a number of bytes.
        key: Name to use in errors.

    Raises:
        ConfigError: Not a quantity, or under one byte.
    """
    size_bytes = int(_parse(value, key=key, example="'64Mi'"))
    if size_bytes < 1:
        raise ConfigError(
            f"{key}={value!r} is less than one byte",
            key=key,
            expected="a quantity such as '64Mi'",
        )
    return size_bytes


def parse_cpu(value: str | float, *, key: str = "cpu") -> int:
    """Return a CPU quantity in millicores: ``0.5``, ``"0.5"`` and ``"500m"`` are 500.

    Args:
        value: A number of CPUs, or a quantity.
        key: Name to use in errors.

    Raises:
        ConfigError: Not a quantity, zero or negative, finer than one millicore, or more CPUs than
            any machine has.
    """
    cpus = _parse(value, key=key, example="0.5 or '500m'")
    expected = "a CPU quantity such as 0.5 or '500m'"
    if cpus > _MOST_CPUS:
        text = str(value).strip()
        meant = text[:-1] + "m" if text.endswith("M") else None
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise ConfigError(
            f"{key}={value!r} is more CPUs than any machine has{hint}",
            key=key,
            expected=expected,
            suggestion=meant,
        )
    millicores = cpus * 1000
    if millicores < 1 or millicores != int(millicores):
        raise ConfigError(
            f"{key}={value!r}: must be a positive whole number of millicores, "
            "such as 0.5 or '500m'",
            key=key,
            expected=expected,
        )
    return int(millicores)


def _parse(value: str | float, *, key: str, example: str) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(
            f"{key} must be a quantity such as {example}, not {type(value).__name__}",
            key=key,
            expected=f"a quantity such as {example}",
        )
    match = _QUANTITY.fullmatch(str(value).strip())
    number, exponent, suffix = match.groups("") if match else ("", "", "")
    if match is None or suffix not in _SUFFIXES:
        guess = _nearest_suffix(suffix)
        meant = number + guess if guess else None
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise ConfigError(
            f"{key}={value!r} is not a quantity: write a number and one of "
            f"{', '.join(suffix for suffix in _SUFFIXES if suffix)}, such as {example}{hint}",
            key=key,
            expected=f"a quantity such as {example}",
            suggestion=meant,
        )
    return (
        Decimal(number).scaleb(int(exponent)) if exponent else Decimal(number) * _SUFFIXES[suffix]
    )


def _nearest_suffix(wrong: str) -> str | None:
    """Return what someone who wrote ``1Gb``, ``1gib`` or ``1MB`` most likely meant."""
    lowered = wrong.lower().removesuffix("b").removesuffix("i")
    for suffix in ("Ki", "Mi", "Gi", "Ti", "Pi"):
        if lowered == suffix[0].lower():
            return suffix
    return None
