"""Early exit: a token leaves the model at the first layer whose head is sure enough.

    h_i = norm_i(x_i),  p_i = softmax(W h_i)      for the chosen layers i; W is the vocabulary of the model
    a token leaves after the first i with c(p_i) >= threshold, where c is its largest probability ("max"),
    the difference of the two largest ("margin", Schuster et al. 2022, CALM, arXiv 2207.07061), or, with
    entropy(p_i) <= threshold, "entropy" (Teerapittayanon et al. 2016, BranchyNet, arXiv 1709.01686)

Each head has a norm of its own, or with `own_norms: false` the model's last one, as in LayerSkip (Elhoushi et al. 2024,
arXiv 2404.16710). In training mode every token takes all layers and the loss is the mean over the heads and the last
layer, weighted with their depth: w_i = i / sum_j j, i counted from 1 (CALM).

In evaluation mode each position decides for itself, in a prompt too, so that any split of a text gives the same. The
layers above still need a state at that position, for later tokens that go deeper: they are given the state in which it
left, as CALM does. Where every row has left, the layers above only do that: no channel mixer runs, and without a cache
nothing at all. A `threshold` of null takes all layers: then the model is the dense one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from zoo.config import ExitOptions, ModelSpec
from zoo.ffn.base import ChannelMixer
from zoo.mixers.base import State
from zoo.models.backbone import Block, make_norm
from zoo.models.shared import set_config


@dataclass
class ExitOutput(CausalLMOutputWithPast):
    """Also `layers_used` (B, L): after how many layers each position left; None where all are taken."""

    layers_used: Tensor | None = None


class EarlyExits(nn.Module):
    """The heads of a model's early exits, and what they decided.

    counts: how many next tokens were predicted after 0, 1, 2, ... layers since the last `reset`: one for each row of
    each forward in evaluation mode, so of a `generate` one for each step.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.exits is not None
        self.options: ExitOptions = spec.exits
        self.depth = len(spec.layers)
        self.threshold = self.options.threshold
        own = {str(i): make_norm(spec, spec.stack_size) for i in self.options.layers} if self.options.own_norms else {}
        self.norms = nn.ModuleDict(own)
        self.reset()

    def reset(self) -> None:
        """Forget the counts."""
        self.counts = [0] * (self.depth + 1)

    @property
    def mean_layers(self) -> float:
        """The mean number of layers behind a predicted token; nan before the first."""
        total = sum(self.counts)
        return sum(n * count for n, count in enumerate(self.counts)) / total if total else float("nan")

    def head(self, i: int, x_BLD: Tensor, last_norm: nn.Module | None) -> Tensor:
        """What the vocabulary reads after layer i."""
        norm = self.norms[str(i)] if self.options.own_norms else last_norm
        return x_BLD if norm is None else norm(x_BLD)

    def sure(self, logits_BLV: Tensor) -> Tensor:
        """Where these logits are sure enough; (B, L)."""
        assert self.threshold is not None
        log_BLV = logits_BLV.float().log_softmax(-1)
        if self.options.confidence == "entropy":
            return -(log_BLV.exp() * log_BLV).sum(-1) <= self.threshold
        if self.options.confidence == "max":
            return log_BLV.amax(-1).exp() >= self.threshold
        two_BL2 = log_BLV.topk(2).values.exp()
        return two_BL2[..., 0] - two_BL2[..., 1] >= self.threshold

    def start(self, model: Any) -> ExitPass | None:
        """What runs the blocks of one pass; None where the pass is the dense one."""
        return ExitPass(self, model) if self.training or self.threshold is not None else None

    def weights(self) -> list[float]:
        """The weights of the losses after the chosen layers and at the end."""
        depths = [i + 1 for i in self.options.layers] + [self.depth]
        return [depth / sum(depths) for depth in depths]


def add_exits(model: Any, layers: list[int], **options: Any) -> Any:
    """A copy of a causal language model that tokens may leave after `layers`; `options` are the others of `exits`.

    Each new norm starts as the model's last one. Without a threshold the copy computes what the model computes.
    """
    new, config = copy.deepcopy(model), copy.deepcopy(model.config)
    config.exits = {"layers": layers, **options}
    config.exits = config.spec.plain()["exits"]
    new.exits = EarlyExits(config.spec)
    for norm in new.exits.norms.values():
        if new.model.norm is not None:
            norm.load_state_dict(new.model.norm.state_dict())
    weight = next(model.parameters())
    new.exits.to(weight.device, weight.dtype).train(model.training)
    set_config(new, config)
    return new


class ExitPass:
    """One pass through the layers: runs each block for the tokens that are still in it."""

    def __init__(self, exits: EarlyExits, model: Any) -> None:
        self.exits, self.model = exits, model
        self.taken: list[Tensor] = []  # in training, what the heads read
        self.head_BLD: Tensor | None = None
        self.gone_BL: Tensor | None = None
        self.used_BL: Tensor | None = None
        self.all_gone = False

    def __call__(
        self,
        i: int,
        block: Block,
        x_BLD: Tensor,
        mask_BL: Tensor | None,
        segments_BL: Tensor | None,
        state: State | None,
        shared: dict[str, Tensor],
    ) -> tuple[Tensor, State | None]:
        """Layer i. A token that has left keeps its state, which the layer takes into its own."""
        if self.all_gone:
            return x_BLD, None if state is None else absorb(block, x_BLD, mask_BL, segments_BL, state, shared)
        y_BLD, state = block(x_BLD, mask_BL, segments_BL, state, shared)
        if self.gone_BL is not None:
            y_BLD = torch.where(self.gone_BL[..., None], x_BLD, y_BLD)
        if i in self.exits.options.layers:
            head_BLD = self.exits.head(i, y_BLD, self.model.model.norm)
            if self.exits.training:
                self.taken.append(head_BLD)
            else:
                self._leave(i, head_BLD, mask_BL)
        return y_BLD, state

    def _leave(self, i: int, head_BLD: Tensor, mask_BL: Tensor | None) -> None:
        sure_BL = self.exits.sure(self.model.lm_head(head_BLD))
        if self.gone_BL is None or self.head_BLD is None or self.used_BL is None:
            self.gone_BL, self.head_BLD = torch.zeros_like(sure_BL), torch.zeros_like(head_BLD)
            self.used_BL = torch.full(sure_BL.shape, self.exits.depth, device=sure_BL.device)
        new_BL = sure_BL & ~self.gone_BL
        self.gone_BL = self.gone_BL | new_BL
        self.head_BLD = torch.where(new_BL[..., None], head_BLD, self.head_BLD)
        self.used_BL = self.used_BL.masked_fill(new_BL, i + 1)
        if torch.compiler.is_exporting():
            return  # a graph has no branches: every layer is computed, and its output not taken
        self.all_gone = bool((self.gone_BL if mask_BL is None else self.gone_BL | ~mask_BL).all())

    def finish(self, last_BLD: Tensor) -> Tensor:
        """What the vocabulary reads: of each token where it left."""
        if self.exits.training or self.gone_BL is None or self.head_BLD is None or self.used_BL is None:
            return last_BLD
        if not torch.compiler.is_exporting():
            for layers in self.used_BL[:, -1].tolist():
                self.exits.counts[layers] += 1
        return torch.where(self.gone_BL[..., None], self.head_BLD, last_BLD)

    def loss(self, last: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The weighted mean of the loss at the end and those after the chosen layers; `loss_of` takes logits."""
        *early, end = self.exits.weights()
        total = end * last
        for weight, head_BLD in zip(early, self.taken, strict=True):
            total = total + weight * loss_of(self.model.lm_head(head_BLD))
        return total


def absorb(
    block: Block,
    x_BLD: Tensor,
    mask_BL: Tensor | None,
    segments_BL: Tensor | None,
    state: State,
    shared: dict[str, Tensor],
) -> State | None:
    """The state of a block after positions of which nobody needs the output."""
    if type(block) is not Block or isinstance(block.ffn, ChannelMixer):
        return block(x_BLD, mask_BL, segments_BL, state, shared)[1]
    u_BLD = x_BLD if block.order in ("post_norm", "output_norm") else block.mixer_norm(x_BLD)
    extra = {"shared": shared} if block.mixer.shares else {}
    return block.mixer(u_BLD, mask_BL=mask_BL, segments_BL=segments_BL, state=state, **extra)[1]
