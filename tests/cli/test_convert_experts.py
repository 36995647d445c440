"""zoo convert --ffn: MLPs to experts, with or without another mixer, and what is said of it."""

from __future__ import annotations

import pytest
import torch

import zoo


def test_upcycle_keeps_the_function(run, teacher, tmp_path):
    ran = run("convert", teacher, "--ffn", "upcycle", "--ffn-option", "num_experts=3", "--out", "wide")
    assert ran.code == 0, ran.err
    assert "MLPs to experts by upcycle; " in ran.out
    wide = zoo.create_model(str(tmp_path / "wide")).eval()
    assert [layer["ffn"]["name"] for layer in wide.config.layers] == ["moe"] * 4
    ids_BL = torch.arange(40).view(2, 20)
    expected = zoo.convert(str(teacher), progress=False)(ids_BL).logits
    torch.testing.assert_close(wide(ids_BL).logits, expected, rtol=1e-5, atol=1e-6)


def test_moefy_beside_another_mixer(run, teacher, text, tmp_path):
    options = ["--ffn", "moefy", "--ffn-option", "num_experts=8", "--ffn-option", "top_k=4"]
    sample = ["--data", text, "--length", 64, "--tokens", 512]
    mixed = run("convert", teacher, "--mixer", "retention", *options, *sample, "--out", "both", "--json").json()
    assert mixed["ffn"] == "moefy"
    assert mixed["parameters"] == sum(p.numel() for p in zoo.create_model(str(tmp_path / "both")).parameters())
    assert mixed["distance"] > 0
    assert mixed["distance_before"] > 0
    alone = run("convert", teacher, *options, *sample, "--out", "alone")
    assert alone.code == 0, alone.err
    assert "MLPs to experts by moefy" in alone.out
    assert "distance from the teacher: " in alone.out
    exact = run("convert", teacher, *options[:-1], "top_k=8", *sample, "--out", "exact", "--json").json()
    assert exact["distance"] == pytest.approx(0, abs=1e-6)
    assert exact["tokens"] == 512


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ffn", "moefi"], "ffn: unknown way 'moefi'; did you mean 'moefy'"),
        (["--ffn-option", "top_k=2"], "ffn_options are given, but no ffn"),
        (["--ffn", "upcycle", "--ffn-option", "tip_k=2"], "layers.0.ffn.tip_k: unknown key; did you mean 'top_k'"),
        (
            ["--ffn", "moefy", "--ffn-option", "num_experts=7"],
            "layer 0: 64 neurons are not 7 equal parts; nearest is 8",
        ),
        (["--mixer", "retention", "--target", "transformers"], "target 'transformers': mixer 'retention' has no form"),
    ],
)
def test_what_is_refused(run, teacher, args, message):
    assert run("convert", teacher, *args, "--out", "student").error.startswith(message)
