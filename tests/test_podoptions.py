"""Options of pods: what Kubernetes would refuse is refused here, with its rule and the fix."""

from __future__ import annotations

import getpass
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrt.config import load_config
from asyncrt.errors import ConfigError
from asyncrt.k8snames import check_label_value, label_value
from asyncrt.options import Settings
from asyncrt.podoptions import PodSettings, default_owner, owner_label, thawed


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"gpu": 0}, "gpu must be a whole number from 1"),
        ({"gpu": 0.5}, "GPUs cannot be shared by fractions"),
        ({"gpu": True}, "gpu must be a whole number from 1"),
        ({"gpu": {"amd.com/gpu": "1"}}, "gpu['amd.com/gpu'] must be a whole number from 1"),
        ({"gpu": {"cpu": 1}}, "gpu['cpu'] must be the resource of a device plugin"),
        ({"gpu": {"kubernetes.io/x": 1}}, "must be the resource of a device plugin"),
        ({"gpu": {"amd com/gpu": 1}}, "gpu must be letters, digits"),
        ({"secrets": "db"}, "secrets must be a list of names, not 'db'; did you mean ['db']?"),
        ({"secrets": 5}, "secrets must be a list of names, not 5"),
        ({"secrets": ["My_Secret"]}, "did you mean 'my-secret'?"),
        ({"secrets": [None]}, "secrets[None] must be lower-case letters"),
        ({"secrets": {"tls": "etc/tls"}}, "secrets['tls'] must be an absolute path"),
        ({"secrets": {"a": "/x", "b": "/x"}}, "secrets: two of them have the same path"),
        ({"secrets": {"tls": "/asyncrt"}}, "'/asyncrt' is where the worker's own files are"),
        ({"image_pull_secrets": ["-"]}, "image_pull_secrets['-'] must be lower-case letters"),
        ({"service_account": "Robot"}, "did you mean 'robot'?"),
        ({"service_account": ""}, "service_account must be lower-case letters"),
        ({"priority_class": "a..b"}, "priority_class must be lower-case letters"),
        ({"priority_class": "a" * 254}, "at most 253 characters"),
        ({"queue": "q" * 64}, "at most 63 characters"),
        ({"queue": ""}, "queue must be"),
        ({"owner": ""}, "owner must be a text"),
        ({"owner": "me@home"}, "did you mean 'me-home'?"),
        ({"namespace": "my.space"}, "did you mean 'my-space'?"),
        ({"namespace": "n" * 64}, "at most 63 characters"),
        ({"context": ""}, "context must be a text"),
        ({"kubeconfig": ""}, "kubeconfig must be a path"),
        ({"kubeconfig": 5}, "kubeconfig must be a path, not 5"),
        ({"node_selector": {"disk": True}}, "node_selector['disk'] must be a text"),
        ({"node_selector": {"disk": True}}, "did you mean 'true'?"),
        ({"node_selector": {"zone": 1}}, "did you mean '1'?"),
        ({"node_selector": ["disk"]}, "node_selector must be a mapping of names to texts"),
        ({"labels": {"a b": "c"}}, "labels must be letters, digits"),
        ({"labels": {"/x": "c"}}, "before it there may be a domain and '/'"),
        ({"labels": {"A.com/x": "c"}}, "before it there may be a domain and '/'"),
        ({"labels": {"a": "b c"}}, "labels['a'] must be a text"),
        ({"labels": {"a": "b c"}}, "did you mean 'b-c'?"),
        ({"labels": {"a": None}}, "labels['a'] must be a text"),
        ({"labels": {5: "c"}}, "labels must be letters"),
        ({"labels": {"asyncrt.dev/owner": "me"}}, "there is the option owner"),
        ({"labels": {"batch.kubernetes.io/job-name": "x"}}, "set by asyncrt or by Kubernetes"),
        ({"labels": {"job-name": "x"}}, "choose another key"),
        ({"annotations": {"a": 5}}, "annotations['a'] must be a text (put it in quotes), not 5"),
        ({"annotations": {"a": "x" * 2**18}}, "Kubernetes takes 256 KiB"),
        ({"annotations": {"a b": ""}}, "annotations must be letters"),
        ({"tolerations": {"key": "a"}}, "tolerations must be a list of mappings"),
        ({"tolerations": ["spot"]}, "tolerations[0] must be a mapping"),
        ({"tolerations": [{"keys": "a"}]}, "did you mean 'key'?"),
        ({"tolerations": [{"zzz": "a"}]}, "has no field 'zzz'; valid are effect, key"),
        ({"tolerations": [{"key": "a", "operator": "In"}]}, ".operator must be 'Equal' or"),
        ({"tolerations": [{"value": "a"}]}, "tolerations[0] has no key"),
        (
            {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]},
            ".value must be empty with operator 'Exists'",
        ),
        ({"tolerations": [{"key": "a", "effect": "Never"}]}, ".effect must be one of NoExecute"),
        ({"tolerations": [{"key": "a", "tolerationSeconds": 5}]}, "needs effect 'NoExecute'"),
        (
            {"tolerations": [{"key": "a", "effect": "NoExecute", "tolerationSeconds": "5"}]},
            ".tolerationSeconds must be a whole number",
        ),
        ({"affinity": {"nodeafinity": {}}}, "did you mean 'nodeAffinity'?"),
        ({"affinity": []}, "affinity must be a mapping, as in a pod's manifest"),
        ({"pod_security_context": "no"}, "pod_security_context must be a mapping"),
        ({"container_security_context": {1: 2}}, "container_security_context must be a mapping"),
        ({"volumes": ["/data"]}, "volumes must be a mapping"),
        ({"volumes": {"data": {"emptyDir": {}}}}, "volumes must be an absolute path"),
        ({"volumes": {"/": {"emptyDir": {}}}}, "volumes must be an absolute path"),
        ({"volumes": {"/a:b": {"emptyDir": {}}}}, "volumes must be an absolute path without ':'"),
        ({"volumes": {"/asyncrt/x": {"emptyDir": {}}}}, "choose another path"),
        ({"volumes": {"/tmp/": {"emptyDir": {}}}}, "choose another path"),  # noqa: S108
        ({"volumes": {"/data": {}}}, "volumes['/data'] must be one source of a volume"),
        ({"volumes": {"/data": {"readOnly": True}}}, "must be one source of a volume"),
        ({"volumes": {"/data": {"emptyDir": {}, "nfs": {}}}}, "must be one source of a volume"),
        ({"volumes": {"/data": {"persistentVolumeClaim": "data"}}}, "{'persistentVolumeClaim'"),
        ({"volumes": {"/data": "data"}}, "volumes['/data'] must be a mapping"),
        ({"volumes": {"/data": {"persistentVolumeclaim": {}}}}, "mean 'persistentVolumeClaim'?"),
        ({"run_as_user": -1}, "run_as_user must be a uid from 0 to 2147483647"),
        ({"run_as_user": 2**31}, "run_as_user must be a uid from 0"),
        ({"run_as_user": "root"}, "or None, not 'root'"),
        ({"run_as_user": True}, "not True"),
        ({"pod_patch": {"containers": []}}, "pod_patch must be a mapping with 'metadata'"),
        ({"ttl": -1}, "ttl must be seconds from 0"),
        ({"ttl": None}, "ttl must be seconds from 0"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        Settings().updated(options)
    assert [caught.value.key] == list(options)
    assert str(caught.value).startswith(str(caught.value.key))
    assert caught.value.expected


@pytest.mark.parametrize(
    "options",
    [
        {"gpu": 2},
        {"gpu": {"amd.com/gpu": 1, "example.com/fpga": 2}},
        {"secrets": ["db", "my.secret-2"]},
        {"secrets": {"db": None, "tls": "/etc/tls"}},
        {"node_selector": {"kubernetes.io/arch": "arm64", "empty": ""}},
        {"labels": {"example.com/Team_1": "Red.2"}},
        {"labels": {"app.kubernetes.io/name": "thumbs"}},
        {"annotations": {"example.com/note": "any text: ü, {}"}},
        {"tolerations": [{"operator": "Exists"}]},
        {"tolerations": [{"key": "a", "value": "b"}]},
        {"tolerations": [{"key": "a", "effect": "NoExecute", "tolerationSeconds": 5}]},
        {"volumes": {"/data": {"nfs": {"server": "s", "path": "/"}, "subPath": "x"}}},
        {"run_as_user": 0},
        {"run_as_user": None},
        {"ttl": 0},
        {"kubeconfig": Path("/kube/config")},
    ],
)
def test_what_kubernetes_accepts_is_accepted(options: dict[str, Any]) -> None:
    pod = Settings().updated(options).pool.pod
    [(name, value)] = options.items()
    assert thawed(getattr(pod, name)) == thawed(value)


def test_wrong_value_in_the_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("asyncrt:\n  labels: {team: red blue}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, environ={})
    assert str(caught.value).startswith(f"{file}:2: asyncrt.labels['team'] must be a text")
    assert (caught.value.line, caught.value.suggestion) == (2, "red-blue")
    file.write_text("k8s:\n  namespace: My_Space\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, environ={})
    assert str(caught.value).startswith(f"{file}:2: k8s.namespace must be lower-case letters")


def test_section_k8s_gives_options_on_kubernetes_only(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "k8s: {kubecfg_path: kube, kubecfg_context: far, namespace: jobs,\n"
        "      pod_security_context: {fsGroup: 5}, container_security_context: {privileged: true}}"
    )
    config = load_config(file, environ={})
    pod = config.settings({"backend": "k8s", "namespace": "other"}).pool.pod
    assert (pod.kubeconfig, pod.context, pod.namespace) == (tmp_path / "kube", "far", "other")
    assert pod.pod_security_context == {"fsGroup": 5}
    assert pod.container_security_context == {"privileged": True}
    assert config.settings().pool.pod == PodSettings()


def test_environment_in_a_patch_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "asyncrt: {secrets: [db], pod_patch: {spec: {containers: [\n"
        "  {name: worker, env: [{name: TOKEN, value: hunter2}]}]}}}"
    )
    shown = load_config(file, environ={}).effective()
    assert shown["asyncrt.secrets"].value == ["db"]
    assert shown["asyncrt.pod_patch"].value["spec"]["containers"] == [
        {"name": "worker", "env": [{"name": "***", "value": "***"}]}
    ]


def test_settings_cannot_be_changed_from_outside() -> None:
    labels, names = {"a": "b"}, ["db"]
    tolerations = [{"key": "a"}]
    pod = PodSettings(labels=labels, secrets=names, tolerations=tolerations)
    labels["a"], tolerations[0]["key"] = "c", "d"
    names.append("other")
    assert pod == PodSettings(labels={"a": "b"}, secrets=("db",), tolerations=({"key": "a"},))
    with pytest.raises(TypeError):
        pod.labels["x"] = "y"  # type: ignore[index]


def test_shape_is_equal_exactly_where_pods_are() -> None:
    different: list[dict[str, Any]] = [
        {},
        {"gpu": 1},
        {"gpu": {"amd.com/gpu": 1}},
        {"labels": {"a": "b"}},
        {"secrets": ["a"]},
        {"secrets": {"a": "/x"}},
        {"run_as_user": None},
        {"pod_patch": {"spec": {"hostIPC": True}}},
        {"kubeconfig": Path("/kube")},
        {"namespace": "jobs"},
    ]
    assert len({PodSettings(**options).shape() for options in different}) == len(different)
    one = PodSettings(labels={"a": "1", "b": "2"}, kubeconfig="/kube")
    other = PodSettings(labels={"b": "2", "a": "1"}, kubeconfig=Path("/kube"))
    assert one.shape() == other.shape()


def test_resources_and_secrets_are_told_in_one_form() -> None:
    assert PodSettings().extended_resources() == {}
    assert PodSettings(gpu=2).extended_resources() == {"nvidia.com/gpu": 2}
    assert PodSettings(gpu={"amd.com/gpu": 1}).extended_resources() == {"amd.com/gpu": 1}
    listed, mapped = PodSettings(secrets=["a"]), PodSettings(secrets={"a": None, "b": "/b"})
    assert (listed.environment_secrets(), listed.mounted_secrets()) == (["a"], {})
    assert (mapped.environment_secrets(), mapped.mounted_secrets()) == (["a"], {"b": "/b"})


# Owners


def test_plain_owner_is_readable() -> None:
    assert owner_label("alice", "laptop.example.com") == "alice_at_laptop.example.com"


@given(st.text(max_size=80), st.text(max_size=80))
def test_every_owner_is_a_label_that_is_not_empty(user: str, host: str) -> None:
    label = owner_label(user, host)
    assert label
    check_label_value("owner", label)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a b", "h"), ("a-b", "h")),
        (("a", "h" * 70), ("a", "h" * 71)),
        (("a", "h-"), ("a", "h")),
        (("a", "b_at_c"), ("a_at_b", "c")),
        (("ü", ""), ("ö", "")),
    ],
)
def test_owners_that_look_alike_are_told_apart(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    assert owner_label(*one) != owner_label(*other)


def test_default_owner_is_this_user_on_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "here")
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    assert default_owner() == "alice_at_here"

    def without_a_name() -> str:
        raise KeyError("getpwuid(): uid not found: 10001")

    monkeypatch.setattr(getpass, "getuser", without_a_name)
    assert re.fullmatch("uid-[0-9]+_at_here", default_owner())


@given(st.text(max_size=100))
def test_repaired_label_is_a_label(text: str) -> None:
    check_label_value("label", label_value(text))
