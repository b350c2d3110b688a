"""What the graders of the block pool's labs have in common: texts, memory and bookkeeping.

They look at what the outside sees: block tables, num_kv, num_free, and the copies that are owed.
"""

from labs import expect

from nanopaged import SamplingParams, Sequence


def make_text(tokens, cache_salt=None):
    """A sequence: of these tokens, or of as many as a number says."""
    seq = Sequence(range(tokens) if isinstance(tokens, int) else tokens, SamplingParams())
    seq.cache_salt = cache_salt
    return seq


def check_books(pool, seqs, when):
    """Every block is in a table or free: nothing was lost, nothing is there twice."""
    rows = [block_id for seq in seqs for block_id in seq.block_table]
    expect(all(block_id in range(pool.num_blocks) for block_id in rows),
           f"{when}: a block table is {rows}, but blocks are numbered 0 to {pool.num_blocks - 1}")
    free = pool.num_blocks - len(set(rows))
    expect(pool.num_free <= free, f"{when}: {pool.num_free} blocks count as free, but only {free} "
           "are in no table: a held block would be handed out again")
    expect(pool.num_free >= free, f"{when}: only {pool.num_free} blocks count as free, but {free} "
           "are in no table: a block was lost")


class Memory:
    """Stands in for the KV cache: a slot holds what the K and V there were computed from.

    Those of a token depend on all tokens before it, so that is the text up to there.
    """

    def __init__(self, pool):
        self.pool, self.slots = pool, {}

    def step(self, *plan):
        """What a step of the engine does: make room for all, copy blocks, then compute."""
        for seq, num_new in plan:
            self.pool.append(seq, num_new)
        self.copy()
        for seq, num_new in plan:
            for i in range(seq.num_kv, seq.num_kv + num_new):
                self.slots[self.slot(seq, i)] = tuple(seq.token_ids[:i + 1])
            seq.num_kv += num_new

    def slot(self, seq, i):
        size = self.pool.block_size
        expect(i // size < len(seq.block_table), f"token {i} has no block: with blocks of {size} "
               f"the table {seq.block_table} ends before it")
        return seq.block_table[i // size], i % size

    def copy(self):
        """Carry out the copies that the pool owes, all at once."""
        expect(all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.pool.copies),
               f"copies is {self.pool.copies}: it must hold pairs (from, to)")
        self.slots |= {(to, i): self.slots.get((source, i)) for source, to in self.pool.copies
                       for i in range(self.pool.block_size)}
        self.pool.copies.clear()

    def check(self, seqs, when):
        """Each sequence reads, through its block table, the K and V of its own text."""
        for seq in seqs:
            for i in range(seq.num_kv):
                block_id, _ = slot = self.slot(seq, i)
                expect(self.slots.get(slot) == tuple(seq.token_ids[:i + 1]),
                       f"{when}: a text's token {i} is read from block {block_id}, where K and V "
                       "of another text, or none, lie")
