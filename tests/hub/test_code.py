"""The code of a model in one file: complete, of this model alone, and it computes the same without the package."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import pytest
import torch

import zoo
from zoo.errors import ConfigError
from zoo.hub.code import auto_map, modeling_code
from zoo.hub.scopes import uses
from zoo.registry import model_config

# Different parts of the package: chunks, scans, convolutions, key-value states, composite mixers, experts.
SHIPPED = ["retnet-tiny", "mamba-tiny", "h3-tiny", "windowed-linear-h-tiny", "rwkv7-tiny", "bert-tiny", "mixtral-tiny"]
RUN = """
import json, sys
sys.modules["zoo"] = None
import torch, transformers
torch.set_grad_enabled(False)
torch.set_num_threads(1)
for folder, auto in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    torch.save(model(ids, attention_mask=mask).logits, folder + "/logits.pt")
    if auto == "AutoModelForCausalLM":
        new = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
        torch.save(new, folder + "/tokens.pt")
assert not [name for name in sys.modules if name.startswith("zoo.")]
"""


@pytest.mark.slow
@torch.no_grad()
def test_the_same_without_the_package(hub, tmp_path):
    jobs, expected = [], {}
    for name in SHIPPED:
        config = model_config(name)
        torch.manual_seed(0)
        model = zoo.create_model(name).eval()
        zoo.push(model, f"alice/{name}", with_code=True, **hub.alice)
        folder = tmp_path / name
        zoo.pull(f"alice/{name}", folder, **hub.alice)
        (auto,) = [key for key in auto_map(config) if key not in ("AutoConfig", "AutoModel")]
        jobs.append([str(folder), auto])
        ids = torch.arange(24).reshape(2, 12)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        expected[name] = model(ids, attention_mask=mask).logits
        if auto == "AutoModelForCausalLM":
            options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
            new = model.generate(ids, attention_mask=mask, **options)
            expected[f"{name} tokens"] = new
        assert torch.equal(zoo.create_model(str(folder))(ids, attention_mask=mask).logits, expected[name])
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    ran = subprocess.run([sys.executable, "-c", RUN, json.dumps(jobs)], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for name in SHIPPED:
        assert torch.equal(torch.load(tmp_path / name / "logits.pt"), expected[name]), name
        if f"{name} tokens" in expected:
            assert torch.equal(torch.load(tmp_path / name / "tokens.pt"), expected[f"{name} tokens"]), name


def test_the_file_is_of_this_model_alone():
    code = modeling_code(model_config("retnet-tiny"))
    assert "class Retention(" in code
    assert "class Mamba" not in code
    assert "class RoutedBlock" not in code
    assert "flash_attn_func" not in code
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported - set(sys.stdlib_module_names) == {"pydantic", "torch", "transformers"}


def test_a_push_without_code_sends_none(hub, tmp_path):
    model = zoo.create_model("retnet-tiny")
    zoo.push(model, "alice/m", with_code=True, **hub.alice)
    assert "modeling_zoo.py" in hub.repos["alice/m"].files
    zoo.pull("alice/m", tmp_path / "out", **hub.alice)
    pushed = zoo.push(tmp_path / "out", "alice/m", **hub.alice)
    assert pushed.removed == ["modeling_zoo.py"]
    assert "auto_map" not in json.loads(hub.repos["alice/m"].files["config.json"].data)


def test_a_mixer_of_another_package_is_not_shipped(monkeypatch):
    from zoo.mixers.retention import Retention

    monkeypatch.setattr(Retention, "__module__", "theirs.retention")
    with pytest.raises(ConfigError, match="comes from outside the package; its code is not shipped"):
        modeling_code(model_config("retnet-tiny"))


def test_scopes():
    source = """
def f(a, b=OUT1, *, c: OUT2):
    from zoo.x import lazy
    d = a + OUT3
    def inner(e):
        return d + e + OUT4
    class C(OUT5):
        g = OUT6
        def method(self):
            return g, lazy, mod.attr
    return [h for h in OUT7 if h], (lambda k: k + OUT8), {m: n for m, n in a}
"""
    found = uses(ast.parse(source).body[0])
    assert {name for name, _ in found.names} == {"f", "g", "mod", *(f"OUT{i}" for i in range(1, 9))} - {"f"}
    assert [(name, attribute) for name, attribute, _ in found.attributes] == [("mod", "attr")]
    assert [name for _, name, _ in found.local] == ["lazy"]
