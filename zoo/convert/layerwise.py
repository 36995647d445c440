"""Running a model layer by layer, with the teacher's own pass recorded once.

A conversion asks one question again and again: how far are the outputs from the teacher's when only layer i differs?
The layers below i then compute what they computed before, so a `Trace` keeps the teacher's input of every layer and
only the layers from i upwards are run.

For models with a vocabulary the distance is KL(teacher || student). Both heads are the same linear map W, so with the
teacher's probabilities p and the difference of logits d = W (h_student - h_teacher)

    KL = log sum_v p_v exp(d_v) - sum_v p_v d_v

which loses nothing under bf16: d is small where the models agree, while the rounding of two logits of size 16 to eight
bits would alone look like 0.001 nats. Rows of tokens are whole: no padding, no packing.

Shapes: N rows, L positions, D model width; see `zoo.mixers.base` for the rest.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConversionError
from zoo.mixers.base import AttentionStats, State
from zoo.models.backbone import Block, ZooPreTrainedModel
from zoo.models.heads import pool

MEASURES = {
    "causal-lm": "KL, nats/token",
    "masked-lm": "KL, nats/token",
    "sequence-classification": "KL, nats/sequence",
    "image-classification": "KL, nats/image",
    "sentence-embedding": "1 - cosine",
}
CLASSIFIERS = ("sequence-classification", "image-classification")
TOKENS_AT_ONCE = 2048  # rows are run in groups of about so many tokens
LOGITS_AT_ONCE = 1 << 24  # logits that exist at once in float32 (64 MB)
KEPT_PROBABILITIES = 1 << 28  # numbers (512 MB in bf16); beyond, the teacher's head is run again for each question


def fast_autocast(model: ZooPreTrainedModel, enabled: bool = True) -> Any:
    """bf16 autocast where the machine computes bf16 natively, else no autocast."""
    device = next(model.parameters()).device.type
    native = device != "cpu" or _cpu_has_bf16()
    return torch.autocast(device, torch.bfloat16, enabled=enabled and native)


def _cpu_has_bf16() -> bool:
    probe: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(probe.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def track(items: Sequence[Any], text: str, progress: bool) -> Iterable[Any]:
    """`items`, with a progress bar on stderr where `progress` is on and somebody is looking."""
    if not progress or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(items, description=text, console=Console(stderr=True), transient=True)


class Given(nn.Module):
    """Stands in a block for a mixer whose output is already known."""

    shares = False

    def __init__(self, y_BLD: Tensor) -> None:
        super().__init__()
        self.y_BLD = y_BLD

    def forward(self, x_BLD: Tensor, **unused: Any) -> tuple[Tensor, State | None]:
        """The given output, whatever the input."""
        return self.y_BLD, None


@contextlib.contextmanager
def mixer_swapped(block: Block, mixer: nn.Module) -> Iterator[Block]:
    """`block` with another mixer for the length of a `with`; the old one is back afterwards, whatever happens."""
    old = block.mixer
    block.mixer = mixer
    try:
        yield block
    finally:
        block.mixer = old


def mixer_input(block: Block, x_NLD: Tensor) -> Tensor:
    """What a block's mixer reads, from the block's input."""
    if block.order == "reversible":
        x_NLD = x_NLD.chunk(2, -1)[1]
    return x_NLD if block.order in ("post_norm", "output_norm") else block.mixer_norm(x_NLD)


Shared = dict[str, Tensor]  # what all layers of a pass may read, such as the grid of an image


def mixer_output(block: Block, x_NLD: Tensor, shared: Shared | None = None) -> Tensor:
    """What a block's mixer returns, from the block's input; float32."""
    extra = {"shared": block.sees(shared)} if block.mixer.shares else {}
    return block.mixer(mixer_input(block, x_NLD), **extra)[0].float()


def run_layers(blocks: Iterable[nn.Module], x_NLD: Tensor, shared: Shared | None = None) -> Tensor:
    """The blocks one after the other on whole rows."""
    shared = dict(shared or {})
    for block in blocks:
        x_NLD = block(x_NLD, None, None, None, shared)[0]
    return x_NLD


def embed(model: Any, tokens_NL: Tensor) -> Tensor:
    """The input of the first layer, of tokens or images."""
    return model.model._embed(model.model.embed(tokens_NL)[0], None, None, None, None)


def before_head(model: Any, x_NLD: Tensor) -> Tensor:
    """What the last linear map reads, (N, L, D), or for a task with one answer a row the answer itself, (N, E)."""
    task, x_NLD = model.config.task, model.model.finish(x_NLD)
    if task == "causal-lm":
        return x_NLD
    if task == "masked-lm":
        return x_NLD if model.transform is None else model.transform(x_NLD)
    if task == "image-classification":
        return model.answer(x_NLD)
    pooled_ND = pool(x_NLD, None, model.config.pooling)
    if task == "sentence-embedding":
        return pooled_ND
    return model.answer(pooled_ND)


class Trace:
    """The teacher's pass over the calibration tokens (N, L), or images (N, channels, rows, columns).

    `inputs[i]` is the input of layer i (N, L, D, float32) and `inputs[-1]` the output of the last. `stats` holds an
    `AttentionStats` for each attention layer, measured in the same pass (None with `with_stats=False`). `shared` is
    what the layers may share, `length` how long the sequences are.
    """

    def __init__(
        self, model: ZooPreTrainedModel, tokens_NL: Tensor, *, fast: bool = True, with_stats: bool = True
    ) -> None:
        from zoo.convert.stats import StatsSum

        check_tokens(model, tokens_NL)
        self.model, self.fast = model, fast
        self.tokens_NL = tokens_NL.to(next(model.parameters()).device)
        self.task = model.config.task
        with torch.no_grad():
            first_1LD, self.shared = model.model.embed(self.tokens_NL[:1])
        self.length = first_1LD.shape[1]
        blocks = model.model.layers
        sums = {i: StatsSum() for i, b in enumerate(blocks) if with_stats and b.mixer.name == "attention"}
        parts: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
        ends = []
        with torch.no_grad(), fast_autocast(model, fast):
            for rows in self.groups(range(len(tokens_NL))):
                x_NLD = embed(model, self.tokens_NL[rows])
                shared = dict(self.shared)
                for i, block in enumerate(blocks):
                    parts[i].append(x_NLD)
                    if i in sums:
                        sums[i].add(block.mixer, mixer_input(block, x_NLD))
                    x_NLD = block(x_NLD, None, None, None, shared)[0]
                parts[-1].append(x_NLD)
                ends.append(before_head(model, x_NLD).float())
        self.inputs = [torch.cat(part) for part in parts]
        self.ends = torch.cat(ends)
        self.stats: dict[int, AttentionStats] = {i: s.result() for i, s in sums.items()}
        self._probabilities: dict[int, Tensor] = {}

    def groups(self, rows: Iterable[int]) -> list[list[int]]:
        """The rows in groups that are run at once."""
        rows, size = list(rows), max(1, TOKENS_AT_ONCE // self.length)
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    @torch.no_grad()
    def distance(self, first: int, x_NLD: Tensor, rows: Sequence[int], blocks: Sequence[nn.Module]) -> float:
        """Mean distance to the teacher's outputs on `rows`, when layers `first`.. are `blocks` and read `x_NLD`.

        `blocks` holds all layers of a model; those below `first` are not run. Infinite where an output is not finite.
        """
        total = 0.0
        with fast_autocast(self.model, self.fast):
            for group in self.groups(range(len(rows))):
                x = run_layers(list(blocks)[first:], x_NLD[group], self.shared)
                total += self.distance_of_end(x, [rows[i] for i in group]) * len(group)
        mean = total / len(rows)
        return mean if mean == mean else float("inf")

    def distance_of_end(self, x_NLD: Tensor, rows: Sequence[int]) -> float:
        """The same for the output of the last layer; mean over `rows`."""
        end, teacher = before_head(self.model, x_NLD).float(), self.ends[list(rows)]
        if self.task == "sentence-embedding":
            return float((1 - F.cosine_similarity(end, teacher, dim=-1)).mean())
        if self.task in CLASSIFIERS:
            if end.shape[-1] == 1:
                return float(F.mse_loss(end, teacher))
            return float(F.kl_div(end.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"))
        return sum(self._row_kl(end[n], row) for n, row in enumerate(rows)) / len(rows)

    def _row_kl(self, end_LD: Tensor, row: int) -> float:
        weight = self.model.lm_head.weight
        teacher_LD, step = self.ends[row], max(1, LOGITS_AT_ONCE // weight.shape[0])
        total = 0.0
        for start in range(0, len(end_LD), step):
            part = slice(start, start + step)
            p = self._teacher_probabilities(row, part)
            d = F.linear(end_LD[part] - teacher_LD[part], weight).float()
            mean = (p * d).sum(-1)
            peak = d.amax(-1)
            kl = (p * (d - peak[:, None]).exp()).sum(-1).log() + peak - mean
            total += float(kl.sum())
        return total / len(end_LD)

    def _teacher_probabilities(self, row: int, part: slice) -> Tensor:
        head = self.model.lm_head
        keep = self.tokens_NL.numel() * head.weight.shape[0] <= KEPT_PROBABILITIES
        if row in self._probabilities:
            p = self._probabilities[row][part].float()
            return p / p.sum(-1, keepdim=True)
        if not keep:
            return head(self.ends[row][part]).float().softmax(-1)
        step = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        dtype = torch.bfloat16 if torch.is_autocast_enabled(self.ends.device.type) else self.ends.dtype
        pieces = [head(piece).float().softmax(-1).to(dtype) for piece in self.ends[row].split(step)]
        self._probabilities[row] = torch.cat(pieces)
        return self._teacher_probabilities(row, part)

    @torch.no_grad()
    def agreement(self, x_NLD: Tensor, rows: Sequence[int]) -> float | None:
        """Share of positions (or sequences) whose highest-scoring answer is the teacher's; None without such answers.

        `x_NLD` is the output of the last layer on `rows`.
        """
        if self.task == "sentence-embedding" or (self.task in CLASSIFIERS and self.model.config.num_labels == 1):
            return None
        end, teacher = before_head(self.model, x_NLD).float(), self.ends[list(rows)]
        if self.task in CLASSIFIERS:
            return float((end.argmax(-1) == teacher.argmax(-1)).float().mean())
        head, step = self.model.lm_head, max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        pairs = zip(end.flatten(0, 1).split(step), teacher.flatten(0, 1).split(step), strict=True)
        same = [(head(a).argmax(-1) == head(b).argmax(-1)).float() for a, b in pairs]
        return float(torch.cat(same).mean())


def check_tokens(model: ZooPreTrainedModel, tokens_NL: Tensor) -> None:
    """Raise ConversionError unless the tokens are (N, L) ids, or images, that the model can read."""
    if model.config.task == "image-classification":
        try:
            model.model.patches.grid_size(tokens_NL)
        except ValueError as error:
            raise ConversionError(f"calibration data: {error}") from None
        return
    if tokens_NL.dim() != 2 or not tokens_NL.numel() or tokens_NL.is_floating_point():
        raise ConversionError(f"calibration tokens must be integers (rows, length), got shape {tuple(tokens_NL.shape)}")
    config = model.config
    low, high = int(tokens_NL.min()), int(tokens_NL.max())
    if low < 0 or high >= config.vocab_size:
        raise ConversionError(
            f"token id {low if low < 0 else high} is outside the teacher's vocabulary of {config.vocab_size}; "
            "is it the teacher's own tokenizer?"
        )
    if config.positions == "learned" and tokens_NL.shape[1] > config.max_position_embeddings:
        raise ConversionError(
            f"length {tokens_NL.shape[1]} is beyond the teacher's {config.max_position_embeddings} positions"
        )
