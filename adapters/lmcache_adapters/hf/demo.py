"""The demonstration: three questions on one long document, without a cache, then from a store in a new process; and
the first of them through a daemon, while the engine and then the daemon are killed and started again.

Each phase is an engine process of its own, and each begins with a small unrelated generation, so that what is
initialised at first use is in no figure. All phases get the same token ids; TTFT is from there to the first token.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lmcache_sdk.errors import ConfigError
from lmcache_sdk.testing.harness import EngineHarness

# Chapters of CPython's own manual, which every Python brings along; the questions are on the first one.
CHAPTERS = (
    "compound",
    "debugger",
    "formatstrings",
    "specialnames",
    "string-methods",
    "typesmapping",
    "assignment",
)
QUESTIONS = (
    "When is the finally clause of a try statement executed?",
    "What does the with statement do?",
    "What is the while statement used for?",
)
INSTRUCTION = "Read this chapter of a manual, then answer the question below it in one sentence."
WARM_UP_TOKENS = 96
ANSWER_TIMEOUT_S = 900.0
# A store's map is sparse, so this is a bound and not a cost.
STORE_SIZE = "20GiB"
# The daemon's pool, in times of the KV of the questions: one client may hold half of it.
POOL_FACTOR = 3
POOL_BYTES_UNKNOWN_STORE = 1 << 30
DAEMON_TIMEOUT_S = 30.0

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """One question in one phase. Times in seconds."""

    ttft_s: float
    cached_tokens: int
    token_ids: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """One question: without a cache, and from the store in a new process."""

    question: str
    prompt_tokens: int
    cold: Answer
    warm: Answer

    @property
    def speedup(self) -> float:
        """How many times sooner the first token comes."""
        return self.cold.ttft_s / self.warm.ttft_s

    @property
    def tokens_equal(self) -> bool:
        """Whether both gave the same answer."""
        return self.cold.token_ids == self.warm.token_ids


@dataclass(frozen=True, slots=True)
class Summary:
    """The first question's figures: what ``--json`` writes."""

    cold_ttft_s: float
    warm_ttft_s: float
    speedup: float
    prompt_tokens: int
    cached_tokens: int
    tokens_equal: bool
    store_bytes: int


@dataclass(frozen=True, slots=True)
class Restart:
    """The first question again, after something was killed and started again."""

    event: str
    answer: Answer
    tokens_equal: bool


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured. ``restarts`` is empty if the part with the daemon was left out."""

    rows: list[Row]
    store_bytes: int
    restarts: Sequence[Restart] = ()

    @property
    def passed(self) -> bool:
        """Every question had the same answer, and something came from the store, or the daemon's memory."""
        answers = [(row.warm, row.tokens_equal) for row in self.rows]
        answers += [(restart.answer, restart.tokens_equal) for restart in self.restarts]
        return all(tokens_equal and answer.cached_tokens > 0 for answer, tokens_equal in answers)

    def summary(self) -> dict[str, float | int | bool]:
        """See :class:`Summary`."""
        first = self.rows[0]
        return asdict(
            Summary(
                cold_ttft_s=first.cold.ttft_s,
                warm_ttft_s=first.warm.ttft_s,
                speedup=first.speedup,
                prompt_tokens=first.prompt_tokens,
                cached_tokens=first.warm.cached_tokens,
                tokens_equal=first.tokens_equal,
                store_bytes=self.store_bytes,
            )
        )


def measure(
    model: str,
    store: str,
    *,
    tokens: int,
    new_tokens: int,
    options: Sequence[str] = (),
    daemon: bool = True,
    progress: Progress,
) -> Report:
    """Run the phases.

    Args:
        model: a model directory or hub id.
        store: URL of the store that is filled and then read.
        tokens: the document has at least this many.
        new_tokens: tokens of each answer.
        options: further arguments of the engine process (``--dtype``, ``--device``).
        daemon: with the part that kills things.

    Raises:
        ConfigError: the document and an answer do not fit the model's context.
        EngineError: a phase failed; the message has the end of its log.
    """
    command = [sys.executable, "-m", "lmcache_adapters.hf.engine", "--model", model, *options]
    progress("Cold: starting an engine without a cache")
    with EngineHarness(command) as engine:
        prompts = _prompts(engine, tokens, new_tokens)
        cold = _ask(engine, prompts, new_tokens, "Cold", progress)
        engine.stop()
    progress("Filling: starting an engine with a store")
    with EngineHarness([*command, "--cache", store]) as engine:
        _ask(engine, prompts, new_tokens, "Filling", progress)
        progress("Filling: waiting until everything is in the store")
        if not engine.flush(ANSWER_TIMEOUT_S):
            raise ConfigError(f"{store} did not take the KV in time")
        engine.stop()
    progress("Warm: starting a new process on the same store")
    with EngineHarness([*command, "--cache", store]) as engine:
        warm = _ask(engine, prompts, new_tokens, "Warm", progress)
        stats = engine.stats() or {"tiers": []}
        engine.stop()
    rows = [
        Row(question, len(prompt), cold_answer, warm_answer)
        for question, prompt, cold_answer, warm_answer in zip(QUESTIONS, prompts, cold, warm, strict=True)
    ]
    store_bytes = sum(tier["used_bytes"] for tier in stats["tiers"])
    restarts: list[Restart] = []
    if daemon:
        try:
            restarts = _restarts(command, rows[0], prompts[0], new_tokens, store_bytes, progress)
        except DaemonMissing as error:
            progress(f"Daemon: this part is left out: {error}")
    return Report(rows, store_bytes, restarts)


def plot(report: Report, file: Path) -> None:
    """Bars of the time to first token, cold and warm, one pair a question.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'lmcache-sdk[plot]'") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for shift, label, values in (
        (-0.2, "without a cache", [row.cold.ttft_s for row in report.rows]),
        (0.2, "from the store, new process", [row.warm.ttft_s for row in report.rows]),
    ):
        bars = axes.bar([at + shift for at in range(len(values))], values, 0.4, label=label)
        axes.bar_label(bars, fmt="%.2f s")
    axes.set_xticks(range(len(report.rows)), [f"question {n}" for n in range(1, len(report.rows) + 1)])
    axes.set_ylabel("time to first token (s)")
    axes.set_title(f"{report.rows[0].prompt_tokens} tokens of prompt")
    axes.margins(y=0.2)  # room for the legend above the bars
    axes.legend()
    figure.savefig(file)


class DaemonMissing(Exception):
    """The daemon cannot run here; the message says why."""


class _Daemon:
    """``lmcache-sdk serve`` without a tier: what comes from it comes from its memory."""

    def __init__(self, socket: Path, pool_bytes: int) -> None:
        self.url = f"unix://{socket}"
        self._socket = socket
        self._log = socket.with_name("log")
        self._command = [sys.executable, "-c", "from lmcache_sdk.cli import main; main()"]
        self._command += ["serve", "--socket", str(socket), "--pool", str(pool_bytes)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers. Raises DaemonMissing."""
        from lmcache_sdk.daemon.serve import answers

        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + DAEMON_TIMEOUT_S
        while not answers(self._socket):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise DaemonMissing(self._log.read_text(errors="replace").strip() or "it does not answer")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextmanager
def _daemon(pool_bytes: int) -> Iterator[_Daemon]:
    """A daemon that runs; nothing of it is left afterwards."""
    from lmcache_sdk.daemon.serve import pool_directory
    from lmcache_sdk.pool.shared import SharedPool

    with tempfile.TemporaryDirectory(prefix="lmcache-sdk-") as folder:
        socket = Path(folder) / "s"
        daemon = _Daemon(socket, pool_bytes)
        try:
            daemon.start()
            yield daemon
        finally:
            daemon.kill()
            SharedPool.remove(pool_directory(socket))


def _restarts(
    command: Sequence[str], row: Row, prompt: list[int], new_tokens: int, store_bytes: int, progress: Progress
) -> list[Restart]:
    """Ask one question through a daemon, kill the engine, ask again; kill the daemon, ask again."""

    def ask(engine: EngineHarness, event: str) -> Restart:
        (answer,) = _ask(engine, [prompt], new_tokens, "Daemon", progress)
        return Restart(event, answer, answer.token_ids == row.cold.token_ids)

    progress("Daemon: starting it, and an engine that fills it")
    with _daemon(POOL_FACTOR * store_bytes or POOL_BYTES_UNKNOWN_STORE) as daemon:
        with EngineHarness([*command, "--cache", daemon.url]) as engine:
            ask(engine, "filling")
            engine.flush(ANSWER_TIMEOUT_S)
            progress("Daemon: killing the engine, and starting a new one")
            engine.kill()
        with EngineHarness([*command, "--cache", daemon.url]) as engine:
            restarts = [ask(engine, "engine killed, new engine")]
            progress("Daemon: killing the daemon, and starting a new one; the engine goes on")
            daemon.kill()
            daemon.start()
            deadline = time.monotonic() + DAEMON_TIMEOUT_S
            while not (engine.stats() or {"pool": {"total_bytes": 0}})["pool"]["total_bytes"]:
                if time.monotonic() > deadline:
                    raise DaemonMissing("the engine does not find it again")
                time.sleep(0.02)
            restarts.append(ask(engine, "daemon killed, new daemon"))
            engine.stop()
    return restarts


def _ask(
    engine: EngineHarness, prompts: Sequence[list[int]], new_tokens: int, phase: str, progress: Progress
) -> list[Answer]:
    engine.generate(list(range(1, WARM_UP_TOKENS + 1)), max_new_tokens=4, store=False, timeout_s=ANSWER_TIMEOUT_S)
    answers = []
    for number, prompt in enumerate(prompts, start=1):
        progress(f"{phase}: question {number} of {len(prompts)}, {len(prompt)} tokens")
        reply = engine.generate(prompt, max_new_tokens=new_tokens, timeout_s=ANSWER_TIMEOUT_S)
        answers.append(Answer(reply["ttft_s"], reply["cached_tokens"], reply["token_ids"], reply["text"]))
        progress(f"{phase}: first token after {reply['ttft_s']:.2f} s, {reply['cached_tokens']} tokens from the cache")
    return answers


def _prompts(engine: EngineHarness, tokens: int, new_tokens: int) -> list[list[int]]:
    """The questions' token ids: the same document before each, so that only the end differs."""
    document = _document(engine, tokens)
    prompts = []
    for question in QUESTIONS:
        content = f"{INSTRUCTION}\n\n{document}\n\nQuestion: {question}"
        prompt = engine.call("tokenize", 60, messages=[{"role": "user", "content": content}])["token_ids"]
        context = engine.hello["context_tokens"]
        if len(prompt) + new_tokens > context:
            raise ConfigError(
                f"a document of {tokens} tokens and {new_tokens} new ones do not fit the model's context of "
                f"{context}; lower --tokens"
            )
        prompts.append(prompt)
    return prompts


def _document(engine: EngineHarness, tokens: int) -> str:
    """The first paragraphs of the manual that have at least this many tokens together."""
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[chapter] for chapter in CHAPTERS if chapter in topics).split("\n\n")

    def text(count: int) -> str:
        return "\n\n".join(paragraphs[:count])

    def length(count: int) -> int:
        return len(engine.call("tokenize", 60, text=text(count))["token_ids"])

    low, high = 1, len(paragraphs)
    if tokens < 1 or length(high) < tokens:
        raise ConfigError(f"--tokens must be within 1 .. {length(high)}, got {tokens}")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if length(middle) >= tokens else (middle + 1, high)
    return text(low)
