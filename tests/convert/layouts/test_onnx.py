"""ONNX graphs in onnxruntime: causal models by prompt and by step, others in one pass, against torch."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import zoo
from zoo.convert.layouts import export_model
from zoo.convert.layouts.onnx_graph import check, save, trace
from zoo.errors import ExportError
from zoo.registry import list_models, model_config

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX needs onnx, onnxscript and onnxruntime")
pytest.importorskip("onnxscript", reason="ONNX needs onnx, onnxscript and onnxruntime")

FAST = ["llama-tiny", "mamba-tiny", "bert-tiny", "swin-tiny"]  # one of each kind; the others are slow together


def parts(name):
    """What a model is made of, as far as its graphs differ from those of others."""
    config = model_config(name)
    spec, kind = config.spec, config.task == "causal-lm"
    found = {("mixer", kind, layer.mixer.name) for layer in spec.layers}
    found |= {("ffn", kind, layer.ffn.name) for layer in spec.layers if layer.ffn is not None}
    found |= {("block", kind, spec.block), ("positions", kind, spec.positions), ("image", spec.image is None)}
    found |= {("depth", layer.depth is None) for layer in spec.layers}
    return found | {("exits", spec.exits is None), ("meta", spec.meta_tokens > 0)}


def all_parts():
    """Models of the registry, each with a part that none before it has."""
    kept, seen = [], set()
    for name in [*FAST, *(name for name in list_models("*-tiny") if name not in FAST)]:
        if not parts(name) <= seen:
            kept.append(name)
            seen |= parts(name)
    return kept


CAUSAL = [name for name in all_parts() if model_config(name).task == "causal-lm"]
WHOLE = [name for name in all_parts() if name not in CAUSAL]
REFUSED = ["big-bird-tiny", "reformer-encoder-tiny"]  # their graphs stop at other lengths: see docs/weights.md
NEED_ALL_LAYERS = ["early-exit-tiny", "hymba-tiny"]  # whose layers name others
STEP_ONLY = {"reformer-tiny": "depends on the whole prompt"}


def marked(names):
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def randomized(name):
    """A model whose weights are not those of a start, which may be zeros and ones.

    But for the fast ones it has one layer of each kind, where those can stand alone: a graph costs seconds a layer.
    """
    layers = model_config(name).layers
    kinds = [layer for i, layer in enumerate(layers) if layer not in layers[:i]]
    whole = name in FAST or name in NEED_ALL_LAYERS
    model = zoo.create_model(name, **({} if whole else {"layers": kinds})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def session_of(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options)


def whole(model, ids_BL, mask_BL):
    return model(input_ids=ids_BL, attention_mask=mask_BL).logits


def one_by_one(model, ids_BL, mask_BL):
    cache, logits = None, []
    for t in range(ids_BL.shape[1]):
        at = slice(t, t + 1)
        out = model(input_ids=ids_BL[:, at], attention_mask=mask_BL[:, at], past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, [*logits, out.logits]
    return torch.cat(logits, 1)


def agrees(got, expected, where=slice(None)):
    error = (torch.from_numpy(got)[where] - expected[where]).abs().max()
    assert error < 1e-4 * expected[where].abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", marked(CAUSAL))
def test_prompts_and_steps_are_those_of_the_model(name, tmp_path):
    """Prompts in two pieces, one row padded on the left and one on the right, then steps; and one row alone.

    They are longer than the tiny windows, and of other sizes than those that were traced.
    """
    model, out = randomized(name), tmp_path / "out"
    export_model(model, "onnx", out)
    told = json.loads((out / "zoo_onnx.json").read_text())
    assert (told["prefill"] is None) == (name in STEP_ONLY)
    assert STEP_ONLY.get(name, "") in told.get("why_no_prefill", "")
    start, names = load_file(out / told["initial_state"]), told["inputs"][2:]
    step = session_of(out / told["graph"])
    prefill = None if name in STEP_ONLY else session_of(out / told["prefill"])
    for rows, pieces in ((3, (33, 9)), (1, (17,))):
        L = sum(pieces) + 4
        ids_BL, mask_BL = torch.randint(1, 256, (rows, L)), torch.ones(rows, L, dtype=torch.long)
        if rows > 1:
            mask_BL[1, :5], mask_BL[2, pieces[0] - 4 : pieces[0]] = 0, 0
        expected = (one_by_one if name in STEP_ONLY else whole)(model, ids_BL, mask_BL)
        state = {n: start[n].repeat(rows, *[1] * (start[n].dim() - 1)).numpy() for n in names}
        a = 0
        for length in (*pieces, *[1] * 4) if prefill else [1] * L:
            fed = {"input_ids": ids_BL[:, a : a + length].numpy(), "attention_mask": mask_BL[:, a : a + length].numpy()}
            graph = step if length == 1 else prefill
            logits, *new = graph.run(None, {**fed, **state})
            assert logits.shape == (rows, 1, 256)
            state, a = dict(zip(names, new, strict=True)), a + length
            last_B = (mask_BL[:, :a] * torch.arange(1, a + 1)).argmax(1)
            fed_B = mask_BL[:, a - length : a].any(1)
            agrees(logits[:, 0], expected[torch.arange(rows), last_B], fed_B)


@torch.no_grad()
@pytest.mark.parametrize("name", marked(WHOLE))
def test_passes_are_those_of_the_model(name, tmp_path):
    """Short and long rows, one of them padded in the middle; of models of images, other rows."""
    model = randomized(name)
    if name in REFUSED:
        with pytest.raises(ExportError, match="has no graph yet; keep it in torch"):
            export_model(model, "onnx", tmp_path / "out")
        assert not any((tmp_path / "out").iterdir())
        return
    export_model(model, "onnx", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "zoo_onnx.json").read_text())
    session = session_of(tmp_path / "out" / told["graph"])
    image = model.config.spec.image
    for rows, length in ((3, 19), (1, 7), (2, 101)):
        if image is not None:
            inputs = {"pixel_values": torch.randn(rows, image.channels, image.image_size, image.image_size)}
        else:
            inputs = {"input_ids": torch.randint(1, 256, (rows, length))}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["attention_mask"][1:, length // 3 : length // 2] = 0
        (got,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        expected = model(**inputs)[0]
        mask = inputs.get("attention_mask")
        agrees(got, expected, slice(None) if mask is None or expected.dim() == 2 else mask.bool())


def test_the_example_of_the_documentation_writes_what_torch_generates(tmp_path, monkeypatch, capsys):
    text = (Path(zoo.__file__).parents[1] / "docs" / "weights.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "onnxruntime" in code]
    model = randomized("gla-tiny")
    export_model(model, "onnx", tmp_path / "out")
    assert (tmp_path / "out" / "weights.onnx_data").stat().st_size < 1.2 * sum(
        4 * p.numel() for p in model.parameters()
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/weights.md", "exec"), {})
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    prompt = torch.tensor([[17, 4, 99, 5, 3]])
    assert printed == [model.generate(prompt, max_new_tokens=20, do_sample=False)[0, 5:].tolist()]


class Odd(nn.Module):
    """Gives its rows times a number that is built in where it is traced."""

    def __init__(self, times):
        super().__init__()
        self.weight, self.times = nn.Parameter(torch.ones(3)), times

    def forward(self, x):
        return self.weight * x * (self.times if torch.compiler.is_exporting() else 2)


def test_graphs_with_other_numbers_are_found(tmp_path):
    for times in (2, 3):
        module = Odd(times)
        graph = trace(module, (torch.ones(2, 3),), ({0: torch.export.Dim.AUTO},), ["input_ids"], ["output"])
        save({"model.onnx": graph}, tmp_path)
        if times == 2:
            check(tmp_path / "model.onnx", module, ["input_ids"], [(torch.rand(4, 3),)])
        else:
            with pytest.raises(ExportError, match=r"other numbers than torch for output on inputs of \(4, 3\)"):
                check(tmp_path / "model.onnx", module, ["input_ids"], [(torch.rand(4, 3),)])


def test_what_cannot_be_traced_says_why_and_what_to_do():
    class Branches(nn.Module):
        def forward(self, x):
            return x if bool(x.sum() > 0) else -x

    with pytest.raises(ExportError, match=r"cannot make a graph of this model .*keep it in torch, or convert it"):
        trace(Branches(), (torch.ones(2),), ({0: torch.export.Dim.AUTO},), ["x"], ["y"])
