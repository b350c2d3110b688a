"""When a GPU waits for Python: host and GPU side by side, by a clock that is only counted.

    python tutorial/11_never_wait/timeline.py

    kernel by kernel   host  plan, launch launch launch ..., wait for the last one, read, plan, ...
    a graph a step     host  plan, launch, wait, read, plan, ...
    bursts of 16       host  plan, launch x 16, wait, read, plan, ...
    flights of 16      the same, but the next flight is planned and launched before one is read

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

COLUMNS = 88                                       # of a drawn line
PROMPTS = {"a": "Four score and seven years ago our", "b": "ROMEO:", "c": "JULIET:\nO"}


# ---- a clock that is only counted --------------------------------------------------------------


@dataclass
class Costs:
    """Microseconds. Host: measured roughly, and rounded. GPU: see the chapter."""
    num_seqs: int
    gpu: int                                       # a step: the model, and the draw from its logits
    launch: int = 42                               # from one kernel of the model to the next
    num_kernels: int = 180                         # of a step
    graph: int = 100                               # what is launched for a step with a graph
    plan: int = 200                                # schedule, and make a batch
    plan_seq: int = 12                             # the same, for each sequence
    read_seq: int = 4                              # add one token, or 16, to a text


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
        land(clock, c, [end])


def launch(clock, c, ahead):
    """A flight: `ahead` steps from one plan, a graph each -> when each of them ends."""
    clock.work("p", c.plan + c.plan_seq * c.num_seqs)
    return [clock.launch(c.graph, c.gpu) for _ in range(ahead)]


def land(clock, c, ends):
    """Wait for a flight, and read its tokens, all of a text together."""
    clock.wait(ends[-1])
    clock.work("r", c.read_seq * c.num_seqs)


def bursts(clock, c, num_steps, ahead):
    """One flight after the other."""
    for _ in range(num_steps // ahead):
        land(clock, c, launch(clock, c, ahead))


def flights(clock, c, num_steps, ahead):
    """A flight is read while the next one is in the air."""
    flight = launch(clock, c, ahead)
    for _ in range(num_steps // ahead - 1):
        following = launch(clock, c, ahead)
        land(clock, c, flight)
        flight = following
    land(clock, c, flight)


def run(policy, c, *args, num_steps=2048):
    """-> (clock, how much of the time the GPU works, the host, tokens a second)."""
    policy(clock := Clock(), c, num_steps, *args)
    gpu, host = (sum(end - start for _, start, end in line) for line in (clock.gpu, clock.host))
    return clock, gpu / clock.now, host / clock.now, 1e6 * num_steps * c.num_seqs / clock.now


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


def draw_policies(c, *policies):
    """Two lines, host and GPU, for each (name, policy, arguments of the policy)."""
    unit = -(-36 * c.gpu // COLUMNS // 100) * 100  # two flights, and more, fit into the line
    print(f"{c.num_seqs} decoding, GPU {c.gpu / 1000:.2f} ms a step; a column is {unit / 1000} ms")
    for name, policy, *args in policies:
        clock, busy, _, speed = run(policy, c, *args)
        print(f"{name:18} GPU busy {busy:3.0%}, {speed:7,.0f} tokens/s\n"
              f"  host {draw(clock.host, unit)}\n  GPU  {draw(clock.gpu, unit)}")


def print_shares(c):
    """How busy both are with other numbers of steps ahead, and what that costs a newcomer."""
    nums = [1 << i for i in range(6)]
    print(f"\nsteps ahead of {c.num_seqs:3}  ", "".join(f"{ahead:6}" for ahead in nums))
    for name, policy, i in (("GPU busy, bursts", bursts, 1), ("GPU busy, flights", flights, 1),
                            ("host busy, flights", flights, 2)):
        print(f"{name:20}", "".join(f"{run(policy, c, ahead)[i]:6.0%}" for ahead in nums))
    # it comes when a flight has just taken off, behind which none follows then
    waits = [(ahead * c.gpu + c.read_seq * c.num_seqs) / 1000 for ahead in nums]
    print("a newcomer waits, ms", "".join(f"{wait:6.1f}" for wait in waits))


# ---- the engine --------------------------------------------------------------------------------


def generate(graphs=True, max_num_seqs=256, **options):
    """The three prompts together -> (their tokens; calls of step(), replays, drawn, dropped).

    options: {prompt: its sampling options}.
    """
    llm = LLM(device="cpu", block_size=4, num_blocks=64, max_num_seqs=max_num_seqs)
    engine, device = llm.engine, StandIn(llm.engine)
    engine.graphs = device if graphs else None
    for seed, (name, max_tokens) in enumerate(zip(PROMPTS, (40, 30, 10), strict=True)):
        engine.add_request(PROMPTS[name], SamplingParams(
            seed=seed, max_tokens=max_tokens, ignore_eos=True, **options.get(name, {})))
    tokens, calls, alone = {}, 0, 0                # alone: drawn by steps that did not run ahead
    while engine.has_unfinished_requests():
        flight, kept, ahead = engine.flight, engine.counts["generated_tokens"], device.num_ahead
        tokens |= {out.request_id: out.outputs[0].token_ids for out in engine.step()}
        if not flight and device.num_ahead == ahead:
            alone += engine.counts["generated_tokens"] - kept
        calls += 1
    drawn = alone + device.num_ahead
    return tokens, calls, device.num_replays, drawn, drawn - engine.counts["generated_tokens"]


def main():
    torch.set_num_threads(1)                       # the model's matrices are too small for two
    one, many = Costs(1, 1200), Costs(256, 4100)
    with_graphs = (("a graph a step", bursts, 1), ("bursts of 16", bursts, 16),
                   ("flights of 16", flights, 16))
    draw_policies(one, ("kernel by kernel", kernel_by_kernel), *with_graphs)
    print()
    draw_policies(many, *with_graphs)
    print_shares(many)

    print("\nthe tiny model     calls of step()  replays  drawn  dropped  the same")
    for name, settings in (("no graphs", {"graphs": False}), ("running ahead", {}),
                           ("two seats for three", {"max_num_seqs": 2}),
                           ("b ends at a comma", {"b": {"stop": [","]}}),
                           ("c with logprobs", {"c": {"logprobs": 0}})):
        tokens, calls, *others = generate(**settings)
        expected, *_ = generate(**settings | {"graphs": False})
        print(f"{name:19}{calls:15}{others[0]:9}{others[1]:7}{others[2]:9}"
              f"{'yes' if tokens == expected else 'NO':>10}")


if __name__ == "__main__":
    main()
