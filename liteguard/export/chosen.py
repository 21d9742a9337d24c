"""The integers and scales that calibration chose, kept for the process that writes the TFLite file.

One safetensors file a layer. A weight is known by what is in it: its float32 values are the same in
the merged model and in the converted file, whatever the converter calls it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import writing
from liteguard.errors import WorkError
from liteguard.export.gptq import Format

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def digest(weight: np.ndarray) -> str:
    """What a float32 matrix is known by."""
    import numpy as np

    return hashlib.blake2b(np.ascontiguousarray(weight).data, digest_size=16).hexdigest()


def save(file: Path, weights: dict[str, tuple[Tensor, Tensor]], kind: Format) -> None:
    """Write a layer's choice: digest -> (int8 integers, scales of blocks). Whole or not at all."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for key, (integers, scales) in weights.items():
        tensors[f"{key}.integers"] = integers
        # Exact: `gptq.storable` scales are float16 values.
        tensors[f"{key}.scales"] = scales.to(torch.float16) if kind.block else scales
    with writing.replacing(file) as partial:
        save_file(tensors, partial, metadata={"format": f"{kind.bits}/{kind.block}"})


class Chosen:
    """What is kept in files of `save`; arrays are read when they are asked for.

    Attributes:
        format: bits and block of all weights.
        open: digests of the weights that no file was given yet.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        from safetensors import safe_open

        self._files: dict[str, Path] = {}
        self.format = Format(0, 0)
        for file in files:
            with safe_open(file, framework="numpy") as tensors:
                # One entry: of several the order in the file is drawn anew each time.
                bits, block = tensors.metadata()["format"].split("/")
                self.format = Format(int(bits), int(block))
                for name in tensors.keys():  # noqa: SIM118 (the handle is not iterable)
                    self._files[name.partition(".")[0]] = file
        self.open = set(self._files)

    def get(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(int8 integers, outputs x inputs; float32 scales, outputs x blocks) of a weight."""
        import numpy as np
        from safetensors import safe_open

        with safe_open(self._files[key], framework="numpy") as tensors:
            scales = tensors.get_tensor(f"{key}.scales").astype(np.float32)
            return tensors.get_tensor(f"{key}.integers"), scales

    def register(self) -> str:
        """Make ai-edge-quantizer write these weights as they are; returns the algorithm's name.

        Its own recovery of weights that were rounded before guesses a block's scale from the
        smallest step between two of its weights: wrong where no two of them are neighbours. Here
        the scale is known. Everything around it (bias, activations, packing) stays the library's.
        """
        from ai_edge_quantizer import algorithm_manager, qtyping
        from ai_edge_quantizer.algorithms.uniform_quantize import (
            common_quantize,
            naive_min_max_quantize,
        )

        key = algorithm_manager.AlgorithmName.DEQUANTIZED_WEIGHT_RECOVERY
        algorithm_manager.register_quantized_op(
            key,
            qtyping.TFLOperationName.FULLY_CONNECTED,
            naive_min_max_quantize.init_qsvs,
            calibration_func=naive_min_max_quantize.min_max_calibrate,
            materialize_func=functools.partial(common_quantize.materialize_fc_conv, self._params),
        )
        return str(key.value)

    def _params(self, op_info: Any, config: Any, content: Any = None, qsv: Any = None) -> Any:
        """What the quantiser asks for each tensor of a fully connected operator."""
        import numpy as np
        from ai_edge_quantizer import qtyping
        from ai_edge_quantizer.algorithms.uniform_quantize import naive_min_max_quantize

        if content is None:
            return naive_min_max_quantize.get_tensor_quant_params(op_info, config, content, qsv)
        key = digest(content)
        if key not in self._files:
            raise WorkError(
                f"the converted file has a weight {content.shape} that the merged model lacks: "
                "it cannot be calibrated. Use --set compress.calibrate=false"
            )
        self.open.discard(key)
        integers, scales = self.get(key)
        return qtyping.UniformQuantParams(
            scale=scales,
            zero_point=np.zeros_like(scales, dtype=np.int32),
            num_bits=self.format.bits,
            symmetric=True,
            quantized_dimension=1 if self.format.block else 0,
            block_size=self.format.block,
            quantized_data=integers,
        )
