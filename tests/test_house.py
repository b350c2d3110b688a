"""The budgets of the house: one file that can be read in an evening, and nothing beside it."""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize

import pytest
from helpers import ROOT

FILES = ("nanopaged.py", "kernels.py")
MAX_CODE_LINES = {"nanopaged.py": 950, "kernels.py": 350}
TOP_LEVEL = {"README.md", "nanopaged.py", "kernels.py", "requirements.txt", "tests", "tutorial",
             "LICENSE"}
PACKAGES = {"torch", "triton", "tiktoken", "safetensors", "pytest"}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENCODING, tokenize.ENDMARKER}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def docstring_lines(tree):
    """The numbers of all lines of all docstrings."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def count_code_lines(source):
    """Lines that hold code: not blank, not only a comment, not a docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(source)))


def functions(tree):
    """{name: lines from `def` to its end, docstring included}; Triton's kernels have their own."""
    return {f"{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1
            for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)}


def imported(tree):
    """The top-level names of all modules that are imported anywhere."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


def test_code_lines_are_counted_right():
    """A count that takes comments or docstrings for code, or a text over two lines for one."""
    source = '"""Doc.\n\nMore."""\n\n# why\nx = 1   # here\n\ndef f():\n    """One."""\n' \
             '    # two\n    return """a\nb""", (\n        1)\n'
    assert count_code_lines(source) == 5               # x, def, return and its two further lines


@pytest.mark.parametrize("name", FILES)
def test_code_lines(name):
    """The file grows past what a reader finishes."""
    source = read(name)
    assert count_code_lines(source) <= MAX_CODE_LINES[name]
    assert len(source.splitlines()) <= 1800


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short(name):
    """A function that must be scrolled through; most should be a handful of lines."""
    lengths = functions(ast.parse(read(name)))
    long = {name: length for name, length in lengths.items() if length > 40}
    assert not long, f"more than 40 lines: {long}"
    if name == "nanopaged.py":                         # kernels.py has only a few
        assert statistics.median(lengths.values()) <= 12


@pytest.mark.parametrize("name", FILES)
def test_lines_are_short(name):
    """Lines that wrap on a projector, or trailing white space."""
    for number, line in enumerate(read(name).splitlines(), 1):
        assert len(line) <= 100, f"{name}:{number} has {len(line)} columns"
        assert line == line.rstrip() and "\t" not in line, f"{name}:{number}: white space"


def test_the_top_level():
    """A stray file: a second package, a setup.py, a folder of examples."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode or "nanopaged.py" not in git.stdout.split("\n"):
        pytest.skip("not a git checkout: other files beside the project's are no fault of its own")
    found = {path.split("/")[0] for path in git.stdout.splitlines()}
    strays = {name for name in found - TOP_LEVEL if not name.startswith(".")}
    assert not strays


def test_requirements():
    """A sixth package, or one without a version: another machine then runs something else."""
    lines = [line for line in read("requirements.txt").splitlines()
             if line.strip() and not line.startswith("#")]
    pinned = {re.match(r"[\w-]+==\d[\w.]*", line)[0].split("==")[0]: line for line in lines}
    assert pinned.keys() == PACKAGES and len(lines) == 5
    assert re.search(r';\s*(sys_platform|platform_system) == "[Ll]inux"$', pinned["triton"]), \
        "triton is there for Linux only: the file must install on a Mac"


def test_imports_go_one_way():
    """kernels that need the engine, or an engine that needs its tests: none can be read alone."""
    engine, kernels = [imported(ast.parse(read(name))) for name in FILES]
    ours = {"nanopaged", "kernels", "tests", "tutorial", "."}
    ours |= {path.stem for folder in ("tests", "tutorial") for path in (ROOT / folder).glob("*.py")}
    assert engine & ours == {"kernels"} and not kernels & ours
    allowed = PACKAGES - {"pytest"} | {"requests", "regex", "jinja2"}   # these three come with them
    assert engine - ours - allowed <= sys.stdlib_module_names
    assert kernels - ours - {"torch", "triton"} <= sys.stdlib_module_names


def sections(source):
    """{number of a section: its text}, by the banners."""
    parts = re.split(r"\n# =+\n# (\d+)\. ", source)
    return dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))


def test_allocator_and_scheduler_need_no_torch():
    """Sections 4 to 6 must be readable, and steppable, without a tensor in sight."""
    found = sections(read("nanopaged.py"))
    assert list(found) == list(range(2, 12)), "the sections, in the order of a request's life"
    for number in (4, 5, 6):
        tree = ast.parse("# " + found[number])
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {"torch", "nn", "F", "kernels"}, f"section {number}"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None               # as on a Mac: importing it raises ImportError
import torch
import kernels, nanopaged
sys.path.insert(0, "tests")
import helpers
group, scheduler = helpers.make_group(0, 2), helpers.make_scheduler(4, 4)
scheduler.waiting.append(group)
assert scheduler.schedule() == [(group.seqs[0], 2)]
cache = kernels.new_kv_cache(1, 2, 4, 1, 8, torch.float32, "cpu")[0]
x = torch.ones(2, 1, 8)
kernels.write_kv_reference(x, x, *cache, torch.tensor([4, 5]))
y = kernels.paged_attention_reference(
    x, *cache, torch.tensor([[1]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32),
    torch.tensor([0, 2], dtype=torch.int32), max_query_len=2, scale=1.0)
assert torch.allclose(y, x)
print("works")
"""


def test_it_works_without_triton():
    """An import of triton that is not guarded: no macOS, no Windows."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout == "works\n", done.stderr
