"""MobileBERT (Sun et al. 2020, arXiv:2004.02984): bottlenecks, stacked feed-forwards, word vectors of three tokens.

Its layers become `mobile_bert` mixers and not `attention`: it teaches, but there is no attention in it to exchange.

The embedding of a token holds those of its neighbours. The original takes padding behind the last token for one, with
the vector of the padding id; here padding is no neighbour, so a row gives what it gives alone. The two agree on rows
without padding, and on those the import is checked.
"""

from __future__ import annotations

from typing import Any, ClassVar

from zoo.convert.teachers.adapter import Packed, register_teacher
from zoo.convert.teachers.bert import Encoder
from zoo.errors import ConversionError


@register_teacher
class MobileBert(Encoder):
    """The published form: `no_norm`, trigram input, bottlenecks."""

    family = "mobilebert"
    model_types = ("mobilebert",)
    architectures = {  # noqa: RUF012
        "MobileBertForMaskedLM": "masked-lm",
        "MobileBertForSequenceClassification": "sequence-classification",
        "MobileBertModel": "sentence-embedding",
    }
    only: ClassVar = {"normalization_type": ("no_norm",), "use_bottleneck": (True,), "trigram_input": (True,)}
    copies = {"cls.predictions.bias": "cls.predictions.decoder.bias"}  # noqa: RUF012
    dropped = ("pooler",)
    padding = "none"

    def spec(self, config: Any, task: str) -> dict[str, Any]:
        if config.use_bottleneck_attention == config.key_query_shared_bottleneck:
            raise ConversionError(
                f"mobilebert with use_bottleneck_attention={config.use_bottleneck_attention!r} and "
                f"key_query_shared_bottleneck={config.key_query_shared_bottleneck!r} cannot be imported exactly; "
                "one of the two must be True"
            )
        mixer = {
            "name": "mobile_bert",
            "num_heads": config.num_attention_heads,
            "head_dim": config.intra_bottleneck_size // config.num_attention_heads,
            "feed_forwards": config.num_feedforward_networks,
            "inner_size": config.intermediate_size,
            "activation": config.hidden_act,
            "attention_input": "residual" if config.use_bottleneck_attention else "own",
        }
        values = self.bert_spec(
            config,
            task,
            norm="no_norm",
            layers=[{"mixer": mixer, "ffn": None}] * config.num_hidden_layers,
            embedding_size=config.embedding_size,
            embedding_context=3,
            embedding_output="extend",
        )
        if config.embedding_size == config.hidden_size:
            raise ConversionError("mobilebert with embedding_size=hidden_size cannot be imported: its head has no rest")
        if task == "sequence-classification":
            dropout = config.classifier_dropout
            values |= {
                "pooling": "cls",
                "pooler": "tanh" if config.classifier_activation else None,
                "classifier_dropout": config.hidden_dropout_prob if dropout is None else dropout,
            }
        return values

    def modules(self, config: Any, architecture: str) -> dict[str, str | Packed]:
        root = "" if self.architectures[architecture] == "sentence-embedding" else "mobilebert."
        theirs, ours = root + "encoder.layer.{i}.", "model.layers.{i}."
        last = config.num_feedforward_networks - 1
        layer = {
            "bottleneck.input.dense": "mixer.residual_proj",
            "bottleneck.input.LayerNorm": "mixer.residual_norm",
            "bottleneck.attention.dense": "mixer.shared_proj",
            "bottleneck.attention.LayerNorm": "mixer.shared_norm",
            "attention.self.query": "mixer.q_proj",
            "attention.self.key": "mixer.k_proj",
            "attention.self.value": "mixer.v_proj",
            "attention.output.dense": "mixer.o_proj",
            "attention.output.LayerNorm": "mixer.o_norm",
            **{f"ffn.{j}.intermediate.dense": f"mixer.ffn.{j}.up_proj" for j in range(last)},
            **{f"ffn.{j}.output.dense": f"mixer.ffn.{j}.down_proj" for j in range(last)},
            **{f"ffn.{j}.output.LayerNorm": f"mixer.ffn_norm.{j}" for j in range(last)},
            "intermediate.dense": f"mixer.ffn.{last}.up_proj",
            "output.dense": f"mixer.ffn.{last}.down_proj",
            "output.LayerNorm": f"mixer.ffn_norm.{last}",
            "output.bottleneck.dense": "mixer.y_proj",
            "output.bottleneck.LayerNorm": "mixer_norm",
        }
        return {
            root + "embeddings.word_embeddings": "model.embed_tokens",
            root + "embeddings.position_embeddings": "model.embed_positions",
            root + "embeddings.token_type_embeddings": "model.embed_token_types",
            root + "embeddings.embedding_transformation": "model.project_in",
            root + "embeddings.LayerNorm": "model.embed_norm",
            **{theirs + name: ours + place for name, place in layer.items()},
            "mobilebert.pooler.dense": "pooler",
            "classifier": "classifier",
            "cls.predictions.transform.dense": "transform.dense",
            "cls.predictions.transform.LayerNorm": "transform.norm",
            "cls.predictions.decoder": "lm_head.words",
            "cls.predictions.dense": Packed(("lm_head.extra",), transposed=True),
        }
