"""kernels.py: torch references and Triton kernels, against a dense computation in float64.

The kernels run on a GPU where there is one, else in Triton's interpreter (see conftest.py).
"""

import copy
import functools
import itertools
import math
import random

import pytest
import torch
from helpers import ROOT  # noqa: F401  (one thread, as the matrices are tiny)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import nanopaged

# Inputs are the same rounded numbers on both sides, so what is left is the arithmetic: sums of at
# most a few hundred products of unit size in float32; one rounding of softmax weights and of the
# result in the short types (float16 has 11 bits, bfloat16 8: 2^-9 of values up to about 4).
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def strided_caches(layout, num_blocks, block_size, num_kv_heads, head_dim, dtype, device="cpu"):
    """K and V caches of logical shape (N, B, K, D), in one of the layouts a kernel may choose."""
    n, b, k, d = num_blocks, block_size, num_kv_heads, head_dim
    if layout == "ours":
        return kernels.new_kv_cache(2, n, b, k, d, dtype, device)[1]
    empty = functools.partial(torch.empty, dtype=dtype, device=device)
    if layout == "heads first":                       # a head's slots of a block stand together
        return empty(2, n, k, b, d).transpose(2, 3)
    if layout == "K beside V":                        # of one block
        return empty(n, 2, b, k, d).transpose(0, 1)
    if layout == "K beside V in a head":
        return empty(n, b, k, 2, d).permute(3, 0, 1, 2, 4)
    assert layout == "padded rows"                    # D contiguous, with a gap behind it
    return empty(2, n, b, k, d + 3)[..., :d]


class Paged:
    """A ragged batch: each sequence has `past` cached tokens and `new` ones, in random blocks.

    Everything that must not be read is poison: unused slots and other blocks are NaN, and the
    tables' padding names blocks that do not exist.
    """

    def __init__(self, lens, heads=(4, 2), head_dim=8, block_size=4, dtype=torch.float32,
                 layout="ours", seed=0, device="cpu"):
        rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
        self.device, self.padding = device, 2                        # columns behind all tables
        num_heads, num_kv_heads = heads
        self.lens, self.scale = lens, 1.7 / math.sqrt(head_dim)      # not the default scale
        num_blocks = [-(-(past + new) // block_size) for past, new in lens]
        ids = list(range(sum(num_blocks) + 3))                       # 3 blocks of someone else
        rng.shuffle(ids)
        self.tables = [[ids.pop() for _ in range(n)] for n in num_blocks]
        self.k_cache, self.v_cache = strided_caches(layout, sum(num_blocks) + 3, block_size,
                                                    num_kv_heads, head_dim, dtype, device)
        self.k_cache.fill_(math.nan)
        self.v_cache.fill_(math.nan)

        def normal(*shape):
            return torch.randn(shape, generator=gen).to(device, dtype)

        num_new = sum(new for _, new in lens)
        self.q = normal(num_new, num_heads, head_dim)
        self.keys = [normal(past + new, num_kv_heads, head_dim) * 2 for past, new in lens]
        self.values = [normal(past + new, num_kv_heads, head_dim) for past, new in lens]
        self.slots = [[table[i // block_size] * block_size + i % block_size
                       for i in range(past + new)]
                      for table, (past, new) in zip(self.tables, lens, strict=True)]

    def write(self):
        """Put the K and V of all tokens into their slots, past and new ones alike."""
        slots = torch.tensor([slot for slots in self.slots for slot in slots], device=self.device)
        kernels.write_kv_reference(torch.cat(self.keys), torch.cat(self.values), self.k_cache,
                                   self.v_cache, slots)

    def arguments(self):
        """What the engine would call with: (q, the caches and the maps), the settings."""
        width = max(map(len, self.tables)) + self.padding
        tables = [table + [10**6 + i for i in range(width - len(table))] for table in self.tables]
        news = [new for _, new in self.lens]
        maps = (tables, [past + new for past, new in self.lens], [0, *itertools.accumulate(news)])
        maps = [torch.tensor(x, dtype=torch.int32, device=self.device) for x in maps]
        settings = {"max_query_len": max(news), "scale": self.scale}
        return (self.q, self.k_cache, self.v_cache, *maps), settings

    def attend(self, **settings):
        """By the reference."""
        args, kwargs = self.arguments()
        return kernels.paged_attention_reference(*args, **kwargs, **settings)

    def dense(self):
        """The same by the textbook, in float64: for each token and head, over all before it."""
        group, outs = self.q.shape[1] // self.keys[0].shape[1], []
        queries = self.q.double().split([new for _, new in self.lens])
        for (past, new), q, *kv in zip(self.lens, queries, self.keys, self.values, strict=True):
            k, v = (x.double().repeat_interleave(group, dim=1).transpose(0, 1) for x in kv)
            scores = q.transpose(0, 1) @ k.mT * self.scale                          # (H, new, C)
            later = torch.ones(new, past + new, device=self.device).triu(past + 1).bool()
            weights = scores.masked_fill(later, -math.inf).softmax(-1)
            outs.append((weights @ v).transpose(0, 1))
        return torch.cat(outs)


def assert_attends(paged, **settings):
    """Write, attend, and compare with the dense computation."""
    paged.write()
    got, want = paged.attend(**settings), paged.dense()
    assert got.dtype == paged.q.dtype and got.shape == paged.q.shape
    error = (got.double() - want).abs().max().item()
    assert error < TOLERANCE[paged.q.dtype], f"largest error {error}"    # NaN fails too


def ragged(block_size):
    """Contexts around the boundaries of a block: 1, B - 1, B, B + 1, ..."""
    return sorted({n for i in (1, 2, 3) for n in (i * block_size + d for d in (-1, 0, 1)) if n > 0})


@pytest.mark.parametrize("block_size", [1, 2, 4, 16, 64])
def test_decodes_over_ragged_contexts(block_size):
    """A last block read to its end, or an off-by-one where a context fills its last block."""
    lens = [(n - 1, 1) for n in (1, *ragged(block_size))]
    assert_attends(Paged(lens, block_size=block_size, seed=block_size))


@pytest.mark.parametrize("block_size", [1, 2, 4, 16, 64])
def test_prompts_over_ragged_lengths(block_size):
    """A causal mask that is shifted by one, or that starts anew at each block."""
    lens = [(0, n) for n in (1, *ragged(min(block_size, 16)))]
    assert_attends(Paged(lens, block_size=block_size, seed=block_size))


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_prefill_chunks(block_size):
    """A chunk whose first query sees no past, or whose queries all see the whole chunk."""
    lens = [(past, new) for past in (0, 1, *ragged(block_size)[-3:]) for new in (1, 2, 5)]
    assert_attends(Paged(lens, block_size=block_size, seed=block_size))


@pytest.mark.parametrize("seed", range(8))
def test_random_mixes(seed):
    """Rows that go to the wrong sequence when decodes, chunks and prompts stand in any order."""
    rng = random.Random(seed)
    lens = [(rng.choice([0, rng.randint(1, 90)]), rng.choice([1, 1, 1, 2, rng.randint(3, 20)]))
            for _ in range(12)]
    assert_attends(Paged(lens, block_size=rng.choice([1, 2, 8, 16]), seed=seed))


@pytest.mark.parametrize("lens", [[(7, 1)] * 3, [(7, 1), (6, 1), (7, 1)], [(0, 1)] * 2,
                                  [(4, 3)] * 3], ids=str)
def test_equal_contexts(lens):
    """A mask left out where every query sees every key, and also where only most do."""
    assert_attends(Paged(lens))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 2), (8, 2), (5, 1), (8, 1), (14, 2)])
def test_query_heads_that_share_a_kv_head(heads):
    """GQA: query head h reads KV head h // (H / K), not h % K and not only the first."""
    assert_attends(Paged([(5, 1), (0, 6), (3, 4), (16, 1)], heads=heads, seed=sum(heads)))


@pytest.mark.parametrize("head_dim", [8, 12, 16, 32, 64, 80])
def test_head_dims(head_dim):
    """Sizes that are no power of two."""
    assert_attends(Paged([(7, 1), (0, 5), (9, 3)], head_dim=head_dim, seed=head_dim))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64])
def test_dtypes(dtype, head_dim):
    """A result in another dtype than q's, or sums in a short one."""
    lens = [(0, 9), (30, 1), (200, 1), (17, 6)]
    assert_attends(Paged(lens, head_dim=head_dim, block_size=16, dtype=dtype))


@pytest.mark.parametrize("layout", ["heads first", "K beside V", "K beside V in a head",
                                    "padded rows"])
def test_the_strides_are_the_caches_own(layout):
    """Code that takes the cache for contiguous, and so reads or writes other slots."""
    for block_size in (1, 4):
        assert_attends(Paged([(0, 6), (11, 1), (3, 5)], block_size=block_size, layout=layout))


@pytest.mark.parametrize("longest_run", [1, 2, 3, 7])
def test_prompts_longer_than_a_query_run(longest_run, monkeypatch):
    """Runs cut from a long prompt: each must see all that is before it and nothing after it."""
    monkeypatch.setattr(kernels, "MAX_QUERY_RUN", longest_run)
    assert_attends(Paged([(0, 14), (5, 1), (9, 7), (2, 6), (0, 3)], seed=longest_run))


def test_a_prompt_longer_than_the_real_query_run():
    """The same at the size that ships: the second run's context."""
    assert_attends(Paged([(3, kernels.MAX_QUERY_RUN + 5)], heads=(1, 1), block_size=16))


def test_a_sequence_without_new_tokens():
    """A row of the batch that has nothing to compute shifts the rows of its neighbours."""
    assert_attends(Paged([(0, 3), (5, 0), (7, 1), (4, 0), (0, 2)]))


def test_extreme_scores():
    """exp() of a large score: infinity over infinity."""
    paged = Paged([(6, 1), (0, 5)])
    paged.q *= 1e4
    assert_attends(paged)


def test_out_is_filled():
    """`out` ignored, or rows beside it written: the graph path reads the buffer it gave."""
    paged = Paged([(0, 3), (5, 1)])
    paged.write()
    buffer = torch.full((4 + 2, 2, *paged.q.shape[1:]), 7.0)
    out = buffer[1:5, 0]                              # a view with strides of its own
    assert paged.attend(out=out) is out
    assert torch.equal(buffer[1:5, 0], paged.attend())
    assert buffer[[0, 5]].eq(7).all() and buffer[:, 1].eq(7).all()


def test_the_same_block_in_two_tables():
    """Shared prefixes: tables may name one block twice (fork, later the prefix cache)."""
    paged = Paged([(8, 1), (8, 1)])
    paged.tables[1][:2] = paged.tables[0][:2]
    paged.keys[1][:8], paged.values[1][:8] = paged.keys[0][:8], paged.values[0][:8]
    paged.slots[1][:8] = paged.slots[0][:8]
    assert_attends(paged)


@pytest.mark.parametrize("layout", ["ours", "heads first", "K beside V", "padded rows"])
@pytest.mark.parametrize("block_size", [1, 4, 64])
def test_write_kv(layout, block_size):
    """A token in another slot than its own, K in V's place, or a neighbour overwritten."""
    gen = torch.Generator().manual_seed(block_size)
    k_cache, v_cache = strided_caches(layout, 7, block_size, 2, 8, torch.float32)
    want = [cache.normal_(generator=gen).clone() for cache in (k_cache, v_cache)]
    slots = torch.randperm(7 * block_size, generator=gen)[:5]
    k, v = torch.randn(2, 5, 2, 8, generator=gen)
    kernels.write_kv_reference(k, v, k_cache, v_cache, slots)
    for row, slot in enumerate(slots.tolist()):
        want[0][slot // block_size, slot % block_size] = k[row]
        want[1][slot // block_size, slot % block_size] = v[row]
    assert torch.equal(k_cache, want[0]) and torch.equal(v_cache, want[1])


def test_write_kv_of_a_view():
    """K and V as the model has them: slices of one qkv matrix, not contiguous."""
    qkv = torch.randn(5, 4 + 2 + 2, 8)
    _, k, v = qkv.split((4, 2, 2), dim=1)
    k_cache, v_cache = strided_caches("ours", 3, 4, 2, 8, torch.float32)
    kernels.write_kv_reference(k, v, k_cache, v_cache, torch.tensor([11, 0, 5, 6, 2]))
    assert torch.equal(k_cache.flatten(0, 1)[[11, 0, 5, 6, 2]], k)
    assert torch.equal(v_cache.flatten(0, 1)[[11, 0, 5, 6, 2]], v)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_new_kv_cache(dtype):
    """A cache whose logical shape is not (L, 2, N, B, K, D), or whose D is not contiguous."""
    cache = kernels.new_kv_cache(3, 5, 4, 2, 8, dtype, "cpu")
    assert cache.shape == (3, 2, 5, 4, 2, 8) and cache.dtype == dtype and cache.stride(-1) == 1
    cache.zero_()
    cache[1, 0, 2, 3, 1] = 1                          # every element is its own
    assert cache.sum() == 8 and cache[1, 0, 2, 3, 1].sum() == 8


class Allocations(TorchDispatchMode):
    """Remembers the largest tensor that an operation makes, views not counted."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs))
                 if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                made = storage.nbytes() if storage.data_ptr() not in given else 0
                self.largest = max(self.largest, made)
        return out


def test_as_many_blocks_as_fit():
    """A pool of no block, of more than 1 GiB unasked, or of more blocks than one can count."""
    def fit(num_blocks, head_dim):                     # a block takes 128 bytes x head_dim
        return kernels.fit_kv_cache(num_blocks, 1, 16, 1, head_dim, torch.float32, "cpu").shape[2]

    assert fit(None, 1 << 18) == 32 and fit(None, 2) == 1 << 20
    assert fit(33, 1 << 18) == 33 and fit(0, 2) == 0
    with pytest.raises(MemoryError, match="1 KV blocks .* lower num_blocks"):
        fit(None, 1 << 24)


def test_the_cache_is_never_copied():
    """One .contiguous() or a gather over the pool: each step then costs as much as the pool."""
    cache = kernels.new_kv_cache(2, 1000, 16, 2, 8, torch.float32, "cpu")
    paged = Paged([(0, 30), (40, 1), (5, 1)], block_size=16)
    cache[0, 0, :len(paged.k_cache)], cache[0, 1, :len(paged.v_cache)] = 0, 0
    paged.k_cache, paged.v_cache = cache[0]
    with Allocations() as allocations:
        paged.write()
        paged.attend()
    assert 0 < allocations.largest < paged.k_cache.nbytes / 20, allocations.largest
    assert (paged.attend().double() - paged.dense()).abs().max() < TOLERANCE[torch.float32]


# ---- the Triton kernels --------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = DEVICE == "cuda"
# On a GPU hundreds of cases take seconds; the interpreter runs each program line by line.
NUM_RANDOM = 300 if GPU else 10
LONG = 900 if GPU else 400                           # up to 57 parts of a tile each, or fewer
needs_triton = pytest.mark.skipif(
    not (GPU or kernels.INTERPRETED),
    reason="no GPU, and no interpreter: it needs triton and numpy, which is none of the five")
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
# Relative error of the whole output, |got - want| / |want|. float32: rounding of sums, and exp2
# to 2 ulp (TF32 would be 3e-4). Else softmax weights and result are rounded once, each by up to
# 2^-12 (float16) or 2^-9 (bfloat16) of its size.
RELATIVE = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}
# The interpreter multiplies the bits of bfloat16 as integers: only a GPU can test that type.
DTYPES = list(RELATIVE) if GPU else [torch.float32, torch.float16]


def assert_kernel_attends(paged):
    """Write and attend by the kernels into poison, and compare with the dense result.

    On a GPU twice: programs that run in another order must give the same bits.
    """
    slots = torch.tensor([slot for slots in paged.slots for slot in slots], device=DEVICE)
    kernels.write_kv(torch.cat(paged.keys), torch.cat(paged.values), paged.k_cache, paged.v_cache,
                     slots)
    args, settings = paged.arguments()
    outs = [torch.full_like(paged.q, math.nan) for _ in range(1 + GPU)]
    for out in outs:
        assert kernels.paged_attention(*args, **settings, out=out) is out
    want = paged.dense()
    error = ((outs[0].double() - want).norm() / want.norm()).item()
    assert error < RELATIVE[paged.q.dtype], f"relative error {error}"       # NaN fails too
    assert torch.equal(outs[0], outs[-1]), "the same inputs, other bits"


def on_device(lens, **settings):
    """A Paged that the kernels can take."""
    return Paged(lens, **{"head_dim": 64, "device": DEVICE} | settings)


@pytest.fixture(autouse=not GPU)
def few_programs(monkeypatch):
    """Enough for all that can go wrong, where each program takes a millisecond and more."""
    monkeypatch.setattr(kernels, "NUM_SMS", 3)


@pytest.fixture
def many_parts(monkeypatch):
    """A GPU so large that a few programs do not fill it: contexts of 100 tokens are split."""
    monkeypatch.setattr(kernels, "NUM_SMS", 132)


@needs_triton
@pytest.mark.parametrize("seed", range(NUM_RANDOM))
def test_kernel_on_random_batches(seed, monkeypatch):
    """Any index that is wrong only for some mix of sizes; poison that is read; bits that vary."""
    rng = random.Random(seed)
    num_kv_heads, group = rng.choice([(1, 1), (2, 4), (1, 8), (3, 2), (2, 7), (1, 16), (8, 4)])
    longest = rng.choice([20, 600, 5000] if GPU else [20, 300])
    lens = []
    for _ in range(rng.randint(1, 40 if GPU else 4)):
        past = rng.choice([0, rng.randint(1, longest)])
        lens.append((past, rng.choice([1, 1, 1, 1, 2, rng.randint(3, 40), 0])))
    if rng.random() < 0.4:
        lens = [(past, 1) for past, _ in lens]                       # decodes only
    lens.append((rng.randint(0, longest), 1))                        # at least one query
    if rng.random() < 0.5:
        monkeypatch.setattr(kernels, "NUM_SMS", 132)
    assert_kernel_attends(on_device(
        lens, heads=(num_kv_heads * group, num_kv_heads), block_size=2 ** rng.randint(0, 8),
        head_dim=rng.choice([32, 64, 80, 96, 128]), dtype=rng.choice(DTYPES), seed=seed))


@needs_triton
@pytest.mark.parametrize("block_size", [2 ** i for i in range(0, 9, 1 if GPU else 2)])
def test_kernel_block_sizes(block_size, many_parts):
    """A tile that must be a block, or a whole number of them; a context that ends with a block."""
    lens = [(n - 1, 1) for n in (1, *ragged(min(block_size, 32)))] + [(0, 9), (block_size, 3)]
    assert_kernel_attends(on_device(lens, block_size=block_size, seed=block_size))


@needs_triton
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 2), (5, 1), (14, 2), (16, 1),
                                   (32, 1)])
def test_kernel_query_heads_that_share_a_kv_head(heads):
    """Rows of one tile that go to the wrong head where H / K is no power of two, or 16 and more."""
    assert_kernel_attends(on_device([(70, 1), (0, 20), (3, 4)], heads=heads, seed=sum(heads)))


@needs_triton
@pytest.mark.parametrize("head_dim", [8, 32, 48, 64, 80, 96, 112, 128, 160, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_head_dims(head_dim, dtype):
    """The padding to a power of two, and a tile that no longer fits in shared memory."""
    for lens in ([(35, 1), (5, 1)], [(0, 20), (40, 1), (33, 3)]):
        assert_kernel_attends(on_device(lens, head_dim=head_dim, dtype=dtype, block_size=16))


@needs_triton
@pytest.mark.parametrize("new", [1, 3, 20])
def test_kernel_splits_long_contexts(new, many_parts):
    """Parts merged in another order or twice; a part in which a query sees no key: -inf - -inf."""
    lens = [(LONG, new), (0, new), (64, 1), (LONG // 2, new)]
    assert_kernel_attends(on_device(lens, heads=(2, 1), block_size=16))


@needs_triton
def test_kernel_splits_one_long_context_among_many(many_parts):
    """Rows of one part, which most have here, are merged, or the long one's parts are not."""
    paged = on_device([(i, 1) for i in range(9)] + [(LONG, 1)] + [(3, 1)] * 3, block_size=256)
    paged.padding = 40
    assert_kernel_attends(paged)


@needs_triton
@pytest.mark.parametrize("num_seqs, num_parts", [(7, 2), (13, 1)])
def test_kernel_splits_a_long_context_where_programs_are_many(num_seqs, num_parts, monkeypatch):
    """One is read when all others have ended; or so many are cut that merging costs more."""
    monkeypatch.setattr(kernels, "NUM_SMS", 3)
    launches, parts = kernels.attention_launches, set()
    monkeypatch.setattr(kernels, "attention_launches", lambda *args: (
        parts.add(launch[0][2]) or launch for launch in launches(*args)))
    lens = [(1500, 1), *[(i, 1) for i in range(num_seqs - 1)]]
    assert_kernel_attends(on_device(lens, heads=(2, 1), block_size=256))
    assert parts == {num_parts}


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_at_128k(dtype):
    """More parts than one program merges at a time; offsets past 32 bits are tested below."""
    lens = [(131_071, 1), (300, 1), (131_000, 40)]
    assert_kernel_attends(on_device(lens[:2], block_size=16, dtype=dtype))
    assert_kernel_attends(on_device(lens, block_size=16, dtype=dtype))


@needs_gpu
def test_kernel_beyond_32_bits():
    """Offsets in 32 bits: the last blocks of a cache of more than 2^31 elements."""
    cache = torch.full((2, 70_000, 16, 8, 128), math.nan, dtype=torch.float16, device=DEVICE)
    paged = on_device([(100, 1), (20, 30)], heads=(16, 8), head_dim=128, block_size=16,
                      dtype=torch.float16)
    moved = cache.shape[1] - len(paged.k_cache)
    paged.k_cache, paged.v_cache = cache
    paged.tables = [[block_id + moved for block_id in table] for table in paged.tables]
    paged.slots = [[slot + 16 * moved for slot in slots] for slots in paged.slots]
    assert_kernel_attends(paged)
    pair = torch.tensor([[paged.tables[0][0], 0]], device=DEVICE)
    kernels.copy_blocks(cache[None], pair)
    assert torch.equal(cache[:, 0], cache[:, paged.tables[0][0]])


@needs_triton
@pytest.mark.parametrize("layout", ["heads first", "K beside V", "K beside V in a head",
                                    "padded rows"])
def test_kernel_strides(layout):
    """Code that takes the cache for contiguous."""
    assert_kernel_attends(on_device([(0, 20), (11, 1), (300, 1)], layout=layout, block_size=16))


@needs_triton
def test_kernel_skips_what_is_empty():
    """A captured graph's padding: sequences without context or queries, rows that nobody owns."""
    paged = on_device([(0, 0), (90, 1), (0, 0), (7, 0), (0, 3), (0, 0)])
    assert_kernel_attends(paged)
    on_its_own = on_device([(900, 1), (5, 1)], heads=(2, 1))          # a query without any key
    args, settings = on_its_own.arguments()
    args[4][1] = 0
    on_its_own.write()
    assert kernels.paged_attention(*args, **settings)[1].eq(0).all()
    (q, *rest), settings = paged.arguments()
    padded = torch.cat((q, torch.full_like(q, math.nan)))
    out = kernels.paged_attention(padded, *rest, **settings, out=torch.full_like(padded, 7))
    assert torch.equal(out[:4], kernels.paged_attention(q, *rest, **settings))
    assert out[4:].eq(7).all(), "a row of no sequence was written"
    nobody = [*rest[:-1], torch.zeros_like(rest[-1])]
    assert kernels.paged_attention(q[:0], *nobody, **settings).shape == (0, 4, 64)


@needs_triton
def test_kernel_extreme_scores(many_parts):
    """exp2 of a large score: infinity over infinity."""
    paged = on_device([(300, 1), (0, 20)])
    paged.q *= 1e4
    assert_kernel_attends(paged)


@needs_triton
def test_kernel_out_is_filled():
    """An `out` that is a view with strides of its own: rows beside it must stay."""
    paged = on_device([(0, 3), (5, 1)])
    paged.write()
    args, settings = paged.arguments()
    buffer = torch.full((4 + 2, 2, *paged.q.shape[1:]), 7.0, device=DEVICE)
    kernels.paged_attention(*args, **settings, out=buffer[1:5, 0])
    assert torch.equal(buffer[1:5, 0], kernels.paged_attention(*args, **settings))
    assert buffer[[0, 5]].eq(7).all() and buffer[:, 1].eq(7).all()


@needs_gpu
def test_kernel_in_a_graph():
    """A length that the host read once: the graph replays with other sequences and contexts."""
    first = on_device([(40, 1), (0, 0), (2000, 1), (9, 1)], block_size=16, seed=1)
    other = on_device([(1900, 1), (3, 1), (0, 0), (50, 1)], block_size=16, seed=2)  # fewer blocks
    first.write()
    args, settings = first.arguments()
    kernels.paged_attention(*args, **settings)                        # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.paged_attention(*args, **settings)
    for paged in (first, other):
        paged.write()
        for mine, given in zip(args, paged.arguments()[0], strict=True):
            mine[tuple(map(slice, given.shape))] = given
        graph.replay()
        want = paged.dense()
        assert (out.double() - want).norm() / want.norm() < RELATIVE[torch.float32]


def changed(arguments, index, change):
    """The arguments with one of them changed."""
    return [change(x) if i == index else x for i, x in enumerate(arguments)]


@needs_triton
@pytest.mark.parametrize("index, change", [
    (0, lambda q: q.half()), (0, lambda q: q[:, :3]), (0, lambda q: q[..., :32]),
    (0, lambda q: q.mT.contiguous().mT), (1, lambda k: k.half()), (1, lambda k: k[:, :3]),
    (1, lambda k: k.transpose(1, 2).contiguous().transpose(1, 2)), (2, lambda v: v[:-1]),
    (3, lambda tables: tables.long()), (3, lambda tables: tables[:1]), (4, lambda lens: lens[:1]),
    (4, lambda lens: lens.float()), (5, lambda start: start[:-1]), (5, lambda start: start[::2]),
    (1, lambda k: k.to("meta")), (0, lambda q: q.to("meta"))])
def test_kernel_refuses(index, change):
    """A wrong dtype, shape, stride or device that reads other memory instead of saying so."""
    paged = on_device([(5, 1), (3, 1)])
    paged.write()
    args, settings = paged.arguments()
    out = torch.full_like(paged.q, 7)
    with pytest.raises(ValueError):
        kernels.paged_attention(*changed(args, index, change), **settings, out=out)
    assert out.eq(7).all()
    with pytest.raises(ValueError, match="out must be"):
        kernels.paged_attention(*args, **settings, out=out[:-1])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["ours", "heads first", "K beside V", "padded rows"])
@pytest.mark.parametrize("sizes", [(1, 2, 8), (4, 3, 80), (64, 8, 128)], ids=str)
def test_write_kv_kernel(sizes, layout, dtype):
    """A token in another slot than its own, a neighbour overwritten, padding that is written."""
    block_size, num_kv_heads, head_dim = sizes
    caches = strided_caches(layout, 7, block_size, num_kv_heads, head_dim, dtype, DEVICE)
    want = [cache.normal_().clone() for cache in caches]
    slots = torch.randperm(7 * block_size, device=DEVICE)[:5]
    qkv = torch.randn(5, 3 * num_kv_heads, head_dim, device=DEVICE).to(dtype)
    _, k, v = qkv.split(num_kv_heads, dim=1)                          # views, as the model has them
    kernels.write_kv_reference(k, v, *want, slots)
    kernels.write_kv(k, v, *caches, slots)
    kernels.write_kv(k + 1, v, *(cache[1:] for cache in caches),      # block -1: a graph's padding
                     torch.full_like(slots, -block_size))
    assert all(torch.equal(*pair) for pair in zip(caches, want, strict=True))
    apart = torch.stack((v, v), 2)[:, :, 0]                           # a gap behind each head
    for bad in ((k.double(), v, *caches, slots), (k, v[:-1], *caches, slots),
                (apart, v, *caches, slots), (k, apart, *caches, slots),
                (k, v, *caches, slots.int()), (k, v, caches[0], caches[1][:-1], slots)):
        with pytest.raises(ValueError):
            kernels.write_kv(*bad)


def a_row_and_its_matrices(heads, width, inner, head_dim, dtype):
    """Arguments of linear for each place that it has in a layer, and for the head: one row each."""
    gen = torch.Generator().manual_seed(width)

    def normal(*shape):
        return torch.randn(shape, generator=gen).to(DEVICE, dtype)

    def matrix(num_out, num_in):
        module = torch.nn.Linear(num_in, num_out, bias=False, device=DEVICE, dtype=dtype)
        module.weight.data = normal(num_out, num_in) * num_in ** -0.5
        return module

    norm = torch.nn.RMSNorm(width, 1e-5, device=DEVICE, dtype=dtype)
    norm.weight.data = 1 + normal(width) / 4
    x, rope = normal(1, width), tuple(normal(1, 1, head_dim // 2) for _ in range(2))
    qkv = matrix(sum(heads) * head_dim, width)
    return {"qkv": ((x, qkv, norm), {"rope": rope, "heads": heads}),
            "up": ((x, matrix(2 * inner, width), norm), {"activation": nanopaged.gate_and_up}),
            "down": ((normal(1, inner), matrix(width, inner)), {"residual": x}),
            "head": ((x, matrix(2 * inner + 1, width), norm), {})}


def in_float64(x):
    """The same tensor, module, tuple of them, or whatever else, in float64."""
    if isinstance(x, tuple):
        return tuple(map(in_float64, x))
    return copy.deepcopy(x).double() if isinstance(x, torch.Tensor | torch.nn.Module) else x


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["qkv", "up", "down", "head"])
@pytest.mark.parametrize("sizes", [((3, 1, 1), 48, 80, 16), ((4, 4, 4), 256, 100, 64),
                                   ((4, 2, 2), 95, 514, 6)], ids=str)
@torch.inference_mode()
def test_linear_kernel(sizes, place, dtype):
    """A pair of rows that is none, an odd last row, v turned too, a residual of other rows.

    The result is rounded once, whatever stands around the product.
    """
    args, kwargs = a_row_and_its_matrices(*sizes, dtype)[place]
    got = kernels.linear(*args, **kwargs)
    want = kernels.linear_reference(*in_float64(args),
                                    **{name: in_float64(x) for name, x in kwargs.items()})
    assert got.shape == want.shape and got.dtype == dtype
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error < RELATIVE[dtype], f"relative error {error}"
    if place == "head":                                # of a chunk whose logits nobody wants
        assert kernels.linear(args[0][:0], *args[1:]).shape == (0, want.shape[1])


@needs_triton
def test_a_row_goes_through_the_model(monkeypatch):
    """A layer that gives the kernel another matrix, norm or residual than the compiled one."""
    folder = nanopaged.find_model("tiny")
    config, calls = nanopaged.load_config(folder), []
    model = nanopaged.load_model(config, folder, DEVICE, torch.float32)
    assert (model.halves_of_one[2] is kernels.linear) == GPU          # a CPU computes by itself
    kv_cache = kernels.new_kv_cache(config.num_hidden_layers, 3, 4, config.num_key_value_heads,
                                    config.head_dim, torch.float32, DEVICE).normal_()
    batch = kernels.flat_batch([([7], 9, [2, 0, 1], True)], 4, torch.device(DEVICE))
    model.halves_of_one, linear = model.halves, kernels.linear
    want = model(batch, kv_cache)
    monkeypatch.setattr(kernels, "linear", lambda *args, **kwargs: (
        calls.append(args[1].weight), linear(*args, **kwargs))[1])
    model.halves_of_one = *model.halves[:2], kernels.linear
    got = model(batch, kv_cache)
    assert len(calls) == 4 * config.num_hidden_layers + 1
    assert (got - want).norm() / want.norm() < 1e-5


@needs_triton
def test_linear_kernel_refuses():
    """Two rows of which one is computed; a matrix that is read as if it were another."""
    (x, matrix, norm), _ = a_row_and_its_matrices((3, 1, 1), 48, 80, 16, torch.float32)["head"]
    transposed = copy.deepcopy(matrix)
    transposed.weight.data = matrix.weight.data.T.contiguous().T
    for bad in ((x.repeat(2, 1), matrix), (x[:, 1:], matrix), (x.half(), matrix), (x, transposed)):
        with pytest.raises(ValueError, match="must be"):
            kernels.linear(*bad, norm)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 8), (4, 3, 80), (16, 8, 128)], ids=str)
def test_copy_blocks_kernel(sizes, dtype):
    """A layer, or V, left out; a neighbour of the destination overwritten; no pairs at all."""
    cache = kernels.new_kv_cache(3, 9, *sizes, dtype, DEVICE).normal_()
    want = cache.clone()
    for pairs in ([[4, 1]], [[2, 8], [0, 3], [2, 7]], []):
        pairs = torch.tensor(pairs, dtype=torch.int64, device=DEVICE).view(-1, 2)
        kernels.copy_blocks_reference(want, want, pairs)
        kernels.copy_blocks(cache, pairs)
        assert torch.equal(cache, want)
    for bad in (pairs.int(), pairs.T, pairs.view(2, 0)):
        with pytest.raises(ValueError):
            kernels.copy_blocks(cache, bad)
    with pytest.raises(ValueError):
        kernels.copy_blocks(cache[..., ::2], pairs)


def test_kernels_refuse_a_cpu(monkeypatch):
    """A silent fallback: the caller would believe that the kernel ran."""
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    paged = Paged([(5, 1)])
    args, settings = paged.arguments()
    for call in (lambda: kernels.paged_attention(*args, **settings),
                 lambda: kernels.write_kv(paged.q, paged.q, paged.q[None], paged.q[None],
                                          torch.tensor([0])),
                 lambda: kernels.copy_blocks(torch.zeros(1, 2, 1, 1, 1, 8),
                                             torch.tensor([[0, 0]])),
                 lambda: kernels.linear(paged.q[0, :1], torch.nn.Linear(8, 8, bias=False))):
        with pytest.raises(ValueError, match="reference"):
            call()
