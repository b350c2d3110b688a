"""Lab 5, the starter: copy it to mine.py and fill in the tasks.

    task 1, 3 points   write_kv_kernel: write a token's K and V to its slot
    task 2, 4 points   attention_kernel: what a turn of the loop does
    task 3, 3 points   merge_kernel: join the results of parts

    python tutorial/grade.py --lab 5
    python tutorial/run_mine.py --lab 5 --prompt "ROMEO:"

All else is the engine's own code: tutorial/labs.py cut it out of kernels.py.
"""

# ruff: noqa: B007, F841    what the loop will use

from kernels import tl, triton  # noqa: F401


@triton.jit
def write_kv_kernel(k, v, k_cache, v_cache, slot_mapping, k_token, v_token, c_block, c_slot, c_head,
                    B: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """One program a token: K * D = SIZE numbers, which in k and v are one row, head by head."""
    raise NotImplementedError("Lab 5, task 1: write a token's K and V to its slot")


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
        raise NotImplementedError("Lab 5, task 2: what a turn of the loop does")

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
    raise NotImplementedError("Lab 5, task 3: join the results of parts")
