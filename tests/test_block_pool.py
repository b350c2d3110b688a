"""Section 5, the block pool: the paper's Fig 6, and random programs under the invariants."""

import copy
import random

import pytest
from helpers import make_seq

from nanopaged import BlockPool, OutOfBlocks


def compute(pool, seq, num_new=1):
    """What a step does: make room for `num_new` tokens, then write their K and V."""
    pool.append(seq, num_new)
    seq.num_kv += num_new


def pool_handing_out(block_ids, num_blocks=10, block_size=4):
    """A pool that will hand out `block_ids` in this order -> (pool, holders of all the others)."""
    for freed in (block_ids, block_ids[::-1]):       # whether its free list is a queue or a stack
        pool, holders = BlockPool(num_blocks, block_size), {}
        for _ in range(num_blocks):
            seq = make_seq(block_size)
            compute(pool, seq, block_size)
            holders[seq.block_table[0]] = seq
        for block_id in freed:
            pool.free(holders.pop(block_id))
        probe, seq = copy.deepcopy(pool), make_seq(0)
        probe.append(seq, len(block_ids) * block_size)
        if seq.block_table == block_ids:
            return pool, list(holders.values())
    raise AssertionError(f"no order of free() makes the pool hand out {block_ids}")


def snapshot(pool, seqs):
    """All that an operation could change, to be compared with =="""
    return copy.deepcopy(vars(pool)), [(seq.num_kv, [*seq.block_table], [*seq.token_ids])
                                       for seq in seqs]


def test_paper_figure_6():
    """A wrong block at the boundary: the 8th token fills block 1, only the 9th takes block 3."""
    pool, others = pool_handing_out([7, 1, 3])
    seq = make_seq(7)
    compute(pool, seq, 7)
    assert seq.block_table == [7, 1]                 # 4 + 3 slots filled
    for num_kv, table in ((8, [7, 1]), (9, [7, 1, 3])):
        seq.token_ids.append(1)
        compute(pool, seq)
        assert (seq.num_kv, seq.block_table) == (num_kv, table)
        pool.check([seq, *others])
    assert pool.num_free == 0


@pytest.mark.parametrize("num_kv, held, held_after", [(3, 1, 1), (4, 1, 2), (5, 2, 2), (8, 2, 3),
                                                      (9, 3, 3)])
def test_a_block_is_taken_when_num_kv_crosses_a_boundary(num_kv, held, held_after):
    """PEERS bug 1: blocks counted from num_tokens, one more than num_kv, come a step early or late.

    With B = 4 and 4 tokens cached the fifth is known and has no slot: it needs a second block.
    With 3 cached the fourth is known and its slot is there: taking a block now is too early.
    """
    pool, seq = BlockPool(8, 4), make_seq(num_kv)
    compute(pool, seq, num_kv)
    seq.token_ids.append(1)                          # sampled: num_tokens = num_kv + 1
    assert len(seq.block_table) == held
    pool.check([seq])
    compute(pool, seq)
    assert len(seq.block_table) == held_after
    pool.check([seq])


def test_appending_nothing_takes_nothing():
    """A full last block counts as a reason for a new one, without a token to put there."""
    pool, seq = BlockPool(8, 4), make_seq(4)
    pool.append(seq, 0)
    assert seq.block_table == []
    compute(pool, seq, 4)
    pool.append(seq, 0)
    assert len(seq.block_table) == 1
    pool.check([seq])


def test_a_pool_can_be_used_to_its_last_slot():
    """Capacity compared with < where <= is right, so that the last block is never handed out."""
    pool, seq = BlockPool(4, 4), make_seq(17)
    assert pool.can_append(seq, 16) and not pool.can_append(seq, 17)
    compute(pool, seq, 16)
    assert pool.num_free == 0 and sorted(seq.block_table) == [0, 1, 2, 3]
    assert pool.can_append(seq, 0) and not pool.can_append(seq, 1)


@pytest.mark.parametrize("num_new", [5, 9, 13, 100])
def test_out_of_blocks_changes_nothing(num_new):
    """I5: some of the blocks are handed out before the shortage is seen, and are lost."""
    pool, a, b = BlockPool(4, 4), make_seq(10), make_seq(200)
    compute(pool, a, 10)
    compute(pool, b, 3)                              # nothing is left but one slot of b's block
    before = snapshot(pool, [a, b])
    assert not pool.can_append(b, num_new)
    with pytest.raises(OutOfBlocks):
        pool.append(b, num_new)
    assert snapshot(pool, [a, b]) == before
    pool.check([a, b])
    compute(pool, b)                                 # what does fit still works


def test_a_large_request_fails_beside_free_blocks():
    """I5 where something is free: the free blocks are taken before the shortage is seen."""
    pool, a, b = BlockPool(8, 4), make_seq(20), make_seq(16)
    compute(pool, a, 20)                             # 5 blocks; 3 are free
    before = snapshot(pool, [a, b])
    with pytest.raises(OutOfBlocks):
        pool.append(b, 13)
    assert snapshot(pool, [a, b]) == before
    compute(pool, b, 12)
    pool.check([a, b])


def test_many_requests_through_a_small_pool():
    """PEERS bug 9: reference counts reset instead of counted; an 8-block pool dies on request 5."""
    pool = BlockPool(8, 4)
    for request in range(200):
        seq = make_seq(32)
        compute(pool, seq, 1 + request % 31)
        while seq.num_kv < 32:
            compute(pool, seq)
        assert sorted(seq.block_table) == list(range(8)), f"request {request}: not the whole pool"
        pool.free(seq)
        pool.check([])
        assert pool.num_free == 8, f"request {request} leaked"


def test_free_keeps_the_tokens_and_forgets_the_cache():
    """A preempted sequence that keeps num_kv would attend to blocks that are someone else's."""
    pool, seq = BlockPool(4, 4), make_seq(9)
    compute(pool, seq, 9)
    pool.free(seq)
    assert (seq.num_kv, seq.block_table, seq.num_tokens) == (0, [], 9)
    pool.free(seq)                                   # nothing is held: nothing happens
    pool.check([seq])
    assert pool.num_free == 4


def random_step(pool, seqs, rng):
    """One operation of a random program: a sequence starts, grows, or gives its blocks back."""
    kind = rng.random()
    if kind < 0.1 or not seqs:
        seqs.append(make_seq(rng.randint(1, 5)))
    elif kind < 0.25:
        pool.free(seqs.pop(rng.randrange(len(seqs))))
    elif kind < 0.3:
        pool.free(rng.choice(seqs))                  # preempted: it may grow again
    else:
        seq, num_new = rng.choice(seqs), rng.choice([1, 1, 1, 2, 3, 4, 5, 9, 17])
        old_table, fits = list(seq.block_table), pool.can_append(seq, num_new)
        if fits:
            compute(pool, seq, num_new)
        else:
            before = snapshot(pool, seqs)
            with pytest.raises(OutOfBlocks):
                pool.append(seq, num_new)
            assert snapshot(pool, seqs) == before
        assert seq.block_table[:len(old_table)] == old_table, "a block that holds K and V moved"


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
def test_random_programs(block_size):
    """Blocks lost, shared by accident or counted wrongly, in an order that nobody thought of."""
    for seed in range(25):
        rng = random.Random(1000 * block_size + seed)
        pool, seqs = BlockPool(rng.randint(1, 40), block_size), []
        for step in range(200):
            random_step(pool, seqs, rng)
            where = f"block_size {block_size}, seed {seed}, step {step}"
            try:
                pool.check(seqs)
            except AssertionError as error:
                raise AssertionError(f"{where}: {error}") from error
            held = [block_id for seq in seqs for block_id in seq.block_table]
            assert len(held) == len(set(held)) == pool.num_blocks - pool.num_free, where
            for seq in seqs:                         # the paper's claim, 4.2
                waste = len(seq.block_table) * block_size - seq.num_kv
                assert 0 <= waste < block_size, f"{where}: {waste} slots wasted"
        for seq in seqs:
            pool.free(seq)
        pool.check([])
        assert pool.num_free == pool.num_blocks, f"seed {seed}: leaked"


def broken_pool():
    """Two sequences in a sound pool, for the tests that break it by hand."""
    pool, a, b = BlockPool(8, 4), make_seq(7), make_seq(5)
    compute(pool, a, 7)
    compute(pool, b, 5)
    pool.check([a, b])
    return pool, a, b


def test_check_sees_a_wrong_reference_count():
    """I1 not checked: a block counted too often leaks, one counted too rarely is given away."""
    pool, a, b = broken_pool()
    for delta in (1, -1):
        pool.ref_count[b.block_table[0]] += delta
        with pytest.raises(AssertionError, match="I1"):
            pool.check([a, b])
        pool.ref_count[b.block_table[0]] -= delta
    with pytest.raises(AssertionError, match="I1"):
        pool.check([a])                              # b's blocks are held, and no row has them


def test_check_sees_a_block_in_two_tables():
    """I1: a row that shares blocks without being counted (fork without a reference)."""
    pool, a, b = broken_pool()
    thief = make_seq(7)
    thief.num_kv, thief.block_table = 7, list(a.block_table)
    with pytest.raises(AssertionError, match="I1"):
        pool.check([a, b, thief])


def test_check_sees_a_lost_block():
    """I2: a block that nobody holds and that is not free."""
    pool, a, b = broken_pool()
    for block_id in b.block_table:
        pool.ref_count[block_id] = 0
    b.num_kv, b.block_table = 0, []
    with pytest.raises(AssertionError, match="I2"):
        pool.check([a, b])


def test_check_sees_a_block_both_free_and_held():
    """I2: the next request would write into a block that is still read."""
    pool, a, b = broken_pool()
    table = list(b.block_table)
    pool.free(b)
    b.num_kv, b.block_table = 5, list(table)
    for block_id in table:
        pool.ref_count[block_id] = 1
    with pytest.raises(AssertionError, match="I2"):
        pool.check([a, b])


def test_check_sees_a_block_freed_twice():
    """I2: two requests would be given one block."""
    pool, a, b = broken_pool()
    table = list(b.block_table)
    with pytest.raises(AssertionError, match="I2"):
        for _ in range(2):
            b.block_table = list(table)
            for block_id in table:
                pool.ref_count[block_id] = 1
            pool.free(b)
        pool.check([a, b])


@pytest.mark.parametrize("num_kv", [3, 4, 9])
def test_check_sees_blocks_that_do_not_fit_num_kv(num_kv):
    """I4: a block too many is waste, a block too few is a write outside the sequence."""
    pool, a, b = broken_pool()
    b.num_kv = num_kv                                # its two blocks hold 5 to 8
    with pytest.raises(AssertionError, match="I4"):
        pool.check([a, b])
