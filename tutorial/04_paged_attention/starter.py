"""Lab 4, the starter: copy it to mine.py and fill in the tasks.

    task 1, 4 points   flat_batch: say whose the rows of a step are, and where
    task 2, 6 points   paged_attention_reference: attend through block tables

    python tutorial/grade.py --lab 4
    python tutorial/run_mine.py --lab 4 --prompt "ROMEO:"

All else is the engine's own code: tutorial/labs.py cut it out of kernels.py.
"""

import functools  # noqa: F401
from array import array  # noqa: F401
from itertools import accumulate, compress, zip_longest  # noqa: F401
from types import SimpleNamespace  # noqa: F401

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401

from kernels import MAX_QUERY_RUN, paged_attention, upload, write_kv, write_kv_reference  # noqa: F401


def paged_attention_reference(q, k_cache, v_cache, block_tables, context_lens, query_start, *,
                              max_query_len, scale, out=None):
    """Causal attention of each sequence's new queries over its own blocks (paper, Eq. 4).

    The meaning, for each sequence and head: gather the K and V of its blocks in the table's order,
    then softmax(scale * q K^T) V, a query at position p seeing keys 0..p. The last query sits at
    position context_lens[s] - 1. Prefill chunks, decodes and any mix of them are the same call: a
    decode is a sequence with one query.

    Shapes: q (T, H, D); k_cache, v_cache (N, B, K, D), any strides; block_tables (S, M);
        context_lens (S,), this step's tokens included; query_start (S+1,) -> (T, H, D).
        max_query_len is a launch hint that only the kernel needs.
    Cost: copies the K and V that are read, never the rest of the cache.
    """
    raise NotImplementedError("Lab 4, task 2: attend through block tables")


def flat_batch(rows, block_size, device):
    """One step's tokens one after the other, and the maps that say whose and where they are.

    rows: for each sequence (new token ids, position of the first, block table, whether the logits
    of its last token are wanted). `write_kv` and `attend` are the kernels on a GPU, elsewhere the
    references.
    """
    raise NotImplementedError("Lab 4, task 1: say whose the rows of a step are, and where")
