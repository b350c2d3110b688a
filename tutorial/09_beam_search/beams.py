"""Beam search over shared blocks: every step forks all beams, and frees what nobody goes on from.

    python tutorial/09_beam_search/beams.py

    measure_the_problem    the same search with requests, with whole caches copied, with forks
    walk_through           the engine's BlockPool, and the block ids of the paper's Fig 9
    draw_steps             which blocks the beams of a real model share, step by step
    measure_saving         what sharing saves for 2, 4 and 6 beams, as in the paper's Fig 15
"""

import sys
from collections import Counter
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TUTORIAL.parent), str(TUTORIAL / "08_copy_on_write")]

from share import MAX_TOKENS, PROMPT  # noqa: E402

import nanopaged  # noqa: E402
from nanopaged import BeamSearchParams, BlockPool, SamplingParams, Sequence  # noqa: E402


def chain(block_ids):
    return "-".join(map(str, block_ids))


def make_llm():
    return nanopaged.LLM(block_size=4, num_blocks=256, enable_prefix_caching=False)


class Watcher:
    """Looks at the beams after each step of a search, when those of the step before are freed."""

    def __init__(self, drawn=()):
        self.drawn, self.before = drawn, []        # the steps to draw; texts of the step before
        self.copied_tokens = self.rows_peak = self.blocks_peak = 0

    def __call__(self, engine):
        pool, beams = engine.pool, engine.scheduler.running[0].unfinished()
        parents = [seq.token_ids[:-1] for seq in beams]        # a beam is its parent and a token
        # If each beam had its K and V alone: one child keeps its parent's, the others copy them.
        self.copied_tokens += sum((num - 1) * len(text) for text, num in
                                  Counter(map(tuple, parents)).items())
        # What the next step holds, before it drops anything.
        held = pool.num_blocks - pool.num_free
        self.blocks_peak = max(self.blocks_peak, held + pool.num_needed([(s, 1) for s in beams]))
        self.rows_peak = max(self.rows_peak, sum(-(-(seq.num_kv + 1) // 4) for seq in beams))
        if engine.counts["steps"] in self.drawn:
            print(f"step {engine.counts['steps']}: {sum(len(seq.block_table) for seq in beams)} "
                  f"rows, {held} blocks")
            self.draw(engine, beams, ["abc"[self.before.index(parent)] for parent in parents])
        self.before = [seq.token_ids for seq in beams]

    def draw(self, engine, beams, parents):
        """A line a beam: whose child it is, its table (a dot: the block above), its new text."""
        above = [None] * len(beams[0].block_table)
        for letter, seq, parent in zip("abc", beams, parents, strict=True):
            table = chain("." if block_id == other else block_id for block_id, other in
                          zip(seq.block_table, above, strict=True))
            text = engine.tokenizer.decode(seq.token_ids[seq.num_prompt_tokens:])
            print(f"  {letter} from {parent}   {table:11}   {text!r}")
            above = seq.block_table


def search(width, watch, prompt=PROMPT, max_tokens=MAX_TOKENS):
    """Beam search in the engine -> (token ids of its texts, best first, stats)."""
    llm = make_llm()
    llm.engine.add_request(prompt, BeamSearchParams(width, max_tokens, ignore_eos=True))
    while llm.engine.has_unfinished_requests():
        output, = llm.engine.step(watch)
    return [text.token_ids for text in output.outputs], llm.stats()


def search_by_requests(width):
    """The same with what we had: in each step each beam is a request for one token."""
    llm = make_llm()
    prompt, beams = llm.tokenizer.encode(PROMPT), [(0.0, [])]
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=width, ignore_eos=True)
    for _ in range(MAX_TOKENS):
        outputs = llm.generate([prompt + tokens for _, tokens in beams], params)
        successors = [(total + logprob, [*tokens, token_id])
                      for (total, tokens), output in zip(beams, outputs, strict=True)
                      for token_id, logprob in output.outputs[0].logprobs[0].items()]
        beams = sorted(successors, reverse=True)[:width]
    return [tokens for _, tokens in beams], llm.stats()


def measure_the_problem():
    """Three ways to do one search."""
    print(f"4 beams of {MAX_TOKENS} tokens\n"
          f"{'':22}computed tokens  copied tokens  blocks at the peak")
    expected, theirs = search_by_requests(4)
    texts, ours = search(4, watcher := Watcher())
    for name, stats, copied, blocks in (
            ("requests", theirs, 0, theirs["blocks_peak"]),
            ("whole caches copied", ours, watcher.copied_tokens, watcher.rows_peak),
            ("blocks shared", ours, 4 * ours["copied_blocks"], watcher.blocks_peak)):
        print(f"{name:22}{stats['computed_tokens']:15,}{copied:15,}{blocks:20}")
    print("the same texts:", "yes" if texts == expected else "NO")


def walk_through():
    """The paper's Fig 9: the best four successors are children of beams 1 and 2."""
    pool, beams = BlockPool(13, 4), []
    for table in ([0, 1, 3, 5], [0, 1, 3, 6], [0, 1, 3, 7], [0, 2, 4, 8]):
        beams.append(Sequence(range(16), BeamSearchParams()))
        pool.hold(beams[-1], table, 16)

    def show(what, seqs):
        print(f"{what:9}", *(f"{chain(seq.block_table):11}" for seq in seqs), *pool.free_blocks)

    print(f"\nFig 9: blocks of 4\n{'':58}free blocks")
    show("beams", beams)
    children = []
    for parent in (beams[1], beams[1], beams[2], beams[2]):
        children.append(parent.fork())
        pool.fork(parent, children[-1])
    pool.free(*beams)
    show("children", children)
    for child in children:
        child.token_ids.append(0)                  # what was chosen for it
        pool.append(child, 1)
    show("write", children)


def draw_steps():
    """Three beams of the tiny model; a table's dot is the block of the line above."""
    print("\n3 beams after 12 tokens of prompt")
    search(3, Watcher(range(4, 7)), "Four score and seven years ago our", 8)


def measure_saving():
    """Blocks with and without sharing, at the peak; and the mean share of them that was saved."""
    print("\nbeams  forks  copies   apart  shared  saved on average")
    for width in (2, 4, 6):
        _, stats = search(width, watcher := Watcher())
        print(f"{width:5}{stats['forks']:7}{stats['copied_blocks']:8}{watcher.rows_peak:8}"
              f"{watcher.blocks_peak:8}{stats['blocks_saved']:18.1%}")


def main():
    nanopaged.torch.set_num_threads(1)             # the model's matrices are too small for two
    measure_the_problem()
    walk_through()
    draw_steps()
    measure_saving()


if __name__ == "__main__":
    main()
