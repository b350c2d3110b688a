"""How much of the KV memory holds anything? Three contiguous policies and blocks, simulated.

    python tutorial/02_contiguous/waste.py [--seeds N]

    draw_requests --> waiting [..] --admit--> running [..] --finish--> memory is free again
    Poisson arrivals,     |                      |
    ShareGPT lengths      | ContiguousServer     | step(): each running request computes one token
                          | PagedServer          | more, a newcomer its whole prompt
                          v                      v
                   where is room?          whose are the slots now?     -> the two tables

No model is run. Where K and V lie, and who may run, depends on lengths and on the clock, not on
what the tokens say; so each iteration is a few integers and a formula for its seconds, and 15
minutes of a busy A100 pass in seconds. Nothing beside the standard library is used but nanopaged:
the paged policy is the engine's own BlockPool and Scheduler.

"The paper" is Kwon et al., SOSP 2023. A *slot* holds the K and V of one token.
"""

import argparse
import json
import math
import random
import sys
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))         # so that it runs from any folder

from nanopaged import BlockPool, SamplingParams, Scheduler, Sequence, SequenceGroup  # noqa: E402

# OPT-13B on an A100 of 40 GB (paper, Table 1): 12 GB are left for K and V, 15.7K slots.
BLOCK_SIZE = 16
NUM_BLOCKS = 983
NUM_SLOTS = NUM_BLOCKS * BLOCK_SIZE
MAX_LEN = 2048                                     # of prompt and output: OPT's limit
BYTES_PER_TOKEN = 2 * 5120 * 40 * 2                # K and V, hidden size, layers, float16
MAX_CHUNK = 128                                    # blocks: MAX_LEN in one piece
MAX_BATCHED_TOKENS = 2560                          # vLLM's budget of a step at the time

WINDOW = (300, 900)                                # seconds that are averaged (Fig 2)

# The paper's own numbers, of Fig 2 and of Fig 13a.
COLUMNS = ("token states", "reserved", "internal", "external & other")
PAPER_SHARES = {"Orca (Max)": (20.4, 13.3, 57.3, 8.9), "Orca (Pow2)": (26.8, 17.9, 13.6, 41.6),
                "Orca (Oracle)": (38.2, 25.2, 0.0, 36.6), "Blocks": (96.3,)}
PAPER_RUNNING = {"Orca (Max)": 7.00, "Orca (Pow2)": 9.81, "Orca (Oracle)": 13.62, "Blocks": 30.42}


# ---- requests ----------------------------------------------------------------------------------


@dataclass
class Request:
    """What a user brings, and what only the simulation knows: how long the output will be."""
    arrival: float                                 # seconds
    prompt_len: int
    output_len: int


def quantile(percents, values, percent):
    """The value below which `percent` % lie, on a straight line between the known percentiles."""
    i = bisect_right(percents, percent) - 1
    share = (percent - percents[i]) / (percents[i + 1] - percents[i])
    return round(values[i] + share * (values[i + 1] - values[i]))


def draw_lengths(table, rng):
    """Draw (prompt_len, output_len): a bin of the table, then each length within the bin.

    The bins keep that long answers follow long prompts a little more often. Pairs longer than the
    model's limit were never in the data; straight lines between percentiles can make one: again.
    """
    while True:
        lengths = rng.choice(table["bins"])
        output_len = quantile(table["output_percentiles"], lengths["output"], 100 * rng.random())
        prompt_len = quantile(table["input_percentiles"], lengths["input"], 100 * rng.random())
        if prompt_len + output_len < MAX_LEN:
            return prompt_len, output_len


def draw_poisson(mean, rng):
    """How many arrive where `mean` are expected (Knuth: uniform factors until below e^-mean)."""
    count, product, limit = 0, rng.random(), math.exp(-mean)
    while product > limit:
        count, product = count + 1, product * rng.random()
    return count


def draw_requests(rate, seed):
    """All requests of the simulated time at `rate` a second, in order of arrival.

    Arrivals are drawn for each 10 ms on its own, as the paper's authors did.
    """
    table = json.loads((FOLDER / "sharegpt_lengths.json").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    return [Request(tick / 100, *draw_lengths(table, rng)) for tick in range(100 * WINDOW[1])
            for _ in range(draw_poisson(rate / 100, rng))]


# ---- contiguous --------------------------------------------------------------------------------


class BuddyAllocator:
    """Chunks of 1, 2, 4, ... blocks. Two free halves of a chunk, its buddies, become it again.

    Invariants: a chunk of `size` begins at a multiple of `size`; no block is in two chunks; no two
    buddies are both free, unless together they would exceed MAX_CHUNK.
    """

    def __init__(self, num_blocks, max_chunk=MAX_CHUNK):
        self.max_chunk = max_chunk
        self.free_chunks = {1 << i: set() for i in range(max_chunk.bit_length())}  # size: starts
        # 983 = 7 * 128 + 64 + 16 + 4 + 2 + 1: always the largest that fits, so starts are aligned.
        start = 0
        for size in reversed(self.free_chunks):
            while start + size <= num_blocks:
                self.free_chunks[size].add(start)
                start += size

    def allocate(self, num_blocks):
        """-> (first block, size) of a chunk of at least `num_blocks`, or None: no room."""
        size = 1 << (num_blocks - 1).bit_length()  # 33 blocks take 64: 31 are lost to all
        fits = [s for s in self.free_chunks if s >= size and self.free_chunks[s]]
        if not fits:
            return None                            # though more may be free, in pieces
        start = min(self.free_chunks[fits[0]])
        self.free_chunks[fits[0]].remove(start)
        for half in reversed([s for s in self.free_chunks if size <= s < fits[0]]):
            self.free_chunks[half].add(start + half)  # keep the left half, free the right one
        return start, size

    def free(self, chunk):
        """Take a chunk back, and merge it with its buddy for as long as that is free as a whole."""
        start, size = chunk
        while size < self.max_chunk and start ^ size in self.free_chunks[size]:
            self.free_chunks[size].remove(start ^ size)  # buddies differ in one bit: their size
            start, size = start & ~size, 2 * size
        self.free_chunks[size].add(start)


# Orca's three policies: how many output tokens a request is believed to bring when it is admitted.
ESTIMATES = {
    "Orca (Max)": lambda request: MAX_LEN,
    "Orca (Pow2)": lambda request: 1 << (request.output_len - 1).bit_length(),
    "Orca (Oracle)": lambda request: request.output_len,  # no real system can know this
}


@dataclass
class Running:
    """A request that has its chunk of memory."""
    request: Request
    length: int                                    # slots that it asked for
    chunk: tuple                                   # (first block, size): what it got
    num_kv: int = 0                                # slots that are filled

    def left(self):
        """Tokens to compute until it ends. The last one is only sampled: nobody reads its K, V."""
        return self.request.prompt_len + self.request.output_len - 1 - self.num_kv

    def slots(self):
        """-> (token states, reserved for tokens to come, internal: never to be used)."""
        total = self.request.prompt_len + self.request.output_len
        return self.num_kv, total - self.num_kv, self.length - total


class ContiguousServer:
    """Every request gets one chunk, for as long as it runs; first come, first served."""

    def __init__(self, estimate):
        self.estimate, self.allocator = estimate, BuddyAllocator(NUM_BLOCKS)
        self.waiting, self.running = deque(), []

    def add(self, request):
        self.waiting.append(request)

    def admit(self):
        """Let those run who find room, up to the first who does not: nobody jumps the queue."""
        admitted = []
        while self.waiting:
            request = self.waiting[0]
            length = min(request.prompt_len + self.estimate(request), MAX_LEN)
            chunk = self.allocator.allocate(math.ceil(length / BLOCK_SIZE))
            if chunk is None:
                break
            admitted.append(Running(self.waiting.popleft(), length, chunk))
        self.running += admitted
        return admitted

    def step(self):
        """Run some iterations -> (how many, prompt tokens computed in the first of them).

        While somebody waits, nothing can change before the first request ends: so we go there in
        one stride. What arrives on the way has to queue anyhow.
        """
        admitted = self.admit()
        for running in admitted:
            running.num_kv = running.request.prompt_len - 1  # and one token more, as everyone
        assert self.running, "nobody runs, and the free memory is in pieces too small for anybody"
        num_steps = min(running.left() for running in self.running) if self.waiting else 1
        for running in self.running:
            running.num_kv += num_steps
        return num_steps, sum(running.request.prompt_len for running in admitted)

    def slots(self):
        """-> (requests that run, [token states, reserved, internal])."""
        columns = zip(*(running.slots() for running in self.running), strict=True)
        return len(self.running), [sum(column) for column in columns]

    def finish(self):
        """Free the chunks of those that have all their tokens."""
        for running in self.running:
            if not running.left():
                self.allocator.free(running.chunk)
        self.running = [running for running in self.running if running.left()]


# ---- blocks ------------------------------------------------------------------------------------


class PagedServer:
    """The engine's own block pool and scheduler, with nothing below them."""

    def __init__(self):
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.scheduler = Scheduler(self.pool, BlockPool(0, BLOCK_SIZE), preemption="recompute",
                                   max_num_seqs=256, max_num_batched_tokens=MAX_BATCHED_TOKENS)
        self.waiting = self.scheduler.waiting
        self.num_added, self.changed = 0, True

    @property
    def running(self):
        return [group.seqs[0] for group in self.scheduler.running]

    def add(self, request):
        seq = Sequence([0] * request.prompt_len, SamplingParams(max_tokens=request.output_len))
        self.changed |= not self.waiting           # else somebody is before it
        self.waiting.append(SequenceGroup(self.num_added, None, [seq]))
        self.num_added += 1

    def schedule(self):
        """-> [(sequence, tokens to compute), ...], as Scheduler.schedule(), but asked more rarely.

        It has a choice only after somebody ended or came to an empty queue, when its budget was
        used up, or when the free blocks do not suffice. Otherwise all running requests go on, and
        who stands at a block's edge takes one more. (tests/test_tutorial.py compares the two.)
        """
        running = self.running
        at_edge = [seq for seq in running if seq.num_kv % BLOCK_SIZE == 0]
        if self.changed or len(at_edge) > self.pool.num_free:
            plan = self.scheduler.schedule()
            self.changed = sum(num_new for _, num_new in plan) == MAX_BATCHED_TOKENS
            return plan
        for seq in at_edge:
            self.pool.append(seq, 1)
        return [(seq, 1) for seq in running]

    def step(self):
        """Run one iteration -> (1, prompt tokens computed; of who was preempted, all tokens)."""
        num_prefill = 0
        for seq, num_new in self.schedule():
            seq.num_kv += num_new
            num_prefill += num_new if num_new > 1 else 0  # one token is a decode
            if seq.num_kv == seq.num_tokens:       # all known ones: the next is sampled
                seq.token_ids.append(0)
                if seq.num_tokens == seq.num_prompt_tokens + seq.params.max_tokens:
                    seq.finish_reason = "length"
        return 1, num_prefill

    def slots(self):
        """-> (requests that run, [token states, reserved, internal])."""
        running = self.running
        num_kv = sum([seq.num_kv for seq in running])
        # Only last blocks have unfilled slots, and nearly all of those will be filled. A request's
        # very last block keeps some, for its last few steps: they are counted as reserved, too.
        num_held = self.pool.num_blocks - self.pool.num_free
        return len(running), [num_kv, num_held * BLOCK_SIZE - num_kv, 0]

    def finish(self):
        """Free the blocks of those that have all their tokens."""
        for group in [group for group in self.scheduler.running if group.seqs[0].finish_reason]:
            self.scheduler.finish(group)
            self.changed = True


# ---- the clock ---------------------------------------------------------------------------------


def step_seconds(num_running, num_kv, num_prefill):
    """What an iteration takes: launching it, each request's share, reading K and V, prompts.

    Ours, not the paper's: about what an A100 does, whose memory gives 1.4 TB/s. What fills the
    memory hardly depends on it: a longer step is longer for everybody.
    """
    kv_seconds = num_kv * BYTES_PER_TOKEN / 1.4e12
    return 0.030 + 0.00028 * num_running + kv_seconds + 0.00012 * num_prefill


def simulate(server, requests):
    """Serve `requests` -> (the four shares of the memory in %, requests that run), means over time.

    The fourth share is what remains: chunks rounded up, pieces too small, and what is just free.
    """
    clock, seconds, totals, coming = 0.0, 0.0, [0.0] * 4, deque(requests)
    while clock < WINDOW[1] and (coming or server.running or server.waiting):
        if not (server.running or server.waiting):  # idle until somebody comes
            clock = max(clock, coming[0].arrival)
        while coming and coming[0].arrival <= clock:
            server.add(coming.popleft())
        num_steps, num_prefill = server.step()
        num_running, (tokens, reserved, internal) = server.slots()
        to_come = num_running * (num_steps - 1) / 2  # on average over a stride of many steps
        duration = num_steps * step_seconds(num_running, tokens - to_come, num_prefill / num_steps)
        clock += duration
        if clock > WINDOW[0]:
            seconds += duration
            now = (tokens - to_come, reserved + to_come, internal, num_running)
            totals = [total + duration * value for total, value in zip(totals, now, strict=True)]
        server.finish()
    shares = [100 * total / seconds / NUM_SLOTS for total in totals[:3]]
    return [*shares, 100 - sum(shares)], totals[3] / seconds


# ---- the tables --------------------------------------------------------------------------------


def make_server(policy):
    return ContiguousServer(ESTIMATES[policy]) if policy in ESTIMATES else PagedServer()


def measure(policy, rate, seeds):
    """Simulate a policy for each seed -> (mean shares, mean number of running requests)."""
    runs = [simulate(make_server(policy), draw_requests(rate, seed)) for seed in seeds]
    shares = [sum(column) / len(runs) for column in zip(*(run[0] for run in runs), strict=True)]
    return shares, sum(run[1] for run in runs) / len(runs)


def print_setting(seeds):
    """What is simulated, and how long the requests of its first table are."""
    drawn = [request for seed in seeds for request in draw_requests(4, seed)]
    prompt_len = sum(request.prompt_len for request in drawn) / len(drawn)
    output_len = sum(request.output_len for request in drawn) / len(drawn)
    print(f"memory: {NUM_BLOCKS} blocks of {BLOCK_SIZE} slots, {BYTES_PER_TOKEN // 1024} KB a slot")
    print(f"requests: {prompt_len:.0f} tokens of prompt, {output_len:.0f} of output on average; "
          f"at most {MAX_LEN} together")
    print(f"mean of {len(seeds)} trace{'s' if len(seeds) > 1 else ''}, "
          f"seconds {WINDOW[0]} to {WINDOW[1]}")


def print_shares(seeds):
    """Fig 2. Its columns are 18 characters wide, for the longest name."""
    print("\n% of the slots at 4 requests/s: here (in the paper, Fig 2)")
    print(" " * 13, *(f"{name:>18}" for name in COLUMNS), sep="")
    for policy, printed in PAPER_SHARES.items():
        shares, _ = measure(policy, 4, seeds)
        paper = [f"({number:.1f})" for number in printed] + [""] * (4 - len(printed))
        cells = [f"{share:.1f} {number:>6}" for share, number in zip(shares, paper, strict=True)]
        print("".join([f"{policy:<13}", *(f"{cell:>18}" for cell in cells)]).rstrip(), flush=True)


def print_running(seeds):
    """Fig 13a."""
    print("\nrequests that run together at 2 requests/s: here (in the paper, Fig 13a)")
    for policy, printed in PAPER_RUNNING.items():
        _, num_running = measure(policy, 2, seeds)
        print(f"{policy:<13}{num_running:>8.2f} {f'({printed:.2f})':>8}", flush=True)


class CommandLine(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"waste.py: {message}\n")     # one line, without the usage


def positive(text):
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def main():
    parser = CommandLine(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=positive, default=6, metavar="N",
                        help="traces of requests to average over (6); 1 for the impatient")
    seeds = range(parser.parse_args().seeds)
    print_setting(seeds)
    print_shares(seeds)
    print_running(seeds)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
