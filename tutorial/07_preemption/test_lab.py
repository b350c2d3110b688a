"""Lab 7's grader: who is preempted loses its blocks, and no token.

    python tutorial/grade.py --lab 7
    python -m pytest tutorial/07_preemption/test_lab.py -k task_1

Requests are called A, B, C in the order of their arrival; blocks have 4 slots.
"""

import random

from labs import doing, expect, task
from pool_checks import check_books
from scheduler_checks import (
    check_random_requests,
    fork,
    let_run,
    letters,
    make_group,
    make_scheduler,
)


def preempted(mine, what, **settings):
    """A with 2 blocks and B with 3 run, C waits, and B is preempted -> scheduler, B."""
    scheduler = make_scheduler(mine, 8, **settings)
    groups = [make_group(0, 7), make_group(1, 11), make_group(2, 5)]
    for group in groups[:2]:
        let_run(scheduler, group, group.seqs[0].num_tokens - 1)
    scheduler.waiting.append(groups[2])
    preempt(scheduler, what)
    expect(scheduler.running == groups[:1], f"{what}: A must go on running, but "
           f"{letters(scheduler.running)} run: schedule() has taken B out of there")
    expect([*scheduler.waiting] == groups[1:], f"{what}: B came before C, so B C wait, in this "
           f"order; it is {letters(scheduler.waiting)}")
    return scheduler, groups[1]


def preempt(scheduler, what):
    group = scheduler.running.pop()
    tokens = [[*seq.token_ids] for seq in group.seqs]
    with doing(what):
        scheduler._preempt(group)
    expect([seq.token_ids for seq in group.seqs] == tokens, f"{what}: its tokens have changed; "
           "they must stay, as K and V are computed from them again")


def check_recomputed(scheduler, group, what, held=2, why=""):
    """All K and V are given up: tables empty, num_kv 0, blocks free."""
    why = why and f": {why}"
    for number, seq in enumerate(group.seqs):
        who = "another of its sequences" if number else "it"
        expect(seq.block_table == [], f"{what}: {who} still holds blocks {seq.block_table}{why}")
        expect(seq.num_kv == 0, f"{what}: num_kv is {seq.num_kv}, but its K and V are gone{why}")
    in_use = scheduler.pool.num_blocks - scheduler.pool.num_free
    expect(in_use == held, f"{what}: {in_use} blocks are still held, {held} would be right{why}")
    in_use = scheduler.swap_pool.num_blocks - scheduler.swap_pool.num_free
    expect(in_use == 0, f"{what}: {in_use} blocks of the CPU's pool are held{why}")


@task(7, 1)
def test_task_1(mine):
    """_preempt() by recompute gives all blocks back, and puts the group at the queue's head."""
    what = "B is preempted by recompute"
    scheduler, group = preempted(mine, what)
    check_recomputed(scheduler, group, what)
    what = "a group of 2 sequences is preempted by recompute"
    scheduler, group = make_scheduler(mine, 8), make_group(0, 7, n=2)
    let_run(scheduler, group, 7)
    fork(scheduler, group)
    preempt(scheduler, what)
    check_recomputed(scheduler, group, what, held=0)
    for seed in range(6):
        check_random_requests(mine, random.Random(seed), f"random requests {seed}, by recompute")


def two_that_share(source):
    """Two sequences of 10 and 11 tokens in blocks 0 1 2 and 0 1 3 of a pool."""
    group = make_group(0, 11, n=2)
    seq = group.seqs[0]
    source.append(seq, 8)
    seq.num_kv = 8
    child = seq.fork()
    source.fork(seq, child)
    group.seqs.append(child)
    for one, num_new in zip(group.seqs, (2, 3), strict=True):
        source.append(one, num_new)
        one.num_kv += num_new
    return group


@task(7, 2)
def test_task_2(mine):
    """take_over() moves each block once, tells the engine which, and forgets nothing."""
    source, target = mine.BlockPool(8, 4), mine.BlockPool(8, 4)
    other = make_group(1, 8).seqs[0]
    target.append(other, 8)                        # so that ids here are other ones than there
    group = two_that_share(source)
    before = [[*seq.block_table] for seq in group.seqs]
    what = f"two sequences with tables {before[0]} and {before[1]} move to another pool"
    with doing(what):
        target.take_over(group, source)
    tables = [seq.block_table for seq in group.seqs]
    held = target.num_blocks - target.num_free - 2
    expect([len(table) for table in tables] == [3, 3], f"{what}: their tables are {tables}, they "
           "must be as long as before")
    expect(held != 6, f"{what}: 6 blocks were taken: what they share is moved once, and shared "
           "again there")
    expect([seq.num_kv for seq in group.seqs] == [10, 11], f"{what}: num_kv is "
           f"{[seq.num_kv for seq in group.seqs]}, it must be [10, 11] as before: K and V are "
           "moved, not lost")
    expect(source.num_free == source.num_blocks, f"{what}: {source.num_blocks - source.num_free} "
           "blocks are still held where they came from")
    check_books(target, [*group.seqs, other], what)
    check_arrivals(source, target, before, tables, what)
    with doing("one of the two is freed after the move"):
        target.free(group.seqs[0])
    check_books(target, [group.seqs[1], other], "one of the two is freed after the move")
    target.free(group.seqs[1])
    check_books(target, [other], "both are freed after the move")
    first = [*target.arrivals]
    with doing("a second group moves in the same step"):
        target.take_over(two_that_share(source), source)
    expect(target.arrivals[:len(first)] == first and len(target.arrivals) > len(first),
           "a second group moves in the same step: the arrivals of the first are forgotten")


def check_arrivals(source, target, before, tables, what):
    """The pairs say how to get from the old tables to the new ones."""
    expect(not source.arrivals, f"{what}: the arrivals are the new pool's, not the old one's")
    pairs = list(target.arrivals)
    moves = {pair for old, new in zip(before, tables, strict=True)
             for pair in zip(old, new, strict=True)}
    hint = (": (from, to), it is the wrong way round" if {*pairs} == {(b, a) for a, b in moves} else
            ": the engine is not told what to copy" if not pairs else "")
    expect({*pairs} == moves and len(pairs) == len(moves), f"{what}: their tables are now "
           f"{tables}, so arrivals must be {sorted(moves)}, in any order; it is {pairs}{hint}")


@task(7, 3)
def test_task_3(mine):
    """_preempt() swaps if it shall and all of the group finds room, else it is recompute."""
    what = "B has 3 blocks, the CPU's pool {}, preemption is {}"
    for room, mode, swaps, why in (
            (8, "swap", True, "it must be swapped out"),
            (3, "swap", True, "that is enough: it must be swapped out"),
            (2, "swap", False, "there is no room for all of it, so recompute"),
            (8, "auto", False, "a group of one sequence is recomputed"),
            (8, "recompute", False, "nothing is swapped")):
        case = what.format(room, mode)
        scheduler, group = preempted(mine, case, swap_blocks=room, preemption=mode)
        if swaps:
            check_swapped(scheduler, group, case, 3, why)
        else:
            check_recomputed(scheduler, group, case, why=why)
    for room, mode, swaps, why in (
            (4, "swap", True, "a block that both hold is moved once, so there is room"),
            (4, "auto", True, "a group of several sequences is swapped"),
            (3, "auto", False, "there is no room for all of it, so recompute")):
        case = f"2 sequences in 4 blocks, of which they share 2, the CPU's pool {room}, {mode}"
        scheduler = make_scheduler(mine, 8, swap_blocks=room, preemption=mode)
        group = two_that_share(scheduler.pool)
        scheduler.running.append(group)
        preempt(scheduler, case)
        if swaps:
            check_swapped(scheduler, group, case, 4, why)
        else:
            check_recomputed(scheduler, group, case, held=0, why=why)
    for seed in range(12):
        for mode in ("swap", "auto"):
            check_random_requests(mine, random.Random(seed), f"random requests {seed}, {mode}",
                                  swap_blocks=seed, preemption=mode)


def check_swapped(scheduler, group, what, num_blocks, why):
    """All K and V are in the CPU's pool."""
    held = scheduler.swap_pool.num_blocks - scheduler.swap_pool.num_free
    expect(held != 0, f"{what}: {why}; nothing is in the CPU's pool")
    expect(held == num_blocks, f"{what}: {why}; {held} blocks of the CPU's pool are held, "
           f"{num_blocks} would be right")
    expect(all(seq.num_kv for seq in group.seqs), f"{what}: num_kv is 0, but K and V are not lost")
    seqs = [seq for other in scheduler.running for seq in other.seqs]
    check_books(scheduler.pool, seqs, what)
    check_books(scheduler.swap_pool, group.seqs, what)
