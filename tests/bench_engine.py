"""How fast is nanopaged on this CPU, beside transformers' `generate`, in one run?

    python tests/bench_engine.py [--model FOLDER|smollm2] [--requests 16] [--prompt-len 64]
                                 [--max-tokens 64] [--threads N] [--rounds 3]

Three questions, all in float32 and greedy:
  one request       tokens/s of a single sequence: the cost of one step
  many requests     tokens/s of all together, against `generate` one after another: what batching
                    gains, for a step reads every weight once however many sequences share it
  first token       seconds from the start of `python nanopaged.py` to its first byte of output

Only a comparison within one run means anything, so the engines take turns, round by round, and
each figure is the median of its rounds. transformers is no dependency: without it the same
figures are printed, less the comparison. Where other programs run too, give fewer threads than
cores: torch's threads wait for the slowest of them, at every operation.
"""

import argparse
import importlib.util
import os
import platform
import random
import statistics
import subprocess
import sys
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
    parser.add_argument("--model", default="smollm2", help="a model folder, or smollm2 (default)")
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
