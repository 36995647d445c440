"""Models of timm in timm's own format, which needs timm to be made."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from safetensors.torch import save_file

from peers import Peer, peer, random_weights
from peers.attention import pixels


def timm_peer(family, label, architecture, **sizes):
    def save(folder: Path):
        timm = importlib.import_module("timm")
        model = random_weights(timm.create_model(architecture, num_classes=5, **sizes), 0.02)
        save_file({n: t.contiguous().clone() for n, t in model.state_dict().items()}, folder / "model.safetensors")
        config = {
            "architecture": architecture, "num_classes": 5, "num_features": model.num_features, "model_args": sizes,
            "pretrained_cfg": {"num_classes": 5, "input_size": [3, 32, 32], "classifier": "head"},
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        return model

    def load(folder: Path):
        timm = importlib.import_module("timm")
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = set(file.keys())
        return model, sorted(set(model.state_dict()) ^ stored)

    def logits(model, given):
        return model(given["pixel_values"])

    made = pixels(sizes["img_size"])
    peer(Peer("timm", family, save, logits, made, load, label, greedy=False, package="timm"))


SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
timm_peer("vit", "", "vit_tiny_patch16_224", **SIZES)
timm_peer("vit", "distilled", "deit_tiny_distilled_patch16_224", **SIZES, qkv_bias=False)
timm_peer(
    "swin", "", "swin_tiny_patch4_window7_224", img_size=32, patch_size=2, embed_dim=16, depths=[1, 2],
    num_heads=[2, 4], window_size=4,
)  # fmt: skip


def save_wrapped(folder: Path):
    """transformers' wrapper around a model of timm."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    values = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": SIZES}
    model = random_weights(TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(values)), 0.02)
    model.save_pretrained(folder)
    return model


def load_wrapped(folder: Path):
    from transformers import TimmWrapperForImageClassification

    model, info = TimmWrapperForImageClassification.from_pretrained(folder, output_loading_info=True)
    return model.eval(), [str(k) for key in ("missing_keys", "unexpected_keys") for k in info[key]]


peer(Peer(
    "transformers", "timm", save_wrapped, lambda model, given: model(**given).logits, pixels(32), load_wrapped,
    greedy=False, package="timm",
))  # fmt: skip
