"""What runs on the device: paged KV cache and attention (paper 5.1), products, sampling, graphs.

One block is `block_size` slots; a slot holds one token's K and V of one layer. The engine hands
over these maps, and nothing here knows what a request is:

    slot_mapping  (T,)    where each new token's K and V go: block_id * block_size + offset
    block_tables  (S, M)  the blocks of each sequence, in the order of its text
    context_lens  (S,)    how many tokens each may read, this step's included
    query_start   (S+1,)  sequence s owns rows query_start[s] : query_start[s+1] of the flat batch

Each operation stands here as a `_reference` in plain torch, which says what it *means* and is what
a CPU runs. Where a Triton kernel does the same on a GPU, it follows its reference.

Dimension key: T tokens of the flat batch, S sequences, M blocks of a table row, N blocks of the
pool, B block size, H query heads, K KV heads, G = H / K, D head_dim, L layers. In the kernels
`q_head`, say, is a stride: how many elements lie between a head of q and the next.
"""

import functools
import os
from array import array
from contextlib import suppress
from itertools import accumulate, compress, zip_longest
from types import SimpleNamespace

import torch
import torch.nn.functional as F

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"     # triton, too, reads it when imported

# What stands in for Triton where it is not there (macOS, Windows): the kernels are plain text then.
# Where nothing could run it, it is not imported either: that would take a third of a second.
triton = tl = SimpleNamespace(constexpr=None, jit=lambda *_, **__: lambda kernel: kernel)
if INTERPRETED or torch.cuda.is_available():
    with suppress(ImportError):
        import triton
        import triton.language as tl

# The reference attends queries in runs of at most this many, so that the mask of a long prompt
# stays small: 512 x 8,192 keys are 4 MB (times H / K), where 8,192 x 8,192 would be 67 MB.
MAX_QUERY_RUN = 512

NUM_SMS = 132         # of an H100 or H200. Elsewhere work is cut a little too fine or too coarse
MAX_PARTS = 64        # of one context: merge_kernel reads all of them at once
PIECE = 256           # tokens of a vocabulary: see draw_reference
LOG2_E = 1.4426950408889634      # e ** x is 2 ** (x * LOG2_E), which is faster


def new_kv_cache(num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype, device):
    """The whole KV cache as one tensor (L, 2, N, B, K, D); index 1 picks K (0) or V (1).

    Uninitialised on purpose: no slot is read before its token was written, so on a CPU the
    memory of a block is not even touched until a sequence needs the block.
    """
    shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
    return torch.empty(shape, dtype=dtype, device=device)


def fit_kv_cache(num_blocks, num_layers, *shape, utilization=1.0, largest_step=None):
    """new_kv_cache(num_layers, num_blocks, *shape) or, for None, with as many blocks as fit.

    A GPU has `utilization` of its memory for them, less what is in use once largest_step(a small
    cache) has run, as torch keeps what that took; a CPU 1 GiB, or for a given num_blocks all of its
    memory. There, a block that was never written costs nothing.
    Raises: MemoryError.
    """
    block, memory = new_kv_cache(num_layers, 1, *shape), 1 << 30
    if num_blocks and hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if block.is_cuda:
        torch.cuda.empty_cache()                   # what a model that is gone has left
        largest_step(block)
        free, total = torch.cuda.mem_get_info()
        memory = int(free - total * (1 - utilization))
    # as many as fit; more than 2 ** 20 would slow the host
    num_blocks = max(1, min(memory // block.nbytes, 1 << 20)) if num_blocks is None else num_blocks
    if (needed := num_blocks * block.nbytes) > memory:
        raise MemoryError(f"{num_blocks} KV blocks take {needed:,} bytes, where {block.device} has "
                          f"{memory:,}; lower num_blocks, swap_blocks or block_size")
    return new_kv_cache(num_layers, num_blocks, *shape)


def check_arguments(device, dtype, **arguments):
    """Refuse what a kernel would misread: arguments of one dtype, each (tensor, shape[, strides]).

    Any strides will do if none are given, but the last must be 1. Raises: ValueError.
    """
    if device.type not in ("cuda", "cpu")[:1 + INTERPRETED] or not hasattr(triton, "cdiv"):
        raise ValueError(f"no Triton on {device}: set TRITON_INTERPRET=1, or call the _reference")
    for name, (x, shape, *strides) in arguments.items():
        wanted = [dtype, tuple(shape), device, *(strides or [(*x.stride()[:-1], 1)])]
        if (given := [x.dtype, tuple(x.shape), x.device, x.stride()]) != wanted:
            raise ValueError(f"{name} must be {wanted} (dtype, shape, device, strides); is {given}")


def write_kv_reference(k, v, k_cache, v_cache, slot_mapping):
    """Store the K and V of T tokens in their slots.

    Shapes: k, v (T, K, D); k_cache, v_cache (N, B, K, D), any strides; slot_mapping (T,) int64,
        none of them negative: only the kernel takes padding.
    """
    where = slot_mapping // k_cache.shape[1], slot_mapping % k_cache.shape[1]    # block, offset
    k_cache[where], v_cache[where] = k, v


@triton.jit
def write_kv_kernel(k, v, k_cache, v_cache, slot_mapping, k_token, v_token, c_block, c_slot, c_head,
                    B: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """One program a token: K * D = SIZE numbers, which in k and v are one row, head by head."""
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNK)
    slot = tl.load(slot_mapping + token)
    real = (i < SIZE) & (slot >= 0)
    where = slot // B * c_block + slot % B * c_slot + i // D * c_head + i % D
    tl.store(k_cache + where, tl.load(k + token * k_token + i, mask=real), real)
    tl.store(v_cache + where, tl.load(v + token * v_token + i, mask=real), real)


def write_kv(k, v, k_cache, v_cache, slot_mapping):
    """write_kv_reference in one launch: the paper's fused reshape and block write (5.1).

    Here the heads of a token must lie one behind the other in k and v, as in the model's qkv. A
    token of a negative slot is not written: the padding of a captured graph.
    """
    (T, K, D), (N, B) = k.shape, k_cache.shape[:2]
    check_arguments(k.device, k.dtype, k=(k, (T, K, D), (k.stride(0), D, 1)),
                    v=(v, k.shape, (v.stride(0), D, 1)), k_cache=(k_cache, (N, B, K, D)),
                    v_cache=(v_cache, k_cache.shape, k_cache.stride()))
    check_arguments(k.device, torch.int64, slot_mapping=(slot_mapping, (T,)))
    write_kv_kernel[(T,)](k, v, k_cache, v_cache, slot_mapping, k.stride(0), v.stride(0),
                          *k_cache.stride()[:3], B, D, K * D, triton.next_power_of_2(K * D))


def copy_blocks_reference(source, target, pairs):
    """Copy blocks of one cache to blocks of another, or of the same, in all layers (paper 5.1).

    Shapes: source, target (L, 2, N, B, K, D); pairs (P, 2) int64: from, to. Within one cache no
        block is both. Copy-on-write, swap out and swap in are this one operation.
    """
    here, there = pairs.T
    target[:, :, there] = source[:, :, here].to(target.device)


@triton.jit
def copy_blocks_kernel(kv_cache, pairs, c_kv, c_block, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """One program for each pair, each of the 2L tensors in which it is copied, each chunk."""
    pair, i = pairs + 2 * tl.program_id(0), tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    base = kv_cache + tl.program_id(1).to(tl.int64) * c_kv + i
    x = tl.load(base + tl.load(pair) * c_block, mask=i < SIZE)
    tl.store(base + tl.load(pair + 1) * c_block, x, mask=i < SIZE)


def copy_blocks(kv_cache, pairs):
    """copy_blocks_reference within one cache, all layers in one launch (paper 5.1).

    Shapes: kv_cache (L, 2, N, B, K, D), as new_kv_cache makes it; pairs (P, 2) int64. The
        destinations are distinct, and none is also a source: the copies have no order.
    Raises: ValueError, or torch's RuntimeError for a cache whose blocks are in several pieces.
    """
    # (2L, N, B * K * D), or torch refuses, if a block is not one piece of memory
    kv = kv_cache.view(2 * len(kv_cache), kv_cache.shape[2], -1)
    check_arguments(kv.device, kv.dtype, kv_cache=(kv, kv.shape))
    check_arguments(kv.device, torch.int64, pairs=(pairs, (len(pairs), 2), (2, 1)))
    copy_blocks_kernel[(len(pairs), len(kv), triton.cdiv(kv.shape[2], 4096))](
        kv, pairs, *kv.stride()[:2], SIZE=kv.shape[2], CHUNK=4096)


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
    out = torch.empty_like(q) if out is None else out
    block_size, G = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    starts = query_start.tolist()
    for seq, context_len in enumerate(context_lens.tolist()):
        # neither the table's padding nor a slot past the context is read: it may hold NaN
        blocks = block_tables[seq, :-(-context_len // block_size)]
        k, v = (cache.index_select(0, blocks).flatten(0, 1).transpose(0, 1)[None]
                for cache in (k_cache, v_cache))                        # (1, K, whole blocks, D)
        for row in range(starts[seq], starts[seq + 1], MAX_QUERY_RUN):
            Q = min(MAX_QUERY_RUN, starts[seq + 1] - row)
            # What the last of them sees. 5 queries in a context of 9, cut after 2: 9 - 5 + 2 = 6.
            keys = torch.arange(context_len - (starts[seq + 1] - row) + Q, device=q.device)
            # The G = H / K query heads that share a KV head become rows of one matrix, (K, QG, D),
            # so its K and V are read once for all of them and never repeated in memory.
            packed = q[row:row + Q].unflatten(1, (-1, G)).transpose(0, 1).flatten(1, 2)
            # the queries' positions are the last Q of the keys'; a decode sees all
            mask = keys <= keys[-Q:].repeat_interleave(G)[:, None] if Q > 1 else None  # (QG, seen)
            y = F.scaled_dot_product_attention(packed[None], k[:, :, :len(keys)],
                                               v[:, :, :len(keys)], mask, scale=scale)
            out[row:row + Q] = y[0].unflatten(1, (Q, G)).transpose(0, 1).flatten(1, 2)
    return out


# ---- the same as a Triton kernel ----------------------------------------------------------------
# Why: the reference copies all K and V that are read, then reads the copies. The kernel reads each
# K and V once, where it lies, and keeps scores and softmax on the chip (online softmax: Milakov &
# Gimelshein 2018, Dao et al. 2022). A decode then takes as long as reading its KV.
#
#   rows of one program          the keys of its part of the context, a tile at a time
#                               +-------------+-------------+--------
#   query 0: its G heads        |  scores =   |             |          for each tile: look up its
#   query 1: its G heads        |  q k^T      |             |  . . .   blocks; scores; new maximum;
#   ... 16 rows, or 64          |             |             |          y = shrink * y + weights v
#                               +-------------+-------------+--------
#
# The G query heads of a KV head are rows of one matrix, so its K and V are read once for all. A
# tile's tokens are looked up one by one in the block table: block size and tile are independent.
#
# Decodes and prompts want other programs. A decode has G rows and waits for memory: 16 rows (the
# least tl.dot takes), 2 warps, and on each multiprocessor (SM) 4 programs with a tile of 32 KB on
# its way to each. A prompt waits for the matrix unit: 64 rows (the least of its fast path), 4
# warps, tiles fetched two ahead. So a batch with a prompt is two launches, and each leaves the
# other's sequences out; up to `few` queries, as many as have room in 16 rows, count as a decode.
#
# A GPU is busy when a few hundred programs run: 64 decodes x 8 KV heads will do; one decode over
# 8,192 tokens will not. So contexts are cut into parts, and merge_kernel joins their results
# (FlashDecoding, Dao et al. 2023). The host does not know the lengths (in a captured graph they
# change and the launch does not): it launches as many tiles and parts as there could be, and what
# has nothing to do ends at once. A decode is one tile; whose a prompt's tile is, follows from
# query_start: sequence s begins at tile query_start[s] // QUERIES + s, which leaves room for all
# before it. With tiles of 2 queries, and parts of at least 4 key tiles:
#
#   sequence   query_start   queries   tiles    key tiles   parts
#      0            0           5      0 1 2        9         3      key tiles 0-3, 4-7 and 8
#      1            5           0        -          -                padding
#      2            5           3       4 5         4         1      queries 0-1 and 2
#
# How fine: where tiles (times KV heads) are few, into parts that make 2 programs for each SM, but
# none below a tile (of a decode) or 64 tokens (of a prompt). Where they are many, lest one long
# context be read when all others have ended, into parts of at least 1,024 tokens while all tiles
# run at once (4 on each SM), and of 8,192 where they are more; and not at all in a step of more
# than 1,024 tokens.


# The numbers that change from step to step; Triton would compile once more for those that are 1, or
# a multiple of 16.
@triton.jit(do_not_specialize=["most_parts", "num_seqs", "few", "least", "t_seq"])
def attention_kernel(q, k_cache, v_cache, tables, context_lens, query_start, out, part_y, part_lse,
                     parts_of, most_parts, num_seqs, few, least, scale, q_token, q_head, c_block,
                     c_slot, c_head, t_seq, o_token, o_head, G: tl.constexpr, D: tl.constexpr,
                     B: tl.constexpr, DIM: tl.constexpr, SEQS: tl.constexpr, ROWS: tl.constexpr,
                     QUERIES: tl.constexpr, TILE: tl.constexpr, PROMPT: tl.constexpr):
    """A tile of queries, one KV head, a part of the context: goes to `out`, or to part_y."""
    # 1. Whose tile it is. From the end, as a prompt's last queries read the most keys: the longest
    #    work goes first.
    query_tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq = query_tile                          # a decode is one tile
    if PROMPT:
        seqs = tl.arange(0, SEQS)
        starts = tl.load(query_start + seqs, mask=seqs < num_seqs, other=1 << 30)
        seq = tl.sum((starts // QUERIES + seqs <= query_tile).to(tl.int32)) - 1
    start, context_len = tl.load(query_start + seq), tl.load(context_lens + seq)
    num_queries = tl.load(query_start + seq + 1) - start
    first_query = (query_tile - start // QUERIES - seq) * QUERIES if PROMPT else 0

    # 2. Its part of the keys that the last of its queries sees.
    seen = context_len - tl.maximum(num_queries - first_query - QUERIES, 0)
    key_tiles, part = tl.cdiv(seen, TILE), tl.program_id(2)
    size = tl.maximum(tl.cdiv(key_tiles, tl.num_programs(2)), least)
    num_parts = tl.maximum(tl.cdiv(key_tiles, size), 1)
    first, last = part * size, tl.minimum((part + 1) * size, key_tiles)
    if (first_query >= num_queries) | ((num_queries > few) != PROMPT) | (part >= num_parts):
        return                                # no such tile, the other launch's, or no such part

    # 3. Its rows, and their q.
    kv_head, row, d = tl.program_id(0), tl.arange(0, ROWS), tl.arange(0, DIM)[None, :]
    query, head = first_query + row // G, kv_head * G + row % G
    real_row = (row < QUERIES * G) & (query < num_queries)
    real = real_row[:, None] & (d < D)
    token, position = (start + query).to(tl.int64), context_len - num_queries + query
    qs = tl.load(q + (token * q_token + head * q_head)[:, None] + d, mask=real, other=0.0)

    # 4. Attend, with an online softmax. `top` starts finite: a row may see no key of a part.
    tables, column = tables + seq * t_seq, kv_head * c_head + d
    top = tl.full([ROWS], -1e30, tl.float32)
    total, y = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, DIM], tl.float32)
    # The table is read a tile ahead. Read with its own tile, it would stand before the loads of K
    # and V, and Triton's pipeline could then not have two tiles on their way.
    ahead = (first * TILE + tl.arange(0, TILE)).to(tl.uint32)    # unsigned: // 16 is one shift
    block_ids = tl.load(tables + ahead // B, mask=ahead < seen, other=0)
    for tile in range(first, last):
        key = (tile * TILE + tl.arange(0, TILE)).to(tl.uint32)
        where = (block_ids.to(tl.int64) * c_block + key % B * c_slot)[:, None] + column
        ahead = key + TILE
        block_ids = tl.load(tables + ahead // B, mask=ahead < seen, other=0)
        there = (key < seen)[:, None] & (d < D)      # else 0, for 0 * NaN is NaN
        keys = tl.load(k_cache + where, mask=there, other=0.0)
        values = tl.load(v_cache + where, mask=there, other=0.0)
        scores = tl.dot(qs, keys.T, input_precision="ieee")      # (ROWS, TILE); never TF32
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        weights, shrink = tl.exp2(scores * scale - higher[:, None]), tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        y = tl.dot(weights.to(values.dtype), values, y * shrink[:, None], input_precision="ieee")
        top = higher

    y = y / tl.where(total > 0, total, 1)[:, None]
    place = token * tl.num_programs(0) * G + head                # the parts of a row lie together
    here = place * most_parts + part
    tl.store(parts_of + place, num_parts, mask=real_row & (part == 0))
    tl.store(part_lse + here, top + tl.log2(total), mask=real_row)
    tl.store(part_y + here[:, None] * DIM + d, y, mask=real & (num_parts > 1))
    tl.store(out + (token * o_token + head * o_head)[:, None] + d, y, mask=real & (num_parts == 1))


@triton.jit(do_not_specialize=["most_parts", "num_seqs"])
def merge_kernel(out, part_y, part_lse, parts_of, most_parts, query_start, num_seqs, o_token,
                 o_head, D: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr):
    """One row and head: the results of its parts, each weighted by its share of the softmax."""
    head, token, d = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, DIM)
    place = token * tl.num_programs(0) + head
    num_parts = tl.load(parts_of + place)
    if (token >= tl.load(query_start + num_seqs)) | (num_parts == 1):
        return                                # nobody's row, or its only part has written it
    part = tl.arange(0, PARTS)
    real, here = part < num_parts, place * most_parts + part
    lse = tl.load(part_lse + here, mask=real, other=float("-inf"))
    ys = tl.load(part_y + here[:, None] * DIM + d[None, :], mask=real[:, None], other=0.0)
    weights = tl.exp2(lse - tl.maximum(tl.max(lse, 0), -1e30))       # no key at all: -inf - -1e30
    y = tl.sum(weights[:, None] * ys, 0) / tl.maximum(tl.sum(weights, 0), 1e-30)
    tl.store(out + token * o_token + head * o_head + d, y, mask=d < D)


def attention_launches(T, S, K, G, dim, longest, max_query_len, short):
    """What is launched for decodes, and for prompts if there may be any; by the rules above.

    T, S, K, G as everywhere; longest: tokens that a table has room for; short: a 16-bit type.
    Yields: the grid (KV heads, tiles, parts), few and least, attention_kernel's sizes, options.
    """
    # up to 512 sequences are looked through by one compiled kernel
    few, seqs = max(16 // G, 1), max(512, triton.next_power_of_2(S))
    for prompt in [False, True][:1 + (max_query_len > few)]:
        rows = max(64 if prompt and short else 16, triton.next_power_of_2(G))
        queries, parts = rows // G, 1
        tiles = T // queries + S if prompt else S
        items = K * min(S * triton.cdiv(max_query_len, queries), tiles)
        many = items >= 3 * NUM_SMS // 2
        if not short:          # exact float32 is off the tensor cores: large tiles gain nothing
            tile, warps, stages = 16, 2, 2
        elif prompt:           # half of the last tile is masked: not too large a tile
            tile, warps, stages = 32 if longest < 1024 else 64, 4 if dim <= 128 else 8, 3
        else:                  # where programs are few, each needs more on its way
            tile, warps, stages = (64, 2, 2) if many and dim <= 128 else (32, 2, 3)
        # where they are many, most have nothing to do; least: tokens of a part
        programs, least = ((16384, 1024 if items <= 4 * NUM_SMS else 8192) if many else
                           (2 * NUM_SMS, 64 if prompt else tile))
        # beside a long prompt, the merge would look through too many rows
        if T <= 1024 and not (many and prompt):
            parts = min(MAX_PARTS, -(-programs // items), -(-longest // least))
        yield ((K, tiles, parts), (few, least // tile), (seqs, rows, queries, tile, prompt),
               {"num_warps": warps, "num_stages": stages})


def paged_attention(q, k_cache, v_cache, block_tables, context_lens, query_start, *,
                    max_query_len, scale, out=None):
    """paged_attention_reference as a kernel: see there for the meaning, above for the method.

    The launch depends on shapes and max_query_len alone, so it can be captured in a CUDA graph and
    replayed with other lengths. Rows from query_start[-1] on are left as they are; a sequence of
    context 0 gets zeros. `scale` must be positive.
    """
    (T, H, D), (N, B, K, _), (S, M) = q.shape, k_cache.shape, block_tables.shape
    dtype = q.dtype if q.dtype in (torch.float16, torch.bfloat16) else torch.float32
    out, G = torch.empty_like(q) if out is None else out, H // K
    check_arguments(q.device, dtype, q=(q, (T, K * G, D)), k_cache=(k_cache, (N, B, K, D)),
                    out=(out, q.shape), v_cache=(v_cache, k_cache.shape, k_cache.stride()))
    check_arguments(q.device, torch.int32, block_tables=(block_tables, (S, M)),
                    context_lens=(context_lens, (S,)), query_start=(query_start, (S + 1,)))
    dim = max(16, triton.next_power_of_2(D))
    launches = [*attention_launches(T, S, K, G, dim, M * B, max_query_len, dtype != torch.float32)]
    most_parts = max(parts for (_, _, parts), *_ in launches)
    part_y, part_lse = (q.new_empty(T * H * most_parts * n, dtype=torch.float32) for n in (dim, 1))
    results = part_y, part_lse, q.new_empty(T * H, dtype=torch.int32), most_parts
    for grid, scalars, sizes, options in launches:
        attention_kernel[grid](
            q, k_cache, v_cache, block_tables, context_lens, query_start, out, *results, S,
            *scalars, scale * LOG2_E, *q.stride()[:2], *k_cache.stride()[:3],
            block_tables.stride(0), *out.stride()[:2], G, D, B, dim, *sizes, **options)
    if most_parts > 1:
        merge_kernel[(H, T)](out, *results, query_start, S, *out.stride()[:2], D, dim, MAX_PARTS)
    return out


def upload(values, device, dtype=torch.int64):
    """A tensor of these numbers; the host does not wait until a GPU has done what it is at."""
    x = torch.asarray(values, dtype=dtype)         # of a list, or of an array of just this type
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def flat_batch(rows, block_size, device):
    """One step's tokens one after the other, and the maps that say whose and where they are.

    rows: for each sequence (new token ids, position of the first, block table, whether the logits
    of its last token are wanted). `write_kv` and `attend` are the kernels on a GPU, elsewhere the
    references.
    """
    ids, firsts, tables, wanted = zip(*rows, strict=True)
    ends = [*accumulate(map(len, ids), initial=0)]
    maps = {"query_start": ends,                        # (S+1,) row of each's first token, and T
            # (S,) this step's included
            "context_lens": [first + len(new) for new, first in zip(ids, firsts, strict=True)],
            # (S, M): all as long as the longest
            "block_tables": [*zip(*zip_longest(*tables, fillvalue=0), strict=True)]}
    maps = {name: upload(values, device, torch.int32) for name, values in maps.items()}
    # Of each token, on the device: whose it is (3 tokens and 1: 0 0 0 1), and its place in that
    # text. The row behind a sequence's last token is ends[s + 1], the position context_lens[s].
    seq = torch.repeat_interleave(maps["query_start"].diff(), output_size=ends[-1])          # (T,)
    positions = torch.arange(ends[-1], device=device) - (
        maps["query_start"][1:] - maps["context_lens"])[seq]
    blocks = maps["block_tables"][seq, positions // block_size]
    write, attention = ((write_kv, paged_attention) if device.type == "cuda" else
                        (write_kv_reference, paged_attention_reference))
    return SimpleNamespace(
        # (T,), by way of an array, as they may be many: three times as fast
        input_ids=upload(array("q", [token_id for new in ids for token_id in new]), device),
        positions=positions, slot_mapping=blocks.long() * block_size + positions % block_size,
        last_rows=upload([end - 1 for end in compress(ends[1:], wanted)], device), write_kv=write,
        **maps, attend=functools.partial(attention, **maps, max_query_len=max(map(len, ids))))


def linear_reference(x, matrix, norm=None, rope=None, heads=(), activation=None, residual=None):
    """A matrix with all that stands around it in a layer: x (T, K) -> (T, N).

    (Here and in `linear`, K and N are the columns and rows of the matrix.) First x is normed, if
    there is a `norm`, then multiplied. What follows is nothing, or one of three things:
    rope, as (cos, sin), each (T, 1, D/2): the product is heads of q, of k and of v, as many as
        `heads` says; each pair (i, i + D/2) of q and k turns by its token's angle (Su et al. 2021);
    activation: a function, after which a row may be narrower;
    residual (T, N): it is added.
    """
    y = matrix(x if norm is None else norm(x))
    if rope:
        # the halves of the heads of q and k, and not of v: views, so they are turned in place
        (a, b), (cos, sin) = y.unflatten(1, (sum(heads), -1))[:, :sum(heads[:2])].chunk(2, 2), rope
        a[:], b[:] = a * cos - b * sin, b * cos + a * sin
    y = activation(y) if activation else y
    # as float32: torch's compiler would have cuBLAS add it, which copies the residual first
    return y if residual is None else (residual.float() + y.float()).to(y.dtype)


# ---- the same for one row -----------------------------------------------------------------------
# Why: the step of a single request multiplies one row, and reading the matrices is all its work. A
# kernel between two products that only norms, turns or adds a few thousand numbers makes the memory
# wait for as long as a small matrix takes. So this one does it along the way. A program reads two
# rows of the matrix, every number of them at once, and norms x, as every program does for itself:
#
#   which two                         what becomes of their products a and b
#   i and i + D/2, of a head          of q or k: a cos - b sin, b cos + a sin; of v: as they are
#   i of gate, and i of up            silu(a) b, one number
#   neighbours                        as they are; the residual is added
#
# Several rows go to cuBLAS, and what stands around them to torch's compiler (if not eager). So does
# one row of GPT-2, or with biases, but uncompiled.


@triton.jit
def linear_kernel(x, gain, weight, cos, sin, residual, out, eps, num_out, apart, num_turned,
                  K: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr):
    """Two rows of the matrix, `apart` from each other, times x: see the table above."""
    pid, k = tl.program_id(0), tl.arange(0, WIDTH)[None, :]
    # where the number of rows is odd, the last one stands for two
    row = tl.minimum(pid // apart * 2 * apart + pid % apart + tl.arange(0, 2) * apart, num_out - 1)
    weights = tl.load(weight + row.to(tl.int64)[:, None] * K + k, mask=k < K, other=0.0)
    xs = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if gain is not None:
        xs *= tl.rsqrt(tl.sum(xs * xs) / K + eps) * tl.load(gain + k, mask=k < K, other=0.0)
    y = tl.sum(weights * xs, 1)
    a, b = tl.split(y)
    if pid // apart < num_turned:             # a head of q or k
        c, s = tl.load(cos + pid % apart), tl.load(sin + pid % apart)
        y = tl.join(a * c - b * s, b * c + a * s)
    if GATED:
        row, y = pid, a * tl.sigmoid(a) * b
    if residual is not None:
        y += tl.load(residual + row)
    tl.store(out + row, y)


def linear(x, matrix, norm=None, rope=None, heads=(), activation=None, residual=None):
    """linear_reference of one row (or none) in one launch, of what LLaMA's layers have: no bias, an
    RMSNorm, and the activation silu(first half) * second half.
    """
    # rows: 1, or 0; check_arguments refuses more. Without rope x stands in for cos and sin, unread
    (N, K), (cos, sin), rows = matrix.weight.shape, rope or (x, x), min(len(x), 1)
    check_arguments(x.device, x.dtype, x=(x, (rows, K)), matrix=(matrix.weight, (N, K), (K, 1)))
    apart = N // 2 if activation else cos.shape[2] if rope else 1
    out = x.new_empty(rows, N // 2 if activation else N)
    linear_kernel[(rows * triton.cdiv(N, 2),)](
        x, norm and norm.weight, matrix.weight, cos, sin, residual, out, norm and norm.eps, N,
        apart, sum(heads[:2]), K, triton.next_power_of_2(K), activation is not None, num_warps=8)
    return out


def random_reference(seeds, counters):
    """A number in [0, 1) for each seed and counter: 40 bits of splitmix64 (Steele et al. 2014).

    Shapes: seeds int64, counters of any integers, broadcast against each other -> float64. Products
    wrap around, as they should; the masks make the right shifts logical.
    """
    x = counters + seeds * -0x61C8864680B583EB                             # 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47              # 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15              # 0x94D049BB133111EB
    return ((x ^ (x >> 31 & (1 << 33) - 1)) >> 24 & (1 << 40) - 1).double() * 2.0 ** -40


def kept_reference(weights, top_p, top_k, min_p):
    """Whether min-p, then top-k and top-p keep each token -> (S, V) bool. Of equals, the first.

    Shapes: weights (S, V) float32, as shares of anything; the options (S, 1) float64.
    """
    ranked, token_ids = weights.sort(descending=True, stable=True)
    ranked[ranked < min_p * ranked[:, :1]] = 0
    ranked[(top_k > 0) & (torch.arange(ranked.shape[1], device=ranked.device) >= top_k)] = 0
    summed = ranked.cumsum(-1, dtype=torch.float64)
    # the token that passes top_p is kept too, and so the first one always is
    kept = (ranked > 0) & ((top_p >= 1) | (summed - ranked < top_p * summed[:, -1:]))
    return kept.scatter(1, token_ids, kept)        # back to their places: all of them


def pick_reference(weights, u):
    """Of weights laid end to end, the one in which the share u of their length ends.

    Shapes: weights (S, n); u (S, 1) float64, in [0, 1) -> which (S, 1), never one of 0, but the
        first where all are; and how far into it that is, a share in [0, 1) again.
    """
    sums = weights.cumsum(-1, dtype=torch.float64)
    target = u * weights.sum(-1, keepdim=True, dtype=torch.float64)
    picked = (sums <= target).sum(-1, keepdim=True) % weights.shape[1]
    missed = (sums.gather(1, picked) - target) / weights.gather(1, picked)
    return picked, (1 - missed).clamp(0, 1 - 2.0 ** -40)


def draw_reference(logits, cut, seeds, lengths, options):
    """A token for each row, and its log-probability -> (2, S) float64; temperature 0 is greedy.

    A token weighs e ** (logit / temperature). A random number u, which seed and length of a text
    give, picks a piece of the vocabulary, and what is left of u a token in it: so the device sums
    all pieces at once and, when compiled, reads the logits once. Greedy is so cold that only the
    highest logits weigh anything, and has u = 0, which picks the first. (In a row of NaN or -inf,
    from an overflow in float16, some token wins and harms no other row.)

    Shapes: logits (S, V); seeds (S,) int64; lengths (S,): tokens of each text with the new one;
        options (S, 4) float64: temperature, top_p, top_k, min_p. cut: whether the last three of any
        row leave tokens out.
    """
    logits, (temperature, *cuts) = logits.float(), options.split(1, dim=1)
    u = random_reference(seeds, lengths)[:, None] * (temperature > 0)
    scale = (LOG2_E / temperature.clamp(min=1e-30)).float()[:, None]
    pieces = F.pad(logits, (0, -logits.size(1) % PIECE), value=-torch.inf).unflatten(1, (-1, PIECE))
    # the highest of each piece (S, n, 1), and of the row (S, 1, 1): so no power is above 1, or NaN
    tops = pieces.amax(-1, keepdim=True).clamp(min=-1e38)
    top = tops.amax(1, keepdim=True)
    weights, of_pieces = ((pieces - tops) * scale).exp2(), ((tops - top) * scale).exp2()
    if cut:
        weights = weights * kept_reference((weights * of_pieces).flatten(1), *cuts).view_as(weights)
    piece, u = pick_reference((weights.sum(-1, keepdim=True) * of_pieces)[..., 0], u)
    weights = weights.gather(1, piece[..., None].expand(-1, -1, PIECE))[:, 0]      # of this piece
    tokens = piece * PIECE + pick_reference(weights, u)[0]
    total = ((pieces - tops) * LOG2_E).exp2().sum(-1, keepdim=True) * ((tops - top) * LOG2_E).exp2()
    logprobs = logits.gather(1, tokens) - top[:, 0] - total.sum(1).log()
    return torch.cat((tokens.double(), logprobs), dim=1).T


class DecodeGraphs:
    """The model, and a draw from its logits; where each sequence has one token, as a CUDA graph.

    Why: a step is hundreds of small kernels, and Python launches them more slowly than they run. A
    captured graph is launched by one call, and works on the same memory each time: for each of a
    few sizes a batch, with seeds and options for draw_reference; logits; and what was drawn. load()
    fills it. A replay also puts the new tokens in and moves the rows on by one place, so it can be
    replayed again at once.
    """

    def __init__(self, model, kv_cache, max_num_seqs, max_model_len):
        self.model, self.graphs, pool = model, {}, torch.cuda.graph_pool_handle()
        self.draw, B = torch.compile(draw_reference, dynamic=True), kv_cache.shape[3]
        # by 32s up to 512, lest the logits of all sizes fill the memory; the last has room for all
        for S in {min(n, max_num_seqs) for n in (1, 2, 4, 8, 16, *range(32, 513, 32), 1 << 31)}:
            table = [0] * -(-max_model_len // B)
            batch = flat_batch([([0], 0, table, True)] * S, B, kv_cache.device)
            batch.seeds = torch.zeros_like(batch.positions)
            batch.options = batch.seeds.new_ones(S, 4, dtype=torch.float64)
            batch.past = batch.options.new_zeros(2, S, 16)     # what the last 16 replays drew
            # compiles, which no capture may contain
            self.draw(model(batch, kv_cache), False, batch.seeds, batch.context_lens, batch.options)
            with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), pool):
                # padding has context 0, and stays there
                batch.positions.copy_((batch.context_lens - 1).clamp(min=0))
                blocks = batch.block_tables.gather(1, batch.positions[:, None] // B)[:, 0]
                torch.add(batch.positions % B, blocks, alpha=B, out=batch.slot_mapping)
                logits = batch.logits = model(batch, kv_cache)
                batch.context_lens += batch.context_lens > 0
                drawn = self.draw(logits, False, batch.seeds, batch.context_lens, batch.options)
                batch.past.copy_(torch.cat((batch.past[..., 1:], drawn[..., None]), dim=2))
                batch.input_ids.copy_(drawn[0])
            batch.graph, self.graphs[S] = graph, batch

    def load(self, batch, cuts=(), seeds=0, options=1):
        """Put a batch where the smallest graph works that takes it.

        cuts: for each row, whether tokens are cut. It, seeds and options are for run_ahead() alone.
        """
        S, M = batch.block_tables.shape
        memory = self.loaded = self.graphs[min(size for size in self.graphs if size >= S)]
        memory.input_ids[:S], memory.context_lens[:S] = batch.input_ids, batch.context_lens
        memory.seeds[:S], memory.options[:S], memory.cuts = seeds, options, cuts
        memory.block_tables[:S, :M] = batch.block_tables
        # padding has nothing to read, and no block, and so no slot
        memory.context_lens[S:], memory.block_tables[S:, 0] = 0, -1

    def __call__(self, batch, kv_cache):
        """-> logits (len(batch.last_rows), V). What the graph draws from them is not used."""
        if len(batch.input_ids) > len(batch.context_lens):
            return self.model(batch, kv_cache)
        self.load(batch)
        self.loaded.graph.replay()
        return self.loaded.logits[batch.last_rows]

    def go_on(self, rows, known, tables):
        """Keep these rows of what is loaded, in this order, and no others; nothing here waits.

        Where each text is, what comes next, and how it is drawn, only the device knows. The host
        has the tables, and sends what is new: behind as many blocks of each as are known here.
        """
        before, new = self.loaded, [n for row, table in enumerate(tables) for i in range(
            known[row], len(table)) for n in (row, i, table[i])]           # three of each block
        kept, new = (upload(numbers, before.seeds.device) for numbers in (rows, new))
        batch = SimpleNamespace(**{name: getattr(before, name)[kept] for name in (
            "input_ids", "context_lens", "block_tables", "seeds", "options")})
        row, column, block = new.view(-1, 3).T
        batch.block_tables[row, column] = block.int()
        self.load(batch, [before.cuts[row] for row in rows], batch.seeds, batch.options)

    def run_ahead(self, num_steps):
        """Draw and go on with the tokens, num_steps times, 16 at most; nothing here waits.

        -> what is drawn, (2, rows and padding, num_steps) float64 as by draw_reference, on the
        host; and the event after which it is there.
        """
        m, cut = self.loaded, any(self.loaded.cuts)
        for _ in range(num_steps):
            m.graph.replay()
            if cut:                                # what the graph has drawn itself is not used
                m.past[..., -1] = draw_reference(m.logits, True, m.seeds, m.context_lens, m.options)
                m.input_ids.copy_(m.past[0, :, -1])
        steps = m.past[..., -num_steps:].to("cpu", non_blocking=True)
        return steps, torch.cuda.current_stream().record_event()
