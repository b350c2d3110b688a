"""What the graders of the scheduler's labs have in common: requests, and steps without a model."""

from labs import doing, expect
from pool_checks import check_books

import nanopaged
from nanopaged import SamplingParams, Sequence, SequenceGroup


def make_group(request_id, num_tokens, max_tokens=8, n=1):
    """A request that waits. No two have a token in common, so none finds another's blocks."""
    tokens = range(1000 * request_id, 1000 * request_id + num_tokens)
    return SequenceGroup(request_id, None, [Sequence(tokens, SamplingParams(
        max_tokens=max_tokens, n=n))])


def make_scheduler(mine, num_blocks, budget=64, max_num_seqs=64, swap_blocks=0,
                   preemption="recompute"):
    """A learner's scheduler, over pools with blocks of 4."""
    pool = getattr(mine, "BlockPool", nanopaged.BlockPool)
    return mine.Scheduler(pool(num_blocks, 4), pool(swap_blocks, 4), preemption, max_num_seqs,
                          budget)


def let_run(scheduler, group, num_kv):
    """Let a group run whose sequence has `num_kv` tokens in the cache."""
    seq, = group.seqs
    scheduler.pool.append(seq, num_kv)
    seq.num_kv = num_kv
    scheduler.running.append(group)


def fork(scheduler, group):
    """Let a group that runs have one more text, which shares all that is cached."""
    child = group.seqs[0].fork()
    scheduler.pool.fork(group.seqs[0], child)
    group.seqs.append(child)


def letters(groups):
    return " ".join(chr(ord("A") + group.request_id) for group in groups) or "nobody"


class Server:
    """Steps of the engine without its model; each plan is looked at before it is carried out."""

    def __init__(self, scheduler, *groups):
        self.scheduler, self.groups = scheduler, list(groups)
        scheduler.waiting.extend(groups)

    def step(self, when):
        """-> [(letter of a request, tokens that it computes), ...]."""
        scheduler, left = self.scheduler, self.scheduler.max_num_batched_tokens
        with doing(when):
            plan = scheduler.schedule()
        expect(isinstance(plan, list), f"{when}: schedule() returned {type(plan).__name__}, it "
               "must be a list of (sequence, number of tokens)")
        owner = {seq: group for group in scheduler.running for seq in group.seqs}
        named = [(letters([owner[seq]]) if seq in owner else "?", num) for seq, num in plan]
        expect(all(seq in owner for seq, _ in plan), f"{when}: somebody who does not run, or was "
               "preempted in this step, is in the plan")
        expect(len({seq for seq, _ in plan}) == len(plan), f"{when}: {named} has one twice")
        expect(sum(num for _, num in plan) <= left, f"{when}: {named} are more than the budget of "
               f"{left} tokens: lower the budget by what each one gets")
        for (letter, num), (seq, _) in zip(named, plan, strict=True):
            lacking = seq.num_tokens - seq.num_kv
            expect(0 < num <= lacking, f"{when}: {letter} lacks {lacking} tokens and gets {num}")
            expect(len(seq.block_table) == -(-(seq.num_kv + num) // 4), f"{when}: {letter} has "
                   f"{seq.num_kv} tokens cached and computes {num}, in blocks of 4 but with a "
                   f"table of {len(seq.block_table)}: pool.append() makes room for these, not for "
                   "more")
        check_books(scheduler.pool, list(owner), when)
        swapped = [seq for group in scheduler.waiting for seq in group.seqs]
        check_books(scheduler.swap_pool, swapped, f"{when}, in the CPU's pool")
        self.compute(plan)
        return named

    def check_order(self, when):
        running, waiting = self.scheduler.running, self.scheduler.waiting
        order = [group.request_id for group in [*running, *waiting]]
        expect(order == sorted(order), f"{when}: the order must be that of arrival, first of those "
               f"who run, then of those who wait; but {letters(running)} run and "
               f"{letters(waiting)} wait")

    def compute(self, plan):
        """What follows a plan: K and V, for groups that have all of them a token, the end."""
        self.scheduler.pool.copies.clear()
        self.scheduler.pool.arrivals.clear()
        self.scheduler.swap_pool.arrivals.clear()
        for seq, num_new in plan:
            seq.num_kv += num_new
        for group in [*self.scheduler.running]:
            if all(seq.num_kv == seq.num_tokens for seq in group.unfinished()):
                for seq in group.unfinished():
                    seq.token_ids.append(group.request_id)
                    if seq.num_tokens == seq.num_prompt_tokens + seq.params.max_tokens:
                        seq.finish_reason = "length"
                        self.scheduler.pool.free(seq)
                while len(group.seqs) < group.width:
                    fork(self.scheduler, group)
            if not group.unfinished():
                self.scheduler.finish(group)

    def run(self, what, max_steps=400):
        """Until all have ended."""
        for step in range(1, max_steps + 1):
            if not (self.scheduler.running or self.scheduler.waiting):
                return
            self.step(f"{what}, step {step}")
            self.check_order(f"{what}, step {step}")
        expect(False, f"{what}: after {max_steps} steps {letters(self.scheduler.running)} run and "
               f"{letters(self.scheduler.waiting)} wait: nobody gets on")


def check_random_requests(mine, rng, what, **settings):
    """Requests of all kinds in a small pool: everybody ends, in the order that they deserve."""
    groups = [make_group(i, rng.randint(1, 20), rng.randint(1, 12), rng.choice([1, 1, 2]))
              for i in range(12)]
    server = Server(make_scheduler(mine, rng.randint(16, 24), rng.choice([4, 8, 64]), 4,
                                   **settings), *groups)
    server.run(what)
    expect(server.scheduler.pool.num_free == server.scheduler.pool.num_blocks,
           f"{what}: all have ended, and blocks are still held")
