"""BERT (Devlin et al. 2018, arXiv:1810.04805), RoBERTa, DistilBERT, and MiniLM, which is a small BERT.

Positions: ours count the real tokens of a row, as the attention mask shows them. RoBERTa counts tokens that are not
the padding id, which is the same for a mask that says so. BERT and DistilBERT number the columns: with padding on the
right that is equal, with padding on the left it is not, so pad encoders on the right, as their tokenizers do.

The pooler of a bare encoder is not part of a sentence embedding; it is left out, and a model written back has none.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from zoo.convert.teachers.adapter import Packed, TeacherAdapter, register_teacher
from zoo.errors import ConversionError


class Encoder(TeacherAdapter):
    """Post-norm, two-sided attention with biases, learned positions, a norm on the embeddings."""

    padding: ClassVar[Literal["right", "none"]] = "right"
    only: ClassVar = {"position_embedding_type": ("absolute",), "is_decoder": (False,), "embedding_size": ()}

    def encoder_spec(
        self, config: Any, task: str, *, inner: int, activation: str, eps: float, dropout: float, **fields: Any
    ) -> dict[str, Any]:
        """The fields that all of these share."""
        mixer = {
            "name": "attention",
            "num_heads": config.num_attention_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "qkv_bias": True,
            "out_bias": True,
            "causal": False,
        }
        ffn = {"name": "mlp", "hidden_size": inner, "activation": activation}
        values: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "max_position_embeddings": config.max_position_embeddings,
            "positions": "learned",
            "layers": [{"mixer": mixer, "ffn": ffn}] * config.num_hidden_layers,
            "block": "post_norm",
            "norm": "layer_norm",
            "norm_eps": eps,
            "final_norm": False,
            "embedding_norm": True,
            "embedding_dropout": dropout,
            "tie_word_embeddings": bool(config.tie_word_embeddings),
            "initializer_range": config.initializer_range,
            **fields,
        }
        if task == "masked-lm":
            values |= {"mlm_transform": True, "mlm_activation": activation, "lm_head_bias": True}
        return values

    def bert_spec(self, config: Any, task: str, **fields: Any) -> dict[str, Any]:
        """`encoder_spec` of a config whose fields are named as BERT's."""
        named = {
            "inner": config.intermediate_size,
            "activation": config.hidden_act,
            "eps": config.layer_norm_eps,
            "dropout": config.hidden_dropout_prob,
            "token_types": config.type_vocab_size,
        }
        return self.encoder_spec(config, task, **named, **fields)

    def inputs(self, ids_BL: Tensor, mask_BL: Tensor) -> dict[str, Tensor]:
        return {"input_ids": ids_BL, "attention_mask": mask_BL}

    def build(self, architecture: str, config: Any) -> Any:
        cls = self.original_class(architecture)
        bare = self.architectures[architecture] == "sentence-embedding"
        return cls(config, add_pooling_layer=False) if bare and "pooler" in self.dropped else cls(config)


class _BertLike(Encoder):
    prefix: ClassVar[str]
    dropped = ("pooler",)

    def spec(self, config: Any, task: str) -> dict[str, Any]:
        values = self.bert_spec(config, task)
        if task == "sequence-classification":
            dropout = getattr(config, "classifier_dropout", None)
            values |= {
                "pooling": "cls",
                "pooler": "tanh",
                "classifier_dropout": config.hidden_dropout_prob if dropout is None else dropout,
            }
        return values

    def modules(self, config: Any, architecture: str) -> dict[str, str | Packed]:
        bare = self.architectures[architecture] == "sentence-embedding"
        root, ours = "" if bare else f"{self.prefix}.", "model.layers.{i}."
        theirs = root + "encoder.layer.{i}."
        return {
            root + "embeddings.word_embeddings": "model.embed_tokens",
            root + "embeddings.position_embeddings": "model.embed_positions",
            root + "embeddings.token_type_embeddings": "model.embed_token_types",
            root + "embeddings.LayerNorm": "model.embed_norm",
            theirs + "attention.self.query": ours + "mixer.q_proj",
            theirs + "attention.self.key": ours + "mixer.k_proj",
            theirs + "attention.self.value": ours + "mixer.v_proj",
            theirs + "attention.output.dense": ours + "mixer.o_proj",
            theirs + "attention.output.LayerNorm": ours + "mixer_norm",
            theirs + "intermediate.dense": ours + "ffn.up_proj",
            theirs + "output.dense": ours + "ffn.down_proj",
            theirs + "output.LayerNorm": ours + "ffn_norm",
            **self.head_modules(architecture),
        }

    def head_modules(self, architecture: str) -> dict[str, str | Packed]:
        """The modules of the task's head."""
        raise NotImplementedError(f"{type(self).__name__} has no head_modules")


@register_teacher
class Bert(_BertLike):
    """BERT and MiniLM."""

    family = "bert"
    model_types = ("bert",)
    prefix = "bert"
    architectures = {  # noqa: RUF012
        "BertForMaskedLM": "masked-lm",
        "BertForSequenceClassification": "sequence-classification",
        "BertModel": "sentence-embedding",
    }
    copies = {"cls.predictions.bias": "cls.predictions.decoder.bias"}  # noqa: RUF012

    def head_modules(self, architecture: str) -> dict[str, str | Packed]:
        return {
            "bert.pooler.dense": "pooler",
            "classifier": "classifier",
            "cls.predictions.transform.dense": "transform.dense",
            "cls.predictions.transform.LayerNorm": "transform.norm",
            "cls.predictions.decoder": "lm_head",
        }


@register_teacher
class Roberta(_BertLike):
    """RoBERTa (Liu et al. 2019, arXiv:1907.11692): positions start behind the padding id."""

    family = "roberta"
    model_types = ("roberta",)
    prefix = "roberta"
    architectures = {  # noqa: RUF012
        "RobertaForMaskedLM": "masked-lm",
        "RobertaForSequenceClassification": "sequence-classification",
        "RobertaModel": "sentence-embedding",
    }
    copies = {"lm_head.bias": "lm_head.decoder.bias"}  # noqa: RUF012

    def spec(self, config: Any, task: str) -> dict[str, Any]:
        if config.pad_token_id is None:
            raise ConversionError(
                "roberta with pad_token_id=None cannot be imported: its positions are counted from it"
            )
        first = config.pad_token_id + 1
        values = super().spec(config, task)
        values |= {"position_offset": first, "max_position_embeddings": config.max_position_embeddings - first}
        return values | ({"mlm_activation": "gelu"} if task == "masked-lm" else {})

    def head_modules(self, architecture: str) -> dict[str, str | Packed]:
        return {
            "classifier.dense": "pooler",
            "classifier.out_proj": "classifier",
            "lm_head.dense": "transform.dense",
            "lm_head.layer_norm": "transform.norm",
            "lm_head.decoder": "lm_head",
        }


@register_teacher
class DistilBert(Encoder):
    """DistilBERT (Sanh et al. 2019, arXiv:1910.01108): no token types."""

    family = "distilbert"
    model_types = ("distilbert",)
    architectures = {  # noqa: RUF012
        "DistilBertForMaskedLM": "masked-lm",
        "DistilBertForSequenceClassification": "sequence-classification",
        "DistilBertModel": "sentence-embedding",
    }

    def spec(self, config: Any, task: str) -> dict[str, Any]:
        values = self.encoder_spec(
            config, task, inner=config.hidden_dim, activation=config.activation, eps=1e-12, dropout=config.dropout
        )
        if task == "sequence-classification":
            values |= {"pooling": "cls", "pooler": "relu", "classifier_dropout": config.seq_classif_dropout}
        return values

    def modules(self, config: Any, architecture: str) -> dict[str, str | Packed]:
        root = "distilbert." if self.architectures[architecture] != "sentence-embedding" else ""
        theirs, ours = root + "transformer.layer.{i}.", "model.layers.{i}."
        return {
            root + "embeddings.word_embeddings": "model.embed_tokens",
            root + "embeddings.position_embeddings": "model.embed_positions",
            root + "embeddings.LayerNorm": "model.embed_norm",
            theirs + "attention.q_lin": ours + "mixer.q_proj",
            theirs + "attention.k_lin": ours + "mixer.k_proj",
            theirs + "attention.v_lin": ours + "mixer.v_proj",
            theirs + "attention.out_lin": ours + "mixer.o_proj",
            theirs + "sa_layer_norm": ours + "mixer_norm",
            theirs + "ffn.lin1": ours + "ffn.up_proj",
            theirs + "ffn.lin2": ours + "ffn.down_proj",
            theirs + "output_layer_norm": ours + "ffn_norm",
            "vocab_transform": "transform.dense",
            "vocab_layer_norm": "transform.norm",
            "vocab_projector": "lm_head",
            "pre_classifier": "pooler",
            "classifier": "classifier",
        }
