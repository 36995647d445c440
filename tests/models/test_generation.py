"""States and generate(): any split gives what one pass gives; greedy, beams, sampling, left-padded batches."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import zoo
from zoo.models.depth import RoutedBlock
from zoo.models.memory import MemoryBlock
from zoo.models.state import StateLayer, state_bytes

CAUSAL = zoo.list_models("*-tiny", task="causal-lm")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
NEW = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def greedy(model, ids_BL: torch.Tensor, steps: int) -> torch.Tensor:
    """Argmax of the last position, the whole text anew for every token: no cache involved."""
    for _ in range(steps):
        next_B1 = model(ids_BL, use_cache=False).logits[:, -1:].argmax(-1)
        ids_BL = torch.cat([ids_BL, next_B1], 1)
    return ids_BL


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_is_the_argmax_without_cache(name, make, ids_BL):
    model = make(name)
    assert torch.equal(model.generate(ids_BL, **NEW), greedy(model, ids_BL, 12))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_left_padded_batch_gives_what_each_row_gives(name, make, ids_BL):
    model = make(name)
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, :9] = 0
    batch_BL = ids_BL.masked_fill(mask_BL == 0, 0)
    out = model.generate(batch_BL, attention_mask=mask_BL, **NEW)
    assert torch.equal(out[:1], greedy(model, ids_BL[:1], 12))
    assert torch.equal(out[1:, 9:], greedy(model, ids_BL[1:, 9:], 12))


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("sizes", [[21], [1] * 21, [1, 20], [20, 1], [7, 7, 7], [3, 1, 1, 12, 4], [10, 11]])
def test_any_split_of_the_prefill_is_one_pass(name, sizes, make, ids_BL):
    model = make(name)
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[0, :5], mask_BL[1, 8:11] = 0, 0
    for mask in (None, mask_BL):
        expected = model(ids_BL, attention_mask=mask, use_cache=False).logits
        cache, pieces, start = DynamicCache(), [], 0
        for size in sizes:
            end = start + size
            seen = None if mask is None else mask[:, :end]
            out = model(ids_BL[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            assert cache.get_seq_length() == end
            pieces.append(out.logits)
            start = end
        real = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(torch.cat(pieces, 1)[real], expected[real], **CLOSE)


@pytest.mark.parametrize("name", CAUSAL)
def test_beam_search(name, make, ids_BL):
    model = make(name)
    options = {**NEW, "max_new_tokens": 5, "num_beams": 3, "early_stopping": True}
    out = model.generate(ids_BL, **options)
    assert torch.equal(out, model.generate(ids_BL, use_cache=False, **options))


@pytest.mark.parametrize("name", CAUSAL)
def test_sampling(name, make, ids_BL):
    model = make(name)
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0, "top_p": 0.95, "pad_token_id": 0}
    torch.manual_seed(3)
    out = model.generate(ids_BL, num_return_sequences=3, **options)
    assert out.shape == (6, 27)
    assert len({tuple(row) for row in out[:3, 21:].tolist()}) > 1
    torch.manual_seed(3)
    again = model.generate(ids_BL, num_return_sequences=3, use_cache=False, **options)
    assert torch.equal(out, again)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_cache_goes_on_where_it_stopped(name, make, ids_BL):
    model = make(name)
    prefix = model(ids_BL[:, :15], use_cache=True).past_key_values
    twice = [copy.deepcopy(prefix) for _ in range(2)]
    out = [model.generate(ids_BL, past_key_values=cache, **NEW) for cache in twice]
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], greedy(model, ids_BL, 12))


@pytest.mark.parametrize("name", CAUSAL)
def test_the_cache_repeats_selects_and_resets(name, make, ids_BL):
    model = make(name)
    cache = model(ids_BL, use_cache=True).past_key_values
    before = state_bytes(cache)
    cache.batch_repeat_interleave(2)
    assert state_bytes(cache) == 2 * before
    next_B1 = torch.tensor([[1], [2], [1], [2]])
    wide = model(next_B1, past_key_values=copy.deepcopy(cache)).logits
    cache.batch_select_indices(torch.tensor([3, 0]))
    narrow = model(next_B1[[3, 0]], past_key_values=cache).logits
    torch.testing.assert_close(narrow, wide[[3, 0]], **CLOSE)
    cache.reset()
    assert state_bytes(cache) == 0
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", CAUSAL)
def test_state_bytes_grow_only_where_the_traits_say_so(name, make):
    model = make(name, torch.float32)
    ids_BL = torch.randint(1, 256, (1, 192))
    blocks, traits = model.model.layers, [block.mixer.traits for block in model.model.layers]
    sizes = []
    for L in (64, 128, 192):
        cache = model(ids_BL[:, :L], use_cache=True).past_key_values
        sizes.append([layer.state.nbytes for layer in cache.layers[: len(traits)]])
    for i, trait in enumerate(traits):
        small, middle, large = (size[i] for size in sizes)
        if isinstance(blocks[i], RoutedBlock):  # grows by the tokens that take it
            assert small <= middle <= large
        elif trait.state == "grows" or isinstance(blocks[i], MemoryBlock):
            assert small < middle < large
            assert middle - small == large - middle
        else:
            assert small == middle == large


def test_a_cache_of_another_model_is_refused(make, ids_BL):
    model = make("transformer-tiny")
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 0)
    with pytest.raises(ValueError, match="past_key_values was filled by another model"):
        model(ids_BL, past_key_values=cache)


def test_no_state_is_kept_where_none_is_wanted(make, ids_BL):
    model = make("transformer-tiny")
    assert model(ids_BL, use_cache=False).past_key_values is None
    assert model(ids_BL).past_key_values.get_seq_length() == 21
    assert all(isinstance(layer, StateLayer) for layer in model(ids_BL).past_key_values.layers)
    assert model.train()(ids_BL).past_key_values is None
    with pytest.raises(ValueError, match="segments and state"):
        model.eval()(ids_BL, segment_ids=torch.zeros_like(ids_BL), use_cache=True)


def test_generation_stops_at_the_learned_positions(make):
    model = make("gpt2-tiny", max_position_embeddings=8)
    with pytest.raises(ValueError, match="beyond the 8 learned positions"):
        model.generate(torch.ones(1, 5, dtype=torch.long), **NEW)


def test_only_the_wanted_logits_are_computed(make, ids_BL):
    model = make("transformer-tiny")
    full = model(ids_BL).logits
    torch.testing.assert_close(model(ids_BL, logits_to_keep=2).logits, full[:, -2:], **CLOSE)
    torch.testing.assert_close(model(ids_BL, logits_to_keep=torch.tensor([3, 5])).logits, full[:, [3, 5]], **CLOSE)
