"""The payload as it is."""

from __future__ import annotations

from typing import ClassVar


class RawCodec:
    """No encoding: records are read and written in place."""

    name: ClassVar[str] = "raw"
    lossless: ClassVar[bool] = True
    identity: ClassVar[bool] = True

    def max_encoded(self, nbytes: int) -> int:
        return nbytes

    def encode(self, payload: memoryview, out: memoryview) -> int:
        out[: len(payload)] = payload
        return len(payload)

    def decode(self, encoded: memoryview, out: memoryview) -> None:
        if len(encoded) != len(out):
            raise ValueError(f"raw payload has {len(encoded)} bytes, expected {len(out)}")
        out[:] = encoded
