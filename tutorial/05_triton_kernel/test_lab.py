"""Lab 5's grader: three pieces of the engine's kernels, launched in Triton's interpreter.

    python tutorial/grade.py --lab 5
    python -m pytest tutorial/05_triton_kernel/test_lab.py -k task_1

The rest of each launch is the engine's own. A wrong address would write over other memory, or end
the process: so all tensors lie in the middle of buffers full of NaN, which are examined as well.
Where a result is wrong, it is compared with what common mistakes would give.
"""

import contextlib
import math
import warnings

import labs
import torch
from labs import doing, expect, task

NO_KERNELS = labs.why_no_interpreter()             # turns it on, before kernels.py is imported

import kernels  # noqa: E402

B, TILE = 4, 16                                    # 16 keys: the engine's tile for float32
GUARD = 1 << 17                                    # elements before and behind each tensor
NAN = math.nan


def guarded(*shape, swap=None):
    """(a buffer of NaN, a tensor in its middle), of which two dimensions may lie swapped."""
    buffer = torch.full((2 * GUARD + math.prod(shape),), NAN)
    inner = [*shape]
    if swap:
        inner[swap[0]], inner[swap[1]] = inner[swap[1]], inner[swap[0]]
    tensor = buffer[GUARD:-GUARD].view(inner)
    return buffer, tensor.transpose(*swap) if swap else tensor


def untouched(buffer):
    return bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all())


@contextlib.contextmanager
def in_kernels(**values):
    """Let kernels.py have other values for a while: a learner's kernel, another number of SMs."""
    expect(not NO_KERNELS, f"not graded: {NO_KERNELS}")
    before = {name: getattr(kernels, name) for name in values}
    vars(kernels).update(values)
    try:
        with warnings.catch_warnings(action="ignore"):                 # numpy's, of inf - inf
            yield
    finally:
        vars(kernels).update(before)


# ---- task 1: write_kv_kernel ---------------------------------------------------------------------

WRONG_SLOTS = {
    "the place within the block, slot % B, is missing": lambda slots: slots // B * B,
    "the block, slot // B, is missing": lambda slots: slots % B,
    "a token's number is not its slot: slot_mapping says where it goes":
        lambda slots: torch.arange(len(slots)),
}


def write(mine, slots, num_heads=2, head_dim=8, swap=None, what="4 tokens"):
    """Let a learner's kernel write -> [((buffer, cache), its K or V)] of both caches."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(len(slots), 3 * num_heads, head_dim, generator=generator)
    _, k, v = qkv.split(num_heads, dim=1)          # views, as the model has them
    pair = [guarded(4, B, num_heads, head_dim, swap=swap) for _ in range(2)]
    with in_kernels(write_kv_kernel=mine.write_kv_kernel), doing(what):
        kernels.write_kv(k.contiguous() if not swap else k, v.contiguous() if not swap else v,
                         pair[0][1], pair[1][1], slots)
    return list(zip(pair, (k, v), strict=True))


def same(cache, expected):
    """Whether two tensors agree, NaN for NaN."""
    return torch.equal(cache.nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


def written(cache, x, slots):
    """What a cache must hold when x has been written to it."""
    expected = torch.full(cache.shape, NAN)
    expected[slots // B, slots % B] = x
    return expected


@task(5, 1)
def test_task_1(mine):
    """write_kv_kernel stores a token's K and V, all heads, in its slot, and nothing else."""
    slots = torch.tensor([5, 0, 10, 7])
    results = write(mine, slots)
    for name, ((buffer, cache), x) in zip("KV", results, strict=True):
        what = f"4 tokens to slots {slots.tolist()}, {name}"
        if same(cache, written(cache, x, slots)) and untouched(buffer):
            continue
        expect(not cache.isnan().all() or not untouched(buffer), f"{what}: nothing was written")
        expect(not same(cache, written(cache, results["KV".index(name) - 1][1], slots)),
               f"{what}: it is the other's cache: K goes to k_cache, V to v_cache")
        for diagnosis, change in WRONG_SLOTS.items():
            expect(not same(cache, written(cache, x, change(slots))), f"{what}: {diagnosis}")
        expect(untouched(buffer), f"{what}: written outside of the cache: slot s begins at "
               "s // B * c_block + s % B * c_slot")
        expect(not same(cache[..., 0, :], written(cache, x, slots)[..., 0, :]),
               f"{what}: head 0 is right, the others are not: number i is of head i // D")
        expect(False, f"{what}: the cache holds other numbers, or in other slots")
    for (buffer, cache), x in write(mine, slots, num_heads=3, head_dim=12,
                                    what="3 heads of 12 numbers"):
        expect(same(cache, written(cache, x, slots)) and untouched(buffer),
               "3 heads of 12 numbers: CHUNK is 64, a power of two; what is beyond SIZE = 36 must "
               "be masked, or it lands on the neighbours")
    for (buffer, cache), x in write(mine, slots, swap=(1, 2), what="a cache with heads first"):
        expect(same(cache, written(cache, x, slots)) and untouched(buffer),
               "K and V that are views, in a cache that has a block's heads first: wrong; use the "
               "strides that are given, not K * D")
    slots = torch.tensor([5, -B, 10, -1])
    for (buffer, cache), x in write(mine, slots, what="a slot below 0"):
        expect(same(cache, written(cache, x[::2], slots[::2])) and untouched(buffer),
               "a token of a slot below 0 is the padding of a graph: it must not be written "
               "anywhere")


# ---- task 2: the loop of attention_kernel --------------------------------------------------------


class Case:
    """Sequences in shuffled blocks: (tokens they know, of these new) of each."""

    def __init__(self, *seqs, num_heads=6, head_dim=8, scale=0.7):
        generator = torch.Generator().manual_seed(0)
        self.seqs, self.scale, num_heads_kv = seqs, scale, 2
        self.kv = [torch.randn(2, num, num_heads_kv, head_dim, generator=generator)
                   for num, _ in seqs]
        counts = [-(-num // B) for num, _ in seqs]
        ids = (torch.randperm(sum(counts), generator=generator) + 1).split(counts)
        shape = (sum(counts) + 1, B, num_heads_kv, head_dim)           # block 0 is nobody's: NaN
        self.caches = [guarded(*shape)[1] for _ in "KV"]
        for (num, _), table, kv in zip(seqs, ids, self.kv, strict=True):
            slots = (table[:, None] * B + torch.arange(B)).flatten()[:num]
            kernels.write_kv_reference(*kv, *self.caches, slots)
        # Rows of zeros, much longer than M: what is looked up past a table is block 0, too.
        self.tables = torch.zeros(len(seqs) + 1, GUARD, dtype=torch.int32)
        for row, table in zip(self.tables, ids, strict=False):
            row[:len(table)] = table
        self.width = max(counts)
        self.q = torch.randn(sum(new for _, new in seqs), num_heads, head_dim, generator=generator)

    def run(self, mine, num_sms):
        """By paged_attention, with a learner's attention_kernel, as for a GPU of num_sms SMs."""
        starts = torch.tensor([0, *(new for _, new in self.seqs)]).cumsum(0).int()
        lens = torch.tensor([num for num, _ in self.seqs], dtype=torch.int32)
        with in_kernels(attention_kernel=mine.attention_kernel, NUM_SMS=num_sms):
            return kernels.paged_attention(
                self.q, *self.caches, self.tables[:-1, :self.width], lens, starts,
                max_query_len=max(new for _, new in self.seqs), scale=self.scale)

    def expected(self, mistake=None):
        """What is right, or what a common mistake would give (with a context in one part)."""
        results, start = [], 0
        for (num, new), kv in zip(self.seqs, self.kv, strict=True):
            q, start = self.q[start:start + new].double(), start + new
            keys = torch.arange(num)
            read = {"first tile": keys % TILE, "first slot": keys // B * B}.get(mistake, keys)
            k, v = kv[:, read].double().repeat_interleave(q.shape[1] // kv.shape[2], 2)
            scores = torch.einsum("thd,chd->thc", q, k)
            scores *= 1 if mistake == "no scale" else self.scale
            if mistake in ("no scale", "base e"):
                scores *= math.log(2) if mistake == "no scale" else math.log2(math.e)
            shift = {"no mask": num, "not itself": num - new - 1}.get(mistake, num - new)
            seen = torch.ones(new, num).tril(shift)[:, None] > 0
            scores = scores.masked_fill(~seen, -math.inf)
            tops = torch.cat([tile.amax(-1, keepdim=True).expand(tile.shape)
                              for tile in scores.split(TILE, -1)], -1).cummax(-1).values
            right = (scores - tops[..., -1:]).exp()                    # against the last maximum
            early = (scores - tops).exp()                              # that of their own tile
            weights = early if mistake in ("no shrink", "y") else right
            total = early if mistake in ("no shrink", "total") else right
            out = torch.einsum("thc,chd->thd", weights, v)
            results.append(out if mistake == "not divided" else out / total.sum(-1, keepdim=True))
        return torch.cat(results)


MISTAKES = {
    "no shrink": "`y` and `total` are not shrunk when a tile brings a higher score: what they hold "
                 "was weighted against the old `top`",
    "y": "`y` is not shrunk when a tile brings a higher score, only `total` is",
    "total": "`total` is not shrunk when a tile brings a higher score, only `y` is",
    "first tile": "every tile reads the blocks of the first: look up `block_ids` for the next",
    "first slot": "only the first slot of a block is read: key % B * c_slot is missing",
    "no scale": "the scores are not multiplied by scale",
    "base e": "scale has the factor log2(e) in it: use exp2, not exp",
    "no mask": "a query sees keys behind its own: compare `key` with `position`",
    "not itself": "a query does not see its own key: <=, not <",
}


def is_close(result, expected):
    return torch.allclose(result.double(), expected, rtol=1e-4, atol=1e-4)


@task(5, 2)
def test_task_2(mine):
    """The loop of attention_kernel: a softmax over tiles that come one after the other."""
    for what, num_sms, case in (
            ("a decode over 16 tokens, one tile", 1, Case((16, 1))),
            ("a decode over 8 tokens, half a tile", 1, Case((8, 1))),
            ("a decode over 48 tokens, three tiles", 1, Case((48, 1))),
            ("a decode over 39 tokens", 1, Case((39, 1))),
            ("a chunk of 5 after 6 tokens", 1, Case((11, 5))),
            ("heads of 12 numbers, DIM = 16", 1, Case((39, 1), head_dim=12)),
            ("scores of some hundred", 1, Case((39, 1), scale=100.0)),
            ("100 tokens in two parts, and 3", 8, Case((100, 1), (3, 1)))):
        with doing(what):
            result = case.run(mine, num_sms)
        if is_close(result, case.expected()):
            continue
        for mistake, diagnosis in MISTAKES.items():
            expect(not is_close(result, case.expected(mistake)), f"{what}: {diagnosis}")
        if "parts" in what:
            expect(False, f"{what}: wrong, where whole contexts are right: a part begins with tile "
                   "`first`, and its table was looked up before the loop")
        if "some hundred" in what:
            expect(False, f"{what}: exp2 overflows: subtract the new maximum first")
        expect(not result.isnan().any(), f"{what}: the result has NaN: slots were read that nobody "
               "wrote (mask with key < seen and d < D; 0 * NaN is NaN), or `top` is not kept")
        expect(False, f"{what}: the result is wrong")


# ---- task 3: merge_kernel ------------------------------------------------------------------------


def merge(mine, lses, head_dim=8, rows=None, swap=None):
    """Merge T rows of 2 heads, with `lses` for the parts of each (row, head).

    -> (out, what is right, {mistake: what it would give}). `out` holds 7 where nothing is written;
    parts that are not there, and a row that has only one, hold NaN.
    """
    T, H, D, DIM, most = len(lses) // 2, 2, head_dim, 16 if head_dim > 8 else 8, max(map(len, lses))
    y = torch.randn(T * H, most, D, generator=torch.Generator().manual_seed(0))
    part_y, part_lse = (guarded(T * H, most, n)[1] for n in (DIM, 1))
    for i, lse in enumerate(lses):
        if len(lse) > 1:
            part_lse[i, :len(lse), 0] = torch.tensor(lse)
            part_y[i, :len(lse), :D] = y[i, :len(lse)]
            part_y[i, [j for j, x in enumerate(lse) if x == -math.inf]] = 0
    buffer, out = guarded(T, H, D, swap=swap)
    out.fill_(7)
    start = torch.tensor([0, T if rows is None else rows], dtype=torch.int32)
    counts = torch.tensor([len(lse) for lse in lses], dtype=torch.int32)
    with in_kernels():
        mine.merge_kernel[(H, T)](out, part_y, part_lse, counts, most, start, 1, *out.stride()[:2],
                                  D, DIM, 8)
    results = {}
    for name in ("", "equal", "base e", "not divided", "raw"):
        results[name] = torch.full((T, H, D), 7.0)
        for i, lse in enumerate(lses[:2 * start[1]]):
            if len(lse) > 1:
                x = torch.tensor(lse, dtype=torch.float64)
                x = x - x.max().clamp(min=-1e30)
                weights = {"equal": torch.ones_like(x), "base e": x.exp(),
                           "raw": torch.tensor(lse)}.get(name, torch.exp2(x))
                total = 1 if name == "not divided" else weights.sum().clamp(min=1e-30)
                parts = part_y[i, :len(lse), :D].double()
                results[name][i // H, i % H] = (weights[:, None] * parts).sum(0) / total
    expect(untouched(buffer), "merge_kernel writes outside of `out`")
    return out, results.pop(""), results


MERGE_MISTAKES = {
    "equal": "all parts count the same: a part counts for the sum of its weights, 2 ** lse",
    "base e": "lse is a logarithm to base 2: use exp2",
    "not divided": "the sum is not divided by the sum of the weights",
    "raw": "lse is the logarithm of a weight, not the weight",
}


@task(5, 3)
def test_task_3(mine):
    """merge_kernel joins the parts of each row by their shares of the whole softmax."""
    some = [[1.0, 3.0], [2.5, -1.0], [0.5, 0.0], [-2.0, 1.0]]
    for what, lses, options in (
            ("2 rows of 2 heads, 2 parts each", some, {}),
            ("rows of 2, 3 and 5 parts", [[1.0, 3.0], [0.0, 1.0, 2.0], [1.0] * 5, [2.0, 1.0]], {}),
            ("heads of 12 numbers, DIM = 16", some, {"head_dim": 12}),
            ("an `out` with strides of its own", some, {"swap": (0, 1)}),
            ("weights of 2^300", [[300.0, 301.0], [1.0, 900.0], *some[:2]], {}),
            ("a part in which a query sees no key, lse = -inf",
             [[1.0, -math.inf, 2.0], *some[1:]], {}),
            ("a query that sees no key in any part", [[-math.inf] * 2, *some[1:]], {}),
            ("a row with one part", [[1.0], *some[1:]], {}),
            ("a row of no sequence", some, {"rows": 1})):
        with doing(what):
            out, right, wrong = merge(mine, lses, **options)
        if torch.allclose(out, right, rtol=1e-4, atol=1e-5):           # NaN is close to nothing
            continue
        for mistake, diagnosis in MERGE_MISTAKES.items():
            expect(not torch.allclose(out, wrong[mistake], rtol=1e-4, atol=1e-5),
                   f"{what}: {diagnosis}")
        hint = {"rows of 2": "only the row's own parts are there, `parts_of` says how many: mask "
                             "the others, which may be NaN",
                "an `out`": "use o_token and o_head",
                "heads of": "mask what is beyond D",
                "weights": "2 ** lse overflows: subtract the largest lse of the row first",
                "a part": "it must count for nothing, and no more",
                "a query": "-inf minus -inf is NaN, and so is 0 / 0; the result must be 0",
                "a row with": "its result is in `out` already, and not in part_y: leave it",
                "a row of": "from query_start[num_seqs] on, `out` must be left as it is"}
        expect(False, f"{what}: " + next((text for start, text in hint.items()
                                          if what.startswith(start)), "the result is wrong"))
