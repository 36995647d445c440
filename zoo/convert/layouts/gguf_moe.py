"""Decoders with experts in GGUF: Mixtral (llama.cpp's `llama` with experts), OLMoE, Qwen2-MoE, Qwen3-MoE.

The matrices of all experts are one tensor there, (expert, out, in). Newer files may hold gates and ups as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from zoo.config import ZooConfig
from zoo.convert.layouts.family import OtherKindError, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.gguf_attention import Decoder
from zoo.convert.layouts.mapping import Entry, flat, pairs, same
from zoo.convert.layouts.moe import fused_pair, stack_of

_FUSED = ".ffn_gate_up_exps.weight"


class Experts(Decoder):
    """A decoder whose MLPs are experts.

    normalize: the weights of those that a token takes are made to add up to one. length: the key of an expert's size.
    """

    inert = ("balance_loss", "z_loss", "balance_first", "jitter", "random_second", "init_scale")  # of training only
    normalize: ClassVar[bool]
    length: ClassVar[str] = "feed_forward_length"

    def ffn(self, checkpoint: Checkpoint) -> dict[str, Any]:
        self.only(checkpoint, "expert_weights_scale", 1.0, 0.0)
        self.only(checkpoint, "expert_group_count", 0, 1)
        return {
            "name": "moe",
            "num_experts": self.key(checkpoint, "expert_count"),
            "hidden_size": self.key(checkpoint, self.length),
            "top_k": self.key(checkpoint, "expert_used_count"),
            "activation": "silu",
            "normalize": self.normalize,
        }

    def ffn_keys(self, ffn: Any, width: int) -> dict[str, Any]:
        if ffn is None or ffn.name != "moe":
            raise OtherKindError("layers.0.ffn has no experts")
        return {
            "feed_forward_length": ffn.hidden_size,
            self.length: ffn.hidden_size,
            "expert_count": ffn.num_experts,
            "expert_used_count": ffn.top_k,
        }

    def entries_of(self, config: ZooConfig, checkpoint: Checkpoint) -> Iterator[Entry]:
        fused = {n.removesuffix(_FUSED) for n in checkpoint.shapes if n.endswith(_FUSED)}
        for entry in self.entries(config):
            block, _, name = entry.theirs[0].partition(".ffn_") if entry.theirs else ("", "", "")
            if block not in fused or name not in ("gate_exps.weight", "up_exps.weight"):
                yield entry
            elif name == "gate_exps.weight":
                ours = entry.ours[0]
                yield fused_pair(f"{block}{_FUSED}", ours, ours.replace("gate_EIO", "up_EIO"))

    def ffn_entries(self, theirs: str, ours: str, ffn: Any) -> Iterator[Entry]:
        yield same(f"{theirs}ffn_gate_inp.weight", f"{ours}router.weight")
        for part in ("gate", "up", "down"):
            yield stack_of(f"{theirs}ffn_{part}_exps.weight", f"{ours}experts.{part}_EIO")


@register_family
class GGUFMixtral(Experts):
    """Mixtral."""

    name = "mixtral"
    architecture = "llama"
    about = "llama with experts"
    turned = factors = normalize = True
    biases = ((False, False), (True, True))

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return super().recognises(checkpoint) and bool(checkpoint.config.get("llama.expert_count"))


@register_family
class GGUFOlmoe(Experts):
    """OLMoE: queries and keys have a norm over all heads."""

    name = architecture = "olmoe"
    about = "olmoe"
    normalize = False
    square = True
    qk_norm = "all"


@register_family
class GGUFQwen3Moe(Experts):
    """Qwen3-MoE."""

    name = "qwen3_moe"
    architecture = about = "qwen3moe"
    normalize = True
    length = "expert_feed_forward_length"
    qk_norm = "head"


@register_family
class GGUFQwen2Moe(Experts):
    """Qwen2-MoE: a shared expert behind a gate beside the others."""

    name = "qwen2_moe"
    architecture = about = "qwen2moe"
    normalize = False
    square = True
    biases = ((True, False),)
    length = "expert_feed_forward_length"

    def ffn(self, checkpoint: Checkpoint) -> dict[str, Any]:
        shared = self.key(checkpoint, "expert_shared_feed_forward_length")
        return {**super().ffn(checkpoint), "shared_size": shared, "shared_gate": True}

    def ffn_keys(self, ffn: Any, width: int) -> dict[str, Any]:
        keys = super().ffn_keys(ffn, width)
        if ffn.shared_size is None or not ffn.shared_gate:
            raise OtherKindError("layers.0.ffn has no shared expert behind a gate")
        return {**keys, "expert_shared_feed_forward_length": ffn.shared_size}

    def ffn_entries(self, theirs: str, ours: str, ffn: Any) -> Iterator[Entry]:
        yield from super().ffn_entries(theirs, ours, ffn)
        names = {f"ffn_{part}_shexp": f"shared.{part}_proj" for part in ("gate", "up", "down")}
        yield from pairs(theirs, ours, names)
        yield vector(f"{theirs}ffn_gate_inp_shexp.weight", f"{ours}shared_gate.weight")


def vector(theirs: str, ours: str) -> Entry:
    """A vector there, a matrix of one row here."""
    reversed_way = flat(ours, theirs, (1, -1))
    return Entry((theirs,), (ours,), reversed_way.write, reversed_way.read)
