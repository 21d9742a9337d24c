"""llama.cpp beside a bundle: the same merged model as GGUF, in a process of its own.

For benchmarks/bench_bundle.py and bench_recipes.py. It takes a Python that has llama-cpp-python,
which is no dependency of LiteGuard; nothing is imported here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from liteguard.errors import UserError

# Run by that Python: answers each JSON line it reads with one.
WORKER = """
import json, sys, time
import numpy as np
from llama_cpp import Llama
path, threads, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = Llama(path, n_ctx=1280, n_threads=threads, n_threads_batch=threads, verbose=False,
              logits_all=tokens == 0)

def ids(text):
    return model.tokenize(text.encode(), add_bos=False, special=True)

def speed(prompt):
    given = ids(prompt)
    model.reset()
    begin = time.perf_counter()
    model.eval(given)
    token = model.sample(top_k=1, temp=0.0)
    first = time.perf_counter()
    for _ in range(tokens):
        model.eval([token])
        token = model.sample(top_k=1, temp=0.0)
    decoded = time.perf_counter()
    return {"prefill_tokens": len(given), "first_token_s": first - begin,
        "prefill_tok_s": len(given) / (first - begin), "decode_tok_s": tokens / (decoded - first)}

def score(context, target):
    model.reset()
    model.eval(context + target)
    rows = model.scores[len(context) - 1 : len(context) + len(target) - 1].astype(np.float64)
    rows -= rows.max(1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    return float(rows[range(len(target)), target].sum())

for line in sys.stdin:
    asked = json.loads(line)
    if "prompt" in asked:
        given = speed(asked["prompt"])
    elif "text" in asked:
        given = ids(asked["text"])
    else:
        given = score(asked["context"], asked["target"])
    print(json.dumps(given), flush=True)
"""
QUANTIZE = """
import sys, llama_cpp
given = llama_cpp.llama_model_quantize_default_params()
given.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
assert not llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), given)
"""


class Llama:
    """A llama.cpp process: `tokens` to decode a prompt, 0 to score texts and not to decode."""

    def __init__(self, python: str, model: Path, threads: int, tokens: int):
        self.process = subprocess.Popen(
            [python, "-c", WORKER, str(model), str(threads), str(tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def _ask(self, asked: dict[str, Any]) -> Any:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise UserError("llama.cpp ended: does the Python have llama-cpp-python?")
        return json.loads(line)

    def benchmark(self, prompt: str) -> dict[str, float]:
        """Speeds of one prompt."""
        return self._ask({"prompt": prompt})

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, special tokens read as such."""
        return self._ask({"text": text})

    def score(self, context: list[int], target: list[int]) -> float:
        """Natural-log likelihood of the target's ids after the context's."""
        return self._ask({"context": context, "target": target})

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def quantize(python: str, source: Path, output: Path, kind: str) -> None:
    """Write a GGUF of 16 bits in llama.cpp's own format `kind`, e.g. Q4_K_M."""
    subprocess.run(
        [python, "-c", QUANTIZE, str(source), str(output), kind],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
