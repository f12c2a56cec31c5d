"""The sessions behind `make`: one for each thing that is checked, shown or measured.

nox's own virtualenvs are switched off: tools/environments.py builds them, keyed by what goes into them, in a
cache that outlives a checkout, and puts the project on top as a wheel. Arguments behind `--` go to pytest, to
the demo or to the benchmarks: `make nox ARGS="-s core -- -k chain"`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import environments

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "none"
nox.options.sessions = [
    "lint",
    "bare",
    "core",
    "daemon",
    "backends",
    "kernels",
    "hf",
    "vllm",
    "sglang",
    "cross",
]

TEST_VARIABLES = {
    # OpenMP threads that spin while they wait take the cores from each other on a small machine.
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Keeps the checkout off sys.path, so that the installed wheel is what is tested.
    "PYTHONSAFEPATH": "1",
}
PYTEST = ("python", "-m", "pytest")


def run(session: nox.Session, environment: str, *command: str, silent: bool = False, **variables: str) -> str:
    """Runs a command in an environment, with the project installed; returns its output if it is silent."""
    folder = environments.install(environment)
    program = environments.program(folder, command[0])
    output = session.run(
        program,
        *command[1:],
        env={**environments.environ(folder), **variables},
        include_outer_env=False,
        external=True,
        silent=silent,
        stderr=None,
    )
    return output.strip() if isinstance(output, str) else ""


def model_directory(session: nox.Session) -> str:
    """Returns the directory of the converted model, made on first use."""
    return run(session, "hf", "python", "tools/model.py", silent=True).splitlines()[-1]


@nox.session
def model(session: nox.Session) -> None:
    """The model that the tests, the demo and the benchmarks use."""
    session.log(model_directory(session))


@nox.session
def lint(session: nox.Session) -> None:
    """Format, style, types, floors."""
    rooms = ("", "adapters", "backends", "kernels/cuda", "kernels/ascend")
    tree = os.pathsep.join(str(environments.ROOT / room) for room in rooms)
    run(session, "lint", "ruff", "format", "--check", "--quiet")
    run(session, "lint", "ruff", "check", "--quiet")
    run(session, "lint", "mypy")
    run(session, "lint", "lint-imports", "--no-logo", PYTHONPATH=tree)


@nox.session
def bare(session: nox.Session) -> None:
    """The package with its hard dependencies only; pytest would be one too many, so this is unittest."""
    run(session, "bare", "python", "-m", "unittest", "discover", "-s", "tests/bare", **TEST_VARIABLES)


@nox.session
def core(session: nox.Session) -> None:
    """Everything that needs no engine and no torch."""
    run(session, "core", *PYTEST, "tests/core", *session.posargs, **TEST_VARIABLES)


@nox.session
def daemon(session: nox.Session) -> None:
    """The daemon and engines as processes that are killed, stopped and lied to."""
    run(session, "core", *PYTEST, "tests/daemon", *session.posargs, **TEST_VARIABLES)


@nox.session
def backends(session: nox.Session) -> None:
    """Storage backends on their real servers, which the tests start."""
    run(session, "backends", *PYTEST, "tests/backends", *session.posargs, **TEST_VARIABLES)


@nox.session
def kernels(session: nox.Session) -> None:
    """The kernel packages without a device: an interpreter, stand-ins for drivers, a pretend NPU, cross-compilation."""
    variables = {**TEST_VARIABLES, "TRITON_DEFAULT_FP_FUSION": "0"}
    run(session, "kernels", *PYTEST, "tests/kernels", *session.posargs, **variables)


@nox.session
def soak(session: nox.Session) -> None:
    """Daemon and engines killed at random under load, for minutes; every load is compared with what was stored."""
    run(session, "core", "python", "tests/daemon/soak.py", *session.posargs, **TEST_VARIABLES)


@nox.session
def oldest(session: nox.Session) -> None:
    """The same on the lowest versions that pyproject.toml allows."""
    run(session, "oldest", *PYTEST, "tests/core", *session.posargs, **TEST_VARIABLES)


@nox.session
def hf(session: nox.Session) -> None:
    """Hugging Face Transformers with a small real model."""
    variables = {**TEST_VARIABLES, "LMCACHE_SDK_TEST_MODEL": model_directory(session)}
    run(session, "hf", *PYTEST, "tests/hf", "tests/engines", "--engine", "hf", *session.posargs, **variables)


@nox.session
def vllm(session: nox.Session) -> None:
    """vLLM's CPU build: its scheduler, its memory, and whole engines with a tiny model."""
    variables = {**TEST_VARIABLES, "LMCACHE_SDK_TEST_MODEL": model_directory(session), "VLLM_NO_USAGE_STATS": "1"}
    run(session, "vllm", *PYTEST, "tests/vllm", "tests/engines", "--engine", "vllm", *session.posargs, **variables)


@nox.session
def sglang(session: nox.Session) -> None:
    """SGLang on the CPU: its keys, its pools, and whole engines with a tiny model."""
    run(
        session,
        "sglang",
        *PYTEST,
        "tests/sglang",
        "tests/engines",
        "--engine",
        "sglang",
        *session.posargs,
        **TEST_VARIABLES,
    )


@nox.session
def cross(session: nox.Session) -> None:
    """All engines on one store, each using what the others have computed with a small real model."""
    pythons = {
        f"LMCACHE_SDK_TEST_PYTHON_{name.upper()}": environments.program(environments.install(name), "python")
        for name in ("vllm", "sglang")
    }
    variables = {**TEST_VARIABLES, "LMCACHE_SDK_TEST_MODEL": model_directory(session), **pythons}
    run(session, "hf", *PYTEST, "tests/cross", *session.posargs, **variables, VLLM_NO_USAGE_STATS="1")


@nox.session
def demo(session: nox.Session) -> None:
    """Three questions on a long document: without a cache, with a store, and in a new process."""
    command = ("lmcache-sdk", "demo", "--model", model_directory(session), "--json", "demo.json")
    run(session, "hf", *command, *session.posargs, **TEST_VARIABLES)


@nox.session
def bench(session: nox.Session) -> None:
    """Ratios to references that are measured in the same run."""
    # The benchmarks are not in the wheel: they are found in the current directory.
    variables = {key: value for key, value in TEST_VARIABLES.items() if key != "PYTHONSAFEPATH"}
    environment = next((name for name in ("backends", "kernels", "vllm", "sglang") if name in session.posargs), "hf")
    if environment in ("vllm", "sglang"):
        variables["LMCACHE_SDK_TEST_MODEL"] = model_directory(session)
    run(session, environment, "python", "-m", "benchmarks.run", "--out", "bench.json", *session.posargs, **variables)
