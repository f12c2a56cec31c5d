"""What the compiler makes of the copy kernel, for devices that are not there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_for.py")
LOAD, STORE = r"LDG|load", r"STG|store"
WIDE = {"sm": r"\.128$", "gfx": r"x4$|b128$"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx90a", "gfx942"])
def test_accesses_are_as_wide_as_memory_allows_and_nothing_spills(target: str, tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "0"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), target], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert len(compiled) == 12
    wide = WIDE[re.match("[a-z]+", target)[0]]
    for name, code in compiled.items():
        assert code["spills"] == 0, name
        accesses = code["accesses"]
        stores = [access for access in accesses if re.search(STORE, access)]
        loads = [access for access in accesses if re.search(LOAD, access)]
        assert stores and loads, name
        # The tables of addresses are read in words of 8; engine memory and staging buffer are the rest.
        if "aligned to" not in name:
            assert all(re.search(wide, access) for access in stores), (name, accesses)
            read = sum(accesses[access] for access in loads if re.search(wide, access))
            assert read == sum(accesses[access] for access in stores), (name, accesses)
        else:
            assert not any(re.search(wide, access) for access in accesses), (name, accesses)
