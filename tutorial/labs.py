"""The labs: what each one asks for, its starter, and how a learner's file is examined.

    python tutorial/labs.py             makes tutorial/NN_name/starter.py of every lab anew

    nanopaged.py, kernels.py  -- bodies of the tasks left out -->  starter.py  -- you -->  mine.py
              |                                                                               |
              +----- NN_name/test_lab.py grades either,  run_mine.py generates text with it --+

The engine is the solution: starters are cut out of it, so neither can drift from the other.
"""

import ast
import ctypes
import importlib
import importlib.util
import os
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parent
ROOT = TUTORIAL.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))                  # so that it runs from any folder

SECONDS_PER_TASK = 5                               # of computing; a task takes milliseconds


@dataclass
class Task:
    names: str                                     # functions of the engine, "Class.method"
    points: int
    hint: str                                      # what they do, in a few words


@dataclass
class Lab:
    folder: str                                    # of tutorial/
    module: str                                    # the file of the engine
    options: str                                   # of nanopaged.py, for run_mine.py
    tasks: list
    inherited: tuple = ()                          # classes of which a starter has the tasks only
    kernels: bool = False                          # the tasks are Triton kernels
    graphs: bool = False                           # run_mine.py needs graphs, or their stand-in
    loops: tuple = ()                              # functions of which a starter lacks the loop
    example: str = '--prompt "ROMEO:"'             # what to run with it: more options, for a reader

    @property
    def owners(self):
        """The classes and functions that a learner's file defines and run_mine.py puts to use."""
        return list(dict.fromkeys(name.split(".")[0] for name in self.names))

    @property
    def names(self):
        return list(dict.fromkeys(name for task in self.tasks for name in task.names.split()))


LABS = {
    3: Lab("03_block_pool", "nanopaged", "--block-size 4 --num-blocks 64 --max-tokens 48", [
        Task("BlockPool.hold", 2, "add rows to a table and count them"),
        Task("BlockPool.num_needed", 2, "how many blocks are missing"),
        Task("BlockPool.append", 3, "take blocks, or change nothing"),
        Task("BlockPool.free", 3, "give back what nobody reads any more"),
    ], example='--prompt "ROMEO:" --max-tokens 20'),
    4: Lab("04_paged_attention", "kernels", "--block-size 4 --num-blocks 64 --max-tokens 24", [
        Task("flat_batch", 4, "say whose the rows of a step are, and where"),
        Task("paged_attention_reference", 6, "attend through block tables"),
    ]),
    5: Lab("05_triton_kernel", "kernels",
           "--device cpu --block-size 4 --num-blocks 64 --max-tokens 24", [
        Task("write_kv_kernel", 3, "write a token's K and V to its slot"),
        Task("attention_kernel", 4, "what a turn of the loop does"),
        Task("merge_kernel", 3, "join the results of parts"),
    ], kernels=True, loops=("attention_kernel",)),
    6: Lab("06_continuous_batching", "nanopaged",
           "--block-size 4 --num-blocks 64 --max-tokens 24 --max-num-batched-tokens 4", [
        Task("Scheduler._plan", 3, "what a running group computes"),
        Task("Scheduler._admit", 3, "whether the first that waits may run"),
        Task("Scheduler.schedule", 4, "who computes how many tokens in a step"),
    ], example='--prompt "ROMEO:" --prompt "JULIET:"'),
    7: Lab("07_preemption", "nanopaged", "--block-size 4 --num-blocks 8 --swap-blocks 8 "
           "--preemption swap --max-tokens 20 --prompt JULIET:", [
        Task("Scheduler._preempt", 3, "take a group's blocks, its tokens stay"),
        Task("BlockPool.take_over", 4, "move a group's blocks from another pool"),
        Task("Scheduler._preempt", 3, "by swap, while there is room"),
    ]),
    8: Lab("08_copy_on_write", "nanopaged",
           "--block-size 4 --num-blocks 64 --max-tokens 24 --n 3", [
        Task("BlockPool.fork", 2, "one more reader of every block"),
        Task("BlockPool.num_needed", 3, "new rows, and copies"),
        Task("BlockPool.append", 5, "copy a block before it is written"),
    ], example='--prompt "ROMEO: I have been so" --n 3'),
    9: Lab("09_beam_search", "nanopaged",
           "--block-size 4 --num-blocks 64 --max-tokens 24 --beam 4", [
        Task("Sequence.fork", 1, "a text that goes on by itself"),
        Task("beam_score", 1, "rank texts of different lengths"),
        Task("hopeful", 3, "whether it is worth going on"),
        Task("Engine._extend_beams", 5, "choose beams, share blocks, free the rest"),
    ], inherited=("Engine",), example='--prompt "ROMEO:" --beam 4 --verbose'),
    10: Lab("10_prefix_cache", "nanopaged",
            "--block-size 4 --num-blocks 64 --max-tokens 24 --max-num-seqs 1", [
        Task("BlockPool._take", 1, "the block that has been free longest"),
        Task("BlockPool._key", 2, "what a block is known by"),
        Task("BlockPool.find_prefix BlockPool.publish", 4, "find what was computed"),
        Task("BlockPool._take", 3, "forget what was in the block"),
    ], example='--prompt "My lord, I" --prompt "My lord, I do" --verbose'),
    11: Lab("11_never_wait", "nanopaged",
            "--device cpu --block-size 4 --num-blocks 64 --max-tokens 24 --max-num-seqs 16", [
        Task("Engine._steps_ahead", 4, "how far the device may run ahead"),
        Task("Engine._launch Engine._land", 6, "let it fly, and take its tokens"),
    ], inherited=("Engine",), graphs=True),
}


# ---- starters ----------------------------------------------------------------------------------


def without_bodies(node, lines, todo, prefix="", loops=()):
    """The lines of a class or function, without the bodies of those in `todo`, {name: message}.

    Of those in `loops` only the body of the loop is left out.
    """
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept, at = [], start - 1                       # lines count from 1, `at` from 0
    inner = [node] if isinstance(node, ast.FunctionDef) else node.body
    for function in inner:
        if message := todo.get(prefix + getattr(function, "name", "")):
            docstring = function.body[0]
            last, end, column = docstring.end_lineno, function.end_lineno, docstring.col_offset
            if prefix + function.name in loops:
                loop, = (part for part in function.body if isinstance(part, ast.For))
                last, end, column = loop.lineno, loop.end_lineno, loop.body[0].col_offset
            kept += lines[at:last]
            kept.append(f'{" " * column}raise NotImplementedError("{message}")')
            at = end
    return kept + lines[at:node.end_lineno]


def tasks_alone(node, lines, todo, module):
    """A class that inherits all but the tasks from the engine's own; their bodies left out."""
    name, docstring = node.name, node.body[0]
    kept = [f"class {name}({module}.{name}):", *lines[docstring.lineno - 1:docstring.end_lineno]]
    for function in node.body:
        if f"{name}.{getattr(function, 'name', '')}" in todo:
            kept += ["", *without_bodies(function, lines, {function.name: todo[
                f"{name}.{function.name}"]})]
    return kept


def imports_for(nodes, tree, module):
    """The import statements that `nodes` of `tree` need, in three sections: ours come last."""
    used = {name.id for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)}
    used -= {node.name for node in nodes}
    sections = {True: [], False: []}               # of the standard library, or installed
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias for alias in node.names if (alias.asname or alias.name) in used]
            used -= {alias.asname or alias.name for alias in names}
            if names:
                node.names = names
                source = getattr(node, "module", None) or names[0].name
                sections[source.split(".")[0] in sys.stdlib_module_names].append(ast.unparse(node))
    bound = {getattr(name, "id", None) or getattr(name, "name", None) for name in ast.walk(tree)
             if isinstance(name, ast.ClassDef | ast.FunctionDef | ast.alias)
             or isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    top = {name for name in vars(importlib.import_module(module)) if name in bound & used}
    ours = sorted(top, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    ours = [f"from {module} import {', '.join(ours)}"] * bool(ours)
    return [[f"{line}  # noqa: F401" for line in section]
            for section in (sections[True], sections[False], ours) if section]


def make_starter(number):
    """The text of a lab's starter: the engine's classes and functions, bodies of tasks left out."""
    lab = LABS[number]
    lines = (ROOT / f"{lab.module}.py").read_text(encoding="utf-8").splitlines()
    tree = ast.parse("\n".join(lines))
    nodes = [node for node in tree.body if getattr(node, "name", None) in lab.owners]
    todo = {}
    for i, task in enumerate(lab.tasks, 1):
        for name in task.names.split():            # of two tasks on one function, the first counts
            todo.setdefault(name, f"Lab {number}, task {i}: {task.hint}")
    table = [f"    task {i}, {task.points} point{'s' * (task.points > 1):1}   "
             f"{' and '.join(task.names.split())}: {task.hint}"
             for i, task in enumerate(lab.tasks, 1)]
    parts = [[f'"""Lab {number}, the starter: copy it to mine.py and fill in the tasks.', "",
              *table, "", f"    python tutorial/grade.py --lab {number}",
              f"    python tutorial/run_mine.py --lab {number} {lab.example}", "",
              "All else is the engine's own code: "
              f"tutorial/labs.py cut it out of {lab.module}.py.", '"""']]
    inherited = [node for node in nodes if node.name in lab.inherited]
    if lab.loops:
        parts.append(["# ruff: noqa: B007, F841    what the loop will use"])
    parts += imports_for([node for node in nodes if node not in inherited], tree, lab.module)
    parts += [[f"import {lab.module}"]] * bool(inherited)
    text = "\n\n".join("\n".join(part) for part in parts)
    for node in nodes:
        prefix = "" if isinstance(node, ast.FunctionDef) else f"{node.name}."
        text += "\n\n\n" + "\n".join(tasks_alone(node, lines, todo, lab.module)
                                      if node in inherited else
                                      without_bodies(node, lines, todo, prefix, lab.loops))
    return text + "\n"


# ---- a learner's file --------------------------------------------------------------------------


class Wrong(Exception):
    """A mistake in a learner's code, told in one line."""


class TimeUp(BaseException):
    """Too long. No Exception, so that a learner's `except Exception` lets it through."""


@contextmanager
def time_limit(seconds):
    """Raise TimeUp in this thread after `seconds` of computing; a debugger's prompt takes none."""
    thread_id, done = ctypes.c_ulong(threading.get_ident()), threading.Event()
    end = time.process_time() + seconds

    def watch():
        pause = 0.05
        while not done.wait(pause):
            if time.process_time() > end:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(TimeUp))
                pause = 0.5                        # then again: a bare `except:` may have eaten it

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def why_no_interpreter():
    """Turn Triton's interpreter on -> None or, in one line, why kernels cannot run in it.

    To be called before kernels.py is imported, which reads the environment then; where it has been
    imported, for a GPU, nothing must change any more.
    """
    if "kernels" not in sys.modules and all(map(importlib.util.find_spec, ("triton", "numpy"))):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    kernels = importlib.import_module("kernels")
    if kernels.INTERPRETED and hasattr(kernels.triton, "cdiv"):
        return None
    return "it needs Triton's interpreter: pip install triton numpy, and set TRITON_INTERPRET=1"


def raised_by(error):
    """What a kernel raised: Triton's interpreter wraps it."""
    return error.__cause__ if type(error).__name__ == "InterpreterError" else error


def ends_program(path):
    """What to say of a file that raises SystemExit, which would end the grader, too."""
    return f"{path.name} ends the program, as sys.exit() does: take that out"


def describe(error, path):
    """An exception in one line: which function of the file `path` raised it, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename == str(path)]
    frame = (theirs or frames)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if not theirs and Path(frame.filename).is_relative_to(TUTORIAL):
        return f"calling your code, or using its result, raised {text}"
    return f"{frame.name}() raised {text} (line {frame.lineno}: {frame.line})"


def find_file(number, file=None):
    """The file that is graded: `file`, or mine.py of the lab's folder, or else the starter."""
    if file == "engine":
        return ROOT / f"{LABS[number].module}.py"
    folder = TUTORIAL / LABS[number].folder
    mine = folder / "mine.py"
    path = Path(file).resolve() if file else mine if mine.is_file() else folder / "starter.py"
    if not path.is_file():
        raise Wrong(f"there is no file {path}")
    return path


def load(number, path):
    """Import a learner's file, or the engine itself. Raises: Wrong, also if a task's is missing."""
    if path == ROOT / f"{LABS[number].module}.py":
        module = importlib.import_module(LABS[number].module)
    else:
        spec = importlib.util.spec_from_file_location(f"lab_{number}_mine", path)
        module = importlib.util.module_from_spec(spec)
        try:
            with time_limit(SECONDS_PER_TASK):
                spec.loader.exec_module(module)
        except SyntaxError as error:
            raise Wrong(f"{path.name} is no Python: {error.msg} (line {error.lineno})") from None
        except TimeUp:
            raise Wrong(f"{path.name} cannot be imported: it does not come to an end") from None
        except SystemExit:
            raise Wrong(ends_program(path)) from None
        except Exception as error:
            raise Wrong(f"{path.name} cannot be imported: {describe(error, path)}") from None
    for name in LABS[number].names:
        owner, _, method = name.partition(".")
        found = getattr(module, owner, None)
        if found is None or method and not hasattr(found, method):
            raise Wrong(f"{path.name} has no {name}")
    return module


# ---- grading -----------------------------------------------------------------------------------


def expect(ok, diagnosis):
    """`diagnosis` is one line that names the mistake in the learner's terms."""
    if not ok:
        raise Wrong(diagnosis)


@contextmanager
def doing(what):
    """Say in the diagnosis what was being done when a learner's code raised something, or hung."""
    try:
        yield
    except (Wrong, NotImplementedError):
        raise
    except (Exception, TimeUp) as error:
        error.add_note(what)
        raise


def examine(check, number, path):
    """Run check(module) on a learner's file -> None, or in one line what is wrong."""
    try:
        module = load(number, path)
        with time_limit(SECONDS_PER_TASK):
            check(module)
        return None
    except Wrong as wrong:
        return str(wrong)
    except SystemExit:
        return ends_program(path)
    except TimeUp as error:
        return f"{notes(error)}no end after {SECONDS_PER_TASK} s of computing: an endless loop?"
    except Exception as error:
        cause = raised_by(error)
        if isinstance(cause, NotImplementedError):
            return f"not done yet ({cause})"
        return notes(error) + describe(cause, path)


def notes(error):
    return "".join(f"{note}: " for note in getattr(error, "__notes__", [])[:1])


def task(lab_number, number):
    """Make of check(module) a test of pytest's, and a task of grade.py's."""
    def decorate(check):
        def test():
            import pytest
            path = find_file(lab_number, os.environ.get("LAB_FILE"))
            if diagnosis := examine(check, lab_number, path):
                if diagnosis.startswith("not graded"):
                    pytest.skip(diagnosis)
                pytest.fail(f"task {number}: {diagnosis}", pytrace=False)
        test.__doc__ = check.__doc__
        test.check, test.number = check, number
        return test
    return decorate


def main():
    for number, lab in LABS.items():
        path = TUTORIAL / lab.folder / "starter.py"
        path.write_text(make_starter(number), encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
