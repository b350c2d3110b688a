"""What bookkeeping costs as pool and batch grow: no model is run.

    python tests/bench_growth.py [--rounds 3]

Two tables:
  a block       nanoseconds to allocate, to fork and to free a block of 1,000 sequences, over pools
                of 10,000, 100,000 and 1,000,000 blocks. In the small pool each sequence holds 9
                blocks, in the large one 999: a cost that does not grow with the pool stays as it
                is down the column, but for the caches of the CPU (a list of 1,000,000 integers
                does not fit into them). Fewer blocks share the cost of a call in the small pool.
  a step        microseconds of the scheduler for 64 to 4,096 running sequences that decode one
                token each, and for the step that admitted them all: linear growth is the same cost
                a sequence down the columns.

Each figure is the fastest of its rounds, as other programs only ever make it slower.
"""

import argparse
import gc
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from helpers import make_group, make_scheduler, make_seq  # noqa: E402

from nanopaged import BlockPool  # noqa: E402

NUM_SEQS = 1000
BLOCK_SIZE = 16


def seconds(work, items) -> float:
    """Time work(item) over all items, without the garbage collector's pauses."""
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    for item in items:
        work(item)
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed


def block_costs(num_blocks: int) -> tuple[float, float, float]:
    """Fill a pool with 1,000 sequences, fork each, free all: nanoseconds a block for each."""
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    each = (num_blocks - 1) // NUM_SEQS  # one block is left over, so that the pool is never empty
    parents = [make_seq(0) for _ in range(NUM_SEQS)]
    allocate = seconds(lambda seq: pool.append(seq, each * BLOCK_SIZE), parents)
    for seq in parents:
        seq.num_kv = each * BLOCK_SIZE
    pairs = [(seq, seq.fork()) for seq in parents]
    fork = seconds(lambda pair: pool.fork(*pair), pairs)
    assert pool.num_free == num_blocks - NUM_SEQS * each
    free = seconds(pool.free, parents + [child for _, child in pairs])
    assert pool.num_free == num_blocks
    total = NUM_SEQS * each
    return allocate / total * 1e9, fork / total * 1e9, free / (2 * total) * 1e9


def step_costs(num_seqs: int, num_steps: int = 40) -> tuple[float, float]:
    """Microseconds to schedule `num_seqs` sequences: a step that decodes, one that admits them."""
    scheduler = make_scheduler(8 * num_seqs, BLOCK_SIZE, num_seqs, budget=64 * num_seqs)
    for request_id in range(num_seqs):
        scheduler.waiting.append(make_group(request_id, 20 + request_id % 40, max_tokens=100))
    times = []
    for _ in range(1 + num_steps):  # the first admits all and computes their prompts
        start = time.perf_counter()
        scheduled = scheduler.schedule()
        times.append(time.perf_counter() - start)
        assert len(scheduled) == num_seqs
        for seq, num_new in scheduled:
            seq.num_kv += num_new
            seq.token_ids.append(1)
    admit, *decode = times
    return sum(decode) / num_steps * 1e6, admit * 1e6


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = range(parser.parse_args().rounds)

    print(f"Python {platform.python_version()}, blocks of {BLOCK_SIZE}\n")
    print(f"{NUM_SEQS:,} sequences, nanoseconds a block")
    print(f"{'blocks in the pool':>18}{'a sequence':>12}{'allocate':>10}{'fork':>8}{'free':>8}")
    for num_blocks in (10_000, 100_000, 1_000_000):
        costs = map(min, zip(*(block_costs(num_blocks) for _ in rounds), strict=True))
        allocate, fork, free = costs
        each = (num_blocks - 1) // NUM_SEQS
        print(f"{num_blocks:>18,}{each:>12,}{allocate:>10.0f}{fork:>8.0f}{free:>8.0f}", flush=True)

    print("\nmicroseconds of the scheduler")
    print(f"{'running sequences':>18}{'a step':>10}{'a sequence':>12}{'to admit it':>13}")
    for num_seqs in (64, 256, 1024, 4096):
        step, admit = map(min, zip(*(step_costs(num_seqs) for _ in rounds), strict=True))
        cells = f"{step:>10,.0f}{step / num_seqs:>12.2f}{admit / num_seqs:>13.2f}"
        print(f"{num_seqs:>18,}{cells}", flush=True)


if __name__ == "__main__":
    main()
