"""Finds the cluster and proves who we are: kubeconfig files, exec plugins, or a pod's own account.

The work is done by kubernetes_asyncio. Its import takes over half a second, so this module is
imported only when the cluster is needed, and it imports that library in a thread.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import anyio
import anyio.to_thread

from asyncrt.errors import ConfigError

if TYPE_CHECKING:
    from kubernetes_asyncio.client.configuration import Configuration
    from kubernetes_asyncio.config.kube_config import KubeConfigLoader

_LOAD_SECONDS: Final = 60.0
_REFRESH_SECONDS: Final = 60.0
_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, slots=True)
class ClusterSource:
    """Where the cluster is described.

    Attributes:
        paths: Kubeconfig files that exist; empty inside a pod that has none.
        context: The context's name; empty inside a pod.
        account: Directory of the pod's service account.
    """

    paths: tuple[Path, ...]
    context: str | None
    account: Path


def find_cluster(
    kubeconfig: Path | str | None,
    context: str | None,
    *,
    environ: Mapping[str, str] = os.environ,
    account: Path = _ACCOUNT,
) -> ClusterSource:
    """Look where ``kubectl`` looks, then for the account of a pod.

    Raises:
        ConfigError: Nothing there: names the places.
    """
    if kubeconfig is not None:
        path = Path(kubeconfig).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"there is no kubeconfig {path}", source=str(path), key="k8s.kubecfg_path"
            )
        return ClusterSource((path,), context, account)
    named = [Path(text).expanduser() for text in environ.get("KUBECONFIG", "").split(":") if text]
    places = named or [Path.home() / ".kube" / "config"]
    found = tuple(path for path in places if path.is_file())
    if found:
        return ClusterSource(found, context, account)
    if environ.get("KUBERNETES_SERVICE_HOST") and (account / "token").is_file():
        if context is not None:
            raise ConfigError(
                f"there is no context {context!r}: this pod has no kubeconfig, only its own "
                "service account; leave the context out to use that",
                key="k8s.kubecfg_context",
            )
        return ClusterSource((), None, account)
    why = "$KUBECONFIG names" if named else "$KUBECONFIG is not set;"
    raise ConfigError(
        f"there is no kubeconfig: {why} {', '.join(map(str, places))}, which is not there, and "
        "this is not a pod with a service account. Name one (kubecfg_path), or use "
        "backend='local'",
        key="k8s.kubecfg_path",
    )


class Credentials:
    """The cluster's address and our proof, loaded and refreshed by kubernetes_asyncio.

    Attributes:
        configuration: What kubernetes_asyncio's transport is made from.
        namespace: The context's or the pod's; ``None`` if neither names one.
    """

    def __init__(
        self, source: ClusterSource, configuration: Configuration, loader: KubeConfigLoader | None
    ) -> None:
        self.source = source
        self.configuration = configuration
        self.namespace: str | None = None
        self._loader = loader
        self._loaded_at = anyio.current_time()

    @classmethod
    async def load(cls, source: ClusterSource) -> Credentials:
        """Read everything anew, running the exec plugin if there is one.

        Raises:
            ConfigError: Names the file and what is wrong in it.
        """
        await anyio.to_thread.run_sync(_import_client)
        try:
            with anyio.fail_after(_LOAD_SECONDS):
                if source.paths:
                    return await _load_files(source)
                return await _load_account(source)
        except TimeoutError as error:
            _complain(source, f"its login took over {_LOAD_SECONDS:.0f} s", error)
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - of YAML, exec plugins, OIDC, asserts: any type
            _complain(source, str(error) or repr(error), error)

    async def header(self) -> dict[str, str]:
        """Return the header that proves who we are, refreshed if its time has come.

        Raises:
            ConfigError: It could not be refreshed.
        """
        now = anyio.current_time()
        if now - self._loaded_at > _REFRESH_SECONDS:
            self._loaded_at = now
            await self._refresh()
        token = self.configuration.api_key.get("BearerToken")
        return {} if token is None else {"Authorization": str(token).strip()}

    async def _refresh(self) -> None:
        """Take what expires or is rotated: tokens of files, plugins and providers."""
        loader = self._loader
        if loader is None:
            return await _read_account(self.source, self.configuration)
        user = loader._user  # there is no public way to see how a user logs in
        if user is None or ("exec" in user and not hasattr(loader, "exec_plugin_expiry")):
            return None  # without an expiry, a plugin's answer holds until the server refuses it
        try:
            with anyio.fail_after(_LOAD_SECONDS):
                await loader._load_authentication()
        except TimeoutError as error:
            _complain(self.source, f"its login took over {_LOAD_SECONDS:.0f} s", error)
        except Exception as error:  # noqa: BLE001 - of exec plugins, OIDC, files: any type
            _complain(self.source, str(error) or repr(error), error)
        if hasattr(loader, "token"):
            self.configuration.api_key["BearerToken"] = loader.token
        return None


def _import_client() -> None:
    import kubernetes_asyncio.config.incluster_config  # noqa: PLC0415 - slow: only when needed
    import kubernetes_asyncio.config.kube_config  # noqa: F401, PLC0415 - the same


def _new_configuration() -> Configuration:
    from kubernetes_asyncio.client import Configuration  # noqa: PLC0415 - slow: only when needed

    configuration = Configuration()
    configuration.connection_pool_maxsize = 0  # no limit: each port-forward holds a connection
    return configuration


async def _load_files(source: ClusterSource) -> Credentials:
    from kubernetes_asyncio.config import kube_config  # noqa: PLC0415 - slow: only when needed

    merger = await anyio.to_thread.run_sync(
        kube_config.KubeConfigMerger, ":".join(map(str, source.paths))
    )
    if merger.config is None or not isinstance(merger.config.value, dict):
        raise ConfigError(_in(source, "it is empty"), source=str(source.paths[0]))
    context = source.context or _current_context(merger.config_files)
    _check_context(source, merger.config.value, context)
    loader = kube_config.KubeConfigLoader(
        config_dict=merger.config,
        active_context=context,
        config_base_path=None,
        config_persister=merger.save_changes,
    )
    if loader._user is None:  # the library reads a client certificate from it all the same
        loader._user = kube_config.ConfigNode("user", {})
    configuration = _new_configuration()
    await loader.load_and_set(configuration)
    # Not ``loader.current_context``: a context may leave its namespace out.
    credentials = Credentials(
        ClusterSource(source.paths, context, source.account), configuration, loader
    )
    current = loader.current_context or {}
    credentials.namespace = current.get("context", {}).get("namespace")
    return credentials


def _current_context(files: Mapping[str, Any]) -> str | None:
    """Return that of the first file with one, as kubectl; kubernetes_asyncio takes the last."""
    for config in files.values():
        if config.get("current-context"):
            return str(config["current-context"])
    return None


def _check_context(source: ClusterSource, config: Mapping[str, Any], context: str | None) -> None:
    entries = config.get("contexts") or []
    names = [str((getattr(entry, "value", entry) or {}).get("name")) for entry in entries]
    if context in names:
        return
    have = f"it has {', '.join(sorted(names))}" if names else "it has none"
    if context is None:
        raise ConfigError(
            _in(source, f"it names no current context; {have}. Name one (kubecfg_context)"),
            source=str(source.paths[0]),
            key="k8s.kubecfg_context",
        )
    near = difflib.get_close_matches(context, names, n=1)
    suggestion = near[0] if near else None
    raise ConfigError(
        _in(
            source,
            f"there is no context {context!r}; {have}"
            + (f". Did you mean {suggestion!r}?" if suggestion else ""),
        ),
        source=str(source.paths[0]),
        key="k8s.kubecfg_context",
        expected=f"one of {', '.join(sorted(names))}",
        suggestion=suggestion,
    )


async def _load_account(source: ClusterSource) -> Credentials:
    from kubernetes_asyncio.config import (  # noqa: PLC0415 - slow: only when needed
        incluster_config,
    )

    configuration = _new_configuration()
    load_incluster_config: Callable[..., None] = incluster_config.load_incluster_config
    load_incluster_config(
        configuration,
        try_refresh_token=False,  # ours, which does not read a file in the loop at each request
        token_filename=str(source.account / "token"),
        cert_filename=str(source.account / "ca.crt"),
    )
    credentials = Credentials(source, configuration, None)
    namespace = anyio.Path(source.account / "namespace")
    if await namespace.is_file():
        credentials.namespace = (await namespace.read_text()).strip() or None
    return credentials


async def _read_account(source: ClusterSource, configuration: Configuration) -> None:
    """Take the token that the kubelet has rotated."""
    token = await anyio.Path(source.account / "token").read_text()
    configuration.api_key["BearerToken"] = f"Bearer {token.strip()}"


def _in(source: ClusterSource, text: str) -> str:
    return f"kubeconfig {', '.join(map(str, source.paths))}: {text}"


def _complain(source: ClusterSource, text: str, error: Exception) -> NoReturn:
    if not source.paths:
        raise ConfigError(
            f"the service account of this pod ({source.account}) cannot be used: {text}",
            source=str(source.account),
        ) from error
    named = f"context {source.context!r}: " if source.context else ""
    raise ConfigError(
        _in(source, f"{named}{text}"), source=str(source.paths[0]), key="k8s.kubecfg_path"
    ) from error
