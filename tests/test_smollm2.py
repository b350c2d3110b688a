"""A real model, SmolLM2-135M-Instruct, beside what transformers and tokenizers say of it.

tests/golden/smollm2.json was made by `python tests/smollm2.py --golden`.
"""

import json
from pathlib import Path

import pytest
import smollm2
import torch
from helpers import greedy_params, run_checked, token_ids

import kernels
from nanopaged import LLM, Engine

GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm2.json").read_text("utf-8"))
PROMPTS = [prompt["token_ids"] for prompt in GOLDEN["prompts"]]
EXPECTED = [prompt["output_ids"] for prompt in GOLDEN["prompts"]]


@pytest.fixture(scope="module")
def llm():
    try:
        folder = smollm2.folder()
    except smollm2.ModelUnavailable as error:
        pytest.skip(f"SmolLM2-135M-Instruct is not to be had: {error}")
    return LLM(str(folder), num_blocks=64)


def engine_with(llm, block_size, num_blocks, max_num_batched_tokens=8192):
    """Another engine over the same weights: they take half a gigabyte."""
    c, old = llm.engine.model.config, llm.engine.kv_cache
    kv_cache = kernels.new_kv_cache(c.num_hidden_layers, num_blocks, block_size,
                                    c.num_key_value_heads, c.head_dim, old.dtype, old.device)
    return Engine(llm.engine.model, llm.tokenizer, kv_cache, 256, max_num_batched_tokens,
                  num_blocks * block_size, 0)


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


def test_bfloat16_runs(llm):
    """The checkpoint's own dtype, which a GPU takes, is not carried through."""
    half = LLM(str(llm.tokenizer.folder), dtype="bfloat16", num_blocks=16)
    assert half.engine.kv_cache.dtype == torch.bfloat16
    output = half.generate([PROMPTS[-1]], greedy_params(4))[0]
    assert token_ids(output)[0] == EXPECTED[-1][0]
