"""kernels.py: the torch references, against a dense computation in float64, one token at a time."""

import math
import random

import pytest
import torch
from helpers import ROOT  # noqa: F401  (one thread, as the matrices are tiny)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels

# Inputs are the same rounded numbers on both sides, so what is left is the arithmetic: sums of at
# most a few hundred products of unit size in float32; one rounding of softmax weights and of the
# result in the short types (float16 has 11 bits, bfloat16 8: 2^-9 of values up to about 4).
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def strided_caches(layout, num_blocks, block_size, num_kv_heads, head_dim, dtype):
    """K and V caches of logical shape (N, B, K, D), in one of the layouts a kernel may choose."""
    n, b, k, d = num_blocks, block_size, num_kv_heads, head_dim
    if layout == "ours":
        return kernels.new_kv_cache(2, n, b, k, d, dtype, "cpu")[1]
    if layout == "heads first":                       # a head's slots of a block stand together
        return torch.empty(2, n, k, b, d, dtype=dtype).transpose(2, 3)
    if layout == "K beside V":                        # of one block
        return torch.empty(n, 2, b, k, d, dtype=dtype).transpose(0, 1)
    if layout == "K beside V in a head":
        return torch.empty(n, b, k, 2, d, dtype=dtype).permute(3, 0, 1, 2, 4)
    assert layout == "padded rows"                    # D contiguous, with a gap behind it
    return torch.empty(2, n, b, k, d + 3, dtype=dtype)[..., :d]


class Paged:
    """A ragged batch: each sequence has `past` cached tokens and `new` ones, in random blocks.

    Everything that must not be read is poison: unused slots and other blocks are NaN, and the
    tables' padding names blocks that do not exist.
    """

    def __init__(self, lens, heads=(4, 2), head_dim=8, block_size=4, dtype=torch.float32,
                 layout="ours", seed=0):
        rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
        num_heads, num_kv_heads = heads
        self.lens, self.scale = lens, 1.7 / math.sqrt(head_dim)      # not the default scale
        num_blocks = [-(-(past + new) // block_size) for past, new in lens]
        ids = list(range(sum(num_blocks) + 3))                       # 3 blocks of someone else
        rng.shuffle(ids)
        self.tables = [[ids.pop() for _ in range(n)] for n in num_blocks]
        self.k_cache, self.v_cache = strided_caches(layout, sum(num_blocks) + 3, block_size,
                                                    num_kv_heads, head_dim, dtype)
        self.k_cache.fill_(math.nan)
        self.v_cache.fill_(math.nan)

        def normal(*shape):
            return torch.randn(shape, generator=gen).to(dtype)

        num_new = sum(new for _, new in lens)
        self.q = normal(num_new, num_heads, head_dim)
        self.keys = [normal(past + new, num_kv_heads, head_dim) * 2 for past, new in lens]
        self.values = [normal(past + new, num_kv_heads, head_dim) for past, new in lens]
        self.slots = [[table[i // block_size] * block_size + i % block_size
                       for i in range(past + new)]
                      for table, (past, new) in zip(self.tables, lens, strict=True)]

    def write(self):
        """Put the K and V of all tokens into their slots, past and new ones alike."""
        slots = torch.tensor([slot for slots in self.slots for slot in slots])
        kernels.write_kv_reference(torch.cat(self.keys), torch.cat(self.values), self.k_cache,
                                   self.v_cache, slots)

    def attend(self, **settings):
        """paged_attention_reference with the maps that the engine would build."""
        width = max(map(len, self.tables)) + 2
        tables = [table + [10**6 + i for i in range(width - len(table))] for table in self.tables]
        news = torch.tensor([new for _, new in self.lens])
        start = torch.cat((torch.zeros(1, dtype=torch.long), news.cumsum(0)))
        return kernels.paged_attention_reference(
            self.q, self.k_cache, self.v_cache, torch.tensor(tables, dtype=torch.int32),
            torch.tensor([past + new for past, new in self.lens], dtype=torch.int32),
            start.int(), max_query_len=int(news.max()), scale=self.scale, **settings)

    def dense(self):
        """The same by the textbook, in float64: for each token and head, over all before it."""
        out, row = torch.empty(self.q.shape, dtype=torch.float64), 0
        group = self.q.shape[1] // self.keys[0].shape[1]
        for (past, new), keys, values in zip(self.lens, self.keys, self.values, strict=True):
            for position in range(past, past + new):
                for head in range(self.q.shape[1]):
                    k = keys[:position + 1, head // group].double()
                    scores = k @ self.q[row, head].double() * self.scale
                    weights = (scores - scores.max()).exp()
                    v = values[:position + 1, head // group].double()
                    out[row, head] = weights @ v / weights.sum()
                row += 1
        return out


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
