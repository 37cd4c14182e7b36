"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result

import asyncrt
from asyncrt.cli import commands
from asyncrt.options import CALL_OPTIONS, POOL_OPTIONS

HIDDEN = "hunter2"  # stands for every password
STEP = re.compile(r" +[0-9]+\.[0-9]{3} s  (.+)")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return this process's environment without what configures asyncrt."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("ASYNCRT_")}
    return {**own, "HOME": str(tmp_path)}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the configuration of whoever runs the tests out of them."""
    for name in set(os.environ) - set(environment):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(commands, arguments)


def run(*arguments: str, environment: Mapping[str, str], cwd: Path) -> tuple[int, str, str]:
    """Run the command in a process and return its exit code, output and errors."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-m", "asyncrt.cli", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    return finished.returncode, finished.stdout, finished.stderr


# The command as a whole


def test_help_lists_the_commands_and_exits_0(environment: dict[str, str], tmp_path: Path) -> None:
    code, output, errors = run("--help", environment=environment, cwd=tmp_path)
    assert (code, errors) == (0, "")
    assert "hello" in output
    assert "config" in output


def test_version_is_that_of_the_package() -> None:
    assert invoke("--version").output == f"asyncrt, version {asyncrt.__version__}\n"


def test_help_loads_nothing_heavy(environment: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import sys, asyncrt.cli\n"
        "try:\n    asyncrt.cli.commands(['--help'])\n"
        "except SystemExit:\n    print('loaded', *sys.modules)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=60,
        check=True,
    )
    loaded = set(finished.stdout.partition("\nloaded ")[2].split())
    assert "click" in loaded
    assert loaded & {"asyncio", "anyio", "yaml", "rich", "cloudpickle", "asyncrt.config"} == set()


def test_main_exits_with_the_code_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(*arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", ["asyncrt", *arguments])
        with pytest.raises(SystemExit) as caught:
            asyncrt.cli.main()
        return caught.value.code

    assert main("config", "show") in {0, None}
    assert main("--version") == 0
    assert main("config", "shwo") == 2
    assert main("-c", "none.yaml", "config", "show") == 2
    assert "none.yaml does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--no-such-option"], ["helo"], ["hello", "--map", "many"], ["hello", "--map", "0"], []],
    ids=" ".join,
)
def test_wrong_command_line_exits_2(
    arguments: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    code, output, errors = run(*arguments, environment=environment, cwd=tmp_path)
    assert (code, output) == (2, "")
    assert "Usage: asyncrt" in errors


@pytest.mark.parametrize("command", [["hello"], ["config", "show"]], ids=" ".join)
def test_wrong_configuration_is_one_line_on_stderr_and_exits_2(
    command: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / ".asyncrt.yaml"
    file.write_text(f"k8s:\n  docker_password: {HIDDEN}\n  namespce: a\n")
    code, output, errors = run(*command, environment=environment, cwd=tmp_path)
    assert (code, output) == (2, "")
    expected = "unknown key 'k8s.namespce'; did you mean 'namespace'?"
    assert errors == f"error: {file}:3: {expected}\n"


def test_wrong_variable_exits_2(environment: dict[str, str], tmp_path: Path) -> None:
    environment["ASYNCRT_MAX_WORKER"] = "2"
    code, _, errors = run("config", "show", environment=environment, cwd=tmp_path)
    assert code == 2
    assert errors.startswith("error: unknown variable 'ASYNCRT_MAX_WORKER'; did you mean")


@pytest.mark.parametrize("command", [["hello"], ["config", "show"]], ids=" ".join)
def test_unknown_backend_exits_2_with_the_nearest_one(command: list[str]) -> None:
    for arguments in (["-b", "k9s", *command], [*command, "-b", "k9s"]):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: backend must be one of local, docker, k8s")
        assert "did you mean 'k8s'?" in result.stderr


# config show


def test_config_show_prints_every_value_with_its_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".asyncrt.yaml"
    file.write_text(
        f"asyncrt:\n  slots: 2\n  env:\n    TOKEN: {HIDDEN}\n"
        f"k8s:\n  docker_password: {HIDDEN}\n  master_timeout: 5\n"
    )
    monkeypatch.setenv("ASYNCRT_TIMEOUT", "5")
    monkeypatch.setenv("ASYNCRT_S3_SECRET_ACCESS_KEY", HIDDEN)
    result = invoke("config", "show")
    assert result.exit_code == 0
    lines = [re.split(r" {2,}", line) for line in result.stdout.splitlines()]
    assert lines[0] == [f"file: {file}"]
    assert ["asyncrt.slots", "2", f"file {file}:2"] in lines
    assert ["asyncrt.env", '{"TOKEN": "***"}', f"file {file}:3"] in lines
    assert ["asyncrt.timeout", "5.0", "environment ASYNCRT_TIMEOUT"] in lines
    assert ["asyncrt.backend", '"local"', "default"] in lines
    assert ["k8s.docker_password", '"***"', f"file {file}:6"] in lines
    variable = "environment ASYNCRT_S3_SECRET_ACCESS_KEY"
    assert ["s3.secret_access_key", '"***"', variable] in lines
    assert lines[-1] == ["ignored: k8s.master_timeout (line 7)"]
    assert HIDDEN not in result.output


def test_config_show_json_is_for_machines(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("k8s: {runtime_memory: 512, rabbitmq_executor: true}\n")
    result = invoke("-b", "k8s", "config", "show", "--json", "-c", str(file))
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["file"] == str(file)
    assert document["ignored"] == ["k8s.rabbitmq_executor (line 1)"]
    values = document["values"]
    assert {f"asyncrt.{name}" for name in CALL_OPTIONS | POOL_OPTIONS} <= set(values)
    assert values["asyncrt.backend"] == {"value": "k8s", "origin": "argument"}
    origin = f"file {file}:1 (k8s.runtime_memory)"
    assert values["asyncrt.memory"] == {"value": "512Mi", "origin": origin}


def test_config_show_works_without_a_file() -> None:
    result = invoke("config", "show")
    assert result.stdout.startswith("file: none\n")
    assert json.loads(invoke("config", "show", "--json").stdout)["file"] is None


def test_option_after_the_command_comes_over_the_one_before_it() -> None:
    result = invoke("-b", "docker", "config", "show", "--json", "-b", "local")
    assert json.loads(result.stdout)["values"]["asyncrt.backend"]["value"] == "local"


# hello


def test_hello_runs_a_function_and_says_what_it_did(
    environment: dict[str, str], tmp_path: Path
) -> None:
    code, output, errors = run("hello", environment=environment, cwd=tmp_path)
    assert (code, errors) == (0, "")
    first, second, *steps = output.splitlines()
    assert first.startswith(f"asyncrt {asyncrt.__version__}, Python 3.")
    assert second == "backend local, configuration none"
    opened, answer, closed = [STEP.fullmatch(step) for step in steps]
    assert opened is not None
    assert answer is not None
    assert closed is not None
    assert (opened[1], closed[1]) == ("opened", "closed")
    assert re.fullmatch(r"hello world, from process [0-9]+ on \S+", answer[1])


def test_hello_maps_as_many_calls_as_it_is_told(tmp_path: Path) -> None:
    (tmp_path / ".asyncrt.yaml").write_text("asyncrt: {max_workers: 2}")
    result = invoke("hello", "--map", "50")
    assert result.exit_code == 0
    assert f"configuration {tmp_path / '.asyncrt.yaml'}" in result.stdout
    assert re.search(r"mapped 50 calls, 50 right answers  \([0-9,]+ calls/s\)", result.stdout)


def test_hello_that_fails_says_why_and_exits_1(environment: dict[str, str], tmp_path: Path) -> None:
    environment["ASYNCRT_START_TIMEOUT"] = "0.0001"
    code, output, errors = run("hello", environment=environment, cwd=tmp_path)
    assert code == 1
    last = errors.splitlines()[-1]  # before it, the log
    assert last.startswith("error: ")
    assert "not ready within start_timeout" in last
    assert "Traceback" not in errors
    assert "hello world" not in output


def test_ctrl_c_outside_of_a_run_exits_130(environment: dict[str, str], tmp_path: Path) -> None:
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncrt.cli", "-c", str(pipe), "config", "show"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    # Opening waits for the reader: from here on the command waits for its configuration.
    with process, pipe.open("w"):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_signal_ends_hello_and_its_workers(
    number: signal.Signals, exit_code: int, environment: dict[str, str], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncrt.cli", "hello", "--map", "3000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    with process:
        try:
            assert process.stdout is not None
            while "hello world" not in (line := process.stdout.readline()):
                assert line, "it ended before it was asked to"
            # The worker lives, and the calls to map are more than can be done before the signal.
            workers = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(number)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == exit_code, errors
    assert errors == f"stopped by {number.name}\n"
    assert output == ""
    assert workers != []
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
