"""The end of a model in a stage's loss, by task: what the teacher gives there, and what the student is compared with.

    causal-lm, masked-lm     KL to the teacher's words, cross-entropy of the next token (causal-lm)
    sentence-embedding       1 - cosine to the teacher's embedding
    image-classification     KL to the teacher's classes, cross-entropy of the label, and of the teacher's choice

A task without a head here can still be distilled by its layers and mixers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.models.heads import pool
from zoo.train.data import Batch
from zoo.train.losses import embedding_distance, head_loss
from zoo.train.recipe import LossWeights, Stage

Guide = dict[str, Tensor]
Loss = tuple[Tensor, dict[str, Tensor]]


class Head:
    """Of a task whose end has no term. `terms`: those of `LossWeights` that a head computes."""

    terms: ClassVar[set[str]] = set()

    def __init__(self, stage: Stage, teacher: Any) -> None:
        self.stage, self.teacher, self.weights = stage, teacher, stage.weights

    @property
    def wanted(self) -> bool:
        """Whether the stage weighs any of the terms."""
        return bool(self.terms & self.weights.used)

    @property
    def taught(self) -> bool:
        """Whether one of them follows the teacher."""
        return bool((self.terms - {"ce"}) & self.weights.used)

    def teach(self, x_BLD: Tensor, batch: Batch) -> Guide:
        """What the loss needs of the teacher, from the output of its last block."""
        return {}

    def loss(self, student: Any, x_BLD: Tensor, batch: Batch, guide: Guide, early: Sequence[Tensor] = ()) -> Loss:
        """The weighted loss, and its terms by name, from the output of the student's last block.

        early: what the early exits read, where the student has some and the stage trains them.
        """
        raise NotImplementedError


class VocabularyHead(Head):
    """Words: KL and cross-entropy in blocks, from the states that the vocabulary is multiplied with."""

    terms: ClassVar = {"kl", "ce"}

    def teach(self, x_BLD: Tensor, batch: Batch) -> Guide:
        return {"last": finish(self.teacher, x_BLD)}

    def loss(self, student: Any, x_BLD: Tensor, batch: Batch, guide: Guide, early: Sequence[Tensor] = ()) -> Loss:
        last_BLD = finish(student, x_BLD)
        loss, terms = self._loss(student, last_BLD, batch, guide)
        if not early:
            return loss, terms
        # exits by the stage's `exits`, deeper ones counting more
        *weights, end = student.exits.weights()
        if self.stage.exits == "as_last":
            losses = [self._loss(student, h_BLD, batch, guide)[0] for h_BLD in early]
        else:
            head, end = student.lm_head, 1.0
            weights = [weight / sum(weights) for weight in weights]
            bias = None if head.bias is None else head.bias.detach()
            teacher = (last_BLD.detach().flatten(0, 1), head.weight.detach(), bias)
            losses = [self._distance(h_BLD, head, teacher, kl=1.0)[0] for h_BLD in early]
        error = torch.stack([weight * x for weight, x in zip(weights, losses, strict=True)]).sum()
        terms["exits"] = (error / sum(weights)).detach()
        return end * loss + error, terms

    def _loss(self, student: Any, x_BLD: Tensor, batch: Batch, guide: Guide) -> Loss:
        weights, teacher = self.weights, None
        if weights.kl:
            t_head = self.teacher.lm_head
            teacher = (guide["last"].flatten(0, 1), t_head.weight, t_head.bias)
        targets_N = batch.targets.flatten()
        return self._distance(x_BLD, student.lm_head, teacher, targets_N=targets_N, kl=weights.kl, ce=weights.ce)

    def _distance(self, x_BLD: Tensor, head: Any, teacher: Any, **terms: Any) -> Loss:
        return head_loss(
            x_BLD.flatten(0, 1),
            head.weight,
            head.bias,
            teacher=teacher,
            temperature=self.stage.temperature,
            dtype=torch.bfloat16 if self.stage.precision == "bf16" else None,
            **terms,
        )


class EmbeddingHead(Head):
    """One vector a row."""

    terms: ClassVar = {"embedding"}

    def teach(self, x_BLD: Tensor, batch: Batch) -> Guide:
        return {"embedding": embedding(self.teacher, x_BLD, batch.mask)}

    def loss(self, student: Any, x_BLD: Tensor, batch: Batch, guide: Guide, early: Sequence[Tensor] = ()) -> Loss:
        error = embedding_distance(embedding(student, x_BLD, batch.mask), guide["embedding"])
        return self.weights.embedding * error, {"embedding": error.detach()}


class ClassHead(Head):
    """A class for each image, from one or two classifiers (DeiT, Touvron et al. 2020, arXiv 2012.12877).

    With two, the second follows the teacher and the first learns the labels; without a teacher in the loss both learn
    the labels, and without labels both follow the teacher. A teacher that has two is followed by each in its place; a
    student that has one follows the teacher's answer, the mean of the two.
    """

    terms: ClassVar = {"kl", "ce", "hard"}

    def teach(self, x_BLD: Tensor, batch: Batch) -> Guide:
        return {"answers": torch.stack(_answers(self.teacher, x_BLD))}

    def loss(self, student: Any, x_BLD: Tensor, batch: Batch, guide: Guide, early: Sequence[Tensor] = ()) -> Loss:
        weights, own = self.weights, _answers(student, x_BLD)
        loss, terms = x_BLD.new_zeros((), dtype=torch.float32), {}
        if weights.ce:
            learners = own[:1] if self.taught else own
            value = torch.stack([self._cross_entropy(s_BC, batch.targets) for s_BC in learners]).mean()
            loss, terms["ce"] = loss + weights.ce * value, value.detach()
        if self.taught:
            pairs = self._followed(own, list(guide["answers"].float()))
            for name, weight, distance in (("kl", weights.kl, self._kl), ("hard", weights.hard, _hard)):
                if weight:
                    value = torch.stack([distance(s_BC, t_BC) for s_BC, t_BC in pairs]).mean()
                    loss, terms[name] = loss + weight * value, value.detach()
        right_B = torch.stack([s_BC.detach() for s_BC in own]).mean(0).argmax(-1) == batch.targets
        return loss, {**terms, "accuracy": right_B.float().mean()}

    def _followed(self, own: list[Tensor], theirs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a classifier of the student and what it follows."""
        if len(own) == 1:
            return [(own[0], torch.stack(theirs).mean(0))]
        if len(theirs) == 2:
            return list(zip(own, theirs, strict=True))
        return [(s_BC, theirs[0]) for s_BC in (own[1:] if self.weights.ce else own)]

    def _kl(self, s_BC: Tensor, t_BC: Tensor) -> Tensor:
        T = self.stage.temperature
        log_q_BC, log_p_BC = ((x_BC / T).log_softmax(-1) for x_BC in (s_BC, t_BC))
        return T * T * F.kl_div(log_q_BC, log_p_BC, log_target=True, reduction="batchmean")

    def _cross_entropy(self, s_BC: Tensor, target_B: Tensor) -> Tensor:
        return F.cross_entropy(s_BC, target_B, label_smoothing=self.stage.label_smoothing)


def _hard(s_BC: Tensor, t_BC: Tensor) -> Tensor:
    return F.cross_entropy(s_BC, t_BC.argmax(-1))


def _answers(model: Any, x_BLD: Tensor) -> list[Tensor]:
    """Logits (B, C) in float32 of each classifier."""
    return [logits.float() for logits in model.both_answers(model.model.finish(x_BLD)) if logits is not None]


HEADS: dict[str, type[Head]] = {
    "causal-lm": VocabularyHead,
    "masked-lm": VocabularyHead,
    "sentence-embedding": EmbeddingHead,
    "image-classification": ClassHead,
}


def head_of(stage: Stage, student: Any, teacher: Any) -> Head:
    """The head of the student's task."""
    return HEADS.get(student.config.task, Head)(stage, teacher)


def check_terms(weights: LossWeights, student: Any, teacher: Any) -> None:
    """Raise ConfigError for a term that the student's task does not have, or where the heads do not fit."""
    task = student.config.task
    terms = HEADS.get(task, Head).terms
    if weights.ce and (task == "masked-lm" or "ce" not in terms):
        raise ConfigError(f"loss.ce: next-token prediction needs a causal-lm, this model is a {task}")
    if weights.kl and "kl" not in terms:
        other = "embedding" if task == "sentence-embedding" else "hidden or loss.mixer"
        raise ConfigError(f"loss.kl: a {task} has no distribution over words; use loss.{other}")
    if weights.embedding and "embedding" not in terms:
        raise ConfigError(f"loss.embedding: this model is a {task}, which has no sentence embedding; use loss.hidden")
    if weights.hard and "hard" not in terms:
        raise ConfigError(f"loss.hard: this model is a {task}, which has no classes; use loss.kl")
    if teacher is not None and task == "image-classification" and (weights.kl or weights.hard):
        sizes = [model.config.num_labels for model in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise ConfigError(f"the student has {sizes[0]} classes, the teacher {sizes[1]}; kl and hard need the same")


def finish(model: Any, x_BLD: Tensor) -> Tensor:
    """From the last block's output to the state that the vocabulary is multiplied with."""
    x_BLD = model.model.finish(x_BLD)
    transform = getattr(model, "transform", None)
    return x_BLD if transform is None else transform(x_BLD)


def embedding(model: Any, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """From the last block's output to one vector a row (B, D), of whatever length."""
    return pool(finish(model, x_BLD), mask_BL, model.config.pooling)
