"""RWKV-6 and RWKV-7 of flash-linear-attention, as in fla-hub's rwkv7-* and rwkv6-*.

Shares, bottlenecks and norms have other names than in the authors' files, and the five uses of version 6 another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from zoo.config import ZooConfig
from zoo.convert.layouts.family import one_layer, register_family
from zoo.convert.layouts.fla import FlaFamily, ratio
from zoo.convert.layouts.mapping import Entry, initial, mapped, rows, same, shaped
from zoo.errors import CheckpointError, ExportError

_THEIRS, _OURS = "rwkvg", "wkvrg"  # the order of the uses in version 6
_TO_OURS, _TO_THEIRS = ([a.index(x) for x in b] for a, b in ((_THEIRS, _OURS), (_OURS, _THEIRS)))


class _FlaRWKV(FlaFamily):
    norm, eps, activation = "layer_norm", 1e-5, "sqrelu"
    first_norm = True
    ffn_name = "ffn"
    version: ClassVar[int]
    needs: ClassVar = {"norm_first": True, "norm_bias": True}

    def ffn(self, c: dict[str, Any]) -> dict[str, Any]:
        size = c["intermediate_size"] or -(-int(c["hidden_size"] * c["hidden_ratio"]) // 32) * 32
        return {"name": "rwkv_channel_mix", "version": self.version, "hidden_size": size}

    def ffn_entries(self, theirs: str, ours: str, options: Any) -> Iterator[Entry]:
        linear = ".linear" if self.version == 6 else ""
        for name in ("key", "receptance") if self.version == 6 else ("key",):
            yield same(f"{theirs}{name}{linear}.weight", f"{ours}{name}.weight")
            share = f"{name}.mu" if self.version == 6 else "x_k"
            yield same(f"{theirs}{share}", f"{ours}shift_{'kr'[name == 'receptance']}")
        yield same(f"{theirs}value.weight", f"{ours}value.weight")

    def bottleneck(self, theirs: str, ours: str, bias: str | None) -> Iterator[Entry]:
        """A map of low rank, whose bias stands by itself here."""
        yield same(f"{theirs}.lora.0.weight", f"{ours}.down.weight")
        yield same(f"{theirs}.lora.2.weight", f"{ours}.up.weight")
        if bias is not None:
            yield same(f"{theirs}.lora.2.bias", bias)

    def close(self, theirs: str, ours: str) -> Iterator[Entry]:
        """The norm per head and the output."""
        yield same(f"{theirs}g_norm.weight", f"{ours}norm.weight")
        yield same(f"{theirs}g_norm.bias", f"{ours}norm.bias")
        yield same(f"{theirs}o_proj.weight", f"{ours}o_proj.weight")

    def config(self, config: ZooConfig) -> dict[str, Any]:
        if getattr(one_layer(config).ffn, "version", None) != self.version:
            raise ExportError(f"layers.0.ffn: has no channel mix but that of version {self.version}")
        return super().config(config)


@register_family
class FlaRWKV6(_FlaRWKV):
    """`RWKV6ForCausalLM`."""

    name = model_type = "rwkv6"
    about = "RWKV6ForCausalLM"
    mixers = ("rwkv6",)
    version = 6
    ratio = 3.5
    defaults: ClassVar = {
        "expand_k": 0.5, "expand_v": 1.0, "num_heads": 4, "proj_low_rank_dim": 32, "gate_low_rank_dim": 64,
    }  # fmt: skip

    def mixer(self, c: dict[str, Any]) -> dict[str, Any]:
        heads, width = c["num_heads"], c["hidden_size"]
        return {
            "name": "rwkv6",
            "num_heads": heads,
            "head_dim": round(c["expand_k"] * width) // heads,
            "value_head_dim": round(c["expand_v"] * width) // heads,
            "shift_rank": c["proj_low_rank_dim"],
            "decay_rank": c["gate_low_rank_dim"],
            "norm_eps": c["norm_eps"],
        }

    def mixer_entries(self, theirs: str, ours: str, options: Any, i: int, width: int) -> Iterator[Entry]:
        R = options.shift_rank
        yield same(f"{theirs}x_proj.0.mu", f"{ours}shift_x")
        yield mapped(
            f"{theirs}x_proj.0.linear.weight",
            f"{ours}shift_down.weight",
            lambda t: t.unflatten(0, (5, R))[_TO_OURS].flatten(0, 1),
            lambda t: t.unflatten(0, (5, R))[_TO_THEIRS].flatten(0, 1),
        )
        yield mapped(
            f"{theirs}x_proj.2.weight",
            f"{ours}shift_up_MRD",
            lambda t: t.unflatten(1, (5, R))[:, _TO_OURS].permute(1, 2, 0).contiguous(),
            lambda t: t.permute(2, 0, 1)[:, _TO_THEIRS].flatten(1),
        )
        yield mapped(f"{theirs}x_bias", f"{ours}shift_MD", lambda t: t[_TO_OURS], lambda t: t[_TO_THEIRS])
        for name, mine in {"r": "q", "k": "k", "v": "v", "g": "g"}.items():
            yield same(f"{theirs}{name}_proj.linear.weight", f"{ours}{mine}_proj.weight")
        yield from self.bottleneck(f"{theirs}w_proj.linear", f"{ours}decay_proj", f"{ours}decay_bias")
        yield same(f"{theirs}bonus", f"{ours}bonus_GK")
        yield from self.close(theirs, ours)

    def mixer_config(self, options: Any, width: int) -> dict[str, Any]:
        return {
            "expand_k": ratio(options.num_heads * options.head_dim, width),
            "expand_v": ratio(options.num_heads * options.value_dim, width),
            "num_heads": options.num_heads,
            "proj_low_rank_dim": options.shift_rank,
            "gate_low_rank_dim": options.decay_rank,
        }


@register_family
class FlaRWKV7(_FlaRWKV):
    """`RWKV7ForCausalLM`."""

    name = model_type = "rwkv7"
    about = "RWKV7ForCausalLM"
    mixers = ("rwkv7",)
    version = 7
    defaults: ClassVar = {
        "head_dim": 64, "num_heads": None, "decay_low_rank_dim": 64, "gate_low_rank_dim": 128, "a_low_rank_dim": 64,
        "v_low_rank_dim": 16, "value_dim": None,
    }  # fmt: skip

    def mixer(self, c: dict[str, Any]) -> dict[str, Any]:
        width = c["hidden_size"]
        values = c["value_dim"] if isinstance(c["value_dim"], list) else [c["value_dim"] or width]
        if set(values) != {width}:
            raise CheckpointError(f"value_dim is {c['value_dim']!r}; only the model's width can be expressed")
        size = c["head_dim"] or width // c["num_heads"]
        return {
            "name": "rwkv7",
            "num_heads": width // size,
            "head_dim": size,
            "decay_rank": c["decay_low_rank_dim"],
            "rate_rank": c["a_low_rank_dim"],
            "value_rank": c["v_low_rank_dim"],
            "gate_rank": c["gate_low_rank_dim"],
            "norm_eps": size * c["norm_eps"],
        }

    def mixer_entries(self, theirs: str, ours: str, options: Any, i: int, width: int) -> Iterator[Entry]:
        yield rows([f"{theirs}x_{use}" for use in "rwkvag"], f"{ours}shift_MD", (1, 1, width))
        for name, mine in {"r": "q", "k": "k", "v": "v"}.items():
            yield same(f"{theirs}{name}_proj.weight", f"{ours}{mine}_proj.weight")
        yield from self.bottleneck(f"{theirs}w_lora", f"{ours}decay_proj", f"{ours}decay_bias")
        yield from self.bottleneck(f"{theirs}a_lora", f"{ours}a_proj", f"{ours}a_bias")
        yield from self.bottleneck(f"{theirs}g_lora", f"{ours}g_proj", None)
        values = self.bottleneck(f"{theirs}v_lora", f"{ours}residual_proj", f"{ours}residual_bias")
        yield from values if i else (initial(entry.ours[0]) for entry in values)
        keys, heads = (options.num_heads * options.head_dim,), (options.num_heads, options.head_dim)
        yield shaped(f"{theirs}k_k", f"{ours}removal_GK", keys, heads)
        yield shaped(f"{theirs}k_a", f"{ours}rate_share_GK", keys, heads)
        yield same(f"{theirs}r_k", f"{ours}bonus_HK")
        yield from self.close(theirs, ours)

    def mixer_config(self, options: Any, width: int) -> dict[str, Any]:
        return {
            "head_dim": options.head_dim,
            "num_heads": options.num_heads,
            "decay_low_rank_dim": options.decay_rank,
            "gate_low_rank_dim": options.gate_rank,
            "a_low_rank_dim": options.rate_rank,
            "v_low_rank_dim": options.value_rank,
            "value_dim": options.num_heads * options.value_dim,
        }
