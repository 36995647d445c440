"""timm's own format, as it is on the Hub: `config.json` with `architecture`, and a state dict. Without timm.

A ViT, a DeiT with a distillation token or a Swin. Sizes are read off the tensors; what those do not show (how many
heads a ViT has, the images of a Swin) is in `model_args`, or follows from the architecture's name. Written is a known
architecture with all sizes in `model_args`, so that `timm.create_model("local-dir:FOLDER")` makes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, same
from zoo.convert.layouts.transformers_attention import packed_entries
from zoo.errors import CheckpointError, ExportError

_WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024}
_SWIN_WIDTHS = {"tiny": 96, "small": 96, "base": 128, "large": 192}
_HEAD_DIM = 64  # of every ViT and DeiT whose name says nothing else


class _Timm(Family):
    layout = "timm"
    known: ClassVar[str]

    def recognises(self, checkpoint: Checkpoint) -> bool:
        c = checkpoint.config
        return "model_type" not in c and re.match(self.known, str(c.get("architecture"))) is not None

    def ignored(self, config: ZooConfig) -> tuple[str, ...]:
        return (".relative_position_index", ".attn_mask")

    def _checked(self, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
        """Their pretrained_cfg and model_args. Raises CheckpointError for an architecture that is not known."""
        c = checkpoint.config
        name, given = c["architecture"].partition(".")[0], c.get("model_args") or {}
        if not re.fullmatch(self.known, name):
            raise CheckpointError(f"{checkpoint.path}: architecture is {name!r}; known are those of {self.known}")
        for key in ("qk_norm", "init_values", "act_layer", "norm_layer", "block_fn", "ape", "always_partition"):
            if given.get(key):
                raise CheckpointError(f"{checkpoint.path}: model_args.{key} is {given[key]!r}; it cannot be expressed")
        return c.get("pretrained_cfg") or c, given

    def _entries(self, config: ZooConfig, modules: Any, tensors: dict[str, str]) -> Iterator[Entry]:
        from zoo.convert.layouts.loading import meta_model

        ours = meta_model(config).state_dict()
        yield from (same(theirs, mine) for theirs, mine in tensors.items() if mine in ours)
        for _, entry in packed_entries(modules, list(range(len(config.layers))), ours):
            yield entry

    def _config(self, config: ZooConfig, architecture: str, width: int, head: Any, args: dict[str, Any]) -> dict:
        image: Any = config.spec.image
        pool = "token" if config.pooling == "cls" else "avg"
        if config.pooling == "last":
            raise ExportError("pooling: 'last' is not one of timm's")
        size = [image.channels, image.image_size, image.image_size]
        args = {"img_size": image.image_size, "patch_size": image.patch_size, "in_chans": image.channels, **args}
        return {
            "architecture": architecture,
            "num_classes": config.num_labels,
            "num_features": width,
            "global_pool": pool,
            "model_args": {**args, "global_pool": pool},
            "pretrained_cfg": {
                "num_classes": config.num_labels,
                "input_size": size,
                "fixed_input_size": True,
                "first_conv": "patch_embed.proj",
                "classifier": head,
            },
        }


def _nearest(widths: dict[str, int], width: int) -> str:
    return min(widths, key=lambda name: abs(widths[name] - width))


@register_family
class TimmVisionTransformer(_Timm):
    """`VisionTransformer` and `VisionTransformerDistilled`."""

    name = "vit"
    about = "ViT and DeiT of timm"
    mixers = ("attention",)
    inert = ("embedding_dropout", "classifier_dropout", "interpolation")  # the last: of images that the class refuses
    known = r"(vit|deit)_(tiny|small|base|large)(_distilled)?_patch\d+_\d+"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        from zoo.convert.teachers.vit import encoder_fields

        _, given = self._checked(checkpoint)
        shapes = checkpoint.shapes
        width, channels, patch, _ = shapes["patch_embed.proj.weight"]
        distilled, token = "dist_token" in shapes, "cls_token" in shapes
        side = math.isqrt(shapes["pos_embed"][1] - distilled - token)
        heads = given.get("num_heads") or width // _HEAD_DIM
        pool = given.get("global_pool") or checkpoint.config.get("global_pool") or "token"
        if pool not in ("token", "avg"):
            raise CheckpointError(f"{checkpoint.path}: global_pool is {pool!r}; known are 'token' and 'avg'")
        depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
        inner, bias = shapes["blocks.0.mlp.fc1.weight"][0], "blocks.0.attn.qkv.bias" in shapes
        values = encoder_fields(width, heads, depth, inner, activation="gelu", eps=1e-6, qkv_bias=bias)
        image = {
            "image_size": side * patch,
            "patch_size": patch,
            "channels": channels,
            "class_token": token,
            "distillation_token": distilled,
            "distillation_head": distilled,
            "interpolation": "bicubic_antialias",
        }
        more = {"image": image, "pooling": "cls" if pool == "token" else "mean", "task": "image-classification"}
        return {**values, **more, "num_labels": shapes["head.weight"][0]}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        spec = config.spec
        if spec.image is None or spec.layers[0].ffn is None:
            raise ExportError("is for images")
        mixer, ffn, both = spec.layers[0].mixer, spec.layers[0].ffn, spec.image.distillation_head
        size = _nearest(_WIDTHS, spec.hidden_size)
        size = "base" if both and size == "large" else size
        head: Any = ["head", "head_dist"] if both else "head"
        args: dict[str, Any] = {
            "embed_dim": spec.hidden_size,
            "depth": len(spec.layers),
            "num_heads": mixer.num_heads,
            "mlp_ratio": ffn.hidden_size / spec.hidden_size,
            "qkv_bias": mixer.qkv_bias,
        }
        if both:
            name = f"deit_{size}_distilled_patch16_224"
        else:
            name = f"vit_{size}_patch16_224"
            args |= {"class_token": spec.image.class_token, "fc_norm": False}
        return self._config(config, name, spec.hidden_size, head, args)

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        from zoo.convert.teachers.timm_models import vit_modules, vit_tensors

        return self._entries(config, vit_modules(), vit_tensors())


@register_family
class TimmSwin(_Timm):
    """`SwinTransformer`."""

    name = "swin"
    about = "Swin of timm"
    mixers = ("shifted_window",)
    inert = TimmVisionTransformer.inert
    known = r"swin_(tiny|small|base|large)_patch\d+_window\d+_\d+"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        from zoo.convert.teachers.swin import swin_fields, swin_image

        pretrained, given = self._checked(checkpoint)
        shapes = checkpoint.shapes
        width, channels, patch, _ = shapes["patch_embed.proj.weight"]
        blocks = {tuple(map(int, name.split(".")[1:4:2])) for name in shapes if ".blocks." in name}
        depths = [sum(s == stage for s, _ in blocks) for stage in range(1 + max(s for s, _ in blocks))]
        tables = [shapes[f"layers.{s}.blocks.0.attn.relative_position_bias_table"] for s in range(len(depths))]
        windows = {(math.isqrt(rows) + 1) // 2 for rows, _ in tables}
        if len(windows) > 1:
            raise CheckpointError(f"{checkpoint.path}: its stages have windows of {sorted(windows)}; one is known")
        size = given.get("img_size") or (pretrained.get("input_size") or [channels, 224, 224])[-1]
        sides = set(size) if isinstance(size, list) else {size}
        if len(sides) > 1:
            raise CheckpointError(f"{checkpoint.path}: img_size is {size}; images must be square")
        values = swin_fields(
            width,
            depths,
            [columns for _, columns in tables],
            window=windows.pop(),
            ratio=shapes["layers.0.blocks.0.mlp.fc1.weight"][0] / width,
            activation="gelu",
            qkv_bias="layers.0.blocks.0.attn.qkv.bias" in shapes,
        )
        image = swin_image(sides.pop(), patch, channels, depths)
        more = {"image": image, "task": "image-classification", "num_labels": shapes["head.fc.weight"][0]}
        return {**values, **more}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        spec = config.spec
        if spec.image is None or not spec.image.stages or spec.layers[0].ffn is None:
            raise ExportError("is for images, in stages")
        starts = [sum(spec.image.stages[:s]) for s in range(len(spec.image.stages))]
        mixers = [spec.layers[i].mixer for i in starts]
        args = {
            "embed_dim": spec.hidden_size,
            "depths": spec.image.stages,
            "num_heads": [mixer.num_heads for mixer in mixers],
            "window_size": mixers[0].window,
            "mlp_ratio": spec.layers[0].ffn.hidden_size / spec.hidden_size,
            "qkv_bias": mixers[0].qkv_bias,
        }
        name = f"swin_{_nearest(_SWIN_WIDTHS, spec.hidden_size)}_patch4_window7_224"
        return self._config(config, name, spec.stack_size, "head.fc", args)

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        from zoo.convert.teachers.timm_models import swin_modules, swin_tensors

        stages: Any = config.spec.image
        return self._entries(config, swin_modules(stages.stages), swin_tensors(stages.stages))
