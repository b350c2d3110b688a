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
                            ref counts,             |         | our     |       and     |
                            prefix cache            |         | (free)  |       seven   |
                                v                   +---------+---------+---   ---------+
    flat batch of T tokens: input_ids, positions, slot_mapping, block_tables
                                |
                                v
    Decoder: each layer writes K and V into their slots, then attends through the block table
                                |
                                v
    logits --> sampler --> one more token --> text --> RequestOutput

One Engine.step() is one trip from schedule() down (on a GPU often several trips of its lower part,
before the host looks at the tokens). The file is in the order of a request's life and each name is
defined before it is used, so it reads from the top: 2 config and weights, 3 tokenizer, 4 sequences,
5 block pool, 6 scheduler, 7 batch, 8 model, 9 sampler, 10 engine, 11 LLM and command line. In a
hurry: sections 4 to 7 and 10 are PagedAttention; 2 and 3 only read files.

Dimension key: T tokens of the flat batch, S sequences, M blocks of a block-table row, N blocks of
the pool, B block size (batch is never B), E hidden size, H query heads, K KV heads, D head_dim,
L layers, V vocabulary.

Two counts run through everything. num_tokens is every token a sequence knows; num_kv is how many
of them have their K and V in the cache. After a step they differ by one: the token just sampled
is known, and its K and V are computed by the next step. (Prefill is just the case where they
differ by more, and preemption by recompute sets num_kv back to 0 and keeps the tokens.)

Invariants. I1, I2, I4, I6 and I7 are asserted by check() in tests/helpers.py after each step; the
others hold by construction.
  I1  ref_count[b] is the number of block-table rows that hold b.
  I2  every block is free exactly once, or held: free + held = N.
  I3  a block that is written in a step has ref_count 1.
  I4  between steps a sequence holds exactly ceil(num_kv / B) blocks. (While a step or a flight is
      computed, also those for its tokens; after an interrupt it keeps them until it fills them.)
  I5  a failed operation changes nothing: capacity is checked before the first mutation.
  I6  a cached block is found by exact tokens, its own and all before them, and only after its K and
      V were computed; at least one token of a prompt is always computed.
  I7  a group is preempted and resumed whole; a request that can never fit is refused when added.
"""

import argparse
import codecs
import copy
import hashlib
import inspect
import itertools
import json
import os
import random
import sys
import time
import warnings
from collections import Counter, OrderedDict, deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import regex as re  # the standard library's, and \p{L}: any letter
import requests
import tiktoken
from jinja2 import TemplateError, sandbox
from safetensors import SafetensorError, safe_open

with warnings.catch_warnings(action="ignore"):     # torch's, that numpy is absent: unused here
    import torch
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
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
FAMILIES = {"GPT2LMHeadModel": "gpt2", "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama"}

# What config.json's settings are also called: by GPT-2's files, and by older ones.
RENAMED = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
           "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
           "layer_norm_epsilon": "rms_norm_eps", "torch_dtype": "dtype"}
SIZES = ("vocab_size", "num_key_value_heads", "head_dim", *RENAMED.values())
# What this decoder computes: (type, lowest, highest), or a list of choices. None is not given; of
# the names above, dtype and rms_norm_eps are no sizes.
COMPUTED = dict.fromkeys(SIZES, (int, 1, 1 << 31)) | {"dtype": [*DTYPES],
    "activation_function": [None, "gelu_new", "gelu_pytorch_tanh"], "hidden_act": [None, "silu"],
    "sliding_window": [None], "quantization_config": [None], "scale_attn_weights": [None, True],
    "scale_attn_by_inverse_layer_idx": [None, False], "rope_theta": (float, 1, 1e12),
    "rms_norm_eps": (float, 1e-12, 1), "rope_type": ["default", "linear", "llama3"]}

# What we say where there are no weights, or other ones.
WEIGHTS = "model*.safetensors, as a pickle (.bin) can run code when it is opened"
# What files hold beside the weights: a tied model's second copy, causal masks, rotary tables.
IGNORED = re.compile(r"lm_head\.weight|h\.\d+\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq")


def require(ok, name, value, allowed, error=ValueError):
    """The one form of our complaints: what it is about, what was given, what is allowed."""
    if not ok:
        raise error(f"{name} is {value!r}; it must be {allowed}")


def check(name, value, limits):
    """Require a value of a list of choices, or one within (type, lowest, highest).

    Where None stands behind the highest, it will do, too. NaN compares false, and so never will.
    """
    if isinstance(limits, list):
        return require(value in limits, name, value, f"one of {limits}")
    kind, low, high, *also = limits
    ok = type(value) in (int, kind) and low <= value <= high or value is None and None in also
    ok or require(ok, name, value, f"{kind.__name__} from {low} to {high}")   # no text for nothing


def check_all(settings, limits):
    """Check those of {name: value} that `limits` names."""
    for name in sorted(settings.keys() & limits):
        check(name, settings[name], limits[name])


@contextmanager
def reading(path):
    """Whatever is wrong with the contents of a file becomes one ValueError that names the file."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SafetensorError,
            TemplateError, RuntimeError) as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{path}: {kind}" + str(error).removeprefix(f"{path}: ")) from None


def read_json(path):
    """The object in a file of JSON; an empty one, where the file is not there."""
    with reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8") if path.is_file() else "{}"))


def load_config(folder):
    """config.json in one form for both families -> a namespace with the names of LLaMA's file.

    In the letters above: vocab_size V, hidden_size E, num_hidden_layers L, num_attention_heads H,
    num_key_value_heads K, head_dim D (H * D need not be E). Any id of eos_token_id ends a text.
    Raises: ValueError that names file, key, value and what is supported.
    """
    path = folder / "config.json"
    raw = {RENAMED.get(key, key): value for key, value in read_json(path).items()
           if value is not None or key == "sliding_window"}    # null is not the same as absent
    eos = read_json(folder / "generation_config.json").get("eos_token_id")
    eos = raw.get("eos_token_id", []) if eos is None else eos
    with reading(path):
        arch = raw.get("architectures", [None])[0]
        require(arch in FAMILIES, "architecture", arch, " or ".join(FAMILIES))
        gpt2 = FAMILIES[arch] == "gpt2"
        # transformers 5 writes rope_parameters; before, rope_theta stood beside rope_scaling
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        c = {"num_key_value_heads": raw["num_attention_heads"], "tie_word_embeddings": gpt2,
             "head_dim": raw["hidden_size"] // raw["num_attention_heads"], "attention_bias": gpt2,
             "intermediate_size": 4 * raw["hidden_size"], "mlp_bias": gpt2, "dtype": "float32",
             "rms_norm_eps": 1e-5 if gpt2 else 1e-6, "rope_type": rope.get("type", "default"),
             "sliding_window": 4096 if arch == "MistralForCausalLM" else None,
             "rope_theta": 10000.0, **raw, **rope, "family": FAMILIES[arch],
             "eos_token_id": eos if isinstance(eos, list) else [eos]}
        check_all(dict.fromkeys(COMPUTED) | c, COMPUTED)
        for token_id in c["eos_token_id"]:
            check("eos_token_id", token_id, (int, 0, 1 << 31))
        require(c["num_attention_heads"] % c["num_key_value_heads"] == 0, "num_key_value_heads",
                c["num_key_value_heads"], f"a divisor of {c['num_attention_heads']} query heads")
        require(c["head_dim"] % 2 == 0, "head_dim", c["head_dim"], "even")
        return SimpleNamespace(**c)


def load_tensors(folder, wanted):
    """Fill `wanted`, {name: tensor}, from the folder's safetensors: one file, or an index's shards.

    Dtype, device and layout are those of the tensors in `wanted`. Nothing is filled before all
    names and shapes were found right in the files' headers.
    Raises: FileNotFoundError, or ValueError that names file, tensor and shapes if one is missing,
        unexpected or of another shape.
    Cost: files are mapped, not read, and each mapping is dropped after one tensor. The largest goes
    first, as memory that was allocated, and not yet written to, takes no room: so the host never
    holds much more than all the weights, not even beside one large embedding.
    """
    index = folder / "model.safetensors.index.json"
    with reading(index):
        files = {*read_json(index).get("weight_map", {"all": "model.safetensors"}).values()}
    for name in sorted(files - {*os.listdir(folder)}, key=str):    # such as "../x" of a bad index
        raise FileNotFoundError(f"{folder}: {name} is missing; the weights must be {WEIGHTS}")
    found, missing = [], {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    for path in [folder / name for name in sorted(files)]:
        with reading(path), safe_open(path, "pt") as file:
            for key in file.keys():
                name = key.removeprefix("transformer.")
                if name in wanted or not IGNORED.fullmatch(name):
                    shape = tuple(file.get_slice(key).get_shape())
                    allowed = missing.pop(name, "absent, or not there twice,")
                    require(shape == allowed, f"tensor {key}", shape, f"{allowed} by config.json")
                    found.append((path, key, wanted[name]))
    for name, shape in missing.items():
        raise ValueError(f"{folder}: tensor {name} {shape} is missing in model.safetensors")
    for path, key, target in sorted(found, key=lambda entry: entry[2].numel(), reverse=True):
        target.copy_(safe_open(path, "pt").get_tensor(key))


def _get(url, byte_range=None):
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}" if token else None,      # None is not sent
               "Accept-Encoding": "identity", "Range": byte_range}    # counts bytes of the file
    try:
        response = requests.get(url, stream=True, timeout=(10, 60), headers=headers)
        response.raise_for_status()
        return response
    except requests.RequestException as error:
        raise OSError(f"{url}: {getattr(error.response, 'status_code', type(error).__name__)}; "
                      "check the name and HF_TOKEN; if you are offline, give a folder") from None


def _fetch(url, path, size, checksum):
    """Make one file whole: resumed where it was cut off, and begun anew where it is damaged."""
    # SHA-256 of large files; of small ones git's SHA-1, over a header and the bytes
    hasher = hashlib.sha256() if len(checksum) == 64 else hashlib.sha1(b"blob %d\0" % size)
    for _ in range(5):
        with open(path, "a+b") as file:            # at its end: what came before is kept
            if (have := file.tell()) < size:
                with suppress(requests.RequestException), _get(url, f"bytes={have}-") as response:
                    file.truncate(have if response.status_code == 206 else 0)
                    for chunk in response.iter_content(1 << 16):
                        file.write(chunk)
                        if sys.stderr.isatty():
                            print(f"\r[{'#' * (40 * file.tell() // size):40}] {path.name}",
                                  end="\n" * (file.tell() >= size), file=sys.stderr, flush=True)
            have = file.seek(0, os.SEEK_END)
            file.seek(0)
            if have == size and hashlib.file_digest(file, hasher.copy).hexdigest() == checksum:
                return
            file.truncate(have if have < size else 0)
        time.sleep(0.2)
    raise OSError(f"{url}: cut off at {have} of {size} bytes, or damaged; run again to resume")


# Settings, tokenizers and weights of a repository, whatever else it holds. Names are matched
# whole, so none can leave the folder.
REPO_FILES = re.compile(r"[\w-]+\.(json|txt|jinja|model)|model[\w.-]*\.safetensors(\.index\.json)?")


def download(repo_id):
    """The folder of a Hugging Face repository, downloaded on first use.

    HF_ENDPOINT and HF_TOKEN are honoured; NANOPAGED_CACHE names another cache folder. A folder
    gets its name when all of it is there; it is then used without asking the network again.
    Raises: OSError with one line: offline, no such repository, no permission, damaged file.
    """
    cache = Path(os.environ.get("NANOPAGED_CACHE") or "~/.cache/nanopaged").expanduser()
    folder = cache / repo_id.replace("/", "--")
    if folder.is_dir():
        return folder
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    listing = f"{endpoint}/api/models/{repo_id}/revision/main?blobs=true"
    with reading(listing):
        info = _get(listing).json()
        files = [file for file in info["siblings"] if REPO_FILES.fullmatch(file["rfilename"])]
        require(any("safetensors" in f["rfilename"] for f in files), "list of weights", [], WEIGHTS)
        part = folder.with_name(f"{folder.name}.{info['sha']}.part")     # no mix of two versions
        part.mkdir(parents=True, exist_ok=True)
        for file in files:
            url = f"{endpoint}/{repo_id}/resolve/{info['sha']}/{file['rfilename']}"
            checksum = (file.get("lfs") or {}).get("sha256") or file["blobId"]
            _fetch(url, part / file["rfilename"], file["size"], checksum)
    return part.rename(folder)


def find_model(model):
    """The folder for `model`: "tiny" (shipped), a folder, or a Hugging Face repo id."""
    tiny = Path(__file__).resolve().parent / "tutorial" / "tiny"
    folder = tiny if model == "tiny" else Path(model).expanduser()
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(model)):
        folder = download(str(model))
    require((folder / "config.json").is_file(), "model", str(model), "tiny, a folder with a "
            "config.json, or a repo id like HuggingFaceTB/SmolLM2-135M-Instruct", FileNotFoundError)
    return folder


# ================================================================================================
# 3. Tokenizer
#    in: text      out: token ids, and back, byte by byte
#
#    BPE is tiktoken's, with tokens from the model's own files. It starts from single bytes, and of
#    all neighbours that make a token it joins those that make the one of lowest rank, until none
#    do. So every kind of file is brought to one form: the bytes of each token, in the order of
#    merging. Text is split into words before; nothing is joined across their ends.
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

# tokenizer.json: the types of normalizers, pre_tokenizers and model, as in GPT-2's kind of file and
# in LLaMA-2's; what pre_tokenizers split off ("(?!)": nothing; a Split says it itself); and of the
# options that would change ids the values that we read.
BYTE_LEVEL, BYTE_FALLBACK = "((Digits|Split) )*ByteLevel BPE", "((Prepend )?Replace|Metaspace) BPE"
SPLITS = {"Digits": r"\p{N}", "ByteLevel": GPT2_SPLIT, "Metaspace": "(?!)"}
OPTIONS = {"individual_digits": [True], "behavior": ["Isolated"], **dict.fromkeys((
    "dropout", "end_of_word_suffix", "continuing_subword_prefix", "add_prefix_space", "invert",
    "split", "lstrip", "rstrip", "single_word"), [None, False, 0.0, ""])}

# Byte-level files spell each byte as one printable character: printable bytes as themselves, the
# other 68 as the characters from 256 on, in order. (Themselves will do for all when we read it.)
BYTE_OF = {chr(i): b for i, b in enumerate([*range(256), *range(33), *range(127, 161), 173])}


def split_text(text, pattern="(?!)", *others):
    """The matches of a pattern and what lies between, each split by the other patterns."""
    ends = [0, *(at for m in re.finditer(pattern, text) for at in m.span()), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(ends) if a < b]
    return [part for piece in pieces for part in split_text(piece, *others)] if others else pieces


class Tokenizer:
    """Text to token ids and back, from the files in a model's folder.

    Reads tokenizer.json (byte-level BPE, or BPE with byte fallback), LLaMA-3's tokenizer.model, or
    GPT-2's vocab.json with merges.txt. Raises ValueError naming what it cannot read.
    """

    def __init__(self, folder):
        self.folder = folder
        # Each reader sets self.special, {text: id}: no text of a user's stands for one of these.
        # What follows stays like this where a kind of file has none:
        self.added = {}          # {text: id} of added ordinary tokens, matched before all else
        self.prefix = []         # ids put before each text, such as a beginning-of-text token
        self.first_space = None  # LLaMA-2's kind puts a space before: never, first, always, each
        readers = {"tokenizer.json": self._read_spec, "tokenizer.model": self._read_tiktoken,
                   "vocab.json": self._read_gpt2}
        present = [name for name in readers if (folder / name).is_file()]
        require(present, f"{folder}: tokenizer", "absent", " or ".join(readers), FileNotFoundError)
        with reading(folder / present[0]):
            readers[present[0]](folder / present[0])

    def _read_gpt2(self, path):
        """GPT-2's own files: vocab.json, and merges.txt with a heading line."""
        vocab = read_json(path)
        merges = path.with_name("merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        self.special = {"<|endoftext|>": vocab["<|endoftext|>"]}
        self._use_model({"vocab": vocab, "merges": merges}, [GPT2_SPLIT])

    def _read_tiktoken(self, path):
        """LLaMA-3's tokenizer.model: one token a line, base64 and rank, which is its id."""
        data = path.read_bytes().split()                       # token, rank, token, rank, ...
        require(data[1::2] == [b"%d" % i for i in range(max(256, len(data[::2])))], "format",
                "SentencePiece's, or broken", "tiktoken's; else put tokenizer.json beside it")
        vocab = {codecs.decode(t, "base64").decode("latin-1"): i for i, t in enumerate(data[::2])}
        self.special = {text: len(data) // 2 + at for text, at in LLAMA3_SPECIAL.items()}
        self.prefix = [self.special["<|begin_of_text|>"]]
        self._use_model({"vocab": vocab, "merges": [], "ignore_merges": True}, [LLAMA3_SPLIT])

    def _read_spec(self, path):
        """tokenizer.json of the tokenizers library."""
        spec = read_json(path)
        normalizer, pre_tokenizer, processor = (
            spec.get(name) or {} for name in ("normalizer", "pre_tokenizer", "post_processor"))
        splits = [*filter(None, pre_tokenizer.get("pretokenizers", [pre_tokenizer]))]
        parts = [*normalizer.get("normalizers", [normalizer]), *splits, spec["model"]]
        kind = " ".join(part.get("type", "BPE") for part in parts if part)
        allowed = BYTE_FALLBACK if spec["model"].get("byte_fallback") else BYTE_LEVEL
        require(re.fullmatch(allowed, kind), "normalizer, pre_tokenizer and model", kind, allowed)
        tokens = spec.get("added_tokens", [])
        for part in parts + tokens:
            check_all(part, OPTIONS)
        self.special = {token["content"]: token["id"] for token in tokens if token["special"]}
        self.added = {token["content"]: token["id"] for token in tokens if not token["special"]}
        self.first_space = {"Metaspace BPE": pre_tokenizer.get("prepend_scheme", "always"),
                            "Prepend Replace BPE": "each", "Replace BPE": "never"}.get(kind)
        self._use_model(spec["model"], [SPLITS.get(split["type"]) or split["pattern"]["Regex"]
                                        for split in splits if split.get("use_regex", True)])
        for part in processor.get("processors", [processor]):
            *before, last = part.get("single", [{"Sequence": "A"}])    # <s>, and then the text
            require("Sequence" in last, "end of the template", last, "the text")
            self.prefix += [(self.special | self.added)[p["SpecialToken"]["id"]] for p in before]

    def _use_model(self, model, patterns):
        """Have tiktoken merge as the model does, within the words that the patterns split off.

        model: vocab, merges and flags, named as in tokenizer.json. patterns: each splits the pieces
        of the one before. A byte without a token is dropped, as by the tokenizers library.
        """
        vocab, self.patterns = model["vocab"], patterns
        if model.get("byte_fallback"):          # LLaMA-2's kind: ▁ is a space, <0xE2> a byte
            spelled = {token: token.replace("▁", " ").encode() for token in vocab}
            spelled |= {f"<0x{b:02X}>": bytes([b]) for b in range(256)}
        else:                                   # a token with other characters is an added one
            spelled = {t: bytes(map(BYTE_OF.get, t)) for t in vocab if BYTE_OF.keys() >= {*t}}
        # {id: the bytes it adds to a text}; special tokens have none
        self.bytes_of = {vocab[t]: data for t, data in spelled.items() if t not in self.special}
        self.bytes_of |= {i: text.encode() for text, i in self.added.items()}

        byte_ids = {data[0]: vocab[t] for t, data in spelled.items() if len(data) == 1}
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        # tiktoken takes a piece that is a token as a whole. "ignore_merges" asks for just that, so
        # tokens that no merge makes get a rank too.
        made = [a + b for a, b in pairs] + [*spelled] * bool(model.get("ignore_merges"))
        # LLaMA-2's merges start from characters, tiktoken's from bytes. So the lowest ranks make
        # characters, E2 + 82 + AC; a start, E2 82, that finds no end becomes the ids of its bytes.
        chars = [t for t in spelled if len(t) == 1]
        starts = [bytes([b]) for b in range(256)] + [spelled[t][:n] for t in chars for n in (2, 3)]
        ids_of = {start: [byte_ids[b] for b in start if b in byte_ids] for start in starts}
        ids_of |= {spelled[t]: [vocab[t]] for t in chars + made}
        self.ids_of_rank = [*ids_of.values()]
        ranks = {data: rank for rank, data in enumerate(ids_of)}
        # It shall not split itself: it knows one pattern, and panics at 1 MB of white space.
        self.bpe = tiktoken.Encoding("", pat_str="(?s).+", mergeable_ranks=ranks, special_tokens={})

    def encode(self, text, allowed_special=False, add_special_tokens=True):
        """Token ids of a text; "<|endoftext|>" in it is plain text unless allowed_special."""
        known = self.added | (self.special if allowed_special else {})
        text = text.encode("utf-8", "replace").decode()        # a lone surrogate becomes "?"
        # Sorted backwards, a token comes after those that it starts. "(?!)" matches nothing.
        pattern = "|".join(map(re.escape, sorted(known, reverse=True))) or "(?!)"
        ids = list(self.prefix) if add_special_tokens else []
        for i, piece in enumerate(split_text(text, pattern)):
            ids += [known[piece]] if piece in known else self._encode_ordinary(piece, i == 0)
        return ids

    def _encode_ordinary(self, text, at_start):
        """Ids of a text without special or added tokens; at_start: it follows none of them."""
        text = text.replace("▁", " ") if self.first_space else text
        bare = text[0] != " "
        spaces = {"each": 1, "always": bare, "first": bare and at_start}.get(self.first_space, 0)
        return [i for piece in split_text(" " * spaces + text, *self.patterns)
                for rank in self.bpe.encode_ordinary(piece) for i in self.ids_of_rank[rank]]

    def token_bytes(self, token_id):
        """The bytes that a token adds to a text: none for a special or an unused one."""
        return self.bytes_of.get(token_id, b"")

    def decode(self, ids):
        """The text of token ids; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.first_space not in (None, "never") else text

    def render_chat(self, messages):
        """The prompt for [{"role": ..., "content": ...}], by the model's own chat template.

        The template comes from a downloaded file: it runs in jinja2's sandbox.
        """
        path = self.folder / "chat_template.jinja"
        config = read_json(self.folder / "tokenizer_config.json")
        source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
        env = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])

        def refuse(complaint):                                 # what a template says of messages
            raise ValueError(complaint)
        env.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
        env.globals |= {key: token["content"] if isinstance(token, dict) else token
                        for key, token in config.items() if key.endswith("_token") and token}
        with reading(f"{self.folder}: chat template"):
            if isinstance(source, list):                       # several, by name
                source = {t["name"]: t["template"] for t in source}.get("default")
            require(source, "it", source, "there for --chat; this model has none")
            return env.from_string(source).render(messages=messages, add_generation_prompt=True)


# ================================================================================================
# 4. Sequences
#    in: token ids and SamplingParams      out: the plain state that everything below passes around
#    paper 4.3, 5.2      No torch in sections 4 to 6: step through them anywhere.
# ================================================================================================


class OutOfBlocks(MemoryError):
    """The block pool cannot hold what was asked for; nothing was changed."""


# Every setting of the API and the command line: see check().
LIMITS = {
    **dict.fromkeys(("n", "beam_width", "max_tokens", "max_num_seqs", "max_num_batched_tokens"),
                    (int, 1, 1 << 31)), "num_blocks": (int, 1, 1 << 31, None),
    **dict.fromkeys(("ignore_eos", "enable_prefix_caching", "enforce_eager"), [False, True]),
    "temperature": (float, 0, 1e6), "logprobs": (int, 0, 100, None), "top_k": (int, -1, 1 << 31),
    "top_p": (float, 1e-6, 1), "min_p": (float, 0, 1), "repetition_penalty": (float, 0.001, 1000),
    "seed": (int, 0, (1 << 63) - 1, None), "max_model_len": (int, 2, 1 << 31, None),
    "length_penalty": (float, -100, 100), "early_stopping": [False, True, "never"],
    "block_size": [1 << i for i in range(9)], "gpu_memory_utilization": (float, 0.01, 1),
    "swap_blocks": (int, 0, 1 << 31), "preemption": ["auto", "recompute", "swap"],
    "device": ["auto", *DEVICES], "dtype": ["auto", *DTYPES], "load_format": ["auto", "dummy"],
}


@dataclass
class SamplingParams:
    """How one request turns logits into tokens, and when it ends. Wrong values raise ValueError."""
    n: int = 1                            # texts a prompt; text i is drawn with seed + i
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
        check_all(vars(self), LIMITS)
        for name, kind, low in (("stop", str, "\0"), ("stop_token_ids", int, 0)):
            given = getattr(self, name)
            items = [given] if isinstance(given, str) else given or []
            ok = type(items) in (list, tuple) and all(type(i) is kind and i >= low for i in items)
            require(ok, name, given, f"a list of {kind.__name__}, none empty or below 0")
            setattr(self, name, list(items))


@dataclass
class BeamSearchParams:
    """Beam search for the likeliest texts. Wrong values raise ValueError.

    A text's score is cumulative_logprob / number of its tokens ** length_penalty.
    """
    beam_width: int = 4                   # texts that are followed at a time, and returned
    max_tokens: int = 16                  # generated tokens at most
    length_penalty: float = 1.0           # above 0 favours long texts, below 0 short ones
    early_stopping: bool | str = False    # True: stop at beam_width ended texts; False: when no
    #     better one is likely any more; "never": only when none is possible
    ignore_eos: bool = False              # go on past the model's end-of-text token

    # Beams are not drawn: what the sampler and the text would do with them, said once.
    n, temperature, top_p, top_k, min_p, repetition_penalty = 1, 0.0, 1.0, 0, 0.0, 1.0
    seed, stop, stop_token_ids = 0, (), ()
    # Of each beam so many tokens that some go on, even if all tokens that end it are among them.
    logprobs = property(lambda self: self.beam_width + len(self.stop_token_ids))
    __post_init__ = SamplingParams.__post_init__


class Sequence:
    """One text in the making: its tokens, and the blocks that hold their K and V."""

    def __init__(self, token_ids, params, cache_salt=None):
        self.token_ids = list(token_ids)           # prompt, then generated
        self.num_prompt_tokens = len(token_ids)
        self.max_num_tokens = len(token_ids) + params.max_tokens       # then it ends by length
        self.num_kv = 0                            # tokens whose K and V are in the cache
        self.block_table = []                      # logical block i is physical block_table[i]
        self.cache_salt = cache_salt               # cached blocks are shared within one salt only
        self.params, self.seed = params, params.seed
        self.data, self.text = b"", ""             # what was generated, and what of it can be shown
        self.cumulative_logprob, self.logprobs = 0.0, []       # of what was generated
        self.finish_reason = None                  # "stop" or "length"

    @property
    def num_tokens(self):
        return len(self.token_ids)

    def fork(self):
        """A sequence that goes on from this one. BlockPool.fork() lets it share the blocks."""
        child = copy.copy(self)
        child.token_ids, child.logprobs = [*self.token_ids], [*self.logprobs]
        child.block_table, child.num_kv = [], 0
        return child


class CompletionOutput(SimpleNamespace):
    """One text of a request, complete once finish_reason is set.

    index: int; text: str; token_ids: list[int]; cumulative_logprob: float, a natural logarithm;
    logprobs: one {token_id: logprob} a generated token, or None; finish_reason: "stop", "length",
    or None while it runs.
    """


class RequestOutput(SimpleNamespace):
    """What generate() and step() return for a request.

    request_id: int; prompt: str, or None when it was given as token ids; prompt_token_ids:
    list[int]; outputs: list[CompletionOutput]; finished: bool; num_cached_tokens: int, of the
    prompt, found in the prefix cache.
    """


class SequenceGroup:
    """One request. Its sequences are scheduled, preempted and finished together (paper 4.5).

    In beam search they are the beams, and behind them the best of the texts that have ended.
    """

    def __init__(self, request_id, prompt, seqs):
        self.request_id, self.prompt, self.seqs = request_id, prompt, seqs   # ids grow by arrival
        self.params = seqs[0].params
        self.width = getattr(self.params, "beam_width", self.params.n)     # sequences it grows to
        self.num_cached_tokens = None              # known when it first runs

    def unfinished(self):
        return [seq for seq in self.seqs if not seq.finish_reason]

    def blocks(self):
        return {block_id for seq in self.seqs for block_id in seq.block_table}

    def output(self):
        """A snapshot for the user."""
        outputs = [CompletionOutput(
            index=i, text=seq.text, token_ids=seq.token_ids[seq.num_prompt_tokens:],
            logprobs=seq.logprobs[:] or None, finish_reason=seq.finish_reason,
            cumulative_logprob=seq.cumulative_logprob) for i, seq in enumerate(self.seqs)]
        return RequestOutput(
            request_id=self.request_id, prompt=self.prompt, outputs=outputs,
            prompt_token_ids=self.seqs[0].token_ids[:self.seqs[0].num_prompt_tokens],
            finished=not self.unfinished(), num_cached_tokens=self.num_cached_tokens)


# ================================================================================================
# 5. Block pool
#    in: a sequence and how many tokens it is about to compute      out: blocks in its block_table
#    paper 4.2 to 4.5
#
#    The pool hands out block ids; the memory behind them is the engine's. It is an ordinary
#    allocator of equal pieces, so nothing is ever lost *between* pieces (no external
#    fragmentation), and a sequence wastes less than one block.
#
#    As every sequence reads through its own table, a block can stand in several of them. All that
#    comes of this is one operation, hold(), which adds rows to a table and counts them: append()
#    holds new blocks, fork() a parent's (parallel sampling, beam search), the prefix cache those
#    that find_prefix() found, and take_over() keeps in a swap what is shared shared.
#    Only the last block of a sequence is ever written, so only that one is ever copied.
# ================================================================================================


class BlockPool:
    """N blocks of B slots, a free list, reference counts and a prefix cache.

    Example (the paper's Fig 6, B = 4): a prompt of 7 tokens takes two blocks, 4 + 3 filled; the
    eighth token fills the second; only the ninth takes a third.
    """

    def __init__(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        # Handed out from the front, given back at the end: what was used last is kept longest.
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))
        self.ref_count = [0] * num_blocks
        self.num_forks = 0
        # What the engine owes before it computes, as (from, to): within the pool, and into it.
        self.copies, self.arrivals = [], []
        # The prefix cache. content[b] is an object that stands for the tokens of a block and of all
        # before it; it equals only itself, and each use of a block brings a new one. So (content of
        # the block before, own tokens) is an exact key, whose cost does not grow with the text.
        self.cached = {}              # {key: block_id}
        self.key_of = {}              # {block_id: key}, to forget it when the block is reused
        self.content = [None] * num_blocks

    @property
    def num_free(self):
        return len(self.free_blocks)

    def num_needed(self, plan):
        """How many free blocks append() takes for all of `plan`, [(seq, num_new), ...].

        Table rows count from num_kv, not num_tokens: the token just sampled has no K and V yet.
        With B = 4 and num_kv = 8 both blocks are full, so one new token needs a third. And copies:
        of k sequences that share a block, and all write to it, the last one finds it its own.
        """
        size, refs = self.block_size, self.ref_count
        rows = sum([max(0, -(-(seq.num_kv + n) // size) - len(seq.block_table)) for seq, n in plan])
        # Where slot num_kv has a block already, that one is written next; a full one never is. Most
        # share none: then nothing is counted, which would take longer than all else here.
        shared = [b for seq, _ in plan for b in seq.block_table[seq.num_kv // size:] if refs[b] > 1]
        return rows + (len(shared) and sum(min(k, refs[b] - 1) for b, k in Counter(shared).items()))

    def _take(self, content=None):
        """A free block to write to; what the prefix cache had there is forgotten."""
        block_id, _ = self.free_blocks.popitem(last=False)
        self.cached.pop(self.key_of.pop(block_id, None), None)
        self.content[block_id] = content or object()
        return block_id

    def hold(self, seq, block_ids, num_kv):
        """Add blocks to the end of a table; `num_kv` tokens of the text are then in the cache."""
        for block_id in block_ids:
            self.free_blocks.pop(block_id, None)   # if it was free
            self.ref_count[block_id] += 1          # one table row more points here (keeps I1)
        seq.block_table += block_ids               # share the blocks, never the list
        seq.num_kv = num_kv

    def append(self, seq, num_new):
        """Give `seq` room for the K and V of `num_new` more tokens; num_kv follows after the step.

        A block that it is about to write and that others read is copied first (keeps I3).
        Raises: OutOfBlocks, and nothing changes (I5).
        """
        if (needed := self.num_needed([(seq, num_new)])) > self.num_free:
            raise OutOfBlocks(f"{needed} blocks are needed, {self.num_free} are free")
        taken = [self._take() for _ in range(needed)]
        written = seq.block_table[seq.num_kv // self.block_size:]
        if written and self.ref_count[written[0]] > 1:
            # A shared block that is written is the last: nobody is forked with blocks ahead.
            self.ref_count[written[0]] -= 1        # the others go on reading it
            self.copies.append((seq.block_table.pop(), taken[0]))
        self.hold(seq, taken, seq.num_kv)

    def fork(self, parent, child):
        """Let `child` read all that `parent` has cached, moving no KV bytes (paper 4.4, 5.2).

        Cost: one integer a block. A block is copied later, in append(), by its first writer.
        """
        assert not child.block_table, "child already holds blocks: they would leak"
        self.hold(child, parent.block_table, parent.num_kv)
        self.num_forks += 1

    def free(self, *seqs):
        """Take back all blocks of sequences; their tokens stay, the K and V are gone.

        The last block goes first, so that the prefix cache loses the ends of texts before their
        beginnings, which more texts have in common.
        """
        for seq in seqs:
            for block_id in reversed(seq.block_table):
                self.ref_count[block_id] -= 1      # one table row less points here (keeps I1)
                if self.ref_count[block_id] == 0:
                    self.free_blocks[block_id] = None
            seq.block_table, seq.num_kv = [], 0

    def _key(self, seq, i, block_table):
        """What the prefix cache knows block `i` of a text by; `block_table` has those before it."""
        before = self.content[block_table[i - 1]] if i else seq.cache_salt
        return before, tuple(seq.token_ids[i * self.block_size:(i + 1) * self.block_size])

    def find_prefix(self, seq):
        """The cached blocks that `seq` begins with. One token at least is left to be computed."""
        blocks, most = [], (seq.num_tokens - 1) // self.block_size
        while len(blocks) < most and (key := self._key(seq, len(blocks), blocks)) in self.cached:
            blocks.append(self.cached[key])
        return blocks

    def publish(self, seq, num_new):
        """Put the blocks into the prefix cache that `num_new` computed tokens fill (keeps I6).

        If another sequence computed the same content before, its block stays the cached one.
        """
        for i in range(seq.num_kv // self.block_size, (seq.num_kv + num_new) // self.block_size):
            key = self._key(seq, i, seq.block_table)
            first = self.cached.get(key, seq.block_table[i])
            self.key_of[first], self.cached[key] = key, first     # in this order: see _take()
            self.content[seq.block_table[i]] = self.content[first]

    def take_over(self, group, source):
        """Move a group here from the pool `source`: swap out, or swap in.

        A block that several of its sequences share is moved once, and shared again (paper 4.5).
        """
        moved = {block_id: self._take(source.content[block_id]) for block_id in group.blocks()}
        for seq in group.seqs:
            table, num_kv = [moved[block_id] for block_id in seq.block_table], seq.num_kv
            source.free(seq)
            self.hold(seq, table, num_kv)
        self.arrivals += moved.items()


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
#    Who is preempted loses its K and V (recompute), or they go to the CPU's memory (swap). Either
#    way the group goes back to the head of the queue, and only the head of the queue may run: so
#    nothing new is admitted while something is swapped out.
#
#    The running groups are always the earliest arrivals, so the latest is preempted first and the
#    earliest can always take the whole pool: it finishes, then the next one does. No deadlock.
# ================================================================================================


class Scheduler:
    """Decides who runs (paper 4.5). Keeps I5 and I7.

    Where a group stands is its state: running, with blocks of the pool; waiting; swapped, which is
    waiting with blocks of the swap pool; or finished, in neither queue.
    """

    def __init__(self, pool, swap_pool, preemption, max_num_seqs, max_num_batched_tokens):
        self.pool, self.swap_pool, self.preemption = pool, swap_pool, preemption
        # Each running sequence decodes one token a step, and the budget must last for all.
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting, self.running = deque(), []   # both in order of arrival
        self.counts = Counter()

    def schedule(self):
        """-> [(sequence, number of its tokens to compute), ...], with blocks for them allocated."""
        scheduled, budget, i = [], self.max_num_batched_tokens, 0
        # The running ones first, as they hold blocks; then, while budget is left, newcomers.
        while budget and (i < len(self.running) or self.waiting and self._admit(self.waiting[0])):
            plan = self._plan(self.running[i], budget)
            if self.pool.num_needed(plan) > self.pool.num_free:
                # The latest arrival, which may be this group itself, but none that is scheduled
                # already. It needs what it gave and more: it cannot come back for that. Then the
                # loop looks again; a plan that is made twice is the same.
                self._preempt(self.running.pop())
            else:
                for seq, num_new in plan:
                    self.pool.append(seq, num_new)
                    budget -= num_new
                scheduled += plan
                i += 1
        return scheduled

    def _plan(self, group, budget):
        """What a running group computes in this step: [(sequence, number of tokens), ...].

        Its sequences get their next token together. If some lack the K and V of more than their
        last token, which after a recompute all do, the first of them is computed alone, up to that
        token: the ones after it then find in the prefix cache what they have in common with it.
        """
        seqs = group.unfinished()
        for seq in seqs:
            if not seq.block_table:                # it begins, or begins again
                prefix = self.pool.find_prefix(seq)
                self.pool.hold(seq, prefix, len(prefix) * self.pool.block_size)
                self.counts["cached_tokens"] += 0 if seq.cache_salt else seq.num_kv
            # a step that was interrupted may have computed, but not sampled
            seq.num_kv = min(seq.num_kv, seq.num_tokens - 1)
            if num_new := seq.num_tokens - seq.num_kv - (len(seqs) > 1):
                return [(seq, min(num_new, budget))]
        return [(seq, 1) for seq in seqs] if len(seqs) <= budget else []

    def _admit(self, group):
        """Let the group that waits longest run, if there is room; nobody jumps the queue."""
        seqs, size = group.unfinished(), self.pool.block_size
        # who was swapped out brings all its K and V along
        prefix = [] if group.blocks() else self.pool.find_prefix(seqs[0])
        # All its tokens must fit, even if only a chunk is computed now: a prompt half done that
        # waits for blocks would hold those that others wait for. Cached blocks that someone holds
        # are there already. And 1% is kept free for the running ones' next tokens, as in the
        # paper's code, lest the newcomer be preempted at once: none in a pool of less than 100.
        needed = (sum(-(-seq.num_tokens // size) for seq in seqs) + self.pool.num_blocks // 100
                  - sum(self.pool.ref_count[block_id] > 0 for block_id in prefix))
        num_seqs = sum(other.width for other in self.running) + group.width
        # Alone it always fits (I7).
        if self.running and (needed > self.pool.num_free or num_seqs > self.max_num_seqs):
            return False
        if group.num_cached_tokens is None:
            group.num_cached_tokens = len(prefix) * size
        self.pool.take_over(group, self.swap_pool)             # what it has there, if anything
        self.running.append(self.waiting.popleft())
        return True

    def _preempt(self, group):
        """Take a group's blocks, by swap while there is room for it on the CPU, or by recompute.

        "auto" swaps what has several sequences: those cost several prefills to bring back.
        """
        swap = {"auto": len(group.unfinished()) > 1, "swap": True, "recompute": False}
        if swap[self.preemption] and len(group.blocks()) <= self.swap_pool.num_free:
            self.swap_pool.take_over(group, self.pool)
        else:                                      # the tokens stay, a prefill brings K and V back
            self.pool.free(*group.seqs)
        self.counts["preemptions_swap" if group.blocks() else "preemptions_recompute"] += 1
        self.waiting.appendleft(group)             # it arrived before all that wait

    def finish(self, *groups):
        """Take groups out, wherever they are, and their blocks back."""
        for group in groups:
            runs = group in self.running
            (self.pool if runs else self.swap_pool).free(*group.seqs)
            (self.running if runs else self.waiting).remove(group)     # last: it can be done again


# ================================================================================================
# 7. Batch
#    in: [(sequence, num_new), ...]      out: the flat tensors of one step
#
#    The step's tokens stand one after the other, without padding: a 500-token prefill chunk and
#    three decodes are T = 503 rows. From here on nothing knows which row belongs to whom but by
#    these maps.
# ================================================================================================


def make_batch(scheduled, kv_cache):
    """The flat batch of a step: kernels.flat_batch of the new tokens and tables of its sequences.

    Example (B = 4): a decode at position 5, with table [7, 1], stands after a two-token prefill.
    query_start [0, 2, 3], positions [0, 1, 5]; the last token is in logical block 5 // 4 = 1,
    physical block 1, slot 1 * 4 + 5 % 4 = 5.
    """
    # Logits are wanted where the last known token is computed.
    rows = [(seq.token_ids[seq.num_kv:seq.num_kv + num_new], seq.num_kv, seq.block_table,
             seq.num_kv + num_new == seq.num_tokens) for seq, num_new in scheduled]
    return kernels.flat_batch(rows, kv_cache.shape[3], kv_cache.device)


# ================================================================================================
# 8. Model
#    in: a flat batch and the KV cache      out: logits of the rows that are sampled
#
#    One decoder is both families; what differs is said by the config:
#                 position                 norm        MLP                     biases
#      GPT-2      learned, added once      LayerNorm   gelu(up)                all
#      LLaMA      RoPE, on each q and k    RMSNorm     silu(gate) * up         none, mostly
# ================================================================================================


def rope_frequencies(head_dim, rope):
    """Radians a position for each of the D/2 rotated pairs (Su et al. 2021) -> (D/2,) float32.

    rope: config.json's rope_theta and rope_type, and the settings of that type.
    """
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    slowed = frequency / (1 if rope["rope_type"] == "default" else rope["factor"])
    if rope["rope_type"] != "llama3":              # "linear" slows all pairs alike
        return slowed
    # LLaMA-3.1: pairs that turn often within the original context stay, slow ones are slowed,
    # and between the two limits the two are mixed.
    turns = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    return torch.lerp(slowed, frequency, ((turns - low) / (high - low)).clamp(0, 1))


def gate_and_up(x):
    """LLaMA's activation: silu(gate) * up, of x (T, 2I), I numbers of each -> (T, I)."""
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


# each family's norm and activation
PARTS = {"gpt2": (nn.LayerNorm, nn.GELU("tanh")), "llama": (nn.RMSNorm, gate_and_up)}


# Left as it was allocated: first values would be lost work, as a checkpoint brings others. (torch's
# skip_init does the same by way of the meta device, whose imports take half a second and 100 MB.)
Linear = type("Linear", (nn.Linear,), {"reset_parameters": lambda self: None})


class Layer(nn.Module):
    """One transformer layer: x + attention(norm(x)), then x + MLP(norm(x)).

    Its two halves take the function that multiplies: see kernels.linear_reference.
    """

    def __init__(self, c, **factory):
        super().__init__()
        self.heads = c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads
        q, k, _ = (heads * c.head_dim for heads in self.heads)
        inner, up = c.intermediate_size, c.intermediate_size * (1 if c.family == "gpt2" else 2)
        # Whose the rows of a matrix are that LLaMA's files hold in parts.
        self.rows = {"qkv": {"q": q, "k": k, "v": k}, "up": {"gate": inner, "up": inner}}
        norm, self.activation = PARTS[c.family]
        self.attn_norm = norm(c.hidden_size, c.rms_norm_eps, **factory)
        self.qkv = Linear(c.hidden_size, q + 2 * k, c.attention_bias, **factory)
        self.o = Linear(q, c.hidden_size, c.attention_bias, **factory)
        self.mlp_norm = norm(c.hidden_size, c.rms_norm_eps, **factory)
        self.up = Linear(c.hidden_size, up, c.mlp_bias, **factory)
        self.down = Linear(inner, c.hidden_size, c.mlp_bias, **factory)

    def before_attention(self, x, rope, linear):
        """x (T, E) -> q (T, H, D); k, v (T, K, D)."""
        qkv = linear(x, self.qkv, norm=self.attn_norm, rope=rope, heads=self.heads)
        return qkv.unflatten(1, (sum(self.heads), -1)).split(self.heads, dim=1)

    def after_attention(self, x, y, linear):
        """x (T, E), and what its heads have read: y (T, H, D) -> (T, E)."""
        x = linear(y.flatten(1), self.o, residual=x)
        h = linear(x, self.up, norm=self.mlp_norm, activation=self.activation)
        return linear(h, self.down, residual=x)


class Decoder(nn.Module):
    """GPT-2 or LLaMA by its config, reading and writing K and V in the paged cache only."""

    def __init__(self, c, **factory):
        super().__init__()
        self.config, width = c, c.hidden_size
        # An embedding is a matrix whose rows are looked up; as a tied head it is multiplied, too.
        self.embed_tokens = Linear(width, c.vocab_size, False, **factory)  # (V, E)
        if c.family == "gpt2":
            self.embed_positions = Linear(width, c.max_position_embeddings, False, **factory)
        self.layers = nn.ModuleList(Layer(c, **factory) for _ in range(c.num_hidden_layers))
        # The two halves of a layer, and the function that multiplies in them. For several rows
        # load_model() may compile the halves; for one row they stay as they are, and LLaMA without
        # biases has a kernel on a GPU.
        plain = factory["device"] != "cuda" or c.family != "llama" or c.attention_bias or c.mlp_bias
        self.halves = Layer.before_attention, Layer.after_attention, kernels.linear_reference
        self.halves_of_one = *self.halves[:2], self.halves[2] if plain else kernels.linear
        self.norm = PARTS[c.family][0](width, c.rms_norm_eps, **factory)
        self.lm_head = (self.embed_tokens if c.tie_word_embeddings else
                        Linear(width, c.vocab_size, False, **factory))
        self.frequencies = rope_frequencies(c.head_dim, vars(c)).to(factory["device"])
        require(self.frequencies.isfinite().all(), "factor", getattr(c, "factor", None), "above 0")

    def forward(self, batch, kv_cache):
        """-> logits (len(batch.last_rows), V); the T tokens' K and V go into their slots.

        kv_cache: (L, 2, N, B, K, D).
        """
        x, rope = nn.functional.embedding(batch.input_ids, self.embed_tokens.weight), None  # (T, E)
        if self.config.family == "gpt2":
            x = x + nn.functional.embedding(batch.positions, self.embed_positions.weight)
        else:   # the angles are computed in float32 and once a step, not once a layer
            angle = batch.positions[:, None, None] * self.frequencies      # (T, 1, D/2)
            rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        before, after, linear = self.halves if len(x) > 1 else self.halves_of_one
        for layer, (k_cache, v_cache) in zip(self.layers, kv_cache, strict=True):
            q, k, v = before(layer, x, rope, linear)
            batch.write_kv(k, v, k_cache, v_cache, batch.slot_mapping)
            y = batch.attend(q, k_cache, v_cache, scale=self.config.head_dim ** -0.5)  # (T, H, D)
            x = after(layer, x, y, linear)
        # the vocabulary is the widest matrix: only rows that are sampled meet it
        return linear(x.index_select(0, batch.last_rows), self.lm_head, norm=self.norm)

    def checkpoint_views(self):
        """{name in the checkpoint: the part of our parameters that it fills}, in its own shape.

        Names are translated part by part with this table. {} stands for q, k, v or for gate, up:
        LLaMA's files hold apart what is stacked to one matrix here.

            ours             GPT-2            LLaMA
            embed_tokens     wte              model.embed_tokens
            embed_positions  wpe              -
            layers           h                model.layers
            attn_norm        ln_1             input_layernorm
            qkv              attn.c_attn      self_attn.{}_proj
            o                attn.c_proj      self_attn.o_proj
            mlp_norm         ln_2             post_attention_layernorm
            up               mlp.c_fc         mlp.{}_proj
            down             mlp.c_proj       mlp.down_proj
            norm             ln_f             model.norm
        """
        column, views = 1 + (self.config.family == "llama"), {}
        table = re.findall(r"^ +(\S+)  +(\S+)  +(\S+)$", Decoder.checkpoint_views.__doc__, re.M)
        names = {row[0]: row[column] for row in table}
        for name, tensor in self.named_parameters():
            source = ".".join(names.get(part, part) for part in name.split("."))
            # GPT-2's layers are made of Conv1D, which stores (in, out)
            tensor = tensor.t() if self.config.family == "gpt2" and "layers" in name else tensor
            rows = self.layers[0].rows[name.split(".")[-2]] if "{}" in source else {"": len(tensor)}
            views |= zip(map(source.format, rows), tensor.split([*rows.values()]), strict=True)
        return views


def load_model(config, folder, device, dtype, load_format="auto", compiled=False):
    """A Decoder on `device`, filled from the folder or, as "dummy", with random weights.

    compiled: whether torch makes single kernels of what stands between the large matrices.
    """
    with reading(folder / "config.json"):          # a rope setting is missing, or memory is short
        model = Decoder(config, device=device, dtype=dtype).requires_grad_(False)
    if load_format == "dummy":
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    else:
        load_tensors(folder, model.checkpoint_views())
    if compiled:                                   # functions: a bound method would hold its layer
        model.halves = *map(torch.compile(dynamic=True), model.halves[:2]), model.halves[2]
    return model


# ================================================================================================
# 9. Sampler
#    in: logits (S, V) and each row's sequence      out: one token a row, and log-probabilities
#
#    Each row draws with a number that its seed and its length alone give, and nothing is
#    carried from step to step: so neither the rest of the batch nor a preemption can change what
#    a request draws (but for the rounding of logits, where two tokens are nearly equal).
# ================================================================================================


def sampling_options(seqs, device):
    """For each whether tokens are cut; seeds (S,); options (S, 4): see kernels.draw_reference."""
    options = [(p.temperature, p.top_p, p.top_k, p.min_p) for p in (seq.params for seq in seqs)]
    cuts = [t > 0 and (top_p < 1 or top_k > 0 or min_p > 0) for t, top_p, top_k, min_p in options]
    seeds = kernels.upload([seq.seed for seq in seqs], device)
    return cuts, seeds, kernels.upload(options, device, torch.float64)


def top_logprobs(logprobs, row, token_id, num):
    """The row's chosen token and its `num` likeliest -> {token_id: logprob}; None for num None.

    Shapes: logprobs (S, V). Each row by itself: where values tie, topk of another num, or a batch,
    may pick others.
    """
    if num is not None:
        token_ids = [token_id, *logprobs[row].topk(min(num, logprobs.shape[1])).indices.tolist()]
        return dict(zip(token_ids, logprobs[row, token_ids].tolist(), strict=True))


def sample(logits, seqs, wait=lambda read: read(), graphs=None):
    """One token for each row -> [(token_id, logprob, {token_id: logprob} or None), ...].

    The log-probabilities are the model's own, before penalty, temperature and filters. wait(read)
    gives what read() returns once the device has got that far. graphs: kernels.DecodeGraphs, whose
    draw is compiled, for rows without cuts and logits of the model's type.
    """
    logprobs = logits.float().log_softmax(-1)
    for row, seq in enumerate(seqs):
        if (penalty := seq.params.repetition_penalty) != 1:
            logits, graphs = logits.float(), None      # exact, not compiled
            # each token is penalised once; multiplying lowers a negative score
            score = logits[row, seen := kernels.upload(seq.token_ids, logits.device)]
            logits[row, seen] = torch.where(score > 0, score / penalty, score * penalty)
    cuts, seeds, options = sampling_options(seqs, logits.device)
    lengths = kernels.upload([seq.num_tokens + 1 for seq in seqs], logits.device, torch.int32)
    draw = kernels.draw_reference if any(cuts) or graphs is None else graphs.draw
    # where all are greedy, or nobody is there, as only parts of prompts were computed: faster
    tokens = (draw(logits, any(cuts), seeds, lengths, options)[0].long()
              if any(seq.params.temperature for seq in seqs) else logits.argmax(-1))
    chosen = wait(logprobs.gather(1, tokens[:, None])[:, 0].tolist)
    return [(token, chosen[row], top_logprobs(logprobs, row, token, seqs[row].params.logprobs))
            for row, token in enumerate(tokens.tolist())]


@torch.inference_mode()
def largest_step(model, kv_cache, num_seqs, num_tokens):
    """Compute and sample as much as a step may, so that torch holds the memory that it takes."""
    length = min(max(1, num_tokens // num_seqs), model.config.max_position_embeddings)
    seq = Sequence([0] * length, SamplingParams(seed=0, top_p=0.5))
    # All write to one block, and nobody reads it. Short tables' kernel comes with the first prompt.
    seq.block_table = [0] * max(seq.num_tokens, 1024)
    with reading("the largest step; lower max_num_seqs or max_num_batched_tokens"):
        sample(model(make_batch([(seq, length)] * num_seqs, kv_cache), kv_cache), [seq] * num_seqs)


def beam_score(seq, num_generated=None):
    """What beam search ranks texts by: log-probability / generated tokens ** length_penalty."""
    num_generated = num_generated or seq.num_tokens - seq.num_prompt_tokens
    return seq.cumulative_logprob / num_generated ** seq.params.length_penalty


def hopeful(beams, ended, params):
    """`beams`; or none, if none can come among the best texts that have `ended`. Best first."""
    if not beams or len(ended) < params.beam_width:
        return beams
    to_the_end = params.early_stopping == "never" and params.length_penalty > 0
    best = beam_score(beams[0], params.max_tokens if to_the_end else None)
    return [] if params.early_stopping is True or best <= beam_score(ended[-1]) else beams


# ================================================================================================
# 10. Engine
#     in: requests      out: a RequestOutput for each request that moved, step by step
#     paper 4.1 (Fig 4), 4.3
#
#     A GPU computes a step of decodes faster than Python prepares one. So where nobody has to see
#     each token, blocks are appended for up to 16 steps, and the device makes them by itself
#     (kernels.DecodeGraphs): a flight. Behind it the host launches the next flight, which goes on
#     from tokens that only the device knows, and gets from the host new blocks only. So one step()
#     launches the next and reads this one, all tokens of a text together:
#
#         device               [ flight 1 ][ flight 2      ][ flight 3      ][ ...
#         host      launch 1, 2            read 1, launch 3  read 2, launch 4
#
#     Whatever needs the host first takes one step at a time, with the same tokens.
# ================================================================================================


class Engine:
    """Scheduler, model and sampler, joined in step(); the caches are the memory of its pools."""

    def __init__(self, scheduler, model, tokenizer, kv_cache, swap_cache, enable_prefix_caching,
                 max_model_len, seed):
        self.scheduler, self.pool, self.counts = scheduler, scheduler.pool, scheduler.counts
        self.model, self.tokenizer = model, tokenizer
        self.kv_cache, self.swap_cache, self.max_model_len = kv_cache, swap_cache, max_model_len
        self.seeds, self.request_ids = random.Random(seed), itertools.count()  # ids grow by arrival
        # {content of a block: steps as a last block}, for stats()
        self.enable_prefix_caching, self.steps_as_last = enable_prefix_caching, {}
        self.graphs = self.flight = None           # see LLM, and _launch()

    def add_request(self, prompt, params):
        """Queue a prompt, given as text or as token ids -> its request_id.

        Raises: ValueError when it can never run; nothing changes then (I5, I7).
        """
        config, text = self.model.config, prompt if isinstance(prompt, str) else None
        require(isinstance(prompt, str | list | tuple), "prompt", prompt, "a text or token ids")
        require(isinstance(params, SamplingParams | BeamSearchParams), "params", params,
                "SamplingParams or BeamSearchParams")
        require(self.tokenizer or text is None and not params.stop, "prompt", prompt,
                "token ids, and without stop strings: there is no tokenizer")
        token_ids = list(prompt) if text is None else self.tokenizer.encode(text)
        ids = *token_ids, *params.stop_token_ids, 0
        # one by one only if there is something else than integers
        for token_id in ids if {*map(type, ids)} != {int} else (min(ids), max(ids)):
            check("token id", token_id, (int, 0, config.vocab_size - 1))
        length, pool, size = len(token_ids), self.pool, self.pool.block_size
        require(0 < length < self.max_model_len, "number of prompt tokens", length,
                f"above 0, below {self.max_model_len} (max_model_len, or all of the pool's "
                f"{pool.num_blocks} blocks); shorten it, or raise num_blocks")
        # ours, with the limits of model and pool in it
        params = replace(params, max_tokens=min(params.max_tokens, self.max_model_len - length))
        params.stop_token_ids = {*params.stop_token_ids,
                                 *(() if params.ignore_eos else config.eos_token_id)}
        # a salt of its own: nothing is then shared but with its own forks
        seq = Sequence(token_ids, params, None if self.enable_prefix_caching else object())
        group = SequenceGroup(next(self.request_ids), text, [seq])
        # Several texts share the prompt's full blocks; of the rest each may come to need its own.
        own = -(-(length % size + params.max_tokens - 1) // size)
        most = min((pool.num_blocks - length // size) // max(own, 1), self.scheduler.max_num_seqs)
        require(group.width <= max(most, 1), "n or beam_width", group.width,
                f"at most {most}, or raise num_blocks, max_num_seqs, max_num_batched_tokens")
        # drawn last: a request that was refused has none
        seq.seed = self.seeds.getrandbits(62) if params.seed is None else params.seed
        self.scheduler.waiting.append(group)
        return group.request_id

    def abort(self, *request_ids):
        """Drop requests and free their blocks; False if none was there (any more)."""
        found = [group for group in [*self.scheduler.running, *self.scheduler.waiting]
                 if group.request_id in request_ids]
        self.scheduler.finish(*found)
        return bool(found)

    def has_unfinished_requests(self):
        return bool(self.scheduler.running or self.scheduler.waiting)

    @torch.inference_mode()
    def step(self, watch=lambda engine: None, only_finished=False):
        """Schedule, run the model, sample -> outputs of the requests that got a token, or ended.

        watch(engine) is called at the end, while what finishes still holds its blocks.
        """
        # A step that is interrupted forgets what flies: the same tokens are drawn again. What flies
        # for nobody, as all were aborted or have ended, is forgotten too.
        flight, self.flight, following = self.flight if self.scheduler.running else None, None, None
        # Some have ended and are still there only after a step that was interrupted then.
        moved = [group for group in self.scheduler.running if not group.unfinished()]
        if not moved and self.has_unfinished_requests():
            plan = [] if flight else self.scheduler.schedule()
            # the longest contexts last: the attention kernel works from the end
            flight = flight or self._launch(sorted((s for s, _ in plan), key=lambda s: s.num_kv))
            following = flight and self._launch(*flight[:2])
            moved = self._land(*flight) if flight else self._compute(plan)
            watch(self)
        # siblings of what has ended may go on
        self.pool.free(*(seq for group in moved for seq in group.seqs if seq.finish_reason))
        ended = [group for group in moved if not group.unfinished()]
        self.scheduler.finish(*ended)
        self.flight = following
        return [group.output() for group in (ended if only_finished else moved)]

    def _steps_ahead(self, seqs, in_flight=0):
        """How many tokens the device may draw for all before the host looks: 16, 8, 4, 2, or 0.

        0 if the host must see each: for prompts, beams, log-probabilities and penalties. Else as
        many as somebody wants beside those in flight, and as fit into max_model_len and the pool.
        """
        plain = self.graphs and seqs and (in_flight or all(                # who flies, flies on
            seq.num_kv == seq.num_tokens - 1 >= seq.num_prompt_tokens
            and seq.params.logprobs is None and seq.params.repetition_penalty == 1 for seq in seqs))
        most = max((seq.max_num_tokens - seq.num_tokens for seq in seqs), default=0) - in_flight
        room = self.max_model_len + 1 - in_flight - max((s.num_tokens for s in seqs), default=0)
        return next((n for n in (16, 8, 4, 2) if plain and n < 2 * most and n <= room
                     and self.pool.num_needed([(seq, in_flight + n) for seq in seqs])
                     <= self.pool.num_free), 0)

    def _launch(self, seqs, in_flight=0):
        """Launch a flight for `seqs`; in_flight: tokens of each that are in the air already.

        Left out is who has ended or was aborted, or will be complete with those. -> its sequences,
        the number of tokens of each, and the tokens to come, for which _land() waits. Or None, if
        the host must look first; behind a flight also if somebody waits for whom there is a seat.
        """
        rows = [row for row, seq in enumerate(seqs)
                if seq.block_table and seq.num_tokens + in_flight < seq.max_num_tokens]
        seqs, waiting = [seqs[row] for row in rows], self.scheduler.waiting
        num_steps = self._steps_ahead(seqs, in_flight)
        if num_steps and not (in_flight and waiting and
                              len(seqs) + waiting[0].width <= self.scheduler.max_num_seqs):
            known = [len(seq.block_table) for seq in seqs]
            for seq in seqs:
                self.pool.append(seq, in_flight + num_steps)
            self._move_blocks()
            if in_flight:                          # the device has all but the new blocks
                self.graphs.go_on(rows, known, [seq.block_table for seq in seqs])
            else:
                batch = make_batch([(seq, 1) for seq in seqs], self.kv_cache)
                self.graphs.load(batch, *sampling_options(seqs, self.kv_cache.device))
            return seqs, num_steps, *self.graphs.run_ahead(num_steps)

    def _wait(self, read):
        """What read() returns once the device has got that far; the time that takes is counted."""
        start, values = time.perf_counter(), read()
        self.counts["seconds_waited"] += time.perf_counter() - start
        return values

    def _land(self, seqs, num_steps, steps, landed):
        """Take the tokens of a flight, up to the end of each text -> the groups that got them."""
        self._wait(landed.synchronize)
        # tokens and log-probabilities of each; behind them is padding
        for seq, *drawn in zip(seqs, steps[0].long().tolist(), steps[1].tolist(), strict=False):
            # all together, but one by one where a stop string may end the text at any of them
            for new in map(zip, zip(*drawn, strict=True)) if seq.params.stop else [drawn]:
                if seq.block_table and not seq.finish_reason:      # not aborted, not ended
                    self._append_tokens(seq, *new)
                    num_new = seq.num_tokens - 1 - seq.num_kv
                    self.pool.publish(seq, num_new)
                    seq.num_kv += num_new
                    self.counts["generated_tokens"] += num_new
        self._count(num_steps * len(seqs), num_steps)
        return list(self.scheduler.running)

    def _compute(self, scheduled):
        """Run the model, and sample -> the groups that got a token."""
        self._move_blocks()
        logits = (self.graphs or self.model)(make_batch(scheduled, self.kv_cache), self.kv_cache)
        # Up to here a step that is interrupted is simply done again, and from here on as well: a
        # sequence that has all its K and V, and no new token, computes its last one once more.
        for seq, num_new in scheduled:
            self.pool.publish(seq, num_new)
            seq.num_kv += num_new
        moved = [group for group in self.scheduler.running
                 if all(seq.num_kv == seq.num_tokens for seq in group.unfinished())]
        self._next_tokens(moved, logits)
        self._count(sum(num_new for _, num_new in scheduled))
        return moved

    def _move_blocks(self):
        """Carry out what schedule() decided: swap out, swap in, copy, each all at once."""
        kv, swap, swap_pool = self.kv_cache, self.swap_cache, self.scheduler.swap_pool
        # At no time of the step are more blocks held. A union of Counters keeps the larger number.
        self.counts |= Counter(blocks_peak=self.pool.num_blocks - self.pool.num_free)
        for pairs, source, target in ((swap_pool.arrivals, kv, swap),
                                      (self.pool.arrivals, swap, kv), (self.pool.copies, kv, kv)):
            if pairs and source is target and kv.is_cuda:
                kernels.copy_blocks(kv, kernels.upload(pairs, kv.device))
            elif pairs:
                kernels.copy_blocks_reference(source, target, torch.tensor(pairs))
            self.counts["copied_blocks" if source is target else "swapped_blocks"] += len(pairs)
            pairs.clear()

    def _next_tokens(self, groups, logits):
        """Give every sequence of `groups` its next token; in their order each has its row."""
        # {sequence: the row of the logits that it goes on from}
        row_of = {seq: row for row, seq in enumerate(s for g in groups for s in g.unfinished())}
        for group in groups:
            for i in range(len(group.seqs), group.params.n):       # the prompt is done: n texts
                child = group.seqs[0].fork()
                child.seed = (child.seed + i) % (1 << 63)
                group.seqs.append(child)           # first: an interrupt must not lose its blocks
                self.pool.fork(group.seqs[0], child)
                row_of[child] = row_of[group.seqs[0]]
        self.counts["generated_tokens"] += len(row_of)
        logits = logits[kernels.upload([*row_of.values()], logits.device)]     # a list would wait
        sampled = dict(zip(row_of, sample(logits, [*row_of], self._wait, self.graphs), strict=True))
        for group in groups:
            if isinstance(group.params, BeamSearchParams):
                self._extend_beams(group, sampled)
            else:
                for seq in group.unfinished():
                    self._append_tokens(seq, *zip(sampled[seq]))     # of each kind, one

    def _extend_beams(self, group, sampled):
        """One step of beam search, by the rules of transformers.

        Each beam of the next step is a fork of one of this step. Then those of this step are
        freed, and with them the blocks that nothing goes on from (paper, Fig 9).
        """
        parent_of = {self._append_tokens(parent.fork(), *zip(offer)): parent   # token and logprob
                     for parent in group.unfinished() for offer in sampled[parent][2].items()}
        ranked = sorted(parent_of, key=lambda seq: seq.cumulative_logprob, reverse=True)
        beams = [seq for seq in ranked if not seq.finish_reason][:group.width]
        ended = [seq for seq in group.seqs + ranked[:group.width] if seq.finish_reason]
        ended = sorted(ended, key=beam_score, reverse=True)[:group.width]
        group.seqs = hopeful(beams, ended, group.params) + ended
        for seq in parent_of.keys() & group.seqs:  # the new ones: others ended before
            self.pool.fork(parent_of[seq], seq)
        self.pool.free(*parent_of.values())        # named again, a parent has nothing left

    def _append_tokens(self, seq, token_ids, logprobs, tops=()):
        """Add tokens up to the text's end, where finish_reason is set; show more of it -> seq.

        Where a stop string may end the text, only one token at a time.
        """
        left, ends = seq.max_num_tokens - seq.num_tokens, seq.params.stop_token_ids
        new, data, text = token_ids[:left], seq.data, seq.text
        if stopped := not ends.isdisjoint(new):
            new = new[:1 + next(i for i, token_id in enumerate(new) if token_id in ends)]
        reason = "stop" if stopped else "length" if len(new) == left else None
        if self.tokenizer:
            # a token that stops the text is no part of it
            data += b"".join(map(self.tokenizer.token_bytes, new[:len(new) - stopped]))
            # until the end, half a character is not shown, nor what may become a stop string
            text, _ = codecs.utf_8_decode(data, "replace", bool(reason))
            if stops := [text.find(stop) for stop in seq.params.stop if stop in text]:
                reason = "stop"
            held_back = 0 if reason else max(map(len, seq.params.stop), default=1) - 1
            text = text[:max(0, min([len(text) - held_back, *stops]))]
        total, tops = seq.cumulative_logprob + sum(logprobs[:len(new)]), [*filter(None, tops)]
        # nothing is called from here on, so an interrupt finds all of it done, or nothing
        seq.cumulative_logprob, seq.data, seq.text, seq.finish_reason = total, data, text, reason
        seq.token_ids += new
        seq.logprobs += tops
        return seq

    def _count(self, num_computed, num_steps=1):
        """What the KV memory of these steps holds: tokens, or slots not (yet) used (paper, Fig 2).

        Only at its end a sequence shows which slots of its last block were for nothing.
        """
        counts, pool, size = self.counts, self.pool, self.pool.block_size
        seqs = [seq for group in self.scheduler.running for seq in group.seqs if seq.block_table]
        last = {pool.content[seq.block_table[-1]]: seq for seq in seqs}     # shared: counts once
        self.steps_as_last = {c: self.steps_as_last.get(c, 0) + num_steps for c in last}
        num_held, num_rows = pool.num_blocks - pool.num_free, sum(len(s.block_table) for s in seqs)
        counts.update(steps=num_steps, running=num_steps * len(self.scheduler.running),
                      slots=num_steps * num_held * size, computed_tokens=num_computed,
                      saved=num_steps * (num_rows - num_held) / max(1, num_rows))
        for content, seq in last.items():
            empty = len(seq.block_table) * size - seq.num_kv
            # In each of several steps one more was filled; what ended is taken as at its end.
            counts["unused"] += num_steps * (empty + (num_steps - 1) / 2 * (not seq.finish_reason))
            if seq.finish_reason:
                counts["never_used"] += empty * self.steps_as_last.pop(content)

    def stats(self):
        """Counters since the start.

        The kv_ shares are of all slots in held blocks, summed over the steps: internal ones were
        left empty by a sequence that finished, reserved are all other empty ones; external is
        memory between pieces, of which there is none as all have one size. blocks_saved is the mean
        share of table rows that needed no block of their own (1 - physical / logical: the paper's
        Fig 15), mean_running that of Fig 13.
        """
        c, slots, steps = self.counts, max(1, self.counts["slots"]), max(1, self.counts["steps"])
        names = ("steps", "computed_tokens", "generated_tokens", "cached_tokens", "copied_blocks",
                 "swapped_blocks", "preemptions_recompute", "preemptions_swap", "blocks_peak")
        return {**{name: c[name] for name in names}, "forks": self.pool.num_forks,
                "mean_running": c["running"] / steps, "blocks_saved": c["saved"] / steps,
                "num_blocks": self.pool.num_blocks, "block_size": self.pool.block_size,
                "blocks_used": self.pool.num_blocks - self.pool.num_free,
                "kv_tokens": 1 - c["unused"] / slots, "kv_internal": c["never_used"] / slots,
                "kv_reserved": (c["unused"] - c["never_used"]) / slots, "kv_external": 0.0}


# ================================================================================================
# 11. LLM and the command line
# ================================================================================================


class LLM:
    """A model with its tokenizer and engine: generate() takes prompts and returns texts.

    Example: LLM().generate("ROMEO:", SamplingParams(temperature=0))[0].outputs[0].text

    model: "tiny" (shipped), a folder, or a Hugging Face repo id.
    dtype: "auto" is float32 on a CPU and the checkpoint's on a GPU.
    num_blocks: None is as many as fit, on a CPU into 1 GiB; at most 2 ** 20.
    gpu_memory_utilization: the share of a GPU's memory for weights, KV cache and computing.
    swap_blocks: blocks in the CPU's memory for preempted requests.
    preemption: "recompute", "swap" (while swap_blocks last, then recompute), or "auto": swap for
        requests with several sequences, recompute for the others.
    max_model_len: most tokens of prompt and output; None is what model and pool can hold.
    seed: makes the seeds of requests that have none; None is another one each time.
    load_format: "dummy" is random weights, for benchmarks.
    enforce_eager: on a GPU, no CUDA graphs and no compiler, to step through it; so does
        CUDA_LAUNCH_BLOCKING in the environment.
    Raises: ValueError, FileNotFoundError, OSError, MemoryError with one line each.
    """

    def __init__(self, model="tiny", device="auto", dtype="auto", block_size=16, num_blocks=None,
                 gpu_memory_utilization=0.9, swap_blocks=0, preemption="auto",
                 enable_prefix_caching=True, max_num_seqs=256, max_num_batched_tokens=8192,
                 max_model_len=None, seed=0, load_format="auto", skip_tokenizer_init=False,
                 enforce_eager=False):
        """Load a model and set its KV cache aside: see the class."""
        check_all(locals(), LIMITS)
        require(swap_blocks or preemption != "swap", "swap_blocks", 0, "above 0 to preempt by swap")
        device = DEVICES[0] if device == "auto" else device
        folder = find_model(model)
        c = load_config(folder)
        dtype = {"auto": "float32" if device == "cpu" else c.dtype}.get(dtype, dtype)
        self.tokenizer = None if skip_tokenizer_init else Tokenizer(folder)
        graphs = device == "cuda" and not (enforce_eager or "CUDA_LAUNCH_BLOCKING" in os.environ)
        decoder = load_model(c, folder, device, DTYPES[dtype], load_format, compiled=graphs)
        shape = c.num_hidden_layers, block_size, c.num_key_value_heads, c.head_dim, DTYPES[dtype]
        kv_cache = kernels.fit_kv_cache(
            num_blocks, *shape, device, utilization=gpu_memory_utilization,
            largest_step=lambda kv: largest_step(decoder, kv, max_num_seqs, max_num_batched_tokens))
        swap_cache = kernels.fit_kv_cache(swap_blocks, *shape, "cpu")
        longest = min(c.max_position_embeddings, kv_cache.shape[2] * block_size)
        check("max_model_len", max_model_len or longest, (int, 2, longest))
        scheduler = Scheduler(BlockPool(*kv_cache.shape[2:4]), BlockPool(*swap_cache.shape[2:4]),
                              preemption, max_num_seqs, max_num_batched_tokens)
        self.engine = Engine(scheduler, decoder, self.tokenizer, kv_cache, swap_cache,
                             enable_prefix_caching, max_model_len or longest, seed)
        # in the mode of step(): in another one torch would compile again
        with torch.inference_mode(), reading("CUDA graphs; lower gpu_memory_utilization"):
            self.engine.graphs = None if not graphs else kernels.DecodeGraphs(
                decoder, kv_cache, scheduler.max_num_seqs, self.engine.max_model_len)
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
        params = params if isinstance(params, list | tuple) else [params] * len(prompts)
        require(len(params) == len(prompts), "number of sampling_params", len(params), len(prompts))
        request_ids, finished = [], {}
        try:                                       # extend() keeps those before one that is refused
            request_ids.extend(map(self.engine.add_request, prompts, params))
            while any(request_id not in finished for request_id in request_ids):
                finished |= {out.request_id: out for out in self.engine.step(only_finished=True)}
        finally:                                   # after an error or Ctrl-C nothing is left over
            self.engine.abort(*request_ids)
        return [finished[request_id] for request_id in request_ids]

    def beam_search(self, prompts, params=None):
        """generate() with beam search: the beam_width likeliest texts a prompt, best first."""
        return self.generate(prompts, BeamSearchParams() if params is None else params)


def draw_blocks(engine):
    """Print each block table, then the pool: a letter a sequence and a dot a free block."""
    pool, scheduler, counts, owner = engine.pool, engine.scheduler, engine.counts, {}
    seqs = [(group.request_id, seq) for group in scheduler.running for seq in group.seqs]
    lines = [f"step {counts['steps']}: {len(seqs)} running, {len(scheduler.waiting)} waiting, "
             f"{counts['preemptions_recompute'] + counts['preemptions_swap']} preempted, "
             f"{pool.num_blocks - pool.num_free} of {pool.num_blocks} blocks held"]
    for request_id, seq in seqs:
        owner |= dict.fromkeys(seq.block_table, letter := chr(ord("a") + request_id % 26))
        table = ".. " * (len(seq.block_table) > 12) + " ".join(map(str, seq.block_table[-12:]))
        lines.append(f"  {letter}: request {request_id}, {seq.num_tokens} tokens, {seq.num_kv} "
                     f"cached in block {table}  {engine.tokenizer.decode(seq.token_ids[-8:])!r}")
    rows = re.findall(".{1,64}", "".join(owner.get(i, ".") for i in range(pool.num_blocks)))
    lines += [f"  {64 * i:6} {row}" for i, row in enumerate(rows) if row.strip(".")]
    print(*lines, sep="\n", file=sys.stderr)


def print_report(engine, seconds):
    """{generated_tokens} tokens in {seconds:.2f} s: {speed:.1f} tokens/s; {steps} steps
    blocks of {block_size}: {blocks_peak} at the peak, {blocks_used} now, {num_blocks} in the pool
    KV slots held: {kv_tokens:.1%} tokens; {kv_reserved:.1%} reserved, {kv_internal:.1%} internal, \
{kv_external:.1%} external waste
    {mean_running:.1f} requests at a time; {preemptions_recompute} preemptions by recompute, \
{preemptions_swap} by swap ({swapped_blocks} blocks)
    sharing saved {blocks_saved:.1%} of the blocks: {forks} forks, {copied_blocks} copies, \
{cached_tokens} cached tokens
    attention: {attention} on {device}; host at work: {host:.0%} of the time"""
    stats, text = engine.stats(), inspect.cleandoc(print_report.__doc__)     # the text just above
    eager = "CUDA graphs of Triton kernels" if engine.graphs else "Triton kernels"
    attention = eager if engine.kv_cache.is_cuda else "torch reference"
    print(text.format(**stats, seconds=seconds, speed=stats["generated_tokens"] / seconds,
                      host=1 - engine.counts["seconds_waited"] / seconds,
                      attention=attention, device=engine.kv_cache.device), file=sys.stderr)


def read_text(path):
    """The text of a file; - is stdin."""
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    return data.decode("utf-8-sig", "replace").replace("\r\n", "\n")


class CommandLine(argparse.ArgumentParser):
    """Generate text with a paged KV cache.

    Texts stream to stdout in the order of their prompts. A report follows on stderr, where that
    is a terminal.

    --prompt PROMPT       a text to continue (repeatable; - reads it from stdin)
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
    --n N                 texts a prompt (1)
    --beam N              the likeliest text by beam search of width N (--json: the N likeliest)
    --device NAME         cpu, cuda or auto (the default)
    --dtype NAME          float32, bfloat16, float16 or auto (the default)
    --block-size N        tokens a block (16)
    --num-blocks N        blocks in the pool (as many as fit; on a CPU 1 GiB of them)
    --swap-blocks N       blocks in the CPU's memory for preempted requests (0)
    --preemption NAME     recompute, swap (while --swap-blocks last) or auto (the default): swap for
                          requests with several texts, recompute for the others
    --max-num-seqs N      texts that are worked on together (256)
    --max-num-batched-tokens N
                          tokens computed a step (8192)
    --max-model-len N     tokens of prompt and output together (what the model was made for)
    --enforce-eager       on a GPU, no CUDA graphs and no compiler: to step through it
    --show-blocks         draw pool and block tables on stderr after each step (on a GPU after up to
                          16, if not for --enforce-eager)
    --json                print one JSON object a prompt
    --verbose             report even if stderr is no terminal
    -h, --help            print this

    examples:
      python nanopaged.py --prompt "ROMEO:" --show-blocks --block-size 4
      python nanopaged.py --model HuggingFaceTB/SmolLM2-135M-Instruct --chat --prompt "Who are you?"

    exit status: 0 done, 1 failed, 2 wrong usage or input, 130 stopped by Ctrl-C
    """

    def __init__(self):
        super().__init__(usage="nanopaged.py [-h] --prompt PROMPT [options]", allow_abbrev=False)
        # The docstring above is the help, and declares the options; their operands say the kind.
        self.format_help = lambda: inspect.cleandoc(self.__doc__) + "\n"
        kinds = {"N": {"type": int}, "X": {"type": float}, "": {"action": "store_true"},
                 "PROMPT": {"type": lambda text: read_text(text) if text == "-" else text},
                 "FILE": {"type": lambda path: re.findall(r".*\S.*", read_text(path)),
                          "action": "extend", "dest": "prompt"}}
        for option, operand, text in re.findall(r"^ +(--\S+) ?([A-Z]*)(.*)", self.__doc__, re.M):
            repeat = {"action": "append"} if "repeatable" in text else {}
            self.add_argument(option, **kinds.get(operand, {}), **repeat)


def write_outputs(engine, request_ids, params, args):
    """Run the engine; stream the texts in the order of `request_ids`, each ended by a newline."""
    # no half lines in JSON, between drawings, or while beams compete
    whole = args.json or args.show_blocks or args.beam or params.n > 1
    watch, news = (draw_blocks if args.show_blocks else lambda engine: None), {}
    for request_id in request_ids:
        written, output = 0, None
        while not (output and output.finished):
            while request_id not in news:          # the others' wait there until it is their turn
                news |= {out.request_id: out for out in engine.step(watch, whole)}
            output = news.pop(request_id)
            text = "\n".join(text.text for text in output.outputs[:params.n])
            text = json.dumps(output, default=vars) if args.json else text
            print(text[written:], end="\n" * output.finished, flush=True)
            written = len(text)


def run(args):
    """The command line's work -> exit status."""
    require(args.prompt, "number of prompts", 0, "1 or more, by --prompt or --prompts-file")
    # What beam search has not, such as --top-p, its parameters refuse. --seed is the engine's.
    names = {*SamplingParams.__match_args__} - {"seed"}
    given = {name: value for name, value in vars(args).items() if value is not None}
    options = {"max_tokens": 64} | {name: given[name] for name in given.keys() & names}
    with reading("options"):
        params = (SamplingParams(**{"temperature": 0.8} | options) if args.beam is None else
                  BeamSearchParams(args.beam, **options))
    llm = LLM(**{name: given[name] for name in given.keys() & inspect.signature(LLM).parameters})
    request_ids, start = [], time.perf_counter()
    for number, prompt in enumerate(args.prompt, 1):
        try:
            if args.chat:
                chat = llm.tokenizer.render_chat([{"role": "user", "content": prompt}])
                prompt = llm.tokenizer.encode(chat, allowed_special=True, add_special_tokens=False)
            request_ids.append(llm.engine.add_request(prompt, params))
        except ValueError as error:                # the other prompts go on
            print(f"nanopaged: prompt {number}: {error}", file=sys.stderr)
    try:
        write_outputs(llm.engine, request_ids, params, args)
    finally:
        if args.verbose or sys.stderr.isatty():
            print_report(llm.engine, time.perf_counter() - start)
    return 0 if len(request_ids) == len(args.prompt) else 2


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
