"""nanopaged: PagedAttention in one file.

Serving a language model is bound by the memory of its KV cache. Reserved in one piece for the
longest output a request could have, 60-80% of it holds nothing. PagedAttention (Kwon et al., SOSP
2023, arXiv 2309.06180: "the paper" below) cuts the cache into blocks of block_size tokens, hands
them out one by one as a text grows, and finds them again through the text's block table:

    prompt --> tokenizer --> Sequence               "Four score and seven years ago our"
                                |                   num_kv = 7, block_table = [7, 1], B = 4
                                v
    waiting [..] <-- preempt -- Scheduler.schedule() -- admit --> running [..]
                                |                        0         1               7
                                v                   +---------+---------+---   ---------+
                            BlockPool               |         | years   |       Four    |
                            free list,              |  free   | ago     |  ..   score   |
                            ref counts              |         | our     |       and     |
                                |                   |         | (free)  |       seven   |
                                v                   +---------+---------+---   ---------+
    flat batch of T tokens: input_ids, positions, slot_mapping, block_tables
                                |
                                v
    Decoder: each layer writes K and V into their slots, then attends through the block table
                                |
                                v
    logits --> sampler --> one more token --> text --> RequestOutput

One Engine.step() is one trip from schedule() down. The file is in the order of a request's life and
each name is defined before it is used, so it reads from the top: 2 config and weights, 3 tokenizer,
4 sequences, 5 block pool, 6 scheduler, 7 batch, 8 model, 9 sampler, 10 engine, 11 LLM and command
line. In a hurry: sections 4 to 7 and 10 are PagedAttention; 2 and 3 only read files.

Dimension key: T tokens of the flat batch, S sequences, M blocks of a block-table row, N blocks of
the pool, B block size (batch is never B), E hidden size, H query heads, K KV heads, D head_dim,
L layers, V vocabulary.

Two counts run through everything. num_tokens is every token a sequence knows; num_kv is how many
of them have their K and V in the cache. After a step they differ by one: the token just sampled
is known, and its K and V are computed by the next step. (Prefill is just the case where they
differ by more, and preemption by recompute sets num_kv back to 0 and keeps the tokens.)

Invariants. I1, I2, I4 and I7 are asserted by check() of pool and scheduler, which tests call after
each step; the others hold by construction.
  I1  ref_count[b] is the number of block-table rows that hold b.
  I2  every block is free exactly once, or held: free + held = N.
  I3  a block that is written in a step has ref_count 1.
  I4  between steps a sequence holds exactly ceil(num_kv / B) blocks. (Inside one also those for the
      tokens being computed; a step that was interrupted leaves them to the next.)
  I5  a failed operation changes nothing: capacity is checked before the first mutation.
  I6  (prefix cache: not built yet)
  I7  a group is preempted and resumed whole; a request that can never fit is refused when added.
"""

import argparse
import base64
import codecs
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import sys
import time
import warnings
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import regex
import requests
import tiktoken
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open

with warnings.catch_warnings():    # torch mentions that numpy, which nothing here uses, is absent
    warnings.simplefilter("ignore")
    import torch
    import torch.nn.functional as F
    from torch import nn

    import kernels

# ================================================================================================
# 2. Config and weights
#    in: a folder as Hugging Face lays it out, or a repo id      out: config, filled parameters
#
#    Only config.json and safetensors are read: data, never code. A pickle (.bin) could run a
#    program when it is opened. Every tensor of the checkpoint is matched by name and shape first.
# ================================================================================================

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FAMILIES = {"GPT2LMHeadModel": "gpt2", "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama"}

# GPT-2's names in config.json, and LLaMA's for the same.
GPT2_KEYS = {"n_embd": "hidden_size", "n_head": "num_attention_heads",
             "n_layer": "num_hidden_layers", "n_inner": "intermediate_size",
             "n_positions": "max_position_embeddings", "layer_norm_epsilon": "rms_norm_eps"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
         "num_attention_heads", "num_key_value_heads", "max_position_embeddings")

# Settings that would change the arithmetic, with the values that this decoder computes.
COMPUTED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "hidden_act": ("silu",),
    "sliding_window": (None,), "quantization_config": (None,), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "rope_type": ("default", "linear", "llama3"),
    "dtype": tuple(DTYPES),
}


def require(ok, name, value, allowed):
    """The one form of our complaints: what it is about, what was given, what is allowed."""
    if not ok:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def is_int(value, low, high=math.inf):
    return type(value) is int and low <= value <= high


@contextmanager
def reading(path):
    """Whatever is wrong with the contents of a file becomes one ValueError that names the file."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SafetensorError,
            TemplateError, RuntimeError) as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        where = "" if str(error).startswith(str(path)) else f"{path}: "    # said by a file within
        raise ValueError(f"{where}{kind}{error}") from None


def read_json(path):
    with reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def load_config(folder):
    """config.json in one form for both families -> a namespace with the names of LLaMA's file.

    In the letters above: vocab_size V, hidden_size E, num_hidden_layers L, num_attention_heads H,
    num_key_value_heads K, head_dim D (H * D need not be E). Any id of eos_token_id ends a text.
    Raises: ValueError that names file, key, value and what is supported.
    """
    path, generation = folder / "config.json", folder / "generation_config.json"
    raw = {GPT2_KEYS.get(key, key): value for key, value in read_json(path).items()
           if value is not None or key == "sliding_window"}    # null is not the same as absent
    if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
        raw["eos_token_id"] = eos
    with reading(path):
        arch = raw.get("architectures", [None])[0]
        require(arch in FAMILIES, "architecture", arch, " or ".join(FAMILIES))
        gpt2 = FAMILIES[arch] == "gpt2"
        c = {"num_key_value_heads": raw["num_attention_heads"], "tie_word_embeddings": gpt2,
             "head_dim": raw["hidden_size"] // raw["num_attention_heads"],
             "intermediate_size": 4 * raw["hidden_size"], "rms_norm_eps": 1e-5 if gpt2 else 1e-6,
             "attention_bias": gpt2, "mlp_bias": gpt2, "eos_token_id": [], "rope_theta": 10000.0,
             "sliding_window": 4096 if arch == "MistralForCausalLM" else None,
             "dtype": raw.get("torch_dtype", "float32"), **raw, "family": FAMILIES[arch]}
        # transformers 5 writes rope_parameters; before, rope_theta stood beside rope_scaling
        c["rope"] = {"rope_theta": c["rope_theta"],
                     **(raw.get("rope_parameters") or raw.get("rope_scaling") or {})}
        kind = c["rope"].get("rope_type", c["rope"].get("type", "default"))
        c["rope_type"] = c["rope"]["rope_type"] = kind
        if not isinstance(c["eos_token_id"], list):
            c["eos_token_id"] = [c["eos_token_id"]]
        for key, computed in COMPUTED.items():
            require(c.get(key, computed[0]) in computed, key, c.get(key), f"one of {computed}")
        for key in SIZES:
            require(is_int(c[key], 1), key, c[key], "a positive integer")
        for token_id in c["eos_token_id"]:
            require(is_int(token_id, 0), "eos_token_id", token_id, "a token id, or a list of them")
        require(c["rms_norm_eps"] > 0, "rms_norm_eps", c["rms_norm_eps"], "above 0")
        require(c["num_attention_heads"] % c["num_key_value_heads"] == 0, "num_key_value_heads",
                c["num_key_value_heads"], f"a divisor of {c['num_attention_heads']} query heads")
        require(c["head_dim"] % 2 == 0, "head_dim", c["head_dim"], "even")
        return SimpleNamespace(**c)


def checkpoint_files(folder):
    """The safetensors files of a folder: the shards that the index names, or the single file."""
    index, names = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        with reading(index):
            names = {str(name) for name in read_json(index)["weight_map"].values()}
    for name in sorted(names):
        require(Path(name).name == name, f"{index}: file", name, "a plain name in the same folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: {name} is missing; only safetensors are read, as a "
                                    "pickle (.bin) can run code when it is opened")
    return [folder / name for name in sorted(names)]


def find_tensors(folder, wanted, is_ignored):
    """Where each of `wanted`, {name: tensor of the right shape}, is -> {name: (file, key in it)}.

    Raises: ValueError that names tensor, file and shapes if one is missing, unexpected or of
        another shape. Only the files' headers are read.
    """
    places, files = {}, checkpoint_files(folder)
    for path in files:
        with reading(path), safe_open(path, "pt") as file:
            for key in file.keys():
                name = key.removeprefix("transformer.")
                shape = tuple(file.get_slice(key).get_shape())
                if not is_ignored(name):
                    require(name in wanted and name not in places, f"tensor {key} {shape}",
                            "unexpected", "one that such a model has, and only once")
                    require(shape == wanted[name].shape, f"shape of {key}", shape,
                            f"{tuple(wanted[name].shape)} by config.json")
                    places[name] = path, key
    for name in wanted.keys() - places.keys():
        raise ValueError(f"{folder}: tensor {name} {tuple(wanted[name].shape)} is missing in "
                         f"{', '.join(path.name for path in files)}")
    return places


def load_tensors(folder, wanted, is_ignored):
    """Fill `wanted` from the folder's safetensors; dtype, device and layout are its tensors' own.

    Cost: files are mapped, not read, and each mapping is dropped after about 4 MB, so that beside
    the destination the host holds no second copy, not even of one large embedding.
    """
    for name, (path, key) in find_tensors(folder, wanted, is_ignored).items():
        target = wanted[name]
        for row in range(0, len(target), rows := 1 + (1 << 22) // target[0].nbytes):
            with safe_open(path, "pt") as file:
                target[row:row + rows] = file.get_slice(key)[row:row + rows]


def _get(url, **headers):
    headers["Accept-Encoding"] = "identity"        # a Range must count the file's own bytes
    if token := os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    try:
        response = requests.get(url, stream=True, timeout=(10, 60), headers=headers)
    except requests.RequestException as error:
        raise requests.ConnectionError(f"cannot reach {url} ({type(error).__name__}; offline?); "
                                       "give a model's folder, or tiny") from None
    if not response.ok:
        raise OSError(f"{url}: the server answered {response.status_code} {response.reason}; check "
                      "the name, and for a private model set HF_TOKEN")
    return response


def _show_progress(name, done, size):
    if sys.stderr.isatty():
        print(f"\r{name:30.30} [{'#' * (30 * done // size):30}] {done / 1e6:,.1f} of "
              f"{size / 1e6:,.1f} MB", end="\n" * (done >= size), file=sys.stderr, flush=True)


def _fetch(url, path, size, checksum, tries=5):
    """One file: resumed after a cut, renamed into place only when size and checksum are right."""
    part = path.with_name(f"{path.name}.{checksum[:12]}.part")   # never resumed as another version
    if path.is_file() and path.stat().st_size == size:           # of a download that did not finish
        os.replace(path, part)
    part.touch()
    while (have := part.stat().st_size) < size and tries:
        tries -= 1
        try:
            with _get(url, Range=f"bytes={have}-") as response, \
                    open(part, "ab" if response.status_code == 206 else "wb") as file:
                for chunk in response.iter_content(1 << 16):
                    file.write(chunk)
                    _show_progress(path.name, file.tell(), size)
        except requests.RequestException:
            time.sleep(0.2)                        # cut: what came is kept, ask for the rest
    if have < size:
        raise OSError(f"{url}: cut off at {have} of {size} bytes; run again to resume")
    # SHA-256 of large files; of small ones git's SHA-1, over a header and the bytes
    hasher = hashlib.sha256() if len(checksum) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with open(part, "rb") as file:
        got = hashlib.file_digest(file, lambda: hasher).hexdigest()
    if have > size or got != checksum:
        part.unlink()
        raise OSError(f"{url}: damaged: {have} bytes with checksum {got[:12]}, expected {size} "
                      f"with {checksum[:12]}; removed, run again")
    os.replace(part, path)


# What a model needs of a repository. Names are matched whole, so none can leave the folder.
REPO_FILES = re.compile(r"(generation_|tokenizer_)?config\.json|(tokenizer|vocab)\.json|merges\.txt"
                        r"|tokenizer\.model|chat_template\.jinja"
                        r"|model[\w.-]*\.safetensors(\.index\.json)?")


def download(repo_id):
    """The folder of a Hugging Face repository, downloaded on first use.

    HF_ENDPOINT and HF_TOKEN are honoured; NANOPAGED_CACHE names another cache folder. A finished
    repository is used without asking the network again.
    Raises: OSError with one line: offline, no such repository, no permission, damaged file.
    """
    cache = Path(os.environ.get("NANOPAGED_CACHE") or "~/.cache/nanopaged").expanduser()
    folder = cache / repo_id.replace("/", "--")
    receipt = folder / "downloaded.json"           # written last: the rest is whole
    if receipt.is_file():
        return folder
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    listing = f"{endpoint}/api/models/{repo_id}/revision/main?blobs=true"
    with reading(listing):
        info = _get(listing).json()
        files = {file["rfilename"]: file for file in info["siblings"]
                 if REPO_FILES.fullmatch(file["rfilename"])}
        require(any(name.endswith(".safetensors") for name in files), "list of weights", [],
                "model*.safetensors: a pickle (.bin) can run code when it is opened")
        folder.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            checksum = (file.get("lfs") or {}).get("sha256") or file["blobId"]
            url = f"{endpoint}/{repo_id}/resolve/{info['sha']}/{name}"
            _fetch(url, folder / name, file["size"], checksum)
    receipt.write_text(json.dumps({"repo_id": repo_id, "commit": info["sha"]}))
    return folder


def find_model(model):
    """The folder for `model`: "tiny" (shipped), a folder, or a Hugging Face repo id."""
    here = Path(__file__).resolve().parent
    folder = here / "tutorial" / "tiny" if model == "tiny" else Path(model).expanduser()
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(model)):
        folder = download(str(model))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{model}: no folder with a config.json; give tiny, a model's "
                                "folder, or a repo id like HuggingFaceTB/SmolLM2-135M-Instruct")
    return folder


# ================================================================================================
# 3. Tokenizer
#    in: text      out: token ids, and back, byte by byte
#
#    Byte-level BPE (GPT-2, LLaMA-3, SmolLM2) is tiktoken, with the ranks and the split pattern of
#    the model's own files. LLaMA-2's BPE has no split, and spells unknown characters as bytes
#    (<0xE2>): that cannot be said in tiktoken, so its merge loop stands here.
# ================================================================================================

# GPT-2's split (Radford et al. 2019): contractions, words with one leading space, numbers, other
# symbols; of a run of white space the last one goes with the word that follows.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# LLaMA-3's: contractions in either case, at most three digits, line breaks with what precedes them.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# tokenizer.model names no special tokens; Meta's code gives these, counted from the last rank.
LLAMA3_SPECIAL = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6,
                  "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10}

# Byte-level files spell each byte as one printable character: printable bytes as themselves, the
# other 68 as the characters from 256 on, in order. {character: byte}
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(b): b for b in PRINTABLE}
BYTE_OF |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}


def bpe_merge(symbols, rank):
    """Merge the neighbouring pair of lowest rank, everywhere, until no pair has a rank.

    symbols: tuple of str; rank: {(left, right): int}.
    Example: bpe_merge(("a", "a", "a", "b"), {("a", "a"): 0, ("aa", "a"): 1}) -> ["aaa", "b"]
    """
    symbols = list(symbols)
    while len(symbols) > 1:
        pair = min(itertools.pairwise(symbols), key=lambda pair: rank.get(pair, math.inf))
        if pair not in rank:
            break
        merged, i = [], 0
        while i < len(symbols):
            width = 2 if tuple(symbols[i:i + 2]) == pair else 1
            merged.append("".join(symbols[i:i + width]))
            i += width
        symbols = merged
    return symbols


def split_text(pattern, text):
    """The matches of a pattern, and what lies between them."""
    ends = [0, *(at for match in regex.finditer(pattern, text) for at in match.span()), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(ends) if a < b]


def _template_error(message):
    raise TemplateError(message)


class Tokenizer:
    """Text to token ids and back, from the files in a model's folder.

    Reads tokenizer.json (byte-level BPE, or BPE with byte fallback), LLaMA-3's tokenizer.model, or
    GPT-2's vocab.json with merges.txt. Raises ValueError naming what it cannot read.
    """

    def __init__(self, folder):
        self.folder = folder
        self.special = {}        # {text: id}: no text of a user's stands for one of these
        self.added = {}          # {text: id} of added ordinary tokens, matched before all else
        self.prefix = []         # ids put before each text, such as a beginning-of-text token
        self.bytes_of = {}       # {id: the bytes it adds to a text}; special tokens have none
        self.first_space = ""    # a space that decode() drops: LLaMA-2 begins each text with one
        readers = {"tokenizer.json": self._read_spec, "tokenizer.model": self._read_tiktoken,
                   "vocab.json": self._read_gpt2}
        present = [name for name in readers if (folder / name).is_file()]
        if not present:
            raise FileNotFoundError(f"{folder}: no tokenizer there; needs {' or '.join(readers)}")
        with reading(folder / present[0]):
            readers[present[0]](folder / present[0])
        self.bytes_of |= {i: text.encode() for text, i in self.added.items()}
        self.bytes_of |= dict.fromkeys(self.special.values(), b"")

    def _read_gpt2(self, path):
        """GPT-2's own files: vocab.json, and merges.txt with a heading line."""
        vocab = read_json(path)
        merges = path.with_name("merges.txt").read_text(encoding="utf-8").split("\n")[1:]
        self.special = {"<|endoftext|>": vocab["<|endoftext|>"]}
        self._use_merges(vocab, [merge.split(" ") for merge in merges if merge], [GPT2_SPLIT])

    def _read_tiktoken(self, path):
        """LLaMA-3's tokenizer.model: one token a line, base64 and rank, which is its id."""
        lines = path.read_bytes().splitlines()
        require(all(re.fullmatch(rb"\S+ \d+", line) for line in lines), "format", "SentencePiece?",
                "tiktoken's; put the model's tokenizer.json beside it")
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        require([*ranks.values()] == [*range(len(lines))] and len(ranks) >= 256, "list of ranks",
                f"broken ({len(ranks)} tokens)", "0, 1, 2, ... to the last token")
        self.special = {text: len(ranks) + offset for text, offset in LLAMA3_SPECIAL.items()}
        self.prefix = [self.special["<|begin_of_text|>"]]
        self._use_ranks(ranks, [*ranks.values()], [LLAMA3_SPLIT])

    def _read_spec(self, path):
        """tokenizer.json of the tokenizers library."""
        spec = read_json(path)
        model, pre_tokenizer = spec["model"], spec.get("pre_tokenizer") or {}
        require(model.get("type", "BPE") == "BPE", "model", model.get("type"), "BPE")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            require(not model.get(key), key, model.get(key), "absent")
        for token in spec.get("added_tokens", []):
            odd = [key for key in ("lstrip", "rstrip", "single_word") if token.get(key)]
            require(not odd, f"added token {token['content']}", odd, "without these options")
            (self.special if token["special"] else self.added)[token["content"]] = token["id"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        normalizer = spec.get("normalizer") or {"normalizers": []}
        steps = [part["type"] for part in normalizer.get("normalizers", [normalizer])]
        if model.get("byte_fallback"):
            steps += [pre_tokenizer["type"]] if pre_tokenizer else []
            schemes = {"Prepend Replace": "each", "Replace": "never",
                       "Metaspace": pre_tokenizer.get("prepend_scheme", "always")}
            require(" ".join(steps) in schemes and not pre_tokenizer.get("split"), "normalization",
                    " ".join(steps), f"one of {[*schemes]}, without split")
            self._use_byte_fallback(model["vocab"], merges, schemes[" ".join(steps)])
        else:
            require(not steps, "normalizer", steps, "null with byte-level BPE")
            self._use_merges(model["vocab"], merges, self._split_patterns(pre_tokenizer),
                             model.get("ignore_merges"))
        processor = spec.get("post_processor") or {}
        for part in processor.get("processors", [processor]):
            if part.get("type") == "TemplateProcessing":       # such as <s> before every text
                require("Sequence" in part["single"][-1], "template", part["single"],
                        "one that ends with the text")
                names = [p["SpecialToken"]["id"] for p in part["single"][:-1]]
                self.prefix = [i for name in names for i in part["special_tokens"][name]["ids"]]

    def _split_patterns(self, pre_tokenizer):
        """The split patterns of byte-level BPE, each applied to the pieces of the one before."""
        patterns = []
        for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
            match part:
                case {"type": "Digits", "individual_digits": True}:
                    patterns.append(r"\p{N}")
                case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": pattern}}:
                    patterns.append(pattern)
                case {"type": "ByteLevel", "add_prefix_space": False}:
                    patterns += [GPT2_SPLIT] if part.get("use_regex", True) else []
                case _:
                    require(False, "pre_tokenizer", part, "Digits, Split or ByteLevel")
        return patterns

    def _use_merges(self, vocab, merges, patterns, ignore_merges=False):
        """Ranks of our own: the bytes, then the merges in their order.

        tiktoken takes a piece that is a token as a whole; "ignore_merges" asks for just that, so
        tokens that no merge makes get a rank too.
        """
        made = [left + right for left, right in merges] + [*vocab] * bool(ignore_merges)
        tokens = [t for t in dict.fromkeys([*BYTE_OF, *made]) if BYTE_OF.keys() >= {*t}]
        ranks = {bytes(BYTE_OF[c] for c in token): rank for rank, token in enumerate(tokens)}
        self._use_ranks(ranks, [vocab.get(token) for token in tokens], patterns)

    def _use_ranks(self, ranks, ids, patterns):
        """tiktoken, which merges by rank. ids[rank] is the model's id; None: it lacks that byte."""
        self.bytes_of = dict(zip(ids, ranks, strict=True))
        # The splits are made here: tiktoken knows one pattern, and panics at 1 MB of white space.
        whole = "(?s:.+)"
        encoding = tiktoken.Encoding("", pat_str=whole, mergeable_ranks=ranks, special_tokens={})

        def encode(text, at_start):
            pieces = [text]
            for pattern in patterns:
                pieces = [p for piece in pieces for p in split_text(pattern, piece)]
            return [ids[rank] for piece in pieces for rank in encoding.encode_ordinary(piece)
                    if ids[rank] is not None]      # dropped, as by the tokenizers library

        self._encode_ordinary = encode

    def _use_byte_fallback(self, vocab, merges, scheme):
        """LLaMA-2, TinyLlama, Mistral: ▁ is a space, an unknown character becomes its bytes."""
        rank = {(left, right): i for i, (left, right) in enumerate(merges)}
        for token, i in vocab.items():
            byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
            self.bytes_of[i] = bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
        self.first_space = " " * (scheme != "never")
        # Words can be merged apart, and remembered, as no token has a ▁ after another character.
        words = re.compile("▁*[^▁]*" if not any("▁" in t.lstrip("▁") for t in vocab) else "(?s:.+)")

        @functools.lru_cache(1 << 16)
        def encode_word(word):
            symbols = [s for c in word
                       for s in ([c] if c in vocab else [f"<0x{b:02X}>" for b in c.encode()])]
            return [vocab[symbol] for symbol in bpe_merge(symbols, rank)]

        def encode(text, at_start):
            text = text.replace(" ", "▁")
            if scheme == "each" or text[0] != "▁" and (
                    scheme == "always" or scheme == "first" and at_start):
                text = "▁" + text
            return [i for word in words.findall(text) for i in encode_word(word)]

        self._encode_ordinary = encode

    def encode(self, text, allowed_special=False, add_special_tokens=True):
        """Token ids of a text; "<|endoftext|>" in it is plain text unless allowed_special."""
        known = self.added | (self.special if allowed_special else {})
        text = text.encode("utf-8", "replace").decode()        # a lone surrogate becomes "?"
        longest_first = sorted(known, key=len, reverse=True)   # one token may start another
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if known else [text]
        ids = list(self.prefix) if add_special_tokens else []
        for i, piece in enumerate(pieces):                     # odd pieces are the matches
            if piece:
                ids += [known[piece]] if i % 2 else self._encode_ordinary(piece, at_start=i == 0)
        return ids

    def token_bytes(self, token_id):
        """The bytes that a token adds to a text: none for a special or an unused one."""
        return self.bytes_of.get(token_id, b"")

    def decode(self, ids):
        """The text of token ids; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return text.removeprefix(self.first_space)

    def render_chat(self, messages):
        """The prompt for [{"role": ..., "content": ...}], by the model's own chat template.

        The template comes from a downloaded file: it runs in jinja2's sandbox.
        """
        path, config = self.folder / "chat_template.jinja", self.folder / "tokenizer_config.json"
        config = read_json(config) if config.is_file() else {}
        source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
        env.globals |= {"raise_exception": _template_error, "strftime_now": time.strftime}
        special = {k: v["content"] if isinstance(v, dict) else v
                   for k, v in config.items() if k.endswith("_token") and v}
        with reading(f"{self.folder}: chat template"):
            if isinstance(source, list):                       # several, by name
                source = {t["name"]: t["template"] for t in source}.get("default")
            require(source, "it", source, "there for --chat; this model has none")
            return env.from_string(source).render(messages=messages, add_generation_prompt=True,
                                                  **special)


# ================================================================================================
# 4. Sequences
#    in: token ids and SamplingParams      out: the plain state that everything below passes around
#    paper 4.3, 5.2      No torch in sections 4 to 6: step through them anywhere.
# ================================================================================================


class OutOfBlocks(MemoryError):
    """The block pool cannot hold what was asked for; nothing was changed."""


# Every setting of the API and the command line: (type, lowest, highest), or a list of choices.
LIMITS = {
    "temperature": (float, 0, 1e6), "top_p": (float, 1e-6, 1), "min_p": (float, 0, 1),
    "top_k": (int, -1, 1 << 31), "repetition_penalty": (float, 0.001, 1000),
    "seed": (int, 0, (1 << 63) - 1), "logprobs": (int, 0, 100), "ignore_eos": [False, True],
    "max_tokens": (int, 1, 1 << 31), "max_model_len": (int, 2, 1 << 31),
    "num_blocks": (int, 1, 1 << 31), "block_size": [1 << i for i in range(9)],
    "max_num_seqs": (int, 1, 1 << 20), "max_num_batched_tokens": (int, 1, 1 << 31),
    "gpu_memory_utilization": (float, 0.01, 1), "device": ["auto", "cpu", "cuda"],
    "dtype": ["auto", *DTYPES], "load_format": ["auto", "dummy"],
}


def check_limits(settings, optional=()):
    """Raise a ValueError that names the first of {name: value} outside LIMITS."""
    for name, value in settings.items():
        limits = None if value is None and name in optional else LIMITS.get(name)
        if isinstance(limits, list):
            require(value in limits, name, value, f"one of {limits}")
        elif limits:
            kind, low, high = limits
            ok = type(value) in (int, kind) and low <= value <= high        # NaN compares false
            require(ok, name, value, f"{kind.__name__} from {low} to {high}")


@dataclass
class SamplingParams:
    """How one request turns logits into tokens, and when it ends. Wrong values raise ValueError."""
    n: int = 1                            # texts a prompt; more than one is not built yet
    temperature: float = 1.0              # 0 is greedy: always the likeliest token
    top_p: float = 1.0                    # keep the likeliest tokens that sum to this probability
    top_k: int = 0                        # keep the k likeliest tokens; 0 or -1 keeps all
    min_p: float = 0.0                    # drop tokens below this share of the likeliest one
    seed: int | None = None               # same seed, same tokens; None: the engine draws one
    max_tokens: int = 16                  # generated tokens at most
    stop: str | list[str] = ()            # texts that end the output and are left out of it
    stop_token_ids: list[int] = ()        # tokens that end the output, beside the model's own
    ignore_eos: bool = False              # go on past the model's end-of-text token
    logprobs: int | None = None           # report the log-probabilities of the top so many
    repetition_penalty: float = 1.0       # above 1: tokens of prompt and output become less likely

    def __post_init__(self):
        check_limits(vars(self), optional=("seed", "logprobs"))
        require(is_int(self.n, 1, 1), "n", self.n, "1: several texts a prompt are not built yet")
        for name, allowed, ok in (
                ("stop", "one or more texts, none empty", lambda s: isinstance(s, str) and s),
                ("stop_token_ids", "a list of token ids", lambda i: is_int(i, 0))):
            given = getattr(self, name)
            items = [] if given is None else [given] if isinstance(given, str) else given
            require(isinstance(items, list | tuple) and all(map(ok, items)), name, given, allowed)
            setattr(self, name, list(items))


Status = Enum("Status", "WAITING RUNNING SWAPPED FINISHED")


class Sequence:
    """One text in the making: its tokens, and the blocks that hold their K and V."""

    def __init__(self, token_ids, params, seed):
        self.token_ids = list(token_ids)           # prompt, then generated
        self.num_prompt_tokens = len(token_ids)
        self.num_kv = 0                            # tokens whose K and V are in the cache
        self.block_table = []                      # logical block i is physical block_table[i]
        self.params, self.seed = params, seed
        self.text = ""
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")   # keeps half a character back
        self.cumulative_logprob = 0.0
        self.logprobs = []
        self.finish_reason = None                  # "stop" or "length"
        self.steps_in_last_block = 0               # for the memory report: Engine._count_slots

    @property
    def num_tokens(self):
        return len(self.token_ids)


@dataclass
class CompletionOutput:
    """One text of a request, complete once finish_reason is set."""
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float              # natural logarithm
    logprobs: list[dict] | None            # one {token_id: logprob} a generated token
    finish_reason: str | None              # "stop" or "length"; None while it runs


@dataclass
class RequestOutput:
    """What generate() and step() return for a request."""
    request_id: int
    prompt: str | None                     # None when it was given as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0             # there is no prefix cache yet


class SequenceGroup:
    """One request. Its sequences are scheduled, preempted and finished together (paper 4.5)."""

    def __init__(self, request_id, prompt, seqs):
        self.request_id, self.prompt, self.seqs = request_id, prompt, seqs   # ids grow by arrival
        self.status = Status.WAITING

    def output(self):
        """A snapshot for the user. A text that may yet turn into a stop string is held back."""
        finished, outputs = self.status is Status.FINISHED, []
        for i, seq in enumerate(self.seqs):
            held_back = 0 if finished else max(map(len, seq.params.stop), default=1) - 1
            text = seq.text[:max(0, len(seq.text) - held_back)]
            outputs.append(CompletionOutput(i, text, seq.token_ids[seq.num_prompt_tokens:],
                                            seq.cumulative_logprob, seq.logprobs[:] or None,
                                            seq.finish_reason))
        prompt_token_ids = self.seqs[0].token_ids[:self.seqs[0].num_prompt_tokens]
        return RequestOutput(self.request_id, self.prompt, prompt_token_ids, outputs, finished)


# ================================================================================================
# 5. Block pool
#    in: a sequence and how many tokens it is about to compute      out: blocks in its block_table
#    paper 4.2, 4.3
#
#    The pool hands out block ids; the memory behind them is the engine's. It is an ordinary
#    allocator of equal pieces, so nothing is ever lost *between* pieces (no external
#    fragmentation), and a sequence wastes less than one block.
# ================================================================================================


class BlockPool:
    """N blocks of B slots, a free list and reference counts.

    Example (the paper's Fig 6, B = 4): a prompt of 7 tokens takes two blocks, 4 + 3 filled; the
    eighth token fills the second; only the ninth takes a third.
    """

    def __init__(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free_blocks = deque(range(num_blocks))
        self.ref_count = [0] * num_blocks

    @property
    def num_free(self):
        return len(self.free_blocks)

    def blocks_needed(self, seq, num_new):
        """How many more blocks `seq` needs before `num_new` tokens can be written.

        It counts from num_kv, not num_tokens: the token just sampled has no K and V yet. With
        B = 4 and num_kv = 8 both blocks are full, so one new token needs a third.
        """
        return -(-(seq.num_kv + num_new) // self.block_size) - len(seq.block_table)

    def can_append(self, seq, num_new, reserve=0):
        """Whether append() would succeed and leave `reserve` blocks free."""
        return self.blocks_needed(seq, num_new) + reserve <= self.num_free

    def append(self, seq, num_new):
        """Give `seq` room for the K and V of `num_new` more tokens; num_kv follows after the step.

        Raises: OutOfBlocks, and nothing changes (I5).
        """
        needed = self.blocks_needed(seq, num_new)
        if needed > self.num_free:
            raise OutOfBlocks(f"{needed} blocks are needed, {self.num_free} are free")
        for _ in range(needed):
            block_id = self.free_blocks.popleft()
            self.ref_count[block_id] = 1
            seq.block_table.append(block_id)

    def free(self, seq):
        """Take back all blocks of `seq`; its tokens stay, their K and V are gone."""
        for block_id in seq.block_table:
            self.ref_count[block_id] -= 1          # one table row less points here (keeps I1)
            if self.ref_count[block_id] == 0:
                self.free_blocks.append(block_id)
        seq.block_table, seq.num_kv = [], 0

    def check(self, seqs):
        """Assert I1, I2 and I4 over all sequences that hold blocks."""
        rows = Counter(block_id for seq in seqs for block_id in seq.block_table)
        for seq in seqs:
            assert self.blocks_needed(seq, 0) == 0, f"I4: {seq.num_kv} tokens, {seq.block_table}"
        counted = [rows[block_id] for block_id in range(self.num_blocks)]
        assert counted == self.ref_count, f"I1: {counted} rows, but ref_count {self.ref_count}"
        held_or_free = sorted([*rows, *self.free_blocks])
        assert held_or_free == [*range(self.num_blocks)], f"I2: lost or there twice: {held_or_free}"


# ================================================================================================
# 6. Scheduler
#    in: waiting and running groups      out: who computes how many tokens in this step
#    paper 4.5
#
#    First come, first served, decided anew each step (iteration-level batching). There is no
#    prefill phase and no decode phase: a sequence that lacks the K and V of m tokens is given
#    up to m tokens of the step's budget. A decode lacks one; a long prompt is computed in chunks
#    beside the decodes; a preempted sequence lacks all and computes them like a prompt.
#
#    The running groups are always the earliest arrivals, so the latest is preempted first and the
#    earliest can always take the whole pool: it finishes, then the next one does. No deadlock.
# ================================================================================================


class Scheduler:
    """Decides who runs (paper 4.5). Keeps I5 and I7."""

    def __init__(self, pool, max_num_seqs, max_num_batched_tokens):
        self.pool = pool
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting, self.running = deque(), []   # both in order of arrival
        self.num_preemptions = 0
        # Kept free at admission for the running ones' next tokens, lest the newcomer be preempted
        # at once: 1%, as in the paper's code, so none in a pool of less than 100 blocks.
        self.watermark = pool.num_blocks // 100

    def add(self, group):
        self.waiting.append(group)

    def schedule(self):
        """-> [(sequence, number of its tokens to compute), ...], with blocks for them allocated."""
        scheduled, budget, i = [], self.max_num_batched_tokens, 0
        # The running ones first, as they hold blocks; then, while budget is left, newcomers. Each
        # running group has one decode at least, and all but the last are done with their prompts,
        # so the budget that admitted them lasts for all of them in each step.
        while budget and (i < len(self.running) or self._admit()):
            group = self.running[i]
            seq = group.seqs[0]
            num_new = min(seq.num_tokens - seq.num_kv, budget)
            while group.status is Status.RUNNING and not self.pool.can_append(seq, num_new):
                # The latest arrival, which may be `group` itself, but none that is scheduled
                # already. It cannot come back in this step: it needs what it gave, and more.
                self._preempt(self.running.pop())
            if group.status is Status.RUNNING:
                self.pool.append(seq, num_new)
                scheduled.append((seq, num_new))
                budget, i = budget - num_new, i + 1
        return scheduled

    def _admit(self):
        """Let the group that waits longest run, if there is room; nobody jumps the queue."""
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return False
        # All its tokens must fit, even if only a chunk is computed now: a prompt half done that
        # waits for blocks would hold those that others wait for.
        seq, reserve = self.waiting[0].seqs[0], self.watermark if self.running else 0
        if not self.pool.can_append(seq, seq.num_tokens, reserve):
            return False
        self.running.append(self.waiting.popleft())
        self.running[-1].status = Status.RUNNING
        return True

    def _preempt(self, group):
        """By recompute: the blocks go, the tokens stay, and one prefill brings K and V back."""
        for seq in group.seqs:
            self.pool.free(seq)
        group.status = Status.WAITING
        self.waiting.appendleft(group)             # it arrived before all that wait
        self.num_preemptions += 1

    def finish(self, group):
        """Take a group out, wherever it is, and its blocks back."""
        (self.running if group.status is Status.RUNNING else self.waiting).remove(group)
        for seq in group.seqs:
            self.pool.free(seq)
        group.status = Status.FINISHED

    def check(self):
        """Assert the invariants of pool and queues."""
        self.pool.check([seq for group in self.running for seq in group.seqs])
        order = [group.request_id for group in [*self.running, *self.waiting]]
        assert order == sorted(order), f"first come, first served is broken: {order}"
        assert not any(seq.block_table for group in self.waiting for seq in group.seqs), "I7"


# ================================================================================================
# 7. Batch
#    in: [(sequence, num_new), ...]      out: the flat tensors of one step
#
#    The step's tokens stand one after the other, without padding: a 500-token prefill chunk and
#    three decodes are T = 503 rows. From here on nothing knows which row belongs to whom but by
#    these maps.
# ================================================================================================


@dataclass
class Batch:
    """One step's tokens, and the maps that say whose they are and where their K and V go."""
    input_ids: torch.Tensor         # (T,)
    positions: torch.Tensor         # (T,) place of each token in its own text
    slot_mapping: torch.Tensor      # (T,) block_id * B + offset: where its K and V go
    block_tables: torch.Tensor      # (S, M) int32, rows padded with 0
    context_lens: torch.Tensor      # (S,) int32, this step's tokens included
    query_start: torch.Tensor       # (S+1,) int32: row of each sequence's first token, and T
    max_query_len: int
    last_rows: torch.Tensor         # rows whose logits are wanted


def make_batch(scheduled, block_size, device):
    """The flat batch of a step.

    Example (B = 4): a decode at position 5, with table [7, 1], stands after a two-token prefill.
    query_lens [2, 1], query_start [0, 2, 3], seq_of [0, 0, 1], positions [0, 1, 5]; the last token
    is in logical block 5 // 4 = 1, physical block 1, slot 1 * 4 + 5 % 4 = 5.
    """
    num_columns = max(len(seq.block_table) for seq, _ in scheduled)        # M
    query_lens = torch.tensor([num_new for _, num_new in scheduled])
    first = torch.tensor([seq.num_kv for seq, _ in scheduled])             # (S,) first new position
    tables = torch.tensor([seq.block_table + [0] * (num_columns - len(seq.block_table))
                           for seq, _ in scheduled], dtype=torch.int32)    # (S, M)
    query_start = F.pad(query_lens.cumsum(0), (1, 0))                      # (S+1,)
    seq_of = torch.repeat_interleave(query_lens)                           # (T,) whose row it is
    positions = torch.arange(len(seq_of)) - query_start[seq_of] + first[seq_of]
    slots = tables[seq_of, positions // block_size].long() * block_size + positions % block_size
    ids = [*itertools.chain.from_iterable(
        seq.token_ids[seq.num_kv:seq.num_kv + num_new] for seq, num_new in scheduled)]
    assert len(ids) == len(slots), f"{len(ids)} token ids for {len(slots)} slots"
    # only a sequence whose last known token is computed now gets a new one
    is_last = torch.tensor([seq.num_kv + num_new == seq.num_tokens for seq, num_new in scheduled])
    return Batch(
        input_ids=torch.tensor(ids).to(device), positions=positions.to(device),
        slot_mapping=slots.to(device), block_tables=tables.to(device),
        context_lens=(first + query_lens).int().to(device),
        query_start=query_start.int().to(device), max_query_len=int(query_lens.max()),
        last_rows=(query_start[1:] - 1)[is_last].to(device))


# ================================================================================================
# 8. Model
#    in: a flat batch and the KV cache      out: logits of the rows that are sampled
#
#    One decoder is both families; what differs is said by the config:
#                 position                 norm        MLP                     biases
#      GPT-2      learned, added once      LayerNorm   gelu(up)                all
#      LLaMA      RoPE, on each q and k    RMSNorm     silu(gate) * up         none, mostly
# ================================================================================================

# Our modules; GPT-2's name of each; LLaMA's, several where we stack their rows in one matrix.
NAMES = {
    "embed_tokens": ("wte", "model.embed_tokens"), "embed_positions": ("wpe",),
    "norm": ("ln_f", "model.norm"), "lm_head": ("lm_head", "lm_head"),
    "layers.{}.attn_norm": ("h.{}.ln_1", "model.layers.{}.input_layernorm"),
    "layers.{}.qkv": ("h.{}.attn.c_attn", "model.layers.{}.self_attn.q_proj",
                      "model.layers.{}.self_attn.k_proj", "model.layers.{}.self_attn.v_proj"),
    "layers.{}.o": ("h.{}.attn.c_proj", "model.layers.{}.self_attn.o_proj"),
    "layers.{}.mlp_norm": ("h.{}.ln_2", "model.layers.{}.post_attention_layernorm"),
    "layers.{}.up": ("h.{}.mlp.c_fc", "model.layers.{}.mlp.gate_proj",
                     "model.layers.{}.mlp.up_proj"),
    "layers.{}.down": ("h.{}.mlp.c_proj", "model.layers.{}.mlp.down_proj"),
}
# Constants that old checkpoints carry: causal masks and rotary tables.
BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq")


class Linear(nn.Linear):
    """Left as it was allocated: first values would be lost work, as a checkpoint brings others."""

    def reset_parameters(self):
        pass


def make_embedding(num_rows, c):
    return nn.Embedding.from_pretrained(torch.empty(num_rows, c.hidden_size, **c.factory))


def make_norm(c):
    norm = nn.LayerNorm if c.family == "gpt2" else nn.RMSNorm
    return norm(c.hidden_size, c.rms_norm_eps, **c.factory)


class Layer(nn.Module):
    """One transformer layer: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        self.attn_norm = make_norm(c)
        qkv_size = sum(self.heads) * c.head_dim
        self.qkv = Linear(c.hidden_size, qkv_size, c.attention_bias, **c.factory)
        self.o = Linear(self.heads[0] * c.head_dim, c.hidden_size, c.attention_bias, **c.factory)
        self.mlp_norm = make_norm(c)
        up_size = c.intermediate_size * (1 if c.family == "gpt2" else 2)
        self.up = Linear(c.hidden_size, up_size, c.mlp_bias, **c.factory)
        self.down = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias, **c.factory)

    def forward(self, x, k_cache, v_cache, batch, rope, runs):
        """x (T, E) -> (T, E); writes the K and V of the T tokens into their slots."""
        qkv = self.qkv(self.attn_norm(x)).unflatten(1, (-1, self.config.head_dim))
        qk, v = qkv.split((sum(self.heads[:2]), self.heads[2]), dim=1)     # (T, H+K, D), (T, K, D)
        qk = kernels.rotate_reference(qk, *rope) if rope else qk
        q, k = qk.split(self.heads[:2], dim=1)
        kernels.write_kv_reference(k, v, k_cache, v_cache, batch.slot_mapping)
        y = kernels.paged_attention_reference(                             # (T, H, D)
            q, k_cache, v_cache, batch.block_tables, batch.context_lens, batch.query_start,
            max_query_len=batch.max_query_len, scale=self.config.head_dim ** -0.5, runs=runs)
        x = x + self.o(y.flatten(1))
        h = self.up(self.mlp_norm(x))
        if self.config.family == "gpt2":
            return x + self.down(F.gelu(h, approximate="tanh"))
        gate, up = h.chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """GPT-2 or LLaMA by its config, reading and writing K and V in the paged cache only."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = make_embedding(c.vocab_size, c)
        if c.family == "gpt2":
            self.embed_positions = make_embedding(c.max_position_embeddings, c)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = make_norm(c)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.hidden_size, c.vocab_size, False, **c.factory)
        self.frequencies = kernels.rope_frequencies(c.head_dim, c.rope).to(c.factory["device"])
        require(self.frequencies.isfinite().all().item(), "rope", c.rope, "finite angles")

    def forward(self, batch, kv_cache):
        """-> logits (len(batch.last_rows), V) float32; kv_cache (L, 2, N, B, K, D) is written."""
        x, rope = self.embed_tokens(batch.input_ids), None                 # (T, E)
        if self.config.family == "gpt2":
            x = x + self.embed_positions(batch.positions)
        else:   # the angles are computed in float32 and once a step, not once a layer
            angle = batch.positions[:, None, None] * self.frequencies      # (T, 1, D/2)
            rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        runs = kernels.query_runs(batch.block_tables, batch.context_lens, batch.query_start,
                                  kv_cache.shape[3])                       # once a step, too
        for layer, (k_cache, v_cache) in zip(self.layers, kv_cache, strict=True):
            x = layer(x, k_cache, v_cache, batch, rope, runs)
        # the vocabulary is the widest matrix: only rows that are sampled meet it
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(self.norm(x[batch.last_rows]), head.weight).float()

    def checkpoint_views(self):
        """{name in the checkpoint: the part of our parameters that it fills}, in its own shape."""
        c, views = self.config, {}
        sizes = {3: [heads * c.head_dim for heads in self.layers[0].heads],    # q, k, v
                 2: [c.intermediate_size] * 2}                                 # gate, up
        for name, parameter in self.named_parameters():
            module, kind = name.rsplit(".", 1)
            layer = re.search(r"\d+|$", module)[0]
            gpt2, *llama = NAMES[re.sub(r"\d+", "{}", module)]
            sources = [gpt2] if c.family == "gpt2" else llama
            parts = parameter.data.split(sizes.get(len(sources), parameter.shape[0]))
            for source, part in zip(sources, parts, strict=True):
                if c.family == "gpt2" and "layers" in module and part.dim() == 2:
                    part = part.T              # GPT-2's Conv1D stores (in, out)
                views[f"{source.format(layer)}.{kind}"] = part
        return views


def load_model(config, folder, device, dtype, load_format="auto"):
    """A Decoder on `device`, filled from the folder or, as "dummy", with random weights."""
    config.factory = {"device": device, "dtype": dtype}
    with reading(folder / "config.json"):          # a rope setting is missing, or memory is short
        model = Decoder(config).requires_grad_(False)
    if load_format == "dummy":
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    else:
        load_tensors(folder, model.checkpoint_views(), lambda name: BUFFERS.fullmatch(name)
                     or config.tie_word_embeddings and name == "lm_head.weight")
    return model


# ================================================================================================
# 9. Sampler
#    in: logits (S, V) and each row's sequence      out: one token a row, and log-probabilities
#
#    Each row draws one number that depends on its seed and its position alone, and nothing is
#    carried from step to step: so neither the rest of the batch nor a preemption can change what
#    a request draws.
# ================================================================================================


def sample(logits, seqs):
    """One token for each row -> [(token_id, logprob, {token_id: logprob} or None), ...].

    The log-probabilities are the model's own, before penalty, temperature and filters.
    """
    params, logprobs = [seq.params for seq in seqs], logits.log_softmax(-1)
    for row, seq in enumerate(seqs):
        if (penalty := params[row].repetition_penalty) != 1:
            seen = torch.tensor(sorted(set(seq.token_ids)), device=logits.device)
            score = logits[row, seen]              # multiplying lowers a negative score
            logits[row, seen] = torch.where(score > 0, score / penalty, score * penalty)
    if any(p.temperature for p in params):
        options = torch.tensor([(p.temperature, p.top_p, p.top_k, p.min_p) for p in params],
                               dtype=torch.float64).T                      # (4, S)
        draws = torch.tensor([(seq.seed, seq.num_tokens) for seq in seqs]).T            # (2, S)
        tokens = kernels.sample_reference(logits, *options.to(logits.device),
                                          *draws.to(logits.device))
    else:
        tokens = logits.argmax(-1)
    chosen, out = logprobs.gather(1, tokens[:, None])[:, 0].tolist(), []
    for row, token in enumerate(tokens.tolist()):
        top = None
        if params[row].logprobs is not None:
            values, ids = logprobs[row].topk(min(params[row].logprobs, logits.shape[1]))
            top = {token: chosen[row], **dict(zip(ids.tolist(), values.tolist(), strict=True))}
        out.append((token, chosen[row], top))
    return out


# ================================================================================================
# 10. Engine
#     in: requests      out: a RequestOutput for each request that moved, step by step
#     paper 4.1 (Fig 4), 4.3
# ================================================================================================


class Engine:
    """Block pool, scheduler, model and sampler, joined in step()."""

    def __init__(self, model, tokenizer, kv_cache, max_num_seqs, max_num_batched_tokens,
                 max_model_len, seed):
        self.model, self.tokenizer, self.kv_cache = model, tokenizer, kv_cache
        self.pool = BlockPool(kv_cache.shape[2], kv_cache.shape[3])
        self.scheduler = Scheduler(self.pool, max_num_seqs, max_num_batched_tokens)
        self.max_model_len, self.seeds = max_model_len, random.Random(seed)
        self.groups = {}                           # request_id -> unfinished group
        self.request_ids = itertools.count()
        self.counts = Counter()                    # what stats() reports

    def add_request(self, prompt, params):
        """Queue a prompt, given as text or as token ids -> its request_id.

        Raises: ValueError when it can never run; nothing changes then (I5, I7).
        """
        text, vocab_size = prompt if isinstance(prompt, str) else None, self.model.config.vocab_size
        require(isinstance(prompt, str | list | tuple), "prompt", prompt, "a text or token ids")
        require(isinstance(params, SamplingParams), "params", params, "SamplingParams")
        if text is not None or params.stop:
            require(self.tokenizer, "prompt", prompt,
                    "token ids, and without stop strings: there is no tokenizer")
        token_ids = self.tokenizer.encode(text) if text is not None else list(prompt)
        require(token_ids, "prompt", prompt, "at least one token long")
        for token_id in (*token_ids, *params.stop_token_ids):
            require(is_int(token_id, 0, vocab_size - 1), "token id", token_id,
                    f"an integer from 0 to {vocab_size - 1}")
        require(len(token_ids) < self.max_model_len, "number of prompt tokens", len(token_ids),
                f"below {self.max_model_len} (max_model_len, or all of the pool's "
                f"{self.pool.num_blocks} blocks); shorten it, or raise num_blocks")
        seed = self.seeds.getrandbits(62) if params.seed is None else params.seed
        group = SequenceGroup(next(self.request_ids), text, [Sequence(token_ids, params, seed)])
        self.groups[group.request_id] = group
        self.scheduler.add(group)
        return group.request_id

    def abort(self, request_id):
        """Drop a request and free its blocks; False if it was not there (any more)."""
        if group := self.groups.pop(request_id, None):
            self.scheduler.finish(group)
        return group is not None

    def has_unfinished_requests(self):
        return bool(self.groups)

    @torch.inference_mode()
    def step(self, watch=None):
        """Schedule, run the model once, sample -> outputs of the requests that got a token.

        watch(engine) is called at the end, while what finishes still holds its blocks.
        """
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return []
        batch = make_batch(scheduled, self.pool.block_size, self.kv_cache.device)
        seqs = [seq for seq, num_new in scheduled if seq.num_kv + num_new == seq.num_tokens]
        sampled = dict(zip(seqs, sample(self.model(batch, self.kv_cache), seqs), strict=True))
        # Up to here a step that is interrupted is simply done again. From here on tokens come
        # first: a num_kv that lags behind is made up for, one that leads would be a hole.
        for seq, token in sampled.items():
            self._append_token(seq, *token)
        for seq, num_new in scheduled:
            seq.num_kv += num_new
        self._count_slots(scheduled)
        if watch:
            watch(self)
        moved = [group for group in self.scheduler.running if group.seqs[0] in sampled]
        for group in moved:
            if all(seq.finish_reason for seq in group.seqs):
                self.scheduler.finish(self.groups.pop(group.request_id))
        return [group.output() for group in moved]

    def _append_token(self, seq, token_id, logprob, logprobs):
        """Add a sampled token; extend the text; set finish_reason if it was the last."""
        seq.token_ids.append(token_id)
        seq.cumulative_logprob += logprob
        seq.logprobs += [logprobs] if logprobs else []
        self.counts["generated_tokens"] += 1
        params, num_generated = seq.params, seq.num_tokens - seq.num_prompt_tokens
        eos_token_ids = () if params.ignore_eos else self.model.config.eos_token_id
        if token_id in eos_token_ids or token_id in params.stop_token_ids:
            seq.finish_reason = "stop"             # this token ends the text, and is no part of it
        elif num_generated >= params.max_tokens or seq.num_tokens == self.max_model_len:
            seq.finish_reason = "length"
        if self.tokenizer:
            new = b"" if seq.finish_reason == "stop" else self.tokenizer.token_bytes(token_id)
            seq.text += seq.utf8.decode(new, final=bool(seq.finish_reason))
            if ends := [at for stop in params.stop if (at := seq.text.find(stop)) >= 0]:
                seq.text, seq.finish_reason = seq.text[:min(ends)], "stop"

    def _count_slots(self, scheduled):
        """What the KV memory of this step holds: tokens, or slots not (yet) used (paper, Fig 2).

        Only at its end a sequence shows which slots of its last block were for nothing.
        """
        counts, block_size = self.counts, self.pool.block_size
        num_held = self.pool.num_blocks - self.pool.num_free
        counts["blocks_peak"] = max(counts["blocks_peak"], num_held)
        counts["steps"] += 1
        counts["running"] += len(scheduled)
        for seq, num_new in scheduled:
            unused = len(seq.block_table) * block_size - seq.num_kv
            counts["computed_tokens"] += num_new
            counts["slots"] += len(seq.block_table) * block_size
            counts["unused"] += unused
            began_block = num_new + unused >= block_size
            seq.steps_in_last_block = 1 if began_block else seq.steps_in_last_block + 1
            if seq.finish_reason:
                counts["never_used"] += unused * seq.steps_in_last_block

    def stats(self):
        """Counters since the start.

        The kv_ shares are of all slots in held blocks, summed over the steps: internal ones were
        left empty by a sequence that finished, reserved are all other empty ones, external is
        memory between pieces.
        """
        c, slots = self.counts, max(1, self.counts["slots"])
        names = "steps", "computed_tokens", "generated_tokens", "blocks_peak"
        return {**{name: c[name] for name in names},
                "mean_running": c["running"] / max(1, c["steps"]),
                "num_blocks": self.pool.num_blocks, "block_size": self.pool.block_size,
                "blocks_used": self.pool.num_blocks - self.pool.num_free,
                "preemptions_recompute": self.scheduler.num_preemptions,
                "kv_tokens": 1 - c["unused"] / slots, "kv_internal": c["never_used"] / slots,
                "kv_reserved": (c["unused"] - c["never_used"]) / slots,
                "kv_external": 0.0}                # all pieces have one size


# ================================================================================================
# 11. LLM and the command line
# ================================================================================================


def make_kv_cache(config, dtype, device, block_size, num_blocks, most_tokens, utilization):
    """The KV cache of num_blocks blocks, or, for None, of as many as are useful and fit.

    Useful are blocks for most_tokens tokens. A GPU has `utilization` of its memory for them, less
    what is in use; a CPU 1 GiB, or for a given num_blocks all of its memory. There, a block that
    was never written costs nothing.
    Raises: MemoryError.
    """
    shape = block_size, config.num_key_value_heads, config.head_dim, dtype, device
    block_bytes = kernels.new_kv_cache(config.num_hidden_layers, 1, *shape).nbytes
    memory = 1 << 30
    if num_blocks and hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        memory = int(free - total * (1 - utilization))
    wanted = num_blocks or max(1, min(memory // block_bytes, -(-most_tokens // block_size)))
    if wanted * block_bytes > memory:
        raise MemoryError(f"{wanted} KV blocks take {wanted * block_bytes:,} bytes, {device} has "
                          f"{memory:,} for them; lower num_blocks or block_size")
    return kernels.new_kv_cache(config.num_hidden_layers, wanted, *shape)


class LLM:
    """A model with its tokenizer and engine: generate() takes prompts and returns texts.

    Example: LLM().generate("ROMEO:", SamplingParams(temperature=0))[0].outputs[0].text
    """

    def __init__(self, model="tiny", device="auto", dtype="auto", block_size=16, num_blocks=None,
                 gpu_memory_utilization=0.9, max_num_seqs=256, max_num_batched_tokens=8192,
                 max_model_len=None, seed=0, load_format="auto", skip_tokenizer_init=False,
                 **unknown):
        """Load a model and set its KV cache aside.

        model: "tiny" (shipped), a folder, or a Hugging Face repo id.
        dtype: "auto" is float32 on a CPU and the checkpoint's on a GPU.
        num_blocks: None is what max_num_seqs longest sequences need, if memory allows.
        max_model_len: most tokens of prompt and output; None is what model and pool can hold.
        load_format: "dummy" is random weights, for benchmarks.
        Raises: ValueError, FileNotFoundError, OSError, MemoryError with one line each.
        """
        require(not unknown, "list of unknown settings", sorted(unknown), "empty; see help(LLM)")
        check_limits(locals(), optional=("num_blocks", "max_model_len"))
        cuda = torch.cuda.is_available()
        require(device != "cuda" or cuda, "device", device, "cpu: torch finds no CUDA device here")
        device = "cpu" if device == "cpu" or not cuda else "cuda"
        folder = find_model(model)
        config = load_config(folder)
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else config.dtype
        self.tokenizer = None if skip_tokenizer_init else Tokenizer(folder)
        decoder = load_model(config, folder, device, DTYPES[dtype], load_format)
        most_tokens = max_num_seqs * (max_model_len or config.max_position_embeddings)
        kv_cache = make_kv_cache(config, DTYPES[dtype], device, block_size, num_blocks, most_tokens,
                                 gpu_memory_utilization)
        longest = min(config.max_position_embeddings, kv_cache.shape[2] * block_size)
        require((max_model_len or 1) <= longest, "max_model_len", max_model_len,
                f"at most {longest}, what model and block pool can hold")
        self.engine = Engine(decoder, self.tokenizer, kv_cache, max_num_seqs,
                             max_num_batched_tokens, max_model_len or longest, seed)
        self.stats = self.engine.stats             # a function: llm.stats()

    def generate(self, prompts, sampling_params=None):
        """Complete prompts -> one RequestOutput a prompt, in their order.

        prompts: a text, a list of token ids, or a list of either.
        sampling_params: one for all, or a list with one for each.
        Requests that were queued in the engine run along, but are not returned.
        Raises: ValueError that names what cannot run; then none has run.
        """
        if isinstance(prompts, str) or prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        params = SamplingParams() if sampling_params is None else sampling_params
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        require(len(params) == len(prompts), "number of sampling_params", len(params), len(prompts))
        outputs = {}
        try:
            for prompt, p in zip(prompts, params, strict=True):
                outputs[self.engine.add_request(prompt, p)] = None
            while any(output is None for output in outputs.values()):
                outputs |= {out.request_id: out for out in self.engine.step()
                            if out.finished and out.request_id in outputs}
        finally:                                   # after an error or Ctrl-C nothing is left over
            for request_id in outputs:
                self.engine.abort(request_id)
        return list(outputs.values())


def draw_blocks(engine):
    """The pool, a letter for each sequence and a dot for a free block; then every block table."""
    pool, owner, lines = engine.pool, {}, []
    seqs = [(group.request_id, seq) for group in engine.scheduler.running for seq in group.seqs]
    for request_id, seq in seqs:
        owner |= dict.fromkeys(seq.block_table, letter := chr(ord("a") + request_id % 26))
        text = engine.tokenizer.decode(seq.token_ids[-8:])
        table = ".. " * (len(seq.block_table) > 12) + " ".join(map(str, seq.block_table[-12:]))
        lines.append(f"  {letter}: request {request_id}, {seq.num_tokens} tokens, {seq.num_kv} "
                     f"cached in block {table}  {text!r}")
    for row in sorted({block_id // 64 for block_id in owner}):
        blocks = range(64 * row, min(64 * row + 64, pool.num_blocks))
        lines.append(f"  {64 * row:6} " + "".join(owner.get(block_id, ".") for block_id in blocks))
    head = (f"step {engine.counts['steps']}: {len(seqs)} running, {len(engine.scheduler.waiting)} "
            f"waiting, {engine.scheduler.num_preemptions} preempted, {len(owner)} of "
            f"{pool.num_blocks} blocks held")
    return "\n".join([head, *lines])


REPORT = """\
{generated_tokens} tokens in {seconds:.2f} s: {speed:.1f} tokens/s; {steps} steps
blocks of {block_size}: {blocks_peak} at the peak, {blocks_used} now, {num_blocks} in the pool
KV slots held: {kv_tokens:.1%} tokens, {kv_reserved:.1%} reserved, {kv_internal:.1%} internal and \
{kv_external:.1%} external waste
{preemptions_recompute} preemptions; attention: torch reference on {device}"""


class CommandLine(argparse.ArgumentParser):
    """Generate text with a paged KV cache.

    Texts stream to stdout in the order of their prompts. A report follows on stderr, where that
    is a terminal.

    --prompt TEXT         a text to continue (repeatable; - reads it from stdin)
    --prompts-file FILE   one prompt a line (- is stdin)
    --model NAME          tiny (shipped, the default), a folder, or a Hugging Face repo id
    --chat                prompts are a user's messages, put into the model's chat template
    --max-tokens N        tokens to generate at most (64)
    --temperature X       0 is greedy: always the likeliest token (0.8)
    --top-p X             draw from the likeliest tokens that sum to this (1)
    --top-k N             draw from the N likeliest tokens (all)
    --min-p X             drop tokens less likely than this share of the likeliest (0)
    --repetition-penalty X
                          above 1: repeat less (1)
    --stop TEXT           end before this text (repeatable)
    --stop-token-ids N    end at this token (repeatable)
    --ignore-eos          go on past the model's end of text
    --logprobs N          with --json: log-probabilities of the top N tokens
    --seed N              same seed, same texts (0)
    --device NAME         cpu, cuda or auto (the default)
    --dtype NAME          float32, bfloat16, float16 or auto (the default)
    --block-size N        tokens a block (16)
    --num-blocks N        blocks in the pool (as many as are useful and fit)
    --max-num-seqs N      requests that run together (256)
    --max-num-batched-tokens N
                          tokens computed a step (8192)
    --max-model-len N     tokens of prompt and output together (what the model was made for)
    --show-blocks         draw pool and block tables on stderr after each step
    --json                print one JSON object a prompt
    --verbose             report even if stderr is no terminal
    --help                print this

    examples:
      python nanopaged.py --prompt "ROMEO:" --show-blocks --block-size 4
      python nanopaged.py --model HuggingFaceTB/SmolLM2-135M-Instruct --chat --prompt "Who are you?"

    exit status: 0 done, 1 failed, 2 wrong usage or input, 130 stopped by Ctrl-C
    """

    def __init__(self):
        super().__init__("nanopaged.py", usage="nanopaged.py --prompt TEXT [--help] [options]",
                         allow_abbrev=False, argument_default=argparse.SUPPRESS)
        # The docstring above is the help, and declares the options: N is an integer, X a number.
        for option, operand, text in re.findall(r"^ +(--\S+) ?([A-Z]*)(.*)", self.__doc__, re.M):
            kind = {"N": int, "X": float}.get(operand, str)
            if operand and "repeatable" in text:
                self.add_argument(option, action="append", type=kind, default=[])
            elif operand:
                self.add_argument(option, type=kind)
            elif option != "--help":
                self.add_argument(option, action="store_true", default=False)
        self.set_defaults(max_tokens=64, temperature=0.8, prompts_file=None)

    def format_help(self):
        return inspect.cleandoc(self.__doc__) + "\n"


def read_text(path):
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    return data.decode("utf-8-sig", "replace").replace("\r\n", "\n")


def write_outputs(engine, request_ids, args):
    """Run the engine; stream the texts in the order of `request_ids`, each ended by a newline."""
    def draw(engine):
        print(draw_blocks(engine), file=sys.stderr)

    outputs, written = {}, 0
    stream = not (args.json or args.show_blocks)   # no half lines, and none among the drawings
    while request_ids:
        moved = engine.step(draw if args.show_blocks else None)
        outputs |= {output.request_id: output for output in moved}
        while (request_ids and (output := outputs.get(request_ids[0]))
               and (stream or output.finished)):
            text = json.dumps(asdict(output)) if args.json else output.outputs[0].text
            print(text[written:], end="\n" * output.finished, flush=True)
            written = len(text)
            if not output.finished:
                break
            request_ids, written = request_ids[1:], 0


def run(args):
    """The command line's work -> exit status."""
    prompts = [read_text(prompt) if prompt == "-" else prompt for prompt in args.prompt]
    if args.prompts_file is not None:
        prompts += [line for line in read_text(args.prompts_file).split("\n") if line.strip()]
    require(prompts, "number of prompts", 0, "1 or more: --prompt TEXT or --prompts-file FILE")
    settings, request_ids, status = vars(args), [], 0
    params = SamplingParams(**{k: v for k, v in settings.items()     # --seed is the engine's
                               if k in SamplingParams.__match_args__ and k != "seed"})
    llm = LLM(**{k: v for k, v in settings.items() if k in inspect.signature(LLM).parameters})
    start = time.perf_counter()
    for number, prompt in enumerate(prompts, 1):
        try:
            if args.chat:
                chat = llm.tokenizer.render_chat([{"role": "user", "content": prompt}])
                prompt = llm.tokenizer.encode(chat, allowed_special=True, add_special_tokens=False)
            request_ids.append(llm.engine.add_request(prompt, params))
        except ValueError as error:                # the other prompts go on
            print(f"nanopaged: prompt {number}: {error}", file=sys.stderr)
            status = 2
    try:
        write_outputs(llm.engine, request_ids, args)
    finally:
        if args.verbose or sys.stderr.isatty():
            stats, seconds = llm.stats(), time.perf_counter() - start
            print(REPORT.format(**stats, seconds=seconds, speed=stats["generated_tokens"] / seconds,
                                device=llm.engine.kv_cache.device), file=sys.stderr)
    return status


def main(argv=None):
    """Run the command line; every foreseeable failure is one line on stderr."""
    try:
        if hasattr(sys.stdout, "reconfigure"):     # an emoji on a terminal that has none is a "?"
            sys.stdout.reconfigure(errors="replace")
        return run(CommandLine().parse_args(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                        # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, MemoryError, RuntimeError) as error:    # torch's own, too
        print("nanopaged:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, ValueError | FileNotFoundError | OutOfBlocks) else 1


if __name__ == "__main__":
    sys.exit(main())
