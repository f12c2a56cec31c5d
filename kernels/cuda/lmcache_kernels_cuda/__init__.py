"""lmcache-sdk's kernels for NVIDIA and AMD devices, from one source and without a build step.

Large runs of bytes go by the copy engines, straight between engine memory and the host (``driver.py``). Small ones are
collected by a Triton kernel in a staging buffer on the device (``blocks.py``), which crosses the bus in one transfer.
Which is faster for which size is measured on each device when it is first used (``routes.py``).
"""

from lmcache_kernels_cuda.kernels import CUDAKernels

__all__ = ["CUDAKernels"]
