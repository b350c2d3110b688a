"""What several test modules share: golden checkpoints, plain sequences, and checked engine runs."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

import kernels
from nanopaged import (
    LLM,
    BlockPool,
    SamplingParams,
    Scheduler,
    Sequence,
    SequenceGroup,
    make_batch,
)

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
MODELS = sorted(path.name for path in (GOLDEN / "models").iterdir())

# What the engine calls of kernels.py: on a GPU the Triton kernel `name`, elsewhere its reference.
CALLED = "{}" if torch.cuda.is_available() else "{}_reference"

torch.set_num_threads(1)       # the matrices are tiny: a second thread costs more than it computes


def make_seq(num_tokens, params=None, seed=0):
    """A sequence that knows `num_tokens` tokens and has none of them in the cache."""
    return Sequence([1] * num_tokens, replace(params or SamplingParams(), seed=seed))


def make_group(request_id, num_tokens, **settings):
    """A request: of one sequence, until its prompt is computed."""
    return SequenceGroup(request_id, None, [make_seq(num_tokens, SamplingParams(**settings))])


def make_scheduler(num_blocks, block_size, max_num_seqs=256, budget=64, swap_blocks=0,
                   preemption="auto"):
    """A scheduler over pools of its own."""
    return Scheduler(BlockPool(num_blocks, block_size), BlockPool(swap_blocks, block_size),
                     preemption, max_num_seqs, budget)


def check_pool(pool, seqs, in_flight=None):
    """Assert I1, I2, I4 and I6 of a pool; `seqs` are all sequences that hold blocks.

    in_flight: {sequence: tokens that the device computes ahead of the host}.
    """
    rows = Counter(block_id for seq in seqs for block_id in seq.block_table)
    held = [(seq.num_kv + (in_flight or {}).get(seq, 0), len(seq.block_table)) for seq in seqs]
    assert all(num == -(-num_kv // pool.block_size) for num_kv, num in held), f"I4: {held}"
    counted = [rows[block_id] for block_id in range(pool.num_blocks)]
    assert counted == pool.ref_count, f"I1: {counted} rows, but ref_count {pool.ref_count}"
    held_or_free = sorted([*rows, *pool.free_blocks])
    assert held_or_free == [*range(pool.num_blocks)], f"I2: lost or there twice: {held_or_free}"
    assert pool.key_of == {b: key for key, b in pool.cached.items()}, "I6: stale keys"


def check(scheduler, flight=None):
    """Assert the invariants of a scheduler's pools and queues; flight: the engine's, if any."""
    seqs, num_steps, *_ = flight or ([], 0)
    in_flight = {seq: num_steps for seq in seqs if seq.block_table}
    seqs = [seq for group in scheduler.running for seq in group.seqs]
    assert in_flight.keys() <= {*seqs}, "what flies is not running"
    check_pool(scheduler.pool, seqs, in_flight)
    # of those that wait, whoever is not swapped out has no blocks, here or in the pool (I7)
    check_pool(scheduler.swap_pool, [seq for group in scheduler.waiting for seq in group.seqs])
    order = [group.request_id for group in [*scheduler.running, *scheduler.waiting]]
    assert order == sorted(order), f"first come, first served is broken: {order}"


def can_append(pool, seq, num_new):
    """Whether there is room for `num_new` more tokens of one sequence."""
    return pool.num_needed([(seq, num_new)]) <= pool.num_free


def begin(pool, seq):
    """Let `seq` begin with what the prefix cache has of it -> number of blocks found."""
    assert not seq.block_table
    prefix = pool.find_prefix(seq)
    pool.hold(seq, prefix, len(prefix) * pool.block_size)
    return len(prefix)


def take_copies(pool):
    """The copies that are owed before anything is computed: [(from, to), ...], once each."""
    pairs = list(pool.copies)
    pool.copies.clear()
    return pairs


def swap(seqs, source, target):
    """Move sequences from pool `source` to pool `target` -> [(from, to), ...]."""
    target.take_over(SequenceGroup(0, None, seqs), source)
    pairs = list(target.arrivals)
    target.arrivals.clear()
    return pairs


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
    # a small pool, so that check() is cheap; float32, as the golden files are, on a GPU too, and
    # there kernel by kernel: each model would be compiled
    settings = {"num_blocks": 64, "dtype": "float32", "enforce_eager": True} | settings
    return LLM(str(GOLDEN / "models" / name), skip_tokenizer_init=True, **settings)


def run_checked(engine, max_steps=2000, after_step=None, watch=lambda engine: None):
    """Step until nothing is left, with all invariants checked -> {request_id: last output}.

    after_step(outputs) sees each step's outputs; it may add and abort requests. watch(engine) sees
    each step's end, while what finishes still holds its blocks.
    """
    outputs = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests():
            return outputs
        moved = engine.step(watch)
        check(engine.scheduler, engine.flight)
        outputs |= {output.request_id: output for output in moved}
        if after_step:
            after_step(moved)
    raise AssertionError(f"still running after {max_steps} steps: a deadlock or a livelock")


def serve(llm, requests, **hooks):
    """Add all (prompt, params) at once and run them, checked -> outputs in their order."""
    ids = [llm.engine.add_request(prompt, params) for prompt, params in requests]
    outputs = run_checked(llm.engine, **hooks)
    assert_nothing_left(llm)
    return [outputs[i] for i in ids]


def token_ids(output):
    """The generated tokens of a request that has one sequence."""
    return output.outputs[0].token_ids


def all_token_ids(output):
    """The generated tokens of each text of a request."""
    return [completion.token_ids for completion in output.outputs]


def blocks_needed(block_size, prompt, params):
    """Blocks that a request takes at its end: what is shared for good, and each text's own."""
    texts = getattr(params, "beam_width", None) or params.n
    shared = len(prompt) // block_size
    own = -(-(len(prompt) + params.max_tokens - 1) // block_size) - shared
    return shared + own * texts


def assert_nothing_left(llm):
    """No request, and no block held: what ended or failed has given everything back."""
    assert not llm.engine.has_unfinished_requests()
    check(llm.engine.scheduler, llm.engine.flight)
    assert llm.stats()["blocks_used"] == 0, "blocks are still held by nobody"


def running_seqs(engine):
    """The sequences that hold blocks of the GPU's pool."""
    return [seq for group in engine.scheduler.running for seq in group.seqs if seq.block_table]


def swapped_groups(engine):
    """Those that wait and have blocks: they are in the CPU's memory."""
    return [group for group in engine.scheduler.waiting if group.blocks()]


def swapped_seqs(engine):
    """The sequences whose blocks are in the CPU's memory."""
    return [seq for group in swapped_groups(engine) for seq in group.seqs if seq.block_table]


def cached_kv(cache, seq):
    """K and V of a sequence, read through its block table -> (L, 2, num_kv, K, D)."""
    return cache[:, :, torch.tensor(seq.block_table)].flatten(2, 3)[:, :, :seq.num_kv]


def computed_kv(llm, texts):
    """K and V of texts that no other has shared anything with -> [(L, 2, tokens, K, D), ...]."""
    engine, kv = llm.engine, []
    seqs = [Sequence(text, SamplingParams()) for text in texts]
    for seq in seqs:
        engine.pool.append(seq, seq.num_tokens)
    with torch.inference_mode():
        engine.model(make_batch([(seq, seq.num_tokens) for seq in seqs], engine.kv_cache),
                     engine.kv_cache)
    for seq in seqs:
        seq.num_kv = seq.num_tokens
        kv.append(cached_kv(engine.kv_cache, seq).cpu())
        engine.pool.free(seq)
    return kv


def spy_on_copies(monkeypatch, seen):
    """Call seen(source cache, target cache, [(from, to), ...]) before blocks are copied."""
    def spied(copy_blocks):
        def spy(*arguments):
            *caches, pairs = arguments             # one on a GPU, where blocks stay in it
            seen(caches[0], caches[-1], [tuple(pair) for pair in pairs.tolist()])
            return copy_blocks(*arguments)
        return spy

    for name in ("copy_blocks_reference", "copy_blocks"):
        monkeypatch.setattr(kernels, name, spied(getattr(kernels, name)))


class Interrupt:
    """A stand-in for a function, that is interrupted at its n-th call."""

    def __init__(self, function, at, error=KeyboardInterrupt):
        self.function, self.calls_left, self.error = function, at, error

    def __call__(self, *args, **kwargs):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise self.error
        return self.function(*args, **kwargs)


def all_logits(llm, prompts):
    """The logits of every position of `prompts`, from one batch -> [(number of tokens, V), ...]."""
    engine = llm.engine
    seqs = [Sequence(prompt, SamplingParams()) for prompt in prompts]
    for seq in seqs:
        engine.pool.append(seq, seq.num_tokens)
    batch = make_batch([(seq, seq.num_tokens) for seq in seqs], engine.kv_cache)
    batch.last_rows = torch.arange(len(batch.input_ids), device=engine.kv_cache.device)
    with torch.inference_mode():
        logits = engine.model(batch, engine.kv_cache).cpu()
    for seq in seqs:
        engine.pool.free(seq)
    return logits.split([seq.num_tokens for seq in seqs])
