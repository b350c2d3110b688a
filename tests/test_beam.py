"""Beam search: transformers' texts and scores, whatever happens around a request.

tests/golden/beams was made by `python tests/make_golden.py beams`; beam_oracle.py is the algorithm
in plain Python, which agrees with all of those files.
"""

import json
import random

import pytest
from beam_oracle import beam_search
from checkpoints import write_babbler
from helpers import (
    GOLDEN,
    MODELS,
    all_logits,
    assert_nothing_left,
    check,
    golden,
    golden_llm,
    greedy_params,
    run_checked,
    token_ids,
)

from nanopaged import LLM, BeamSearchParams

MODEL = "llama_gqa_tied"                               # of the two with all settings
PROMPTS, GREEDY = golden(MODEL)                        # of 1, 7, 16 and 33 tokens
MAX_TOKENS = 14


def load_beams(name):
    """-> (ids that may end a text, golden cases)."""
    data = json.loads((GOLDEN / "beams" / f"{name}.json").read_text())
    assert data["max_tokens"] == MAX_TOKENS
    return data["eos_token_ids"], data["cases"]


def params_of(case):
    return BeamSearchParams(beam_width=case["beam_width"], max_tokens=MAX_TOKENS,
                            length_penalty=case["length_penalty"],
                            early_stopping=case["early_stopping"],
                            ignore_eos=case["num_eos"] == 0)


def check_case(case, output, eos_token_ids, where=""):
    """The output is transformers': texts, order, scores, and how each text ended."""
    where = f"{where} {case}"
    assert output.finished, where
    texts = output.outputs
    assert [text.token_ids for text in texts] == case["token_ids"], where
    assert [text.index for text in texts] == list(range(case["beam_width"])), where
    eos_token_ids = eos_token_ids[:case["num_eos"]]
    for text, score in zip(texts, case["scores"], strict=True):
        length = len(text.token_ids)
        got = text.cumulative_logprob / length ** case["length_penalty"]
        assert got == pytest.approx(score, abs=1e-4), where
        ended = text.token_ids[-1] in eos_token_ids
        assert text.finish_reason == ("stop" if ended else "length"), where
        assert ended or length == MAX_TOKENS, where


def serve(llm, requests):
    """Add all (prompt, params) at once and run them, checked -> outputs in their order."""
    ids = [llm.engine.add_request(prompt, params) for prompt, params in requests]
    outputs = run_checked(llm.engine, 5000)
    assert_nothing_left(llm)
    return [outputs[i] for i in ids]


def check_cases(llm, name, every=1):
    """Serve one in `every` cases of a model beside greedy requests: all that can be together are.

    The ids that end a text are the model's, so there is one batch for each number of them.
    """
    prompts, greedy = golden(name)
    eos_token_ids, cases = load_beams(name)
    for num_eos in (1, 2):                             # texts without an end go with the first
        llm.engine.model.config.eos_token_id = eos_token_ids[:num_eos]
        chosen = [case for case in cases if (case["num_eos"] or 1) == num_eos][::every]
        company = [(prompt, greedy_params()) for prompt in prompts]
        outputs = serve(llm, [*company[:2], *((prompts[case["prompt"]], params_of(case))
                                              for case in chosen), *company[2:]])
        for case, output in zip(chosen, outputs[2:-2], strict=True):
            check_case(case, output, eos_token_ids, f"{name}, {num_eos} eos,")
        assert [token_ids(out) for out in outputs[:2] + outputs[-2:]] == greedy, "the greedy ones"


def widest(block_size):
    """Blocks for the widest search over the longest prompt, even if its beams shared nothing."""
    return 6 * -(-(33 + MAX_TOKENS) // block_size)


# --- against transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_beams_are_those_of_transformers(name):
    """A rank, a score or an end that differs: an end that is not counted, kept though it is behind
    the first beam_width, or takes the place of a beam that could go on; a wrong stop of it all."""
    block_size = [1, 4, 16][MODELS.index(name) % 3]
    check_cases(golden_llm(name, block_size=block_size, num_blocks=2048 // block_size), name)


@pytest.mark.parametrize("settings", [
    {"block_size": 1}, {"block_size": 16},
    {"block_size": 4, "enable_prefix_caching": False},
    {"block_size": 1, "enable_prefix_caching": False, "max_num_batched_tokens": 7},
    {"block_size": 4, "max_num_batched_tokens": 6},    # the widest group's decodes, and no more
    {"block_size": 16, "max_num_batched_tokens": 11, "max_num_seqs": 8}], ids=str)
def test_beams_whatever_the_settings(settings):
    """A beam that writes into a block that another reads, or goes on from another's K and V: shown
    by the last block's size, by prompts that come in chunks, or by a prefix cache."""
    blocks = 2048 // settings["block_size"]
    every = 7 if "max_num_batched_tokens" in settings else 3
    check_cases(golden_llm(MODEL, num_blocks=blocks, **settings), MODEL, every)


@pytest.mark.parametrize("preemption, block_size, enable_prefix_caching", [
    ("recompute", 1, False), ("recompute", 4, True), ("recompute", 16, False), ("auto", 4, False),
    ("swap", 1, True), ("swap", 4, False), ("swap", 4, True), ("swap", 16, True)])
def test_beams_preempted(preemption, block_size, enable_prefix_caching):
    """A group that lost its blocks: a beam is forgotten, sums are counted twice, or blocks that the
    beams shared come back as copies of one beam's, or do not fit any more."""
    blocks = widest(block_size)
    llm = golden_llm(MODEL, block_size=block_size, num_blocks=blocks, preemption=preemption,
                     swap_blocks=4 * blocks, enable_prefix_caching=enable_prefix_caching)
    check_cases(llm, MODEL, every=9)
    kind = "recompute" if preemption == "recompute" else "swap"      # "auto" swaps beams
    assert llm.stats()[f"preemptions_{kind}"] > 0, "nothing was preempted: no test of it"


def test_beams_with_little_room_to_swap():
    """Groups that do not fit into the swap space any more are lost, or wait for it for ever."""
    llm = golden_llm(MODEL, block_size=4, num_blocks=widest(4), preemption="swap", swap_blocks=20)
    check_cases(llm, MODEL, every=9)
    assert llm.stats()["preemptions_swap"] > 0, "nothing was swapped: no test of it"


# --- against the plain search, with many more ends ----------------------------------------------


def plain_search(llm, prompt, params):
    """beam_oracle's search over the engine's own logits -> ([(score, token_ids), ...], margin)."""
    def next_logprobs(beams):
        logits = all_logits(llm, [[*prompt, *beam] for beam in beams])
        logprobs = [rows[-1].double().log_softmax(-1).tolist() for rows in logits]
        return [dict(enumerate(row)) for row in logprobs]

    eos = [] if params.ignore_eos else llm.engine.model.config.eos_token_id
    return beam_search(next_logprobs, params.beam_width, params.max_tokens, params.length_penalty,
                       params.early_stopping, eos)


def random_params(rng):
    return BeamSearchParams(
        beam_width=rng.choice([1, 2, 2, 3, 4, 6]), max_tokens=rng.randint(1, 10),
        length_penalty=rng.choice([1.0, 0.0, 2.0, 4.0, -0.3, -1.0]),
        early_stopping=rng.choice([False, True, "never"]), ignore_eos=rng.random() < 0.1)


@pytest.mark.parametrize("num_eos", [1, 3, 10, 30, 70, 110])       # of 131 tokens
def test_beams_with_random_ends(num_eos):
    """Ends at every turn: so many among the first 2 * beam_width ranks that too few beams go on; a
    width of 1 that goes on after its end ("never"); texts of one token; a score of any size."""
    rng, compared, ended = random.Random(num_eos), 0, 0
    llm = golden_llm(MODEL, block_size=4, num_blocks=200)
    llm.engine.model.config.eos_token_id = rng.sample(range(131), num_eos)
    requests = [([rng.randrange(131) for _ in range(rng.randint(1, 9))], random_params(rng))
                for _ in range(40)]
    expected = [plain_search(llm, *request) for request in requests]
    for (texts, margin), (prompt, params), output in zip(expected, requests, serve(llm, requests),
                                                         strict=True):
        if margin < 1e-3:
            continue                                   # rounding may decide
        compared, where = compared + 1, f"{num_eos} eos: {prompt}, {params}"
        assert [text.token_ids for text in output.outputs] == [text for _, text in texts], where
        for text, (score, _) in zip(output.outputs, texts, strict=True):
            got = text.cumulative_logprob / len(text.token_ids) ** params.length_penalty
            assert got == pytest.approx(score, abs=1e-4, rel=1e-5), where
            ended += text.finish_reason == "stop"
    assert compared >= 30 and ended >= 5, "near ties, or no ends: this test shows nothing"


# --- around a search ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_beams_while_others_come_and_go(seed):
    """Requests added and aborted between the steps, in a pool too small for them: blocks of a
    search that nobody gives back, or a text that changes with its company."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 16])
    eos_token_ids, cases = load_beams(MODEL)
    llm = golden_llm(MODEL, block_size=block_size, num_blocks=widest(block_size),
                     max_num_seqs=rng.choice([6, 99]), enable_prefix_caching=rng.random() < 0.5,
                     max_num_batched_tokens=rng.choice([6, 20, 64]), swap_blocks=500,
                     preemption=rng.choice(["recompute", "swap", "auto"]))
    llm.engine.model.config.eos_token_id = eos_token_ids[:1]
    cases = [case for case in cases if case["num_eos"] < 2]
    to_come, live, aborted, latest = rng.sample(cases, 16), {}, set(), {}

    def come_and_go(outputs):
        latest.update({out.request_id: out for out in outputs})
        while to_come and rng.random() < 0.3:
            case = to_come.pop()
            greedy = rng.random() < 0.3
            params = greedy_params() if greedy else params_of(case)
            request_id = llm.engine.add_request(PROMPTS[case["prompt"]], params)
            live[request_id] = case, greedy
        if live and rng.random() < 0.06:
            request_id = rng.choice(list(live))
            if llm.engine.abort(request_id):
                aborted.add(request_id)

    for _ in range(300):                               # who comes late may find an idle engine
        come_and_go([])
        run_checked(llm.engine, after_step=come_and_go)
        if not to_come:
            break
    assert_nothing_left(llm)
    assert len(live) == 16 and len(aborted) < 12
    for request_id, (case, greedy) in live.items():
        if request_id not in aborted and greedy:
            assert token_ids(latest[request_id]) == GREEDY[case["prompt"]], f"seed {seed}"
        elif request_id not in aborted:
            check_case(case, latest[request_id], eos_token_ids, f"seed {seed}")


def test_beams_aborted_while_swapped_out():
    """Swap space that is never given back, or given back to the pool that it is not of."""
    eos_token_ids, cases = load_beams(MODEL)
    cases = [case for case in cases if case["num_eos"] == 0 and case["beam_width"] == 6]
    llm = golden_llm(MODEL, block_size=4, num_blocks=widest(4) // 2, preemption="swap",
                     swap_blocks=widest(4))
    requests = [(PROMPTS[case["prompt"]], params_of(case)) for case in cases] * 2
    ids = [llm.engine.add_request(*request) for request in requests]
    while llm.stats()["preemptions_swap"] == 0:
        assert llm.engine.has_unfinished_requests(), "nothing was swapped: no test of it"
        llm.engine.step()
    for request_id in ids[1:]:                         # the first is never preempted
        llm.engine.abort(request_id)
        check(llm.engine.scheduler, llm.engine.flight)
    check_case(cases[0], run_checked(llm.engine)[ids[0]], eos_token_ids)
    assert_nothing_left(llm)
    for case, output in zip(cases * 2, serve(llm, requests), strict=True):
        check_case(case, output, eos_token_ids)


def test_generate_and_beam_search():
    """Two ways in that differ; params or prompts in a list that meet the wrong one."""
    eos_token_ids, cases = load_beams(MODEL)
    cases = [case for case in cases if case["num_eos"] == 0][1::3]
    llm, params = golden_llm(MODEL), [params_of(case) for case in cases]
    prompts = [PROMPTS[case["prompt"]] for case in cases]
    for outputs in (llm.beam_search(prompts, params), llm.generate(prompts, params)):
        for case, output in zip(cases, outputs, strict=True):
            check_case(case, output, eos_token_ids)
    alone = llm.beam_search(prompts[-1], params[-1])   # one prompt, and not in a list
    assert len(alone) == 1
    check_case(cases[-1], alone[0], eos_token_ids)
    mixed = llm.generate([PROMPTS[2], *prompts, PROMPTS[3]],
                         [greedy_params(), *params, greedy_params()])
    assert [token_ids(out) for out in (mixed[0], mixed[-1])] == GREEDY[2:]
    for case, output in zip(cases, mixed[1:-1], strict=True):
        check_case(case, output, eos_token_ids)
    both = llm.beam_search(PROMPTS[:2], BeamSearchParams(beam_width=3, ignore_eos=True))
    assert [len(out.outputs) for out in both] == [3, 3], "one for all"
    assert [out.prompt_token_ids for out in both] == PROMPTS[:2]
    assert_nothing_left(llm)


def test_one_beam_is_greedy():
    """A search of one beam that keeps the second best."""
    llm = golden_llm(MODEL)
    for params in (BeamSearchParams(beam_width=1, max_tokens=24, ignore_eos=True, length_penalty=p)
                   for p in (1.0, -2.0)):
        beams, greedy = serve(llm, [(PROMPTS[2], params), (PROMPTS[2], greedy_params())])
        assert token_ids(beams) == token_ids(greedy) == GREEDY[2]
        assert beams.outputs[0].cumulative_logprob == pytest.approx(
            greedy.outputs[0].cumulative_logprob, abs=1e-4)


def test_beams_end_at_max_model_len():
    """A search that runs past the longest text, or is dropped there."""
    short, ample = golden_llm(MODEL, max_model_len=16 + 9), golden_llm(MODEL)
    outputs = []
    for llm, max_tokens in ((short, 24), (ample, 9)):
        params = BeamSearchParams(beam_width=4, max_tokens=max_tokens, ignore_eos=True)
        outputs.append(serve(llm, [(PROMPTS[2], params)])[0].outputs)
    assert [text.token_ids for text in outputs[0]] == [text.token_ids for text in outputs[1]]
    assert {(len(text.token_ids), text.finish_reason) for text in outputs[0]} == {(9, "length")}


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_beams_share_the_prompt(block_size):
    """A prompt that each beam has a copy of, or that is computed once a beam."""
    llm = golden_llm(MODEL, block_size=block_size, num_blocks=300)
    serve(llm, [(PROMPTS[3], BeamSearchParams(beam_width=6, max_tokens=14, ignore_eos=True))])
    shared = 33 // block_size
    own = -(-(33 + 14) // block_size) - shared
    assert llm.stats()["blocks_peak"] <= shared + 6 * own
    assert llm.stats()["computed_tokens"] <= 33 + 6 * 13       # nobody reads the last ones


def test_texts_of_beams(tmp_path):
    """A text that goes on as another beam's, lacks a token, or shows its end token."""
    folder = write_babbler(tmp_path / "model", "smollm2", 908)
    llm = LLM(str(folder), block_size=4, num_blocks=200, dtype="float32")
    llm.engine.model.config.eos_token_id = list(range(0, 908, 9))
    ends = set()
    for width, prompt in ((2, "Tyger"), (5, "To be, or not"), (6, "It's 1,024 blocks")):
        params = BeamSearchParams(beam_width=width, max_tokens=12)
        for text in llm.beam_search(prompt, params)[0].outputs:
            tokens = text.token_ids[:len(text.token_ids) - (text.finish_reason == "stop")]
            pieces = b"".join(map(llm.tokenizer.token_bytes, tokens))
            assert text.text == pieces.decode("utf-8", "replace")
            assert (text.token_ids[-1] % 9 == 0) == (text.finish_reason == "stop")
            ends.add(text.finish_reason)
    assert ends == {"stop", "length"}, "one kind of end: this test shows less than it should"


# --- wrong values -------------------------------------------------------------------------------


@pytest.mark.parametrize("field, value", [
    ("beam_width", 0), ("beam_width", -1), ("beam_width", 2.0), ("beam_width", None),
    ("max_tokens", 0), ("max_tokens", "9"), ("early_stopping", "maybe"), ("early_stopping", None),
    ("length_penalty", float("nan")), ("length_penalty", float("inf")), ("length_penalty", "1"),
    ("ignore_eos", "no")], ids=str)
def test_wrong_values(field, value):
    """A value that is taken and fails later, or a complaint that does not say what is allowed."""
    with pytest.raises(ValueError, match=rf"^{field} is {value!r}; it must be \S+"):
        BeamSearchParams(**{field: value})


def test_more_beams_than_sequences():
    """A group that no step can hold is queued, and all behind it wait for ever."""
    llm = golden_llm(MODEL, max_num_seqs=3)
    for ask in (llm.beam_search, llm.generate):
        with pytest.raises(ValueError, match=r"beam_width is 4; it must be .*\b3\b"):
            ask([PROMPTS[0], PROMPTS[1]], BeamSearchParams(beam_width=4))
        assert_nothing_left(llm)
    params = BeamSearchParams(beam_width=3, max_tokens=5)
    assert len(llm.beam_search(PROMPTS[0], params)[0].outputs) == 3


def test_more_beams_than_blocks():
    """A group that the pool can never hold, which preempts itself for ever."""
    llm = golden_llm(MODEL, block_size=4, num_blocks=8)        # 6 beams of 14 tokens need 24
    with pytest.raises(ValueError, match="num_blocks|beam_width"):
        llm.beam_search(PROMPTS[0], BeamSearchParams(beam_width=6, max_tokens=14, ignore_eos=True))
    assert_nothing_left(llm)
    params = BeamSearchParams(beam_width=2, max_tokens=8, ignore_eos=True)     # need 6
    assert len(llm.beam_search(PROMPTS[0], params)[0].outputs) == 2
