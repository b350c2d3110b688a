"""Several texts from one prompt: each on its own, and with shared blocks that are copied late.

    python tutorial/08_copy_on_write/share.py

    measure_the_problem    four texts of the tiny model: as four requests, and as one with n = 4
    walk_through           the engine's BlockPool, and the block ids of the paper's Fig 8
    measure_saving         what sharing saves for 2, 4 and 6 texts, as in the paper's Fig 15
"""

import sys
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TUTORIAL.parent), str(TUTORIAL / "03_block_pool")]

from blocks import make_pool  # noqa: E402

from nanopaged import LLM, SamplingParams, Sequence, torch  # noqa: E402

PROMPT = """ROMEO:
Have I not reason, being here alone,
To speak of love, and of what love has done?

JULIET:
"""
MAX_TOKENS = 24


def run(all_params, **settings):
    """Generate from PROMPT, once for each of `all_params` and all together -> (texts, stats)."""
    llm = LLM(block_size=4, num_blocks=256, enable_prefix_caching=False, **settings)
    outputs = llm.generate([PROMPT] * len(all_params), all_params)
    return [text.text for output in outputs for text in output.outputs], llm.stats()


def make_params(n=1, seed=0):
    return SamplingParams(n=n, seed=seed, temperature=0.8, ignore_eos=True, max_tokens=MAX_TOKENS)


def print_row(name, stats):
    print(f"{name:22}{stats['computed_tokens']:15}{stats['blocks_peak']:20}"
          f"{stats['copied_blocks']:8}")


def measure_the_problem():
    """The same four texts, as four requests and as one: text i is drawn with seed + i."""
    print(f"4 texts of {MAX_TOKENS} tokens\n"
          f"{'':22}computed tokens  blocks at the peak  copies")
    apart, stats = run([make_params(seed=seed) for seed in range(4)])
    print_row("4 requests", stats)
    together, stats = run([make_params(n=4)])
    print_row("1 request with n = 4", stats)
    print("the same texts:", "yes" if together == apart else "NO")


def walk_through():
    """The paper's Fig 8: two samples of a prompt of 7 tokens."""
    pool, a1 = make_pool(8, [7, 1, 3]), Sequence(range(7), SamplingParams())
    print("\nFig 8: blocks of 4; 7, 1 and 3 are free\n"
          "             A1       A2       copied   blocks free")

    def show(what, a2_table=()):
        copied = ", ".join(f"{source} -> {to}" for source, to in pool.copies)
        print(f"{what:13}{a1.block_table!s:9}{a2_table or '':9}{copied:9}{pool.num_free:11}")
        pool.copies.clear()                        # the engine has copied them

    pool.append(a1, 7)
    a1.num_kv = 7
    show("7 tokens")
    a2 = a1.fork()
    pool.fork(a1, a2)
    show("fork", str(a2.block_table))
    for name, seq in (("A1 writes", a1), ("A2 writes", a2)):
        seq.token_ids.append(0)                    # what it has sampled
        pool.append(seq, 1)
        seq.num_kv += 1
        show(name, str(a2.block_table))
    pool.free(a1)
    show("A1 ends", str(a2.block_table))


def measure_saving():
    """Blocks with and without sharing, at the peak; and the mean share of them that was saved."""
    print("\nblocks at the peak: texts apart, and sharing\n"
          "texts   apart  shared  saved on average  copies")
    for n in (2, 4, 6):
        _, apart = run([make_params(seed=seed) for seed in range(n)])
        _, shared = run([make_params(n=n)])
        print(f"{n:5}{apart['blocks_peak']:8}{shared['blocks_peak']:8}"
              f"{shared['blocks_saved']:18.1%}{shared['copied_blocks']:8}")


def main():
    torch.set_num_threads(1)                       # the tiny model's matrices are too small for two
    measure_the_problem()
    walk_through()
    measure_saving()


if __name__ == "__main__":
    main()
