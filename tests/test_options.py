"""Options, the checks of single values, and quantities."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import FrozenInstanceError, fields
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrt import checks
from asyncrt.errors import ConfigError
from asyncrt.options import (
    CALL_OPTIONS,
    POD_OPTIONS,
    POOL_OPTIONS,
    Backups,
    CallSettings,
    PoolSettings,
    Retry,
    Settings,
    check_names,
    option_defaults,
)
from asyncrt.podoptions import PodSettings
from asyncrt.quantities import parse_cpu, parse_memory

MIB = 2**20


class OwnBackend:
    """What the constructor accepts as a backend: something that opens pools."""

    def open_pool(self) -> None:
        raise NotImplementedError


# Quantities


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        ("256Mi", 256 * MIB),
        ("1Gi", 2**30),
        ("1G", 10**9),
        ("4096Ki", 4 * MIB),
        ("5000k", 5_000_000),
        (" 64Mi ", 64 * MIB),
        ("0.5Gi", 2**29),
        (".5Gi", 2**29),
        ("129e6", 129_000_000),
        ("129E+6", 129_000_000),
        ("1.5e9", 1_500_000_000),
        ("134217728000m", 128 * MIB),
        (256 * MIB, 256 * MIB),
        (5e6, 5_000_000),
        (1e16, 10**16),
    ],
)
def test_memory_is_bytes(written: str | float, size_bytes: int) -> None:
    assert parse_memory(written) == size_bytes


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("512", "512Mi"),
        (512, "512Mi"),
        ("256m", "256Mi"),
        (512.0, "512Mi"),
        (1, "256Mi"),
        (0, "256Mi"),
        ("2000000", "256Mi"),
        (".5", "256Mi"),
    ],
)
def test_memory_too_small_for_python_names_the_mebibytes_that_were_meant(
    written: str | float, meant: str
) -> None:
    with pytest.raises(ConfigError, match="too little to start Python") as caught:
        parse_memory(written, key="runtime_memory")
    assert caught.value.suggestion == meant
    assert caught.value.key == "runtime_memory"
    assert parse_memory(meant) >= 4 * MIB


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1GB", "1Gi"),
        ("1gib", "1Gi"),
        ("512MB", "512Mi"),
        ("512mb", "512Mi"),
        ("64K", "64Ki"),
        ("1.5tb", "1.5Ti"),
        ("lots", None),
        ("256 Mi", None),
        ("256MiMi", None),
        ("", None),
        ("-1Gi", None),
        ("nan", None),
        ("1e", None),
        ("١Gi", None),  # noqa: RUF001 - an Arabic digit, which int() would take
        (-1, None),
        (math.nan, None),
        (math.inf, None),
    ],
)
def test_what_is_no_quantity_is_refused_with_the_nearest_one(
    written: str | float, meant: str | None
) -> None:
    with pytest.raises(ConfigError, match="is not a quantity") as caught:
        parse_memory(written)
    assert caught.value.suggestion == meant
    if meant is not None:
        assert f"did you mean {meant!r}?" in str(caught.value)
    assert caught.value.expected == "a quantity such as '256Mi'"


@pytest.mark.parametrize("written", [True, None, b"1Gi", ["1Gi"]])
def test_quantity_of_another_type_is_refused_by_its_type(written: Any) -> None:
    with pytest.raises(ConfigError, match=f"not {type(written).__name__}$"):
        parse_memory(written)


@pytest.mark.parametrize("written", ["8192Pi", "1e30", 2**63])
def test_memory_beyond_64_bits_is_refused(written: str | int) -> None:
    with pytest.raises(ConfigError, match="more than a quantity can hold"):
        parse_memory(written)


@pytest.mark.parametrize(
    ("written", "millicores"),
    [
        (0.5, 500),
        ("0.5", 500),
        ("500m", 500),
        (2, 2000),
        ("1k", 1_000_000),
        (0.001, 1),
        (".25", 250),
    ],
)
def test_cpu_is_millicores(written: str | float, millicores: int) -> None:
    assert parse_cpu(written) == millicores


@pytest.mark.parametrize("written", [0, "0m", "0.5m", 0.0001, 1e-5, "1.5m"])
def test_cpu_that_is_no_whole_number_of_millicores_is_refused(written: str | float) -> None:
    with pytest.raises(ConfigError, match="whole number of millicores") as caught:
        parse_cpu(written, key="runtime_cpu")
    assert caught.value.key == "runtime_cpu"


@pytest.mark.parametrize(
    ("written", "meant"), [("500M", "500m"), ("1Gi", None), (10**9, None), ("1e300", None)]
)
def test_more_cpus_than_any_machine_has_are_refused(written: str | int, meant: str | None) -> None:
    with pytest.raises(ConfigError, match="more CPUs than any machine has") as caught:
        parse_cpu(written)
    assert caught.value.suggestion == meant


@given(st.integers(4, 2**30), st.sampled_from(["Mi", "Gi", "M", "G"]))
def test_suffix_multiplies(number: int, suffix: str) -> None:
    factor = {"Mi": 2**20, "Gi": 2**30, "M": 10**6, "G": 10**9}[suffix]
    if number * factor >= 4 * MIB:
        assert parse_memory(f"{number}{suffix}") == number * factor


@given(st.integers(1, 100_000_000))
def test_millicores_are_the_same_as_a_fraction(millicores: int) -> None:
    assert parse_cpu(f"{millicores}m") == millicores
    assert parse_cpu(str(Decimal(millicores) / 1000)) == millicores
    assert parse_cpu(millicores / 1000) == millicores


@given(st.text() | st.integers() | st.floats() | st.none() | st.booleans() | st.binary())
def test_any_value_is_a_quantity_or_a_config_error(value: Any) -> None:
    for parse in (parse_memory, parse_cpu):
        with suppress(ConfigError):
            assert parse(value) > 0


# Checks of single values


def test_a_bool_is_no_number() -> None:
    assert not checks.is_int(True)
    assert not checks.is_number(False)


def test_numbers_are_what_can_be_compared() -> None:
    assert checks.is_number(1.5)
    assert checks.is_number(math.inf)
    assert checks.is_number(10**400)
    assert not checks.is_number(math.nan)
    assert not checks.is_number("1")
    assert checks.is_int(-3)
    assert not checks.is_int(3.0)


def test_check_bool_takes_none_only_where_it_may() -> None:
    checks.check_bool("echo", True)
    checks.check_bool("echo", None, optional=True)
    for value in (None, 1, "yes"):
        with pytest.raises(ConfigError, match="echo must be True or False"):
            checks.check_bool("echo", value)


def test_check_text_takes_none_only_where_it_may() -> None:
    checks.check_text("name", "x", optional=False)
    checks.check_text("name", None, optional=True)
    for value in (None, 5, b"x"):
        with pytest.raises(ConfigError, match="name must be a text, not "):
            checks.check_text("name", value, optional=False)
    with pytest.raises(ConfigError, match="not an empty text"):
        checks.check_text("name", "", optional=True)


def test_secret_text_is_not_in_the_error() -> None:
    with pytest.raises(ConfigError, match=r"must be a text, not a value of type int$"):
        checks.check_text("docker_password", 31337, optional=True, secret=True)


@pytest.mark.parametrize(
    "url", ["s3://key:hunter2@host/bucket", "https://hunter2@host", "key:hunter2@host:9000"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="must not contain a user or a password") as caught:
        PoolSettings(store=url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.key == "store"


@pytest.mark.parametrize("url", ["s3://bucket/a@b", "file:///home/a@b", "s3://bucket", "/data/a@b"])
def test_an_at_sign_in_a_path_is_no_credential(url: str) -> None:
    assert PoolSettings(store=url).store == url


def test_check_choice_names_the_nearest_choice() -> None:
    checks.check_choice("isolation", "call", ("worker", "call"))
    with pytest.raises(ConfigError, match="did you mean 'worker'") as caught:
        checks.check_choice("isolation", "wroker", ("worker", "call"))
    assert caught.value.suggestion == "worker"
    assert caught.value.expected == "worker | call"
    with pytest.raises(ConfigError, match=r"one of worker, call, not 5$"):
        checks.check_choice("isolation", 5, ("worker", "call"))


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True, None])
def test_check_count_refuses_what_is_no_whole_number_from_1(value: Any) -> None:
    with pytest.raises(ConfigError, match="slots must be a whole number from 1"):
        checks.check_count("slots", value)


def test_check_count_takes_none_only_where_it_may() -> None:
    checks.check_count("max_workers", None, optional=True)
    checks.check_count("slots", 1)


@pytest.mark.parametrize("value", [0, -1, "1", True, None, math.nan, -math.inf])
def test_check_seconds_refuses_what_is_no_duration(value: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"must be seconds above 0, not {value!r}")):
        checks.check_seconds("timeout", value)


def test_check_seconds_takes_zero_and_none_only_where_it_may() -> None:
    checks.check_seconds("idle_timeout", 0, zero=True)
    checks.check_seconds("idle_timeout", None, optional=True)
    checks.check_seconds("timeout", 0.001)
    with pytest.raises(ConfigError, match="seconds from 0, not -1"):
        checks.check_seconds("idle_timeout", -1, zero=True)


@pytest.mark.parametrize("value", [math.inf, 1e10, 10**400])
def test_endless_duration_is_refused_with_the_word_for_it(value: float) -> None:
    with pytest.raises(ConfigError, match=r"above 0 and up to 1e\+09") as caught:
        checks.check_seconds("timeout", value, optional=True)
    assert "for no limit use None" in str(caught.value)
    with pytest.raises(ConfigError, match="up to") as caught:
        checks.check_seconds("start_timeout", value)
    assert "None" not in str(caught.value)


# Retry


def test_retry_delay_doubles_up_to_its_limit() -> None:
    retry = Retry(attempts=9, delay=1, max_delay=5, jitter=False)
    assert [retry.delay_before(attempt, draw=0.1) for attempt in range(2, 7)] == [1, 2, 4, 5, 5]
    assert retry.delay_before(10_000, draw=0.1) == 5


def test_retry_jitter_takes_the_drawn_part_of_the_delay() -> None:
    retry = Retry(delay=1, max_delay=4)
    assert [retry.delay_before(3, draw=draw) for draw in (0, 0.25, 1)] == [0, 0.5, 2]


def test_retry_takes_one_exception_class_for_a_tuple_of_one() -> None:
    assert Retry(on=KeyError).on == (KeyError,)  # type: ignore[arg-type]
    assert Retry(on=(KeyError, OSError)).on == (KeyError, OSError)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"attempts": 0}, "attempts must be a whole number of at least 1, not 0"),
        ({"attempts": True}, "not True"),
        ({"attempts": 1.5}, "not 1.5"),
        ({"on": (KeyboardInterrupt,)}, "on must be exception classes"),
        ({"on": "ValueError"}, "on must be exception classes"),
        ({"delay": -1}, "retries.delay must be seconds from 0"),
        ({"max_delay": "5"}, "retries.max_delay must be seconds from 0"),
        ({"jitter": 1}, "retries.jitter must be True or False"),
    ],
)
def test_retry_refuses_wrong_values(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        Retry(**options)
    assert str(caught.value.key).startswith("retries")


# Settings


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"ordered": 1}, "ordered must be True or False, not 1"),
        ({"return_exceptions": None}, "return_exceptions must be True or False"),
        ({"max_in_flight": 0}, "max_in_flight must be a whole number from 1"),
        ({"chunksize": 0}, "chunksize must be 'auto' or a whole number from 1, not 0"),
        ({"chunksize": "many"}, "chunksize must be 'auto'"),
        ({"chunksize": None}, "chunksize must be 'auto'"),
        ({"retries": "3"}, "retries must be asyncrt.Retry(...) or a number"),
        ({"retries": True}, "retries must be asyncrt.Retry(...) or a number"),
        ({"retries": 0}, "attempts must be a whole number of at least 1"),
        ({"timeout": 0}, "timeout must be seconds above 0"),
        ({"deadline": "soon"}, "deadline must be a value of anyio.current_time()"),
        ({"isolation": "calls"}, "did you mean 'call'?"),
        ({"name": ""}, "name must be a text"),
        ({"include_modules": "yaml"}, "did you mean ['yaml']?"),
        ({"include_modules": {"yaml": 1}}, "include_modules must be a list of modules'"),
        ({"exclude_modules": ["app/tests"]}, "and 'app/tests' is none"),
        ({"exclude_modules": [3]}, "and 3 is none"),
        ({"modules_limit": None}, "modules_limit must be a quantity such as '64Mi'"),
        ({"modules_limit": 0}, "modules_limit=0 is less than one byte"),
        ({"backend": "k9s"}, "did you mean 'k8s'?"),
        (
            {"backend": 5},
            "backend must be one of local, docker, k8s or an asyncrt.backends.Backend",
        ),
        ({"backend": None}, "backend must be one of"),
        ({"runtime": 3.12}, "runtime must be a text"),
        ({"store": ""}, "store must be a text"),
        ({"slots": None}, "slots must be a whole number from 1"),
        ({"slots": 0}, "slots must be a whole number from 1"),
        ({"max_workers": 0}, "max_workers must be a whole number from 1"),
        ({"min_workers": -1}, "min_workers must be a whole number from 0"),
        ({"min_workers": True}, "min_workers must be a whole number from 0"),
        ({"min_workers": 3, "max_workers": 2}, "min_workers=3 is more than max_workers=2"),
        ({"idle_timeout": -1}, "idle_timeout must be seconds from 0"),
        ({"start_timeout": None}, "start_timeout must be seconds above 0"),
        ({"orphan_timeout": 0}, "orphan_timeout must be seconds above 0"),
        ({"heartbeat_interval": 0}, "heartbeat_interval must be seconds above 0"),
        ({"echo": "yes"}, "echo must be True or False"),
        ({"env": {"A": 1}}, "env must map names to strings"),
        ({"env": {1: "a"}}, "env must map names to strings"),
        ({"env": "A=1"}, "env must map names to strings"),
        ({"cpu": "many"}, "cpu='many' is not a quantity"),
        ({"memory": 512}, "memory=512 is 512 bytes"),
        ({"recycle_memory": "1GB"}, "did you mean '1Gi'?"),
    ],
)
def test_wrong_option_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        Settings().updated(options)
    assert caught.value.key in options
    assert caught.value.expected


def test_every_option_can_be_set() -> None:
    backend = OwnBackend()
    options: dict[str, Any] = {
        "ordered": False,
        "return_exceptions": True,
        "max_in_flight": 10,
        "chunksize": 4,
        "retries": Retry(attempts=2),
        "timeout": 1.5,
        "deadline": 12.5,
        "isolation": "call",
        "backups": Backups(quantile=0.5),
        "name": "thumbs",
        "include_modules": ["yaml"],
        "exclude_modules": ("app.tests", "scratch"),
        "modules_limit": "1Gi",
        "backend": backend,
        "runtime": "python:3.12-slim",
        "cpu": "500m",
        "memory": "256Mi",
        "slots": 2,
        "env": {"LANG": "C.UTF-8"},
        "min_workers": 1,
        "max_workers": 5,
        "idle_timeout": 0,
        "start_timeout": 5,
        "orphan_timeout": 6,
        "heartbeat_interval": 1,
        "recycle_memory": "128Mi",
        "spill_dir": "/scratch",
        "spill_limit": "1Gi",
        "store": "s3://bucket",
        "echo": False,
        "gpu": 1,
        "secrets": ("db",),
        "service_account": "worker",
        "image_pull_secrets": ("registry",),
        "node_selector": {"disk": "ssd"},
        "tolerations": ({"operator": "Exists"},),
        "affinity": {"nodeAffinity": {}},
        "volumes": {"/data": {"emptyDir": {}}},
        "priority_class": "low",
        "labels": {"team": "red"},
        "annotations": {"note": "a text"},
        "queue": "team-red",
        "run_as_user": 1000,
        "pod_security_context": {"fsGroup": 1000},
        "container_security_context": {"privileged": False},
        "pod_patch": {"spec": {"hostIPC": False}},
        "namespace": "jobs",
        "context": "production",
        "kubeconfig": "~/.kube/config",
        "owner": "me",
        "ttl": 60,
    }
    assert set(options) == CALL_OPTIONS | POOL_OPTIONS
    settings = Settings().updated(options)
    given = {
        "cpu_millicores": 500,
        "memory_bytes": 256 * MIB,
        "recycle_memory_bytes": 2**27,
        "spill_limit_bytes": 2**30,
        "modules_limit_bytes": 2**30,
        "include_modules": ("yaml",),
    }
    for name, value in {**options, **given}.items():
        if name not in {"cpu", "memory", "recycle_memory", "spill_limit", "modules_limit"}:
            in_pool = settings.pool.pod if name in POD_OPTIONS else settings.pool
            part = settings.call if hasattr(settings.call, name) else in_pool
            assert getattr(part, name) == value


def test_options_laid_over_keep_the_others_and_the_original() -> None:
    first = Settings().updated({"slots": 2, "timeout": 5})
    second = first.updated({"slots": 3})
    assert (second.pool.slots, second.call.timeout) == (3, 5)
    assert (first.pool.slots, first.call) == (2, second.call)
    assert first.updated({}) == first
    assert first.updated({"timeout": None}).call.timeout is None


def test_quantity_can_be_taken_back_with_none() -> None:
    settings = Settings().updated({"memory": "1Gi", "cpu": 1}).updated({"memory": None})
    assert (settings.pool.memory_bytes, settings.pool.cpu_millicores) == (None, 1000)


@pytest.mark.parametrize(("retries", "attempts"), [(None, 1), (3, 3), (Retry(attempts=2), 2)])
def test_number_of_retries_means_attempts(retries: Any, attempts: int) -> None:
    assert CallSettings(retries=retries).retries.attempts == attempts


def test_settings_cannot_be_changed() -> None:
    environment = {"A": "1"}
    settings = PoolSettings(env=environment)
    environment["A"] = "2"
    assert settings.env == {"A": "1"}
    with pytest.raises(TypeError):
        settings.env["A"] = "3"  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        settings.slots = 2  # type: ignore[misc]


def test_values_of_the_environment_are_not_in_the_repr() -> None:
    assert "hunter2" not in repr(Settings().updated({"env": {"TOKEN": "hunter2"}}))


def test_shape_is_equal_where_workers_can_be_shared() -> None:
    plain = PoolSettings()
    assert plain.shape() == PoolSettings(max_workers=9, idle_timeout=1, echo=False).shape()
    different: list[dict[str, Any]] = [
        {"backend": "k8s"},
        {"backend": OwnBackend()},
        {"runtime": "python:3.12"},
        {"cpu_millicores": 500},
        {"memory_bytes": 2**28},
        {"slots": 2},
        {"recycle_memory_bytes": 2**28},
        {"env": {"A": "1"}},
        {"pod": PodSettings(gpu=1)},
    ]
    shapes = {PoolSettings(**options).shape() for options in different}
    assert len(shapes | {plain.shape()}) == len(different) + 1
    backend = OwnBackend()
    assert PoolSettings(backend=backend).shape() == PoolSettings(backend=backend).shape()
    one, other = {"A": "1", "B": "2"}, {"B": "2", "A": "1"}
    assert PoolSettings(env=one).shape() == PoolSettings(env=other).shape()


@pytest.mark.parametrize(
    ("memory", "recycle", "limit"),
    [(None, None, None), (2**28, None, 2**27), (2**28, 2**26, 2**26)],
)
def test_process_may_keep_half_of_the_memory_unless_said_otherwise(
    memory: int | None, recycle: int | None, limit: int | None
) -> None:
    settings = PoolSettings(memory_bytes=memory, recycle_memory_bytes=recycle)
    assert settings.recycle_limit_bytes() == limit


def test_unknown_option_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="unknown option 'max_worker'; did you mean") as caught:
        check_names({"max_worker": 3})
    assert caught.value.suggestion == "max_workers"
    assert caught.value.key == "max_worker"


def test_unknown_option_with_nothing_near_lists_all() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings().updated({"zzz": 1})
    assert all(name in str(caught.value) for name in CALL_OPTIONS | POOL_OPTIONS)
    assert caught.value.suggestion is None


def test_option_of_the_workers_is_refused_for_a_run_with_the_way_to_set_it() -> None:
    with pytest.raises(ConfigError, match=r"executor\.with_options\(memory=\.\.\.\)\.map"):
        Settings().updated({"memory": "1Gi"}, only_calls=True)
    Settings().updated({"timeout": 1}, only_calls=True)


def test_unknown_option_of_a_run_is_not_taken_for_one_of_the_workers() -> None:
    with pytest.raises(ConfigError, match="did you mean 'timeout'") as caught:
        check_names({"time_out": 1}, only_calls=True)
    assert "memory" not in str(caught.value.expected)


def test_defaults_are_those_of_settings_without_options() -> None:
    defaults = option_defaults()
    assert set(defaults) == CALL_OPTIONS | POOL_OPTIONS
    settings = Settings()
    parts: Mapping[str, Any] = {
        item.name: getattr(part, item.name)
        for part in (settings.pool, settings.pool.pod, settings.call)
        for item in fields(part)
    }
    for name, value in defaults.items():
        if name not in {"cpu", "memory", "recycle_memory", "spill_limit", "modules_limit"}:
            assert parts[name] == value
    assert (defaults["cpu"], defaults["memory"], defaults["recycle_memory"]) == (None, None, None)
    assert defaults["modules_limit"] == 64 * MIB
