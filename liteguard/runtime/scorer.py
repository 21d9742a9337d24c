"""Log-likelihoods of given texts from a bundle's TFLite model, which its runtime does not give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from liteguard.errors import UserError, WorkError
from liteguard.machine import quiet_stderr, quiet_stderr_at_exit


class Scorer:
    """Teacher-forced log-likelihoods from the TFLite model inside a `.task` file.

    The KV cache is one set of buffers that every call reads and writes in place, as LiteRT-LM does.
    Through the interpreter's signature runners it would be copied in and out for each token, which
    took four times as long (197 against 49 ms a token with a cache of 1280, SmolLM2, 2 cores).
    """

    def __init__(self, path: Path, threads: int, unpacked: Path) -> None:
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.options import CpuOptions, Options

        from liteguard.runtime.container import tflite_model

        file = unpacked / "model.tflite"
        if not file.exists():
            # A file of its own is mapped; a buffer would be held in memory as a whole.
            with file.open("wb") as handle:
                handle.write(tflite_model(path))
        cpu = CpuOptions(
            num_threads=threads, xnnpack_weight_cache_path=str(unpacked / "scores.xnnpack_cache")
        )
        quiet_stderr_at_exit()
        with quiet_stderr():
            self._model = CompiledModel.from_file(str(file), options=Options(cpu_options=cpu))
        details = self._model.get_input_tensor_details("decode")
        self._cache = {
            name: (self._model.create_input_buffer_by_name("decode", name), tensor)
            for name, tensor in details.items()
            if "kv" in name
        }
        self.cache_length = int(details["mask"]["shape"][-1])
        with quiet_stderr():
            self._clear_cache()  # the first write sets up an environment, and says so
        # Length in tokens -> (signature, its inputs, its outputs, details of its inputs).
        self._signatures = {1: self._buffers("decode")}
        for name in self._model.get_signature_list():
            length = name.removeprefix("prefill_")
            if length.isdigit() and length != "1":  # one token: decode, which gives logits too
                self._signatures[int(length)] = self._buffers(name)
        self._prefilled: list[int] | None = []  # tokens whose keys and values the cache holds
        outputs = self._model.get_output_tensor_details("decode")
        self._vocabulary = int(outputs["logits"]["shape"][-1])

    def _clear_cache(self) -> None:
        import numpy as np

        for buffer, tensor in self._cache.values():
            buffer.write(np.zeros(tensor["shape"], tensor["dtype"]))

    def _buffers(self, name: str) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]:
        cache = {key: buffer for key, (buffer, _) in self._cache.items()}
        details = self._model.get_input_tensor_details(name)
        inputs = {
            key: cache.get(key) or self._model.create_input_buffer_by_name(name, key)
            for key in details
        }
        outputs = {
            key: cache.get(key) or self._model.create_output_buffer_by_name(name, key)
            for key in self._model.get_output_tensor_details(name)
        }
        return name, inputs, outputs, details

    def _run(self, length: int, ids: list[int], start: int) -> Any:
        """Runs `ids` at positions start, start+1, ... in the signature of that length."""
        import numpy as np

        name, inputs, outputs, details = self._signatures[length]
        columns = np.arange(self.cache_length)
        visible = columns[None, :] <= (start + np.arange(length))[:, None]
        # Large and finite: minus infinity makes NaN of a fully masked row.
        boolean = "bool" in str(details["mask"]["dtype"])
        mask = visible if boolean else np.where(visible, 0.0, -1e9).astype(np.float32)
        inputs["mask"].write(mask[None, None])
        inputs["tokens"].write(np.array([ids], np.int32))
        inputs["input_pos"].write(np.arange(start, start + length, dtype=np.int32))
        self._model.run_by_name(name, inputs, outputs)
        if "logits" in outputs:
            return outputs["logits"].read(self._vocabulary, np.float32).astype(np.float64)
        return None

    def score(self, context: list[int], targets: list[int]) -> tuple[float, int]:
        """See `Bundle.score`; ids instead of text."""
        return self.follow(context, targets)[0], len(targets)

    def follow(self, context: list[int], targets: list[int]) -> tuple[float, bool]:
        """(log-likelihood of `targets`, whether each of them is the likeliest token)."""
        import numpy as np

        likelihood, greedy = 0.0, True
        for logits, target in self._predictions(context, targets):
            top = logits.max()
            likelihood += float(logits[target] - top - np.log(np.exp(logits - top).sum()))
            greedy &= bool(logits[target] == top)
        return likelihood, greedy

    def behind(self, context: list[int], tokens: list[int]) -> float:
        """Nats by which the likeliest of `tokens` is behind the likeliest token after `context`."""
        logits = next(self._predictions(context, tokens))[0]
        return float(logits.max() - max(logits[token] for token in tokens))

    def next_token(self, context: list[int], longest: int) -> Any:
        """See `Bundle.next_token`."""
        if self._prefilled:
            self._prefilled = []  # perhaps computed in longer steps
        return next(self._predictions(context, context[:1], longest))[0]

    def _predictions(
        self, context: list[int], targets: list[int], longest: int | None = None
    ) -> Iterator[tuple[Any, int]]:
        """(logits, the target that they are of) for each target, one after the other.

        `longest`: most tokens to compute at a time; None for what is fastest.
        """
        total = len(context) + len(targets)
        if not context or not targets:
            raise UserError("scoring needs a context and a target of at least one token each")
        if total > self.cache_length:
            raise WorkError(f"{total} tokens do not fit the KV cache of {self.cache_length} tokens")
        known = len(context) - 1  # the last context token yields the first logits
        if context[:known] == self._prefilled:
            # The options of one question: what stands behind the context is masked anyway.
            done = known
        else:
            if self._prefilled is None:
                self._clear_cache()  # numbers of a run that failed may be none
            self._prefilled = None  # in case that this one fails half way
            done = 0
        allowed = [n for n in sorted(self._signatures) if longest is None or n <= longest]
        while done < known:
            fitting = [n for n in allowed if done + n <= self.cache_length]
            # The shortest that covers the rest, else the longest. Padding lands in cache slots
            # that the mask hides until they are overwritten.
            length = next((n for n in fitting if n >= known - done), fitting[-1])
            chunk = context[done : min(done + length, known)]
            self._run(length, chunk + [0] * (length - len(chunk)), done)
            done += len(chunk)
        self._prefilled = context[:known]
        sequence = context + targets
        for position in range(known, total - 1):
            yield self._run(1, [sequence[position]], position), sequence[position + 1]
