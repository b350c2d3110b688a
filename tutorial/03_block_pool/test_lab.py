"""Lab 3's grader: blocks are handed out one by one, counted, and come back.

    python tutorial/grade.py --lab 3
    python -m pytest tutorial/03_block_pool/test_lab.py -k task_1

It looks at what the outside sees: block tables, num_kv, num_free and what append() raises.
"""

import random

from labs import doing, expect, task
from pool_checks import check_books, make_text

from nanopaged import OutOfBlocks


def grow(pool, seq, num_new):
    """A step: room is made, then K and V of `num_new` tokens are computed."""
    pool.append(seq, num_new)
    expect(seq.num_kv + num_new <= len(seq.block_table) * pool.block_size,
           f"after append(seq, {num_new}) a sequence of {seq.num_kv} cached tokens has only "
           f"{len(seq.block_table)} blocks of {pool.block_size}")
    seq.num_kv += num_new


@task(3, 1)
def test_task_1(mine):
    """hold() adds rows to a table, and the pool knows that they are held."""
    pool, a, b = mine.BlockPool(8, 4), make_text(9), make_text(9)
    with doing("hold(a, [7, 1], 7)"):
        pool.hold(a, [7, 1], 7)
    expect(a.block_table == [7, 1], f"after hold(a, [7, 1], 7) the table is {a.block_table}")
    expect(a.num_kv == 7, f"after hold(a, [7, 1], 7) num_kv is {a.num_kv}: hold() also notes how "
           "many tokens are in the cache")
    expect(pool.num_free != 8, "blocks 7 and 1 are held, but still count as free: the next "
           "append() would hand them out again")
    check_books(pool, [a], "after hold(a, [7, 1], 7)")
    with doing("hold(a, [3], 9), of a sequence that has blocks [7, 1]"):
        pool.hold(a, [3], 9)
    expect(a.block_table != [3], "hold() replaced the block table: new blocks go to its end")
    expect(a.block_table == [7, 1, 3], f"after [7, 1] and then [3] the table is {a.block_table}")
    with doing("a second sequence holds the same blocks"):
        pool.hold(b, a.block_table, 9)
    expect(b.block_table is not a.block_table,
           "the tables of two sequences are one list: what one appends, the other has as well")
    check_books(pool, [a, b], "after two sequences hold the same three blocks")
    given = [0, 2]
    with doing("hold() twice"):
        pool.hold(c := make_text(12), given, 8)
        pool.hold(c, [4], 9)
    expect(given == [0, 2], "the list that was given to hold() became the table itself: it changes "
           "when the table grows")


@task(3, 2)
def test_task_2(mine):
    """num_needed() counts table rows from num_kv, and changes nothing."""
    pool = mine.BlockPool(8, 4)
    for num_new, blocks in ((1, 1), (3, 1), (4, 1), (5, 2), (7, 2), (8, 2), (9, 3)):
        needed = pool.num_needed([(make_text(9), num_new)])
        expect(needed == blocks, f"{num_new} tokens of an empty sequence need {blocks} blocks of "
               f"4, but num_needed is {needed}" + ": whole blocks, so round up" * (needed < blocks)
               + ": full blocks need no further one" * (needed > blocks and num_new % 4 == 0))
    a = make_text(7)
    pool.hold(a, [7, 1], 7)
    a.token_ids.append(7)                          # sampled: known, but not in the cache
    needed = pool.num_needed([(a, 1)])
    expect(needed == 0, f"7 of 8 tokens are cached in 2 blocks of 4 and the 8th has a slot there, "
           f"but num_needed is {needed}: count from num_kv (7), not from num_tokens (8)")
    a.num_kv = 8
    a.token_ids.append(8)
    needed = pool.num_needed([(a, 1)])
    expect(needed == 1, "8 tokens are cached and fill 2 blocks of 4, so the 9th needs a third, but "
           f"num_needed is {needed}")
    needed = pool.num_needed([(a, 1), (make_text(5), 5), (make_text(3), 3)])
    expect(needed == 4, f"a plan of three sequences needs 1 + 2 + 1 blocks, but num_needed is "
           f"{needed}: sum over the plan")
    b = make_text(8)
    pool.hold(b, [2, 3], 1)                        # a step was interrupted: it has one to spare
    needed = pool.num_needed([(b, 1), (a, 1)])
    expect(needed == 1, "a sequence that holds more blocks than it needs takes none, and gives "
           f"none to the others: 0 + 1 blocks, but num_needed is {needed}")
    check_books(pool, [a, b], "after num_needed(), which only counts")


@task(3, 3)
def test_task_3(mine):
    """append() follows the paper's Fig 6, and a failed one changes nothing."""
    pool, a = mine.BlockPool(8, 4), make_text(7)
    with doing("append(a, 7), a prompt of 7 tokens"):
        pool.append(a, 7)
    expect(a.num_kv == 0, f"after append(a, 7) num_kv is {a.num_kv}: append() only makes room, "
           "num_kv follows when K and V were computed")
    expect(len(a.block_table) == 2, f"7 tokens take 2 blocks of 4, the table is {a.block_table}")
    check_books(pool, [a], "after append(a, 7)")
    a.num_kv, first = 7, [*a.block_table]
    a.token_ids.append(7)
    with doing("the 8th token"):
        grow(pool, a, 1)
    expect(a.block_table == first, f"the 8th token has a slot in {first}, the table is now "
           f"{a.block_table}")
    a.token_ids.append(8)
    with doing("the 9th token"):
        grow(pool, a, 1)
    expect(a.block_table[:2] == first and len(a.block_table) == 3,
           f"the 9th token takes one block more than {first}, at the end: it is {a.block_table}")
    b = make_text(16)
    with doing("a second sequence"):
        grow(pool, b, 16)
    expect(not {*a.block_table} & {*b.block_table},
           f"tables {a.block_table} and {b.block_table}: a block was handed out twice")
    check_books(pool, [a, b], "after two sequences took blocks")
    before, c = [*b.block_table], make_text(8)
    for seq, num_new in ((c, 8), (b, 8)):
        try:
            with doing("2 blocks are asked for and 1 is free"):
                pool.append(seq, num_new)
            raised = None
        except (KeyError, IndexError, ValueError, StopIteration, AssertionError) as error:
            raised = type(error).__name__
        except OutOfBlocks:
            raised = OutOfBlocks
        expect(raised is OutOfBlocks, "2 blocks are asked for and 1 is free: append() must raise "
               f"OutOfBlocks{f', it raised {raised}' if raised else ''}")
        expect(pool.num_free == 1 and b.block_table == before and not c.block_table,
               "append() raised OutOfBlocks, but blocks had been taken already: look whether there "
               "are enough before you change anything")
    try:
        grow(pool, b, 4)
    except OutOfBlocks:
        expect(False, "1 block is asked for and 1 is free: that is enough")
    check_books(pool, [a, b], "after the last block was taken")


@task(3, 4)
def test_task_4(mine):
    """free() gives back what nobody else reads, and each block once."""
    pool, a = mine.BlockPool(4, 4), make_text(9)
    grow(pool, a, 9)
    tokens = [*a.token_ids]
    with doing("free(a)"):
        pool.free(a)
    expect(pool.num_free != 1, "after free(a) its blocks still do not count as free")
    expect(a.block_table == [], f"after free(a) its table is {a.block_table}: it would go on using "
           "blocks that are somebody else's by then")
    expect(a.num_kv == 0, f"after free(a) num_kv is {a.num_kv}: its K and V are gone")
    expect(a.token_ids == tokens, "free(a) changed its tokens: those are needed to compute K and V "
           "again")
    with doing("free(a) once more, though it holds nothing"):
        pool.free(a)
    check_books(pool, [], "after free(a) twice")
    with doing("a sequence takes all blocks after they were given back"):
        grow(pool, b := make_text(16), 16)
    check_books(pool, [b], "after all blocks were taken again")
    expect(len({*b.block_table}) == 4, f"table {b.block_table}: a block was handed out twice")
    pool.free(b)
    grow(pool, a, 8)
    pool.hold(c := make_text(9), a.block_table, 8)      # as the prefix cache does
    shared = {*c.block_table}
    with doing("one of two readers is freed"):
        pool.free(a)
    expect(pool.num_free == 2, f"a and c read the same 2 of 4 blocks and a was freed: "
           f"{pool.num_free} blocks count as free, but c still reads them: 2 are")
    grow(pool, d := make_text(8), 8)
    expect(not shared & {*d.block_table}, "a block that somebody still reads was handed out again")
    with doing("free(c, d)"):
        pool.free(c, d)
    expect(not d.block_table, "free(c, d) freed only the first of them")
    check_books(pool, [], "after the last readers were freed")
    check_random_programs(mine)


def check_random_programs(mine):
    """All of it, in any order."""
    for seed in range(20):
        rng, pool, seqs = random.Random(seed), mine.BlockPool(12, 4), []
        for step in range(100):
            when, kind = f"random program {seed}, step {step}", rng.random()
            with doing(when):
                if kind < 0.3:
                    seqs.append(make_text(20))
                elif kind < 0.4 and seqs and (seq := rng.choice(seqs)).num_kv % 4 == 0:
                    pool.hold(child := make_text(20), seq.block_table, seq.num_kv)
                    seqs.append(child)
                elif kind < 0.55 and seqs:
                    pool.free(seqs.pop(rng.randrange(len(seqs))))
                elif seqs:
                    seq, num_new = rng.choice(seqs), rng.randint(1, 6)
                    missing = -(-(seq.num_kv + num_new) // 4) - len(seq.block_table)
                    if missing <= pool.num_free:
                        grow(pool, seq, num_new)
            check_books(pool, seqs, when)
