"""Builds the virtual environments that the project is linted, tested, shown and measured in.

    environments.py list                    every environment, its folder, and whether it is built
    environments.py build NAME...           build what is missing
    environments.py python NAME             print the interpreter that has the project installed
    environments.py run NAME -- COMMAND...  run a command in it

Two layers. The **environment** holds the pinned requirements; it is named by a hash of everything that goes
into it and is never written to again once it is complete, so that any number of checkouts and runs may share
it. The **project layer** on top of it is a venv of a few files that holds this checkout's wheel and is named
by the hash of that wheel: what runs is always the tree as it is now, with the metadata and entry points that
a user gets.

Only the standard library, since this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import debian

ROOT = Path(__file__).resolve().parent.parent
BUILDER_VERSION = 1
STAMP = "complete.json"
LAYER_LIFETIME_S = 7 * 24 * 3600


@dataclass(frozen=True)
class Environment:
    """`requirements` are files of requirements/, installed together; `torch` is one that goes before them; `packages`
    are Debian's, to be unpacked beside them: groups of names that are of use only together.

    `pinned` is a file that is installed as it stands, without asking its packages what else they want; `alias` is the
    name and version under which one of them is looked for, too. `beside` are folders of this checkout whose wheels lie
    beside the project's.
    """

    requirements: tuple[str, ...]
    torch: str | None = None
    packages: tuple[str, ...] = ()
    pinned: str | None = None
    alias: tuple[str, str] | None = None
    project: bool = True
    beside: tuple[str, ...] = ()


# The servers that the storage backends are tried on, and what mooncake's programs link to.
SERVERS = (
    "redis-server redis-tools",
    "valkey-server valkey-tools",
    "libibverbs1 librdmacm1 libnuma1 libcurl4",
)


ENVIRONMENTS = {
    "tools": Environment(("tools",), project=False),
    "lint": Environment(("runtime", "test", "lint"), project=False),
    "bare": Environment(("runtime",)),
    "core": Environment(("runtime", "test")),
    "oldest": Environment(("oldest", "test")),
    "backends": Environment(("runtime", "test", "backends"), packages=SERVERS),
    "kernels": Environment(("runtime", "test", "kernels"), torch="torch", beside=("kernels/cuda", "kernels/ascend")),
    "hf": Environment(("runtime", "test", "hf"), torch="torch"),
    # `vllm serve` asks for its own version by the name of the CUDA build; "cpu" in it is how vLLM knows where it runs.
    "vllm": Environment(("test",), torch="torch", pinned="vllm", alias=("vllm", "0.32.0+cpu")),
    "sglang": Environment(("test",), torch="torch", pinned="sglang"),
}


class BuildError(Exception):
    """What went wrong and what the user can do about it."""


def cache_root() -> Path:
    """The folder of environments, project layers and models: LMCACHE_SDK_VENVS or ~/.cache/lmcache-sdk."""
    return Path(os.environ.get("LMCACHE_SDK_VENVS") or "~/.cache/lmcache-sdk").expanduser().absolute()


def say(text: str) -> None:
    # stdout belongs to the answer (a path) or to the command that is run.
    print(text, file=sys.stderr, flush=True)


# --- a folder that is either complete or built again


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; the kernel drops it when the process dies, so no lock is ever stale."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that builds {folder.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def complete(folder: Path, make: Callable[[Path], None], facts: object = None) -> Path:
    """Returns `folder`, made by `make` unless its stamp says that an earlier call finished it.

    The folder is made in place, since a venv cannot be moved; the stamp, written last, tells a finished one
    from the remains of an interrupted one.
    """
    stamp = folder / STAMP
    if not stamp.exists():
        with locked(folder):
            if not stamp.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                stamp.write_text(json.dumps(facts, indent=1))
    return folder


# --- environments


def requirement_lines(name: str) -> list[str]:
    """The requirements of one file, without what does not change the result (comments, blank lines)."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def torch_build() -> str:
    """`cpu`, or `default` where an NVIDIA driver is present (the default build on Linux is a CUDA one)."""
    return "default" if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") else "cpu"


def facts_of(name: str) -> dict[str, object]:
    """Everything that decides what an environment holds; its hash is the environment's identity."""
    environment = ENVIRONMENTS[name]
    facts: dict[str, object] = {
        "builder": BUILDER_VERSION,
        "python": sys.version,
        "interpreter": os.path.realpath(sys.base_prefix),
        "platform": sysconfig.get_platform(),
        "requirements": [requirement_lines(file) for file in environment.requirements],
    }
    if environment.torch:
        facts["torch"] = [torch_build(), *requirement_lines(environment.torch)]
    if environment.pinned:
        facts["pinned"] = [*requirement_lines(environment.pinned), environment.alias]
    if environment.packages:
        facts["packages"] = [*debian.release(), *environment.packages]
    return facts


def folder_of(name: str) -> Path:
    digest = hashlib.sha256(json.dumps(facts_of(name), sort_keys=True).encode()).hexdigest()
    return cache_root() / f"{name}-{digest[:12]}"


def python_in(folder: Path) -> Path:
    return folder / "bin" / "python"


def build(name: str) -> Path:
    """Returns the environment's folder, building it first if need be."""
    return complete(folder_of(name), lambda folder: make_environment(name, folder), facts_of(name))


def make_environment(name: str, folder: Path) -> None:
    if sys.version_info < (3, 11):
        version = sys.version.split()[0]
        raise BuildError(f"Python {version} is too old: 3.11 or newer is needed (make PYTHON=python3.11)")
    if importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise BuildError(
            f"Python {version} cannot make virtual environments, since its ensurepip module is missing. "
            f"On Debian and Ubuntu: apt-get install python{version}-venv"
        )
    environment = ENVIRONMENTS[name]
    say(f"building environment {name} in {folder}" + (" (some minutes)" if environment.torch else ""))
    started = time.monotonic()
    check_call([sys.executable, "-m", "venv", str(folder)])
    if environment.torch:
        install_torch(folder, environment.torch)
    files = (f"--requirement={ROOT}/requirements/{file}.txt" for file in environment.requirements)
    pip(folder, "install", *files)
    if environment.pinned:
        pip(folder, "install", "--no-deps", f"--requirement={ROOT}/requirements/{environment.pinned}.txt")
    else:
        pip(folder, "check")
    if environment.alias:
        add_alias(folder, *environment.alias)
    if environment.packages:
        unpack(environment.packages, folder / "debian")
    say(f"built environment {name} in {time.monotonic() - started:.0f} s")


def add_alias(folder: Path, name: str, version: str) -> None:
    """Makes the metadata of a package findable by another name."""
    (library,) = folder.glob("lib/python*/site-packages")
    stub = library / f"{name}-{version}.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def unpack(packages: tuple[str, ...], folder: Path) -> None:
    """Unpacks Debian packages; says which this system does not have, since what needs them is then left out."""
    try:
        for line in debian.unpack(packages, folder):
            say(f"NOTE: {line}")
    except debian.DebianError as error:
        raise BuildError(f"Debian packages for tests on real servers cannot be had now: {error}") from error


def install_torch(folder: Path, file: str) -> None:
    """Installs torch before everything else, so that nothing else can choose its version or its build."""
    lines = requirement_lines(file)
    if torch_build() == "cpu":
        cpu = [f"{line}+cpu" if line.startswith("torch==") else line for line in lines]
        try:
            pip(folder, "install", *cpu)
            return
        except BuildError:
            say(
                "NOTE: pip's index has no CPU build of torch under that name, so the default build is taken; "
                "where that is a CUDA build it is several GB. PyTorch's own index has the CPU builds:\n"
                "      PIP_EXTRA_INDEX_URL=<the CPU index that PyTorch's install page names>"
            )
    pip(folder, "install", *lines)


def pip(folder: Path, *arguments: str, python: Path | None = None) -> None:
    """Runs the pip of an environment, on it or on another interpreter."""
    target = [] if python is None else [f"--python={python}"]
    options = [*target, "--disable-pip-version-check", "--no-input", "-qq"]
    check_call([str(python_in(folder)), "-m", "pip", *options, *arguments])


def check_call(command: list[str], cwd: Path = ROOT) -> None:
    """Runs a command silently, unless it fails: then what it printed is the message of a BuildError."""
    done = subprocess.run(command, cwd=cwd, env=clean_environ(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"exit status {done.returncode} of {' '.join(command)}\n{done.stdout}{done.stderr}")


def clean_environ() -> dict[str, str]:
    """The caller's variables without those that would bring another Python's packages in."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


# --- the project in an environment


def install(name: str) -> Path:
    """Returns the folder that holds `name` and this checkout's wheel, if `name` takes the project."""
    environment = build(name)
    if not ENVIRONMENTS[name].project:
        return environment
    tools = build("tools")
    with tempfile.TemporaryDirectory() as scratch:
        for room in (".", *ENVIRONMENTS[name].beside):
            command = [str(python_in(tools)), "-m", "hatchling", "build", "-t", "wheel", "-d", scratch]
            check_call(command, cwd=ROOT / room)
        wheels = sorted(Path(scratch).glob("*.whl"))
        digest = hashlib.sha256(b"".join(wheel.read_bytes() for wheel in wheels)).hexdigest()
        layers = cache_root() / "projects"
        layer = complete(
            layers / f"{environment.name}-{digest[:12]}",
            lambda folder: make_layer(environment, tools, wheels, folder),
        )
    os.utime(layer / STAMP)
    drop_old_layers(layers)
    return layer


def make_layer(environment: Path, tools: Path, wheels: list[Path], folder: Path) -> None:
    check_call([str(python_in(environment)), "-m", "venv", "--without-pip", str(folder)])
    packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (folder / packages / "environment.pth").write_text(f"{environment / packages}\n")
    (folder / "environment").symlink_to(environment)
    pip(tools, "install", "--no-deps", "--no-index", *map(str, wheels), python=python_in(folder))


def drop_old_layers(layers: Path) -> None:
    """Removes layers that no run has used for a week: every change of the source makes a new one."""
    for stamp in layers.glob(f"*/{STAMP}"):
        with contextlib.suppress(OSError):
            if stamp.stat().st_mtime < time.time() - LAYER_LIFETIME_S:
                stamp.unlink()
                shutil.rmtree(stamp.parent, ignore_errors=True)


def environ(folder: Path) -> dict[str, str]:
    """The process environment for commands that run in `folder`, as an activated venv would have it."""
    below = folder / "environment" if (folder / "environment").exists() else folder
    found = debian.search_paths(below / "debian")
    found["PATH"] = [*(str(place / "bin") for place in dict.fromkeys((folder, below))), *found["PATH"]]
    variables = clean_environ() | {"VIRTUAL_ENV": str(folder)}
    for name, places in found.items():
        if value := os.pathsep.join([*places, *filter(None, [variables.get(name)])]):
            variables[name] = value
    return variables


def program(folder: Path, name: str) -> str:
    """The full path of a command that is found as `environ(folder)` would find it."""
    found = shutil.which(name, path=environ(folder)["PATH"])
    if found is None:
        raise BuildError(f"{name}: no such command in {folder}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    commands.add_parser("build").add_argument("names", nargs="+", choices=ENVIRONMENTS, metavar="NAME")
    commands.add_parser("python").add_argument("name", choices=ENVIRONMENTS, metavar="NAME")
    run = commands.add_parser("run")
    run.add_argument("name", choices=ENVIRONMENTS, metavar="NAME")
    # Split off here, since argparse would also swallow a second `--`, which belongs to the command.
    own = sys.argv[1:]
    end = own.index("--") if "--" in own else len(own)
    own, argv = own[:end], own[end + 1 :]
    arguments = parser.parse_args(own)
    if (arguments.command == "run") != bool(argv):
        parser.error("run NAME -- COMMAND..., and only run, takes a command behind --")

    try:
        if arguments.command == "list":
            for name in ENVIRONMENTS:
                folder = folder_of(name)
                print(f"{name:9}{'built' if (folder / STAMP).exists() else 'missing':9}{folder}")
        elif arguments.command == "build":
            for name in arguments.names:
                build(name)
        elif arguments.command == "python":
            print(python_in(install(arguments.name)))
        else:
            folder = install(arguments.name)
            os.execve(program(folder, argv[0]), argv, environ(folder))
    except BuildError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
