"""Model folders for the tests that need one with a certain text, fault or size."""

import ctypes
import json
import shutil
import struct
from pathlib import Path

import torch
from safetensors import safe_open

GOLDEN = Path(__file__).resolve().parent / "golden"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
               torch.uint8: "U8"}


def write_safetensors(path, tensors):
    """The format in five lines, as safetensors' own save_file() needs numpy: the length of a JSON
    header, the header, the bytes of the tensors in its order."""
    header, end = {}, 0
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end := end + tensor.nbytes]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def read_safetensors(path):
    """-> {name: tensor}, copied: the file may be overwritten."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}


def copy_model(name, folder, tokenizer=None):
    """A golden checkpoint to be spoilt, with the files of a golden tokenizer if one is named."""
    shutil.copytree(GOLDEN / "models" / name, folder, dirs_exist_ok=True)
    if tokenizer:
        shutil.copytree(GOLDEN / "tokenizers" / tokenizer, folder, dirs_exist_ok=True)
    return folder


def edit_json(path, drop=(), **changes):
    """Set keys of a JSON file, and take those of `drop` out."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if k not in drop}))


def edit_tensors(folder, changes, file="model.safetensors"):
    """Apply {name: tensor, or None to take it out} to a checkpoint's file."""
    tensors = read_safetensors(folder / file)
    assert all(name in tensors for name, t in changes.items() if t is None), "nothing to take out"
    tensors |= changes
    write_safetensors(folder / file, {name: t for name, t in tensors.items() if t is not None})


def write_model(folder, config, tensors, tokenizer=None):
    """A folder with config.json, model.safetensors and, if one is named, a golden tokenizer."""
    if tokenizer:
        shutil.copytree(GOLDEN / "tokenizers" / tokenizer, folder, dirs_exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def gpt2_shapes(vocab_size, width, num_layers, num_positions, inner=None, tied=True):
    """-> {name: shape} of a GPT-2, with the largest matrix last, as in OpenAI's own file."""
    inner, shapes = inner or 4 * width, {}
    for i in range(num_layers):
        for name, shape in (("attn.c_attn", (width, 3 * width)), ("attn.c_proj", (width, width)),
                            ("mlp.c_fc", (width, inner)), ("mlp.c_proj", (inner, width))):
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (width,), f"h.{i}.{name}.bias": (width,)}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,), "wpe.weight": (num_positions, width)}
    shapes |= {} if tied else {"lm_head.weight": (vocab_size, width)}
    return shapes | {"wte.weight": (vocab_size, width)}


def gpt2_config(vocab_size, width, num_layers, num_positions, **settings):
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": vocab_size,
            "n_embd": width, "n_layer": num_layers, "n_head": 1, "n_positions": num_positions,
            **settings}


def write_reciter(folder, token_ids, tokenizer, eos_token_id):
    """A GPT-2 that knows one text by heart: at position p it says token_ids[p + 1], then the end.

    A prompt of n tokens is answered with token_ids[n:], whatever the prompt says. All its weights
    are 0 but a one-hot vector for each position, and a head that gives each its next token.
    """
    width = len(token_ids) + 2 + len(token_ids) % 2             # room for the end, and even
    vocab_size = 1 + max(*token_ids, eos_token_id)
    shapes = gpt2_shapes(vocab_size, width, 1, width, inner=2, tied=False)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tensors["ln_f.weight"] += 1
    tensors["wpe.weight"] = torch.eye(width)
    for position, token_id in enumerate([*token_ids[1:], eos_token_id]):
        tensors["lm_head.weight"][token_id, position] = 10      # no temperature shakes it
    config = gpt2_config(vocab_size, width, 1, width, n_inner=2, tie_word_embeddings=False,
                         eos_token_id=eos_token_id)
    return write_model(folder, config, tensors, tokenizer)


def write_babbler(folder, tokenizer, vocab_size, num_positions=512, seed=0):
    """A GPT-2 with random weights, whose sampled texts differ from seed to seed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * (0.2 if "h." in name else 1)
               for name, shape in gpt2_shapes(vocab_size, 32, 2, num_positions).items()}
    return write_model(folder, gpt2_config(vocab_size, 32, 2, num_positions), tensors, tokenizer)
