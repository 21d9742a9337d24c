"""What this project reads from pinned libraries without their promise to keep it.

A new version may rename any of it without a word in its release notes; `config._commit_hash` went
that way, and reading it gave None. Here each name is looked up, so that a moved pin fails in
seconds, with the name, and not as a wrong result.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
from conftest import ROOT

# Module -> names in it, dotted where an attribute of an object is meant.
NAMES = {
    "torch": [
        "ops.mkldnn._is_mkldnn_bf16_supported",
        "ops.mkldnn._reorder_linear_weight",
        "ops.mkldnn._linear_pointwise",
        "cuda.is_bf16_supported",
        "nn.LayerNorm.forward",  # replaced for the conversion
        "OutOfMemoryError",
    ],
    "torch.distributed.fsdp._flat_param": [],
    "torch.distributed.fsdp.wrap": ["_or_policy", "lambda_auto_wrap_policy"],
    "torch.distributed.fsdp._init_utils": ["_get_device_from_device_id"],
    "torch.utils._python_dispatch": ["TorchDispatchMode"],
    "torch.utils._pytree": ["tree_iter"],
    "torch.distributed": ["broadcast_object_list"],
    "transformers": [
        "AttentionInterface.register",
        "PreTrainedModel.set_attn_implementation",
        # Replaced or called for the validation of a whole set, and for the warm-up.
        "Trainer._prepare_inputs",
        "Trainer.compute_loss_context_manager",
        "Trainer.create_scheduler",
        "Trainer.evaluation_loop",
        "Trainer.prediction_step",
    ],
    "transformers.activations": ["ACT2FN", "NewGELUActivation"],
    "transformers.integrations.sdpa_attention": ["sdpa_attention_forward"],
    "transformers.masking_utils": ["AttentionMaskInterface.register", "sdpa_mask"],
    "transformers.training_args": ["OptimizerNames"],
    "peft": ["set_peft_model_state_dict", "PeftModel.delete_adapter"],
    "peft.tuners.tuners_utils": ["_get_tuner_state_dict_key_prefixes"],
    "peft.tuners.lora": ["Linear.get_delta_weight", "LoraLayer.get_base_layer"],
    "trl": ["DPOTrainer.compute_ref_log_probs", "DPOTrainer._compute_loss"],
    "trl.trainer.utils": ["FusedCausalLMOutput", "add_fused_lm_head"],
    "huggingface_hub": ["HfApi.resolve_revision", "HfApi.list_repo_tree", "get_token"],
    "huggingface_hub.constants": ["ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE"],
    "huggingface_hub.errors": [
        "CachedRepoTreeNotFoundError",
        "GatedRepoError",
        "HFValidationError",
        "HfHubHTTPError",
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
    ],
    "huggingface_hub.utils": ["disable_progress_bars", "enable_progress_bars"],
    "datasets.exceptions": ["DatasetNotFoundError"],
    "ai_edge_litert.compiled_model": [
        "CompiledModel.from_file",
        "CompiledModel.create_input_buffer_by_name",
        "CompiledModel.create_output_buffer_by_name",
        "CompiledModel.get_input_tensor_details",
        "CompiledModel.get_output_tensor_details",
        "CompiledModel.get_signature_list",
        "CompiledModel.run_by_name",
    ],
    "ai_edge_litert.options": ["CpuOptions", "Options"],
    "ai_edge_litert.schema_py_generated": [
        "BlockwiseQuantization",
        "BuiltinOperator.CUSTOM",
        "BuiltinOperator.FULLY_CONNECTED",
        "Model.GetRootAs",
        "QuantizationDetails.BlockwiseQuantization",
        "QuantizationParametersT.Pack",  # replaced: equal parameters are written once
        "TensorType.INT2",
        "TensorType.INT4",
    ],
    "ai_edge_quantizer.algorithm_manager": [
        "AlgorithmName.DEQUANTIZED_WEIGHT_RECOVERY",  # replaced: the scales are known
        "AlgorithmName.FLOAT_CASTING",
        "AlgorithmName.MIN_MAX_UNIFORM_QUANT",
        "register_quantized_op",
    ],
    "ai_edge_quantizer.algorithms.uniform_quantize.common_quantize": ["materialize_fc_conv"],
    "ai_edge_quantizer.algorithms.uniform_quantize.naive_min_max_quantize": [
        "get_tensor_quant_params",
        "init_qsvs",
        "min_max_calibrate",
    ],
    "ai_edge_quantizer.qtyping": [
        "ComputePrecision.FLOAT",
        "OpQuantizationConfig",
        "TensorDataType.FLOAT",
        "TensorQuantizationConfig",
        "TFLOperationName.FULLY_CONNECTED",
        "UniformQuantParams",
    ],
    "ai_edge_quantizer.algorithms.uniform_quantize.uniform_quantize_tensor": [
        "is_blockwise",
        "tensor_zp_scale_from_min_max",
    ],
    "ai_edge_quantizer.quantizer": ["Quantizer.load_quantization_recipe", "Quantizer.quantize"],
    "ai_edge_quantizer.recipe": [
        "TFLOperationName.ALL_SUPPORTED",
        "TFLOperationName.FULLY_CONNECTED",
        "dynamic_wi4b32_afp32",
        "dynamic_wi4b64_afp32",
        "dynamic_wi8_afp32",
        "weight_only_wi8_afp32",
    ],
    "ai_edge_quantizer.recipe_manager": [
        "RecipeManager.add_quantization_config",
        "RecipeManager.add_weight_only_config",
        "RecipeManager.get_quantization_recipe",
    ],
    "litert_lm": ["Backend.CPU", "Engine", "LogSeverity.SILENT", "SamplerConfig"],
    "litert_lm_builder.litertlm_builder": ["populate_system_metadata"],
    "litert_lm_builder.litertlm_core": [
        "HEADER_BEGIN_BYTE_OFFSET",
        "HEADER_END_LOCATION_BYTE_OFFSET",
    ],
    "litert_lm_builder.litertlm_header_schema_py_generated": [
        "AnySectionDataType.TFLiteModel",
        "LiteRTLMMetaData.GetRootAs",
    ],
    "litert_lm_builder.runtime.proto.llm_metadata_pb2": ["LlmMetadata"],
    "litert_lm_builder.runtime.proto.sampler_params_pb2": ["SamplerParameters.TOP_P"],
    "sentencepiece.sentencepiece_model_pb2": ["ModelProto"],
}

# (module, function) -> parameters that are given by name.
PARAMETERS = {
    ("litert_torch.generative.export_hf.export", "export"): [
        "bundle_litert_lm",
        "cache_length",
        "delete_in_memory_params",
        "externalize_embedder",
        "keep_temporary_files",
        "prefill_lengths",
        "quantization_recipe",
        "use_v2",
    ],
    ("trl.trainer.sft_trainer", "SFTConfig"): ["dataset_kwargs", "pad_token", "max_length"],
    ("trl.trainer.dpo_trainer", "DPOConfig"): ["beta", "loss_type", "loss_weights", "pad_token"],
    ("transformers", "TrainingArguments"): ["train_sampling_strategy", "logging_nan_inf_filter"],
    ("huggingface_hub", "snapshot_download"): ["allow_patterns", "local_files_only", "revision"],
    ("ai_edge_litert.options", "CpuOptions"): ["num_threads", "xnnpack_weight_cache_path"],
    ("litert_lm", "Engine"): ["backend", "cache_dir", "enable_benchmark"],
    ("datasets", "load_dataset"): ["revision", "split", "streaming"],
}

# Private names that are not a module's: set by the library on its objects. And Python's own.
ON_OBJECTS = {"_attn_implementation", "_exit", "_run_exitfuncs", "_shutdown"}


# Libraries that are looked at in one process: TensorFlow and torch bring their own protobuf
# messages, and some of these do not go together.
PROCESSES = [
    ("torch", "transformers", "peft", "trl", "huggingface_hub", "datasets"),
    ("ai_edge_litert", "ai_edge_quantizer", "litert_lm", "litert_lm_builder"),
    ("litert_torch", "sentencepiece"),
]


def missing(libraries: list[str]) -> list[str]:
    """Names and parameters of these libraries that are listed above and not there."""
    found = []
    for module, names in NAMES.items():
        if module.split(".")[0] in libraries:
            loaded = importlib.import_module(module)
            for name in names:
                try:
                    reduce(getattr, name.split("."), loaded)
                except AttributeError:
                    found.append(f"{module}.{name}")
    for (module, function), names in PARAMETERS.items():
        if module.split(".")[0] in libraries:
            known = inspect.signature(getattr(importlib.import_module(module), function)).parameters
            found += [f"{module}.{function}({name}=)" for name in names if name not in known]
    return found


@pytest.mark.parametrize("libraries", PROCESSES, ids=" ".join)
def test_what_is_read_from_libraries_is_there(libraries):
    code = f"import json, test_pins; print(json.dumps(test_pins.missing({libraries!r})))"
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1]) == []


def test_every_library_is_looked_at():
    modules = [*NAMES, *(module for module, _ in PARAMETERS)]
    looked_at = {library for process in PROCESSES for library in process}
    assert {module.split(".")[0] for module in modules} == looked_at


def test_what_libraries_set_on_their_objects_is_there():
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM, PhiConfig
    from trl import DPOTrainer

    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = PhiConfig(**shape, num_attention_heads=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        linear = bitsandbytes.nn.Linear4bit(8, 8)
    assert model.config._attn_implementation == "eager"
    assert hasattr(linear, "support_avx512bf16_for_cpu")
    assert model.name_or_path == ""
    # Attributes that exist only once a trainer has been built.
    assert "self.precompute_ref_logps = " in inspect.getsource(DPOTrainer.__init__)


# Functions that read an attribute by its name.
ASKING = ("getattr", "hasattr", "setattr")


def sources() -> list[Path]:
    folders = ("liteguard/**", "benchmarks", "tests", ".")
    return [file for folder in folders for file in sorted(ROOT.glob(f"{folder}/*.py"))]


def test_every_private_name_of_a_library_is_listed_here():
    """A name with an underscore in front that this project does not define itself."""
    own, read = set(), {}
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, (ast.Name, ast.Attribute)):
                name = node.id if isinstance(node, ast.Name) else node.attr
                if isinstance(node.ctx, ast.Store):
                    own.add(name)
                elif isinstance(node, ast.Attribute):
                    read.setdefault(name, file.name)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ASKING:
                name = getattr(node.args[1], "value", "")
                read.setdefault(str(name), file.name)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    read.setdefault(alias.name, file.name)
                for part in (node.module or "").split("."):
                    read.setdefault(part, file.name)
    listed = {part for module in NAMES for part in module.split(".")} | ON_OBJECTS
    listed |= {part for names in NAMES.values() for name in names for part in name.split(".")}
    private = {n for n in read if n.startswith("_") and not n.startswith("__")}
    unlisted = {name: read[name] for name in sorted(private - own - listed)}
    assert not unlisted, f"read from a library, and not in NAMES: {unlisted}"
