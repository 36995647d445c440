"""Our GGUF files in llama.cpp (the package xllamacpp): the same tokens, and the same likeliest ones at each step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import zoo
from zoo.convert.layouts import export_model, import_checkpoint
from zoo.convert.layouts.gguf_ssm import nearest_log
from zoo.errors import CheckpointError, ExportError

ODD = {"rope_type": "longrope", "factor": 1.0, "original_max_position_embeddings": 1}
ODD |= {key: [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 8.0, 8.0] for key in ("short_factor", "long_factor")}
TINY = {  # family there: model here, what is other than in its tiny form
    "llama": ("llama-tiny", {}),
    "llama-biases": ("llama-tiny", {"layers": {"defaults": {"qkv_bias": True, "out_bias": True}}}),
    "llama-linear": (
        "llama-tiny",
        {"layers": {"defaults": {"rotary": {"scaling": {"rope_type": "linear", "factor": 4.0}}}}},
    ),
    "llama-factors": ("llama-tiny", {"layers": {"defaults": {"rotary": {"scaling": ODD}}}}),
    "qwen2": ("qwen2-tiny", {}),
    "qwen3": ("qwen3-tiny", {"layers": {"defaults": {"head_dim": 24}}}),
    "gpt2": ("gpt2-tiny", {"max_position_embeddings": 512}),
    "gpt_neox": ("pythia-tiny", {}),
    "mixtral": ("mixtral-tiny", {}),
    "olmoe": ("olmoe-tiny", {}),
    "qwen2_moe": ("qwen2-moe-tiny", {}),
    "qwen3_moe": ("mixtral-tiny", {"layers": {"defaults": {"qk_norm": True, "qk_norm_eps": 1e-5}}}),
    "rwkv6": ("rwkv6-tiny", {}),
    # llama.cpp's loop over the heads of RWKV-7 goes in steps of 32 or 64 and has no rest: heads of the published size
    "rwkv7": ("rwkv7-tiny", {"hidden_size": 128, "layers": {"defaults": {"num_heads": 2, "head_dim": 64}}}),
    "mamba": ("mamba-tiny", {}),
    "falcon_mamba": ("falcon-mamba-tiny", {"layers": {"defaults": {"bcdt_norm_eps": 1e-5}}}),
    "mamba2": ("mamba2-tiny", {}),
    "bamba": ("bamba-tiny", {}),
    "falcon_h1": ("falcon-h1-tiny", {}),
}


def written(name, folder, dtype=torch.float32):
    model, options = TINY[name]
    model = zoo.create_model(model, **{"max_position_embeddings": 256, **options}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model = model.to(dtype)
    family = export_model(model, "gguf", folder, tokenizer=plain_tokenizer())
    assert family.name == name.split("-")[0]
    return model


def plain_tokenizer():
    """256 tokens of two letters, so that no answer ends within a character; the first one ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(97 + i // 16) + chr(65 + i % 16): i for i in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="aA")


def parameters(path):
    """Of llama.cpp with a file."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp comes with the package xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 256, 1, False, 0
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # which rounds to half
    return params


def running(path):
    """llama.cpp with a file."""
    return pytest.importorskip("xllamacpp").Server(parameters(path))


def answers(path, prompt, length=12):
    """Its greedy tokens after a text or tokens: for each step the token, and the logarithms of the likeliest five."""
    asked = {"prompt": prompt, "n_predict": length, "temperature": 0.0, "n_probs": 5, "ignore_eos": True}
    answer = running(path).handle_completions({**asked, "return_tokens": True, "cache_prompt": False})
    steps = answer["choices"][0]["logprobs"]["content"] if "choices" in answer else answer["completion_probabilities"]
    return [(step["id"], {told["id"]: told["logprob"] for told in step["top_logprobs"]}) for step in steps]


@torch.no_grad()
def compare(model, path, tolerance):
    """Each step's token and probabilities, given the tokens that llama.cpp took before it."""
    prompt = torch.randint(1, 256, (24,))
    steps = answers(path, prompt.tolist())
    assert len(steps) == 12
    whole = torch.cat([prompt, torch.tensor([token for token, _ in steps])])
    expected = model(whole[None]).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    for (token, told), row in zip(steps, expected, strict=True):
        assert row[token] >= row[1:].max() - tolerance  # the first ends a text, and was asked to be left out
        for i, logprob in told.items():
            assert math.isclose(logprob, row[i].item(), abs_tol=tolerance)


@pytest.mark.parametrize("name", TINY)
def test_llama_cpp_gives_the_same_tokens(name, tmp_path):
    model = written(name, tmp_path / "out")
    compare(model, tmp_path / "out" / "model.gguf", 1e-3)


@pytest.mark.parametrize("name", ["mixtral", "rwkv6", "rwkv7", "bamba"])
def test_llama_cpp_runs_half_precision(name, tmp_path):
    """What must be float32 there is; it rounds what it multiplies with too, hence the tolerance."""
    model = written(name, tmp_path / "out", torch.float16)
    compare(model.float(), tmp_path / "out" / "model.gguf", 0.03)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back(dtype, tmp_path):
    model = written("llama", tmp_path / "out", dtype)
    again = import_checkpoint(tmp_path / "out" / "model.gguf")
    assert again.layout == "gguf"
    ours = {name: t for name, t in model.state_dict().items() if t.dim() == 2}
    theirs = again.model.state_dict()
    assert all(torch.equal(tensor.float(), theirs[name].float()) for name, tensor in ours.items())


SCALES = {"Q8_0": {0: 4e-4}, "Q4_0": {0: 8e-3}, "Q4_K": {0: 2e-4, 2: 1e-3}, "Q6_K": {208: 2e-5}}  # by place in a block


@pytest.mark.parametrize("kind", SCALES)
def test_quantised_files_come_in_as_llama_cpp_runs_them(kind, tmp_path):
    """Every matrix of random blocks of bytes with sane scales, which is what a quantised file is."""
    gguf = pytest.importorskip("gguf")
    kind, random = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    wide = {"hidden_size": 256, "layers": {"defaults": {"num_heads": 4, "head_dim": 64}, "ffn": {"hidden_size": 256}}}
    model = zoo.create_model("llama-tiny", max_position_embeddings=256, **wide)
    export_model(model, "gguf", tmp_path, tokenizer=plain_tokenizer())
    reader, path = gguf.GGUFReader(tmp_path / "model.gguf"), tmp_path / "quantised.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (tensor.data.size // elements, size), dtype=np.uint8)
        for at, scale in SCALES[kind.name].items():
            blocks[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
        writer.add_tensor(tensor.name, blocks.reshape(tensor.data.shape[0], -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = import_checkpoint(path)
    assert found.model.dtype == torch.float32
    compare(found.model, path, 0.05)  # it rounds what it multiplies with to 8 bits


def test_a_of_mamba_keeps_its_last_bit():
    log = torch.cat([8 * torch.randn(100_000), torch.arange(1, 257).float().log(), 1e-3 * torch.randn(1000)])
    a = log.exp()
    again = nearest_log(a)
    assert torch.equal(again.exp(), a)
    assert not torch.equal(a.log().exp(), a)  # what the plain logarithm gives


def test_what_cannot_be_told_is_refused(tmp_path):
    with pytest.raises(ExportError, match="gguf"):
        export_model(zoo.create_model("retnet-tiny"), "gguf", tmp_path / "a")
    windows = zoo.create_model("llama-tiny", layers={"num_hidden_layers": 2, "defaults": {"window": 8}})
    with pytest.raises(ExportError, match="window"):
        export_model(windows, "gguf", tmp_path / "b")
    written("mamba", tmp_path / "c")
    whole = (tmp_path / "c" / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        import_checkpoint(tmp_path / "cut.gguf")


TEXT = "the cat sat on the mat, then  the dog's 1234 years: 56.7% off\n\n  The END it's\t9 O'Clock ünknown"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(rule):
    """A byte-level BPE of a few merges that splits text as GPT-2, SmolLM2, Qwen2, Llama 3 or none of these."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule in ("gpt-2", "smollm"))
    before = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "qwen2": [pre_tokenizers.Split(Regex(WORDS), "isolated")],
        "llama-bpe": [pre_tokenizers.Split(Regex(WORDS.replace("|\\p{N}|", "|\\p{N}{1,3}|")), "isolated")],
        "other": [pre_tokenizers.Split(" ", "isolated")],
    }.get(rule, [])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=["<end>"])
    tokenizer.train_from_iterator([TEXT, "1234 1234 56 56.7% the 12's"] * 9, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, whole]) if before else whole  # which the merges cross
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>")


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_the_vocabulary_inside_is_found(rule, tmp_path):
    """By transformers and by llama.cpp, which goes by the name of how text is split."""
    words = trained(rule)
    words.chat_template = "{{ messages[0].content }}"
    model = zoo.create_model("llama-tiny", vocab_size=len(words))
    export_model(model, "gguf", tmp_path / "out", tokenizer=words)
    found = import_checkpoint(tmp_path / "out" / "model.gguf")
    assert found.model.config.eos_token_id == words.eos_token_id
    if rule == "gpt-2":  # the others are split as by GPT-2 too by transformers' reader
        assert found.tokenizer(TEXT).input_ids == words(TEXT).input_ids
    by_text, by_tokens = (answers(tmp_path / "out" / "model.gguf", p) for p in (TEXT, words(TEXT).input_ids))
    assert by_text == by_tokens != []


def pieces(merged=True):
    """SentencePiece's BPE as transformers has it; not merged: a pair of tokens that make one has no merge."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *sorted({*TEXT.replace(" ", ""), "\u2581"})]
    words.remove("ü")
    joined = [
        "he",
        "th",
        "\u2581t",
        "at",
        "the",
        "\u2581the",
        "\u2581c",
        "cat",
        "\u2581cat",
        "\u2581\u2581",
        "12",
        "34",
        "1234",
        "en",
    ]
    vocab = {word: i for i, word in enumerate(words + joined)}
    splits = [[(w[:at], w[at:]) for at in range(1, len(w)) if {w[:at], w[at:]} <= vocab.keys()] for w in joined]
    merges = [pair for split in splits for pair in (split if merged else split[:1])]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_sentencepieces_vocabulary_is_read_by_llama_cpp(tmp_path):
    words = pieces()
    ids = words(TEXT).input_ids
    assert ids[0] == 1  # the first token of a text
    assert any(3 <= i < 259 for i in ids)  # bytes of an ü
    model = zoo.create_model("llama-tiny", vocab_size=len(words))
    export_model(model, "gguf", tmp_path / "out", tokenizer=words)
    by_text, by_tokens = (answers(tmp_path / "out" / "model.gguf", p) for p in (TEXT, ids))
    assert by_text == by_tokens != []
    with pytest.raises(ExportError, match="make a token and are not merged"):
        export_model(model, "gguf", tmp_path / "refused", tokenizer=pieces(merged=False))


def test_llama_cpp_embeds_sentences(tmp_path):
    """Near, for it takes another form of GELU from a table; of the text, so that the vocabulary is used too."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp comes with the package xllamacpp")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "on", "mat", ",", "un", "##like"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{word.strip('[]').lower()}_token": word for word in words[:5]}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    plain = {"pooling": "mean", "pooler": None, "mlm_transform": False, "lm_head_bias": False}
    model = zoo.create_model("bert-tiny", task="sentence-embedding", vocab_size=len(words), **plain).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    assert export_model(model, "gguf", tmp_path / "out", tokenizer=made).name == "bert"
    params = parameters(tmp_path / "out" / "model.gguf")
    params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = xllamacpp.Server(params)
    for text in ("The cats sat on the mat, unlike the cat", "un cat zebra"):
        got = torch.tensor(server.handle_embeddings({"input": text})["data"][0]["embedding"])
        with torch.no_grad():
            expected = model(**made(text, return_tensors="pt")).pooler_output[0]
        assert torch.dot(got, expected) > 0.9995


def test_other_vocabularies_are_refused(tmp_path):
    words = trained("other")
    model = zoo.create_model("llama-tiny", vocab_size=len(words))
    with pytest.raises(ExportError, match=r"Split, ByteLevel splits text as none of gpt-2"):
        export_model(model, "gguf", tmp_path / "out", tokenizer=words)
