"""Grade a lab: points for each task, and in one line what is wrong.

    python tutorial/grade.py --lab 3 [--file mine.py] [--json]

Without --file it is mine.py in the lab's folder or, if there is none, starter.py; --file engine
grades the engine. Exit status: 0 all points, 1 not all, 2 wrong usage.
"""

import argparse
import contextlib
import importlib.util
import json
import sys
from pathlib import Path

import labs


def load_tasks(number):
    """The checks of a lab's test_lab.py -> {number of the task: check(module)}."""
    path = labs.TUTORIAL / labs.LABS[number].folder / "test_lab.py"
    spec = importlib.util.spec_from_file_location(f"test_lab_{number}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {test.number: test.check for test in vars(module).values() if hasattr(test, "number")}


def grade(number, file=None):
    """Examine a file in all tasks of a lab -> a dict for JSON."""
    path, checks, results = labs.find_file(number, file), load_tasks(number), []
    for i, task in enumerate(labs.LABS[number].tasks, 1):
        with contextlib.redirect_stdout(sys.stderr):           # what a learner's code prints
            diagnosis = labs.examine(checks[i], number, path)
        results.append({"task": i, "functions": task.names.split(), "of": task.points,
                        "points": 0 if diagnosis else task.points, "diagnosis": diagnosis})
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return {"lab": number, "file": str(shown), "points": sum(r["points"] for r in results),
            "of": sum(r["of"] for r in results), "tasks": results}


def show(report):
    """The report as text."""
    print(f"lab {report['lab']}: {report['file']}")
    for r in report["tasks"]:
        print(f"task {r['task']}   {r['points']} of {r['of']:2}   {' and '.join(r['functions'])}")
        if r["diagnosis"]:
            print(f"          {r['diagnosis']}")
    print(f"total   {report['points']} of {report['of']:2}")


def lab_parser(description):
    """The options that grade.py and run_mine.py have in common."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=int, required=True, choices=list(labs.LABS))
    parser.add_argument("--file", help="mine.py or else starter.py of the lab; engine is itself")
    return parser


def main(argv=None):
    parser = lab_parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    try:
        report = grade(args.lab, args.file)
    except labs.Wrong as wrong:
        print(f"grade.py: {wrong}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(report))
    else:
        show(report)
    return 0 if report["points"] == report["of"] else 1


if __name__ == "__main__":
    sys.exit(main())
