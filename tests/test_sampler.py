"""Section 9, the sampler, against probabilities computed by hand in float64."""

import math

import pytest
import torch
from helpers import make_seq

import kernels
from nanopaged import SamplingParams, sample, sampling_options

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
INF = math.inf


def row(*values):
    """One row of logits -> (1, V) float32."""
    return torch.tensor([values], dtype=torch.float32)


def filtered_probs(logits, params):
    """What each row of logits draws from, by its SamplingParams -> (S, V)."""
    temperature, *cuts = (torch.tensor([[getattr(p, name)] for p in params], dtype=torch.float64)
                          for name in ("temperature", "top_p", "top_k", "min_p"))
    probs = (logits / temperature.float()).softmax(-1)
    return probs * kernels.kept_reference(probs, *cuts)


def log_probs(*probs):
    """Logits that stand for these probabilities at temperature 1 -> (1, V)."""
    return row(*(math.log(p) if p else -INF for p in probs))


def sample_row(logits, seed=0, seen=(0,), **settings):
    """Sample one row -> (token_id, logprob, {token_id: logprob} or None)."""
    seq = make_seq(0, SamplingParams(**settings), seed)
    seq.token_ids += seen
    return sample(logits.clone(), [seq])[0]


def expected_probs(logits, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0):
    """The documented order, in plain Python: temperature, min-p, top-k, top-p; sums to 1."""
    top = max(logits)
    probs = [math.exp((x - top) / temperature) for x in logits]
    kept = [i for i, p in enumerate(probs) if p >= min_p * max(probs)]
    kept.sort(key=lambda i: -probs[i])
    kept = kept[:top_k] if top_k > 0 else kept
    total, mass, nucleus = sum(probs[i] for i in kept), 0.0, []
    for i in kept:
        if mass >= top_p * total:
            break
        nucleus.append(i)                             # the one that passes top_p is kept
        mass += probs[i]
    return [probs[i] / mass if i in nucleus else 0.0 for i in range(len(probs))]


def chi_squared_limit(degrees):
    """The value that a chi-squared variable passes with probability 1e-4 (Wilson-Hilferty)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.719 * math.sqrt(spread)) ** 3


def assert_drawn_from(tokens, probs):
    """Pearson's test of draws against probabilities; what has none must never be drawn."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probs)).tolist()
    impossible = [i for i, p in enumerate(probs) if p == 0 and counts[i]]
    assert not impossible, f"tokens of probability zero were drawn: {impossible}"
    wanted = [(n, p * len(tokens)) for n, p in zip(counts, probs, strict=True) if p]
    if len(wanted) > 1:
        assert min(e for _, e in wanted) > 3, "too few draws for a chi-squared test"
        statistic = sum((n - e) ** 2 / e for n, e in wanted)
        assert statistic < chi_squared_limit(len(wanted) - 1), (statistic, counts)


# Each option alone, then together; LOGITS has ties in neither value nor filter boundary.
LOGITS = [0.3, 2.1, -1.0, 1.2, 0.9, -0.2, 1.6, -2.0]
OPTIONS = [
    {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 3}, {"top_k": -1},
    {"top_p": 0.3}, {"top_p": 0.6}, {"top_p": 0.95}, {"min_p": 0.1}, {"min_p": 0.5}, {"min_p": 1.0},
    {"temperature": 2.0, "min_p": 0.5},               # min-p is measured after temperature
    {"top_k": 4, "top_p": 0.8},                       # top-p is a share of what top-k left
    {"temperature": 1.7, "min_p": 0.25, "top_k": 5, "top_p": 0.8},
    {"temperature": 0.6, "min_p": 0.05, "top_k": 3, "top_p": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_filtered_probs(options):
    """A filter in the wrong order, off by one, or against the wrong total."""
    probs = filtered_probs(row(*LOGITS), [SamplingParams(**options)])[0].double()
    want = expected_probs(LOGITS, **options)
    assert [p > 0 for p in want] == probs.gt(0).tolist()
    assert (probs / probs.sum()).tolist() == pytest.approx(want, rel=1e-5)


def test_the_options_do_tell_orders_apart():
    """OPTIONS in which the order of the filters makes no difference would show nothing."""
    def kept(**options):
        return sum(p > 0 for p in expected_probs(LOGITS, **options))

    assert kept(top_k=4, top_p=0.8) == 3 and kept(top_p=0.8) == 4
    assert kept(temperature=2.0, min_p=0.5) == 4 and kept(min_p=0.5) == 2


@pytest.mark.parametrize("top_p, kept", [(0.2, [0]), (0.49, [0]), (0.51, [0, 1]), (0.79, [0, 1]),
                                         (0.81, [0, 1, 2]), (0.94, [0, 1, 2]), (0.96, [0, 1, 2, 3]),
                                         (1.0, [0, 1, 2, 3]), (1e-6, [0])])
def test_top_p_keeps_the_boundary_token(top_p, kept):
    """PEERS bug 13: the token that passes top_p is dropped, and with a small top_p all are."""
    logits = log_probs(0.5, 0.3, 0.15, 0.05)
    probs = filtered_probs(logits, [SamplingParams(top_p=top_p)])[0]
    assert probs.nonzero().flatten().tolist() == kept
    backwards = filtered_probs(logits.flip(1), [SamplingParams(top_p=top_p)])[0]
    assert backwards.nonzero().flatten().tolist() == [3 - i for i in reversed(kept)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_probabilities(options):
    """A biased draw: 20,000 seeds at one position, against the exact probabilities."""
    params = SamplingParams(**options)
    seqs = [make_seq(5, params, seed) for seed in range(20_000)]
    tokens = [token for token, _, _ in sample(row(*LOGITS).repeat(20_000, 1), seqs)]
    assert_drawn_from(tokens, expected_probs(LOGITS, **options))


def test_penalty_comes_before_temperature():
    """A penalty on probabilities, or after temperature, is another distribution."""
    params = SamplingParams(temperature=0.7, repetition_penalty=1.5)
    seqs = [make_seq(0, params, seed) for seed in range(20_000)]
    for seq in seqs:
        seq.token_ids += [1, 5, 1]
    penalised = [*LOGITS]
    penalised[1], penalised[5] = 2.1 / 1.5, -0.2 * 1.5
    tokens = [token for token, _, _ in sample(row(*LOGITS).repeat(20_000, 1), seqs)]
    assert_drawn_from(tokens, expected_probs(penalised, temperature=0.7))


def test_rows_with_different_options_in_one_batch():
    """One row's option used for another, or for all."""
    options = [{"temperature": 0}, {"top_k": 2}, {"top_p": 0.5, "temperature": 2.0}, {},
               {"min_p": 0.3}]
    params = [SamplingParams(**option) for option in options]
    seqs = [make_seq(3, params[i % 5], i) for i in range(20_000)]
    drawn = [token for token, _, _ in sample(row(*LOGITS).repeat(20_000, 1), seqs)]
    assert set(drawn[::5]) == {1}, "greedy rows take the likeliest token"
    for i, option in enumerate(options[1:], 1):
        assert_drawn_from(drawn[i::5], expected_probs(LOGITS, **option))


def test_a_row_does_not_depend_on_its_neighbours():
    """Same seed, same tokens beside whatever else: another path for mixed batches rounds otherwise.

    Checked bit by bit over a vocabulary whose unlikely tail is what rounding would cut off.
    """
    gen = torch.Generator().manual_seed(1)
    for _ in range(5):
        logits = 4 * torch.randn(2, 5000, generator=gen)
        plain, filtered = SamplingParams(), SamplingParams(top_k=40, top_p=0.9)
        alone = filtered_probs(logits[:1].clone(), [plain])
        beside = filtered_probs(logits.clone(), [plain, filtered])
        assert torch.equal(alone[0], beside[0])
        beside = filtered_probs(logits.flip(0), [filtered, plain])
        assert torch.equal(alone[0], beside[1])


# --- random numbers -----------------------------------------------------------------------------


def splitmix64(state):
    """Steele, Lea and Flood 2014: the output for a state, in arbitrary-precision integers."""
    z = state & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def test_the_oracle_is_splitmix64():
    """An oracle with a typing error of its own: the five values that Rosetta Code publishes."""
    outputs = [splitmix64(1234567 + i * GOLDEN) for i in range(1, 6)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423,
                       4593380528125082431, 16408922859458223821]


def test_random_numbers_are_splitmix64s():
    """A shift that drags the sign along, or a product cut at 63 bits; and a seed's tokens that
    change from one version to the next."""
    seeds = [0, 1, 2, 42, -1, -2**63, 2**31, 2**32 - 1, 2**62 - 1, 2**63 - 1]
    pairs = [(seed, counter) for seed in seeds for counter in [0, 1, 2, 3, 17, 2**20, 2**31 - 1]]
    want = [(splitmix64(counter + seed * GOLDEN) >> 24) / 2**40 for seed, counter in pairs]
    got = kernels.random_reference(*torch.tensor(pairs).T)
    assert got.dtype == torch.float64 and got.tolist() == want


def test_random_numbers_of_a_batch_are_those_of_each():
    """A generator that is shared by the rows of a batch, or carried from step to step."""
    seeds, counters = torch.arange(50) * 7919, torch.arange(50) % 13
    random = kernels.random_reference
    alone = [random(seeds[i:i + 1], counters[i:i + 1]).item() for i in range(50)]
    assert random(seeds, counters).tolist() == alone
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert random(seeds[order], counters[order].int()).tolist() == [alone[i] for i in order]


@pytest.mark.parametrize("along", ["seeds", "counters", "both"])
def test_random_numbers_are_uniform(along):
    """Near seeds, or the counters of one text, that draw near numbers."""
    counter = torch.arange(40_000)
    u = kernels.random_reference(counter * (along != "counters"), counter * (along != "seeds"))
    assert_drawn_from((u * 100).long().tolist(), [0.01] * 100)
    pairs = (u[:-1] * 10).long() * 10 + (u[1:] * 10).long()          # one after the other
    assert_drawn_from(pairs[::2].tolist(), [0.01] * 100)
    assert len(set(u.tolist())) == 40_000 and 0 <= u.min() and u.max() < 1


# --- the draw -----------------------------------------------------------------------------------


LARGEST = 1 - 2.0**-40                                # of random_reference's numbers


def draw(logits, u, monkeypatch, **options):
    """The token that a random number u draws, by draw_reference itself."""
    params = SamplingParams(**options)
    monkeypatch.setattr(kernels, "random_reference",
                        lambda seeds, lengths: torch.full(seeds.shape, u, dtype=torch.float64))
    return sample(logits.clone(), [make_seq(1, params, 0)])[0][0]


def test_which_weight_is_picked():
    """The weight before, at a border; one of 0; or a share of what is left that is out of range."""
    weights = torch.tensor([[0.0, 1.0, 2.0, 0.0, 1.0, 0.0]])
    for u, which, rest in ((0.0, 1, 0.0), (0.125, 1, 0.5), (0.25, 2, 0.0), (0.5, 2, 0.5),
                           (0.75, 4, 0.0), (0.875, 4, 0.5), (LARGEST, 4, 1 - 2.0**-38)):
        picked, left = kernels.pick_reference(weights, torch.tensor([[u]], dtype=torch.float64))
        assert (picked.item(), left.item()) == (which, pytest.approx(rest, abs=1e-15)), u
    gen = torch.Generator().manual_seed(2)
    weights = torch.rand(500, 300, generator=gen) ** 9
    u = torch.rand(500, 1, generator=gen, dtype=torch.float64)
    picked, left = kernels.pick_reference(weights, u)
    assert 0 <= left.min() and left.max() < 1 and 0.45 < left.mean() < 0.55
    # and back: what lies before it, and the share of its own, are the share u of all
    sums = weights.double().cumsum(-1)
    before = sums.gather(1, picked) - weights.gather(1, picked) * (1 - left)
    assert before.div(sums[:, -1:]).tolist() == [pytest.approx(x, abs=1e-12) for x in u.tolist()]


@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 1000])
def test_the_draw_is_by_inversion(size, monkeypatch):
    """A token that the sums of pieces, or of tokens in a piece, put one too far; the padding."""
    logits = 3 * torch.randn(1, size, generator=torch.Generator().manual_seed(size))
    sums = logits[0].double().softmax(-1).cumsum(-1)
    for i in range(200):
        u = i * LARGEST / 199
        token = draw(logits, u, monkeypatch)
        before = sums[token - 1].item() if token else 0
        assert before - 1e-5 <= u <= sums[token].item() + 1e-5, (u, token)


@pytest.mark.parametrize("u", [0.0, 2.0**-40, 0.5, LARGEST])
def test_a_token_of_probability_zero_is_never_drawn(u, monkeypatch):
    """The extremes of u, which fall on what lies before the first token, or behind the last."""
    wide = torch.full((1, 1000), -INF)
    wide[0, [300, 700]] = 0.0
    for logits, likely in ((log_probs(0, 0, 0.5, 0, 0.5, 0, 0), (2, 4)), (wide, (300, 700))):
        for options in ({}, {"top_k": 5}, {"top_p": 0.9999}, {"min_p": 0.1}, {"temperature": 0.01}):
            assert draw(logits, u, monkeypatch, **options) == likely[u >= 0.5]


def test_the_draw_depends_on_seed_and_position():
    """Different seeds that say the same, or a text that draws one number again and again."""
    flat = torch.zeros(1, 1000)
    by_seed = {sample_row(flat, seed=seed)[0] for seed in range(50)}
    by_position = {sample_row(flat, seen=[0] * n)[0] for n in range(1, 51)}
    assert len(by_seed) > 40 and len(by_position) > 40
    again = {sample_row(flat, seed=seed)[0] for seed in range(50)}
    assert by_seed == again


# --- the edges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 513, 128_000])
def test_the_ends_of_a_vocabulary(size):
    """The last tokens are never drawn, or such as are behind the end."""
    for token_id in {0, size // 2, size - 1}:
        logits = torch.full((1, size), -INF)
        logits[0, token_id] = 1.0
        for options in ({}, {"temperature": 0}, {"top_k": 3}):
            assert sample_row(logits, **options)[0] == token_id


def test_a_large_vocabulary():
    """Draws that reach only a part of 128,000 tokens, or some parts too often."""
    seqs = [make_seq(1, SamplingParams(), seed) for seed in range(100)]
    tokens = [token for token, _, _ in sample(torch.zeros(100, 128_000), seqs)]
    assert_drawn_from([token // 32_000 for token in tokens], [0.25] * 4)
    assert len({*tokens}) > 95


def test_greedy_rows_beside_random_rows():
    """Greedy that turns random in company, or random rows that a greedy one makes greedy."""
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(3))
    greedy, random = SamplingParams(temperature=0), SamplingParams(temperature=1.5)
    seqs = [make_seq(4, random if i % 2 else greedy, i) for i in range(40)]
    tokens = [token for token, _, _ in sample(logits.clone(), seqs)]
    assert tokens[::2] == logits.argmax(-1)[::2].tolist()
    assert tokens[1::2] != logits.argmax(-1)[1::2].tolist()
    for i, token in enumerate(tokens):
        assert sample(logits[i:i + 1].clone(), [seqs[i]])[0][0] == token, f"row {i} alone"


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5},
                                     {"min_p": 0.01}, {"temperature": 1e-6}], ids=str)
def test_extreme_logits(options):
    """exp() overflows, or infinity minus infinity: NaN, and then any token."""
    for logits, token in ((row(-1e4, 1e4, 0, 9e3), 1), (row(-INF, -INF, -50, -INF), 2),
                          (row(1e4, -INF, 9.9e3, -INF), 0), (row(-1e4, -1.2e4, -INF, -1.1e4), 0)):
        for seed in range(20):
            got, logprob, _ = sample_row(logits, seed=seed, **options)
            assert (got, logprob) == (token, pytest.approx(0))


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-30, 1e-6, 1e-4])
def test_a_very_small_temperature_is_greedy(temperature):
    """A division by nearly zero: infinities, and NaN of them."""
    logits = row(3.0, 3.1, -20.0, 2.9, 0.0)
    assert {sample_row(logits, seed=i, temperature=temperature)[0] for i in range(50)} == {1}


def test_a_very_high_temperature_is_flat():
    """Temperature that multiplies instead of divides."""
    seqs = [make_seq(1, SamplingParams(temperature=1e6), i) for i in range(20_000)]
    tokens = [token for token, _, _ in sample(row(9, 0, -9, 3).repeat(20_000, 1), seqs)]
    assert_drawn_from(tokens, [0.25] * 4)


@pytest.mark.parametrize("options", OPTIONS + [{"temperature": 0}, {"top_k": 1 << 31}], ids=str)
def test_a_vocabulary_of_one_token(options):
    """An index behind the end."""
    assert sample_row(row(-3.0), logprobs=5, **options) == (0, 0.0, {0: 0.0})


def test_top_k_above_the_vocabulary_keeps_all():
    """An index behind the end, or a top_k that wraps round."""
    plain = filtered_probs(row(*LOGITS), [SamplingParams()])
    for top_k in (0, -1, 8, 9, 1000, 1 << 31):
        assert torch.equal(filtered_probs(row(*LOGITS), [SamplingParams(top_k=top_k)]), plain)


def test_a_step_that_samples_nothing():
    """Only chunks of prompts are computed: options of no row that have lost their columns."""
    assert sample(torch.empty(0, 8), []) == []


def test_only_rows_whose_tokens_are_cut_cause_a_cut():
    """All rows are sorted, at five times the cost of a step, for options that leave nothing out."""
    settings = [{}, {"top_p": 0.5}, {"top_p": 0.5, "temperature": 0}, {"top_k": -1}, {"top_k": 3},
                {"min_p": 0.1}, {"min_p": 0.1, "temperature": 0}]
    seqs = [make_seq(1, SamplingParams(**options)) for options in settings]
    cuts, _, _ = sampling_options(seqs, torch.device("cpu"))
    assert cuts == [False, True, False, False, True, True, False]


def test_zeros_of_both_signs_are_equal():
    """-0.0 before 0.0, as integers order them, but only beside a random row."""
    seqs = [make_seq(1, SamplingParams(temperature=t), 0) for t in (0, 1)]
    logits = row(-1, -0.0, 0.0, -2).repeat(2, 1)
    assert sample(logits, seqs)[0][0] == 1 == sample(logits[:1], seqs[:1])[0][0]


def test_equal_logits():
    """top_k = 1 that keeps all of the likeliest, or greedy that draws among them, or nearly so."""
    beside = [make_seq(1, SamplingParams(temperature=t, top_k=1 - t), 0) for t in (0, 1)]
    for wide in (torch.zeros(2, 300), torch.zeros(2, 3000).bfloat16()):
        assert sample(wide, beside)[0][0] == 0
    assert sample(row(1, 2, 2.00001).repeat(2, 1), beside)[0][0] == 2
    logits = row(1, 2, 2, 2, 0)
    for seed in range(20):                            # alone, and beside a row that draws
        seqs = [make_seq(1, SamplingParams(temperature=t), seed) for t in (0, 1)]
        assert sample_row(logits, seed, temperature=0)[0] == 1
        assert sample(logits.repeat(2, 1), seqs)[0][0] == 1
    assert filtered_probs(logits, [SamplingParams(top_k=1)]).gt(0).sum() == 1
    assert filtered_probs(logits, [SamplingParams(min_p=1.0)])[0].gt(0).tolist() == [
        False, True, True, True, False]


# --- penalty and log-probabilities --------------------------------------------------------------


@pytest.mark.parametrize("penalty, logits, seen, token", [
    (1.0, (2.0, 1.5, -1.0), [0], 0), (1.3, (2.0, 1.5, -1.0), [0], 0),     # 1.54
    (1.4, (2.0, 1.5, -1.0), [0], 1),                                       # 1.43
    (1.4, (2.0, 1.5, -1.0), [0, 1], 0), (3.0, (2.0, 0.6, 0.5), [0, 1, 1], 0),
    (2.0, (-1.0, -1.9, -3.0), [0], 1),                                     # -2.0: lower, not higher
    (2.0, (-1.0, -1.9, -3.0), [0, 1], 0),
    (0.5, (2.0, 1.5, -1.0), [1], 1), (0.5, (-2.0, -1.5, -3.0), [2], 1),    # below 1: repeat more
    (1000.0, (9.0, 8.0, 0.1), [0, 1, 0], 2)])
def test_repetition_penalty(penalty, logits, seen, token):
    """Dividing negative scores too raises them; a token seen twice is penalised once."""
    got, logprob, _ = sample_row(row(*logits), seen=seen, temperature=0, repetition_penalty=penalty)
    assert got == token
    assert logprob == pytest.approx(row(*logits).double().log_softmax(-1)[0, got].item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_penalty_is_not_rounded(dtype):
    """A small penalty is lost, as logits have 8 or 11 bits; or a large score overflows."""
    seq = make_seq(0, SamplingParams(temperature=0, repetition_penalty=1.0001), 0)
    seq.token_ids += [0]
    assert sample(row(20.0, 20.0).to(dtype), [seq])[0][0] == 1
    seq = make_seq(0, SamplingParams(temperature=0, repetition_penalty=0.001), 0)
    seq.token_ids += [0, 1]
    assert sample(row(70.0, 90.0).to(dtype), [seq])[0][0] == 1


def test_the_penalty_is_each_rows_own():
    """Tokens that a neighbour has seen."""
    logits = row(2.0, 1.9, 0.0).repeat(3, 1)
    seqs = [make_seq(0, SamplingParams(temperature=0, repetition_penalty=penalty), 0)
            for penalty in (2.0, 2.0, 1.0)]
    for seq, seen in zip(seqs, ([0], [1], [0]), strict=True):
        seq.token_ids += seen
    assert [token for token, _, _ in sample(logits, seqs)] == [1, 0, 0]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.3, "top_k": 2},
                                     {"temperature": 5.0}, {"repetition_penalty": 4.0}], ids=str)
@pytest.mark.parametrize("num", [0, 1, 3, 8, 100])
def test_logprobs(num, options):
    """Log-probabilities after the filters, without the chosen token, or of too many."""
    want = row(*LOGITS).double().log_softmax(-1)[0].tolist()
    ranked = sorted(range(8), key=lambda i: -want[i])
    for seed in range(10):
        token, logprob, top = sample_row(row(*LOGITS), seed, [1], logprobs=num, **options)
        assert top == {i: pytest.approx(want[i], abs=1e-5) for i in {token, *ranked[:num]}}
        assert top[token] == logprob


def test_logprobs_only_where_asked():
    """One request's option answered to all."""
    seqs = [make_seq(1, SamplingParams(logprobs=num), 0) for num in (None, 2, None, 0)]
    tops = [top for _, _, top in sample(row(*LOGITS).repeat(4, 1), seqs)]
    assert tops[0] is None and tops[2] is None and len(tops[3]) == 1 and 2 <= len(tops[1]) <= 3


def test_a_row_of_nan_harms_no_other():
    """An overflow in one request's float16 ends in an index error, and takes all others down."""
    for size, top_k in ((50, 0), (256, 0), (1000, 0), (50, 3), (300, 3)):
        logits = torch.randn(3, size, generator=torch.Generator().manual_seed(5))
        seqs = [make_seq(4, SamplingParams(temperature=0.8, top_k=top_k), i) for i in range(3)]
        alone = [token for token, _, _ in sample(logits.clone(), seqs)]
        for bad in (math.nan, INF, -INF):
            logits[1] = bad
            beside = [token for token, _, _ in sample(logits.clone(), seqs)]
            assert beside[::2] == alone[::2] and 0 <= beside[1] < size, (size, top_k, bad)
            assert bad != -INF or beside[1] == 0   # where nothing weighs anything, the first
