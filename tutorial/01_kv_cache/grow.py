"""What a KV cache saves and what it costs: one text, written twice by the tiny model.

    python tutorial/01_kv_cache/grow.py [--seconds]

    token ids --> embed --> 6 x [ x + attention(x), x + MLP(x) ] --> logits --> one more token
                                       ^
                        K and V of all tokens so far, from KVCache

The model is plain torch, written out in forward(). Of nanopaged only the files are read: config,
weights, tokenizer. There are no blocks yet: a layer's K and V lie in one tensor that grows.

Shapes: T tokens that are computed, C tokens of the text so far, E hidden size, H query heads, K KV
heads, D head_dim, V vocabulary.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))                      # so that it runs from any folder

# torch by way of nanopaged, which keeps it from warning that numpy is absent
from nanopaged import Tokenizer, load_config, load_model, nn, torch  # noqa: E402

PROMPT, NUM_TOKENS = "Four score and seven years ago our", 48

# Layers, KV heads, head_dim and bytes of a number: all that the size of a cache depends on.
MODELS = {"tiny, float32": (6, 2, 32, 4), "GPT-2": (12, 12, 64, 2), "OPT-13B": (40, 40, 128, 2),
          "LLaMA-3 8B": (32, 8, 128, 2), "LLaMA-3 70B": (80, 8, 128, 2)}


def bytes_per_token(num_layers, num_kv_heads, head_dim, number_bytes):
    """What the cache grows by with each token: its K and its V, of each KV head of each layer."""
    return 2 * num_layers * num_kv_heads * head_dim * number_bytes


class KVCache:
    """K and V of each layer, of all tokens of one text."""

    def __init__(self, config):
        empty = torch.empty(0, config.num_key_value_heads, config.head_dim)
        self.layers = [(empty, empty)] * config.num_hidden_layers      # (C, K, D) twice, a layer
        self.num_kv = 0                            # tokens whose K and V are there

    def append(self, layer, k, v):
        """Add the K and V (T, K, D) of new tokens to a layer's -> those of the whole text."""
        old_k, old_v = self.layers[layer]
        self.layers[layer] = torch.cat((old_k, k)), torch.cat((old_v, v))
        return self.layers[layer]

    def nbytes(self):
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


def rotate(x, angle):
    """RoPE: turn each pair (x[i], x[i + D/2]) by its token's angle. x (T, heads, D)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


def attend(q, k, v):
    """Causal attention of the last T tokens of a text over all C of it.

    Shapes: q (T, H, D); k, v (C, K, D) -> (T, H, D).
    """
    (T, H, D), (C, K, _) = q.shape, k.shape
    k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))        # (C, H, D)
    scores = torch.einsum("thd,chd->htc", q, k) * D ** -0.5
    # The first query is token C - T. It sees the keys 0 to C - T, the next one a key more.
    seen = torch.ones(T, C, dtype=torch.bool).tril(C - T)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.einsum("htc,chd->thd", weights, v)


def forward(model, token_ids, cache):
    """Compute tokens that follow those in the cache, which then has them, too.

    -> (V,) logits: what follows the last of them.
    """
    c = model.config
    heads = c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads
    positions = torch.arange(cache.num_kv, cache.num_kv + len(token_ids))
    angle = positions[:, None, None] * model.frequencies               # (T, 1, D/2)
    x = nn.functional.embedding(torch.tensor(token_ids), model.embed_tokens.weight)     # (T, E)
    for number, layer in enumerate(model.layers):
        qkv = layer.qkv(layer.attn_norm(x)).unflatten(1, (-1, c.head_dim))     # (T, H+2K, D)
        q, k, v = qkv.split(heads, dim=1)
        k, v = cache.append(number, rotate(k, angle), v)               # (C, K, D): T became C
        x = x + layer.o(attend(rotate(q, angle), k, v).flatten(1))
        gate, up = layer.up(layer.mlp_norm(x)).chunk(2, dim=-1)
        x = x + layer.down(nn.functional.silu(gate) * up)
    cache.num_kv += len(token_ids)
    return model.lm_head(model.norm(x[-1]))


def count(work, model, num_new, num_kv):
    """Add up the work of a forward() after which `num_kv` tokens are in the cache."""
    c = model.config
    matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)   # of all layers
    # The last query sees num_kv keys, the one before it one less, and so on.
    pairs = sum(range(num_kv - num_new + 1, num_kv + 1))
    work["steps"] += 1
    work["tokens computed"] += num_new
    work["token-layers"] += num_new * c.num_hidden_layers
    work["multiply-adds, matrices"] += num_new * matrices + model.lm_head.weight.numel()
    # q k^T, then weights V: D multiply-adds each, for each query head of each layer
    work["multiply-adds, attention"] += (2 * pairs * c.head_dim * c.num_attention_heads
                                         * c.num_hidden_layers)


@torch.inference_mode()
def generate(model, prompt, num_tokens, keep, watch=lambda cache: None):
    """Add `num_tokens` tokens to a prompt, always the likeliest -> (token ids, work).

    keep: whether a step finds what the steps before it computed.
    """
    cache, token_ids, work = KVCache(model.config), list(prompt), Counter()
    for _ in range(num_tokens):
        if not keep:
            cache = KVCache(model.config)          # empty: num_kv is 0, and all tokens are new
        new = token_ids[cache.num_kv:]
        logits = forward(model, new, cache)
        count(work, model, len(new), cache.num_kv)
        token_ids.append(int(logits.argmax()))     # known; K and V follow in the next step
        watch(cache)
    return token_ids, work


def load_tiny():
    folder = ROOT / "tutorial" / "tiny"
    return load_model(load_config(folder), folder, "cpu", torch.float32), Tokenizer(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seconds", action="store_true", help="also measure the time of each run")
    args = parser.parse_args()
    model, tokenizer = load_tiny()
    prompt, grown, start = tokenizer.encode(PROMPT), [], time.perf_counter()
    without, work = generate(model, prompt, NUM_TOKENS, keep=False)
    middle = time.perf_counter()
    token_ids, less = generate(model, prompt, NUM_TOKENS, keep=True,
                               watch=lambda cache: grown.append((cache.num_kv, cache.nbytes())))
    end = time.perf_counter()

    print(tokenizer.decode(token_ids))
    print(f"\n{NUM_TOKENS} tokens after {len(prompt)}; the same without a cache: "
          f"{'yes' if token_ids == without else 'NO'}")
    print(f"{'':26}{'without':>13}{'with a cache':>16}{'ratio':>8}")
    for name in work:
        print(f"{name:26}{work[name]:>13,}{less[name]:>16,}{work[name] / less[name]:>8.1f}")
    if args.seconds:
        print(f"{'seconds':26}{middle - start:>13.3f}{end - middle:>16.3f}"
              f"{(middle - start) / (end - middle):>8.1f}")

    print("\nthe cache after step")
    for step in (1, 2, 3, NUM_TOKENS):
        num_kv, num_bytes = grown[step - 1]
        print(f"{step:>4}: {num_kv:>2} tokens, {num_bytes:>7,} bytes")

    print("\nbytes a token: K and V x layers x KV heads x head_dim x bytes of a number"
          f"\n{'tokens in 12 GB':>56}")
    for name, (num_layers, num_kv_heads, head_dim, size) in MODELS.items():
        total = bytes_per_token(num_layers, num_kv_heads, head_dim, size)
        print(f"{name:14}2 x {num_layers:>2} x {num_kv_heads:>2} x {head_dim:>3} x {size} = "
              f"{total:>7,}{12 * 2**30 // total:>11,}")


if __name__ == "__main__":
    main()
