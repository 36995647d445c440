"""Heads on the backbone: causal LM, masked LM, sequence and image classification, sentence embedding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers import AutoModelForImageClassification as AutoImageClassifier
from transformers import AutoModelForSequenceClassification as AutoClassifier
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import ModelOutput

from zoo.config import ModelSpec, ZooConfig
from zoo.errors import TraitError
from zoo.linear import Linear, NoNorm
from zoo.models.backbone import ZooModel, ZooPreTrainedModel, make_norm
from zoo.models.early_exit import EarlyExits, ExitOutput

_TIED = {"lm_head.weight": "model.embed_tokens.weight"}


class ExtendedHead(nn.Module):
    """W h with W = [word vectors, extra]: word vectors that have more numbers in the output (MobileBERT)."""

    def __init__(self, words: int, extra: int, vocab_size: int, bias: bool) -> None:
        super().__init__()
        self.words: Any = Linear(words, vocab_size, bias=bias)
        self.extra: Any = Linear(extra, vocab_size, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        words, extra = x_BLD.split([self.words.in_features, self.extra.in_features], -1)
        return self.words(words) + self.extra(extra)

    @property
    def weight(self) -> Tensor:
        """The whole map (V, D)."""
        return torch.cat([self.words.weight, self.extra.weight], 1)

    @property
    def bias(self) -> Tensor | None:
        """(V,), or None."""
        return self.words.bias


class _Vocabulary(ZooPreTrainedModel):
    """A head with an output for each word, tied to the word vectors where the config says so."""

    lm_head: Any
    _tied_weights_keys = _TIED

    def _make_head(self, spec: ModelSpec) -> nn.Module:
        if spec.embedding_output != "extend":
            return Linear(spec.output_size, spec.vocab_size, bias=spec.lm_head_bias)
        self._tied_weights_keys = {"lm_head.words.weight": "model.embed_tokens.weight"}
        extra = spec.hidden_size - spec.word_size
        return ExtendedHead(spec.word_size, extra, spec.vocab_size, bias=spec.lm_head_bias)

    def get_output_embeddings(self) -> nn.Module:
        """The linear map that may be tied to the word vectors."""
        return self.lm_head.words if isinstance(self.lm_head, ExtendedHead) else self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Exchange the map that `get_output_embeddings` gives."""
        if isinstance(self.lm_head, ExtendedHead):
            self.lm_head.words = new_embeddings
        else:
            self.lm_head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers."""
        words = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if isinstance(self.lm_head, ExtendedHead):
            self.lm_head.extra = self._get_resized_lm_head(self.lm_head.extra, words.num_embeddings)
        return words


class ZooForCausalLM(_Vocabulary, GenerationMixin):  # type: ignore[misc]  # push_to_hub, of two bases
    """Next-token prediction; works with `generate`."""

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.model = ZooModel(config)
        if (reason := self.model.why_not_causal) is not None:
            raise TraitError(
                f"a causal LM needs causal layers, but {reason}: set causal: true on every mixer and "
                "chooser: tokens on every moe, or take task masked-lm"
            )
        self.lm_head = self._make_head(config.spec)
        self.exits = EarlyExits(config.spec) if config.exits else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, vocab), or of the last `logits_to_keep` positions; a loss where `labels` are given.

        `labels` (B, L) are the input ids themselves (shifted inside); -100 is not counted. The rest as `ZooModel`.
        """
        extra = {k: kwargs.pop(k) for k in ("num_items_in_batch", "shift_labels") if k in kwargs}
        leaving = self.exits.start(self) if self.exits is not None else None
        if leaving is not None:
            kwargs["run_block"] = leaving
        out = self.model(input_ids, attention_mask, past_key_values=past_key_values, **kwargs)
        x_BLD = out.last_hidden_state if leaving is None else leaving.finish(out.last_hidden_state)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        if isinstance(logits_to_keep, Tensor):
            keep = logits_to_keep  # type: ignore[assignment]
        logits = self.lm_head(x_BLD[:, keep])
        loss = None
        if labels is not None:
            loss_of = partial(self.loss_function, labels=labels, vocab_size=self.config.vocab_size, **extra)
            loss = loss_of(logits)
            if leaving is not None and self.training:
                loss = leaving.loss(loss, loss_of)
            loss = self.with_auxiliary(loss)
        kept = {"past_key_values": out.past_key_values, "hidden_states": out.hidden_states}
        if self.exits is not None:
            return ExitOutput(
                loss=loss, logits=logits, layers_used=None if leaving is None else leaving.used_BL, **kept
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, **kept)


class MaskedLMTransform(nn.Module):
    """BERT's dense layer, activation and norm before the vocabulary."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.dense = Linear(spec.state_size, spec.output_size)
        self.act = ACT2FN[spec.mlm_activation]
        # MobileBERT norms here and nowhere else.
        named = make_norm(spec, spec.output_size)
        self.norm = nn.LayerNorm(spec.output_size, eps=spec.norm_eps) if isinstance(named, NoNorm) else named

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(x_BLD)))


class ZooForMaskedLM(_Vocabulary):
    """Prediction of masked tokens by a two-sided encoder."""

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.model = ZooModel(config)
        self.transform = MaskedLMTransform(config.spec) if config.mlm_transform else None
        self.lm_head = self._make_head(config.spec)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits (B, L, vocab); a loss where `labels` (B, L, -100 where not counted) are given."""
        out = self.model(input_ids, attention_mask, **{**kwargs, "use_cache": False})
        x_BLD = out.last_hidden_state
        logits = self.lm_head(x_BLD if self.transform is None else self.transform(x_BLD))
        loss = None
        if labels is not None:
            loss = self.with_auxiliary(F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()))
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


def pool(x_BLD: Tensor, attention_mask: Tensor | None, how: str) -> Tensor:
    """One vector a sequence: the mean over real tokens, the first one, or the last one; (B, D)."""
    if attention_mask is None:
        attention_mask = torch.ones(x_BLD.shape[:2], dtype=torch.long, device=x_BLD.device)
    mask_BL1 = attention_mask[:, :, None].to(x_BLD.dtype)
    if how == "mean":
        return (x_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1e-9)
    place_BL = attention_mask.long().cumsum(1)
    wanted = (place_BL == 1) if how == "cls" else (place_BL == place_BL[:, -1:])
    index_B = (wanted & attention_mask.bool()).long().argmax(1)
    return x_BLD[torch.arange(x_BLD.shape[0], device=x_BLD.device), index_B]


def classification_loss(config: ZooConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """Of `problem_type`; where it is unset, squared error for one label and cross-entropy for several."""
    kind = config.problem_type or ("regression" if logits.shape[-1] == 1 else "single_label_classification")
    if kind == "regression":
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


class ZooForSequenceClassification(ZooPreTrainedModel):
    """A label (or a number, for one label) for each sequence."""

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.model = ZooModel(config)
        size = config.spec.state_size
        self.pooler = Linear(size, size) if config.pooler else None
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = Linear(size, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits (B, num_labels); a loss where `labels` (B,) are given: squared error for one, else cross-entropy."""
        out = self.model(input_ids, attention_mask, **{**kwargs, "use_cache": False})
        pooled = pool(out.last_hidden_state, attention_mask, self.config.pooling)
        logits = self.answer(pooled)
        loss = None
        if labels is not None:
            loss = self.with_auxiliary(classification_loss(self.config, logits, labels))
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states)

    def answer(self, pooled_BD: Tensor) -> Tensor:
        """Logits (B, num_labels) of pooled states."""
        if self.pooler is not None:
            pooled_BD = ACT2FN[self.config.pooler](self.pooler(pooled_BD))
        return self.classifier(self.dropout(pooled_BD))


class ZooForSentenceEmbedding(ZooPreTrainedModel):
    """One unit vector a sentence, by pooling the encoder's states."""

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.model = ZooModel(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """`pooler_output` (B, D): the sentence embeddings, of length one unless `normalize_embeddings` is off."""
        out = self.model(input_ids, attention_mask, **{**kwargs, "use_cache": False})
        pooled = pool(out.last_hidden_state, attention_mask, self.config.pooling)
        if self.config.normalize_embeddings:
            pooled = F.normalize(pooled, dim=-1)
        return BaseModelOutputWithPooling(
            last_hidden_state=out.last_hidden_state, pooler_output=pooled, hidden_states=out.hidden_states
        )


@dataclass
class ImageClassifierOutput(ModelOutput):
    """Of `ZooForImageClassification`. `logits` is the mean of the two heads' where there are two."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    class_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class ZooForImageClassification(ZooPreTrainedModel):
    """A label for each image, read from the class token, the mean of the patches, or the last patch (`pooling`).

    With a distillation head (DeiT, Touvron et al. 2020, arXiv 2012.12877) a second classifier reads the second token.
    """

    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012 (transformers' type)

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.model = ZooModel(config)
        image: Any = config.spec.image
        self.image = image
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = Linear(config.spec.stack_size, self.num_labels)
        self.distillation_classifier = None
        if image.distillation_head:
            self.distillation_classifier = Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        teacher_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Logits (B, num_labels); a loss where `labels` (B,) are given, as for sequences.

        Args:
            pixel_values: (B, channels, rows, columns), normalised as the model expects.
            labels: what the class head learns.
            teacher_labels: what the distillation head learns: a teacher's answers; by default `labels`. Both heads have
                half of the loss (DeiT's hard distillation).
        """
        out = self.model(pixel_values=pixel_values, **{**kwargs, "use_cache": False})
        first, second = self.both_answers(out.last_hidden_state)
        loss = None
        if labels is not None:
            loss = classification_loss(self.config, first, labels)
            if second is not None:
                targets = labels if teacher_labels is None else teacher_labels
                loss = (loss + classification_loss(self.config, second, targets)) / 2
            loss = self.with_auxiliary(loss)
        logits = first if second is None else (first + second) / 2
        return ImageClassifierOutput(loss, logits, first, second, out.hidden_states)

    def both_answers(self, x_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the class head and of the distillation head, from the backbone's output."""
        if self.config.pooling == "cls":
            pooled_BD = x_BLD[:, 0]
        else:
            pooled_BD = pool(x_BLD[:, self.image.prefix :], None, self.config.pooling)
        first = self.classifier(self.dropout(pooled_BD))
        if self.distillation_classifier is None:
            return first, None
        return first, self.distillation_classifier(self.dropout(x_BLD[:, 1]))

    def answer(self, x_BLD: Tensor) -> Tensor:
        """Logits (B, num_labels) from the backbone's output."""
        first, second = self.both_answers(x_BLD)
        return first if second is None else (first + second) / 2


TASK_CLASSES: dict[str, type[ZooPreTrainedModel]] = {
    "causal-lm": ZooForCausalLM,
    "masked-lm": ZooForMaskedLM,
    "sequence-classification": ZooForSequenceClassification,
    "sentence-embedding": ZooForSentenceEmbedding,
    "image-classification": ZooForImageClassification,
}

AutoConfig.register("zoo", ZooConfig)
AutoModel.register(ZooConfig, ZooModel)
AutoModelForCausalLM.register(ZooConfig, ZooForCausalLM)
AutoModelForMaskedLM.register(ZooConfig, ZooForMaskedLM)
AutoClassifier.register(ZooConfig, ZooForSequenceClassification)
AutoImageClassifier.register(ZooConfig, ZooForImageClassification)
