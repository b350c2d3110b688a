"""Lab 4's grader: the maps of a flat batch, and attention that follows them.

    python tutorial/grade.py --lab 4
    python -m pytest tutorial/04_paged_attention/test_lab.py -k task_1

Attention is compared in float64, in a pool whose other slots hold NaN. Where a result is wrong, it
is compared with what common mistakes would give.
"""

import torch
from labs import doing, expect, task

import kernels

B = 4
CPU = torch.device("cpu")

# (new token ids, position of the first, block table, whether logits are wanted)
ROWS = [([16, 17, 18, 19, 20], 6, [12, 2, 9], False), ([37], 7, [7, 1], True),
        ([50, 51, 52], 0, [5], True)]
EXPECTED = {"input_ids": [16, 17, 18, 19, 20, 37, 50, 51, 52],
            "positions": [6, 7, 8, 9, 10, 7, 0, 1, 2],
            "slot_mapping": [10, 11, 36, 37, 38, 7, 20, 21, 22], "last_rows": [5, 8],
            "block_tables": [[12, 2, 9], [7, 1, 0], [5, 0, 0]], "context_lens": [11, 8, 3],
            "query_start": [0, 5, 6, 9]}
# What mistakes make of a map, and what to say then.
KNOWN = {
    "positions": {(0, 1, 2, 3, 4, 0, 0, 1, 2): "a position counts from the beginning of the text, "
                                               "not of this step"},
    "slot_mapping": {
        (6, 7, 8, 9, 10, 7, 0, 1, 2): "those are positions; a slot is in a physical block, which "
                                      "the block table names",
        (8, 8, 36, 36, 36, 4, 20, 20, 20): "the place within the block, position % B, is missing",
        (4, 5, 9, 10, 11, 4, 5, 6, 7): "a block has B slots, so its first one is block_id * B",
        (48, 49, 50, 51, 8, 28, 20, 21, 22): "the first new token is not the first of the text: "
                                             "look its block up by its position"},
    "last_rows": {(4, 5, 8): "only rows whose logits are wanted", (0, 5, 6): "the last row of a "
                  "sequence, not its first"},
    "context_lens": {(6, 7, 0): "this step's tokens are part of it, as a token sees itself",
                     (5, 1, 3): "the tokens of earlier steps are part of it",
                     (12, 8, 4): "count tokens, not slots: a last block may not be full"},
    "query_start": {(0, 5, 6): "T, where the last sequence ends, is missing",
                    (5, 6, 9): "it begins with 0",
                    (0, 4, 5, 8): "a sequence begins where the one before ends, at its last row + "
                                  "1"},
}


def freeze(value):
    return tuple(map(freeze, value)) if isinstance(value, list) else value


class Case:
    """Sequences in a shuffled pool: (tokens they know, of these new, block table) of each."""

    def __init__(self, *seqs, num_heads=6):
        generator = torch.Generator().manual_seed(0)
        options = {"dtype": torch.float64, "generator": generator}
        self.seqs, self.kv = seqs, [torch.randn(2, num, 2, 8, **options) for num, _, _ in seqs]
        self.caches = torch.full((2, 16, B, 2, 8), torch.nan, dtype=torch.float64)
        everything = kernels.flat_batch([([0] * num, 0, table, False) for num, _, table in seqs],
                                        B, CPU)
        kernels.write_kv_reference(*torch.cat(self.kv, 1), *self.caches, everything.slot_mapping)
        self.batch = kernels.flat_batch([([0] * new, num - new, table, False)
                                         for num, new, table in seqs], B, CPU)
        self.q = torch.randn(len(self.batch.positions), num_heads, 8, **options)

    def run(self, attention, **more):
        maps = {name: getattr(self.batch, name) for name in ("block_tables", "context_lens",
                                                             "query_start")}
        return attention(self.q, *self.caches, **maps, scale=0.7, **more,
                         max_query_len=max(new for _, new, _ in self.seqs))

    def expected(self, mistake=None):
        """What is right, or what a common mistake would give."""
        results, num_heads, start = [], self.q.shape[1], 0
        for (num, new, table), (k, v) in zip(self.seqs, self.kv, strict=True):
            q, start = self.q[start:start + new], start + new
            if mistake == "order":
                slots = torch.arange(num).split(B)
                order = sorted(range(len(slots)), key=lambda j, table=table: table[j])
                k, v = (x[torch.cat([slots[j] for j in order])] for x in (k, v))
            heads = torch.arange(num_heads)
            heads = heads % 2 if mistake == "heads" else heads // (num_heads // 2)
            scores = torch.einsum("thd,chd->htc", q, k[:, heads])
            scores = scores * {"no scale": 1, "own scale": 8 ** -0.5}.get(mistake, 0.7)
            shift = {"no mask": num, "first key": 0, "not itself": num - new - 1}
            seen = torch.ones(new, num).tril(shift.get(mistake, num - new)) > 0
            scores = scores.masked_fill(~seen, float("-inf"))
            parts = scores.split(B if mistake == "softmax" else num, -1)
            weights = torch.cat([part.softmax(-1).nan_to_num() for part in parts], -1)
            results.append(torch.einsum("htc,chd->thd", weights, v[:, heads]))
        return torch.cat(results)


MISTAKES = {
    "no scale": "the scores are not multiplied by scale",
    "own scale": "the scores are multiplied by D ** -0.5 instead of scale",
    "order": "K and V must be gathered in the order of the block table, which is that of the text",
    "heads": "query head h reads KV head h // (H / K): neighbours share one, here it is h % K",
    "softmax": "each block has a softmax of its own: Eq. 4 has one over all blocks",
    "no mask": "there is no causal mask: a query sees keys of later positions",
    "first key": "the mask takes the first query for the first token of the text: in a chunk it is "
                 "at position context_len - number of queries",
    "not itself": "a query does not see its own key",
}


def check_attention(case, result, what):
    """Compare a result with the right one and, if it is another, with what mistakes give."""
    right = case.expected()
    expect(isinstance(result, torch.Tensor) and result.shape == right.shape,
           f"{what}: the result must have the shape of q, {tuple(right.shape)}")
    if torch.allclose(result, right, atol=1e-9):
        return
    for mistake, diagnosis in MISTAKES.items():
        expect(not torch.allclose(result, case.expected(mistake), atol=1e-9),
               f"{what}: {diagnosis}")
    expect(not result.isnan().any(), f"{what}: the result has NaN, as slots were read that nobody "
           "wrote: the rest of a last block, or blocks that pad a table")
    rows = [row for row in range(len(right)) if not torch.allclose(result[row], right[row])]
    expect(False, f"{what}: wrong in rows {rows} of {len(right)}")


@task(4, 1)
def test_task_1(mine):
    """flat_batch() lays the rows one after the other, and says whose and where they are."""
    with doing("flat_batch() of a chunk, a decode and a whole prompt"):
        batch = mine.flat_batch(ROWS, B, CPU)
    for i, (name, expected) in enumerate(EXPECTED.items()):
        found = getattr(batch, name, None)
        expect(isinstance(found, torch.Tensor), f"the batch's {name} must be a tensor, it is "
               f"{'missing' if found is None else type(found).__name__}")
        values = found.tolist()
        known = KNOWN.get(name, {}).get(freeze(values))
        expect(values == expected, f"{name} is {values}, it must be {expected}"
               + (f": {known}" if known else ""))
        dtype = torch.int64 if i < 4 else torch.int32
        expect(found.dtype == dtype, f"{name} is {found.dtype}, it must be {dtype}")
    with doing("flat_batch() with blocks of 16"):
        slots = mine.flat_batch([([1, 2], 15, [3, 8], True)], 16, CPU).slot_mapping.tolist()
    expect(slots == [63, 128], "with blocks of 16 and table [3, 8], positions 15 and 16 are in "
           f"slots [63, 128], slot_mapping is {slots}: use block_size")
    tables = [row[2] for row in ROWS]
    expect(tables == [[12, 2, 9], [7, 1], [5]], "flat_batch() changed the sequences' own block "
           f"tables to {tables}: pad a copy")
    check_functions(mine)


def check_functions(mine):
    """The batch's write_kv and attend; the second with the engine's own attention behind it."""
    case, theirs = Case((3, 3, [5])), mine.paged_attention_reference
    mine.paged_attention_reference = kernels.paged_attention_reference
    try:
        batch = mine.flat_batch([([0] * 3, 0, [5], True)], B, CPU)
        for name in ("write_kv", "attend"):
            expect(callable(getattr(batch, name, None)), f"the batch must have a function {name}")
        caches = torch.full_like(case.caches, torch.nan)
        with doing("batch.write_kv(k, v, k_cache, v_cache, slot_mapping)"):
            batch.write_kv(*case.kv[0], *caches, batch.slot_mapping)
        expect(torch.equal(caches.nan_to_num(), case.caches.nan_to_num()),
               "batch.write_kv on a CPU must be write_kv_reference: K and V are elsewhere")
        with doing("batch.attend(q, k_cache, v_cache, scale=0.7), which must be "
                   "paged_attention_reference with all other arguments filled in"):
            result = batch.attend(case.q, *case.caches, scale=0.7)
        check_attention(case, result, "batch.attend")
    finally:
        mine.paged_attention_reference = theirs


@task(4, 2)
def test_task_2(mine):
    """paged_attention_reference() is causal attention over each sequence's own blocks."""
    for what, case in (
            ("a decode over two full blocks", Case((8, 1, [7, 1]), num_heads=2)),
            ("a prompt of 8 in two full blocks", Case((8, 8, [7, 1]), num_heads=2)),
            ("a decode over 6 tokens", Case((6, 1, [7, 1]), num_heads=2)),
            ("a decode with 6 query heads over 2 KV heads", Case((8, 1, [7, 1]))),
            ("a whole prompt of 7", Case((7, 7, [7, 1]))),
            ("a chunk of 5 after 6 tokens", Case((11, 5, [12, 2, 9]))),
            ("a chunk, a decode and a prompt",
             Case((11, 5, [12, 2, 9]), (8, 1, [7, 1]), (3, 3, [5])))):
        with doing(what):
            result = case.run(mine.paged_attention_reference)
        check_attention(case, result, what)
    out = torch.zeros_like(case.q)
    with doing("paged_attention_reference(..., out=out)"):
        result = case.run(mine.paged_attention_reference, out=out)
    check_attention(case, result, "with out=out")
    expect(result is out or torch.equal(out, result), "the result must be written to `out`, where "
           "it is given")
