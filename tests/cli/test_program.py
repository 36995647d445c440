"""The program itself: help, version, exit codes, Ctrl-C, tracebacks only on request, quick to start."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

import zoo
from zoo.cli.common import guarded, parse_options
from zoo.cli.main import app
from zoo.errors import ConfigError, DataError

COMMANDS = [
    "list", "show", "backends", "convert", "distill", "train", "score", "card", "generate", "push", "pull", "demo",
]  # fmt: skip


def program(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "zoo", *args], capture_output=True, text=True, env={**os.environ, **env}
    )


def test_help_is_quick_and_names_every_command():
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "zoo", "--help"], capture_output=True, text=True, check=True
    )
    for command in COMMANDS:
        assert f" {command} " in ran.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in ran.stderr.splitlines()}
    assert {"typer", "zoo"} <= imported
    assert not imported & {"torch", "transformers", "numpy", "pydantic", "datasets", "accelerate"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_teaches_by_example(command):
    for flag in ("--help", "-h"):
        shown = CliRunner().invoke(app, [command, flag])
        assert shown.exit_code == 0
        assert "Examples" in shown.stdout
        assert shown.stdout.count(f"zoo {command}") >= 3  # usage, and two commands to copy


def test_version():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"{zoo.__version__}\n"


@pytest.mark.parametrize(
    "args", [["lst"], ["show"], ["list", "--jsn"], ["generate", "x", "--beams", "0", "--prompt", "x"]]
)
def test_usage_errors_exit_with_2(args):
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    assert "Usage: zoo" in result.stderr
    assert "Traceback" not in result.stderr


def test_bad_input_is_one_line_and_a_traceback_only_on_request():
    ran = program("show", "retnet-tinny")
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: unknown model 'retnet-tinny'; did you mean 'retnet-tiny'")
    assert ran.stderr.count("\n") == 1
    ran = program("show", "retnet-tinny", ZOO_DEBUG="1")
    assert ran.returncode == 1
    assert "Traceback" in ran.stderr
    assert "UnknownNameError" in ran.stderr


def one_command(error: BaseException):
    def fail() -> None:
        raise error

    small = typer.Typer(pretty_exceptions_enable=False)
    small.command()(guarded(fail, "run it again to go on"))
    return CliRunner().invoke(small, [])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("two\nlines"), 2, "error: two lines"),
        (ConfigError("a: b"), 2, "error: a: b"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "error: out: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted; run it again to go on"),
        (KeyboardInterrupt("stopped at step 3"), 130, "stopped at step 3"),
    ],
)
def test_errors_and_exit_codes(error, code, line):
    result = one_command(error)
    assert result.exit_code == code
    assert result.stderr == line + "\n"


def test_a_bug_is_not_hidden():
    result = one_command(ZeroDivisionError("a bug"))
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_options():
    assert parse_options(["a=1", "b.c=x", "b.d=1e-3", "e=[1, 2]", "f=", "g=true"]) == {
        "a": 1, "b": {"c": "x", "d": 1e-3}, "e": [1, 2], "f": None, "g": True,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="a has a value already"):
        parse_options(["a=1", "a.b=2"])
    for wrong in ("a", "=1", "a..b=1", ".a=1"):
        with pytest.raises(ConfigError, match="write key=value"):
            parse_options([wrong])


def test_demo_is_given_what_was_asked_for(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr("zoo.cli.demo.demo", lambda *args: called.append(args))
    assert CliRunner().invoke(app, ["demo"]).exit_code == 0
    args = ["demo", "--out", str(tmp_path), "--minutes", "7", "--mixer", "mamba2", "--json", "--overwrite"]
    assert CliRunner().invoke(app, args).exit_code == 0
    assert [str(called[0][0]), *called[0][2:]] == ["demo", None, False, False]
    assert called[1] == (tmp_path, 7.0, "mamba2", True, True)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 300}) + "\n" for i in range(40)))
    command = [
        sys.executable, "-m", "zoo", "train", "pretrain-tiny", "data=text.jsonl", "out=run", "stages.0.length=32",
        "eval_tokens=0", "stages.0.budget.tokens=40000",
    ]  # fmt: skip
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(600):
        if log.is_file() and log.read_text().count("\n") >= 3:
            break
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in said
    assert "start the same command again to go on" in said
    stopped = json.loads(log.read_text().splitlines()[-1])["step"]
    assert not (tmp_path / "run" / "train.json").exists()
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] > stopped
    assert (tmp_path / "run" / "train.json").exists()
