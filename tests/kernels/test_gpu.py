"""The public suite on a GPU, where there is one: by staging buffer, by copy engine, and as measured."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lmcache_kernels_cuda.kernels import CUDAKernels
from lmcache_kernels_cuda.routes import Routes
from lmcache_sdk.kernels import Bytes, Kernels, host_buffer, kernels_for
from lmcache_sdk.layout import KVLayout, Plane
from lmcache_sdk.testing.kernels import KernelTests, Placed
from tests.kernels.conftest import HAS_GPU

if not HAS_GPU:
    pytest.skip("torch finds no GPU here", allow_module_level=True)

ROUTES = {"staged": Routes(1 << 62, 1 << 62), "direct": Routes(0, 0), "measured": None}


@pytest.fixture(scope="module", params=ROUTES)
def gpu_kernels(request: pytest.FixtureRequest) -> CUDAKernels:
    return CUDAKernels(routes=ROUTES[request.param])


class TestGPU(KernelTests):
    device = "cuda:0"

    @pytest.fixture
    def kernels(self, gpu_kernels: CUDAKernels) -> Kernels:
        return gpu_kernels

    def place(self, data: Bytes) -> Placed:
        owner = torch.from_numpy(data.copy()).to(self.device)
        torch.cuda.synchronize()  # the copies' own streams do not wait for torch's
        return Placed(owner.data_ptr(), owner)

    def fetch(self, placed: Placed) -> Bytes:
        whole: Bytes = placed.owner.cpu().numpy()
        return whole


def test_a_store_waits_for_torchs_stream_and_torchs_stream_for_the_store() -> None:
    """The engine's own events and streams are understood."""
    kernels = kernels_for("cuda:0")
    assert isinstance(kernels, CUDAKernels)
    memory = torch.zeros((64, 16, 8, 128), dtype=torch.bfloat16, device="cuda:0")
    torch.cuda.synchronize()
    plane = Plane.of(memory, ("page", "token", "head", "dim"), group="g", layer=0, role="latent")
    layout = KVLayout((plane,), "cuda:0")
    chunk = host_buffer(memory.nbytes)
    assert kernels.pin(chunk)
    queue, plan = kernels.stream("cuda:0"), kernels.plan(layout, np.arange(64 * 16))
    forward, slow = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda:0")
    for value in range(1, 6):
        with torch.cuda.stream(forward):
            for _ in range(20):
                slow = (slow @ slow).tanh()
            memory.fill_(value)
            written = torch.cuda.Event()
            written.record()
        queue.wait(written)
        queue.gather((plane,), (0, 8), plan, chunk)
        stored = queue.record()
        stored.hold(forward)
        with torch.cuda.stream(forward):
            memory.fill_(-1)
        stored.wait()
        assert (chunk.view(np.uint16) == torch.tensor(float(value)).bfloat16().view(torch.int16).item()).all()
    kernels.unpin(chunk)


def test_a_graph_that_another_thread_captures_is_not_spoiled() -> None:
    """Not even by a registration, which torch's default mode of capture forbids to all threads."""
    kernels = kernels_for("cuda:0")
    assert isinstance(kernels, CUDAKernels)
    memory = torch.zeros((64, 16, 8, 128), dtype=torch.bfloat16, device="cuda:0")
    plane = Plane.of(memory, ("page", "token", "head", "dim"), group="g", layer=0, role="latent")
    queue, plan = kernels.stream("cuda:0"), kernels.plan(KVLayout((plane,), "cuda:0"), np.arange(64 * 16))

    def copy() -> None:
        chunk = host_buffer(memory.nbytes)
        assert kernels.pin(chunk)
        queue.gather((plane,), (0, 8), plan, chunk)
        queue.record().wait()
        kernels.unpin(chunk)

    graph, count = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda:0")
    with ThreadPoolExecutor(1) as thread:
        thread.submit(copy).result()
        with torch.cuda.graph(graph):
            count += 1
            thread.submit(copy).result()
    graph.replay()
    assert count.item() == 1
