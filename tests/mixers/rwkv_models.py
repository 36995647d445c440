"""What the tests of RWKV share: tiny models with weights from a formula, and the authors' package that runs them.

The package is `rwkv` (https://pypi.org/project/rwkv, 0.8.32 here): pip install --no-deps rwkv. It reads .pth files.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from formulas import teacher, wave

import zoo
from zoo.mixers.base import AttentionStats


def formula_model(name: str, dtype: torch.dtype = torch.double, **overrides):
    """A model of three layers whose weights anybody can make again."""
    layers = {"num_hidden_layers": 3, **overrides.pop("layers", {})}
    model = zoo.create_model(name, vocab_size=31, layers=layers, **overrides).eval()
    with torch.no_grad():
        for i, (key, parameter) in enumerate(sorted(model.named_parameters())):
            numbers = wave(*parameter.shape, step=0.31 + 0.013 * i)
            scale = 0.5 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(scale * numbers + ("norm.weight" in key))
    return model.to(dtype)


IDS = torch.arange(24).square()[None] % 31


def official(model, version: int) -> dict[str, torch.Tensor]:
    """Our weights under the names of the authors' checkpoints (float32)."""
    found = {"emb.weight": model.model.embed_tokens.weight, "head.weight": model.lm_head.weight}
    found |= norm("ln_out", model.model.norm)
    for i, block in enumerate(model.model.layers):
        b, mixer = f"blocks.{i}", block.mixer
        if i == 0:
            found |= norm(f"{b}.ln0", model.model.embed_norm)
        found |= {**norm(f"{b}.ln1", block.mixer_norm), **norm(f"{b}.ln2", block.ffn_norm)}
        projections = {"receptance": "q", "key": "k", "value": "v", "output": "o"}
        found |= {f"{b}.att.{o}.weight": getattr(mixer, f"{n}_proj").weight for o, n in projections.items()}
        found |= {f"{b}.att.{key}": w for key, w in (time_mix_6 if version == 6 else time_mix_7)(mixer).items()}
        found |= norm(f"{b}.att.ln_x", mixer.norm)
        found |= {f"{b}.ffn.{key}.weight": getattr(block.ffn, key).weight for key in ("key", "value")}
        prefix = f"{b}.ffn.time_maa" if version == 6 else f"{b}.ffn.x"
        found[f"{prefix}_k"] = block.ffn.shift_k[None, None]
        if version == 6:
            found[f"{prefix}_r"] = block.ffn.shift_r[None, None]
            found[f"{b}.ffn.receptance.weight"] = block.ffn.receptance.weight
    return {key: w.detach().float().clone() for key, w in found.items()}


def norm(name, module):
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


def time_mix_6(mixer):
    names = {f"time_maa_{n}": row[None, None] for n, row in zip("wkvrg", mixer.shift_MD, strict=True)}
    return {
        "time_maa_x": mixer.shift_x[None, None], **names, "time_maa_w1": mixer.shift_down.weight.T,
        "time_maa_w2": mixer.shift_up_MRD, "time_decay": mixer.decay_bias[None, None],
        "time_decay_w1": mixer.decay_proj.down.weight.T, "time_decay_w2": mixer.decay_proj.up.weight.T,
        "time_faaaa": mixer.bonus_GK, "gate.weight": mixer.g_proj.weight,
    }  # fmt: skip


def time_mix_7(mixer):
    names = {f"x_{n}": row[None, None] for n, row in zip("rwkvag", mixer.shift_MD, strict=True)}
    for letter, low in {"w": "decay", "a": "a", "v": "residual", "g": "g"}.items():
        module = getattr(mixer, f"{low}_proj")
        names |= {f"{letter}1": module.down.weight.T, f"{letter}2": module.up.weight.T}
    biases = {"w0": mixer.decay_bias, "a0": mixer.a_bias, "v0": mixer.residual_bias}
    keys = {"k_k": mixer.removal_GK.flatten(), "k_a": mixer.rate_share_GK.flatten(), "r_k": mixer.bonus_HK}
    return {**names, **biases, **keys}


def authors_model(weights: dict[str, torch.Tensor], folder: Path, version: int, monkeypatch):
    """The authors' package with these weights, on the CPU in float32; skips where it is not installed."""
    path = next((p for entry in sys.path if (p := Path(entry) / "rwkv" / "model.py").is_file()), None)
    if path is None:
        pytest.skip("the rwkv package is not on the Python path: pip install --no-deps rwkv")
    settings = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1" if version == 7 else "0"}
    for key, value in settings.items():
        monkeypatch.setitem(os.environ, key, value)
    spec = importlib.util.spec_from_file_location(f"rwkv_model_{version}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    torch.save(weights, folder / "model.pth")
    return module.RWKV(model=str(folder / "model"), strategy="cpu fp32")


@torch.no_grad()
def compare_with_authors(name: str, version: int, folder: Path, monkeypatch) -> None:
    """All logits of a prompt, and then of single steps with the state carried, are those of the authors' package."""
    ours = formula_model(name, torch.float32)
    theirs = authors_model(official(ours, version), folder, version, monkeypatch)
    prompt, rest = IDS[:, :17], IDS[0, 17:].tolist()
    out = ours(prompt, use_cache=True)
    expected, state = theirs.forward(prompt[0].tolist(), None, full_output=True)
    error = (out.logits[0] - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, error
    for token in rest:
        out = ours(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        expected, state = theirs.forward([token], state)
        error = (out.logits[0, -1] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, error


def converted_from_attention(cls, **options):
    """A causal attention layer, and the mixer that `cls` makes of it with measured look-backs and scales."""
    attention = teacher(causal=True)
    weights = attention.attention_weights()
    stats = AttentionStats(
        lookback_H=torch.tensor([1.0, 3.0, 20.0, 60.0]), q_norm_H=torch.ones(4), k_norm_H=torch.ones(4),
        out_rms_H=torch.tensor([0.5, 0.4, 0.3, 0.2]),
    )  # fmt: skip
    return attention, cls.from_attention(cls.config_from_attention(weights, **options), weights, stats)
