"""A base model's own SentencePiece model, made fit for a `.task`: the same pieces, more of them.

Pieces, scores and how text is split stay as they are. Added are what the Hugging Face tokenizer has
beside them (a padding token, a chat's tokens), pieces for spare rows of the embedding, and the
deletion of the guard character. Tokens like `</s>` become text that matches, as in a prompt. No
blank is put before a text where the Hugging Face tokenizer puts none.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from liteguard import writing
from liteguard.errors import UserError, WorkError

# A Unicode noncharacter: never in text that anyone exchanges, so a piece that contains it matches
# nothing, and an answer that contains it shows that a placeholder was written.
PLACEHOLDER_MARK = "\ufdd0"
# Another noncharacter, which the model's character map deletes before tokenization. The runtime's
# own chat template strips whitespace at the start of a suffix ("\n" after the question); with this
# in front there is nothing to strip, and the ids are those of the text without it.
GUARD = "\ufdd1"


def read(path: Path, tokenizer_dir: Path) -> Any | None:
    """The SentencePiece model in a file, or None where it is not the tokenizer's own.

    Llama 3 calls another format `tokenizer.model`. Piece i must be token i of tokenizer.json, which
    may only have renamed what it lists as added (spare tokens).
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    try:
        model = proto.ModelProto.FromString(Path(path).read_bytes())
    except (OSError, DecodeError):
        return None
    added, tokens = _tokens(tokenizer_dir)
    pieces = [piece.piece for piece in model.pieces]
    same = all(index in added or tokens.get(index) == text for index, text in enumerate(pieces))
    return model if pieces and same else None


def write(model: Any, tokenizer_dir: Path, output: Path, rows: int) -> dict[str, Any]:
    """Write `model` (of `read`) with what is missing in it; returns a `TokenizerReport`'s fields.

    Raises UserError for a model with a character map of its own, WorkError when what was written
    cannot be opened or an added token is not one piece.
    """
    import sentencepiece

    added, tokens = _tokens(tokenizer_dir)
    kinds = type(model).SentencePiece
    if model.normalizer_spec.precompiled_charsmap:
        raise UserError(
            f"the base's tokenizer.model normalises text ({model.normalizer_spec.name}), which "
            "leaves no room for what a .task needs"
        )
    for index, piece in enumerate(model.pieces):
        if index in added and piece.type != kinds.UNKNOWN:
            piece.piece, piece.type = added[index], kinds.USER_DEFINED
    known, count = len(model.pieces), max(tokens) + 1
    for index in range(known, max(count, rows)):
        text = tokens.get(index)
        kind = kinds.UNUSED if text is None else kinds.USER_DEFINED
        mark = f"{PLACEHOLDER_MARK}{index}{PLACEHOLDER_MARK}"
        model.pieces.add(piece=text or mark, score=0.0, type=kind)
    spec = model.trainer_spec
    spec.vocab_size = len(model.pieces)
    spec.bos_id = spec.eos_id = spec.pad_id = -1
    model.normalizer_spec.precompiled_charsmap = charsmap({GUARD: ""})
    if not _begins_with_a_blank(tokenizer_dir):
        model.normalizer_spec.add_dummy_prefix = False
    output.parent.mkdir(parents=True, exist_ok=True)
    writing.write_bytes(output, model.SerializeToString())
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(output))
    except Exception as error:
        raise WorkError(f"{output} was written but cannot be opened: {error}") from error
    unknown = processor.unk_id()
    for index, text in added.items():
        # After other text: at its very beginning some models put a blank.
        if index != unknown and processor.encode(f"a{text}")[-1:] != [index]:
            raise WorkError(f"added token {text!r} (id {index}) is not one piece in {output}")
    return {
        "tokens": count,
        "rows": max(count, rows),
        "pieces": len(model.pieces),
        "incomplete": [index for index in range(known, count) if index not in tokens],
        "single_bytes": [],
        "duplicates": [],
        "split": [],
        "missing_bytes": [],
        "replaced": {},
        "native": True,
    }


def _tokens(tokenizer_dir: Path) -> tuple[dict[int, str], dict[int, str]]:
    """(added tokens, all tokens) of a tokenizer.json, by id."""
    path = Path(tokenizer_dir) / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    added = {token["id"]: token["content"] for token in data.get("added_tokens", [])}
    vocabulary = data["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # of a Unigram model: [piece, score]
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return added, {index: token for token, index in vocabulary.items()} | added


def _begins_with_a_blank(tokenizer_dir: Path) -> bool:
    """Whether a tokenizer.json puts a blank before texts, as `add_dummy_prefix` does."""
    path = Path(tokenizer_dir) / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    steps = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    return any(f'"{word}"' in steps for word in ("Prepend", "first", "always"))


def charsmap(replacements: dict[str, str]) -> bytes:
    """SentencePiece's compiled form of a character map.

    Only the trainer can compile one, so it is asked to train a model of a few characters, from
    which nothing but the map is kept.
    """
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "rules.tsv"
        rules.write_text(
            "".join(
                f"{ord(char):X}\t{' '.join(f'{ord(c):X}' for c in plain)}\n"
                for char, plain in replacements.items()
            )
        )
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f"] * 4),
            model_prefix=str(Path(folder) / "map"),
            vocab_size=10,
            hard_vocab_limit=False,
            model_type="char",
            normalization_rule_tsv=str(rules),
            minloglevel=2,
        )
        from sentencepiece import sentencepiece_model_pb2 as proto

        model = proto.ModelProto.FromString((Path(folder) / "map.model").read_bytes())
        return model.normalizer_spec.precompiled_charsmap
