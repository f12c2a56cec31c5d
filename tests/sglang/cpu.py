"""SGLang on a CPU, for this process: to be imported before SGLang is. Reasons are in ``tests/engines/sglang_cpu``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

STAND_INS = Path(__file__).resolve().parents[1] / "engines" / "sglang_cpu"

# Before torch and SGLang are loaded: idle OpenMP threads must not spin, and nothing here needs the network or a GPU.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
sys.path.insert(0, str(STAND_INS))
importlib.import_module("stand_ins").install("torchvision", "torchaudio", "timm")
importlib.import_module("cpu_copies").install()
