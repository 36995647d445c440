"""ALBERT (Lan et al. 2019, arXiv:1909.11942): one block for all layers, word vectors of 128 channels.

Word vectors, positions and token types are summed and normed in `embedding_size` channels; one linear map leads to the
blocks, and the transform of a masked LM back. `num_hidden_groups` blocks run equally often (published: one block).
"""

from __future__ import annotations

from typing import Any, ClassVar

from zoo.convert.teachers.adapter import Packed, register_teacher
from zoo.convert.teachers.bert import Encoder


@register_teacher
class Albert(Encoder):
    """`zoo.models.unshare` gives each layer weights of its own, which a conversion needs."""

    family = "albert"
    model_types = ("albert",)
    architectures = {  # noqa: RUF012
        "AlbertForMaskedLM": "masked-lm",
        "AlbertForSequenceClassification": "sequence-classification",
        "AlbertModel": "sentence-embedding",
    }
    only: ClassVar = {"position_embedding_type": ("absolute",), "inner_group_num": (1,)}
    copies = {"predictions.bias": "predictions.decoder.bias"}  # noqa: RUF012
    dropped = ("pooler",)

    def spec(self, config: Any, task: str) -> dict[str, Any]:
        values = self.bert_spec(config, task, embedding_size=config.embedding_size, embedding_projection="sum")
        owners = first_layers(config)
        values["layers"] = [
            layer if owners[i] == i else {**layer, "same_as": owners[i]} for i, layer in enumerate(values["layers"])
        ]
        if task == "sequence-classification":
            values |= {"pooling": "cls", "pooler": "tanh", "classifier_dropout": config.classifier_dropout_prob}
        return values

    def modules(self, config: Any, architecture: str) -> dict[str, str | Packed]:
        root = "" if self.architectures[architecture] == "sentence-embedding" else "albert."
        layer = {
            "attention.query": "mixer.q_proj",
            "attention.key": "mixer.k_proj",
            "attention.value": "mixer.v_proj",
            "attention.dense": "mixer.o_proj",
            "attention.LayerNorm": "mixer_norm",
            "ffn": "ffn.up_proj",
            "ffn_output": "ffn.down_proj",
            "full_layer_layer_norm": "ffn_norm",
        }
        theirs = root + "encoder.albert_layer_groups.{i}.albert_layers.0."
        return {
            root + "embeddings.word_embeddings": "model.embed_tokens",
            root + "embeddings.position_embeddings": "model.embed_positions",
            root + "embeddings.token_type_embeddings": "model.embed_token_types",
            root + "embeddings.LayerNorm": "model.embed_norm",
            root + "encoder.embedding_hidden_mapping_in": "model.project_in",
            **{theirs + name: "model.layers.{i}." + place for name, place in layer.items()},
            "albert.pooler": "pooler",
            "classifier": "classifier",
            "predictions.dense": "transform.dense",
            "predictions.LayerNorm": "transform.norm",
            "predictions.decoder": "lm_head",
        }

    def our_layers(self, config: Any) -> list[int]:
        owners = first_layers(config)
        return sorted(set(owners))


def first_layers(config: Any) -> list[int]:
    """For each layer the first one that runs the same block."""
    groups = [int(i / (config.num_hidden_layers / config.num_hidden_groups)) for i in range(config.num_hidden_layers)]
    return [groups.index(group) for group in groups]
