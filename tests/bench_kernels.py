"""How fast is kernels.paged_attention on this GPU, beside its peers, in one run?

    python tests/bench_kernels.py [--only SUBSTRING] [--no-peers]

bfloat16, blocks of 16 tokens in random order; each kernel is captured in a CUDA graph and its
replay timed (the median), so that no launch from Python is in the figures. Columns:
  ms        of one layer's attention
  GB/s      over the K and V that must be read, each once
  of copy   that, as a share of the bandwidth of a large copy in this same run: what limits decodes
  TFLOP/s   over the products below the causal diagonal: what limits prompts
  error     |got - want| / |want|, against float32
The peers are those that can be imported: dense scaled_dot_product_attention, which has its K and V
contiguous and so shows what paging costs; FlashAttention-3 and the Triton kernel of vLLM;
FlashInfer. Only figures of one run can be compared.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import kernels  # noqa: E402

BLOCK_SIZE, DTYPE = 16, torch.bfloat16


def shapes():
    """name -> (new tokens of each sequence, context of each, query heads, KV heads, head_dim)."""
    gen = torch.Generator().manual_seed(1)
    ragged = torch.randint(64, 8192, (64,), generator=gen).tolist()
    decodes = {f"decode {n} x {c}": ([1] * n, [c] * n, 32, 8, 128)
               for n, c in ((1, 8192), (1, 131072), (8, 2048), (64, 1024), (64, 4096), (256, 1024))}
    return decodes | {
        "decode 64 x 64-8192": ([1] * 64, ragged, 32, 8, 128),
        "decode 1 x 65536 + 63 x 512": ([1] * 64, [65536] + [512] * 63, 32, 8, 128),
        "decode 64 x 1024, 12 heads, D 64": ([1] * 64, [1024] * 64, 12, 12, 64),
        "decode 256 x 512, D 64": ([1] * 256, [512] * 256, 32, 8, 64),
        "decode 1 x 640, D 64": ([1], [640], 32, 8, 64),
        "decode 24 x 1500": ([1] * 24, [1500] * 24, 32, 8, 128),
        "decode 512 x 300": ([1] * 512, [300] * 512, 32, 8, 128),
        "decode 64 x 1024, 32 heads, D 80": ([1] * 64, [1024] * 64, 32, 32, 80),
        "decode 64 x 1024, D 96": ([1] * 64, [1024] * 64, 32, 8, 96),
        "decode 64 x 1024, D 256": ([1] * 64, [1024] * 64, 16, 4, 256),
        "decode 64 x 2048, 16 heads a KV head": ([1] * 64, [2048] * 64, 32, 2, 128),
        "prompt 1 x 4096": ([4096], [4096], 32, 8, 128),
        "prompt 16 x 512": ([512] * 16, [512] * 16, 32, 8, 128),
        "prompt 16 x 512, D 64": ([512] * 16, [512] * 16, 32, 8, 64),
        "prompt 4 x 1024, D 256": ([1024] * 4, [1024] * 4, 16, 4, 256),
        "chunk 128 of 32768": ([128], [32768], 32, 8, 128),
        "chunk 1024 of 4096 + 63 decodes x 1024": ([1024] + [1] * 63, [4096] + [1024] * 63,
                                                   32, 8, 128),
    }


class Case:
    """Random inputs of one shape, in the layout that all paged kernels take."""

    def __init__(self, news, contexts, num_heads, num_kv_heads, head_dim):
        self.news, self.contexts, self.scale = news, contexts, head_dim ** -0.5
        blocks = [-(-context // BLOCK_SIZE) for context in contexts]
        self.kv = kernels.new_kv_cache(1, sum(blocks), BLOCK_SIZE, num_kv_heads, head_dim, DTYPE,
                                       "cuda")[0].normal_()
        self.q = torch.randn(sum(news), num_heads, head_dim, dtype=DTYPE, device="cuda")
        ids = torch.randperm(sum(blocks), dtype=torch.int32, device="cuda").split(blocks)
        self.block_ids = ids
        self.tables = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        self.context_lens = torch.tensor(contexts, dtype=torch.int32, device="cuda")
        starts = torch.tensor([0, *news], device="cuda").cumsum(0)
        self.query_start = starts.int()

    def dense(self):
        """The result in float32, one sequence and KV head at a time."""
        outs = []
        rows = self.q.float().split(self.news)
        for q, context, ids in zip(rows, self.contexts, self.block_ids, strict=True):
            k, v = (x[ids].flatten(0, 1)[:context].float() for x in self.kv)      # (C, K, D)
            later = torch.ones(len(q), context, dtype=torch.bool, device="cuda")
            later = later.triu(context - len(q) + 1)
            q = q.unflatten(1, (k.shape[1], -1))                                  # (new, K, G, D)
            heads = []
            for i in range(k.shape[1]):
                scores = torch.einsum("qgd,kd->gqk", q[:, i], k[:, i]) * self.scale
                weights = scores.masked_fill(later, -math.inf).softmax(-1)
                heads.append(torch.einsum("gqk,kd->qgd", weights, v[:, i]))
            outs.append(torch.cat(heads, 1))
        return torch.cat(outs)


# ---- the kernels: one more peer is one more function; None: it cannot run this shape ------------


def ours(case):
    return lambda: kernels.paged_attention(
        case.q, *case.kv, case.tables, case.context_lens, case.query_start,
        max_query_len=max(case.news), scale=case.scale)


def dense_sdpa(case):
    new, context, num_seqs = case.news[0], case.contexts[0], len(case.news)
    if len({*case.news}) > 1 or len({*case.contexts}) > 1 or new not in (1, context):
        return None
    ids = torch.cat(case.block_ids)
    k, v = (x[ids].view(num_seqs, -1, *x.shape[2:])[:, :context].transpose(1, 2).contiguous()
            for x in case.kv)
    q = case.q.view(num_seqs, new, *case.q.shape[1:]).transpose(1, 2)
    return lambda: F.scaled_dot_product_attention(
        q, k, v, is_causal=new > 1, enable_gqa=True).transpose(1, 2).flatten(0, 1)


def vllm_fa3(case):
    from vllm.vllm_flash_attn import flash_attn_varlen_func
    return lambda: flash_attn_varlen_func(
        case.q, *case.kv, max(case.news), case.query_start, max(case.contexts),
        seqused_k=case.context_lens, causal=True, block_table=case.tables,
        softmax_scale=case.scale, fa_version=3)


def vllm_triton(case):
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    (_, num_heads, head_dim), segments = case.q.shape, 16
    threshold = max(1, 128 // case.kv.shape[3])
    out = torch.empty_like(case.q)
    sums = torch.empty(threshold, num_heads, segments, device="cuda")
    buffers = {
        "seq_threshold_3D": threshold, "num_par_softmax_segments": segments,
        "softmax_segm_output": sums.new_empty(*sums.shape, 1 << (head_dim - 1).bit_length()),
        "softmax_segm_max": sums, "softmax_segm_expsum": torch.empty_like(sums)}

    def run():
        unified_attention(case.q, *case.kv, out, case.query_start, max(case.news),
                          case.context_lens, max(case.contexts), case.scale, True, (-1, -1),
                          case.tables, 0, None, None, None, **buffers)
        return out
    return run


def flashinfer(case):
    import flashinfer as fi
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    counts = torch.tensor([0, *map(len, case.block_ids)], device="cuda")
    pages = (counts.cumsum(0).int(), torch.cat(case.block_ids),
             (case.context_lens - 1) % BLOCK_SIZE + 1)
    heads = (case.q.shape[1], case.kv.shape[3], case.q.shape[2], BLOCK_SIZE)
    types = {"q_data_type": DTYPE, "kv_data_type": DTYPE}
    if max(case.news) == 1:
        wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=heads[0] // heads[1] >= 4)
        wrapper.plan(*pages, *heads, **types)
    else:
        wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        wrapper.plan(case.query_start, *pages, *heads, causal=True, **types)
    return lambda: wrapper.run(case.q, tuple(case.kv))


PEERS = {"dense SDPA": dense_sdpa, "vLLM FA3": vllm_fa3, "vLLM Triton": vllm_triton,
         "FlashInfer": flashinfer}


# ---- measuring ----------------------------------------------------------------------------------


def milliseconds(run):
    """Median time of a call, the L2 cache emptied before each."""
    from triton.testing import do_bench
    return do_bench(run, warmup=20, rep=120, return_mode="median")


def captured(run):
    """The call as a graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):                             # compiles, and warms what needs it
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth():
    """Bytes read and written a second by a copy of 2 GB."""
    x = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(lambda: y.copy_(x)) * 1e3


def measure(name, case, run, want, copy):
    """One row of the table."""
    got = run()
    error = ((got.float() - want).norm() / want.norm()).item()
    seconds = milliseconds(captured(run)) / 1e3
    num_heads, head_dim = case.q.shape[1:]
    rate = 2 * sum(case.contexts) * case.kv[0, 0, 0].nbytes / seconds
    pairs = sum(new * context - new * (new - 1) / 2
                for new, context in zip(case.news, case.contexts, strict=True))
    flops = 4 * num_heads * head_dim * pairs / seconds
    print(f"  {name:12} {seconds * 1e3:8.4f} {rate / 1e9:8.0f} {rate / copy:8.3f} "
          f"{flops / 1e12:8.1f} {error:9.1e}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU: the interpreter runs the kernels on a CPU, but its time says nothing")
    torch.manual_seed(0)
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy / 1e9:.0f} GB/s")
    print(f"  {'':12} {'ms':>8} {'GB/s':>8} {'of copy':>8} {'TFLOP/s':>8} {'error':>9}")
    for shape, sizes in shapes().items():
        if args.only not in shape:
            continue
        case = Case(*sizes)
        want = case.dense()
        print(shape)
        for name, make in {"nanopaged": ours, **({} if args.no_peers else PEERS)}.items():
            try:
                run = make(case)
                if run:
                    measure(name, case, run, want, copy)
            except Exception as error:                 # not installed, or not for this shape
                print(f"  {name:12} {error!r:.80}", flush=True)
        del case, want
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
