"""Section 2, config and weights: transformers' numbers, and every fault of a model's folder."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoints import (
    copy_model,
    edit_json,
    edit_tensors,
    gpt2_config,
    gpt2_shapes,
    read_safetensors,
    write_model,
)
from helpers import GOLDEN, MODELS, ROOT, all_logits, golden, golden_llm, greedy_params, token_ids

from nanopaged import LLM

INDEX = "model.safetensors.index.json"


def load(folder, **settings):
    """The engine on a folder that has no tokenizer."""
    return LLM(str(folder), **{"skip_tokenizer_init": True, "num_blocks": 32} | settings)


def refusal(folder, error=ValueError):
    """The one line with which a folder is refused."""
    with pytest.raises(error) as caught:
        load(folder)
    assert type(caught.value) is error, "a subclass says less than it seems to"
    assert "\n" not in str(caught.value), "a complaint is one line"
    return str(caught.value)


# ---- right answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name):
    """A weight left out, transposed or swapped; a wrong angle, scale or norm: any moves a logit."""
    oracle = read_safetensors(GOLDEN / "models" / name / "golden.safetensors")
    prompts, _ = golden(name)
    llm = golden_llm(name)
    together = all_logits(llm, prompts)
    for i, prompt in enumerate(prompts):
        alone = all_logits(llm, [prompt])[0]
        expected = oracle[f"logits_{i}"]
        assert (alone - expected).abs().max() < 1e-4, f"prompt {i} alone"
        assert (together[i] - expected).abs().max() < 1e-4, f"prompt {i} beside the others"


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_those_of_transformers(name):
    """Decoding that reads other K and V than prefill wrote; a prompt that its neighbours change."""
    prompts, texts = golden(name)
    llm = golden_llm(name, block_size=4)
    assert [token_ids(out) for out in llm.generate(prompts, greedy_params())] == texts, "together"
    assert [token_ids(llm.generate(prompt, greedy_params())[0]) for prompt in prompts] == texts, \
        "one by one"


@pytest.mark.parametrize("name, rename", [
    ("gpt2_prefixed", lambda key: key.removeprefix("transformer.")),
    ("gpt2_openai", lambda key: "transformer." + key),
    ("gpt2_openai", lambda key: "transformer." * key.startswith("h.1") + key)])
def test_gpt2_names_with_and_without_transformer(name, rename, tmp_path):
    """A loader that knows one spelling of GPT-2's names, or takes lm_head's for one of them."""
    folder = copy_model(name, tmp_path)
    tensors = read_safetensors(folder / "model.safetensors")
    edit_tensors(folder, drop=tensors, **{
        (key if key == "lm_head.weight" else rename(key)) + " ": t for key, t in tensors.items()})
