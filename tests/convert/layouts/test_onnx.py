"""ONNX graphs in onnxruntime: a causal model fed token by token from the state it starts with, others in one pass."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import zoo
from zoo.convert.layouts import export_model
from zoo.errors import ExportError

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX needs onnx, onnxscript and onnxruntime")
pytest.importorskip("onnxscript", reason="ONNX needs onnx, onnxscript and onnxruntime")

CAUSAL = [
    "llama-tiny", "gpt2-tiny", "sliding-window-tiny", "windowed-linear-tiny", "mla-tiny", "retnet-tiny", "gla-tiny",
    "gated-deltanet-h-tiny", "kimi-linear-tiny", "mamba-tiny", "mamba2-tiny", "falcon-h1-tiny", "rwkv4-tiny",
    "rwkv6-tiny", "rwkv7-tiny", "hyena-tiny", "performer-tiny", "mixtral-tiny",
]  # fmt: skip
WHOLE = ["bert-tiny", "linformer-tiny", "vit-tiny"]


def exported(name, folder):
    model = zoo.create_model(name).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    export_model(model, "onnx", folder)
    told = json.loads((folder / "zoo_onnx.json").read_text())
    return model, told, onnxruntime.InferenceSession(folder / told["graph"])


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_steps_are_those_of_the_model(name, tmp_path):
    """Three rows, one padded on the left, through more tokens than the tiny windows hold."""
    model, told, session = exported(name, tmp_path / "out")
    ids_BL = torch.randint(1, 256, (3, 40))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, :5] = 0
    expected = model(input_ids=ids_BL, attention_mask=mask_BL).logits
    start = load_file(tmp_path / "out" / told["initial_state"])
    state = {name: start[name].repeat(3, *[1] * (start[name].dim() - 1)).numpy() for name in told["inputs"][2:]}
    for t in range(ids_BL.shape[1]):
        step = {"input_ids": ids_BL[:, t : t + 1].numpy(), "attention_mask": mask_BL[:, t : t + 1].numpy()}
        logits, *new = session.run(None, {**step, **state})
        state = dict(zip(state, new, strict=True))
        real = mask_BL[:, t].bool()
        error = (torch.from_numpy(logits)[real, 0] - expected[real, t]).abs().max()
        assert error < 1e-4 * expected.abs().max(), t


@torch.no_grad()
@pytest.mark.parametrize("name", WHOLE)
def test_passes_are_those_of_the_model(name, tmp_path):
    model, _, session = exported(name, tmp_path / "out")
    if (image := model.config.spec.image) is not None:
        inputs = {"pixel_values": torch.randn(3, 3, image.image_size, image.image_size)}
    else:
        inputs = {"input_ids": torch.randint(1, 256, (3, 19)), "attention_mask": torch.ones(3, 19, dtype=torch.long)}
        inputs["attention_mask"][1, 12:] = 0
    (got,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
    expected = model(**inputs)[0]
    mask = inputs.get("attention_mask")
    where = slice(None) if mask is None or expected.dim() == 2 else mask.bool()
    assert (torch.from_numpy(got)[where] - expected[where]).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["s4-tiny", "mixture-of-depths-tiny"])
def test_what_has_no_graph_is_refused(name, tmp_path):
    with pytest.raises(ExportError):
        export_model(zoo.create_model(name), "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
