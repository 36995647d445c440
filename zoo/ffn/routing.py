"""Which tokens go to which experts, and what keeps the load even: functions of the router's logits, without parameters.

    token choice    each token takes the k experts with the highest scores            Shazeer et al. 2017, 1701.06538
    groups          out of the `top_groups` whose two highest scores sum to most      DeepSeek-V3, 2412.19437
    capacity        an expert takes the first so many tokens of a sequence            Fedus et al. 2021, 2101.03961
    by choice       all first choices before all second ones                          Lepikhin et al. 2020, 2006.16668
    by score        the same, tokens in the order of their highest score              Riquelme et al. 2021, 2106.05974
    random second   the second expert kept with probability 2 weight_2                Lepikhin et al. 2020, 2006.16668
    expert choice   each expert takes the k n / E tokens with the highest scores      Zhou et al. 2022, 2202.09368

    load balancing  E sum_e f_e P_e      f: choices of e a token, P: mean probability of e      Fedus et al., eq. 4
    z-loss          mean of (log sum_e exp logit_e)^2                                 Zoph et al. 2022, 2202.08906

Sequences never compete with one another: capacity and expert choice count within a sequence, so that a batch, padded or
packed, gives what its sequences give alone. Padding takes no place and counts nowhere.

Shapes: B batch, L positions, E experts, K experts a token, N = B * L tokens, P pairs of a token and an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.chunks import run_starts
from zoo.ops.decisions import decided
from zoo.ops.padding import invert
from zoo.ops.positions import token_positions


@dataclass(frozen=True)
class Pairs:
    """Who computes what: token `token_P` (of B * L) goes to expert `expert_P`, and its output counts `weight_P`.

    Pairs that are not computed have the expert E and the weight 0.
    """

    token_P: Tensor
    expert_P: Tensor
    weight_P: Tensor


def scores_of(logits_BLE: Tensor, kind: str) -> Tensor:
    """The router's scores: `softmax` over all experts, `sigmoid` of each, or with `one` the logits, only to compare."""
    if kind == "softmax":
        return logits_BLE.softmax(-1)
    return logits_BLE.sigmoid() if kind == "sigmoid" else logits_BLE


def choose_experts(scores_BLE: Tensor, top_k: int, groups: int = 1, top_groups: int = 1) -> Tensor:
    """The `top_k` experts of each token: (B, L, K), highest first, out of the best `top_groups` groups of experts."""
    if groups > 1:
        grouped = scores_BLE.unflatten(-1, (groups, -1))
        value_BLG = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        best_BLG = value_BLG.topk(top_groups, -1).indices
        out_BLG = torch.ones_like(value_BLG, dtype=torch.bool).scatter(-1, best_BLG, False)
        scores_BLE = grouped.masked_fill(out_BLG[..., None], -torch.inf).flatten(-2)
    return scores_BLE.topk(top_k, -1).indices


def chosen_weights(scores_BLE: Tensor, experts_BLK: Tensor, kind: str, normalize: bool, scale: float) -> Tensor:
    """What the chosen experts' outputs count: their scores, made to sum to one if wanted, times `scale`."""
    if kind == "one":
        return torch.full_like(experts_BLK, scale, dtype=scores_BLE.dtype)
    weights_BLK = scores_BLE.gather(-1, experts_BLK)
    if normalize:
        weights_BLK = weights_BLK / (weights_BLK.sum(-1, keepdim=True) + 1e-20)
    return weights_BLK * scale


def token_pairs(weights_BLK: Tensor, experts_BLK: Tensor, kept_BLK: Tensor | None, count: int) -> Pairs:
    """The pairs of token choice: K of each token, those that are not kept going to nobody."""
    K = experts_BLK.shape[-1]
    if kept_BLK is not None:
        experts_BLK = experts_BLK.masked_fill(~kept_BLK, count)
        weights_BLK = weights_BLK.masked_fill(~kept_BLK, 0)
    N = experts_BLK.shape[0] * experts_BLK.shape[1]  # `Size.numel` would be a constant in a graph
    token_P = torch.arange(N, device=experts_BLK.device)[:, None].expand(N, K).flatten()
    return Pairs(token_P, experts_BLK.flatten(), weights_BLK.flatten())


def chosen(experts_BLK: Tensor, count: int, mask_BL: Tensor | None) -> Tensor:
    """Which real token chose which of `count` experts: bool (B, L, E)."""
    B, L, _ = experts_BLK.shape
    chosen_BLE = torch.zeros(B, L, count, dtype=torch.bool, device=experts_BLK.device).scatter(-1, experts_BLK, True)
    return chosen_BLE if mask_BL is None else chosen_BLE & mask_BL[..., None]


def sequence_lengths(chosen_BLE: Tensor, mask_BL: Tensor | None, segments_BL: Tensor | None) -> Tensor:
    """How many real tokens the sequence has that a token belongs to: (B, L)."""
    B, L = chosen_BLE.shape[:2]
    real_BL = torch.ones(B, L, dtype=torch.long, device=chosen_BLE.device) if mask_BL is None else mask_BL.long()
    if segments_BL is None:
        return real_BL.sum(1, keepdim=True).expand(B, L)
    run_BL = run_starts(segments_BL, mask_BL).long().cumsum(1)
    return torch.zeros_like(real_BL).scatter_add(1, run_BL, real_BL).gather(1, run_BL)


def within_capacity(
    experts_BLK: Tensor,
    count: int,
    capacity: Tensor | int,
    *,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
    taken_BE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which choices are among the first `capacity` of their expert in their sequence: (B, L, K), and the places taken.

    capacity: for all, or (B, L). taken_BE: places that earlier calls have taken; what comes back includes them. Tokens
    come in order, each with all its choices at once, so that nothing depends on a later token. Choices of the expert
    `count` (nobody) take no place.
    """
    chosen_BLE = chosen(experts_BLK, count + 1, mask_BL)[..., :count].long()
    place_BLE = chosen_BLE.cumsum(1)
    if taken_BE is not None:
        place_BLE = place_BLE + taken_BE[:, None]
    after_BE = place_BLE[:, -1]
    if segments_BL is not None:
        start_BL1 = run_starts(segments_BL, mask_BL)[..., None]
        place_BLE = place_BLE - torch.where(start_BL1, place_BLE - chosen_BLE, 0).cummax(1).values
    limit = capacity[..., None] if isinstance(capacity, Tensor) else capacity
    return place_BLE.gather(-1, experts_BLK.clamp(max=count - 1)) <= limit, after_BE


def within_capacity_by_rank(
    experts_BLK: Tensor,
    count: int,
    capacity: Tensor | int,
    *,
    score_BL: Tensor | None = None,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
) -> Tensor:
    """As `within_capacity` (B, L, K), where all first choices come before all second ones, and so on.

    Among equal choices the tokens with the higher `score_BL` come first, without it the earlier ones. Who finds a place
    depends on the whole sequence. Choices of the expert `count` (nobody) take no place.
    """
    B, L, K = experts_BLK.shape
    rank_BL = torch.arange(L, device=experts_BLK.device).expand(B, L)
    if score_BL is not None:
        rank_BL = invert(score_BL.argsort(dim=1, descending=True, stable=True))
    run_BL = torch.zeros_like(rank_BL) if segments_BL is None else run_starts(segments_BL, mask_BL).long().cumsum(1)
    choice_K = torch.arange(K, device=experts_BLK.device)
    order_BP = ((run_BL[..., None] * K + choice_K) * L + rank_BL[..., None]).flatten(1).argsort(1)
    taken_BLK = experts_BLK if mask_BL is None else experts_BLK.masked_fill(~mask_BL[..., None], count)
    wanted_BPE = F.one_hot(taken_BLK.flatten(1).gather(1, order_BP), count + 1)
    place_BPE = wanted_BPE.cumsum(1)
    run_BP = run_BL.repeat_interleave(K, 1).gather(1, order_BP)
    start_BP = F.pad(run_BP[:, 1:] != run_BP[:, :-1], (1, 0))
    place_BPE = place_BPE - torch.where(start_BP[..., None], place_BPE - wanted_BPE, 0).cummax(1).values
    place_BP = (place_BPE * wanted_BPE).sum(-1).gather(1, invert(order_BP))
    limit = capacity[..., None] if isinstance(capacity, Tensor) else capacity
    return place_BP.view(B, L, K) <= limit


def capacity_of(factor: float, top_k: int, count: int, tokens_BL: Tensor) -> Tensor:
    """Places of an expert in a sequence: `factor` times its share of the tokens' choices, rounded up."""
    share_BL = factor * top_k * tokens_BL.double() / count
    return (share_BL - 1e-9).ceil().long()  # 1.2 * 10 / 4 is 3, although not in floating point


def choose_tokens(
    scores_BLE: Tensor, top_k: int, *, mask_BL: Tensor | None = None, segments_BL: Tensor | None = None
) -> Pairs:
    """The pairs of expert choice: of the n tokens of a sequence each expert takes the k n / E best, rounded up."""
    taken_P3 = decided(lambda: _best_tokens(scores_BLE.detach(), top_k, mask_BL, segments_BL).nonzero())
    row, expert_P, column = taken_P3.unbind(1)
    return Pairs(row * scores_BLE.shape[1] + column, expert_P, scores_BLE[row, column, expert_P])


def _best_tokens(scores_BLE: Tensor, top_k: int, mask_BL: Tensor | None, segments_BL: Tensor | None) -> Tensor:
    """Which tokens an expert takes: (B, E, L)."""
    B, L, E = scores_BLE.shape
    real_BL = torch.ones(B, L, dtype=torch.bool, device=scores_BLE.device) if mask_BL is None else mask_BL
    # Sort by score, then by sequence, stably; padding forms one more sequence at the end.
    run_BL = torch.zeros(B, L, dtype=torch.long, device=scores_BLE.device)
    if segments_BL is not None:
        run_BL = run_starts(segments_BL, mask_BL).long().cumsum(1)
    run_BL = run_BL.masked_fill(~real_BL, L)
    order = scores_BLE.transpose(1, 2).reshape(B * E, L).argsort(dim=-1, descending=True, stable=True)
    run = run_BL.repeat_interleave(E, 0)
    order = order.gather(-1, run.gather(-1, order).argsort(dim=-1, stable=True))
    place_BEL = invert(order).view(B, E, L)
    first_BL = torch.zeros_like(run_BL)  # real tokens of the sequences before this one's
    if segments_BL is not None:
        first_BL = real_BL.cumsum(1) - 1 - token_positions(scores_BLE, mask_BL, segments_BL)
    tokens_BL = sequence_lengths(scores_BLE, mask_BL, segments_BL)
    places_BL = capacity_of(1.0, top_k, E, tokens_BL)
    return (place_BEL < (first_BL + places_BL)[:, None]) & real_BL[:, None]


def balance_loss(probabilities_BLE: Tensor, chosen_BLE: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Load-balancing loss over the real tokens of a batch; K (experts a token) where the load is even."""
    tokens = chosen_BLE.shape[0] * chosen_BLE.shape[1] if mask_BL is None else mask_BL.sum().clamp(min=1)
    if mask_BL is not None:
        probabilities_BLE = probabilities_BLE * mask_BL[..., None]
    share_E = chosen_BLE.sum((0, 1)) / tokens
    return chosen_BLE.shape[-1] * (share_E * probabilities_BLE.sum((0, 1)) / tokens).sum()


def z_loss(logits_BLE: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Router z-loss, the mean over real tokens: keeps the logits small."""
    square_BL = logits_BLE.logsumexp(-1).square()
    return square_BL.mean() if mask_BL is None else (square_BL * mask_BL).sum() / mask_BL.sum().clamp(min=1)
