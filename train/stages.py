"""What a stage computes: which parameters train, what the teacher gives, the loss.

align     each converted mixer on the teacher's own input to that layer: ||y - y_T||^2 / ||y_T||^2 (teacher forcing). No
          gradient goes from layer to layer.
distill   end to end: what the task's head compares (`zoo.train.heads`: KL to the teacher's distribution, cross-entropy,
          distance of sentence embeddings), and the relative errors of layers and mixers.
finetune, pretrain    cross-entropy alone.

A student with early exits trains them with these losses, or to follow its own last layer (`exits` of a stage).

What is the same in teacher and student is computed once: the leading layers that are frozen and equal run in the
teacher only, and the student goes on from there.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, did_you_mean
from zoo.ffn.base import ChannelMixer
from zoo.models.backbone import ZooModel, ZooPreTrainedModel
from zoo.train.data import Batch
from zoo.train.heads import Guide, Head, check_terms, head_of
from zoo.train.losses import relative_error
from zoo.train.recipe import Stage


def converted_layers(student: ZooPreTrainedModel, teacher: ZooPreTrainedModel | None) -> list[int]:
    """The layers whose mixer is not the teacher's.

    Without a teacher, or with one of another depth, those that are not attention, or else all.
    """
    ours, theirs = student.config.layers, [] if teacher is None else teacher.config.layers
    if len(ours) != len(theirs):
        names = student.config.mixer_names
        return [i for i, name in enumerate(names) if name != "attention"] or list(range(len(names)))
    return [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a["mixer"] != b["mixer"]]


@dataclass(frozen=True)
class Group:
    """Parameters by name that train at one peak rate."""

    pattern: str
    lr: float
    names: list[str]


def choose_parameters(student: ZooPreTrainedModel, stage: Stage, converted: list[int]) -> list[Group]:
    """What trains, by the stage's `train`; sets `requires_grad` on every parameter.

    Raises ConfigError for a pattern that fits no parameter, with the nearest names, and where nothing is to be trained.
    """
    names = [name for name, _ in student.named_parameters()]
    mixers = tuple(f"model.layers.{i}.mixer." for i in converted)
    taken: dict[str, str] = {}
    for pattern in stage.trains:
        if pattern == "mixers":
            fits = [n for n in names if n.startswith(mixers)] if mixers else []
        else:
            fits = names if pattern == "all" else fnmatch.filter(names, pattern)
            if not fits:
                raise ConfigError(f"train: no parameter fits {pattern!r}{_near(pattern, names)}")
        if stage.kind == "align":
            fits = [n for n in fits if mixers and n.startswith(mixers)]
        for name in fits:
            taken.setdefault(name, pattern)
    if not taken:
        raise ConfigError(f"a {stage.kind} stage has nothing to train: every mixer is the teacher's own")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in taken)
    rates = stage.trains
    return [Group(p, rates[p], [n for n in names if taken.get(n) == p]) for p in rates if p in taken.values()]


def _near(pattern: str, names: list[str]) -> str:
    return did_you_mean(pattern.replace("*", ""), ["mixers", "all", *names]) or "; for example model.layers.0.*"


def make_optimizer(student: Any, groups: list[Group], stage: Stage) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); vectors (norms, biases, decays) are not decayed."""
    parameters = dict(student.named_parameters())
    parts = []
    for group in groups:
        chosen = [parameters[name] for name in group.names]
        for decay, members in (
            (stage.weight_decay, [p for p in chosen if p.dim() > 1]),
            (0.0, [p for p in chosen if p.dim() <= 1]),
        ):
            if members:
                parts.append({"params": members, "lr": group.lr, "weight_decay": decay})
    return torch.optim.AdamW(parts, betas=(stage.betas[0], stage.betas[1]), eps=stage.eps, fused=_fused(parts))


def _fused(parts: list[dict[str, Any]]) -> bool:
    devices = {p.device.type for part in parts for p in part["params"]}
    return devices <= {"cpu", "cuda"} and all(p.is_floating_point() for part in parts for p in part["params"])


def check_stage(stage: Stage, student: ZooPreTrainedModel, teacher: ZooPreTrainedModel | None) -> None:
    """Raise ConfigError where the models have no such loss."""
    weights = stage.weights
    if stage.needs_teacher and teacher is None:
        raise ConfigError(f"a {stage.kind} stage needs a teacher; name one, or take a finetune or pretrain stage")
    check_terms(weights, student, teacher)
    if stage.exits == "from_last" and getattr(student, "exits", None) is None:
        raise ConfigError("exits: this model has no early exits; zoo.models.early_exit.add_exits gives it some")
    if teacher is not None and weights.used & {"hidden", "mixer"}:
        depths = [len(model.config.layers) for model in (student, teacher)]
        if depths[0] != depths[1]:
            term = "hidden" if weights.hidden else "mixer"
            raise ConfigError(f"loss.{term}: the student has {depths[0]} layers and the teacher {depths[1]}")
    sized = weights.hidden or weights.embedding
    if teacher is not None and sized and student.config.hidden_size != teacher.config.hidden_size:
        sizes = f"{student.config.hidden_size} and {teacher.config.hidden_size}"
        term = "hidden" if weights.hidden else "embedding"
        raise ConfigError(f"loss.{term}: hidden sizes differ ({sizes}); only terms of the head fit")
    limit = student.config.max_position_embeddings
    if student.config.positions == "learned" and stage.length > limit:
        raise ConfigError(f"length: {stage.length} is beyond the {limit} positions that the model has learned")


def _first_trained(student: ZooPreTrainedModel) -> int:
    """The number of leading blocks without a trained parameter; 0 where something before them trains."""
    model: Any = student.model
    parts = [part for part in (model.layers, model.norm, model.project_out) if part is not None]
    blocks = {id(p) for part in parts for p in part.parameters()}
    if any(p.requires_grad for p in model.parameters() if id(p) not in blocks):
        return 0
    for i, block in enumerate(model.layers):
        if any(p.requires_grad for p in block.parameters()):
            return i
    return len(model.layers)


def shared_layers(student: ZooPreTrainedModel, teacher: ZooPreTrainedModel) -> int:
    """How many leading blocks are frozen in the student and equal to the teacher's, embeddings included."""
    ours, theirs = student.model, teacher.model
    if not _equal(_outside_blocks(ours), _outside_blocks(theirs)):
        return 0
    count = 0
    for i in range(min(_first_trained(student), len(theirs.layers))):
        if student.config.layers[i] != teacher.config.layers[i]:
            break
        if not _equal(ours.layers[i].state_dict(), theirs.layers[i].state_dict()):
            break
        count += 1
    return count


def _outside_blocks(model: Any) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if not n.startswith(("layers.", "norm.", "project_out."))}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(t.shape == b[n].shape and torch.equal(t, b[n].to(t)) for n, t in a.items())


@contextmanager
def watching(backbone: Any, layers: list[int], first: int = 0) -> Iterator[dict[str, Tensor]]:
    """Inputs ("mixer_in.i") and outputs ("mixer_out.i") of these layers' mixers, in a pass from layer `first` on.

    A mixer that several layers share is told apart by its turn.
    """
    seen: dict[str, Tensor] = {}
    turns: dict[nn.Module, list[int]] = {}
    for i in range(first, len(backbone.layers)):
        turns.setdefault(backbone.layers[i].mixer, []).append(i)

    def hook(module: nn.Module, args: tuple, out: tuple) -> None:
        i = turns[module].pop(0)
        if i in layers:
            seen[f"mixer_in.{i}"], seen[f"mixer_out.{i}"] = args[0], out[0]

    with ExitStack() as stack:
        for mixer, runs in turns.items():
            if not set(runs).isdisjoint(layers):
                stack.callback(mixer.register_forward_hook(hook).remove)
        yield seen


def embed(backbone: ZooModel, batch: Batch) -> Tensor:
    """The input of the first block (B, L, D)."""
    return backbone._embed(backbone.embed(batch.inputs)[0], batch.mask, None, batch.segment_ids, None)


def shared_inputs(backbone: ZooModel, batch: Batch) -> dict[str, Tensor]:
    """What all layers may share in a pass over this batch, as it is before the first: the grid of images."""
    return {} if backbone.patches is None else backbone.patches.grids(batch.inputs)


@dataclass
class Teaching:
    """The teacher's side of a stage: run it over a batch, get the tensors that the loss compares with.

    converted: layers of which the mixers are compared. hidden: layers of which the outputs are. head: of the task,
    where the end of the model is needed. shared: leading layers that stand for the student's as well.
    """

    teacher: Any
    converted: list[int] = field(default_factory=list)
    hidden: list[int] = field(default_factory=list)
    head: Head | None = None
    shared: int = 0
    inputs: bool = False  # of the mixers, for align

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Guide:
        backbone, out = self.teacher.model, {}
        x_BLD = embed(backbone, batch)
        stop = len(backbone.layers)
        if self.head is None:
            stop = 1 + max([*self.converted, *self.hidden, self.shared - 1, 0])
        passed = shared_inputs(backbone, batch) | backbone.first_shared(x_BLD)
        with watching(backbone, self.converted) as seen:
            for i, block in enumerate(backbone.layers[:stop]):
                x_BLD, _ = block(x_BLD, batch.mask, batch.segment_ids, None, passed)
                if i + 1 == self.shared:
                    out["shared"] = x_BLD
                if i in self.hidden:
                    out[f"hidden.{i}"] = x_BLD
        out |= {name: t for name, t in seen.items() if self.inputs or name.startswith("mixer_out")}
        return out if self.head is None else out | self.head.teach(x_BLD, batch)


class Objective(nn.Module):
    """The loss of one stage as a module around the student, so that DDP and FSDP see one forward pass.

    `forward(batch, guide)` gives the weighted loss (a scalar) and its terms by name.
    """

    def __init__(self, student: Any, teacher: Any, stage: Stage, converted: list[int]) -> None:
        super().__init__()
        self.student = student
        self.stage, self.converted = stage, converted
        for module in student.modules():
            if isinstance(module, ChannelMixer):
                module.auxiliary_loss = None  # of an earlier stage; a layer that is shared with the teacher never runs
        self.device_type = next(student.parameters()).device.type
        self._teacher = (teacher,)  # in a tuple: not a submodule, so nobody wraps, moves or saves it
        weights = stage.weights
        first = _first_trained(student)
        self.hidden = list(range(first, len(student.model.layers))) if weights.hidden else []
        self.shared = shared_layers(student, teacher) if teacher is not None and stage.kind == "distill" else 0
        self.exits = getattr(student, "exits", None) if stage.exits != "none" else None
        if self.exits is not None:  # which read what those layers give
            self.shared = min(self.shared, self.exits.options.layers[0])
        self.head = head_of(stage, student, teacher)
        self.teaching = None
        if stage.needs_teacher:
            self.teaching = Teaching(
                teacher,
                converted=converted if weights.mixer else [],
                hidden=self.hidden,
                head=self.head if self.head.taught else None,
                shared=self.shared,
                inputs=stage.kind == "align",
            )

    @property
    def teacher(self) -> Any:
        """The teacher, or None."""
        return self._teacher[0]

    def precision(self) -> Any:
        """The autocast region of the stage; parameters stay float32."""
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.stage.precision == "bf16")

    def teach(self, batch: Batch) -> Guide:
        """The teacher's tensors for a batch ({} in a stage without teacher)."""
        if self.teaching is None:
            return {}
        with self.precision():
            return self.teaching(batch)

    def forward(self, batch: Batch, guide: Guide) -> tuple[Tensor, dict[str, Tensor]]:
        with self.precision():
            return self._align(batch, guide) if self.stage.kind == "align" else self._end_to_end(batch, guide)

    def _align(self, batch: Batch, guide: Guide) -> tuple[Tensor, dict[str, Tensor]]:
        errors, passed = [], shared_inputs(self.student.model, batch)
        for i in self.converted:
            block = self.student.model.layers[i]
            extra = {"shared": block.sees(passed)} if block.mixer.shares else {}
            y_BLD, _ = block.mixer(guide[f"mixer_in.{i}"], mask_BL=batch.mask, segments_BL=batch.segment_ids, **extra)
            errors.append(relative_error(y_BLD, guide[f"mixer_out.{i}"], batch.mask))
        error = torch.stack(errors).mean()
        return self.stage.weights.mixer * error, {"mixer": error.detach()}

    def _end_to_end(self, batch: Batch, guide: Guide) -> tuple[Tensor, dict[str, Tensor]]:
        weights, backbone = self.stage.weights, self.student.model
        first_BLD = embed(backbone, batch) if self.shared == 0 or backbone.reads_embedding else guide["shared"]
        passed = shared_inputs(backbone, batch) | backbone.first_shared(first_BLD)
        x_BLD = guide["shared"] if self.shared else first_BLD
        hidden: list[Tensor] = []
        early: list[Tensor] = []  # what the exits read
        with watching(backbone, self.converted if weights.mixer else [], self.shared) as seen:
            for i, block in enumerate(backbone.layers):
                if i < self.shared:
                    continue
                x_BLD, _ = block(x_BLD, batch.mask, batch.segment_ids, None, passed)
                if i in self.hidden:
                    hidden.append(relative_error(x_BLD, guide[f"hidden.{i}"], batch.mask))
                if self.exits is not None and i in self.exits.options.layers:
                    early.append(self.exits.head(i, x_BLD, backbone.norm))
        loss = x_BLD.new_zeros((), dtype=torch.float32)
        terms: dict[str, Tensor] = {}
        if self.head.wanted:
            loss, terms = self.head.loss(self.student, x_BLD, batch, guide, early)
        if hidden:
            terms["hidden"] = (error := torch.stack(hidden).mean()).detach()
            loss = loss + weights.hidden * error
        if weights.mixer:
            pairs = [(seen[f"mixer_out.{i}"], guide[f"mixer_out.{i}"]) for i in self.converted if i >= self.shared]
            errors = [relative_error(y, t, batch.mask) for y, t in pairs]
            terms["mixer"] = (error := torch.stack(errors).mean()).detach()
            loss = loss + weights.mixer * error
        if (extra := backbone.auxiliary_loss()) is not None:
            terms["auxiliary"] = extra.detach()
            loss = loss + extra
        return loss, terms


def first_non_finite(objective: Objective, batch: Batch, guide: Guide) -> str:
    """Where the first value that is not finite appears when this batch is run again: a module's name, or the loss."""
    for name, parameter in objective.student.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name}"
    for name, t in guide.items():
        if not torch.isfinite(t).all():
            return f"the teacher ({name})"
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            tensors = out if isinstance(out, tuple | list) else [out]
            if not found and any(isinstance(t, Tensor) and not torch.isfinite(t).all() for t in tensors):
                found.append(name)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in objective.student.named_modules():
            stack.callback(module.register_forward_hook(watch(name)).remove)
        objective(batch, guide)
    return found[0] if found else "the gradient"
