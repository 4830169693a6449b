"""Requests through the connector: hits, what is computed, and tokens equal to plain transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import penstock
from penstock import Intent, Miss
from penstock.connectors.equality import Equality, compare_tokens
from penstock.connectors.transformers import Connector, RequestOptions
from tests.connectors.models import SHAPES, VOCAB, alone, make_model, make_prompt

Connect = Callable[..., Connector]


def greedy(connector: Connector, prompt: list[int], n_tokens: int = 8, **options: Any) -> Any:
    result = connector.generate(prompt, n_tokens, options=RequestOptions(**options), do_sample=False)
    assert connector.flush()
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "overrides"), SHAPES)
def test_turns_hit_prompt_and_answer_and_generate_the_models_own_tokens(
    connect: Connect, family: str, overrides: dict[str, Any], dtype: torch.dtype
) -> None:
    model = make_model(family, dtype=dtype, **overrides)
    connector = connect(model)
    history: list[int] = []
    found = Equality()
    for turn, user_tokens in enumerate((100, 21, 37)):
        prompt = history + make_prompt(user_tokens, seed=turn)
        result = greedy(connector, prompt, 40)
        found += compare_tokens(model, prompt, alone(model, prompt, 40), result.tokens)
        # Everything of the last turn but the answer's last token, whose keys nothing needed, in full blocks.
        assert result.hit_tokens == max(0, len(history) - 1) // 16 * 16
        assert result.prompt_tokens == len(prompt)
        history = prompt + result.tokens
    assert found.violations == 0, found
    assert found.equal + found.near_ties == 120
    if dtype == torch.float32:
        assert found == Equality(equal=120)


def test_another_connector_of_equal_weights_hits(connect: Connect, llama: PreTrainedModel) -> None:
    prompt = make_prompt(100)
    first = greedy(connect(llama), prompt)
    second = greedy(connect(make_model("llama")), prompt)
    assert (first.hit_tokens, first.miss) == (0, Miss.ABSENT)
    assert (second.hit_tokens, second.miss) == (96, Miss.NONE)
    assert second.tokens == first.tokens


@pytest.mark.parametrize(("n_tokens", "hit"), [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32)])
def test_at_least_one_token_is_computed(connect: Connect, llama: PreTrainedModel, n_tokens: int, hit: int) -> None:
    connector = connect(llama)
    prompt = make_prompt(n_tokens)
    greedy(connector, prompt)
    again = greedy(connector, prompt)
    assert (again.hit_tokens, again.miss) == (hit, Miss.NONE)
    assert again.tokens == alone(llama, prompt, 8)


def test_a_prompt_that_parts_in_the_middle_hits_up_to_there(connect: Connect, llama: PreTrainedModel) -> None:
    connector = connect(llama)
    prompt = make_prompt(100)
    greedy(connector, prompt)
    other = prompt[:70] + make_prompt(30, seed=9)
    result = greedy(connector, other)
    assert (result.hit_tokens, result.miss) == (64, Miss.ABSENT)
    assert result.tokens == alone(llama, other, 8)


def test_block_length_is_a_choice_and_part_of_the_space(connect: Connect, llama: PreTrainedModel) -> None:
    prompt = make_prompt(100)
    greedy(connect(llama), prompt)
    longer = connect(llama, block_tokens=32)
    assert greedy(longer, prompt).hit_tokens == 0
    assert greedy(longer, prompt).hit_tokens == 96


def test_pad_tokens_that_are_text_are_not_hidden(connect: Connect) -> None:
    model = make_model("llama", pad_token_id=3)
    prompt = [3, 3, *make_prompt(60), 3]
    assert greedy(connect(model), prompt).tokens == alone(model, prompt, 8)


def test_skip_load_computes_and_skip_save_leaves_nothing(connect: Connect, llama: PreTrainedModel) -> None:
    connector = connect(llama)
    prompt = make_prompt(100)
    unsaved = greedy(connector, prompt, skip_save=True)
    assert (unsaved.hit_tokens, unsaved.miss) == (0, Miss.ABSENT)
    assert greedy(connector, prompt).hit_tokens == 0
    unloaded = greedy(connector, prompt, skip_load=True)
    assert (unloaded.hit_tokens, unloaded.miss) == (0, Miss.SKIPPED)
    assert unloaded.tokens == unsaved.tokens
    assert greedy(connector, prompt, skip_load=True, skip_save=True).miss is Miss.SKIPPED
    assert greedy(connector, prompt).hit_tokens == 96


def test_what_the_pool_has_is_not_stored_again(connect: Connect, llama: PreTrainedModel) -> None:
    connector = connect(llama)
    prompt = make_prompt(100)
    greedy(connector, prompt, 32)
    stored = connector.counters()["saved_blocks"]
    assert stored == 131 // 16
    greedy(connector, prompt, 32, skip_load=True)
    greedy(connector, prompt, 32)
    assert connector.counters()["saved_blocks"] == stored


@pytest.mark.parametrize(("least", "hit"), [(64, 64), (65, 0)])
def test_a_hit_below_the_minimum_is_not_loaded(connect: Connect, llama: PreTrainedModel, least: int, hit: int) -> None:
    connector = connect(llama)
    prompt = make_prompt(100)
    greedy(connector, prompt[:65])
    result = greedy(connector, prompt, min_hit_tokens=least)
    assert (result.hit_tokens, result.miss) == (hit, Miss.ABSENT if hit else Miss.SKIPPED)
    assert result.tokens == alone(llama, prompt, 8)


def test_one_log_line_a_request(connect: Connect, llama: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    connector = connect(llama)
    prompt = make_prompt(100)
    greedy(connector, prompt)
    caplog.clear()
    with caplog.at_level(logging.INFO, "penstock.connector"):
        greedy(connector, prompt, intent=Intent(session="s"))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "penstock.connector"]
    assert "prompt_tokens=100 hit_tokens=96 miss=none fetched_blocks=0 front_tokens=0 new_tokens=8" in line


def test_counters_say_what_happened(connect: Connect, llama: PreTrainedModel) -> None:
    connector = connect(llama)
    for _ in range(2):
        greedy(connector, make_prompt(100))
    counters = connector.counters()
    assert counters["requests"] == 2
    assert counters["hit_tokens"] == 96
    assert counters["miss.absent"] == counters["miss.none"] == 1
    assert counters["saved_blocks"] == 6


def test_sampling_and_stop_tokens_work_as_in_transformers(connect: Connect, llama: PreTrainedModel) -> None:
    connector = connect(llama)
    prompt = make_prompt(100)
    full = greedy(connector, prompt, 24).tokens
    stop = full[5]
    cut = connector.generate(prompt, 24, do_sample=False, eos_token_id=stop)
    assert cut.tokens == full[: full.index(stop) + 1]
    torch.manual_seed(4)
    sampled = connector.generate(prompt, 24, do_sample=True, top_k=0)
    ids = torch.tensor([prompt])
    torch.manual_seed(4)
    own = llama.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=24)
    assert sampled.tokens == own[0, 100:].tolist()


def test_load_and_save_around_the_models_own_generate(connect: Connect, llama: PreTrainedModel) -> None:
    connector = connect(llama)
    ids = torch.tensor([make_prompt(100)])
    for hit in (0, 96):
        loaded = connector.load(ids)
        assert loaded.hit_tokens == loaded.cache.get_seq_length() == hit
        output = llama.generate(
            ids,
            past_key_values=loaded.cache,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
        )
        assert output[0, 100:].tolist() == alone(llama, ids[0].tolist(), 30)
        # 129 tokens have keys: the newest one was never fed back.
        assert connector.save(output[0], loaded.cache) == 8
        assert connector.flush()
    assert connector.load(output).hit_tokens == 128


def test_save_takes_the_models_own_cache(connect: Connect, llama: PreTrainedModel) -> None:
    connector = connect(llama)
    ids = torch.tensor([make_prompt(50)])
    cache = DynamicCache(config=llama.config)
    with torch.inference_mode():
        llama(input_ids=ids, past_key_values=cache)
    assert connector.save(ids, cache, RequestOptions(skip_save=True)) == 0
    assert connector.save(ids, cache) == 3
    assert connector.flush()
    loaded = connector.load(ids)
    assert loaded.hit_tokens == 48
    for own, other in zip(cache.layers, loaded.cache.layers, strict=True):
        assert torch.equal(own.keys[:, :, :48], other.keys)
        assert torch.equal(own.values[:, :, :48], other.values)


def test_blocks_are_laid_out_as_documented(connect: Connect, pool: penstock.Pool, llama: PreTrainedModel) -> None:
    connector = connect(llama)
    ids = torch.tensor([make_prompt(40)])
    loaded = connector.load(ids)
    with torch.inference_mode():
        llama(input_ids=ids, past_key_values=loaded.cache)
    connector.save(ids, loaded.cache)
    assert connector.flush()
    handle = pool.space(connector.space)
    with pool.match(handle, penstock.chain_keys(connector.space, ids[0].tolist())) as lease:
        assert len(lease) == 2
        raw = torch.frombuffer(bytearray(lease.views(1)), dtype=torch.float32).view(3, 2, 2, 16, 16)
    for index, layer in enumerate(loaded.cache.layers):
        assert torch.equal(raw[index, 0], layer.keys[0, :, 16:32])
        assert torch.equal(raw[index, 1], layer.values[0, :, 16:32])


def test_requests_that_do_not_fit_one_plain_cache_are_refused(connect: Connect, llama: PreTrainedModel) -> None:
    connector = connect(llama)
    prompt = make_prompt(20)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, 0] = 0
    calls: list[tuple[str, Any, dict[str, Any]]] = [
        ("one request at a time", torch.tensor([prompt, prompt]), {}),
        ("hides tokens", prompt, {"attention_mask": mask}),
        ("empty prompt", [], {}),
        ("integers", torch.zeros(1, 20), {}),
        ("num_beams=2", prompt, {"num_beams": 2}),
        ("num_return_sequences=2", prompt, {"num_return_sequences": 2}),
        ("prompt_lookup_num_tokens", prompt, {"prompt_lookup_num_tokens": 3}),
        ("past_key_values", prompt, {"past_key_values": DynamicCache()}),
        ("pixel_values", prompt, {"pixel_values": torch.zeros(1)}),
        ("cache_implementation", prompt, {"cache_implementation": "static"}),
    ]
    for reason, ids, kwargs in calls:
        with pytest.raises(penstock.errors.Refused, match=reason):
            connector.generate(ids, 4, **kwargs)


def test_positions_beyond_the_model_are_refused_before_anything_runs(connect: Connect) -> None:
    model = make_model("gpt2", n_positions=64)
    connector = connect(model)
    with pytest.raises(penstock.errors.Refused, match="the model has 64"):
        connector.generate(make_prompt(60), 6)
    fits = greedy(connector, make_prompt(60), 5)
    assert fits.tokens == alone(model, make_prompt(60), 5)


def test_training_mode_is_refused_at_the_request(connect: Connect) -> None:
    model = make_model("llama")
    connector = connect(model)
    model.train()
    with pytest.raises(penstock.errors.Refused, match="training mode"):
        connector.generate(make_prompt(20), 4)


def test_token_ids_beyond_the_vocabulary_are_the_models_error(connect: Connect, llama: PreTrainedModel) -> None:
    with pytest.raises(IndexError):
        connect(llama).generate([VOCAB], 2, do_sample=False)
