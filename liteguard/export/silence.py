"""What a `.task` cannot write as text must never be chosen by its model; a `.litertlm` writes all.

A `.task` shows tokens through SentencePiece, which has no text for those that are a part of a
character's UTF-8 (GPT-2's vocabulary spells a word-initial gamma, a division sign and a quarter
with two of them). So its TFLite gets other numbers in the output layer, and nothing else: the file
is mapped copy-on-write, the numbers are changed in memory, and the bundle is written from there.
There is no second export, no second file on disk, and the `.litertlm` gets the file as it is.

An output layer with a bias gets a very negative one for these tokens. Without a bias their rows
are made a hundred times smaller (those of single bytes ten times), so that their logits stay near
zero, below the winner's. In 8 bits that is each row's scale. With tied weights it changes the
tokens' input embeddings too, which hardly matters: no prompt holds the former, and the first layer
normalises what it reads. (Rows turned against the mean hidden state look stronger and are not:
SmolLM2's states change sign after some words, and all silenced tokens win at once.) The second way
is for greedy decoding: a sampler can still draw such a token.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard.errors import WorkError
from liteguard.export.tokenizer import GUARD, PLACEHOLDER_MARK, TokenizerReport

if TYPE_CHECKING:
    import numpy as np
    import torch

# Characters that stand for bytes in a byte-level vocabulary: space, newline, tab, return.
_RAW_BYTE_CHARACTERS = "\u0120\u010a\u0109\u010d"
_REPLACEMENT = "\ufffd"
# In place of a silenced token's own bias: exact in float32 and float16, far below any logit.
SILENT_BIAS = -10000.0
# Small and not zero: a row of zeros has no embedding that a layer could normalise.
SILENT_SCALE = 0.01
# For tokens that prompts may hold. The first layer normalises what it reads, so a tenth of an
# embedding still says which token it was, and a tenth of a logit does not win.
READ_ONLY_SCALE = 0.1


# What is looked at to see whether silenced tokens lose: as the model is asked and answers, and in
# scripts that are spelled with silenced tokens.
_SENTENCES = (
    "Iron deficiency causes tiredness, pale skin and shortness of breath; see a doctor.",
    "Instruct: What is asthma?\nOutput: Asthma is a disease of the airways in the lungs.",
    "1. Take 500 mg twice a day.\n2. Do not exceed 4 g in 24 hours (\u2265 60 kg).\n",
    "I cannot help with that. If you are in danger, call your local emergency number now.",
    "There are guidelines to follow. In pregnancy, the American College recommends rest.",
)
_ELSEWHERE = (
    "哮喘是气道的慢性疾病。",
    "الربو مرض مزمن في الرئتين.",
    "Астма — болезнь дыхательных путей.",
    "I feel better today 🙂 thank you ❤️ 👍🏽",
)


@dataclasses.dataclass(frozen=True)
class Silence:
    """The tokens that a bundle must never write, and what keeps its output layer from them."""

    factors: dict[int, float]  # token id -> what its row is multiplied by where there is no bias
    rows: int  # of the output layer
    bias: bool  # the output layer has one

    @classmethod
    def of(cls, report: TokenizerReport, model_dir: Path) -> Silence:
        """What a `.task` needs: the tokens from `report`, the output layer from a merged model.

        Of the model only the headers of its files are read: a bias is a vector with a number for
        each row of the vocabulary, and no other vector is that long.
        """
        from safetensors import safe_open

        shapes: list[list[int]] = []
        for path in sorted(Path(model_dir).glob("*.safetensors")):
            with safe_open(str(path), framework="numpy") as tensors:
                # keys(): the handle is not iterable
                shapes += [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
        factors = dict.fromkeys(report.silenced, SILENT_SCALE)
        factors |= dict.fromkeys(report.single_bytes, READ_ONLY_SCALE)
        return cls(dict(sorted(factors.items())), report.rows, [report.rows] in shapes)

    def check(self, model_dir: Path) -> dict[str, Any]:
        """Measure on a merged model whether its silenced tokens lose; the model is not changed.

        With a bias there is nothing to measure. Without one, the model is loaded in float32.

        Returns:
            ``silenced`` (count), ``method`` ("bias", "rows" or "none"), and for "rows"
            ``smallest_margin`` (winner's logit less the highest silenced one, over sentences) and
            ``smallest_margin_elsewhere`` (over other scripts and emoji, in which a model of English
            is not at home: said, see `warning`, and no reason against the bundle).

        Raises:
            WorkError: a silenced token would still win somewhere in the sentences.
        """
        method = ("bias" if self.bias else "rows") if self.factors else "none"
        result: dict[str, Any] = {"silenced": len(self.factors), "method": method}
        if method != "rows":
            return result
        margin, elsewhere = self._smallest_margins(Path(model_dir), (_SENTENCES, _ELSEWHERE))
        result |= {"smallest_margin": margin, "smallest_margin_elsewhere": elsewhere}
        if margin <= 0:
            raise WorkError(
                f"tokens that a .task cannot show could not be silenced in {model_dir}: one of "
                f"them wins by {-margin:.1f} in a test sentence. A .litertlm can show them: "
                "--only litertlm"
            )
        return result

    def _smallest_margins(self, model_dir: Path, texts: Sequence[Sequence[str]]) -> list[float]:
        """Least of (winner's logit - highest silenced logit) over each group of sentences."""
        import torch
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(model_dir), trust_remote_code=False
        )
        # 16-bit matrix products are slow or missing on CPUs.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(model_dir), dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        ids = list(self.factors)
        smallest = [math.inf] * len(texts)
        with torch.no_grad():
            # Tied weights change in the embedding as well, as they do in the file.
            head = model.get_output_embeddings()
            head.weight[ids] *= torch.tensor(list(self.factors.values()))[:, None]
            for group, sentence in [(n, text) for n, found in enumerate(texts) for text in found]:
                read = tokenizer.encode(sentence, add_special_tokens=False, return_tensors="pt")
                logits = model(input_ids=read).logits[0]
                silenced = logits[:, ids].max(1).values
                logits[:, ids] = -math.inf
                margin = (logits.max(1).values - silenced).min().item()
                smallest[group] = min(smallest[group], margin)
        return smallest

    def hook(self, head: torch.nn.Module) -> None:
        """Let a loaded model's output layer give the logits that the `.task` gives.

        `head` is a linear layer (``model.get_output_embeddings()``); its weights stay as they are,
        and with tied ones so does the embedding.
        """
        import torch

        ids = list(self.factors)
        factors = torch.tensor(list(self.factors.values()))

        def silence(layer: Any, _: Any, logits: torch.Tensor) -> torch.Tensor:
            if self.bias:
                logits[..., ids] += SILENT_BIAS - layer.bias[ids]
            else:
                logits[..., ids] *= factors.to(logits)
            return logits

        head.register_forward_hook(silence)

    def copy_of(self, tflite: Path) -> mmap.mmap:
        """The content of an exported TFLite file with the tokens silenced; the file is kept.

        The content is a private mapping: only pages that are changed take memory.

        Args:
            tflite: float32, or in any recipe of `config.RECIPES`.

        Raises:
            WorkError: the file has no output layer of the merged model's form.
        """
        import numpy as np
        from ai_edge_litert import schema_py_generated as schema

        with Path(tflite).open("rb") as handle:
            content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        model = schema.Model.GetRootAs(content, 0)
        layers = list(_output_layers(model, self.rows))
        if not layers or any((bias is not None) != self.bias for _, bias in layers):
            raise WorkError(
                f"{tflite}: {len(layers)} output layers with {self.rows} rows, "
                f"{sum(bias is not None for _, bias in layers)} with a bias; the merged model has "
                f"one {'with' if self.bias else 'without'} a bias. Its tokens were not silenced"
            )
        ids, factors = list(self.factors), np.array(list(self.factors.values()), np.float32)
        # The signatures share their numbers, which must not be multiplied twice.
        done: set[int] = set()
        for weights, bias in layers:
            numbers = _stored(model, content, weights if bias is None else bias)
            if numbers is None or len(numbers) != self.rows:
                raise WorkError(
                    f"{tflite}: the output layer does not have one scale, row or bias of floating "
                    f"point for each of its {self.rows} tokens. Its tokens were not silenced"
                )
            if numbers.ctypes.data in done:
                continue
            done.add(numbers.ctypes.data)
            if bias is None:
                numbers[ids] *= factors.reshape(-1, *[1] * (numbers.ndim - 1))
            else:
                numbers[ids] = SILENT_BIAS
        return content


def warning(facts: dict[str, Any]) -> str:
    """What to say of `Silence.check`'s facts, or an empty string."""
    margin = facts.get("smallest_margin_elsewhere", 1.0)
    if margin > 0:
        return ""
    return (
        "note: in other scripts or emoji, the .task may write a token that it cannot show (one "
        f"wins by {-margin:.1f} in a test sentence); the .litertlm can show all"
    )


def _output_layers(model: Any, rows: int) -> Iterator[tuple[Any, Any | None]]:
    """(weights, bias or None) of each linear layer with `rows` outputs, as tensors.

    Converter v1 gives the layer its bias, v2 adds it in an operator of its own. The recipe fp16
    stores 16-bit numbers and widens them in an operator before the layer.
    """
    from ai_edge_litert import schema_py_generated as schema

    kinds = schema.BuiltinOperator
    for index in range(model.SubgraphsLength()):
        graph = model.Subgraphs(index)
        operators: dict[int, list[Any]] = {}
        for number in range(graph.OperatorsLength()):
            operator = graph.Operators(number)
            kind = model.OperatorCodes(operator.OpcodeIndex()).BuiltinCode()
            operators.setdefault(kind, []).append(operator)
        narrow = {o.Outputs(0): o.Inputs(0) for o in operators.get(kinds.DEQUANTIZE, [])}
        added = {
            o.Inputs(side): o.Inputs(1 - side)
            for o in operators.get(kinds.ADD, [])
            for side in (0, 1)
        }
        for layer in operators.get(kinds.FULLY_CONNECTED, []):
            weights = graph.Tensors(narrow.get(layer.Inputs(1), layer.Inputs(1)))
            if weights.ShapeAsNumpy()[0] != rows:
                continue
            bias = layer.Inputs(2) if layer.InputsLength() > 2 else -1
            bias = added.get(layer.Outputs(0), -1) if bias < 0 else bias
            yield weights, graph.Tensors(narrow.get(bias, bias)) if bias >= 0 else None


def _stored(model: Any, content: mmap.mmap, tensor: Any) -> np.ndarray | None:
    """What is multiplied or set for a token: scales of whole numbers, or floating point itself.

    The array is a view of `content`. None for a tensor that has neither.
    """
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    floats = {schema.TensorType.FLOAT32: np.float32, schema.TensorType.FLOAT16: np.float16}
    if tensor.Type() not in floats:
        scales = tensor.Quantization()
        return scales.ScaleAsNumpy() if scales and scales.ScaleLength() else None
    buffer = model.Buffers(tensor.Buffer())
    # Large buffers lie behind the flatbuffer, at an offset into the file.
    if buffer.DataLength():
        raw = buffer.DataAsNumpy()
    else:
        raw = np.frombuffer(content, np.uint8, buffer.Size(), buffer.Offset())
    numbers, shape = raw.view(floats[tensor.Type()]), tensor.ShapeAsNumpy()
    return numbers.reshape(shape) if numbers.size == shape.prod() else None


def is_made(text: str) -> bool:
    """Whether a text shows pieces that the bundle's tokenizer has and the model's has not."""
    return PLACEHOLDER_MARK in text or GUARD in text


def dirt(text: str, special: Sequence[str]) -> str | None:
    """What is in an answer that nobody should see, or None."""
    if is_made(text):
        return "a placeholder piece (a token that is incomplete UTF-8 was not silenced)"
    if _REPLACEMENT in text:
        return "U+FFFD (bytes that are no valid UTF-8)"
    raw = [char for char in _RAW_BYTE_CHARACTERS if char in text]
    if raw:
        return f"raw byte-level characters {' '.join(raw)} (the tokenizer was not decoded)"
    shown = [token for token in special if token in text]
    if shown:
        return f"special-token text {', '.join(shown)}"
    return None
