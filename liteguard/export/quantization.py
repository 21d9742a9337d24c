"""float32 TFLite -> TFLite with fewer bits a weight, by a recipe with a name.

The 8-bit recipes quantise every weight per output channel. The 4-bit ones (a scale for each block
of 32 or 64 inputs) leave embedding and output layer at 8 bits: they are one matrix in models with
tied weights, and stored twice as soon as the two differ. Which layer is which is read from shapes,
because converter v2 names linear layers by number only.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liteguard.errors import WorkError

# Bits of a weight in (FFN, attention, embedding and output layer).
BITS = {
    "int8": (8, 8, 8),
    "int8_mixed": (8, 8, 8),
    "int8_weight_only": (8, 8, 8),
    "mixed": (4, 8, 8),
    "int4_block32": (4, 4, 8),
    "int4_block64": (4, 4, 8),
    "fp16": (16, 16, 16),
    "none": (32, 32, 32),
}
# Weights shorter than this are norms, biases and constants.
_SMALL = 1024


def _open(file: Path) -> tuple[Any, mmap.mmap]:
    """(flatbuffer model, its mapped content); mapped, because files reach gigabytes."""
    from ai_edge_litert import schema_py_generated as schema

    with file.open("rb") as handle:
        content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    return schema.Model.GetRootAs(content, 0), content


def _operators(model: Any) -> Any:
    """(subgraph, operator, its code) of every operator."""
    for index in range(model.SubgraphsLength()):
        graph = model.Subgraphs(index)
        for number in range(graph.OperatorsLength()):
            operator = graph.Operators(number)
            yield graph, operator, model.OperatorCodes(operator.OpcodeIndex())


def custom_operators(file: Path) -> set[str]:
    """Names of the operators in a TFLite file that no standard runtime knows."""
    from ai_edge_litert import schema_py_generated as schema

    codes = (code for _, _, code in _operators(_open(file)[0]))
    custom = (c for c in codes if c.BuiltinCode() == schema.BuiltinOperator.CUSTOM)
    return {(code.CustomCode() or b"?").decode() for code in custom}


def linear_layers(file: Path, architecture: dict[str, Any]) -> dict[str, list[str]]:
    """Role ("ffn", "ffn_down", "attention", "output") -> names of its linear layers' results.

    "ffn_down" are the layers that lead out of a feed-forward block, "ffn" those into it.

    Args:
        file: a float32 TFLite file.
        architecture: config.json of the model it was made from.

    Raises:
        WorkError: one name stands for different roles in two signatures.
    """
    from ai_edge_litert import schema_py_generated as schema

    wide = architecture.get("intermediate_size") or architecture.get("n_inner")
    roles: dict[str, str] = {}
    for graph, operator, code in _operators(_open(file)[0]):
        if code.BuiltinCode() != schema.BuiltinOperator.FULLY_CONNECTED:
            continue
        shape = graph.Tensors(operator.Inputs(1)).ShapeAsNumpy().tolist()
        name = graph.Tensors(operator.Outputs(0)).Name().decode()
        role = {shape[0]: "ffn", shape[1]: "ffn_down"}.get(wide, "attention")
        role = "output" if shape[0] == architecture["vocab_size"] else role
        if roles.setdefault(name, role) != role:
            raise WorkError(
                f"{file}: {name} is {roles[name]} in one signature and {role} in another"
            )
    found: dict[str, list[str]] = {"ffn": [], "ffn_down": [], "attention": [], "output": []}
    for name, role in roles.items():
        found[role].append(name)
    return found


def recipe(name: str, file: Path, architecture: dict[str, Any]) -> list[dict[str, Any]]:
    """What ai_edge_quantizer reads, for a recipe of RECIPES other than "none".

    `file` and `architecture`: see `linear_layers`. Rules that come later win.
    """
    from ai_edge_quantizer import algorithm_manager, qtyping, recipe_manager
    from ai_edge_quantizer import recipe as recipes

    if name == "int8":
        return recipes.dynamic_wi8_afp32()
    if name == "int8_weight_only":
        return recipes.weight_only_wi8_afp32()
    if name == "fp16":
        manager = recipe_manager.RecipeManager()
        manager.add_quantization_config(
            regex=".*",
            operation_name=recipes.TFLOperationName.ALL_SUPPORTED,
            algorithm_key=algorithm_manager.AlgorithmName.FLOAT_CASTING,
            op_config=qtyping.OpQuantizationConfig(
                weight_tensor_config=qtyping.TensorQuantizationConfig(
                    num_bits=16, dtype=qtyping.TensorDataType.FLOAT
                ),
                compute_precision=qtyping.ComputePrecision.FLOAT,
                explicit_dequantize=True,
            ),
        )
        return manager.get_quantization_recipe()
    layers = linear_layers(file, architecture)

    def only(names: list[str]) -> str:
        # The quantiser matches an operator by its results' names, each followed by a semicolon.
        return f"^({'|'.join(map(re.escape, names))});?$"

    linear = recipes.TFLOperationName.FULLY_CONNECTED
    if name == "int8_mixed":
        manager = recipe_manager.RecipeManager()
        manager.add_weight_only_config(
            regex=only(layers["ffn_down"]), operation_name=linear, num_bits=8
        )
        return recipes.dynamic_wi8_afp32() + manager.get_quantization_recipe()
    chosen = layers["ffn"] + layers["ffn_down"]
    chosen += [] if name == "mixed" else layers["attention"]
    blocks = (
        recipes.dynamic_wi4b64_afp32 if name == "int4_block64" else recipes.dynamic_wi4b32_afp32
    )
    return recipes.dynamic_wi8_afp32() + blocks(regex=only(chosen), operation_name=linear)


def _share_quantization_parameters() -> None:
    """Makes the file's writer store equal quantisation parameters once.

    The signatures of a bundle share their weights, but each has tensors of its own for them, and
    each tensor repeats scales and zero points (12 bytes a channel: 2 % of an 8-bit SmolLM2 for each
    prefill length). A flatbuffer may point to one table from many places.
    """
    from ai_edge_litert import schema_py_generated as schema

    pack = schema.QuantizationParametersT.Pack
    known: dict[Any, int] = {}
    writer: list[Any] = []

    def content(value: Any) -> Any:
        if value is None or isinstance(value, (int, float)):
            return value
        if hasattr(value, "__dict__"):
            return tuple((key, content(part)) for key, part in sorted(vars(value).items()))
        import numpy as np

        array = np.ascontiguousarray(value)
        return hashlib.sha256(array.tobytes()).digest(), array.dtype.str, array.shape

    def shared(self: Any, builder: Any) -> int:
        if not writer or writer[0] is not builder:
            known.clear()
            writer[:] = [builder]
        key = content(self)
        if key not in known:
            known[key] = pack(self, builder)
        return known[key]

    schema.QuantizationParametersT.Pack = shared


def quantize(source: Path, output: Path, name: str, architecture: dict[str, Any]) -> None:
    """Write `source` with its weights in recipe `name`; runs in the conversion's child process."""
    from ai_edge_quantizer import quantizer

    _share_quantization_parameters()
    engine = quantizer.Quantizer(str(source))
    engine.load_quantization_recipe(recipe(name, source, architecture))
    engine.quantize(serialize_to_path=str(output), enable_progress_report=False)


def stored_weights(file: Path) -> dict[str, int]:
    """What the weights of a TFLite file take.

    Returns:
        ``file_bytes``; ``weights`` (entries of all stored weight matrices) and ``weight_bytes``
        (with their scales and the short constants, each once); ``repeated_bytes`` (buffers whose
        content stands elsewhere in the file as well).
    """
    from ai_edge_litert import schema_py_generated as schema

    model, content = _open(file)
    bits = {
        schema.TensorType.FLOAT32: 32,
        schema.TensorType.FLOAT16: 16,
        schema.TensorType.INT8: 8,
        schema.TensorType.INT4: 4,
        schema.TensorType.INT2: 2,
    }
    tensors: dict[int, Any] = {}
    scale_buffers: set[int] = set()
    for index in range(model.SubgraphsLength()):
        graph = model.Subgraphs(index)
        for number in range(graph.TensorsLength()):
            tensor = graph.Tensors(number)
            tensors.setdefault(tensor.Buffer(), tensor)
            scales = tensor.Quantization()
            if scales and scales.DetailsType() == schema.QuantizationDetails.BlockwiseQuantization:
                blocks = schema.BlockwiseQuantization()
                blocks.Init(scales.Details().Bytes, scales.Details().Pos)
                scale_buffers.add(graph.Tensors(blocks.Scales()).Buffer())
    seen: set[bytes] = set()
    weights = weight_bytes = repeated = 0
    for index, tensor in tensors.items():
        buffer = model.Buffers(index)
        # Large buffers lie behind the flatbuffer, at an offset into the file.
        inside = buffer.DataLength()
        start, size = (None, inside) if inside else (buffer.Offset(), buffer.Size())
        if not size:
            continue
        scales = tensor.Quantization()
        weight_bytes += size + (12 * scales.ScaleLength() if scales else 0)
        if size < _SMALL:
            continue
        data = buffer.DataAsNumpy() if start is None else memoryview(content)[start : start + size]
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in seen:
            repeated += size
        seen.add(digest)
        matrix = tensor.ShapeLength() > 1 and index not in scale_buffers
        if matrix and tensor.Type() in bits:
            weights += size * 8 // bits[tensor.Type()]
    return {
        "file_bytes": file.stat().st_size,
        "weights": weights,
        "weight_bytes": weight_bytes,
        "repeated_bytes": repeated,
    }


def check_stored_once(
    file: Path, parameters: int, say: Callable[[str], None] = print, limit: float = 1.02
) -> dict[str, int]:
    """`stored_weights` of a file, after checking that no weight is stored twice.

    Converter v1 stores Phi's fc1, q and k once for each signature, which makes the file 48 % larger
    than it need be and shows nowhere else.

    Args:
        parameters: entries of the weight matrices of the model, tied ones once.
        say: gets a line when small parts beside the weights take more than 2 %.

    Raises:
        WorkError: more than `limit` times the weights of the model are stored.
    """
    found = stored_weights(file)
    if (
        found["weights"] > limit * parameters
        or found["repeated_bytes"] > (limit - 1) * (found["weight_bytes"])
    ):
        raise WorkError(
            f"{file} stores {found['weights'] / 1e6:.1f} million weights where the model has "
            f"{parameters / 1e6:.1f} million ({found['repeated_bytes'] / 1e6:.0f} MB are copies): "
            "some are stored once for each signature. Use compress.converter: v2"
        )
    if found["file_bytes"] > limit * found["weight_bytes"]:
        rest = found["file_bytes"] / found["weight_bytes"] - 1
        say(
            f"  {rest:.1%} of the file are not weights but the operators of its signatures (fewer "
            "prefill lengths make it smaller)"
        )
    return found
