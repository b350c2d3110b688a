"""Lab 11's grader: how far the device runs ahead, and what the host makes of its tokens.

    python tutorial/grade.py --lab 11
    python -m pytest tutorial/11_never_wait/test_lab.py -k task_1

There is no model: a device that is played here looks at the rows that it gets, and makes tokens up.
Blocks have 4 slots. Texts are a, b, c, ... in the order of their requests.
"""

from types import GeneratorType, SimpleNamespace

import torch
from labs import Wrong, doing, expect, task
from pool_checks import check_books
from scheduler_checks import make_scheduler

import nanopaged
from nanopaged import BeamSearchParams, SamplingParams, Sequence, SequenceGroup

LONGEST = 256                                      # tokens of the model
END = 99                                           # a token that ends a text
STOP = 98                                          # one whose text is ".", a stop string


def make_engine(mine, num_blocks=64, graphs=True):
    """A learner's engine without a model; its cache is a number a slot."""
    tokenizer = SimpleNamespace(token_bytes=lambda token_id: b"." if token_id == STOP else b"a")
    engine = mine.Engine(make_scheduler(nanopaged, num_blocks), None, tokenizer,
                         torch.zeros(1, 2, num_blocks, 4, 1, 1), torch.zeros(1, 2, 0, 4, 1, 1),
                         True, LONGEST, 0)
    engine.graphs = object() if graphs else None
    return engine


def add(engine, num_prompt, num_generated, num_kv=None, params=None, num_texts=1):
    """A request that runs: of its tokens all but the last are in the cache, or `num_kv`."""
    params = params or SamplingParams(max_tokens=200, n=num_texts)
    number = len(engine.scheduler.running)
    params.stop_token_ids, params.seed = {END}, 10 * number
    seq = Sequence(range(1000 * number, 1000 * number + num_prompt), params)
    seq.token_ids += range(1000 * number + 500, 1000 * number + 500 + num_generated)
    num_kv = seq.num_tokens - 1 if num_kv is None else num_kv
    engine.pool.append(seq, num_kv)
    engine.pool.publish(seq, num_kv)
    seq.num_kv = num_kv
    group = SequenceGroup(number, None, [seq])
    for i in range(1, num_texts):
        child = seq.fork()
        child.seed += i
        engine.pool.fork(seq, child)
        group.seqs.append(child)
    engine.scheduler.running.append(group)
    return group.seqs


# ---- task 1 --------------------------------------------------------------------------------------


def check_steps(engine, seqs, what, ours, most=16, why="a newcomer waits until all are done",
                in_flight=0):
    """_steps_ahead() must be at most `most`, and at least half of what the engine does, `ours`."""
    with doing(what):
        num = engine._steps_ahead(seqs, in_flight)
    expect(type(num) is int and num >= 0, f"{what}: the result must be a number of steps, or 0; it "
           f"is {num!r}")
    expect(num <= most, f"{what}: the result is {num}, it must be {'at most ' * (most > 0)}{most}: "
           f"{why}")
    expect(2 * num >= ours, f"{what}: the result is {num}, and {ours} would fit")


@task(11, 1)
def test_task_1(mine):
    """_steps_ahead(): as many as somebody wants, up to 16, while the host need not look."""
    engine = make_engine(mine)
    seqs = add(engine, 7, 1) + add(engine, 3, 5)
    check_steps(engine, seqs, "two texts decode, and nobody waits", 16)
    engine.scheduler.waiting.append(SequenceGroup(9, None, [Sequence([1], SamplingParams())]))
    check_steps(engine, seqs, "two texts decode, and somebody waits, who could not be let in: that "
                "is no reason for fewer steps", 16)
    for what, why, options, params in (
            ("there are no graphs", "the host launches kernel by kernel", {"graphs": False}, {}),
            ("one text asks for log-probabilities", "the host must see the logits of each step",
             {}, {"logprobs": 2}),
            ("one text asks for logprobs=0, the chosen tokens' own", "0 is not None", {},
             {"logprobs": 0}),
            ("one text has a repetition_penalty", "a token that was drawn changes the next "
             "logits, and the host does that", {}, {"repetition_penalty": 1.2})):
        engine = make_engine(mine, **options)
        seqs = add(engine, 7, 1) + add(engine, 3, 5, params=SamplingParams(**params))
        check_steps(engine, seqs, what, 0, 0, why)
    engine = make_engine(mine)
    check_steps(engine, add(engine, 7, 1, params=BeamSearchParams()), "beam search", 0, 0,
                "the host chooses the beams")
    for num_prompt, num_generated, num_kv, what in (
            (9, 0, 0, "one computes its prompt"),
            (9, 0, 8, "one lacks its prompt's last token, the others are in the cache"),
            (9, 3, 8, "one was preempted and lacks 4 tokens"),
            (9, 6, 11, "one was preempted, and has its prompt again, but lacks 4 tokens")):
        engine = make_engine(mine)
        seqs = add(engine, 7, 1) + add(engine, num_prompt, num_generated, num_kv)
        check_steps(engine, seqs, f"of two texts {what}", 0, 0, "a graph has one token for each "
                    "sequence" + (", and behind a prompt n texts are forked"
                                  if num_kv == 8 and not num_generated else ""))
    check_wanted(mine)
    check_limits(mine)
    check_steps(make_engine(mine), [], "nobody is left who could fly", 0, 0, "there is nothing to "
                "draw")


def take_off(engine, seqs, num):
    """`num` tokens of each are in flight: they have blocks, and num_kv does not count them."""
    for seq in seqs if num else ():
        engine.pool.append(seq, num)
    return f"{num} tokens of each are in flight, and " if num else ""


def check_wanted(mine):
    """Fewer than twice what the text still wants that wants most, beside what is in flight."""
    for wanted, in_flight, ours in (
            ((1, 1), 0, 0), ((2, 1), 0, 2), ((1, 5), 0, 8), ((8, 8), 0, 8), ((9, 2), 0, 16),
            ((1, 100), 0, 16), ((5, 5), 4, 0), ((8, 6), 4, 4), ((18, 17), 16, 2), ((9, 25), 8, 16)):
        engine, most = make_engine(mine), max(wanted) - in_flight
        seqs = [seq for left in wanted
                for seq in add(engine, 6, 20, params=SamplingParams(max_tokens=20 + left))]
        what = take_off(engine, seqs, in_flight)
        check_steps(engine, seqs, f"{what or 'of two texts '}one wants {wanted[0]} more, the other "
                    f"{wanted[1]} more", ours, min(16, 2 * most - 1), f"twice {most} or more, and "
                    "half of the steps or more are for nobody", in_flight)


def check_limits(mine):
    """There must be places in the model, and blocks for all tokens."""
    for num_generated, in_flight, ours in ((232, 0, 16), (240, 0, 8), (241, 0, 8), (246, 0, 2),
                                           (224, 16, 8), (226, 16, 4)):
        engine, params = make_engine(mine, 128), {"max_tokens": LONGEST - 8}
        seqs = add(engine, 8, 1) + add(engine, 8, num_generated, params=SamplingParams(**params))
        what, left = take_off(engine, seqs, in_flight), LONGEST - seqs[1].num_kv - in_flight
        check_steps(engine, seqs, f"{what}a text has {8 + num_generated} of {LONGEST} tokens", ours,
                    min(16, left), f"the model has places for the K and V of {left} more",
                    in_flight)
    # a has 8 tokens in 2 blocks, and b and its sibling 9 in 3 that they share: 16 more are 4 blocks
    # for each, and one of b's two copies its last
    for num_free, ours in ((13, 16), (12, 8), (4, 4)):
        engine = make_engine(mine, 5 + num_free)
        seqs = add(engine, 7, 2) + add(engine, 7, 3, num_texts=2)
        check_blocks(engine, seqs, ours)
    engine = make_engine(mine, 6)
    check_blocks(engine, add(engine, 7, 2) + add(engine, 7, 2), 4)   # one more block for each
    for num_free, ours in ((8, 16), (7, 8), (1, 0)):   # 8 tokens and 4 in flight: 3 blocks for each
        engine = make_engine(mine, 6 + num_free)
        check_blocks(engine, add(engine, 7, 2) + add(engine, 7, 2), ours, 4)


def check_blocks(engine, seqs, ours, in_flight=0):
    pool, what = engine.pool, take_off(engine, seqs, in_flight)
    needed = [pool.num_needed([(seq, in_flight + num) for seq in seqs]) for num in range(18)]
    most = max(num for num in range(17) if needed[num] <= pool.num_free)
    check_steps(engine, seqs, f"{what}{len(seqs)} texts decode, and {pool.num_free} blocks are "
                "free", ours, most, f"for {most + 1} tokens of each {needed[most + 1]} blocks are "
                f"needed, {'behind those in flight' if in_flight else 'copies included'}",
                in_flight)


# ---- task 2 --------------------------------------------------------------------------------------


class Landing:
    """The tokens of a flight, and the event behind it: they are there once somebody has waited."""

    def __init__(self, drawn):
        self.drawn, self.waited = drawn, False     # a list of each row's tokens
        shape = 2, len(drawn) + 3, len(drawn[0])   # padding is behind the rows
        self.steps = torch.full(shape, -1.0, dtype=torch.float64)

    def synchronize(self):
        self.waited = True
        self.steps.zero_()
        self.steps[0, :len(self.drawn)] = torch.tensor(self.drawn, dtype=torch.float64)
        self.steps[1, :len(self.drawn)] = -0.5 - torch.arange(len(self.drawn[0]))


class Device:
    """Plays DecodeGraphs: looks at what it is given, then makes tokens up.

    draws: {sequence: its tokens}. call: what the launch should be like, see launch(). tables:
    {sequence: its block table as the device knows it}, of what is loaded, row by row.
    """

    def __init__(self, engine, draws):
        self.engine, self.draws, self.call, self.tables = engine, draws, None, {}

    def load(self, batch, cuts, seeds, options):
        call, by_seed = self.call, {seq.seed: seq for seq in self.draws}
        expect(not call.in_flight, "load() begins with tokens that the host knows, and behind a "
               "flight only the device knows them: go_on() keeps them there")
        seqs = [by_seed[seed] for seed in seeds.tolist()]
        num_rows, num_tokens = len(batch.context_lens), len(batch.input_ids)
        expect(num_rows == len(seqs), f"there are {num_rows} rows, and sampling_options() of "
               f"{len(seqs)} sequences: both must be of those that fly")
        expect(num_tokens == num_rows, f"a row is a sequence's next token, and the batch has "
               f"{num_tokens} tokens of {num_rows} sequences")
        for seq, token_id, position in zip(seqs, batch.input_ids.tolist(), batch.positions.tolist(),
                                           strict=True):
            expect((token_id, position) == (seq.token_ids[-1], seq.num_kv), f"{call.names[seq]}'s "
                   f"row has token {token_id} at position {position}, it must have the last that "
                   f"is known, {seq.token_ids[-1]} at {seq.num_kv}")
        self.tables = dict(zip(seqs, batch.block_tables.tolist(), strict=True))
        call.loaded += 1

    def go_on(self, rows, known, tables):
        call, before = self.call, [*self.tables]
        expect(call.in_flight, "go_on() goes on behind a flight, and nothing flies: load() begins")
        want = [before.index(seq) for seq in before if seq in call.going]
        expect([*rows] == want, f"go_on() keeps rows {[*rows]}, it must be {want}: each one's "
               "number in the flight before")
        expect(len(known) == len(tables) == len(rows), f"go_on() keeps {len(rows)} rows, and gets "
               f"{len(tables)} tables of which {len(known)} numbers of blocks are known")
        new = {}
        for row, num_known, table in zip(rows, known, tables, strict=True):
            have = self.tables[before[row]]
            expect(0 <= num_known <= len(have), f"{num_known} blocks of {call.names[before[row]]} "
                   f"are said to be known to the device, and it has {len(have)}")
            new[before[row]] = have[:num_known] + table[num_known:]
        self.tables = new
        call.loaded += 1

    def run_ahead(self, num_steps):
        call, pool = self.call, self.engine.pool
        expect(call.landing is None, "graphs.run_ahead() was called twice, it must be once")
        expect(call.loaded == 1, f"before run_ahead() load() or go_on() must be called, once; they "
               f"were called {call.loaded} times")
        expect(num_steps == call.num_steps, f"run_ahead() is told {num_steps} steps, and "
               f"_steps_ahead() said {call.num_steps}")
        call.seqs = [*self.tables]
        call.check_who(call.seqs, "has a row")
        expect(not pool.copies, "blocks are still to be copied, and the device computes already: "
               "_move_blocks() comes first")
        for seq, table in self.tables.items():
            self.check_table(call, seq, table)
        call.drawn = {seq: [self.draws[seq].pop(0) for _ in range(num_steps)] for seq in call.seqs}
        call.landing = Landing([*call.drawn.values()])
        return call.landing.steps, call.landing

    def check_table(self, call, seq, table):
        name, pool, in_flight = call.names[seq], self.engine.pool, call.in_flight
        needed = -(-(seq.num_kv + in_flight + call.num_steps) // 4)
        expect(len(seq.block_table) >= needed, f"{seq.num_kv} tokens are cached, {in_flight} are "
               f"in flight and {call.num_steps} steps follow, but the table has "
               f"{len(seq.block_table)} blocks: append room for all of them first, {needed} blocks")
        expect(table[:needed] == seq.block_table[:needed], f"{name}'s table is {seq.block_table}, "
               f"and the device knows {table[:needed]}: it must get what was appended, in its row "
               "and its column")
        written = seq.block_table[seq.num_kv // 4:needed]
        expect(all(pool.ref_count[block_id] == 1 for block_id in written), "a block is written "
               "that another sequence reads")


def launch(engine, seqs, in_flight, num_steps, what, left_out=None):
    """Let a learner's engine launch a flight -> (the flight or None, what it should be like).

    num_steps: what _steps_ahead() says. left_out: {sequence: why it must have no row}.
    """
    left_out = left_out or {}
    going = [seq for seq in seqs if seq not in left_out]
    call = SimpleNamespace(
        in_flight=in_flight, num_steps=num_steps if going else 0, going=going, landing=None,
        loaded=0, seqs=[], drawn={}, names=dict(zip(engine.graphs.draws, "abcd", strict=False)))

    def check_who(asked, has):
        for seq in asked:
            expect(seq not in left_out, f"{call.names[seq]} {has}, but it {left_out.get(seq)}")
        lost = " and ".join(call.names[seq] for seq in going if seq not in asked)
        expect(not lost, f"{lost} could fly, and is left out: only who has ended, was aborted or "
               "will have all its tokens then must be")

    def steps_ahead(asked, in_flight=0):
        check_who(asked, "is among those that _steps_ahead() is asked about")
        expect(in_flight == call.in_flight, f"_steps_ahead() is told that {in_flight} tokens are "
               f"in flight, and {call.in_flight} are")
        return call.num_steps

    call.check_who, engine.graphs.call, engine._steps_ahead = check_who, call, steps_ahead
    before = {seq: (seq.num_kv, seq.num_tokens, [*seq.block_table]) for seq in call.names}
    with doing(what):
        try:
            flight = engine._launch(seqs, in_flight) if in_flight else engine._launch(seqs)
        except Wrong as wrong:
            raise Wrong(f"{what}: {wrong}") from None
    for seq, (num_kv, num_tokens, table) in before.items():
        expect((seq.num_kv, seq.num_tokens) == (num_kv, num_tokens), f"{what}: _launch() changes "
               "num_kv, or the text: they count what has landed")
        expect(seq in call.seqs or seq.block_table == table, f"{what}: {call.names[seq]} does not "
               "fly, and gets blocks")
    if not call.num_steps:
        what += ", and _steps_ahead() says 0" if going else ", for which nobody is left"
        expect(flight is None and call.landing is None, f"{what}: nothing is launched then, and "
               "_launch() must return None")
    return flight, call


def check_launched(flight, call, what):
    """A flight is what step() hands to _launch() and _land()."""
    expect(call.landing is not None, f"{what}: graphs.run_ahead() was not called")
    ok = isinstance(flight, tuple | list) and len(flight) == 4
    expect(ok and [*flight[0]] == call.seqs and flight[1] == call.num_steps
           and [*flight[2:]] == [call.landing.steps, call.landing],
           f"{what}: _launch() must return the sequences that fly, the number of steps, and the "
           "two results of run_ahead()")
    expect(not call.landing.waited, f"{what}: _launch() waits for its own flight: that is "
           "_land()'s part, as the host has other things to do until then")


def land(engine, flight, call, what):
    """Let a learner's engine land a flight, and look at all that the landing changes."""
    known = {seq: [*seq.token_ids] for seq in call.seqs}
    sums, counts = {seq: seq.cumulative_logprob for seq in call.seqs}, dict(engine.counts)
    out = [seq for seq in call.seqs if not seq.block_table or seq.finish_reason]
    with doing(what):
        moved = engine._land(*flight)
        moved = [*moved] if isinstance(moved, list | tuple | GeneratorType) else moved
    expect(call.landing.waited, f"{what}: the tokens are read before they are there: "
           "landed.synchronize() comes first")
    kept_in_all = 0
    for seq in call.seqs:
        name, found = call.names[seq], seq.token_ids[len(known[seq]):]
        if seq in out:
            expect(not found, f"{what}: {name} was aborted or has ended, and its blocks are gone, "
                   f"but it gets {found}")
            expect(not seq.num_kv, f"{what}: {name} has no blocks, and num_kv is {seq.num_kv}")
            continue
        most = seq.max_num_tokens - len(known[seq])
        kept = call.drawn[seq][:most]
        for end in [END, STOP] if seq.params.stop else [END]:
            kept = kept[:kept.index(end) + 1] if end in kept else kept
        kept_in_all += len(kept)
        check_text(engine, seq, found, kept, sums[seq], f"{what}: text {name}")
    check_counts(engine, call, counts, kept_in_all, what)
    groups = engine.scheduler.running
    expect(isinstance(moved, list) and len(moved) == len(groups) and {*moved} == {*groups},
           f"{what}: the result must be the {len(groups)} groups that got tokens, each once")


def check_text(engine, seq, found, kept, total, what):
    """One text of a flight that has landed: its tokens, its sum, its end, or its blocks."""
    expect(-1 not in found, f"{what}: its tokens are read before they are there: "
           "landed.synchronize() comes first")
    expect(found[:len(kept)] != kept or len(found) == len(kept), f"{what} has {found} behind what "
           f"was known, it ends with {kept[-1]}: what is drawn behind the end is dropped" +
           (", and where there are stop strings, _append_tokens() sees the end only if it gets one "
            "token at a time" if seq.params.stop else ""))
    expect(found == kept, f"{what} goes on with {found}, the device drew {kept}")
    expect(all(type(token_id) is int for token_id in found), f"{what}: a token is a float: the "
           "device hands out tokens and log-probabilities in one tensor")
    total += sum(-0.5 - i for i in range(len(kept)))
    expect(abs(seq.cumulative_logprob - total) < 1e-6, f"{what}: its log-probability is "
           f"{seq.cumulative_logprob}, it must be {total}")
    ended = seq.num_tokens == seq.max_num_tokens or kept[-1] in (END, STOP)
    expect(bool(seq.finish_reason) == ended, f"{what}: finish_reason is {seq.finish_reason}")
    if not ended:
        expect(seq.num_kv == seq.num_tokens - 1, f"{what}: it knows {seq.num_tokens} tokens and "
               f"num_kv is {seq.num_kv}: all but the last have K and V now")
        heir = Sequence([*seq.token_ids, 1], seq.params, seq.cache_salt)
        num, most = len(engine.pool.find_prefix(heir)), seq.num_kv // 4
        expect(num == most, f"{what}: {most} of its blocks are full, and the prefix cache finds "
               f"{num}: publish() each token before num_kv counts it")


def check_counts(engine, call, before, kept_in_all, what):
    """What the report of --verbose is made of."""
    generated, computed, steps = (engine.counts[name] - before.get(name, 0) for name in (
        "generated_tokens", "computed_tokens", "steps"))
    expect(generated == kept_in_all, f"{what}: generated_tokens rises by {generated}, the texts "
           f"grew by {kept_in_all}")
    want = call.num_steps, call.num_steps * len(call.seqs)
    expect((steps, computed) == want, f"{what}: {steps} steps and {computed} computed tokens are "
           f"counted, it must be {want[0]} and {want[1]}: _count() takes the tokens of all steps, "
           "dropped ones too, and the number of steps")


def fly(mine, seqs_of, nums, what, ends=(), aborted=None):
    """What step() does while nobody comes: launch, launch the next, land the first, and so on.

    seqs_of(engine) -> sequences. nums: steps of each flight. ends: {number of a text: which of its
    draws is an end, and END or STOP}. aborted: the request that is aborted when the first flight
    has landed.
    """
    engine = make_engine(mine)
    seqs = seqs_of(engine)
    draws = {seq: [100 * (i + 1) + k for k in range(sum(nums))] for i, seq in enumerate(seqs)}
    for i, (k, end) in dict(ends).items():
        draws[seqs[i]][k] = end
    engine.graphs, gone = Device(engine, draws), {}
    flight, call = launch(engine, seqs, 0, nums[0], f"{what}, flight 1")
    for number, num_steps in enumerate([*nums[1:], 0], 2):
        when = f"{what}, flight {number - 1}"
        check_launched(flight, call, when)
        left_out = {seq: gone.get(seq, "will have all its tokens then") for seq in call.seqs
                    if seq in gone or seq.num_tokens + call.num_steps >= seq.max_num_tokens}
        following, next_call = launch(engine, flight[0], call.num_steps, num_steps,
                                      f"{what}, flight {number}", left_out)
        land(engine, flight, call, when)
        for group in [*engine.scheduler.running]:
            if number == 2 and group.request_id == aborted:
                gone |= dict.fromkeys(group.seqs, "was aborted, and has no blocks")
                engine.abort(aborted)
                continue
            ended = [seq for seq in group.seqs if seq.finish_reason]
            gone |= dict.fromkeys(ended, "has ended, and has no blocks")
            engine.pool.free(*ended)
            if not group.unfinished():
                engine.scheduler.finish(group)
        check_books(engine.pool, seqs, when)
        flight, call = following, next_call
    engine.pool.free(*seqs)
    check_books(engine.pool, [], f"{what}, then all are freed")


@task(11, 2)
def test_task_2(mine):
    """_launch(), _land(): blocks first, then one call; later each token as if it came by itself."""
    def two(engine):
        return add(engine, 7, 1) + add(engine, 7, 3)

    def three(engine):
        return add(engine, 7, 1) + add(engine, 7, 3) + add(engine, 5, 2)

    fly(mine, two, [6], "texts of 8 and 10 tokens fly 6 steps")
    fly(mine, two, [5], "5 steps, in the second of which b ends", {1: (1, END)})
    fly(mine, lambda engine: add(engine, 7, 1) + add(engine, 7, 3, params=SamplingParams(
        max_tokens=200, stop=["."])), [5], "5 steps, in the third of which b comes to its stop "
        "string", {1: (2, STOP)})
    fly(mine, lambda engine: add(engine, 7, 1, params=SamplingParams(max_tokens=3))
        + add(engine, 6, 2), [4], "4 steps, of which a needs 2 to reach max_tokens")
    fly(mine, lambda engine: add(engine, 6, 4, num_texts=2) + add(engine, 5, 1), [4, 2],
        "two texts that share their last block, and a third, in flights of 4 and 2")
    check_nobody_flies(mine, two)
    fly(mine, two, [4, 8, 2], "flights of 4, 8 and 2 steps")
    fly(mine, lambda engine: add(engine, 7, 1) + add(engine, 7, 1, params=SamplingParams(
        max_tokens=5)) + add(engine, 5, 2, params=SamplingParams(max_tokens=7)), [4, 4],
        "b wants 4 tokens, c 5, and 4 are in flight")
    fly(mine, three, [4, 4, 2], "b ends in the first of three flights", {1: (2, END)})
    fly(mine, three, [4, 4, 2], "b is aborted while the second of three flights is in the air",
        aborted=1)


def check_nobody_flies(mine, seqs_of):
    """When _launch() has nothing to launch: it returns None, and changes nothing."""
    def first(waits, num_steps, what):
        engine = make_engine(mine)
        seqs = seqs_of(engine)
        engine.graphs = Device(engine, {seq: [*range(100, 120)] for seq in seqs})
        newcomer = SequenceGroup(9, None, [Sequence([1], SamplingParams())])
        engine.scheduler.waiting.extend([newcomer] * waits)
        return engine, *launch(engine, seqs, 0, num_steps, what)

    first(False, 0, "the host must look first")
    what = "somebody waits, and nothing is in flight"
    engine, flight, call = first(True, 4, what)
    expect(flight is not None, f"{what}: the plan has just found no room for who waits, so a "
           "flight may be launched, but the result is None")
    check_launched(flight, call, what)
    what = "somebody waits, and 4 tokens of each are in flight"
    following, next_call = launch(engine, flight[0], 4, 4, what)
    expect(next_call.landing is None and following is None, f"{what}: nothing may follow, or who "
           "waits cannot be let in when the flight has landed; the result must be None")
