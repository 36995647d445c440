"""A teacher and its students on the same tokens: perplexity, KL, agreement; one pass for all of them.

The hidden states of a batch are computed once per model; logits exist only for a slice of positions at a time, because
a whole row of them is a hundred megabytes with a vocabulary of 49152. Softmax and its logarithm are always float32, the
sums float64, whatever the models compute in.

    perplexity   exp of the mean negative log-likelihood of the text
    KL           mean over predicted tokens of sum_v p_teacher(v) log(p_teacher(v) / p_student(v)), in nats
    top-1        share of predicted tokens where teacher and student find the same token the likeliest

A causal model predicts every token of a row but the first; a masked LM predicts the tokens that were masked. The
position of a prediction is the place of the predicted token in its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError

EDGES = (0, 64, 256, 512, *(1024 << i for i in range(12)))
LOGITS_AT_ONCE = 1 << 24  # numbers, per model: 64 MiB
MASKED_SHARE = 0.15
OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class Ablated:
    """A model with one branch ("linear" or "window") of its mixers switched off while it is entered."""

    model: Any
    branch: str

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switch the branch off, and back to what it was."""
        mixers = branched(self.model)
        before = [mixer.ablate for mixer in mixers]
        for mixer in mixers:
            mixer.ablate = self.branch
        try:
            yield
        finally:
            for mixer, old in zip(mixers, before, strict=True):
                mixer.ablate = old


def branched(model: nn.Module) -> list[Any]:
    """The mixers that have branches to switch off: those with an attribute `ablate`."""
    return [module for module in model.modules() if hasattr(module, "ablate")]


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """No gradients, no dropout; every module's training flag is put back afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@dataclass
class Comparison:
    """Sums of one model's predictions by position (P) and by row (N), in float64."""

    length: int
    rows: int
    count_P: Tensor = field(init=False)
    nll_P: Tensor = field(init=False)
    kl_P: Tensor = field(init=False)
    top1_P: Tensor = field(init=False)
    count_N: Tensor = field(init=False)
    kl_N: Tensor = field(init=False)

    def __post_init__(self) -> None:
        for name in ("count_P", "nll_P", "kl_P", "top1_P"):
            setattr(self, name, torch.zeros(self.length, dtype=torch.float64))
        for name in ("count_N", "kl_N"):
            setattr(self, name, torch.zeros(self.rows, dtype=torch.float64))

    def add(self, row_T: Tensor, position_T: Tensor, nll_T: Tensor, kl_T: Tensor, top1_T: Tensor) -> None:
        """Count predictions."""
        one_T = torch.ones(len(row_T), dtype=torch.float64)
        row_T, position_T = row_T.cpu(), position_T.cpu()
        for name, value_T in (("count", one_T), ("nll", nll_T), ("kl", kl_T), ("top1", top1_T)):
            getattr(self, f"{name}_P").index_add_(0, position_T, value_T.cpu().double())
        self.count_N.index_add_(0, row_T, one_T)
        self.kl_N.index_add_(0, row_T, kl_T.cpu().double())

    def _mean(self, sum_P: Tensor, span: slice = slice(None)) -> float:
        return float(sum_P[span].sum() / self.count_P[span].sum())

    @property
    def tokens(self) -> int:
        """How many tokens were predicted."""
        return int(self.count_P.sum())

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood in nats per token."""
        return self._mean(self.nll_P)

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return _exp(self.nll)

    @property
    def kl(self) -> float:
        """Mean KL(teacher || model) in nats per token."""
        return self._mean(self.kl_P)

    @property
    def kl_standard_error(self) -> float | None:
        """Standard error of `kl` over rows, which are independent texts; None for a single row."""
        used = self.count_N > 0
        if int(used.sum()) < 2:
            return None
        mean_N = self.kl_N[used] / self.count_N[used]
        return float(mean_N.std() / len(mean_N) ** 0.5)

    @property
    def top1(self) -> float:
        """Share of predictions whose likeliest token is the teacher's."""
        return self._mean(self.top1_P)

    def by_position(self, what: str) -> dict[str, float]:
        """`what` ("perplexity", "kl", "top1") in buckets of positions, such as {"0-64": ..., "64-256": ...}."""
        sum_P = self.nll_P if what == "perplexity" else getattr(self, f"{what}_P")
        out = {}
        for low, high in buckets(self.length):
            if self.count_P[low:high].sum():
                mean = self._mean(sum_P, slice(low, high))
                out[f"{low}-{high}"] = _exp(mean) if what == "perplexity" else mean
        return out


def _exp(x: float) -> float:
    return float(torch.exp(torch.tensor(x, dtype=torch.float64)))


def buckets(length: int) -> list[tuple[int, int]]:
    """The position buckets of rows of `length` tokens: 0-64, 64-256, 256-512, 512-1024 and so on by doubling."""
    return [(low, min(high, length)) for low, high in pairwise(EDGES) if low < length]


def shared_vocabulary(models: Mapping[str, Any], rows_NL: Tensor, tokenizer: Any = None) -> int:
    """How many ids all models share. Sizes may differ by padding only, which needs the tokenizer to tell.

    Raises ConfigError where vocabularies do not fit together, DataError for ids outside them.
    """
    sizes = {name: model.config.vocab_size for name, model in models.items()}
    smallest = min(sizes.values())
    if len(set(sizes.values())) > 1:
        used = None if tokenizer is None else len(tokenizer)
        if used is None or used > smallest:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            known = "no tokenizer was given" if used is None else f"the tokenizer has {used} tokens"
            raise ConfigError(
                f"vocabularies do not fit together ({listed}; {known}); KL needs the same tokens on both sides"
            )
        smallest = used
    if (largest := int(rows_NL.max())) >= smallest or int(rows_NL.min()) < 0:
        raise DataError(f"token id {largest} in the data, but the models share ids 0 to {smallest - 1} only")
    return smallest


def hidden(model: Any, input_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Final hidden states (B, L, D)."""
    with autocast(model, dtype):
        return model.model(input_ids.to(model.device), use_cache=False).last_hidden_state


def logits_of(model: Any, x_TD: Tensor, vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits (T, vocabulary) in float32 of final hidden states."""
    with autocast(model, dtype):
        transform = getattr(model, "transform", None)
        return model.lm_head(x_TD if transform is None else transform(x_TD))[..., :vocabulary].float()


def autocast(model: Any, dtype: torch.dtype) -> Any:
    """bf16 autocast on the model's device, or nothing for float32."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@dataclass(frozen=True)
class _Batch:
    """Inputs, and which of their positions predict which token, counted at which position of which row."""

    input_BL: Tensor
    select_BL: Tensor
    target_T: Tensor
    position_T: Tensor
    row_T: Tensor


def _batches(rows_NL: Tensor, batch_tokens: int, masking: tuple[Tensor, int] | None) -> Iterator[_Batch]:
    N, L = rows_NL.shape
    size = max(1, batch_tokens // L)
    for start in range(0, N, size):
        rows_BL = rows_NL[start : start + size]
        if masking is None:
            input_BL, select_BL = rows_BL, torch.ones_like(rows_BL, dtype=torch.bool)
            select_BL[:, -1] = False
            target_BL, shift = rows_BL.roll(-1, 1), 1
        else:
            masked_NL, mask_token_id = masking
            select_BL = masked_NL[start : start + size]
            input_BL, target_BL, shift = rows_BL.masked_fill(select_BL, mask_token_id), rows_BL, 0
        row_T, position_T = select_BL.nonzero(as_tuple=True)
        yield _Batch(input_BL, select_BL, target_BL[select_BL], position_T + shift, row_T + start)


def masked_positions(rows_NL: Tensor, keep_ids: list[int], share: float = MASKED_SHARE, seed: int = 0) -> Tensor:
    """bool (N, L): which tokens a masked LM is asked for; never those in `keep_ids`, at least one in a row."""
    generator = torch.Generator().manual_seed(seed)
    draw_NL = torch.rand(rows_NL.shape, generator=generator)
    draw_NL[torch.isin(rows_NL, torch.tensor(keep_ids, dtype=rows_NL.dtype))] = 2.0
    number = max(1, round(share * rows_NL.shape[1]))
    chosen_NL = torch.zeros_like(draw_NL, dtype=torch.bool).scatter_(1, draw_NL.argsort(1)[:, :number], True)
    return chosen_NL & (draw_NL < 2)


def compare(
    teacher: Any,
    students: Mapping[str, Any],
    rows_NL: Tensor,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int = 2048,
    seed: int = 0,
    on_batch: OnBatch | None = None,
) -> dict[str, Comparison]:
    """The teacher and every student on the rows, in one pass.

    Args:
        teacher: a zoo model with a vocabulary (causal or masked LM).
        students: models by name, or `Ablated` ones; "teacher" is taken.
        rows_NL: int64 token ids, every row a text of its own without padding.
        tokenizer: needed for masked LMs and where vocabularies are padded differently.
        dtype: float32, or bfloat16 for autocast, which on SmolLM2-135M takes 0.45 of the time and adds 0.001 to a KL
            of 0.086 (teacher in bf16 against itself in float32: 0.0006, top-1 97.7 %).
        batch_tokens: how many tokens go through the models at once.
        seed: of the choice of masked tokens.
        on_batch: is told how many rows are done.

    Returns:
        Comparisons by name; "teacher" is the teacher against itself.

    Raises:
        ConfigError: vocabularies or tasks that do not fit together. DataError: rows that cannot be scored.
    """
    variants = {"teacher": teacher, **students}
    models: dict[str, Any] = {name: v.model if isinstance(v, Ablated) else v for name, v in variants.items()}
    vocabulary = shared_vocabulary(models, rows_NL, tokenizer)
    N, L = rows_NL.shape
    masking = _masking(teacher, rows_NL, tokenizer, seed)
    if masking is None and L < 2:
        raise DataError("rows of one token have nothing to predict; give rows of at least 2")
    totals = {name: Comparison(L, N) for name in variants}
    with evaluating(*models.values()):
        for batch in _batches(rows_NL, batch_tokens, masking):
            x_TD = {}
            for name, variant in variants.items():
                with ExitStack() as stack:
                    if isinstance(variant, Ablated):
                        stack.enter_context(variant.off())
                    select_BL = batch.select_BL.to(models[name].device)
                    x_TD[name] = hidden(models[name], batch.input_BL, dtype)[select_BL]
            _count(totals, models, x_TD, batch, vocabulary, dtype)
            if on_batch is not None:
                on_batch(int(batch.row_T.max()) + 1 if len(batch.row_T) else 0)
    return totals


def _masking(teacher: Any, rows_NL: Tensor, tokenizer: Any, seed: int) -> tuple[Tensor, int] | None:
    if teacher.config.task == "causal-lm":
        return None
    if teacher.config.task != "masked-lm":
        raise ConfigError(f"task {teacher.config.task!r} has no perplexity; causal-lm and masked-lm have")
    mask_token_id = getattr(tokenizer, "mask_token_id", None)
    if mask_token_id is None:
        raise DataError("a masked LM is scored on masked tokens: give a tokenizer that has a mask token")
    return masked_positions(rows_NL, list(tokenizer.all_special_ids), seed=seed), mask_token_id


def _count(totals: dict, models: dict, x_TD: dict, batch: _Batch, vocabulary: int, dtype: torch.dtype) -> None:
    """Logits, a slice of predictions at a time: the teacher's once, then each student's against them."""
    step = max(1, LOGITS_AT_ONCE // vocabulary)
    for start in range(0, len(batch.target_T), step):
        part = slice(start, start + step)
        where = batch.row_T[part], batch.position_T[part]
        logp_TV = F.log_softmax(logits_of(models["teacher"], x_TD["teacher"][part], vocabulary, dtype), -1)
        p_TV, best_T = logp_TV.exp(), logp_TV.argmax(-1)
        target_T1 = batch.target_T[part, None].to(logp_TV.device)
        for name, total in totals.items():
            if name == "teacher":
                nll_T = -logp_TV.gather(1, target_T1)[:, 0]
                total.add(*where, nll_T, torch.zeros_like(nll_T), torch.ones_like(nll_T))
                continue
            logq_TV = F.log_softmax(logits_of(models[name], x_TD[name][part], vocabulary, dtype), -1)
            logq_TV = logq_TV.to(logp_TV.device)
            nll_T, top1_T = -logq_TV.gather(1, target_T1)[:, 0], logq_TV.argmax(-1) == best_T
            kl_T = logq_TV.neg_().add_(logp_TV).mul_(p_TV).sum(-1)
            total.add(*where, nll_T, kl_T, top1_T)


def greedy_continuation(model: Any, prompt_BP: Tensor, tokens: int) -> Tensor:
    """The `tokens` likeliest next tokens one after the other (B, tokens), with a carried state."""
    out = model(prompt_BP.to(model.device), use_cache=True, logits_to_keep=1)
    ids = [out.logits[:, -1].argmax(-1)]
    for _ in range(tokens - 1):
        out = model(ids[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
        ids.append(out.logits[:, -1].argmax(-1))
    return torch.stack(ids, 1)


def greedy_agreement(
    teacher: Any, students: Mapping[str, Any], prompt_BP: Tensor, *, tokens: int = 64, end_id: int | None = None
) -> dict[str, float]:
    """Mean number of tokens for which a student's greedy continuation is the teacher's; at most `tokens`.

    Up to where they part both have the same text before them, so one parallel pass of the student over the teacher's
    continuation finds the place. A continuation ends with `end_id`, counted, where the teacher gives it. "teacher"
    is the mean length of the teacher's own continuations, which no student can exceed.
    """
    with evaluating(teacher, *students.values()):
        next_BT = greedy_continuation(teacher, prompt_BP, tokens).cpu()
        length_B = _first(next_BT == end_id, tokens - 1) + 1 if end_id is not None else torch.tensor(tokens)
        text_BL = torch.cat([prompt_BP.cpu(), next_BT[:, :-1]], 1)
        out = {"teacher": float(length_B.double().mean())}
        for name, student in students.items():
            logits_BTV = student(text_BL.to(student.device), use_cache=False, logits_to_keep=tokens).logits
            parted_B = _first(logits_BTV.argmax(-1).cpu() != next_BT, tokens)
            out[name] = float(torch.minimum(parted_B, length_B).double().mean())
    return out


def _first(is_BT: Tensor, otherwise: int) -> Tensor:
    """Index of the first True in each row, or `otherwise`."""
    return torch.where(is_BT.any(1), is_BT.int().argmax(1), otherwise)
