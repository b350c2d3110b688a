"""Lab 6, the starter: copy it to mine.py and fill in the tasks.

    task 1, 3 points   Scheduler._plan: what a running group computes
    task 2, 3 points   Scheduler._admit: whether the first that waits may run
    task 3, 4 points   Scheduler.schedule: who computes how many tokens in a step

    python tutorial/grade.py --lab 6
    python tutorial/run_mine.py --lab 6 --prompt "ROMEO:" --prompt "JULIET:"

All else is the engine's own code: tutorial/labs.py cut it out of nanopaged.py.
"""

from collections import Counter, deque  # noqa: F401


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
        raise NotImplementedError("Lab 6, task 3: who computes how many tokens in a step")

    def _plan(self, group, budget):
        """What a running group computes in this step: [(sequence, number of tokens), ...].

        Its sequences get their next token together. If some lack the K and V of more than their
        last token, which after a recompute all do, the first of them is computed alone, up to that
        token: the ones after it then find in the prefix cache what they have in common with it.
        """
        raise NotImplementedError("Lab 6, task 1: what a running group computes")

    def _admit(self, group):
        """Let the group that waits longest run, if there is room; nobody jumps the queue."""
        raise NotImplementedError("Lab 6, task 2: whether the first that waits may run")

    def _preempt(self, group):
        """Take a group's blocks, by swap while there is room for it on the CPU, or by recompute.

        "auto" swaps what has several sequences: those cost several prefills to bring back.
        """
        swap = {"auto": len(group.unfinished()) > 1, "swap": True, "recompute": False}
        if swap[self.preemption] and len(group.blocks()) <= self.swap_pool.num_free:
            self.swap_pool.take_over(group, self.pool)
        else:                                      # the tokens stay, a prefill brings K and V back
            self.pool.free(*group.seqs)
        self.counts["preemptions_swap" if group.blocks() else "preemptions_recompute"] += 1
        self.waiting.appendleft(group)             # it arrived before all that wait

    def finish(self, *groups):
        """Take groups out, wherever they are, and their blocks back."""
        for group in groups:
            runs = group in self.running
            (self.pool if runs else self.swap_pool).free(*group.seqs)
            (self.running if runs else self.waiting).remove(group)     # last: it can be done again
