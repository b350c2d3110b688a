"""Texts that begin alike: computed again each time, and found in the prefix cache.

    python tutorial/10_prefix_cache/prefixes.py

    measure_the_problem    a dialogue with the tiny model, whose prompt is all that was said so far
    walk_through           the engine's BlockPool: what is published, found, and lost again
    measure_the_pool       the dialogue once more, with somebody else's texts in between
"""

import sys
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TUTORIAL.parent), str(TUTORIAL / "03_block_pool")]

from blocks import make_pool  # noqa: E402

from nanopaged import LLM, SamplingParams, Sequence, torch  # noqa: E402

LINES = ("ROMEO:\nIs it so early, that the day is young?\n\nJULIET:\n",
         "\n\nROMEO:\nWhat is her name, and in whose house was she born?\n\nJULIET:\n",
         "\n\nROMEO:\nThen let us go, and think of this no more.\n\nJULIET:\n",
         "\n\nROMEO:\nFarewell.\n\nJULIET:\n")
PARAMS = SamplingParams(temperature=0, ignore_eos=True, max_tokens=16)
WORDS = "Four score and seven years ago our fathers brought".split()


def run_dialogue(other_tokens=0, **settings):
    """-> [(prompt tokens, of these found in the cache, tokens computed) of each turn], texts.

    Between the turns somebody else has a text of `other_tokens` tokens computed.
    """
    llm, history, turns, texts = LLM(block_size=4, **settings), [], [], []
    for turn, line in enumerate(LINES):
        history += llm.tokenizer.encode(line)
        before = llm.stats()["computed_tokens"]
        output, = llm.generate(history, PARAMS)
        turns.append((len(history), output.num_cached_tokens,
                      llm.stats()["computed_tokens"] - before))
        history += output.outputs[0].token_ids
        texts.append(output.outputs[0].text)
        if other_tokens:
            llm.generate([turn + 1] * other_tokens, SamplingParams(temperature=0, max_tokens=1))
    return turns, texts


def measure_the_problem():
    """What each turn of a dialogue computes, without the cache and with it."""
    without, texts = run_dialogue(num_blocks=64, enable_prefix_caching=False)
    cached, same_texts = run_dialogue(num_blocks=64)
    print("a dialogue of four turns: tokens\n"
          "turn   in the prompt   computed   with the cache: found   computed")
    for turn, (one, other) in enumerate(zip(without, cached, strict=True), 1):
        print(f"{turn:4}{one[0]:16}{one[2]:11}{other[1]:24}{other[2]:11}")
    print(f"{'all':4}{'':16}{sum(turn[2] for turn in without):11}"
          f"{sum(turn[1] for turn in cached):24}{sum(turn[2] for turn in cached):11}")
    print("the same texts:", "yes" if texts == same_texts else "NO")


def compute(pool, seq, num_new):
    """What a step does: room, K and V, and then what is full is published."""
    pool.append(seq, num_new)
    pool.publish(seq, num_new)
    seq.num_kv += num_new


def walk_through():
    """The paper's seven tokens: found block by block, and lost from the end."""
    ids = {word: i for i, word in enumerate(WORDS)}
    pool, a = make_pool(8, [7, 1, 3]), Sequence([ids[word] for word in WORDS[:7]], PARAMS)
    later, b = Sequence(list(ids.values()), PARAMS), Sequence([99] * 12, PARAMS)
    print('\nblocks of 4; 7, 1 and 3 are free. What does a text find that begins "Four score and\n'
          'seven years ago our fathers brought"?')

    def show(what):
        print(f"{what:46}{pool.find_prefix(later)!s:8}{pool.num_free} free")

    show("nothing was computed")
    compute(pool, a, 7)
    show(f"A has computed 7 tokens in {a.block_table}")
    a.token_ids.append(ids["fathers"])
    compute(pool, a, 1)
    show('A has computed "fathers" as well')
    pool.free(a)
    show("A has ended")
    for num_new in (4, 4, 4):
        compute(pool, b, num_new)
        show(f"B has computed {b.num_kv} other tokens in {b.block_table}")


def measure_the_pool():
    """The cache is nothing but free blocks: who needs them takes them."""
    print("\nthe dialogue, with a text of 128 tokens between the turns: tokens found in turn\n"
          "blocks in the pool     1     2     3     4")
    for num_blocks in (128, 64, 56, 48, 40):
        turns, _ = run_dialogue(128, num_blocks=num_blocks)
        print(f"{num_blocks:18}", *(f"{found:5}" for _, found, _ in turns))


def main():
    torch.set_num_threads(1)                       # the tiny model's matrices are too small for two
    measure_the_problem()
    walk_through()
    measure_the_pool()


if __name__ == "__main__":
    main()
