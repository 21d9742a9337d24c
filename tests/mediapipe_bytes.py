"""What MediaPipe's bundler writes, as JSON: run where mediapipe 0.10.35 is installed.

    python tests/mediapipe_bytes.py > tests/fixtures/mediapipe_bytes.json

Not a requirement of this project: it brings OpenCV (245 MB), and later versions have no bundler.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import zipfile
from pathlib import Path

# A name that no prompt holds: the field is required, and taken out again.
START = "<|never|>"
PIECES = ["<unk>", "a"]
# Lengths that are no multiples of the alignment.
MEMBERS = {"TF_LITE_PREFILL_DECODE": b"model", "TOKENIZER_MODEL": b"pieces", "METADATA": b"text"}
CASES = [
    {"stop_tokens": ["<|endoftext|>"], "user": ["\nInstruct: ", "\ufdd1\n"]}
    | {"model": ["Output:\n", "<|endoftext|>\n"]},
    {"stop_tokens": ["<|im_end|>", "<|endoftext|>"], "user": ["<|u|>", "<|e|>\n"]}
    | {"model": ["<|m|>", "<|im_end|>"]},
    # Lengths of two bytes; letters of two.
    {"stop_tokens": ["</s>"], "user": ["x" * 300, "y"], "model": ["é" * 90, "</s>"]},
    {"stop_tokens": ["</s>"], "user": ["Q: ", " "], "model": ["", ""]},
    {"stop_tokens": ["</s>"], "user": ["", ""], "model": ["", "</s>"]},
]


def metadata(tokenizer: Path, case: dict) -> bytes:
    """The METADATA of MediaPipe's bundle, less its start token."""
    from mediapipe.tasks.python.genai.bundler import llm_bundler

    model, bundle = tokenizer.with_name("model"), tokenizer.with_name("x.task")
    model.write_bytes(b"none")
    llm_bundler.create_bundle(
        llm_bundler.BundleConfig(
            tflite_model=str(model),
            tokenizer_model=str(tokenizer),
            start_token=START,
            stop_tokens=case["stop_tokens"],
            output_filename=str(bundle),
            prompt_prefix_user=case["user"][0],
            prompt_suffix_user=case["user"][1],
            prompt_prefix_model=case["model"][0],
            prompt_suffix_model=case["model"][1],
        )
    )
    with zipfile.ZipFile(bundle) as archive:
        found = archive.read("METADATA")
    start = bytes([6 << 3 | 2, len(START)]) + START.encode()
    assert found.count(start) == 1
    return found.replace(start, b"")


def zipped(folder: Path) -> bytes:
    """MediaPipe's zip file around MEMBERS, as if written when zip files begin."""
    from mediapipe.tasks.python.metadata.metadata_writers import model_asset_bundle_utils

    zipfile.time.localtime = lambda _: time.struct_time((1980, 1, 1, 0, 0, 0, 1, 1, 0))
    model_asset_bundle_utils.create_model_asset_bundle(MEMBERS, str(folder / "zip"))
    return (folder / "zip").read_bytes()


def main() -> None:
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    for number, piece in enumerate(PIECES):
        model.pieces.add(piece=piece, type=2 if number == 0 else 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer").write_bytes(model.SerializeToString())
        cases = [{**c, "metadata": metadata(folder / "tokenizer", c).hex()} for c in CASES]
        found = {"cases": cases, "zip": zipped(folder).hex()}
    json.dump(found, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
