"""Every family: the same logits, the same greedy text, and the same tensors after the way back."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

from zoo.convert.surgery import replace_mixers
from zoo.convert.teachers import load_teacher, save_original, write_back
from zoo.convert.teachers.adapter import Packed, adapter_for
from zoo.convert.teachers.parity import check_parity, random_rows
from zoo.errors import ConversionError
from zoo.models import unshare
from zoo.models.create import load_folder

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
BERT = NEOX
OPT = {key: value for key, value in NEOX.items() if key != "intermediate_size"} | {"ffn_dim": 48, "pad_token_id": 0}
ALBERT = BERT | {"embedding_size": 16}
MOBILE = BERT | {"embedding_size": 16, "intra_bottleneck_size": 24, "num_feedforward_networks": 3}
DISTIL = {"vocab_size": 97, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 128}

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def rope(**values) -> dict:
    return {"rope_parameters": {"rope_theta": 10000.0, **values}}


CAUSAL = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-mqa-wide-heads": ("LlamaForCausalLM", LLAMA | {"num_key_value_heads": 1, "head_dim": 12}),
    "llama-theta": ("LlamaForCausalLM", LLAMA | rope(rope_type="default", rope_theta=500.0)),
    "llama-linear": ("LlamaForCausalLM", LLAMA | rope(rope_type="linear", factor=2.0)),
    "llama-dynamic": (
        "LlamaForCausalLM",
        LLAMA | {"max_position_embeddings": 32} | rope(rope_type="dynamic", factor=2.0),
    ),
    "llama-yarn": ("LlamaForCausalLM", LLAMA | {"rope_parameters": YARN}),
    "llama-llama3": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LLAMA3}),
    "llama-longrope": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LONGROPE}),
    "mistral-window": ("MistralForCausalLM", LLAMA | {"sliding_window": 8}),
    "mistral-full": ("MistralForCausalLM", LLAMA | {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "qwen2-windows": (
        "Qwen2ForCausalLM",
        LLAMA | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 16, "attention_bias": True}),
    "qwen3-layer-types": (
        "Qwen3ForCausalLM",
        LLAMA
        | {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA | {"no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False, "n_inner": 40}),
    "gpt2-unscaled": ("GPT2LMHeadModel", GPT2 | {"scale_attn_weights": False}),
    "gpt2-by-layer": (
        "GPT2LMHeadModel",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    "opt": ("OPTForCausalLM", OPT),
    "opt-350m": ("OPTForCausalLM", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "opt-350m-untied": (
        "OPTForCausalLM",
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 24, "tie_word_embeddings": False},
    ),
    "opt-narrow-no-bias": (
        "OPTForCausalLM",
        OPT | {"enable_bias": False, "word_embed_proj_dim": 24, "activation_function": "gelu"},
    ),
    "opt-no-final-norm": ("OPTForCausalLM", OPT | {"_remove_final_layer_norm": True}),
    "neox": ("GPTNeoXForCausalLM", NEOX | rope(rope_type="default", partial_rotary_factor=0.5)),
    "neox-sequential": (
        "GPTNeoXForCausalLM",
        NEOX | {"use_parallel_residual": False, "tie_word_embeddings": True},
    ),
    "neox-no-bias": ("GPTNeoXForCausalLM", NEOX | {"attention_bias": False, "hidden_act": "gelu_new"}),
}
ENCODERS = {
    "bert-mlm": ("BertForMaskedLM", BERT),
    "bert-mlm-untied": ("BertForMaskedLM", BERT | {"tie_word_embeddings": False, "hidden_act": "gelu_new"}),
    "bert-classifier": ("BertForSequenceClassification", BERT | {"num_labels": 3, "classifier_dropout": 0.3}),
    "bert": ("BertModel", BERT | {"type_vocab_size": 3}),
    "roberta-mlm": ("RobertaForMaskedLM", BERT | {"pad_token_id": 1, "hidden_act": "relu", "type_vocab_size": 1}),
    "roberta-classifier": ("RobertaForSequenceClassification", BERT | {"pad_token_id": 1, "num_labels": 3}),
    "roberta": ("RobertaModel", BERT | {"pad_token_id": 3}),
    "albert-mlm": ("AlbertForMaskedLM", ALBERT),
    "albert-mlm-untied": ("AlbertForMaskedLM", ALBERT | {"tie_word_embeddings": False, "hidden_act": "relu"}),
    "albert-mlm-groups": ("AlbertForMaskedLM", ALBERT | {"num_hidden_layers": 5, "num_hidden_groups": 2}),
    "albert-classifier": ("AlbertForSequenceClassification", ALBERT | {"num_labels": 3}),
    "albert": ("AlbertModel", ALBERT),
    "mobilebert-mlm": ("MobileBertForMaskedLM", MOBILE),
    "mobilebert-mlm-residual": (
        "MobileBertForMaskedLM",
        MOBILE
        | {"use_bottleneck_attention": True, "key_query_shared_bottleneck": False, "num_feedforward_networks": 1},
    ),
    "mobilebert-classifier": ("MobileBertForSequenceClassification", MOBILE | {"num_labels": 3}),
    "mobilebert-classifier-plain": (
        "MobileBertForSequenceClassification",
        MOBILE | {"num_labels": 1, "classifier_activation": False},
    ),
    "mobilebert": ("MobileBertModel", MOBILE),
    "distilbert-mlm": ("DistilBertForMaskedLM", DISTIL),
    "distilbert-classifier": ("DistilBertForSequenceClassification", DISTIL | {"num_labels": 3}),
    "distilbert": ("DistilBertModel", DISTIL),
}


DENSE = ["pooler.dense.bias", "pooler.dense.weight"]
POOLERS = {"albert": ["pooler.bias", "pooler.weight"], "bert": DENSE, "roberta": DENSE, "mobilebert": DENSE}


def original(name: str) -> hf.PreTrainedModel:
    """A small random model whose every tensor, biases and norms included, is away from its default."""
    cls, values = (CAUSAL | ENCODERS)[name]
    model = getattr(hf, cls)(getattr(hf, cls).config_class(**values)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if p.dim() == 1 and "norm" in name else 0.0))
    return model


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_give_the_same_logits_and_text(name):
    model = original(name)
    teacher = load_teacher(model)
    assert teacher.max_logit_error < 1e-5
    assert all(mixer == "attention" for mixer in teacher.model.config.mixer_names)
    ids_BL = torch.randint(3, 97, (2, 60))  # beyond every window, and beyond the original length of the scalings
    mask_BL = torch.ones(2, 60, dtype=torch.long)
    mask_BL[1, :17] = 0
    with torch.no_grad():
        theirs = model(ids_BL, attention_mask=mask_BL, position_ids=(mask_BL.cumsum(1) - 1).clamp(min=0)).logits
        ours = teacher.model(ids_BL, attention_mask=mask_BL).logits
    real_BL = mask_BL.bool()
    torch.testing.assert_close(ours[real_BL], theirs[real_BL], atol=1e-5, rtol=0)
    prompt = {"attention_mask": mask_BL[:, :26], "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(ids_BL[:, :26], **prompt)
    assert torch.equal(teacher.model.generate(ids_BL[:, :26], **prompt), theirs)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_give_the_same_outputs(name):
    model = original(name)
    teacher = load_teacher(model)
    assert teacher.max_logit_error < 1e-5
    ids_BL, mask_BL = random_rows(model.config, adapter_for(model.config.model_type).padding)
    arguments = {"attention_mask": mask_BL}
    if teacher.model.config.token_types:
        arguments["token_type_ids"] = torch.randint(0, teacher.model.config.token_types, ids_BL.shape)
    with torch.no_grad():
        theirs, ours = model(ids_BL, **arguments), teacher.model(ids_BL, **arguments)
    if teacher.task == "sentence-embedding":
        hidden_BLD, mask_BL1 = theirs.last_hidden_state, mask_BL[:, :, None]
        mean_BD = (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
        expected_BD = torch.nn.functional.normalize(mean_BD, dim=-1)
        torch.testing.assert_close(ours.pooler_output, expected_BD, atol=1e-5, rtol=0)
    else:
        keep = mask_BL.bool() if "mlm" in name else slice(None)
        torch.testing.assert_close(ours.logits[keep], theirs.logits[keep], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CAUSAL | ENCODERS)
def test_write_back_gives_identical_tensors(name, tmp_path):
    model = original(name)
    before = copy.deepcopy(model.state_dict())
    teacher = load_teacher(model, check=False)
    again = write_back(teacher.model)
    assert type(again) is type(model)
    expected = {key: t for key, t in before.items() if key not in teacher.model.config.origin["dropped"]}
    if name.endswith("bert-mlm-untied"):  # a bias that these classes have, and that no output depends on
        prefix = "predictions" if name.startswith("albert") else "cls.predictions"
        expected[f"{prefix}.bias"] = expected[f"{prefix}.decoder.bias"]
    tensors = again.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not pointers & {p.data_ptr() for p in teacher.model.parameters()}, "memory is shared with the original"
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    # Both ways through the disk: as a zoo model, and as the original class.
    teacher.model.save_pretrained(tmp_path / "zoo")
    save_original(load_folder(tmp_path / "zoo"), tmp_path / "back")
    loaded = load_teacher(tmp_path / "back")
    ours = teacher.model.state_dict()
    assert all(torch.equal(t, ours[key]) for key, t in loaded.model.state_dict().items())
    assert loaded.model.config.layers == teacher.model.config.layers
    assert loaded.task == teacher.task


def test_only_the_pooler_of_a_bare_encoder_is_dropped():
    for name in CAUSAL | ENCODERS:
        dropped = load_teacher(original(name), check=False).model.config.origin["dropped"]
        assert sorted(dropped) == POOLERS.get(name, [])


@pytest.mark.parametrize(
    "name",
    ["opt", "opt-350m", "albert-mlm", "albert-mlm-groups", "albert-classifier", "mobilebert-mlm", "distilbert-mlm"],
)
def test_gradients_are_those_of_the_original(name):
    model = original(name)
    ours = load_teacher(model, check=False).model
    adapter = adapter_for(model.config.model_type)
    ids_BL, mask_BL = random_rows(model.config, adapter.padding)
    theirs, found = model(**adapter.inputs(ids_BL, mask_BL)).logits, ours(ids_BL, attention_mask=mask_BL).logits
    weights = torch.randn(theirs.shape) * (mask_BL[:, :, None] if theirs.dim() == 3 else 1)
    (theirs * weights).sum().backward()
    (found * weights).sum().backward()
    own = {key: p.grad for key, p in ours.named_parameters()}
    compared = adapter.export_tensors(model.config, type(model).__name__, own)
    for key, gradient in compared.items():
        expected = model.get_parameter(key).grad
        assert (gradient - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1e-3), key
    reached = {id(model.get_parameter(key)) for key in compared}
    assert all(id(p) in reached for p in model.parameters() if p.grad is not None)


def test_padding_is_no_neighbour_in_mobilebert():
    model = original("mobilebert-mlm")
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0  # then it is none in the original either
    teacher = load_teacher(model).model
    ids_BL, mask_BL = random_rows(model.config, "right")
    with torch.no_grad():
        theirs, ours = model(ids_BL, mask_BL).logits, teacher(ids_BL, mask_BL).logits
        alone = teacher(ids_BL[1:, : int(mask_BL[1].sum())]).logits
    torch.testing.assert_close(ours[mask_BL.bool()], theirs[mask_BL.bool()], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1, : alone.shape[1]], alone[0], atol=1e-5, rtol=0)


def test_albert_has_a_block_for_each_group_and_is_written_back_only_so():
    teacher = load_teacher(original("albert-mlm-groups")).model
    assert [layer.get("same_as") for layer in teacher.config.layers] == [None, 0, 0, None, 3]
    assert sum(p.numel() for p in teacher.model.layers.parameters()) == 2 * sum(
        p.numel() for p in teacher.model.layers[0].parameters()
    )
    own = unshare(teacher)
    with pytest.raises(ConversionError, match=r"layer 1: same_as is not that of the original any more"):
        write_back(own)
    student = replace_mixers(own, {1: {"name": "linear_attention", "feature_map": "elu"}})
    assert student.config.mixer_names == ["attention", "linear_attention", *["attention"] * 3]


def test_origin_says_where_a_model_comes_from():
    model = original("llama")
    origin = load_teacher(model).model.config.origin
    assert origin["family"] == "llama"
    assert origin["architecture"] == "LlamaForCausalLM"
    assert origin["config"]["num_key_value_heads"] == 2
    assert 0 <= origin["max_logit_error"] < 1e-5
    assert load_teacher(model, check=False).max_logit_error is None


def test_the_original_object_keeps_its_mode_and_dtype():
    model = original("qwen3").to(torch.bfloat16).train()
    model.model.layers[1].eval()
    teacher = load_teacher(model)
    assert model.dtype == torch.bfloat16
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.layers[1].training
    assert teacher.model.dtype == torch.float32
    assert not teacher.model.training
    assert teacher.max_logit_error < 1e-5


def test_weights_decide_whether_the_output_is_tied():
    model = original("llama-tied")
    model.lm_head = torch.nn.Linear(32, 97, bias=False)
    teacher = load_teacher(model)
    again = write_back(teacher.model)
    assert not teacher.model.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_wrong_import_is_found_and_located():
    model = original("llama")
    ours = load_teacher(model).model
    with torch.no_grad():
        ours.model.layers[1].mixer.k_proj.weight[0] += 0.05
    with pytest.raises(ConversionError, match=r"first in layer 1$"):
        check_parity(ours, model, adapter_for("llama"))
    ours = load_teacher(model).model
    with torch.no_grad():
        ours.lm_head.weight[5, 3] = float("nan")
    with pytest.raises(ConversionError, match="the final norm or the head"):
        check_parity(ours, model, adapter_for("llama"))


def test_packed_is_its_own_inverse():
    for packed, shape in (
        (Packed(("q", "k", "v"), transposed=True), (8, 24)),
        (Packed(("q", "k", "v"), by_head=4), (24, 8)),
        (Packed(("q",), transposed=True), (8, 24)),
    ):
        for tensor in (torch.randn(shape), torch.randn(24)):
            assert torch.equal(packed.pack(packed.unpack(tensor)), tensor)


def test_write_back_refuses_what_the_class_cannot_hold():
    teacher = load_teacher(original("llama")).model
    changed = copy.deepcopy(teacher)
    changed.config.layers[1]["mixer"] = {**changed.config.layers[1]["mixer"], "window": 8}
    with pytest.raises(ConversionError, match=r"layer 1: mixer.window"):
        write_back(changed)
    changed = copy.deepcopy(teacher)
    changed.config.layers[2]["mixer"] = {"name": "retention", "num_heads": 4, "head_dim": 8}
    with pytest.raises(ConversionError, match=r"layers 2 \(retention\)"):
        write_back(changed)
    changed = copy.deepcopy(teacher)
    changed.config.origin = {}
    with pytest.raises(ConversionError, match="not imported"):
        write_back(changed)


def test_save_original_does_not_write_over_a_folder(tmp_path):
    teacher = load_teacher(original("gpt2")).model
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConversionError, match="exists already"):
        save_original(teacher, tmp_path)
    save_original(teacher, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
