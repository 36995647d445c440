"""Mixtures of experts out of the MLPs of a pretrained model, two ways.

`upcycle` makes a larger model (sparse upcycling, Komatsuzaki et al. 2022, arXiv:2212.05055): every expert is a copy of
the MLP, the router is random, and the weights of the chosen experts sum to one, so that the function is what it was
until training tells the experts apart.

`moefy` makes a cheaper one (MoEfication, Zhang et al. 2021, arXiv:2110.01786). An MLP is a sum over its neurons,

    y = sum_j h_j(x) d_j,      h_j = act(g_j . x) (u_j . x), or act(u_j . x) without a gate,

which is split into parts of equal size by balanced k-means on the directions of g (of u): neurons that fire together
come together. Parts are added up with weight one, so that all of them give the MLP exactly; the router picks the top_k
that are expected to add most. It is a ridge regression, on calibration tokens, of the mass that part e adds,

    m_e(x) = sum over j in e of |h_j(x)| |d_j|,

from x: one linear solve, no training.

Shapes: T tokens, D model width, F neurons of the MLP, E parts or experts, N rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from zoo.convert.layerwise import check_tokens
from zoo.convert.surgery import replace_mixers
from zoo.convert.teachers import Teacher, load_teacher
from zoo.errors import ConversionError, did_you_mean
from zoo.ffn.moe import MoE, MoEConfig
from zoo.models.backbone import ZooPreTrainedModel, float32_patterns
from zoo.models.shared import refuse_shared, set_config

ROWS_AT_ONCE = 8
DENSE = ("gated_mlp", "mlp")


def method(
    name: str | None, options: Mapping[str, Any] | None
) -> Callable[[ZooPreTrainedModel, Tensor | None], ZooPreTrainedModel] | None:
    """`upcycle` or `moefy` with options as a function of a model and calibration tokens; None for None.

    Raises ConversionError for another name, or options without a name.
    """
    values = dict(options or {})
    if name is None:
        if values:
            raise ConversionError("ffn_options are given, but no ffn")
        return None
    if name == "upcycle":
        return lambda model, tokens_NL: upcycle(model, **values)
    if name == "moefy":
        return lambda model, tokens_NL: moefy(model, tokens_NL, **values)  # type: ignore[arg-type]
    raise ConversionError(f"ffn: unknown way {name!r}{did_you_mean(name, ['upcycle', 'moefy'])}")


def upcycle(
    teacher: Any,
    layers: Iterable[int] | None = None,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    noise: float = 0.0,
    router_std: float = 0.02,
    seed: int = 0,
    **options: Any,
) -> ZooPreTrainedModel:
    """A copy of `teacher` in which MLPs are mixtures of copies of themselves; it computes the same.

    Args:
        teacher: a zoo model, or anything that `load_teacher` takes.
        layers: whose MLPs; by default all. (The paper converts half of them.)
        num_experts, top_k: how many experts, and how many of them for a token.
        noise: added to each expert, in deviations of each weight matrix; with it the function is no longer the same.
        router_std: deviation of the router's initial weights.
        seed: of router and noise.
        options: other options of `moe`, such as ``balance_loss=0.01``. The function stays the same as long as each
            token's weights sum to one (`normalize`, `scale`) and no token is dropped (`capacity`).

    Raises ConversionError for a layer that does not exist or has no dense MLP; ConfigError for wrong options.
    """
    model, chosen = _start(teacher, layers)
    generator = torch.Generator().manual_seed(seed)
    new: dict[int, MoE] = {}
    for i in chosen:
        parts = _dense_parts(model.model.layers[i].ffn)
        c = model.model.layers[i].ffn.config
        values = {"num_experts": num_experts, "hidden_size": c.hidden_size, "top_k": top_k, **options}
        moe = new[i] = _make(model, i, values)
        with torch.no_grad():
            for name, t in parts.items():
                copies = getattr(moe.experts, name)
                copies.copy_(t)  # to every expert
                if noise and t.dim() == 2:
                    drawn = torch.randn(copies.shape, generator=generator)
                    copies.add_(noise * float(t.float().std()) * drawn.to(copies))
            weight = moe.router.weight
            weight.copy_(router_std * torch.randn(weight.shape, generator=generator))
    return _with_experts(model, new, "upcycle")


@torch.no_grad()
def moefy(
    teacher: Any,
    tokens_NL: Tensor,
    layers: Iterable[int] | None = None,
    *,
    num_experts: int = 16,
    top_k: int = 8,
    ridge: float = 1e-2,
    seed: int = 0,
    **options: Any,
) -> ZooPreTrainedModel:
    """A copy of `teacher` in which MLPs are split into parts, of which each token uses the `top_k` that matter most.

    Args:
        teacher: a zoo model, or anything that `load_teacher` takes.
        tokens_NL: token ids, whole rows, to fit the routers on.
        layers: whose MLPs; by default all.
        num_experts: parts, a divisor of the MLP's inner width. top_k: parts a token; all of them are exact.
        ridge: in units of the mean variance of a layer's inputs.
        seed: of the k-means.
        options: other options of `moe`.

    The router's weights get no gradient, for a choice has none: give `balance_loss`, or leave them as they are.

    Raises ConversionError for a layer that does not exist or has no dense MLP, for `num_experts` that do not divide it,
    and for tokens that the teacher cannot read; ConfigError for wrong options.
    """
    model, chosen = _start(teacher, layers)
    check_tokens(model, tokens_NL)
    new: dict[int, MoE] = {}
    splits: dict[int, Tensor] = {}
    for i in chosen:
        ffn = model.model.layers[i].ffn
        F, size = ffn.config.hidden_size, ffn.config.hidden_size // num_experts
        if size * num_experts != F:
            near = min((n for n in range(1, F + 1) if F % n == 0), key=lambda n: abs(n - num_experts))
            raise ConversionError(f"layer {i}: {F} neurons are not {num_experts} equal parts; nearest is {near}")
        values = {
            "num_experts": num_experts, "hidden_size": size, "top_k": top_k, "scores": "one", "router_bias": True,
            **options,
        }  # fmt: skip
        moe = new[i] = _make(model, i, values)
        splits[i] = split = balanced_split(_directions(ffn), num_experts, seed=seed)
        for name, t in _dense_parts(ffn).items():
            if name == "down_bias_EO":  # each token meets top_k of them
                t = t.expand(num_experts, -1) / moe.config.top_k
            elif name == "down_EIO":
                t = t[split]
            else:
                t = t[..., split].movedim(-2, 0)
            getattr(moe.experts, name).copy_(t)
    for i, (weight_ED, bias_E) in fit_routers(model, splits, tokens_NL, ridge).items():
        new[i].router.weight.copy_(weight_ED)
        new[i].router.bias.copy_(bias_E)
    return _with_experts(model, new, "moefy")


def balanced_split(rows_FX: Tensor, count: int, *, seed: int = 0, rounds: int = 30) -> Tensor:
    """Constrained k-means: the rows in `count` clusters of equal size; returns their indices (count, F / count).

    Centres and assignment take turns until nothing changes. The assignment first lets clusters take the rows nearest to
    them until they are full, then swaps rows between two clusters as long as that brings both together nearer.
    """
    x = rows_FX.float()
    F = len(x)
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randperm(F, generator=generator)[:count].to(x.device)]
    split_EF = torch.arange(F, device=x.device).view(count, -1)
    best = float("inf")
    for _ in range(rounds):
        cost_FE = torch.cdist(x, centres).square()
        found = balanced_assignment(cost_FE)
        now = sum(float(cost_FE[rows, e].sum()) for e, rows in enumerate(found))
        if now >= best * (1 - 1e-6):
            break
        best, split_EF = now, found
        centres = x[split_EF].mean(1)
    return split_EF


def balanced_assignment(cost_FE: Tensor) -> Tensor:
    """Equally many rows for each cluster, at a low total cost that no swap of pairs lowers much: (E, F / E) indices."""
    F, E = cost_FE.shape
    size = F // E
    taken_F = torch.full((F,), -1, device=cost_FE.device)
    for _ in range(E):
        free = (taken_F < 0).nonzero()[:, 0]
        if not len(free):
            break
        room = size - torch.bincount(taken_F[taken_F >= 0], minlength=E)
        wish = cost_FE[free].masked_fill(room <= 0, torch.inf).argmin(1)
        for e in wish.unique().tolist():
            bids = free[wish == e]
            taken_F[bids[cost_FE[bids, e].argsort()[: int(room[e])]]] = e
    split_EF = taken_F.argsort(stable=True).view(E, size)
    for a, b in itertools.combinations(range(E), 2):
        mine, theirs = split_EF[a], split_EF[b]
        gain_a, order_a = (cost_FE[mine, a] - cost_FE[mine, b]).sort(descending=True)
        gain_b, order_b = (cost_FE[theirs, b] - cost_FE[theirs, a]).sort(descending=True)
        swap = int((gain_a + gain_b > 0).sum())
        moved = mine[order_a[:swap]].clone()
        mine[order_a[:swap]] = theirs[order_b[:swap]]
        theirs[order_b[:swap]] = moved
    return split_EF


@torch.no_grad()
def fit_routers(
    model: ZooPreTrainedModel, splits: dict[int, Tensor], tokens_NL: Tensor, ridge: float
) -> dict[int, tuple[Tensor, Tensor]]:
    """Per layer the ridge regression of each part's mass on the MLP's input: weights (E, D) and biases (E,)."""
    sums: dict[int, list[Tensor]] = {}

    def watch(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_TD = args[0].flatten(0, -2)
            mass_TE = activation_mass(module, x_TD)[:, splits[i]].sum(-1)
            x_TD, mass_TE = x_TD.double(), mass_TE.double()
            new = [x_TD.sum(0), mass_TE.sum(0), x_TD.T @ x_TD, x_TD.T @ mass_TE]
            sums[i] = [a + b for a, b in zip(sums[i], new, strict=True)] if i in sums else new

        return hook

    with ExitStack() as stack:
        for i in splits:
            stack.callback(model.model.layers[i].ffn.register_forward_pre_hook(watch(i)).remove)
        tokens_NL = tokens_NL.to(next(model.parameters()).device)
        for rows_NL in tokens_NL.split(ROWS_AT_ONCE):
            model.model(rows_NL, use_cache=False)
    found, T = {}, tokens_NL.numel()
    for i, (x_D, mass_E, gram_DD, cross_DE) in sums.items():
        x_D, mass_E = x_D / T, mass_E / T
        spread_DD = gram_DD / T - torch.outer(x_D, x_D)
        lift = ridge * spread_DD.diagonal().mean().clamp(min=1e-30)
        spread_DD.diagonal().add_(lift)
        weight_DE = torch.linalg.solve(spread_DD, cross_DE / T - torch.outer(x_D, mass_E))
        found[i] = weight_DE.T, mass_E - x_D @ weight_DE
    return found


def activation_mass(ffn: Any, x_TD: Tensor) -> Tensor:
    """How much each neuron of a dense MLP adds: |h_j(x)| |d_j|, (T, F)."""
    h_TF = ffn.act(ffn.gate_proj(x_TD)) * ffn.up_proj(x_TD) if ffn.name == "gated_mlp" else ffn.act(ffn.up_proj(x_TD))
    return h_TF.abs() * ffn.down_proj.weight.norm(dim=0)


def _directions(ffn: Any) -> Tensor:
    """The unit vectors that say when a neuron fires, (F, D)."""
    firing = ffn.gate_proj if ffn.name == "gated_mlp" else ffn.up_proj
    return nn.functional.normalize(firing.weight.detach().float(), dim=-1)


def _dense_parts(ffn: Any) -> dict[str, Tensor]:
    """The weights of a dense MLP as those of one expert: (in, out), biases (out,), by the experts' names."""
    parts = {}
    for name in ("gate", "up", "down"):
        if (linear := getattr(ffn, f"{name}_proj", None)) is not None:
            parts[f"{name}_EIO"] = linear.weight.detach().T
            if linear.bias is not None:
                parts[f"{name}_bias_EO"] = linear.bias.detach()
    return parts


def _start(teacher: Any, layers: Iterable[int] | None) -> tuple[ZooPreTrainedModel, list[int]]:
    """The teacher as a zoo model, and the layers to convert."""
    if not isinstance(teacher, ZooPreTrainedModel):
        teacher = (teacher if isinstance(teacher, Teacher) else load_teacher(teacher)).model
    blocks = teacher.model.layers
    dense = [i for i, block in enumerate(blocks) if getattr(block.ffn, "name", None) in DENSE]
    chosen = dense if layers is None else sorted(set(layers))
    for i in chosen:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(blocks):
            raise ConversionError(f"layer {i!r} does not exist; the teacher has layers 0 to {len(blocks) - 1}")
        if i not in dense:
            has = getattr(blocks[i].ffn, "name", "none")
            raise ConversionError(f"layer {i}: its channel mixer is {has}; only {' and '.join(DENSE)} become experts")
    if not chosen:
        raise ConversionError("nothing to convert: no layer of this model has a dense MLP")
    refuse_shared(teacher, chosen)
    return teacher, chosen


def _make(model: ZooPreTrainedModel, layer: int, values: dict[str, Any]) -> MoE:
    """A mixture whose experts have the form of the layer's MLP, on its device and in its dtype."""
    ffn = model.model.layers[layer].ffn
    form = {"gated": ffn.name == "gated_mlp", "activation": ffn.config.activation, "bias": ffn.config.bias}
    moe = MoE(MoEConfig.parse({**form, **values}, f"layers.{layer}.ffn"), model.config.hidden_size)
    weight = ffn.up_proj.weight
    moe = moe.to(weight.device)
    for parameter in moe.parameters():
        parameter.data = parameter.data.to(weight.dtype)
    return moe


def _with_experts(model: ZooPreTrainedModel, new: dict[int, MoE], step: str) -> ZooPreTrainedModel:
    """A copy of `model` with other channel mixers, and with the step in its lineage."""
    student = replace_mixers(model, {})
    config = student.config
    for i, moe in new.items():
        student.model.layers[i].ffn = moe
        config.layers[i]["ffn"] = moe.config.plain()
    entry = {"step": step, "layers": {str(i): moe.name for i, moe in new.items()}}
    config.origin = {**config.origin, "lineage": [*config.origin.get("lineage", []), entry]}
    _ = config.spec  # validates
    set_config(student, config)
    student.model._keep_in_fp32_modules_strict = float32_patterns(student)
    return student.requires_grad_(True).eval()
