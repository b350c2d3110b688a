"""Five Triton kernels for the same decode over a paged cache, from naive to fast.

    python tutorial/05_triton_kernel/steps.py             right or wrong, and what is counted
    python tutorial/05_triton_kernel/steps.py --bench     on a GPU: milliseconds

    step      one program has                  its loop takes             what is new
    1         a query head of a sequence       a token                    one pass, softmax included
    2         the same                         a tile of tokens           loads that do not wait
    3         the G heads of a KV head         a tile                     K and V are read once
    4         the same                         a tile                     the next ones on their way
    5         the same, in a part of the text  a tile                     programs for every SM

Each kernel is the one before with a few lines changed: compare them side by side. Without a GPU
they run in Triton's interpreter, which executes them line by line in numpy.

Shapes: S sequences, each with one query; M blocks of a table row, N blocks of the pool, B block
size, H query heads, K KV heads, G = H / K, D head_dim (here a power of two, 16 or more). q and out
are (S, H, D), a layer's K and V (N, B, K, D), all contiguous: slot s, KV head h begins at element
(s * K + h) * D.
"""

import argparse
import importlib.util
import itertools
import math
import os
import random
import sys
import warnings
from functools import partial
from pathlib import Path

with warnings.catch_warnings(action="ignore"):     # torch's, that numpy is absent: see main()
    import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

GPU = torch.cuda.is_available()
if not GPU and all(map(importlib.util.find_spec, ("triton", "numpy"))):
    os.environ.setdefault("TRITON_INTERPRET", "1")                     # before kernels.py reads it

import kernels  # noqa: E402
from kernels import tl, triton  # noqa: E402       (or what lets this file be read without Triton)

LOG2_E = math.log2(math.e)     # exp2 is what the hardware has: e^x = 2^(x log2 e)


# ---- step 1: one token at a time -----------------------------------------------------------------


@triton.jit
def one_token(q, k_cache, v_cache, tables, context_lens, out, M, scale, K: tl.constexpr,
              G: tl.constexpr, D: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr):
    """A query head of a sequence: an online softmax over its tokens, one by one."""
    seq, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D)
    context_len = tl.load(context_lens + seq)
    query = tl.load(q + (seq * K * G + head) * D + d).to(tl.float32)             # (D,)
    top, total, y = -1e30, 0.0, tl.zeros([D], tl.float32)
    for i in range(0, context_len):
        slot = tl.load(tables + seq * M + i // B).to(tl.int64) * B + i % B
        where = (slot * K + head // G) * D + d
        k = tl.load(k_cache + where).to(tl.float32)
        v = tl.load(v_cache + where).to(tl.float32)
        score = tl.sum(query * k, 0) * scale
        higher = tl.maximum(top, score)
        weight, shrink = tl.exp2(score - higher), tl.exp2(top - higher)
        total = total * shrink + weight
        y = y * shrink + weight * v
        top = higher
    tl.store(out + (seq * K * G + head) * D + d, y / total)


# ---- step 2: a tile of tokens --------------------------------------------------------------------


@triton.jit
def a_tile(q, k_cache, v_cache, tables, context_lens, out, M, scale, K: tl.constexpr,
           G: tl.constexpr, D: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr):
    """Step 1 with TILE tokens in each turn of the loop: one wait, one new maximum for all."""
    seq, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D)
    context_len = tl.load(context_lens + seq)
    query = tl.load(q + (seq * K * G + head) * D + d).to(tl.float32)             # (D,)
    top, total, y = -1e30, 0.0, tl.zeros([D], tl.float32)
    for tile in range(0, tl.cdiv(context_len, TILE)):
        i = tile * TILE + tl.arange(0, TILE)
        # What lies past the context may be NaN: neither its block is looked up nor its slot read.
        there = i < context_len
        slot = tl.load(tables + seq * M + i // B, mask=there, other=0).to(tl.int64) * B + i % B
        where = ((slot * K + head // G) * D)[:, None] + d[None, :]               # (TILE, D)
        k = tl.load(k_cache + where, mask=there[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_cache + where, mask=there[:, None], other=0.0).to(tl.float32)
        scores = tl.sum(query[None, :] * k, 1) * scale                           # (TILE,)
        scores = tl.where(there, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        weights, shrink = tl.exp2(scores - higher), tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 0)
        y = y * shrink + tl.sum(weights[:, None] * v, 0)
        top = higher
    tl.store(out + (seq * K * G + head) * D + d, y / total)


# ---- step 3: the heads that share K and V --------------------------------------------------------


@triton.jit
def shared_heads(q, k_cache, v_cache, tables, context_lens, out, M, scale, K: tl.constexpr,
                 G: tl.constexpr, D: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr):
    """Step 2 for all G query heads of a KV head: they are rows of one matrix, of 16 at least."""
    seq, kv_head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D)
    row = tl.arange(0, 16)                         # the fewest that tl.dot takes; G are used
    context_len = tl.load(context_lens + seq)
    at = ((seq * K + kv_head) * G + row)[:, None] * D + d[None, :]
    queries = tl.load(q + at, mask=row[:, None] < G, other=0.0)                  # (16, D)
    top, total = tl.full([16], -1e30, tl.float32), tl.zeros([16], tl.float32)
    y = tl.zeros([16, D], tl.float32)
    for tile in range(0, tl.cdiv(context_len, TILE)):
        i = tile * TILE + tl.arange(0, TILE)
        there = i < context_len
        slot = tl.load(tables + seq * M + i // B, mask=there, other=0).to(tl.int64) * B + i % B
        where = ((slot * K + kv_head) * D)[:, None] + d[None, :]                 # (TILE, D)
        k = tl.load(k_cache + where, mask=there[:, None], other=0.0)
        v = tl.load(v_cache + where, mask=there[:, None], other=0.0)
        scores = tl.dot(queries, k.T, input_precision="ieee") * scale            # (16, TILE)
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        y = tl.dot(weights.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
        top = higher
    tl.store(out + at, y / total[:, None], mask=row[:, None] < G)


# ---- step 4: the table a tile ahead, warps and stages chosen -------------------------------------


@triton.jit
def read_ahead(q, k_cache, v_cache, tables, context_lens, out, M, scale, K: tl.constexpr,
               G: tl.constexpr, D: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr):
    """Step 3, but a turn knows its blocks when it begins: the turn before has looked them up."""
    seq, kv_head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D)
    row = tl.arange(0, 16)
    context_len = tl.load(context_lens + seq)
    at = ((seq * K + kv_head) * G + row)[:, None] * D + d[None, :]
    queries = tl.load(q + at, mask=row[:, None] < G, other=0.0)                  # (16, D)
    top, total = tl.full([16], -1e30, tl.float32), tl.zeros([16], tl.float32)
    y = tl.zeros([16, D], tl.float32)
    ahead = tl.arange(0, TILE)
    block_ids = tl.load(tables + seq * M + ahead // B, mask=ahead < context_len, other=0)
    for tile in range(0, tl.cdiv(context_len, TILE)):
        i = tile * TILE + tl.arange(0, TILE)
        there = i < context_len
        slot = block_ids.to(tl.int64) * B + i % B
        where = ((slot * K + kv_head) * D)[:, None] + d[None, :]                 # (TILE, D)
        ahead = i + TILE
        block_ids = tl.load(tables + seq * M + ahead // B, mask=ahead < context_len, other=0)
        k = tl.load(k_cache + where, mask=there[:, None], other=0.0)
        v = tl.load(v_cache + where, mask=there[:, None], other=0.0)
        scores = tl.dot(queries, k.T, input_precision="ieee") * scale            # (16, TILE)
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        y = tl.dot(weights.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
        top = higher
    tl.store(out + at, y / total[:, None], mask=row[:, None] < G)


# ---- step 5: contexts in parts -------------------------------------------------------------------


@triton.jit
def in_parts(q, k_cache, v_cache, tables, context_lens, part_y, part_lse, M, scale, PARTS,
             K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
             TILE: tl.constexpr):
    """Step 4 for one of PARTS parts of the context: its result, and how much it weighs.

    That is lse, log2 of the sum of 2^score. Where a part has no token, y = 0 and lse = -1e30.
    """
    seq, kv_head, part, d = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.arange(0, D)
    row = tl.arange(0, 16)
    context_len = tl.load(context_lens + seq)
    num_tiles = tl.cdiv(context_len, TILE)
    size = tl.cdiv(num_tiles, PARTS)
    first, last = part * size, tl.minimum((part + 1) * size, num_tiles)
    head = (seq * K + kv_head) * G + row
    queries = tl.load(q + head[:, None] * D + d[None, :], mask=row[:, None] < G, other=0.0)
    top, total = tl.full([16], -1e30, tl.float32), tl.zeros([16], tl.float32)
    y = tl.zeros([16, D], tl.float32)
    ahead = first * TILE + tl.arange(0, TILE)
    block_ids = tl.load(tables + seq * M + ahead // B, mask=ahead < context_len, other=0)
    for tile in range(first, last):
        i = tile * TILE + tl.arange(0, TILE)
        there = i < context_len
        slot = block_ids.to(tl.int64) * B + i % B
        where = ((slot * K + kv_head) * D)[:, None] + d[None, :]                 # (TILE, D)
        ahead = i + TILE
        block_ids = tl.load(tables + seq * M + ahead // B, mask=ahead < context_len, other=0)
        k = tl.load(k_cache + where, mask=there[:, None], other=0.0)
        v = tl.load(v_cache + where, mask=there[:, None], other=0.0)
        scores = tl.dot(queries, k.T, input_precision="ieee") * scale            # (16, TILE)
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        y = tl.dot(weights.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
        top = higher
    total = tl.where(total > 0, total, 1.0)        # neither 0 / 0 nor log2(0)
    here = head * PARTS + part                     # the parts of a head lie together
    tl.store(part_y + here[:, None] * D + d[None, :], y / total[:, None], mask=row[:, None] < G)
    tl.store(part_lse + here, top + tl.log2(total), mask=row < G)


@triton.jit
def merge(out, part_y, part_lse, PARTS, D: tl.constexpr, ROOM: tl.constexpr):
    """One query head: the results of its parts, each by its share of the whole softmax."""
    head, part, d = tl.program_id(0), tl.arange(0, ROOM), tl.arange(0, D)
    here = head * PARTS + part
    lse = tl.load(part_lse + here, mask=part < PARTS, other=float("-inf"))
    ys = tl.load(part_y + here[:, None] * D + d[None, :], mask=part[:, None] < PARTS, other=0.0)
    weights = tl.exp2(lse - tl.max(lse, 0))
    tl.store(out + head * D + d, tl.sum(weights[:, None] * ys, 0) / tl.sum(weights, 0))


# ---- the ladder ----------------------------------------------------------------------------------

# (name, kernel, whether a program has all G heads of a KV head)
STEPS = (("1 one token", one_token, False), ("2 a tile", a_tile, False),
         ("3 shared heads", shared_heads, True), ("4 read ahead", read_ahead, True),
         ("5 in parts", in_parts, True))


class Decode:
    """One decode step: lengths, and what a GPU is told about them. Tensors come with fill().

    num_sms: multiprocessors that should have two programs each, for step 5.
    """

    def __init__(self, context_lens, num_heads, num_kv_heads, head_dim, block_size, tile, num_sms):
        self.lens, self.D, self.B, self.tile = context_lens, head_dim, block_size, tile
        self.H, self.K, self.G = num_heads, num_kv_heads, num_heads // num_kv_heads
        self.scale = head_dim ** -0.5
        programs = len(context_lens) * num_kv_heads                    # of steps 3 and 4
        self.parts, self.many = min(64, -(-2 * num_sms // programs)), programs >= 1.5 * num_sms

    def fill(self, dtype, device, tables=None):
        """Random q, K and V; blocks in random order, unless `tables` are given; else only NaN."""
        generator = torch.Generator(device).manual_seed(0)
        options = {"dtype": dtype, "device": device}
        if tables is None:
            counts = [-(-num // self.B) for num in self.lens]
            ids = random.Random(0).sample(range(sum(counts)), sum(counts))
            tables = [[ids.pop() for _ in range(count)] for count in counts]
        num_blocks, width = 1 + max(map(max, tables)), max(map(len, tables))
        self.k_cache, self.v_cache = torch.full((2, num_blocks, self.B, self.K, self.D), math.nan,
                                                **options)
        for table, num in zip(tables, self.lens, strict=True):
            slots = (torch.tensor(table, device=device)[:, None] * self.B
                     + torch.arange(self.B, device=device)).flatten()[:num]
            kernels.write_kv_reference(
                *torch.randn(2, num, self.K, self.D, generator=generator, **options),
                self.k_cache, self.v_cache, slots)
        self.q = torch.randn(len(self.lens), self.H, self.D, generator=generator, **options)
        tables = [table + [0] * (width - len(table)) for table in tables]
        self.tables, self.context_lens, self.query_start = (
            torch.tensor(x, dtype=torch.int32, device=device)
            for x in (tables, self.lens, range(len(self.lens) + 1)))
        return self

    def attend(self, attention, dtype):
        """kernels.paged_attention or its reference, with q, K and V in `dtype`."""
        return attention(*(x.to(dtype) for x in (self.q, self.k_cache, self.v_cache)),
                         self.tables, self.context_lens, self.query_start, max_query_len=1,
                         scale=self.scale)


def grid(case, kernel, shared):
    """How many programs a step launches, as Triton takes it."""
    return (len(case.lens), case.K if shared else case.H, *[case.parts] * (kernel is in_parts))


def warps_and_stages(case, kernel):
    """Triton's own choice, 4 and 3, for steps 1 to 3; then measured, as nobody can compute it.

    Stages are how many turns of the loop are in work at once: 2 fetch one tile ahead, 3 two. Where
    programs are few, each needs more on its way; where they are many, room for four on an SM.
    """
    if kernel in (one_token, a_tile, shared_heads):
        return {}
    return {"num_warps": 2, "num_stages": 2 if case.many else 3}


def launch(case, kernel, shared, options=None):
    """Run a step -> (S, H, D). Cost: step 5 makes two launches, and a buffer for the parts."""
    options = warps_and_stages(case, kernel) if options is None else options
    S, out = len(case.lens), torch.empty_like(case.q)
    given = (case.q, case.k_cache, case.v_cache, case.tables, case.context_lens)
    sizes = (case.K, case.G, case.D, case.B, case.tile)
    numbers = (case.tables.stride(0), case.scale * LOG2_E)
    if kernel is not in_parts:
        kernel[grid(case, kernel, shared)](*given, out, *numbers, *sizes, **options)
        return out
    rows = S * case.H * case.parts
    part_y, part_lse = (case.q.new_empty(rows * n, dtype=torch.float32) for n in (case.D, 1))
    kernel[grid(case, kernel, shared)](*given, part_y, part_lse, *numbers, case.parts, *sizes,
                                       **options)
    merge[(S * case.H,)](out, part_y, part_lse, case.parts, case.D,
                         triton.next_power_of_2(case.parts))
    return out


def count(case, kernel, shared, element_bytes):
    """What limits a step: programs, turns of the longest loop, bytes of K and V that are loaded."""
    turns = max(case.lens)
    if kernel is not one_token:
        turns = -(-turns // case.tile)
    if kernel is in_parts:
        turns = -(-turns // case.parts)
    tokens = sum(case.lens) * (case.K if shared else case.H)
    return math.prod(grid(case, kernel, shared)), turns, 2 * tokens * case.D * element_bytes


# ---- right or wrong ------------------------------------------------------------------------------

# float32 against float64 with the same numbers: sums of at most 100 products of unit size are off
# by some 1e-6, TF32, with its 10 bits, would be by some 1e-3.
TOLERANCE = 1e-5
# Three sequences in blocks of 4: the paper's request of chapter 3, chapter 4's other one, and one
# of 100 tokens in blocks 16 to 40; with tiny's heads.
SMALL = ([8, 11, 100], 6, 2, 32, 4, 16, 12)
TABLES = [[7, 1], [12, 2, 9], [(11 * i) % 25 + 16 for i in range(25)]]
LARGE = {"64 x 1024": [1024] * 64, "1 x 8192": [8192]}
SIZES = (32, 8, 128, 16, 64, kernels.NUM_SMS)      # of LARGE: H, K, D, B, tile, and an H100's SMs


def is_right(case, result):
    """Whether the result is the reference's. NaN compares false."""
    expected = case.attend(kernels.paged_attention_reference, torch.float64)
    return bool((result - expected).abs().max() < TOLERANCE)


def measure_the_problem(case):
    """What chapter 4's reference moves: it copies the K and V that are read, then reads them."""
    needed = count(case, shared_heads, True, 4)[2]
    moved = 0

    def index_select(cache, *args):
        nonlocal moved
        copy = original(cache, *args)
        moved += 2 * copy.nbytes                   # read and written; and attention reads `needed`
        return copy

    original, torch.Tensor.index_select = torch.Tensor.index_select, index_select
    try:
        case.attend(kernels.paged_attention_reference, torch.float32)
    finally:
        torch.Tensor.index_select = original
    print(f"K and V that a decode of {len(case.lens)} sequences must read: {needed:,} bytes")
    print(f"chapter 4's reference moves {moved + needed:,}, one sequence after the other")


def show():
    """The output of the chapter: the same on any machine."""
    case = Decode(*SMALL).fill(torch.float32, "cuda" if GPU else "cpu", TABLES)
    measure_the_problem(case)
    print(f"\ncontexts of {case.lens[0]}, {case.lens[1]} and {case.lens[2]} tokens in blocks of "
          f"{case.B}, tiles of {case.tile}; {case.H} query heads, {case.K} KV heads")
    print(f"{'step':15} programs  turns  bytes loaded  within 1e-5")
    for name, *step in STEPS:
        programs, turns, loaded = count(case, *step, 4)
        right = "yes" if is_right(case, launch(case, *step)) else "NO"
        print(f"{name:15} {programs:8} {turns:6} {loaded:13,}  {right}")
    cases = [Decode(lens, *SIZES) for lens in LARGE.values()]
    print(f"\na GPU's in bfloat16: {cases[0].H} query heads, {cases[0].K} KV heads, "
          f"D = {cases[0].D}, tiles of {cases[0].tile}")
    print(f"{'':15}" + "".join(f"{title:>26}" for title in LARGE))
    print(f"{'step':15}" + " ".join([" programs  turns       MB"] * len(LARGE)))
    for name, *step in STEPS:
        counts = [count(case, *step, 2) for case in cases]
        print(f"{name:15}" + "".join(f"{programs:9,} {turns:6,} {loaded / 1e6:8,.1f} "
                                     for programs, turns, loaded in counts).rstrip())


# ---- on a GPU ------------------------------------------------------------------------------------

# |got - want| / |want|: bfloat16 has 8 bits, and weights and result are rounded once each.
BFLOAT16 = 4e-3


def milliseconds(run):
    """Median time of a call, the L2 cache emptied before each."""
    from triton.testing import do_bench
    return do_bench(run, warmup=20, rep=120, return_mode="median")


def replay(run):
    """The call as a CUDA graph's replay: what Python needs for a launch is not in the time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()                                      # compiles, which no capture may contain
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth():
    """Bytes that a copy of 1 GiB reads and writes a millisecond."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(lambda: y.copy_(x))


def measure(name, cases, calls, wants, copy):
    """Print a row: for each case the milliseconds, and how much of a copy's bandwidth they are."""
    cells = []
    for case, call, want in zip(cases, calls, wants, strict=True):
        error = ((call().float() - want).norm() / want.norm()).item()
        assert error < BFLOAT16, f"{name}: relative error {error}"
        ms, needed = milliseconds(replay(call)), count(case, shared_heads, True, 2)[2]
        cells.append(f"{ms:.3f} | {needed / ms / copy:.0%}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def bench():
    """Two tables of milliseconds: the steps, and step 4 with other warps and stages."""
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton "
          f"{triton.__version__}: a copy moves {copy / 1e6:,.0f} GB/s")
    cases = [Decode(lens, *SIZES).fill(torch.bfloat16, "cuda") for lens in LARGE.values()]
    wants = [case.attend(kernels.paged_attention_reference, torch.float32) for case in cases]
    head = " | ".join(f"{title}, ms | of copy" for title in LARGE)
    print(f"\n| step | {head} |\n| :-- |" + " --: | --: |" * len(LARGE))
    for name, *step in STEPS:
        measure(name, cases, [partial(launch, case, *step) for case in cases], wants, copy)
    measure("`paged_attention`", cases, [
        partial(case.attend, kernels.paged_attention, torch.bfloat16) for case in cases],
        wants, copy)
    print(f"\n| step 4: warps, stages | {head} |\n| :-- |" + " --: | --: |" * len(LARGE))
    for warps, stages in itertools.product((2, 4, 8), (2, 3, 4)):
        options = {"num_warps": warps, "num_stages": stages}
        measure(f"{warps}, {stages}", cases, [
            partial(launch, case, read_ahead, True, options) for case in cases], wants, copy)


def fail(message):
    print(f"steps.py: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bench", action="store_true", help="milliseconds, on a GPU")
    args = parser.parse_args()
    if not hasattr(triton, "cdiv"):
        fail("kernels need a GPU, or the interpreter of Triton: pip install triton numpy")
    if args.bench and (kernels.INTERPRETED or not GPU):
        fail("--bench needs a GPU: the interpreter's times say nothing")
    bench() if args.bench else show()


if __name__ == "__main__":
    main()
