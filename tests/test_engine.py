"""Sections 10 and 11, engine and LLM: the same tokens whatever happens around a request."""

import json
import random
import shutil
from dataclasses import fields

import pytest
import torch
from helpers import (
    GOLDEN,
    MODELS,
    ROOT,
    Interrupt,
    assert_nothing_left,
    check,
    golden,
    golden_llm,
    greedy_params,
    run_checked,
    serve,
    token_ids,
)
from safetensors import safe_open

import kernels
import nanopaged
from nanopaged import LLM, Engine, SamplingParams, largest_step

MODEL = "llama_gqa_tied"                               # 131 tokens, 128 positions
PROMPTS, GREEDY = golden(MODEL)                        # of 1, 7, 16 and 33 tokens; 24 more of each
LONGEST = 33 + 24


def snapshots(llm, prompt, params):
    """All outputs of one request, as they were streamed."""
    llm.engine.add_request(prompt, params)
    streamed = []
    run_checked(llm.engine, after_step=streamed.extend)
    return streamed


def first_logprobs(name, i):
    """transformers' log-probabilities after each prefix of prompt i -> (tokens, V) float64."""
    with safe_open(GOLDEN / "models" / name / "golden.safetensors", "pt") as file:
        return file.get_tensor(f"logits_{i}").double().log_softmax(-1)


@pytest.fixture
def llm():
    """An engine for the tests that need nothing special of it."""
    return golden_llm(MODEL, block_size=4)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A model's folder with a real tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copy(GOLDEN / "tokenizers" / "smollm2" / "tokenizer.json", folder)
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_attention_heads": 2,
              "num_hidden_layers": 1, "max_position_embeddings": 128, "vocab_size": 908,
              "eos_token_id": list(range(0, 908, 9))}   # every ninth token ends a text
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def text_llm(text_folder):
    """Random weights: any token may come, half characters and special ones too."""
    torch.manual_seed(0)
    return LLM(str(text_folder), load_format="dummy", block_size=4, num_blocks=64, dtype="float32",
               enforce_eager=True)


# --- greedy tokens, against transformers --------------------------------------------------------


def tight(block_size):
    """The blocks of a pool that barely holds the longest request."""
    return -(-LONGEST // block_size)


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
@pytest.mark.parametrize("block_size", [1, 2, 4, 16, 64])
def test_greedy_whatever_the_block_size_pool_and_chunks(block_size, chunk):
    """Any slot, position or mask that is wrong for one geometry; a preempted text that changes."""
    llm = golden_llm(MODEL, block_size=block_size, num_blocks=tight(block_size),
                     max_num_batched_tokens=chunk)
    order = [1, 3, 0, 2]
    outputs = serve(llm, [(PROMPTS[i], greedy_params()) for i in order])
    assert [token_ids(out) for out in outputs] == [GREEDY[i] for i in order]
    if chunk > 3 and block_size < 64:                  # else they hardly ever run side by side
        assert llm.stats()["preemptions_recompute"] > 0, "nothing was preempted: no test of it"


@pytest.mark.parametrize("name", MODELS)
def test_greedy_of_every_checkpoint(name):
    """A family that is wrong only in a batch, in chunks, or after a preemption."""
    prompts, greedy = golden(name)
    rng, preemptions = random.Random(name), 0
    for num_blocks in (100, tight(4)):
        order = rng.sample(range(4), 4)
        llm = golden_llm(name, block_size=4, num_blocks=num_blocks,
                         max_num_batched_tokens=rng.choice([8, 40, 1000]))
        outputs = serve(llm, [(prompts[i], greedy_params()) for i in order])
        assert [token_ids(out) for out in outputs] == [greedy[i] for i in order], order
        preemptions += llm.stats()["preemptions_recompute"]
    assert preemptions > 0, "nothing was preempted: no test of it"


def test_greedy_alone(llm):
    """A request that is right only in company."""
    for prompt, greedy in zip(PROMPTS, GREEDY, strict=True):
        assert [token_ids(out) for out in serve(llm, [(prompt, greedy_params())])] == [greedy]


def test_equal_requests_do_not_meet(llm):
    """PEERS bug 8: duplicates that share blocks by accident."""
    outputs = serve(llm, [(PROMPTS[2], greedy_params())] * 5)
    assert [token_ids(out) for out in outputs] == [GREEDY[2]] * 5


def random_request(rng):
    """-> (number of its prompt, params): greedy, or a seeded draw to keep it company."""
    i, max_tokens = rng.randrange(4), rng.randint(1, 24)
    if rng.random() < 0.7:
        return i, greedy_params(max_tokens)
    return i, SamplingParams(max_tokens=max_tokens, seed=rng.randrange(100), ignore_eos=True,
                             top_p=rng.choice([0.5, 1.0]), repetition_penalty=rng.choice([1, 1.3]))


@pytest.mark.parametrize("seed", range(10))
def test_greedy_while_others_come_and_go(seed):
    """Requests added and aborted between the steps, in a pool too small for them: state of one that
    leaks into another."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 16])
    llm = golden_llm(MODEL, block_size=block_size, max_num_batched_tokens=rng.choice([3, 7, 64]),
                     num_blocks=rng.randint(tight(block_size), 2 * tight(block_size)),
                     max_num_seqs=rng.choice([2, 5, 256]))
    to_come, live, aborted, latest = [random_request(rng) for _ in range(14)], {}, set(), {}

    def come_and_go(outputs):
        latest.update({out.request_id: out for out in outputs})
        while to_come and rng.random() < 0.3:
            i, params = to_come.pop()
            live[llm.engine.add_request(PROMPTS[i], params)] = i, params
        if live and rng.random() < 0.08:
            request_id = rng.choice(list(live))
            if llm.engine.abort(request_id):
                aborted.add(request_id)

    for _ in range(300):                               # who comes late may find an idle engine
        come_and_go([])
        run_checked(llm.engine, after_step=come_and_go)
        if not to_come:
            break
    assert_nothing_left(llm)
    assert len(live) == 14 and len(aborted) < 10
    for request_id, (i, params) in live.items():
        tokens = token_ids(latest[request_id]) if request_id in latest else []
        if params.temperature == 0:
            assert tokens == GREEDY[i][:len(tokens)], f"seed {seed}, request {request_id}"
        if request_id not in aborted:
            assert latest[request_id].finished and len(tokens) == params.max_tokens


# --- seeded sampling ----------------------------------------------------------------------------


def sampled_requests():
    """Requests with seeds and options of their own."""
    options = [{"temperature": 0.8}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.05},
               {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.2}]
    return [(PROMPTS[i % 4], SamplingParams(seed=i, max_tokens=20, ignore_eos=True,
                                            **options[i % 5])) for i in range(8)]


@pytest.fixture(scope="module")
def sampled_alone():
    """The tokens of sampled_requests(), each run alone in an ample pool."""
    llm = golden_llm(MODEL, block_size=4)
    return [token_ids(*serve(llm, [request])) for request in sampled_requests()]


@pytest.mark.parametrize("settings", [
    {}, {"block_size": 1}, {"block_size": 64, "max_num_batched_tokens": 3},
    {"block_size": 4, "num_blocks": tight(4)}, {"block_size": 1, "num_blocks": tight(1), "seed": 9},
    {"max_num_seqs": 2}], ids=str)
def test_same_seed_same_tokens(settings, sampled_alone):
    """A generator that all requests share, or that is reset or moved on by a preemption."""
    llm = golden_llm(MODEL, **settings)
    requests = sampled_requests()
    company = [(prompt, greedy_params(9)) for prompt in PROMPTS]
    outputs = serve(llm, [*company[:2], *requests, *company[2:]])
    assert [token_ids(out) for out in outputs[2:-2]] == sampled_alone
    outputs = serve(llm, requests[::-1])
    assert [token_ids(out) for out in outputs] == sampled_alone[::-1]
    if settings.get("num_blocks"):
        assert llm.stats()["preemptions_recompute"] > 0, "nothing was preempted: no test of it"


def test_other_seeds_other_tokens(llm, sampled_alone):
    """A seed that is accepted and not used."""
    prompt, params = sampled_requests()[0]
    texts = [token_ids(*serve(llm, [(prompt, SamplingParams(**vars(params) | {"seed": seed}))]))
             for seed in (0, 1, 2)]
    assert texts[0] == sampled_alone[0] and len(set(map(tuple, texts))) == 3


def test_requests_without_a_seed_differ_and_can_be_repeated():
    """All draws of one engine equal; or a run that its LLM(seed=...) does not fix."""
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    texts = [[token_ids(out) for out in golden_llm(MODEL, seed=seed).generate([[5]] * 4, params)]
             for seed in (1, 1, 2)]
    assert len({tuple(text) for text in texts[0]}) == 4
    assert texts[0] == texts[1] != texts[2]


# --- each option does what it says --------------------------------------------------------------

# For each field of SamplingParams: settings, and what changes the output when it is added to them.
EFFECTS = {
    "temperature": ({"seed": 1}, {"temperature": 0}), "top_p": ({"seed": 1}, {"top_p": 0.01}),
    "top_k": ({"seed": 1}, {"top_k": 2}), "min_p": ({"seed": 1}, {"min_p": 1.0}),
    "seed": ({"seed": 1}, {"seed": 2}), "max_tokens": ({"seed": 1}, {"max_tokens": 3}),
    "stop": ({"seed": 1}, {"stop": ["a", "e", "i", "o", "u"]}),
    "stop_token_ids": ({"seed": 1}, {"stop_token_ids": list(range(1, 900, 2))}),
    "ignore_eos": ({"seed": 1}, {"ignore_eos": False}), "logprobs": ({"seed": 1}, {"logprobs": 1}),
    "repetition_penalty": ({"temperature": 0}, {"repetition_penalty": 5.0}),
    "n": ({"seed": 1}, {"n": 2}),
}


@pytest.mark.parametrize("field", [f.name for f in fields(SamplingParams)])
def test_every_option_has_an_effect(field, text_llm):
    """PEERS bug 12: an option that is accepted and dropped. A new one needs a line in EFFECTS."""
    base, change = EFFECTS[field]
    assert list(change) == [field]
    base = {"max_tokens": 30, "ignore_eos": True} | base
    plain, changed = [text_llm.generate([3, 4, 5], SamplingParams(**settings))[0].outputs
                      for settings in (base, base | change)]
    assert plain != changed


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0},
                                     {"temperature": 1e-6}], ids=str)
def test_options_that_amount_to_greedy(options, llm):
    """A filter that keeps a token too many."""
    params = SamplingParams(max_tokens=24, ignore_eos=True, seed=3, **options)
    outputs = serve(llm, [(prompt, params) for prompt in PROMPTS])
    assert [token_ids(out) for out in outputs] == GREEDY


@pytest.mark.parametrize("max_tokens", [1, 2, 23])
def test_max_tokens(max_tokens, llm):
    """One token too many or too few."""
    outputs = serve(llm, [(prompt, greedy_params(max_tokens)) for prompt in PROMPTS])
    assert [token_ids(out) for out in outputs] == [greedy[:max_tokens] for greedy in GREEDY]
    assert {out.outputs[0].finish_reason for out in outputs} == {"length"}


@pytest.mark.parametrize("max_tokens, at", [(24, 9), (10, 9), (24, 0)])
def test_stop_token_ids(max_tokens, at, llm):
    """A stop that is not seen, seen a token late, or called "length" where both come together."""
    greedy = GREEDY[2]
    end = greedy.index(greedy[at]) + 1                 # it may have come before
    params = greedy_params(max_tokens, stop_token_ids=[greedy[at], 130])
    out = serve(llm, [(PROMPTS[2], params)])[0].outputs[0]
    assert (out.token_ids, out.finish_reason) == (greedy[:end], "stop")


def test_end_of_text(text_llm):
    """The model's own end ignored, or obeyed although the user said not to."""
    for seed in range(5):
        outs = {ignore: text_llm.generate([7], SamplingParams(seed=seed, max_tokens=60,
                                                              ignore_eos=ignore))[0].outputs[0]
                for ignore in (True, False)}
        ended = next(i for i, token in enumerate(outs[True].token_ids) if token % 9 == 0)
        assert outs[False].token_ids == outs[True].token_ids[:ended + 1]
        assert [outs[x].finish_reason for x in (True, False)] == ["length", "stop"]
        ended_text = text_llm.tokenizer.decode(outs[False].token_ids[:-1])
        assert outs[False].text == ended_text, "the end is no part of the text"


def test_stop_token_ids_hold_with_ignore_eos(text_llm):
    """ignore_eos that ignores the user's own stops too."""
    params = SamplingParams(seed=1, max_tokens=60, ignore_eos=True,
                            stop_token_ids=list(range(0, 908, 9)))
    out = text_llm.generate([7], params)[0].outputs[0]
    assert out.finish_reason == "stop" and out.token_ids[-1] % 9 == 0


@pytest.mark.parametrize("name", [MODEL, "gpt2_prefixed"])
def test_logprobs_are_transformers(name):
    """Log-probabilities of another position, or after the filters; the chosen token left out."""
    want, prompt = first_logprobs(name, 3), golden(name)[0][3]
    params = [SamplingParams(max_tokens=1, seed=k, logprobs=k % 5 * 5, temperature=k % 3,
                             repetition_penalty=1.5, ignore_eos=True) for k in range(1, 34)]
    outputs = golden_llm(name).generate([prompt[:k] for k in range(1, 34)], params)
    for k, (out, p) in enumerate(zip(outputs, params, strict=True)):
        (token,), (got,) = out.outputs[0].token_ids, out.outputs[0].logprobs
        top = want[k].topk(p.logprobs).indices.tolist()
        assert got == {i: pytest.approx(want[k, i].item(), abs=1e-4) for i in {token, *top}}
        assert out.outputs[0].cumulative_logprob == got[token]


def test_logprobs_of_a_whole_text(llm):
    """A token's log-probability lost or doubled by a chunk or a preemption; a wrong sum."""
    small = golden_llm(MODEL, block_size=4, num_blocks=tight(4), max_num_batched_tokens=7)
    params = greedy_params(logprobs=2)
    expected, preempted = [serve(engine, [(prompt, params) for prompt in PROMPTS])
                           for engine in (llm, small)]
    assert small.stats()["preemptions_recompute"] > 0
    for a, b in zip(expected, preempted, strict=True):
        a, b = a.outputs[0], b.outputs[0]
        assert len(a.logprobs) == len(b.logprobs) == len(a.token_ids)
        for token, x, y in zip(a.token_ids, a.logprobs, b.logprobs, strict=True):
            assert x == pytest.approx(y, abs=1e-4) and x[token] == max(x.values())
        chosen = sum(top[token] for token, top in zip(b.token_ids, b.logprobs, strict=True))
        assert b.cumulative_logprob == pytest.approx(chosen)
    assert serve(llm, [([1], greedy_params(3))])[0].outputs[0].logprobs is None


@pytest.mark.parametrize("penalty", [0.5, 1.2, 2.0, 5.0])
def test_repetition_penalty_by_hand(penalty, llm):
    """A penalty on the wrong tokens: the prompt's count, and each once."""
    with safe_open(GOLDEN / "models" / MODEL / "golden.safetensors", "pt") as file:
        logits = file.get_tensor("logits_3").tolist()
    for k in range(1, 34):
        scores = list(logits[k - 1])
        for token in set(PROMPTS[3][:k]):
            scores[token] *= penalty if scores[token] < 0 else 1 / penalty
        best, second = sorted(scores)[-1:-3:-1]
        params = greedy_params(1, repetition_penalty=penalty)
        if best - second > 1e-3:                       # else rounding may decide
            out = llm.generate(PROMPTS[3][:k], params)[0]
            assert token_ids(out) == [scores.index(best)], f"prompt of {k} tokens"


def test_repetition_penalty_counts_generated_tokens(llm):
    """A penalty on the prompt alone, or one that forgets at a preemption."""
    small = golden_llm(MODEL, block_size=1, num_blocks=tight(1))
    requests = [(prompt, greedy_params(repetition_penalty=1000.0)) for prompt in PROMPTS]
    expected, preempted = [[token_ids(out) for out in serve(engine, requests)]
                           for engine in (llm, small)]
    assert small.stats()["preemptions_recompute"] > 0
    assert expected == preempted
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert len({*prompt, *tokens}) == len({*prompt}) + 24, "a token has come again"


# --- texts, stop strings and streaming ----------------------------------------------------------


def text_params(seed, **settings):
    """About 30 random tokens: words, special tokens, pieces of characters."""
    return SamplingParams(**{"seed": seed, "max_tokens": 30, "ignore_eos": True} | settings)


@pytest.mark.parametrize("seed", range(4))
def test_streamed_texts_are_prefixes_of_the_final_one(seed, text_llm):
    """Half a character shown as U+FFFD and corrected later; a token's text lost or said twice."""
    streamed = snapshots(text_llm, "To be, or not to be", text_params(seed, max_tokens=100))
    final, token_bytes = streamed[-1].outputs[0], text_llm.tokenizer.token_bytes
    assert final.text == b"".join(map(token_bytes, final.token_ids)).decode("utf-8", "replace")
    assert "\ufffd" in final.text, "no broken character: this test shows nothing"
    for number, out in enumerate(streamed, 1):
        assert final.text.startswith(out.outputs[0].text)
        assert token_ids(out) == final.token_ids[:number], "one output a token"
        assert out.finished == (number == len(streamed))
        assert (out.outputs[0].finish_reason is None) != out.finished


def test_texts_that_end_within_a_character(text_llm):
    """The bytes of a last, unfinished character are lost where they should become U+FFFD."""
    params = [text_params(2, max_tokens=n) for n in range(1, 60)]
    texts = [out.outputs[0].text for out in text_llm.generate([[5, 6]] * 59, params)]
    tokens = token_ids(text_llm.generate([5, 6], params[-1])[0])
    pieces = [text_llm.tokenizer.token_bytes(token) for token in tokens]
    assert texts == [b"".join(pieces[:n]).decode("utf-8", "replace") for n in range(1, 60)]
    assert any(text.endswith("\ufffd") for text in texts), "none does: this test shows nothing"


def test_streamed_outputs_are_snapshots(text_llm):
    """Lists shared with the engine: an output that was kept changes behind its owner's back."""
    streamed = snapshots(text_llm, [5, 6], text_params(0, logprobs=1))
    for number, out in enumerate(streamed, 1):
        completion = out.outputs[0]
        assert len(completion.token_ids) == len(completion.logprobs) == number
        completion.token_ids.clear()
        completion.logprobs.clear()
        out.prompt_token_ids.clear()


@pytest.mark.parametrize("start, length", [(0, 1), (0, 6), (0, 15), (3, 4), (9, 7), (11, 25)])
@pytest.mark.parametrize("seed", range(3))
def test_stop_strings(seed, start, length, text_llm):
    """A stop string over several tokens that is missed, kept, or streamed before it is complete."""
    full = text_llm.generate("Hark", text_params(seed))[0].outputs[0].text
    stop = full[start:start + length]
    assert len(stop) == length
    for stops in (stop, [stop], ["not there", stop, "not there either, and longer than the rest"]):
        streamed = snapshots(text_llm, "Hark", text_params(seed, stop=stops))
        final = streamed[-1].outputs[0]
        assert (final.text, final.finish_reason) == (full[:full.find(stop)], "stop")
        for out in streamed:
            assert final.text.startswith(out.outputs[0].text), f"streamed past {stop!r}"


def test_stop_strings_that_never_come(text_llm):
    """What was held back, as it might have become a stop string, is never given out."""
    full = text_llm.generate("Hark", text_params(0))[0].outputs[0]
    for stop in (full.text[-5:] + "\0", "\0" * 300, full.text + "\0"):
        assert text_llm.generate("Hark", text_params(0, stop=stop))[0].outputs[0] == full


def test_the_text_of_a_stop_that_comes_with_the_last_token(text_llm):
    """ "length" where a stop string came with the last token, and the text left uncut."""
    full = text_llm.generate("Hark", text_params(1))[0].outputs[0]
    pieces = [text_llm.tokenizer.decode([token]) for token in full.token_ids]
    last = max(i for i, piece in enumerate(pieces)
               if piece.strip() and "\ufffd" not in piece and full.text.count(piece) == 1)
    params = text_params(1, max_tokens=last + 1, stop=pieces[last])
    out = text_llm.generate("Hark", params)[0].outputs[0]
    assert len(out.token_ids) == last + 1
    assert (out.text, out.finish_reason) == (full.text[:full.text.find(pieces[last])], "stop")


def test_the_fields_of_an_output(text_llm):
    """A name of the API that is missing or holds something else."""
    ids = text_llm.tokenizer.encode("Hark")
    text, tokens = text_llm.generate(["Hark", ids], text_params(0, logprobs=0))
    assert (text.prompt, tokens.prompt) == ("Hark", None)
    assert text.prompt_token_ids == tokens.prompt_token_ids == ids
    assert text.request_id != tokens.request_id
    for out in (text, tokens):
        completion, = out.outputs
        assert out.finished and out.num_cached_tokens == 0
        assert completion.index == 0 and completion.finish_reason == "length"
        assert len(completion.token_ids) == len(completion.logprobs) == 30
        assert isinstance(completion.text, str) and completion.cumulative_logprob < 0
    assert text.outputs == tokens.outputs, "a text, or its tokens: the same request"


def test_special_tokens_in_a_prompt_are_text(text_llm):
    """A user's text that ends the model's turn or begins another."""
    ids = text_llm.generate("<|im_end|>", text_params(0))[0].prompt_token_ids
    assert len(ids) > 1 and 2 not in ids


@pytest.mark.skipif(not (ROOT / "tutorial" / "tiny" / "config.json").is_file(),
                    reason="the model tiny is not there")
def test_tiny():
    """The shipped model: alone, beside others and preempted it must say the same."""
    prompts, params = ["ROMEO:", "KING HENRY:\nWhat", "A"], greedy_params(20)
    alone = [LLM(num_blocks=16, block_size=16, dtype="float32").generate(prompt, params)[0]
             for prompt in prompts]
    llm = LLM(num_blocks=15, block_size=2, max_num_batched_tokens=9, dtype="float32")
    together = serve(llm, [(prompt, params) for prompt in prompts])
    assert llm.stats()["preemptions_recompute"] > 0
    assert [out.outputs[0].text for out in together] == [out.outputs[0].text for out in alone]
    assert all(token_ids(out) for out in alone)


# --- what cannot run, and what is interrupted ---------------------------------------------------

BAD_PROMPTS = [[], [131], [-1], [1.0], [True], ["5"], [None], [2**40], [[1]], [1] * 128,
               [3] * 10**5, "a text, without a tokenizer"]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=lambda prompt: str(prompt)[:20])
def test_a_bad_prompt_is_refused_when_added(prompt, llm):
    """PEERS bug 2: what can never run brings down those that can, or is tried for ever."""
    first = llm.engine.add_request(PROMPTS[1], greedy_params())
    with pytest.raises(ValueError) as error:
        llm.engine.add_request(prompt, greedy_params())
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)
    second = llm.engine.add_request(PROMPTS[2], greedy_params())
    outputs = run_checked(llm.engine)
    assert {i: token_ids(out) for i, out in outputs.items()} == {first: GREEDY[1],
                                                                 second: GREEDY[2]}
    assert_nothing_left(llm)


@pytest.mark.parametrize("prompt", [None, 7.5, b"ROMEO", {"prompt": "x"}], ids=str)
def test_a_prompt_of_another_type_is_refused(prompt, text_llm):
    """A TypeError from deep inside, or bytes and keys that are taken for token ids."""
    for call in (lambda: text_llm.engine.add_request(prompt, greedy_params(2)),
                 lambda: text_llm.generate([[1], prompt], greedy_params(2))):
        with pytest.raises(ValueError, match="prompt"):
            call()
        assert_nothing_left(text_llm)


def test_what_the_pool_can_never_hold_is_refused():
    """PEERS bug 2: accepted, and then "out of blocks" in the middle of other people's texts."""
    llm = golden_llm(MODEL, block_size=4, num_blocks=5)          # 20 slots
    refused = llm.engine.add_request(PROMPTS[1], greedy_params(6))
    for prompt in (PROMPTS[3], PROMPTS[3][:20]):
        with pytest.raises(ValueError, match=f"{len(prompt)}.*20"):
            llm.engine.add_request(prompt, greedy_params(1))
    outputs = run_checked(llm.engine)
    assert token_ids(outputs[refused]) == GREEDY[1][:6]
    for length in range(12, 20):                                  # the largest that do fit
        out = llm.generate(PROMPTS[3][:length], greedy_params())[0].outputs[0]
        assert (len(out.token_ids), out.finish_reason) == (20 - length, "length")
    assert_nothing_left(llm)


@pytest.mark.parametrize("max_model_len", [8, 10, 30])
def test_max_model_len(max_model_len):
    """A text that grows past the limit, or ends one token before it."""
    llm = golden_llm(MODEL, max_model_len=max_model_len)
    out = serve(llm, [(PROMPTS[1], greedy_params(100))])[0].outputs[0]
    assert (out.token_ids, out.finish_reason) == (GREEDY[1][:max_model_len - 7], "length")
    with pytest.raises(ValueError, match=str(max_model_len)):
        llm.engine.add_request(PROMPTS[3][:max_model_len], greedy_params(1))


def test_the_models_own_length_is_a_limit():
    """Positions behind the table of learned ones: an IndexError, or nonsense."""
    llm = golden_llm("gpt2_openai", block_size=4)                 # 128 positions, 256 slots
    out = llm.generate([5] * 100, greedy_params(1000))[0].outputs[0]
    assert (len(out.token_ids), out.finish_reason) == (28, "length")


BAD_PARAMS = [
    ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
    ("temperature", "1"), ("temperature", None), ("temperature", True), ("top_p", 0),
    ("top_p", 1.01), ("top_p", -1), ("top_k", -2), ("top_k", 1.5), ("min_p", -0.1), ("min_p", 1.1),
    ("seed", -1), ("seed", 1.0), ("seed", 2**63), ("max_tokens", 0), ("max_tokens", -5),
    ("max_tokens", 2.0), ("max_tokens", True), ("logprobs", -1), ("logprobs", 1.0),
    ("logprobs", 101), ("repetition_penalty", 0), ("repetition_penalty", -1), ("stop", ""),
    ("stop", ["a", ""]), ("stop", [1]), ("stop", 5), ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]), ("stop_token_ids", [True]), ("stop_token_ids", 5),
    ("ignore_eos", "no"), ("ignore_eos", None), ("n", 0), ("n", -1), ("n", 2.0),
    ("n", "2"), ("n", True), ("n", None),
]


@pytest.mark.parametrize("field, value", BAD_PARAMS, ids=str)
def test_bad_sampling_params(field, value):
    """A wrong value that is accepted, or a complaint that does not say which, what and how else."""
    with pytest.raises(ValueError, match=rf"^{field} ") as error:
        SamplingParams(**{field: value})
    assert repr(value) in str(error.value) or repr([value]) in str(error.value)


def test_sampling_params_at_their_limits():
    """A range that is one too narrow; vLLM's own ways to say "nothing"."""
    SamplingParams(temperature=0, top_p=1, top_k=-1, min_p=0, seed=2**63 - 1, max_tokens=1,
                   logprobs=0, repetition_penalty=1, stop=[], stop_token_ids=[])
    SamplingParams(seed=None, logprobs=None, stop=None, stop_token_ids=None, min_p=1, top_k=1)


def test_requests_that_need_a_tokenizer(llm, text_llm):
    """Stop strings accepted where there is no text to find them in; a stop token that is none."""
    with pytest.raises(ValueError, match="tokenizer"):
        llm.engine.add_request([1], SamplingParams(stop="x"))
    with pytest.raises(ValueError, match="908"):
        text_llm.engine.add_request([1], SamplingParams(stop_token_ids=[908]))
    assert_nothing_left(llm)


@pytest.mark.parametrize("bad", range(3))
def test_generate_with_one_bad_prompt_leaves_nothing(bad, llm):
    """The good ones stay queued, and come out of the next call."""
    prompts = [PROMPTS[1], PROMPTS[2], PROMPTS[3]]
    prompts[bad] = [131]
    with pytest.raises(ValueError, match="131"):
        llm.generate(prompts, greedy_params())
    assert_nothing_left(llm)
    assert [token_ids(out) for out in llm.generate(PROMPTS, greedy_params())] == GREEDY


def test_generate_with_params_for_each(llm):
    """The first request's options used for all; a list that is too short or too long."""
    outputs = llm.generate(PROMPTS, [greedy_params(n) for n in (9, 2, 24, 1)])
    assert [len(token_ids(out)) for out in outputs] == [9, 2, 24, 1]
    assert [out.prompt_token_ids for out in outputs] == PROMPTS, "in the order of the prompts"
    for params in ([], [greedy_params()] * 3, [greedy_params()] * 5):
        with pytest.raises(ValueError, match="sampling_params"):
            llm.generate(PROMPTS, params)
    assert llm.generate([], greedy_params()) == []
    assert_nothing_left(llm)


def test_generate_beside_a_request_of_the_engine(llm):
    """generate() that returns other people's outputs, or takes their requests down at its end."""
    short = llm.engine.add_request(PROMPTS[0], greedy_params(2))
    long = llm.engine.add_request(PROMPTS[3], greedy_params(24))
    outputs = llm.generate(PROMPTS[1:3], greedy_params(8))
    assert [token_ids(out) for out in outputs] == [GREEDY[1][:8], GREEDY[2][:8]]
    assert short != long and token_ids(run_checked(llm.engine)[long]) == GREEDY[3]
    assert_nothing_left(llm)


@pytest.mark.parametrize("at", [1, 2, 9])
@pytest.mark.parametrize("where", ["sample", "make_batch"])
def test_generate_interrupted_leaves_nothing(where, at, llm, monkeypatch):
    """Ctrl-C in a notebook: requests that go on in the next cell, or blocks that are lost."""
    with monkeypatch.context() as patch:
        patch.setattr(nanopaged, where, Interrupt(getattr(nanopaged, where), at))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, greedy_params())
    assert_nothing_left(llm)
    assert [token_ids(out) for out in llm.generate(PROMPTS, greedy_params())] == GREEDY


@pytest.mark.parametrize("at", [1, 2, 9])
@pytest.mark.parametrize("where", ["sample", "make_batch"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")], ids=repr)
def test_a_step_that_failed_can_be_repeated(error, where, at, llm, monkeypatch):
    """I5: a step half done. Tokens counted as cached that were not sampled from crash the next
    step, or take another sequence's token."""
    ids = [llm.engine.add_request(prompt, greedy_params()) for prompt in PROMPTS]
    with monkeypatch.context() as patch:
        patch.setattr(nanopaged, where, Interrupt(getattr(nanopaged, where), at, error))
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            run_checked(llm.engine)
    outputs = run_checked(llm.engine)
    assert [token_ids(outputs[i]) for i in ids] == GREEDY
    assert_nothing_left(llm)


def test_abort(llm):
    """A request that goes on, keeps its blocks, or cannot be aborted before it has begun."""
    engine = llm.engine
    ids = [engine.add_request(prompt, greedy_params()) for prompt in PROMPTS]
    assert engine.abort(ids[2]), "while it waits"
    for _ in range(5):
        assert ids[2] not in {out.request_id for out in engine.step()}
    held = llm.stats()["blocks_used"]
    assert engine.abort(ids[3]), "while it runs"
    assert llm.stats()["blocks_used"] <= held - 9      # 33 tokens in blocks of 4
    check(engine.scheduler, engine.flight)
    assert not engine.abort(ids[3]) and not engine.abort(10**9), "not there (any more)"
    outputs = run_checked(engine)
    assert {i: token_ids(out) for i, out in outputs.items()} == {ids[0]: GREEDY[0],
                                                                 ids[1]: GREEDY[1]}
    assert not engine.abort(ids[0]), "it has ended"
    assert_nothing_left(llm)


def test_abort_of_a_preempted_request():
    """It is looked for among the running ones, or comes back after its end."""
    llm = golden_llm(MODEL, block_size=4, num_blocks=tight(4))
    ids = [llm.engine.add_request(PROMPTS[i], greedy_params()) for i in (3, 2)]
    while not llm.stats()["preemptions_recompute"]:
        llm.engine.step()
    assert llm.engine.abort(ids[1])
    outputs = run_checked(llm.engine)
    assert token_ids(outputs[ids[0]]) == GREEDY[3] and ids[1] not in outputs
    assert_nothing_left(llm)


def test_a_step_without_requests(llm):
    """An idle server's loop that crashes."""
    assert not llm.engine.has_unfinished_requests()
    before = llm.stats()
    assert llm.engine.step() == []
    assert llm.stats() == before


def test_the_callers_lists_are_not_touched(llm):
    """A prompt that grows by what was generated."""
    prompt, params = list(PROMPTS[1]), greedy_params(5)
    before = dict(vars(params))
    llm.generate([prompt, prompt], params)
    assert prompt == PROMPTS[1] and vars(params) == before


# --- limits and counters ------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_seqs", [1, 3])
def test_max_num_seqs(max_num_seqs):
    """More requests in a batch than the user allowed."""
    llm = golden_llm(MODEL, max_num_seqs=max_num_seqs)
    moved = []
    for _ in range(6):
        llm.engine.add_request(PROMPTS[0], greedy_params(4))
    run_checked(llm.engine, after_step=lambda outputs: moved.append(len(outputs)))
    assert max(moved) == max_num_seqs
    assert llm.stats()["mean_running"] == max_num_seqs


@pytest.mark.parametrize("num_blocks", [4, 64])
@pytest.mark.parametrize("max_tokens, slots, unused, never_used", [(6, 64, 7, 0), (5, 52, 7, 3),
                                                                   (1, 8, 1, 1), (2, 16, 1, 0)])
def test_kv_shares_by_hand(max_tokens, slots, unused, never_used, num_blocks):
    """PEERS bug 17: waste as a share of the pool, or of the GPU; used slots called waste.

    B = 4 and a prompt of 7: the steps end with 7, 8, 9, 10, 11, 12 tokens cached, in 2, 2, 3, 3, 3,
    3 blocks; 1, 0, 3, 2, 1, 0 slots are unused. After 5 tokens the last slot has waited 3 steps.
    """
    llm = golden_llm(MODEL, block_size=4, num_blocks=num_blocks)
    serve(llm, [(PROMPTS[1], greedy_params(max_tokens))])
    stats = llm.stats()
    assert stats["kv_tokens"] == pytest.approx(1 - unused / slots)
    assert stats["kv_internal"] == pytest.approx(never_used / slots)
    assert stats["kv_reserved"] == pytest.approx((unused - never_used) / slots)
    assert stats["kv_external"] == 0
    assert (stats["steps"], stats["generated_tokens"]) == (max_tokens, max_tokens)
    assert stats["computed_tokens"] == 7 + max_tokens - 1
    assert stats["blocks_peak"] == (3 if max_tokens > 2 else 2)
    assert (stats["num_blocks"], stats["block_size"]) == (num_blocks, 4)
    serve(llm, [([1], greedy_params(1))])              # a smaller request moves no peak
    assert llm.stats()["blocks_peak"] == stats["blocks_peak"]


@pytest.mark.parametrize("settings", [{}, {"num_blocks": tight(4), "max_num_batched_tokens": 7}],
                         ids=str)
def test_kv_shares_sum_to_one(settings):
    """Shares that miss a slot or count one twice, in chunks, after preemptions and aborts."""
    llm = golden_llm(MODEL, block_size=4, **settings)
    assert sum(v for k, v in llm.stats().items() if k.startswith("kv_")) == pytest.approx(1)
    ids = [llm.engine.add_request(prompt, greedy_params()) for prompt in PROMPTS * 2]
    for step in range(300):
        llm.engine.step()
        stats = llm.stats()
        shares = [v for k, v in stats.items() if k.startswith("kv_")]
        assert len(shares) == 4 and sum(shares) == pytest.approx(1), f"step {step}"
        assert all(0 <= share <= 1 for share in shares), f"step {step}: {shares}"
        if step == 20:
            llm.engine.abort(ids[5])
        if not llm.engine.has_unfinished_requests():
            break
    assert stats["preemptions_recompute"] > 0 or not settings
    assert stats["blocks_used"] == 0 < stats["blocks_peak"] <= stats["num_blocks"]


def test_memory_is_not_wasted():
    """The paper's claim: less than a block a sequence, where reservation wastes 60-80%."""
    llm = golden_llm(MODEL, block_size=4, num_blocks=100)
    serve(llm, [(prompt, greedy_params()) for prompt in PROMPTS])
    assert llm.stats()["kv_tokens"] > 0.9


def test_the_largest_step_is_as_large_as_a_step_can_be(llm):
    """Memory for a smaller one, so that a full batch later finds none; or a row without logits."""
    seen, model = [], llm.engine.model

    def spy(batch, kv_cache):
        seen.append((len(batch.input_ids), len(batch.last_rows), kv_cache.shape[2]))
        return model(batch, kv_cache)

    spy.config = model.config                          # of 128 positions
    cache = kernels.new_kv_cache(*llm.engine.kv_cache.shape[:1], 1, *llm.engine.kv_cache.shape[3:],
                                 torch.float32, llm.engine.kv_cache.device)
    for num_seqs, num_tokens in ((4, 64), (7, 64), (1, 9), (8, 3), (2, 8192)):
        largest_step(spy, cache, num_seqs, num_tokens)
    assert seen == [(64, 4, 1), (63, 7, 1), (9, 1, 1), (8, 8, 1), (256, 2, 1)]


def test_params_of_another_type_are_refused(llm):
    """A dict of options that is accepted, and fails in the middle of other people's texts."""
    for params in (None, {"temperature": 0}, 5):
        with pytest.raises(ValueError, match="params"):
            llm.engine.add_request([1], params)
    assert_nothing_left(llm)


BAD_SETTINGS = [("swap_blocks", -1), ("swap_blocks", None), ("preemption", "copy"),
                ("preemption", None), ("enable_prefix_caching", "no"), ("max_num_seqs", 0)]


@pytest.mark.parametrize("field, value", BAD_SETTINGS, ids=str)
def test_bad_settings(field, value):
    """A setting that is accepted and dropped, or fails when the first pool is full."""
    with pytest.raises(ValueError, match=rf"^{field} ") as error:
        golden_llm(MODEL, **{field: value})
    assert repr(value) in str(error.value)
    with pytest.raises(TypeError, match="no_such_setting"):
        golden_llm(MODEL, no_such_setting=1)


@pytest.mark.parametrize("at", range(1, 9))
def test_a_step_that_failed_while_tokens_were_added(at, llm, monkeypatch):
    """Ctrl-C between the tokens of a step: a sequence with nothing left to compute stops all."""
    ids = [llm.engine.add_request(prompt, greedy_params()) for prompt in PROMPTS]
    with monkeypatch.context() as patch:
        append = Interrupt(Engine._append_tokens, at)
        patch.setattr(Engine, "_append_tokens", lambda *args: append(*args))
        with pytest.raises(KeyboardInterrupt):
            run_checked(llm.engine)
    outputs = run_checked(llm.engine)
    assert [token_ids(outputs[i]) for i in ids] == GREEDY
    assert_nothing_left(llm)


def test_an_interrupted_abort_is_done_by_the_next_one(llm, monkeypatch):
    """A second Ctrl-C: a request that is in no queue any more, and holds its blocks for ever."""
    request_id = llm.engine.add_request(PROMPTS[1], greedy_params())
    llm.engine.step()
    with monkeypatch.context() as patch:
        free = Interrupt(nanopaged.BlockPool.free, 1)
        patch.setattr(nanopaged.BlockPool, "free", lambda *args: free(*args))
        with pytest.raises(KeyboardInterrupt):
            llm.engine.abort(request_id)
    assert llm.engine.abort(request_id)
    assert_nothing_left(llm)


def test_a_text_that_an_interrupt_left_too_long_ends(llm):
    """Ctrl-C between a token and the look at the limit: a text that goes on for ever."""
    request_id = llm.engine.add_request(PROMPTS[0], greedy_params(4))
    for _ in range(3):
        llm.engine.step()
    llm.engine.scheduler.running[0].seqs[0].token_ids.append(GREEDY[0][3])
    outputs = run_checked(llm.engine, max_steps=3)
    assert token_ids(outputs[request_id]) == GREEDY[0][:4]
    assert outputs[request_id].outputs[0].finish_reason == "length"


def test_the_waste_of_a_block_is_its_last_owners():
    """An aborted request's steps are counted as those of the next owner: more waste than slots."""
    llm = golden_llm(MODEL, block_size=64, num_blocks=1)
    aborted = llm.engine.add_request([5], greedy_params(60))
    for _ in range(58):
        llm.engine.step()
    llm.engine.abort(aborted)
    serve(llm, [([6], greedy_params(1))])
    stats = llm.stats()
    assert stats["kv_internal"] == pytest.approx(63 / (59 * 64)) and stats["kv_reserved"] > 0


def test_a_refused_request_changes_no_draw():
    """I5: a seed that is drawn for a request that cannot run moves those of all that come later."""
    tokens = []
    for refused in (0, 2):
        llm = golden_llm(MODEL, max_num_seqs=3)
        for _ in range(refused):
            with pytest.raises(ValueError, match="n or beam_width is 4"):
                llm.engine.add_request([5], SamplingParams(n=4))
        tokens.append(token_ids(*llm.generate([5], SamplingParams(max_tokens=12, ignore_eos=True))))
    assert tokens[0] == tokens[1]


def test_an_empty_slot_that_several_texts_share_counts_once(llm):
    """A block that three texts end in: its unused slot is 1 of 8, and never 3."""
    serve(llm, [(PROMPTS[1], greedy_params(1, n=3))])
    stats = llm.stats()
    assert (stats["kv_internal"], stats["kv_reserved"]) == (1 / 8, 0)
