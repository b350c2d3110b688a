"""The tutorial does what it says: its programs are run, its numbers compared, its answers tried."""

import contextlib
import copy
import importlib.util
import inspect
import io
import itertools
import random
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ROOT, check, make_group, make_scheduler

import kernels
import nanopaged

CHAPTERS = ("01_kv_cache", "02_contiguous", "04_paged_attention", "05_triton_kernel",
            "06_continuous_batching", "07_preemption", "11_never_wait")
sys.path[:0] = [str(ROOT / "tutorial" / chapter) for chapter in ("", *CHAPTERS)]

import batches  # noqa: E402
import dry  # noqa: E402
import grow  # noqa: E402
import labs  # noqa: E402
import paged  # noqa: E402
import stand_in  # noqa: E402
import steps  # noqa: E402
import timeline  # noqa: E402
import waste  # noqa: E402

PROGRAMS = dict(zip(CHAPTERS, (grow, waste, paged, steps, batches, dry, timeline), strict=True))
# What the chapters name and we have not: tasks, and parts of vLLM.
ELSEWHERE = {"FirstFit", "FreeKVCacheBlockQueue", "KVCacheSpec", "Reserved", "Reserving",
             "kv_cache_dtype", "block_table", "query_start_loc", "seq_lens", "num_computed_tokens",
             "_preempt_request", "BatchDecodeWithPagedKVCacheWrapper", "paged_attention_v2",
             "plan", "FULL_AND_PIECEWISE"}
CAN_LAUNCH = hasattr(kernels.triton, "cdiv")       # else kernels are plain text


def chapter_text(program, name="README.md"):
    """A text of the chapter that a program belongs to."""
    return (Path(program.__file__).parent / name).read_text(encoding="utf-8")


def answer(program, number):
    """What the code that answers.md gives for a task defines -> {name: object}."""
    text = re.search(rf"^\*\*{number}\.\*\*.*?^```python\n(.*?)^```$",
                     chapter_text(program, "answers.md"), re.M | re.S)[1]
    defined = dict(vars(program))
    exec(text, defined)
    return defined


def solution(program, number, name):
    """What a task asks for: the reader's if it is in the program, else answers.md's."""
    if hasattr(program, name):
        return getattr(program, name)
    note_the_answer(program, name)
    return answer(program, number)[name]


def note_the_answer(program, name):
    """A reader whose name is misspelt must not take what passes for his."""
    file = Path(program.__file__).name
    warnings.warn(f"checked: the answer's code, as {file} has no {name}", stacklevel=2)


ONE_SEED, SIX_SEEDS = re.findall(r"^```text\n(memory: .*?)^```$", chapter_text(waste), re.M | re.S)
ORCA = tuple(waste.ESTIMATES)


def allocator_of(task):
    """The chapter's allocator, or FirstFit."""
    return waste.BuddyAllocator if task == 1 else solution(waste, 2, "FirstFit")


def rows(text):
    """{policy: numbers that were measured here}, of the table of shares and of the other one."""
    lines = [(line[:13].strip(), re.sub(r"\(.*?\)", "", line[13:])) for line in text.splitlines()]
    numbers = [(policy, [float(cell) for cell in cells.split()])
               for policy, cells in lines if policy in waste.PAPER_SHARES]
    return dict(numbers[:4]), {policy: running for policy, (running,) in numbers[4:]}


def printed(function, seeds):
    """What one of the program's functions prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        function(seeds)
    return output.getvalue()


# ---- every chapter -----------------------------------------------------------------------------


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_checkpoint(chapter, monkeypatch, capsys):
    """A chapter shows another output than its command prints, on this machine or this engine."""
    readme = chapter_text(PROGRAMS[chapter])
    if chapter == "05_triton_kernel" and not CAN_LAUNCH:
        pytest.skip("no GPU, and no interpreter: it needs triton and numpy")
    command, = re.findall(r"^```\npython (.*)\n```$", readme, re.M)
    expected = re.search(r"^## Checkpoint$.*?^```text\n(.*?)^```$", readme, re.M | re.S)[1]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert capsys.readouterr() == (expected, "")


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_what_to_try_runs(chapter):
    """A chapter tells its reader to try a command that fails."""
    for command in re.findall(r"^    python nanopaged\.py ((?:.*\\\n)*.*)",
                              chapter_text(PROGRAMS[chapter]), re.M):
        assert nanopaged.main(shlex.split(command.replace("\\\n", ""))) == 0


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_chapter_stays_short_and_names_what_exists(chapter):
    """A chapter that grows into a book, or that sends its reader to what was renamed."""
    program, folder = PROGRAMS[chapter], ROOT / "tutorial" / chapter
    readme, answers = chapter_text(program), chapter_text(program, "answers.md")
    assert 900 <= len(readme.split()) <= 1500
    modules = [program, *PROGRAMS.values(), stand_in, nanopaged, kernels]
    for name, attribute in re.findall(r"`([A-Z]\w+)\.?(\w*)[`(]", readme + answers):
        owner = next(filter(None, [getattr(module, name, None) for module in modules]), None)
        assert owner or name in ELSEWHERE, name
        assert not attribute or hasattr(owner, attribute), f"{name}.{attribute}"
    code = re.findall(r"^```python\n(.*?)^```$", answers, re.M | re.S)
    code += [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
    words = re.findall(r"\w+", "".join(code))
    for name in re.findall(r"`([a-z_]\w+)[`(]", readme + answers):
        assert name in ELSEWHERE.union(words), name
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", readme + answers):
        assert (folder / link).exists(), link
    tests = Path(__file__).read_text(encoding="utf-8")
    for option in re.findall(r"-k (\w+)", readme):
        assert option in tests, f"no test for -k {option}"


def test_a_check_says_whose_code_it_took(monkeypatch):
    """A reader whose name is misspelt believes that his code has passed."""
    with pytest.warns(UserWarning, match="answer's code, as grow.py has no Reserved$"):
        monkeypatch.delattr(grow, "Reserved", raising=False)
        solution(grow, 2, "Reserved")
    with warnings.catch_warnings(action="error"):
        monkeypatch.setattr(grow, "Reserved", object, raising=False)
        assert solution(grow, 2, "Reserved") is object


@pytest.mark.parametrize("chapter", [lab.folder for lab in labs.LABS.values()
                                     if lab.folder in CHAPTERS])
def test_lab_sections(chapter):
    """A chapter's lab has other tasks, points or commands than the table of labs."""
    number, readme = int(chapter[:2]), chapter_text(PROGRAMS[chapter])
    lab = re.search(r"^## Lab\n(.*?)^## ", readme, re.M | re.S)[1]
    tasks = [([name.split(".")[-1] for name in task.names.split()], str(task.points))
             for task in labs.LABS[number].tasks]
    found = re.findall(r"^\d\. (\*\*`\w+`\*\*(?: and \*\*`\w+`\*\*)*) \((\d+)", lab, re.M)
    assert [(re.findall(r"`(\w+)`", names), points) for names, points in found] == tasks
    assert f"tutorial/{chapter}/test_lab.py -k task_1\n" in lab
    assert f"grade.py --lab {number}\n" in lab and f"run_mine.py --lab {number} --prompt" in lab


# ---- 1: the KV cache ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """(model, tokenizer) of the chapters' programs."""
    return grow.load_tiny()


def test_the_engine_writes_the_same():
    """The model that chapter 1 writes out is another one than the engine's."""
    shown = re.search(r"^## Checkpoint$.*?^```text\n(.*?)^\d+ tokens", chapter_text(grow),
                      re.M | re.S)[1]
    params = nanopaged.SamplingParams(temperature=0, max_tokens=grow.NUM_TOKENS)
    output, = nanopaged.LLM(num_blocks=8).generate(grow.PROMPT, params)
    assert grow.PROMPT + output.outputs[0].text + "\n\n" == shown


def test_bytes_per_token(tiny):
    """A factor is missing: K and V, layers, or KV heads, which are not the query heads."""
    model, _ = tiny
    cache = grow.KVCache(model.config)
    with torch.inference_mode():
        grow.forward(model, [5, 6, 7], cache)
    assert cache.nbytes() == 3 * grow.bytes_per_token(*grow.MODELS["tiny, float32"])
    assert grow.bytes_per_token(*grow.MODELS["OPT-13B"]) == waste.BYTES_PER_TOKEN


@pytest.mark.parametrize("whose", ["the_programs", "the_answers"])
def test_kv_cache_task1_attend(whose):
    """A query sees a later key, or not all earlier ones; or it reads another head's K and V."""
    attend = grow.attend if whose == "the_programs" else answer(grow, 1)["attend"]
    generator = torch.Generator().manual_seed(0)
    for T, C in ((1, 1), (1, 7), (7, 7), (3, 9)):
        q = torch.randn(T, 6, 4, generator=generator, dtype=torch.float64)
        k, v = torch.randn(2, C, 2, 4, generator=generator, dtype=torch.float64)
        for t in range(T):
            for head in range(6):
                keys = slice(0, C - T + t + 1), head // 3
                expected = (k[keys] @ q[t, head] / 2).softmax(0) @ v[keys]
                torch.testing.assert_close(attend(q, k, v)[t, head], expected)


def test_kv_cache_task2_reserved(tiny, monkeypatch):
    """K and V are written where others lie, or more, or fewer, are returned than are there."""
    model, tokenizer = tiny
    reserved, made = solution(grow, 2, "Reserved"), []
    prompt = tokenizer.encode(grow.PROMPT)
    expected, _ = grow.generate(model, prompt, 12, keep=True)

    def make(config):
        made.append(reserved(config, 256))
        return made[-1]

    monkeypatch.setattr(grow, "KVCache", make)
    assert grow.generate(model, prompt, 12, keep=True)[0] == expected
    assert [cache.nbytes() for cache in made] == [256 * 3072]
    assert f"{256 * 3072:,} bytes" in chapter_text(grow, "answers.md")


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_kv_cache_task3_chunks(chunk, tiny):
    """A token is sampled within the prompt, or a chunk's tokens are computed twice or never."""
    model, tokenizer = tiny
    generate_in_chunks = solution(grow, 3, "generate_in_chunks")
    prompt = tokenizer.encode(grow.PROMPT)
    expected, work = grow.generate(model, prompt, 8, keep=True)
    token_ids, done = generate_in_chunks(model, prompt, 8, chunk)
    assert token_ids == expected and done["tokens computed"] == work["tokens computed"]
    assert done["steps"] == -(-len(prompt) // chunk) + 7


# ---- 2: what is printed ------------------------------------------------------------------------


def test_six_seeds_are_near_the_paper():
    """A policy, allocator or lengths that are not the paper's: Fig 2 within 2 points, Fig 13a."""
    shares, running = rows(SIX_SEEDS)
    for policy, paper in waste.PAPER_SHARES.items():
        assert shares[policy][:len(paper)] == pytest.approx(paper, abs=2)
        assert sum(shares[policy]) == pytest.approx(100, abs=0.2)       # four numbers are rounded
    assert shares["Blocks"][0] >= 95.8
    for policy in ORCA:
        assert running[policy] == pytest.approx(waste.PAPER_RUNNING[policy], abs=0.2)
    assert running["Blocks"] == pytest.approx(waste.PAPER_RUNNING["Blocks"], rel=0.12)


def test_six_seeds_are_what_it_prints(monkeypatch):
    """The chapter's second table is not what the program prints.

    Orca's rows are measured in full. Those of the blocks take most of a minute: they are compared
    with the single trace, which test_checkpoint measures.
    """
    for table in ("PAPER_SHARES", "PAPER_RUNNING"):
        paper = getattr(waste, table)
        monkeypatch.setattr(waste, table, {policy: paper[policy] for policy in ORCA})
    for function in (waste.print_setting, waste.print_shares, waste.print_running):
        assert printed(function, range(6)) in re.sub(r"^Blocks.*\n", "", SIX_SEEDS, flags=re.M)
    monkeypatch.undo()
    (one, few), (six, many) = rows(ONE_SEED), rows(SIX_SEEDS)
    assert six["Blocks"] == pytest.approx(one["Blocks"], abs=0.3)
    assert many["Blocks"] == pytest.approx(few["Blocks"], abs=1.5)


@pytest.mark.parametrize("options", [["--seeds", "0"], ["--seeds", "x"], ["--seeds", "-1"],
                                     ["--seeds"], ["--seed", "1"], ["more"]])
def test_bad_options_end_in_one_line(options, monkeypatch, capsys):
    """A traceback, the whole usage, or a run of the wrong length."""
    monkeypatch.setattr(sys, "argv", ["waste.py", *options])
    with pytest.raises(SystemExit) as error:
        waste.main()
    captured = capsys.readouterr()
    assert error.value.code == 2 and captured.out == ""
    assert re.fullmatch(r"waste\.py: .+\n", captured.err)


# ---- 2: requests -------------------------------------------------------------------------------


def test_requests_are_the_papers():
    """Lengths of another data set, a limit that is not kept, another rate of arrivals, disorder."""
    requests = [request for seed in range(4) for request in waste.draw_requests(8, seed)]
    mean_prompt = sum(request.prompt_len for request in requests) / len(requests)
    mean_output = sum(request.output_len for request in requests) / len(requests)
    # Fig 11's means: 20,000 to 30,000 draws with a deviation of 300 are within 2% of theirs
    assert mean_prompt == pytest.approx(161.31, rel=0.04)
    assert mean_output == pytest.approx(337.99, rel=0.02)
    assert all(request.prompt_len >= 1 and request.output_len >= 1
               and request.prompt_len + request.output_len < 2048 for request in requests)
    assert len(requests) == pytest.approx(4 * 8 * 900, rel=0.02)
    first = waste.draw_requests(8, 0)
    assert first == requests[:len(first)] and first == sorted(first, key=lambda one: one.arrival)


# ---- 2: contiguous -----------------------------------------------------------------------------


def test_buddies_split():
    """A split that keeps the wrong half, or leaves one out: chunks overlap, or blocks are lost."""
    allocator = waste.BuddyAllocator(8, max_chunk=8)
    assert [allocator.allocate(n) for n in (1, 3, 2)] == [(0, 1), (4, 4), (2, 2)]
    assert allocator.allocate(1) == (1, 1) and allocator.allocate(1) is None
    pool = waste.BuddyAllocator(waste.NUM_BLOCKS)
    assert [pool.allocate(128) for _ in range(8)] == [(128 * i, 128) for i in range(7)] + [None]


def test_task_1_buddies_merge():
    """A merge with a chunk that only lies beside, with a half that is split, or none at all."""
    allocator = waste.BuddyAllocator(8, max_chunk=8)
    chunks = [allocator.allocate(2) for _ in range(4)]
    for chunk in chunks[1:3]:                        # blocks 2-3 and 4-5: neighbours, no buddies
        allocator.free(chunk)
    assert allocator.allocate(4) is None
    allocator.free(chunks[0])
    assert allocator.allocate(4) == (0, 4)
    allocator.free((0, 4))
    allocator.free(chunks[3])
    assert allocator.allocate(8) == (0, 8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("task", [1, 2], ids=["task_1_buddies", "task_2_first_fit"])
def test_chunks_never_overlap(task, seed):
    """Two requests write to one block, or blocks are lost, as chunks come and go."""
    allocator, rng = allocator_of(task)(waste.NUM_BLOCKS), random.Random(seed)
    fresh = copy.deepcopy(vars(allocator))
    chunks, held = [], set()
    for step in range(3000):
        if chunks and rng.random() < 0.5:
            start, size = chunk = chunks.pop(rng.randrange(len(chunks)))
            allocator.free(chunk)
            held.difference_update(range(start, start + size))
        elif (chunk := allocator.allocate(num_blocks := rng.randint(1, 128))) is not None:
            start, size = chunk
            blocks = set(range(start, start + size))
            assert len(blocks) >= num_blocks, f"seed {seed}, step {step}: {chunk} is too small"
            assert not blocks & held and max(blocks) < waste.NUM_BLOCKS, f"seed {seed}, step {step}"
            assert task == 2 or start % size == 0 and size & size - 1 == 0, f"W2: {chunk}"
            chunks.append(chunk)
            held |= blocks
    for chunk in chunks:
        allocator.free(chunk)
    assert vars(allocator) == fresh, f"W4: seed {seed}"


def test_paper_figure_3():
    """A slot in the wrong column: requests A and B of the paper's Fig 3, halfway."""
    a, b = [waste.Running(waste.Request(0.0, prompt_len, output_len), length, (0, 0), num_kv)
            for prompt_len, output_len, length, num_kv in ((7, 3, 2048, 8), (3, 2, 512, 4))]
    assert a.slots() == (8, 2, 2038)
    assert b.slots() == (4, 1, 507)


def test_estimates():
    """Pow2 reserves twice too much for a power of two, or too little above one."""
    estimates = {output_len: [waste.ESTIMATES[policy](waste.Request(0.0, 1, output_len))
                              for policy in ORCA] for output_len in (1, 25, 32, 33)}
    assert estimates == {1: [2048, 1, 1], 25: [2048, 32, 25], 32: [2048, 32, 32],
                         33: [2048, 64, 33]}


@pytest.mark.parametrize("policy", ORCA)
def test_every_slot_counts_once(policy):
    """A slot is counted twice or never (W1), or somebody jumps the queue (W5)."""
    server = waste.make_server(policy)
    fresh = copy.deepcopy(server.allocator.free_chunks)
    requests = waste.draw_requests(4, 0)[:120]
    for request in requests:
        server.add(request)
    while server.waiting or server.running:
        server.step()
        num_running, shares = server.slots()
        free = sum(size * len(starts) for size, starts in server.allocator.free_chunks.items())
        rounded = sum(one.chunk[1] * waste.BLOCK_SIZE - one.length for one in server.running)
        assert min(*shares, free, rounded) >= 0
        assert sum(shares) + rounded + free * waste.BLOCK_SIZE == waste.NUM_SLOTS
        assert [*server.waiting] == requests[len(requests) - len(server.waiting):]
        assert num_running == len(server.running)
        server.finish()
    assert server.allocator.free_chunks == fresh


class OneByOne(waste.ContiguousServer):
    """One iteration at a time, whoever waits."""

    def step(self):
        admitted = self.admit()
        for running in admitted:
            running.num_kv = running.request.prompt_len - 1
        for running in self.running:
            running.num_kv += 1
        return 1, sum(running.request.prompt_len for running in admitted)


@pytest.mark.parametrize("policy", ORCA)
def test_strides_change_nothing(policy, monkeypatch):
    """The stride to the next end skips somebody's admission, or weighs what it skips wrongly."""
    requests = waste.draw_requests(4, 0)[:80]
    monkeypatch.setattr(waste, "WINDOW", (0, 1e9))   # until the last has ended
    shares, num_running = waste.simulate(waste.make_server(policy), requests)
    expected = waste.simulate(OneByOne(waste.ESTIMATES[policy]), requests)
    # on the way the steps get longer, by less than a thousandth: the mean takes them as equal
    assert shares == pytest.approx(expected[0], rel=1e-3)
    assert num_running == pytest.approx(expected[1], rel=1e-9)


def test_task_2_what_rounding_costs(monkeypatch):
    """answers.md shows another row than its allocator brings."""
    monkeypatch.setattr(waste, "BuddyAllocator", allocator_of(2))
    monkeypatch.setattr(waste, "PAPER_SHARES", {"Orca (Oracle)": (38.2, 25.2, 0.0, 36.6)})
    assert printed(waste.print_shares, range(1)).splitlines()[-1] in \
        chapter_text(waste, "answers.md").splitlines()


# ---- 2: blocks ---------------------------------------------------------------------------------


class EveryStep(waste.PagedServer):
    """The scheduler is asked in each step, as the engine does."""

    def schedule(self):
        return self.scheduler.schedule()


def paged_steps(monkeypatch, servers):
    """Let servers of a small pool and budget serve the same requests -> each step's results."""
    for name, value in (("NUM_BLOCKS", 200), ("MAX_BATCHED_TOKENS", 300)):
        monkeypatch.setattr(waste, name, value)
    servers = [server() for server in servers]
    requests, num_steps = waste.draw_requests(4, 0)[:60], 0
    while requests or servers[0].running:
        if requests and num_steps % 10 == 0:
            request = requests.pop(0)
            for server in servers:
                server.add(request)
        yield [(server, server.step()) for server in servers]
        for server in servers:
            server.finish()
        num_steps += 1


def test_the_scheduler_is_asked_often_enough(monkeypatch):
    """A step in which it would have admitted or preempted somebody passes without it."""
    for num_steps, results in enumerate(paged_steps(monkeypatch, (waste.PagedServer, EveryStep))):
        states = [(done, [(seq.num_kv, seq.num_tokens, seq.block_table) for seq in server.running])
                  for server, done in results]
        assert states[0] == states[1], f"step {num_steps}"
    few, every = [server for server, _ in results]
    assert few.scheduler.counts == every.scheduler.counts
    assert few.scheduler.counts["preemptions_recompute"] > 10 and few.pool.num_free == 200


@pytest.mark.parametrize("whose", ["the_chapters", "the_answers"])
def test_task_3_unfilled_slots(whose, monkeypatch):
    """A slot of a block is counted twice or never, or as reserved though nobody will fill it."""
    if whose == "the_answers":
        monkeypatch.setattr(waste.PagedServer, "slots", answer(waste, 3)["slots"])
    found = []
    for (server, _), in paged_steps(monkeypatch, [waste.PagedServer]):
        check(server.scheduler)
        num_running, (tokens, reserved, internal) = server.slots()
        tables = [(seq.num_prompt_tokens + seq.params.max_tokens - 1, seq.block_table)
                  for seq in server.running]         # the last token is sampled, and never cached
        assert num_running == len(tables) and tokens == sum(seq.num_kv for seq in server.running)
        assert tokens + reserved + internal == sum(16 * len(table) for _, table in tables)
        found.append((internal, sum(max(0, 16 * len(table) - last) for last, table in tables)))
    if any(internal for internal, _ in found) or whose == "the_answers":   # the task has been done
        assert all(internal == never_filled for internal, never_filled in found)


# ---- 4: paged attention ------------------------------------------------------------------------


def attention_cases(attend_one):
    """(what attend_one makes of a random pool full of NaN, what chapter 1 makes of one tensor)."""
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    options = {"dtype": torch.float64, "generator": generator}
    for block_size, num_keys in itertools.product((1, 3, 4, 16), (1, 3, 4, 5, 17)):
        num_blocks = -(-num_keys // block_size)
        table = torch.tensor([*rng.sample(range(num_blocks + 3), num_blocks), 0])
        caches = torch.full((2, num_blocks + 3, block_size, 2, 8), torch.nan, dtype=torch.float64)
        kv, q = torch.randn(2, num_keys, 2, 8, **options), torch.randn(1, 6, 8, **options)
        positions = torch.arange(num_keys)
        kernels.write_kv_reference(*kv, *caches, table[positions // block_size] * block_size
                                   + positions % block_size)
        yield (attend_one(q[0], *caches, table, num_keys, 0.3),
               grow.attend(q * 0.3 * 8 ** 0.5, *kv)[0])


@pytest.mark.parametrize("which", ["attention_task1", "attention_task2"])
def test_attention_over_blocks(which):
    """A slot past the context is read, a block in the wrong order, another head's K and V; or, in
    one pass, what was summed up is not shrunk when a new highest score comes."""
    attend_one = (paged.attend_one if which == "attention_task1" else
                  solution(paged, 2, "attend_online"))
    for number, (result, expected) in enumerate(attention_cases(attend_one)):
        torch.testing.assert_close(result, expected, msg=lambda text, n=number: f"case {n}: {text}")


def test_attention_task1_whole_blocks(monkeypatch):
    """answers.md says wrongly what happens to which row if whole blocks are read."""
    whole = inspect.getsource(paged.attend_one).replace("table[j], :num_filled]", "table[j]]")
    if whole == inspect.getsource(paged.attend_one):
        pytest.skip("attend_one has been rewritten")
    batch, q, *caches, _ = paged.run_steps(torch.Generator().manual_seed(0))
    right = paged.attend(q, *caches, batch, 1.0)
    exec(whole, defined := dict(vars(paged)))
    monkeypatch.setattr(paged, "attend_one", defined["attend_one"])
    wrong = paged.attend(q, *caches, batch, 1.0)
    same = (wrong == right).flatten(1).all(1)
    assert same.tolist() == [position == 7 for position in batch.positions.tolist()]
    nan = wrong.isnan().flatten(1).all(1).tolist()
    assert nan == [position not in (6, 7) for position in batch.positions.tolist()]


# ---- 5: the Triton kernel ----------------------------------------------------------------------

needs_launches = pytest.mark.skipif(not CAN_LAUNCH, reason="no GPU, and no interpreter: it needs "
                                    "triton and numpy")


def small_case():
    return steps.Decode(*steps.SMALL).fill(torch.float32, "cuda" if steps.GPU else "cpu",
                                           steps.TABLES)


def kernel_from(text, path):
    """Triton reads a kernel's source from a file -> the module."""
    path.write_text("from steps import *\nfrom steps import tl, triton\n\n\n" + text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_launches
def test_kernel_task1_one_pass(tmp_path):
    """a_tile is wrong; or, without a shrink, other contexts are wrong than answers.md says."""
    case = small_case()
    assert steps.is_right(case, steps.launch(case, steps.a_tile, False))
    source = Path(steps.__file__).read_text(encoding="utf-8")
    source = re.search(r"^@triton.jit\ndef a_tile\(.*?^    tl\.store.*?$", source, re.M | re.S)[0]
    if "y = y * shrink +" not in source:
        pytest.skip("a_tile has been rewritten")
    wrong = kernel_from(source.replace("y = y * shrink +", "y = y +"), tmp_path / "wrong.py")
    difference = steps.launch(case, wrong.a_tile, False) - case.attend(
        kernels.paged_attention_reference, torch.float64)
    assert (difference.abs().amax((1, 2)) < steps.TOLERANCE).tolist() == [True, True, False]


@needs_launches
def test_kernel_task2_a_block(tmp_path):
    """A block is read to its end though the context ends before, or entries are skipped."""
    text = re.search(r"^```python\n(.*?)^```$", chapter_text(steps, "answers.md"), re.M | re.S)[1]
    if hasattr(steps, "a_block"):
        module = steps
    else:
        note_the_answer(steps, "a_block")
        module = kernel_from(text, tmp_path / "answer.py")
    case = small_case()
    assert steps.is_right(case, steps.launch(case, module.a_block, False))


def test_the_numbers_of_the_steps():
    """The chapter names other numbers of parts, programs or turns than steps.py counts."""
    case = steps.Decode(steps.LARGE["1 x 8192"], *steps.SIZES)
    programs, turns, _ = steps.count(case, steps.in_parts, True, 2)
    text = " ".join(chapter_text(steps).split())
    assert f"In {case.parts} parts it has {programs}, of {turns} turns each" in text
    assert f"A tile takes {2 * case.tile * case.D * 2 // 1024} of an SM's 228 KB" in text


def test_the_table_of_the_steps():
    """A share that does not follow from milliseconds and copy, or a factor from other rows."""
    readme, answers = chapter_text(steps), " ".join(chapter_text(steps, "answers.md").split())
    table = re.findall(r"^\|([\w ]+|`paged_attention`)\|([\d.]+)\|(\d+)%\|([\d.]+)\|(\d+)%\|$",
                       readme, re.M)
    assert [name for name, *_ in table[:-1]] == [name for name, *_ in steps.STEPS]
    copy = float(re.search(r"([\d,]+) GB/s", readme)[1].replace(",", ""))
    for _, *cells in table:
        for (ms, share), lens in zip((cells[:2], cells[2:]), steps.LARGE.values(), strict=True):
            case = steps.Decode(lens, *steps.SIZES)
            needed = steps.count(case, steps.shared_heads, True, 2)[2]
            assert 100 * needed / float(ms) / 1e6 / copy == pytest.approx(float(share), abs=1)
    many, one = ([float(row[i]) for row in table] for i in (1, 3))
    assert f"{many[1] / many[2]:.1f} with 64 sequences, {one[1] / one[2]:.1f} with one" in answers
    assert f"merge cost {many[4] / many[3] - 1:.0%}" in readme


# ---- 6: continuous batching --------------------------------------------------------------------


def random_requests(seed, num=30):
    rng = random.Random(seed)
    return [waste.Request(0.0, rng.randint(1, 40), rng.randint(1, 40)) for _ in range(num)]


@pytest.mark.parametrize("policy", ["static", "continuous"])
def test_each_token_is_computed_once(policy):
    """A policy forgets a request's last token, or computes one twice; or its padding is wrong."""
    requests = random_requests(0)
    plans = list(batches.static(requests, 7) if policy == "static" else
                 batches.continuous(requests, 7, 16))
    for number, request in enumerate(requests):
        computed = sum(plan.get(number, 0) for plan, _ in plans)
        assert computed == request.prompt_len + request.output_len - 1, f"{policy}: {number}"
    if policy == "static":                           # 30 requests: 7, 7, 7, 7 and 2 of 7 seats
        assert all((sum(plan.values()) + padding) % 7 == 0 for plan, padding in plans)
    else:
        assert all(sum(plan.values()) <= 16 and padding == 0 for plan, padding in plans)


def test_measure_by_hand():
    """A mean or a share is taken over the wrong steps, rows or requests."""
    requests = [waste.Request(0.0, 3, 2), waste.Request(0.0, 1, 1)]
    plans = [({0: 2, 1: 1}, 1), ({0: 1}, 0), ({0: 1}, 3)]          # the prompt of 3 in two chunks
    assert batches.measure(plans, requests, 2) == (3, 5 / 9, 4 / 6, 4, 3 / 2, 4 / 2)


def test_who_decodes_never_waits():
    """B3: who is past the prompt gets no token in a step, as a newcomer took the budget."""
    requests = random_requests(1)
    computed, waiting = [0] * len(requests), 0
    for plan, _ in batches.continuous(requests, 7, 16):
        for number, request in enumerate(requests):
            if request.prompt_len <= computed[number] < request.prompt_len + request.output_len - 1:
                assert plan.get(number) == 1, f"{number} waits"
            computed[number] += plan.get(number, 0)
        waiting += len(plan) < 7
    assert waiting                                   # for somebody who took more than one token


def test_the_paper_request_in_chunks_of_four():
    """The chapter's picture: A's blocks and counts step by step, with a budget of 4 tokens."""
    scheduler = make_scheduler(16, 4, budget=4)
    groups = [make_group(0, 7), make_group(1, 3)]
    scheduler.waiting += groups
    seen = []
    for _ in range(4):
        scheduled = scheduler.schedule()
        for seq, num_new in scheduled:
            seq.num_kv += num_new
            seq.token_ids += [0] * (seq.num_kv == seq.num_tokens)
        seq = groups[0].seqs[0]
        seen.append(([num_new for _, num_new in scheduled], len(seq.block_table), seq.num_kv))
    assert seen == [([4], 1, 4), ([3, 1], 2, 7), ([1, 2], 2, 8), ([1, 1], 3, 9)]


@pytest.mark.parametrize("budget", [7, 8, 16, 1000])
def test_batching_task1_iteration_level(budget):
    """A newcomer goes before who runs, sits down where no seat is free, or gets too many tokens."""
    requests = random_requests(budget)
    mine = list(solution(batches, 1, "iteration_level")(requests, 7, budget))
    for step, (plan, expected) in enumerate(zip(mine, batches.continuous(requests, 7, budget),
                                                strict=True), 1):
        assert plan == expected, f"step {step}"


def test_batching_task2_prompts_apart():
    """A prompt and a decode share a step; or answers.md shows another row than it measures."""
    prompts_apart = solution(batches, 2, "prompts_apart")
    requests = waste.draw_requests(4, 0)[:batches.MANY]
    computed, num_pauses = [0] * len(requests), 0
    for plan, padding in prompts_apart(requests, batches.SEATS):
        begins = [computed[number] == 0 for number in plan]
        assert padding == 0 and len(set(begins)) == 1, "prompts and decodes in one step"
        num_pauses += begins[0]
        for number, num_new in plan.items():
            computed[number] += num_new
    assert computed == [request.prompt_len + request.output_len - 1 for request in requests]
    steps, rows, seats, *others = batches.measure(prompts_apart(requests, batches.SEATS), requests,
                                                  batches.SEATS)
    answers = chapter_text(batches, "answers.md")
    row = " ".join([f"{steps:,} {rows:.0%} {seats:.0%}", *(f"{number:,.0f}" for number in others)])
    assert f"prompts apart {row}" in " ".join(answers.split())
    assert f"{num_pauses} of the {steps:,} steps" in answers


def test_seats_are_empty_only_at_the_end():
    """answers.md names another step as the last one in which all seats are taken."""
    requests = waste.draw_requests(4, 0)[:batches.MANY]
    plans = batches.continuous(requests, batches.SEATS, batches.NO_LIMIT)
    full = [len(plan) == batches.SEATS for plan, _ in plans]
    last = max(step for step, is_full in enumerate(full, 1) if is_full)
    assert all(full[:last]) and f"until step {last:,}." in chapter_text(batches, "answers.md")


# ---- 7: preemption -----------------------------------------------------------------------------


def test_the_peak():
    """The chapter names another number of blocks as the most that are held, if there are enough."""
    num_kv, peak = [0] * batches.MANY, 0
    requests = waste.draw_requests(4, 0)[:batches.MANY]
    for plan, _ in batches.continuous(requests, batches.SEATS, 512, dry.POOLS[0]):
        for number, num_new in plan.items():
            num_kv[number] += num_new
        peak = max(peak, sum(-(-num_kv[number] // 16) for number in plan))
    assert f"Of {dry.POOLS[0]:,} blocks at most {peak} are held." in chapter_text(dry)


def test_the_latest_is_preempted_and_no_text_changes():
    """Another than the latest is preempted; or a text is another one in a pool of another size."""
    expected, _ = dry.generate(dry.ROOMY)
    for num_blocks in (9, 11, 17):
        ran = []
        tokens, stats = dry.generate(num_blocks, lambda step, before, now, ended, ran=ran:
                                     ran.append(sorted({*now} - ended)))
        assert tokens == expected and stats["preemptions_recompute"] > 0, f"{num_blocks} blocks"
        for step, ids in enumerate(ran):             # those who run are the earliest of who is left
            left = [i for i in range(3) if any(i in later for later in ran[step:])]
            assert ids == left[:len(ids)], f"{num_blocks} blocks, step {step}"


def test_what_is_found_again(monkeypatch):
    """Question 5 of chapter 7: who computes how much again after a preemption by recompute."""
    lost, again = {}, {}

    def preempt(scheduler, group):
        lost[group.request_id] = group.seqs[0].num_kv
        return original(scheduler, group)

    def watch(step, before, ran, ended):
        for request_id in {*lost} & {*ran} - {*before}:
            again[request_id] = computed[step]

    original, computed = nanopaged.Scheduler._preempt, {}
    schedule = nanopaged.Scheduler.schedule

    def spy(scheduler):
        plan = schedule(scheduler)
        computed[len(computed) + 1] = {group.request_id: num_new for seq, num_new in plan
                                       for group in scheduler.running if seq in group.seqs}
        return plan

    monkeypatch.setattr(nanopaged.Scheduler, "_preempt", preempt)
    monkeypatch.setattr(nanopaged.Scheduler, "schedule", spy)
    dry.generate(dry.TIGHT, watch)
    assert lost == {2: 16, 1: 22}
    # in the step in which they come back: all they lack, one token of it for the first time
    assert {i: plan[i] - 1 for i, plan in again.items()} == {2: 16, 1: 2}


def test_preemption_task1_reserving():
    """Somebody is let in and must be thrown out later; or kept out though all would fit."""
    reserving, ours = solution(dry, 1, "Reserving"), answer(dry, 1)["Reserving"]
    needed = sum(r.prompt_len + r.output_len - 1 for r in waste.draw_requests(4, 0)[:batches.MANY])
    steps, running, computed = dry.serve(400, ours)
    answers = " ".join(chapter_text(dry, "answers.md").split())
    assert f"takes {steps:,} steps instead of 4,725 and computes no token twice: {running:.1f} " \
           "requests" in answers
    if reserving is not ours:
        more_steps, _, computed = dry.serve(400, reserving)
        assert more_steps <= 1.02 * steps, "too careful"
    assert computed == needed, "somebody was preempted"


def test_preemption_task2_swap_ms():
    """The formula is further from the paper's Fig 19a than 5 ms."""
    paper = re.search(r"256: ([\d, and\n]+) ms", chapter_text(dry))[1]
    printed_ms = [int(number) for number in re.findall(r"\d+", paper)]
    assert len(printed_ms) == 9
    swap_ms = solution(dry, 2, "swap_ms")
    assert [swap_ms(1 << i) for i in range(9)] == pytest.approx(printed_ms, abs=5)


def test_what_to_watch(capsys):
    """Chapter 7 says that b and c go and come back, and in that command nobody does."""
    command = re.search(r"^    python nanopaged\.py ((?:.*\\\n)*.*)", chapter_text(dry), re.M)[1]
    nanopaged.main(shlex.split(command.replace("\\\n", "")))
    drawn = capsys.readouterr().err
    running = [int(n) for n in re.findall(r"^step \d+: (\d+) running", drawn, re.M)]
    assert "3 running, 0 waiting, 0 preempted" in drawn and " 2 preempted" in drawn
    assert 2 in running[running.index(1):], "nobody comes back"


# ---- 11: making the GPU never wait -------------------------------------------------------------


def costs(num_seqs, **others):
    return timeline.Costs(num_seqs, {1: 1200, 256: 4100}[num_seqs], **others)


def in_flight(clock, ahead=1):
    """How many steps have been launched and not been read, `ahead` at once, after each launch."""
    letters = "".join(letter for letter, _, _ in clock.host)
    return [letters[:i].count("L") - ahead * letters[:i].count("r")
            for i in range(1, len(letters) + 1) if letters[i - 1] == "L"]


@pytest.mark.parametrize("num_seqs", [1, 256])
def test_the_clock(num_seqs):
    """The GPU begins before it is told to, does two things at once, or the host reads too early."""
    c = costs(num_seqs)
    plan, read = c.plan + c.plan_seq * num_seqs, c.read_seq * num_seqs
    for policy, ahead, round_ in (
            (timeline.kernel_by_kernel, 1, plan + 180 * c.launch + c.gpu / 180 + read),
            (timeline.bursts, 1, plan + c.graph + c.gpu + read),
            (timeline.bursts, 16, plan + c.graph + 16 * c.gpu + read)):
        args = () if policy is timeline.kernel_by_kernel else (ahead,)
        clock, busy, host, speed = timeline.run(policy, c, *args, num_steps=32)
        assert clock.now == pytest.approx(32 // ahead * round_)
        assert busy == pytest.approx(c.gpu * ahead / round_)
        assert host == pytest.approx((plan + read + (
            c.graph * ahead if args else 180 * c.launch)) / round_)
        assert speed == pytest.approx(1e6 * num_seqs * ahead / round_)
        check_lines(clock)
        assert max(in_flight(clock, ahead)) == ahead or not args


def check_lines(clock):
    """Each of the two does one thing after the other."""
    for line in (clock.host, clock.gpu):
        assert all(end <= start for (*_, end), (_, start, _) in itertools.pairwise(line))


@pytest.mark.parametrize("num_seqs, ahead", [(1, 1), (1, 16), (256, 1), (256, 2), (256, 16)])
def test_the_clock_of_flights(num_seqs, ahead):
    """The GPU waits between flights, or a flight is launched too early, or read too late."""
    c, num = costs(num_seqs), 96 // ahead
    clock, busy, *_ = timeline.run(timeline.flights, c, ahead, num_steps=96)
    plan, read = c.plan + c.plan_seq * num_seqs, c.read_seq * num_seqs
    host, gpu = plan + ahead * c.graph + read, ahead * c.gpu
    # the first plan, and the reading of the last flight; between them the slower one works
    assert clock.now == pytest.approx(plan + c.graph + num * max(host, gpu) + read, rel=0.02)
    check_lines(clock)
    launched = in_flight(clock, ahead)
    assert max(launched) == 2 * ahead and len(launched) == len(clock.gpu) == 96
    if gpu > host:                                 # the GPU has not waited once
        gaps = [start - end for (*_, end), (_, start, _) in itertools.pairwise(clock.gpu)]
        assert max(gaps) == 0 and busy > 0.9
    else:
        assert (num_seqs, ahead) == (256, 1)


def test_a_drawn_line():
    """A column shows another letter than what most of it went to."""
    spans = [("a", 0, 10), ("b", 10, 18), ("#", 22, 24), ("#", 31, 31.5)]
    assert timeline.draw(spans, 10)[:5] == "ab-.."


def test_what_was_measured_is_simulated():
    """The simulation's first rows are far from what was measured on a GPU; or numbers differ."""
    readme = chapter_text(timeline)
    eager, graphs = (int(re.search(rf"^\|one request, {how}\|(\d+) tokens/s", readme, re.M)[1])
                     for how in ("kernel by kernel", "graphs and flights"))
    assert timeline.run(timeline.kernel_by_kernel, costs(1))[-1] == pytest.approx(eager, rel=0.03)
    assert timeline.run(timeline.flights, costs(1), 16)[-1] == pytest.approx(graphs, rel=0.03)
    replay = float(re.search(r"^\|a replay for 256.*?\|([\d.]+) ms", readme, re.M)[1])
    assert 1000 * replay == pytest.approx(costs(256).gpu)
    assert round(1e6 / eager / costs(1).num_kernels) == costs(1).launch + 1      # and the plan
    answers = " ".join(chapter_text(timeline, "answers.md").split())
    share = [timeline.run(timeline.flights, costs(256, read_seq=num), 16)[1] for num in (320, 4)]
    assert "busy {:.0%} of the time, instead of {:.0%}".format(*share) in answers
    lower, bursts = (timeline.run(timeline.bursts, costs(256), num)[1] for num in (1, 16))
    assert f"Lower: {lower:.0%}." in answers and f"once for 16 steps: {bursts:.0%}." in answers
    share = [timeline.run(timeline.bursts, costs(256), num)[1] for num in (2, 16)]
    assert "bursts of 2 keep the GPU busy {:.0%} of the time, and those of 16 {:.0%}.".format(
        *share) in answers
    share = [timeline.run(timeline.flights, costs(256), num)[2] for num in (2, 16)]
    assert "needs {:.0%} of the time with flights of 2, {:.0%} with 16".format(*share) in answers


def test_the_picture_of_flights(monkeypatch):
    """The chapter's picture: other positions or slots than two flights of two steps have."""
    monkeypatch.setattr(nanopaged.Engine, "_steps_ahead", lambda *args: 2)
    llm = nanopaged.LLM(device="cpu", block_size=4, num_blocks=8)
    engine, seen = llm.engine, []
    engine.graphs = stand_in.StandIn(engine)
    seq = nanopaged.Sequence(range(5, 13), nanopaged.SamplingParams(seed=0))
    seq.num_prompt_tokens, seq.params.stop_token_ids = 7, set()
    engine.pool.hold(seq, [7, 1], 7)
    engine.pool.hold(nanopaged.Sequence([], seq.params), [0, 2], 0)    # so that 3 is the next
    engine.scheduler.running.append(nanopaged.SequenceGroup(0, None, [seq]))
    original = engine.model.forward

    def forward(batch, kv_cache):
        seen.append([batch.positions.tolist(), batch.context_lens.tolist(),
                     batch.slot_mapping.tolist()])
        return original(batch, kv_cache)

    engine.model.forward = forward
    with torch.inference_mode():
        flight = engine._launch([seq])
        assert seq.block_table == [7, 1, 3] and (seq.num_kv, seq.num_tokens) == (7, 8)
        following = engine._launch(*flight[:2])
        for num_kv, landing in ((9, flight), (11, following)):
            engine._land(*landing)
            assert seq.block_table == [7, 1, 3]
            assert (seq.num_kv, seq.num_tokens) == (num_kv, num_kv + 1)
    assert seen == [[[7 + i], [8 + i], [slot]] for i, slot in enumerate((7, 12, 13, 14))]


def test_what_is_dropped(monkeypatch):
    """Prediction 3 of chapter 11: other steps, replays or dropped tokens than the engine's."""
    steps_ahead, nums = nanopaged.Engine._steps_ahead, []

    def spy(engine, seqs, in_flight):
        nums.append(steps_ahead(engine, seqs, in_flight))
        return nums[-1]

    monkeypatch.setattr(nanopaged.Engine, "_steps_ahead", spy)
    _, calls, replays, _, dropped = timeline.generate()
    answers = " ".join(chapter_text(timeline, "answers.md").split())
    assert nums == [0, 16, 16, 8, 0] and f"{calls} calls: the prompts, then 16, 16 and 8" in answers
    assert f"= {dropped} are dropped. The price: {replays} replays where 39" in answers


@pytest.mark.parametrize("num_seqs", [1, 256])
def test_never_wait_task1_one_by_one(num_seqs):
    """A flight is read in one piece, or before it has landed, or while none follows it."""
    policy, c = solution(timeline, 1, "one_by_one"), costs(num_seqs)
    clock, busy, host, _ = timeline.run(policy, c, 16)
    plan, read = c.plan + c.plan_seq * num_seqs, c.read_seq * num_seqs
    work = 2048 * (c.graph + read) + 2048 // 16 * plan
    assert clock.now == pytest.approx(plan + c.graph + 2048 * c.gpu + 16 * read)
    check_lines(clock)
    assert host == pytest.approx(work / clock.now)
    assert len(clock.gpu) == 2048 and max(in_flight(clock)) == 32
    if num_seqs == 256:
        together = timeline.run(timeline.flights, c, 16)[2]
        answers = " ".join(chapter_text(timeline, "answers.md").split())
        assert f"host is busy {host:.0%} of the time instead of {together:.0%}" in answers
        assert f"and the GPU still {busy:.0%}" in answers


def test_never_wait_task2_draw_token():
    """A draw that is none from the softmax, or another than the engine's."""
    draw_token = solution(timeline, 2, "draw_token")
    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    for row in range(50):
        params = nanopaged.SamplingParams(seed=row)
        seq = nanopaged.Sequence([0] * (3 * row + 1), params)
        (want, *_), = nanopaged.sample(logits[row:row + 1], [seq])
        assert draw_token(logits[row], row, 3 * row + 2) == want, f"row {row}"
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = torch.tensor([draw_token(probs.log(), 7, i) for i in range(5000)]).bincount()
    assert (drawn / 5000 - probs).abs().max() < 0.02           # three deviations of 0.007
