"""What happens when no block is free: somebody gives all of theirs back, and comes again.

    python tutorial/07_preemption/dry.py

    running  A  B  C      C, the latest, is preempted:   recompute: blocks freed, tokens kept
                   |                                     swap: blocks moved to the CPU's memory
    waiting  C  D  E  <---+  before all who wait

First chapter 6's simulation in ever smaller pools; then the paper's two requests, block by block;
then the tiny model, whose texts must not change.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tutorial" / chapter)
                             for chapter in ("02_contiguous", "06_continuous_batching"))]

from batches import MANY, SEATS, continuous  # noqa: E402
from waste import draw_requests  # noqa: E402

from nanopaged import (  # noqa: E402
    LLM,
    BlockPool,
    SamplingParams,
    Scheduler,
    Sequence,
    SequenceGroup,
)

POOLS = (4096, 600, 400, 200)                      # the longest request alone takes 128
PROMPTS = {"a": "Four score and seven years ago our", "b": "ROMEO:", "c": "JULIET:\nO"}
ROOMY, TIGHT = 64, 14                              # blocks of 4 for the tiny model
BLOCK_BYTES = 4 * 3072                             # tiny's K and V of 4 tokens (chapter 1)


# ---- ever smaller pools ------------------------------------------------------------------------


def serve(num_blocks, kind=Scheduler):
    """Chapter 6's requests in a pool of blocks -> (steps, requests a step, tokens computed)."""
    requests, steps, running, computed = draw_requests(4, 0)[:MANY], 0, 0, 0
    for plan, _ in continuous(requests, SEATS, 512, num_blocks, kind):
        steps, running, computed = steps + 1, running + len(plan), computed + sum(plan.values())
    return steps, running / steps, computed


# ---- the paper's two requests ------------------------------------------------------------------


def paper_example():
    """Yield (step, who was preempted, [(name, tokens computed, block table), ...])."""
    pool, params = BlockPool(8, 4), SamplingParams(max_tokens=3)
    others, before = Sequence([], params), Sequence([], params)
    pool.hold(others, [0, 2, 4, 5, 6], 0)          # somebody else's, all the time
    pool.hold(before, [3, 1, 7], 0)
    pool.free(before)                              # the last goes first: 7, 1, 3 is now their order
    scheduler = Scheduler(pool, BlockPool(0, 4), "recompute", max_num_seqs=2,
                          max_num_batched_tokens=64)
    names = {}
    for name, prompt_len in (("A", 7), ("B", 3)):
        group = SequenceGroup(len(names), None, [Sequence([0] * prompt_len, params)])
        names[group.seqs[0]] = name
        scheduler.waiting.append(group)
    step = 0
    while scheduler.running or scheduler.waiting:
        ran, step = list(scheduler.running), step + 1
        scheduled = scheduler.schedule()
        yield (step, [names[group.seqs[0]] for group in ran if group not in scheduler.running],
               [(names[seq], num_new, list(seq.block_table)) for seq, num_new in scheduled])
        for seq, num_new in scheduled:             # as in chapter 6
            seq.num_kv += num_new
            if seq.num_kv == seq.num_tokens:
                seq.token_ids.append(0)
        for group in list(scheduler.running):
            if group.seqs[0].num_tokens == group.seqs[0].num_prompt_tokens + params.max_tokens:
                scheduler.finish(group)


# ---- the tiny model ----------------------------------------------------------------------------


def generate(num_blocks, watch=None, **settings):
    """The three prompts together -> (their tokens, stats)."""
    # without the prefix cache, as nothing shall be found again by chance
    llm = LLM(block_size=4, num_blocks=num_blocks, enable_prefix_caching=False, **settings)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    for prompt in PROMPTS.values():
        llm.engine.add_request(prompt, params)
    tokens, before = {}, []
    while llm.engine.has_unfinished_requests():
        outputs = llm.engine.step()
        tokens |= {out.request_id: out.outputs[0].token_ids for out in outputs}
        ended = {out.request_id for out in outputs if out.finished}
        now = [group.request_id for group in llm.engine.scheduler.running]
        if watch:
            watch(llm.stats()["steps"], before, [*now, *ended], ended)
        before = now
    return tokens, llm.stats()


def print_events(step, before, ran, ended):
    """A line for a step in which somebody came, was preempted or ended."""
    names = list(PROMPTS)
    events = [f"{names[i]} {what}" for what, ids in (
        ("comes", sorted({*ran} - {*before})), ("is preempted", sorted({*before} - {*ran})),
        ("ends", sorted(ended))) for i in ids]
    if events:
        print(f"  step {step:2}: {', '.join(events)}")


def main():
    print(f"{MANY} requests of chapter 2, {SEATS} seats, 512 tokens a step")
    needed = sum(r.prompt_len + r.output_len - 1 for r in draw_requests(4, 0)[:MANY])
    print("blocks  steps  requests a step  tokens computed  of them again")
    for num_blocks in POOLS:
        steps, running, computed = serve(num_blocks)
        print(f"{num_blocks:6}{steps:7,}{running:17.1f}{computed:17,}{computed - needed:15,}")

    print("\nthe paper's request A and a request B, B = 4, three blocks: 7, 1, 3")
    for step, preempted, plan in paper_example():
        print(f"  step {step}:", *(f"{name} is preempted;" for name in preempted),
              "; ".join(f"{name} computes {n}, block table {table}" for name, n, table in plan))

    print(f"\nthe tiny model in {TIGHT} blocks of 4, recompute")
    expected, _ = generate(ROOMY)
    generate(TIGHT, print_events)
    print("\n                  steps  tokens computed  preempted  blocks moved    bytes  the same")
    for name, num_blocks, settings in (
            ("64 blocks", ROOMY, {}), ("14, by recompute", TIGHT, {}),
            ("14, by swap", TIGHT, {"preemption": "swap", "swap_blocks": 16})):
        tokens, stats = generate(num_blocks, **settings)
        preempted = stats["preemptions_recompute"] + stats["preemptions_swap"]
        moved = stats["swapped_blocks"]
        print(f"{name:18}{stats['steps']:5}{stats['computed_tokens']:17}{preempted:11}{moved:14}"
              f"{moved * BLOCK_BYTES:9,}{'yes' if tokens == expected else 'NO':>10}")


if __name__ == "__main__":
    main()
