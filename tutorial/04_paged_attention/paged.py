"""Attention over K and V that lie in blocks, in any order: Eq. 4 of the paper, block by block.

    python tutorial/04_paged_attention/paged.py

    new tokens of S sequences, their     kernels.flat_batch      pool of N blocks, one layer
    positions and block tables      -->  T rows and four maps    |block 0|block 1|  ...
                                              |                        ^         |
                                              | slot_mapping: write ---+         | block_tables:
                                              +--> attend() <--------------------+ read

No model is run: q, K and V are random numbers in float64, so that no mistake can hide behind
rounding. One layer is enough, as all layers use the same maps.

Shapes: T rows, S sequences, M blocks of a table row, N blocks of the pool, B block size, H query
heads, K KV heads, G = H / K, D head_dim.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tutorial" / chapter)
                             for chapter in ("01_kv_cache", "02_contiguous"))]

from grow import attend as dense_attend  # noqa: E402
from waste import draw_requests  # noqa: E402

import kernels  # noqa: E402
from nanopaged import BlockPool, SamplingParams, Sequence, torch  # noqa: E402

N, B, H, K, D = 16, 4, 6, 2, 32
CPU = torch.device("cpu")
TEXT = "Four score and seven years ago our fathers brought".split()

# One step of three sequences: (tokens they know, of these new in this step, block table).
ROWS = ((11, 5, [12, 2, 9]),       # a prompt's second chunk; the first had 6 tokens
        (8, 1, [7, 1]),            # the paper's request: a decode, "fathers"
        (3, 3, [5]))               # a whole prompt


def attend_one(q, k_cache, v_cache, table, num_seen, scale):
    """Eq. 4 for one query, which sees the first `num_seen` keys of its sequence.

    Shapes: q (H, D); k_cache, v_cache (N, B, K, D) -> (H, D).
    """
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    # The G query heads that share a KV head are rows of one matrix: its K and V are read once.
    q = q.view(num_kv_heads, -1, head_dim)                             # (K, G, D)
    scores = []
    for j in range(-(-num_seen // block_size)):
        num_filled = min(block_size, num_seen - j * block_size)        # 8 keys: 4 and 4; 7: 4 and 3
        k = k_cache[table[j], :num_filled]                             # (filled, K, D)
        scores.append(torch.einsum("kgd,bkd->kgb", q, k) * scale)
    # One softmax over all blocks: a weight says what share of the whole text a token has.
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).split(block_size, dim=-1)
    out = torch.zeros_like(q)
    for j, weight in enumerate(weights):                               # (K, G, filled)
        v = v_cache[table[j], :weight.shape[-1]]
        out += torch.einsum("kgb,bkd->kgd", weight, v)
    return out.flatten(0, 1)                                           # (H, D)


def attend(q, k_cache, v_cache, batch, scale):
    """attend_one for each row of a flat batch. q (T, H, D) -> (T, H, D)."""
    out, starts = torch.empty_like(q), batch.query_start.tolist()
    for seq, context_len in enumerate(batch.context_lens.tolist()):
        for row in range(starts[seq], starts[seq + 1]):
            # The last row sees all keys, its own among them; the row before it one less.
            num_seen = context_len - (starts[seq + 1] - 1 - row)
            out[row] = attend_one(q[row], k_cache, v_cache, batch.block_tables[seq], num_seen,
                                  scale)
    return out


def run_steps(generator):
    """Two steps that write K and V: what was there before ROWS, and ROWS.

    -> the second one's (flat batch, q, k_cache, v_cache, [(k, v) of each sequence as one tensor]).
    """
    k_cache, v_cache = torch.full((2, N, B, K, D), float("nan"), dtype=torch.float64)
    whole = [torch.randn(2, num_tokens, K, D, dtype=torch.float64, generator=generator)
             for num_tokens, _, _ in ROWS]
    for before in (True, False):
        spans = [(0, total - num_new) if before else (total - num_new, total)
                 for total, num_new, _ in ROWS]
        # (token ids, position of the first, block table, whether logits are wanted); ids are 0 here
        batch = kernels.flat_batch([([0] * (end - first), first, table, not before)
                                    for (first, end), (_, _, table)
                                    in zip(spans, ROWS, strict=True)], B, CPU)
        k, v = (torch.cat([kv[which, first:end]
                           for kv, (first, end) in zip(whole, spans, strict=True)])
                for which in (0, 1))                                   # (T, K, D)
        kernels.write_kv_reference(k, v, k_cache, v_cache, batch.slot_mapping)
    q = torch.randn(len(k), H, D, dtype=torch.float64, generator=generator)
    return batch, q, k_cache, v_cache, whole


def measure_the_problem(num_seqs=30):
    """What chapter 1's attention, which wants K and V in one tensor, would have to copy."""
    pool, requests = BlockPool(983, 16), draw_requests(4, 0)[:num_seqs]
    seqs = [Sequence([0] * r.prompt_len, SamplingParams()) for r in requests]
    lengths = [r.prompt_len + r.output_len // 2 for r in requests]     # halfway
    growing = list(zip(seqs, lengths, strict=True))
    while growing:                                 # they take turns, as in a server
        for seq, _ in growing:
            num_new = 1 if seq.num_kv else seq.num_tokens
            pool.append(seq, num_new)
            seq.num_kv += num_new
        growing = [(seq, length) for seq, length in growing if seq.num_kv < length]
    num_held = sum(len(seq.block_table) for seq in seqs)
    joints = sum(after == before + 1 for seq in seqs
                 for before, after in zip(seq.block_table, seq.block_table[1:], strict=False))
    context, padded = sum(lengths), num_seqs * max(lengths)
    longest = max(r.prompt_len for r in requests)
    print(f"{num_seqs} requests of chapter 2, halfway: {context:,} tokens in {num_held} blocks, "
          f"which lie in {num_held - joints} pieces")
    print(f"as one padded tensor: {padded:,} tokens to copy in each step and layer, "
          f"{1 - context / padded:.0%} of them padding")
    print(f"one computes its prompt of {longest:,}, the others decode: "
          f"{longest + num_seqs - 1:,} rows; padded {num_seqs * longest:,}")


def main():
    measure_the_problem()

    paper = kernels.flat_batch([([0] * 8, 0, [7, 1], True)], B, CPU)
    print("\nthe paper's request, B = 4, block table [7, 1]")
    print("   ", *(f"{word:>7}" for word in TEXT[:8]))
    print("slot", *(f"{slot:>7}" for slot in paper.slot_mapping.tolist()))
    ninth = kernels.flat_batch([([0], 8, [7, 1, 3], True)], B, CPU)
    print(f"{TEXT[8]} takes a third block: block table [7, 1, 3], slot {ninth.slot_mapping.item()}")

    batch, q, k_cache, v_cache, whole = run_steps(torch.Generator().manual_seed(0))
    print("\none step of three: a prompt's second chunk, a decode, a whole prompt")
    for name in ("positions", "slot_mapping", "query_start", "context_lens", "block_tables"):
        print(f"{name:13}", getattr(batch, name).tolist())
    print(f"{len(q)} rows; padded {len(ROWS) * max(num_new for _, num_new, _ in ROWS)}")
    print("\nthe keys that the rows of the first one see, by block")
    total, num_new, table = ROWS[0]
    print("      block", " ".join(f"{block_id:<{B}}" for block_id in table).rstrip())
    for position in range(total - num_new, total):
        seen = "x" * (position + 1) + "." * (total - position - 1)
        print(f"position {position:2}", *(seen[i:i + B] for i in range(0, total, B)))

    scale, starts = D ** -0.5, batch.query_start.tolist()
    expected = torch.cat([dense_attend(q[first:last], *kv) for first, last, kv
                          in zip(starts, starts[1:], whole, strict=False)])
    options = {name: getattr(batch, name) for name in ("block_tables", "context_lens",
                                                       "query_start")}
    results = {"Eq. 4, block by block": attend(q, k_cache, v_cache, batch, scale),
               "the engine's reference": kernels.paged_attention_reference(
                   q, k_cache, v_cache, **options, max_query_len=5, scale=scale)}
    num_nan = int(k_cache[..., 0, 0].isnan().sum())
    print(f"\n{num_nan} of {N * B} slots were never written and hold NaN")
    for name, result in results.items():
        close = bool((result - expected).abs().max() < 1e-12)          # NaN compares false
        print(f"{name}: within 1e-12 of chapter 1's attention: {'yes' if close else 'NO'}")
    print(f"the decode reads {2 * 8 * K * D:,} numbers of K and V; head by head it would be "
          f"{2 * 8 * H * D:,}")


if __name__ == "__main__":
    main()
