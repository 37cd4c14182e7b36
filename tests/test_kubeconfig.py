"""Finding the cluster, logging in, and what is said when that does not work."""

from __future__ import annotations

import json
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncrt.backends.kubeapi import open_kube_api
from asyncrt.backends.kubeconfig import Credentials, find_cluster
from asyncrt.errors import ConfigError
from asyncrt.testing.fakekubernetes import FakeKubernetes

pytestmark = pytest.mark.anyio

PODS = "/api/v1/namespaces/default/pods"


@pytest.fixture
async def fake() -> AsyncIterator[FakeKubernetes]:
    async with FakeKubernetes() as fake:
        yield fake


def write_config(path: Path, **changes: Any) -> Path:
    config = {
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [
            {"name": "staging", "context": {"cluster": "c", "user": "u", "namespace": "team"}},
            {"name": "production", "context": {"cluster": "c", "user": "u"}},
        ],
        "current-context": "staging",
        **changes,
    }
    path.write_text(json.dumps(config))
    return path


async def load(path: Path, context: str | None = None) -> Credentials:
    return await Credentials.load(find_cluster(path, context))


def test_a_kubeconfig_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no kubeconfig .*absent") as caught:
        find_cluster(tmp_path / "absent", None)
    assert caught.value.source == str(tmp_path / "absent")


def test_without_any_kubeconfig_the_places_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{tmp_path}/.kube/config.*backend='local'"):
        find_cluster(None, None, environ={})
    with pytest.raises(ConfigError, match=r"\$KUBECONFIG names /a/b, /c"):
        find_cluster(None, None, environ={"KUBECONFIG": "/a/b:/c"})


def test_kubeconfigs_are_looked_for_where_kubectl_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".kube").mkdir()
    home = write_config(tmp_path / ".kube" / "config")
    one = write_config(tmp_path / "one")
    assert find_cluster(None, None, environ={}).paths == (home,)
    environ = {"KUBECONFIG": f"{one}::{tmp_path}/absent"}
    assert find_cluster(None, None, environ=environ).paths == (one,)
    assert find_cluster("~/one", None).paths == (one,)


async def test_a_wrong_context_names_those_that_exist_and_the_nearest(tmp_path: Path) -> None:
    path = write_config(tmp_path / "config")
    with pytest.raises(ConfigError, match="no context 'stagging'; it has production, staging") as c:
        await load(path, "stagging")
    assert c.value.suggestion == "staging"
    assert c.value.key == "k8s.kubecfg_context"
    with pytest.raises(ConfigError, match="names no current context; it has production"):
        await load(write_config(tmp_path / "config", **{"current-context": ""}))
    with pytest.raises(ConfigError, match="it has none"):
        await load(write_config(tmp_path / "config", contexts=[]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clusters": []}, "Expected object with name c in"),
        ({"users": [{"name": "u", "user": {"tokenFile": "/absent/token"}}]}, "/absent/token"),
        (
            {"users": [{"name": "u", "user": {"exec": {"command": "no-such", "apiVersion": "v"}}}]},
            "no-such",
        ),
        (
            {"users": [{"name": "u", "user": {"exec": {"command": "false", "apiVersion": "v"}}}]},
            "exec: process returned 1",
        ),
        (
            {"users": [{"name": "u", "user": {"client-certificate": "/absent/cert"}}]},
            "/absent/cert",
        ),
    ],
)
async def test_a_broken_kubeconfig_is_named_with_what_is_wrong(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = write_config(tmp_path / "config", **changes)
    with pytest.raises(ConfigError) as caught:
        await load(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "- a list"])
async def test_what_is_not_a_kubeconfig_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        await load(path)


async def test_namespace_is_the_argument_or_the_contexts_or_default(tmp_path: Path) -> None:
    path = write_config(tmp_path / "config")
    for context, argument, expected in (
        ("staging", None, "team"),
        ("production", None, "default"),
        ("staging", "mine", "mine"),
    ):
        async with open_kube_api(kubeconfig=path, context=context, namespace=argument) as api:
            assert (api.namespace, api.context) == (expected, context)
            assert api.server == "https://127.0.0.1:1"


async def test_the_first_file_that_names_a_context_decides(tmp_path: Path) -> None:
    first = write_config(tmp_path / "first", **{"current-context": "production"})
    second = write_config(tmp_path / "second")
    source = find_cluster(None, None, environ={"KUBECONFIG": f"{first}:{second}"})
    assert (await Credentials.load(source)).source.context == "production"


async def test_a_user_may_have_nothing(tmp_path: Path) -> None:
    path = write_config(tmp_path / "config", users=[])
    assert await (await load(path)).header() == {}


def write_plugin(directory: Path, token_file: Path, *, expiry: str | None) -> dict[str, Any]:
    """Return a user that logs in through a program, which counts how often it ran."""
    program = directory / "plugin"
    stamp = "" if expiry is None else f', "expirationTimestamp": "{expiry}"'
    program.write_text(
        "#!/bin/sh\n"
        f"echo run >> {directory}/runs\n"
        f'echo \'{{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", \''
        f'\'"status": {{"token": "\'$(cat {token_file})\'"{stamp}}}}}\'\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"command": str(program), "apiVersion": "client.authentication.k8s.io/v1"}


async def test_an_exec_plugin_runs_once_and_again_when_its_token_is_refused(
    fake: FakeKubernetes, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(fake.token)
    plugin = write_plugin(tmp_path, token, expiry=None)
    path = fake.kubeconfig(tmp_path / "config", exec=plugin)
    async with open_kube_api(kubeconfig=path) as api:
        for _ in range(3):
            await api.request("GET", PODS)
        assert (tmp_path / "runs").read_text() == "run\n"
        fake.tokens = {"new": "tester"}
        token.write_text("new")
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(api.request, "GET", PODS)
        assert (tmp_path / "runs").read_text() == "run\nrun\n"


async def test_a_token_file_is_read_again_when_a_minute_has_passed(
    fake: FakeKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text(fake.token)
    credentials = await load(fake.kubeconfig(tmp_path / "config", tokenFile=str(token)))
    token.write_text("rotated")
    assert await credentials.header() == {"Authorization": f"Bearer {fake.token}"}
    later = anyio.current_time() + 61
    monkeypatch.setattr(anyio, "current_time", lambda: later)
    assert await credentials.header() == {"Authorization": "Bearer rotated"}
    token.unlink()
    monkeypatch.setattr(anyio, "current_time", lambda: later + 61)
    with pytest.raises(ConfigError, match="token"):
        await credentials.header()


async def test_an_expired_plugin_token_is_renewed_before_it_is_refused(
    fake: FakeKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    plugin = write_plugin(tmp_path, token, expiry="2020-01-01T00:00:00Z")
    credentials = await load(fake.kubeconfig(tmp_path / "config", exec=plugin))
    token.write_text("new")
    later = anyio.current_time() + 61
    monkeypatch.setattr(anyio, "current_time", lambda: later)
    assert await credentials.header() == {"Authorization": "Bearer new"}
    token.write_text("newer")
    (tmp_path / "plugin").write_text("#!/bin/sh\nexit 3\n")
    monkeypatch.setattr(anyio, "current_time", lambda: later + 61)
    with pytest.raises(ConfigError, match="exec: process returned 3"):
        await credentials.header()


def make_account(directory: Path) -> Path:
    for name, text in (("token", "t-1\n"), ("ca.crt", "not read yet"), ("namespace", "pods-own\n")):
        (directory / name).write_text(text)
    return directory


async def test_inside_a_pod_its_account_is_used_and_its_token_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    account = make_account(tmp_path)
    source = find_cluster(None, None, account=account)
    credentials = await Credentials.load(source)
    assert credentials.namespace == "pods-own"
    assert credentials.configuration.host == "https://10.96.0.1:443"
    assert await credentials.header() == {"Authorization": "Bearer t-1"}
    (account / "token").write_text("t-2\n")
    later = anyio.current_time() + 61
    monkeypatch.setattr(anyio, "current_time", lambda: later)
    assert await credentials.header() == {"Authorization": "Bearer t-2"}
    with pytest.raises(ConfigError, match="no context 'x': this pod has no kubeconfig"):
        find_cluster(None, "x", account=account)


async def test_a_broken_account_of_a_pod_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    account = make_account(tmp_path)
    (account / "ca.crt").unlink()
    source = find_cluster(None, None, environ={**_no_home(tmp_path)}, account=account)
    with pytest.raises(ConfigError, match="service account of this pod"):
        await Credentials.load(source)


def _no_home(tmp_path: Path) -> dict[str, str]:
    return {"KUBECONFIG": str(tmp_path / "absent"), "KUBERNETES_SERVICE_HOST": "10.96.0.1"}


async def test_client_certificates_and_the_servers_authority_come_from_the_kubeconfig(
    tmp_path: Path,
) -> None:
    async with FakeKubernetes(tls=True) as fake:
        path = fake.kubeconfig(tmp_path / "config")
        async with open_kube_api(kubeconfig=path) as api:
            assert api.server.startswith("https://")
            assert (await api.request("GET", PODS))["items"] == []
