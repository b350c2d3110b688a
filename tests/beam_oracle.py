"""Beam search as transformers has it, in plain Python: an oracle for any model, or for a table.

It is slow, knows nothing of blocks and batches, and tells how clear its decisions were.
"""

import heapq

import torch


def beam_search(next_logprobs, beam_width, max_tokens, length_penalty=1.0, early_stopping=False,
                eos_token_ids=()):
    """-> ([(score, token_ids), ...] best first, the margin of the closest decision).

    next_logprobs(beams) gives for each list of tokens {next token: log-probability}; a beam's
    num_candidates() likeliest tokens are enough.

    Each step ranks all beams with all next tokens by their sums of log-probabilities. Of the first
    beam_width, those that end are kept with the score sum / length ** length_penalty, the end token
    counted; those that end behind them are dropped. The first beam_width that do not end go on.
    It is over when beam_width texts are kept and, for early_stopping True, at once; for False, when
    the best beam, were it to end here, would not beat the worst of them; for "never" the same, but
    with the length that gives it the best score.
    margin: rounding that moves no sum by half of it changes no decision and no order in the result.
    """
    beams, finished, margins = [(0.0, [])], [], [float("inf")]
    for length in range(1, max_tokens + 1):
        rows = next_logprobs([tokens for _, tokens in beams])
        ranked = heapq.nlargest(num_candidates(beam_width, eos_token_ids), (
            (total + logprob, [*tokens, token]) for (total, tokens), row
            in zip(beams, rows, strict=True) for token, logprob in row.items()))
        ends = [length == max_tokens or tokens[-1] in eos_token_ids for _, tokens in ranked]
        margins += rank_margins([total for total, _ in ranked], ends, beam_width)
        finished += [(total / length ** length_penalty, tokens) for (total, tokens), end
                     in zip(ranked[:beam_width], ends, strict=False) if end]
        finished.sort(reverse=True)
        margins += score_margins(finished, length_penalty)
        del finished[beam_width:]
        beams = [beam for beam, end in zip(ranked, ends, strict=True) if not end][:beam_width]
        if len(finished) < beam_width or length == max_tokens:
            continue
        if early_stopping is True:
            break
        best_length = max_tokens if early_stopping == "never" and length_penalty > 0 else length
        hoped_for = beams[0][0] / best_length ** length_penalty, [0] * best_length
        margins += score_margins([hoped_for, finished[-1]], length_penalty)
        if hoped_for[0] <= finished[-1][0]:
            break
    return finished, min(margins)


def num_candidates(beam_width, eos_token_ids):
    """So many ranks hold beam_width texts that do not end, and the first that is left behind."""
    return beam_width * (1 + len(eos_token_ids)) + 1


def rank_margins(sums, ends, beam_width):
    """How far each candidate is from the rank beyond which it would be treated otherwise."""
    running, (inside, outside) = [], sums[beam_width - 1:beam_width + 1]
    margins = []
    for rank, (total, end) in enumerate(zip(sums, ends, strict=True)):
        if end:
            margins.append(total - outside if rank < beam_width else inside - total)
        else:
            running.append(total)
    if len(running) > beam_width:
        margins.append(running[beam_width - 1] - running[beam_width])
    return margins


def score_margins(texts, length_penalty):
    """Distances of neighbours among (score, token_ids), as differences of their sums."""
    return [abs(a - b) * min(len(x) ** length_penalty, len(y) ** length_penalty)
            for (a, x), (b, y) in zip(texts, texts[1:], strict=False)]


def ask_transformers(model, prompt, beam_width, max_tokens, eos_token_ids=(), **settings):
    """transformers' own answer -> ([(score, token_ids), ...] best first, margin).

    The search above is replayed over the logits that transformers met on its way; where no decision
    was closer than 1e-4 the two must agree. Width 1 is transformers' greedy search, which ends with
    the first end token whatever the settings are, and has no score: it gets ours.
    """
    ids, beams = torch.tensor([prompt]), {}
    if beam_width > 1:
        beams = {**settings, "num_beams": beam_width, "num_return_sequences": beam_width}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=max_tokens, eos_token_id=list(eos_token_ids) or None,
                         pad_token_id=0, return_dict_in_generate=True, output_scores=True,
                         output_logits=True, **beams)
    steps = iter(out.logits)                           # each (beam_width, V), the best beam first

    def next_logprobs(beams):
        logprobs = next(steps)[:len(beams)].double().log_softmax(-1)
        top = logprobs.topk(num_candidates(beam_width, eos_token_ids))
        return [dict(zip(tokens, values, strict=True)) for tokens, values
                in zip(top.indices.tolist(), top.values.tolist(), strict=True)]

    ours, margin = beam_search(next_logprobs, beam_width, max_tokens,
                               eos_token_ids=eos_token_ids, **settings)
    texts = out.sequences[:, len(prompt):].tolist()
    if beam_width > 1:                                 # beam_indices is -1 where a text is padded
        lengths, scores = (out.beam_indices >= 0).sum(1).tolist(), out.sequences_scores.tolist()
    else:
        lengths, scores = [len(texts[0])], [ours[0][0]]
    theirs = [(score, text[:n]) for score, text, n in zip(scores, texts, lengths, strict=True)]
    if margin > 1e-4:
        assert [text for _, text in ours] == [text for _, text in theirs], (prompt, settings)
        assert all(abs(a - b) < 1e-4 for (a, _), (b, _) in zip(ours, theirs, strict=True))
        assert next(steps, None) is None, "transformers went on where we stopped"
    return theirs, margin
