"""lmcache-sdk's kernels for Ascend NPUs: torch operations that torch_npu serves, and CANN's transfers.

Written from CANN's documentation and tried on a pretend device; nothing of it has run on an NPU yet.
"""

from lmcache_kernels_ascend.kernels import AscendKernels

__all__ = ["AscendKernels"]
