"""How fast is nanopaged: on this CPU beside transformers' `generate`, or against the roofline?

    python tests/bench_engine.py [--model FOLDER|smollm2] [--requests 16] [--prompt-len 64]
                                 [--max-tokens 64] [--threads N] [--rounds 3]
    python tests/bench_engine.py --workload single|nano256|REQUESTSxINxOUT [--model 1b|8b|FOLDER]
                                 [--eager] [--rounds 3]

Three questions, all in float32 and greedy:
  one request       tokens/s of a single sequence: the cost of one step
  many requests     tokens/s of all together, against `generate` one after another: what batching
                    gains, for a step reads every weight once however many sequences share it
  first token       seconds from the start of `python nanopaged.py` to its first byte of output

Only a comparison within one run means anything, so the engines take turns, round by round, and
each figure is the median of its rounds. transformers is no dependency: without it the same
figures are printed, less the comparison. Where other programs run too, give fewer threads than
cores: torch's threads wait for the slowest of them, at every operation.

With --workload: how near a run on the GPU, or the CPU, comes to what memory and arithmetic allow.
The floor is measured in the same run: every weight read once a step and each request's K and V once
a token at the rate of a large copy, the prompts' products at the rate of a large product. 1b and 8b
are the shapes of Llama 3.2 1B and 3.1 8B with random weights; nano256 is nano-vllm's own benchmark,
256 requests of 100 to 1,024 tokens in and out. Printed are tokens/s and the share of the floor of
each round (the first compiles kernels), the seconds until the engine was ready, the host's
microseconds a step (what a step took, less the time in which it waited for the device) and, where
there are CUDA graphs, the milliseconds of a replay and of the draw in it. Where Python may not keep
compiled modules (PYTHONDONTWRITEBYTECODE, and none installed), most of the seconds until the engine
is ready go into compiling torch's own.
"""

import argparse
import functools
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import smollm2
import torch

ROOT = Path(__file__).resolve().parents[1]
CLI_PROMPT = "Once upon a time"
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

# An engine is a function (prompts as token ids, max_tokens) -> generated token ids, a list each.
Engine = Callable[[list[list[int]], int], list[list[int]]]


# ---- engines: one more peer is one more function ------------------------------------------------


def nanopaged_engine(folder: Path) -> Engine:
    """Load nanopaged; all prompts of a call are batched together."""
    from nanopaged import LLM, SamplingParams

    llm = LLM(model=str(folder), device="cpu")

    def generate(prompts, max_tokens):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params)]

    return generate


def transformers_engine(folder: Path) -> Engine:
    """Load transformers; the prompts of a call run one after another."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    # The same as ignore_eos: the end token may be chosen, and ends nothing. min_new_tokens would
    # forbid it instead, so that the two engines could generate different texts.
    model.generation_config.eos_token_id = None

    def generate_one(prompt, max_tokens):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
        )
        return out[0, len(prompt) :].tolist()

    return lambda prompts, max_tokens: [generate_one(prompt, max_tokens) for prompt in prompts]


def load_engines(folder: Path) -> dict[str, Engine]:
    """Load nanopaged and every peer that is installed."""
    engines = {"nanopaged": nanopaged_engine(folder)}
    if importlib.util.find_spec("transformers"):
        engines["transformers"] = transformers_engine(folder)
    else:
        print("no comparison: transformers is missing (pip install transformers)", file=sys.stderr)
    return engines


# ---- measuring ----------------------------------------------------------------------------------


def random_prompts(num_prompts: int, prompt_len: int, seed: int) -> list[list[int]]:
    """Draw prompts of random tokens, the same for a seed.

    Ids below 1000 are in every vocabulary; a dense model takes as long for one text as another.
    """
    draw = random.Random(seed)
    return [[draw.randrange(3, 1000) for _ in range(prompt_len)] for _ in range(num_prompts)]


def measure(engines: dict[str, Engine], num_requests: int, args) -> tuple[dict, float]:
    """Return (engine -> median output tokens/s, share of tokens on which all engines agree)."""
    for engine in engines.values():  # warm up: first-touch memory, lazy imports, thread pools
        engine(random_prompts(num_requests, args.prompt_len, seed=num_requests), 2)
    speeds = {name: [] for name in engines}
    same = total = 0
    for round_id in range(args.rounds):
        # new prompts every round, so that no engine finds them in its prefix cache
        prompts = random_prompts(num_requests, args.prompt_len, seed=1000 * num_requests + round_id)
        texts = []
        for name, engine in engines.items():
            start = time.perf_counter()
            texts.append([token for tokens in engine(prompts, args.max_tokens) for token in tokens])
            seconds = time.perf_counter() - start
            speeds[name].append(len(texts[-1]) / seconds)
            expected = num_requests * args.max_tokens
            assert len(texts[-1]) == expected, f"{name}: {len(texts[-1])} tokens, not {expected}"
        same += sum(len(set(tokens)) == 1 for tokens in zip(*texts, strict=True))
        total += len(texts[0])
    return {name: statistics.median(values) for name, values in speeds.items()}, same / total


def first_token_seconds(options: list[str], args) -> float:
    """Time `python nanopaged.py` from process start to its first byte on stdout: median seconds.

    The first run, which fills the disk cache, does not count. Raises: SubprocessError if it fails.
    """
    command = [sys.executable, str(ROOT / "nanopaged.py"), *options, "--prompt", CLI_PROMPT]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    times = []
    for _ in range(1 + args.rounds):
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        ) as process:
            first = process.stdout.read(1)
            times.append(time.perf_counter() - start)
            process.kill()  # the rest of the text is not our question
            if not first:
                reason = process.stderr.read().decode(errors="replace").strip().splitlines()
                said = reason[-1] if reason else "no output"
                raise subprocess.SubprocessError(f"{' '.join(command)}: {said}")
    return statistics.median(times[1:])


# ---- against the roofline -----------------------------------------------------------------------

LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 8192, "rope_theta": 500000.0, "dtype": "bfloat16",
         "num_attention_heads": 32, "num_key_value_heads": 8, "eos_token_id": 2}
SHAPES = {
    "1b": LLAMA | {"hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64,
                   "intermediate_size": 8192, "tie_word_embeddings": True},
    "8b": LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "head_dim": 128,
                   "intermediate_size": 14336, "tie_word_embeddings": False}}


def workload_name(name: str) -> str:
    """The name of a workload that make_workload knows; argparse tells of another."""
    if not re.fullmatch(r"single|nano256|[1-9]\d*x[1-9]\d*x[1-9]\d*", name):
        raise argparse.ArgumentTypeError(f"{name!r} is none: give single, nano256, or 16x64x64")
    return name


def make_workload(name: str) -> tuple[list[list[int]], list[int]]:
    """Return (prompts as token ids, output length of each)."""
    draw = random.Random(0)
    if name == "nano256":
        lengths = [(draw.randint(100, 1024), draw.randint(100, 1024)) for _ in range(256)]
    else:
        num, length, most = (1, 128, 512) if name == "single" else map(int, name.split("x"))
        lengths = [(length, most)] * num
    prompts = [[draw.randrange(3, 1000) for _ in range(length)] for length, _ in lengths]
    return prompts, [most for _, most in lengths]


def rate(work: Callable[[], object], amount: float, device: str) -> float:
    """Return amount / seconds of `work`, the best of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return amount / min(times[1:])


def device_rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Return (bytes a second that a large copy reads and writes, operations a second)."""
    size, width = (1 << 30, 8192) if device == "cuda" else (1 << 27, 1024)
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b, x = torch.empty_like(a), torch.randn(width, width, dtype=dtype, device=device)
    return (rate(lambda: b.copy_(a), 2 * size, device),
            rate(lambda: x @ x, 2 * width ** 3, device))


def floor_seconds(engine, prompts, lengths, bandwidth: float, flops: float) -> float:
    """Return the least time for a workload on this device: see the head of this file."""
    weights = sum(parameter.numel() for parameter in engine.model.parameters())
    head = engine.model.lm_head.weight.numel()
    num_bytes = engine.kv_cache.element_size()
    kv_bytes = engine.kv_cache[:, :, 0, 0].nbytes             # of one token
    read = sum(sum(range(len(prompt), len(prompt) + most))
               for prompt, most in zip(prompts, lengths, strict=True))
    untied = 0 if engine.model.config.tie_word_embeddings else head      # the table is not read
    return ((max(lengths) * (weights - untied) * num_bytes + read * kv_bytes) / bandwidth
            + 2 * sum(map(len, prompts)) * (weights - head - untied) / flops)


def measure_workload(args) -> None:
    """Print how near the engine comes to the floor, round by round."""
    from nanopaged import LLM, SamplingParams

    settings = {"enable_prefix_caching": False, "enforce_eager": args.eager, "max_num_seqs": 512}
    with tempfile.TemporaryDirectory() as folder:
        if args.model in SHAPES:
            (Path(folder) / "config.json").write_text(json.dumps(SHAPES[args.model]))
            settings |= {"load_format": "dummy", "skip_tokenizer_init": True}
        else:
            folder = smollm2.folder() if args.model == "smollm2" else args.model
        llm = LLM(str(folder), **settings)
    engine, device = llm.engine, llm.engine.kv_cache.device.type
    ready = process_age()
    prompts, lengths = make_workload(args.workload)
    params = [SamplingParams(temperature=0.6, max_tokens=most, ignore_eos=True, seed=i)
              for i, most in enumerate(lengths)]
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    bandwidth, flops = device_rates(device, engine.kv_cache.dtype)
    floor = floor_seconds(engine, prompts, lengths, bandwidth, flops)
    print(f"{args.model}, {args.workload}, {name}, torch {torch.__version__}"
          f"{', eager' if args.eager else ''}: ready after {ready:.1f} s; "
          f"copy {bandwidth / 1e9:,.0f} GB/s, product {flops / 1e12:,.2f} TFLOP/s")
    if engine.graphs:
        with torch.inference_mode():
            print_replays(engine)
    if device == "cpu":                    # here the host waits while it computes
        forward = engine.model.forward
        engine.model.forward = lambda *args: engine._wait(functools.partial(forward, *args))
    for round_id in range(args.rounds):
        before, start = engine.counts.copy(), time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds, counts = time.perf_counter() - start, engine.counts - before
        num_tokens = sum(len(out.outputs[0].token_ids) for out in outputs)
        assert num_tokens == sum(lengths), f"{num_tokens} tokens, not {sum(lengths)}"
        host, steps = seconds - counts["seconds_waited"], counts["steps"]
        print(f"  round {round_id + 1}: {num_tokens / seconds:10,.1f} tokens/s, "
              f"{floor / seconds:.1%} of the roofline; host {host / steps * 1e6:,.0f} us a step, "
              f"{host / seconds:.1%} of the time", flush=True)


def print_replays(engine, context: int = 800, rounds: int = 20) -> None:
    """Print the device's milliseconds for a decode step, and for its last part, the draw."""
    import kernels

    for size, num_seqs in ((1, 1), (256, 256)):
        if size not in engine.graphs.graphs:
            continue
        batch = engine.graphs.graphs[size]
        num_columns = min(batch.block_tables.shape[1], -(-(context + 64) // engine.pool.block_size))
        table = batch.block_tables[:, :num_columns]
        blocks = torch.arange(table.numel(), device=table.device) % engine.pool.num_blocks
        table.copy_(blocks.view_as(table))
        runs = {"a replay": batch.graph.replay}
        for name, draw in (("its draw", engine.graphs.draw),
                           ("the same, not compiled", kernels.draw_reference)):
            with torch.cuda.graph(captured := torch.cuda.CUDAGraph()):
                draw(batch.logits, False, batch.seeds, batch.context_lens, batch.options)
            runs[name] = captured.replay
        for name, run in runs.items():
            batch.context_lens.zero_()
            batch.context_lens[:num_seqs] = context
            run()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(rounds):
                run()
            end.record()
            end.synchronize()
            print(f"  {name} for {num_seqs} x {context}: {start.elapsed_time(end) / rounds:.3f} ms")


def process_age() -> float:
    """Seconds since this process was started; NaN where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return float("nan")


# ---- the report ---------------------------------------------------------------------------------


def cpu_name() -> str:
    """Name the processor as its maker does, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_speeds(title: str, speeds: dict[str, float], agreement: float) -> None:
    """Print one line a workload: tokens/s of each engine, and nanopaged's ratio to each peer."""
    cells = "".join(f"{speed:>14.1f}" for speed in speeds.values())
    ours, *peers = speeds.values()
    ratios = "".join(f"{ours / peer:>9.2f}x" for peer in peers)
    note = f"   {agreement:.0%} of tokens the same" if peers else ""
    print(f"{title:<28}{cells}{ratios}{note}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2",
                        help="a model folder, or smollm2 (default); with --workload also 1b, 8b")
    parser.add_argument("--workload", type=workload_name,
                        help="single, nano256, or requests x tokens in x tokens out: 16x64x64")
    parser.add_argument("--eager", action="store_true", help="with --workload: no CUDA graphs")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    """Run the three measurements and print each as soon as it is known."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.workload:
        return measure_workload(args)
    folder = smollm2.folder() if args.model == "smollm2" else Path(args.model)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{folder.name}, float32, {args.prompt_len} tokens in, {args.max_tokens} out")
    print(f"torch {torch.__version__}, {args.threads} threads, {cpu_name()} ({capability})\n")

    engines = load_engines(folder)
    heads = "".join(f"{name:>14}" for name in engines)
    print(f"{'output tokens/s':<28}{heads}{'ratio' if len(engines) > 1 else '':>10}")
    for num_requests in (1, args.requests):
        title = "one request" if num_requests == 1 else f"{num_requests} requests together"
        print_speeds(title, *measure(engines, num_requests, args))

    print("\nseconds to the first token, process start included")
    default = first_token_seconds([], args)
    print(f"{'the default model':<28}{default:>14.2f}", flush=True)
    chosen = first_token_seconds(["--model", str(folder)], args)
    print(f"{folder.name:<28}{chosen:>14.2f}")


if __name__ == "__main__":
    try:
        main()
    except (smollm2.ModelUnavailable, subprocess.SubprocessError) as error:
        print(f"bench_engine: {error}", file=sys.stderr)
        sys.exit(2)
