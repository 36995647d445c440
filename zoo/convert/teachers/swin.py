"""Swin (Liu et al. 2021, arXiv:2103.14030) for classification.

Its layers are `shifted_window` here, not `attention`: a Swin is imported and written back, but has nothing to convert.
An image smaller than those it was trained on, in which a stage has fewer patches than a window, is another matter in
transformers, whose biases then belong to other places.
"""

from __future__ import annotations

from typing import Any

from zoo.convert.teachers.adapter import Packed, register_teacher
from zoo.convert.teachers.vit import ImageTeacher, one_number
from zoo.errors import ConversionError


def swin_fields(
    width: int,
    depths: list[int],
    heads: list[int],
    *,
    window: int,
    ratio: float,
    activation: str,
    qkv_bias: bool,
) -> dict[str, Any]:
    """Fields of a Swin: windows that are shifted in every second layer of a stage, and a norm behind the patches."""
    layers = []
    for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        size = width << stage
        mixer = {
            "name": "shifted_window",
            "num_heads": count,
            "head_dim": size // count,
            "qkv_bias": qkv_bias,
            "out_bias": True,
            "window": window,
        }
        ffn = {"name": "mlp", "hidden_size": int(size * ratio), "activation": activation}
        layers += [{"mixer": mixer | {"shift": window // 2 if i % 2 else 0}, "ffn": ffn} for i in range(depth)]
    return {
        "hidden_size": width,
        "layers": layers,
        "norm": "layer_norm",
        "norm_eps": 1e-5,
        "embedding_norm": True,
        "pooling": "mean",
    }


def swin_image(size: int, patch: int, channels: int, depths: list[int]) -> dict[str, Any]:
    """The `image` of a Swin: no class token, no positions beside the windows' biases."""
    sizes = {"image_size": size, "patch_size": patch, "channels": channels}
    return sizes | {"class_token": False, "positions": False, "stages": list(depths)}


def swin_blocks(depths: list[int], theirs: str) -> list[tuple[str, str]]:
    """The name of each block, `theirs` with {s} and {j}, and ours."""
    places = [(s, j) for s, depth in enumerate(depths) for j in range(depth)]
    return [(theirs.format(s=s, j=j), f"model.layers.{i}.") for i, (s, j) in enumerate(places)]


def swin_merges(depths: list[int]) -> list[str]:
    """Our names of the merging modules behind all stages but the last."""
    return [f"model.layers.{sum(depths[: s + 1]) - 1}.merge." for s in range(len(depths) - 1)]


@register_teacher
class Swin(ImageTeacher):
    """Swin in transformers."""

    family = "swin"
    model_types = ("swin",)
    architectures = {"SwinForImageClassification": "image-classification"}  # noqa: RUF012
    published = (
        (r"\.attention\.q_proj\.", ".attention.self.query."),
        (r"\.attention\.k_proj\.", ".attention.self.key."),
        (r"\.attention\.v_proj\.", ".attention.self.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.attention\.relative_position_bias\.", ".attention.self."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
    only = {"use_absolute_embeddings": (False,), "layer_norm_eps": (1e-5,)}  # noqa: RUF012

    def spec(self, config: Any, task: str) -> dict[str, Any]:
        size, patch = one_number(config, "image_size"), one_number(config, "patch_size")
        grid, stages = size // patch, len(config.depths)
        if (smallest := grid >> (stages - 1)) < config.window_size:
            raise ConversionError(
                f"swin with window_size={config.window_size} cannot be imported: its last stage has only "
                f"{smallest} x {smallest} patches"
            )
        values = swin_fields(
            config.embed_dim,
            list(config.depths),
            list(config.num_heads),
            window=config.window_size,
            ratio=config.mlp_ratio,
            activation=config.hidden_act,
            qkv_bias=config.qkv_bias,
        )
        return values | {
            "image": swin_image(size, patch, config.num_channels, list(config.depths)),
            "embedding_dropout": config.hidden_dropout_prob,
            "initializer_range": config.initializer_range,
        }

    def modules(self, config: Any, architecture: str) -> dict[str, str | Packed]:
        found: dict[str, str | Packed] = {
            "swin.embeddings.patch_embeddings.projection": "model.patches.projection",
            "swin.embeddings.norm": "model.embed_norm",
            "swin.layernorm": "model.norm",
            "classifier": "classifier",
        }
        for theirs, ours in swin_blocks(config.depths, "swin.encoder.layers.{s}.blocks.{j}."):
            found[theirs + "layernorm_before"] = ours + "mixer_norm"
            found |= {f"{theirs}attention.{n}_proj": f"{ours}mixer.{n}_proj" for n in "qkvo"}
            found[theirs + "layernorm_after"] = ours + "ffn_norm"
            found[theirs + "mlp.fc1"] = ours + "ffn.up_proj"
            found[theirs + "mlp.fc2"] = ours + "ffn.down_proj"
        for stage, ours in enumerate(swin_merges(config.depths)):
            for name in ("reduction", "norm"):
                found[f"swin.encoder.layers.{stage}.downsample.{name}"] = ours + name
        return found

    def tensors(self, config: Any, architecture: str) -> dict[str, str]:
        table = "attention.relative_position_bias.relative_position_bias_table"
        blocks = swin_blocks(config.depths, "swin.encoder.layers.{s}.blocks.{j}.")
        return {theirs + table: ours + "mixer.bias_table" for theirs, ours in blocks}
