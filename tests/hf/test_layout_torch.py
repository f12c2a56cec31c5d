"""Torch tensors are described through their own pointers and strides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmcache_sdk.errors import LayoutError
from lmcache_sdk.kernels import kernels_for
from lmcache_sdk.layout import KVLayout, Plane, Strides

NHD = ("page", "token", "head", "dim")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "float16"),
        (torch.float32, "float32"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
        (torch.float8_e5m2, "float8_e5m2"),
        (torch.uint8, "uint8"),
    ],
)
def test_a_tensor_is_described(dtype, name):
    tensor = torch.zeros(2, 5, 4, 16, 8, dtype=dtype)
    plane = Plane.of(tensor[1], ("page", "head", "token", "dim"), group="full", layer=3, role="v")
    size = tensor.element_size()
    assert (plane.dtype, plane.base, plane.shape) == (name, tensor[1].data_ptr(), (5, 16, 4, 8))
    assert plane.strides == Strides(512 * size, 8 * size, 128 * size, size)


def test_an_unserved_dtype_is_refused():
    with pytest.raises(LayoutError, match="float64"):
        Plane.of(torch.zeros(2, 16, 4, 8, dtype=torch.float64), NHD, group="full", layer=0, role="k")


def test_bytes_reach_a_tensor_and_come_back():
    torch.manual_seed(0)
    cache = torch.randn(2, 2, 6, 16, 4, 8).to(torch.bfloat16)
    layout = KVLayout(
        tuple(Plane.of(cache[n, r], NHD, group="full", layer=n, role="kv"[r]) for n in (0, 1) for r in (0, 1))
    )
    kernels, planes = kernels_for("cpu"), layout.planes_of("full", [0, 1])
    slots = torch.randperm(96)[:40]
    plan = kernels.plan(layout, slots.numpy())
    chunk = np.zeros(4 * 40 * 4 * 8 * 2, np.uint8)
    kernels.gather(planes, (0, 4), plan, chunk)
    expected = cache.reshape(4, 96, 4, 8)[:, slots]
    assert torch.equal(torch.from_numpy(chunk).view(torch.bfloat16).reshape(expected.shape), expected)
    other = torch.randn_like(expected)
    kernels.scatter(planes, (0, 4), plan, other.reshape(-1).view(torch.uint8).numpy())
    assert torch.equal(cache.reshape(4, 96, 4, 8)[:, slots], other)
