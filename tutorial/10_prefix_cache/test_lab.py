"""Lab 10's grader: a text that begins like another one finds its blocks, and never wrong ones.

    python tutorial/grade.py --lab 10
    python -m pytest tutorial/10_prefix_cache/test_lab.py -k task_1

It looks at what the outside sees: which blocks are found, block tables, num_free, and what K and V
a text then reads through its table. Only the key of task 1 is looked at as such.
"""

import random

from labs import doing, expect, task
from pool_checks import Memory, check_books, make_text

SEVEN = [4, 20, 7, 9, 3, 8, 5]                     # "Four score and seven years ago our"


class Cache(Memory):
    """The memory, with what the engine does for the prefix cache."""

    def begin(self, seq):
        """A text begins with what is found of it -> number of tokens found."""
        found = self.pool.find_prefix(seq)
        expect(len(found) * self.pool.block_size < seq.num_tokens, f"{len(found)} blocks of "
               f"{self.pool.block_size} were found of a text of {seq.num_tokens} tokens: one token "
               "at least must be left to compute, for its output is the next token")
        self.pool.hold(seq, found, len(found) * self.pool.block_size)
        return seq.num_kv

    def compute(self, seq, num_new=None):
        """A step: room, K and V, and then the blocks that are now full are published."""
        num_new = num_new or seq.num_tokens - seq.num_kv
        before = seq.num_kv
        self.step((seq, num_new))
        seq.num_kv = before                        # the engine raises it after publish()
        self.pool.publish(seq, num_new)
        seq.num_kv = before + num_new

    def run(self, tokens, cache_salt=None):
        """A text begins and is computed -> it."""
        seq = make_text(tokens, cache_salt)
        self.begin(seq)
        self.compute(seq)
        return seq


@task(10, 1)
def test_task_1(mine):
    """Blocks are taken in the order in which they became free."""
    pool = mine.BlockPool(6, 4)
    first, second = make_text(8), make_text(16)
    with doing("two texts take all blocks"):
        pool.append(first, 8)
        pool.append(second, 16)
    expect(len({*first.block_table, *second.block_table}) == 6, f"tables {first.block_table} and "
           f"{second.block_table}: a block was handed out twice")
    freed = [first.block_table[::-1], second.block_table[::-1]]     # free() begins at the end
    pool.free(first)
    pool.free(second)
    third = make_text(8)
    with doing("a third text takes 2 blocks after both were freed"):
        pool.append(third, 8)
    expect(third.block_table == freed[0], f"blocks {freed[0]} became free before {freed[1]}, but "
           f"{third.block_table} were taken: what was used last would be lost first")
    check_books(pool, [third], "after blocks were taken, freed and taken again")


@task(10, 2)
def test_task_2(mine):
    """A key is equal for equal beginnings, and for nothing else."""
    pool = mine.BlockPool(8, 4)
    a, same, other = make_text(SEVEN + [1]), make_text(SEVEN + [2]), make_text([0] * 4 + SEVEN[:4])
    for seq in (a, other):
        pool.append(seq, 8)
    with doing("_key(seq, 0, []) of a text's first block"):
        keys = [pool._key(seq, 0, []) for seq in (a, same, other)]
        expect({key: 1 for key in keys}[keys[0]] == 1 and keys[0] == keys[1],
               "two texts begin with the same 4 tokens, but their first blocks have two keys: they "
               "would never be found")
    expect(keys[0] != keys[2], "two texts begin with different tokens, but their first blocks have "
           "one key")
    with doing("_key(seq, 1, block_table) of a second block"):
        expect(pool._key(a, 1, a.block_table) == pool._key(a, 1, a.block_table[:1]),
               "the key of block 1 depends on the blocks behind it: only those before it matter")
        expect(pool._key(a, 1, a.block_table) != pool._key(same, 1, a.block_table),
               "tokens 4 to 7 of two texts differ in the last one, but the key is the same: all "
               "tokens of a block belong to it")
        b = make_text([0] * 4 + SEVEN[4:] + [1])
        pool.append(b, 8)
        expect(pool._key(a, 1, a.block_table) != pool._key(b, 1, b.block_table),
               "two texts have the same tokens 4 to 7 after different beginnings, but one key for "
               "them: K and V depend on all tokens before, so the key must")
    salted = [make_text(SEVEN, salt) for salt in ("mine", "yours", "mine")]
    keys = [pool._key(seq, 0, []) for seq in salted]
    expect(keys[0] == keys[2] != keys[1] and keys[0] != pool._key(a, 0, []),
           "texts of different cache_salt must not find each other's blocks, those of one may: it "
           "belongs to the key of a first block")
    pairs = (SEVEN[:4], SEVEN[3::-1]), ([0] * 4, [2 ** 61 - 1] * 4)     # the second: equal hashes
    for tokens, others in pairs:
        keys = [pool._key(make_text(each), 0, []) for each in (tokens, others)]
        expect(keys[0] != keys[1], f"tokens {tokens} and {others} have one key: a sum or a hash of "
               "different tokens can be the same, so the key must hold the tokens themselves")


@task(10, 3)
def test_task_3(mine):
    """What was computed is found: whole blocks, from the beginning, when K and V are there."""
    check_what_is_found(mine)
    check_when_it_is_found(mine)
    check_what_it_is(mine)


def check_what_is_found(mine):
    """Whole blocks, and not the whole text."""
    pool = mine.BlockPool(16, 4)
    cache = Cache(pool)
    with doing("find_prefix() where nothing was computed yet"):
        expect(pool.find_prefix(make_text(SEVEN)) == [], "blocks are found, but none was computed")
    with doing("a text of 13 tokens is computed and published"):
        a = cache.run(SEVEN + [1, 2, 3, 4, 5, 6])
    for num_tokens, blocks in ((13, 3), (12, 2), (9, 2), (8, 1), (5, 1), (4, 0), (1, 0)):
        with doing(f"find_prefix() of the first {num_tokens} of 13 computed tokens"):
            found = pool.find_prefix(make_text(a.token_ids[:num_tokens]))
        expect(len(found) * 4 < num_tokens, f"{len(found)} blocks of 4 were found of a text of "
               f"{num_tokens} tokens: one token at least must be left to compute, for its output "
               "is the next token")
        expect(found == a.block_table[:blocks], f"of a text of {num_tokens} tokens that were "
               f"computed before, {found} was found, not blocks {a.block_table[:blocks]}")
    expect(pool.num_free == 12, "find_prefix() changed the number of free blocks: it only looks, "
           "hold() takes")
    found = pool.find_prefix(make_text(SEVEN[:5] + [0] * 8))
    expect(found == a.block_table[:1], "a text begins with 5 tokens of one that was computed, its "
           f"first block is the same, but {found} was found, not {a.block_table[:1]}")
    with doing("a text begins with blocks that another one still reads"):
        b = cache.run(SEVEN + [1, 0, 0])
    expect(b.block_table[:2] == a.block_table[:2], "two blocks were found, but are not shared")
    cache.check([a, b], "while two texts share what they begin with")
    check_books(pool, [a, b], "while two texts share what they begin with")


def check_when_it_is_found(mine):
    """Neither before K and V are computed nor only if it was in one piece."""
    pool = mine.BlockPool(16, 4)
    cache, a = Cache(pool), make_text(SEVEN + [1, 2, 3, 4, 5])
    longer = make_text([*a.token_ids, 0])
    with doing("append(a, 12)"):
        pool.append(a, 12)
    expect(not pool.find_prefix(longer), "a block is found after append() and before publish(): "
           "its K and V are not computed yet")
    pool.free(a)
    computed = 0
    for num_new, blocks in ((3, 0), (2, 1), (2, 1), (1, 2), (4, 3)):
        computed += num_new
        with doing(f"publish(a, {num_new}), {computed} tokens are then computed"):
            cache.compute(a, num_new)
            found = pool.find_prefix(longer)
        expect(len(found) <= blocks, f"{computed} tokens are computed, but {len(found)} blocks of "
               "4 are found: a block is published when all its tokens are computed, not before")
        expect(len(found) == blocks, f"{computed} tokens were computed in pieces of 3, 2, 2, 1 "
               f"and 4, but only {len(found)} blocks of 4 are found: a block may be filled by more "
               "than one step (num_kv is what the steps before computed)")
    with doing("a text of 12 tokens has its blocks, 5 are computed"):
        pool.append(b := make_text([0] * 12), 12)
        pool.publish(b, 5)
    expect(len(pool.find_prefix(make_text([0] * 13))) == 1, "5 of 12 tokens are computed, so block "
           "0 is found and the others, that wait for theirs, are not")


def check_what_it_is(mine):
    """A text that has ended is still found, and one that two have computed side by side."""
    pool = mine.BlockPool(4, 4)
    pool.free(Cache(pool).run(SEVEN + [1]))
    expect(pool.num_free == 4, "a freed text's blocks are free, also if they can be found")
    expect(len(pool.find_prefix(make_text(SEVEN + [1, 2]))) == 2,
           "a text has ended and nobody used its blocks since, but they are not found any more")
    pool = mine.BlockPool(16, 4)
    cache = Cache(pool)
    a, twin = make_text(SEVEN + [1, 2]), make_text(SEVEN + [1, 3])
    with doing("two texts with the same beginning are computed side by side"):
        for seq in (a, twin):
            cache.compute(seq)
    c = cache.run(SEVEN + [1, 4])
    cache.check([a, twin, c], "after two texts computed the same blocks side by side")
    with doing("the first of two texts that computed the same blocks ends, the other goes on"):
        pool.free(a)
        twin.token_ids += [7, 7, 7, 7]
        cache.compute(twin)
        d = make_text([*twin.token_ids, 0])
        found = cache.begin(d)
        cache.compute(d)
    cache.check([twin, c, d], "after one of two texts that computed the same blocks has ended")
    expect(found == 12, "two texts computed the same 2 blocks, then one of them filled a third, "
           f"but a text that goes on from there finds {found} tokens, not 12")


@task(10, 4)
def test_task_4(mine):
    """A block that is used again is forgotten, and what was used last is kept longest."""
    pool = mine.BlockPool(4, 4)
    cache = Cache(pool)
    a = cache.run(SEVEN + [1])
    pool.free(a)
    with doing("another text uses all blocks"):
        b = cache.run([0] * 16)
    expect(len({*b.block_table}) == 4, f"table {b.block_table}: a block was handed out twice")
    found = pool.find_prefix(make_text(SEVEN + [1, 2]))
    expect(found == [], f"blocks {found} are found for a text whose K and V were overwritten by "
           "another one: who takes a block must forget what the cache knows it by")
    pool = mine.BlockPool(6, 4)
    cache = Cache(pool)
    first, second, third = [cache.run([n] * 8) for n in (1, 2, 3)]
    pool.free(first, second, third)
    with doing("a text takes 2 of 6 free blocks"):
        cache.run([9] * 8)
    found = [len(pool.find_prefix(make_text([n] * 9))) for n in (1, 2, 3)]
    expect(found == [0, 2, 2], "three texts of 2 blocks ended one after the other and 2 blocks "
           f"were taken: the first text's should be gone, but of the three {found} are found")
    check_gap(mine)
    for seed in range(20):
        check_random_program(mine, seed)


def check_gap(mine):
    """A text's beginning is gone and what came behind it is still there."""
    pool = mine.BlockPool(6, 4)
    cache = Cache(pool)
    a = cache.run(SEVEN + [1])
    pool.hold(make_text(8), a.block_table[1:], 4)  # somebody keeps the second block
    pool.free(a)
    filler = make_text([0] * 20)
    cache.compute(filler)                          # and all others are used again
    found = pool.find_prefix(make_text(SEVEN + [1, 2]))
    expect(found == [], "a text's first block was used for another text, its second one is still "
           f"there, but {found} was found: without the beginning nothing behind it is of use")


def check_random_program(mine, seed):
    """Texts of few tokens begin and end in any order; each reads its own K and V."""
    rng, pool, texts = random.Random(seed), mine.BlockPool(10, 4), []
    cache = Cache(pool)
    for step in range(80):
        when = f"random program {seed}, step {step}"
        with doing(when):
            if texts and (rng.random() < 0.4 or pool.num_free < 5):
                pool.free(texts.pop(rng.randrange(len(texts))))
            else:
                tokens = [rng.randint(0, 1)] * 4 + [rng.randint(0, 1)] * 4 + [rng.randint(0, 1)] * 4
                texts.append(cache.run([*tokens, rng.randint(0, 1)][:rng.randint(1, 13)]))
        cache.check(texts, when)
        check_books(pool, texts, when)
