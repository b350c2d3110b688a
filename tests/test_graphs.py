"""Sections 8 to 10 where the device runs ahead of the host: kernels.DecodeGraphs and the engine.

On a CPU a graph's replay is played by the model itself (as in the tutorial's chapter 11), so that
all that the host does is tested anywhere; on a GPU the same runs go through real CUDA graphs and
compiled layers.
"""

import contextlib
import gc
import random
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    MODELS,
    ROOT,
    Interrupt,
    assert_nothing_left,
    blocks_needed,
    check,
    golden,
    golden_llm,
    greedy_params,
    run_checked,
    serve,
    token_ids,
)

import kernels
import nanopaged
from nanopaged import (
    LLM,
    BeamSearchParams,
    BlockPool,
    Engine,
    SamplingParams,
    Tokenizer,
    find_model,
    load_config,
    load_model,
    print_report,
)

sys.path.insert(0, str(ROOT / "tutorial" / "11_never_wait"))

from stand_in import StandIn  # noqa: E402

GPU = torch.cuda.is_available()
GRAPHS = kernels.DecodeGraphs if GPU else StandIn
MODEL = "llama_gqa_tied"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU: real graphs, or its memory")
COMPILED = []                      # the model that torch has compiled, on a GPU: the last one


class Late(StandIn):
    """A stand-in whose tokens are there only when somebody has waited for them."""

    def run_ahead(self, num_steps):
        drawn, landed = super().run_ahead(num_steps)
        steps = torch.full_like(drawn, torch.nan)

        def synchronize():
            landed.synchronize()
            steps.copy_(drawn)
        return steps, SimpleNamespace(synchronize=synchronize)


@pytest.fixture
def ahead():
    """-> make(name, **settings): an engine on a golden model, or "tiny", that runs ahead."""
    def make(name, **settings):
        if GPU and COMPILED != [name]:             # torch keeps eight at most
            torch._dynamo.reset()
            COMPILED[:] = [name]
        if name == "tiny":
            llm = LLM(num_blocks=64, dtype="float32", **settings)
        else:
            llm = golden_llm(name, enforce_eager=False, **settings)
        if not GPU:
            llm.engine.graphs = Late(llm.engine)
        return llm

    return make


# --- the same tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2_prefixed", MODEL] if GPU else MODELS)
@pytest.mark.parametrize("block_size, num_blocks", [(4, 50)] if GPU else [(1, 1024), (4, 50),
                                                                         (16, 14)])
def test_golden_tokens(name, block_size, num_blocks, ahead):
    """A token fed at a wrong position, a slot that padding overwrites, a preemption in between."""
    prompts, texts = golden(name)
    llm = ahead(name, block_size=block_size, num_blocks=num_blocks)
    outputs = serve(llm, [(prompt, greedy_params()) for prompt in prompts])
    assert [token_ids(output) for output in outputs] == texts
    assert llm.stats()["steps"] > 24 or not llm.stats()["preemptions_recompute"]


def test_the_device_does_run_ahead(ahead):
    """Graphs that are captured and then not used; a step that returns before all have landed."""
    llm = ahead(MODEL)
    llm.engine.add_request([1, 2, 3], greedy_params(max_tokens=30))
    lengths = []
    run_checked(llm.engine, after_step=lambda moved: lengths.extend(
        len(token_ids(output)) for output in moved))
    assert lengths == [1, 17, 30]
    assert llm.stats()["generated_tokens"] == 30 and llm.stats()["steps"] == 33


def test_the_time_in_which_the_host_waits(ahead, capsys):
    """A host that seems to work all the time, while it waits for a flight; or that never works."""
    llm, waits = ahead(MODEL), []
    run_ahead, start = llm.engine.graphs.run_ahead, time.perf_counter()

    def slowly(*args):
        steps, landed = run_ahead(*args)

        def synchronize():
            waits.append(args)
            time.sleep(0.02)
            landed.synchronize()
        return steps, SimpleNamespace(synchronize=synchronize)

    llm.engine.graphs.run_ahead = slowly
    serve(llm, [([1, 2, 3], greedy_params(max_tokens=40))])
    seconds, waited = time.perf_counter() - start, llm.engine.counts["seconds_waited"]
    assert len(waits) == 3 and 0.06 <= waited <= seconds
    print_report(llm.engine, 4 * waited)
    assert "host at work: 75% of the time" in capsys.readouterr().err


def test_who_waits_is_let_in_between(ahead):
    """A request that waits for a seat until nobody else runs; or one that gets none in between."""
    llm = ahead(MODEL, max_num_seqs=2)
    for max_tokens in (60, 20, 8):
        llm.engine.add_request([1, 2, 3], greedy_params(max_tokens=max_tokens))
    moved = []
    run_checked(llm.engine, after_step=lambda outputs: moved.append(
        {output.request_id: len(token_ids(output)) for output in outputs}))
    assert moved[:4] == [{0: 1, 1: 1}, {0: 17, 1: 17}, {0: 33, 1: 20}, {0: 34, 2: 1}]


@pytest.mark.parametrize("max_tokens, steps", [(1, 1), (2, 2), (3, 3), (4, 5), (5, 5), (17, 17),
                                               (18, 18), (20, 21)])
def test_no_more_steps_than_are_wanted(max_tokens, steps, ahead):
    """Sixteen steps for the one token that somebody asked for."""
    llm = ahead(MODEL)
    serve(llm, [([1, 2, 3], greedy_params(max_tokens=max_tokens))])
    assert llm.stats()["steps"] == steps
    shares = [llm.stats()[f"kv_{kind}"] for kind in ("tokens", "internal", "reserved")]
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0, shares


def test_a_pool_that_is_nearly_full(ahead):
    """One step at a time as soon as sixteen do not fit, just where there is most to do."""
    llm = ahead(MODEL, block_size=1, num_blocks=60)
    for _ in range(4):
        llm.engine.add_request([1, 2, 3], greedy_params(max_tokens=20))
    lengths = []
    run_checked(llm.engine, after_step=lambda moved: lengths.append(
        [len(token_ids(output)) for output in moved]))
    # 4 x 3 blocks; then 4 x 16 more are not there, but 4 x 8, and then 4 x 4; then none
    assert lengths[:3] == [[1] * 4, [9] * 4, [13] * 4]
    assert llm.stats()["preemptions_recompute"] > 0


@pytest.mark.parametrize("settings", [
    {"logprobs": 2}, {"repetition_penalty": 1.5}, {"n": 3, "temperature": 1.0, "seed": 3},
    {"top_p": 0.6, "temperature": 1.2, "seed": 1}, {"top_k": 3, "temperature": 1.2, "seed": 1},
    {"min_p": 0.3, "temperature": 1.5, "seed": 1}, {"temperature": 0.8, "seed": 7},
    {"stop_token_ids": list(range(0, 60))}, {"max_tokens": 1}, {"max_tokens": 2}], ids=str)
def test_each_option_gives_the_tokens_of_the_plain_path(settings, ahead):
    """An option that the device draws without, or draws otherwise; text behind an end."""
    params = greedy_params(**settings)
    want, got = [serve(llm, [([3, 1, 4, 1, 5], params), ([9, 2, 6], greedy_params())])
                 for llm in (golden_llm(MODEL), ahead(MODEL))]
    for one, other in zip(want, got, strict=True):
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)


def test_texts_and_their_ends(ahead):
    """A stop string that is found too late, or text behind it; half a character that is shown."""
    params = [SamplingParams(seed=i, max_tokens=60, stop=stop)
              for i, stop in enumerate([["."], ["the", "\n\n"], [], [" a", "e"]])]
    prompts = ["ROMEO:", "JULIET:\nO", "KING", "First"]
    want, got = [[output.outputs[0] for output in llm.generate(prompts, params)] for llm in (
        LLM(num_blocks=64, dtype="float32", enforce_eager=True), ahead("tiny"))]
    for one, other in zip(want, got, strict=True):
        assert (one.text, one.token_ids, one.finish_reason) == (
            other.text, other.token_ids, other.finish_reason)
    assert {text.finish_reason for text in got} == {"stop", "length"}


def watch_launches(llm):
    """-> a list to which each launch will add (the first positions of its rows, its steps).

    Asserts that it has a row for each that flies, and the smallest graph that has so many.
    """
    graphs, launches = llm.engine.graphs, []

    def spy(num_steps):
        lengths, num_rows = graphs.loaded.context_lens, len(graphs.loaded.cuts)
        assert (lengths[:num_rows] > 0).all() and (lengths[num_rows:] == 0).all()
        assert len(lengths) == min(size for size in graphs.graphs if size >= num_rows)
        launches.append(((lengths[:num_rows] - 1).tolist(), num_steps))
        return type(graphs).run_ahead(graphs, num_steps)

    graphs.run_ahead = spy
    return launches


def test_one_flight_follows_another(ahead):
    """The device waits for the host between two flights; or flies on for nobody."""
    llm = ahead(MODEL)
    launches = watch_launches(llm)
    llm.engine.add_request([1, 2, 3], greedy_params(max_tokens=40))
    read = []
    run_checked(llm.engine, after_step=lambda moved: read.append(
        (len(token_ids(moved[0])), sum(num_steps for _, num_steps in launches))))
    # 1 by the prompt; then what is read is 16 behind what was launched, until no more is wanted
    assert read == [(1, 0), (17, 32), (33, 40), (40, 40)]
    assert [num_steps for _, num_steps in launches] == [16, 16, 8] and llm.engine.flight is None


def test_the_longest_contexts_are_the_last_rows(ahead):
    """The attention kernel begins with the last row: a long one that begins late ends last."""
    llm, params = ahead(MODEL), greedy_params(max_tokens=40)
    launches = watch_launches(llm)
    serve(llm, [([1] * 9, params), ([2] * 3, params), ([3] * 6, params)])
    assert [positions for positions, _ in launches] == [[3, 6, 9], [19, 22, 25], [35, 38, 41]]


def test_rows_that_move_up_take_all_along(ahead):
    """When the first row leaves, others draw by its seed, its options, or without their cuts."""
    requests = [([1], {"temperature": 0, "max_tokens": 18}), ([4, 5], {"temperature": 1.0}),
                ([2, 3, 6], {"temperature": 1.2, "top_p": 0.5})]
    requests = [(prompt, greedy_params(**{"max_tokens": 60, "seed": i} | settings))
                for i, (prompt, settings) in enumerate(requests)]
    llm = ahead(MODEL, block_size=4)
    launches = watch_launches(llm)
    outputs = serve(llm, requests)
    assert [len(positions) for positions, _ in launches] == [3, 3, 2, 2]
    assert llm.engine.graphs.loaded.cuts == [False, True]
    assert [token_ids(output) for output in outputs] == [
        token_ids(output) for output in serve(golden_llm(MODEL, block_size=4), requests)]


def test_what_was_generated_in_flight_is_found_again(ahead):
    """I6: blocks that a flight has filled are published, or those of tokens behind an end."""
    for stop_token_ids in ([], golden(MODEL)[1][0][9:10]):
        params = greedy_params(40, stop_token_ids=stop_token_ids)
        found = []
        for llm in (golden_llm(MODEL, block_size=4), ahead(MODEL, block_size=4)):
            prompt = golden(MODEL)[0][0]
            text = prompt + token_ids(serve(llm, [(prompt, params)])[0])
            longer, = serve(llm, [(text + [1, 2, 3, 4, 5, 6], greedy_params(1))])
            found.append(longer.num_cached_tokens)
            assert longer.num_cached_tokens == (len(text) - 1) // 4 * 4, "the last has no K and V"
        assert found[0] == found[1]


@pytest.mark.parametrize("at", [1, 2, 17, 18, 30])
def test_an_interrupt_among_new_tokens_leaves_all_or_nothing(at, ahead, monkeypatch):
    """Ctrl-C between tokens and text: tokens whose text is never shown, or that are added twice."""
    def run(interrupted):
        llm = ahead("tiny")
        llm.engine.add_request("ROMEO:", SamplingParams(seed=1, max_tokens=40))
        if interrupted:
            with monkeypatch.context() as patch:
                read = Interrupt(Tokenizer.token_bytes, at)
                patch.setattr(Tokenizer, "token_bytes", lambda *args: read(*args))
                with pytest.raises(KeyboardInterrupt):
                    run_checked(llm.engine)
        output, = run_checked(llm.engine).values()
        return output.outputs[0]

    want, got = run(False), run(True)
    assert (got.text, got.token_ids, got.finish_reason) == (
        want.text, want.token_ids, want.finish_reason)
    assert got.cumulative_logprob == pytest.approx(want.cumulative_logprob, abs=1e-3)


def test_nothing_follows_where_somebody_waits(ahead):
    """A newcomer that waits for as long as the others have something to say."""
    llm, lengths = ahead(MODEL), []
    llm.engine.add_request([1, 2, 3], greedy_params(max_tokens=90))
    for _ in range(2):
        llm.engine.step()
    newcomer = llm.engine.add_request([4, 5], greedy_params(max_tokens=3))
    run_checked(llm.engine, after_step=lambda moved: lengths.append(
        {output.request_id: len(token_ids(output)) for output in moved}))
    # what was in flight when it came; then the step that has its prompt
    assert lengths[:2] == [{0: 33}, {0: 34, newcomer: 1}]


def test_a_queue_does_not_stop_those_who_have_all_seats(ahead):
    """The device waits for the host between all flights, just where most is to be done."""
    llm, flies = ahead(MODEL, max_num_seqs=2), []
    ids = [llm.engine.add_request([1, 2, i], greedy_params(most))
           for i, most in enumerate((90, 50, 20))]
    outputs = run_checked(llm.engine, after_step=lambda moved: flies.append(
        bool(llm.engine.flight)))
    # the prompts, three flights with another behind them, and one in which the second text ends
    assert flies[:5] == [False, True, True, True, False]
    assert [len(token_ids(outputs[i])) for i in ids] == [90, 50, 20]


@pytest.mark.parametrize("how", ["stop", "length", "abort"])
def test_who_is_gone_takes_nothing_along(how, ahead):
    """Tokens for a text that ended, or was aborted, while more of it were in flight; its blocks."""
    prompts, texts = golden(MODEL)
    end = texts[0][9]                              # the flight goes on behind this token
    params = {"stop": greedy_params(60, stop_token_ids=[end]), "length": greedy_params(20),
              "abort": greedy_params(60)}[how]
    llm, outputs = ahead(MODEL, block_size=4), {}
    ids = [llm.engine.add_request(prompt, one) for prompt, one in
           zip(prompts[:3], (params, greedy_params(60), greedy_params(60)), strict=True)]
    for _ in range(2):
        outputs |= {output.request_id: output for output in llm.engine.step()}
    if how == "abort":
        llm.engine.abort(ids[0])
    assert len(llm.engine.flight[0]) == 3, "nothing is in flight: this tests nothing"
    outputs |= {output.request_id: output for output in llm.engine.step()}
    assert len(llm.engine.flight[0]) == 2, "the others wait for the host"
    outputs |= run_checked(llm.engine)
    alone = serve(ahead(MODEL), [(prompt, greedy_params(60)) for prompt in prompts[1:3]])
    assert [token_ids(outputs[i]) for i in ids[1:]] == [token_ids(output) for output in alone]
    if how != "abort":
        want = texts[0][:20] if how == "length" else texts[0][:texts[0].index(end) + 1]
        assert token_ids(outputs[ids[0]]) == want
    assert_nothing_left(llm)


def test_all_have_gone_and_something_still_flies(ahead):
    """What flies for nobody is read, waited for, or counted, when the next request comes."""
    prompts, texts = golden(MODEL)
    for end in ("stop", "abort"):
        llm = ahead(MODEL)
        params = greedy_params(max_tokens=60, stop_token_ids=[texts[0][3]] * (end == "stop"))
        request_id = llm.engine.add_request(prompts[0], params)
        for _ in range(2):
            llm.engine.step()
        assert llm.engine.flight and llm.engine.abort(request_id) == (end == "abort")
        steps = llm.stats()["steps"]
        newcomer = llm.engine.add_request(prompts[1], greedy_params())
        assert [output.request_id for output in llm.engine.step()] == [newcomer], end
        assert llm.stats()["steps"] == steps + 1
        assert token_ids(run_checked(llm.engine)[newcomer]) == texts[1]


@pytest.mark.parametrize("owner, name, at", [
    (GRAPHS, "go_on", 1), (GRAPHS, "load", 1), (nanopaged, "sampling_options", 1),
    *[(owner, name, at) for at in (1, 2, 3, 9, 40) for owner, name in (
        (GRAPHS, "run_ahead"), (Engine, "_launch"), (Engine, "_land"), (Engine, "_append_tokens"),
        (BlockPool, "append"), (BlockPool, "publish"), (kernels, "upload"))]])
def test_an_interrupted_flight_is_flown_again(owner, name, at, ahead, monkeypatch):
    """Ctrl-C while something flies: tokens that are taken twice, or never; blocks that are lost."""
    prompts, texts = golden(MODEL)
    llm, outputs = ahead(MODEL, block_size=4), {}
    ids = [llm.engine.add_request(prompt, greedy_params()) for prompt in prompts]
    outputs |= {output.request_id: output for output in llm.engine.step()}     # the prompts
    with monkeypatch.context() as patch:
        interrupt = Interrupt(getattr(owner, name), at)
        patch.setattr(owner, name, lambda *args, **kwargs: interrupt(*args, **kwargs))
        with contextlib.suppress(KeyboardInterrupt):
            outputs |= run_checked(llm.engine, max_steps=at)
    assert interrupt.calls_left <= 0 or at > 2, "it was not called so often"
    # who has new tokens whose K and V are not noted keeps the blocks for more, and goes on alone
    if any(seq.num_kv < seq.num_tokens - 1 for group in llm.engine.scheduler.running
           for seq in group.unfinished()):
        assert name == "publish"
        outputs |= {output.request_id: output for output in llm.engine.step()}
    outputs |= run_checked(llm.engine)
    assert [token_ids(outputs[i]) for i in ids] == texts
    assert_nothing_left(llm)


def random_requests(rng, num_requests, num_tokens):
    """Requests of all kinds -> [(prompt, params), ...]; no prompt and output over num_tokens."""
    requests = []
    for seed in range(num_requests):
        prompt = [rng.randrange(90) for _ in range(rng.randint(1, num_tokens // 2))]
        most = rng.randint(1, num_tokens // 2)
        settings = rng.choice([
            {}, {}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"n": 2},
            {"logprobs": 2}, {"stop_token_ids": list(range(50))}, {"repetition_penalty": 1.2}])
        params = SamplingParams(seed=seed, max_tokens=most, ignore_eos=rng.random() < 0.5,
                                **settings)
        if rng.random() < 0.1:
            params = BeamSearchParams(beam_width=2, max_tokens=most)
        requests.append((prompt, params))
    return requests


def run_random(llm, requests, seed):
    """Requests that come and go while others run -> {index: its texts}, of those not aborted."""
    rng, engine, ids, outputs = random.Random(seed), llm.engine, {}, {}
    waiting = list(enumerate(requests))
    aborted = {i for i, _ in waiting if rng.random() < 0.15}
    while waiting or engine.has_unfinished_requests():
        for _ in range(rng.randint(0, 5)):
            if waiting:
                index, (prompt, params) = waiting.pop(0)
                ids[engine.add_request(prompt, params)] = index
        if rng.random() < 0.3:
            for request_id in [i for i, index in ids.items() if index in aborted]:
                engine.abort(request_id)
        for output in engine.step(only_finished=True):
            outputs[ids[output.request_id]] = [(c.token_ids, c.finish_reason)
                                               for c in output.outputs]
        check(engine.scheduler, engine.flight)
    assert_nothing_left(llm)
    return {index: texts for index, texts in outputs.items() if index not in aborted}


@pytest.mark.parametrize("seed", range(3 if GPU else 12))
def test_random_programs(seed, ahead):
    """Requests of all kinds that come, go, are preempted: other tokens, or blocks that leak."""
    rng = random.Random(seed)
    name = MODEL if GPU else rng.choice(MODELS)
    requests = random_requests(rng, 30, 40)
    block_size = rng.choice([1, 2, 4, 16])
    most = max(blocks_needed(block_size, *request) for request in requests)
    settings = {"block_size": block_size, "num_blocks": most + rng.choice([0, 100]),
                "max_num_seqs": rng.choice([4, 16]), "swap_blocks": rng.choice([0, 100]),
                "max_num_batched_tokens": rng.choice([16, 64])}
    want = run_random(golden_llm(name, **settings), requests, seed)
    got = run_random(ahead(name, **settings), requests, seed)
    assert want == got and len(want) > 20, settings


def test_up_to_the_last_token_of_the_model(ahead):
    """A row that is drawn past its end reads behind the table of positions, or of blocks."""
    for name in ("gpt2_prefixed", MODEL)[GPU:]:
        llm = ahead(name, block_size=4)
        longest = llm.engine.max_model_len
        params = [greedy_params(max_tokens=longest), greedy_params(max_tokens=longest - 21)]
        outputs = serve(llm, [([7] * 5, params[0]), ([8] * 20, params[1])])
        assert [len(token_ids(output)) for output in outputs] == [longest - 5, longest - 21]


# --- on a GPU -----------------------------------------------------------------------------------


def test_a_compiled_model_goes_when_nobody_holds_it():
    """Layers that hold themselves: two models do not fit until Python looks for cycles."""
    folder = find_model("tiny")
    torch.compile(abs)                             # its imports leave cycles of their own
    gc.disable()
    try:
        model = load_model(load_config(folder), folder, "cpu", torch.float32, compiled=True)
        weight = weakref.ref(model.layers[0].qkv.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


@needs_gpu
def test_a_compiled_draw_is_the_plain_one():
    """The compiler rounds otherwise, and other tokens win; a CPU draws others than a GPU."""
    draw = torch.compile(kernels.draw_reference, dynamic=True)
    for num_rows, size in ((1, 1000), (2, 1000), (33, 50_257), (256, 128_256)):
        gen = torch.Generator().manual_seed(size)
        logits = 3 * torch.randn(num_rows, size, generator=gen)
        seeds = torch.randint(1 << 62, (num_rows,), generator=gen)
        lengths = torch.arange(num_rows, dtype=torch.int32)
        options = torch.tensor([[i % 3 / 2, 1, 0, 0] for i in range(num_rows)]).double()
        want = kernels.draw_reference(logits, False, seeds, lengths, options)
        for function in (draw, kernels.draw_reference):
            tokens, logprobs = function(logits.cuda(), False, seeds.cuda(), lengths.cuda(),
                                        options.cuda())
            assert (tokens.cpu() == want[0]).double().mean() > 0.99      # near ties may round over
            assert (logprobs.cpu() - want[1]).abs().max() < 1e-3 or not torch.equal(
                tokens.cpu(), want[0])


@needs_gpu
def test_nothing_is_compiled_under_a_request(ahead):
    """Other strides or types than at the start: torch compiles again, while somebody waits."""
    COMPILED.clear()                               # lest an earlier test has compiled it
    llm = ahead(MODEL)
    ready = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for n in (1, 2, 5):
        serve(llm, [([1, 2, 3], greedy_params(temperature=1.0, seed=i, max_tokens=20))
                    for i in range(n)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == ready > 0


@needs_gpu
def test_a_thousand_requests(ahead):
    """Something is lost, or memory grows: of blocks, of the device."""
    llm, rng = ahead(MODEL, num_blocks=600, max_num_seqs=64), random.Random(0)
    requests = random_requests(rng, 1000, 60)
    run_random(llm, requests[:100], 0)
    before = torch.cuda.memory_allocated()
    outputs = run_random(llm, requests, 1)
    assert len(outputs) > 800 and torch.cuda.memory_allocated() <= before + (1 << 20)


@needs_gpu
@pytest.mark.parametrize("settings, names", [
    ({"num_blocks": 1 << 30}, ["num_blocks"]),
    ({"num_blocks": None, "gpu_memory_utilization": 0.01}, ["lower", "num_blocks"])])
def test_a_device_that_is_too_small_is_one_line(settings, names):
    """An error of CUDA's, over many lines, that names nothing to be done."""
    with pytest.raises((MemoryError, ValueError)) as error:
        LLM("tiny", device="cuda", **settings)
    assert "\n" not in str(error.value) and all(name in str(error.value) for name in names)
