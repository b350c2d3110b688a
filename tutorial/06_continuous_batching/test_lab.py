"""Lab 6's grader: who computes how many tokens in a step.

    python tutorial/grade.py --lab 6
    python -m pytest tutorial/06_continuous_batching/test_lab.py -k task_1

Requests are called A, B, C in the order of their arrival; blocks have 4 slots.
"""

import random

from labs import doing, expect, task
from scheduler_checks import (
    Server,
    check_random_requests,
    fork,
    let_run,
    letters,
    make_group,
    make_scheduler,
)


def plan_of(scheduler, group, budget, what):
    """_plan() -> [(number of the sequence within its group, tokens), ...]."""
    with doing(what):
        plan = scheduler._plan(group, budget)
    expect(isinstance(plan, list) and all(seq in group.seqs for seq, _ in plan),
           f"{what}: _plan() must return a list of (sequence of the group, number of tokens)")
    return [(group.seqs.index(seq), num_new) for seq, num_new in plan]


@task(6, 1)
def test_task_1(mine):
    """_plan() gives a running group what it lacks, as far as the budget lasts."""
    for num_kv, budget, tokens, hint in (
            (0, 64, 7, "it lacks all of them"),
            (0, 4, 4, "no more than the budget, the rest later"),
            (4, 64, 3, "count from num_kv")):
        scheduler, group = make_scheduler(mine, 32), make_group(0, 7)
        what = f"7 tokens known, {num_kv} cached, a budget of {budget}"
        let_run(scheduler, group, num_kv)
        plan = plan_of(scheduler, group, budget, what)
        expect(plan == [(0, tokens)], f"{what}: {tokens} must be computed, {hint}; the plan is "
               f"{[num for _, num in plan]}")
    scheduler, group = make_scheduler(mine, 32), make_group(0, 7, n=3)
    let_run(scheduler, group, 7)
    for _ in range(2):
        fork(scheduler, group)
    for seq in group.seqs:
        seq.token_ids.append(7)
    what = "a group of 3 sequences, each of which lacks its last token"
    plan = plan_of(scheduler, group, 64, what)
    expect(plan == [(0, 1), (1, 1), (2, 1)], f"{what}: each computes 1; the plan is {plan}")
    plan = plan_of(scheduler, group, 2, what)
    expect(plan == [], f"{what}, a budget of 2: all get their next token together, or none; the "
           f"plan is {plan}")
    group.seqs[1].finish_reason = "stop"
    plan = plan_of(scheduler, group, 64, f"{what}; the second has ended")
    expect(plan == [(0, 1), (2, 1)], f"{what}; the second has ended: leave it out; the plan is "
           f"{plan}")
    check_recompute(mine)


def check_recompute(mine):
    """A group of several sequences that were preempted by recompute: all K and V are gone."""
    scheduler, group = make_scheduler(mine, 32), make_group(0, 7, n=2)
    let_run(scheduler, group, 7)
    fork(scheduler, group)
    for seq in group.seqs:
        seq.token_ids += [7, 8]
    scheduler.pool.free(*group.seqs)
    what = "2 sequences of 9 tokens, none cached, a budget of 12"
    for _ in range(8):
        plan = plan_of(scheduler, group, 12, what)
        expect(plan and sum(num for _, num in plan) <= 12, f"{what}: the plan is {plan}: something "
               "must be computed, and 12 tokens at most")
        for number, num_new in plan:
            seq = group.seqs[number]
            scheduler.pool.append(seq, num_new)
            seq.num_kv += num_new
        done = [seq.num_kv == seq.num_tokens for seq in group.seqs]
        expect(any(done) == all(done), f"{what}: one has all its K and V, and would be sampled, "
               "while the other lacks some: stop before the last token of each")
        if all(done):
            return
    expect(False, f"{what}: after 8 steps they still lack tokens")


def admit(mine, what, allowed, group, *running, num_blocks=8, max_num_seqs=64, why=""):
    """_admit(group) beside `running`, which are (group, tokens in the cache)."""
    scheduler = make_scheduler(mine, num_blocks, max_num_seqs=max_num_seqs)
    for other, num_kv in running:
        let_run(scheduler, other, num_kv)
    scheduler.waiting.append(group)
    with doing(what):
        result = scheduler._admit(group)
    expect(bool(result) == allowed, f"{what}: _admit() returned {result}, it must be {allowed}"
           + (f": {why}" if why else ""))
    others = [other for other, _ in running]
    if allowed:
        expect(scheduler.running == [*others, group] and not scheduler.waiting,
               f"{what}: then {letters([*others, group])} run and nobody waits, but "
               f"{letters(scheduler.running)} run and {letters(scheduler.waiting)} wait: _admit() "
               "moves the group from waiting to running")
    else:
        expect(scheduler.running == others and [*scheduler.waiting] == [group],
               f"{what}: it was not let in, so running and waiting must stay as they were")


@task(6, 2)
def test_task_2(mine):
    """_admit() lets the first that waits run, if there is room for all its tokens."""
    admit(mine, "7 tokens, a pool of 8 blocks, nobody runs", True, make_group(0, 7))
    admit(mine, "A holds 4 of 8 blocks, B needs 4", True, make_group(1, 16),
          (make_group(0, 17), 16), why="that is enough")
    admit(mine, "A holds 4 of 8 blocks, B needs 5", False, make_group(1, 17),
          (make_group(0, 17), 16), why="its whole prompt must fit")
    admit(mine, "A holds 100 of 200 blocks, B needs 98", True, make_group(1, 392),
          (make_group(0, 401), 400), num_blocks=200, why="then 1 % is still free")
    admit(mine, "A holds 100 of 200 blocks, B needs 99", False, make_group(1, 396),
          (make_group(0, 401), 400), num_blocks=200,
          why="1 % of the pool, 2 blocks, must stay free for the next tokens of those who run")
    admit(mine, "A needs all 200 blocks, nobody runs", True, make_group(0, 800), num_blocks=200,
          why="alone it always fits; else it would wait for ever")
    two = [(make_group(0, 4), 3), (make_group(1, 4), 3)]
    admit(mine, "2 run, max_num_seqs is 3, C is one sequence", True, make_group(2, 4), *two,
          max_num_seqs=3, why="a third may run")
    two = [(make_group(0, 4), 3), (make_group(1, 4), 3)]
    admit(mine, "2 run, max_num_seqs is 3, C will be two sequences", False, make_group(2, 4, n=2),
          *two, max_num_seqs=3, why="count the sequences that a group grows to, its width")
    several = make_group(1, 9, n=2)
    several.seqs.append(several.seqs[0].fork())
    admit(mine, "5 of 8 blocks are free, B has two sequences that need 3 each", False, several,
          (make_group(0, 13), 12), why="sum over its sequences")
    check_swapped(mine)


def check_swapped(mine):
    """Who was swapped out gets its blocks back."""
    for num_blocks, allowed in ((6, True), (5, False)):
        scheduler = make_scheduler(mine, num_blocks, swap_blocks=4)
        let_run(scheduler, make_group(0, 12), 12)
        what = f"B is swapped out, needs 3 blocks, {num_blocks - 3} are free"
        group = make_group(1, 9)
        seq, = group.seqs
        scheduler.swap_pool.append(seq, 8)
        seq.num_kv = 8
        scheduler.waiting.append(group)
        with doing(what):
            result = scheduler._admit(group)
        expect(bool(result) == allowed, f"{what}: _admit() returned {result}")
        expect(seq.num_kv == 8 and len(seq.block_table) == 2, f"{what}: its K and V are lost")
        in_use = scheduler.swap_pool.num_blocks - scheduler.swap_pool.num_free
        expect(in_use == (0 if allowed else 2), f"{what}: it holds {in_use} of the CPU's blocks: "
               + ("who comes back takes its blocks along, pool.take_over(group, swap_pool)"
                  if allowed else "it was not let in, so they stay there"))


@task(6, 3)
def test_task_3(mine):
    """schedule() serves those who run, in order, and then newcomers, under the budget."""
    server = Server(make_scheduler(mine, 32))
    plan = server.step("nobody is there")
    expect(plan == [], f"nobody is there, the plan is {plan}")
    server = Server(make_scheduler(mine, 32), make_group(0, 7), make_group(1, 3), make_group(2, 5))
    plan = server.step("three prompts of 7, 3 and 5 tokens")
    expect(plan == [("A", 7), ("B", 3), ("C", 5)], "three prompts of 7, 3 and 5 tokens, a budget "
           f"of 64: all begin at once; the plan is {plan}")
    server = Server(make_scheduler(mine, 32, budget=4), make_group(0, 7), make_group(1, 3))
    for step, expected in enumerate(([("A", 4)], [("A", 3), ("B", 1)], [("A", 1), ("B", 2)],
                                     [("A", 1), ("B", 1)]), 1):
        what = f"prompts of 7 and 3 tokens, a budget of 4, step {step}"
        plan = server.step(what)
        expect(plan == expected, f"{what}: the plan is {plan}, it must be {expected}: those who "
               "run go first, and newcomers get what is left")
    scheduler = make_scheduler(mine, 8)
    let_run(scheduler, make_group(0, 24), 23)
    server = Server(scheduler, make_group(1, 12), make_group(2, 2))
    plan = server.step("A holds 6 of 8 blocks; B needs 3, and C behind it 1")
    expect(plan == [("A", 1)], "A holds 6 of 8 blocks; B needs 3, and C behind it 1: C must not "
           f"jump the queue; the plan is {plan}")
    check_preemption(mine)
    for seed in range(12):
        check_random_requests(mine, random.Random(seed), f"random requests {seed}")


def check_preemption(mine):
    """No block is free: _preempt(), which is given, must be called for the right group."""
    for what, num_kv, num_blocks, expected, waiting, why in (
            ("A needs a third block and none is free", (8, 4), 3, [("A", 1)], "B C",
             "B, the latest, must be preempted"),
            ("B needs a second block and none is free", (7, 4), 3, [("A", 1)], "B C",
             "B is the latest itself; A came before it"),
            ("A needs a block, and B and C run", (8, 3, 2), 4, [("A", 1), ("B", 1)], "C D",
             "C is the latest, and its block is enough")):
        scheduler = make_scheduler(mine, num_blocks)
        for i, num in enumerate(num_kv):
            let_run(scheduler, make_group(i, num + 1), num)
        newcomer = make_group(len(num_kv), 1)
        scheduler.max_num_seqs = len(num_kv)
        plan = Server(scheduler, newcomer).step(what)
        expect(plan == expected, f"{what}: {why}; the plan is {plan}, it must be {expected}")
        expect(letters(scheduler.waiting) == waiting, f"{what}: then {waiting} wait, in this "
               f"order; it is {letters(scheduler.waiting)}")
