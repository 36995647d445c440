"""Mixture of depths: blocks that only some tokens take (Raposo et al. 2024, arXiv 2404.02258).

    r_t = w . x_t [+ b]                                a router for each such block
    x_t <- x_t + r_t f(X)_t   for the tokens with the largest r, a share `capacity` of each sequence; others pass by

f is all that the block adds to its input, mixer and channel mixer, and sees the chosen tokens X alone: they attend to
one another, in their order, and positions inside the block count them. Which tokens are the largest depends on later
ones, so a choice that is causal is learned beside it: a predictor reads x_t (no gradient flows back into it) and is
trained with a binary cross-entropy to say which ones they are. In training mode the largest are taken, in evaluation
mode those that the predictor names: a model is scored as it decodes. With `predictor: null` the router's own logits are
the prediction and get that loss (the paper's first way). `select`, a plain attribute, forces "top" or "predictor".

The chosen tokens are gathered into shorter rows, so a block costs a share of its products, and in decoding nothing
where no row takes it. The state is the block's own, of the tokens that took it. With w = 0, b = 1 and a capacity of 1
the block is the dense one: that is where a pretrained block starts from.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import DepthOptions, LayerSpec, ModelSpec
from zoo.errors import ConfigError
from zoo.linear import Linear
from zoo.mixers.base import State
from zoo.models.backbone import Block
from zoo.models.shared import add_earlier_runs
from zoo.ops.padding import segment_runs, take


@dataclass
class DepthState(State):
    """The state of a routed block: `length` counts all positions, `inner.length` those that went through the block."""

    inner: State = field(default_factory=State)

    def map(self, function: Callable[[Tensor], Tensor]) -> DepthState:
        return DepthState({}, self.length, self.inner.map(function))

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes


class RoutedBlock(Block):
    """A block that only the chosen tokens take; see the module docstring.

    `chosen_BL` is the last choice (B, L), `auxiliary_loss` the predictor's weighted loss in the last training forward.
    `as_padding` computes the block for all tokens, with those that are not chosen masked: the same at the full cost,
    but no shape depends on the choice. Graphs that leave torch are always made so.
    """

    auxiliary_loss: Tensor | None = None
    chosen_BL: Tensor | None = None
    select: Literal["top", "predictor"] | None = None
    as_padding: bool = False

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__(spec, layer)
        if spec.block == "post_norm":
            raise ConfigError("depth: a post_norm block has no residual to pass by; take block: pre_norm or parallel")
        if self.mixer.shares:
            raise ConfigError(
                f"depth: mixer {self.mixer.name!r} reads what other layers saw, so all tokens must pass it"
            )
        assert layer.depth is not None
        self.depth: DepthOptions = layer.depth
        self.router = Linear(spec.hidden_size, 1, bias=self.depth.bias)
        self.predictor: nn.Module | None = None
        if self.depth.predictor is not None:
            size = self.depth.predictor
            self.predictor = nn.Sequential(Linear(spec.hidden_size, size), nn.GELU(), Linear(size, 1))

    def forward(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None,
        segments_BL: Tensor | None,
        state: State | None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        if mask_BL is not None:
            x_BLD = x_BLD.masked_fill(~mask_BL[..., None], 0)
        score_BL = _at_least_float32(self.router(x_BLD).squeeze(-1))
        chosen_BL = self.chosen_BL = self._choose(x_BLD, score_BL, mask_BL, segments_BL, shared)
        if self.as_padding or torch.compiler.is_exporting():
            return self._masked(x_BLD, chosen_BL, score_BL, state, shared)
        count_B = chosen_BL.sum(1)
        C = int(count_B.max())
        if not isinstance(state, DepthState | None):
            raise TypeError("a routed block needs the state that its init_state made")
        inner = None if state is None else state.inner
        if C:
            index_BC = (~chosen_BL).to(torch.int8).argsort(dim=1, stable=True)[:, :C]
            real_BC = torch.arange(C, device=x_BLD.device) < count_B[:, None]
            u_BCD = take(x_BLD, index_BC, 1)
            runs_BC = None if segments_BL is None else take(segment_runs(segments_BL, mask_BL), index_BC, 1)
            padding = None if bool(real_BC.all()) else real_BC
            y_BCD, inner = super().forward(u_BCD, padding, runs_BC, inner, shared)
            added_BCD = (y_BCD - u_BCD) * take(score_BL, index_BC, 1)[..., None].to(x_BLD.dtype)
            added_BCD = added_BCD.masked_fill(~real_BC[..., None], 0).to(x_BLD.dtype)
            x_BLD = x_BLD.scatter_add(1, index_BC[..., None].expand_as(added_BCD), added_BCD)
        if state is None:
            return x_BLD, None
        assert inner is not None
        return x_BLD, DepthState({}, state.length + x_BLD.shape[1], inner)

    def _masked(
        self, x_BLD: Tensor, chosen_BL: Tensor, score_BL: Tensor, state: Any, shared: dict[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """All tokens take the block, those that are not chosen as padding."""
        y_BLD, inner = super().forward(x_BLD, chosen_BL, None, None if state is None else state.inner, shared)
        added_BLD = (y_BLD - x_BLD) * score_BL[..., None].to(x_BLD.dtype)
        x_BLD = x_BLD + added_BLD.masked_fill(~chosen_BL[..., None], 0)
        return x_BLD, None if inner is None else DepthState({}, state.length + x_BLD.shape[1], inner)

    def _choose(
        self,
        x_BLD: Tensor,
        score_BL: Tensor,
        mask_BL: Tensor | None,
        segments_BL: Tensor | None,
        shared: dict[str, Tensor] | None,
    ) -> Tensor:
        self.auxiliary_loss = None
        top = (self.select or ("top" if self.training else "predictor")) == "top"
        if top and not self.training:
            return largest_share(score_BL, self.depth.capacity, mask_BL, segments_BL)
        said_BL = score_BL
        if self.predictor is not None:
            said_BL = _at_least_float32(self.predictor(x_BLD.detach()).squeeze(-1))
        if self.training:
            top_BL = largest_share(score_BL, self.depth.capacity, mask_BL, segments_BL)
            real = slice(None) if mask_BL is None else mask_BL
            loss = F.binary_cross_entropy_with_logits(said_BL[real], top_BL[real].to(said_BL.dtype))
            self.auxiliary_loss = self.depth.loss_weight * loss
            if self.runs_as is not None and shared is not None:
                add_earlier_runs(self, f"{self.runs_as}.depth", shared)
            if top:
                return top_BL
        return said_BL > 0 if mask_BL is None else (said_BL > 0) & mask_BL

    def init_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """No token yet, of all and of those that take the block."""
        return DepthState({}, 0, super().init_state(batch_size, device=device, dtype=dtype))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def largest_share(score_BL: Tensor, capacity: float, mask_BL: Tensor | None, segments_BL: Tensor | None) -> Tensor:
    """The tokens with the largest scores, of each sequence the share `capacity`, rounded up; (B, L), True where chosen.

    With equal scores the earlier token is the larger. Masked positions are not counted and never chosen.
    """
    B, L = score_BL.shape
    score_BL, place_BL = score_BL.detach(), torch.arange(L, device=score_BL.device).expand(B, L)
    runs_BL = torch.zeros_like(place_BL) if segments_BL is None else segment_runs(segments_BL, mask_BL)
    if mask_BL is not None:  # padding is a sequence of its own, after all others
        runs_BL = runs_BL.masked_fill(~mask_BL, L)
    order_BL = score_BL.argsort(dim=1, descending=True, stable=True)
    order_BL = take(order_BL, take(runs_BL, order_BL, 1).argsort(dim=1, stable=True), 1)  # by sequence, then by score
    sizes_BR = torch.zeros(B, L + 1, dtype=torch.long, device=score_BL.device)
    sizes_BR = sizes_BR.scatter_add(1, runs_BL, torch.ones_like(runs_BL))
    starts_BR = sizes_BR.cumsum(1) - sizes_BR
    sorted_BL = take(runs_BL, order_BL, 1)
    allowed_BL = (take(sizes_BR, sorted_BL, 1) * capacity - 1e-6).ceil()
    chosen_BL = torch.zeros_like(runs_BL, dtype=torch.bool)
    chosen_BL = chosen_BL.scatter(1, order_BL, place_BL - take(starts_BR, sorted_BL, 1) < allowed_BL)
    return chosen_BL if mask_BL is None else chosen_BL & mask_BL


@torch.no_grad()
def add_routers(model: Any, *, every: int = 2, **options: Any) -> Any:
    """A copy of a model in which only some tokens take every `every`-th block; `options` are those of `depth`.

    The blocks keep their weights. The routers start near a weight of one for every token (w at its small random start,
    b = 1), so that with `capacity` 1.0 the copy is almost the model; with less it needs training. Raises ConfigError
    for wrong options, and for blocks that tokens cannot pass by.
    """
    depth = DepthOptions.parse({"bias": True, **options}, "depth")
    if not depth.bias:
        raise ConfigError("depth.bias: a pretrained block needs bias: true, so that its weight can start at one")
    config = copy.deepcopy(model.config)
    for layer in config.layers[every - 1 :: every]:
        layer["depth"] = depth.plain()
    new = type(model)(config)
    known = model.state_dict()
    wrong = [name for name in new.load_state_dict(known, strict=False).missing_keys if not _ROUTING.search(name)]
    assert not wrong, wrong
    for block in routed_blocks(new):
        block.router.bias.fill_(1.0)
    weight = next(model.parameters())
    for name, p in new.named_parameters():
        p.data = p.data.to(weight.device, known[name].dtype if name in known else weight.dtype)
    return new.train(model.training)


_ROUTING = re.compile(r"\.(router|predictor)\.")


def routed_blocks(model: Any) -> list[RoutedBlock]:
    """The blocks of a model that only some tokens take."""
    return [module for module in model.modules() if isinstance(module, RoutedBlock)]
