"""Every tiny model of text in the registry: shapes, training, saving, padding, packing, precision."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

import zoo
from zoo.errors import TraitError
from zoo.ffn.base import ChannelMixer
from zoo.mixers.base import SequenceMixer
from zoo.models.heads import (
    ZooForCausalLM,
    ZooForMaskedLM,
    ZooForSentenceEmbedding,
    ZooForSequenceClassification,
    pool,
)

IMAGES = zoo.list_models("*-tiny", task="image-classification")  # these have the same tests in test_images.py
TINY = [name for name in zoo.list_models("*-tiny") if name not in IMAGES]
CAUSAL = zoo.list_models("*-tiny", task="causal-lm")
ENCODERS = zoo.list_models("*-tiny", task="masked-lm")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("name", TINY)
def test_one_step_of_training_lowers_the_loss(name, make, ids_BL):
    model = make(name, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(2):
        out = model(ids_BL, labels=ids_BL)
        assert out.logits.shape == (2, 21, 256)
        out.loss.backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", CAUSAL)
def test_the_loss_is_that_of_the_next_token(name, make, ids_BL):
    model = make(name)
    labels = ids_BL.clone()
    labels[0, 5] = -100
    out = model(ids_BL, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss.float(), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_save_and_load(name, make, ids_BL, tmp_path):
    model = make(name, torch.float32)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert not list(tmp_path.glob("*.bin"))
    auto = AutoModelForCausalLM if name in CAUSAL else AutoModelForMaskedLM
    expected = model(ids_BL).logits
    for again in (zoo.create_model(str(tmp_path)), auto.from_pretrained(tmp_path)):
        assert type(again) is type(model)
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        # not to the bit: in a file tensors lie at other addresses, where a product of one row rounds otherwise
        torch.testing.assert_close(again.eval()(ids_BL).logits, expected, rtol=1e-6, atol=5e-6)
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    hidden_BLD = model.model(ids_BL).last_hidden_state
    torch.testing.assert_close(backbone(ids_BL).last_hidden_state, hidden_BLD, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("name", TINY)
def test_loading_in_bfloat16_keeps_what_must_stay_float32(name, make, tmp_path):
    model = make(name, torch.float32)
    model.save_pretrained(tmp_path)
    again = zoo.create_model(str(tmp_path), dtype=torch.bfloat16)
    kept = {n for m in again.modules() if isinstance(m, SequenceMixer | ChannelMixer) for n in m.keep_float32}
    for key, value in again.state_dict().items():
        wanted = torch.float32 if key.rsplit(".", 1)[-1] in kept else torch.bfloat16
        assert value.dtype == wanted, key
    assert again.eval()(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("where", ["left", "right", "inside"])
def test_padding_changes_nothing(name, where, make, ids_BL):
    model = make(name)
    expected = model(ids_BL).logits
    slots = {"left": list(range(5, 26)), "right": list(range(21)), "inside": [*range(3), *range(5, 12), *range(15, 26)]}
    slots = torch.tensor(slots[where])
    padded_BL = torch.zeros(2, 26, dtype=torch.long)
    mask_BL = torch.zeros(2, 26, dtype=torch.long)
    padded_BL[:, slots], mask_BL[:, slots] = ids_BL, 1
    out = model(padded_BL, attention_mask=mask_BL).logits[:, slots]
    torch.testing.assert_close(out, expected, **CLOSE)
    embeds = model.get_input_embeddings()(padded_BL).masked_fill(mask_BL[:, :, None] == 0, float("nan"))
    poisoned = model(inputs_embeds=embeds, attention_mask=mask_BL).logits[:, slots]
    torch.testing.assert_close(poisoned, expected, **CLOSE)


@pytest.mark.parametrize("name", TINY)
def test_a_batch_of_different_lengths_gives_what_each_row_gives(name, make, ids_BL):
    model = make(name)
    mask_BL = torch.ones(2, 21, dtype=torch.long)
    mask_BL[1, :9] = 0
    out = model(ids_BL, attention_mask=mask_BL).logits
    torch.testing.assert_close(out[:1], model(ids_BL[:1]).logits, **CLOSE)
    torch.testing.assert_close(out[1:, 9:], model(ids_BL[1:, 9:]).logits, **CLOSE)


@pytest.mark.parametrize("name", TINY)
def test_packed_segments_are_separate_sequences(name, make, ids_BL):
    model = make(name)
    segments_BL = torch.tensor([[0] * 4 + [1] * 9 + [2] * 8, [5] * 20 + [6]])
    out = model(ids_BL, segment_ids=segments_BL, use_cache=False).logits
    for row, cuts in enumerate([[0, 4, 13, 21], [0, 20, 21]]):
        for start, end in pairwise(cuts):
            alone = model(ids_BL[row : row + 1, start:end]).logits
            torch.testing.assert_close(out[row : row + 1, start:end], alone, **CLOSE)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_output_depends_on_a_later_token(name, make, ids_BL):
    model = make(name)
    changed_BL = ids_BL.clone()
    changed_BL[:, 13:] = 3
    out, changed = model(ids_BL).logits, model(changed_BL).logits
    torch.testing.assert_close(out[:, :13], changed[:, :13], **CLOSE)
    assert (out[:, 13:] - changed[:, 13:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_looks_both_ways(name, make, ids_BL):
    model = make(name)
    changed_BL = ids_BL.clone()
    changed_BL[:, -1] = 3
    assert (model(ids_BL).logits[:, 0] - model(changed_BL).logits[:, 0]).abs().max() > 1e-4
    assert model(ids_BL).get("past_key_values") is None


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_gives_the_same_gradients(name, make, ids_BL):
    model = make(name).train()
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[0, :4] = 0
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        torch.manual_seed(0)
        model(ids_BL, attention_mask=mask_BL, labels=ids_BL).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_autocast_is_finite_and_near(name, make, ids_BL):
    model = make(name, torch.float32).train()
    expected = model(ids_BL, labels=ids_BL).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids_BL, labels=ids_BL).loss
    loss.backward()
    assert abs(loss.item() - expected.item()) < 0.05 * expected.item()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("name", TINY)
def test_hidden_states_are_the_inputs_of_the_blocks(name, make, ids_BL):
    model = make(name)
    out = model(ids_BL, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    shared = model.model.first_shared(out.hidden_states[0])
    x_BLD, _ = model.model.layers[0](out.hidden_states[0], None, None, None, shared)
    torch.testing.assert_close(out.hidden_states[1], x_BLD, **CLOSE)
    torch.testing.assert_close(out.hidden_states[-1], model.model(ids_BL).last_hidden_state, **CLOSE)


@pytest.mark.parametrize("name", TINY)
def test_embeddings_can_be_given_and_resized(name, make, ids_BL):
    model = make(name)
    embeds = model.get_input_embeddings()(ids_BL)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids_BL).logits, **CLOSE)
    model.resize_token_embeddings(300)
    assert model.config.vocab_size == 300
    out = model(torch.full((1, 3), 299))
    assert out.logits.shape[-1] == 300
    if model.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids_BL, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids_BL, attention_mask=torch.ones(2, 1, 21, 21))


def test_initial_weights_follow_the_config():
    torch.manual_seed(0)
    model = zoo.create_model("transformer-tiny", initializer_range=0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert model.model.layers[0].mixer.q_proj.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    assert torch.equal(zoo.create_model("gpt2-tiny").model.layers[0].mixer.q_proj.bias, torch.zeros(64))


def test_a_causal_task_needs_causal_layers():
    layers = {"defaults": {"causal": False}}
    with pytest.raises(TraitError, match="a causal LM needs causal layers"):
        zoo.create_model("transformer-tiny", layers=layers)
    with pytest.raises(TraitError, match="'mamba2' has no two-sided form"):
        zoo.create_model("mamba2-tiny", layers=layers, task="masked-lm")


@pytest.mark.parametrize("name", ["bert-tiny", "retnet-tiny", "linear-transformer-tiny", "sliding-window-tiny"])
def test_other_tasks_on_two_sided_layers(name, make, ids_BL, tmp_path):
    layers = {"defaults": {"causal": False}}
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, 15:] = 0
    classifier = make(name, task="sequence-classification", layers=layers, pooler="tanh")
    assert type(classifier) is ZooForSequenceClassification
    out = classifier(ids_BL, attention_mask=mask_BL, labels=torch.tensor([1, 0]))
    assert out.logits.shape == (2, 2)
    alone = classifier(ids_BL[1:, :15]).logits
    torch.testing.assert_close(out.logits[1:], alone, **CLOSE)
    out.loss.backward()
    embedder = make(name, task="sentence-embedding", layers=layers)
    assert type(embedder) is ZooForSentenceEmbedding
    vectors = embedder(ids_BL, attention_mask=mask_BL).pooler_output
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(vectors[1:], embedder(ids_BL[1:, :15]).pooler_output, **CLOSE)
    assert type(make(name, task="masked-lm", layers=layers)) is ZooForMaskedLM
    classifier.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(again(ids_BL).logits, classifier(ids_BL).logits, **CLOSE)


def test_pooling():
    x_BLD = torch.arange(12.0).view(2, 3, 2)
    mask_BL = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert pool(x_BLD, mask_BL, "mean").tolist() == [[3, 4], [7, 8]]
    assert pool(x_BLD, mask_BL, "cls").tolist() == [[2, 3], [6, 7]]
    assert pool(x_BLD, mask_BL, "last").tolist() == [[4, 5], [8, 9]]
    assert pool(x_BLD, None, "last").tolist() == [[4, 5], [10, 11]]


def test_regression_and_multi_label_losses(make, ids_BL):
    one = make("bert-tiny", torch.float32, task="sequence-classification", num_labels=1)
    out = one(ids_BL, labels=torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(out.loss, ((out.logits[:, 0] - torch.tensor([0.5, -1.0])) ** 2).mean())
    many = make("bert-tiny", torch.float32, task="sequence-classification", num_labels=3)
    many.config.problem_type = "multi_label_classification"
    assert many(ids_BL, labels=torch.tensor([[1, 0, 1], [0, 0, 0]])).loss > 0


def test_positions_beyond_the_learned_ones_are_refused():
    model = zoo.create_model("gpt2-tiny", max_position_embeddings=8)
    assert isinstance(model, ZooForCausalLM)
    with pytest.raises(ValueError, match="position 8 is beyond the 8 learned positions"):
        model(torch.ones(1, 9, dtype=torch.long))
