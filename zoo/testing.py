"""The laws that every sequence mixer obeys, as functions that any mixer can be put through.

    from zoo.testing import check_mixer
    check_mixer("my_mixer")                      # or the class itself, registered or not

Each law is a function of its own; `check_mixer` runs all of them over an example config, its two-sided form where there
is one, and a few seeded random configs. A law that a mixer's `traits` exclude is skipped. A broken law raises
AssertionError, whose text begins with the law's name and says what was compared and by how much it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from zoo._testing import (
    SINGLE,
    Case,
    ConfigLike,
    MixerLike,
    RoundEachStep,
    example_configs,
    example_options,
    find_class,
    parse_config,
    random_config,
    rms,
)
from zoo.errors import unknown_name


def check_mixer(
    mixer: MixerLike,
    *,
    config: ConfigLike = None,
    width: int = 16,
    seed: int = 0,
    laws: Iterable[str] | None = None,
    variants: int = 3,
) -> None:
    """Put a mixer through the laws; returns nothing where they hold.

    Args:
        mixer: a registered name, or a class (which need not be registered).
        config: one config to test; by default an example, its two-sided form and `variants` random ones.
        width: model width D.
        seed: of the weights, the inputs and the random configs.
        laws: names out of `LAWS`; all by default.

    Raises:
        AssertionError: a law does not hold; the message names the law and the config.
    """
    cls = find_class(mixer)
    configs = [parse_config(cls, config)] if config is not None else example_configs(cls, seed, variants)
    for name in LAWS if laws is None else laws:
        if name not in LAWS:
            raise unknown_name("law", name, LAWS)
        for one in configs:
            LAWS[name](cls, config=one, width=width, seed=seed)


def check_split(mixer: MixerLike, *, config: ConfigLike = None, width: int = 16, seed: int = 0) -> None:
    """Law 1: a sequence cut anywhere, also into single steps, gives the same with the state carried.

    Where `traits.splits` is "within_chunk", sequences of at most `config.chunk` tokens.
    """
    case = Case("split", mixer, config, width, seed).within_chunk()
    if not case.has_state:
        return
    mask_BL = case.random_mask()
    half = case.length // 2
    cuts = {"single steps": [1] * case.length, "one token, then the rest": [1, case.length - 1]}
    cuts["random pieces"] = case.pieces()
    cuts["a half, three steps, the rest"] = [half, 1, 1, 1, case.length - half - 3]
    for masked in (None, mask_BL):
        whole, _ = case.run(case.x_BLD, mask_BL=masked)
        for kind, sizes in cuts.items():
            parts, state = case.run_in_pieces(case.x_BLD, sizes, mask_BL=masked)
            case.close(parts, whole, f"{kind}{'' if masked is None else ' of a padded batch'}", masked)
            case.demand(state.length == case.length, f"state.length is {state.length} after {case.length} positions")
            case.demand(all(t.shape[0] == 2 for t in state.tensors.values()), "a state tensor without the batch first")
    left_BL = torch.ones_like(mask_BL)
    left_BL[0, :half] = False
    whole, _ = case.run(case.x_BLD, mask_BL=left_BL)
    parts = case.prompt_then_steps(left_BL, half + 3)
    case.close(parts, whole, "a left-padded prompt, then steps without a mask", left_BL)
    with case.as_type(torch.float32):
        whole, _ = case.run(case.x_BLD.float())
        parts, _ = case.run_in_pieces(case.x_BLD.float(), cuts["single steps"])
        case.close(parts, whole, "single steps in float32", tolerance=SINGLE)
    state = case.run(case.x_BLD[:, :half], state=case.fresh())[1]
    swapped, _ = case.run(case.x_BLD[:, half:].flip(0), state=state.clone().select(torch.tensor([1, 0])))
    straight, _ = case.run(case.x_BLD[:, half:], state=state)
    case.close(swapped.flip(0), straight, "rows of the state exchanged by `select`")


def check_mask(mixer: MixerLike, *, config: ConfigLike = None, width: int = 16, seed: int = 0) -> None:
    """Law 2: masked positions are identity steps; what stands there, even NaN, changes nothing."""
    case = Case("mask", mixer, config, width, seed)
    for kind, mask_BL in case.masks().items():
        x_BLD = case.x_BLD.masked_fill(~mask_BL[..., None], torch.nan)
        padded, _ = case.run(x_BLD, mask_BL=mask_BL)
        for b in range(2):
            alone, _ = case.run(case.x_BLD[b : b + 1, mask_BL[b]])
            case.close(padded[b : b + 1, mask_BL[b]], alone, f"{kind} padding, filled with NaN, in row {b}")
        if not case.has_state or case.cls.traits.splits != "anywhere":
            continue
        after = torch.full_like(mask_BL[:, :3], True)
        _, state = case.run(x_BLD, mask_BL=mask_BL, state=case.fresh())
        tail, _ = case.run(case.x_BLD[:, :3], mask_BL=after, state=state)
        for b in range(2):
            joined = torch.cat([case.x_BLD[b : b + 1, mask_BL[b]], case.x_BLD[b : b + 1, :3]], 1)
            case.close(tail[b : b + 1], case.run(joined)[0][:, -3:], f"what follows {kind} padding in row {b}")
    x_BLD = case.x_BLD.clone().requires_grad_()
    mask_BL = case.random_mask()
    y_BLD, _ = case.module(x_BLD, mask_BL=mask_BL)
    (gradient,) = torch.autograd.grad(y_BLD[mask_BL].square().sum(), x_BLD)
    case.demand(bool(gradient.isfinite().all()), "a gradient that is not finite")
    case.demand(not gradient[~mask_BL].any(), "a masked position has a gradient")


def check_packing(mixer: MixerLike, *, config: ConfigLike = None, width: int = 16, seed: int = 0) -> None:
    """Law 3: packed segments give what the separate sequences give."""
    case = Case("packing", mixer, config, width, seed)
    for masked in (None, case.random_mask()):
        sizes = [case.pieces(), case.pieces()]
        ids = [[i % 2 for i, n in enumerate(row) for _ in range(n)] for row in sizes]  # ids may come back
        segments_BL = torch.tensor(ids)
        if masked is not None:  # every segment keeps a token: padding alone does not part two with the same id
            masked = masked | (segments_BL.diff(append=1 - segments_BL[:, -1:]) != 0)
        packed, _ = case.run(case.x_BLD, segments_BL=segments_BL, mask_BL=masked)
        for b, row in enumerate(sizes):
            start = 0
            for n in row:
                keep = slice(start, start + n)
                mask = None if masked is None else masked[b : b + 1, keep]
                alone, _ = case.run(case.x_BLD[b : b + 1, keep], mask_BL=mask)
                what = f"segment at {start} to {start + n} of row {b}{'' if mask is None else ', padded'}"
                case.close(packed[b : b + 1, keep], alone, what, mask)
                start += n
    if case.has_state:
        try:
            case.run(case.x_BLD, segments_BL=segments_BL, state=case.fresh())
        except ValueError:
            return
        case.demand(False, "segments and a state together were accepted; they must raise ValueError")


def check_causality(mixer: MixerLike, *, config: ConfigLike = None, width: int = 16, seed: int = 0) -> None:
    """Law 4: in the causal form no output depends on a later input; in the two-sided form outputs do.

    Where `traits.splits` is "within_chunk", sequences of at most `config.chunk` tokens.
    """
    case = Case("causality", mixer, config, width, seed).within_chunk()
    for cut in (1, case.length // 3, 64, case.length - 1):
        changed = case.x_BLD.clone()
        changed[:, cut:] = 3 * torch.randn(changed[:, cut:].shape, dtype=changed.dtype, generator=case.generator)
        before, after = (case.run(x)[0][:, :cut] for x in (case.x_BLD, changed))
        if case.causal:
            case.close(after, before, f"outputs before {cut}, where the inputs from {cut} on were changed")
    if not case.causal:
        case.demand(not torch.equal(before, after), "the two-sided form does not look ahead")


def check_gradients(mixer: MixerLike, *, config: ConfigLike = None, width: int = 16, seed: int = 0) -> None:
    """Law 5a: gradients match finite differences in float64, also through a carried state."""
    case = Case("gradients", mixer, config, width, seed)
    weights = torch.randn(case.x_BLD.shape, dtype=torch.double, generator=case.generator)
    leaves = {"input": case.x_BLD.clone().requires_grad_()}
    leaves |= {name: p for name, p in case.module.named_parameters() if p.requires_grad}

    def loss(pieces: list[int]) -> Tensor:
        if len(pieces) == 1:
            return (case.module(leaves["input"])[0] * weights).sum()
        state, total, start = case.fresh(), torch.zeros((), dtype=torch.double), 0
        for n in pieces:
            y, state = case.module(leaves["input"][:, start : start + n], state=state)
            total, start = total + (y * weights[:, start : start + n]).sum(), start + n
        return total

    step = 1e-6
    for pieces in [[case.length], [case.length - 3, 1, 2]][: 1 + case.has_state]:
        gradients = torch.autograd.grad(loss(pieces), list(leaves.values()), allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            case.demand(gradient is not None, f"{name} gets no gradient")
            direction = torch.randn(leaf.shape, dtype=torch.double, generator=case.generator)
            with torch.no_grad():
                leaf.add_(direction, alpha=step)
                upper = loss(pieces)
                leaf.sub_(direction, alpha=2 * step)
                lower = loss(pieces)
                leaf.add_(direction, alpha=step)
            expected, got = ((upper - lower) / (2 * step)).item(), (gradient * direction).sum().item()
            error = abs(got - expected) / max(abs(expected), 1.0)
            way = "" if len(pieces) == 1 else " through a carried state"
            case.demand(
                error < 1e-5, f"gradient of {name}{way} along a direction: {got:.9g}, differences {expected:.9g}"
            )


def check_precision(mixer: MixerLike, *, config: ConfigLike = None, width: int = 16, seed: int = 0) -> None:
    """Law 5b: float32 agrees with float64; bfloat16 errs at most twice as much as a plain evaluation in bfloat16.

    Plain is: the same rounded weights and inputs, with the result of every step outside `zoo.ops` rounded to bfloat16.
    """
    case = Case("precision", mixer, config, width, seed)
    exact, _ = case.run(case.x_BLD)
    with case.as_type(torch.float32):
        single, _ = case.run(case.x_BLD.float())
        case.close(single.double(), exact, "float32 against float64", tolerance=20 * SINGLE)
    x_BLD = case.x_BLD.bfloat16()
    with case.as_type(torch.bfloat16):
        half, _ = case.run(x_BLD)
        case.demand(half.dtype == torch.bfloat16, f"a bfloat16 input gives {half.dtype}")
        loss = case.module(x_BLD)[0].float().square().sum()
        for name, p in case.module.named_parameters():
            if p.requires_grad:
                (gradient,) = torch.autograd.grad(loss, p, retain_graph=True)
                case.demand(bool(gradient.isfinite().all()), f"the bfloat16 gradient of {name} is not finite")
        with case.as_type(torch.float64):  # the weights as they were rounded
            exact, _ = case.run(x_BLD.double())
            with RoundEachStep():
                plain = case.run(x_BLD.double())[0].bfloat16()
        with case.as_type(torch.float32), torch.autocast(x_BLD.device.type, dtype=torch.bfloat16):
            auto, _ = case.run(x_BLD.float())
    allowed = 2 * rms(plain.double() - exact)
    for kind, y in (("bfloat16", half), ("autocast to bfloat16", auto)):
        error = rms(y.double() - exact)
        case.demand(
            error <= allowed, f"{kind} has an rms error of {error:.3g}; twice the plain evaluation's is {allowed:.3g}"
        )


def check_state_size(mixer: MixerLike, *, config: ConfigLike = None, width: int = 16, seed: int = 0) -> None:
    """Law 6: a state that `traits` call "constant" never grows, one that they call "window" stops growing."""
    case = Case("state size", mixer, config, width, seed)
    kind = case.cls.traits.state
    if not case.has_state or kind == "grows":
        return
    state, sizes = case.fresh(), []
    sizes.append(state.nbytes)
    piece = max(case.length, 2 * (getattr(case.config, "window", None) or 0) + getattr(case.config, "sinks", 0))
    x_BLD = torch.randn(2, piece, width, dtype=torch.double, generator=case.generator)
    for _ in range(3):
        _, state = case.run(x_BLD, state=state)
        sizes.append(state.nbytes)
    _, state = case.run(x_BLD[:, :1], state=state)
    sizes.append(state.nbytes)
    first = 0 if kind == "constant" else 1
    case.demand(
        len(set(sizes[first:])) == 1, f"the state is {kind!r} but its bytes went {sizes} over pieces of {piece}"
    )


def check_modules(mixer: MixerLike, *, config: ConfigLike = None, width: int = 16, seed: int = 0) -> None:
    """Law 7: linear layers are called as modules (adapters work); weights survive saving; float32 islands are kept."""
    case = Case("modules", mixer, config, width, seed)
    linears = {name: m for name, m in case.module.named_modules() if isinstance(m, nn.Linear)}
    called: set[str] = set()
    handles = [m.register_forward_hook(lambda *_, name=name: called.add(name)) for name, m in linears.items()]
    before, _ = case.run(case.x_BLD)
    for handle in handles:
        handle.remove()
    missed = sorted(set(linears) - called)
    case.demand(not missed, f"linear layer {missed[0] if missed else ''} is used without being called")
    other = case.cls(case.config, width).double().eval()
    other.load_state_dict(case.module.state_dict())
    case.close(other(case.x_BLD)[0], before, "a second module with the same state_dict")
    with case.as_type(torch.bfloat16):
        for name, tensor in case.module.state_dict().items():
            kept = name.split(".")[-1] in case.cls.keep_float32
            case.demand(not kept or tensor.dtype == torch.float32, f"{name} is not float32")
        case.demand(
            bool(case.run(case.x_BLD.bfloat16())[0].isfinite().all()), "bfloat16 gives values that are not finite"
        )


LAWS: dict[str, Callable[..., None]] = {
    "split": check_split,
    "mask": check_mask,
    "packing": check_packing,
    "causality": check_causality,
    "gradients": check_gradients,
    "precision": check_precision,
    "state_size": check_state_size,
    "modules": check_modules,
}


__all__ = [
    "LAWS",
    "check_mixer",
    "example_configs",
    "example_options",
    "random_config",
    *(f.__name__ for f in LAWS.values()),
]
