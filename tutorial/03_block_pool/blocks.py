"""Blocks on demand: one request's life, the paper's Fig 6, and twelve texts of a real model.

    python tutorial/03_block_pool/blocks.py

    measure_the_problem    chapter 2's policies: how full is what a request holds, while it lives?
    walk_through           the engine's BlockPool, and the block ids of the paper
    run_texts              the engine and the tiny model, beside chapter 2's buddy allocator
"""

import sys
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TUTORIAL.parent), str(TUTORIAL / "02_contiguous")]

import waste  # noqa: E402

from nanopaged import LLM, BlockPool, SamplingParams, Sequence, torch  # noqa: E402

SPEAKERS = ("ROMEO:", "JULIET:", "MERCUTIO:", "Nurse:", "BENVOLIO:", "TYBALT:", "KING HENRY:",
            "QUEEN:", "GLOUCESTER:", "Servant:", "PETRUCHIO:", "KATHARINA:")
OUTPUT_LENS = (8, 16, 24, 32, 40, 48) * 2          # tokens that each text gets
NUM_BLOCKS, BLOCK_SIZE = 64, 4                     # 256 slots: what one longest text of tiny needs


def measure_the_problem(prompt_len=161, output_len=338):
    """What chapter 2's policies and blocks hold for one request, and how full that is."""
    request = waste.Request(0.0, prompt_len, output_len)
    life = range(prompt_len, prompt_len + output_len)          # num_kv, step by step
    size = waste.BLOCK_SIZE
    print(f"one request, {prompt_len} tokens of prompt, {output_len} of output: slots held\n"
          f"{'':16}first step   last step   filled on average")
    for policy, estimate in waste.ESTIMATES.items():
        length = min(prompt_len + estimate(request), waste.MAX_LEN)
        _, num_blocks = waste.BuddyAllocator(waste.NUM_BLOCKS).allocate(-(-length // size))
        print_row(policy, [num_blocks * size for _ in life], life)
    print_row("Blocks", [-(-num_kv // size) * size for num_kv in life], life)


def print_row(name, held, life):
    share = sum(num_kv / slots for num_kv, slots in zip(life, held, strict=True)) / len(held)
    print(f"{name:16}{held[0]:10}{held[-1]:12}{share:20.1%}")


def make_pool(num_blocks, next_ids):
    """A pool of blocks of 4 that will hand out `next_ids` first, and all others are held."""
    pool, holders = BlockPool(num_blocks, 4), [Sequence([], SamplingParams()) for _ in next_ids]
    pool.hold(others := Sequence([], SamplingParams()), list(range(num_blocks)), 0)
    for holder, block_id in zip(holders, next_ids, strict=True):
        others.block_table.remove(block_id)        # its row moves to a table of its own ...
        holder.block_table.append(block_id)
    pool.free(*holders)                            # ... and is given back in the order of next_ids
    return pool


def walk_through():
    """The paper's Fig 6: a prompt of 7 tokens, then one token a step."""
    pool, seq = make_pool(8, [7, 1, 3]), Sequence(range(7), SamplingParams())
    print("\nFig 6: blocks of 4; 7, 1 and 3 are free\n"
          "append   needs   block table   num_kv   blocks free")
    for num_new in (7, 1, 1):
        needed = pool.num_needed([(seq, num_new)])
        pool.append(seq, num_new)
        seq.num_kv += num_new                      # the step has computed them
        seq.token_ids.append(0)                    # and a token was sampled
        print(f"{num_new:6}{needed:8}   {seq.block_table!s:14}{seq.num_kv:6}{pool.num_free:14}")
    pool.free(seq)
    print(f"  free           {seq.block_table!s:14}{seq.num_kv:6}{pool.num_free:14}")


def run_texts():
    """Twelve texts in a memory for one: who fits at once, and what the engine does."""
    llm = LLM(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
    longest = llm.engine.max_model_len
    print(f"\n{len(SPEAKERS)} texts in {NUM_BLOCKS} blocks of {BLOCK_SIZE}: texts at once")
    for policy, estimate in waste.ESTIMATES.items():
        allocator, num_fit = waste.BuddyAllocator(NUM_BLOCKS, max_chunk=NUM_BLOCKS), 0
        for speaker, output_len in zip(SPEAKERS, OUTPUT_LENS, strict=True):
            prompt_len = len(llm.tokenizer.encode(speaker))
            request = waste.Request(0.0, prompt_len, output_len)
            length = min(prompt_len + estimate(request), longest)
            if allocator.allocate(-(-length // BLOCK_SIZE)) is None:
                break
            num_fit += 1
        print(f"{policy:16}{num_fit:3}")

    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in OUTPUT_LENS]
    requests = [llm.engine.add_request(speaker, one)
                for speaker, one in zip(SPEAKERS, params, strict=True)]
    running = []
    while llm.engine.has_unfinished_requests():
        llm.engine.step(lambda engine: running.append(len(engine.scheduler.running)))
    stats = llm.stats()
    print(f"{'Blocks':16}{max(running):3}")
    print(f"{len(requests)} texts in {stats['steps']} steps, {stats['preemptions_recompute']} "
          f"preempted; {stats['blocks_peak']} of {NUM_BLOCKS} blocks at the peak; "
          f"{stats['kv_tokens']:.1%} of the held slots filled")


def main():
    torch.set_num_threads(1)                       # the tiny model's matrices are too small for two
    measure_the_problem()
    walk_through()
    run_texts()


if __name__ == "__main__":
    main()
