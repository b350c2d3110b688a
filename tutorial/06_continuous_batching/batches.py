"""Who computes what in which step: static batches beside nanopaged's own Scheduler, counted.

    python tutorial/06_continuous_batching/batches.py

    requests --> static()      --> plans: {request: tokens it computes}  --> draw(), measure()
             --> continuous()      and padding, for each step
                    ask Scheduler.schedule(); raise num_kv; whoever has all its K and V gets a
                    token; whoever has ended leaves

No model is run, as no plan depends on what the tokens say. The clock counts steps. The lengths are
chapter 2's.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorial" / "02_contiguous")]

from waste import Request, draw_requests  # noqa: E402

from nanopaged import BlockPool, SamplingParams, Scheduler, Sequence, SequenceGroup  # noqa: E402

# The paper's prompts of 7 and of 3 tokens, and three more: (arrival, prompt, output).
EXAMPLE = {"A": Request(0, 7, 3), "B": Request(0, 3, 6), "C": Request(0, 4, 2),
           "D": Request(0, 2, 4), "E": Request(0, 5, 3)}
MANY, SEATS = 128, 16                              # requests of chapter 2, places in a batch
NO_LIMIT = 1 << 20                                 # tokens a step: each prompt as a whole


def static(requests, num_seats):
    """Batches of the earliest requests; the next begins when the last of one has ended.

    Yields for each step ({number of a request: tokens it computes}, rows that are padding).
    """
    for first in range(0, len(requests), num_seats):
        batch = dict(list(enumerate(requests))[first:first + num_seats])
        longest = max(request.prompt_len for request in batch.values())
        plan = {number: request.prompt_len for number, request in batch.items()}
        yield plan, num_seats * longest - sum(plan.values())   # prompts, filled up to the longest
        for step in range(1, max(request.output_len for request in batch.values())):
            plan = {number: 1 for number, request in batch.items() if step < request.output_len}
            yield plan, num_seats - len(plan)      # who has ended still has its row


def continuous(requests, num_seats, budget, num_blocks=4096, kind=Scheduler):
    """The engine's Scheduler, asked before each step; yields as static() does."""
    scheduler = kind(BlockPool(num_blocks, 16), BlockPool(0, 16), "recompute",
                     max_num_seqs=num_seats, max_num_batched_tokens=budget)
    for number, request in enumerate(requests):
        seq = Sequence([0] * request.prompt_len, SamplingParams(max_tokens=request.output_len))
        scheduler.waiting.append(SequenceGroup(number, None, [seq]))
    while scheduler.waiting or scheduler.running:
        scheduled = scheduler.schedule()
        number_of = {group.seqs[0]: group.request_id for group in scheduler.running}
        yield {number_of[seq]: num_new for seq, num_new in scheduled}, 0   # flat: nothing is padded
        for seq, num_new in scheduled:             # what Engine.step() does, without a model
            seq.num_kv += num_new
            if seq.num_kv == seq.num_tokens:       # the last known token was computed: sample
                seq.token_ids.append(0)
                if seq.num_tokens == seq.num_prompt_tokens + seq.params.max_tokens:
                    seq.finish_reason = "length"
        for group in [group for group in scheduler.running if not group.unfinished()]:
            scheduler.finish(group)


def draw(plans, names):
    """A line for each request: how many tokens it computes in which step."""
    plans = [plan for plan, _ in plans]
    print("  step", *(f"{step:2}" for step in range(1, len(plans) + 1)))
    for number, name in enumerate(names):
        cells = [plan.get(number, "") for plan in plans]
        print(f"  {name:4}", " ".join(f"{cell:2}" for cell in cells).rstrip())
    print(f"  {'rows':4}", *(f"{sum(plan.values()):2}" for plan in plans))


def measure(plans, requests, num_seats):
    """What it took to serve all -> steps, share of rows and of seats in use, rows of the largest
    step, and the mean step of the first token and of the last."""
    steps = rows = padding = seats = largest = 0
    computed, first, last = [0] * len(requests), {}, {}
    for steps, (plan, padded) in enumerate(plans, 1):
        rows, padding, seats = rows + sum(plan.values()), padding + padded, seats + len(plan)
        largest = max(largest, sum(plan.values()) + padded)
        for number, num_new in plan.items():
            computed[number] += num_new
            if computed[number] >= requests[number].prompt_len:        # this step brings a token
                first.setdefault(number, steps)
                last[number] = steps
    return (steps, rows / (rows + padding), seats / (steps * num_seats), largest,
            sum(first.values()) / len(first), sum(last.values()) / len(last))


def main():
    small = list(EXAMPLE.values())
    for title, plans in (("static batches, three seats", static(small, 3)),
                         ("iteration by iteration, three seats", continuous(small, 3, NO_LIMIT)),
                         ("... and at most 4 tokens a step", continuous(small, 3, 4))):
        print(title)
        draw(plans, EXAMPLE)
        print()

    requests = draw_requests(4, 0)[:MANY]
    total = sum(request.prompt_len + request.output_len - 1 for request in requests)
    print(f"{MANY} requests of chapter 2: {total:,} tokens to compute")
    print(f"{f'{SEATS} seats':24}  steps  rows used  seats used  largest step",
          " first token  last token")
    for title, plans in (("static batches", static(requests, SEATS)),
                         ("iteration by iteration", continuous(requests, SEATS, NO_LIMIT)),
                         ("... 512 tokens a step", continuous(requests, SEATS, 512)),
                         ("... 64 tokens a step", continuous(requests, SEATS, 64))):
        steps, rows, seats, largest, first, last = measure(plans, requests, SEATS)
        print(f"{title:24}{steps:7,}{rows:11.0%}{seats:12.0%}{largest:14,}{first:13,.0f}"
              f"{last:12,.0f}")


if __name__ == "__main__":
    main()
