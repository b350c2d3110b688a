"""Section 11, the command line: what goes to which stream, exit codes, and every bad input."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from checkpoints import (
    copy_model,
    edit_json,
    gpt2_config,
    gpt2_shapes,
    write_babbler,
    write_model,
    write_reciter,
)
from helpers import GOLDEN, ROOT

from nanopaged import LLM, Engine, SamplingParams, Tokenizer, main

TOKENIZER = Tokenizer(GOLDEN / "tokenizers" / "smollm2")
PROMPT, TEXT = "If blocks are handed out", " one at a time, naïve 🙂 readers see\n\n  no waste."
EOS = TOKENIZER.special["<|im_end|>"]
PROMPT_IDS, TEXT_IDS = TOKENIZER.encode(PROMPT), TOKENIZER.encode(TEXT)


@pytest.fixture(scope="module")
def reciter(tmp_path_factory):
    """A model that answers PROMPT with TEXT; a prompt of other length begins elsewhere in both."""
    folder = tmp_path_factory.mktemp("reciter")
    return str(write_reciter(folder, PROMPT_IDS + TEXT_IDS, "smollm2", EOS))


@pytest.fixture(scope="module")
def babbler(tmp_path_factory):
    """A model with random weights and a context of 512, that never ends by itself."""
    return str(write_babbler(tmp_path_factory.mktemp("babbler"), "smollm2", 1100))


@pytest.fixture
def cli(capsys):
    """Run main() in this process -> (exit status, stdout, stderr)."""
    def run(*argv):
        try:
            status = main(list(map(str, argv)))
        except SystemExit as exit:                 # argparse's way to end
            status = exit.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err
    return run


def real(*argv, stderr=subprocess.PIPE):
    """Start the real thing, in a process of its own, that hears Ctrl-C even if tests do not.

    (What a shell runs in the background ignores it, and so do the children.)
    """
    def hear():
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "nanopaged.py"), *map(str, argv)],
                            stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8", env=one_thread,
                            preexec_fn=hear if os.name == "posix" else None)


# ---- stdout -------------------------------------------------------------------------------------


def test_stdout_carries_only_the_text(reciter, cli):
    """Progress, a report or a warning among the text: `> file` is spoilt."""
    assert cli("--model", reciter, "--prompt", PROMPT) == (0, TEXT + "\n", "")


def test_text_streams(reciter, monkeypatch):
    """The whole text at the end, or in pieces but all of them at the end; or half a character."""
    events, step = [], Engine.step

    class Stdout(io.StringIO):
        def write(self, text):
            events.extend([text] if text else [])

    def recorded_step(*arguments):
        events.append(None)
        return step(*arguments)

    monkeypatch.setattr(Engine, "step", recorded_step)
    monkeypatch.setattr(sys, "stdout", Stdout())
    assert main(["--model", reciter, "--prompt", PROMPT]) == 0
    pieces = " ".join("|" if event is None else repr(event) for event in events).split("|")
    assert "".join(event for event in events if event) == TEXT + "\n"
    assert len([piece for piece in pieces if piece.strip()]) > len(TEXT_IDS) / 2, pieces


def test_prompt_is_repeatable_and_texts_come_in_its_order(reciter, cli):
    """The last --prompt wins; or the texts stand in the order in which they end."""
    short, longer = TOKENIZER.decode(PROMPT_IDS[:2]), PROMPT + TEXT[:4]     # the longer ends first
    status, out, _ = cli("--model", reciter, "--prompt", short, "--prompt", longer)
    assert status == 0
    assert out == f"{PROMPT[len(short):]}{TEXT}\n{TEXT[4:]}\n"


def test_prompt_from_stdin(reciter, cli, monkeypatch):
    """- taken for a text; or stdin decoded by the locale, or broken bytes a traceback."""
    for data, expected in ((PROMPT.encode(), TEXT), (b"\xff", None)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
        status, out, err = cli("--model", reciter, "--prompt", "-")
        assert (status, err) == (0, "") and expected in (None, out[:-1])


def test_prompts_file_from_stdin(reciter, cli, monkeypatch):
    """One prompt a line, blank lines and the ends of lines are none of it."""
    data = f"{PROMPT}\r\n\n  \n{PROMPT}".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert cli("--model", reciter, "--prompts-file", "-") == (0, f"{TEXT}\n{TEXT}\n", "")


def test_a_stdout_that_cannot_say_all_characters(reciter, monkeypatch):
    """A Windows pipe (cp1252) or LANG=C: one emoji, and the rest of the text is lost."""
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    assert main(["--model", reciter, "--prompt", PROMPT]) == 0
    sys.stdout.flush()
    assert b"readers see" in buffer.getvalue()


def test_stop_ends_the_text_before_it(reciter, cli):
    """A stop string printed in part, as it was streamed before it was complete."""
    status, out, _ = cli("--model", reciter, "--prompt", PROMPT, "--stop", "z", "--stop", "readers")
    assert (status, out) == (0, TEXT[:TEXT.index("readers")] + "\n")


@pytest.mark.parametrize("options, same", [
    ([], True), (["--seed", 0], True), (["--seed", 1], False), (["--temperature", 0], False)])
def test_same_seed_same_text(options, same, babbler, cli):
    """Texts that nobody can get again; or a seed that is not used."""
    argv = ["--model", babbler, "--prompt", "Tyger", "--max-tokens", 12]
    first, second = cli(*argv), cli(*argv, *options)
    assert first[0] == second[0] == 0 and (first[1] == second[1]) is same


def test_equal_prompts_differ(babbler, cli):
    """One seed for all: ten prompts give the same text ten times."""
    _, out, _ = cli("--model", babbler, *["--prompt", "Tyger"] * 2, "--max-tokens", 30, "--json")
    first, second = (json.loads(line)["outputs"][0]["token_ids"] for line in out.splitlines())
    assert first != second


# ---- --json -------------------------------------------------------------------------------------


def test_json_equals_the_api(babbler, cli):
    """A field left out or renamed; text beside the JSON; an object before it is finished."""
    prompts = ["Tyger Tyger", "🙂", "a\nb"]
    status, out, err = cli("--model", babbler, *(x for p in prompts for x in ("--prompt", p)),
                           "--max-tokens", 9, "--logprobs", 2, "--top-k", 50, "--seed", 7, "--json")
    params = SamplingParams(temperature=0.8, max_tokens=9, logprobs=2, top_k=50)
    outputs = LLM(babbler, seed=7).generate(prompts, params)
    assert (status, err) == (0, "")
    assert [json.loads(line) for line in out.splitlines()] == [
        json.loads(json.dumps(output, default=vars)) for output in outputs]


# ---- --chat -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A model that answers the first golden chat -> (folder, message, ids of the prompt)."""
    golden = json.loads((GOLDEN / "tokenizers" / "smollm2" / "golden.json").read_text())["chats"][0]
    folder = tmp_path_factory.mktemp("chat")
    write_reciter(folder, golden["ids"] + TOKENIZER.encode("Four."), "smollm2", EOS)
    return str(folder), golden["messages"][0]["content"], golden["ids"]


def test_chat_renders_the_models_template(chat, cli):
    """The message sent bare, the template's special tokens as plain text, the end token shown."""
    folder, message, ids = chat
    assert cli("--model", folder, "--chat", "--prompt", message) == (0, "Four.\n", "")
    _, out, _ = cli("--model", folder, "--chat", "--prompt", message, "--json")
    assert json.loads(out)["prompt_token_ids"] == ids
    assert json.loads(out)["outputs"][0]["finish_reason"] == "stop"


def test_chat_without_a_template_is_one_line(reciter, tmp_path, cli):
    """A base model has none: what a chat would look like is not guessed."""
    shutil.copytree(reciter, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").unlink()
    status, out, err = cli("--model", tmp_path, "--chat", "--prompt", "Hi")
    assert (status, out, err.count("\n")) == (2, "", 1) and "template" in err


# ---- --show-blocks and the report ---------------------------------------------------------------

# B = 4: 7 prompt tokens and 5 more. The last one is never written, so 7 to 11 tokens are held.
SEVEN = TOKENIZER.decode((PROMPT_IDS + TEXT_IDS)[:7])
TINY_POOL = ["--prompt", SEVEN, "--max-tokens", 5, "--block-size", 4, "--num-blocks", 8]
SEVEN_TEXT = TOKENIZER.decode((PROMPT_IDS + TEXT_IDS)[7:12])


def test_show_blocks_draws_on_stderr(reciter, cli):
    """A drawing that shows the step before, counts the token without K and V, or is on stdout; or
    one that comes after the last step has given its blocks back, and so never shows them."""
    status, out, err = cli("--model", reciter, *TINY_POOL, "--show-blocks")
    assert (status, out) == (0, SEVEN_TEXT + "\n")
    assert re.findall(r"(\d+) of 8 blocks held", err) == ["2", "2", "3", "3", "3"]
    assert re.findall(r"(\d+) running, (\d+) waiting", err) == [("1", "0")] * 5
    assert re.findall(r"(\d+) tokens, (\d+) cached in block ([\d ]*\d)", err) == [
        ("8", "7", "0 1"), ("9", "8", "0 1"), ("10", "9", "0 1 2"), ("11", "10", "0 1 2"),
        ("12", "11", "0 1 2")]
    assert re.findall(r"^ +0 ([a.]+)$", err, re.M) == ["aa......"] * 2 + ["aaa....."] * 3


def test_show_blocks_shows_who_waits(reciter, cli):
    """4 blocks hold two requests of 7 tokens, until both need a third: the later is preempted."""
    pool = [*TINY_POOL[:-1], 4]
    other = "If are blocks handed out"                 # equal texts would share blocks
    assert len(TOKENIZER.encode(other)) == 7
    status, out, err = cli("--model", reciter, *pool, "--prompt", other, "--show-blocks")
    assert (status, out) == (0, f"{SEVEN_TEXT}\n" * 2)
    states = re.findall(r"(\d+) running, (\d+) waiting, (\d+) preempted, (\d+) of 4", err)
    assert states[:3] == [("2", "0", "0", "4"), ("2", "0", "0", "4"), ("1", "1", "1", "3")]
    assert states[-1] == ("1", "0", "1", "3")


def figures(err):
    """{what: number} of the closing report."""
    patterns = {"tokens": r"^([\d,]+) tokens in", "seconds": r"in ([\d.]+) s\b",
                "speed": r"([\d.,]+) tokens/s", "steps": r"(\d+) steps",
                "peak": r"(\d+) at the peak", "now": r"(\d+) now", "pool": r"(\d+) in the pool",
                "preemptions": r"(\d+) preemption", "kv": r"([\d.]+)% tokens",
                "reserved": r"([\d.]+)% reserved", "internal": r"([\d.]+)% internal",
                "external": r"([\d.]+)% external"}
    return {what: float(re.search(pattern, err, re.M)[1].replace(",", ""))
            for what, pattern in patterns.items()}


def test_the_report_is_for_verbose_and_right(reciter, cli):
    """A report that is always there, never there, on stdout, or whose shares are not the paper's.

    Held slots: 8 + 8 + 12 + 12 + 12 = 52. Tokens in them: 7 + 8 + 9 + 10 + 11 = 45. One slot of
    the last block is never used, in 3 steps: 3 / 52 are internal, the other 4 / 52 reserved.
    """
    status, out, err = cli("--model", reciter, *TINY_POOL, "--verbose")
    report = figures(err)
    assert (status, out) == (0, SEVEN_TEXT + "\n")
    expected = {"tokens": 5, "steps": 5, "peak": 3, "now": 0, "pool": 8, "preemptions": 0,
                "kv": 86.5, "reserved": 7.7, "internal": 5.8, "external": 0}
    assert {what: report[what] for what in expected} == expected
    least, most = report["seconds"] - 0.006, report["seconds"] + 0.006     # it is rounded to 0.01
    assert 5 / most - 0.1 <= report["speed"] and (least <= 0 or report["speed"] <= 5 / least + 0.1)


def test_the_report_counts_preemptions(reciter, cli):
    """Work that was done twice is no waste of memory, but it is why it took long."""
    _, _, err = cli("--model", reciter, *TINY_POOL[:-1], 4, *TINY_POOL[:2], "--verbose")
    report = figures(err)
    assert report["preemptions"] == 1 and report["tokens"] == 10 and report["peak"] == 4
    assert abs(sum(report[what] for what in ("kv", "reserved", "internal", "external")) - 100) < 0.2


# ---- several prompts, one of them bad -----------------------------------------------------------


def test_a_bad_prompt_loses_nothing_of_the_others(reciter, tmp_path, cli):
    """One prompt that is too long ends all; or its complaint does not say which one it was."""
    path = tmp_path / "prompts.txt"
    path.write_text(f"{PROMPT}\n{PROMPT * 20}\n{PROMPT}\n", encoding="utf-8")
    status, out, err = cli("--model", reciter, "--prompts-file", path)
    assert (status, out) == (2, f"{TEXT}\n{TEXT}\n")
    assert err.count("\n") == 1 and "prompt 2" in err


def test_only_bad_prompts(reciter, cli):
    """Nothing to run: a step with an empty batch."""
    status, out, err = cli("--model", reciter, "--prompt", PROMPT * 20, "--prompt", "", "--verbose")
    assert (status, out) == (2, "")
    assert "prompt 1" in err and "prompt 2" in err


# ---- bad input ----------------------------------------------------------------------------------

BAD_OPTIONS = [      # options, what the line must name
    (["--max-tokens", 0], "max_tokens"), (["--max-tokens", -1], "max_tokens"),
    (["--max-tokens", "x"], "max-tokens"), (["--max-tokens", 1.5], "max-tokens"),
    (["--max-tokens"], "max-tokens"), (["--temperature", -0.1], "temperature"),
    (["--temperature", "nan"], "temperature"), (["--temperature", "inf"], "temperature"),
    (["--temperature", "hot"], "temperature"), (["--top-p", 0], "top_p"),
    (["--top-p", 1.01], "top_p"),
    (["--top-k", -2], "top_k"), (["--top-k", 0.5], "top-k"), (["--min-p", -1], "min_p"),
    (["--min-p", 1.5], "min_p"), (["--repetition-penalty", 0], "repetition_penalty"),
    (["--logprobs", -1], "logprobs"), (["--logprobs", 10 ** 6], "logprobs"),
    (["--stop", ""], "stop"), (["--seed", -1], "seed"), (["--seed", 2 ** 64], "seed"),
    (["--block-size", 0], "block_size"), (["--block-size", 3], "block_size"),
    (["--block-size", -16], "block_size"), (["--block-size", 512], "block_size"),
    (["--num-blocks", 0], "num_blocks"), (["--num-blocks", -1], "num_blocks"),
    (["--num-blocks", 2 ** 40], "num_blocks"), (["--max-num-seqs", 0], "max_num_seqs"),
    (["--max-num-batched-tokens", 0], "max_num_batched_tokens"),
    (["--max-model-len", 1], "max_model_len"), (["--max-model-len", 10 ** 6], "max_model_len"),
    (["--max-model-len", 4], "max_model_len"), (["--num-blocks", 1, "--block-size", 4], "pool"),
    (["--device", "tpu"], "device"), (["--dtype", "int8"], "dtype"), (["--prompt", ""], "prompt 2"),
    (["--no-such-option"], "no-such-option"), (["--max-tok", 5], "max-tok"), (["stray"], "stray"),
    (["--model", "./no-such-folder"], "no-such-folder"), (["--model", ""], "config.json"),
    (["--model", "a/b/c"], "a/b/c"), (["--prompts-file", "no-such-file"], "no-such-file"),
]


def one_line(status, err, *named):
    """Assert that a run was refused in one line; argparse may put its usage line before it."""
    lines = [line for line in err.splitlines() if not line.startswith("usage: ")]
    assert status == 2 and len(lines) == 1, (status, err)
    assert all(part in lines[0] for part in named), lines[0]


@pytest.mark.parametrize("options, named", BAD_OPTIONS)
def test_a_bad_option_is_one_line(options, named, reciter, cli):
    """A traceback; a value that is clipped in silence; a line that does not say which option."""
    status, out, err = cli("--model", reciter, "--prompt", PROMPT, *options)
    one_line(status, err, named)
    assert out == ("" if options != ["--prompt", ""] else TEXT + "\n")


def test_no_prompt_is_one_line(reciter, tmp_path, cli):
    """Waiting for stdin without a word; or nothing done, and that was a success."""
    (tmp_path / "empty").write_text("\n \n")
    for argv in ([], ["--prompts-file", tmp_path / "empty"]):
        status, out, err = cli("--model", reciter, *argv)
        one_line(status, err, "--prompt")
        assert out == ""


def test_cuda_where_there_is_none(reciter, cli):
    """torch's own message is 12 lines."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    status, _, err = cli("--model", reciter, "--prompt", PROMPT, "--device", "cuda")
    one_line(status, err, "cuda")


def spoil_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("spoil, named", [
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"?" * 99), "model.safetensors"),
    (spoil_weights, "model.safetensors"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (lambda folder: edit_json(folder / "config.json", architectures=["BertModel"]), "BertModel"),
    (lambda folder: edit_json(folder / "config.json", vocab_size=9), "(9, "),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("[]"), "tokenizer.json")])
def test_a_bad_folder_is_one_line(spoil, named, reciter, tmp_path, cli):
    """A traceback for a file that is missing, cut off, garbage, or of another model."""
    shutil.copytree(reciter, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    status, out, err = cli("--model", tmp_path, "--prompt", PROMPT)
    one_line(status, err, named)
    assert out == ""


def test_a_token_that_the_model_does_not_know_is_one_line(tmp_path, cli):
    """The tokenizer of another model, whose ids are past the end of this one's embedding."""
    copy_model("mistral", tmp_path, tokenizer="smollm2")
    status, _, err = cli("--model", tmp_path, "--prompt", PROMPT)
    one_line(status, err, "token id", "102")


def test_a_name_with_a_line_end_is_one_line(cli):
    """The message repeats what was given, as it is."""
    status, _, err = cli("--prompt", "x", "--model", "no\nsuch/a/model")
    one_line(status, err)


@pytest.mark.parametrize("options", [["--num-blocks", 2 ** 30],
                                     ["--num-blocks", 2 ** 31, "--block-size", 256]])
def test_too_many_blocks_for_the_memory_fail_in_one_line(options, reciter, cli):
    """The kernel's OOM killer, half a minute later; or a traceback of torch's allocator."""
    status, out, err = cli("--model", reciter, "--prompt", PROMPT, "--device", "cpu", *options)
    assert (status, out, err.count("\n")) == (1, "", 1) and "num_blocks" in err


def test_no_memory_for_one_block(tmp_path, cli):
    """A pool of 0 blocks, in which no request can ever run: an endless loop."""
    width = 1 << 19                # 1,048,576 values a token: 256 tokens are 1 GiB, over 1 layer
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16)
               for name, shape in llama_shapes(1100, 2, 2, width).items()}
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 1100, "hidden_size": 2,
              "intermediate_size": 2, "num_hidden_layers": 2, "num_attention_heads": 1,
              "head_dim": width, "max_position_embeddings": 512, "tie_word_embeddings": True}
    write_model(tmp_path, config, tensors, "smollm2")
    status, out, err = cli("--model", tmp_path, "--prompt", PROMPT, "--block-size", 256,
                           "--device", "cpu")
    assert (status, out, err.count("\n")) == (1, "", 1) and "block" in err


def llama_shapes(vocab_size, width, num_layers, head_dim):
    """-> {name: shape} of a tied LLaMA with one head and an MLP as narrow as the rest."""
    shapes = {"model.embed_tokens.weight": (vocab_size, width), "model.norm.weight": (width,)}
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (head_dim, width) for x in "qkv"}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (width, head_dim)}
        shapes |= {f"{layer}.mlp.{x}_proj.weight": (width, width) for x in ("gate", "up", "down")}
        shapes |= {f"{layer}.{x}_layernorm.weight": (width,)
                   for x in ("input", "post_attention")}
    return shapes


def test_a_model_that_does_not_fit_into_memory_fails_in_one_line(tmp_path, cli):
    """torch's RuntimeError of its allocator, with a traceback: a config.json of 60 TB."""
    shapes = gpt2_shapes(1100, 32, 1, 32)
    write_model(tmp_path, gpt2_config(1100, 32, 1, 32),
                {name: torch.zeros(shape) for name, shape in shapes.items()}, "smollm2")
    edit_json(tmp_path / "config.json", n_embd=1 << 22)
    status, out, err = cli("--model", tmp_path, "--prompt", PROMPT)
    assert status in (1, 2) and (out, err.count("\n")) == ("", 1)


def test_offline_is_one_line(cli, monkeypatch, tmp_path):
    """An unknown name is looked for on the network, which may not be there: exit 1, a failure."""
    monkeypatch.setenv("NANOPAGED_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    status, out, err = cli("--model", "org/model", "--prompt", "x")
    assert (status, out, err.count("\n")) == (1, "", 1) and "offline" in err


def test_help_names_every_option(cli):
    """--help that lies: an option that is not there, or one that is not told."""
    status, out, err = cli("--help")
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 100
    for option in ("prompt", "prompts-file", "model", "max-tokens", "temperature", "top-p", "top-k",
                   "min-p", "seed", "chat", "device", "dtype", "block-size", "num-blocks", "stop",
                   "max-num-batched-tokens", "show-blocks", "json", "verbose"):
        assert re.search(rf"--{option}\b", out), option
    assert "130" in out, "exit codes are told"


# ---- the real process ---------------------------------------------------------------------------


def test_ctrl_c_ends_cleanly(babbler, tmp_path):
    """Three screens of traceback; or a process that goes on."""
    path = tmp_path / "prompts.txt"
    path.write_text("Tyger\n" * 500)               # minutes of work, one after the other
    process = real("--model", babbler, "--prompts-file", path, "--max-tokens", 500,
                   "--max-num-seqs", 1, "--verbose")
    assert process.stdout.read(1), "it has begun"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "tokens/s" in err, "what was done so far is reported"


def test_a_reader_that_has_seen_enough(babbler):
    """`| head -1`: BrokenPipeError, and once more when Python flushes at its end."""
    prompts = ["--prompt", "Tyger", "--prompt", "a b c"] * 5
    process = real("--model", babbler, *prompts, "--max-tokens", 200, "--stop", "\n")
    assert process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=30)
    err = process.stderr.read()
    assert process.returncode in (0, 1, 120) and err == "", err


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="pseudo-terminals are there on Unix only")
def test_a_terminal_gets_the_report(reciter):
    """isatty() of the wrong stream: the report is missing where one looks for it."""
    terminal, stderr = os.openpty()
    process = real("--model", reciter, "--prompt", PROMPT, "--prompt", "", stderr=stderr)
    out, _ = process.communicate(timeout=30)
    os.close(stderr)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert (process.returncode, out) == (2, TEXT + "\n")
    assert "prompt 2" in shown and "tokens/s" in shown


def test_stop_token_ids(reciter, cli):
    """The option is there and does nothing, or is taken for text."""
    status, out, _ = cli("--model", reciter, "--prompt", PROMPT, "--stop-token-ids", TEXT_IDS[2])
    assert (status, out) == (0, TOKENIZER.decode(TEXT_IDS[:2]) + "\n")
