"""DeepSeek and Kimi Linear beyond their peers: fp8 with scales, what is left out, models without experts, refusals."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peers import deepseek, kimi_linear
from safetensors.torch import load_file, save_file

import zoo
from zoo.convert.layouts import export_model, import_checkpoint
from zoo.errors import CheckpointError, ExportError

BLOCK = 16
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
KINDS = {
    "DeepseekV3": {**deepseek.SIZES, "q_lora_rank": 12, "n_group": 4, "topk_group": 2},
    "DeepseekV2": {**deepseek.SIZES, "q_lora_rank": None},
    "KimiLinear": {**kimi_linear.SIZES, "layer_types": [*["linear_attention"] * 3, "full_attention"]},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A function: the folder and the model of one of their classes, made once."""
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**KINDS[kind]))
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.05 * torch.randn_like(p))
            deepseek.with_bias(model)
            folder = tmp_path_factory.mktemp(kind)
            model.eval().save_pretrained(folder)
            made[kind] = folder, model
        return made[kind]

    return make


def written(source, folder, tensors=None, **options):
    """A checkpoint with other options of its config, and other tensors."""
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **options}))
    save_file(tensors or load_file(source / "model.safetensors"), folder / "model.safetensors")
    return folder


def in_blocks(weight):
    """A weight in fp8, its scales, and what both stand for: block by block."""
    rows, columns = (-(-n // BLOCK) for n in weight.shape)
    scale, plain = torch.empty(rows, columns), torch.empty_like(weight)
    small = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            place = (slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * j, BLOCK * (j + 1)))
            scale[i, j] = weight[place].abs().max() / 448
            small[place] = (weight[place] / scale[i, j]).to(small.dtype)
            plain[place] = small[place].float() * scale[i, j]
    return small, scale, plain


@torch.no_grad()
def test_fp8_weights_are_multiplied_out(checkpoints, tmp_path):
    source, theirs = checkpoints("DeepseekV3")
    stored, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        plain[name] = stored[name] = tensor
        if name.endswith("_proj.weight") or "kv_a_proj" in name:
            stored[name], stored[f"{name}_scale_inv"], plain[name] = in_blocks(tensor)
    assert sum(name.endswith("_scale_inv") for name in stored) > 60
    folder = written(source, tmp_path, stored, quantization_config=FP8)
    (tmp_path / "plain").mkdir()
    again = transformers.DeepseekV3ForCausalLM.from_pretrained(written(source, tmp_path / "plain", plain)).eval()
    ids_BL = torch.randint(0, 97, (2, 20))
    expected, before = again(ids_BL).logits, theirs(ids_BL).logits
    got = import_checkpoint(folder).model(ids_BL).logits
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (got - before).abs().max() > 1e-3 * expected.abs().max()
    with pytest.raises(CheckpointError, match=r"_scale_inv is \(\d, \d\), expected"):
        import_checkpoint(written(source, tmp_path, stored, quantization_config={**FP8, "weight_block_size": [8, 16]}))
    name = "model.layers.0.self_attn.o_proj.weight"
    without = {n: t for n, t in stored.items() if n != f"{name}_scale_inv"}
    with pytest.raises(CheckpointError, match=f"{name} is fp8 without a scale"):
        import_checkpoint(written(source, tmp_path, without, quantization_config=FP8))


def test_the_layer_that_predicts_a_further_token_is_passed_over(checkpoints, tmp_path):
    source, _ = checkpoints("DeepseekV3")
    tensors = load_file(source / "model.safetensors")
    more = {name.replace(".2.", ".3."): t.clone() for name, t in tensors.items() if name.startswith("model.layers.2.")}
    more |= {f"model.layers.3.{n}.weight": torch.zeros(3) for n in ("eh_proj", "enorm", "hnorm", "shared_head.head")}
    state = import_checkpoint(written(source, tmp_path, {**tensors, **more})).model.state_dict()
    expected = import_checkpoint(source).model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\..* has no place in deepseek_v3"):
        import_checkpoint(written(source, tmp_path, {**tensors, **more}, num_nextn_predict_layers=0))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("DeepseekV2", {"topk_method": "group_limited_greedy"}, "'group_limited_greedy'; only 'greedy'"),
        ("DeepseekV2", {"norm_topk_prob": True}, "norm_topk_prob is True; only False"),
        ("DeepseekV3", {"num_key_value_heads": 2}, "num_key_value_heads is 2; latent attention has as many"),
        ("DeepseekV3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; only 'sigmoid'"),
        ("DeepseekV3", {"quantization_config": {"quant_method": "awq"}}, "quantization_config is .*awq.*; only null"),
        ("KimiLinear", {"linear_attn_config": {"use_full_rank_gate": True}}, "use_full_rank_gate is True, which"),
        ("KimiLinear", {"mla_use_output_gate": True}, "mla_use_output_gate is True; only False"),
        ("KimiLinear", {"tie_word_embeddings": True}, "tie_word_embeddings is True; only False"),
        ("KimiLinear", {"mlp_layer_types": ["dense"]}, r"mlp_layer_types is \['dense'\], of 4 layers"),
        ("KimiLinear", {"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; a model has at most 1024"),
    ],
)
def test_options_without_a_place_are_refused(checkpoints, tmp_path, kind, options, message):
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(written(checkpoints(kind)[0], tmp_path, **options))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options", "family"),
    [
        ("mla-tiny", {}, "deepseek_v2"),
        ("mla-tiny", {"layers": {"defaults": {"rotary": {"interleaved": False}}}}, "deepseek_v3"),
        ("kimi-linear-tiny", {}, "kimi_linear"),
        ("deepseek-v3-tiny", {"layers": {"ffns": {"moe": {"bias_rate": 0.0}}}}, "deepseek_v3"),
    ],
)
def test_models_by_name_go_out(tmp_path, name, options, family):
    model = zoo.create_model(name, **options).eval()
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    assert export_model(model, "transformers", tmp_path).name == family
    cls = transformers.AutoModelForCausalLM
    theirs, info = cls.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids_BL = torch.randint(0, 256, (2, 19))
    expected = theirs.eval()(ids_BL).logits
    assert (model(ids_BL).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kimi-linear-tiny", {"tie_word_embeddings": True}, "kimi_linear: tie_word_embeddings: the class never ties"),
        ("deepseek-v3-tiny", {"layers": {"ffns": {"moe": {"shared_size": 30}}}}, "shared_size 30 is not a multiple"),
        ("deepseek-v3-tiny", {"layers": {"ffns": {"moe": {"shared_size": None}}}}, "experts without a shared one"),
        ("deepseek-v3-tiny", {"layers": {"ffn_pattern": "moe gated_mlp"}}, r"deepseek_v3: layers\.1\.ffn"),
    ],
)
def test_what_the_classes_have_not_is_refused(tmp_path, name, options, message):
    with pytest.raises(ExportError, match=message):
        export_model(zoo.create_model(name, **options), "transformers", tmp_path / "out")
