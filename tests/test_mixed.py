"""Sharing beside sharing: greedy, seeded, n > 1 and beam search in one batch, under all settings.

Each request must get the tokens that it has alone, in a pool where nothing is tight.
"""

import functools
import itertools
import random
from collections import Counter

import pytest
from helpers import (
    CALLED,
    Interrupt,
    all_token_ids,
    assert_nothing_left,
    blocks_needed,
    check,
    golden,
    golden_llm,
    greedy_params,
    run_checked,
    serve,
)

import kernels
import nanopaged
from nanopaged import BeamSearchParams, BlockPool, Engine, SamplingParams

MODEL = "llama_gqa_tied"                               # 131 tokens, 128 positions
PROMPTS, _ = golden(MODEL)                             # of 1, 7, 16 and 33 tokens
STOPS = list(range(0, 97, 7))                          # so that some texts end early


def seeded(max_tokens, **settings):
    return SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True} | settings)


def beam(beam_width, max_tokens, **settings):
    return BeamSearchParams(beam_width, max_tokens, **{"ignore_eos": True} | settings)


def requests_of(prompts):
    """Of all kinds. Prompts that share beginnings with others, and two that are the same."""
    return [
        (prompts[3], seeded(9, n=3, seed=5)),
        (prompts[1], beam(3, 8)),
        (prompts[2], greedy_params(12)),
        (prompts[2], seeded(10, n=4, seed=7, stop_token_ids=STOPS)),
        (prompts[3][:20], seeded(12, seed=9, top_p=0.9, repetition_penalty=1.2)),
        (prompts[3], beam(2, 10, length_penalty=0.5, ignore_eos=False)),
        (prompts[0], seeded(14, n=2, seed=11)),
        (prompts[3][:16] + prompts[1], greedy_params(7, n=2)),
        (prompts[1] + prompts[3], greedy_params(1, n=3)),
        (prompts[2], beam(4, 6)),
    ]


REQUESTS = requests_of(PROMPTS)


@functools.cache
def tokens_alone(name):
    """The tokens of a model's requests, each run alone and sharing with nobody else."""
    llm = golden_llm(name, block_size=4, num_blocks=128, enable_prefix_caching=False)
    return [all_token_ids(serve(llm, [request])[0]) for request in requests_of(golden(name)[0])]


@pytest.fixture(scope="module")
def alone():
    return tokens_alone(MODEL)


def smallest_pool(block_size, requests=REQUESTS):
    """Blocks that just hold the largest of `requests`."""
    return max(blocks_needed(block_size, *request) for request in requests)


def random_settings(rng):
    """Settings of an engine in which each of REQUESTS can run, and most cannot run together."""
    block_size, preemption = rng.choice([1, 2, 4, 16]), rng.choice(["auto", "recompute", "swap"])
    num_blocks = smallest_pool(block_size)
    return {"block_size": block_size, "preemption": preemption,
            "num_blocks": rng.randint(num_blocks, 2 * num_blocks),
            "swap_blocks": rng.randint(preemption == "swap", 2 * num_blocks),
            "max_num_batched_tokens": rng.choice([4, 5, 9, 30, 100]),
            "max_num_seqs": rng.choice([4, 9, 256]),
            "enable_prefix_caching": rng.random() < 0.5}


@pytest.mark.parametrize("pool", ["ample", "recompute", "swap"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("name", [MODEL, "gpt2_openai"])
def test_the_tokens_it_has_alone(name, block_size, pool):
    """A row of the logits taken for another's; K and V lost, mixed up or stale after a preemption;
    a prefix that is none. The semantics of this engine, as one matrix."""
    prompts, _ = golden(name)
    requests, expected, preempted = requests_of(prompts), tokens_alone(name), Counter()
    chosen = [0, 1, 3, 4, 5, 7, 9]
    settings = {"block_size": block_size, "num_blocks": 1024 // block_size}
    if pool != "ample":
        settings |= {"num_blocks": smallest_pool(block_size, requests), "preemption": pool,
                     "swap_blocks": 200 * (pool == "swap")}
    for caching, chunk, order in itertools.product((True, False), (6, 100), (1, -1)):
        llm = golden_llm(name, enable_prefix_caching=caching, max_num_batched_tokens=chunk,
                         **settings)
        outputs = serve(llm, [requests[i] for i in chosen[::order]])
        where = f"cache {caching}, chunks of {chunk}, order {order}"
        assert [all_token_ids(out) for out in outputs] == [
            expected[i] for i in chosen[::order]], where
        preempted.update({kind: llm.stats()[f"preemptions_{kind}"] for kind in
                          ("recompute", "swap")})
        assert caching or llm.stats()["cached_tokens"] == 0
    assert {kind for kind, count in preempted.items() if count} == {pool} - {"ample"}
    assert pool == "ample" or preempted[pool] > 8, "the pool was not tight"


def add_and_abort(llm, rng, num_requests):
    """A hook for run_checked(): requests come and go -> (it, {request_id: i}, ids of aborted)."""
    to_come, live, aborted = rng.choices(range(len(REQUESTS)), k=num_requests), {}, set()

    def come_and_go(_):
        while to_come and rng.random() < 0.4:
            i = to_come.pop()
            live[llm.engine.add_request(*REQUESTS[i])] = i
        if live and rng.random() < 0.05:
            request_id = rng.choice(list(live))
            if llm.engine.abort(request_id):
                aborted.add(request_id)
        check(llm.engine.scheduler, llm.engine.flight)
    return come_and_go, to_come, live, aborted


TOTALS = Counter()


@pytest.mark.parametrize("seed", range(32))
def test_random_programs(seed, alone):
    """Blocks lost or shared wrongly, a deadlock, or a wrong token, in an order not thought of."""
    rng = random.Random(seed)
    settings = random_settings(rng)
    llm = golden_llm(MODEL, **settings)
    come_and_go, to_come, live, aborted = add_and_abort(llm, rng, 12)
    outputs = {}
    try:
        while to_come:                                 # who comes late may find an idle engine
            come_and_go([])
            outputs |= run_checked(llm.engine, after_step=come_and_go)
        assert_nothing_left(llm)
        for request_id, i in live.items():
            if request_id not in aborted:
                assert all_token_ids(outputs[request_id]) == alone[i], f"request {request_id}"
    except AssertionError as error:
        raise AssertionError(f"seed {seed}, {settings}: {error}") from error
    TOTALS.update(llm.stats())


def test_random_programs_show_something():
    """The test above in pools where nothing is shared, copied, preempted or found again."""
    assert TOTALS["steps"] > 2000 or not TOTALS["steps"]
    for name in ("forks", "copied_blocks", "swapped_blocks", "cached_tokens", "preemptions_swap",
                 "preemptions_recompute"):
        assert TOTALS[name] > 20 or not TOTALS["steps"], f"{name}: {TOTALS[name]}"


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("first, second", [(0, 1), (3, 1)])
def test_a_fork_beside_a_beam_search_that_starts(first, second, n, alone):
    """As many rows to sample from as there are logits, but not the same ones: a text is drawn from
    the logits of the beam search beside it."""
    prompt, params = REQUESTS[first]
    params = SamplingParams(**vars(params) | {"n": n})
    for order in (1, -1):                              # n rows, of n logits: 1 + (n - 1) beams
        requests = [(prompt, params), *[REQUESTS[second]] * (n - 1)][::order]
        outputs = serve(golden_llm(MODEL, block_size=4, num_blocks=128), requests)
        tokens = [all_token_ids(out) for out in outputs][::order]
        assert tokens == [alone[first][:n], *[alone[second]] * (n - 1)]


@pytest.mark.parametrize("caching", [True, False])
def test_only_with_prefix_caching_requests_share(caching):
    """A setting that is accepted and dropped. Texts of one request share their prompt either way,
    after a recompute as well: the pool just holds what they share, and what each needs alone."""
    requests = [(PROMPTS[3], seeded(9, n=3, seed=5))] * 3
    llm = golden_llm(MODEL, block_size=4, num_blocks=blocks_needed(4, *requests[0]) + 1,
                     enable_prefix_caching=caching)
    outputs = serve(llm, requests)
    assert outputs[-1].num_cached_tokens == (32 if caching else 0)
    assert all_token_ids(outputs[0]) == all_token_ids(outputs[1]) == all_token_ids(outputs[2])
    assert llm.stats()["preemptions_recompute"] > 0, "nothing was preempted: no test of it"


# --- an interrupted step ------------------------------------------------------------------------

PLACES = [(nanopaged, "make_batch"), (nanopaged, "sample"), (nanopaged, "beam_score"),
          (kernels, CALLED.format("copy_blocks")), (kernels, CALLED.format("paged_attention")),
          (BlockPool, "append"), (BlockPool, "publish"), (Engine, "_append_tokens")]


@pytest.mark.parametrize("owner, name", PLACES, ids=lambda place: getattr(place, "__name__", place))
def test_an_interrupted_step_is_done_again(owner, name, alone, monkeypatch):
    """I5: Ctrl-C, or an error, somewhere in a step. Blocks that nobody holds any more, a text that
    has ended and stops all others, tokens drawn twice, a cached block that nobody computed."""
    chosen = [0, 1, 2, 8]
    # each of the first calls, when all is new; then some of those when texts fork and end
    for at in itertools.chain(range(1, 9), itertools.count(9, 4)):
        llm, outputs = golden_llm(MODEL, block_size=4, num_blocks=64), {}

        def keep(moved, outputs=outputs):
            outputs.update({out.request_id: out for out in moved})

        ids = [llm.engine.add_request(*REQUESTS[i]) for i in chosen]
        with monkeypatch.context() as patch:
            interrupt = Interrupt(getattr(owner, name), at)
            patch.setattr(owner, name, lambda *args, it=interrupt, **kw: it(*args, **kw))
            try:
                run_checked(llm.engine, after_step=keep)
            except KeyboardInterrupt:
                pass
        if interrupt.calls_left > 0:
            assert at > 2, "it is never called: no test of it"
            return
        run_checked(llm.engine, after_step=keep)
        assert_nothing_left(llm)
        # what ended in the interrupted step may have been given out, or not
        tokens = {i: all_token_ids(outputs[request_id])
                  for i, request_id in zip(chosen, ids, strict=True)}
        assert tokens == {i: alone[i] for i in chosen}, f"at call {at}"


@pytest.mark.parametrize("at", range(1, 6))
def test_nothing_false_is_cached_by_an_interrupted_step(at, monkeypatch):
    """I6: blocks whose publishing was interrupted. The next one then follows on nothing, and is
    found for texts that begin with its tokens."""
    llm, prompt = golden_llm(MODEL, block_size=4), PROMPTS[3][:13]
    llm.engine.add_request(prompt, greedy_params(20))
    with monkeypatch.context() as patch:
        interrupt = Interrupt(BlockPool.publish, at)
        patch.setattr(BlockPool, "publish", lambda *args, **kwargs: interrupt(*args, **kwargs))
        with pytest.raises(KeyboardInterrupt):
            run_checked(llm.engine)
    outputs = run_checked(llm.engine)
    text = prompt + [token for out in outputs.values() for token in all_token_ids(out)[0]]
    for start in range(0, 24, 4):
        part, params = text[start:start + 9], greedy_params(8)
        expected = golden_llm(MODEL, block_size=4).generate([part], params)[0]
        out = llm.generate([part], params)[0]
        assert all_token_ids(out) == all_token_ids(expected), f"from token {start}"
        assert start == 0 or out.num_cached_tokens == 0, f"from token {start}: a false hit"


def test_an_interrupted_beam_search_keeps_no_text_twice(monkeypatch):
    """Texts that ended in a step that is done again are among the best of that step twice."""
    request = PROMPTS[1], BeamSearchParams(3, 10, length_penalty=4.0)

    def search():
        llm = golden_llm(MODEL, block_size=4, num_blocks=128)
        llm.engine.model.config.eos_token_id = list(range(100))
        return llm, llm.engine.add_request(*request)

    llm, request_id = search()
    expected = all_token_ids(run_checked(llm.engine)[request_id])
    for at in itertools.count(1):
        llm, request_id = search()
        interrupt = Interrupt(nanopaged.beam_score, at)
        with monkeypatch.context() as patch:
            patch.setattr(nanopaged, "beam_score", lambda *a, it=interrupt, **kw: it(*a, **kw))
            try:
                run_checked(llm.engine)
            except KeyboardInterrupt:
                outputs = run_checked(llm.engine)
                assert all_token_ids(outputs[request_id]) == expected, f"at call {at}"
        if interrupt.calls_left > 0:
            assert at > 5, "it is hardly called: no test of it"
            return
