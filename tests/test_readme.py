"""The README does what it says: its commands are run and their output compared."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
COMMANDS = [line for kind, text in FENCES if not kind for line in text.splitlines()]
OUTPUTS = [text for kind, text in FENCES if kind == "text"]


@functools.cache
def run(command):
    arguments = shlex.split(command)
    assert arguments[:2] == ["python", "nanopaged.py"], command
    return subprocess.run([sys.executable, *arguments[1:]], cwd=ROOT, check=True, text=True,
                          capture_output=True, encoding="utf-8", timeout=60,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})    # printed on a CPU


@pytest.mark.parametrize("prompt, stream, output", [
    ("--prompt \"ROMEO:\"", "stdout", OUTPUTS[0]), ("--show-blocks", "stderr", OUTPUTS[1])])
def test_the_printed_output_is_what_the_command_prints(prompt, stream, output):
    """The README's sample output drifts from the engine or from the shipped model."""
    command = next(line for line in COMMANDS if prompt in line)
    assert getattr(run(command), stream) == output


def test_the_python_example_runs():
    """The API in the README is not the API."""
    (code,) = [text for kind, text in FENCES if kind == "python"]
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


def test_every_option_and_file_it_names_exists():
    """A renamed option, file or test stays in the README."""
    options = run("python nanopaged.py --help").stdout
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)):
        assert option in options, f"{option} is not in --help"
    for name in set(re.findall(r"`((?:tests|tutorial)/[\w./]*|\w+\.(?:py|txt))`", README)):
        assert (ROOT / name).exists(), f"{name} does not exist"
    for script in re.findall(r"python ((?:tests|tutorial)/\S+\.py)", README):
        assert (ROOT / script).is_file(), f"{script} does not exist"


def test_it_stays_short():
    """The README grows into a manual, or makes the reader scroll to the first command."""
    assert len(README.split()) <= 900
    assert README[:README.index("```")].count("\n") < 22
    assert "pip install -r requirements.txt" in COMMANDS
    assert "python -m pytest" in COMMANDS
