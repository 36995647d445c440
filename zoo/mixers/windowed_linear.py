"""A linear mixer beside a sliding window with sinks, mixed by a learned gate per head.

    y_h = (1 - g_h) * window_h + g_h * linear_h,    g_h = sigmoid(b_h [+ w_h . x_t]),    b_h = -4, w_h = 0 at the start

Both branches read the same queries, keys and values and share the output projection (the arrangement of LoLCATs,
Zhang et al. 2024, arXiv 2410.10254, and Liger, Lan et al. 2025, arXiv 2503.01496; theirs share one softmax
denominator or mix half and half, which spoils an untrained student). With b = -4 the untrained student is the window,
whose weights are those of attention, and the linear branch adds 1.8 % of its output. With `mix_gate: token` a head also
looks at the token before it chooses: recall then learns to read the state where something is asked for, and only there.

A branch that does not average values (all but linear attention) has no scale of its own, so it is normalised per head
and given a learned gain that starts at the scale of attention's outputs. The delta rule can do without
(`branch_norm: false`): its state answers unit queries with values, and with little where it knows no answer, which a
norm would blow up. The branch may be given only what the window no longer sees (`older_only`): its keys and values are
then delayed by the window, and its share is zero while there are none.

`ablate`, a plain attribute, is None, "linear" or "window": that branch gives nothing and the other has full weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import MixerOptions
from zoo.errors import ConfigError, did_you_mean
from zoo.linear import Linear
from zoo.mixers.base import AttentionStats, AttentionWeights, Traits
from zoo.mixers.qkv import Inputs, QKVMixer, QKVOptions, output_rms
from zoo.mixers.sliding_window import Joined, SlidingWindow, SlidingWindowConfig
from zoo.ops.padding import right_align, segment_runs, take
from zoo.registry import list_mixers, mixer_class, register_mixer

BRANCH_EPS = 1e-6
# What the whole mixer has once and its linear branch therefore must not set. The scale is each branch's own.
_SHARED = (set(QKVOptions.model_fields) - {"name", "scale"}) | {"num_groups"}
_NONE_OF_ITS_OWN = {"rotary": None, "conv": None, "gate": False, "head_norm": False}


class WindowedLinearConfig(QKVOptions):
    """Options of `windowed_linear`.

    linear: the name of the other branch and the options that only it has.
    mix_gate: one gate for each head ("head"), or one that also sees the token ("token").
    branch_norm: whether a branch that does not average values is normalised per head.
    """

    name: Literal["windowed_linear"] = "windowed_linear"
    linear: dict[str, Any]
    window: int = Field(64, ge=1, le=1 << 24)
    sinks: int = Field(4, ge=0, le=1024)
    mix_gate: Literal["head", "token"] = "head"
    gate_init: float = Field(-4.0, ge=-30, le=30)
    branch_norm: bool = True
    older_only: bool = False

    @model_validator(mode="after")
    def _branches_fit(self) -> WindowedLinearConfig:
        if self.older_only and not self.causal:
            raise ValueError("older_only needs a past, so causal must be true")
        self.linear_options()
        return self

    def linear_options(self) -> QKVOptions:
        """The linear branch's own config."""
        cls = linear_class(self.linear)
        for key in self.linear:
            if key in _SHARED:
                raise ValueError(f"linear.{key}: belongs to the mixer itself, not to its branch")
        shape = {
            key: getattr(self, key) for key in ("num_heads", "num_kv_heads", "head_dim", "value_head_dim", "causal")
        }
        return cast(QKVOptions, cls.Config.parse({**self.linear, **shape, **_NONE_OF_ITS_OWN}, "linear"))

    def window_options(self) -> SlidingWindowConfig:
        """The window's own config."""
        keys = ("num_heads", "num_kv_heads", "head_dim", "value_head_dim", "causal", "scale", "window", "sinks")
        return SlidingWindowConfig.parse({key: getattr(self, key) for key in keys}, "window")


def linear_class(options: dict[str, Any]) -> type[QKVMixer]:
    """The class of a linear branch. Raises ConfigError where it cannot stand beside a window."""
    name = options.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"linear: expected a mapping with 'name', got {options!r}")
    cls = mixer_class(name)
    if not _can_be_branch(cls):
        fitting = [n for n in list_mixers() if _can_be_branch(mixer_class(n))]
        raise ConfigError(
            f"linear.name: {name!r} has no recurrence to stand beside a window{did_you_mean(name, fitting)}"
        )
    return cls


def _can_be_branch(cls: type) -> bool:
    return issubclass(cls, QKVMixer) and not cls.stands_alone and cls.traits.causal and cls.traits.state == "constant"


@register_mixer("windowed_linear")
class WindowedLinear(QKVMixer):
    """A linear mixer and a sliding window, mixed by a gate per head; see the module docstring."""

    Config = WindowedLinearConfig
    traits = Traits(causal=True, bidirectional=True, state="window")
    config: WindowedLinearConfig

    def __init__(self, config: WindowedLinearConfig, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        linear = config.linear_options()
        self.window = SlidingWindow(config.window_options(), width, own_projections=False)
        self.linear = linear_class(config.linear)(linear, width, own_projections=False)
        self.needs_positions = self.window.needs_positions or self.linear.needs_positions or config.older_only
        if config.older_only:
            self.window.keep = config.window  # one more than the window needs: the key that leaves it next
        self.mix_logit_H = nn.Parameter(torch.empty(config.num_heads))
        if config.mix_gate == "token":
            self.mix_proj = Linear(width, config.num_heads, bias=False)
        if not self.linear.averages_values:
            self.gain_H = nn.Parameter(torch.empty(config.num_heads))
        self.ablate: Literal["linear", "window"] | None = None
        self.reset_parameters(0.02)

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        state = inputs.state
        tensors: dict[str, Tensor] = {}
        if state is None:
            joined = Joined(k_BGLK, v_BGLV, inputs.mask_BL, {})
            window_BHLV, _ = self.window.mix(q_BHLK, k_BGLK, v_BGLV, inputs)
        else:
            window_inputs = replace(inputs, state=state.sub("window."))
            joined = self.window.join(k_BGLK, v_BGLV, window_inputs)
            window_BHLV = self.window.attend(q_BHLK, joined, window_inputs)
            tensors = {f"window.{name}": tensor for name, tensor in joined.tensors.items()}
        inputs = inputs if state is None else replace(inputs, state=state.sub("linear."))
        any_BL = None
        if self.config.older_only:
            k_BGLK, v_BGLV, any_BL = self._older(joined, inputs, k_BGLK.shape[2])
            if any_BL is not None:
                mask_BL = any_BL if inputs.mask_BL is None else any_BL & inputs.mask_BL
                runs_BL = inputs.segments_BL
                if runs_BL is not None:  # numbered, for a whole sequence may be masked between two that share an id
                    runs_BL = segment_runs(runs_BL, inputs.mask_BL)
                inputs = replace(inputs, mask_BL=mask_BL.expand(k_BGLK.shape[0], -1), segments_BL=runs_BL)
        linear_BHLV, left = self.linear.mix(q_BHLK, k_BGLK, v_BGLV, inputs)
        tensors |= {f"linear.{name}": tensor for name, tensor in left.items()}
        return self._blend(window_BHLV, linear_BHLV, inputs.x_BLD, any_BL), tensors

    def _blend(self, window_BHLV: Tensor, linear_BHLV: Tensor, x_BLD: Tensor, any_BL: Tensor | None) -> Tensor:
        if self.ablate == "linear":
            return window_BHLV
        if not self.linear.averages_values:
            if self.config.branch_norm:
                linear_BHLV = F.rms_norm(linear_BHLV, linear_BHLV.shape[-1:], eps=BRANCH_EPS)
            linear_BHLV = linear_BHLV * self.gain_H[:, None, None].to(linear_BHLV.dtype)
        logit = self.mix_logit_H[:, None, None]
        if self.config.mix_gate == "token":
            logit = logit + self.mix_proj(x_BLD).mT[..., None]
        share = (torch.ones_like(logit) if self.ablate == "window" else logit.sigmoid()).to(window_BHLV.dtype)
        if any_BL is not None:
            share = share * any_BL[:, None, :, None]
        if self.ablate == "window":
            return linear_BHLV * share
        return torch.lerp(window_BHLV, linear_BHLV.to(window_BHLV.dtype), share)

    def _older(self, joined: Joined, inputs: Inputs, L: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """For every new position the key and value that leave its window there, and where there are any (None: all)."""
        W, (k, v) = self.config.window, (joined.k_BGSK, joined.v_BGSV)
        S = k.shape[2]
        if joined.mask_BS is None and inputs.segments_BL is None:
            missing = W - (S - L)  # carried keys are W in number, or the sequence is still shorter
            if missing <= 0:
                return k[:, :, :L], v[:, :, :L], None
            k, v = (F.pad(x, (0, 0, missing, 0))[:, :, :L] for x in (k, v))
            return k, v, (torch.arange(L, device=k.device) >= missing)[None]
        mask_BS = joined.mask_BS
        if mask_BS is None:
            mask_BS = torch.ones(k.shape[0], S, dtype=torch.bool, device=k.device)
        order_BS = right_align(mask_BS)
        rank_BL = torch.empty_like(order_BS).scatter_(1, order_BS, torch.arange(S, device=k.device).expand_as(order_BS))
        rank_BL = rank_BL[:, S - L :] - W  # where, in the aligned row, the leaving key stands
        source_BL = order_BS.gather(1, rank_BL.clamp(min=0))
        any_BL = (rank_BL >= 0) & mask_BS.gather(1, source_BL)
        if inputs.segments_BL is not None:
            runs_BL = segment_runs(inputs.segments_BL, inputs.mask_BL)
            any_BL = any_BL & (runs_BL.gather(1, source_BL) == runs_BL)
        return take(k, source_BL, 2), take(v, source_BL, 2), any_BL

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for prefix, branch in (("window.", self.window), ("linear.", self.linear)):
            made = branch.mix_state(batch_size, device, dtype)
            tensors |= {prefix + name: tensor for name, tensor in made.items()}
        return tensors

    def reset_parameters(self, std: float) -> None:
        """Gates at `gate_init`, gains so that a unit query reads a value; the linear branch as its paper does."""
        init.constant_(self.mix_logit_H, self.config.gate_init)
        if self.config.mix_gate == "token":
            init.zeros_(self.mix_proj.weight)
        if not self.linear.averages_values:
            init.constant_(self.gain_H, 1.0 if self.config.branch_norm else 1 / self.config.softmax_scale)
        self.linear.reset_parameters(std)

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        """As for attention, with the linear branch's own options from its own `config_from_attention`.

        `linear` may be a name or a mapping; options of the branch that are given there win.
        """
        linear = options.pop("linear", None)
        linear = {"name": linear} if isinstance(linear, str) else linear
        if not isinstance(linear, dict):
            raise ConfigError(f"mixer.linear: name the linear branch, such as 'gated_delta_net'; got {linear!r}")
        branch = linear_class(linear)
        if wrong := [key for key in linear if key in _SHARED]:
            raise ConfigError(f"mixer.linear.{wrong[0]}: belongs to the mixer itself, not to its branch")
        own = {k: v for k, v in linear.items() if k != "name"}
        derived = branch.config_from_attention(attention, **{**_NONE_OF_ITS_OWN, **own}).plain()
        kept = {key: value for key, value in derived.items() if key not in _SHARED}
        # A branch without gates loses nothing by seeing keys late; a gate would be read at the wrong token.
        options = {"older_only": branch.averages_values and attention.causal, **options}
        return super().config_from_attention(attention, linear=kept, **options)

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        self.linear.start_from(attention, stats)
        if not self.linear.averages_values and self.config.branch_norm:
            self.gain_H.copy_(output_rms(attention, stats))

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """A linear branch for the tests of `zoo.testing`, which cannot guess one."""
        return {"linear": {"name": "linear_attention"}, "window": 5, "sinks": 2}
