"""Lab 7, the starter: copy it to mine.py and fill in the tasks.

    task 1, 3 points   Scheduler._preempt: take a group's blocks, its tokens stay
    task 2, 4 points   BlockPool.take_over: move a group's blocks from another pool
    task 3, 3 points   Scheduler._preempt: by swap, while there is room

    python tutorial/grade.py --lab 7
    python tutorial/run_mine.py --lab 7 --prompt "ROMEO:"

All else is the engine's own code: tutorial/labs.py cut it out of nanopaged.py.
"""

from collections import Counter, OrderedDict, deque  # noqa: F401

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
        block_id, _ = self.free_blocks.popitem(last=False)
        self.cached.pop(self.key_of.pop(block_id, None), None)
        self.content[block_id] = content or object()
        return block_id

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
        before = self.content[block_table[i - 1]] if i else seq.cache_salt
        return before, tuple(seq.token_ids[i * self.block_size:(i + 1) * self.block_size])

    def find_prefix(self, seq):
        """The cached blocks that `seq` begins with. One token at least is left to be computed."""
        blocks, most = [], (seq.num_tokens - 1) // self.block_size
        while len(blocks) < most and (key := self._key(seq, len(blocks), blocks)) in self.cached:
            blocks.append(self.cached[key])
        return blocks

    def publish(self, seq, num_new):
        """Put the blocks into the prefix cache that `num_new` computed tokens fill (keeps I6).

        If another sequence computed the same content before, its block stays the cached one.
        """
        for i in range(seq.num_kv // self.block_size, (seq.num_kv + num_new) // self.block_size):
            key = self._key(seq, i, seq.block_table)
            first = self.cached.get(key, seq.block_table[i])
            self.key_of[first], self.cached[key] = key, first     # in this order: see _take()
            self.content[seq.block_table[i]] = self.content[first]

    def take_over(self, group, source):
        """Move a group here from the pool `source`: swap out, or swap in.

        A block that several of its sequences share is moved once, and shared again (paper 4.5).
        """
        raise NotImplementedError("Lab 7, task 2: move a group's blocks from another pool")


class Scheduler:
    """Decides who runs (paper 4.5). Keeps I5 and I7.

    Where a group stands is its state: running, with blocks of the pool; waiting; swapped, which is
    waiting with blocks of the swap pool; or finished, in neither queue.
    """

    def __init__(self, pool, swap_pool, preemption, max_num_seqs, max_num_batched_tokens):
        self.pool, self.swap_pool, self.preemption = pool, swap_pool, preemption
        # Each running sequence decodes one token a step, and the budget must last for all.
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting, self.running = deque(), []   # both in order of arrival
        self.counts = Counter()

    def schedule(self):
        """-> [(sequence, number of its tokens to compute), ...], with blocks for them allocated."""
        scheduled, budget, i = [], self.max_num_batched_tokens, 0
        # The running ones first, as they hold blocks; then, while budget is left, newcomers.
        while budget and (i < len(self.running) or self.waiting and self._admit(self.waiting[0])):
            plan = self._plan(self.running[i], budget)
            if self.pool.num_needed(plan) > self.pool.num_free:
                # The latest arrival, which may be this group itself, but none that is scheduled
                # already. It needs what it gave and more: it cannot come back for that. Then the
                # loop looks again; a plan that is made twice is the same.
                self._preempt(self.running.pop())
            else:
                for seq, num_new in plan:
                    self.pool.append(seq, num_new)
                    budget -= num_new
                scheduled += plan
                i += 1
        return scheduled

    def _plan(self, group, budget):
        """What a running group computes in this step: [(sequence, number of tokens), ...].

        Its sequences get their next token together. If some lack the K and V of more than their
        last token, which after a recompute all do, the first of them is computed alone, up to that
        token: the ones after it then find in the prefix cache what they have in common with it.
        """
        seqs = group.unfinished()
        for seq in seqs:
            if not seq.block_table:                # it begins, or begins again
                prefix = self.pool.find_prefix(seq)
                self.pool.hold(seq, prefix, len(prefix) * self.pool.block_size)
                self.counts["cached_tokens"] += 0 if seq.cache_salt else seq.num_kv
            # a step that was interrupted may have computed, but not sampled
            seq.num_kv = min(seq.num_kv, seq.num_tokens - 1)
            if num_new := seq.num_tokens - seq.num_kv - (len(seqs) > 1):
                return [(seq, min(num_new, budget))]
        return [(seq, 1) for seq in seqs] if len(seqs) <= budget else []

    def _admit(self, group):
        """Let the group that waits longest run, if there is room; nobody jumps the queue."""
        seqs, size = group.unfinished(), self.pool.block_size
        # who was swapped out brings all its K and V along
        prefix = [] if group.blocks() else self.pool.find_prefix(seqs[0])
        # All its tokens must fit, even if only a chunk is computed now: a prompt half done that
        # waits for blocks would hold those that others wait for. Cached blocks that someone holds
        # are there already. And 1% is kept free for the running ones' next tokens, as in the
        # paper's code, lest the newcomer be preempted at once: none in a pool of less than 100.
        needed = (sum(-(-seq.num_tokens // size) for seq in seqs) + self.pool.num_blocks // 100
                  - sum(self.pool.ref_count[block_id] > 0 for block_id in prefix))
        num_seqs = sum(other.width for other in self.running) + group.width
        # Alone it always fits (I7).
        if self.running and (needed > self.pool.num_free or num_seqs > self.max_num_seqs):
            return False
        if group.num_cached_tokens is None:
            group.num_cached_tokens = len(prefix) * size
        self.pool.take_over(group, self.swap_pool)             # what it has there, if anything
        self.running.append(self.waiting.popleft())
        return True

    def _preempt(self, group):
        """Take a group's blocks, by swap while there is room for it on the CPU, or by recompute.

        "auto" swaps what has several sequences: those cost several prefills to bring back.
        """
        raise NotImplementedError("Lab 7, task 1: take a group's blocks, its tokens stay")

    def finish(self, *groups):
        """Take groups out, wherever they are, and their blocks back."""
        for group in groups:
            runs = group in self.running
            (self.pool if runs else self.swap_pool).free(*group.seqs)
            (self.running if runs else self.waiting).remove(group)     # last: it can be done again
