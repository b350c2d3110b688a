"""Section 5, the block pool: the paper's Figs 6, 8, 9, and random programs under the invariants."""

import contextlib
import copy
import random
import sys

import pytest
from helpers import begin, can_append, check_pool, make_seq, swap, take_copies

from nanopaged import BlockPool, OutOfBlocks, SamplingParams, Sequence


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


def make_child(pool, seq):
    """A sequence that shares all blocks of `seq`."""
    child = seq.fork()
    pool.fork(seq, child)
    return child


def snapshot(pool, seqs):
    """All that an operation could change, to be compared with =="""
    return repr(vars(pool)), [(seq.num_kv, [*seq.block_table], [*seq.token_ids]) for seq in seqs]


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
        check_pool(pool, [seq, *others])
    assert pool.num_free == 0


def test_paper_figure_8():
    """Parallel sampling: a block that both samples write to, one that is copied twice, or one that
    is copied although its last reader writes."""
    pool, others = pool_handing_out([7, 1, 3])
    a1 = make_seq(7)
    compute(pool, a1, 7)
    a2 = make_child(pool, a1)
    assert a1.block_table == a2.block_table == [7, 1]
    assert (pool.ref_count[7], pool.ref_count[1], pool.num_free) == (2, 2, 1)
    a1.token_ids.append(5)
    compute(pool, a1)                                # A1 writes: block 1 is copied into block 3
    assert take_copies(pool) == [(1, 3)]
    assert (a1.block_table, a2.block_table) == ([7, 3], [7, 1])
    assert [pool.ref_count[i] for i in (7, 1, 3)] == [2, 1, 1]
    check_pool(pool, [a1, a2, *others])
    a2.token_ids.append(6)
    compute(pool, a2)                                # A2 is alone in block 1: it writes in place
    assert take_copies(pool) == []
    assert (a1.block_table, a2.block_table) == ([7, 3], [7, 1])
    check_pool(pool, [a1, a2, *others])
    pool.free(a1)
    assert [pool.ref_count[i] for i in (7, 1, 3)] == [1, 1, 0]
    pool.free(a2)
    assert pool.num_free == 3
    check_pool(pool, others)


def test_paper_figure_9():
    """Beam search, k = 4: blocks of candidates that were dropped stay held, those that a new one
    goes on from are freed, or a full block is copied."""
    pool, others = pool_handing_out([0, 1, 3, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12], num_blocks=13)
    seq = make_seq(4)
    compute(pool, seq, 4)                            # block 0: all share it
    candidate_3 = make_child(pool, seq)
    compute(pool, seq, 8)                            # 1, 3
    compute(pool, candidate_3, 8)                    # 2, 4
    beams = [seq, make_child(pool, seq), make_child(pool, seq), candidate_3]
    for beam in beams:
        compute(pool, beam, 4)                       # 5, 6, 7, 8
    assert [beam.block_table for beam in beams] == [[0, 1, 3, 5], [0, 1, 3, 6], [0, 1, 3, 7],
                                                    [0, 2, 4, 8]]
    assert [pool.ref_count[i] for i in range(13)] == [4, 3, 1, 3, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    check_pool(pool, [*beams, *others])
    new = [make_child(pool, beams[i]) for i in (1, 1, 2, 2)]     # the top 4 come from 1 and 2
    for beam in beams:
        pool.free(beam)
    assert [i for i in range(9) if pool.ref_count[i] == 0] == [2, 4, 5, 8]
    assert [pool.ref_count[i] for i in (0, 1, 3, 6, 7)] == [4, 4, 4, 2, 2]
    for beam in new:
        compute(pool, beam)
    assert [beam.block_table for beam in new] == [[0, 1, 3, 6, 9], [0, 1, 3, 6, 10],
                                                  [0, 1, 3, 7, 11], [0, 1, 3, 7, 12]]
    assert take_copies(pool) == [], "all shared blocks are full: nobody writes to them"
    check_pool(pool, [*new, *others])


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
    check_pool(pool, [seq])
    compute(pool, seq)
    assert len(seq.block_table) == held_after
    check_pool(pool, [seq])


def test_appending_nothing_takes_nothing():
    """A full last block counts as a reason for a new one, without a token to put there."""
    pool, seq = BlockPool(8, 4), make_seq(4)
    pool.append(seq, 0)
    assert seq.block_table == []
    compute(pool, seq, 4)
    pool.append(seq, 0)
    assert len(seq.block_table) == 1
    check_pool(pool, [seq])


def test_a_pool_can_be_used_to_its_last_slot():
    """Capacity compared with < where <= is right, so that the last block is never handed out."""
    pool, seq = BlockPool(4, 4), make_seq(17)
    assert can_append(pool, seq, 16) and not can_append(pool, seq, 17)
    compute(pool, seq, 16)
    assert pool.num_free == 0 and sorted(seq.block_table) == [0, 1, 2, 3]
    assert can_append(pool, seq, 0) and not can_append(pool, seq, 1)


@pytest.mark.parametrize("num_new", [5, 9, 13, 100])
def test_out_of_blocks_changes_nothing(num_new):
    """I5: some of the blocks are handed out before the shortage is seen, and are lost."""
    pool, a, b = BlockPool(4, 4), make_seq(10), make_seq(200)
    compute(pool, a, 10)
    compute(pool, b, 3)                              # nothing is left but one slot of b's block
    before = snapshot(pool, [a, b])
    assert not can_append(pool, b, num_new)
    with pytest.raises(OutOfBlocks):
        pool.append(b, num_new)
    assert snapshot(pool, [a, b]) == before
    check_pool(pool, [a, b])
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
    check_pool(pool, [a, b])


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
        check_pool(pool, [])
        assert pool.num_free == 8, f"request {request} leaked"


def test_free_keeps_the_tokens_and_forgets_the_cache():
    """A preempted sequence that keeps num_kv would attend to blocks that are someone else's."""
    pool, seq = BlockPool(4, 4), make_seq(9)
    compute(pool, seq, 9)
    pool.free(seq)
    assert (seq.num_kv, seq.block_table, seq.num_tokens) == (0, [], 9)
    pool.free(seq)                                   # nothing is held: nothing happens
    check_pool(pool, [seq])
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
        old_table, fits = list(seq.block_table), can_append(pool, seq, num_new)
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
                check_pool(pool, seqs)
            except AssertionError as error:
                raise AssertionError(f"{where}: {error}") from error
            held = [block_id for seq in seqs for block_id in seq.block_table]
            assert len(held) == len(set(held)) == pool.num_blocks - pool.num_free, where
            for seq in seqs:                         # the paper's claim, 4.2
                waste = len(seq.block_table) * block_size - seq.num_kv
                assert 0 <= waste < block_size, f"{where}: {waste} slots wasted"
        for seq in seqs:
            pool.free(seq)
        check_pool(pool, [])
        assert pool.num_free == pool.num_blocks, f"seed {seed}: leaked"


def broken_pool():
    """Two sequences in a sound pool, for the tests that break it by hand."""
    pool, a, b = BlockPool(8, 4), make_seq(7), make_seq(5)
    compute(pool, a, 7)
    compute(pool, b, 5)
    check_pool(pool, [a, b])
    return pool, a, b


def test_check_sees_a_wrong_reference_count():
    """I1 not checked: a block counted too often leaks, one counted too rarely is given away."""
    pool, a, b = broken_pool()
    for delta in (1, -1):
        pool.ref_count[b.block_table[0]] += delta
        with pytest.raises(AssertionError, match="I1"):
            check_pool(pool, [a, b])
        pool.ref_count[b.block_table[0]] -= delta
    with pytest.raises(AssertionError, match="I1"):
        check_pool(pool, [a])                        # b's blocks are held, and no row has them


def test_check_sees_a_block_in_two_tables():
    """I1: a row that shares blocks without being counted (fork without a reference)."""
    pool, a, b = broken_pool()
    thief = make_seq(7)
    thief.num_kv, thief.block_table = 7, list(a.block_table)
    with pytest.raises(AssertionError, match="I1"):
        check_pool(pool, [a, b, thief])


def test_check_sees_a_lost_block():
    """I2: a block that nobody holds and that is not free."""
    pool, a, b = broken_pool()
    for block_id in b.block_table:
        pool.ref_count[block_id] = 0
    b.num_kv, b.block_table = 0, []
    with pytest.raises(AssertionError, match="I2"):
        check_pool(pool, [a, b])


def test_check_sees_a_block_both_free_and_held():
    """I2: the next request would write into a block that is still read."""
    pool, a, b = broken_pool()
    table = list(b.block_table)
    pool.free(b)
    b.num_kv, b.block_table = 5, list(table)
    for block_id in table:
        pool.ref_count[block_id] = 1
    with pytest.raises(AssertionError, match="I2"):
        check_pool(pool, [a, b])


def test_check_sees_a_block_freed_twice():
    """I1, I2: two requests would be given one block."""
    pool, a, b = broken_pool()
    table = list(b.block_table)
    with pytest.raises(AssertionError, match="I1|I2"):
        for _ in range(2):
            b.block_table = list(table)
            pool.free(b)
        check_pool(pool, [a, b])


@pytest.mark.parametrize("num_kv", [3, 4, 9])
def test_check_sees_blocks_that_do_not_fit_num_kv(num_kv):
    """I4: a block too many is waste, a block too few is a write outside the sequence."""
    pool, a, b = broken_pool()
    b.num_kv = num_kv                                # its two blocks hold 5 to 8
    with pytest.raises(AssertionError, match="I4"):
        check_pool(pool, [a, b])


# --- what blocks hold: copies, prefix cache, swap -----------------------------------------------


class Memory:
    """A pool, and memory to it. A slot holds the text up to its token: K and V depend on all of it.

    What a sequence finds through its block table must therefore be the prefixes of its own text.
    """

    def __init__(self, num_blocks, block_size):
        self.pool, self.slots = BlockPool(num_blocks, block_size), {}

    def move(self, pairs, target=None):
        """Copy blocks, all at once, as the engine does."""
        held = [{i: self.slots.get((source, i)) for i in range(self.pool.block_size)}
                for source, _ in pairs]
        for (_, block_id), slots in zip(pairs, held, strict=True):
            (target or self).slots.update({(block_id, i): text for i, text in slots.items()})

    def compute(self, seq, num_new=1):
        """Copy what is shared and about to be written, write, publish."""
        pool, size = self.pool, self.pool.block_size
        pool.append(seq, num_new)
        self.move(take_copies(pool))
        for i in range(seq.num_kv, seq.num_kv + num_new):
            block_id = seq.block_table[i // size]
            assert pool.ref_count[block_id] == 1, "I3: others read what is written"
            self.slots[block_id, i % size] = tuple(seq.token_ids[:i + 1])
        pool.publish(seq, num_new)
        seq.num_kv += num_new

    def start(self, token_ids):
        """Begin a text with what is cached, compute the rest -> (sequence, blocks found)."""
        seq = Sequence(token_ids, SamplingParams())
        found = begin(self.pool, seq)
        self.compute(seq, seq.num_tokens - seq.num_kv)
        return seq, found

    def num_found(self, token_ids):
        """How many blocks of a text the prefix cache has; nothing changes."""
        return len(self.pool.find_prefix(Sequence(token_ids, SamplingParams())))

    def check(self, seqs):
        """The invariants, and that each sequence reads its own text."""
        check_pool(self.pool, seqs)
        for seq in seqs:
            for i in range(seq.num_kv):
                slot = seq.block_table[i // self.pool.block_size], i % self.pool.block_size
                assert self.slots[slot] == tuple(seq.token_ids[:i + 1]), f"slot {slot}"


def test_fork_then_both_write():
    """PEERS bug 10: parent and child write the same slot; or one table for both."""
    for first in (0, 1):
        memory = Memory(8, 4)
        parent, _ = memory.start([1, 2, 3, 4, 5])
        child = make_child(memory.pool, parent)
        seqs = [parent, child]
        for turn in range(9):                        # over two more blocks
            for seq in (seqs[first], seqs[1 - first]):
                seq.token_ids.append(10 + turn + 100 * (seq is child))
                memory.compute(seq)
                memory.check(seqs)
        assert parent.block_table[0] == child.block_table[0]
        assert not {*parent.block_table[1:]} & {*child.block_table[1:]}


@pytest.mark.parametrize("num_kv", [1, 3, 4, 6, 8])
@pytest.mark.parametrize("num_children", [1, 2, 5])
def test_can_append_counts_the_copies(num_kv, num_children):
    """Copies that capacity is not checked for, or one too many: who writes last writes in place."""
    for num_blocks in range(2, 16):
        pool, seq = BlockPool(num_blocks, 4), make_seq(8)
        compute(pool, seq, num_kv)
        seqs = [seq, *(make_child(pool, seq) for _ in range(num_children))]
        before, plan = snapshot(pool, seqs), [(seq, 1) for seq in seqs]
        needed = len(seqs) if num_kv % 4 == 0 else num_children
        fits = pool.num_needed(plan) <= pool.num_free
        assert fits == (needed <= pool.num_free), f"{num_blocks} blocks"
        assert snapshot(pool, seqs) == before
        if fits:
            for seq in seqs:
                compute(pool, seq)
            assert len(take_copies(pool)) == (num_children if num_kv % 4 else 0)
            check_pool(pool, seqs)


def test_a_copy_that_does_not_fit_changes_nothing():
    """I5: a reference taken off the shared block before the shortage is seen."""
    pool, a = BlockPool(2, 4), make_seq(7)
    compute(pool, a, 7)
    b = make_child(pool, a)
    before = snapshot(pool, [a, b])
    with pytest.raises(OutOfBlocks):
        pool.append(b, 1)
    assert snapshot(pool, [a, b]) == before
    pool.free(a)
    compute(pool, b)                                 # now it is alone: in place
    assert take_copies(pool) == []
    check_pool(pool, [b])


def test_a_text_is_found_again():
    """A cache of what is held only; blocks found in another order; a block that is not full."""
    memory = Memory(8, 4)
    text = list(range(11))
    first, found = memory.start(text)
    assert found == 0
    table = list(first.block_table)
    for freed in (False, True):
        if freed:
            memory.pool.free(first)
        assert memory.num_found(text + [99]) == 2, "the third block is not full"
        second, found = memory.start(text)
        assert (found, second.block_table[:2]) == (2, table[:2])
        memory.check([second] if freed else [first, second])
        memory.pool.free(second)


@pytest.mark.parametrize("num_tokens, found", [(1, 0), (4, 0), (5, 1), (7, 1), (8, 1), (9, 2)])
def test_one_token_is_left_to_compute(num_tokens, found):
    """PEERS bug 3: a prompt that is all in the cache leaves no token, and so no logits."""
    memory = Memory(8, 4)
    text = list(range(12))
    memory.pool.free(memory.start(text)[0])
    assert memory.num_found(text[:num_tokens]) == found
    assert memory.num_found(text) == 2


def test_equal_tokens_behind_other_beginnings():
    """PEERS bug 13: a key of the block's own tokens alone, or of a part of them."""
    memory = Memory(16, 4)
    seqs = [memory.start([1] * 4 + [2] * 4)[0], memory.start([3] * 4)[0]]
    for text, found in (([1] * 4 + [2] * 5, 2), ([3] * 4 + [2] * 5, 1), ([2] * 5, 0),
                        ([2] * 4 + [1] * 5, 0), ([1] * 9, 1), ([1, 1, 1, 2] + [2] * 5, 0),
                        ([257] * 4 + [2] * 5, 0)):   # 257 & 0xFF is 1
        assert memory.num_found(text) == found, text
    memory.check(seqs)


def test_a_block_is_found_only_once_it_is_computed():
    """PEERS bug 5: a block that was handed out, and holds nothing yet, is found."""
    memory = Memory(8, 4)
    seq = Sequence(list(range(9)), SamplingParams())
    for num_new, found in ((3, 0), (1, 1), (2, 1), (3, 2)):
        memory.pool.append(seq, num_new)
        assert memory.num_found(range(9)) == seq.num_kv // 4, "before it is computed"
        memory.pool.publish(seq, num_new)
        seq.num_kv += num_new
        assert memory.num_found(range(9)) == found


def test_nothing_is_found_in_a_block_that_was_reused():
    """A key that outlives its block's contents: the next text begins with another's K and V."""
    memory = Memory(3, 4)
    memory.pool.free(memory.start([1] * 12)[0])
    assert memory.num_found([1] * 13) == 3
    other = Sequence([2] * 9, SamplingParams())
    memory.pool.append(other, 9)                     # not yet written
    assert memory.num_found([1] * 13) == 0
    assert memory.num_found([2] * 9) == 0
    memory.pool.free(other)
    memory.check([])


@pytest.mark.parametrize("at", range(1, 12))
def test_nothing_is_found_where_publishing_was_interrupted(at):
    """A block that is found by its content, and is not forgotten when another text takes it."""
    pool, lines = BlockPool(2, 4), 0
    first, second, third = (Sequence(ids, SamplingParams()) for ids in (
        range(8), range(10, 18), range(9)))

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code is not BlockPool.publish.__code__:
            return None
        lines += event == "line"
        if lines == at:
            raise KeyboardInterrupt
        return trace

    pool.append(first, 8)
    sys.settrace(trace)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            pool.publish(first, 8)
    finally:
        sys.settrace(None)
    assert lines == at, "publish() has fewer lines: fewer will do"
    pool.free(first)
    pool.append(second, 8)
    assert pool.find_prefix(third) == []


def test_nothing_is_found_behind_a_block_that_was_reused():
    """A key with the parent's block id: whoever gets that block next inherits its children.

    Two computed the same beginning side by side. The one whose block is the cached one leaves, and
    the other goes on: what it adds stands behind a block that is given to a third.
    """
    memory = Memory(5, 2)
    leaves, stays = (Sequence([1, 1], SamplingParams()) for _ in range(2))
    memory.compute(leaves, 2)
    memory.compute(stays, 2)
    assert leaves.block_table != stays.block_table
    stays.token_ids += [5, 5]
    memory.compute(stays, 2)
    reused = leaves.block_table[0]
    memory.pool.free(leaves)
    others = []
    while not others or reused not in others[-1].block_table:
        others.append(Sequence([2, 2], SamplingParams()))
        memory.compute(others[-1], 2)
    assert memory.num_found([2, 2, 5, 5, 9]) == 1
    memory.check([stays, *others])


def test_the_end_of_a_text_is_given_up_first():
    """A text's beginning is lost before its end, which nobody can find without it."""
    memory = Memory(4, 4)
    memory.pool.free(memory.start([1] * 16)[0])
    for left in (3, 2, 1, 0):
        seq = Sequence([9] * 4, SamplingParams())
        memory.pool.append(seq, 4)
        assert memory.num_found([1] * 17) == left


def test_what_was_used_last_is_kept_longest():
    """The most recent first, or by age of the contents: a system prompt that is used every second
    is lost to one-time texts."""
    memory = Memory(4, 4)
    for token in (1, 2, 3, 4):
        memory.pool.free(memory.start([token] * 4)[0])
    again = Sequence([1] * 5, SamplingParams())
    assert begin(memory.pool, again) == 1            # 1 is used once more
    memory.pool.free(again)
    for lost in (2, 3, 4, 1):
        assert memory.num_found([lost] * 5) == 1
        memory.pool.append(Sequence([9] * 4, SamplingParams()), 4)
        assert memory.num_found([lost] * 5) == 0, f"{lost} was to go first"


def test_blocks_that_hold_nothing_known_are_used_first():
    """A cached text thrown out of a pool that has other room."""
    memory = Memory(6, 4)
    memory.pool.free(memory.start([1] * 8)[0])
    seq, _ = memory.start(list(range(16)))
    assert memory.num_found([1] * 9) == 2
    memory.check([seq])


@pytest.mark.parametrize("num_children", [0, 1, 3])
def test_swap_moves_shared_blocks_once(num_children):
    """Sharing lost on the way (paper 4.5): a group comes back larger than it went, and may not
    fit; or shared contents that are moved to one member only."""
    gpu, cpu = Memory(12, 4), Memory(12, 4)
    seq, _ = gpu.start(list(range(9)))
    seqs = [seq, *(make_child(gpu.pool, seq) for _ in range(num_children))]
    for i, seq in enumerate(seqs):
        seq.token_ids.append(100 + i)
        gpu.compute(seq)
    for source, target in ((gpu, cpu), (cpu, gpu)):
        pairs = swap(seqs, source.pool, target.pool)
        source.move(pairs, target)
        assert len(pairs) == len(dict(pairs)) == 2 + len(seqs)
        assert len({block_id for seq in seqs for block_id in seq.block_table}) == 2 + len(seqs)
        assert target.pool.num_free == 12 - 2 - len(seqs) and source.pool.num_free == 12
        assert [seq.num_kv for seq in seqs] == [10] * len(seqs)
        target.check(seqs)
        source.check([])


def test_swap_leaves_what_others_share():
    """Blocks that another request goes on reading are taken from it."""
    gpu, cpu = Memory(8, 4), Memory(8, 4)
    a, _ = gpu.start([1] * 9)
    b, found = gpu.start([1] * 8 + [2])
    assert found == 2
    gpu.move(swap([a], gpu.pool, cpu.pool), cpu)
    gpu.check([b])
    cpu.check([a])
    cpu.move(swap([a], cpu.pool, gpu.pool), gpu)
    gpu.check([a, b])


def random_text(rng):
    """Few tokens, so that texts begin alike."""
    return [rng.choice((1, 1, 1, 2)) for _ in range(rng.randint(1, 14))]


def grow(memory, seqs, rng):
    """A sequence computes some of its tokens, or one more."""
    seq = rng.choice(seqs)
    if seq.num_kv == seq.num_tokens:
        seq.token_ids += rng.choices((1, 1, 2), k=rng.choice([1, 1, 5]))
    num_new = rng.randint(1, seq.num_tokens - seq.num_kv)
    if can_append(memory.pool, seq, num_new):
        memory.compute(seq, num_new)
        return
    before = snapshot(memory.pool, seqs)
    with pytest.raises(OutOfBlocks):
        memory.pool.append(seq, num_new)
    assert snapshot(memory.pool, seqs) == before


def sharing_step(memories, groups, rng, counts):
    """One operation: groups = [[memory they are in, sequence, ...], ...]."""
    gpu, kind = memories[0], rng.random()
    running = [group for group in groups if group[0] is gpu]
    if kind < 0.15 or not running:
        seq = Sequence(random_text(rng), SamplingParams())
        counts["found"] += begin(gpu.pool, seq)
        groups.append([gpu, seq])
        return
    memory, *seqs = group = rng.choice(groups)
    if kind < 0.3:                                   # one ends, and the group with its last one
        seq = group.pop(rng.randrange(1, len(group)))
        memory.pool.free(seq)
        groups[:] = [group for group in groups if len(group) > 1]
    elif kind < 0.4:                                 # out, or back
        target = memories[memory is gpu]
        if len({b for seq in seqs for b in seq.block_table}) <= target.pool.num_free:
            memory.move(swap(seqs, memory.pool, target.pool), target)
            group[0] = target
            counts["swapped"] += 1
    elif kind < 0.45 and memory is gpu:              # preempted by recompute
        for seq in seqs:
            memory.pool.free(seq)
        counts["found"] += begin(memory.pool, seqs[0])
    elif kind < 0.6 and memory is gpu and len(seqs) < 6:
        group.append(make_child(memory.pool, rng.choice(seqs)))
        counts["forked"] += 1
    else:
        grow(gpu, rng.choice(running)[1:], rng)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_random_programs_of_sharing(block_size):
    """A text that reads what another wrote, whoever shared, copied, cached or swapped what."""
    counts = dict.fromkeys(("found", "swapped", "forked"), 0)
    for seed in range(30):
        rng = random.Random(1000 * block_size + seed)
        memories = [Memory(rng.randint(2, 30), block_size) for _ in range(2)]
        groups = []
        for step in range(150):
            sharing_step(memories, groups, rng, counts)
            try:
                for memory in memories:
                    memory.check([s for group in groups if group[0] is memory for s in group[1:]])
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, step {step}: {error}") from error
        for memory, *seqs in groups:
            for seq in seqs:
                memory.pool.free(seq)
        for memory in memories:
            memory.check([])
            assert memory.pool.num_free == memory.pool.num_blocks, f"seed {seed}: leaked"
    assert min(counts.values()) > 100, f"{counts}: this test shows nothing"
