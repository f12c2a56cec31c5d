"""Programs and libraries of Debian packages, unpacked into a folder.

Nothing is installed, no service is started and root is not needed: apt works on lists and a cache of its own and only
downloads. It takes the mirror that the system's sources name, for this release and its backports. What those packages
need is taken along where the system does not have it.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

KEYRINGS = Path("/usr/share/keyrings")
MISSING = "missing.txt"
NOT_FOUND = ("Unable to locate package", "has no installation candidate")


class DebianError(Exception):
    """What failed, with apt's own words."""


def release() -> tuple[str, str]:
    """The distribution and its release's name, `("debian", "bookworm")`; empty where there are none."""
    try:
        facts = platform.freedesktop_os_release()
    except OSError:
        return "", ""
    return facts.get("ID", ""), facts.get("VERSION_CODENAME", "")


def unpack(groups: Sequence[str], folder: Path) -> list[str]:
    """Unpacks packages into the folder; returns what this system does not have, a sentence for each group.

    `groups` are names with spaces between them; the packages of a group are of use only together. Raises DebianError
    where packages exist but cannot be had now.
    """
    folder.mkdir(parents=True)
    missing = list(_unpack(groups, folder))
    (folder / MISSING).write_text("".join(f"{line}\n" for line in missing))
    return missing


def _unpack(groups: Sequence[str], folder: Path) -> list[str]:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return [f"{group}: this system has no apt-get; what is on PATH is used" for group in groups]
    apt = Apt(folder / "apt")
    missing = []
    for group in groups:
        packages = group.split()
        try:
            apt.download(packages)
        except DebianError as error:
            if not any(text in str(error) for text in NOT_FOUND):
                raise
            missing.append(f"{group}: {' '.join(release())} has not all of these; what is on PATH is used")
    for file in sorted(apt.archives.glob("*.deb")):
        call(["dpkg", "-x", str(file), str(folder)])
    shutil.rmtree(apt.folder)
    return missing


class Apt:
    """apt-get with lists, cache and sources in a folder of its own, and the system's record of what is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.archives = folder / "cache" / "archives"
        for place in (self.archives / "partial", folder / "state" / "lists" / "partial"):
            place.mkdir(parents=True)
        lines = sources()
        # Some releases have no backports, and some mirrors do not carry them.
        try:
            self.update(lines | {line for line in map(backports_of, lines) if line})
        except DebianError:
            self.update(lines)

    def update(self, lines: set[str]) -> None:
        (self.folder / "sources.list").write_text("".join(f"{line}\n" for line in sorted(lines)))
        self.get("update")

    def download(self, packages: Sequence[str]) -> None:
        """Also those that are installed: the folder must not depend on the system more than it has to."""
        self.get("install", "--yes", "--download-only", "--reinstall", "--no-install-recommends", *packages)

    def get(self, *arguments: str) -> None:
        options = {
            "Dir::State": self.folder / "state",
            "Dir::Cache": self.folder / "cache",
            "Dir::Etc::sourcelist": self.folder / "sources.list",
            "Dir::Etc::sourceparts": "-",
            # apt's user for downloads cannot write below a home; the lock is the system's, which is only read.
            "APT::Sandbox::User": "root",
            "Debug::NoLocking": "1",
            # Otherwise an update without a network succeeds, and finds no package.
            "APT::Update::Error-Mode": "any",
        }
        call(["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items()), *arguments])


def sources() -> set[str]:
    """The lines of a sources.list for this release, as the system's own sources have them."""
    distribution, codename = release()
    keyring = KEYRINGS / f"{distribution}-archive-keyring.gpg"
    signed = f" [signed-by={keyring}]" if keyring.exists() else ""
    form = f"deb{signed} $(REPO_URI) $(RELEASE) $(COMPONENT)"
    listed = call(["apt-get", "--no-release-info", "indextargets", "--format", form, "Created-By: Packages"])
    lines = {line for line in listed.splitlines() if line.split()[-2].split("-")[0] == codename}
    if not lines:
        raise DebianError(f"apt's sources name no mirror for {distribution} {codename!r}")
    return lines


def backports_of(line: str) -> str:
    """The source of a release's backports, from that of the release itself; empty for the others (-updates, ...)."""
    start, suite, component = line.rsplit(" ", 2)
    return "" if "-" in suite else f"{start} {suite}-backports {component}"


def call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DebianError(f"exit status {done.returncode} of {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def search_paths(folder: Path) -> dict[str, list[str]]:
    """For PATH and LD_LIBRARY_PATH, so that what was unpacked into the folder is found."""
    return {
        "PATH": [str(folder / "usr" / "bin")],
        "LD_LIBRARY_PATH": [str(place) for usr in ("usr/lib", "lib") for place in folder.glob(f"{usr}/*-linux-gnu*")],
    }
