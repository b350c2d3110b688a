"""Section 6, the scheduler, with plain sequences: the test plays the engine, no model is run."""

import random

import pytest
from helpers import check, make_group, make_scheduler


class Play:
    """A scheduler, and an engine that computes nothing: each decode appends the token 1."""

    def __init__(self, num_blocks=16, block_size=4, max_num_seqs=256, budget=64):
        self.scheduler = make_scheduler(num_blocks, block_size, max_num_seqs, budget)
        self.pool, self.budget = self.scheduler.pool, budget
        self.groups = {}                               # request_id -> unfinished group
        self.ends = {}                                 # request_id -> num_tokens at which it ends
        self.num_steps = 0

    def add(self, num_tokens, max_tokens=1000):
        """Queue a prompt -> its only sequence."""
        request_id = len(self.ends)
        group = self.groups[request_id] = make_group(request_id, num_tokens)
        self.ends[request_id] = num_tokens + max_tokens
        self.scheduler.waiting.append(group)
        return group.seqs[0]

    def abort(self, request_id):
        """What Engine.abort does to the scheduler."""
        self.scheduler.finish(self.groups.pop(request_id))
        check(self.scheduler)

    def step(self):
        """Schedule and play the model -> {request_id: number of tokens computed}."""
        self.num_steps += 1
        assert self.num_steps < 2000, "a deadlock or a livelock"
        scheduled = self.scheduler.schedule()
        self._check_plan(scheduled)
        owner = {id(seq): i for i, group in self.groups.items() for seq in group.seqs}
        computed = {owner[id(seq)]: num_new for seq, num_new in scheduled}
        for seq, num_new in scheduled:
            request_id = owner[id(seq)]
            seq.num_kv += num_new
            if seq.num_kv == seq.num_tokens:
                seq.token_ids.append(1)
                if seq.num_tokens == self.ends[request_id]:
                    self.scheduler.finish(self.groups.pop(request_id))
        check(self.scheduler)
        return computed

    def _check_plan(self, scheduled):
        """What must hold for every plan, whatever the policy."""
        assert sum(num_new for _, num_new in scheduled) <= self.budget, "over the token budget"
        assert len({id(seq) for seq, _ in scheduled}) == len(scheduled), "one sequence twice"
        for seq, num_new in scheduled:
            known = seq.num_tokens - seq.num_kv
            assert 1 <= num_new <= known, f"{num_new} tokens to compute, {known} are known"
            slots = len(seq.block_table) * self.pool.block_size
            assert seq.num_kv + num_new <= slots, "tokens to compute without a slot"


def test_nothing_to_do():
    """An empty queue is an error, or never ends."""
    assert Play().step() == {}


def test_first_come_first_served():
    """Admission by length, or last come first served."""
    play = Play(budget=20)
    for num_tokens in (9, 3, 7, 5):
        play.add(num_tokens)
    assert play.step() == {0: 9, 1: 3, 2: 7, 3: 1}     # 20 in all: the rest of 3 comes next
    assert play.step() == {0: 1, 1: 1, 2: 1, 3: 4}


def test_nobody_jumps_the_queue():
    """A short request that would fit passes a long one that does not, which then starves."""
    play = Play(num_blocks=8)
    play.add(16, max_tokens=3)                         # 4 blocks, then 5
    play.add(20)                                       # 5 blocks: does not fit beside it
    play.add(1)
    assert [set(play.step()) for _ in range(3)] == [{0}, {0}, {0}]
    assert list(play.step()) == [1, 2], "the first has ended: the others come in their order"


def test_everyone_runs_who_fits():
    """Batches of one, or a batch that is filled only once it has drained (no iteration level)."""
    play = Play()
    play.add(8, max_tokens=2)
    assert set(play.step()) == {0}
    play.add(8)                                        # arrives while 0 runs
    assert play.step() == {0: 1, 1: 8}
    assert play.step() == {1: 1}


def test_the_latest_arrival_is_preempted_first():
    """The victim is the earliest, the largest or the one that needs the block."""
    play = Play(num_blocks=6)
    seqs = [play.add(8) for _ in range(3)]             # 2 blocks each: the pool is full
    assert set(play.step()) == {0, 1, 2}
    assert set(play.step()) == {0, 1}, "0 and 1 need a third block: 2 gives both of its own"
    assert (seqs[2].num_kv, seqs[2].block_table, seqs[2].num_tokens) == (0, [], 9)
    assert play.scheduler.counts["preemptions_recompute"] == 1
    assert [len(seq.block_table) for seq in seqs] == [3, 3, 0]


def test_the_latest_arrival_preempts_itself():
    """The last one takes a block from an earlier one when it is itself the victim."""
    play = Play(num_blocks=5)
    first, second = play.add(10), play.add(8)          # 3 + 2 blocks; 0 has two slots left
    assert play.step() == {0: 10, 1: 8}
    assert play.step() == {0: 1}
    assert (first.num_kv, second.num_kv, second.num_tokens) == (11, 0, 9)


def test_several_are_preempted_in_one_step():
    """One victim a step: the second of the early ones is then preempted by its own need."""
    play = Play(num_blocks=4)
    seqs = [play.add(4) for _ in range(4)]             # a block each
    assert set(play.step()) == {0, 1, 2, 3}
    assert play.step() == {0: 1, 1: 1}                 # 3 gives its block to 0, then 2 to 1
    assert [len(seq.block_table) for seq in seqs] == [2, 2, 0, 0]
    assert play.scheduler.counts["preemptions_recompute"] == 2


def test_a_preempted_request_goes_before_all_that_wait():
    """A victim at the end of the queue: those that arrived after it pass it."""
    play = Play(num_blocks=4)
    for num_tokens, max_tokens in ((8, 5), (7, 9), (1, 9)):
        play.add(num_tokens, max_tokens)
    assert set(play.step()) == {0, 1}                  # 2 waits
    play.step()
    assert set(play.step()) == {0}                     # 0 had needed a third block
    while 0 in play.groups:
        assert set(play.step()) == {0}
    assert list(play.step()) == [1, 2]


@pytest.mark.parametrize("budget, chunks", [(64, [11]), (4, [4, 4, 3])])
def test_a_preempted_request_resumes_whole(budget, chunks):
    """Resuming with num_kv of before, with the prompt only, or only up to one chunk."""
    play = Play(num_blocks=5, budget=budget)
    play.add(8, max_tokens=6)
    seq = play.add(7, max_tokens=20)
    while not play.scheduler.counts["preemptions_recompute"]:
        play.step()
        seq.token_ids[:] = range(seq.num_tokens)       # real texts have different tokens
    known = seq.num_tokens
    assert known > 7, "it was preempted before it had generated: the test shows nothing"
    while 0 in play.groups:
        assert 1 not in play.step()
    assert seq.token_ids == list(range(known)), "tokens were lost"
    seq.token_ids += range(known, 11)                  # as if generated, for one length of chunks
    for chunk in chunks:
        assert play.step() == {1: chunk}
    assert play.step() == {1: 1}


def test_a_long_prompt_is_computed_in_chunks():
    """PEERS bug 6: a chunk planned with the full length reads K and V not yet written."""
    play = Play(num_blocks=16, budget=8)
    seq = play.add(20, max_tokens=2)
    for computed, num_kv, blocks in ((8, 8, 2), (8, 16, 4), (4, 20, 5)):
        assert (seq.num_tokens, play.step()) == (20, {0: computed})
        assert (seq.num_kv, len(seq.block_table)) == (num_kv, blocks)
    assert (seq.num_tokens, play.step()) == (21, {0: 1})
    assert not play.groups


def test_decodes_run_beside_a_long_prefill():
    """PEERS bug 7: no mixed batches, so that who has begun waits for who has come."""
    play = Play(num_blocks=64, budget=8)
    play.add(3)
    play.add(4)
    play.step()
    play.add(100)
    for _ in range(16):
        assert play.step() == {0: 1, 1: 1, 2: 6}       # 16 steps x 6 tokens
    assert play.step() == {0: 1, 1: 1, 2: 4}


def test_the_budget_left_over_goes_to_the_next_prompt():
    """One prefill a step, whatever the budget."""
    play = Play(budget=10)
    for _ in range(3):
        play.add(4)
    assert play.step() == {0: 4, 1: 4, 2: 2}
    assert play.step() == {0: 1, 1: 1, 2: 2}


def test_watermark():
    """Without blocks kept back, who was just admitted is preempted by the next decode.

    1% of the pool, as in the paper's code: 2 of these 200 blocks.
    """
    for num_blocks, admitted in ((188, True), (189, False)):
        play = Play(num_blocks=200, budget=4096)
        play.add(38)                                   # 10 blocks, and room for two tokens more
        play.step()
        play.add(4 * num_blocks)
        assert (1 in play.step()) == admitted, f"{num_blocks} + 10 of 200 blocks"


def test_the_watermark_does_not_lock_out_the_largest_request():
    """A request that takes the whole pool, and could, waits for ever for the watermark."""
    play = Play(num_blocks=200, budget=4096)
    play.add(800, max_tokens=1)
    assert play.step() == {0: 800}


def test_blocks_are_taken_on_demand():
    """PEERS bug 11: reserving prompt + max output, which is what the paper argues against.

    Two requests that may grow to 24 tokens, 6 blocks, in a pool of 8: both run from the first step.
    """
    play = Play(num_blocks=8)
    a, b = play.add(4, max_tokens=20), play.add(4, max_tokens=20)
    assert play.step() == {0: 4, 1: 4}
    assert (len(a.block_table), len(b.block_table)) == (1, 1)
    for _ in range(12):
        assert set(play.step()) == {0, 1}
    for _ in range(100):
        play.step()
    assert not play.groups


def test_only_the_blocks_of_the_chunk_are_taken():
    """A long prompt takes all its blocks with its first chunk: reservation by another name."""
    play = Play(num_blocks=32, budget=4)
    seq = play.add(100)
    for held in (1, 2, 3):
        play.step()
        assert len(seq.block_table) == held


def test_max_num_seqs():
    """More sequences than the user allowed, or one fewer."""
    play = Play(max_num_seqs=3)
    for _ in range(5):
        play.add(2, max_tokens=3)
    assert [list(play.step()) for _ in range(5)] == [[0, 1, 2]] * 3 + [[3, 4]] * 2


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_more_requests_than_the_budget_has_tokens(budget):
    """A budget below the number of requests: overdrawn, or handed round so that none ends."""
    play = Play(num_blocks=64, budget=budget)
    for _ in range(8):
        play.add(3, max_tokens=4)
    for step in range(8 * 7 + 1):                      # at worst one after the other
        if not play.groups:
            break
        assert min(play.groups) in play.step(), f"step {step}: the earliest does not move"
    assert not play.groups


def test_abort_of_a_waiting_request():
    """The queue keeps a dead request, or loses its neighbour."""
    play = Play(num_blocks=4)
    for num_tokens in (8, 12, 4):
        play.add(num_tokens)
    assert set(play.step()) == {0}
    play.abort(1)
    assert play.step() == {0: 1, 2: 4}


def test_abort_of_a_running_request():
    """Its blocks stay held, and who waits for them waits for ever."""
    play = Play(num_blocks=4)
    play.add(15)
    play.add(16)
    assert set(play.step()) == {0}
    play.abort(0)
    assert play.pool.num_free == 4
    assert play.step() == {1: 16}


def test_abort_of_a_preempted_request():
    """A preempted request is looked for among the running ones, or resumes after its end."""
    play = Play(num_blocks=4)
    play.add(8)
    play.add(8)
    play.step()
    assert set(play.step()) == {0}
    play.abort(1)
    for _ in range(7):
        assert set(play.step()) == {0}
    play.abort(0)
    assert play.pool.num_free == 4 and play.step() == {}


def random_play(rng):
    """A tiny pool, and 12 requests that each fit in it alone -> (play, [(prompt, output), ...])."""
    block_size, slots = rng.choice([1, 2, 4, 16]), rng.randint(6, 48)
    play = Play(-(-slots // block_size), block_size, rng.choice([1, 2, 5, 256]),
                rng.choice([1, 2, 3, 7, 64]))
    prompts = [rng.randint(1, rng.choice([3, slots])) for _ in range(12)]
    return play, [(n, rng.randint(1, slots - n + 1)) for n in prompts]   # the last needs no slot


@pytest.mark.parametrize("seed", range(60))
def test_random_workloads_end(seed):
    """Deadlock: all wait for blocks that others hold. Livelock: they preempt each other for ever.

    The earliest request moves in every step, so the steps are bounded by all tokens there are.
    """
    rng = random.Random(seed)
    play, sizes = random_play(rng)
    bound, aborted = sum(prompt + output for prompt, output in sizes) + 100, 0
    for step in range(bound):
        while sizes and rng.random() < 0.3:
            play.add(*sizes.pop())
        if play.groups and rng.random() < 0.02:
            play.abort(rng.choice(list(play.groups)))
            aborted += 1
        earliest = min(play.groups, default=None)
        computed = play.step()
        assert earliest is None or earliest in computed, f"seed {seed}, step {step}: no progress"
        assert list(computed) == sorted(computed), f"seed {seed}, step {step}: not in order"
        if not play.groups and not sizes:
            break
    assert not play.groups and not sizes, f"seed {seed}: not done after {bound} steps"
    assert play.pool.num_free == play.pool.num_blocks, f"seed {seed}: blocks leaked"


def test_random_workloads_do_preempt():
    """The test above with pools so large that it shows nothing."""
    preemptions = 0
    for seed in range(60):
        play, sizes = random_play(random.Random(seed))
        for size in sizes:
            play.add(*size)
        while play.groups:
            play.step()
        preemptions += play.scheduler.counts["preemptions_recompute"]
    assert preemptions > 100
