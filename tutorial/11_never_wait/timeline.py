"""When a GPU waits for Python: host and GPU side by side, by a clock that is only counted.

    python tutorial/11_never_wait/timeline.py

    kernel by kernel   host  plan, launch launch launch ..., wait for the last one, read, plan, ...
    a graph a step     host  plan, launch, wait, read, plan, ...
    16 steps ahead     host  plan, launch x 16, then wait and read x 16, plan, ...

Then the tiny model in the engine: running ahead must not change a token. A CPU has no graphs; there
stand_in.py does what a replay does, and counts.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 0)]

from stand_in import StandIn  # noqa: E402

from nanopaged import LLM, SamplingParams, torch  # noqa: E402

COLUMNS = 64                                       # of a drawn line
PROMPTS = {"a": "Four score and seven years ago our", "b": "ROMEO:", "c": "JULIET:\nO"}


# ---- a clock that is only counted --------------------------------------------------------------


@dataclass
class Costs:
    """Microseconds. Host: measured roughly, and rounded. GPU: see the chapter."""
    num_seqs: int
    gpu: int                                       # a step: the model, and a draw from its logits
    launch: int = 42                               # from one kernel of the model to the next
    num_kernels: int = 240                         # of a step
    graph: int = 200                               # what is launched for a step with a graph
    plan: int = 200                                # schedule, and make a batch
    plan_seq: int = 12                             # the same, for each sequence
    read_seq: int = 4                              # add a token to its text


class Clock:
    """Two that work: the host, whose time is `now`, and the GPU, which has work until `free`."""

    def __init__(self):
        self.now, self.free, self.host, self.gpu = 0, 0, [], []        # (letter, start, end)

    def work(self, letter, duration):
        self.host.append((letter, self.now, self.now + duration))
        self.now += duration

    def launch(self, duration, gpu):
        """The host's part and, behind all that was launched before, the GPU's -> when it ends."""
        self.work("L", duration)
        start = max(self.now, self.free)
        self.free = start + gpu
        self.gpu.append(("#", start, self.free))
        return self.free

    def wait(self, until):
        self.now = max(self.now, until)


def kernel_by_kernel(clock, c, num_steps):
    for _ in range(num_steps):
        clock.work("p", c.plan + c.plan_seq * c.num_seqs)
        for _ in range(c.num_kernels):
            end = clock.launch(c.launch, c.gpu / c.num_kernels)
        clock.wait(end)
        clock.work("r", c.read_seq * c.num_seqs)


def running_ahead(clock, c, num_steps, ahead):
    """A graph a step, `ahead` of them from one plan; tokens are read while later steps run."""
    for _ in range(num_steps // ahead):
        clock.work("p", c.plan + c.plan_seq * c.num_seqs)
        ends = [clock.launch(c.graph, c.gpu) for _ in range(ahead)]
        for end in ends:
            clock.wait(end)
            clock.work("r", c.read_seq * c.num_seqs)


def run(policy, c, *args, num_steps=32):
    """-> (clock, how much of the time the GPU works, tokens a second)."""
    policy(clock := Clock(), c, num_steps, *args)
    busy = sum(end - start for _, start, end in clock.gpu)
    return clock, busy / clock.now, 1e6 * num_steps * c.num_seqs / clock.now


def draw(spans, unit):
    """A letter for each `unit` of time: what most of it went to.

    A dot is waiting; where that is most, but not all, of a GPU's, it is a dash.
    """
    columns = [Counter() for _ in range(COLUMNS)]
    for letter, start, end in spans:
        for i in range(int(start // unit), min(COLUMNS, int(end // unit) + 1)):
            columns[i][letter] += min(end, (i + 1) * unit) - max(start, i * unit)
    line = ""
    for column in columns:
        idle = unit - column.total()
        letter = max(column, key=column.get, default=".")
        line += letter if column[letter] >= idle else "-" if column["#"] > unit / 10 else "."
    return line


def draw_policies(c):
    unit = -(-running_round(c, 16) // 6200) * 100              # a round fits into the line
    print(f"{c.num_seqs} decoding, GPU {c.gpu / 1000:.2f} ms a step; a column is {unit / 1000} ms")
    for name, policy, *args in (("kernel by kernel", kernel_by_kernel),
                                ("a graph a step", running_ahead, 1),
                                ("16 steps ahead", running_ahead, 16)):
        clock, busy, speed = run(policy, c, *args)
        print(f"{name:18} GPU busy {busy:3.0%}, {speed:7,.0f} tokens/s\n"
              f"  host {draw(clock.host, unit)}\n  GPU  {draw(clock.gpu, unit)}")


def running_round(c, ahead):
    """From one plan to the next, and so the longest that a newcomer waits."""
    running_ahead(clock := Clock(), c, ahead, ahead)
    return clock.now


# ---- the engine --------------------------------------------------------------------------------


def generate(graphs=True, max_num_seqs=256, **of_c):
    """The three prompts together -> (their tokens; calls of step(), replays, drawn, dropped)."""
    llm = LLM(device="cpu", block_size=4, num_blocks=64, max_num_seqs=max_num_seqs)
    engine = llm.engine
    engine.graphs = StandIn(engine) if graphs else None
    for seed, (name, max_tokens) in enumerate(zip(PROMPTS, (40, 30, 10), strict=True)):
        engine.add_request(PROMPTS[name], SamplingParams(
            seed=seed, max_tokens=max_tokens, ignore_eos=True, **of_c if name == "c" else {}))
    tokens, calls, dropped = {}, 0, 0
    while engine.has_unfinished_requests():
        ahead, kept = engine.graphs.num_ahead if graphs else 0, engine.counts["generated_tokens"]
        tokens |= {out.request_id: out.outputs[0].token_ids for out in engine.step()}
        if graphs and engine.graphs.num_ahead > ahead:
            dropped += engine.graphs.num_ahead - ahead + kept - engine.counts["generated_tokens"]
        calls += 1
    kept = engine.counts["generated_tokens"]
    return tokens, calls, engine.graphs.num_replays if graphs else 0, kept + dropped, dropped


def main():
    torch.set_num_threads(1)                       # the model's matrices are too small for two
    one, many = Costs(1, 1500), Costs(256, 4420)
    draw_policies(one)
    print()
    draw_policies(many)
    print("\nsteps ahead       1     2     4     8    16    32")
    rounds = [1 << i for i in range(6)]
    for c in (one, many):
        print(f"GPU busy, {c.num_seqs:3}", "".join(
            f"{run(running_ahead, c, ahead)[1]:6.0%}" for ahead in rounds))
    print("a round, ms  ", "".join(f"{running_round(many, ahead) / 1000:6.1f}" for ahead in rounds))

    expected, *_ = generate(graphs=False)
    print("\nthe tiny model     calls of step()  replays  drawn  dropped  the same")
    for name, settings in (("no graphs", {"graphs": False}), ("running ahead", {}),
                           ("two seats for three", {"max_num_seqs": 2}),
                           ("c with logprobs", {"logprobs": 0})):
        tokens, calls, *others = generate(**settings)
        print(f"{name:19}{calls:15}{others[0]:9}{others[1]:7}{others[2]:9}"
              f"{'yes' if tokens == expected else 'NO':>10}")


if __name__ == "__main__":
    main()
