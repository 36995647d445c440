"""The experts of a mixture: many small MLPs of one shape, each computing its own tokens and no others.

    y_t = sum_e weight_te down_e(act(gate_e x_t) * up_e x_t)          over the pairs (t, e) that the router made

Pairs are sorted by expert, so that each weight takes part in one matrix product over the tokens of its expert; no token
is dropped or padded for the sake of the computation (MegaBlocks, Gale et al. 2022, arXiv:2211.15841).

Weights are stacked, one tensor (E, in, out) for all experts, not E linear modules: a checkpoint then has three tensors
a layer instead of hundreds, sharding and optimizers see large tensors, and a grouped kernel can read them. So adapters
that replace `nn.Linear` do not find them; peft reaches them by name (`target_parameters`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from zoo.ffn.routing import Pairs
from zoo.ops.grouped import grouped_linear, grouped_pair


class Experts(nn.Module):
    """E MLPs, gated or not, as stacked weights. F is the inner width of one.

    init_scale: None draws weights with the model's `initializer_range`; a number s as Switch does, from a normal with
    variance s / fan_in, cut at two deviations.
    """

    gate_EIO: Tensor
    up_EIO: Tensor
    down_EIO: Tensor

    def __init__(
        self,
        count: int,
        width: int,
        hidden_size: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        init_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.count, self.gated, self.init_scale = count, gated, init_scale
        shapes = {"gate": (width, hidden_size), "up": (width, hidden_size), "down": (hidden_size, width)}
        self.parts = [name for name in shapes if gated or name != "gate"]
        for name in self.parts:
            setattr(self, f"{name}_EIO", nn.Parameter(torch.empty(count, *shapes[name])))
            setattr(self, f"{name}_bias_EO", nn.Parameter(torch.zeros(count, shapes[name][1])) if bias else None)
        self.act = ACT2FN[activation]
        self.reset_parameters(0.02)

    def forward(self, x_ND: Tensor, pairs: Pairs) -> Tensor:
        """The weighted sum of the experts' outputs for each token, (N, D) in the dtype of the products."""
        order_P = pairs.expert_P.argsort(stable=True)
        expert_P, token_P = pairs.expert_P[order_P], pairs.token_P[order_P]
        experts_E = torch.arange(self.count, device=expert_P.device)
        ends_E = torch.searchsorted(expert_P, experts_E, right=True).int()
        expert_P = expert_P.clamp(max=self.count - 1)  # nobody's rows weigh nothing, whatever bias they get
        rows_PD = x_ND.index_select(0, token_P)
        if self.gated:
            gate_PF, up_PF = grouped_pair(rows_PD, self.gate_EIO, self.up_EIO, ends_E)
            h_PF = self.act(self._biased("gate", gate_PF, expert_P)) * self._biased("up", up_PF, expert_P)
        else:
            h_PF = self.act(self._biased("up", grouped_linear(rows_PD, self.up_EIO, ends_E), expert_P))
        y_PD = self._biased("down", grouped_linear(h_PF, self.down_EIO, ends_E), expert_P)
        y_PD = y_PD * pairs.weight_P[order_P, None]  # weights are float32 or better, and so is the sum
        return torch.zeros(x_ND.shape, dtype=y_PD.dtype, device=y_PD.device).index_add(0, token_P, y_PD)

    def _biased(self, name: str, y_PO: Tensor, expert_P: Tensor) -> Tensor:
        bias_EO = getattr(self, f"{name}_bias_EO")
        return y_PO if bias_EO is None else y_PO + bias_EO.to(y_PO.dtype).index_select(0, expert_P)

    def reset_parameters(self, std: float) -> None:
        """Normal with deviation `std`, or Switch's cut normal by fan-in; biases zero."""
        for name in self.parts:
            weight, bias = getattr(self, f"{name}_EIO"), getattr(self, f"{name}_bias_EO")
            if self.init_scale is None:
                init.normal_(weight, std=std)
            else:
                cut_normal(weight, self.init_scale, weight.shape[1])
            if bias is not None:
                init.zeros_(bias)

    def extra_repr(self) -> str:
        E, D, F = self.up_EIO.shape
        return f"{E} experts, {D} -> {F} -> {D}"


def cut_normal(weight: Tensor, scale: float, fan_in: int) -> None:
    """Fill with a normal of variance scale / fan_in, what lies beyond two deviations drawn again (Switch, sec. 2.4)."""
    std = (scale / fan_in) ** 0.5
    init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
