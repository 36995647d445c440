"""Models of timm: the Vision Transformer, DeiT with a distillation token, and Swin, as `timm.create_model` makes them.

transformers has a wrapper for models of timm (`TimmWrapperForImageClassification`), under which they have a config, a
place on the Hub ("timm/vit_tiny_patch16_224...") and files. A bare timm model is put into one; what is written back is
a wrapper too, and `.timm_model` the model in it. The config only names an architecture, so sizes are read from a model
that is built without memory.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from zoo.convert.teachers.adapter import Packed, register_teacher
from zoo.convert.teachers.swin import swin_blocks, swin_fields, swin_image, swin_merges
from zoo.convert.teachers.vit import ImageTeacher, encoder_fields, random_images
from zoo.errors import ConversionError

_ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "QuickGELU": "quick_gelu",
}


@register_teacher
class TimmModel(ImageTeacher):
    """timm's `VisionTransformer`, `VisionTransformerDistilled` and `SwinTransformer`."""

    family = "timm"
    model_types = ("timm_wrapper",)
    architectures = {"TimmWrapperForImageClassification": "image-classification"}  # noqa: RUF012

    def wrap(self, model: Any) -> Any:
        if not type(model).__module__.startswith("timm.models."):
            return None
        name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
        if name is None:
            raise ConversionError(f"{type(model).__name__}: only models made by timm.create_model can be imported")
        values = {"architecture": name, "num_classes": model.num_classes, "model_args": arguments(model)}
        config = TimmWrapperConfig.from_dict(values)
        with torch.device("meta"):
            wrapper = TimmWrapperForImageClassification(config)
        wrapper.timm_model = model
        return wrapper

    def config(self, values: dict[str, Any]) -> Any:
        return TimmWrapperConfig.from_dict(values)

    def our_layers(self, config: Any) -> list[int]:
        return list(range(len(getattr(skeleton(config), "blocks", ()))))  # those of a Swin are listed one by one

    def probe(self, config: Any) -> dict[str, Tensor] | None:
        patches = skeleton(config).patch_embed
        return random_images(patches.proj.in_channels, _side(patches.img_size))

    def spec(self, config: Any, task: str) -> dict[str, Any]:
        model = skeleton(config)
        for option, (value, needed) in _kind(model).needs(model).items():
            if value != needed:
                what = f"{config.architecture} with {option}={value!r}"
                raise ConversionError(f"{what} cannot be imported exactly; {option} must be {needed!r}")
        return _kind(model).spec(model)

    def modules(self, config: Any, architecture: str) -> dict[str, str | Packed]:
        model = skeleton(config)
        return {f"timm_model.{theirs}": ours for theirs, ours in _kind(model).modules(model).items()}

    def tensors(self, config: Any, architecture: str) -> dict[str, str]:
        model = skeleton(config)
        return {f"timm_model.{theirs}": ours for theirs, ours in _kind(model).tensors(model).items()}


class _VisionTransformer:
    @staticmethod
    def arguments(model: Any) -> dict[str, Any]:
        block = model.blocks[0]
        return {
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
            "qkv_bias": block.attn.qkv.bias is not None,
            "class_token": model.cls_token is not None,
            "no_embed_class": model.no_embed_class,
            "global_pool": model.global_pool,
            "pool_include_prefix": model.pool_include_prefix,
            "fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "dynamic_img_size": model.dynamic_img_size,
        }

    @staticmethod
    def needs(model: Any) -> dict[str, tuple[Any, Any]]:
        attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
        return {
            "global_pool": (model.global_pool, "token" if model.global_pool == "token" else "avg"),
            "fc_norm": (not isinstance(model.fc_norm, nn.Identity), False),
            "pos_embed": (model.pos_embed is not None, True),
            "no_embed_class": (model.no_embed_class, False),
            "pool_include_prefix": (model.pool_include_prefix, False),
            "qk_norm": (not isinstance(attn.q_norm, nn.Identity), False),
            "act_layer": _activation(mlp),
        }

    @staticmethod
    def spec(model: Any) -> dict[str, Any]:
        patches, block = model.patch_embed, model.blocks[0]
        distilled = type(model).__name__ == "VisionTransformerDistilled"
        values = encoder_fields(
            model.embed_dim,
            block.attn.num_heads,
            len(model.blocks),
            block.mlp.fc1.out_features,
            activation=_ACTIVATIONS[type(block.mlp.act).__name__],
            eps=block.norm1.eps,
            qkv_bias=block.attn.qkv.bias is not None,
        )
        image = {
            "image_size": _side(patches.img_size),
            "patch_size": _side(patches.patch_size),
            "channels": patches.proj.in_channels,
            "class_token": model.cls_token is not None,
            "distillation_token": distilled,
            "distillation_head": distilled,
            "interpolation": "bicubic_antialias",
        }
        return values | {"image": image, "pooling": "cls" if model.global_pool == "token" else "mean"}

    @staticmethod
    def modules(model: Any) -> dict[str, str | Packed]:
        return vit_modules()

    @staticmethod
    def tensors(model: Any) -> dict[str, str]:
        return {n: m for n, m in vit_tensors().items() if getattr(model, n, None) is not None}


class _Swin:
    @staticmethod
    def arguments(model: Any) -> dict[str, Any]:
        block = model.layers[0].blocks[0]
        return {
            "window_size": list(block.attn.window_size),
            "embed_dim": model.embed_dim,
            "depths": _depths(model),
            "num_heads": [stage.blocks[0].attn.num_heads for stage in model.layers],
            "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
            "qkv_bias": block.attn.qkv.bias is not None,
        }

    @staticmethod
    def needs(model: Any) -> dict[str, tuple[Any, Any]]:
        block, last = model.layers[0].blocks[0], model.layers[-1].blocks[0]
        window, heads = block.attn.window_size, block.attn.num_heads
        return {
            "window_size": (tuple(last.attn.window_size), (window[0], window[0])),
            "always_partition": (block.always_partition, False),
            "head_dim": (block.attn.qkv.out_features, 3 * heads * (model.embed_dim // heads)),
            "global_pool": (model.head.global_pool.pool_type, "avg"),
            "act_layer": _activation(block.mlp),
            "norm_layer": (block.norm1.eps, 1e-5),
        }

    @staticmethod
    def spec(model: Any) -> dict[str, Any]:
        patches, block, depths = model.patch_embed, model.layers[0].blocks[0], _depths(model)
        values = swin_fields(
            model.embed_dim,
            depths,
            [stage.blocks[0].attn.num_heads for stage in model.layers],
            window=block.attn.window_size[0],
            ratio=block.mlp.fc1.out_features / model.embed_dim,
            activation=_ACTIVATIONS[type(block.mlp.act).__name__],
            qkv_bias=block.attn.qkv.bias is not None,
        )
        size, patch = _side(patches.img_size), _side(patches.patch_size)
        return values | {"image": swin_image(size, patch, patches.proj.in_channels, depths)}

    @staticmethod
    def modules(model: Any) -> dict[str, str | Packed]:
        return swin_modules(_depths(model))

    @staticmethod
    def tensors(model: Any) -> dict[str, str]:
        return swin_tensors(_depths(model))


_KINDS: dict[str, Any] = {
    "VisionTransformer": _VisionTransformer,
    "VisionTransformerDistilled": _VisionTransformer,
    "SwinTransformer": _Swin,
}


def _kind(model: Any) -> Any:
    if type(model).__name__ not in _KINDS:
        raise ConversionError(f"timm's {type(model).__name__} is not supported; supported: {', '.join(_KINDS)}")
    return _KINDS[type(model).__name__]


def arguments(model: Any) -> dict[str, Any]:
    """The arguments of `timm.create_model` that say a model's sizes, whatever its name stands for."""
    own, patches = _kind(model).arguments(model), model.patch_embed
    sizes = {"img_size": list(patches.img_size), "patch_size": list(patches.patch_size)}
    return {**sizes, "in_chans": patches.proj.in_channels, **own}


def skeleton(config: Any) -> Any:
    """The model of a config without memory, for its sizes. Raises ConversionError for another class of model."""
    model = _skeleton(config.architecture, config.num_labels, json.dumps(config.model_args or {}, sort_keys=True))
    _kind(model)
    return model


@functools.lru_cache(maxsize=4)
def _skeleton(name: str, num_labels: int, model_args: str) -> Any:
    try:
        import timm
    except ImportError:
        raise ConversionError(f"{name}: models of timm need the package: pip install 'zoo[vision]'") from None
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, num_classes=num_labels, **json.loads(model_args))


def vit_modules() -> dict[str, str | Packed]:
    """The modules of timm's Vision Transformers and ours; "head_dist" is in those with a distillation token."""
    return {
        "patch_embed.proj": "model.patches.projection",
        **_block("blocks.{i}.", "model.layers.{i}."),
        "norm": "model.norm",
        "head": "classifier",
        "head_dist": "distillation_classifier",
    }


def vit_tensors() -> dict[str, str]:
    """Their parameters outside modules, of which a model may lack some."""
    names = {"cls_token": "class_token", "dist_token": "distillation_token", "pos_embed": "position_table"}
    return {theirs: f"model.patches.{ours}" for theirs, ours in names.items()}


def swin_modules(depths: list[int]) -> dict[str, str | Packed]:
    """The modules of timm's Swin and ours."""
    found: dict[str, str | Packed] = {
        "patch_embed.proj": "model.patches.projection",
        "patch_embed.norm": "model.embed_norm",
        "norm": "model.norm",
        "head.fc": "classifier",
    }
    for theirs, ours in swin_blocks(depths, "layers.{s}.blocks.{j}."):
        found |= _block(theirs, ours)
    for stage, ours in enumerate(swin_merges(depths), 1):  # timm merges at the start of a stage
        found |= {f"layers.{stage}.downsample.{name}": ours + name for name in ("reduction", "norm")}
    return found


def swin_tensors(depths: list[int]) -> dict[str, str]:
    """The biases of its windows."""
    blocks = swin_blocks(depths, "layers.{s}.blocks.{j}.")
    return {f"{theirs}attn.relative_position_bias_table": ours + "mixer.bias_table" for theirs, ours in blocks}


def _block(theirs: str, ours: str) -> dict[str, str | Packed]:
    """The modules that every block of timm's Transformers has."""
    return {
        theirs + "norm1": ours + "mixer_norm",
        theirs + "attn.qkv": Packed(tuple(f"{ours}mixer.{n}_proj" for n in "qkv")),
        theirs + "attn.proj": ours + "mixer.o_proj",
        theirs + "norm2": ours + "ffn_norm",
        theirs + "mlp.fc1": ours + "ffn.up_proj",
        theirs + "mlp.fc2": ours + "ffn.down_proj",
    }


def _depths(model: Any) -> list[int]:
    return [len(stage.blocks) for stage in model.layers]


def _activation(mlp: Any) -> tuple[str, str]:
    name = type(mlp.act).__name__
    return name, name if name in _ACTIVATIONS else "GELU"


def _side(size: Any) -> int:
    rows, columns = (size, size) if isinstance(size, int) else size
    if rows != columns:
        raise ConversionError(f"sizes must be square, got {rows} x {columns}")
    return rows
