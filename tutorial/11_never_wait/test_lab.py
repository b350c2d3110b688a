"""Lab 11's grader: how far the device runs ahead, and what the host makes of its tokens.

    python tutorial/grade.py --lab 11
    python -m pytest tutorial/11_never_wait/test_lab.py -k task_1

There is no model: a device that is played here looks at the batch that it gets, and draws tokens
from a list. Blocks have 4 slots.
"""

import types

import torch
from labs import doing, expect, task
from pool_checks import check_books
from scheduler_checks import make_scheduler

import nanopaged
from nanopaged import BeamSearchParams, SamplingParams, Sequence, SequenceGroup

LONGEST = 256                                      # tokens of the model
END = 99                                           # a token that ends a text


def make_engine(mine, num_blocks=64, graphs=True):
    """A learner's engine without a model; its cache is a number a slot."""
    engine = mine.Engine(make_scheduler(nanopaged, num_blocks), None, None,
                         torch.zeros(1, 2, num_blocks, 4, 1, 1), torch.zeros(1, 2, 0, 4, 1, 1),
                         True, LONGEST, 0)
    engine.graphs = object() if graphs else None
    return engine


def add(engine, num_prompt, num_generated, num_kv=None, params=None, num_texts=1):
    """A request that runs: of its tokens all but the last are in the cache, or `num_kv`."""
    params = params or SamplingParams(max_tokens=200, n=num_texts)
    params.stop_token_ids, params.seed = {END}, 0
    number = len(engine.scheduler.running)
    seq = Sequence(range(1000 * number, 1000 * number + num_prompt), params)
    seq.token_ids += range(1000 * number + 500, 1000 * number + 500 + num_generated)
    num_kv = seq.num_tokens - 1 if num_kv is None else num_kv
    engine.pool.append(seq, num_kv)
    engine.pool.publish(seq, num_kv)
    seq.num_kv = num_kv
    group = SequenceGroup(number, None, [seq])
    for _ in range(1, num_texts):
        child = seq.fork()
        engine.pool.fork(seq, child)
        group.seqs.append(child)
    engine.scheduler.running.append(group)
    return group.seqs


# ---- task 1 --------------------------------------------------------------------------------------


def check_steps(engine, seqs, what, ours, most=16, why="a newcomer waits until all are done"):
    """_steps_ahead() must be at most `most`, and at least half of what the engine does, `ours`."""
    with doing(what):
        num = engine._steps_ahead(seqs)
    expect(type(num) is int and num > 0, f"{what}: the result must be a number of steps, it is "
           f"{num!r}")
    expect(num <= most, f"{what}: the result is {num}, it must be {'at most ' * (most > 1)}{most}: "
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
        check_steps(engine, seqs, what, 1, 1, why)
    engine = make_engine(mine)
    check_steps(engine, add(engine, 7, 1, params=BeamSearchParams()), "beam search", 1, 1,
                "the host chooses the beams")
    for num_prompt, num_generated, num_kv, what in (
            (9, 0, 0, "one computes its prompt"),
            (9, 0, 8, "one lacks its prompt's last token, the others are in the cache"),
            (9, 3, 8, "one was preempted and lacks 4 tokens"),
            (9, 6, 11, "one was preempted, and has its prompt again, but lacks 4 tokens")):
        engine = make_engine(mine)
        seqs = add(engine, 7, 1) + add(engine, num_prompt, num_generated, num_kv)
        check_steps(engine, seqs, f"of two texts {what}", 1, 1, "a graph has one token for each "
                    "sequence" + (", and behind a prompt n texts are forked"
                                  if num_kv == 8 and not num_generated else ""))
    check_wanted(mine)
    check_limits(mine)


def check_wanted(mine):
    """Fewer than twice what the text still wants that wants most."""
    for wanted, ours in (((1, 1), 1), ((2, 1), 2), ((1, 5), 8), ((8, 8), 8), ((9, 2), 16),
                         ((1, 100), 16)):
        engine, most = make_engine(mine), max(wanted)
        seqs = [seq for left in wanted
                for seq in add(engine, 6, 20, params=SamplingParams(max_tokens=20 + left))]
        check_steps(engine, seqs, f"of two texts one wants {wanted[0]} more, the other {wanted[1]} "
                    "more", ours, min(16, 2 * most - 1), f"twice {most} or more, and half of the "
                    "steps or more are for nobody")


def check_limits(mine):
    """There must be places in the model, and blocks for all tokens."""
    for num_generated, ours in ((232, 16), (240, 8), (241, 8), (246, 2)):
        engine, params = make_engine(mine, 128), {"max_tokens": LONGEST - 8}
        seqs = add(engine, 8, 1) + add(engine, 8, num_generated, params=SamplingParams(**params))
        left = LONGEST - seqs[1].num_kv
        check_steps(engine, seqs, f"a text has {8 + num_generated} of {LONGEST} tokens", ours,
                    min(16, left), f"the model has places for the K and V of {left} more")
    # a has 8 tokens in 2 blocks, and b and its sibling 9 in 3 that they share: 16 more are 4 blocks
    # for each, and one of b's two copies its last
    for num_free, ours in ((13, 16), (12, 8), (4, 4)):
        engine = make_engine(mine, 5 + num_free)
        seqs = add(engine, 7, 2) + add(engine, 7, 3, num_texts=2)
        check_blocks(engine, seqs, ours)
    engine = make_engine(mine, 6)
    check_blocks(engine, add(engine, 7, 2) + add(engine, 7, 2), 4)   # one more block for each


def check_blocks(engine, seqs, ours):
    pool = engine.pool
    needed = [pool.num_needed([(seq, num) for seq in seqs]) for num in range(18)]
    most = max(num for num in range(17) if needed[num] <= pool.num_free)
    check_steps(engine, seqs, f"{len(seqs)} texts decode, and {pool.num_free} blocks are free",
                ours, most, f"for {most + 1} tokens of each {needed[most + 1]} blocks are "
                "needed, copies included")


# ---- task 2 --------------------------------------------------------------------------------------


class Device:
    """Plays run_ahead() of DecodeGraphs: checks what it is given, then hands out tokens."""

    def __init__(self, engine, seqs, tokens):
        self.engine, self.seqs, self.tokens, self.calls = engine, seqs, tokens, 0
        self.known = [[*seq.token_ids] for seq in seqs]
        self.options = nanopaged.sampling_options(seqs, len(tokens), torch.device("cpu"))

    def run_ahead(self, batch, cut, keys, *options):
        self.calls += 1
        pool, num_steps = self.engine.pool, len(self.tokens)
        expect(keys.shape == (len(self.seqs), num_steps), f"the keys have shape {[*keys.shape]}; "
               f"{len(self.seqs)} sequences and {num_steps} steps need sampling_options() of these")
        expect(torch.equal(keys, self.options[1]), "the keys are not those of the next tokens' "
               "positions")
        expect(batch.input_ids.tolist() == [known[-1] for known in self.known], "the batch must "
               "have the last token of each sequence: [(seq, 1), ...]")
        expect(not pool.copies, "blocks are still to be copied, and the device computes already: "
               "_move_blocks() comes first")
        for seq, table in zip(self.seqs, batch.block_tables.tolist(), strict=True):
            needed = -(-(seq.num_kv + num_steps) // 4)
            expect(len(seq.block_table) >= needed, f"{seq.num_kv} tokens are cached and "
                   f"{num_steps} steps follow, but the table has {len(seq.block_table)} blocks: "
                   f"append room for all steps first, {needed} blocks")
            expect(table[:needed] == seq.block_table[:needed], "the batch has other tables than "
                   "the sequences: make it when blocks have been appended")
            written = seq.block_table[seq.num_kv // 4:needed]
            expect(all(pool.ref_count[block_id] == 1 for block_id in written), "a block is written "
                   "that another sequence reads")
        return self.flights()

    def flights(self):
        for i, tokens in enumerate(self.tokens):
            padding = [0.0] * 3
            yield [[*map(float, tokens), *padding], [-0.5 - i] * len(tokens) + padding]


def run(mine, seqs_of, tokens, what):
    """Let a learner's engine run ahead -> (engine, sequences, groups that it returned)."""
    engine = make_engine(mine)
    seqs = seqs_of(engine)
    device = engine.graphs = Device(engine, seqs, tokens)
    with doing(what):
        moved = engine._run_ahead(seqs, len(tokens))
        moved = [*moved] if isinstance(moved, list | tuple | types.GeneratorType) else moved
    expect(device.calls == 1, f"{what}: graphs.run_ahead() was called {device.calls} times, it "
           "must be once")
    return engine, seqs, device, moved


@task(11, 2)
def test_task_2(mine):
    """_run_ahead(): blocks first, then one call, then each token as if it came by itself."""
    what = "texts of 8 and 10 tokens run 6 steps ahead"
    rows = [[10 + i, 20 + i] for i in range(6)]
    check(mine, lambda engine: add(engine, 7, 1) + add(engine, 7, 3), rows, what)
    check(mine, lambda engine: add(engine, 7, 1) + add(engine, 7, 3),
          [[10, 20], [11, END], [12, 30], [13, 31], [14, END]],
          "5 steps ahead, in the second of which a text ends")
    check(mine, lambda engine: add(engine, 7, 1, params=SamplingParams(max_tokens=3))
          + add(engine, 6, 2), [[10, 20], [11, 21], [12, 22], [13, 23]],
          "4 steps ahead, of which a text needs 2 to reach max_tokens")
    check(mine, lambda engine: add(engine, 6, 4, num_texts=2) + add(engine, 5, 1),
          [[10 + i, 20 + i, 30 + i] for i in range(4)],
          "4 steps ahead for two texts that share their last block, and a third")


def check(mine, seqs_of, rows, what):
    """Tokens, num_kv, sums, blocks and counters after one run."""
    engine, seqs, device, moved = run(mine, seqs_of, rows, what)
    kept_in_all = 0
    for row, (seq, known) in enumerate(zip(seqs, device.known, strict=True)):
        most = seq.num_prompt_tokens + seq.params.max_tokens - len(known)
        kept = [tokens[row] for tokens in rows][:most]
        kept = kept[:kept.index(END) + 1] if END in kept else kept
        kept_in_all += len(kept)
        found = seq.token_ids[len(known):]
        expect(found[:len(kept)] != kept or len(found) == len(kept), f"{what}: a text has {found} "
               f"behind what was known, it ends with {kept[-1]}: what is drawn behind the end is "
               "dropped")
        expect(found == kept, f"{what}: a text goes on with {found}, the device drew {kept}")
        expect(all(type(token_id) is int for token_id in found), f"{what}: a token is a float: the "
               "device hands out tokens and log-probabilities in one tensor")
        total = sum(-0.5 - i for i in range(len(kept)))
        expect(abs(seq.cumulative_logprob - total) < 1e-6, f"{what}: the log-probability of a text "
               f"is {seq.cumulative_logprob}, it must be {total}")
        ended = len(kept) == most or kept[-1] == END
        expect(bool(seq.finish_reason) == ended, f"{what}: finish_reason is {seq.finish_reason}")
        if not ended:
            expect(seq.num_kv == seq.num_tokens - 1, f"{what}: a text knows {seq.num_tokens} "
                   f"tokens and num_kv is {seq.num_kv}: all but the last have K and V now")
            heir = Sequence([*seq.token_ids, 1], seq.params, seq.cache_salt)
            num, most = len(engine.pool.find_prefix(heir)), seq.num_kv // 4
            expect(num == most, f"{what}: {most} blocks of a text are full, and the prefix cache "
                   f"finds {num}: publish() each token before num_kv counts it")
    groups = engine.scheduler.running
    expect(isinstance(moved, list) and len(moved) == len(groups) and {*moved} == {*groups},
           f"{what}: the result must be the {len(groups)} groups that got tokens, each once")
    counted = engine.counts["generated_tokens"]
    expect(counted == kept_in_all, f"{what}: generated_tokens is {counted}, the texts grew by "
           f"{kept_in_all}")
    check_books(engine.pool, seqs, what)
    engine.pool.free(*seqs)
    check_books(engine.pool, [], f"{what}, then all are freed")
