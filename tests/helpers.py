"""What several test modules share: golden checkpoints, plain sequences, and checked engine runs."""

import json
from pathlib import Path

import torch

from nanopaged import LLM, SamplingParams, Sequence, SequenceGroup, make_batch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
MODELS = sorted(path.name for path in (GOLDEN / "models").iterdir())

torch.set_num_threads(1)       # the matrices are tiny: a second thread costs more than it computes


def make_seq(num_tokens, params=None, seed=0):
    """A sequence that knows `num_tokens` tokens and has none of them in the cache."""
    return Sequence([1] * num_tokens, params or SamplingParams(), seed)


def make_group(request_id, num_tokens):
    """A request of one sequence."""
    return SequenceGroup(request_id, None, [make_seq(num_tokens)])


def greedy_params(max_tokens=24, **settings):
    """Greedy, and for exactly `max_tokens` tokens, as the golden files were made."""
    settings = {"temperature": 0, "ignore_eos": True} | settings
    return SamplingParams(max_tokens=max_tokens, **settings)


def golden(name):
    """What transformers answers for a small checkpoint -> (prompts, 24 greedy tokens for each)."""
    data = json.loads((GOLDEN / "models" / name / "golden.json").read_text())
    return data["prompts"], data["greedy"]


def golden_llm(name, **settings):
    """The engine on a small checkpoint, whose prompts are token ids."""
    settings = {"num_blocks": 64} | settings       # a small pool, so that check() is cheap
    return LLM(str(GOLDEN / "models" / name), skip_tokenizer_init=True, **settings)


def run_checked(engine, max_steps=2000, after_step=None):
    """Step until nothing is left, with all invariants checked -> {request_id: last output}.

    after_step(outputs) sees each step's outputs; it may add and abort requests.
    """
    outputs = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests():
            return outputs
        moved = engine.step()
        engine.scheduler.check()
        outputs |= {output.request_id: output for output in moved}
        if after_step:
            after_step(moved)
    raise AssertionError(f"still running after {max_steps} steps: a deadlock or a livelock")


def token_ids(output):
    """The generated tokens of a request that has one sequence."""
    return output.outputs[0].token_ids


def assert_nothing_left(llm):
    """No request, and no block held: what ended or failed has given everything back."""
    assert not llm.engine.has_unfinished_requests()
    llm.engine.scheduler.check()
    assert llm.stats()["blocks_used"] == 0, "blocks are still held by nobody"


def all_logits(llm, prompts):
    """The logits of every position of `prompts`, from one batch -> [(number of tokens, V), ...]."""
    engine = llm.engine
    seqs = [Sequence(prompt, SamplingParams(), 0) for prompt in prompts]
    for seq in seqs:
        engine.pool.append(seq, seq.num_tokens)
    batch = make_batch([(seq, seq.num_tokens) for seq in seqs], engine.pool.block_size,
                       engine.kv_cache.device)
    batch.last_rows = torch.arange(len(batch.input_ids), device=engine.kv_cache.device)
    with torch.inference_mode():
        logits = engine.model(batch, engine.kv_cache)
    for seq in seqs:
        engine.pool.free(seq)
    return logits.split([seq.num_tokens for seq in seqs])
