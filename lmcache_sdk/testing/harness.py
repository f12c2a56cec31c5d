"""An inference engine as a child process, behind one small protocol, so that one set of tests drives every engine.

The protocol is JSON, one object a line; requests on the engine's stdin, answers on its stdout, logs on its stderr.

The engine speaks first, once, when it can take requests::

    {"event": "ready", "engine": "hf", "namespace": "…", "producer": "…", "chunk_tokens": 64, "context_tokens": 8192}

with, if it likes, ``block_tokens``, of its paged memory, and ``identity``, its ``Namespace`` and ``Producer`` in full;
or ``{"error": "…"}``, and ends. Then each request has an ``id``, which its answer repeats, and an ``op``:

``generate``
    request: ``ids`` (token ids), ``max_new_tokens``; optional ``temperature``, ``top_p``, ``top_k``, ``seed``,
    ``cache_salt``, ``load`` and ``store`` (default true), ``logits`` (default false).
    answer: ``token_ids``, ``text``, ``prompt_tokens``, ``cached_tokens``, ``ttft_s``, ``finish_reason``; with
    ``logits`` also ``top``, 20 pairs of token id and log probability after the prompt, and, from an engine that has
    them, ``logits_sha256`` of the float32 logits there, and ``margins``: how far the most likely token was ahead of the
    second, by log probability, for each token of the reply.
``tokenize``
    request: ``text`` or ``messages``. answer: ``token_ids``.
``flush``
    request: ``timeout_s``. answer: ``flushed``, whether all KV has reached the store.
``stats``
    answer: ``stats``, the cache's (``lmcache_sdk.api.Stats``), or null without a cache; and ``preemptions``, of an
    engine that preempts requests, since its start.
``forget``
    of an engine with a prefix cache of its own: empty that. answer: ``forgotten``.
``abort``
    of an engine that runs several requests at once. request: ``target``, the id of a ``generate``, which is then
    answered with an error. answer: ``aborted``, whether it still ran.
``stop``
    answer: ``stopped``, true; the process then ends with status 0.

A request that fails is answered by ``{"id": …, "error": "…"}``, and the engine goes on. The end of stdin is a
``stop``. An engine that cannot do a part of this (logits, say) answers with an error, and its tests leave
that part out.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Self

from lmcache_sdk.errors import LMCacheSDKError

_STDERR_TAIL_BYTES = 4000


class EngineError(LMCacheSDKError):
    """The engine answered with an error, died, or was late; the message ends with what it last wrote to stderr."""


class EngineHarness:
    """One engine process. As a context manager it starts the process, and ends it in any case.

    Args:
        command: program and arguments.
        env: the whole environment of the process; None = this one's.
        start_timeout_s: engines import for seconds, and load a model.

    Attributes:
        hello: the engine's first line.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, start_timeout_s: float = 180.0
    ) -> None:
        self.command = list(command)
        self.hello: dict[str, Any] = {}
        self._env = env
        self._start_timeout_s = start_timeout_s
        self._numbers = itertools.count(1)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._early: dict[int, dict[str, Any]] = {}
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._stderr: IO[bytes] | None = None

    def start(self) -> None:
        """Start the process and wait until it is ready.

        Raises:
            EngineError: it refused, died, or is late. It does not run any more then.
        """
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by kill()
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=self._env,
            text=True,
            start_new_session=True,  # an engine may have processes of its own, which end with it
        )
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        try:
            self.hello = self._next(time.monotonic() + self._start_timeout_s)
            if self.hello.get("event") != "ready":
                raise self._error(f"did not start: {self.hello.get('error', self.hello)}")
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Of the engine process."""
        return self._running().pid

    def generate(
        self, ids: Sequence[int], max_new_tokens: int = 1, *, timeout_s: float = 60.0, **fields: Any
    ) -> dict[str, Any]:
        """Generate for token ids; the answer's fields as listed above."""
        return self.call("generate", timeout_s, ids=list(ids), max_new_tokens=max_new_tokens, **fields)

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until all KV has reached the store."""
        return bool(self.call("flush", timeout_s + 5, timeout_s=timeout_s)["flushed"])

    def stats(self) -> dict[str, Any] | None:
        """The cache's statistics."""
        stats: dict[str, Any] | None = self.call("stats", 30)["stats"]
        return stats

    def stop(self, timeout_s: float = 60.0) -> int:
        """Let the process end by itself; the answer is its exit status.

        Raises:
            EngineError: it is late; it has been killed then.
        """
        try:
            self.call("stop", timeout_s)
            return self._running().wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self._error(f"did not end within {timeout_s} s") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process and its children at once, as a crash would (SIGKILL), and free what it held. Idempotent."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._reader is not None:
            self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process = None

    def call(self, op: str, timeout_s: float, /, **fields: Any) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            EngineError: the answer is an error, or there is none in time.
        """
        return self.receive(self.send(op, **fields), timeout_s)

    def send(self, op: str, /, **fields: Any) -> int:
        """Send a request without waiting; the answer is its number, for :meth:`receive`."""
        number = next(self._numbers)
        stdin = self._running().stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps({"id": number, "op": op, **fields}) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._error("is gone") from None
        return number

    def receive(self, number: int, timeout_s: float) -> dict[str, Any]:
        """The answer to a request that was sent; answers may come in any order."""
        deadline = time.monotonic() + timeout_s
        while number not in self._early:
            answer = self._next(deadline)
            self._early[answer["id"]] = answer
        answer = self._early.pop(number)
        if "error" in answer:
            raise self._error(f"answered: {answer['error']}")
        return answer

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise EngineError(f"{self.command} does not run")
        return self._process

    def _read(self, stdout: IO[str]) -> None:
        for line in stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _next(self, deadline: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise self._error("is late with its answer") from None
        if line is None:
            self._lines.put(None)  # stays true for whoever asks next
            raise self._error(f"is gone, with status {self._running().wait()}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise self._error(f"wrote something else than JSON to stdout: {line!r}") from None
        return answer

    def _error(self, what: str) -> EngineError:
        tail = b""
        if self._stderr is not None and not self._stderr.closed:
            end = self._stderr.seek(0, 2)
            self._stderr.seek(max(0, end - _STDERR_TAIL_BYTES))
            tail = self._stderr.read()
        return EngineError(f"the engine {what}\n{tail.decode(errors='replace')}".rstrip())
