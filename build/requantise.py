"""Called with .venv's Python: requantise.py SOURCE TARGET makes the default model's Q8_0 file.

SmolLM2's package has Q4_1, for which llama.cpp has no fast matrix kernels on a CPU.  Q8_0 loses
next to nothing of it and computes prompts and batches faster (figures:
tests/bench/results/default-model.md).
"""

import os
import sys

import llama_cpp.llama_cpp as llama


def main(source: str, target: str) -> int:
    llama.llama_backend_init()
    params = llama.llama_model_quantize_default_params()
    params.ftype = llama.LLAMA_FTYPE_MOSTLY_Q8_0
    params.allow_requantize = True
    return llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
