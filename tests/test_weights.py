"""Section 2, config and weights: transformers' numbers, and every fault of a model's folder."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoints import (
    copy_model,
    edit_json,
    edit_tensors,
    gpt2_config,
    gpt2_shapes,
    read_safetensors,
    write_model,
)
from helpers import GOLDEN, MODELS, ROOT, all_logits, golden, golden_llm, greedy_params, token_ids

from nanopaged import LLM

INDEX = "model.safetensors.index.json"


def load(folder, **settings):
    """The engine on a folder that has no tokenizer."""
    settings = {"skip_tokenizer_init": True, "num_blocks": 32, "device": "cpu"} | settings
    return LLM(str(folder), **settings)


def refusal(folder, error=ValueError):
    """The one line with which a folder is refused."""
    with pytest.raises(error) as caught:
        load(folder)
    assert type(caught.value) is error, "a subclass says less than it seems to"
    assert "\n" not in str(caught.value), "a complaint is one line"
    return str(caught.value)


# ---- right answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name):
    """A weight left out, transposed or swapped; a wrong angle, scale or norm: any moves a logit."""
    oracle = read_safetensors(GOLDEN / "models" / name / "golden.safetensors")
    prompts, _ = golden(name)
    llm = golden_llm(name)
    together = all_logits(llm, prompts)
    for i, prompt in enumerate(prompts):
        alone = all_logits(llm, [prompt])[0]
        expected = oracle[f"logits_{i}"]
        assert (alone - expected).abs().max() < 1e-4, f"prompt {i} alone"
        assert (together[i] - expected).abs().max() < 1e-4, f"prompt {i} beside the others"


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_those_of_transformers(name):
    """Decoding that reads other K and V than prefill wrote; a prompt that its neighbours change."""
    prompts, texts = golden(name)
    llm = golden_llm(name, block_size=4)
    assert [token_ids(out) for out in llm.generate(prompts, greedy_params())] == texts, "together"
    assert [token_ids(llm.generate(prompt, greedy_params())[0]) for prompt in prompts] == texts, \
        "one by one"


@pytest.mark.parametrize("name", ["gpt2_prefixed", "gpt2_openai"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_names_with_and_without_transformer(name, prefix, tmp_path):
    """A loader that knows one spelling of GPT-2's names, or infers it from the first one."""
    folder = copy_model(name, tmp_path)
    old = read_safetensors(folder / "model.safetensors")
    new = {prefix * (key != "lm_head.weight") + key.removeprefix("transformer."): tensor
           for key, tensor in old.items()}
    edit_tensors(folder, dict.fromkeys(old) | new)
    prompts, texts = golden(name)
    assert [token_ids(out) for out in load(folder).generate(prompts, greedy_params())] == texts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gpt2_prefixed", "llama_bfloat16", "llama_float16"])
def test_any_stored_dtype_loads_as_any_other(name, dtype):
    """A tensor left in the file's dtype, or reinterpreted instead of converted."""
    oracle = read_safetensors(GOLDEN / "models" / name / "golden.safetensors")
    prompts, texts = golden(name)
    llm = golden_llm(name, dtype=dtype)
    assert {str(p.dtype) for p in llm.engine.model.parameters()} == {f"torch.{dtype}"}
    assert str(llm.engine.kv_cache.dtype) == f"torch.{dtype}"
    # The logits are 10 wide. 2 layers round some 20 times, by 2^-9 (bfloat16) or 2^-12 at most.
    bound = {"float32": 1e-4, "bfloat16": 1.0, "float16": 0.1}[dtype]
    for i, logits in enumerate(all_logits(llm, prompts)):
        assert (logits - oracle[f"logits_{i}"]).abs().max() < bound


def test_tied_head_is_the_embedding_whatever_else_the_file_holds(tmp_path):
    """Tied, but lm_head.weight of the file is used: transformers ignores it."""
    folder = copy_model("llama_gqa_tied", tmp_path)
    edit_tensors(folder, {"lm_head.weight": torch.zeros(131, 30)})
    prompts, texts = golden("llama_gqa_tied")
    assert [token_ids(out) for out in load(folder).generate(prompts, greedy_params())] == texts


def test_files_may_be_links(tmp_path):
    """Hugging Face's own cache holds links into another folder: these are no escape."""
    for path in (GOLDEN / "models" / "llama_linear_sharded").iterdir():
        (tmp_path / path.name).symlink_to(path)
    prompts, texts = golden("llama_linear_sharded")
    assert token_ids(load(tmp_path).generate(prompts[1], greedy_params())[0]) == texts[1]


def test_dummy_weights_need_no_file(tmp_path):
    """load_format="dummy" that still looks for weights; and the engine runs on what it makes."""
    shutil.copy(GOLDEN / "models" / "llama_mqa_llama3" / "config.json", tmp_path)
    out = load(tmp_path, load_format="dummy").generate([1, 2, 3], greedy_params(5))[0]
    assert len(token_ids(out)) == 5


@pytest.mark.parametrize("config, expected", [
    ({"eos_token_id": 7}, [7]), ({"eos_token_id": [7, 9]}, [7, 9]), ({}, [2]),
    ({"eos_token_id": None}, [2]), ({"eos_token_id": 0}, [0])])
def test_end_of_text_ids_come_from_generation_config_first(config, expected, tmp_path):
    """A chat model's second end-of-text id, named only in generation_config.json, is missed."""
    folder = copy_model("mistral", tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(config))
    prompts, texts = golden("mistral")
    params = greedy_params(ignore_eos=False)
    for out, text in zip(load(folder).generate(prompts, params), texts, strict=True):
        ends = [i for i, token_id in enumerate(text) if token_id in expected]
        length = ends[0] + 1 if ends else len(text)
        assert token_ids(out) == text[:length]
        assert out.outputs[0].finish_reason == ("stop" if ends else "length")


# ---- tensors ------------------------------------------------------------------------------------

MISSING = [("llama_gqa_tied", "model.layers.1.self_attn.v_proj.weight", "(16, 30)"),
           ("llama_gqa_tied", "model.norm.weight", "(30,)"),
           ("llama_mha_bias", "model.layers.0.mlp.up_proj.bias", "(52,)"),
           ("llama_mha_bias", "lm_head.weight", "(107, 30)"),
           ("gpt2_openai", "wpe.weight", "(128, 28)"),
           ("gpt2_openai", "h.1.attn.c_attn.bias", "(84,)"),
           ("gpt2_openai", "h.0.mlp.c_fc.weight", "(28, 112)")]


@pytest.mark.parametrize("name, tensor, shape", MISSING)
def test_a_missing_tensor_is_named(name, tensor, shape, tmp_path):
    """A tensor that the file lacks stays what the memory held: garbage text, and no error."""
    folder = copy_model(name, tmp_path)
    edit_tensors(folder, {tensor: None})
    message = refusal(folder)
    assert all(part in message for part in (tensor, shape, "model.safetensors", "missing")), message


@pytest.mark.parametrize("name, tensor", [
    ("llama_gqa_tied", "model.layers.3.self_attn.q_proj.weight"),       # a fourth layer
    ("llama_gqa_tied", "model.layers.0.self_attn.q_norm.weight"),       # another architecture's
    ("llama_gqa_tied", "model.layers.0.self_attn.q_proj.bias"),         # attention_bias is false
    ("gpt2_openai", "h.0.crossattention.c_attn.weight"),
    ("gpt2_openai", "h.0.mlp.c_fc.masked_bias"),                        # no mask has this name
    ("gpt2_openai", "score.weight")])
def test_an_unexpected_tensor_is_named(name, tensor, tmp_path):
    """Weights that are passed over in silence: the model computes less than it was trained to."""
    folder = copy_model(name, tmp_path)
    edit_tensors(folder, {tensor: torch.zeros(5, 3)})
    message = refusal(folder)
    assert all(part in message for part in (tensor, "(5, 3)", "model.safetensors")), message


@pytest.mark.parametrize("name, tensor, right", [
    ("llama_gqa_tied", "model.layers.2.mlp.down_proj.weight", (30, 42)),
    ("llama_gqa_tied", "model.embed_tokens.weight", (131, 30)),
    ("llama_mqa_llama3", "model.layers.0.self_attn.k_proj.weight", (12, 40)),
    ("gpt2_prefixed", "transformer.h.0.attn.c_attn.weight", (24, 72)),
    ("gpt2_prefixed", "transformer.h.1.ln_2.bias", (24,))])
@pytest.mark.parametrize("make", [
    lambda right: torch.zeros(right).T.contiguous() if len(right) == 2 else torch.zeros(1),
    lambda right: torch.zeros(right)[:-1],             # one row less
    lambda right: torch.zeros(1, *right)])
def test_a_wrong_shape_is_named_with_the_right_one(name, tensor, right, make, tmp_path):
    """copy_() broadcasts: a (1,) norm, or one row, would fill a whole tensor without a word."""
    folder = copy_model(name, tmp_path)
    wrong = make(right)
    edit_tensors(folder, {tensor: wrong})
    message = refusal(folder)
    parts = (tensor, str(tuple(wrong.shape)), str(right), "model.safetensors")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("key, part", [("attention_bias", "self_attn."), ("mlp_bias", "mlp.")])
def test_a_bias_that_config_denies_is_not_dropped(key, part, tmp_path):
    """Biases of the file that nobody asked for vanish, where config.json is wrong about them."""
    folder = copy_model("llama_mha_bias", tmp_path)
    edit_json(folder / "config.json", **{key: False})
    message = refusal(folder)
    assert part in message and ".bias" in message, message


def test_a_bias_is_not_taken_for_a_mask(tmp_path):
    """Skipping all that ends with "attn.bias" or ".bias", as for GPT-2's masks `h.0.attn.bias`."""
    for i, name in enumerate(["h.0.attn.c_attn.bias", "h.1.attn.c_proj.bias", "ln_f.bias"]):
        folder = copy_model("gpt2_openai", tmp_path / str(i))
        edit_tensors(folder, {name: None, name.replace("bias", "masked_bias"): torch.zeros(1)})
        assert name.removesuffix("bias") in refusal(folder)


def test_a_tensor_that_is_there_twice_is_refused(tmp_path):
    """Two tensors for one weight, with and without "transformer.": which one counts is luck."""
    folder = copy_model("gpt2_openai", tmp_path)
    edit_tensors(folder, {"transformer.wpe.weight": torch.zeros(128, 28)})
    assert "wpe.weight" in refusal(folder)
    folder = copy_model("llama_linear_sharded", tmp_path / "sharded")
    norm = {"model.norm.weight": torch.ones(36)}
    edit_tensors(folder, norm, file="model-00001-of-00003.safetensors")
    assert "model.norm.weight" in refusal(folder)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [
    lambda data: b"", lambda data: data[:5], lambda data: data[:100], lambda data: data[:-1],
    lambda data: data[:len(data) // 2], lambda data: data + b"0", lambda data: b"\xff" * 300,
    lambda data: data[:8] + b"#" + data[9:], lambda data: b"<!DOCTYPE html>" * 40,
    lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"])
def test_a_truncated_or_garbage_file_is_named(spoil, tmp_path):
    """A cut download, an error page or a git-lfs pointer ends in a traceback, or worse, in text."""
    folder = copy_model("mistral", tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    assert str(path) in refusal(folder)


def test_a_missing_file_or_shard_is_named(tmp_path):
    """A half downloaded checkpoint."""
    folder = copy_model("llama_linear_sharded", tmp_path / "shard")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refusal(folder, FileNotFoundError)
    folder = copy_model("mistral", tmp_path / "single")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(folder, FileNotFoundError)


def test_pickles_are_refused_with_the_reason(tmp_path):
    """A pickle that is opened runs what its author put there."""
    folder = copy_model("mistral", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder, FileNotFoundError)
    assert "safetensors" in message and "pickle" in message and "code" in message


@pytest.mark.parametrize("name", ["../mistral.safetensors", "/etc/passwd", "a/b.safetensors", "..",
                                  "", "./model-00001-of-00003.safetensors"])
def test_an_index_cannot_leave_its_folder(name, tmp_path):
    """A downloaded index that makes the loader open files elsewhere on the disk."""
    folder = copy_model("llama_linear_sharded", tmp_path / "model")
    copy_model("mistral", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "mistral.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(folder)
    assert repr(name) in str(caught.value) or f"{name} is missing" in str(caught.value)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}',
                                   '{"weight_map": null}', '{"weight_map": {}}', "\0"])
def test_a_broken_index_is_named(index, tmp_path):
    """An index that is no index: a traceback, or a model without weights."""
    folder = copy_model("llama_linear_sharded", tmp_path)
    (folder / INDEX).write_text(index)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


# ---- config.json --------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["Qwen2ForCausalLM", "GPT2Model", "LlamaModel"])
def test_another_architecture_is_refused_by_name(arch, tmp_path):
    """A model that is nearly LLaMA runs, and says nonsense (PEERS bug 16's kin)."""
    folder = copy_model("mistral", tmp_path)
    edit_json(folder / "config.json", architectures=[arch])
    message = refusal(folder)
    supported = ("GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM")
    assert all(part in message for part in (arch, "config.json", *supported)), message


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '"LlamaForCausalLM"', "\xff", "{}"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_file_that_is_no_json_object_is_named(file, text, tmp_path):
    """json's and Python's own complaints name no file."""
    folder = copy_model("mistral", tmp_path)
    (folder / file).write_text(text, encoding="latin-1")
    if file == "generation_config.json" and text in ("{}", "[]"):
        load(folder)                               # says nothing, which is allowed
    else:
        assert str(folder / file) in refusal(folder)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "architectures",
                                 "num_attention_heads", "max_position_embeddings"])
def test_a_missing_key_is_named(key, tmp_path):
    """A default for a size that no two models share."""
    folder = copy_model("llama_gqa_tied", tmp_path)
    edit_json(folder / "config.json", drop=[key])
    message = refusal(folder)
    assert key.removesuffix("s") in message and str(folder / "config.json") in message, message


BAD_VALUES = [       # key, its value, what the message must name
    ("vocab_size", 0, "vocab_size"), ("vocab_size", -1, "vocab_size"),
    ("vocab_size", 131.0, "vocab_size"), ("vocab_size", "131", "vocab_size"),
    ("hidden_size", -30, ""), ("hidden_size", "big", ""), ("hidden_size", [30], ""),
    ("num_hidden_layers", 0, "num_hidden_layers"), ("num_hidden_layers", True, "num_hidden_layers"),
    ("num_attention_heads", 0, ""), ("num_attention_heads", -6, ""),
    ("num_attention_heads", "6", ""),
    ("num_key_value_heads", 4, "num_key_value_heads"),             # of 6 query heads
    ("num_key_value_heads", 12, "num_key_value_heads"),
    ("num_key_value_heads", 0, "num_key_value_heads"),
    ("head_dim", 7, "head_dim"), ("head_dim", -8, "head_dim"), ("head_dim", 8.0, "head_dim"),
    ("intermediate_size", -42, "intermediate_size"),
    ("max_position_embeddings", -1, "max_position_embeddings"),
    ("sliding_window", 4096, "sliding_window"), ("hidden_act", "gelu", "hidden_act"),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}, "quantization_config"),
    ("dtype", "float8_e4m3fn", "dtype"), ("rms_norm_eps", "small", ""),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "yarn"),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "dynamic"),
    ("rope_scaling", {"rope_type": "linear"}, "factor"), ("rope_scaling", "linear", ""),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, ""),
    ("rope_scaling", {"type": "linear", "factor": "4"}, ""),
    ("rope_scaling", {"type": "linear", "factor": 0}, ""),
    ("rope_theta", "1e4", ""), ("rope_theta", -1.0, ""), ("rope_theta", 0, ""),
    ("eos_token_id", "</s>", ""), ("eos_token_id", -1, ""), ("eos_token_id", [2, "</s>"], ""),
]


@pytest.mark.parametrize("key, value, named", BAD_VALUES)
def test_a_value_that_is_not_computed_is_refused(key, value, named, tmp_path):
    """A setting passed over in silence: wrong text, NaN, or a traceback at the first token."""
    folder = copy_model("llama_gqa_tied", tmp_path)
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", **{key: value})
    message = refusal(folder)
    assert named in message and str(folder / "config.json") in message, message


def test_a_mistral_whose_window_is_not_named_has_one(tmp_path):
    """transformers takes 4096 where the key is absent; full attention would be another text."""
    folder = copy_model("mistral", tmp_path)
    edit_json(folder / "config.json", drop=["sliding_window"])
    assert "sliding_window" in refusal(folder)


def test_unsupported_rope_names_the_supported_ones(tmp_path):
    """The user cannot know which of a dozen scalings this engine computes."""
    folder = copy_model("llama_gqa_tied", tmp_path)
    for key in ("rope_scaling", "rope_parameters"):
        edit_json(folder / "config.json", **{key: {"rope_type": "yarn"}})
        message = refusal(folder)
        assert all(part in message for part in ("yarn", "linear", "llama3")), message


@pytest.mark.parametrize("key, value", [
    ("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True),
    ("scale_attn_weights", False), ("n_head", 3), ("n_embd", -28), ("n_layer", 0),
    ("n_positions", 0), ("vocab_size", None)])
def test_gpt2_values_that_are_not_computed_are_refused(key, value, tmp_path):
    """GPT-2's own switches and sizes; 28 is no multiple of 3 heads."""
    folder = copy_model("gpt2_openai", tmp_path)
    edit_json(folder / "config.json", **{key: value})
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("arch, key, default", [
    ("llama_linear_oldest", "rms_norm_eps", 1e-6), ("gpt2_openai", "layer_norm_epsilon", 1e-5)])
def test_a_norm_without_epsilon_has_that_of_transformers(arch, key, default, tmp_path):
    """LLaMA's default is 1e-6 and GPT-2's 1e-5: the other one moves small activations."""
    prompts, _ = golden(arch)
    said, unsaid = copy_model(arch, tmp_path / "said"), copy_model(arch, tmp_path / "unsaid")
    edit_json(said / "config.json", **{key: default})
    edit_json(unsaid / "config.json", drop=[key])
    for a, b in zip(*(all_logits(load(folder), prompts) for folder in (said, unsaid)), strict=True):
        assert a.equal(b)


# ---- memory -------------------------------------------------------------------------------------

# Runs in a process of its own: each case in a fork, whose peak starts at what its parent held. A
# small model goes first, so that the pages of torch's own code are not counted.
MEASURE = """
import os, sys
from nanopaged import LLM

def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

for folder, dtype in zip(sys.argv[2::2], sys.argv[3::2]):
    if (child := os.fork()) == 0:
        settings = dict(dtype=dtype, device="cpu", num_blocks=1, skip_tokenizer_init=True)
        LLM(sys.argv[1], **settings)
        before = memory("VmRSS")
        llm = LLM(folder, **settings)
        weights = sum(p.nbytes for p in llm.engine.model.parameters())
        print(memory("VmHWM") - before, weights, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc/self/status")
def test_loading_peaks_at_1_2_times_the_weights():
    """The file read beside the weights it fills, or the embedding held twice: a model that fits
    does not load. As in GPT-2 small the embedding is a third of all, and comes last."""
    shape = {"vocab_size": 25000, "width": 512, "num_layers": 8, "num_positions": 64}
    with tempfile.TemporaryDirectory() as folder:
        cases = []
        for stored, loaded in (("float32", ["float32"]), ("bfloat16", ["bfloat16", "float32"])):
            path = write_model(
                Path(folder) / stored, gpt2_config(**shape, dtype=stored),
                {name: torch.rand(size).to(getattr(torch, stored))
                 for name, size in gpt2_shapes(**shape).items()})
            cases += [(str(path), dtype) for dtype in loaded]
        warm_up = str(GOLDEN / "models" / "gpt2_openai")
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEASURE, warm_up, *sum(cases, ())],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for (path, dtype), line in zip(cases, result.stdout.splitlines(), strict=True):
        grown, weights = map(int, line.split())
        assert grown <= 1.2 * weights, (f"{Path(path).name} as {dtype}: {grown / 1e6:.0f} MB for "
                                        f"{weights / 1e6:.0f} MB of weights: {grown / weights:.2f}")
