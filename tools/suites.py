"""Runs suites one after another and says at the end how each did against its time budget.

    suites.py [--full] SUITE...    runs in the `tools` environment

A suite is a nox session. Environments and models are made before the clock starts: a budget is about what a
developer waits for every time. A suite over budget is reported, not failed: a slow machine is no defect.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from environments import ROOT, BuildError, build


@dataclass(frozen=True)
class Suite:
    """`budget_s` is for two cores, without the slow tests; `prepare` are sessions to run before."""

    environment: str | tuple[str, ...]
    budget_s: int
    pytest: bool = True
    prepare: tuple[str, ...] = ()


SUITES = {
    "lint": Suite("lint", 120, pytest=False),
    "bare": Suite("bare", 15, pytest=False),
    "core": Suite("core", 240),
    "daemon": Suite("core", 240),
    "backends": Suite("backends", 360),
    "oldest": Suite("oldest", 240),
    "kernels": Suite("kernels", 180),
    "hf": Suite("hf", 180, prepare=("model",)),
    "vllm": Suite("vllm", 480, prepare=("model",)),
    "sglang": Suite("sglang", 540),
    "cross": Suite(("hf", "vllm", "sglang"), 240, prepare=("model",)),
}
CLOSING_LINE = re.compile(r"=+ (.* in \d[\d.]*s.*?) =+$")


@dataclass(frozen=True)
class Result:
    name: str
    seconds: float
    passed: bool
    closing_line: str


def prepare(suite: Suite) -> None:
    """Makes what is not on the clock; where that fails, the suite itself fails of it and is reported."""
    with contextlib.suppress(BuildError):
        for environment in [suite.environment] if isinstance(suite.environment, str) else suite.environment:
            build(environment)
        for session in suite.prepare:
            subprocess.run([sys.executable, "-m", "nox", "-s", session], cwd=ROOT, check=False)


def run(name: str, full: bool) -> Result:
    suite = SUITES[name]
    arguments = ["--", "-m", ""] if full and suite.pytest else []
    command = [sys.executable, "-m", "nox", "-s", name, *arguments]
    closing_line = ""
    started = time.monotonic()
    # Unbuffered, so that the last line before a hang is seen.
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            if match := CLOSING_LINE.match(line):
                closing_line = match[1]
    return Result(name, time.monotonic() - started, process.returncode == 0, closing_line)


def report(results: list[Result], full: bool) -> None:
    print("\nsuite     seconds  budget  verdict")
    for result in results:
        budget = SUITES[result.name].budget_s
        over = result.seconds > budget and not full
        verdict = ("ok" if result.passed else "FAILED") + (", OVER BUDGET" if over else "")
        shown = "-" if full else str(budget)
        line = f"{result.name:9} {result.seconds:7.1f}  {shown:>6}  {verdict:15} {result.closing_line}"
        print(line.rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="with the slow tests")
    parser.add_argument("suites", nargs="+", choices=SUITES, metavar="SUITE")
    arguments = parser.parse_args()

    for name in arguments.suites:
        prepare(SUITES[name])
    results = [run(name, arguments.full) for name in arguments.suites]
    report(results, arguments.full)
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
