"""A tiny teacher with a tokenizer of bytes, documents to train on, and the program run in this process."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "sang", "on", "under", "mat", "then", "slowly", "today"]


@dataclass
class Ran:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that bad input is answered with."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.out == ""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    def json(self):
        """Stdout, which must be nothing but JSON."""
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`run("list", "retnet*")` in an empty folder."""
    from zoo.cli.main import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("ZOO_DEBUG", raising=False)

    def run(*args: object) -> Ran:
        result = CliRunner().invoke(app, [str(a) for a in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The folder of a Llama with four layers and a vocabulary of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from zoo.text import byte_tokenizer

    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A JSONL file of 60 documents."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    rows = [{"text": " ".join(generator.choices(WORDS, k=80))} for _ in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def student(tmp_path_factory, teacher, text):
    """The folder of a converted teacher: a window beside linear attention, one layer kept."""
    import zoo

    folder = tmp_path_factory.mktemp("made") / "student"
    options = {"window": 8, "sinks": 2}
    zoo.convert(
        str(teacher), "linear_attention+window", keep=[1], mixer_options=options, data=str(text), length=64,
        tokens=512, out=folder, progress=False,
    )  # fmt: skip
    return folder
