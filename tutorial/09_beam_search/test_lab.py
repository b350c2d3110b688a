"""Lab 9's grader: beams are forked, ranked and freed.

    python tutorial/grade.py --lab 9
    python -m pytest tutorial/09_beam_search/test_lab.py -k task_1

A text is called by what it has generated after a prompt of 7 tokens, such as "ab": a token is a
letter, and "." ends a text. Blocks have 4 slots.
"""

import random

from labs import doing, expect, task
from pool_checks import Memory, check_books
from scheduler_checks import make_scheduler

import nanopaged
from nanopaged import BeamSearchParams, SamplingParams, SequenceGroup

PROMPT = [ord("p")] * 7


def make_params(width=2, max_tokens=8, **settings):
    params = BeamSearchParams(beam_width=width, max_tokens=max_tokens, **settings)
    params.stop_token_ids = {ord(".")}
    return params


def make_text(mine, params, logprob=0.0, name="", num_generated=0):
    """A learner's sequence: the prompt and what was generated, none of it in the cache."""
    seq = mine.Sequence(PROMPT, params)
    seq.token_ids += map(ord, name or "x" * num_generated)
    seq.cumulative_logprob = logprob
    return seq


def name_of(seq):
    return "".join(map(chr, seq.token_ids[len(PROMPT):]))


def names(seqs):
    return " ".join(f'"{name_of(seq)}"' for seq in seqs) or "none"


@task(9, 1)
def test_task_1(mine):
    """fork() makes a text of its own, which knows what its parent knows."""
    params = SamplingParams(seed=5)
    parent = mine.Sequence([1, 2, 3], params, cache_salt=object())
    parent.token_ids += [4, 5]
    parent.logprobs, parent.cumulative_logprob = [{4: -1.0}, {5: -0.5}], -1.5
    parent.data, parent.text = b"ab", "ab"
    parent.block_table, parent.num_kv = [7, 1], 5
    with doing("fork() of a text of 5 tokens, 3 of them prompt"):
        child = parent.fork()
    expect(child is not parent, "fork() returned the text itself: there must be two then")
    expect(child.token_ids == [1, 2, 3, 4, 5], f"the child's tokens are {child.token_ids}, the "
           "parent's [1, 2, 3, 4, 5]")
    expect(child.num_prompt_tokens == 3, f"the child's num_prompt_tokens is "
           f"{child.num_prompt_tokens}: what was generated has become prompt, 3 is right")
    expect(child.max_num_tokens == parent.max_num_tokens, "the child's max_num_tokens is "
           f"{child.max_num_tokens}: it may become as long as its parent, "
           f"{parent.max_num_tokens} tokens, and no longer")
    expect(child.block_table == [] and child.num_kv == 0, f"the child's table is "
           f"{child.block_table} and its num_kv {child.num_kv}: [] and 0, as it holds no block "
           "before BlockPool.fork() has counted it as a reader")
    for name in ("cumulative_logprob", "logprobs", "data", "text", "seed", "finish_reason"):
        found, right = getattr(child, name, "missing"), getattr(parent, name)
        expect(found == right, f"the child's {name} is {found!r}, the parent's {right!r}")
    expect(child.cache_salt is parent.cache_salt, "the child's cache_salt is another object than "
           "the parent's: it equals only itself, so a copy of it is another salt")
    child.token_ids.append(6)
    child.logprobs.append({6: -2.0})
    child.block_table.append(3)
    expect(parent.token_ids == [1, 2, 3, 4, 5], "the child got a token, and the parent has it as "
           "well: their token_ids are one list")
    expect(len(parent.logprobs) == 2, "the child got a token, and the parent its logprobs: they "
           "are one list")
    expect(parent.block_table == [7, 1] and parent.num_kv == 5, "fork() changed the parent")


@task(9, 2)
def test_task_2(mine):
    """beam_score() is the sum of log-probabilities over a power of the length."""
    for penalty, num_generated, right in ((1, None, -2.0), (1, 6, -1.0), (0, None, -6.0),
                                          (2, None, -6 / 9), (-1, None, -18.0)):
        seq = make_text(mine, make_params(length_penalty=penalty), -6.0, "abc")
        what = (f"log-probability -6, 3 generated tokens after a prompt of 7, length_penalty "
                f"{penalty}" + f", num_generated {num_generated} is given" * bool(num_generated))
        with doing(what):
            score = mine.beam_score(seq, num_generated) if num_generated else mine.beam_score(seq)
        known = {-6 / 10 ** penalty: "only generated tokens count, not the prompt",
                 -6 / (3 * penalty or 1): "the length is raised to the power of length_penalty, "
                                          "not multiplied by it",
                 -6 * 3 ** penalty: "divide by the power of the length",
                 -6 / 3 ** penalty: "num_generated, where it is given, takes the place of the "
                                    "text's own length"}
        close = isinstance(score, int | float) and abs(score - right) < 1e-9
        hints = [hint for wrong, hint in known.items()
                 if isinstance(score, int | float) and abs(score - wrong) < 1e-9]
        expect(close, f"{what}: the score is {score}, it must be {right:.4}"
               + (f": {hints[0]}" if hints else ""))


@task(9, 3)
def test_task_3(mine):
    """hopeful() gives the beams back as long as one may still come among the best ended texts."""
    # beams and ended texts, best first, as (log-probability, generated tokens); 8 at most
    for beams, ended, settings, goes_on, why in (
            ([(-9, 2), (-12, 2)], [(-1, 1)], {}, True,
             "fewer than beam_width texts have ended, so each further one is welcome"),
            ([(-1.5, 1), (-9, 1)], [(-1, 1), (-2, 1)], {}, True,
             "the best beam's score -1.5 is above the worst ended text's -2, whose place it takes"),
            ([(-5, 2), (-9, 2)], [(-1, 1), (-2, 1)], {}, False,
             "the best beam's score -2.5 is below the worst ended text's -2"),
            ([(-4, 2), (-9, 2)], [(-1, 1), (-2, 1)], {}, False,
             "the best beam's score -2 is no better than the worst ended text's -2"),
            ([(-3, 4), (-9, 4)], [(-1, 1), (-2, 2)], {}, True,
             "compare scores: -3 / 4 is above -2 / 2"),
            ([(-1, 2), (-2, 2)], [(-3, 1), (-4, 1)], {"early_stopping": True}, False,
             "early_stopping is True, and beam_width texts have ended"),
            ([(-1, 2), (-2, 2)], [(-3, 1)], {"early_stopping": True}, True,
             "early_stopping is True, but fewer than beam_width texts have ended"),
            ([(-5, 2), (-9, 2)], [(-1, 1), (-2, 1)], {"early_stopping": "never"}, True,
             'early_stopping is "never": at max_tokens, 8, the best beam may have score -5 / 8'),
            ([(-17, 2), (-19, 2)], [(-1, 1), (-2, 1)], {"early_stopping": "never"}, False,
             'early_stopping is "never", but even at max_tokens, 8, the best beam has score -17 / '
             "8, below -2"),
            ([(-3, 2), (-9, 2)], [(-1, 1), (-5, 1)],
             {"early_stopping": "never", "length_penalty": -1}, False,
             "length_penalty is -1, so a text gets no better as it grows: the best beam's score "
             "is -3 * 2, and it is below -5"),
            ([(-2, 2), (-9, 2)], [(-1, 1), (-5, 1)],
             {"early_stopping": "never", "length_penalty": -1}, True,
             "length_penalty is -1, so what counts is the score now, -2 * 2, and not that at "
             "max_tokens; it is above -5"),
            ([], [(-1, 1), (-2, 1)], {}, False, "there is no beam")):
        params = make_params(**settings)
        beams, ended = ([make_text(mine, params, total, num_generated=num) for total, num in texts]
                        for texts in (beams, ended))
        before = [*beams]
        with doing(f"hopeful() where {why}"):
            result = mine.hopeful(beams, ended, params)
        expect(isinstance(result, list), f"hopeful() returned {type(result).__name__}; it must be "
               "a list: the beams, or []")
        expect((result == before) if goes_on else not result, f"{why}: so the result must be "
               f"{'the beams' if goes_on else '[]'}, it has {len(result)} of {len(before)} beams")


class Search:
    """Steps of a beam search without a model; a memory knows whose K and V lie where."""

    def __init__(self, mine, params, num_blocks=32):
        seq = make_text(mine, params)
        self.group = SequenceGroup(0, None, [seq])
        scheduler = make_scheduler(nanopaged, num_blocks)
        scheduler.running.append(self.group)
        self.pool, self.memory = scheduler.pool, Memory(scheduler.pool)
        self.engine = mine.Engine(scheduler, None, None, None, None, False, 64, 0)
        self.memory.step((seq, 7))
        self.forked_too_many = False

    def extend(self, tokens, what):
        """One step: tokens[name] are what the beam of that name may go on with, {letter: logprob}.

        The best come first, as the sampler gives them.
        """
        sampled = {}
        for seq in self.group.unfinished():
            if seq.num_kv < seq.num_tokens:        # not the prompt: that has been computed
                self.memory.step((seq, 1))
            top = sorted(tokens[name_of(seq)].items(), key=lambda item: -item[1])
            best, logprob = top[0]
            sampled[seq] = ord(best), logprob, {ord(letter): value for letter, value in top}
        num_forks = self.pool.num_forks
        with doing(what):
            self.engine._extend_beams(self.group, sampled)
        self.forked_too_many |= self.pool.num_forks - num_forks > len(self.group.seqs)

    def check(self, expected_beams, expected_ended, what):
        """Texts, sums and order are right, and each beam reads its own K and V."""
        beams = [seq for seq in self.group.seqs if not seq.finish_reason]
        ended = [seq for seq in self.group.seqs if seq.finish_reason]
        expect({*map(name_of, beams)} == {*expected_beams} and len(beams) == len(expected_beams),
               f"{what}: the beams are {names(beams)}, they must be "
               + (" ".join(f'"{name}"' for name in expected_beams) or "none"))
        found = [name_of(seq) for seq in ended]
        expect(found == [*expected_ended], f"{what}: the ended texts are {names(ended)}, they must "
               "be " + (" ".join(f'"{name}"' for name in expected_ended) or "none"))
        for seq in [*beams, *ended]:
            total = {**expected_beams, **expected_ended}[name_of(seq)]
            expect(abs(seq.cumulative_logprob - total) < 1e-6, f'{what}: the log-probability of '
                   f'"{name_of(seq)}" is {seq.cumulative_logprob:.4}, it must be {total:.4}')
        for seq in beams:
            expect(seq.block_table, f'{what}: beam "{name_of(seq)}" has no blocks: let it read its '
                   "parent's by pool.fork(), before the parent is freed")
            expect(seq.num_kv == seq.num_tokens - 1, f'{what}: beam "{name_of(seq)}" has K and V '
                   f"of {seq.num_kv} tokens, it must be those of its parent's "
                   f"{seq.num_tokens - 1}")
        self.memory.check(beams, what)
        held = self.pool.num_blocks - self.pool.num_free
        read = len(self.group.blocks())
        expect(held <= read, f"{what}: {held} blocks are held, but the group's texts read only "
               f"{read}: a beam that nothing goes on from must be freed as well")
        check_books(self.pool, self.group.seqs, what)
        self.pool.free(*ended)                     # as Engine.step() does it

    def end(self, what):
        """All that is left is freed."""
        self.pool.free(*self.group.seqs)
        lost = self.pool.num_blocks - self.pool.num_free
        expect(not lost, f"{what}, then all texts are freed, but {lost} blocks are still held: "
               + ("who was not chosen must not be forked, or it counts as a reader for ever"
                  if self.forked_too_many else "a parent counts as a reader until it is freed, "
                  "also one that beams go on from"))


def steps(mine, params, *plan):
    """Steps of one search: (what, tokens of each beam, beams, ended texts) each."""
    search = Search(mine, params)
    for what, tokens, beams, ended in plan:
        search.extend(tokens, what)
        search.check(beams, ended, what)
    search.end(plan[-1][0])


START = ("two beams from the prompt", {"": {"a": -1.0, "b": -2.0, "c": -3.0}},
         {"a": -1.0, "b": -2.0}, {})


@task(9, 4)
def test_task_4(mine):
    """_extend_beams() goes on with the best successors, and holds what they read, and no more."""
    steps(mine, make_params(), START)
    steps(mine, make_params(), START, (
        "both beams get one successor", {"a": {"d": -1.0, "e": -9.0}, "b": {"f": -1.0, "g": -9.0}},
        {"ad": -2.0, "bf": -3.0}, {}))
    steps(mine, make_params(), START, (
        'the two best of all successors are both "a"\'s',
        {"a": {"d": -1.0, "e": -1.5}, "b": {"f": -1.6, "g": -1.9}}, {"ad": -2.0, "ae": -2.5}, {}), (
        'and then both are "ae"\'s',
        {"ad": {"d": -3.0, "e": -3.5}, "ae": {"f": -1.0, "g": -1.5}},
        {"aef": -3.5, "aeg": -4.0}, {}))
    steps(mine, make_params(), START, (
        'the likeliest next token is "b"\'s, but sums of log-probabilities count',
        {"a": {"d": -1.5, "e": -1.6}, "b": {"f": -1.0, "g": -9.0}}, {"ad": -2.5, "ae": -2.6}, {}))
    check_ends(mine)
    for seed in range(12):
        check_random_search(mine, random.Random(seed), f"random search {seed}")


def check_ends(mine):
    """Texts end, and compete with those that ended before."""
    end = {"a.": -1.5}
    first = ('"a." is the best successor, and ends: its place as a beam goes to the next one',
             {"a": {".": -0.5, "d": -3.0, "e": -4.0}, "b": {"f": -1.0, "g": -3.0, "h": -9.0}},
             {"bf": -3.0, "ad": -4.0}, end)
    steps(mine, make_params(), START, first)
    steps(mine, make_params(), START, (
        '"b." ends, but is third: only an end among the beam_width best successors counts',
        {"a": {"d": -0.5, "e": -1.0, "f": -9.0}, "b": {".": -0.5, "g": -3.0, "h": -9.0}},
        {"ad": -1.5, "ae": -2.0}, {}))
    steps(mine, make_params(early_stopping="never"), START, first, (
        '"a." ended before, and stays; "bf." ends now',
        {"bf": {".": -0.3, "d": -1.0, "e": -2.5}, "ad": {"f": -1.0, "g": -2.0, "h": -3.0}},
        {"bfd": -4.0, "adf": -5.0}, {"a.": -1.5, "bf.": -3.3}))
    steps(mine, make_params(early_stopping="never", length_penalty=2.0), START, first, (
        '"bf." is longer and has the better score, so it comes first, though the less likely one',
        {"bf": {".": -0.3, "d": -1.0, "e": -2.5}, "ad": {"f": -1.0, "g": -2.0, "h": -3.0}},
        {"bfd": -4.0, "adf": -5.0}, {"bf.": -3.3, "a.": -1.5}), (
        'three texts have ended, and the best beam_width of them are kept',
        {"bfd": {".": -0.1, "d": -1.0, "e": -2.5}, "adf": {"f": -1.0, "g": -2.0, "h": -3.0}},
        {"bfdd": -5.0, "adff": -6.0}, {"bfd.": -4.1, "bf.": -3.3}))
    steps(mine, make_params(), START, first, (
        'two texts have ended and the best beam is worse: hopeful() says that nobody goes on',
        {"bf": {".": -0.1, "d": -7.0, "e": -8.0}, "ad": {"f": -7.0, "g": -8.0, "h": -9.0}},
        {}, {"a.": -1.5, "bf.": -3.1}))
    steps(mine, make_params(max_tokens=2), START, (
        "the texts reach max_tokens", {"a": {"d": -1.0, "e": -9.0}, "b": {"f": -0.1, "g": -9.0}},
        {}, {"ad": -2.0, "bf": -2.1}))


def check_random_search(mine, rng, what):
    """Against a plain search in which each text is a string and a sum."""
    width, max_tokens = rng.choice([1, 2, 3, 4]), 12
    params = make_params(width, max_tokens, early_stopping="never", length_penalty=0.5)
    search, ended, beams = Search(mine, params, num_blocks=64), {}, {"": 0.0}
    for length in range(1, max_tokens + 1):
        tokens = {name: {letter: -3 * rng.random() for letter in rng.sample("abcdef.", width + 1)}
                  for name in beams}
        ranked = sorted(((total + logprob, name + letter) for name, total in beams.items()
                         for letter, logprob in tokens[name].items()), reverse=True)
        ends = [length == max_tokens or name[-1] == "." for _, name in ranked]
        ended |= {name: total for (total, name), end in zip(ranked[:width], ends, strict=False)
                  if end}
        scores = {name: total / len(name) ** 0.5 for name, total in ended.items()}
        ended = {name: ended[name] for name in sorted(ended, key=scores.get, reverse=True)[:width]}
        going = [(total, name) for (total, name), end in zip(ranked, ends, strict=True) if not end]
        beams = {name: total for total, name in going[:width]}
        hope = max(beams.values(), default=0) / max_tokens ** 0.5
        if len(ended) == width and hope <= min(scores[name] for name in ended):
            beams = {}
        search.extend(tokens, f"{what}, step {length}")
        search.check(beams, ended, f"{what}, step {length}")
        if not beams:
            break
    search.end(f"{what}, step {length}")
