"""What most likely helps, by the words of the kubelet, the registry or the API server.

The texts are not part of any contract: a hint that is not found costs nothing, since their own
words are in the error anyway.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

Hints = Sequence[tuple[str, str]]
"""Patterns with what to do. The first that is found holds."""

IMAGE_HINTS: Final[Hints] = (
    # of a container that could not be started
    (
        "exec format error|no match for platform|no matching manifest",
        "it is built for another architecture than the node's",
    ),
    (
        "executable file not found|no such file or directory",
        "it has no python3 on its PATH: use one with Python 3.11 or newer, or set the command of "
        "the container 'worker' with pod_patch",
    ),
    (
        "chdir to cwd",
        "the worker's user may not enter its WORKDIR: set run_as_user, or workingDir of the "
        "container 'worker' with pod_patch",
    ),
    # of a pull
    (
        r"toomanyrequests|\b429\b",
        "the registry limits pulls: give it an account (image_pull_secrets), or use a mirror",
    ),
    (
        r"unauthorized|authentication required|authorization failed|denied|no basic auth"
        r"|forbidden|\b40[13]\b",
        "the registry wants an account (image_pull_secrets names a Secret with one), or the name "
        "is wrong",
    ),
    ("not found|manifest unknown|invalid reference", "is its name right?"),
    ("x509|certificate", "the node does not trust the registry's certificate"),
    (
        "no such host|timeout|timed out|connection refused|unreachable",
        "the node does not reach the registry",
    ),
)
POD_HINTS: Final[Hints] = (
    (
        "violates PodSecurity",
        "the namespace forbids what run_as_user, a security context, volumes or pod_patch ask for",
    ),
    ("runAsNonRoot|non-numeric user", "run_as_user must be a uid that is not 0"),
    ("must specify", "the namespace's quota wants a value for it: set it with pod_patch"),
    ("serviceaccount", "does the service_account exist in the namespace?"),
    ("PriorityClass", "does the priority_class exist?"),
    ("not found", "does it exist in the namespace?"),
)


def hint_for(hints: Hints, text: str) -> str:
    """Return the hint for a text as the end of a message; empty if there is none."""
    return next((f"; {hint}" for pattern, hint in hints if re.search(pattern, text)), "")
