"""What a configuration file may look like, and what its errors and those of variables say."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from asyncrt.config import (
    Config,
    K8sConfig,
    LocalConfig,
    LocalStorageConfig,
    S3Config,
    load_config,
)
from asyncrt.configenv import variables
from asyncrt.configkeys import valid_keys
from asyncrt.errors import ConfigError
from asyncrt.options import CALL_OPTIONS, POOL_OPTIONS, Retry

MIB = 2**20
HIDDEN = "hunter2"  # stands for every password
Load = Callable[..., Config]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


@pytest.fixture
def load(file: Path) -> Load:
    """Return a function that loads a text as the file, in an environment of its own."""

    def load_text(text: str, environ: Mapping[str, str] | None = None) -> Config:
        file.write_text(text)
        return load_config(file, environ=environ or {}, cwd=file.parent)

    return load_text


def refused(load: Load, text: str, environ: Mapping[str, str] | None = None) -> ConfigError:
    """Return the error that a file causes, and check that it quotes no password anywhere."""
    with pytest.raises(ConfigError) as caught:
        load(text, environ)
    error = caught.value
    shown = [*traceback.format_exception(error), repr(vars(error))]
    assert not any(HIDDEN in line for line in shown)
    assert error.expected
    return error


# What a file may look like


@pytest.mark.parametrize("text", ["", "---\n", "# nothing\n", "null\n", "k8s:\nasyncrt:\n", "{}"])
def test_empty_file_and_empty_sections_are_fine(load: Load, text: str) -> None:
    config = load(text)
    assert config.settings() == Config().settings()
    assert config.s3 is None


def test_byte_order_mark_is_fine(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfasyncrt: {slots: 2}")
    assert load_config(file, environ={}).settings().pool.slots == 2


def test_every_section_becomes_its_class(load: Load, tmp_path: Path) -> None:
    config = load(
        """
        asyncrt: {backend: k8s, echo: false}
        k8s:
          kubecfg_path: kube/config
          kubecfg_context: prod
          namespace: jobs
          docker_server: registry.example.com
          docker_user: me
          docker_password: hunter2
          runtime: me/image:1
          runtime_cpu: 500m
          runtime_memory: 512
          runtime_timeout: 60
          runtime_arch: arm64
          max_workers: 20
          worker_processes: 2
          container_security_context: {runAsNonRoot: true, capabilities: {drop: [ALL]}}
          pod_security_context: {fsGroup: 10}
        local: {max_workers: 2, slots: 3, cpu: 1, memory: 1Gi}
        s3:
          endpoint: http://localhost:8333
          pod_endpoint: https://s3.svc
          bucket: data
          region: eu-1
          access_key_id: id
          secret_access_key: hunter2
          session_token: hunter2
          path_style: true
          ca_bundle: /etc/ca.pem
        local_storage: {path: store}
        """
    )
    assert config.k8s == K8sConfig(
        kubecfg_path=tmp_path / "kube/config",
        kubecfg_context="prod",
        namespace="jobs",
        docker_server="registry.example.com",
        docker_user="me",
        docker_password=HIDDEN,
        runtime="me/image:1",
        runtime_cpu="500m",
        runtime_memory=512,
        runtime_timeout=60,
        runtime_arch="arm64",
        max_workers=20,
        worker_processes=2,
        container_security_context={"runAsNonRoot": True, "capabilities": {"drop": ["ALL"]}},
        pod_security_context={"fsGroup": 10},
    )
    assert config.local == LocalConfig(max_workers=2, slots=3, cpu=1, memory="1Gi")
    assert config.s3 == S3Config(
        endpoint="http://localhost:8333",
        pod_endpoint="https://s3.svc",
        bucket="data",
        region="eu-1",
        access_key_id="id",
        secret_access_key=HIDDEN,
        session_token=HIDDEN,
        path_style=True,
        ca_bundle=Path("/etc/ca.pem"),
    )
    assert config.local_storage == LocalStorageConfig(path=tmp_path / "store")
    assert config.options == {"backend": "k8s", "echo": False}
    assert HIDDEN not in repr(config) + str(config.effective()) + str(config.origins)
    with pytest.raises(FrozenInstanceError):
        config.k8s.namespace = "x"  # type: ignore[misc]


def test_values_can_be_shared_with_anchors_and_merges(load: Load) -> None:
    config = load(
        """
        asyncrt: &all {slots: 2, timeout: 5}
        local: &few {max_workers: 2, slots: 4}
        k8s: {<<: [{max_workers: 7}, *few0], namespace: &name jobs, kubecfg_context: *name}
        """.replace("*few0", "{max_workers: 8, worker_processes: 9}")
    )
    assert (config.k8s.max_workers, config.k8s.worker_processes) == (7, 9)
    assert config.k8s.kubecfg_context == "jobs"
    config = load("asyncrt:\n  <<: {slots: 2, timeout: 5}\n  slots: 3\n")
    assert (config.options["slots"], config.options["timeout"]) == (3, 5)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("k8s: 5", 1, "k8s must be a section: keys with values"),
        ("asyncrt:\n  slots: 2\nlocal: [a]", 3, "local must be a section"),
        ("lithops: k8s", 1, "lithops must be a section"),
        ("- k8s", 1, "the file must be a mapping of sections"),
        ("hunter2", 1, "the file must be a mapping of sections"),
        ("k8s:\n  namespace: a\n  namespace: b", 3, "k8s.namespace is already given in line 2"),
        ("k8s: {}\nk8s: {}", 2, "k8s is already given in line 1"),
        (
            "k8s:\n  pod_security_context:\n    a: 1\n    a: 2",
            4,
            "k8s.pod_security_context.a is already given in line 3",
        ),
        ("k8s:\n  5: a", 2, "k8s has a key that is not a text: put it in quotes"),
        ("no: {}", 1, "the file has a key that is not a text"),
        ("k8s:\n  [hunter2]: a", 2, "k8s has a key that is not a text"),
        ("k8s:\n  <<: hunter2", 2, "k8s.<< must name a mapping, or several"),
        ("k8s:\n  namespace: 2026-02-31", 2, "k8s.namespace cannot be read: put the value in"),
        ("k8s:\n  docker_password: !hunter2 x", 2, "k8s.docker_password cannot be read"),
        ("k8s:\n  docker_password: !!python/name:os.system hunter2", 2, "cannot be read"),
    ],
)
def test_wrong_shape_is_refused_with_its_line(
    load: Load, file: Path, text: str, line: int, problem: str
) -> None:
    error = refused(load, text)
    assert str(error).startswith(f"{file}:{line}: ")
    assert problem in str(error)
    assert (error.source, error.line) == (str(file), line)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("k8s:\n  docker_password: %hunter2", 2, "found character '%' that cannot start any token"),
        ("k8s:\n  docker_password: *hunter2", 2, "found undefined alias ..."),
        ("k8s:\n  docker_password: &hunter2 a\n  runtime: &hunter2 b", 3, ""),
        ("k8s:\n  docker_password: 'hunter2", 2, "found unexpected end of stream"),
        ("k8s:\n  docker_password: [hunter2", 2, "expected ',' or ']'"),
        ("k8s:\n docker_user: a\n docker_password:hunter2\n", 4, "could not find expected ':'"),
        ("k8s: {}\n---\nlocal: {}", 2, "but found another document"),
        ("k8s:\n  runtime: a\n\tnamespace: b", 3, "cannot start any token"),
        ("k8s:\n  docker_password: hunter2\x07", 2, "found a control character"),
    ],
)
def test_invalid_yaml_is_refused_with_its_line_and_without_its_words(
    load: Load, file: Path, text: str, line: int, problem: str
) -> None:
    error = refused(load, text)
    assert "not valid YAML" in str(error)
    assert problem in str(error)
    assert (error.source, error.expected) == (str(file), "YAML")
    assert error.line is not None
    assert abs(error.line - line) <= 1  # some mistakes are noticed in the line after


def test_endless_nesting_and_aliases_of_themselves_are_refused(load: Load) -> None:
    assert "nested too deeply" in str(refused(load, "k8s: " + "[" * 5000))
    error = refused(load, "k8s:\n  pod_security_context: &a {again: *a}")
    assert "an alias that contains itself" in str(error)


def test_aliases_that_multiply_are_refused(load: Load) -> None:
    lines = ["k8s:", "  pod_security_context:", "    a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 8):
        lines.append(f"    a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    assert "more than 100000 entries" in str(refused(load, "\n".join(lines)))


def test_file_that_is_not_utf8_is_refused_with_its_line(file: Path) -> None:
    file.write_bytes(b"asyncrt:\n  name: caf\xe9 hunter2\n")
    with pytest.raises(ConfigError, match=r"config\.yaml:2: not UTF-8 \(byte 0xe9\)$") as caught:
        load_config(file, environ={})
    assert caught.value.line == 2
    assert not any(HIDDEN in line for line in traceback.format_exception(caught.value))


# What keys accept


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("k8s:\n  namespce: a", "k8s.namespce", "namespace"),
        ("k8s:\n  memory: 512", "k8s.memory", "runtime_memory"),
        ("k8s:\n  slots: 2", "k8s.slots", "worker_processes"),
        ("k8s:\n  echo: true", "k8s.echo", "asyncrt.echo"),
        ("local:\n  timeout: 5", "local.timeout", "asyncrt.timeout"),
        ("asyncrt:\n  runtime_memory: 5", "asyncrt.runtime_memory", "k8s.runtime_memory"),
        ("asyncrt:\n  max_worker: 5", "asyncrt.max_worker", "max_workers"),
        ("asyncrt:\n  deadline: 5", "asyncrt.deadline", "timeout"),
        ("s3:\n  secret_key: hunter2", "s3.secret_key", "secret_access_key"),
        ("\nk9s:\n  namespace: a", "k9s", "k8s"),
        ("\nlithop:\n  backend: a", "lithop", "lithops"),
    ],
)
def test_unknown_key_names_the_nearest_one(
    load: Load, file: Path, text: str, key: str, suggestion: str
) -> None:
    error = refused(load, text)
    assert str(error).startswith(f"{file}:2: ")
    assert key in str(error)
    assert f"did you mean {suggestion!r}?" in str(error)
    assert (error.source, error.line) == (str(file), 2)
    assert (error.key, error.suggestion) == (key, suggestion)


def test_unknown_key_with_nothing_near_lists_those_of_its_section(load: Load) -> None:
    error = refused(load, "local_storage:\n  zzz: 1")
    assert str(error).endswith("unknown key 'local_storage.zzz'; valid are path")
    assert error.suggestion is None


def test_key_that_swallowed_its_value_is_not_repeated(load: Load) -> None:
    error = refused(load, "k8s: {docker_password=hunter2: }")
    assert "config.yaml:1: unknown key; " in str(error)
    assert error.key is None


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("asyncrt.timeout", "soon", "must be seconds above 0, not 'soon'"),
        ("asyncrt.timeout", "true", "must be seconds above 0, not True"),
        ("asyncrt.timeout", ".inf", "for no limit use None"),
        ("asyncrt.slots", "2.5", "must be a whole number from 1, not 2.5"),
        ("asyncrt.slots", "null", "must be a whole number from 1, not None"),
        ("asyncrt.memory", "512", "=512 is 512 bytes, too little to start Python"),
        ("asyncrt.memory", "1GB", "did you mean '1Gi'?"),
        ("asyncrt.cpu", "many", "='many' is not a quantity"),
        ("asyncrt.backend", "k9s", "did you mean 'k8s'?"),
        ("asyncrt.echo", "'yes'", "must be True or False, not 'yes'"),
        ("asyncrt.retries", "{attempts: 3}", "a number of attempts"),
        ("asyncrt.retries", "0", ": attempts must be a whole number of at least 1"),
        ("asyncrt.isolation", "calls", "did you mean 'call'?"),
        ("asyncrt.env", "A=1", "must map names to strings"),
        ("asyncrt.env", "{hunter3: hunter2, A: 5}", "asyncrt.env.A must be a text: put it in"),
        ("asyncrt.store", "'s3://id:hunter2@host'", "must not contain a user or a password"),
        ("asyncrt.name", "''", "must be a text, not an empty text"),
        ("k8s.namespace", "5", "must be a text, not 5"),
        ("k8s.namespace", "no", "must be a text, not False"),
        ("k8s.docker_password", "[hunter2]", "must be a text, not a value of type list"),
        ("k8s.docker_server", "'me:hunter2@registry'", "must not contain a user or a password"),
        ("k8s.kubecfg_path", "5", "must be a path, not 5"),
        ("k8s.kubecfg_path", "''", "must be a path, not ''"),
        ("k8s.runtime_cpu", "0", "must be a positive whole number of millicores"),
        ("k8s.runtime_memory", "lots", "='lots' is not a quantity"),
        ("k8s.runtime_memory", "'512'", "for MiB write '512Mi'"),
        ("k8s.runtime_memory", "3", "3 is none that a worker can have; did you mean 256?"),
        ("k8s.runtime_memory", "268435456", "did you mean 256?"),
        ("k8s.runtime_timeout", "0", "must be seconds above 0, not 0"),
        ("k8s.max_workers", "0", "must be a whole number from 1, not 0"),
        ("k8s.worker_processes", "two", "must be a whole number from 1, not 'two'"),
        ("k8s.pod_security_context", "[a]", "must be a mapping, as in a pod's manifest, not list"),
        ("local.max_workers", "0", "must be a whole number from 1, not 0"),
        ("local.cpu", "none", "='none' is not a quantity"),
        ("local.memory", "5", "=5 is 5 bytes"),
        ("s3.endpoint", "localhost:9000", "must be a URL that begins with http:// or https://"),
        ("s3.endpoint", "'http://[::1'", "must be a URL"),
        ("s3.endpoint", "'http://'", "must be a URL"),
        ("s3.endpoint", "5", "must be a URL"),
        ("s3.pod_endpoint", "https://id:hunter2@host", "must not contain a user or a password"),
        ("s3.secret_access_key", "{hunter2: 1}", "must be a text, not a value of type dict"),
        ("s3.path_style", "'on'", "must be True or False, not 'on'"),
        ("s3.bucket", "5", "must be a text, not 5"),
        ("local_storage.path", "[a]", "must be a path, not ['a']"),
    ],
)
def test_wrong_value_is_refused_with_file_line_and_key(
    load: Load, file: Path, key: str, value: str, problem: str
) -> None:
    section, name = key.split(".")
    error = refused(load, f"# first line\n{section}:\n  {name}: {value}\n")
    assert str(error).startswith(f"{file}:3: {key}")
    assert problem in str(error)
    assert (error.source, error.line) == (str(file), 3)
    assert str(error.key).startswith(key)
    assert error.suggestion is None or error.suggestion in str(error)


@pytest.mark.parametrize("section", ["k8s", "local", "s3", "local_storage"])
def test_null_means_that_a_key_of_a_section_was_not_given(load: Load, section: str) -> None:
    text = "\n".join([f"{section}:", *(f"  {key}: null" for key in valid_keys()[section])])
    config = load(text)
    assert config.settings() == Config().settings()
    assert [key for key in config.effective() if key.startswith(f"{section}.")] == []


def test_every_option_can_be_in_the_file(load: Load, file: Path) -> None:
    written = {
        "backend": "local",
        "runtime": "python:3.12",
        "cpu": "500m",
        "memory": "1Gi",
        "slots": "2",
        "env": "{LANG: C.UTF-8}",
        "min_workers": "1",
        "max_workers": "4",
        "idle_timeout": "null",
        "start_timeout": "10",
        "orphan_timeout": "20.5",
        "heartbeat_interval": "2",
        "recycle_memory": "512Mi",
        "spill_dir": "/scratch",
        "spill_limit": "1Gi",
        "store": "s3://bucket",
        "echo": "false",
        "gpu": '{"amd.com/gpu": 2}',
        "secrets": "{db: null, tls: /etc/tls}",
        "service_account": "worker",
        "image_pull_secrets": "[registry]",
        "node_selector": "{disk: ssd}",
        "tolerations": "[{key: spot, operator: Exists}]",
        "affinity": "{nodeAffinity: {}}",
        "volumes": "{/data: {persistentVolumeClaim: {claimName: data}, readOnly: true}}",
        "priority_class": "low",
        "labels": "{team: red}",
        "annotations": "{note: a text}",
        "queue": "team-red",
        "run_as_user": "null",
        "pod_security_context": "{fsGroup: 1000}",
        "container_security_context": "{privileged: false}",
        "pod_patch": "{spec: {hostIPC: false}}",
        "namespace": "jobs",
        "context": "production",
        "kubeconfig": "kube/config",
        "owner": "me",
        "ttl": "60",
        "ordered": "false",
        "return_exceptions": "true",
        "max_in_flight": "50",
        "chunksize": "3",
        "retries": "3",
        "timeout": "1.5",
        "isolation": "call",
        "backups": "true",
        "name": "night",
        "include_modules": "[yaml, app.plugins]",
        "exclude_modules": "[]",
        "modules_limit": "128Mi",
    }
    assert set(written) == (CALL_OPTIONS | POOL_OPTIONS) - {"deadline"}
    lines = [f"  {key}: {value}" for key, value in written.items()]
    settings = load("\n".join(["asyncrt:", *lines])).settings()
    assert (settings.pool.memory_bytes, settings.pool.cpu_millicores) == (2**30, 500)
    assert settings.pool.env == {"LANG": "C.UTF-8"}
    assert settings.pool.idle_timeout is None
    pod = settings.pool.pod
    assert pod.extended_resources() == {"amd.com/gpu": 2}
    assert (pod.environment_secrets(), pod.mounted_secrets()) == (["db"], {"tls": "/etc/tls"})
    assert (pod.tolerations, pod.run_as_user) == (({"key": "spot", "operator": "Exists"},), None)
    assert pod.kubeconfig == file.parent / "kube/config"
    assert settings.call.retries == Retry(attempts=3)
    assert (settings.call.chunksize, settings.call.isolation) == (3, "call")
    assert settings.call.include_modules == ("yaml", "app.plugins")
    assert (settings.call.exclude_modules, settings.call.modules_limit_bytes) == ((), 2**27)


def test_relative_paths_belong_to_the_directory_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    file = tmp_path / "conf/own.yaml"
    file.write_text("k8s: {kubecfg_path: ~/kube}\ns3: {ca_bundle: ca.pem}\n")
    environ = {"HOME": "/home/me", "ASYNCRT_LOCAL_STORAGE_PATH": "store"}
    config = load_config(file, environ=environ, cwd=tmp_path)
    assert config.k8s.kubecfg_path == Path("/home/me/kube")
    assert config.s3 == S3Config(ca_bundle=tmp_path / "conf/ca.pem")
    assert config.local_storage == LocalStorageConfig(path=tmp_path / "store")
    without_home = load_config(file, environ={}, cwd=tmp_path)
    assert without_home.k8s.kubecfg_path == tmp_path / "conf/~/kube"


# The environment


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("ASYNCRT_MAX_WORKERS", "7", 7),
        ("ASYNCRT_MAX_WORKERS", "none", None),
        ("ASYNCRT_TIMEOUT", "2.5", 2.5),
        ("ASYNCRT_TIMEOUT", "None", None),
        ("ASYNCRT_ECHO", "off", False),
        ("ASYNCRT_ECHO", "1", True),
        ("ASYNCRT_ORDERED", "FALSE", False),
        ("ASYNCRT_CHUNKSIZE", "auto", "auto"),
        ("ASYNCRT_CHUNKSIZE", "12", 12),
        ("ASYNCRT_RETRIES", "3", 3),
        ("ASYNCRT_CPU", "0.5", 0.5),
        ("ASYNCRT_CPU", "500m", "500m"),
        ("ASYNCRT_MEMORY", "1Gi", "1Gi"),
        ("ASYNCRT_MEMORY", "268435456", 2**28),
        ("ASYNCRT_NAME", "5", "5"),
        ("ASYNCRT_BACKEND", "local", "local"),
        ("ASYNCRT_ENV", '{"A": "1"}', {"A": "1"}),
        ("ASYNCRT_INCLUDE_MODULES", "yaml, app.plugins,", ["yaml", "app.plugins"]),
        ("ASYNCRT_EXCLUDE_MODULES", "scratch", ["scratch"]),
        ("ASYNCRT_MODULES_LIMIT", "1Gi", "1Gi"),
        ("ASYNCRT_GPU", "1", 1),
        ("ASYNCRT_GPU", '{"amd.com/gpu": 1}', {"amd.com/gpu": 1}),
        ("ASYNCRT_SECRETS", "db, tls", ["db", "tls"]),
        ("ASYNCRT_SECRETS", '["db"]', ["db"]),
        ("ASYNCRT_SECRETS", '{"db": null}', {"db": None}),
        ("ASYNCRT_RUN_AS_USER", "none", None),
        ("ASYNCRT_LABELS", '{"team": "red"}', {"team": "red"}),
    ],
)
def test_variable_is_read_by_the_type_of_its_option(
    tmp_path: Path, variable: str, text: str, value: Any
) -> None:
    config = load_config(environ={variable: text}, cwd=tmp_path)
    option = variable.removeprefix("ASYNCRT_").lower()
    assert config.options == {option: value}
    assert type(config.options[option]) is type(value)
    assert config.origins[f"asyncrt.{option}"] == f"environment {variable}"
    config.settings()


def test_every_section_can_be_set_by_variables(tmp_path: Path) -> None:
    environ = {
        "ASYNCRT_K8S_NAMESPACE": "jobs",
        "ASYNCRT_K8S_DOCKER_PASSWORD": HIDDEN,
        "ASYNCRT_K8S_RUNTIME_MEMORY": "512",
        "ASYNCRT_K8S_POD_SECURITY_CONTEXT": '{"fsGroup": 10}',
        "ASYNCRT_LOCAL_MAX_WORKERS": "2",
        "ASYNCRT_S3_PATH_STYLE": "yes",
        "ASYNCRT_LOCAL_STORAGE_PATH": "/data",
    }
    config = load_config(environ=environ, cwd=tmp_path)
    assert config.k8s.namespace == "jobs"
    assert config.k8s.docker_password == HIDDEN
    assert config.k8s.runtime_memory == 512
    assert config.k8s.pod_security_context == {"fsGroup": 10}
    assert config.local == LocalConfig(max_workers=2)
    assert config.s3 == S3Config(path_style=True)
    assert config.local_storage == LocalStorageConfig(path=Path("/data"))
    assert config.origins["k8s.namespace"] == "environment ASYNCRT_K8S_NAMESPACE"


@pytest.mark.parametrize(
    ("variable", "text", "problem"),
    [
        ("ASYNCRT_TIMEOUT", "soon", "asyncrt.timeout must be seconds above 0, not 'soon'"),
        ("ASYNCRT_TIMEOUT", "nan", "asyncrt.timeout must be seconds above 0, not nan"),
        ("ASYNCRT_SLOTS", "none", "asyncrt.slots must be a whole number from 1, not 'none'"),
        ("ASYNCRT_ECHO", "maybe", "asyncrt.echo must be True or False, not 'maybe'"),
        ("ASYNCRT_CHUNKSIZE", "many", "asyncrt.chunksize must be 'auto' or a whole number"),
        ("ASYNCRT_ENV", "hunter2", "asyncrt.env must map names to strings"),
        ("ASYNCRT_ENV", '{"A": {"hunter2": 1}}', "asyncrt.env must map names to strings"),
        ("ASYNCRT_S3_ENDPOINT", "id:hunter2@host", "must not contain a user or a password"),
        ("ASYNCRT_K8S_POD_SECURITY_CONTEXT", "[1]", "must be a mapping"),
    ],
)
def test_wrong_variable_is_refused_by_its_name(
    load: Load, variable: str, text: str, problem: str
) -> None:
    error = refused(load, "", {variable: text})
    assert str(error).startswith(f"{variable}: ")
    assert problem in str(error)
    assert (error.source, error.line) == (variable, None)


@pytest.mark.parametrize(
    ("variable", "suggestion"),
    [
        ("ASYNCRT_MAX_WORKER", "ASYNCRT_MAX_WORKERS"),
        ("ASYNCRT_K8S_NAMESPCE", "ASYNCRT_K8S_NAMESPACE"),
        ("ASYNCRT_DOCKER_USER", "ASYNCRT_K8S_DOCKER_USER"),
        ("ASYNCRT_DEADLINE", "timeout"),
    ],
)
def test_unknown_variable_names_the_nearest_one(load: Load, variable: str, suggestion: str) -> None:
    error = refused(load, "", {variable: "hunter2"})
    assert variable in str(error)
    assert f"did you mean {suggestion!r}?" in str(error)
    assert (error.source, error.suggestion) == (variable, suggestion)


@pytest.mark.parametrize(
    "variable",
    [
        "ASYNCRT_SECRET",
        "ASYNCRT_TEST_KUBECONFIG",
        "ASYNCRT_CLUSTER_DIR",
        "ASYNCRT_SERVICE_HOST",
        "ASYNCRT_API_SERVICE_PORT",
        "ASYNCRT_API_SERVICE_PORT_HTTP",
        "ASYNCRT_PORT",
        "ASYNCRT_API_PORT_80_TCP_ADDR",
        "ASYNCRTX",
        "PATH",
    ],
)
def test_variables_that_are_no_options_are_left_alone(tmp_path: Path, variable: str) -> None:
    assert load_config(environ={variable: "x"}, cwd=tmp_path) == Config()


def test_empty_variable_is_one_that_is_not_set(load: Load) -> None:
    config = load("asyncrt: {timeout: 5}", {"ASYNCRT_TIMEOUT": ""})
    assert config.settings().call.timeout == 5


def test_no_two_keys_share_a_variable() -> None:
    assert len(set(variables().values())) == sum(map(len, valid_keys().values()))
    assert not any(name.startswith(("ASYNCRT_TEST_", "ASYNCRT_CLUSTER_")) for name in variables())
