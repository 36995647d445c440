"""Layers that share weights: one block counted, saved, loaded and trained once, with a state for each run."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import zoo
from zoo.cli.show import describe
from zoo.config import ModelSpec
from zoo.convert.surgery import replace_mixers
from zoo.errors import ConfigError, ConversionError
from zoo.ffn.base import ChannelMixer
from zoo.models import unshare
from zoo.models.costs import size_of
from zoo.train.stages import watching

ATTENTION = {"name": "attention", "num_heads": 2, "head_dim": 8, "rotary": {}}
MAMBA = {"name": "mamba2", "num_heads": 2, "num_groups": 1, "head_dim": 8, "value_head_dim": 16}
FFN = {"name": "gated_mlp", "hidden_size": 24}
ZAMBA = [
    {"mixer": MAMBA},
    {"mixer": ATTENTION, "ffn": FFN},
    {"mixer": MAMBA, "ffn": None},
    {"same_as": 1},
    {"same_as": 0},
    {"same_as": 3},
]
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


@pytest.fixture
def zamba():
    torch.manual_seed(0)
    config = zoo.ZooConfig(hidden_size=16, vocab_size=64, layers=ZAMBA, initializer_range=0.2)
    return zoo.models.heads.ZooForCausalLM(config).double().eval()


@pytest.fixture
def albert():
    torch.manual_seed(0)
    layers = {"pattern": "attention@a", "num_hidden_layers": 3, "defaults": ATTENTION, "ffn": FFN}
    return zoo.models.heads.ZooForCausalLM(zoo.ZooConfig(hidden_size=16, vocab_size=64, layers=layers)).eval()


@pytest.fixture
def ids_BL():
    return torch.randint(1, 64, (2, 13), generator=torch.Generator().manual_seed(2))


def test_a_layer_is_that_of_an_earlier_one():
    spec = ModelSpec.parse({"layers": ZAMBA})
    assert [layer.same_as for layer in spec.layers] == [None, None, None, 1, 0, 1]
    assert spec.layers[3].mixer == spec.layers[5].mixer == spec.layers[1].mixer
    assert spec.layers[5].ffn == spec.layers[1].ffn
    assert ModelSpec.parse(spec.plain()) == spec
    assert "same_as" not in spec.plain()["layers"][0]


def test_labels_in_a_pattern_share():
    layers = {"pattern": "mamba2*2 attention@a", "num_hidden_layers": 8, "mixers": {"mamba2": {"num_groups": 1}}}
    layers["defaults"] = {"num_heads": 2, "head_dim": 8}
    spec = ModelSpec.parse({"layers": layers})
    assert [layer.same_as for layer in spec.layers] == [None] * 5 + [2, None, None]
    layers |= {"pattern": "attention@a*2 attention@b*2", "num_hidden_layers": 6, "mixers": {}}
    assert [layer.same_as for layer in ModelSpec.parse({"layers": layers}).layers] == [None, 0, None, 2, 0, 0]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"mixer": ATTENTION}, {"same_as": 1}], "layers.1.same_as: must be the index of an earlier layer, got 1"),
        ([{"same_as": 0}], "layers.0.same_as: must be the index of an earlier layer, got 0"),
        ([{"mixer": ATTENTION}, {"same_as": -1}], "must be the index of an earlier layer, got -1"),
        ([{"mixer": ATTENTION}, {"same_as": True}], "must be the index of an earlier layer, got True"),
        ([{"mixer": ATTENTION}, {"same_as": 0, "mixer": MAMBA}], "layers.1.mixer: differs from that of layer 0"),
        ([{"mixer": ATTENTION}, {"same_as": 0, "ffn": FFN}], "layers.1.ffn: differs from that of layer 0"),
        ([{"mixer": ATTENTION}, {"same_az": 0}], "layers.1.same_az: unknown key; did you mean 'same_as'"),
        ({"pattern": "attention@a mamba2@a", "num_hidden_layers": 2}, "layers.1.mixer: differs from that of layer 0"),
        ({"pattern": "attention@", "num_hidden_layers": 2}, "layers.pattern: cannot read 'attention@'"),
    ],
)
def test_wrong_layers_are_refused(layers, message):
    if isinstance(layers, dict):
        layers["defaults"] = {"num_heads": 2, "head_dim": 8}
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        ModelSpec.parse({"layers": layers})


def test_weights_are_one_and_states_are_many(zamba, ids_BL):
    own = unshare(zamba)
    layers = zamba.model.layers
    assert len(layers) == 6
    assert [layers[3], layers[4], layers[-1]] == [layers[1], layers[0], layers[1]]
    assert layers[2:4] == [layers[2], layers[1]]
    extra = [sum(p.numel() for p in layers[i].parameters()) for i in (3, 4, 5)]
    assert own.num_parameters() == zamba.num_parameters() + sum(extra)
    assert own.config.layers[3] == own.config.layers[1]
    assert len({id(block) for block in own.model.layers}) == 6
    torch.testing.assert_close(zamba(ids_BL).logits, own(ids_BL).logits, **CLOSE)
    cache = zamba(ids_BL[:, :7]).past_key_values
    assert not torch.equal(cache.layers[1].state["k"], cache.layers[3].state["k"])
    step = zamba(ids_BL[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(step, own(ids_BL).logits[:, 7:], **CLOSE)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(zamba.generate(ids_BL, **options), own.generate(ids_BL, use_cache=False, **options))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_the_sum_over_the_runs(zamba, ids_BL, checkpointed):
    own = unshare(zamba)
    if checkpointed:
        zamba.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (zamba, own):
        model.train()(ids_BL, labels=ids_BL).loss.backward()
    theirs = dict(own.named_parameters())
    runs = {0: (0, 4), 1: (1, 3, 5), 2: (2,)}
    for name, parameter in zamba.named_parameters():
        names = [name]
        if name.startswith("model.layers."):
            _, _, i, rest = name.split(".", 3)
            names = [f"model.layers.{run}.{rest}" for run in runs[int(i)]]
        torch.testing.assert_close(parameter.grad, sum(theirs[n].grad for n in names), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_saved_once_and_come_back_shared(ids_BL, tmp_path, tied):
    torch.manual_seed(0)
    config = zoo.ZooConfig(hidden_size=16, vocab_size=64, layers=ZAMBA, tie_word_embeddings=tied)
    model = zoo.models.heads.ZooForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name.split(".")[2] for name in stored if "layers" in name} == {"0", "1", "2"}
    assert sum(t.numel() for t in stored.values()) == model.num_parameters()
    expected = model(ids_BL).logits
    for again in (zoo.create_model(str(tmp_path)).eval(), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert again.num_parameters() == model.num_parameters()
        assert again.model.layers[5] is again.model.layers[1]
        assert torch.equal(again(ids_BL).logits, expected)
    model.load_state_dict(again.state_dict())
    half = zoo.create_model(str(tmp_path), dtype=torch.bfloat16)
    assert half.model.layers[4].mixer.A_log.dtype == torch.float32
    unshare(again).save_pretrained(tmp_path / "own")
    assert torch.equal(zoo.create_model(str(tmp_path / "own")).eval()(ids_BL).logits, expected)


def test_copies_and_training_keep_the_weights_one(zamba, ids_BL):
    model = copy.deepcopy(zamba).train()
    assert model.model.layers[3] is model.model.layers[1] is not zamba.model.layers[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(2):
        losses.append(model(ids_BL, labels=ids_BL).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    with pytest.raises(TypeError, match="layers share weights here"):
        model.model.layers[0] = model.model.layers[1]
    with pytest.raises(TypeError, match="layers share weights here"):
        model.model.layers.append(model.model.layers[1])


def test_a_conversion_asks_for_weights_of_their_own(zamba, albert, ids_BL):
    message = r"layer {} shares its weights .* zoo.models.unshare\(teacher\)"
    with pytest.raises(ConversionError, match=message.format(1)):
        replace_mixers(zamba, {1: "retention"})
    with pytest.raises(ConversionError, match=message.format(0)):
        zoo.convert(albert, "retention", data=ids_BL)
    student = zoo.convert(unshare(albert), "retention", keep=[1], data=ids_BL, calibrate=False, progress=False)
    assert student.config.mixer_names == ["retention", "attention", "retention"]
    student = replace_mixers(unshare(zamba), {1: "retention", 3: "retention"})
    assert [block.mixer.name for block in student.model.layers][:4] == ["mamba2", "retention", "mamba2", "retention"]
    exact = replace_mixers(zamba, {})
    assert exact.model.layers[3] is exact.model.layers[1] is not zamba.model.layers[1]


def test_the_inputs_of_a_shared_mixer_are_told_apart(zamba, ids_BL):
    backbone, own = zamba.model, unshare(zamba).model
    with watching(backbone, [1, 5]) as seen:
        backbone(ids_BL)
    with watching(own, [1, 5]) as expected:
        own(ids_BL)
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, **CLOSE)
    start_BLD = own(ids_BL, output_hidden_states=True).hidden_states[3]
    with watching(backbone, [5], first=3) as seen:
        for block in backbone.layers[3:]:
            start_BLD, _ = block(start_BLD, None, None, None)
    torch.testing.assert_close(seen["mixer_in.5"], expected["mixer_in.5"], **CLOSE)


class Loss(ChannelMixer):
    """Adds the mean of its input to the loss."""

    def forward(self, x_BLD, *, mask_BL=None, segments_BL=None, state=None):
        self.auxiliary_loss = x_BLD.mean()
        return x_BLD, state

    def reset_parameters(self, std):
        pass


def test_every_run_adds_to_the_loss(zamba, ids_BL):
    for i in (1, 2):
        zamba.model.layers[i].ffn = Loss()
        zamba.model.layers[i].ffn_norm = torch.nn.Identity()
    own = unshare(zamba)
    for _ in range(2):  # a pass knows nothing of the one before
        zamba(ids_BL)
        own(ids_BL)
        torch.testing.assert_close(zamba.model.auxiliary_loss(), own.model.auxiliary_loss(), **CLOSE)


def test_it_compiles(albert, ids_BL):
    expected = albert(ids_BL, use_cache=False).logits
    compiled = torch.compile(albert, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids_BL, use_cache=False).logits, expected)


def test_show_counts_weights_once_and_work_every_time(zamba, tmp_path):
    zamba.float().save_pretrained(tmp_path / "shared")
    unshare(zamba).save_pretrained(tmp_path / "own")
    shared, own = describe(str(tmp_path / "shared")), describe(str(tmp_path / "own"))
    assert shared["parameters"] == zamba.num_parameters() < own["parameters"]
    for key in ("flops_per_token", "state_bytes"):
        assert shared[key] == own[key]
    assert [row["parameters"] for row in shared["layers"]][3:] == [0, 0, 0]
    assert "same_as=1" in shared["layers"][3]["options"]


# --- Parameters that mixers have in common -------------------------------------------------------------------------

LINFORMER = {
    "name": "linformer", "num_heads": 2, "head_dim": 8, "max_length": 16, "projected_length": 4, "share": "layers"
}  # fmt: skip
TWO_SIDED = {**ATTENTION, "causal": False}


def encoder(*mixers, **options):
    torch.manual_seed(0)
    layers = [{"mixer": mixer, "ffn": FFN} for mixer in mixers]
    config = zoo.ZooConfig(task="masked-lm", hidden_size=16, vocab_size=64, layers=layers, **options)
    return zoo.models.heads.ZooForMaskedLM(config).double().eval()


def test_mixers_hold_once_what_they_have_in_common(ids_BL, tmp_path):
    other = {**LINFORMER, "projected_length": 5}
    model = encoder(LINFORMER, other, LINFORMER, LINFORMER)
    held = [name for name in model.state_dict() if "sums" in name]
    assert held == ["model.layers.0.mixer.k_sums", "model.layers.1.mixer.k_sums"]
    model(ids_BL, labels=ids_BL).loss.backward()
    first = model.model.layers[0].mixer
    assert all(model.model.layers[i].mixer.holder is first for i in (0, 2, 3))

    own = encoder(*[{**mixer, "share": "kv"} for mixer in (LINFORMER, other, LINFORMER, LINFORMER)])
    own.load_state_dict(model.state_dict(), strict=False)
    for i in (2, 3):
        own.model.layers[i].mixer.k_sums.data.copy_(first.k_sums)
    assert torch.equal(own(ids_BL).logits, model(ids_BL).logits)
    own(ids_BL, labels=ids_BL).loss.backward()
    gradient = sum(own.model.layers[i].mixer.k_sums.grad for i in (0, 2, 3))
    torch.testing.assert_close(first.k_sums.grad, gradient, **CLOSE)

    model.save_pretrained(tmp_path)
    assert held == [name for name in load_file(tmp_path / "model.safetensors") if "sums" in name]
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(ids_BL).logits, model(ids_BL).logits)
    copied = copy.deepcopy(model)
    assert copied.model.layers[3].mixer.holder is copied.model.layers[0].mixer is not first


def test_what_is_held_once_counts_once():
    config = encoder(LINFORMER, LINFORMER, LINFORMER).config
    assert size_of(config)[0] == sum(p.numel() for p in encoder(*[LINFORMER] * 3).parameters())


def test_reversible_layers_with_a_common_parameter(ids_BL):
    model = encoder(LINFORMER, LINFORMER, block="reversible", tie_word_embeddings=False).train()
    gradients = []
    for keep in (False, True):  # keeping hidden states is without recomputation
        model.zero_grad()
        model(ids_BL, labels=ids_BL, output_hidden_states=keep).loss.backward()
        gradients.append(model.model.layers[0].mixer.k_sums.grad.clone())
    torch.testing.assert_close(*gradients, **CLOSE)


def test_a_conversion_joins_what_it_makes_to_what_is_there(ids_BL):
    teacher = encoder(TWO_SIDED, TWO_SIDED, TWO_SIDED)
    options = {k: LINFORMER[k] for k in ("name", "max_length", "projected_length", "share")}
    once = replace_mixers(teacher, {1: options})
    sums = once.model.layers[1].mixer.k_sums
    sums.data.add_(torch.randn_like(sums))  # something learned
    student = replace_mixers(once, {0: options, 2: options})
    held = {name: t for name, t in student.state_dict().items() if "sums" in name}
    assert list(held) == ["model.layers.0.mixer.k_sums"]
    assert torch.equal(held["model.layers.0.mixer.k_sums"], sums)
    assert len([name for name in once.state_dict() if "sums" in name]) == 1


def test_unshared_blocks_still_have_that_in_common(ids_BL):
    config = encoder(LINFORMER, LINFORMER).config
    config.layers[1]["same_as"] = 0
    model = zoo.models.heads.ZooForMaskedLM(config).double().eval()
    own = unshare(model)
    assert [name for name in own.state_dict() if "sums" in name] == ["model.layers.0.mixer.k_sums"]
    assert torch.equal(own(ids_BL).logits, model(ids_BL).logits)
