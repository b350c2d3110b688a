"""Write tests/golden: small checkpoints and tokenizers, and the outside oracles' answers to them.

The tests read only the files, so that they need neither oracle; this script is here so that anyone
can see where each number comes from, and make it again:

    pip install transformers tokenizers      # beside requirements.txt; made with 5.23.0 and 0.23.3
    python tests/make_golden.py              # or: models, beams, tokenizers, for one part

models/NAME      a Hugging Face folder with random weights (numpy's frozen RandomState), in the
                 form that some real checkpoint has; golden.json and golden.safetensors hold what
                 transformers (eager attention, float32) computes from that very folder.
beams/NAME.json  what transformers' beam search finds with models/NAME, from its prompts.
tokenizers/NAME  the files of a small trained tokenizer; golden.json holds what the Hugging Face
                 tokenizers library answers for TEXTS.

All is seeded: a second run on one machine writes the same bytes. Another CPU or torch may move the
logits' last bits, which is why no greedy step and no beam's choice is closer than MIN_GAP.
"""

import base64
import codecs
import contextlib
import io
import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import tiktoken
import torch
from beam_oracle import ask_transformers
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

GOLDEN = Path(__file__).parent / "golden"


def write_json(path, value):
    """Write `value` with one line per key, and per element of a top-level list of containers."""
    def line(v):
        return json.dumps(v, ensure_ascii=True)

    def field(v):
        if isinstance(v, list) and v and isinstance(v[0], list | dict):
            return "[\n    " + ",\n    ".join(map(line, v)) + "\n  ]"
        return line(v)

    body = ",\n".join(f"  {line(k)}: {field(v)}" for k, v in value.items())
    path.write_bytes(f"{{\n{body}\n}}\n".encode())


def fresh_folder(*parts):
    """Return an empty folder under GOLDEN; what an earlier run left there is gone."""
    folder = GOLDEN.joinpath(*parts)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# ------------------------------------------------------------------------------------------------
# A. Models
# ------------------------------------------------------------------------------------------------
PROMPT_LENS = (1, 7, 16, 33)
NEW_TOKENS = 24
MIN_GAP = 1e-3          # top-1 minus top-2 logit at every greedy step: far above float32 noise
MIN_DISTINCT = 11       # different tokens among the 24: the text must not sit in a short loop

# Every config is written as its kind of checkpoint on the hub has it: which keys are there, which
# are left out, and in which historical spelling. Sizes are odd so that no two can be confused.
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 100, "embd_pdrop": 0.1, "eos_token_id": 100, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 128, "n_embd": 28, "n_head": 2,
    "n_layer": 2, "n_positions": 128, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "vocab_size": 101,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 36, "initializer_range": 0.02, "intermediate_size": 52,
    "max_position_embeddings": 128, "model_type": "llama", "num_attention_heads": 6,
    "num_hidden_layers": 2, "rms_norm_eps": 1e-05, "use_cache": True, "vocab_size": 113,
}

# name -> (what it pins, config, how it is stored)
MODELS = {
    "gpt2_prefixed": (
        "names with `transformer.`; lm_head stored beside wte; mask buffers; a large epsilon",
        GPT2 | {"vocab_size": 97, "bos_token_id": 96, "eos_token_id": 96, "n_embd": 24, "n_head": 4,
                "layer_norm_epsilon": 1e-2, "n_inner": None, "scale_attn_weights": True,
                "reorder_and_upcast_attn": False, "scale_attn_by_inverse_layer_idx": False,
                "transformers_version": "4.11.0.dev0", "use_cache": True},
        {"prefix": "transformer.", "masks": True, "lm_head": True}),
    "gpt2_openai": (
        "names without prefix and no lm_head, as openai-community/gpt2; tied without saying so",
        GPT2, {"masks": True}),
    "llama_mha_bias": (
        "a bias on every projection, MHA, untied",
        LLAMA | {"hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 5,
                 "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False,
                 "rope_scaling": None, "rope_theta": 10000.0, "pretraining_tp": 1,
                 "vocab_size": 107, "torch_dtype": "float32"}, {}),
    "llama_gqa_tied": (
        "GQA (3 query heads a KV head), head_dim given and not hidden/heads, tied, 3 layers",
        LLAMA | {"hidden_size": 30, "intermediate_size": 42, "num_attention_heads": 6,
                 "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3,
                 "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
                 "rms_norm_eps": 1e-2, "rope_scaling": None, "rope_theta": 100000.0,
                 "vocab_size": 131, "is_llama_config": True, "rope_interleaved": False,
                 "torch_dtype": "float32"}, {}),
    "llama_mqa_llama3": (
        "MQA; llama3 rope scaling in the old form (rope_theta outside); a list of eos ids",
        LLAMA | {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1,
                 "head_dim": 12, "eos_token_id": [2, 5, 6], "attention_bias": False,
                 "mlp_bias": False, "tie_word_embeddings": False, "rope_theta": 5000.0,
                 "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 32, "rope_type": "llama3"},
                 "torch_dtype": "float32"}, {}),
    "llama_linear_sharded": (
        "linear scaling as transformers 5 writes it (rope_parameters); three shards and an index",
        LLAMA | {"num_key_value_heads": 3, "head_dim": 6, "dtype": "float32",
                 "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
                 "rope_parameters": {"factor": 4.0, "rope_theta": 3000.0, "rope_type": "linear"},
                 "transformers_version": "5.0.0", "pad_token_id": None}, {"shards": 3}),
    "llama_linear_oldest": (
        "linear scaling under `type`; no rope_theta, no num_key_value_heads; inv_freq in the file",
        LLAMA | {"hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0,
                 "rope_scaling": {"type": "linear", "factor": 2.0}, "rms_norm_eps": 1e-06,
                 "torch_dtype": "float32", "transformers_version": "4.31.0"}, {"inv_freq": True}),
    "mistral": (
        "model_type mistral with sliding_window null; GQA",
        LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
                 "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "intermediate_size": 50, "rope_theta": 1000000.0, "sliding_window": None,
                 "tie_word_embeddings": False, "attention_dropout": 0.0, "vocab_size": 103,
                 "torch_dtype": "float32"}, {}),
    "llama_bfloat16": (
        "stored in bfloat16; dtype under transformers 5's key `dtype`; GQA",
        LLAMA | {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "intermediate_size": 70, "dtype": "bfloat16", "attention_bias": False,
                 "mlp_bias": False, "tie_word_embeddings": False,
                 "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}, {}),
    "llama_float16": (
        "stored in float16; dtype under the old key `torch_dtype`; MHA without saying so",
        LLAMA | {"hidden_size": 42, "num_attention_heads": 3, "intermediate_size": 60,
                 "torch_dtype": "float16", "rope_scaling": None, "tie_word_embeddings": False}, {}),
}


class Weights:
    """Seeded random tensors, scaled up so that attention is sharp and logits spread by units.

    RandomState's stream is frozen by numpy's policy: the same numbers on every version.
    """

    def __init__(self, seed):
        self.rng = np.random.RandomState(seed)
        self.tensors = {}

    def add(self, name, *shape, std, mean=0.0):
        """Add one normal tensor."""
        values = mean + std * self.rng.standard_normal(shape)
        self.tensors[name] = torch.from_numpy(values.astype(np.float32))

    def linear(self, name, fan_out, fan_in, gain=1.5, bias=False, conv1d=False):
        """Add a projection, and a bias far from 0; GPT-2's Conv1D keeps its weight as (in, out)."""
        shape = (fan_in, fan_out) if conv1d else (fan_out, fan_in)
        self.add(name + ".weight", *shape, std=gain / fan_in ** 0.5)
        if bias:
            self.add(name + ".bias", fan_out, std=0.3)

    def norm(self, name, width, bias=False):
        """Add a norm's weight, away from 1 so that a loader that forgets it is caught."""
        self.add(name + ".weight", width, mean=1.0, std=0.2)
        if bias:
            self.add(name + ".bias", width, std=0.2)


def gpt2_weights(config, seed):
    """Random GPT-2 tensors under the names of openai-community/gpt2 (no prefix)."""
    w, width = Weights(seed), config["n_embd"]
    w.add("wte.weight", config["vocab_size"], width, std=3 / width ** 0.5)
    w.add("wpe.weight", config["n_positions"], width, std=1.0)
    for i in range(config["n_layer"]):
        w.norm(f"h.{i}.ln_1", width, bias=True)
        w.linear(f"h.{i}.attn.c_attn", 3 * width, width, gain=2.5, bias=True, conv1d=True)
        w.linear(f"h.{i}.attn.c_proj", width, width, gain=2.5, bias=True, conv1d=True)
        w.norm(f"h.{i}.ln_2", width, bias=True)
        w.linear(f"h.{i}.mlp.c_fc", 4 * width, width, gain=2.5, bias=True, conv1d=True)
        w.linear(f"h.{i}.mlp.c_proj", width, 4 * width, gain=2.5, bias=True, conv1d=True)
    w.norm("ln_f", width, bias=True)
    return w.tensors


def llama_weights(config, seed):
    """Random LLaMA (or Mistral) tensors under the hub's names."""
    w, width, inner = Weights(seed), config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim", width // heads)
    attn_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    tied = config.get("tie_word_embeddings", False)
    w.add("model.embed_tokens.weight", config["vocab_size"], width,
          std=3 / width ** 0.5 if tied else 1.0)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        w.norm(f"{layer}.input_layernorm", width)
        w.linear(f"{layer}.self_attn.q_proj", heads * head_dim, width, bias=attn_bias)
        w.linear(f"{layer}.self_attn.k_proj", kv_heads * head_dim, width, bias=attn_bias)
        w.linear(f"{layer}.self_attn.v_proj", kv_heads * head_dim, width, bias=attn_bias)
        w.linear(f"{layer}.self_attn.o_proj", width, heads * head_dim, bias=attn_bias)
        w.norm(f"{layer}.post_attention_layernorm", width)
        w.linear(f"{layer}.mlp.gate_proj", inner, width, bias=mlp_bias)
        w.linear(f"{layer}.mlp.up_proj", inner, width, bias=mlp_bias)
        w.linear(f"{layer}.mlp.down_proj", width, inner, bias=mlp_bias)
    w.norm("model.norm", width)
    if not tied:
        w.linear("lm_head", config["vocab_size"], width, gain=3.0)
    return w.tensors


def as_stored(tensors, config, how):
    """Return `tensors` as that kind of checkpoint stores them: prefix, stray buffers, dtype."""
    out = {how.get("prefix", "") + name: tensor for name, tensor in tensors.items()}
    if how.get("masks"):            # constants that old GPT-2 files carry: `attn.bias` is no bias
        size = config["n_positions"]
        for i in range(config["n_layer"]):
            attn = f"{how.get('prefix', '')}h.{i}.attn"
            out[f"{attn}.bias"] = torch.ones(1, 1, size, size, dtype=torch.uint8).tril()
            out[f"{attn}.masked_bias"] = torch.tensor(-1e4)
    if how.get("lm_head"):
        out["lm_head.weight"] = tensors["wte.weight"].clone()
    if how.get("inv_freq"):         # LLaMA-2's first files carry the unscaled frequencies
        dim = config["hidden_size"] // config["num_attention_heads"]
        inv_freq = 1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim)
        for i in range(config["num_hidden_layers"]):
            out[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = inv_freq.clone()
    dtype = config.get("dtype", config.get("torch_dtype", "float32"))
    floating = {name for name, tensor in out.items() if tensor.is_floating_point()}
    return {name: t.to(getattr(torch, dtype)) if name in floating else t for name, t in out.items()}


def save_checkpoint(folder, tensors, num_shards):
    """Write model.safetensors, or `num_shards` shards of consecutive tensors and their index."""
    meta = {"format": "pt"}
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata=meta)
        return
    names, weight_map = list(tensors), {}
    for i in range(num_shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        share = names[i * len(names) // num_shards:(i + 1) * len(names) // num_shards]
        save_file({name: tensors[name] for name in share}, folder / file, metadata=meta)
        weight_map |= dict.fromkeys(share, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_model(folder, config, how, seed):
    """Write the Hugging Face folder that loader and oracle alike read."""
    make = gpt2_weights if config["model_type"] == "gpt2" else llama_weights
    tensors = as_stored(make(config, seed), config, how)
    save_checkpoint(folder, tensors, how.get("shards", 1))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {"_from_model_config": True, "bos_token_id": config["bos_token_id"],
                  "eos_token_id": config["eos_token_id"], "transformers_version": "4.40.0"}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def load_oracle(folder):
    """Load the folder with transformers, and make sure that it took every weight from the file."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    strays = [k for k in info["unexpected_keys"] if not k.endswith(("inv_freq", ".masked_bias"))]
    assert not strays, strays
    model.generation_config.eos_token_id = None     # greedy goes on to NEW_TOKENS whatever it says
    return model.eval()


@torch.no_grad()
def greedy(model, prompt):
    """Return NEW_TOKENS greedy ids, and the smallest top-1 to top-2 gap met on the way."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=NEW_TOKENS, output_logits=True, pad_token_id=0,
                         return_dict_in_generate=True)
    top2 = torch.cat(out.logits).topk(2).values     # (NEW_TOKENS, 2)
    return out.sequences[0, len(prompt):].tolist(), (top2[:, 0] - top2[:, 1]).min().item()


@torch.no_grad()
def make_model(name, config, how):
    """Write models/NAME from the first seed whose greedy text is varied and nowhere near a tie."""
    folder = fresh_folder("models", name)
    for seed in itertools.count():
        write_model(folder, config, how, seed)
        model, rng = load_oracle(folder), np.random.RandomState(1000 + seed)
        prompts = [rng.randint(0, config["vocab_size"], n).tolist() for n in PROMPT_LENS]
        texts, gaps = zip(*(greedy(model, prompt) for prompt in prompts), strict=True)
        if min(gaps) > MIN_GAP and min(len(set(text)) for text in texts) >= MIN_DISTINCT:
            break
    logits = {f"logits_{i}": model(torch.tensor([p])).logits[0] for i, p in enumerate(prompts)}
    assert all(logits[f"logits_{i}"][-1].argmax() == text[0] for i, text in enumerate(texts))
    save_file(logits, folder / "golden.safetensors")
    write_json(folder / "golden.json", {"prompts": prompts, "greedy": list(texts)})
    spread = torch.cat(list(logits.values())).std().item()
    print(f"{name}: seed {seed}, smallest gap {min(gaps):.4f}, logits' std {spread:.1f}")


def make_models():
    """Write every folder of MODELS."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name, (_, config, how) in MODELS.items():
        make_model(name, config, how)


# ------------------------------------------------------------------------------------------------
# B. Beam search
# ------------------------------------------------------------------------------------------------
# A case is a prompt of golden.json, a beam width, and (num_eos, length_penalty, early_stopping).
# The first num_eos of the file's eos_token_ids end a text; for 0 none does (ignore_eos). The ids
# of config.json hardly ever come, so choose_eos() takes ids that do.
# Width 1 is transformers' greedy search. That ignores early_stopping, of which "never" matters even
# for one beam (it may run past the first end for a better one): the two are not combined here.
BEAM_TOKENS = 14
BEAM_WIDTHS = (1, 2, 4, 6)
DEFAULT = (1.0, False)
PENALTIES = [(0.0, False), (2.0, False), (-0.5, False)]
STOPPING = [(1.0, True), (1.0, "never"), (-0.5, "never"), (2.0, True)]
THOROUGH = ("gpt2_openai", "llama_gqa_tied")    # all settings; the other models share them


def beam_settings(name):
    """-> [(num_eos, length_penalty, early_stopping), ...] for a model."""
    with_eos = [DEFAULT, *PENALTIES, *STOPPING]
    if name in THOROUGH:
        return [(0, *DEFAULT), *((n, *setting) for n in (1, 2) for setting in with_eos)]
    i = list(MODELS).index(name)
    return [(0, *DEFAULT), (1 + i % 2, *with_eos[i % len(with_eos)]),
            (2 - i % 2, *with_eos[(i + 3) % len(with_eos)])]


@torch.no_grad()
def choose_eos(model, prompts, vocab_size):
    """-> the two ids with which most prompts have texts that end early beside texts that do not."""
    chosen = []
    for _ in range(2):
        def variety(token, chosen=tuple(chosen)):
            answers = [ask_transformers(model, prompt, 4, BEAM_TOKENS, [*chosen, token])[0]
                       for prompt in prompts]
            lengths = [{len(text) for _, text in texts} for texts in answers]
            return sum(len(found) > 1 for found in lengths), len(set().union(*lengths))
        chosen.append(max((t for t in range(vocab_size) if t not in chosen), key=variety))
    return chosen


@torch.no_grad()
def make_beam_file(name):
    """Write beams/NAME.json: all cases of a model but those that are close to a tie."""
    folder = GOLDEN / "models" / name
    model, cases, dropped = load_oracle(folder), [], 0
    prompts = json.loads((folder / "golden.json").read_text())["prompts"]
    eos_token_ids = choose_eos(model, prompts, model.config.vocab_size)
    for (num_eos, penalty, stopping), width, i in itertools.product(
            beam_settings(name), BEAM_WIDTHS, range(len(prompts))):
        if width == 1 and stopping == "never":
            continue
        texts, margin = ask_transformers(model, prompts[i], width, BEAM_TOKENS,
                                         eos_token_ids[:num_eos], length_penalty=penalty,
                                         early_stopping=stopping)
        if margin < MIN_GAP:
            dropped += 1
            continue
        cases.append({"prompt": i, "beam_width": width, "num_eos": num_eos,
                      "length_penalty": penalty, "early_stopping": stopping,
                      "token_ids": [text for _, text in texts],
                      "scores": [round(score, 6) for score, _ in texts]})
    write_json(GOLDEN / "beams" / f"{name}.json",
               {"max_tokens": BEAM_TOKENS, "eos_token_ids": eos_token_ids, "cases": cases})
    early = sum(len(text) < BEAM_TOKENS for case in cases for text in case["token_ids"])
    print(f"{name}: {len(cases)} cases, {dropped} dropped, eos {eos_token_ids}, {early} of "
          f"{sum(len(case['token_ids']) for case in cases)} texts end early")


def make_beams():
    """Write a file for every model of MODELS, whose folders must be there."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    fresh_folder("beams")
    for name in MODELS:
        make_beam_file(name)


# ------------------------------------------------------------------------------------------------
# C. Tokenizers: the texts
# ------------------------------------------------------------------------------------------------
# PROSE, VERSE, CODE and SCRIPTS are also what the tokenizers are trained on (see corpus()).
PROSE = [
    "The memory of a computer is cut into blocks of one size, and a table says where each block "
    "of a program lies. The program sees one long row of addresses; the machine sees scattered "
    "blocks.",
    "A server that answers many people at once must keep, for every one of them, the keys and the "
    "values of all the words so far. Nobody knows how long an answer will be before it has ended.",
    "If the longest answer is reserved for everyone, most of the memory waits for words that "
    "never come. If blocks are handed out one at a time, only the last block of each answer is "
    "part empty.",
    "When two answers begin with the same words, they can share the same blocks. The first one "
    "that writes into a shared block makes a copy of it, and the other never notices.",
    "\"Well,\" she said, \"that's it: we've got 1,024 blocks, they're all free, and I'll take 3 "
    "now -- don't you dare say 'no' (or 'maybe')!\" He'd heard it before; it wasn't the last "
    "time, either.",
    "Mr. Jones paid $3.50 for 12 eggs at 7:45 a.m. on 1999-12-31; e-mail him at "
    "jones@example.com, or see https://example.com/a/b?c=d&e=f#g for more...",
    "IN CAPITALS: DON'T PANIC, IT'S ONLY WHAT WE'VE SAID, THEY'RE FINE, I'LL GO, I'M SURE, HE'D "
    "KNOW.",
]
VERSE = [        # Blake, 1794; Carroll, 1871
    "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye,\n"
    "Could frame thy fearful symmetry?\n\nIn what distant deeps or skies,\nBurnt the fire of thine "
    "eyes?\nOn what wings dare he aspire?\nWhat the hand, dare seize the fire?\n",
    "'Twas brillig, and the slithy toves\n  Did gyre and gimble in the wabe:\nAll mimsy were the "
    "borogoves,\n  And the mome raths outgrabe.\n",
]
CODE = [
    "def fib(n):\n    a, b = 0, 1\n    while a < n:\n        print(a, end=' ')\n"
    "        a, b = b, a+b\n"
    "    return {'n': n, \"b\": b}\n",
    "class Block:\n\tdef __init__(self, size=16):\n\t\tself.size = size  # tokens\n\n\n"
    "if __name__ == '__main__':\n\tBlock()\n",
    "#include <stdio.h>\r\nint main(void) {\r\n    for (int i = 0; i < 10; ++i) {\r\n"
    "        printf(\"%d\\n\", i);\r\n    }\r\n    return 0;\r\n}\r\n",
    "fn main() {\n    let v: Vec<u32> = (0..10).map(|x| x * x).collect();\n"
    "    println!(\"{:?}\", v);\n}\n",
    "const f = async (x) => { await x?.y ?? `${x}`; return x === null ? [] : {...x}; };  // js",
    "<!doctype html>\n<p class=\"a b\">x &lt; y &amp;&amp; z</p>\n<!-- note --><br/>\n",
    "SELECT name, COUNT(*) FROM t WHERE id >= 100 AND name LIKE 'a%' GROUP BY 1 ORDER BY 2 DESC;",
    "for f in *.txt; do grep -E '^[0-9]+$' \"$f\" | sort -n >> out.log 2>&1; done\n",
    "{\"a\": [1, 2.5, -3e10, true, null], \"b\": {\"c\": \"\\u00e9\\n\"}}",
    "\\begin{equation}\n  \\sum_{i=0}^{n} x_i^2 \\leq \\frac{1}{2}\n\\end{equation}\n",
    "all: a.o b.o\n\tcc -o $@ $^\n\n.PHONY: clean\nclean:\n\trm -f *.o\n",
    "0xDEADBEEF + 0b1010 - 1_000_000 * 3.14159e-10 // 7 ** 2 >>= 4 != ~x",
]
SCRIPTS = [
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Straße, Größe, Übermäßig.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. L'été, ça va, œuvre.",
    "Wszyscy ludzie rodzą się wolni i równi. Zażółć gęślą jaźń. Příliš žluťoučký kůň. İstanbul ığü",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。",
    "すべての人間は、生まれながらにして自由であり、カタカナも平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng.",
    "ყველა ადამიანი იბადება თავისუფალი. Բոլոր մարդիկ ծնվում են ազատ: ሰው ሁሉ ነጻ ሆኖ ይወለዳል።",
]
SPACES = [       # every white space in every position
    " ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\t", "\t\t", " \n", "\n ", " \n \n ", "\r\n",
    "\r\n\r\n", "\r", "\t \t", " a", "  a", "   a", "a ", "a  ", "a   ", "a b", "a  b", "a   b",
    "a    b     c", "\na", "a\n", "a\n\nb", "a \n b", "a  \n  b", "a\n  b\n    c", "a\n\n  b",
    "a\r\nb\r\n  c", "a\tb", "a\t\tb", "\ta", "a \tb", " 1", "  1", "a 1", "a  1", "a   12",
    "1 2  3   4", "\n1", "\n 1", "\t1", " .", "  .", "a .", "a  .", "a   !?", "\n.", "  \n.", ".\n",
    "!\n\n", "...\n \n", ". \n", ".\r\n", "a\u00a0b", "\u00a0a", " \u00a0 a", "a\u3000b",
    "\u3000\u3000", "a\u2028b", "a\u2029b", "a\u0085b", "a\u2003b \u2009c", "a\x0bb\x0cc", "  '",
    " 's", "a 's", "a\n's", "x = 1\n\n\n    y  =  2 ",
]
CONTRACTIONS = [
    "it's we're I've I'm they'll he'd can't", "IT'S WE'RE I'VE I'M THEY'LL HE'D CAN'T",
    "'s'S't'T'll'LL", "'Ll 'lL 'vE 'Re 'reason 'sand 'SAND",
    "it\u2019s we\u2019re don\u2019t \u2018quoted\u2019", "''s '' '", "a'b'c 1's 2'd",
    "rock'n'roll o'clock", "'\u017f 'ſt", "\u00e9's \u4e2d's",
]
DIGITS = [
    "0 1 12 123 1234 12345 123456 1234567 12345678 123456789 1234567890", "0", "42", "007", "2024",
    "1000000", "314159265358979323846264338327950288", "a1b22c333d4444", "v1.2.3-rc4", "3,141.59",
    "1st 2nd", "x\u00b2 + y\u00b3 = \u00bd \u00be", "\u2167 \u2168\u2169 \u216b",
    "\u0663\u0661\u0664 \u09ea\u09e8", "12\u00b234 1\u0663 \u0967\u0968\u0969\u096a",
    "\u2460\u2461 \u3007\u4e00\u4e8c \U0001d7d9\U0001d7da",
]
MARKS = [        # emoji with joiners and skin tones, flags, combining accents in NFC and NFD
    "\U0001f642", "\U0001f642\U0001f643 \U0001f642",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f44b\U0001f3fd \U0001f44d\U0001f3ff", "\U0001f1eb\U0001f1f7\U0001f1ef\U0001f1f5",
    "\u2764\ufe0f \u2603", "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "1\ufe0f\u20e3 #\ufe0f\u20e3", "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m", "\u0301", " \u0301a",
    "Z\u0351\u036b\u0343a\u0328\u0300l\u0334g\u0321o\u0322",
    "\u0915\u094d\u0937\u093f \u0928\u0940", "\ufb01 \ufb03",
    "\u2260 \u2264 \u221e \u2211 \u2192 \u20ac \u00a3 \u00a9 \u2122 \u2014 \u2026 \u00ab\u00bb",
    "\u0e01\u0e33 \u0e40\u0e01\u0e49",
]
ODD = [
    "\x00", "a\x00b", "\x01\x02\x04\x06\x13\x14\x16\x1d\x1f", "a\x04b \x1dc", "\x7f\x80\x9f",
    "\ufffd", "a\ufffd\ufffdb", "a\u200bb\u200cc\u200dd", "\ufeffa", "\u202eabc\u202c", "\u00ad",
    "\ue000\uf8ff", "\U00040000a\U0007fffd", "\U0010ffff", "\U000f0000",
    "\U0001d400\U0001d41a \U00020000\U0002a6d6", "\uffff\ufffe", "\u115f\u1160 \uac00\u11a8",
]
SPECIAL = [      # text that looks like special or byte tokens, and the white space around it
    "<|endoftext|>", "a<|endoftext|>b", "a <|endoftext|> b", "<|endoftext|><|endoftext|>",
    "<|endoftext", "<s>", "</s>", "<s>a", " <s> a", "a<s>b</s>c", "a <s>  b", "<s><s>", "<unk>",
    "a<unk> b", "<pad>", "<s >", "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|> \n<|im_end|>  1", "<0x41>", "<0x0A>a<0xFF>", "\u2581", "\u2581a",
    "a\u2581b \u2581 c", "\u2581\u2581 \u2581", "\u0120a \u010a", "<|begin_of_text|>a",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "a\n<|end_of_text|>\nb", "<repo_name>a/b<file_sep>c.py",
    "[INST] <<SYS>>\nx\n<</SYS>>\n\ny [/INST]",
]
# llama3's vocabulary holds these whole, though no chain of merges makes them: ignore_merges (in
# tiktoken, the look-up of the whole piece) finds them where they are one piece, and only there.
WHOLE = [" zyzzyvas", "Qwjzk"]
WORDS = [
    " zyzzyvas", "zyzzyvas", "Qwjzk", " Qwjzk", "a zyzzyvas, Qwjzks and zyzzyvas1 Qwjzk", "a", "Z",
    "'", "-", "!", "\u00e9", "\u4e2d", "", "antidisestablishmentarianism",
    "Donaudampfschifffahrtsgesellschaft", "aaaaaaaaaaaaaaaaa", "abababababababababab",
    "theTheTHEtHe", "snake_case_name camelCaseName SCREAMING_CASE kebab-case", "----====####",
    "!!!???...,,,;;;", "((()))[[[]]]{{{}}}", "a,b;c:d.e!f?g", "\\n \\t \\x41 \\\\",
    "http://a.b/c%20d", "~`@#$%^&*_+|",
]
# Blocks for random strings, all assigned before Unicode 6: libraries of any age class them alike.
BLOCKS = [
    (0x20, 0x7f), (0x20, 0x7f), (0x09, 0x0e), (0x30, 0x3a), (0xa0, 0x180), (0x300, 0x340),
    (0x391, 0x3a2), (0x410, 0x450), (0x5d0, 0x5eb), (0x621, 0x63b), (0x660, 0x66a), (0x905, 0x93a),
    (0xe01, 0xe31), (0x2000, 0x2030), (0x2150, 0x2180), (0x2190, 0x2200), (0x3041, 0x3097),
    (0x4e00, 0x4f00), (0xac00, 0xad00), (0x1f300, 0x1f321), (0x1f601, 0x1f611), (0x20000, 0x20040),
]


def long_texts():
    """Very long words and runs, 3,000 characters of everything mixed, and random strings."""
    rng = np.random.RandomState(0)
    word = "".join(chr(97 + i) for i in rng.randint(0, 26, 2000))
    mixed = " ".join(MARKS + DIGITS + SPECIAL + CONTRACTIONS + SCRIPTS[:7] + VERSE + CODE)[:3000]
    texts = [word, mixed, "x" + " " * 500 + "y", " " * 500, "\n" * 40 + "a", "a" * 300, "1" * 100]
    for length in (5, 10, 20, 40, 80, 160, 160, 160):
        picks = [BLOCKS[i] for i in rng.randint(0, len(BLOCKS), length)]
        texts.append("".join(chr(rng.randint(low, high)) for low, high in picks))
    return texts


TEXTS = (PROSE + VERSE + CODE + SCRIPTS + SPACES + CONTRACTIONS + DIGITS + MARKS + ODD + SPECIAL
         + WORDS + long_texts())


def corpus():
    """The training text: the prose above, the Zen of Python, and numbers; nothing is downloaded."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    zen = codecs.decode(this.s, "rot13")
    numbers = " ".join(f"{i} {i * i} {i / 7:.2f}" for i in range(0, 700, 7))
    return PROSE + VERSE + CODE + SCRIPTS + CONTRACTIONS + zen.split("\n\n") + [zen, numbers]


# ------------------------------------------------------------------------------------------------
# C. Tokenizers: the files
# ------------------------------------------------------------------------------------------------
SMOLLM2_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>",
    "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>",
    "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>",
    "<empty_output>",
]
# The real SmolLM2 has no tokens for these bytes: the library drops them from a text in silence.
SMOLLM2_NO_BYTES = bytes.fromhex("04061314161dc0c1f1f2f5f6f7f8f9fafbfcfdfeff")
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS = [
    [{"role": "user", "content": "What's 2 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi! "},
     {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "1\n\n2"}],
]
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [      # the first 16 of 256, by the names and places of Meta's tokenizer.py
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|reserved_special_token_2|>", "<|reserved_special_token_3|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 11)),
]
LLAMA2_SPECIAL = ["<unk>", "<s>", "</s>"]
# GPT-2's alphabet: these bytes stand for themselves, the others for U+0100 on, in order.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHAR_TO_BYTE = {chr(b): b for b in PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
BYTE_TO_CHAR = {b: char for char, b in CHAR_TO_BYTE.items()}
SPACE_RUNS = (2, 4, 8, 16, 3, 5, 6, 7)      # LLaMA-2's vocabulary has such pieces


def train_bpe(pre_tokenizer, vocab_size, texts, **options):
    """Train a BPE; return its vocabulary {token: id} and its merges, one a token, in order."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False,
                                  **options)
    tok.train_from_iterator(texts, trainer)
    model = json.loads(tok.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def all_merges(tokens):
    """Every split of every token into two others, by the whole's place, then by the parts'.

    So LLaMA's converters write merges, where the original file has only pieces and their ranks.
    """
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [(a, b) for a, b in splits if a in rank and b in rank]
        merges += sorted(splits, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return merges


def add_special(tok, tokens):
    """Make `tokens` special; those not in the vocabulary get the ids after it."""
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])


def save_tokenizer(tok, folder, merges_as_strings):
    """Write tokenizer.json; its merges as pairs, or as "a b" as every file before 2024 has them."""
    data = json.loads(tok.to_str())
    if merges_as_strings:
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_bytes(text.encode())


def answers(tok):
    """What `tok` makes of TEXTS: read as plain text, and with special tokens recognised."""
    cases = []
    for text in TEXTS:
        tok.encode_special_tokens = True        # special-looking text is text; BOS is still added
        ids = tok.encode(text).ids
        tok.encode_special_tokens = False
        special = tok.encode(text, add_special_tokens=False).ids
        cases.append({"text": text, "ids": ids, "ids_special": special, "decoded": tok.decode(ids)})
    return cases


def finish(tok, name, merges_as_strings=False, **extra):
    """Write tokenizers/NAME, and the answers of what is read back from it; return those."""
    folder = fresh_folder("tokenizers", name)
    save_tokenizer(tok, folder, merges_as_strings)
    cases = answers(Tokenizer.from_file(str(folder / "tokenizer.json")))
    write_json(folder / "golden.json", {"cases": cases} | extra)
    print(f"{name}: {tok.get_vocab_size()} tokens, {len(cases)} texts")
    return folder, cases


def make_gpt2():
    """gpt2_json: tokenizer.json; gpt2_files: the same as vocab.json and merges.txt alone."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab, merges = train_bpe(level, 1000, corpus(), initial_alphabet=sorted(level.alphabet()))
    vocab["<|endoftext|>"] = len(vocab)         # last, as in GPT-2
    tok = Tokenizer(models.BPE(vocab, merges))
    tok.pre_tokenizer, tok.decoder = level, decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    add_special(tok, ["<|endoftext|>"])
    _, cases = finish(tok, "gpt2_json", merges_as_strings=True)

    folder = fresh_folder("tokenizers", "gpt2_files")
    tok.model.save(str(folder))
    tok.model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    assert answers(tok) == cases
    write_json(folder / "golden.json", {"cases": cases})


def make_smollm2():
    """smollm2: single digits, special tokens first, 21 bytes without a token, a chat template."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    missing = {BYTE_TO_CHAR[b] for b in SMOLLM2_NO_BYTES}
    vocab, merges = train_bpe(splitter, 1100, corpus(), special_tokens=SMOLLM2_SPECIAL,
                              initial_alphabet=sorted(set(level.alphabet()) - missing))
    assert not missing & vocab.keys()
    tok = Tokenizer(models.BPE(vocab, merges))
    tok.pre_tokenizer, tok.decoder = splitter, decoders.ByteLevel(add_prefix_space=False)
    add_special(tok, SMOLLM2_SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=CHATML)
    chats = []
    for messages in CHATS:
        text = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        chats.append({"messages": messages, "text": text, "ids": tok.encode(text).ids})
    folder, _ = finish(tok, "smollm2", merges_as_strings=True, chats=chats)
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
              "unk_token": "<|endoftext|>", "clean_up_tokenization_spaces": False,
              "chat_template": CHATML, "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_llama3():
    """llama3: tokenizer.json; llama3_tiktoken: the same ranks as Meta's tokenizer.model."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated")
    splitter = pre_tokenizers.Sequence([split, level])
    vocab, _ = train_bpe(splitter, 1100, corpus(), initial_alphabet=sorted(level.alphabet()))
    tokens = sorted(vocab, key=vocab.get) + [level.pre_tokenize_str(w)[0][0] for w in WHOLE]
    tok = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, all_merges(tokens),
                               ignore_merges=True))
    tok.pre_tokenizer, tok.decoder = splitter, decoders.ByteLevel()
    add_special(tok, LLAMA3_SPECIAL)
    bos, bos_id = LLAMA3_SPECIAL[0], tok.token_to_id(LLAMA3_SPECIAL[0])
    bos_first = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)])
    tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos_first])
    _, cases = finish(tok, "llama3")

    folder = fresh_folder("tokenizers", "llama3_tiktoken")
    ranks = {bytes(CHAR_TO_BYTE[c] for c in token): i for i, token in enumerate(tokens)}
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_text("".join(lines))
    special = {t: len(ranks) + i for i, t in enumerate(LLAMA3_SPECIAL)}
    enc = tiktoken.Encoding("llama3", pat_str=LLAMA3_REGEX, mergeable_ranks=ranks,
                            special_tokens=special)
    for case in cases:                          # a second oracle: tiktoken itself
        assert [bos_id] + enc.encode_ordinary(case["text"]) == case["ids"], case
        assert enc.encode(case["text"], allowed_special="all") == case["ids_special"], case
    write_json(folder / "golden.json", {"cases": cases})


def llama2_tokens():
    """LLaMA-2's order: specials, bytes, pieces of several characters by rank, single characters."""
    spaces = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    splitter = pre_tokenizers.Sequence([spaces, pre_tokenizers.Digits(individual_digits=True)])
    # No piece holds a line end or a tab (sentencepiece trains on lines): they become byte tokens.
    lines = [line for text in corpus() for line in text.replace("\t", " ").splitlines()]
    vocab, _ = train_bpe(splitter, 900, lines)
    trained = sorted(vocab, key=vocab.get)
    pieces = ["\u2581" * n for n in SPACE_RUNS] + [t for t in trained if len(t) > 1]
    return (LLAMA2_SPECIAL + [f"<0x{b:02X}>" for b in range(256)], pieces
            + [t for t in trained if len(t) == 1])


def make_llama2():
    """llama2: a normalizer puts U+2581 for spaces; mistral: a pre-tokenizer does."""
    fixed, pieces = llama2_tokens()
    vocab = {token: i for i, token in enumerate(fixed + pieces)}
    tok = Tokenizer(models.BPE(vocab, all_merges(pieces), unk_token="<unk>", fuse_unk=True,
                               byte_fallback=True))
    tok.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tok.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    add_special(tok, LLAMA2_SPECIAL)
    finish(tok, "llama2", merges_as_strings=True)
    tok.normalizer = None
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    finish(tok, "mistral")


def make_tokenizers():
    """Write every folder under tokenizers."""
    make_gpt2()
    make_smollm2()
    make_llama3()
    make_llama2()


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = {"models": make_models, "beams": make_beams, "tokenizers": make_tokenizers}
    for part in sys.argv[1:] or parts:
        parts[part]()
