"""RWKV's channel mix, a squared-ReLU MLP that sees the token before.

    k = W_k (x + (x_before - x) * mu_k)          out = sigmoid(W_r (x + (x_before - x) * mu_r)) * W_v relu(k)^2

RWKV-4 (Peng et al. 2023, arXiv 2305.13048) and RWKV-6 (2024, arXiv 2404.05892) have the gate r, RWKV-7 (2025, arXiv
2503.14456) has none. mu are the shares of the previous token; in version 4 the parameters are those of the present
one, 1 - mu, as published. The state is the last input.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import FFNOptions
from zoo.ffn.base import ChannelMixer
from zoo.linear import Linear
from zoo.mixers.base import State, admit
from zoo.mixers.rwkv import depth, ramp
from zoo.ops.shift import token_shift
from zoo.registry import register_ffn


class RWKVChannelMixConfig(FFNOptions):
    """Options of `rwkv_channel_mix`.

    version: of RWKV; 7 has no gate, and each has an initialisation of its own. hidden_size: None is that of the
    published models, 4 times the width (3.5 times in version 6, rounded down to a multiple of 32).
    """

    name: Literal["rwkv_channel_mix"] = "rwkv_channel_mix"
    version: Literal[4, 6, 7]
    hidden_size: int | None = Field(None, ge=1, le=1 << 20)

    def resolved(self, width: int) -> Self:
        """With the published size written out."""
        usual = max(32, int(3.5 * width) // 32 * 32) if self.version == 6 else 4 * width
        return self.model_copy(update={"hidden_size": self.hidden_size or usual})


@register_ffn("rwkv_channel_mix")
class RWKVChannelMix(ChannelMixer):
    """The channel mix of RWKV-4, -6 and -7; see the module docstring."""

    Config = RWKVChannelMixConfig

    def __init__(self, config: RWKVChannelMixConfig, width: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        hidden: Any = config.resolved(width).hidden_size
        self.shift_k = nn.Parameter(torch.empty(width))
        self.key = Linear(width, hidden, bias=False)
        self.value = Linear(hidden, width, bias=False)
        if config.version != 7:
            self.shift_r = nn.Parameter(torch.empty(width))
            self.receptance = Linear(width, width, bias=False)
        self.reset_parameters(0.02)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        x_BLD = admit(x_BLD, mask_BL, segments_BL, state)
        initial = None if state is None else state["shift"]
        shifted_BLD, last_BD = token_shift(
            x_BLD, initial=initial, final=state is not None, mask_BL=mask_BL, segments_BL=segments_BL
        )
        if self.config.version == 4:  # whose shares are those of the present token
            x_BLD, shifted_BLD = shifted_BLD, x_BLD
        delta_BLD = shifted_BLD - x_BLD
        hidden_BLE = self.key(torch.addcmul(x_BLD, delta_BLD, self.shift_k.to(x_BLD.dtype))).relu().square()
        out_BLD = self.value(hidden_BLE)
        if self.config.version != 7:
            gate_BLD = self.receptance(torch.addcmul(x_BLD, delta_BLD, self.shift_r.to(x_BLD.dtype))).sigmoid()
            out_BLD = gate_BLD * out_BLD
        if state is None or last_BD is None:
            return out_BLD, None
        return out_BLD, State({"shift": last_BD}, state.length + x_BLD.shape[1])

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        device, dtype = device or self.key.weight.device, dtype or self.key.weight.dtype
        return State({"shift": torch.zeros(batch_size, self.width, device=device, dtype=dtype)})

    def reset_parameters(self, std: float) -> None:
        """As in the authors' code, whatever `std`: shifts by depth, W_v and W_r zero, W_k orthogonal."""
        version, up = self.config.version, depth(self.place)[1]
        present_D = ramp(self.width) ** (up ** {4: 1, 6: 3, 7: 4}[version])
        share_D = present_D if version == 4 else 1 - present_D
        init.copy_(self.shift_k, share_D)
        init.orthogonal_(
            self.key.weight, gain=max(1.0, self.key.out_features / self.width) ** 0.5 if version == 4 else 1.0
        )
        init.zeros_(self.value.weight)
        if version != 7:
            init.copy_(self.shift_r, share_D)
            init.zeros_(self.receptance.weight)
