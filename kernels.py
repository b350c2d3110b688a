"""What runs on the device: batch and paged KV cache (paper 5.1), rotary positions, sampling.

One block is `block_size` slots; a slot holds one token's K and V of one layer. The engine hands
over these maps, and nothing here knows what a request is:

    slot_mapping  (T,)    where each new token's K and V go: block_id * block_size + offset
    block_tables  (S, M)  the blocks of each sequence, in the order of its text
    context_lens  (S,)    how many tokens each may read, this step's included
    query_start   (S+1,)  sequence s owns rows query_start[s] : query_start[s+1] of the flat batch

Each operation stands here as a `_reference` in plain torch, which says what it *means* and is what
the engine calls.

Dimension key: T tokens of the flat batch, S sequences, M blocks of a table row, N blocks of the
pool, B block size, H query heads, K KV heads, D head_dim, L layers.
"""

import math
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F

# Queries are attended in runs of at most this many, so the mask of a long prompt stays small:
# 512 x 8,192 keys are 16 MB as float32 (times H / K), where 8,192 x 8,192 would be 268 MB.
MAX_QUERY_RUN = 512


def new_kv_cache(num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype, device):
    """The whole KV cache as one tensor (L, 2, N, B, K, D); index 1 picks K (0) or V (1).

    Uninitialised on purpose: no slot is read before its token was written, so on a CPU the
    memory of a block is not even touched until a sequence needs the block.
    """
    shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
    return torch.empty(shape, dtype=dtype, device=device)


def fit_kv_cache(num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype, device, *,
                 most_blocks=0, utilization=1.0, pin=False):
    """new_kv_cache of num_blocks blocks or, for None, of as many as are useful and fit.

    Useful are most_blocks. A GPU has `utilization` of its memory for them, less what is in use; a
    CPU 1 GiB, or for a given num_blocks all of its memory. There, a block that was never written
    costs nothing; unless it is pinned, for fast copies to and from a GPU.
    Raises: MemoryError.
    """
    shape, memory = (block_size, num_kv_heads, head_dim, dtype, device), 1 << 30
    block_bytes = new_kv_cache(num_layers, 1, *shape).nbytes
    if num_blocks and hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        memory = int(free - total * (1 - utilization))
    if num_blocks is None:
        num_blocks = max(1, min(memory // block_bytes, most_blocks))
    if num_blocks * block_bytes > memory:
        raise MemoryError(f"{num_blocks} KV blocks take {num_blocks * block_bytes:,} bytes, where "
                          f"{device} has {memory:,}; lower num_blocks, swap_blocks or block_size")
    kv_cache = new_kv_cache(num_layers, num_blocks, *shape)
    return kv_cache.pin_memory() if pin and num_blocks else kv_cache


def flat_batch(rows, block_size, device):
    """One step's tokens one after the other, and the maps that say whose and where they are.

    rows: for each sequence (new token ids, position of the first, block table, whether the logits
    of its last token are wanted).
    """
    batch = SimpleNamespace(
        input_ids=[],         # (T,)
        positions=[],         # (T,) place of each token in its own text
        slot_mapping=[],      # (T,) block_id * B + offset: where its K and V go
        last_rows=[],         # rows whose logits are wanted
        block_tables=[],      # (S, M) int32, padded with 0
        context_lens=[],      # (S,) int32, this step's tokens included
        query_start=[0])      # (S+1,) int32: row of each sequence's first token, and T
    num_columns = max(len(table) for _, _, table, _ in rows)               # M
    for token_ids, first, table, is_wanted in rows:
        new = range(first, first + len(token_ids))
        batch.input_ids += token_ids
        batch.positions += new
        batch.slot_mapping += [table[i // block_size] * block_size + i % block_size for i in new]
        batch.block_tables.append(table + [0] * (num_columns - len(table)))
        batch.context_lens.append(new.stop)
        batch.query_start.append(len(batch.input_ids))
        batch.last_rows += [len(batch.input_ids) - 1] * is_wanted
    for i, (name, values) in enumerate(vars(batch).items()):
        dtype = torch.int64 if i < 4 else torch.int32
        setattr(batch, name, torch.tensor(values, dtype=dtype, device=device))
    batch.max_query_len = max(len(token_ids) for token_ids, *_ in rows)
    return batch


def write_kv_reference(k, v, k_cache, v_cache, slot_mapping):
    """Store the K and V of T tokens in their slots.

    Shapes: k, v (T, K, D); k_cache, v_cache (N, B, K, D), any strides; slot_mapping (T,) int64.
    """
    block_size = k_cache.shape[1]
    where = slot_mapping // block_size, slot_mapping % block_size
    k_cache.index_put_(where, k)
    v_cache.index_put_(where, v)


def copy_blocks_reference(source, target, pairs):
    """Copy blocks of one cache to blocks of another, or of the same, in all layers (paper 5.1).

    Shapes: source, target (L, 2, N, B, K, D); pairs (P, 2) int64: from, to. Within one cache no
        block is both. Copy-on-write, swap out and swap in are this one operation.
    """
    here, there = pairs.T
    target[:, :, there] = source[:, :, here].to(target.device)


def query_runs(block_tables, context_lens, query_start, block_size):
    """What paged_attention_reference does alike for all layers of a step -> one tuple a run.

    A run is a set of sequences with equally many queries and contexts within 2x of each other, so
    that it is one dense attention and padding at most doubles its work. All decodes have one
    query; a long prompt is cut into runs of at most MAX_QUERY_RUN queries.

    Shapes: rows (S, Q) of the flat batch; slots (S, C) of the keys; mask (S, Q, C), or None when
        every query sees every key.
    """
    runs, starts, device = {}, query_start.tolist(), block_tables.device
    for seq, context_len in enumerate(context_lens.tolist()):
        end = starts[seq + 1]
        for row in range(starts[seq], end, MAX_QUERY_RUN):
            num_queries = min(MAX_QUERY_RUN, end - row)
            # What the run's last query sees. 5 queries in a context of 9, cut after 2: 9 - 3 = 6.
            context = context_len - (end - row - num_queries)
            key = num_queries, context.bit_length()
            runs.setdefault(key, []).append((seq, row, context))
    plans = []
    for (num_queries, _), run in runs.items():
        seqs, first_row, context = torch.tensor(run, device=device).T[:, :, None]           # (S, 1)
        query = torch.arange(num_queries, device=device)
        key_position = torch.arange(max(context for _, _, context in run), device=device)   # (C,)
        # Past a sequence's end its last token is read again and masked: a slot never written
        # may hold NaN, and 0 * NaN is NaN. The table's padding is not followed either.
        readable = torch.minimum(key_position, context - 1)                                 # (S, C)
        block_ids = block_tables[seqs[:, 0]].long().gather(1, readable // block_size)
        slots = block_ids * block_size + readable % block_size
        mask = key_position <= (context - num_queries + query)[:, :, None]
        plans.append((first_row + query, slots, None if bool(mask.all()) else mask))
    return plans


def paged_attention_reference(q, k_cache, v_cache, block_tables, context_lens, query_start, *,
                              max_query_len, scale, out=None, runs=None):
    """Causal attention of each sequence's new queries over its own blocks (paper, Eq. 4).

    The meaning, for each sequence and head: gather the K and V of its blocks in the table's order,
    then softmax(scale * q K^T) V, a query at position p seeing keys 0..p. The last query sits at
    position context_lens[s] - 1. Prefill chunks, decodes and any mix of them are the same call: a
    decode is a sequence with one query.

    Shapes: q (T, H, D); k_cache, v_cache (N, B, K, D), any strides; block_tables (S, M);
        context_lens (S,), this step's tokens included; query_start (S+1,) -> (T, H, D).
        max_query_len is a launch hint that only the kernel needs; runs are query_runs() of the
        three maps, if the caller has them already.
    Cost: copies the K and V that are read, never the rest of the cache.
    """
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    out = torch.empty_like(q) if out is None else out
    if runs is None:
        runs = query_runs(block_tables, context_lens, query_start, block_size)
    for rows, slots, mask in runs:
        k, v = (cache.reshape(-1, num_kv_heads * head_dim)      # a view, in new_kv_cache's layout
                .index_select(0, slots.flatten()).view(*slots.shape, num_kv_heads, head_dim)
                .transpose(1, 2) for cache in (k_cache, v_cache))                   # (S, K, C, D)
        # The G = H / K query heads that share a KV head become rows of one matrix, so its K and
        # V are read once for all of them and never repeated in memory.
        packed = q[rows].unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)    # (S,K,G,Q,D)
        group = packed.shape[2]
        if mask is not None:
            mask = mask[:, None].expand(-1, group, -1, -1).flatten(1, 2)[:, None]   # (S,1,GQ,C)
        y = F.scaled_dot_product_attention(packed.flatten(2, 3), k, v, mask, scale=scale)
        y = y.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4)                      # (S,Q,K,G,D)
        out[rows] = y.flatten(2, 3)
    return out


def rope_frequencies(head_dim, rope):
    """Radians a position for each of the D/2 rotated pairs (Su et al. 2021) -> (D/2,) float32.

    rope: config.json's rope_theta and rope_type, and the settings of that type.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency = 1.0 / rope["rope_theta"] ** exponent
    if rope["rope_type"] == "default":
        return frequency
    slowed = frequency / rope["factor"]
    if rope["rope_type"] == "linear":
        return slowed
    # LLaMA-3.1: pairs that turn often within the original context stay, slow ones are slowed,
    # and between the two limits the two are mixed.
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    return torch.lerp(slowed, frequency, ((turns - low) / (high - low)).clamp(0, 1))


def rotate_reference(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) by its token's angle: rotary positions (Su et al. 2021).

    Shapes: x (T, heads, D); cos, sin (T, 1, D/2) -> (T, heads, D).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def uniform_reference(seeds, positions):
    """A number in [0, 1) for each (seed, position), by splitmix64 (Steele et al. 2014).

    Shapes: int64 (S,), (S,) -> float64 (S,). Products of int64 wrap around, as they should; the
    masks make the right shifts logical.
    """
    def mix(x):
        x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47      # 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15      # 0x94D049BB133111EB
        return x ^ (x >> 31 & (1 << 33) - 1)

    golden = -0x61C8864680B583EB                                       # 0x9E3779B97F4A7C15
    bits = mix(mix(seeds + golden) + positions * golden)
    return (bits >> 11 & (1 << 53) - 1).double() * 2.0 ** -53


def filtered_probs_reference(logits, temperature, top_p, top_k, min_p):
    """What each row draws from, by temperature, then min-p, top-k and top-p -> (S, V).

    Rows need not sum to 1. Shapes: logits (S, V) float32; the options (S,) float64.
    """
    temperature, top_p, top_k, min_p = (x[:, None] for x in (temperature, top_p, top_k, min_p))
    # 1e-6 stands in for the greedy rows, whose draw is not used
    probs = (logits / temperature.clamp(min=1e-6).float()).softmax(-1)
    probs[probs < min_p * probs.amax(-1, keepdim=True)] = 0
    if bool(((top_k > 0) | (top_p < 1)).any()):    # only these need the rank of each token
        ranked, token_ids = probs.sort(descending=True)
        ranked[(top_k > 0) & (torch.arange(logits.shape[1], device=logits.device) >= top_k)] = 0
        summed = ranked.cumsum(-1, dtype=torch.float64)
        # the token that passes top_p is kept too, and so the first one always is
        ranked[(top_p < 1) & (summed - ranked >= top_p * summed[:, -1:])] = 0
        probs = torch.zeros_like(probs).scatter(1, token_ids, ranked)
    return probs


def penalize_reference(logits, row, token_ids, penalty):
    """Make the tokens that a row's text has already less likely, in place; each of them once.

    Shapes: logits (S, V).
    """
    if penalty != 1:
        seen = torch.tensor(token_ids, device=logits.device)
        score = logits[row, seen]                  # multiplying lowers a negative score
        logits[row, seen] = torch.where(score > 0, score / penalty, score * penalty)


def sample_reference(logits, temperature, top_p, top_k, min_p, seeds, positions):
    """A token for each row, drawn by its seed and position alone; temperature 0 is greedy -> (S,).

    The token is the one at which the summed probabilities pass a number in [0, 1). (None does in a
    row of NaN, from an overflow in float16: it takes the last token and harms no other row.)
    """
    if not temperature.any():
        return logits.argmax(-1)
    probs = filtered_probs_reference(logits, temperature, top_p, top_k, min_p)
    summed = probs.cumsum(-1, dtype=torch.float64)
    passed = uniform_reference(seeds, positions)[:, None] * summed[:, -1:]
    drawn = torch.searchsorted(summed, passed, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return torch.where(temperature > 0, drawn, logits.argmax(-1))


def top_logprobs_reference(logprobs, row, token_id, num):
    """The row's chosen token and its `num` likeliest -> {token_id: logprob}, or None for num None.

    Shapes: logprobs (S, V). Each row by itself: where values tie, topk of another num, or a batch,
    may pick others.
    """
    if num is None:
        return None
    token_ids = [token_id, *logprobs[row].topk(min(num, logprobs.shape[1])).indices.tolist()]
    return dict(zip(token_ids, logprobs[row, token_ids].tolist(), strict=True))


def sample_rows(logits, options, seeds, texts):
    """One token for each row -> [(token_id, logprob, {token_id: logprob} or None), ...].

    options: for each row (temperature, top_p, top_k, min_p, repetition_penalty, number of top
    log-probabilities or None); seeds; texts: the token ids so far, whose number is the position
    drawn. The log-probabilities are the model's own, before penalty, temperature and filters.
    """
    logprobs = logits.log_softmax(-1)
    for row, (option, token_ids) in enumerate(zip(options, texts, strict=True)):
        penalize_reference(logits, row, token_ids, option[4])
    # the views keep their columns when S is 0, in a step that ends nobody's prompt
    numbers = torch.tensor([option[:4] for option in options], dtype=torch.float64)
    draws = torch.tensor([*zip(seeds, map(len, texts), strict=True)])
    tokens = sample_reference(logits, *numbers.view(-1, 4).T.to(logits.device),
                              *draws.view(-1, 2).T.to(logits.device))
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    rows = enumerate(zip(tokens.tolist(), chosen.tolist(), options, strict=True))
    return [(token, logprob, top_logprobs_reference(logprobs, row, token, option[5]))
            for row, (token, logprob, option) in rows]
