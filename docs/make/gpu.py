"""Record the machine code of the GPU's kernels in docs/performance/gpu_code.json.

    python docs/make/gpu.py

No GPU is needed: Triton compiles the kernels for two kinds of GPU (see tests/gpu_code.py).
tests/nn/test_triton_code.py compares the code with this record, so run the command after each
change of a kernel. It takes a minute.
"""

import json
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

import gpu_code  # noqa: E402  # of the tests
import triton  # noqa: E402  # needs the line above, as the tests do

RECORD = PROJECT / "docs/performance/gpu_code.json"


def record() -> dict[str, Any]:
    """Return instructions, registers and loads and stores of each kernel for each kind of GPU."""
    code = {}
    for name, launch in gpu_code.recorded_launches().items():
        for capability in gpu_code.CAPABILITIES:
            found = gpu_code.compiled(launch, capability)
            kept = ("instructions", "registers", "memory")
            code[f"{name} sm_{capability}"] = {key: getattr(found, key) for key in kept}
    return {"triton": triton.__version__, "code": code}


def main() -> None:
    text = json.dumps(record(), indent=1) + "\n"
    is_same = RECORD.is_file() and text == RECORD.read_text()
    RECORD.write_text(text)
    print(f"{RECORD.relative_to(PROJECT)}: {'unchanged' if is_same else 'changed'}")


if __name__ == "__main__":
    main()
