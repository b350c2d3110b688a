"""Train nanopaged's default model from one plain text file, without a GPU.

    python tutorial/train_tiny.py tinyshakespeare.txt tutorial/tiny [steps]

    text --split--> train 95% --train_bpe--> tokenizer.json
                        |                        |
                        +------- encode ---------+--> token ids --train--> model.safetensors
                    last 5% --encode--> validation only: seen by neither the BPE nor the model

The folder it writes is an ordinary Hugging Face LLaMA checkpoint. The model is a dict of tensors
under Hugging Face's names, so that the dict *is* the safetensors file, and forward() is the whole
architecture on one screen; nanopaged.py computes the same function with a paged KV cache.

Shapes: S sequences, T tokens of each, E hidden size, H query heads, K KV heads, D head_dim, V
vocabulary. Seeded: the same machine gives the same model (another CPU may round differently).
"""

import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import regex
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

# config.json, word for word. 3 query heads a KV head, and sizes that are no powers of two, on
# purpose: a kernel that silently relies on nicer numbers fails on this model first.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 2048,
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": None, "tie_word_embeddings": True, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}
V, E, L = CONFIG["vocab_size"], CONFIG["hidden_size"], CONFIG["num_hidden_layers"]
H, K, D = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], CONFIG["head_dim"]
CONTEXT, EPS = CONFIG["max_position_embeddings"], CONFIG["rms_norm_eps"]

STEPS, BATCH, MAX_LR, WARMUP = 1600, 16, 2e-3, 100
DROPOUT, WEIGHT_DECAY = 0.15, 0.1    # the text is small: without them the model learns it by heart
EVAL_EVERY, PATIENCE = 100, 6        # stop after 6 evaluations without a better validation loss

# Id 0, and never trained on: the text is one long file that does not mark where a play ends. The
# model therefore never says it, and generation simply runs to max_tokens (or to a stop string).
SPECIAL = "<|endoftext|>"
SPLIT = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


# ---- tokenizer: byte-level BPE ------------------------------------------------------------------
def merge(ids, pair, new_id):
    """`ids` with each `pair`, from the left, replaced: merge([1, 2, 3], (1, 2), 9) == [9, 3]."""
    out = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new_id             # new_id is in no pair yet, so it cannot match again here
        else:
            out.append(i)
    return out


def train_bpe(text, vocab_size):
    """Learn a vocabulary: the bytes of each id, and {(id, id): merged id} in order of merging.

    Cost: seconds, because each distinct word is kept once with its count, and a merge recounts
    only the words that hold the pair, not the text.
    """
    word_counts = Counter(SPLIT.findall(text))
    words = [[1 + byte for byte in word.encode()] for word in word_counts]
    counts = list(word_counts.values())
    pair_counts, pair_words = Counter(), defaultdict(set)

    def recount(i, sign):
        for pair in zip(words[i], words[i][1:], strict=False):
            pair_counts[pair] += sign * counts[i]
            pair_words[pair].add(i)      # never removed: a word too many only costs a look

    for i in range(len(words)):
        recount(i, +1)
    vocab, merges = [SPECIAL.encode()] + [bytes([byte]) for byte in range(256)], {}
    while len(vocab) < vocab_size:
        pair = max(pair_counts, key=pair_counts.get)  # of equals the one counted first: repeatable
        merges[pair] = len(vocab)
        for i in sorted(pair_words.pop(pair)):
            recount(i, -1)
            words[i] = merge(words[i], pair, len(vocab))
            recount(i, +1)
        del pair_counts[pair]            # now 0; left in, such pairs would slow every later max()
        vocab.append(vocab[pair[0]] + vocab[pair[1]])
    return vocab, merges


def encode(text, merges):
    """Token ids of `text`: in each word the earliest-learned pair is merged first."""

    @cache
    def encode_word(word):
        ids = [1 + byte for byte in word.encode()]
        while pairs := [p for p in zip(ids, ids[1:], strict=False) if p in merges]:
            pair = min(pairs, key=merges.get)
            ids = merge(ids, pair, merges[pair])
        return ids

    return [i for word in SPLIT.findall(text) for i in encode_word(word)]


def tokenizer_json(vocab, merges):
    """Hugging Face's tokenizer.json: a token's name has one printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]    # e.g. space is written "Ġ"
    char = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    names = [SPECIAL] + ["".join(char[byte] for byte in token) for token in vocab[1:]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    special = {"id": 0, "content": SPECIAL, "special": True, "normalized": False,
               "single_word": False, "lstrip": False, "rstrip": False}
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)},
             "merges": [f"{names[a]} {names[b]}" for a, b in merges]}
    return {"version": "1.0", "added_tokens": [special], "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
            "model": model}


# ---- model: LLaMA as a function of a dict -------------------------------------------------------
def new_weights():
    """Random weights under Hugging Face's names; tied embeddings, so there is no lm_head."""
    inner = CONFIG["intermediate_size"]
    matrices = {"self_attn.q_proj": (H * D, E), "self_attn.k_proj": (K * D, E),
                "self_attn.v_proj": (K * D, E), "self_attn.o_proj": (E, H * D),
                "mlp.gate_proj": (inner, E), "mlp.up_proj": (inner, E), "mlp.down_proj": (E, inner)}
    w = {"model.embed_tokens.weight": torch.randn(V, E) * 0.02, "model.norm.weight": torch.ones(E)}
    for layer in range(L):
        for name, shape in matrices.items():
            # The two that write to the residual stream start smaller, as 2 L of them add up in it.
            std = 0.02 / math.sqrt(2 * L) if name.endswith(("o_proj", "down_proj")) else 0.02
            w[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape) * std
        for name in ("input_layernorm", "post_attention_layernorm"):
            w[f"model.layers.{layer}.{name}.weight"] = torch.ones(E)
    return w


def rotate(x, cos, sin):
    """RoPE in Hugging Face's form: dims d and d + D/2 are the two coordinates of one rotation."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def forward(w, ids, dropout=0.0):
    """Logits (S, T, V) of the token after each of `ids` (S, T); `dropout` is for training only."""

    def linear(x, name):
        return F.linear(x, w[name + ".weight"])

    def norm(x, name):
        return F.rms_norm(x, (E,), w[name + ".weight"], EPS)

    S, T = ids.shape
    freqs = CONFIG["rope_theta"] ** -(torch.arange(0, D, 2) / D)
    angles = torch.outer(torch.arange(T), freqs).repeat(1, 2)                     # (T, D)
    cos, sin = angles.cos(), angles.sin()
    x = F.dropout(F.embedding(ids, w["model.embed_tokens.weight"]), dropout)      # (S, T, E)
    for layer in range(L):
        p = f"model.layers.{layer}."
        h = norm(x, p + "input_layernorm")
        q, k, v = (linear(h, f"{p}self_attn.{n}_proj").view(S, T, -1, D).transpose(1, 2)
                   for n in "qkv")                                                # (S, H | K, T, D)
        a = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v,
                                           is_causal=True, enable_gqa=True)       # (S, H, T, D)
        a = a.transpose(1, 2).reshape(S, T, H * D)
        x = x + F.dropout(linear(a, p + "self_attn.o_proj"), dropout)
        h = norm(x, p + "post_attention_layernorm")
        h = F.silu(linear(h, p + "mlp.gate_proj")) * linear(h, p + "mlp.up_proj")
        x = x + F.dropout(linear(h, p + "mlp.down_proj"), dropout)
    return linear(norm(x, "model.norm"), "model.embed_tokens")                    # tied: no lm_head


def loss_of(w, windows, dropout=0.0):
    """Mean cross-entropy, in nats a token, of `windows` (S, T + 1)."""
    logits = forward(w, windows[:, :-1], dropout)
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def sample(w, prompts, num_tokens, temperature=0.8):
    """`prompts` (S, T) and `num_tokens` more; with no KV cache, each recomputes the whole past."""
    ids = prompts
    for _ in range(num_tokens):
        probs = (forward(w, ids[:, -CONTEXT:])[:, -1] / temperature).softmax(-1)
        ids = torch.cat((ids, torch.multinomial(probs, 1)), dim=1)
    return ids


# ---- training -----------------------------------------------------------------------------------
def save(w, path):
    """Write `w` in bfloat16, in one move, so that an interrupted run leaves a whole file.

    By hand (safetensors' own save_file wants numpy), which shows that the format holds no secret:
    the header's length in 8 bytes, the header in JSON, then every tensor's bytes in that order.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in w.items():
        start, end = end, end + 2 * t.numel()                    # 2 bytes a number
        header[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)                              # the tensors start on 8 bytes
    flat = torch.cat([t.detach().bfloat16().flatten() for t in w.values()]).view(torch.uint8)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(len(head).to_bytes(8, "little") + head + bytes(flat.tolist()))
    os.replace(temporary, path)


def train(train_ids, val_windows, path, steps):
    """Train, keeping at `path` the weights of the best validation loss so far."""
    w = {name: t.requires_grad_() for name, t in new_weights().items()}
    print(f"{sum(t.numel() for t in w.values()):,} parameters")
    groups = [{"params": [t for t in w.values() if t.dim() == 2], "weight_decay": WEIGHT_DECAY},
              {"params": [t for t in w.values() if t.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    best, best_step, start = math.inf, 0, time.time()
    for step in range(1, steps + 1):
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = MAX_LR * ((step + 1) / WARMUP if step < WARMUP else cosine)
        offsets = torch.randint(len(train_ids) - CONTEXT, (BATCH, 1))
        windows = train_ids[offsets + torch.arange(CONTEXT + 1)]  # (S, T + 1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(w, windows, DROPOUT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVAL_EVERY == 0 or step == steps:
            with torch.no_grad():
                val_loss = loss_of(w, val_windows).item()
            if val_loss < best:
                best, best_step = val_loss, step
                save(w, path)
            seconds = time.time() - start
            print(f"step {step:5d}  train {loss.item():.3f}  validation {val_loss:.4f}  "
                  f"{seconds:4.0f} s  {step * BATCH * CONTEXT / seconds:,.0f} tokens/s", flush=True)
            if step - best_step >= PATIENCE * EVAL_EVERY:
                break


def report(w, vocab, merges, train_ids, val_windows):
    """Print what the README states: loss, bits a byte, memorisation; and a few samples."""
    with torch.no_grad():
        loss = loss_of(w, val_windows).item()
    num_bytes = sum(len(vocab[i]) for i in val_windows[:, 1:].flatten().tolist())
    bits = loss * val_windows[:, 1:].numel() / math.log(2) / num_bytes
    print(f"saved model: validation loss {loss:.4f} nats a token, {bits:.4f} bits a byte")

    def windows(ids, n=12):
        return [tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)]

    seen = set(windows(train_ids))
    prompts = torch.tensor([encode("\n", merges)] * 16)
    # The validation text's share is what the same author's unseen lines score here.
    for name, rows in (("sampled", sample(w, prompts, CONTEXT - 1)), ("validation", val_windows)):
        copied = [window in seen for row in rows.tolist() for window in windows(row)]
        print(f"12-token windows that occur in the training text: {sum(copied) / len(copied):.2%}"
              f" of {len(copied):,} in {name} text")
    for prompt in ("ROMEO:", "First Citizen:\n", "To be, or not to be"):
        ids = sample(w, torch.tensor([encode(prompt, merges)]), 120)[0].tolist()
        print("-" * 40, b"".join(vocab[i] for i in ids).decode(errors="replace"), sep="\n")


def main(text_path, out_dir, steps=STEPS):
    """Everything, from the text to the folder that `LLM(model=out_dir)` loads."""
    torch.manual_seed(0)
    text, out, start = Path(text_path).read_text(encoding="utf-8"), Path(out_dir), time.time()
    cut = text.rindex("\n\n", 0, int(len(text) * 0.95)) + 2      # 95%, at the end of a speech
    vocab, merges = train_bpe(text[:cut], V)
    train_ids, val_ids = (torch.tensor(encode(t, merges)) for t in (text[:cut], text[cut:]))
    print(f"{len(train_ids):,} training and {len(val_ids):,} validation tokens, "
          f"{len(text) / (len(train_ids) + len(val_ids)):.2f} characters each; "
          f"BPE took {time.time() - start:.1f} s")
    out.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "config.json": CONFIG, "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
        "tokenizer.json": tokenizer_json(vocab, merges),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast",
                                  "bos_token": SPECIAL, "eos_token": SPECIAL,
                                  "clean_up_tokenization_spaces": False},
    }.items():
        (out / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n",
                                encoding="utf-8")
    num_windows = (len(val_ids) - 1) // CONTEXT                  # only whole windows
    val_windows = val_ids[:num_windows * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    train(train_ids, val_windows, out / "model.safetensors", int(steps))
    # What is reported is what was shipped: the best step's weights, rounded to bfloat16.
    w = {name: t.float() for name, t in load_file(out / "model.safetensors").items()}
    report(w, vocab, merges, train_ids.tolist(), val_windows)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python tutorial/train_tiny.py TEXT_FILE OUTPUT_FOLDER [STEPS]")
    main(*sys.argv[1:])
