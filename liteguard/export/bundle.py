"""TFLite + tokenizer + prompt -> `.task`, or LiteRT-LM's own `.litertlm`.

Both hold the same TFLite model, but that of a `.task` never writes what a `.task` cannot show
(silence.py). A `.task` is a zip file with a SentencePiece model and prefixes and suffixes; a
`.litertlm` has the original tokenizer.json and a chat template in Jinja.

What LiteRT-LM (0.18.1) does with a `.task`'s metadata, found by experiment:

- `start_token` is put before the first prefill, with and without templates: the prompt's BOS, which
  therefore stands in no prefix and in no template. Without one the field is left out. An empty
  string is not the same: it aborts the process.
- `system_prompt` is ignored. The system block is therefore part of the user prefix, so that the
  answer to every question is conditioned as in training. A second question in the same
  conversation repeats it.
- prefixes and suffixes of the user and the model are joined, and the model's prefix ends the
  prompt. They are pasted into a Jinja template whose tags strip the whitespace that follows, so
  that "\\n" after a question gets lost: a character that the tokenizer deletes guards it.
- what follows the model's end token (`turn_separator`) is lost between turns, however it is
  written: from the second question on, a conversation differs from `Prompt.render_conversation`
  by that text. In a `.litertlm` it does not.
"""

from __future__ import annotations

import re
import tempfile
import uuid
from pathlib import Path
from typing import Any
from unittest import mock

from liteguard import checkpoints, writing
from liteguard.errors import UserError, WorkError
from liteguard.export import task_format
from liteguard.export.silence import Silence
from liteguard.export.tokenizer import GUARD
from liteguard.prompts import Prompt
from liteguard.runtime.container import TASK_MODEL

# What the proof is made with: the likeliest token, always.
SAMPLER: dict[str, Any] = {"top_k": 1, "top_p": 1.0, "temperature": 1.0}


def _guarded(text: str) -> str:
    """`text` with its whitespace safe from the runtime's template, which strips what a part begins
    with, and the last line break of two."""
    text = re.sub(r"\n(?=\n)", f"\n{GUARD}", text)
    return GUARD + text if text[:1].isspace() else text


def task_metadata(prompt: Prompt) -> bytes:
    """The METADATA member of a `.task`."""
    return task_format.metadata(
        prompt.stop_tokens,
        user=(_guarded(prompt.system_block + prompt.user_prefix), _guarded(prompt.user_suffix)),
        model=(_guarded(prompt.model_prefix), prompt.end_token + prompt.turn_separator),
        start_token=prompt.bos_token,
    )


def write_task(
    tflite: Path,
    sentencepiece: Path,
    prompt: Prompt,
    output: Path,
    silence: Silence | None = None,
) -> dict[str, Any]:
    """Write a `.task` whose own template renders exactly what `prompt` renders.

    Args:
        tflite: the converted model.
        sentencepiece: the tokenizer model (`tokenizer.build_sentencepiece`).
        prompt: stop tokens, prefixes and suffixes.
        output: the file to write, with the ending `.task`.
        silence: the tokens that the model in the bundle must never write; None for a model that
            may write all. `tflite` is not changed.

    Returns:
        ``bytes`` (of the bundle), ``stop_tokens`` (token -> id), ``prompt_tokens`` (tokens that
        the prompt adds to a question).

    Raises:
        UserError: a file is missing, or a stop token is not one piece (the bundler does not look).
        WorkError: the bundle could not be written, or its tokens not silenced.
    """
    import sentencepiece as spm

    tflite, sentencepiece, output = Path(tflite), Path(sentencepiece), Path(output)
    for path in (tflite, sentencepiece):
        if not path.is_file():
            raise UserError(f"no file {path}")
    if output.suffix != ".task":
        raise UserError(f"the bundle must be called *.task, not {output.name}")
    tokenizer = spm.SentencePieceProcessor(model_file=str(sentencepiece))
    stops = {}
    for token in prompt.stop_tokens:
        ids = tokenizer.encode(token)
        if len(ids) != 1 or tokenizer.id_to_piece(ids[0]) != token:
            raise UserError(
                f"stop token {token!r} is {len(ids)} pieces in {sentencepiece}: the device would "
                "never stop at it"
            )
        stops[token] = ids[0]

    if tokenizer.encode(GUARD + "\n") != tokenizer.encode("\n"):
        raise UserError(f"{sentencepiece} was not made by build_sentencepiece: no guard character")

    output.parent.mkdir(parents=True, exist_ok=True)
    members = {
        TASK_MODEL: silence.copy_of(tflite) if silence else tflite.read_bytes(),
        "TOKENIZER_MODEL": sentencepiece.read_bytes(),
        "METADATA": task_metadata(prompt),
    }
    try:
        with writing.replacing(output) as partial:
            task_format.write(partial, members)
    except OSError as error:
        raise WorkError(f"{output} could not be written: {error}") from error
    return {
        "bytes": output.stat().st_size,
        "stop_tokens": stops,
        "prompt_tokens": len(tokenizer.encode(prompt.render_question(""))),
    }


def _about(*parts: Path) -> list[Any]:
    """What a `.litertlm` says of itself: the same for equal `parts`, another uuid for others."""
    from litert_lm_builder import litertlm_builder

    digests = "".join(map(checkpoints.sha256_file, parts))
    facts = {
        "Authors": "LiteGuard",
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, digests)),
        "creation_timestamp": "1980-01-01T00:00:00+00:00",
    }
    text = litertlm_builder.DType.STRING
    return [litertlm_builder.Metadata(key=k, value=v, dtype=text) for k, v in facts.items()]


def write_litertlm(
    tflite: Path, tokenizer_dir: Path, prompt: Prompt, output: Path, kv_cache_length: int
) -> dict[str, Any]:
    """Write a `.litertlm` with the original tokenizer and the prompt's chat template.

    Args:
        tflite: the converted model.
        tokenizer_dir: directory with tokenizer.json.
        prompt: stop tokens and chat template.
        output: the file to write, with the ending `.litertlm`.
        kv_cache_length: tokens of prompt and answer together, as the model was exported.

    Returns:
        ``bytes`` (of the bundle), ``stop_tokens`` (token -> id), ``prompt_tokens`` (tokens that
        the prompt adds to a question).

    Raises:
        UserError: a file is missing, or a stop token is not one token.
        WorkError: the bundle could not be written.
    """
    import tokenizers
    from litert_lm_builder import litertlm_builder
    from litert_lm_builder.runtime.proto import llm_metadata_pb2, sampler_params_pb2

    tflite, output = Path(tflite), Path(output)
    tokenizer_file = Path(tokenizer_dir) / "tokenizer.json"
    for path in (tflite, tokenizer_file):
        if not path.is_file():
            raise UserError(f"no file {path}")
    if output.suffix != ".litertlm":
        raise UserError(f"the bundle must be called *.litertlm, not {output.name}")
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    metadata = llm_metadata_pb2.LlmMetadata()
    stops = {}
    for token in prompt.stop_tokens:
        stops[token] = tokenizer.token_to_id(token)
        if stops[token] is None:
            raise UserError(f"stop token {token!r} is not in {tokenizer_file}")
        metadata.stop_tokens.add().token_ids.ids.append(stops[token])
    pad = tokenizer.token_to_id(prompt.pad_token)
    if pad is not None:
        metadata.pad_token.token_ids.ids.append(pad)
    if prompt.bos_token:
        start = tokenizer.token_to_id(prompt.bos_token)
        if start is None:
            raise UserError(f"bos_token {prompt.bos_token!r} is not in {tokenizer_file}")
        metadata.start_token.token_ids.ids.append(start)
    template = prompt.model_copy(update={"bos_token": ""})
    metadata.jinja_prompt_template = template.chat_template()
    metadata.max_num_tokens = kv_cache_length
    # Greedy, as the proof. LiteRT-LM 0.18.1 fails at the first message with the type GREEDY.
    metadata.sampler_params.type = sampler_params_pb2.SamplerParameters.TOP_P
    metadata.sampler_params.k = SAMPLER["top_k"]
    metadata.sampler_params.p = SAMPLER["top_p"]
    metadata.sampler_params.temperature = SAMPLER["temperature"]
    metadata.llm_model_type.generic_model.SetInParent()

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        description = Path(folder) / "metadata.pb"
        description.write_bytes(metadata.SerializeToString())
        builder = litertlm_builder.LitertLmFileBuilder()
        about = _about(description, tokenizer_file, tflite)
        builder.add_llm_metadata(str(description))
        builder.add_hf_tokenizer(str(tokenizer_file))
        builder.add_tflite_model(str(tflite), litertlm_builder.TfLiteModelType.PREFILL_DECODE)
        try:
            # The builder would write a random number and the time of day.
            same = mock.patch.object(litertlm_builder, "populate_system_metadata", lambda _: about)
            with same, writing.replacing(output) as partial, partial.open("xb") as stream:
                builder.build(stream)
        except OSError as error:
            raise WorkError(f"{output} could not be written: {error}") from error
    question = tokenizer.encode(prompt.render_question(""), add_special_tokens=False)
    return {
        "bytes": output.stat().st_size,
        "stop_tokens": stops,
        "prompt_tokens": len(question.ids),
    }
