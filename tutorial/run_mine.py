"""Generate text with your own code in the engine, and see whose code ran.

    python tutorial/run_mine.py --lab 3 --prompt "ROMEO:" [--file mine.py] [more options]

More options are those of nanopaged.py, such as --show-blocks, --n 4 or --max-tokens 100. The same
is then done by the engine's own code: it must write the same text. The options that the lab sets
are printed first; yours come after them. Exit status: 0 the same text, 1 another, or a task is not
done yet, or something was raised, 2 wrong usage.
"""

import contextlib
import functools
import importlib
import io
import sys
from collections import Counter

import labs
import torch
from grade import lab_parser

SECONDS = 60                                       # of computing, for the learner's run


class Calls:
    """Counts calls of functions, and keeps the first exception that one of them raised."""

    def __init__(self):
        self.counts, self.error = Counter(), None

    def counted(self, name, function):
        @functools.wraps(function)
        def count(*args, **kwargs):
            self.counts[name] += 1
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self.error = self.error or error
                raise
        return count

    def counted_kernel(self, name, kernel):
        """kernel[grid](...) is what a launch looks like: count these."""
        class Counted:
            def __getitem__(_, grid):
                return self.counted(name, kernel[grid])
        return Counted()


def four_parts(launches):
    """The engine launches up to 64 parts, the interpreter one by one: 4 show as much."""
    def cut(*args):
        return [((heads, tiles, 4), (few, 1), *more)
                for (heads, tiles, _), (few, _), *more in launches(*args)]
    return cut


def with_graphs(init):
    """LLM.__init__ of which the engine has graphs, on a CPU as well."""
    sys.path.insert(0, str(labs.TUTORIAL / "11_never_wait"))
    stand_in = importlib.import_module("stand_in")

    @functools.wraps(init)                         # the command line asks for its parameters
    def set_up(llm, *args, **kwargs):
        init(llm, *args, **kwargs)
        llm.engine.graphs = llm.engine.graphs or stand_in.StandIn(llm.engine)
    return set_up


def unless_stopped(print_report):
    """No report of a run in which there was nothing to report: a task is not done, or it exits."""
    @functools.wraps(print_report)                 # its docstring is the report's text
    def report(*args):
        error = labs.raised_by(sys.exc_info()[1])
        if not isinstance(error, NotImplementedError | SystemExit):
            print_report(*args)
    return report


@contextlib.contextmanager
def in_the_engine(number, mine, calls):
    """Put the classes and functions of a learner's module into the engine, their calls counted."""
    lab = labs.LABS[number]
    engine, undo = importlib.import_module(lab.module), []

    def put(owner, name, value):
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)
    try:
        for name in lab.owners:
            put(engine, name, getattr(mine, name))
        for full_name in lab.names:
            owner, _, method = full_name.partition(".")
            place = (getattr(engine, owner), method) if method else (engine, owner)
            count = calls.counted_kernel if lab.kernels else calls.counted
            counted = count(full_name, getattr(*place))
            put(*place, counted)
            if not method:                         # functions of one lab may call each other
                put(mine, owner, counted)
        if lab.kernels:                            # a batch has the references on a CPU: not here
            for name in ("write_kv", "paged_attention"):
                put(engine, f"{name}_reference", getattr(engine, name))
            put(engine, "attention_launches", four_parts(engine.attention_launches))
        command = importlib.import_module("nanopaged")
        put(command, "print_report", unless_stopped(command.print_report))
        if lab.graphs:
            put(engine.LLM, "__init__", with_graphs(engine.LLM.__init__))
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


def parse(argv):
    """nanopaged's command line -> its options. Raises: Wrong; ends the program after --help."""
    # not before lab 5 has turned the interpreter on
    import nanopaged

    try:
        return nanopaged.CommandLine().parse_args(argv)
    except (ValueError, OSError) as error:
        raise labs.Wrong(" ".join(str(error).split())) from None


def generate(options):
    """What nanopaged.py does -> (exit status, text); the text is shown as well."""
    class Tee(io.StringIO):
        def write(self, text):
            shown.write(text)
            shown.flush()
            return super().write(text)

    import nanopaged

    shown = sys.stdout
    with contextlib.redirect_stdout(Tee()) as written:
        return nanopaged.run(options), written.getvalue()


def whose(mine, full_name, path):
    """Whether a function was written in the file `path`, or came with the engine."""
    owner, _, method = full_name.partition(".")
    function = getattr(getattr(mine, owner), method) if method else getattr(mine, owner)
    code = getattr(function, "__code__", None) or getattr(function, "fn", function).__code__
    return "yours" if code.co_filename == str(path) else "the engine's"


def run_theirs(number, path, mine, options, calls):
    """Generate with a learner's code -> (exit status, text). Raises: Wrong."""
    try:
        with labs.time_limit(SECONDS), in_the_engine(number, mine, calls):
            return generate(options)
    except labs.TimeUp:
        raise labs.Wrong(f"no end after {SECONDS} s of computing: an endless loop, or a pool that "
                         "never has a block to give") from None
    except SystemExit:
        raise labs.Wrong(labs.ends_program(path)) from None
    except Exception as error:
        cause = labs.raised_by(calls.error or error)
        if isinstance(cause, NotImplementedError):
            raise labs.Wrong(f"not done yet: {cause}") from None
        if isinstance(cause, ValueError | OSError) and calls.error is None:
            raise labs.Wrong(" ".join(str(cause).split())) from None     # options, or the model
        raise labs.Wrong(labs.describe(cause, path)) from None


def run(number, file, more):
    """Run a learner's code, then the engine's own -> exit status."""
    argv = [*labs.LABS[number].options.split(), *more]
    if labs.LABS[number].kernels and (reason := labs.why_no_interpreter()):
        raise labs.Wrong(f"lab {number} has kernels, and a CPU runs the references: {reason}")
    path, options, calls = labs.find_file(number, file), parse(argv), Calls()
    mine = labs.load(number, path)
    yours = path != labs.find_file(number, "engine")
    owners = {name: whose(mine, name, path) if yours else "the engine's"
              for name in labs.LABS[number].names}
    print(f"lab {number} sets {labs.LABS[number].options}", flush=True)
    status, text = run_theirs(number, path, mine, options, calls)
    width = max(24, *map(len, owners))
    print(f"\n{'called':{width}}  times  whose code")
    for name, owner in owners.items():
        print(f"{name:{width}} {calls.counts[name]:6}  {owner}")
    if status or not yours:
        return status
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        expected = generate(options)[1]
    if text != expected:
        print(f"The engine's own code writes another text:\n\n{expected}")
        return 1
    print("The engine's own code writes the same text.")
    return 0


def main(argv=None):
    args, more = lab_parser(__doc__).parse_known_args(argv)
    torch.set_num_threads(1)                       # the tiny model's matrices are too small for two
    try:
        return run(args.lab, args.file, more)
    except labs.Wrong as wrong:
        print(f"run_mine.py: {wrong}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
