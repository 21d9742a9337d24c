"""What apps are told of a bundle: `NAME.deploy.json`, and `NAME.gallery.json` for AI Edge Gallery.

The latter is an allow list of that app with one model (the fields of its `ModelAllowlist.kt`, in
November 2026). Both are made from the record that compress_model.py writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from liteguard.export.bundle import SAMPLER
from liteguard.records import BundleRecord

# Where `adb push` can write and an app can read (docs/phone.md).
_ON_A_PHONE = "/data/local/tmp"


def deployment(record: BundleRecord) -> dict[str, Any]:
    """What an app must know of a bundle.

    Lengths are tokens. `context_length` is prompts and answers together; a message is accepted
    while fewer than `conversation_tokens` are in a conversation. The sampler is the one that the
    proof was made with: greedy.
    """
    exported, first = record.export, next(iter(record.bundles.values()))
    proof = record.verify.model_dump() if record.verify else {}
    return {
        "bundles": {
            name: {"sha256": digest, "bytes": record.bytes[name]}
            for name, digest in record.files.items()
        },
        "base_model": record.base_model,
        "license": record.base_licence,
        "licence": record.base_licence,  # the older spelling, for one release
        "quantize": record.quantize["recipe"],
        "context_length": exported.kv_cache_length,
        "conversation_tokens": exported.conversation_tokens,
        "kv_cache_length": exported.kv_cache_length,
        "prefill_lengths": exported.prefill_lengths,
        "prompt": record.prompt.model_dump(),
        # The runtime puts the start token there.
        "prompt_example": record.prompt.render_question("QUESTION").removeprefix(
            record.prompt.bos_token
        ),
        "prompt_tokens": first["prompt_tokens"],
        "start_token": record.prompt.bos_token or None,
        "stop_tokens": first["stop_tokens"],
        "sampler": SAMPLER,
        "replaced_characters": record.tokenizer["replaced"],
        "runtime_cache_bytes": proof.get("runtime_cache_bytes"),
        "notes": _notes(record),
        "proof": proof.get("steps", []),
    }


def _notes(record: BundleRecord) -> dict[str, str]:
    """What an app's author would otherwise find out from users."""
    room = record.export.kv_cache_length
    notes = {
        "end_of_cache": (
            f"Everything said in a conversation shares {room} tokens. An answer that reaches the "
            "last one ends there, without an error, and answers after it are empty. A message that "
            "does not fit is an error, and so is every later one of that conversation. Ask the "
            "conversation for its count of tokens before each message, and begin a new one in time."
        ),
        "runtime_cache": (
            "At the first start the runtime writes the weights as the phone's processor reads them "
            "beside the bundle, or in the cache directory that the app names: a file of about "
            "runtime_cache_bytes. Count it as needed space."
        ),
    }
    if any(name.endswith(".task") for name in record.files):
        notes["system_message"] = (
            "In a .task a system message of the app is pasted before the question as it is, which "
            "was never trained; the prompt's own system text is there already. Send none, or use "
            "the .litertlm, whose template knows system messages."
        )
        notes["restored_history"] = (
            "A .task that is given an earlier conversation again (LiteRT-LM's initialMessages) "
            "leaves out the end token after each old answer, so that the model sees a text it was "
            "never trained on. Keep the conversation open instead, begin a new one, or use the "
            ".litertlm."
        )
    return notes


def gallery(
    record: BundleRecord, file: str | None = None, repository: str | None = None
) -> dict[str, Any]:
    """An allow list of AI Edge Gallery with the bundle, greedy as in its proof.

    Args:
        record: of the bundles.
        file: the bundle that is listed; default: the `.litertlm`, where there is one.
        repository: of a model hub, for the app to fetch it from; None: pushed to the phone.
    """
    names = sorted(record.files, key=lambda name: not name.endswith(".litertlm"))
    name = file or names[0]
    place = {} if repository else {"localModelFilePathOverride": f"{_ON_A_PHONE}/{name}"}
    return {
        "models": [
            {
                "name": Path(name).stem,
                "modelId": repository or "",
                "modelFile": name,
                "commitHash": "main",
                "description": (
                    f"{record.base_model}, trained with LiteGuard, {record.quantize['recipe']}. "
                    "Not medical advice."
                ),
                "sizeInBytes": record.bytes[name],
                "defaultConfig": {
                    "topK": SAMPLER["top_k"],
                    "topP": SAMPLER["top_p"],
                    "temperature": 0.0,
                    "maxTokens": record.export.kv_cache_length,
                    "accelerators": "cpu",  # what the proof ran on
                },
                "taskTypes": ["llm_chat", "llm_prompt_lab"],
                **place,
            }
        ]
    }
