"""Python runs this at its start, when this folder is on PYTHONPATH."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))  # noqa: PTH120 - every process starts with this

import stand_ins

stand_ins.install("torchvision", "torchaudio", "timm")
