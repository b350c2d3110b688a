"""What sequences share, on real K and V: copy-on-write, n texts, prefix cache, swap, counters."""

import contextlib
import json
from collections import Counter

import pytest
import torch
from helpers import (
    CALLED,
    Interrupt,
    all_token_ids,
    assert_nothing_left,
    blocks_needed,
    cached_kv,
    check,
    computed_kv,
    golden,
    golden_llm,
    greedy_params,
    run_checked,
    running_seqs,
    serve,
    spy_on_copies,
    swapped_groups,
    swapped_seqs,
    token_ids,
)

import kernels
from nanopaged import LLM, BeamSearchParams, BlockPool, SamplingParams

MODEL = "llama_gqa_tied"                               # 131 tokens, 128 positions
PROMPTS, GREEDY = golden(MODEL)                        # of 1, 7, 16 and 33 tokens
STOPS = list(range(0, 131, 5))                         # so that some texts end early


def drawn(max_tokens, n=1, seed=0, **settings):
    return SamplingParams(max_tokens=max_tokens, n=n, seed=seed, **{"ignore_eos": True} | settings)


def beam(beam_width, max_tokens, **settings):
    return BeamSearchParams(beam_width, max_tokens, **{"ignore_eos": True} | settings)


MIXED = [(PROMPTS[1], drawn(12, n=3, seed=1)), (PROMPTS[3], beam(3, 8)),
         (PROMPTS[2], greedy_params(10)), (PROMPTS[3][:18], drawn(9, n=4, stop_token_ids=STOPS)),
         (PROMPTS[3], drawn(6, n=2, seed=3)), (PROMPTS[2], beam(2, 7))]
LARGEST = {size: max(blocks_needed(size, *request) for request in MIXED) for size in (1, 4, 16)}


# --- copy-on-write ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {"block_size": 4, "num_blocks": 200}, {"block_size": 16, "enable_prefix_caching": False},
    {"block_size": 4, "num_blocks": LARGEST[4], "preemption": "swap", "swap_blocks": 99},
    {"block_size": 16, "num_blocks": LARGEST[16], "preemption": "swap", "swap_blocks": 99},
    {"block_size": 4, "num_blocks": LARGEST[4], "preemption": "recompute"}], ids=str)
def test_what_the_blocks_hold(settings):
    """A text that reads K and V which another wrote: a copy that is missing, late or of another
    block; a table that two texts have; contents lost by a swap. Tokens show it late, or never."""
    llm = golden_llm(MODEL, max_num_batched_tokens=24, **settings)
    alone, compared = golden_llm(MODEL, num_blocks=300, enable_prefix_caching=False), Counter()

    def compare(_):
        engine = llm.engine
        for cache, seqs in ((engine.kv_cache, running_seqs(engine)),
                            (engine.swap_cache, swapped_seqs(engine))):
            texts = [seq.token_ids[:seq.num_kv] for seq in seqs]
            for seq, kv in zip(seqs, computed_kv(alone, texts) if seqs else [], strict=True):
                torch.testing.assert_close(cached_kv(cache, seq).cpu(), kv, atol=1e-4, rtol=1e-4)
                compared[cache is engine.swap_cache] += 1

    serve(llm, MIXED, after_step=compare)
    assert compared[False] > 90 and llm.stats()["copied_blocks"] > 5
    assert (compared[True] > 5) == ("swap_blocks" in settings)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_only_shared_last_blocks_are_copied_and_all_at_once(block_size, monkeypatch):
    """A copy of what nobody else reads, or nobody writes; a launch for each block, not a step."""
    llm = golden_llm(MODEL, block_size=block_size, num_blocks=1024 // block_size)
    copies, calls = [], []

    def seen(source, target, pairs):
        assert source is target is llm.engine.kv_cache
        calls.append(len(pairs))
        copies.extend(pairs)
        targets = [to for _, to in pairs]
        assert len({*targets}) == len(targets) and not {*targets} & {of for of, _ in pairs}
        writers = {}                                   # block that is written next -> who writes
        for seq in running_seqs(llm.engine):
            if seq.num_kv % block_size:                # else it is a new one
                writers.setdefault(seq.block_table[seq.num_kv // block_size], []).append(seq)
        for of, to in pairs:
            writer, = writers[to]
            texts = [seq.token_ids[:seq.num_kv] for seq in writers.get(of, [])]
            assert writer.token_ids[:writer.num_kv] in texts, "nobody else has it, or needs it"

    spy_on_copies(monkeypatch, seen)
    serve(llm, MIXED, after_step=lambda _: calls.append(None))
    assert len(copies) == llm.stats()["copied_blocks"]
    assert (len(copies) == 0) == (block_size == 1), "a block of one slot is never half full"
    assert not any(a and b for a, b in zip(calls, calls[1:], strict=False)), "two calls in a step"
    assert block_size == 1 or max(filter(None, calls)) > 1


@pytest.mark.parametrize("num_tokens, copied", [(15, 3), (16, 0), (17, 3)])
def test_copies_by_hand(num_tokens, copied):
    """Four texts of one prompt: one writes in place, and a full block is nobody's to write."""
    llm = golden_llm(MODEL, block_size=4)
    serve(llm, [(PROMPTS[3][:num_tokens], drawn(9, n=4))])
    assert (llm.stats()["copied_blocks"], llm.stats()["forks"]) == (copied, 3)


# --- n texts of a prompt ------------------------------------------------------------------------


@pytest.mark.parametrize("block_size, chunk", [(1, 100), (4, 5), (16, 100)])
def test_n_texts_are_those_of_n_requests(block_size, chunk):
    """Texts drawn alike, with the seeds of others, or from another's K and V."""
    llm = golden_llm(MODEL, block_size=block_size, num_blocks=512 // block_size,
                     max_num_batched_tokens=chunk)
    for options in ({"top_p": 0.9}, {"stop_token_ids": STOPS, "logprobs": 2}, {"temperature": 0}):
        together, *alone = serve(llm, [(PROMPTS[3], drawn(10, n=4, seed=20, **options)),
                                       *((PROMPTS[3], drawn(10, seed=20 + i, **options))
                                         for i in range(4))])
        assert [text.index for text in together.outputs] == [0, 1, 2, 3]
        for text, out in zip(together.outputs, alone, strict=True):
            one = out.outputs[0]
            assert (text.token_ids, text.finish_reason) == (one.token_ids, one.finish_reason)
            assert text.cumulative_logprob == pytest.approx(one.cumulative_logprob, abs=1e-4)
            assert len(text.logprobs or []) == len(one.logprobs or [])
        texts = {tuple(tokens) for tokens in all_token_ids(together)}
        assert len(texts) == (1 if "temperature" in options else 4)


def test_n_texts_are_computed_from_one_prompt():
    """A prompt that is computed for each text."""
    llm = golden_llm(MODEL, block_size=4, enable_prefix_caching=False)
    serve(llm, [(PROMPTS[3], drawn(5, n=4))])
    assert llm.stats()["computed_tokens"] == 33 + 4 * 4


@pytest.mark.parametrize("budget", [4, 6, 7, 40])
def test_no_token_is_computed_twice(budget):
    """Half of a group computed where the budget ends: its texts go on together, so that the half
    is computed again in the next step."""
    llm = golden_llm(MODEL, block_size=4, num_blocks=200, enable_prefix_caching=False,
                     max_num_batched_tokens=budget)
    requests = [(PROMPTS[2], drawn(6, n=2)), (PROMPTS[1], drawn(8, n=3)), (PROMPTS[3], beam(2, 5)),
                (PROMPTS[1], greedy_params(5)), (PROMPTS[3], drawn(4, n=4))]
    serve(llm, requests)
    needed = sum(len(prompt) + (params.max_tokens - 1) * getattr(params, "beam_width", params.n)
                 for prompt, params in requests)
    assert llm.stats()["computed_tokens"] == needed


@pytest.mark.parametrize("budget", [6, 9, 16])
def test_the_texts_of_a_group_get_their_next_token_together(budget):
    """After a recompute in chunks one text is ready before the others: it computes its last token
    again and again until they are."""
    llm, behind = golden_llm(MODEL, block_size=4, num_blocks=26, preemption="recompute",
                             max_num_batched_tokens=budget), Counter()

    def check(_):
        for group in llm.engine.scheduler.running:
            lacking = [seq.num_tokens - seq.num_kv for seq in group.unfinished()]
            assert min(lacking) > 0, f"{lacking}: it has computed all, and got no token"
            behind["seen"] += len(group.seqs) > 1 and max(lacking) > 1

    serve(llm, [(PROMPTS[2], drawn(18, n=3, seed=seed)) for seed in range(5)], after_step=check)
    assert behind["seen"] > 0 and llm.stats()["preemptions_recompute"] > 0


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_texts_that_end_early_give_up_their_blocks(preemption):
    """Blocks that are held until the last text of a request ends, or by who has ended for ever."""
    llm, waited = golden_llm(MODEL, block_size=4, num_blocks=26, preemption=preemption,
                             swap_blocks=60), Counter()

    def check(_):
        for group in llm.engine.scheduler.running:
            ended = [seq for seq in group.seqs if seq.finish_reason]
            assert not any(seq.block_table for seq in ended)
            waited["steps"] += bool(ended)
        held = {block_id for seq in running_seqs(llm.engine) for block_id in seq.block_table}
        assert llm.stats()["blocks_used"] == len(held)

    requests = [(PROMPTS[2], drawn(18, n=4, seed=seed, stop_token_ids=STOPS)) for seed in range(6)]
    serve(llm, requests, after_step=check)
    assert waited["steps"] > 10 and llm.stats()[f"preemptions_{preemption}"] > 0


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("params", [drawn(12, n=2), drawn(20, n=5), beam(3, 9), beam(6, 14)],
                         ids=lambda params: f"{type(params).__name__}{params.n}")
def test_a_group_that_just_fits(params, block_size):
    """Sharing left out of what can run; or what cannot run is queued, and waits for ever (I7)."""
    for prompt in PROMPTS[1:]:
        num_blocks = blocks_needed(block_size, prompt, params)
        for preemption, swap_blocks in (("recompute", 0), ("swap", num_blocks)):
            llm = golden_llm(MODEL, block_size=block_size, num_blocks=num_blocks,
                             preemption=preemption, swap_blocks=swap_blocks)
            out, = serve(llm, [(prompt, params)])
            assert {len(tokens) for tokens in all_token_ids(out)} == {params.max_tokens}
            stats = llm.stats()
            assert stats["preemptions_recompute"] + stats["preemptions_swap"] == 0
            assert stats["blocks_peak"] <= num_blocks
            assert stats["blocks_peak"] == num_blocks or isinstance(params, BeamSearchParams)
        llm = golden_llm(MODEL, block_size=block_size, num_blocks=num_blocks - 1)
        with pytest.raises(ValueError, match=r"^n or beam_width is \d; it must be at most \d"):
            llm.engine.add_request(prompt, params)
        assert_nothing_left(llm)


@pytest.mark.parametrize("settings", [{"max_num_seqs": 3}, {"max_num_batched_tokens": 3}], ids=str)
def test_more_texts_than_a_step_can_hold(settings):
    """A group that no step can schedule whole is queued, and all behind it wait for ever."""
    llm = golden_llm(MODEL, **settings)
    with pytest.raises(ValueError, match=r"^n or beam_width is 4; it must be at most 3"):
        llm.engine.add_request(PROMPTS[1], drawn(5, n=4))
    assert_nothing_left(llm)
    assert len(llm.generate(PROMPTS[0], drawn(5, n=3))[0].outputs) == 3


# --- prefix cache -------------------------------------------------------------------------------


def test_hits_across_requests():
    """A beginning that is computed again, or one that is found where it ends earlier."""
    llm, computed = golden_llm(MODEL, block_size=4), []
    prompt = PROMPTS[3]                                # of 33 tokens: 8 full blocks
    for cut, found in ((33, 0), (33, 32), (20, 16), (21, 20), (3, 0), (5, 4)):
        before = llm.stats()["computed_tokens"]
        out, = serve(llm, [(prompt[:cut], greedy_params(1))])
        computed.append(llm.stats()["computed_tokens"] - before)
        assert (out.num_cached_tokens, computed[-1]) == (found, cut - found), f"{cut} tokens"
    other = [*prompt[:8], (prompt[8] + 1) % 131, *prompt[9:]]
    out, = serve(llm, [(other, greedy_params(1))])
    assert out.num_cached_tokens == 8, "they part in the third block"
    assert llm.stats()["cached_tokens"] == 32 + 16 + 20 + 4 + 8
    out, = serve(llm, [(prompt, greedy_params())])
    assert token_ids(out) == GREEDY[3]


def test_generated_tokens_are_found():
    """A second turn of a chat that computes the first one's answer again. The last token's K and V
    were never computed."""
    llm = golden_llm(MODEL, block_size=4)
    serve(llm, [(PROMPTS[3], greedy_params(12))])      # 33 + 11 computed: 11 blocks
    out, = serve(llm, [(PROMPTS[3] + GREEDY[3][:14], greedy_params(10))])
    assert out.num_cached_tokens == 44
    assert token_ids(out) == GREEDY[3][14:]


@pytest.mark.parametrize("block_size, found", [(1, 15), (4, 12), (16, 0)])
@pytest.mark.parametrize("kind", ["greedy", "n", "beam"])
def test_a_prompt_that_is_all_there(kind, block_size, found):
    """PEERS bug 3: no token is left to compute, a query of length zero."""
    params = {"greedy": greedy_params(6), "n": drawn(6, n=3), "beam": beam(3, 6)}[kind]
    llm, outputs = golden_llm(MODEL, block_size=block_size), []
    for num_cached_tokens in (0, found, found):
        outputs += serve(llm, [(PROMPTS[2], params)])  # of 16 tokens
        assert outputs[-1].num_cached_tokens == num_cached_tokens
        assert all_token_ids(outputs[-1]) == all_token_ids(outputs[0])


@pytest.mark.parametrize("num_batched_tokens, found", [(10, 8), (100, 12)])
def test_hits_on_what_another_has_computed_so_far(num_batched_tokens, found):
    """PEERS bug 5: a block is found before it is computed, or only when its request has ended."""
    llm = golden_llm(MODEL, block_size=4, max_num_batched_tokens=num_batched_tokens)
    prompt = PROMPTS[3][:12]
    twins = [llm.engine.add_request(prompt, greedy_params(9)) for _ in range(2)]
    llm.engine.step()                                  # 10 of the first's 12, or both twins
    late = llm.engine.add_request(PROMPTS[3], greedy_params(9))
    outputs = run_checked(llm.engine)
    second = 8 if num_batched_tokens == 10 else 0      # in one step: neither can find the other's
    assert [outputs[i].num_cached_tokens for i in twins] == [0, second]
    assert outputs[late].num_cached_tokens == found
    assert token_ids(outputs[late]) == GREEDY[3][:9]
    assert len({tuple(token_ids(outputs[i])) for i in twins}) == 1
    again, = serve(llm, [(PROMPTS[3], greedy_params())])
    assert (again.num_cached_tokens, token_ids(again)) == (32, GREEDY[3])


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_live_blocks_are_shared_and_stay_right(block_size):
    """PEERS bug 8: who shares the blocks of a running request corrupts it. A huge block hid it."""
    llm, ids = golden_llm(MODEL, block_size=block_size, num_blocks=256 // block_size), []

    def come(_):
        if len(ids) < 6:
            ids.append(llm.engine.add_request(PROMPTS[3], greedy_params()))

    come(None)
    outputs = run_checked(llm.engine, after_step=come)
    assert_nothing_left(llm)
    assert [token_ids(outputs[i]) for i in ids] == [GREEDY[3]] * 6
    assert [outputs[i].num_cached_tokens for i in ids] == [0] + [32] * 5
    assert llm.stats()["blocks_peak"] < (33 + 6 * 25) / block_size + 6


def test_a_preempted_request_finds_its_own_blocks():
    """PEERS bug 4: counts of before the preemption meet the blocks that are found again."""
    llm = golden_llm(MODEL, block_size=4, num_blocks=28, preemption="recompute")
    outputs = serve(llm, [(prompt, greedy_params()) for prompt in (PROMPTS[3], PROMPTS[2]) * 2])
    assert [token_ids(out) for out in outputs] == [GREEDY[3], GREEDY[2]] * 2
    assert [out.num_cached_tokens for out in outputs[:2]] == [0, 0], "of the prompt, at first"
    stats = llm.stats()
    assert stats["preemptions_recompute"] > 0 and stats["cached_tokens"] > 0
    assert all(out.num_cached_tokens < len(out.prompt_token_ids) for out in outputs)


def test_many_preemptions_beside_a_full_cache():
    """PEERS bug 4, as it was met: hundreds of requests, a tight pool, and hits all the time."""
    llm = golden_llm(MODEL, block_size=4, num_blocks=60, preemption="recompute", max_num_seqs=64)
    prompts = [PROMPTS[3][:4 + i % 29] + [i % 7] * (i % 3) for i in range(128)]
    ample = golden_llm(MODEL, num_blocks=512, enable_prefix_caching=False)
    params = greedy_params(8)
    assert ([token_ids(out) for out in serve(llm, [(prompt, params) for prompt in prompts])]
            == [token_ids(out) for out in ample.generate(prompts, params)])
    assert llm.stats()["preemptions_recompute"] > 10 and llm.stats()["cached_tokens"] > 500


@pytest.mark.parametrize("name", [CALLED.format(x) for x in ("paged_attention", "write_kv")])
def test_nothing_is_found_of_a_step_that_failed(name, monkeypatch):
    """I6: blocks in the cache before they are computed. Ctrl-C comes, the request is dropped, and
    the next one with its prompt reads what was never written."""
    llm = golden_llm(MODEL, block_size=4)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, name, Interrupt(getattr(kernels, name), 1))
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPTS[3]], greedy_params())
    assert_nothing_left(llm)
    out, = serve(llm, [(PROMPTS[3], greedy_params())])
    assert (out.num_cached_tokens, token_ids(out)) == (0, GREEDY[3])


def test_without_the_cache_nothing_is_found():
    """A switch that is accepted and does nothing."""
    llm = golden_llm(MODEL, block_size=4, enable_prefix_caching=False)
    for _ in range(2):
        out, = serve(llm, [(PROMPTS[3], greedy_params(5))])
        assert out.num_cached_tokens == 0
    assert (llm.stats()["cached_tokens"], llm.stats()["computed_tokens"]) == (0, 2 * (33 + 4))


@pytest.fixture
def long_llm(tmp_path):
    """Makes an engine with random weights, for longer texts than the golden models have."""
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_attention_heads": 2,
              "num_hidden_layers": 1, "max_position_embeddings": 512, "vocab_size": 999}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def make(**settings):
        torch.manual_seed(0)
        return LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True, num_blocks=2000,
                   dtype="float32", enforce_eager=True, **settings)
    return make


def test_a_shared_system_prompt(long_llm):
    """The paper's 5-shot case (Fig 16): 341 tokens before each of 64 questions. 21 blocks of 16
    are computed once: 336 of 341 tokens."""
    prompts = [[5 * i % 999 for i in range(341)] + [question, 7 * question] * 5
               for question in range(64)]
    params, texts = greedy_params(6), []
    for caching, first, computed in ((False, 1, 64 * (351 + 5)), (True, 64, None),
                                     (True, 1, 64 * (351 + 5) - 63 * 336)):
        llm = long_llm(enable_prefix_caching=caching, max_num_batched_tokens=512)
        outputs = llm.generate(prompts[:first], params)
        outputs += llm.generate(prompts[first:], params) if prompts[first:] else []
        texts.append([token_ids(out) for out in outputs])
        found = [out.num_cached_tokens for out in outputs]
        assert llm.stats()["computed_tokens"] == 64 * (351 + 5) - sum(found)
        assert computed in (None, llm.stats()["computed_tokens"])
        if computed is None:                           # all at once: 512 tokens before anyone finds
            assert found[0] == 0 and found[2:] == [336] * 62
        assert llm.stats()["cached_tokens"] == sum(found)
        assert_nothing_left(llm)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("at", [1, 2])
def test_a_fork_that_is_interrupted_is_done_again(at, monkeypatch):
    """Ctrl-C behind a fork: blocks of a text that has no place in its request are never freed."""
    texts, fork = [], BlockPool.fork
    for interrupted in (False, True):
        llm, forked = golden_llm(MODEL, block_size=4), []

        def spy(*args, forked=forked, interrupted=interrupted):
            fork(*args)
            forked.append(args)
            if interrupted and len(forked) == at:
                raise KeyboardInterrupt

        request_id = llm.engine.add_request([1, 2, 3, 4, 5], drawn(12, n=3, seed=1))
        monkeypatch.setattr(BlockPool, "fork", spy)
        with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
            llm.engine.step()
        texts.append(all_token_ids(run_checked(llm.engine)[request_id]))
        assert_nothing_left(llm)
    assert texts[0] == texts[1]


# --- swap ---------------------------------------------------------------------------------------


def test_swapped_blocks_are_moved_once(monkeypatch):
    """Shared blocks moved for each text that reads them, and not shared any more on return."""
    llm = golden_llm(MODEL, block_size=4, num_blocks=25, preemption="swap", swap_blocks=40)
    engine, moved, out = llm.engine, Counter(), {}

    def seen(source, target, pairs):
        if source is target:
            return
        assert len({of for of, _ in pairs}) == len({to for _, to in pairs}) == len(pairs)
        seqs = swapped_seqs(engine) if source is engine.kv_cache else running_seqs(engine)
        held = {block_id for seq in seqs for block_id in seq.block_table}
        assert {to for _, to in pairs} <= held, "moved to where nobody reads it"
        moved["pairs"] += len(pairs)

    def tables_are_alike(_):
        for group in swapped_groups(engine):
            out[group.request_id] = pattern([seq.block_table for seq in group.seqs])
        for group in engine.scheduler.running:
            if group.request_id in out and group.unfinished()[0].num_kv == 0:
                assert pattern([seq.block_table for seq in group.seqs]) == out[group.request_id]

    def pattern(tables):
        ids = [block_id for table in tables for block_id in table]
        assert len({*ids}) < len(ids), "nothing is shared"
        return [ids.index(block_id) for block_id in ids]

    spy_on_copies(monkeypatch, seen)
    requests = [(PROMPTS[3], drawn(10, n=3, seed=seed)) for seed in range(4)]
    serve(llm, requests, after_step=tables_are_alike)
    assert out and llm.stats()["swapped_blocks"] == moved["pairs"] > 0
    assert llm.stats()["preemptions_recompute"] == 0
    # 8 blocks of the prompt once, and a few of each text: out, and in again
    assert moved["pairs"] <= llm.stats()["preemptions_swap"] * 2 * (8 + 3 * 3)


def test_nothing_new_is_admitted_while_something_is_swapped_out():
    """Newcomers take the blocks for which a swapped request waits: it starves (paper 4.5)."""
    llm = golden_llm(MODEL, block_size=4, num_blocks=LARGEST[4] + 4, preemption="swap",
                     swap_blocks=200, enable_prefix_caching=False)
    started, swapped, seen = set(), set(), Counter()

    def check(_):
        nonlocal swapped
        new = {group.request_id for group in llm.engine.scheduler.running} - started
        out = {group.request_id for group in swapped_groups(llm.engine)}
        assert not (new and swapped & out), f"{new} before {swapped & out}"
        assert not started - out & {group.request_id for group in llm.engine.scheduler.waiting}
        started.update(new)
        seen["stayed out"] += bool(swapped & out)
        swapped = out

    serve(llm, MIXED + [(PROMPTS[0], greedy_params(3))] * 6, after_step=check)
    assert seen["stayed out"] > 5


def test_too_little_swap_space():
    """A group that the swap space cannot hold is lost, half moved, or waits for ever."""
    params, tokens = drawn(12, n=3, seed=5), []
    for swap_blocks, kind in ((99, "swap"), (3, "recompute"), (1, "recompute")):
        llm = golden_llm(MODEL, block_size=4, num_blocks=24, preemption="swap",
                         swap_blocks=swap_blocks)
        outputs = serve(llm, [(prompt, params) for prompt in PROMPTS[2:] * 2])
        tokens.append([all_token_ids(out) for out in outputs])
        preempted = {k for k in ("swap", "recompute") if llm.stats()[f"preemptions_{k}"]}
        assert preempted == {kind}, f"{swap_blocks} blocks"
    assert tokens[0] == tokens[1] == tokens[2]


def test_auto_is_swap_for_several_and_recompute_for_one():
    """The paper's code: what has several sequences costs several prefills to bring back."""
    for params, kind in ((greedy_params(), "recompute"), (drawn(9, n=3), "swap"),
                         (beam(3, 9), "swap")):
        llm = golden_llm(MODEL, block_size=4, num_blocks=22, swap_blocks=99)
        serve(llm, [(prompt, params) for prompt in PROMPTS * 2])
        preempted = {k for k in ("swap", "recompute") if llm.stats()[f"preemptions_{k}"]}
        assert preempted == {kind}, params


def test_abort_of_a_swapped_request():
    """Swap space that is never given back, or given back to the pool that it is not of."""
    llm = golden_llm(MODEL, block_size=4, num_blocks=24, preemption="swap", swap_blocks=30)
    request = PROMPTS[3], drawn(12, n=3, seed=5)
    expected = all_token_ids(serve(llm, [request])[0])
    for _ in range(4):                                 # what is lost each time is missed at last
        ids = [llm.engine.add_request(*request) for _ in range(3)]
        while not swapped_groups(llm.engine):
            assert llm.engine.has_unfinished_requests(), "nothing was swapped: no test of it"
            llm.engine.step()
        for group in swapped_groups(llm.engine):
            assert llm.engine.abort(group.request_id)
            check(llm.engine.scheduler, llm.engine.flight)
        outputs = run_checked(llm.engine)
        assert all_token_ids(outputs[ids[0]]) == expected
        assert_nothing_left(llm)
        assert llm.engine.scheduler.swap_pool.num_free == 30


def test_swap_without_swap_space():
    """A setting that is accepted and dropped: every preemption is then by recompute."""
    with pytest.raises(ValueError, match=r"^swap_blocks is 0; it must be above 0"):
        golden_llm(MODEL, preemption="swap")
    assert golden_llm(MODEL, preemption="swap", swap_blocks=1)


# --- counters -----------------------------------------------------------------------------------


class Count:
    """llm.stats() by brute force, from the block tables at each step's end."""

    def __init__(self):
        self.steps = self.running = self.slots = self.tokens = self.saved = self.peak = 0
        self.history, self.internal = {}, 0            # block_id -> [slots filled, step by step]

    def __call__(self, engine):
        seqs, size, filled, ended = running_seqs(engine), engine.pool.block_size, {}, {}
        for seq in seqs:
            for i, block_id in enumerate(seq.block_table):
                filled[block_id] = max(filled.get(block_id, 0), min(size, seq.num_kv - i * size))
                ended.setdefault(block_id, []).append(bool(seq.finish_reason))
        num_rows = sum(len(seq.block_table) for seq in seqs)
        self.steps += 1
        self.running += len(engine.scheduler.running)
        self.slots += len(filled) * size
        self.tokens += sum(filled.values())
        self.saved += 1 - len(filled) / num_rows if num_rows else 0
        self.peak = max(self.peak, len(filled))
        for block_id, num_filled in filled.items():
            history = self.history.setdefault(block_id, [])
            if history and num_filled < history[-1]:   # it was given back, and is another's now
                history.clear()
            history.append(num_filled)
            if all(ended[block_id]):                   # nobody fills the rest any more
                self.internal += (size - num_filled) * len(history)
                history.clear()
        for block_id in self.history.keys() - filled:
            self.history[block_id].clear()

    def expected(self):
        return {"steps": self.steps, "mean_running": pytest.approx(self.running / self.steps),
                "blocks_peak": self.peak, "blocks_saved": pytest.approx(self.saved / self.steps),
                "kv_tokens": pytest.approx(self.tokens / self.slots), "kv_external": 0}


def check_stats(llm, count, **expected):
    stats = llm.stats()
    expected = count.expected() | expected
    assert {name: stats[name] for name in expected} == expected
    shares = [stats[f"kv_{kind}"] for kind in ("tokens", "reserved", "internal", "external")]
    assert sum(shares) == pytest.approx(1) and all(-1e-9 <= share <= 1 for share in shares), shares


@pytest.mark.parametrize("settings", [{"block_size": 4}, {"block_size": 1}, {"block_size": 16},
                                      {"block_size": 4, "num_blocks": 16}], ids=str)
def test_counters_without_sharing(settings):
    """PEERS bug 17: shares of something else than the slots that are held."""
    llm, count = golden_llm(MODEL, **{"num_blocks": 200} | settings), Count()
    requests = [(prompt, greedy_params(max_tokens)) for max_tokens, prompt in
                zip((1, 5, 13, 24), PROMPTS, strict=True)]
    outputs = serve(llm, requests, watch=count)
    internal = {} if "num_blocks" in settings else {"kv_internal": pytest.approx(
        count.internal / count.slots)}
    check_stats(llm, count, generated_tokens=1 + 5 + 13 + 24, forks=0, copied_blocks=0, **internal)
    assert llm.stats()["preemptions_recompute"] > 0 or not settings.get("num_blocks")
    assert all(out.num_cached_tokens == 0 for out in outputs)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_counters_of_texts_that_share(block_size, monkeypatch):
    """Shared blocks counted for each reader, forks or copies not counted, or twice."""
    llm, count = golden_llm(MODEL, block_size=block_size, num_blocks=600), Count()
    copied = []
    spy_on_copies(monkeypatch, lambda source, target, pairs: copied.extend(pairs))
    requests = [(PROMPTS[3], drawn(9, n=4)), (PROMPTS[2], greedy_params(5)),
                (PROMPTS[1], drawn(12, n=3, stop_token_ids=STOPS)), (PROMPTS[2], drawn(3, n=2))]
    outputs = serve(llm, requests, watch=count)
    outputs += serve(llm, requests, watch=count)       # the second time, prompts are found
    texts = [tokens for out in outputs for tokens in all_token_ids(out)]
    cached = sum(out.num_cached_tokens for out in outputs)
    computed = (sum(len(out.prompt_token_ids) for out in outputs)
                + sum(len(tokens) - 1 for tokens in texts))
    check_stats(llm, count, forks=2 * (3 + 2 + 1), copied_blocks=len(copied), cached_tokens=cached,
                computed_tokens=computed - cached, generated_tokens=sum(map(len, texts)),
                swapped_blocks=0)
    assert llm.stats()["blocks_saved"] > 0.2 and (cached > 50 or block_size == 16)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_counters_of_mixed_requests(preemption, monkeypatch):
    """Counters that go wrong by beams that fork and end, by swaps or by preemptions."""
    llm = golden_llm(MODEL, block_size=4, num_blocks=LARGEST[4], preemption=preemption,
                     swap_blocks=200)
    count, copied, swapped = Count(), [], []
    spy_on_copies(monkeypatch, lambda source, target, pairs:
                  (copied if source is target else swapped).extend(pairs))
    outputs = serve(llm, MIXED, watch=count)
    # a beam search forks all its beams after each step, and at last those that it returns
    forks = sum(params.n - 1 for _, params in MIXED) + 3 * 8 + 2 * 7
    check_stats(llm, count, forks=forks, copied_blocks=len(copied), swapped_blocks=len(swapped),
                # in a search's last step, its blocks are there or already given back
                kv_tokens=pytest.approx(count.tokens / count.slots, abs=0.02),
                blocks_saved=pytest.approx(count.saved / count.steps, abs=0.02))
    assert bool(swapped) == (preemption == "swap")
    assert llm.stats()[f"preemptions_{preemption}"] > 0 and len(outputs) == len(MIXED)


@pytest.mark.parametrize("num_tokens, max_tokens", [(7, 1), (6, 2), (7, 2), (33, 4), (33, 3)])
def test_waste_of_texts_that_shared_a_block(num_tokens, max_tokens):
    """The empty slots of a block that several share, counted for each as wasted: then more is
    wasted than is held, and less than nothing reserved."""
    llm, count = golden_llm(MODEL, block_size=4), Count()
    serve(llm, [(PROMPTS[3][:num_tokens], drawn(max_tokens, n=4))], watch=count)
    check_stats(llm, count, kv_internal=pytest.approx(count.internal / count.slots))


def test_beams_hold_blocks_until_they_end():
    """A search's last step, counted when its blocks are given back: a peak that is never seen."""
    llm = golden_llm(MODEL, block_size=4)
    serve(llm, [(PROMPTS[1], beam(4, 1))])             # one step, 7 tokens in 2 blocks
    assert llm.stats()["blocks_peak"] == 2
    assert llm.stats()["blocks_saved"] == 0.75         # four texts, one prompt


def test_a_step_that_holds_nothing_saves_nothing():
    """A search whose last step ends with none of its beams: all of no blocks are saved then."""
    llm, count, held = golden_llm(MODEL, block_size=4, num_blocks=64), Count(), []
    llm.engine.model.config.eos_token_id = list(range(0, 131, 2))

    def watch(engine):
        count(engine)
        held.append(len(running_seqs(engine)))

    serve(llm, [(PROMPTS[0], beam(2, 15, length_penalty=0.0, ignore_eos=False))], watch=watch)
    assert held[-1] == 0, "its last step holds blocks: no test of it"
    check_stats(llm, count)
