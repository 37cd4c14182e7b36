"""The syntax of Kubernetes' names, labels and annotations, checked before a server refuses them.

Rules: https://kubernetes.io/docs/concepts/overview/working-with-objects/names/ and
https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#syntax-and-character-set
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from asyncrt.errors import ConfigError

LONGEST_LABEL: Final = 63
_LONGEST_SUBDOMAIN: Final = 253
_LARGEST_ANNOTATIONS: Final = 256 * 1024

_DNS_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN: Final = re.compile(rf"{_DNS_LABEL.pattern}(\.{_DNS_LABEL.pattern})*")
_LABEL_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")

_SUBDOMAIN_RULE: Final = (
    "lower-case letters, digits, '-' and '.', a letter or digit at each end of each part, "
    f"at most {_LONGEST_SUBDOMAIN} characters"
)
_DNS_LABEL_RULE: Final = (
    "lower-case letters, digits and '-', a letter or digit at each end, "
    f"at most {LONGEST_LABEL} characters"
)
_LABEL_RULE: Final = (
    "letters, digits, '-', '_' and '.', a letter or digit at each end, "
    f"at most {LONGEST_LABEL} characters"
)


def check_dns_label(key: str, value: object, *, what: str = "") -> None:
    """Refuse what cannot be the name of a namespace, a container or a volume (RFC 1123 label).

    Args:
        key: Name of the option, for the error.
        what: Which value of the option it is, for example ``['data']``.

    Raises:
        ConfigError: It names the rule and, if one is near, a name that would do.
    """
    if not _matches(_DNS_LABEL, value, LONGEST_LABEL):
        raise _wrong(key, what, value, _DNS_LABEL_RULE, _repaired(value, LONGEST_LABEL, dots=False))


def check_subdomain(key: str, value: object, *, what: str = "") -> None:
    """Refuse what cannot be the name of most objects, such as Secrets (RFC 1123 subdomain).

    Raises:
        ConfigError: See ``check_dns_label``.
    """
    if not _matches(_SUBDOMAIN, value, _LONGEST_SUBDOMAIN):
        near = _repaired(value, _LONGEST_SUBDOMAIN, dots=True)
        raise _wrong(key, what, value, _SUBDOMAIN_RULE, near)


def check_label_key(key: str, value: object, *, what: str = "") -> None:
    """Refuse what cannot be a label's or annotation's key: a name, or a domain, ``/`` and a name.

    Raises:
        ConfigError: See ``check_dns_label``.
    """
    prefix, slash, name = value.rpartition("/") if isinstance(value, str) else ("", "", value)
    good_prefix = not slash or _matches(_SUBDOMAIN, prefix, _LONGEST_SUBDOMAIN)
    if not good_prefix or not _matches(_LABEL_NAME, name, LONGEST_LABEL):
        rule = f"{_LABEL_RULE}; before it there may be a domain and '/'"
        raise _wrong(key, what, value, rule, None)


def check_label_value(key: str, value: object, *, what: str = "") -> None:
    """Refuse what cannot be a label's value. It may be empty.

    Raises:
        ConfigError: See ``check_dns_label``.
    """
    if value != "" and not _matches(_LABEL_NAME, value, LONGEST_LABEL):
        text = str(value).lower() if isinstance(value, bool) else value
        near = label_value(str(text)) if isinstance(text, str | int | float) else None
        raise _wrong(key, what, value, f"a text: {_LABEL_RULE}", near)


def check_labels(key: str, labels: object) -> None:
    """Refuse all but a mapping of label keys to label values.

    Raises:
        ConfigError: See ``check_dns_label``.
    """
    for name, value in _mapping(key, labels).items():
        check_label_key(key, name)
        check_label_value(key, value, what=f"[{name!r}]")


def check_annotations(key: str, annotations: object) -> None:
    """Refuse all but a mapping of label keys to texts, 256 KiB in all.

    Raises:
        ConfigError: See ``check_dns_label``.
    """
    size_bytes = 0
    for name, value in _mapping(key, annotations).items():
        check_label_key(key, name)
        if not isinstance(value, str):
            raise _wrong(key, f"[{name!r}]", value, "a text (put it in quotes)", str(value))
        size_bytes += len(name.encode()) + len(value.encode())
    if size_bytes > _LARGEST_ANNOTATIONS:
        raise ConfigError(
            f"{key} are {size_bytes} bytes: Kubernetes takes 256 KiB of them at most",
            key=key,
            expected="annotations of at most 256 KiB",
        )


def label_value(text: str) -> str:
    """Return the label value that is nearest to a text; it may be empty."""
    kept = re.sub(r"[^-A-Za-z0-9_.]+", "-", text)
    return kept[:LONGEST_LABEL].strip("-_.")


def _matches(pattern: re.Pattern[str], value: object, longest: int) -> bool:
    return isinstance(value, str) and len(value) <= longest and pattern.fullmatch(value) is not None


def _repaired(value: object, longest: int, *, dots: bool) -> str | None:
    if not isinstance(value, str):
        return None
    kept = re.sub(r"[^-a-z0-9.]+" if dots else r"[^-a-z0-9]+", "-", value.lower())
    near = kept[:longest].strip("-.")
    return near if (_SUBDOMAIN if dots else _DNS_LABEL).fullmatch(near) else None


def _mapping(key: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{key} must be a mapping of names to texts, not {value!r}",
            key=key,
            expected="a mapping of names to texts",
        )
    return value


def _wrong(key: str, what: str, value: object, rule: str, near: str | None) -> ConfigError:
    near = near or None
    hint = f"; did you mean {near!r}?" if near else ""
    return ConfigError(
        f"{key}{what} must be {rule}, not {value!r}{hint}", key=key, expected=rule, suggestion=near
    )
