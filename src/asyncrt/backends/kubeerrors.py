"""Says in words what the API server refused: the thing, the verb, and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from asyncrt.errors import KubernetesError

_VERBS: Final = {
    "POST": "create",
    "PUT": "update",
    "PATCH": "patch",
}
_ROLE_HINT: Final = "asyncrt.backends.k8s.role_manifest() is the least Role that asyncrt needs"


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is about, in the words of a Role."""

    verb: str
    resource: str
    name: str
    namespace: str

    def __str__(self) -> str:
        what = f"{self.resource} {self.name!r}" if self.name else self.resource
        where = f" in namespace {self.namespace!r}" if self.namespace else ""
        return f"{self.verb} {what}{where}"


def describe_request(method: str, path: str, query: Mapping[str, Any] | None = None) -> Target:
    """Return what a request is about.

    Paths: https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-uris
    """
    parts = path.strip("/").split("/")
    if len(parts) < 3 or parts[0] not in ("api", "apis"):
        return Target("get", path, "", "")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    namespace = ""
    if len(parts) > 2 and parts[0] == "namespaces":
        namespace, parts = parts[1], parts[2:]
    resource, name, sub = (*parts, "", "", "")[:3]
    if sub:
        resource = f"{resource}/{sub}"
    if method == "GET":
        verb = "get" if name else "list"
        if query and str(query.get("watch", "")).lower() in ("true", "1"):
            verb = "watch"
    elif method == "DELETE":
        verb = "delete" if name else "deletecollection"
    else:
        verb = _VERBS[method]
    return Target(verb, resource, name, namespace)


def refusal(
    target: Target,
    status: int,
    answer: Mapping[str, Any],
    *,
    server: str,
    retry_after: float | None = None,
) -> KubernetesError:
    """Return the error for an answer that is not a success.

    Args:
        answer: The ``Status`` object of the answer; empty if it had none.
        retry_after: The header, seconds.
    """
    detail = str(answer.get("message") or "")
    reason = str(answer.get("reason") or _REASONS.get(status, ""))
    details = answer.get("details") or {}
    if retry_after is None and details.get("retryAfterSeconds"):
        retry_after = float(details["retryAfterSeconds"])
    hint = _hint(target, status, detail, details)
    words = f"{status} {reason}".strip() + (f": {detail}" if detail else "")
    return KubernetesError(
        _sentence(f"cannot {target} at {server}: {words}", hint),
        status=status,
        reason=reason,
        verb=target.verb,
        resource=target.resource,
        name=target.name,
        namespace=target.namespace,
        detail=detail,
        hint=hint,
        retry_after=retry_after,
    )


def no_answer(target: Target, error: BaseException, *, server: str, reason: str) -> KubernetesError:
    """Return the error for a request that got no answer."""
    detail = str(error) or type(error).__name__
    hint = {
        "TLS": (
            "check certificate-authority(-data) and tls-server-name of the cluster in the "
            "kubeconfig: they must fit the server's certificate"
        ),
        "Timeout": f"check that {server} can be reached from here (VPN, firewall, proxy)",
    }.get(
        reason,
        f"check that the API server runs at {server}, and that this is the right context",
    )
    return KubernetesError(
        _sentence(f"cannot {target}: no answer from {server}: {detail}", hint),
        reason=reason,
        verb=target.verb,
        resource=target.resource,
        name=target.name,
        namespace=target.namespace,
        detail=detail,
        hint=hint,
    )


_REASONS: Final = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Gone",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}


def _hint(target: Target, status: int, detail: str, details: Mapping[str, Any]) -> str:
    if status == 401:
        return (
            "the server does not accept these credentials: the token may have expired; log in "
            "again, or name another context (kubecfg_context)"
        )
    if status == 403 and "exceeded quota" in detail:
        return "wait for other pods of the namespace to end, or ask for less or for more quota"
    if status == 403 and "violates PodSecurity" not in detail and "is being terminated" in detail:
        return "the namespace is being deleted: name another one (namespace=)"
    if status == 403 and "cannot " in detail:
        return (
            f"this account needs the verb {target.verb!r} on {target.resource!r}"
            f"{f' in namespace {target.namespace!r}' if target.namespace else ''}: {_ROLE_HINT}"
        )
    if status == 404 and details.get("kind") == "namespaces":
        return (
            f"create it (kubectl create namespace {details.get('name', target.namespace)}), "
            "or name one that exists (namespace=)"
        )
    return ""


def _sentence(text: str, hint: str) -> str:
    return f"{text}. {hint[0].upper()}{hint[1:]}" if hint else text
