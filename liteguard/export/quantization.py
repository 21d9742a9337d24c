"""float32 TFLite -> TFLite with fewer bits a weight, by a recipe with a name.

The 8-bit recipes quantise every weight per output channel. The 4-bit ones (a scale for each block
of 32 or 64 inputs) leave embedding and output layer at 8 bits: they are one matrix in models with
tied weights, and stored twice as soon as the two differ. Which layer is which is read from shapes,
because converter v2 names linear layers by number only.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import mmap
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import models
from liteguard.errors import UserError, WorkError
from liteguard.export import chosen, gptq

if TYPE_CHECKING:
    from liteguard.config import CompressSection

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
# Inputs that share a scale, in the recipes with 4-bit weights.
BLOCKS = {"mixed": 32, "int4_block32": 32, "int4_block64": 64}
# Recipes whose layers compute in float32, as far as they do: roles of `role`, or all.
_FLOAT_INPUTS = {
    "int8_mixed": {"ffn_down"},
    "int8_weight_only": {"ffn", "ffn_down", "attention", "output"},
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


def role(shape: Sequence[int], architecture: dict[str, Any]) -> str:
    """What a linear layer with weights of that shape (outputs, inputs) does in a model.

    "ffn_down" leads out of a feed-forward block, "ffn" into it, also where gate and up are one
    matrix (GLM, Phi-3); else "attention" or "output". `architecture` is the model's config.json.
    """
    if shape[0] == architecture["vocab_size"]:
        return "output"
    wide = architecture.get("intermediate_size") or architecture.get("n_inner")
    widths = wide if isinstance(wide, list) else [wide] if wide else []  # a list: one of each layer
    if shape[1] in widths:
        return "ffn_down"
    return "ffn" if shape[0] in widths or shape[0] in [2 * w for w in widths] else "attention"


def bits(recipe: str, shape: Sequence[int], architecture: dict[str, Any]) -> int:
    """Bits of a linear layer's weights in a recipe; shape and architecture as in `role`."""
    ffn, attention, rest = BITS[recipe]
    return {"attention": attention, "output": rest}.get(role(shape, architecture), ffn)


def chosen_format(recipe: str) -> gptq.Format | None:
    """The format of the weights that calibration chooses in a recipe; None: it chooses none."""
    if recipe in BLOCKS:
        return gptq.Format(4, BLOCKS[recipe])
    return gptq.Format(8, 0) if recipe.startswith("int8") else None


def rounds_inputs(recipe: str, shape: Sequence[int], architecture: dict[str, Any]) -> bool:
    """Whether the device rounds the inputs of such a linear layer to 8 bits."""
    return role(shape, architecture) not in _FLOAT_INPUTS.get(recipe, ())


def expected_bytes(
    shapes: Iterable[Sequence[int]], recipe: str, architecture: dict[str, Any]
) -> int:
    """Bytes of a model's weights in a recipe, from the shapes of its parameters (tied ones once).

    8-bit rows have a float32 scale and an int64 zero point, 4-bit blocks a float16 scale.
    """
    total = 0
    for shape in shapes:
        entries = math.prod(shape)
        width = bits(recipe, shape, architecture) if len(shape) > 1 else 32
        scales = {8: 12 * shape[0], 4: 2 * entries // BLOCKS.get(recipe, 32)}.get(width, 0)
        total += entries * width // 8 + scales
    return total


def recipes_that_fit(
    recipes: Sequence[str],
    gigabytes: float | None,
    shapes: Sequence[Sequence[int]],
    architecture: dict[str, Any],
    smaller: bool = True,
) -> list[str]:
    """Those of `recipes` whose weights take at most so many GB (10^9 bytes), in their order.

    Where none does, and `smaller` ones may be taken, the larger of `mixed` and `int4_block32` that
    does. `gigabytes` None: all of them.

    Raises UserError when none is small enough.
    """
    if gigabytes is None:
        return list(recipes)
    names = [*recipes, "mixed", "int4_block32"] if smaller else [*recipes]
    sizes = {name: expected_bytes(shapes, name, architecture) / 1e9 for name in names}
    found = [name for name in recipes if sizes[name] <= gigabytes]
    if smaller and not found:
        found = [name for name in names[-2:] if sizes[name] <= gigabytes][:1]
    if not found:
        least = min(names, key=lambda name: sizes[name])
        which = "the smallest recipe" if smaller else "the smallest of compress.quantize"
        raise UserError(
            f"compress.size_gb is {gigabytes}, and {which}, {least}, takes {sizes[least]:.2f} GB. "
            f"Allow as much{'' if smaller else ', set quantize: auto'}, or choose a smaller base "
            "model"
        )
    return found


def recipes_for(section: CompressSection, architecture: Any) -> list[str]:
    """What to try: what the settings name, as far as `compress.size_gb` allows it; of `auto` also
    a smaller one.

    architecture: the base's transformers config. Raises UserError as `recipes_that_fit`.
    """
    if section.size_gb is None:
        return list(section.recipes)
    auto = section.quantize == "auto"
    shapes = [list(value.shape) for value in models.meta_model(architecture).parameters()]
    text = architecture.get_text_config().to_dict()
    return recipes_that_fit(section.recipes, section.size_gb, shapes, text, smaller=auto)


def linear_layers(file: Path, architecture: dict[str, Any]) -> dict[str, list[str]]:
    """Role (of `role`) -> names of its linear layers' results.

    Args:
        file: a float32 TFLite file.
        architecture: config.json of the model it was made from.

    Raises:
        WorkError: one name stands for different roles in two signatures.
    """
    from ai_edge_litert import schema_py_generated as schema

    roles: dict[str, str] = {}
    for graph, operator, code in _operators(_open(file)[0]):
        if code.BuiltinCode() != schema.BuiltinOperator.FULLY_CONNECTED:
            continue
        shape = graph.Tensors(operator.Inputs(1)).ShapeAsNumpy().tolist()
        name = graph.Tensors(operator.Outputs(0)).Name().decode()
        own = role(shape, architecture)
        if roles.setdefault(name, own) != own:
            raise WorkError(
                f"{file}: {name} is {roles[name]} in one signature and {own} in another"
            )
    found: dict[str, list[str]] = {"ffn": [], "ffn_down": [], "attention": [], "output": []}
    for name, own in roles.items():
        found[own].append(name)
    return found


def recipe(
    name: str, file: Path, architecture: dict[str, Any], algorithm: str | None = None
) -> list[dict[str, Any]]:
    """What ai_edge_quantizer reads, for a recipe of RECIPES other than "none".

    `file` and `architecture`: see `linear_layers`. Rules that come later win. `algorithm` rounds
    the weights that `chosen_format` is about; None: the scale of the largest weight, each rounded
    to the nearest.
    """
    from ai_edge_quantizer import algorithm_manager, qtyping, recipe_manager
    from ai_edge_quantizer import recipe as recipes

    whole = {"int8": recipes.dynamic_wi8_afp32, "int8_weight_only": recipes.weight_only_wi8_afp32}
    if name in whole and algorithm is None:
        return whole[name]()
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
    key = algorithm or algorithm_manager.AlgorithmName.MIN_MAX_UNIFORM_QUANT
    if name.startswith("int8"):
        manager = recipe_manager.RecipeManager()
        floats = _FLOAT_INPUTS.get(name, set())
        for own in ("ffn", "ffn_down", "attention"):
            add = manager.add_weight_only_config if own in floats else manager.add_dynamic_config
            add(only(layers[own]), linear, 8, algorithm_key=key)
        rest = whole.get(name, recipes.dynamic_wi8_afp32)()
        return rest + manager.get_quantization_recipe()
    small = layers["ffn"] + layers["ffn_down"]
    small += [] if name == "mixed" else layers["attention"]
    blocks = (
        recipes.dynamic_wi4b64_afp32 if name == "int4_block64" else recipes.dynamic_wi4b32_afp32
    )
    four = blocks(regex=only(small), operation_name=linear, algorithm_key=key)
    return recipes.dynamic_wi8_afp32() + four


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


def _no_scale_of_zero() -> None:
    """Makes the quantiser give every block a scale that the device accepts.

    A block's scale is a float16, which becomes 0 where all weights are below 2e-7: rows that
    training left near zero. XNNPACK refuses such a tensor when the first prompt comes. With the
    smallest normal scale the weights of the block are zero, as they almost were.
    """
    import numpy as np
    from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor as library

    choose = library.tensor_zp_scale_from_min_max
    if hasattr(choose, "__wrapped__"):  # an earlier file of this process
        return
    given = inspect.signature(choose)

    @functools.wraps(choose)
    def normal(*positional: Any, **named: Any) -> tuple[Any, Any]:
        zero, scale = choose(*positional, **named)
        if library.is_blockwise(given.bind(*positional, **named).arguments["granularity"]):
            scale = np.maximum(scale, np.float32(gptq.SMALLEST))
        return zero, scale

    library.tensor_zp_scale_from_min_max = normal


def unusable_scales(file: Path) -> int:
    """How many scales of blocks in a TFLite file the device refuses: zero, or no normal float16."""
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    model, content = _open(file)
    buffers = set()
    for index in range(model.SubgraphsLength()):
        graph = model.Subgraphs(index)
        for number in range(graph.TensorsLength()):
            if (blocks := _blocks(graph.Tensors(number))) is not None:
                scales = graph.Tensors(blocks.Scales())
                assert scales.Type() == schema.TensorType.FLOAT16
                buffers.add(scales.Buffer())
    found = 0
    for index in buffers:
        buffer = model.Buffers(index)
        if buffer.DataLength():
            values = buffer.DataAsNumpy().view(np.float16)
        else:
            count = buffer.Size() // 2
            values = np.frombuffer(content, np.float16, count, offset=buffer.Offset())
        found += int((~np.isfinite(values) | (values < gptq.SMALLEST)).sum())
    return found


def _blocks(tensor: Any) -> Any:
    """The blockwise quantisation of a tensor; None where it has none."""
    from ai_edge_litert import schema_py_generated as schema

    scales = tensor.Quantization()
    if not scales or scales.DetailsType() != schema.QuantizationDetails.BlockwiseQuantization:
        return None
    blocks = schema.BlockwiseQuantization()
    blocks.Init(scales.Details().Bytes, scales.Details().Pos)
    return blocks


def quantize(
    source: Path,
    output: Path,
    name: str,
    architecture: dict[str, Any],
    calibrated: Path | None = None,
) -> None:
    """Write `source` with its weights in recipe `name`; runs in the conversion's child process.

    `calibrated` is the folder of `calibration.calibrate` for that recipe: its weights are written
    as they are.
    """
    from ai_edge_quantizer import quantizer

    _share_quantization_parameters()
    _no_scale_of_zero()
    engine = quantizer.Quantizer(str(source))
    kept = chosen.Chosen(sorted(calibrated.glob("*.safetensors")) if calibrated else [])
    algorithm = kept.register() if calibrated else None
    engine.load_quantization_recipe(recipe(name, source, architecture, algorithm))
    engine.quantize(serialize_to_path=str(output), enable_progress_report=False)
    if kept.open:
        raise WorkError(
            f"{len(kept.open)} calibrated weights are not in the converted file: the converter "
            "changed them. Use --set compress.calibrate=false"
        )
    if count := unusable_scales(output):
        raise WorkError(f"{count} blocks of weights have a scale that no device accepts")


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
            if (blocks := _blocks(tensor)) is not None:
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
