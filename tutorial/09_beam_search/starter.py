"""Lab 9, the starter: copy it to mine.py and fill in the tasks.

    task 1, 1 point    Sequence.fork: a text that goes on by itself
    task 2, 1 point    beam_score: rank texts of different lengths
    task 3, 3 points   hopeful: whether it is worth going on
    task 4, 5 points   Engine._extend_beams: choose beams, share blocks, free the rest

    python tutorial/grade.py --lab 9
    python tutorial/run_mine.py --lab 9 --prompt "ROMEO:" --beam 4 --verbose

All else is the engine's own code: tutorial/labs.py cut it out of nanopaged.py.
"""

import copy  # noqa: F401

import nanopaged


class Sequence:
    """One text in the making: its tokens, and the blocks that hold their K and V."""

    def __init__(self, token_ids, params, cache_salt=None):
        self.token_ids = list(token_ids)           # prompt, then generated
        self.num_prompt_tokens = len(token_ids)
        self.max_num_tokens = len(token_ids) + params.max_tokens       # then it ends by length
        self.num_kv = 0                            # tokens whose K and V are in the cache
        self.block_table = []                      # logical block i is physical block_table[i]
        self.cache_salt = cache_salt               # cached blocks are shared within one salt only
        self.params, self.seed = params, params.seed
        self.data, self.text = b"", ""             # what was generated, and what of it can be shown
        self.cumulative_logprob, self.logprobs = 0.0, []       # of what was generated
        self.finish_reason = None                  # "stop" or "length"

    @property
    def num_tokens(self):
        return len(self.token_ids)

    def fork(self):
        """A sequence that goes on from this one. BlockPool.fork() lets it share the blocks."""
        raise NotImplementedError("Lab 9, task 1: a text that goes on by itself")


def beam_score(seq, num_generated=None):
    """What beam search ranks texts by: log-probability / generated tokens ** length_penalty."""
    raise NotImplementedError("Lab 9, task 2: rank texts of different lengths")


def hopeful(beams, ended, params):
    """`beams`; or none, if none can come among the best texts that have `ended`. Best first."""
    raise NotImplementedError("Lab 9, task 3: whether it is worth going on")


class Engine(nanopaged.Engine):
    """Scheduler, model and sampler, joined in step(); the caches are the memory of its pools."""

    def _extend_beams(self, group, sampled):
        """One step of beam search, by the rules of transformers.

        Each beam of the next step is a fork of one of this step. Then those of this step are
        freed, and with them the blocks that nothing goes on from (paper, Fig 9).
        """
        raise NotImplementedError("Lab 9, task 4: choose beams, share blocks, free the rest")
