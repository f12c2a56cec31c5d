"""SGLang's engine process with one more op: its storage backend is detached between requests, and attached again.

Two processes of one program differ by more than a backend costs, for as long as they run; see ``vllm_engine.py``.
"""

from __future__ import annotations

import sys

from lmcache_adapters.process import Answer
from lmcache_adapters.sglang import engine

_attached = True


async def storage(self: engine.Engine, attached: bool) -> Answer:
    """Op ``storage``: with the backend, or with SGLang's hierarchical cache alone."""
    global _attached  # noqa: PLW0603 - of this process, as its one engine is
    if attached != _attached:
        manager, server = self._engine.tokenizer_manager, self._server
        if attached:
            out = await manager.attach_hicache_storage("dynamic", server.hicache_storage_backend_extra_config)
        else:
            out = await manager.detach_hicache_storage()
        if not out.success:
            raise RuntimeError(out.message)
        _attached = attached
        self._expected.clear()  # what was asked meanwhile is not stored
    return {"attached": attached}


if __name__ == "__main__":
    engine._OPS.update(storage=storage)
    sys.exit(engine.main())
