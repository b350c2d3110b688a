"""Lab 8's grader: texts share blocks, and the first one that writes to a shared block copies it.

    python tutorial/grade.py --lab 8
    python -m pytest tutorial/08_copy_on_write/test_lab.py -k task_1

It looks at what the outside sees: block tables, num_kv, num_free, the copies that are owed, and
what each text then reads through its table.
"""

import random

from labs import doing, expect, task
from pool_checks import Memory, check_books, make_text

from nanopaged import OutOfBlocks


def make_child(pool, parent, token=None):
    """A text that goes on from `parent` with another token, or with none yet."""
    child = parent.fork()
    pool.fork(parent, child)
    child.token_ids += [token] if token else []
    return child


def prompt(pool, num_tokens):
    """A text whose tokens all are in the cache -> (it, the memory)."""
    seq, memory = make_text(num_tokens), Memory(pool)
    with doing(f"a prompt of {num_tokens} tokens, which nobody shares"):
        memory.step((seq, num_tokens))
    return seq, memory


def shared_prompt(mine, num_tokens, num_texts):
    """-> (pool of blocks of 4, texts that share all they have and know one token more)."""
    pool, seq = mine.BlockPool(12, 4), make_text(num_tokens)
    pool.hold(seq, list(range(-(-num_tokens // 4))), num_tokens)
    texts = [seq] + [make_child(pool, seq, 100 + i) for i in range(1, num_texts)]
    seq.token_ids.append(100)
    return pool, texts


@task(8, 1)
def test_task_1(mine):
    """fork() lets the child read all that the parent has, and moves nothing."""
    pool, a1 = mine.BlockPool(8, 4), make_text(7)
    pool.hold(a1, [7, 1], 7)
    with doing("fork(a1, a2), where a1 has blocks [7, 1]"):
        a2 = make_child(pool, a1)
    expect(pool.num_free == 6, f"fork() took {6 - pool.num_free} blocks; the child reads the "
           "parent's, so it must take none")
    expect(a2.block_table == [7, 1], f"the child's table is {a2.block_table}, the parent's [7, 1]")
    expect(a2.block_table is not a1.block_table, "the parent's table and the child's are one list: "
           "append to one changes both")
    expect(a2.num_kv == 7, f"the child's num_kv is {a2.num_kv}: it has K and V of 7 tokens to read")
    expect(not pool.copies, "fork() copies blocks: it moves no K and V, append() does when one of "
           "the two writes")
    expect(a1.block_table == [7, 1] and a1.num_kv == 7, "fork() changed the parent")
    a3 = make_child(pool, a2)
    for left, seq in ((2, a2), (1, a1)):
        pool.free(seq)
        expect(pool.num_free == 6, f"three texts shared blocks 7 and 1, {3 - left} of them is "
               f"freed and {left} still read them, but they count as free: fork() must count one "
               "more reader of each block")
    pool.free(a3)
    expect(pool.num_free == 8, "three texts shared blocks 7 and 1, all are freed, but the blocks "
           "are not free: fork() counts too many readers")


@task(8, 2)
def test_task_2(mine):
    """num_needed() counts the copies that a whole plan will bring."""
    pool = mine.BlockPool(8, 4)
    alone = make_text(8)
    pool.hold(alone, [5], 3)
    for num_new, blocks in ((1, 0), (2, 1)):
        needed = pool.num_needed([(alone, num_new)])
        expect(needed == blocks, f"a text alone in its block, 3 of 4 slots filled, needs {blocks} "
               f"blocks for {num_new} tokens, but num_needed is {needed}")
    pool.hold(spare := make_text(8), [2, 3], 3)
    needed = pool.num_needed([(spare, 1), (alone, 2)])
    expect(needed == 1, "a text that holds a block more than it needs takes none, and gives none "
           f"to the others: 0 + 1 blocks, but num_needed is {needed}")
    pool, (a1, a2) = shared_prompt(mine, 7, 2)
    needed = pool.num_needed([(a1, 1)])
    expect(needed != 0, "a1 and a2 share a block with 3 of 4 slots filled, and a1 writes to it: it "
           "needs a block for its copy, but num_needed is 0")
    expect(needed == 1, f"one copy is 1 block, but num_needed is {needed}: only the last block is "
           "written, so only that one is copied")
    needed = pool.num_needed([(a1, 1), (a2, 1)])
    expect(needed == 1, f"a1 and a2 share a block and both write to it: one copies it, and the "
           f"other then has it alone, so 1 copy, but num_needed is {needed}")
    needed = pool.num_needed([(a1, 3)])
    expect(needed == 2, "a1 shares a block with 3 of 4 slots filled and computes 3 tokens: a copy "
           f"and a further block, but num_needed is {needed}")
    pool, texts = shared_prompt(mine, 7, 3)
    for num_writers, blocks in ((1, 1), (2, 2), (3, 2)):
        needed = pool.num_needed([(seq, 1) for seq in texts[:num_writers]])
        expect(needed == blocks, f"{num_writers} of 3 texts that share a block write to it: "
               f"{blocks} copies, but num_needed is {needed}")
    pool, (a1, a2) = shared_prompt(mine, 8, 2)
    needed = pool.num_needed([(a1, 1), (a2, 1)])
    expect(needed == 2, "a1 and a2 share two full blocks, which nobody writes to any more: each "
           f"takes one new block, but num_needed is {needed}")
    pool, (a1, a2) = shared_prompt(mine, 7, 2)
    b1 = make_text(6)
    pool.hold(b1, [9, 10], 6)
    b2 = make_child(pool, b1)
    needed = pool.num_needed([(seq, 1) for seq in (a1, a2, b1, b2)])
    expect(needed == 2, "two pairs of texts each share a last block, and all four write: 1 copy a "
           f"pair, but num_needed is {needed}")


@task(8, 3)
def test_task_3(mine):
    """append() copies a block that others read before it is written (Fig 8)."""
    pool = mine.BlockPool(8, 4)
    a1, memory = prompt(pool, 7)
    first, last = a1.block_table
    a2 = make_child(pool, a1, token=201)
    a1.token_ids.append(101)
    with doing("a1 writes to a block that a2 reads too"):
        pool.append(a1, 1)
    check_first_write(pool, a1, a2, first, last)
    pool.copies.clear()
    with doing("a2 writes to a block that it now has alone"):
        pool.append(a2, 1)
    expect(not pool.copies, f"a2 has block {last} alone since a1 left it, but copied it all the "
           "same: when a1 left, the block lost a reader")
    expect(a2.block_table == [first, last], f"a2 has block {last} alone and writes in place, but "
           f"its table became {a2.block_table}")
    pool.free(a1, a2)
    check_books(pool, [], "after both texts were freed")
    check_full_blocks(mine)
    check_long_append(mine)
    check_failed_append(mine)
    for seed in range(10):
        check_random_program(mine, seed)


def check_first_write(pool, a1, a2, first, last):
    """The first writer of a shared block has a copy, the other one has the block."""
    expect(a2.block_table == [first, last], f"a1 wrote, but a2's table changed to {a2.block_table}")
    expect(a1.block_table != [first, last], f"block {last} is shared and a1 is about to write to "
           "it: it would overwrite what a2 reads. It must write to a copy")
    expect(len(a1.block_table) == 2, f"a1 has 8 tokens in blocks of 4, but its table is "
           f"{a1.block_table}: the copy takes the place of block {last}")
    expect(a1.block_table[0] == first, f"a1's full block {first} is still shared, only the last "
           f"one is replaced, but its table is {a1.block_table}")
    copied = a1.block_table[1]
    expect(pool.copies, f"a1's table has block {copied} in place of {last}, but copies is empty: "
           f"the engine must be told to copy what was in block {last}")
    expect(pool.copies != [(copied, last)], f"copies is {pool.copies}, the wrong way round: (from, "
           "to)")
    expect(pool.copies == [(last, copied)], f"copies is {pool.copies}; only the last block is "
           f"copied, and once: [({last}, {copied})]")
    check_books(pool, [a1, a2], "after a1's copy")


def check_full_blocks(mine):
    """What is full is never written, so it stays shared."""
    pool = mine.BlockPool(8, 4)
    a1, memory = prompt(pool, 8)
    a2 = make_child(pool, a1, token=201)
    shared = [*a1.block_table]
    a1.token_ids.append(101)
    with doing("a text writes behind two full blocks that are shared"):
        pool.append(a1, 1)
    expect(not pool.copies, "two full blocks are shared and the next token goes into a new one: "
           f"nothing is written to them, but copies is {pool.copies}")
    expect(a1.block_table[:2] == shared and len(a1.block_table) == 3,
           f"two full blocks {shared} are shared, but after the 9th token a1's table is "
           f"{a1.block_table}: a new block goes behind them")
    check_books(pool, [a1, a2], "after a text wrote behind shared full blocks")


def check_long_append(mine):
    """A copy and further blocks in one append: the copy comes first."""
    pool = mine.BlockPool(8, 4)
    a1, memory = prompt(pool, 7)
    a2 = make_child(pool, a1)
    a1.token_ids += [101, 102, 103, 104, 105, 106]
    with doing("a text appends 6 tokens to a shared block with 3 of 4 slots filled"):
        memory.step((a1, 6))
    memory.check([a1, a2], "after 6 tokens were appended to a shared block, 3 of 4 slots filled")
    check_books(pool, [a1, a2], "after a copy and two further blocks")


def check_failed_append(mine):
    """No room for the copy: nothing changes."""
    pool = mine.BlockPool(3, 4)
    a1, memory = prompt(pool, 7)
    a2 = make_child(pool, a1)
    pool.append(make_text(4), 4)                   # takes the last block
    before = [*a1.block_table]
    try:
        with doing("a shared block must be copied and no block is free"):
            pool.append(a1, 1)
        expect(False, "a shared block must be copied and no block is free: append() must raise "
               "OutOfBlocks")
    except OutOfBlocks:
        pass
    except (KeyError, IndexError, ValueError, StopIteration, AssertionError) as error:
        expect(False, "a shared block must be copied and no block is free: append() must raise "
               f"OutOfBlocks, it raised {type(error).__name__}")
    expect(a1.block_table == a2.block_table == before and not pool.copies,
           "append() raised OutOfBlocks, but it had changed a table or copies already: look first, "
           "then change")
    pool.free(a2)
    with doing("a block is written that was shared until the other text was freed"):
        memory.step((a1, 1))


def check_random_program(mine, seed):
    """Texts fork, grow and end in any order; each reads its own K and V at every moment."""
    rng, pool = random.Random(seed), mine.BlockPool(16, 4)
    memory, texts, new_tokens = Memory(pool), [], iter(range(1000, 10000))
    for step in range(60):
        when, kind = f"random program {seed}, step {step}", rng.random()
        with doing(when):
            if kind < 0.2 or not texts:
                texts.append(make_text([next(new_tokens)]))
            elif kind < 0.5 and (parent := rng.choice(texts)).num_kv:
                texts.append(make_child(pool, parent))
            elif kind < 0.6:
                pool.free(texts.pop(rng.randrange(len(texts))))
            for seq in texts:
                while seq.num_tokens <= seq.num_kv or rng.random() < 0.2:
                    seq.token_ids.append(next(new_tokens))
            plan = [(seq, seq.num_tokens - seq.num_kv) for seq in texts if rng.random() < 0.5]
            free_before, needed = pool.num_free, pool.num_needed(plan)
            if needed <= free_before:
                memory.step(*plan)
                expect(free_before - pool.num_free == needed, f"{when}: num_needed is {needed} for "
                       f"a plan, but append() took {free_before - pool.num_free} blocks for it")
        memory.check(texts, when)
        check_books(pool, texts, when)
