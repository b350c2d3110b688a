"""A real model, SmolLM2-135M-Instruct, beside what transformers and tokenizers say of it.

tests/golden/smollm2.json was made by `python tests/smollm2.py --golden`.
"""

import json
from pathlib import Path

import pytest
import smollm2
import torch
from helpers import (
    all_token_ids,
    blocks_needed,
    greedy_params,
    make_scheduler,
    run_checked,
    token_ids,
)

import kernels
from nanopaged import LLM, BeamSearchParams, Engine, SamplingParams

GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm2.json").read_text("utf-8"))
PROMPTS = [prompt["token_ids"] for prompt in GOLDEN["prompts"]]
EXPECTED = [prompt["output_ids"] for prompt in GOLDEN["prompts"]]


@pytest.fixture(scope="module")
def llm():
    try:
        folder = smollm2.folder()
    except smollm2.ModelUnavailable as error:
        pytest.skip(f"SmolLM2-135M-Instruct is not to be had: {error}")
    return LLM(str(folder), num_blocks=64, dtype="float32")


def engine_with(llm, block_size, num_blocks, max_num_batched_tokens=8192, swap_blocks=0,
                preemption="auto", enable_prefix_caching=True):
    """Another engine over the same weights: they take half a gigabyte."""
    c, old = llm.engine.model.config, llm.engine.kv_cache
    kv_cache = kernels.new_kv_cache(c.num_hidden_layers, num_blocks, block_size,
                                    c.num_key_value_heads, c.head_dim, old.dtype, old.device)
    swap_cache = kv_cache.new_empty((*kv_cache.shape[:2], swap_blocks, *kv_cache.shape[3:]))
    scheduler = make_scheduler(num_blocks, block_size, budget=max_num_batched_tokens,
                               swap_blocks=swap_blocks, preemption=preemption)
    return Engine(scheduler, llm.engine.model, llm.tokenizer, kv_cache, swap_cache,
                  enable_prefix_caching, max_model_len=num_blocks * block_size, seed=0)


def complete(engine, prompts):
    """Greedy tokens of prompts that run together, all invariants checked after each step."""
    ids = [engine.add_request(prompt, greedy_params(12)) for prompt in prompts]
    outputs = run_checked(engine)
    return [token_ids(outputs[request_id]) for request_id in ids]


def test_token_ids_are_those_of_tokenizers(llm):
    """A real tokenizer.json, with 49,152 tokens, is split or merged in another way."""
    for prompt in GOLDEN["prompts"]:
        ids = llm.tokenizer.encode(prompt["text"], allowed_special=True)
        assert ids == prompt["token_ids"], prompt["text"]
        assert llm.tokenizer.decode(prompt["output_ids"]) == prompt["output_text"]


def test_alone(llm):
    """A weight or a rotation is wrong in a way that the small random models do not show."""
    engine = engine_with(llm, 16, 16)
    assert [complete(engine, [prompt])[0] for prompt in PROMPTS] == EXPECTED


@pytest.mark.parametrize("block_size", [1, 4, 64])
def test_together(llm, block_size):
    """A sequence reads another's blocks, or the block size shows in the text."""
    assert complete(engine_with(llm, block_size, 1600 // block_size), PROMPTS) == EXPECTED


def test_preempted(llm):
    """A sequence that lost its blocks and was computed again goes on with other tokens."""
    engine = engine_with(llm, 16, 24, max_num_batched_tokens=128)
    assert complete(engine, PROMPTS) == EXPECTED
    assert engine.stats()["preemptions_recompute"] > 0, "the pool was not tight"


def test_beams(llm):
    """A search that is right for small vocabularies only; real ends of a text, which it goes past
    or takes for the end of all."""
    engine = LLM(str(llm.tokenizer.folder), num_blocks=256, dtype="float32").engine
    ids = [engine.add_request(PROMPTS[case["prompt"]], BeamSearchParams(
        beam_width=case["beam_width"], max_tokens=case["max_tokens"],
        early_stopping=case["early_stopping"])) for case in GOLDEN["beams"]]
    outputs = run_checked(engine)
    for request_id, case in zip(ids, GOLDEN["beams"], strict=True):
        texts, where = outputs[request_id].outputs, (case["prompt"], case["beam_width"])
        assert [text.token_ids for text in texts] == case["token_ids"], where
        for text, score in zip(texts, case["scores"], strict=True):
            mean = text.cumulative_logprob / len(text.token_ids)
            assert mean == pytest.approx(score, abs=1e-4), where
            ended = text.token_ids[-1] == 2            # <|im_end|>, no part of the text
            assert text.finish_reason == ("stop" if ended else "length"), where
            shown = text.token_ids[:-1] if ended else text.token_ids
            assert text.text == llm.tokenizer.decode(shown), where


# Prompts of 16, 4 and 5 tokens. The first two share the blocks of their prompt.
MIXED = [(2, SamplingParams(n=3, seed=4, max_tokens=8, ignore_eos=True)), (2, greedy_params(12)),
         (1, BeamSearchParams(beam_width=4, max_tokens=7, ignore_eos=True)),
         (3, SamplingParams(n=2, seed=8, top_p=0.9, max_tokens=9, ignore_eos=True))]


def complete_mixed(engine, order=1):
    """The tokens of MIXED, run together, invariants checked after each step."""
    ids = [engine.add_request(PROMPTS[i], params) for i, params in MIXED[::order]]
    outputs = run_checked(engine)
    return [all_token_ids(outputs[request_id]) for request_id in ids][::order]


@pytest.fixture(scope="module")
def mixed_alone(llm):
    """The tokens of MIXED, each alone and sharing with nobody else."""
    tokens = []
    for i, params in MIXED:
        engine = engine_with(llm, 16, 20, enable_prefix_caching=False)
        request_id = engine.add_request(PROMPTS[i], params)
        tokens.append(all_token_ids(run_checked(engine)[request_id]))
    assert tokens[1] == [EXPECTED[2]]
    return tokens


@pytest.mark.parametrize("block_size, pool, chunk, caching", [
    (1, "ample", 9, True), (4, "recompute", 100, False), (4, "swap", 12, True),
    (16, "swap", 100, False)])
def test_mixed_requests_whatever_the_settings(llm, mixed_alone, block_size, pool, chunk, caching):
    """K and V that are copied, swapped, found or computed again wrongly, on a real model."""
    needed = max(blocks_needed(block_size, PROMPTS[i], params) for i, params in MIXED)
    tight = {"preemption": pool, "swap_blocks": 3 * needed * (pool == "swap")}
    engine = engine_with(llm, block_size, 4 * needed if pool == "ample" else needed + 1, chunk,
                         enable_prefix_caching=caching, **tight if pool != "ample" else {})
    assert complete_mixed(engine) == mixed_alone
    stats = engine.stats()
    assert pool == "ample" or stats[f"preemptions_{pool}"] > 0, "the pool was not tight"
    assert stats["forks"] > 3 and (stats["copied_blocks"] > 0) == (block_size > 1)
    if caching:                                        # all over again, in the other order
        assert complete_mixed(engine, order=-1) == mixed_alone
        assert engine.stats()["cached_tokens"] >= 12
    assert engine.stats()["blocks_used"] == 0


def test_bfloat16_runs(llm):
    """The checkpoint's own dtype, which a GPU takes, is not carried through."""
    half = LLM(str(llm.tokenizer.folder), dtype="bfloat16", num_blocks=16)
    assert half.engine.kv_cache.dtype == torch.bfloat16
    output = half.generate([PROMPTS[-1]], greedy_params(4))[0]
    assert token_ids(output)[0] == EXPECTED[-1][0]
