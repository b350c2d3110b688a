"""The labs: starters, graders on right and wrong solutions, and a learner's code in the engine.

A wrong solution is a class that overrides what it gets wrong; the diagnosis must name the mistake.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from textwrap import dedent, indent

import pytest
from helpers import ROOT

TUTORIAL = ROOT / "tutorial"
sys.path.insert(0, str(TUTORIAL))

import grade  # noqa: E402
import labs  # noqa: E402
import run_mine  # noqa: E402

import nanopaged  # noqa: E402

NO_INTERPRETER = labs.why_no_interpreter()         # lab 5's kernels run in it, GPU or not
needs_interpreter = pytest.mark.skipif(bool(NO_INTERPRETER), reason=str(NO_INTERPRETER))
LAB_NUMBERS = [pytest.param(number, marks=needs_interpreter if lab.kernels else ())
               for number, lab in labs.LABS.items()]
PROGRAMS = {3: "blocks.py", 8: "share.py", 9: "beams.py", 10: "prefixes.py"}


def write_class(path, code, number=3):
    """A learner's file: the engine's classes and functions, but for what `code` defines.

    Methods in `code` belong to the class of the lab that has one of them.
    """
    lab = labs.LABS[number]
    text = f"import copy\nimport torch\nimport {lab.module}\nfrom nanopaged import OutOfBlocks\n"
    changed = next((name.split(".")[0] for name in lab.names
                    if f"def {name.split('.')[-1]}(" in code), lab.owners[0])
    for owner in lab.owners:
        if isinstance(getattr(sys.modules[lab.module], owner), type):
            body = indent(dedent(code if owner == changed else "pass"), "    ")
            text += f"\n\nclass {owner}({lab.module}.{owner}):\n{body}\n"
        else:
            text += f"from {lab.module} import {owner}\n"
            text += f"{dedent(code)}\n" * (owner == changed)
    path.write_text(text)
    return str(path)


def write_solution(path, number, bodies):
    """A learner's file: the starter with {name: body} filled in."""
    text = labs.make_starter(number)
    for name, body in bodies.items():
        before, after = text.split(f"def {name}(")
        body = dedent(body).strip("\n")
        after = re.sub(r"( +)raise NotImplementedError\(.*\)",
                       lambda found, b=body: indent(b, found[1]), after, count=1)
        text = f"{before}def {name}({after}"
    assert "NotImplementedError" not in text
    path.write_text(text)
    return str(path)


def diagnoses(report):
    """{task: diagnosis} of those that failed."""
    return {r["task"]: r["diagnosis"] for r in report["tasks"] if r["diagnosis"]}


# ---- starters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", LAB_NUMBERS)
def test_starters_are_made_from_the_engine(number):
    """The engine moved on and a starter did not: run `python tutorial/labs.py`."""
    path = TUTORIAL / labs.LABS[number].folder / "starter.py"
    assert path.read_text(encoding="utf-8") == labs.make_starter(number)


@pytest.mark.parametrize("number", labs.LABS)
def test_the_starter_runs_what_its_chapter_runs(number):
    """The header of a starter and the chapter's lab section have other options."""
    assert commands(number, "run_mine.py") == [["--lab", str(number),
                                                *shlex.split(labs.LABS[number].example)]]


@pytest.mark.parametrize("number", LAB_NUMBERS)
def test_a_starter_has_nothing_of_the_solution(number):
    """A starter with points, or one that fails by something else than what is to do."""
    report = grade.grade(number, TUTORIAL / labs.LABS[number].folder / "starter.py")
    assert report["points"] == 0 and report["of"] == 10
    for task in report["tasks"]:
        assert task["diagnosis"].startswith(f"not done yet (Lab {number}, task ")


@pytest.mark.parametrize("number", LAB_NUMBERS)
def test_the_engine_is_the_solution(number):
    """A grader that asks for what the engine does not do."""
    assert diagnoses(grade.grade(number, "engine")) == {}


def test_functions_and_classes_become_starters():
    """A decorator is lost, or the bodies of functions outside classes cannot be left out."""
    lab = labs.Lab("", "kernels", "", [labs.Task("copy_blocks_reference", 1, "copy")])
    labs.LABS[0] = lab
    try:
        text = labs.make_starter(0)
    finally:
        del labs.LABS[0]
    assert 'raise NotImplementedError("Lab 0, task 1: copy")' in text
    compile(text, "starter", "exec")


# ---- wrong solutions ---------------------------------------------------------------------------

HOLD = """
    def hold(self, seq, block_ids, num_kv):
        for block_id in block_ids:
            self.free_blocks.pop(block_id, None)
            self.ref_count[block_id] += 1
        seq.block_table += block_ids
        seq.num_kv = num_kv
"""
FREE = """
    def free(self, *seqs):
        for seq in seqs:
            for block_id in reversed(seq.block_table):
                self.ref_count[block_id] -= 1
                if self.ref_count[block_id] == 0:
                    self.free_blocks[block_id] = None
            seq.block_table, seq.num_kv = [], 0
"""
APPEND = """
    def append(self, seq, num_new):
        needed = self.num_needed([(seq, num_new)])
        if needed > self.num_free:
            raise OutOfBlocks
        taken = [self._take() for _ in range(needed)]
        written = seq.block_table[seq.num_kv // self.block_size:]
        if written and self.ref_count[written[0]] > 1:
            shared = seq.block_table.pop()
            self.ref_count[shared] -= 1
            self.copies.append((shared, taken[0]))
        self.hold(seq, taken, seq.num_kv)
"""
ATTEND = """
    out = torch.empty_like(q) if out is None else out
    starts, size = query_start.tolist(), k_cache.shape[1]
    for s, num in enumerate(context_lens.tolist()):
        blocks = block_tables[s, :-(-num // size)]
        k, v = (cache[blocks].flatten(0, 1)[:num] for cache in (k_cache, v_cache))
        heads = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
        rows = q[starts[s]:starts[s + 1]]
        scores = torch.einsum("thd,chd->htc", rows, k[:, heads]) * scale
        seen = torch.ones(len(rows), len(k)).tril(num - len(rows)) > 0
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[starts[s]:starts[s + 1]] = torch.einsum("htc,chd->thd", weights, v[:, heads])
    return out
"""
ADMIT = """
    def _admit(self, group):
        size, num_blocks = self.pool.block_size, self.pool.num_blocks
        needed = sum(-(-seq.num_tokens // size) for seq in group.unfinished()) + num_blocks // 100
        num_seqs = sum(other.width for other in self.running) + group.width
        if self.running and (needed > self.pool.num_free or num_seqs > self.max_num_seqs):
            return False
        if group.blocks():
            self.pool.take_over(group, self.swap_pool)
        self.running.append(self.waiting.popleft())
        return True
"""
SCHEDULE = """
    def schedule(self):
        scheduled, left, served = [], self.max_num_batched_tokens, 0
        while left:
            if served == len(self.running) and not (self.waiting and self._admit(self.waiting[0])):
                break
            group = self.running[served]
            plan = self._plan(group, left)
            while group in self.running and self.pool.num_needed(plan) > self.pool.num_free:
                self._preempt(self.running.pop())
            if group in self.running:
                for seq, num_new in plan:
                    self.pool.append(seq, num_new)
                left -= sum(num_new for _, num_new in plan)
                scheduled += plan
                served += 1
        return scheduled
"""
PREEMPT = """
    def _preempt(self, group):
        blocks = {block_id for seq in group.seqs for block_id in seq.block_table}
        swap = {"swap": True, "recompute": False, "auto": len(group.unfinished()) > 1}
        if swap[self.preemption] and len(blocks) <= self.swap_pool.num_free:
            self.swap_pool.take_over(group, self.pool)
        else:
            self.pool.free(*group.seqs)
        self.waiting.appendleft(group)
"""
TAKE_OVER = """
    def take_over(self, group, source):
        moved = {}
        for seq in group.seqs:
            for block_id in seq.block_table:
                if block_id not in moved:
                    moved[block_id] = self._take()
            table, num_kv = [moved[block_id] for block_id in seq.block_table], seq.num_kv
            source.free(seq)
            self.hold(seq, table, num_kv)
        self.arrivals += [(old, new) for old, new in moved.items()]
"""
HOPEFUL = """
    def hopeful(beams, ended, params):
        if len(ended) < params.beam_width or not beams:
            return beams
        longest = params.early_stopping == "never" and params.length_penalty > 0
        score = beam_score(beams[0], params.max_tokens if longest else None)
        stops = params.early_stopping is True or score <= beam_score(ended[-1])
        return [] if stops else beams
"""
EXTEND = """
    def _extend_beams(self, group, sampled):
        parents, old = group.unfinished(), [seq for seq in group.seqs if seq.finish_reason]
        found = []
        for parent in parents:
            for token_id, logprob in sampled[parent][2].items():
                child = parent.fork()
                self._append_tokens(child, [token_id], [logprob])
                found.append((child, parent))
        found.sort(key=lambda pair: pair[0].cumulative_logprob, reverse=True)
        width = group.width
        beams = [child for child, _ in found if not child.finish_reason][:width]
        ended = old + [child for child, _ in found[:width] if child.finish_reason]
        ended = sorted(ended, key=beam_score, reverse=True)[:width]
        group.seqs = hopeful(beams, ended, group.params) + ended
        for child, parent in found:
            if child in group.seqs:
                self.pool.fork(parent, child)
        self.pool.free(*parents)
"""
STEPS_AHEAD = """
    def _steps_ahead(self, seqs, in_flight=0):
        num, wanted = 16, 0
        if not self.graphs:
            return 0
        for seq in seqs:
            if seq.num_kv < seq.num_tokens - 1 or seq.num_tokens == seq.num_prompt_tokens:
                return 0
            if seq.params.logprobs is not None or seq.params.repetition_penalty != 1:
                return 0
            num = min(num, self.max_model_len - seq.num_kv - in_flight)
            known = seq.num_tokens - seq.num_prompt_tokens
            wanted = max(wanted, seq.params.max_tokens - known - in_flight)
        num = min(num, wanted)
        plan = [(seq, in_flight + num) for seq in seqs]
        while num > 0 and self.pool.num_needed(plan) > self.pool.num_free:
            num -= 1
            plan = [(seq, num_new - 1) for seq, num_new in plan]
        return num
"""
LAUNCH = """
    def _launch(self, seqs, in_flight=0):
        flying, sources = [], []
        for row, seq in enumerate(seqs):
            if not seq.block_table:
                continue
            if seq.max_num_tokens - seq.num_tokens > in_flight:
                flying.append(seq)
                sources.append(row)
        num_steps = self._steps_ahead(flying, in_flight)
        if num_steps == 0 or in_flight and self.scheduler.waiting:
            return None
        for seq in flying:
            self.pool.append(seq, in_flight + num_steps)
        self._move_blocks()
        if in_flight:
            known, tables = [], []
            for seq in flying:
                known.append((seq.num_kv + in_flight) // self.pool.block_size)
                tables.append(seq.block_table)
            self.graphs.go_on(sources, known, tables)
        else:
            batch = nanopaged.make_batch([(seq, 1) for seq in flying], self.kv_cache)
            options = nanopaged.sampling_options(flying, self.kv_cache.device)
            self.graphs.load(batch, *options)
        steps, landed = self.graphs.run_ahead(num_steps)
        return flying, num_steps, steps, landed
"""
LAND = """
    def _land(self, seqs, num_steps, steps, landed):
        landed.synchronize()
        tokens, logprobs = steps.tolist()
        for i in range(num_steps):
            for row, seq in enumerate(seqs):
                if seq.finish_reason:
                    continue
                if not seq.block_table:
                    continue
                self.pool.publish(seq, 1)
                seq.num_kv += 1
                self._append_tokens(seq, [int(tokens[row][i])], [logprobs[row][i]])
                self.counts["generated_tokens"] += 1
        self._count(num_steps * len(seqs), num_steps)
        return [group for group in self.scheduler.running if {*group.seqs} & {*seqs}]
"""
FLIGHTS = LAUNCH + LAND
# as the engine does it, but without a look at stop strings
TOGETHER = LAUNCH + """
    def _land(self, seqs, num_steps, steps, landed):
        landed.synchronize()
        for row, seq in enumerate(seqs):
            if seq.block_table and not seq.finish_reason:
                known = seq.num_tokens
                self._append_tokens(seq, steps[0, row].long().tolist(), steps[1, row].tolist())
                self.pool.publish(seq, seq.num_tokens - known)
                seq.num_kv += seq.num_tokens - known
                self.counts["generated_tokens"] += seq.num_tokens - known
        self._count(num_steps * len(seqs), num_steps)
        return [*self.scheduler.running]
"""


def attend_but(right, wrong):
    """A paged_attention_reference with one line of it wrong."""
    return ("def paged_attention_reference(q, k_cache, v_cache, block_tables, context_lens, "
            "query_start, *, max_query_len, scale, out=None):" + but(ATTEND, right, wrong))


def batch_but(change):
    """A flat_batch of which something is changed behind."""
    return f"""
def flat_batch(rows, block_size, device):
    batch = kernels.flat_batch(rows, block_size, device)
    new = [range(first, first + len(token_ids)) for token_ids, first, _, _ in rows]
    {change}
    return batch
"""


def but(code, right, wrong):
    """A solution with one line of it wrong."""
    assert code.count(right) == 1
    return code.replace(right, wrong)


# Lab 5: {kernel: body}, a right solution; a wrong one has a line of it changed.
KERNELS = {
    "write_kv_kernel": """
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNK)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        place = (slot // B) * c_block + (slot % B) * c_slot + (i // D) * c_head + i % D
        x = tl.load(k + token * k_token + i, mask=i < SIZE)
        tl.store(k_cache + place, x, mask=i < SIZE)
        x = tl.load(v + token * v_token + i, mask=i < SIZE)
        tl.store(v_cache + place, x, mask=i < SIZE)
""",
    "attention_kernel": """
    key = tile * TILE + tl.arange(0, TILE)
    slot = block_ids.to(tl.int64) * c_block + key % B * c_slot
    there = (key < seen)[:, None] & (d < D)
    keys = tl.load(k_cache + slot[:, None] + column, mask=there, other=0.0)
    scores = tl.sum(qs[:, None, :] * keys[None, :, :], 2) * scale
    scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[:, None])
    total *= shrink
    total += tl.sum(weights, 1)
    values = tl.load(v_cache + slot[:, None] + column, mask=there, other=0.0)
    y *= shrink[:, None]
    y += tl.dot(weights, values, input_precision="ieee")
    top = new_top
    block_ids = tl.load(tables + (key + TILE) // B, mask=key + TILE < seen, other=0)
""",
    "merge_kernel": """
    token, d = tl.program_id(1), tl.arange(0, DIM)
    row = token.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    num_parts = tl.load(parts_of + row)
    if num_parts == 1:
        return
    if token >= tl.load(query_start + num_seqs):
        return
    top, total, y = -1e30, 0.0, tl.zeros([DIM], tl.float32)
    for part in range(0, num_parts):
        lse = tl.load(part_lse + row * most_parts + part)
        new_top = tl.maximum(top, lse)
        shrink, weight = tl.exp2(top - new_top), tl.exp2(lse - new_top)
        part_of_y = tl.load(part_y + (row * most_parts + part) * DIM + d)
        y = y * shrink + part_of_y * weight
        total = total * shrink + weight
        top = new_top
    y = y / tl.where(total > 0, total, 1.0)
    tl.store(out + token * o_token + tl.program_id(0) * o_head + d, y, mask=d < D)
"""}


def kernel_but(name, right, wrong):
    """The kernels of lab 5 with one line wrong."""
    return KERNELS | {name: but(KERNELS[name], right, wrong)}


WRONG = {
    # lab 3
    "tables_are_one_list": (3, 1, "one list", but(
        HOLD, "seq.block_table += block_ids", "seq.block_table = seq.block_table and "
        "seq.block_table + block_ids or block_ids")),
    "held_blocks_stay_free": (3, 1, "still count as free", but(
        HOLD, "self.free_blocks.pop(block_id, None)", "pass")),
    "table_is_replaced": (3, 1, "replaced the block table", but(
        HOLD, "seq.block_table += block_ids", "seq.block_table = [*block_ids]")),
    "num_kv_is_not_noted": (3, 1, "also notes how many", but(
        HOLD, "seq.num_kv = num_kv", "pass")),
    "held_twice_raises": (3, 1, "second sequence .* the same blocks: hold.. raised KeyError", but(
        HOLD, "pop(block_id, None)", "pop(block_id)")),
    "one_block_too_many_when_full": (3, 2, "full blocks need no further one", """
        def num_needed(self, plan):
            return sum((seq.num_kv + num_new) // self.block_size + 1 - len(seq.block_table)
                       for seq, num_new in plan)"""),
    "rounded_down": (3, 2, "so round up", """
        def num_needed(self, plan):
            return sum((seq.num_kv + num_new) // self.block_size - len(seq.block_table)
                       for seq, num_new in plan)"""),
    "counted_from_num_tokens": (3, 2, "not from num_tokens", """
        def num_needed(self, plan):
            return sum(-(-((seq.num_tokens if seq.num_kv else 0) + num_new) // self.block_size)
                       - len(seq.block_table) for seq, num_new in plan)"""),
    "less_than_none": (3, 2, "takes none, and gives none", """
        def num_needed(self, plan):
            return sum(-(-(seq.num_kv + num_new) // self.block_size) - len(seq.block_table)
                       for seq, num_new in plan)"""),
    "only_the_first_of_the_plan": (3, 2, "sum over the plan", """
        def num_needed(self, plan):
            return super().num_needed(plan[:1])"""),
    "taken_before_it_is_known": (3, 3, "before you change anything", """
        def append(self, seq, num_new):
            for _ in range(self.num_needed([(seq, num_new)])):
                if not self.num_free:
                    raise OutOfBlocks
                self.hold(seq, [self._take()], seq.num_kv)"""),
    "the_last_block_is_not_given": (3, 3, "1 is free: that is enough", but(
        APPEND, "needed > self.num_free", "needed >= self.num_free")),
    "num_kv_before_the_step": (3, 3, "append.. only makes room", but(
        APPEND, "self.hold(seq, taken, seq.num_kv)",
        "self.hold(seq, taken, seq.num_kv + num_new)")),
    "no_capacity_check": (3, 3, "must raise OutOfBlocks, it raised KeyError", but(
        APPEND, "if needed > self.num_free", "if False")),
    "a_new_block_for_each_token": (3, 3, "8th token has a slot", """
        def append(self, seq, num_new):
            needed = max(1, self.num_needed([(seq, num_new)]))
            if needed > self.num_free:
                raise OutOfBlocks
            self.hold(seq, [self._take() for _ in range(needed)], seq.num_kv)"""),
    "an_endless_loop": (3, 3, "7 tokens: no end after .* s of computing", """
        def append(self, seq, num_new):
            while self.num_needed([(seq, num_new)]):
                try:
                    pass
                except:
                    pass"""),
    "readers_are_ignored": (3, 4, "c still reads them", but(
        FREE, "self.ref_count[block_id] -= 1", "self.ref_count[block_id] = 0")),
    "never_given_back": (3, 4, "still do not count as free", but(
        FREE, "self.free_blocks[block_id] = None", "pass")),
    "table_is_kept": (3, 4, "it would go on using", but(
        FREE, "seq.block_table, seq.num_kv = [], 0", "seq.num_kv = 0")),
    "num_kv_is_kept": (3, 4, "K and V are gone", but(
        FREE, "seq.block_table, seq.num_kv = [], 0", "seq.block_table = []")),
    "tokens_are_lost": (3, 4, "changed its tokens", but(
        FREE, "seq.block_table, seq.num_kv = [], 0",
        "seq.token_ids, seq.block_table, seq.num_kv = [], [], 0")),
    # lab 4
    "positions_of_the_step": (4, 1, "from the beginning of the text, not of this step", batch_but(
        "batch.positions = torch.cat([torch.arange(len(span)) for span in new])")),
    "slots_are_positions": (4, 1, "those are positions", batch_but(
        "batch.slot_mapping = batch.positions")),
    "slots_without_block_size": (4, 1, "first one is block_id . B", batch_but(
        "batch.slot_mapping = torch.tensor([row[2][i // block_size] + i % block_size "
        "for row, span in zip(rows, new) for i in span])")),
    "blocks_from_the_first_on": (4, 1, "look its block up by its position", batch_but(
        "batch.slot_mapping = torch.tensor([row[2][i // block_size] * block_size + i % block_size "
        "for row, span in zip(rows, new) for i in range(len(span))])")),
    "context_without_this_step": (4, 1, "a token sees itself", batch_but(
        "batch.context_lens -= batch.query_start.diff()")),
    "no_end_of_the_last": (4, 1, "T, where the last sequence ends", batch_but(
        "batch.query_start = batch.query_start[:-1]")),
    "all_logits": (4, 1, "only rows whose logits are wanted", batch_but(
        "batch.last_rows = batch.query_start[1:].long() - 1")),
    "tables_are_padded_in_place": (4, 1, "pad a copy", batch_but(
        "[row[2].extend([0] * (3 - len(row[2]))) for row in rows]")),
    "attend_lacks_an_argument": (4, 1, "other arguments filled in: calling your code, or using its "
                                 "result, raised TypeError: .*max_query_len", batch_but(
        "batch.attend.keywords.pop('max_query_len')")),
    "no_mask": (4, 2, "no causal mask", attend_but("~seen", "~seen & False")),
    "mask_of_a_whole_prompt": (4, 2, "takes the first query for the first token", attend_but(
        ".tril(num - len(rows))", ".tril()")),
    "own_key_is_masked": (4, 2, "does not see its own key", attend_but(
        ".tril(num - len(rows))", ".tril(num - len(rows) - 1)")),
    "whole_blocks": (4, 2, "6 tokens: the result has NaN", attend_but("[:num]", "")),
    "heads_take_turns": (4, 2, "neighbours share one", attend_but(
        "// (q.shape[1] // k.shape[1])", "% k.shape[1]")),
    "scale_is_forgotten": (4, 2, "not multiplied by scale", attend_but(" * scale", "")),
    "table_is_sorted": (4, 2, "in the order of the block table", attend_but(
        ":-(-num // size)]", ":-(-num // size)].sort().values")),
    "a_softmax_for_each_block": (4, 2, "one over all blocks", attend_but(
        ").softmax(-1)", ").split(size, -1); weights = torch.cat("
        "[part.softmax(-1) for part in weights], -1)")),
    "one_table_for_all": (4, 2, "a chunk, a decode and a prompt: ", attend_but(
        "block_tables[s,", "block_tables[0,")),
    "out_is_ignored": (4, 2, "written to `out`", attend_but(
        "torch.empty_like(q) if out is None else out", "torch.empty_like(q)")),
    # lab 5
    "no_offset_within_the_block": (5, 1, "slot % B, is missing", kernel_but(
        "write_kv_kernel", " + (slot % B) * c_slot", "")),
    "no_block": (5, 1, "slot // B, is missing", kernel_but(
        "write_kv_kernel", "(slot // B) * c_block + ", "")),
    "slots_of_one_element": (5, 1, "written outside of the cache", kernel_but(
        "write_kv_kernel", "(slot // B) * c_block + (slot % B) * c_slot", "slot * c_block")),
    "v_is_k": (5, 1, "V: it is the other's cache", kernel_but(
        "write_kv_kernel", "tl.load(v + token * v_token", "tl.load(k + token * k_token")),
    "heads_lie_in_a_row": (5, 1, "heads first: wrong", kernel_but(
        "write_kv_kernel", "(i // D) * c_head + i % D", "i")),
    "all_heads_are_the_first": (5, 1, "head 0 is right", kernel_but(
        "write_kv_kernel", "k + token * k_token + i", "k + token * k_token + i % D")),
    "chunk_is_not_masked": (5, 1, "or it lands on the neighbours", kernel_but(
        "write_kv_kernel", "tl.store(k_cache + place, x, mask=i < SIZE)",
        "tl.store(k_cache + place, x)")),
    "strides_are_guessed": (5, 1, "use the strides that are given", kernel_but(
        "write_kv_kernel", "tl.load(k + token * k_token", "tl.load(k + token * SIZE")),
    "padding_is_written": (5, 1, "a slot below 0 is the padding", kernel_but(
        "write_kv_kernel", "if slot >= 0:", "if slot >= -1:")),
    "padding_is_only_slot_minus_one": (5, 1, "a slot below 0 is the padding", kernel_but(
        "write_kv_kernel", "if slot >= 0:", "if slot != -1:")),
    "no_shrink": (5, 2, "`y` and `total` are not shrunk", kernel_but(
        "attention_kernel", "tl.exp2(top - new_top)", "tl.exp2(top - top)")),
    "y_is_not_shrunk": (5, 2, "`y` is not shrunk", kernel_but(
        "attention_kernel", "y *= shrink[:, None]", "")),
    "total_is_not_shrunk": (5, 2, "`total` is not shrunk", kernel_but(
        "attention_kernel", "total *= shrink", "")),
    "the_first_tiles_blocks": (5, 2, "three tiles: every tile reads the blocks of the first",
                               kernel_but("attention_kernel", "block_ids = tl.load(tables + "
                                          "(key + TILE) // B, mask=key + TILE < seen, other=0)",
                                          "")),
    "what_is_not_there": (5, 2, "8 tokens, half a tile: the result has NaN", kernel_but(
        "attention_kernel", "(key < seen)[:, None] & (d < D)",
        "(key < seen + TILE)[:, None] & (d < D)")),
    "first_slot_only": (5, 2, "key % B . c_slot is missing", kernel_but(
        "attention_kernel", " + key % B * c_slot", "")),
    "later_keys_are_seen": (5, 2, "compare `key` with `position`", kernel_but(
        "attention_kernel", "key[None, :] <= position[:, None]", "(key < seen)[None, :]")),
    "no_key_of_its_own": (5, 2, "<=, not <", kernel_but(
        "attention_kernel", "key[None, :] <= position", "key[None, :] < position")),
    "weights_of_base_e": (5, 2, "use exp2, not exp", kernel_but(
        "attention_kernel", "weights = tl.exp2(", "weights = tl.exp(")),
    "scores_are_not_scaled": (5, 2, "not multiplied by scale", kernel_but(
        "attention_kernel", ", 2) * scale", ", 2)")),
    "parts_count_the_same": (5, 3, "all parts count the same", kernel_but(
        "merge_kernel", "weight = tl.exp2(top - new_top), tl.exp2(lse - new_top)",
        "weight = 1.0, 1.0")),
    "parts_of_base_e": (5, 3, "lse is a logarithm to base 2", kernel_but(
        "merge_kernel", "tl.exp2(top - new_top), tl.exp2(lse - new_top)",
        "tl.exp(top - new_top), tl.exp(lse - new_top)")),
    "not_divided": (5, 3, "is not divided", kernel_but(
        "merge_kernel", "y = y / tl.where(total > 0, total, 1.0)", "")),
    "all_parts_are_read": (5, 3, "`parts_of` says how many", kernel_but(
        "merge_kernel", "range(0, num_parts)", "range(0, most_parts)")),
    "no_maximum": (5, 3, "overflows: subtract", kernel_but(
        "merge_kernel", "tl.maximum(top, lse)", "0.0")),
    "infinity_minus_infinity": (5, 3, "-inf minus -inf", kernel_but(
        "merge_kernel", "top, total, y = -1e30,", "top, total, y = float('-inf'),")),
    "one_part_is_merged": (5, 3, "one part: its result is in", kernel_but(
        "merge_kernel", "if num_parts == 1:", "if num_parts == 0:")),
    "rows_of_nobody": (5, 3, "must be left as it is", kernel_but(
        "merge_kernel", "if token >= tl.load(query_start + num_seqs):", "if token < 0:")),
    # lab 6
    "more_than_the_budget": (6, 1, "no more than the budget", """
        def _plan(self, group, budget):
            return super()._plan(group, 64)"""),
    "num_kv_is_ignored": (6, 1, "count from num_kv", """
        def _plan(self, group, budget):
            return [(seq, min(seq.num_tokens, budget)) for seq in group.unfinished()]"""),
    "half_a_group": (6, 1, "together, or none", """
        def _plan(self, group, budget):
            seqs = group.unfinished()
            if len(seqs) > 1 and all(seq.num_kv == seq.num_tokens - 1 for seq in seqs):
                return [(seq, 1) for seq in seqs[:budget]]
            return super()._plan(group, budget)"""),
    "who_has_ended_goes_on": (6, 1, "has ended: leave it out", """
        def _plan(self, group, budget):
            if len(group.seqs) == 3:
                return [(seq, 1) for seq in group.seqs] if budget >= 3 else []
            return super()._plan(group, budget)"""),
    "sampled_before_the_others": (6, 1, "stop before the last token of each", """
        def _plan(self, group, budget):
            seqs = group.unfinished()
            if all(seq.num_kv >= seq.num_tokens - 1 for seq in seqs):
                return super()._plan(group, budget)
            seq = max(seqs, key=lambda seq: seq.num_tokens - seq.num_kv)
            return [(seq, min(seq.num_tokens - seq.num_kv, budget))]"""),
    "no_watermark": (6, 2, "1 % of the pool, 2 blocks, must stay free", but(
        ADMIT, " + num_blocks // 100", "")),
    "the_last_block_is_kept": (6, 2, "B needs 4: .*that is enough", but(
        ADMIT, "needed > self.pool.num_free", "needed >= self.pool.num_free")),
    "only_one_block_must_fit": (6, 2, "its whole prompt must fit", but(
        ADMIT, "-(-seq.num_tokens // size)", "1")),
    "locked_out": (6, 2, "alone it always fits", but(
        ADMIT, "self.running and (needed", "(needed")),
    "groups_are_counted": (6, 2, "the sequences that a group grows to", but(
        ADMIT, "sum(other.width for other in self.running) + group.width",
        "len(self.running) + 1")),
    "runs_and_waits": (6, 2, "A run and nobody waits, but A run and A wait", but(
        ADMIT, "self.waiting.popleft()", "group")),
    "left_on_the_cpu": (6, 2, "takes its blocks along", but(
        ADMIT, "self.pool.take_over(group, self.swap_pool)", "pass")),
    "jumps_the_queue": (6, 3, "C must not jump the queue", """
        def schedule(self):
            for group in [*self.waiting]:
                self.waiting.remove(group)
                self.waiting.appendleft(group)
                if not self._admit(group):
                    self.waiting.append(self.waiting.popleft())
            return super().schedule()"""),
    "the_earliest_is_preempted": (6, 3, "B, the latest, must be preempted", but(
        SCHEDULE, "self.running.pop()", "self.running.pop(0)")),
    "nobody_is_preempted": (6, 3, "B, the latest, must be preempted", but(
        SCHEDULE, "self._preempt(self.running.pop())", "return scheduled")),
    "budget_is_not_lowered": (6, 3, "lower the budget", but(
        SCHEDULE, "sum(num_new for _, num_new in plan)", "0 or 0")),
    "blocks_for_the_whole_prompt": (6, 3, "makes room for these, not for more", but(
        SCHEDULE, "self.pool.append(seq, num_new)",
        "self.pool.append(seq, seq.num_tokens - seq.num_kv)")),
    "newcomers_wait_for_the_end": (6, 3, "all begin at once", but(
        SCHEDULE, "not (self.waiting and", "not (not self.running and self.waiting and")),
    # lab 7
    "goes_to_the_queues_end": (7, 1, "B came before C", but(PREEMPT, "appendleft", "append")),
    "output_is_dropped": (7, 1, "its tokens have changed", """
        def _preempt(self, group):
            super()._preempt(group)
            for seq in group.seqs:
                seq.token_ids = seq.token_ids[:seq.num_prompt_tokens - 1]"""),
    "blocks_are_kept": (7, 1, "it still holds blocks", but(
        PREEMPT, "self.pool.free(*group.seqs)", "pass")),
    "one_of_two_is_freed": (7, 1, "another of its sequences still holds blocks", but(
        PREEMPT, "self.pool.free(*group.seqs)", "self.pool.free(group.seqs[0])")),
    "nobody_lets_it_in_again": (7, 1, "so B C wait", but(
        PREEMPT, "self.waiting.appendleft(group)", "pass")),
    "moved_once_for_each_reader": (7, 2, "what they share is moved once", but(
        TAKE_OVER, "if block_id not in moved:", "if True:")),
    "arrivals_the_wrong_way_round": (7, 2, "the wrong way round", but(
        TAKE_OVER, "(old, new) for", "(new, old) for")),
    "num_kv_is_lost": (7, 2, "moved, not lost", but(TAKE_OVER, "table, num_kv)", "table, 0)")),
    "not_freed_where_it_came_from": (7, 2, "still held where they came from", but(
        TAKE_OVER, "source.free(seq)", "seq.block_table = []")),
    "arrivals_are_replaced": (7, 2, "arrivals of the first are forgotten", but(
        TAKE_OVER, "self.arrivals +=", "self.arrivals =")),
    "nobody_is_told": (7, 2, "not told what to copy", but(
        TAKE_OVER, "[(old, new) for old, new in moved.items()]", "[]")),
    "rows_are_counted_for_blocks": (7, 3, "moved once, so there is room", but(
        PREEMPT, "len(blocks) <=", "sum(len(seq.block_table) for seq in group.seqs) <=")),
    "no_look_at_the_room": (7, 3, "the CPU's pool 2, .*raised KeyError", but(
        PREEMPT, " and len(blocks) <= self.swap_pool.num_free", "")),
    "auto_swaps_all": (7, 3, "a group of one sequence is recomputed", but(
        PREEMPT, "len(group.unfinished()) > 1", "True")),
    "swapped_and_forgotten": (7, 3, "num_kv is 0, but K and V are not lost", but(
        PREEMPT, "self.swap_pool.take_over(group, self.pool)", """self.swap_pool.take_over(
                group, self.pool)
            for seq in group.seqs:
                seq.num_kv = 0""")),
    # lab 8
    "child_is_no_reader": (8, 1, "must count one more reader", """
        def fork(self, parent, child):
            child.block_table, child.num_kv = [*parent.block_table], parent.num_kv"""),
    "child_has_the_parents_list": (8, 1, "one list: append to one changes both", """
        def fork(self, parent, child):
            for block_id in parent.block_table:
                self.ref_count[block_id] += 1
            child.block_table, child.num_kv = parent.block_table, parent.num_kv"""),
    "everything_is_copied_at_once": (8, 1, "fork.. took 2 blocks", """
        def fork(self, parent, child):
            taken = [self._take() for _ in parent.block_table]
            self.copies += zip(parent.block_table, taken)
            self.hold(child, taken, parent.num_kv)"""),
    "child_has_nothing_to_read": (8, 1, "num_kv is 0", """
        def fork(self, parent, child):
            self.hold(child, parent.block_table, 0)"""),
    "copies_are_not_counted": (8, 2, "needs a block for its copy, but num_needed is 0", """
        def num_needed(self, plan):
            return sum(max(0, -(-(seq.num_kv + num_new) // self.block_size) - len(seq.block_table))
                       for seq, num_new in plan)"""),
    "a_copy_for_every_writer": (8, 2, "the other then has it alone, so 1 copy, but num_needed is 2",
                                """
        def num_needed(self, plan):
            return sum(super(BlockPool, self).num_needed([one]) for one in plan)"""),
    "full_blocks_are_counted": (8, 2, "which nobody writes to any more", """
        def num_needed(self, plan):
            return super().num_needed(plan) + sum(
                seq.num_kv > 0 and seq.num_kv % self.block_size == 0
                and self.ref_count[seq.block_table[-1]] > 1 for seq, _ in plan)"""),
    "no_copy": (8, 3, "would overwrite what a2 reads", """
        def append(self, seq, num_new):
            rows = -(-(seq.num_kv + num_new) // self.block_size) - len(seq.block_table)
            self.hold(seq, [self._take() for _ in range(rows)], seq.num_kv)"""),
    "the_others_copy_it_too": (8, 3, "when a1 left, the block lost a reader", but(
        APPEND, "self.ref_count[shared] -= 1", "pass")),
    "the_wrong_way_round": (8, 3, "the wrong way round", but(
        APPEND, "(shared, taken[0])", "(taken[0], shared)")),
    "the_copy_goes_to_the_end": (8, 3, "takes the place of block", but(
        APPEND, "shared = seq.block_table.pop()", "shared = seq.block_table[-1]")),
    "the_engine_is_not_told": (8, 3, "copies is empty", but(
        APPEND, "self.copies.append((shared, taken[0]))", "pass")),
    "copies_when_it_need_not": (8, 3, "nothing is written to them", """
        def append(self, seq, num_new):
            if seq.block_table and self.ref_count[seq.block_table[-1]] > 1:
                shared, taken = seq.block_table.pop(), self._take()
                self.ref_count[shared] -= 1
                self.copies.append((shared, taken))
                self.hold(seq, [taken], seq.num_kv)
            super().append(seq, num_new)"""),
    "changed_before_it_is_known": (8, 3, "look first", """
        def append(self, seq, num_new):
            written = seq.block_table[seq.num_kv // self.block_size:]
            if written and self.ref_count[written[0]] > 1:
                shared = seq.block_table.pop()
                self.ref_count[shared] -= 1
                if not self.num_free:
                    raise OutOfBlocks
                taken = self._take()
                self.copies.append((shared, taken))
                self.hold(seq, [taken], seq.num_kv)
            super().append(seq, num_new)"""),
    # lab 9
    "tokens_are_one_list": (9, 1, "their token_ids are one list", """
        def fork(self):
            child = copy.copy(self)
            child.block_table, child.num_kv = [], 0
            return child"""),
    "output_becomes_prompt": (9, 1, "what was generated has become prompt", """
        def fork(self):
            return Sequence(self.token_ids, self.params, self.cache_salt)"""),
    "a_child_may_say_more": (9, 1, "as long as its parent, 19 tokens, and no longer", """
        def fork(self):
            child = Sequence(self.token_ids, self.params, self.cache_salt)
            child.num_prompt_tokens = self.num_prompt_tokens
            return child"""),
    "holds_uncounted_blocks": (9, 1, "holds no block before BlockPool.fork", """
        def fork(self):
            child = super().fork()
            child.block_table, child.num_kv = [*self.block_table], self.num_kv
            return child"""),
    "salt_is_copied": (9, 1, "a copy of it is another salt", """
        def fork(self):
            child = copy.deepcopy(self)
            child.block_table, child.num_kv = [], 0
            return child"""),
    "the_prompt_counts_as_well": (9, 2, "only generated tokens count", """
        def beam_score(seq, num_generated=None):
            return seq.cumulative_logprob / (
                num_generated or seq.num_tokens) ** seq.params.length_penalty"""),
    "penalty_is_a_factor": (9, 2, "not multiplied by it", """
        def beam_score(seq, num_generated=None):
            num_generated = num_generated or seq.num_tokens - seq.num_prompt_tokens
            return seq.cumulative_logprob / (num_generated * seq.params.length_penalty or 1)"""),
    "other_length_is_ignored": (9, 2, "takes the place of the text's own length", """
        def beam_score(seq, num_generated=None):
            return nanopaged.beam_score(seq)"""),
    "stops_with_the_first_end": (9, 3, "fewer than beam_width texts have ended", but(
        HOPEFUL, "len(ended) < params.beam_width", "not ended")),
    "against_the_best_that_ended": (9, 3, "above the worst ended text's", but(
        HOPEFUL, "ended[-1]", "ended[0]")),
    "sums_are_compared": (9, 3, "compare scores", but(
        HOPEFUL, "score <= beam_score(ended[-1])",
        "beams[0].cumulative_logprob <= ended[-1].cumulative_logprob")),
    "on_while_it_is_as_good": (9, 3, "no better than the worst", but(HOPEFUL, "<=", "<")),
    "never_is_always": (9, 3, "at max_tokens, 8, the best beam may have", but(
        HOPEFUL, "params.max_tokens if longest else None", "None")),
    "longer_is_always_better": (9, 3, "a text gets no better as it grows|not that at", but(
        HOPEFUL, " and params.length_penalty > 0", "")),
    "says_yes_or_no": (9, 3, "it must be a list", but(
        HOPEFUL, "return [] if stops else beams", "return not stops")),
    "parents_freed_before_the_forks": (9, 4, "before the parent is freed", but(
        but(EXTEND, "        self.pool.free(*parents)\n", ""),
        "        for child, parent in found:\n",
        "        self.pool.free(*parents)\n        for child, parent in found:\n")),
    "parents_are_never_freed": (9, 4, "counts as a reader until it is freed", but(
        EXTEND, "self.pool.free(*parents)", "pass")),
    "only_the_childless_are_freed": (9, 4, "also one that beams go on from", but(
        EXTEND, "self.pool.free(*parents)",
        "self.pool.free(*({*parents} - {p for c, p in found if c in group.seqs}))")),
    "only_who_has_children_is_freed": (9, 4, "that nothing goes on from must be freed", but(
        EXTEND, "self.pool.free(*parents)",
        "self.pool.free(*{p for c, p in found if c in group.seqs})")),
    "all_successors_are_forked": (9, 4, "who was not chosen must not be forked", but(
        EXTEND, "if child in group.seqs:", "if True:")),
    "nothing_is_forked": (9, 4, "has no blocks", but(
        EXTEND, "self.pool.fork(parent, child)", "pass")),
    "sorted_the_wrong_way": (9, 4, 'two beams from the prompt: the beams are "c" "b"', but(
        EXTEND, "pair[0].cumulative_logprob, reverse=True", "pair[0].cumulative_logprob")),
    "each_beam_for_itself": (9, 4, "two best of all successors are both", but(
        EXTEND, "beams = [child for child, _ in found if not child.finish_reason][:width]",
        "beams = [child for child, p in found if not child.finish_reason and (len(parents) == 1 or "
        "child is next(c for c, q in found if q is p and not c.finish_reason))][:width]")),
    "ranked_by_the_last_token": (9, 4, "but sums of log-probabilities count", but(
        EXTEND, "pair[0].cumulative_logprob, ",
        "pair[0].cumulative_logprob - pair[1].cumulative_logprob, ")),
    "ends_take_the_place_of_beams": (9, 4, "its place as a beam goes to the next one", but(
        EXTEND, "if not child.finish_reason][:width]", "][:width]; "
        "beams = [child for child in beams if not child.finish_reason]")),
    "every_end_counts": (9, 4, "only an end among the beam_width best", but(
        EXTEND, "found[:width] if child", "found if child")),
    "earlier_ends_are_forgotten": (9, 4, '"a." ended before, and stays', but(
        EXTEND, "ended = old + ", "ended = ")),
    "ends_are_ranked_by_sums": (9, 4, "has the better score, so it comes first", but(
        EXTEND, "key=beam_score", "key=lambda seq: seq.cumulative_logprob")),
    "too_many_ends_are_kept": (9, 4, "the best beam_width of them are kept", but(
        EXTEND, "reverse=True)[:width]\n        group", "reverse=True)\n        group")),
    "goes_on_without_hope": (9, 4, "hopeful.. says that nobody goes on", but(
        EXTEND, "hopeful(beams, ended, group.params)", "beams")),
    # lab 10
    "newest_first": (10, 1, "used last would be lost first", """
        def _take(self, content=None):
            self.free_blocks.move_to_end(next(reversed(self.free_blocks)), last=False)
            return super()._take(content)"""),
    "own_tokens_only": (10, 2, "after different beginnings, but one key", """
        def _key(self, seq, i, block_table):
            return seq.cache_salt, tuple(seq.token_ids[4 * i:4 * i + 4])"""),
    "only_a_hash": (10, 2, "the key must hold the tokens themselves", """
        def _key(self, seq, i, block_table):
            before, tokens = super()._key(seq, i, block_table)
            return before, hash(tokens)"""),
    "salt_is_ignored": (10, 2, "cache_salt", """
        def _key(self, seq, i, block_table):
            return tuple(seq.token_ids[:4 * i + 4])"""),
    "nothing_is_left_to_compute": (10, 3, "one token at least must be left", """
        def find_prefix(self, seq):
            blocks = []
            for i in range(seq.num_tokens // self.block_size):
                key = self._key(seq, i, blocks)
                if key not in self.cached:
                    break
                blocks.append(self.cached[key])
            return blocks"""),
    "published_before_it_is_computed": (10, 3, "after append.. and before publish", """
        def append(self, seq, num_new):
            super().append(seq, num_new)
            self.publish(seq, num_new)"""),
    "half_a_block_is_published": (10, 3, "when all its tokens are computed, not before", """
        def publish(self, seq, num_new):
            super().publish(seq, -(-(seq.num_kv + num_new) // 4) * 4 - seq.num_kv)"""),
    "all_held_blocks_are_published": (10, 3, "5 of 12 tokens are computed", """
        def publish(self, seq, num_new):
            super().publish(seq, max(num_new, 4 * (len(seq.block_table) - 1) - seq.num_kv))"""),
    "filled_by_two_steps": (10, 3, "may be filled by more than one step", """
        def publish(self, seq, num_new):
            super().publish(seq, num_new // self.block_size * self.block_size)"""),
    "an_end_without_its_beginning": (10, 4, "without the beginning nothing behind it", """
        def _key(self, seq, i, block_table):
            return seq.cache_salt, tuple(seq.token_ids[:4 * i + 4])
        def find_prefix(self, seq):
            keys = [self._key(seq, i, []) for i in range((seq.num_tokens - 1) // 4)]
            return [self.cached[key] for key in keys if key in self.cached]"""),
    "never_forgotten": (10, 4, "must forget what the cache knows it by", """
        def _take(self, content=None):
            block_id, _ = self.free_blocks.popitem(last=False)
            self.content[block_id] = content or object()
            return block_id"""),
    "forgotten_too_early": (10, 3, "not found any more", FREE + """
            self.cached.clear()
            self.key_of.clear()"""),
    # lab 11
    "four_steps_while_somebody_waits": (11, 1, "waits, .* no reason for fewer .* 16 would fit", but(
        STEPS_AHEAD, "= 16, 0", "= 4 if self.scheduler.waiting else 16, 0")),
    "newcomers_wait_for_ever": (11, 1, r"is \d+, it must be at most 16: a newcomer waits", but(
        STEPS_AHEAD, "= 16, 0", "= 1000, 0")),
    "sixteen_steps_for_one_token": (11, 1, "wants 1 more, .* is 16, .* at most 1: twice 1", but(
        STEPS_AHEAD, "        num = min(num, wanted)\n", "")),
    "half_of_it_for_nobody": (11, 1, "is 2, it must be at most 1: .* half of the steps", but(
        STEPS_AHEAD, "num = min(num, wanted)", "num = min(num, 2 * wanted)")),
    "wanted_at_the_beginning": (11, 1, "wants 1 more, .* is 16, .* at most 1: twice 1", but(
        STEPS_AHEAD, "seq.params.max_tokens - known -", "seq.params.max_tokens -")),
    "what_flies_is_wanted_again": (11, 1, "4 tokens .* in flight, .* at most 1: twice 1", but(
        STEPS_AHEAD, "known - in_flight", "known")),
    "the_shortest_decides": (11, 1, "wants 1 more, the other 5 more: .* 8 would fit", but(but(
        STEPS_AHEAD, "= 16, 0", "= 16, 16"), "max(wanted,", "min(wanted,")),
    "no_step_for_a_few_tokens": (11, 1, "wants 2 more, .* the result is 0, and 2 would fit", but(
        STEPS_AHEAD, "num = min(num, wanted)", "num = num if num < 2 * wanted else 0")),
    "ahead_without_graphs": (11, 1, "launches kernel by kernel", but(
        STEPS_AHEAD, "if not self.graphs:", "if False:")),
    "one_step_where_the_host_must_look": (11, 1, "the result is 1, it must be 0: .* kernel", but(
        STEPS_AHEAD, "if not self.graphs:\n            return 0",
        "if not self.graphs:\n            return 1")),
    "sixteen_steps_of_nobody": (11, 1, "nobody is left .* is 16, it must be 0", but(
        STEPS_AHEAD, "= 16, 0", "= 16, 0 if seqs else 16")),
    "logprobs_run_ahead": (11, 1, "see the logits of each step", but(
        STEPS_AHEAD, "seq.params.logprobs is not None or ", "")),
    "no_logprobs_for_zero": (11, 1, "0 is not None", but(
        STEPS_AHEAD, "seq.params.logprobs is not None", "seq.params.logprobs")),
    "penalty_runs_ahead": (11, 1, "changes the next logits", but(
        STEPS_AHEAD, " or seq.params.repetition_penalty != 1", "")),
    "prompts_run_ahead": (11, 1, "one token for each sequence$", but(
        STEPS_AHEAD, "seq.num_kv < seq.num_tokens - 1 or ", "")),
    "all_behind_a_prompt_is_there": (11, 1, "has its prompt again, but lacks 4 tokens", but(
        STEPS_AHEAD, "seq.num_kv < seq.num_tokens - 1", "seq.num_kv < seq.num_prompt_tokens")),
    "texts_are_never_forked": (11, 1, "behind a prompt n texts are forked", but(
        STEPS_AHEAD, " or seq.num_tokens == seq.num_prompt_tokens", "")),
    "passes_the_models_longest": (11, 1, "is 16, .* at most 9: the model has places", but(
        STEPS_AHEAD, "min(num, self.max_model_len - seq.num_kv - in_flight)", "num")),
    "what_flies_needs_no_places": (11, 1, "16 .* in flight, .* at most 9: the model has", but(
        STEPS_AHEAD, "seq.num_kv - in_flight)", "seq.num_kv)")),
    "no_step_ahead_near_the_end": (11, 1, "248 of 256 tokens: the result is 0, and 8 would", but(
        STEPS_AHEAD, "num = min(num, self.max_model_len - seq.num_kv - in_flight)",
        "num = num if num <= self.max_model_len - seq.num_kv - in_flight else 0")),
    "room_for_one_step": (11, 1, "for 16 tokens of each 13 blocks are needed", but(
        STEPS_AHEAD, "in_flight + num) for", "in_flight + 1) for")),
    "what_flies_has_no_blocks": (11, 1, "in flight, .* 8 blocks are needed, behind those", but(
        STEPS_AHEAD, "in_flight + num) for", "num) for")),
    "the_pools_last_block": (11, 1, "2 blocks are free: the result is 0, and 4 would fit", but(
        STEPS_AHEAD, "> self.pool.num_free", ">= self.pool.num_free")),
    "sixteen_or_none": (11, 1, "12 blocks are free: the result is 0, and 8 would fit", but(
        STEPS_AHEAD, "num -= 1", "num = 0")),
    "blocks_for_one_step": (11, 2, "flight 1: .* append room for all of them first", but(
        FLIGHTS, "self.pool.append(seq, in_flight + num_steps)", "self.pool.append(seq, 1)")),
    "no_blocks_behind_what_flies": (11, 2, "flight 2: .* 4 are in flight .* append room for", but(
        FLIGHTS, "self.pool.append(seq, in_flight + num_steps)",
        "self.pool.append(seq, num_steps)")),
    "copied_too_late": (11, 2, "_move_blocks.. comes first", but(
        FLIGHTS, "self._move_blocks()", "pass")),
    "rows_before_the_blocks": (11, 2, "the device knows .* it must get what was appended", but(but(
        FLIGHTS, "        for seq in flying:\n            self.pool.append(seq, in_flight + "
        "num_steps)\n        self._move_blocks()\n", ""), "        steps, landed =",
        "        [self.pool.append(seq, in_flight + num_steps) for seq in flying]\n"
        "        self._move_blocks()\n        steps, landed =")),
    "all_are_known": (11, 2, "flight 2: 5 blocks of a are said to be known .* it has 4", but(
        FLIGHTS, "known.append((seq.num_kv + in_flight) // self.pool.block_size)",
        "known.append(len(seq.block_table))")),
    "tables_of_everybody": (11, 2, "flight 2: .* keeps 2 rows, and gets 3 tables", but(
        FLIGHTS, "            for seq in flying:\n                known",
        "            for seq in seqs:\n                known")),
    "what_was_said_before": (11, 2, "token 6 at position 7, it must have .* known, 500 at 7", but(
        FLIGHTS, "nanopaged.make_batch([(seq, 1) for seq in flying], self.kv_cache)",
        "nanopaged.kernels.flat_batch([(seq.token_ids[-2:-1], seq.num_kv, seq.block_table, True) "
        "for seq in flying], 4, self.kv_cache.device)")),
    "from_tokens_that_nobody_knows": (11, 2, "behind a flight only the device knows them", but(
        FLIGHTS, "if in_flight:\n            known", "if False:\n            known")),
    "a_first_flight_behind_another": (11, 2, "nothing flies: load.. begins", but(
        FLIGHTS, "if in_flight:\n            known", "if True:\n            known")),
    "rows_of_this_flight": (11, 2, r"keeps rows \[0, 1\], it must be \[0, 2\]", but(
        FLIGHTS, "go_on(sources,", "go_on([*range(len(flying))],")),
    "flies_with_all_its_tokens": (11, 2, "asked about, but it will have all its tokens then", but(
        FLIGHTS, "if seq.max_num_tokens - seq.num_tokens > in_flight:", "if True:")),
    "one_token_too_few": (11, 2, "c 5, .* flight 2: c could fly, and is left", but(
        FLIGHTS, "num_tokens > in_flight:", "num_tokens > in_flight + 1:")),
    "flies_on_without_blocks": (11, 2, "asked about, but it (has ended|was aborted), and has", but(
        FLIGHTS, "            if not seq.block_table:\n                continue\n"
        "            if seq.max", "            if seq.max")),
    "asks_about_everybody": (11, 2, "asked about, but it will have all its tokens then", but(
        FLIGHTS, "self._steps_ahead(flying, in_flight)", "self._steps_ahead(seqs, in_flight)")),
    "asks_as_if_nothing_flew": (11, 2, "told that 0 tokens are in flight, and 6 are", but(
        FLIGHTS, "self._steps_ahead(flying, in_flight)", "self._steps_ahead(flying)")),
    "follows_while_somebody_waits": (11, 2, "somebody waits, .*: nothing may follow", but(
        FLIGHTS, " or in_flight and self.scheduler.waiting", "")),
    "nobody_flies_in_a_queue": (11, 2, "somebody waits, and nothing is in flight: the plan", but(
        FLIGHTS, "in_flight and self.scheduler.waiting", "self.scheduler.waiting")),
    "a_flight_of_no_steps": (11, 2, "_steps_ahead.. says 0: nothing is launched", but(
        FLIGHTS, "num_steps == 0 or ", "")),
    "waits_for_its_own_flight": (11, 2, "_launch.. waits for its own flight", but(
        FLIGHTS, "        return flying", "        landed.synchronize()\n        return flying")),
    "advanced_when_launched": (11, 2, "_launch.. changes num_kv", but(
        FLIGHTS, "        return flying", "        for seq in flying:\n"
        "            seq.num_kv += num_steps\n        return flying")),
    "does_not_wait_for_the_landing": (11, 2, "are read before they are there", but(
        FLIGHTS, "        landed.synchronize()\n", "")),
    "tokens_behind_a_stop_string": (11, 2, "third of which b .* one token at a time", TOGETHER),
    "tokens_behind_an_end": (11, 2, "behind the end is dropped", but(
        FLIGHTS, "if seq.finish_reason:", "if False:")),
    "tokens_for_who_was_aborted": (11, 2, "b is aborted .* raised IndexError: .*publish", but(
        FLIGHTS, "                if not seq.block_table:\n                    continue\n", "")),
    "num_kv_is_not_advanced": (11, 2, "all but the last have K and V", but(
        FLIGHTS, "seq.num_kv += 1", "pass")),
    "not_published": (11, 2, "the prefix cache finds", but(
        FLIGHTS, "self.pool.publish(seq, 1)", "pass")),
    "published_too_late": (11, 2, "the prefix cache finds", but(but(
        FLIGHTS, "self.pool.publish(seq, 1)", "pass"),
        "seq.num_kv += 1", "seq.num_kv += 1; self.pool.publish(seq, 1)")),
    "tokens_are_floats": (11, 2, "a token is a float", but(
        FLIGHTS, "[int(tokens[row][i])]", "[tokens[row][i]]")),
    "padding_is_read": (11, 2, "raised ValueError", but(
        FLIGHTS, "            for row, seq in enumerate(seqs):\n                if seq.finish",
        "            for row, (seq, _) in enumerate(zip(seqs, tokens, strict=True)):\n"
        "                if seq.finish")),
    "drawn_tokens_are_counted": (11, 2, "generated_tokens rises by", but(but(
        FLIGHTS, '                self.counts["generated_tokens"] += 1\n', ""),
        "        self._count(", '        self.counts["generated_tokens"] += num_steps * len(seqs)\n'
        "        self._count(")),
    "kept_tokens_are_computed": (11, 2, "_count.. takes the tokens of all steps", but(
        FLIGHTS, "self._count(num_steps * len(seqs), num_steps)", "self._count(len(seqs))")),
    "a_group_for_each_text": (11, 2, "each once", but(
        FLIGHTS, "[group for group in self.scheduler.running if {*group.seqs} & {*seqs}]",
        "[group for group in self.scheduler.running for seq in group.seqs]")),
}


@needs_interpreter
@pytest.mark.parametrize("name", [name for name in WRONG if WRONG[name][0] == 5])
def test_wrong_kernels(name, tmp_path):
    """As below, in lab 5, where tasks do not need each other, and each takes a second."""
    number, task, words, bodies = WRONG[name]
    path = write_solution(tmp_path / "mine.py", number, bodies)
    diagnosis = labs.examine(grade.load_tasks(number)[task], number, labs.find_file(number, path))
    assert re.search(words, diagnosis or "") and "\n" not in diagnosis, diagnosis


@pytest.mark.parametrize("name", [name for name in WRONG if WRONG[name][0] != 5])
def test_wrong_solutions(name, tmp_path, monkeypatch):
    """A mistake that earns the points, or whose diagnosis does not name it."""
    monkeypatch.setattr(labs, "SECONDS_PER_TASK", 0.5)
    number, task, words, code = WRONG[name]
    report = grade.grade(number, write_class(tmp_path / "mine.py", code, number))
    found = diagnoses(report)
    assert re.search(words, found.get(task, "")), found
    assert "\n" not in found[task] and report["points"] < report["of"]
    assert min(found) == task, f"an earlier task complains first: {found}"


def test_enough_wrong_solutions():
    """A lab with fewer than three seeded mistakes, or a task without one."""
    for number in labs.LABS:
        tasks = [task for lab_number, task, _, _ in WRONG.values() if lab_number == number]
        assert len(tasks) >= 3 and {*tasks} == {*range(1, len(labs.LABS[number].tasks) + 1)}


@pytest.mark.parametrize("code, words", [
    ("class BlockPool:\n    def hold(self:\n", "is no Python: .*line 2"),
    ("import nanopaged\nx = 1 / 0\n", "ZeroDivisionError: division by zero .line 2: x = 1 / 0"),
    ("from nanopaged import Sequence\n", "has no BlockPool.hold"),
    ("class BlockPool:\n    hold = num_needed = 1\n", "has no BlockPool.append"),
    ("while True:\n    pass\n", "does not come to an end"),
])
def test_files_that_are_no_solution(code, words, tmp_path, monkeypatch):
    """A traceback of the grader's, or an error that does not say where the learner must look."""
    monkeypatch.setattr(labs, "SECONDS_PER_TASK", 0.3)
    path = tmp_path / "mine.py"
    path.write_text(code)
    for diagnosis in diagnoses(grade.grade(3, path)).values():
        assert re.fullmatch(rf"mine\.py .*{words}.*", diagnosis)


# ---- right solutions, written differently ------------------------------------------------------

DIFFERENT = {
    3: {"hold": """
        seq.num_kv = num_kv
        seq.block_table.extend(block_ids)
        for block_id in block_ids:
            if self.ref_count[block_id] == 0 and block_id in self.free_blocks:
                del self.free_blocks[block_id]
            self.ref_count[block_id] += 1""", "num_needed": """
        total = 0
        for seq, num_new in plan:
            slots = len(seq.block_table) * self.block_size
            while slots < seq.num_kv + num_new:
                slots += self.block_size
                total += 1
        return total""", "append": """
        missing = self.num_needed([(seq, num_new)])
        if self.num_free < missing:
            raise OutOfBlocks("the pool is empty")
        while missing:
            self.hold(seq, [self._take()], seq.num_kv)
            missing -= 1""", "free": """
        for seq in seqs:
            while seq.block_table:
                last = seq.block_table.pop()
                self.ref_count[last] -= 1
                if not self.ref_count[last]:
                    self.free_blocks[last] = None
            seq.num_kv = 0"""},
    4: {"paged_attention_reference": ATTEND, "flat_batch": """
        tokens, positions, slots, wanted, lens, starts = [], [], [], [], [], [0]
        tables = torch.zeros(len(rows), max(len(row[2]) for row in rows), dtype=torch.int32)
        for s, (token_ids, first, table, is_wanted) in enumerate(rows):
            for i, token_id in enumerate(token_ids):
                block, offset = divmod(first + i, block_size)
                tokens.append(token_id)
                positions.append(first + i)
                slots.append(table[block] * block_size + offset)
            if is_wanted:
                wanted.append(len(tokens) - 1)
            tables[s, :len(table)] = torch.tensor(table)
            lens.append(first + len(token_ids))
            starts.append(len(tokens))

        def attend(q, k_cache, v_cache, scale):
            return paged_attention_reference(
                q, k_cache, v_cache, block_tables=maps.block_tables, scale=scale, max_query_len=0,
                context_lens=maps.context_lens, query_start=maps.query_start)
        maps = SimpleNamespace(
            input_ids=torch.tensor(tokens), positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots), last_rows=torch.tensor(wanted, dtype=torch.int64),
            block_tables=tables, context_lens=torch.tensor(lens, dtype=torch.int32),
            query_start=torch.tensor(starts, dtype=torch.int32),
            write_kv=write_kv_reference, attend=attend)
        return maps"""},
    5: KERNELS,
    6: {"_plan": """
        seqs = group.unfinished()
        behind = [seq for seq in seqs if seq.num_tokens - seq.num_kv > 1]
        if len(seqs) == 1:
            return [(seqs[0], min(budget, seqs[0].num_tokens - seqs[0].num_kv))]
        if not behind:
            return [(seq, 1) for seq in seqs] * (len(seqs) <= budget)
        plan = []
        for seq in behind:
            num = min(budget, seq.num_tokens - seq.num_kv - 1)
            budget -= num
            plan += [(seq, num)] * (num > 0)
        return plan""", "_admit": ADMIT.split(":\n", 1)[1],
        "schedule": SCHEDULE.split(":\n", 1)[1]},
    7: {"_preempt": PREEMPT.split(":\n", 1)[1], "take_over": TAKE_OVER.split(":\n", 1)[1]},
    8: {"fork": """
        child.num_kv = parent.num_kv
        for block_id in parent.block_table:
            child.block_table.append(block_id)
            self.ref_count[block_id] += 1""", "num_needed": """
        total, readers = 0, {}
        for seq, num_new in plan:
            have, first = len(seq.block_table), seq.num_kv // self.block_size
            total += max(0, (seq.num_kv + num_new + self.block_size - 1) // self.block_size - have)
            if first < have:
                block_id = seq.block_table[first]
                left = readers.setdefault(block_id, self.ref_count[block_id])
                if left > 1:
                    total += 1
                    readers[block_id] = left - 1
        return total""", "append": """
        if self.num_needed([(seq, num_new)]) > self.num_free:
            raise OutOfBlocks("the pool is empty")
        i = seq.num_kv // self.block_size
        if seq.num_kv % self.block_size and self.ref_count[seq.block_table[i]] > 1:
            new = self._take()
            self.copies.append((seq.block_table[i], new))
            self.ref_count[seq.block_table[i]] -= 1
            self.ref_count[new] = 1
            seq.block_table[i] = new
        while len(seq.block_table) * self.block_size < seq.num_kv + num_new:
            seq.block_table.append(self._take())
            self.ref_count[seq.block_table[-1]] = 1"""},
    9: {"fork": """
        child = Sequence(self.token_ids, self.params, self.cache_salt)
        for name in ("num_prompt_tokens", "max_num_tokens", "seed", "data", "text",
                     "cumulative_logprob"):
            setattr(child, name, getattr(self, name))
        child.logprobs.extend(self.logprobs)
        return child""", "beam_score": """
        length = len(seq.token_ids[seq.num_prompt_tokens:])
        return seq.cumulative_logprob * (num_generated or length) ** -seq.params.length_penalty
        """, "hopeful": HOPEFUL.split(":\n", 1)[1], "_extend_beams": """
        parents, width = group.unfinished(), group.params.beam_width
        offers = sorted(((parent.cumulative_logprob + logprob, number, token_id) for number, parent
                         in enumerate(parents) for token_id, logprob in sampled[parent][2].items()),
                        reverse=True)
        beams, ended, of = [], [seq for seq in group.seqs if seq not in parents], {}
        for rank, (total, number, token_id) in enumerate(offers):
            child = parents[number].fork()
            self._append_tokens(child, [token_id], [total - child.cumulative_logprob])
            if child.finish_reason and rank < width:
                ended.append(child)                # its K and V are not needed any more
            elif not child.finish_reason and len(beams) < width:
                beams.append(child)
                of[child] = parents[number]
        ended = sorted(ended, key=beam_score)[::-1][:width]
        beams = hopeful(beams, ended, group.params)
        for child in beams:
            self.pool.fork(of[child], child)
        for parent in parents:
            self.pool.free(parent)
        group.seqs[:] = ended + beams"""},
    10: {"_take": """
        block_id = next(iter(self.free_blocks))
        del self.free_blocks[block_id]
        for key in [key for key, known in self.cached.items() if known == block_id]:
            del self.cached[key]
        return block_id""", "_key": """
        return seq.cache_salt, *seq.token_ids[:(i + 1) * self.block_size]""", "find_prefix": """
        found = []
        while (len(found) + 1) * self.block_size < len(seq.token_ids):
            block_id = self.cached.get(self._key(seq, len(found), None))
            if block_id is None:
                return found
            found.append(block_id)
        return found""", "publish": """
        for i, block_id in enumerate(seq.block_table):
            if (i + 1) * self.block_size <= seq.num_kv + num_new:
                self.cached[self._key(seq, i, None)] = block_id"""},
    11: {"_steps_ahead": STEPS_AHEAD.split(":\n", 1)[1],
         "_launch": LAUNCH.split(":\n", 1)[1], "_land": LAND.split(":\n", 1)[1]},
}


@pytest.mark.parametrize("number", [number for number in LAB_NUMBERS
                                    if getattr(number, "values", [number])[0] in DIFFERENT])
def test_another_right_solution(number, tmp_path, capsys):
    """A grader that wants our code and not what it does, or an engine that runs with no other."""
    path = write_solution(tmp_path / "mine.py", number, DIFFERENT[number])
    assert diagnoses(grade.grade(number, path)) == {}
    prompts = ["--prompt", "ROMEO: I have", "--prompt", "ROMEO: I have been so"]
    num = "12" if number == 5 else "8"             # for more than one part of 16 tokens
    assert run_mine.main(["--lab", str(number), "--file", path, "--max-tokens", num, *prompts]) == 0
    output = capsys.readouterr().out
    assert "The engine's own code writes the same text." in output
    for name in labs.LABS[number].names:
        calls = re.search(rf"^{re.escape(name)} +(\d+)  yours$", output, re.M)
        assert calls and int(calls[1]) > 0, output


@pytest.mark.parametrize("choice", ["ours // 2", "ours", "most"])
def test_any_sensible_number_of_steps(choice, tmp_path):
    """Lab 11's grader wants the engine's number, where half of it or more within the rules do."""
    path = write_class(tmp_path / "mine.py", f"""
        def _steps_ahead(self, seqs, in_flight=0):
            ours = super()._steps_ahead(seqs, in_flight)
            if not ours:
                return 0
            longest = max(seq.num_tokens for seq in seqs) + in_flight
            wanted = max(seq.max_num_tokens - seq.num_tokens for seq in seqs) - in_flight
            most = max(num for num in range(1, 17) if num < 2 * wanted
                       and num <= self.max_model_len - longest + 1 and self.pool.num_needed(
                           [(seq, in_flight + num) for seq in seqs]) <= self.pool.num_free)
            return {choice}""", 11)
    assert diagnoses(grade.grade(11, path)) == {}


# ---- the commands ------------------------------------------------------------------------------


def test_grade_prints_points(tmp_path, capsys):
    """Text or JSON that miss a task, a wrong exit status, a learner's print() within the JSON."""
    path = write_class(tmp_path / "mine.py", but(
        FREE, "self.ref_count[block_id] -= 1", "print('here'); self.ref_count[block_id] = 0"))
    assert grade.main(["--lab", "3", "--file", path]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "task 1   2 of  2   BlockPool.hold" and lines[-1] == "total   7 of 10"
    assert grade.main(["--lab", "3", "--file", path, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["lab"], report["points"], report["of"]) == (3, 7, 10)
    assert [task["points"] for task in report["tasks"]] == [2, 2, 3, 0]
    assert grade.main(["--lab", "3", "--file", "engine"]) == 0
    assert grade.main(["--lab", "3", "--file", str(tmp_path / "none.py")]) == 2
    assert "none.py" in capsys.readouterr().err


@pytest.mark.parametrize("number", LAB_NUMBERS)
def test_run_mine_says_what_is_not_done(number, capsys):
    """A traceback where one line should say which task comes next."""
    starter = TUTORIAL / labs.LABS[number].folder / "starter.py"
    assert run_mine.main(["--lab", str(number), "--prompt", "ROMEO:", "--verbose",
                          "--file", str(starter)]) == 1
    captured = capsys.readouterr()                 # no report, in which all would be zeros
    assert re.fullmatch(rf"run_mine\.py: not done yet: Lab {number}, task \d: .*\n", captured.err)
    assert captured.out.splitlines()[0] == f"lab {number} sets {labs.LABS[number].options}"


@pytest.mark.parametrize("name, words", [
    ("no_copy", "The engine's own code writes another text"),
    ("held_twice_raises", r"hold\(\) raised KeyError: .*line \d+: "),
    ("one_block_too_many_when_full", "never has a block to give"),
])
def test_run_mine_says_what_is_wrong(name, words, tmp_path, monkeypatch, capsys):
    """Wrong code in the engine ends in a traceback, never, or as if all were right."""
    monkeypatch.setattr(run_mine, "SECONDS", 2)
    number, _, _, code = WRONG[name]
    prompt = ["--prompt", "ROMEO: I have been so"] * 2
    if name == "one_block_too_many_when_full":
        code = code.replace("+ 1", "+ 100")
    path = write_class(tmp_path / "mine.py", code)
    assert run_mine.main(["--lab", str(number), "--file", path, "--max-tokens", "8", *prompt]) == 1
    captured = capsys.readouterr()
    assert re.search(words, captured.out + captured.err), captured


@pytest.mark.parametrize("body", ["import sys\nsys.exit(0)\n", """
import nanopaged

class BlockPool(nanopaged.BlockPool):
    def hold(self, seq, block_ids, num_kv):
        raise SystemExit
"""])
def test_a_file_that_exits_has_no_points(body, tmp_path, capsys):
    """It ends the grader: status 0, as for all points, and no line in a teacher's list."""
    path = tmp_path / "mine.py"
    path.write_text(body)
    assert grade.main(["--lab", "3", "--file", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "ends the program" in lines[2] and lines[1].startswith("task 1   0 of")
    assert "ends the program" in labs.examine(grade.load_tasks(3)[1], 3, path)
    assert run_mine.main(["--lab", "3", "--file", str(path), "--prompt", "A", "--verbose"]) == 1
    assert re.fullmatch(r"run_mine\.py: mine\.py ends the program.*\n", capsys.readouterr().err)
    with pytest.raises(SystemExit):                # an option that there is not
        run_mine.main(["--lab", "3", "--file", "engine", "--promt", "A"])


def test_run_mine_leaves_the_engine_as_it_was(tmp_path):
    """A learner's class stays in the engine after the run, or its calls go on being counted."""
    before = nanopaged.BlockPool, dict(vars(nanopaged.BlockPool))
    for file in ("engine", write_class(tmp_path / "mine.py", "pass")):
        run_mine.main(["--lab", "3", "--file", file, "--prompt", "A", "--max-tokens", "1"])
    assert (nanopaged.BlockPool, dict(vars(nanopaged.BlockPool))) == before


def test_pytest_runs_a_lab():
    """`pytest -k task_n` of a chapter finds no test, or all tests of the suite find the labs'."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    path = "tutorial/03_block_pool/test_lab.py"
    starter = str(TUTORIAL / "03_block_pool" / "starter.py")
    for more, file, words in (([path, "-k", "task_1"], starter, "task 1: not done yet"),
                              ([path], "engine", "4 passed"), (["tutorial"], "", "no tests ran")):
        result = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True,
                                env={**os.environ, "LAB_FILE": file})
        assert words in result.stdout, result.stdout + result.stderr


# ---- the chapters ------------------------------------------------------------------------------


def chapter_text(number, name="README.md"):
    return (TUTORIAL / labs.LABS[number].folder / name).read_text(encoding="utf-8")


def the_engines_own(path, number):
    """A learner's file that does what the engine does, call for call."""
    lab = labs.LABS[number]
    text = f"import {lab.module}\n\n"
    for owner in lab.owners:
        methods = [name.split(".")[1] for name in lab.names if name.startswith(f"{owner}.")]
        text += f"\nclass {owner}({lab.module}.{owner}):\n" * bool(methods)
        for name in methods:
            text += f"    def {name}(self, *args):\n        return super().{name}(*args)\n"
        if not methods:
            text += f"\n{owner}_ = {lab.module}.{owner}\n"
            text += f"def {owner}(*args):\n    return {owner}_(*args)\n"
    path.write_text(text)
    return str(path)


def commands(number, script):
    """The arguments of the commands that a chapter gives for a script."""
    return [shlex.split(line) for line in
            re.findall(rf"^    python tutorial/{script} (.*)$", chapter_text(number), re.M)]


@pytest.mark.parametrize("number", PROGRAMS)
def test_checkpoint(number, monkeypatch, capsys):
    """A chapter shows another output than its command prints, on this machine or this engine."""
    command, = re.findall(r"^```\npython (.*)\n```$", chapter_text(number), re.M)
    assert command == f"tutorial/{labs.LABS[number].folder}/{PROGRAMS[number]}"
    expected = re.search(r"^## Checkpoint$.*?^```text\n(.*?)^```$", chapter_text(number),
                         re.M | re.S)[1]
    monkeypatch.chdir(ROOT)
    runpy.run_path(command, run_name="__main__")
    assert capsys.readouterr() == (expected, "")


@pytest.mark.parametrize("number", PROGRAMS)
def test_the_chapter_stays_short_and_names_what_exists(number):
    """A chapter that grows into a book, or that sends its reader to what was renamed."""
    readme, answers = chapter_text(number), chapter_text(number, "answers.md")
    assert 900 <= len(readme.split()) <= 1500
    for i, task in enumerate(labs.LABS[number].tasks, 1):
        name = task.names.split()[0].split(".")[-1]
        line = rf"^{i}\. \*\*`{name}`.*\({task.points}( points?)?\)"
        assert re.search(line, readme, re.M), f"task {i}: its function or its points"
    for owner, attribute in re.findall(r"`(BlockPool|Engine|Scheduler)\.(\w+)`", readme + answers):
        assert hasattr(getattr(nanopaged, owner), attribute), f"{owner}.{attribute}"
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", readme + answers):
        assert (TUTORIAL / labs.LABS[number].folder / link).exists(), link


@pytest.mark.parametrize("folder", sorted(path.name for path in TUTORIAL.glob("[0-9]*")))
def test_the_order_of_sections(folder):
    """Chapters that have the same sections in another order."""
    readme = (TUTORIAL / folder / "README.md").read_text(encoding="utf-8")
    order = ["The problem", "A picture", "Invariants", "Predict before you run", "Checkpoint",
             "Tasks", "What we left out", "Lab", "Questions"]
    found = [name for name in re.findall(r"^## (.*)$", readme, re.M) if name in order]
    assert found == [name for name in order if name in found]
    assert {*order} - {*found} <= {"Tasks", "Lab"}


@pytest.mark.parametrize("number", PROGRAMS)
def test_the_commands_of_a_chapter(number, tmp_path, capsys):
    """A chapter's command that fails, or prints something else than the chapter shows."""
    path = the_engines_own(tmp_path / "mine.py", number)
    graded, ran = commands(number, "grade.py"), commands(number, "run_mine.py")
    assert graded and ran
    for command in graded:
        assert grade.main([*command, "--file", path]) == 0
    capsys.readouterr()
    for command in ran:
        assert run_mine.main([*command, "--file", path]) == 0
        captured = capsys.readouterr()
        assert "the engine's\n" not in captured.out
        shown = re.search(r"^    python tutorial/run_mine[^\n]*\n\n```text\n(.*?)^```$",
                          chapter_text(number), re.M | re.S)
        assert not shown or shown[1] == captured.out
        assert number != 10 or "4 cached tokens" in captured.err


def test_without_a_copy_only_the_last_text_is_right(tmp_path, capsys):
    """Chapter 8 asks which of three texts is still right without copies, and answers: the last."""
    command, = commands(8, "run_mine.py")
    path = write_class(tmp_path / "mine.py", WRONG["no_copy"][3])
    assert run_mine.main([*command, "--file", path, "--json"]) == 1
    mine, theirs = (json.loads(line)["outputs"] for line in
                    re.findall(r"^{.*}$", capsys.readouterr().out, re.M))
    same = [a["text"] == b["text"] for a, b in zip(mine, theirs, strict=True)]
    assert same == [False, False, True]


def test_freed_before_the_forks_costs_steps(tmp_path, capsys):
    """Chapter 9 says what the mistake costs, and that the text is right all the same."""
    command, = commands(9, "run_mine.py")
    answers, shown = " ".join(chapter_text(9, "answers.md").split()), []
    for name in ("parents_freed_before_the_forks", "pass"):
        path = write_class(tmp_path / "mine.py", WRONG[name][3] if name in WRONG else name, 9)
        assert run_mine.main([*command, "--file", path]) == 0
        report = capsys.readouterr().err
        shown.append([re.search(rf"(\d+) {word}", report)[1]
                      for word in ("steps", "copies", "cached tokens")])
    (steps, copies, cached), (right_steps, right_copies, _) = shown
    assert f"{steps} steps instead of {right_steps}" in answers
    assert f"Of {int(cached):,} tokens the blocks were still there" in answers
    assert copies == "0" < right_copies


def test_whole_rows_reordered():
    """Question 5 of chapter 9: what it costs to move all rows in each step, and against what."""
    rows, = re.findall(r"= ([\d,]+) tokens: ([\d.]+) times .*?, and (\d+)\s+times",
                       " ".join(chapter_text(9, "answers.md").split()))
    moved = 4 * sum(range(30, 53))
    second, late = re.findall(r"^(?:whole caches copied|blocks shared) +\d+ +([\d,]+)",
                              chapter_text(9), re.M)
    assert rows == (f"{moved:,}", f"{moved / int(second.replace(',', '')):.1f}",
                    f"{moved / int(late):.0f}")


# ---- the map, and the page for teachers --------------------------------------------------------

MAP = (TUTORIAL / "README.md").read_text(encoding="utf-8")
TEACHING = (TUTORIAL / "TEACHING.md").read_text(encoding="utf-8")


def test_the_map_is_honest():
    """A chapter or lab that the map does not know of, or one that is not there."""
    rows = re.findall(r"^\| \[?(\d+)\. [^|]*?(?:\]\((.*?)/README\.md\))? \| [^|]* "
                      r"\|(?: lab (\d+))? \|$", MAP, re.M)
    linked = {folder for _, folder, _ in rows if folder}
    assert linked == {path.name for path in TUTORIAL.glob("[0-9]*") if path.is_dir()}
    assert [int(number) for number, _, _ in rows] == [*range(1, 12)]
    for number, folder, lab in rows:
        assert not folder or folder.startswith(f"{int(number):02}_")
        assert lab == (number if int(number) in labs.LABS else "")
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", MAP + TEACHING):
        assert (TUTORIAL / link).exists(), link
    for name in re.findall(r"`(\w+\.py)`", MAP + TEACHING):
        assert name in ("mine.py", "starter.py", "test_lab.py") or (ROOT / name).exists() \
            or (TUTORIAL / name).exists(), name


def test_what_grade_prints_is_what_the_map_shows(tmp_path, monkeypatch, capsys):
    """The reader sees another table, or the teacher another JSON."""
    (tmp_path / "hand-in").mkdir()
    for name in ("mine.py", "hand-in/ada.py"):
        write_class(tmp_path / name, WRONG["readers_are_ignored"][3])
    monkeypatch.chdir(tmp_path)
    assert grade.main(["--lab", "3", "--file", "mine.py"]) == 1
    assert capsys.readouterr().out == re.search(r"^```text\n(.*?)^```$", MAP, re.M | re.S)[1]
    assert grade.main(["--lab", "3", "--file", "hand-in/ada.py", "--json"]) == 1
    shown = re.search(r"^```text\n(.*) \.\.\.\n```$", TEACHING, re.M)[1]
    assert capsys.readouterr().out.startswith(shown)


def test_the_page_for_teachers():
    """Points or mistakes that are not those of the graders."""
    for number, lab in labs.LABS.items():
        points = " + ".join(str(task.points) for task in lab.tasks)
        functions = ", ".join(f"`{name}`" for name in lab.names)
        assert f"\n| {number} | {len(lab.tasks)} | {points} | {functions} |\n" in TEACHING
    mistakes = re.findall(r"^\| (\d+) \| (`\w+`(?:, `\w+`)*) \| ", TEACHING, re.M)
    for number, names in mistakes:
        for name in re.findall(r"\w+", names):
            assert WRONG[name][0] == int(number), name
    assert {int(number) for number, _ in mistakes} == {*labs.LABS}


def test_one_file_for_all_labs_of_the_pool(tmp_path):
    """Chapter 8's append must do for chapter 3's grader, and so on: it is one class."""
    bodies = DIFFERENT[3] | DIFFERENT[8] | DIFFERENT[10]
    text = labs.make_starter(3)                    # it has all signatures
    signatures = {name: re.search(rf"    def {name}.*", text)[0] for name in bodies}
    code = "".join(f"\n{signatures[name]}\n{indent(dedent(body), ' ' * 8)}\n"
                   for name, body in bodies.items())
    path = write_class(tmp_path / "mine.py", code)
    for number in (3, 8, 10):
        assert diagnoses(grade.grade(number, path)) == {}
