"""Mixture of experts: a router sends each token to a few of many MLPs (Shazeer et al. 2017, arXiv:1701.06538).

    y_t = shared(x_t) + sum over the chosen e of weight_te expert_e(x_t)      scores_t = softmax or sigmoid of W_r x_t

One layer, told apart by its options:

    GShard (Lepikhin et al. 2020, 2006.16668)     top_k 2, capacity_factor 1.0, priority choice, random_second
    Switch (Fedus et al. 2021, 2101.03961)        top_k 1, normalize false, capacity_factor 1.25, jitter 0.01
    Mixtral (Jiang et al. 2024, 2401.04088)       top_k 2, normalize true: the softmax over the chosen two
    DeepSeekMoE (Dai et al. 2024, 2401.06066)     many small experts, top_k 6, normalize false, shared experts
    Qwen2-MoE (2024, 2407.10671)                  the same, the shared expert behind a sigmoid gate
    OLMoE (Muennighoff et al. 2024, 2409.02060)   64 experts, top_k 8, normalize false, z_loss 0.001
    DeepSeek-V3 (2024, 2412.19437)                sigmoid scores, groups of experts, scale 2.5, bias_rate 0.001
    expert choice (Zhou et al. 2022, 2202.09368)  chooser experts: each takes its share of the tokens; encoders only
    MoEfication (Zhang et al. 2021, 2110.01786)   scores one: the chosen parts of a dense MLP simply add up

Dropless (Gale et al. 2022) unless a capacity is set. A token that found no place passes through: its output is zero
here and the residual carries it on. Expert choice, and places given by `choice` or by `score`, depend on the whole
sequence: such a layer is not causal (`causal` is False) where that holds in evaluation too.

Load: `balance_loss` and `z_loss` are added to the loss of the model in training (see `routing`). `bias_rate` balances
without a loss (Wang et al. 2024, 2408.15664): a bias per expert takes part in the choice, but not in the weights, and
after each step moves by `bias_rate` up for experts that had less than their share and down for the others. It is a
buffer, saved with the weights. `after_step` does the move: zoo's training loop calls it; a loop of your own needs
`optimizer.register_step_post_hook(lambda *_: model.model.after_step())`.

The router computes in its weights' precision, not in autocast's, and its scores are float32 at least. Linear layers are
modules, except the experts themselves: see `experts`.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from transformers import initialization as init
from transformers.activations import ACT2FN

from zoo.config import FFNOptions
from zoo.errors import TraitError, did_you_mean
from zoo.ffn import routing
from zoo.ffn.base import ChannelMixer
from zoo.ffn.experts import Experts, cut_normal
from zoo.ffn.mlp import MLP, GatedMLP
from zoo.linear import Linear
from zoo.mixers.base import State, refuse_segments_with_state
from zoo.ops.decisions import decided, recomputing
from zoo.registry import register_ffn


class MoEConfig(FFNOptions):
    """Options of `moe`.

    hidden_size: inner width of one expert; shared_size: that of the shared experts together. chooser: `tokens` take
    their top_k experts, or `experts` take their share of the tokens, top_k of them a token on average. capacity: places
    of an expert in each sequence, always; capacity_factor: in training only, times an even share of the sequence (in
    evaluation nothing is dropped, so that decoding needs no length). priority: who gets the places, the tokens in their
    order with all their choices (`position`), all first choices before the second ones (`choice`), or that with the
    tokens of the highest score first (`score`). random_second: in training the second of two experts is kept with
    probability 2 weight_2. jitter: the router's input is multiplied by 1 +- jitter in training. balance_loss, z_loss:
    weights of the losses; balance_first: the former counts first choices only. init_scale: see `Experts`.
    """

    name: Literal["moe"] = "moe"
    num_experts: int = Field(ge=1, le=1 << 14)
    hidden_size: int = Field(ge=1, le=1 << 20)
    top_k: int = Field(2, ge=1, le=1 << 14)
    gated: bool = True
    activation: str = "silu"
    bias: bool = False
    scores: Literal["softmax", "sigmoid", "one"] = "softmax"
    normalize: bool = True
    scale: float = Field(1.0, gt=0, le=1e4)
    groups: int = Field(1, ge=1, le=1 << 14)
    top_groups: int = Field(1, ge=1, le=1 << 14)
    chooser: Literal["tokens", "experts"] = "tokens"
    capacity: int | None = Field(None, ge=1, le=1 << 27)
    capacity_factor: float | None = Field(None, gt=0, le=1e4)
    priority: Literal["position", "choice", "score"] = "position"
    random_second: bool = False
    balance_first: bool = False
    jitter: float = Field(0.0, ge=0, lt=1)
    router_bias: bool = False
    shared_size: int | None = Field(None, ge=1, le=1 << 20)
    shared_gate: bool = False
    balance_loss: float = Field(0.0, ge=0, le=1e4)
    z_loss: float = Field(0.0, ge=0, le=1e4)
    bias_rate: float = Field(0.0, ge=0, le=1)
    init_scale: float | None = Field(None, gt=0, le=1e4)

    @field_validator("activation")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ACT2FN:
            raise ValueError(f"unknown activation {value!r}{did_you_mean(value, ACT2FN)}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        E, size = self.num_experts, self.num_experts // self.groups
        if self.top_k > E:
            raise ValueError(f"top_k ({self.top_k}) is more than num_experts ({E})")
        if E % self.groups:
            raise ValueError(f"num_experts ({E}) is not a multiple of groups ({self.groups})")
        if self.top_groups > self.groups or self.top_k > self.top_groups * size:
            raise ValueError(
                f"top_k ({self.top_k}) experts out of top_groups ({self.top_groups}) of groups ({self.groups}) with "
                f"{size} each cannot be chosen"
            )
        if self.shared_gate and self.shared_size is None:
            raise ValueError("shared_gate without shared_size: there is no shared expert")
        if self.capacity is not None and self.capacity_factor is not None:
            raise ValueError(
                f"capacity ({self.capacity}) and capacity_factor ({self.capacity_factor}) exclude each other"
            )
        if self.priority != "position" and self.capacity is None and self.capacity_factor is None:
            raise ValueError(f"priority ({self.priority!r}) without capacity or capacity_factor: nothing is scarce")
        if self.random_second and (self.top_k != 2 or not self.normalize or self.scores == "one"):
            raise ValueError("random_second needs top_k 2, normalize, and scores that weigh")
        if self.chooser == "experts":
            unused = {
                "capacity": self.capacity, "capacity_factor": self.capacity_factor, "balance_loss": self.balance_loss,
                "bias_rate": self.bias_rate, "groups": self.groups > 1, "scores": self.scores == "one",
                "random_second": self.random_second,
            }  # fmt: skip
            if wrong := [key for key, value in unused.items() if value]:
                raise ValueError(f"{wrong[0]} has no meaning with chooser: experts, whose load is even by itself")
        return self


@register_ffn("moe")
class MoE(ChannelMixer):
    """A mixture of experts; see the module docstring. (B, L, D) -> (B, L, D)."""

    Config = MoEConfig
    keep_float32 = ("balance_E",)
    balance_E: Tensor

    def __init__(self, config: MoEConfig, width: int) -> None:
        super().__init__()
        c = self.config = config
        shape: dict[str, Any] = {"activation": c.activation, "bias": c.bias}
        self.router = Linear(width, c.num_experts, bias=c.router_bias)
        self.experts = Experts(c.num_experts, width, c.hidden_size, gated=c.gated, init_scale=c.init_scale, **shape)
        if c.shared_size is not None:
            dense: Any = GatedMLP if c.gated else MLP
            self.shared = dense(dense.Config(hidden_size=c.shared_size, **shape), width)
        if c.shared_gate:
            self.shared_gate = Linear(width, 1, bias=False)
        if c.bias_rate:
            self.register_buffer("balance_E", torch.zeros(c.num_experts))
        self._load_E: Tensor | None = None  # choices since the last step; not a buffer, for DDP overwrites those
        self.reset_parameters(0.02)

    @property
    def causal(self) -> bool:
        """Whether no token's output depends on a later token."""
        c = self.config
        return c.chooser == "tokens" and (c.capacity is None or c.priority == "position")

    @property
    def not_causal(self) -> str:
        """The option because of which `causal` is False, for messages."""
        return "chooser: experts" if self.config.chooser == "experts" else f"priority: {self.config.priority}"

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        refuse_segments_with_state(segments_BL, state)
        if state is not None and not self.causal:
            raise TraitError(f"{self.not_causal} looks at a whole sequence at once, so there is no state to carry")
        if mask_BL is not None:  # whatever stands in the padding, nothing of it gets any further
            x_BLD = x_BLD.masked_fill(~mask_BL[..., None], 0)
        logits_BLE = self.logits(x_BLD)
        pairs, after = self._route(logits_BLE, mask_BL, segments_BL, state)
        y_BLD = self.experts(x_BLD.flatten(0, 1), pairs).view(x_BLD.shape)
        if self.config.shared_size is not None:
            shared_BLD = self.shared(x_BLD)
            if self.config.shared_gate:
                shared_BLD = self.shared_gate(x_BLD).sigmoid() * shared_BLD
            y_BLD = y_BLD + shared_BLD
        return y_BLD.to(x_BLD.dtype), after

    def logits(self, x_BLD: Tensor) -> Tensor:
        """What the router says of each expert: (B, L, E), float32 or the model's float64."""
        if self.training and self.config.jitter:
            noise = torch.empty_like(x_BLD).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
            x_BLD = x_BLD * noise
        with torch.autocast(x_BLD.device.type, enabled=False):
            logits_BLE = self.router(x_BLD.to(self.router.weight.dtype))
        return logits_BLE.to(torch.promote_types(logits_BLE.dtype, torch.float32))

    def _route(
        self, logits_BLE: Tensor, mask_BL: Tensor | None, segments_BL: Tensor | None, state: State | None
    ) -> tuple[routing.Pairs, State | None]:
        """Who goes where, and the new state; sets the loss and counts the load."""
        c = self.config
        scores_BLE = routing.scores_of(logits_BLE, c.scores)
        after = None if state is None else State({}, state.length + logits_BLE.shape[1])
        if c.chooser == "experts":
            self._note(logits_BLE, scores_BLE, None, mask_BL)
            return routing.choose_tokens(scores_BLE, c.top_k, mask_BL=mask_BL, segments_BL=segments_BL), after
        choice_BLE = scores_BLE.detach() + self.balance_E if c.bias_rate else scores_BLE.detach()
        experts_BLK = decided(lambda: routing.choose_experts(choice_BLE, c.top_k, c.groups, c.top_groups))
        self._note(logits_BLE, scores_BLE, experts_BLK, mask_BL)
        weights_BLK = routing.chosen_weights(scores_BLE, experts_BLK, c.scores, c.normalize, c.scale)
        kept_BLK = None if mask_BL is None else mask_BL[..., None].expand_as(experts_BLK)
        if c.random_second and self.training:
            second_BL1 = 2 * weights_BLK[..., 1:].detach() / c.scale > torch.rand_like(weights_BLK[..., 1:])
            stays_BLK = decided(lambda: torch.cat([torch.ones_like(second_BL1), second_BL1], -1))
            kept_BLK = stays_BLK if kept_BLK is None else kept_BLK & stays_BLK
        limit: Tensor | int | None = c.capacity
        if c.capacity_factor is not None and self.training:
            tokens_BL = routing.sequence_lengths(logits_BLE, mask_BL, segments_BL)
            limit = routing.capacity_of(c.capacity_factor, c.top_k, c.num_experts, tokens_BL)
        if limit is not None:
            wanted_BLK = experts_BLK if kept_BLK is None else experts_BLK.masked_fill(~kept_BLK, c.num_experts)
            fits_BLK = self._places(wanted_BLK, limit, scores_BLE, mask_BL, segments_BL, state, after)
            kept_BLK = fits_BLK if kept_BLK is None else kept_BLK & fits_BLK
        return routing.token_pairs(weights_BLK, experts_BLK, kept_BLK, c.num_experts), after

    def _places(
        self,
        experts_BLK: Tensor,
        limit: Tensor | int,
        scores_BLE: Tensor,
        mask_BL: Tensor | None,
        segments_BL: Tensor | None,
        state: State | None,
        after: State | None,
    ) -> Tensor:
        """Which choices find a place (B, L, K); notes in `after` the places taken."""
        c, context = self.config, {"mask_BL": mask_BL, "segments_BL": segments_BL}
        if c.priority != "position":
            best_BL = decided(lambda: scores_BLE.detach().amax(-1)) if c.priority == "score" else None
            return routing.within_capacity_by_rank(experts_BLK, c.num_experts, limit, score_BL=best_BL, **context)
        taken_BE = None if state is None or c.capacity is None else state["taken"]
        fits_BLK, after_BE = routing.within_capacity(experts_BLK, c.num_experts, limit, taken_BE=taken_BE, **context)
        if after is not None and c.capacity is not None:
            after.tensors["taken"] = after_BE
        return fits_BLK

    def _note(self, logits_BLE: Tensor, scores_BLE: Tensor, experts_BLK: Tensor | None, mask_BL: Tensor | None) -> None:
        """In training: the loss of the last forward, and the load since the last step."""
        c, loss = self.config, None
        self.auxiliary_loss = None
        if not self.training:
            return
        if c.z_loss:
            loss = c.z_loss * routing.z_loss(logits_BLE, mask_BL)
        if experts_BLK is not None and (c.balance_loss or c.bias_rate):
            if c.balance_loss:
                counted_BLK = experts_BLK[..., :1] if c.balance_first else experts_BLK
                counted_BLE = routing.chosen(counted_BLK, c.num_experts, mask_BL)
                p_BLE = logits_BLE.softmax(-1) if c.scores == "one" else scores_BLE
                p_BLE = p_BLE / p_BLE.sum(-1, keepdim=True) if c.scores == "sigmoid" else p_BLE
                balance = c.balance_loss * routing.balance_loss(p_BLE, counted_BLE, mask_BL)
                loss = balance if loss is None else loss + balance
            if c.bias_rate and self.router.weight.requires_grad and not recomputing():
                load_E = routing.chosen(experts_BLK, c.num_experts, mask_BL).sum((0, 1))
                self._load_E = load_E if self._load_E is None else self._load_E + load_E
        self.auxiliary_loss = loss

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the balancing bias by the load since the last step, that of all processes together."""
        if self._load_E is None:
            return
        load_E, self._load_E = self._load_E.float(), None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load_E)
        if self.balance_E.dtype != torch.float32:  # after model.to(bfloat16), where small steps are lost
            self.balance_E = self.balance_E.float()
        self.balance_E += self.config.bias_rate * (load_E.mean() - load_E).sign()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Nothing; with a `capacity` the places taken, (B, E)."""
        if self.config.capacity is None:
            return State()
        device = device or self.router.weight.device
        return State({"taken": torch.zeros(batch_size, self.config.num_experts, dtype=torch.long, device=device)})

    def reset_parameters(self, std: float) -> None:
        """The router as the experts: as the model's other projections, or by fan-in; the balancing bias zero."""
        if self.config.init_scale is not None:
            cut_normal(self.router.weight, self.config.init_scale, self.router.in_features)
        if self.config.bias_rate:
            init.zeros_(self.balance_E)

    @property
    def flops_per_token(self) -> int:
        """Of the products for one token: how many tokens an expert gets depends on numbers, their sum does not."""
        dense = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        maps = sum(p.numel() for p in self.experts.parameters() if p.dim() == 3)
        return 2 * (dense + maps * self.config.top_k // self.config.num_experts)

    def stacked_weights(self) -> tuple[int, int]:
        total = sum(p.numel() for p in self.experts.parameters())
        return total, total * self.config.top_k // self.config.num_experts
