"""Lab 10, the starter: copy it to mine.py and fill in the tasks.

    task 1, 1 point    BlockPool._take: the block that has been free longest
    task 2, 2 points   BlockPool._key: what a block is known by
    task 3, 4 points   BlockPool.find_prefix and BlockPool.publish: find what was computed
    task 4, 3 points   BlockPool._take: forget what was in the block

    python tutorial/grade.py --lab 10
    python tutorial/run_mine.py --lab 10 --prompt "My lord, I" --prompt "My lord, I do" --verbose

All else is the engine's own code: tutorial/labs.py cut it out of nanopaged.py.
"""

from collections import Counter, OrderedDict  # noqa: F401

from nanopaged import OutOfBlocks  # noqa: F401


class BlockPool:
    """N blocks of B slots, a free list, reference counts and a prefix cache.

    Example (the paper's Fig 6, B = 4): a prompt of 7 tokens takes two blocks, 4 + 3 filled; the
    eighth token fills the second; only the ninth takes a third.
    """

    def __init__(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        # Handed out from the front, given back at the end: what was used last is kept longest.
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))
        self.ref_count = [0] * num_blocks
        self.num_forks = 0
        # What the engine owes before it computes, as (from, to): within the pool, and into it.
        self.copies, self.arrivals = [], []
        # The prefix cache. content[b] is an object that stands for the tokens of a block and of all
        # before it; it equals only itself, and each use of a block brings a new one. So (content of
        # the block before, own tokens) is an exact key, whose cost does not grow with the text.
        self.cached = {}              # {key: block_id}
        self.key_of = {}              # {block_id: key}, to forget it when the block is reused
        self.content = [None] * num_blocks

    @property
    def num_free(self):
        return len(self.free_blocks)

    def num_needed(self, plan):
        """How many free blocks append() takes for all of `plan`, [(seq, num_new), ...].

        Table rows count from num_kv, not num_tokens: the token just sampled has no K and V yet.
        With B = 4 and num_kv = 8 both blocks are full, so one new token needs a third. And copies:
        of k sequences that share a block, and all write to it, the last one finds it its own.
        """
        size, refs = self.block_size, self.ref_count
        rows = sum([max(0, -(-(seq.num_kv + n) // size) - len(seq.block_table)) for seq, n in plan])
        # Where slot num_kv has a block already, that one is written next; a full one never is. Most
        # share none: then nothing is counted, which would take longer than all else here.
        shared = [b for seq, _ in plan for b in seq.block_table[seq.num_kv // size:] if refs[b] > 1]
        return rows + (len(shared) and sum(min(k, refs[b] - 1) for b, k in Counter(shared).items()))

    def _take(self, content=None):
        """A free block to write to; what the prefix cache had there is forgotten."""
        raise NotImplementedError("Lab 10, task 1: the block that has been free longest")

    def hold(self, seq, block_ids, num_kv):
        """Add blocks to the end of a table; `num_kv` tokens of the text are then in the cache."""
        for block_id in block_ids:
            self.free_blocks.pop(block_id, None)   # if it was free
            self.ref_count[block_id] += 1          # one table row more points here (keeps I1)
        seq.block_table += block_ids               # share the blocks, never the list
        seq.num_kv = num_kv

    def append(self, seq, num_new):
        """Give `seq` room for the K and V of `num_new` more tokens; num_kv follows after the step.

        A block that it is about to write and that others read is copied first (keeps I3).
        Raises: OutOfBlocks, and nothing changes (I5).
        """
        if (needed := self.num_needed([(seq, num_new)])) > self.num_free:
            raise OutOfBlocks(f"{needed} blocks are needed, {self.num_free} are free")
        taken = [self._take() for _ in range(needed)]
        written = seq.block_table[seq.num_kv // self.block_size:]
        if written and self.ref_count[written[0]] > 1:
            # A shared block that is written is the last: nobody is forked with blocks ahead.
            self.ref_count[written[0]] -= 1        # the others go on reading it
            self.copies.append((seq.block_table.pop(), taken[0]))
        self.hold(seq, taken, seq.num_kv)

    def fork(self, parent, child):
        """Let `child` read all that `parent` has cached, moving no KV bytes (paper 4.4, 5.2).

        Cost: one integer a block. A block is copied later, in append(), by its first writer.
        """
        assert not child.block_table, "child already holds blocks: they would leak"
        self.hold(child, parent.block_table, parent.num_kv)
        self.num_forks += 1

    def free(self, *seqs):
        """Take back all blocks of sequences; their tokens stay, the K and V are gone.

        The last block goes first, so that the prefix cache loses the ends of texts before their
        beginnings, which more texts have in common.
        """
        for seq in seqs:
            for block_id in reversed(seq.block_table):
                self.ref_count[block_id] -= 1      # one table row less points here (keeps I1)
                if self.ref_count[block_id] == 0:
                    self.free_blocks[block_id] = None
            seq.block_table, seq.num_kv = [], 0

    def _key(self, seq, i, block_table):
        """What the prefix cache knows block `i` of a text by; `block_table` has those before it."""
        raise NotImplementedError("Lab 10, task 2: what a block is known by")

    def find_prefix(self, seq):
        """The cached blocks that `seq` begins with. One token at least is left to be computed."""
        raise NotImplementedError("Lab 10, task 3: find what was computed")

    def publish(self, seq, num_new):
        """Put the blocks into the prefix cache that `num_new` computed tokens fill (keeps I6).

        If another sequence computed the same content before, its block stays the cached one.
        """
        raise NotImplementedError("Lab 10, task 3: find what was computed")

    def take_over(self, group, source):
        """Move a group here from the pool `source`: swap out, or swap in.

        A block that several of its sequences share is moved once, and shared again (paper 4.5).
        """
        moved = {block_id: self._take(source.content[block_id]) for block_id in group.blocks()}
        for seq in group.seqs:
            table, num_kv = [moved[block_id] for block_id in seq.block_table], seq.num_kv
            source.free(seq)
            self.hold(seq, table, num_kv)
        self.arrivals += moved.items()
