"""ViT (Dosovitskiy et al. 2020, arXiv:2010.11929) and DeiT (Touvron et al. 2020, arXiv:2012.12877) for classification.

Images of other sizes than the trained one: ours always resize the positions, transformers where it is called with
`interpolate_pos_encoding=True`; both do it alike.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.convert.teachers.adapter import Packed, TeacherAdapter, register_teacher
from zoo.errors import ConversionError


def one_number(config: Any, option: str) -> int:
    """A size that may be a pair. Raises ConversionError where its two sides differ."""
    value = getattr(config, option)
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(set(sides)) != 1:
        raise ConversionError(f"{config.model_type} with {option}={value!r} cannot be imported: images must be square")
    return sides[0]


def encoder_fields(
    width: int, heads: int, depth: int, inner: int, *, activation: str, eps: float, qkv_bias: bool
) -> dict[str, Any]:
    """The fields that all Vision Transformers share."""
    mixer = {
        "name": "attention",
        "num_heads": heads,
        "head_dim": width // heads,
        "qkv_bias": qkv_bias,
        "out_bias": True,
        "causal": False,
    }
    ffn = {"name": "mlp", "hidden_size": inner, "activation": activation}
    return {
        "hidden_size": width,
        "layers": [{"mixer": mixer, "ffn": ffn}] * depth,
        "norm": "layer_norm",
        "norm_eps": eps,
    }


def random_images(channels: int, size: int) -> dict[str, Tensor]:
    """Two images of normal noise, the same ones each time."""
    return {"pixel_values": torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))}


class ImageTeacher(TeacherAdapter):
    """An encoder of square images, checked on two random ones."""

    only: ClassVar = {"position_embedding_type": ("absolute",)}

    def probe(self, config: Any) -> dict[str, Tensor] | None:
        return random_images(config.num_channels, one_number(config, "image_size"))


class _VisionTransformer(ImageTeacher):
    root: ClassVar[str]
    published = (
        (r"\.layers\.(\d+)\.", r".encoder.layer.\1."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )

    def spec(self, config: Any, task: str) -> dict[str, Any]:
        if config.hidden_size % config.num_attention_heads:
            raise ConversionError(
                f"{config.model_type}: hidden_size={config.hidden_size} does not divide into "
                f"num_attention_heads={config.num_attention_heads}"
            )
        values = encoder_fields(
            config.hidden_size,
            config.num_attention_heads,
            config.num_hidden_layers,
            config.intermediate_size,
            activation=config.hidden_act,
            eps=config.layer_norm_eps,
            qkv_bias=config.qkv_bias,
        )
        image = {
            "image_size": one_number(config, "image_size"),
            "patch_size": one_number(config, "patch_size"),
            "channels": config.num_channels,
        }
        return values | {
            "image": image,
            "pooling": "cls",
            "embedding_dropout": config.hidden_dropout_prob,
            "initializer_range": config.initializer_range,
        }

    def modules(self, config: Any, architecture: str) -> dict[str, str | Packed]:
        theirs, ours = f"{self.root}.layers.{{i}}.", "model.layers.{i}."
        return {
            f"{self.root}.embeddings.patch_embeddings.projection": "model.patches.projection",
            theirs + "layernorm_before": ours + "mixer_norm",
            **{f"{theirs}attention.{n}_proj": f"{ours}mixer.{n}_proj" for n in "qkvo"},
            theirs + "layernorm_after": ours + "ffn_norm",
            theirs + "mlp.fc1": ours + "ffn.up_proj",
            theirs + "mlp.fc2": ours + "ffn.down_proj",
            f"{self.root}.layernorm": "model.norm",
            "classifier": "classifier",
        }

    def tensors(self, config: Any, architecture: str) -> dict[str, str]:
        return {
            f"{self.root}.embeddings.cls_token": "model.patches.class_token",
            f"{self.root}.embeddings.position_embeddings": "model.patches.position_table",
        }


@register_teacher
class ViT(_VisionTransformer):
    """The Vision Transformer."""

    family = "vit"
    model_types = ("vit",)
    root = "vit"
    architectures = {"ViTForImageClassification": "image-classification"}  # noqa: RUF012


@register_teacher
class DeiT(_VisionTransformer):
    """DeiT; `DeiTForImageClassificationWithTeacher` has both heads, `DeiTForImageClassification` that of the class."""

    family = "deit"
    model_types = ("deit",)
    root = "deit"
    architectures = {  # noqa: RUF012
        "DeiTForImageClassificationWithTeacher": "image-classification",
        "DeiTForImageClassification": "image-classification",
    }

    def fields(self, config: Any, architecture: str) -> dict[str, Any]:
        values = super().fields(config, architecture)
        both = architecture == "DeiTForImageClassificationWithTeacher"
        values["image"] |= {"distillation_token": True, "distillation_head": both}
        return values

    def modules(self, config: Any, architecture: str) -> dict[str, str | Packed]:
        values = super().modules(config, architecture)
        if architecture == "DeiTForImageClassification":
            return values
        del values["classifier"]
        return values | {"cls_classifier": "classifier", "distillation_classifier": "distillation_classifier"}

    def tensors(self, config: Any, architecture: str) -> dict[str, str]:
        token = {"deit.embeddings.distillation_token": "model.patches.distillation_token"}
        return super().tensors(config, architecture) | token
