"""The configuration: where it is found, who comes over whom, and where a value comes from."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from asyncrt.config import (
    Config,
    K8sConfig,
    Origin,
    S3Config,
    load_config,
)
from asyncrt.configenv import variables
from asyncrt.errors import ConfigError
from asyncrt.options import CALL_OPTIONS, POOL_OPTIONS, Retry

MIB = 2**20
HIDDEN = "hunter2"  # stands for every password
DOCUMENT = Path(__file__).parents[1] / "docs/configuration.md"
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


# Where the file is found


def test_without_a_file_and_variables_all_is_default(tmp_path: Path) -> None:
    config = load_config(environ={}, cwd=tmp_path)
    assert config == Config()
    assert config.settings() == Config().settings()
    assert set(config.origins.values()) == {"default"}


def test_first_file_found_wins(tmp_path: Path) -> None:
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    named, given = tmp_path / "named.yaml", tmp_path / "given.yaml"
    in_home = home / ".config/asyncrt/config.yaml"
    in_home.parent.mkdir(parents=True)
    cwd.mkdir()
    environ = {"HOME": str(home)}

    def slots() -> int:
        return load_config(environ=environ, cwd=cwd).settings().pool.slots

    in_home.write_text("asyncrt: {slots: 2}")
    assert slots() == 2
    (cwd / ".asyncrt.yaml").write_text("asyncrt: {slots: 3}")
    assert slots() == 3
    named.write_text("asyncrt: {slots: 4}")
    environ["ASYNCRT_CONFIG"] = str(named)
    assert slots() == 4
    given.write_text("asyncrt: {slots: 5}")
    config = load_config(given, environ=environ, cwd=cwd)
    assert (config.settings().pool.slots, config.path) == (5, given)


def test_this_process_has_the_environment_and_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".asyncrt.yaml").write_text("asyncrt: {slots: 3}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ASYNCRT_CONFIG", raising=False)
    monkeypatch.setenv("ASYNCRT_TIMEOUT", "7")
    settings = load_config().settings()
    assert (settings.pool.slots, settings.call.timeout) == (3, 7)


def test_named_file_is_relative_to_the_directory_or_to_home(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("asyncrt: {slots: 3}")
    for name in ("own.yaml", "~/own.yaml"):
        environ = {"ASYNCRT_CONFIG": name, "HOME": str(tmp_path)}
        assert load_config(environ=environ, cwd=tmp_path).path == tmp_path / "own.yaml"
        assert load_config(name, environ=environ, cwd=tmp_path).path == tmp_path / "own.yaml"


def test_empty_variable_names_no_file(tmp_path: Path) -> None:
    assert load_config(environ={"ASYNCRT_CONFIG": ""}, cwd=tmp_path).path is None


def test_given_file_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist$") as caught:
        load_config("none.yaml", environ={}, cwd=tmp_path)
    assert caught.value.source == str(tmp_path / "none.yaml")


def test_named_file_that_does_not_exist_is_an_error_and_nothing_else_is_read(
    tmp_path: Path,
) -> None:
    (tmp_path / ".asyncrt.yaml").write_text("asyncrt: {slots: 3}")
    environ = {"ASYNCRT_CONFIG": str(tmp_path / ".asyncrt.yaml" / "below-a-file")}
    with pytest.raises(ConfigError, match=r"does not exist \(named by ASYNCRT_CONFIG\)$"):
        load_config(environ=environ, cwd=tmp_path)


def test_directory_in_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".asyncrt.yaml").mkdir()
    with pytest.raises(ConfigError, match="is a directory") as caught:
        load_config(environ={}, cwd=tmp_path)
    assert caught.value.source == str(tmp_path / ".asyncrt.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_config("", environ={}, cwd=tmp_path)


def test_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".asyncrt.yaml").symlink_to(".asyncrt.yaml")  # a loop stops root too
    with pytest.raises(ConfigError, match="cannot be read: Too many levels of symbolic links"):
        load_config(environ={}, cwd=tmp_path)


# Who comes over whom


def test_argument_over_variable_over_file_over_default(load: Load) -> None:
    text = "asyncrt: {slots: 2, max_workers: 2, timeout: 2}"
    config = load(text, {"ASYNCRT_MAX_WORKERS": "3", "ASYNCRT_TIMEOUT": "3"})
    settings = config.settings({"timeout": 4})
    assert settings.pool.slots == 2
    assert settings.pool.max_workers == 3
    assert settings.call.timeout == 4
    assert settings.pool.idle_timeout == 60


def test_kubernetes_has_the_defaults_of_its_own(tmp_path: Path) -> None:
    config = load_config(environ={}, cwd=tmp_path)
    pool = config.settings({"backend": "k8s"}).pool
    assert (pool.memory_bytes, pool.cpu_millicores) == (256 * MIB, 500)
    pool = config.settings().pool
    assert (pool.memory_bytes, pool.cpu_millicores) == (None, None)


def test_keys_of_the_k8s_section_are_options_on_kubernetes_only(load: Load) -> None:
    text = """
    asyncrt: {max_workers: 3, memory: 1Gi}
    k8s: {runtime_memory: 512, runtime_cpu: 2, runtime: me/image, runtime_timeout: 9,
          max_workers: 50, worker_processes: 4}
    """
    config = load(text)
    on_k8s = config.settings({"backend": "k8s"})
    assert on_k8s.pool.memory_bytes == 512 * MIB
    assert on_k8s.pool.cpu_millicores == 2000
    assert on_k8s.pool.runtime == "me/image"
    assert (on_k8s.pool.max_workers, on_k8s.pool.slots) == (50, 4)
    assert on_k8s.call.timeout == 9
    local = config.settings()
    assert (local.pool.memory_bytes, local.pool.max_workers) == (2**30, 3)
    assert (local.pool.runtime, local.call.timeout) == (None, None)
    docker = config.settings({"backend": "docker"})
    assert docker == config.settings({}).updated({"backend": "docker"})
    assert config.settings({"backend": "k8s", "memory": None}).pool.memory_bytes is None


def test_keys_of_the_local_section_are_options_on_this_machine_only(load: Load) -> None:
    config = load("asyncrt: {slots: 2}\nlocal: {max_workers: 3, slots: 4, cpu: 1, memory: 1Gi}")
    pool = config.settings().pool
    assert (pool.max_workers, pool.slots, pool.cpu_millicores) == (3, 4, 1000)
    assert config.settings({"backend": "k8s"}).pool.slots == 2


def test_section_asyncrt_comes_over_the_defaults_of_kubernetes(load: Load) -> None:
    pool = load("asyncrt: {backend: k8s, memory: 1Gi}").settings().pool
    assert (pool.memory_bytes, pool.cpu_millicores) == (2**30, 500)


def test_variable_of_an_option_comes_over_the_key_of_a_backend_in_the_file(load: Load) -> None:
    text = "asyncrt: {backend: k8s}\nk8s: {runtime_memory: 512}\nlocal: {memory: 64Mi}"
    config = load(text, {"ASYNCRT_MEMORY": "1Gi"})
    assert config.settings().pool.memory_bytes == 2**30
    assert config.settings({"backend": "local"}).pool.memory_bytes == 2**30
    assert config.k8s.runtime_memory is None
    both = load(text, {"ASYNCRT_MEMORY": "1Gi", "ASYNCRT_K8S_RUNTIME_MEMORY": "128"})
    assert both.settings().pool.memory_bytes == 128 * MIB


def test_variable_none_takes_a_key_of_a_section_back(load: Load) -> None:
    config = load("k8s: {runtime_timeout: 5}", {"ASYNCRT_K8S_RUNTIME_TIMEOUT": "none"})
    assert config.settings({"backend": "k8s"}).call.timeout is None


def test_backend_object_has_no_section(load: Load) -> None:
    class Own:
        def open_pool(self) -> None:
            raise NotImplementedError

    backend = Own()
    settings = load("local: {slots: 4}").settings({"backend": backend})
    assert settings.pool.backend is backend
    assert settings.pool.slots == 1


def test_unknown_argument_is_refused_as_by_the_executor() -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_workers'"):
        Config().settings({"max_worker": 2})


def test_wrong_argument_is_not_blamed_on_the_file(load: Load) -> None:
    config = load("asyncrt: {slots: 2}")
    with pytest.raises(ConfigError, match=r"^slots must be a whole number") as caught:
        config.settings({"slots": 0})
    assert caught.value.source is None


def test_values_that_do_not_go_together_name_the_place_of_one(load: Load, file: Path) -> None:
    config = load("asyncrt:\n  min_workers: 5\n  max_workers: 2\n")
    with pytest.raises(
        ConfigError, match=r"config\.yaml:2: asyncrt\.min_workers=5 is more"
    ) as error:
        config.settings()
    assert (error.value.source, error.value.line) == (str(file), 2)
    assert config.settings({"max_workers": 9}).pool.min_workers == 5


def test_memory_in_the_k8s_section_may_be_a_quantity(load: Load) -> None:
    config = load("asyncrt: {backend: k8s}\nk8s: {runtime_memory: 1.5Gi}")
    assert config.settings().pool.memory_bytes == 3 * 2**29


def test_configuration_made_in_code_is_used_and_checked() -> None:
    config = Config(
        options={"backend": "k8s"},
        k8s=K8sConfig(runtime_memory=512, kubecfg_path="~/x"),  # type: ignore[arg-type]
    )
    assert config.settings().pool.memory_bytes == 512 * MIB
    assert config.k8s.kubecfg_path == Path("~/x")
    assert config.effective()["k8s.runtime_memory"].origin == "argument"
    with pytest.raises(ConfigError, match=r"^k8s\.max_workers must be a whole number"):
        K8sConfig(max_workers=0)
    with pytest.raises(ConfigError, match="min_workers=3 is more than max_workers=2"):
        Config(options={"min_workers": 3, "max_workers": 2}).settings()


# Origins


def test_origin_of_every_value_is_known(load: Load, file: Path) -> None:
    config = load(
        "k8s:\n  namespace: a\nlithops:\n  execution_timeout: 9\n",
        {"ASYNCRT_SLOTS": "2"},
    )
    assert set(config.origins) == set(variables().values())
    assert config.origins["k8s.namespace"] == f"file {file}:2"
    assert config.origins["asyncrt.timeout"] == f"file {file}:4 (lithops.execution_timeout)"
    assert config.origins["asyncrt.slots"] == "environment ASYNCRT_SLOTS"
    assert config.origins["asyncrt.memory"] == "default"


def test_effective_values_say_where_they_come_from(load: Load, file: Path) -> None:
    config = load(
        "asyncrt:\n  timeout: 5\n  env:\n    TOKEN: hunter2\n"
        "k8s:\n  runtime_memory: 512\n  docker_password: hunter2\n"
        "  kubecfg_path: /kube\n  pod_security_context: {fsGroup: 10}\n",
        {"ASYNCRT_MAX_WORKERS": "7"},
    )
    shown = config.effective({"backend": "k8s", "retries": Retry(attempts=4)})
    told = {key: (item.value, item.origin) for key, item in shown.items()}
    assert told["asyncrt.backend"] == ("k8s", "argument")
    assert told["asyncrt.retries"] == (4, "argument")
    assert told["asyncrt.timeout"] == (5, f"file {file}:2")
    assert told["asyncrt.memory"] == ("512Mi", f"file {file}:6 (k8s.runtime_memory)")
    assert told["asyncrt.cpu"] == (0.5, "default")
    assert told["asyncrt.max_workers"] == (7, "environment ASYNCRT_MAX_WORKERS")
    assert told["asyncrt.env"] == ({"TOKEN": "***"}, f"file {file}:3")
    assert told["k8s.docker_password"] == ("***", f"file {file}:7")
    assert told["k8s.kubecfg_path"] == ("/kube", f"file {file}:8")
    assert told["k8s.pod_security_context"] == ({"fsGroup": 10}, f"file {file}:9")
    assert "k8s.namespace" not in told
    assert {f"asyncrt.{name}" for name in CALL_OPTIONS | POOL_OPTIONS} <= set(told)


def test_origin_reads_like_a_place() -> None:
    assert str(Origin()) == "default"
    assert str(Origin("file", "/a.yaml", 3)) == "file /a.yaml:3"
    assert str(Origin("file", "/a.yaml", 3, "minio.endpoint")) == "file /a.yaml:3 (minio.endpoint)"


# Files of Lithops


LITHOPS = """
lithops:
  backend: {backend}
  storage: {storage}
  monitoring: rabbitmq
  log_level: DEBUG
  execution_timeout: 900
  chunksize: 2
  max_workers: 30
localhost: {{worker_processes: 6, runtime: python3}}
k8s:
  runtime_memory: 512
  docker_password: hunter2
  master_timeout: 600
  rabbitmq_executor: true
aws: {{region: eu-west-1, access_key_id: aws-id, secret_access_key: hunter2}}
aws_s3: {{region: us-east-1, storage_bucket: aws-bucket}}
minio: {{endpoint: 'http://minio:9000', access_key_id: minio-id, storage_bucket: minio-bucket}}
rabbitmq: {{amqp_url: 'amqp://me:hunter2@host'}}
"""


def test_lithops_file_works_on_kubernetes(
    load: Load, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="asyncrt"):
        config = load(LITHOPS.format(backend="k8s", storage="minio"))
    settings = config.settings()
    assert settings.pool.backend == "k8s"
    assert settings.pool.memory_bytes == 512 * MIB
    assert settings.pool.max_workers == 30
    assert (settings.call.timeout, settings.call.chunksize) == (900, 2)
    assert config.s3 == S3Config(
        endpoint="http://minio:9000", access_key_id="minio-id", bucket="minio-bucket"
    )
    assert config.origins["s3.bucket"] == f"file {file}:18 (minio.storage_bucket)"
    ignored = {note.partition(" ")[0] for note in config.notes}
    assert ignored == {
        "lithops.monitoring",
        "lithops.log_level",
        "localhost.runtime",
        "k8s.master_timeout",
        "k8s.rabbitmq_executor",
        "aws.region",
        "aws.access_key_id",
        "aws.secret_access_key",
        "aws_s3.region",
        "aws_s3.storage_bucket",
        "rabbitmq",
    }
    assert "k8s.master_timeout (line 14)" in config.notes
    [record] = caplog.records
    assert all(note in record.getMessage() for note in config.notes)
    assert HIDDEN not in record.getMessage()


def test_lithops_file_works_on_this_machine(load: Load) -> None:
    config = load(LITHOPS.format(backend="localhost", storage="localhost"))
    pool = config.settings().pool
    assert (pool.backend, pool.max_workers) == ("local", 6)
    assert config.s3 is None
    assert "lithops.storage (line 4)" in config.notes


def test_bucket_section_of_lithops_comes_over_its_account_section(load: Load) -> None:
    assert load(LITHOPS.format(backend="k8s", storage="aws_s3")).s3 == S3Config(
        region="us-east-1",
        access_key_id="aws-id",
        secret_access_key=HIDDEN,
        bucket="aws-bucket",
    )


def test_own_sections_come_over_those_of_lithops(load: Load) -> None:
    text = LITHOPS.format(backend="localhost", storage="minio")
    own = "asyncrt: {backend: k8s, timeout: 5}\ns3: {bucket: own}\nlocal: {max_workers: 1}\n"
    for config in (load(text + own), load(own + text)):
        assert config.settings().pool.backend == "k8s"
        assert config.settings().call.timeout == 5
        assert config.s3 is not None
        assert (config.s3.bucket, config.s3.access_key_id) == ("own", "minio-id")
        assert config.local.max_workers == 1


def test_backend_that_only_lithops_has_is_refused_when_it_is_used(load: Load, file: Path) -> None:
    config = load("lithops:\n  backend: aws_lambda\n")
    with pytest.raises(
        ConfigError, match="must be one of local, docker, k8s, not 'aws_lambda'"
    ) as (caught):
        config.settings()
    assert str(caught.value).startswith(f"{file}:2: lithops.backend must")
    assert (caught.value.key, caught.value.line) == ("lithops.backend", 2)
    assert config.settings({"backend": "k8s"}).pool.backend == "k8s"


def test_wrong_value_of_lithops_is_refused_by_its_own_name(load: Load, file: Path) -> None:
    error = refused(load, "lithops:\n  execution_timeout: long\n")
    assert str(error) == (
        f"{file}:2: lithops.execution_timeout must be seconds above 0, not 'long'"
    )
    error = refused(load, "lithops: {storage: ceph}\nceph:\n  endpoint: 'id:hunter2@host'")
    assert error.key == "ceph.endpoint"
    with pytest.raises(ConfigError, match=r"lithops\.backend"):
        load("lithops:\n  backend: 5\n").settings()


def test_odd_but_empty_sections_of_lithops_are_fine(load: Load) -> None:
    config = load("lithops:\nminio:\naws_lambda: text\nlocalhost: {}\n")
    assert config.settings() == Config().settings()
    assert config.notes == ("aws_lambda (line 3)",)
    assert load("minio: {endpoint: 'http://x'}").s3 is None


# The documentation


def test_every_key_is_in_the_documentation() -> None:
    documented = set(re.findall(r"^\| `([\w.]+)`", DOCUMENT.read_text(), re.M))
    keys = {key.removeprefix("asyncrt.") for key in variables().values()}
    assert keys - documented == set()
    assert documented - keys - {"deadline"} == set()


def test_example_of_the_documentation_is_accepted(load: Load) -> None:
    [example] = re.findall(r"^```yaml\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S)
    config = load(example)
    assert config.settings().pool.backend == "k8s"
    assert config.notes == ()
