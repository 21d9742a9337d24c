"""Loading tokenizers and models: precision from the hardware, NF4, LoRA targets, the adapter."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import base_tokenizers, distributed, hub, machine, model_files, registry
from liteguard.checkpoints import read_dict, sha256_file, sha256_json
from liteguard.errors import UserError, WorkError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from liteguard.config import Config
    from liteguard.prompts import Prompt


def meta_model(architecture: Any) -> Any:
    """The causal language model of a transformers config on the meta device: shapes, no data."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture)


# Attention scores of Phi-2 and hidden states of Gemma leave the range of float16 (65504), which
# turns the loss into NaN.
FLOAT16_UNSAFE = ("phi", "gemma2", "gemma3", "gemma3_text")


def choose_dtype(requested: str, architecture: str) -> tuple[torch.dtype, str]:
    """(compute dtype, the reason in words) for this machine and model architecture.

    bfloat16 where the hardware multiplies it, float16 only on GPUs without it and only for models
    that stay in its range, float32 otherwise. A CPU without bf16 units runs bf16 matrix products
    hundreds of times slower than float32, so it is asked for its units, not only for the type.
    """
    import torch

    cuda = torch.cuda.is_available()
    if requested != "auto":
        if requested == "float16" and (not cuda or architecture in FLOAT16_UNSAFE):
            place = (
                "a CPU" if not cuda else f"the {architecture!r} architecture, which overflows it"
            )
            raise UserError(
                f"model.compute_dtype float16 cannot be used on {place}. "
                "Use auto, bfloat16 or float32."
            )
        return getattr(torch, requested), "asked for by model.compute_dtype"
    if cuda:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"{torch.cuda.get_device_name()} has bf16 units"
        if architecture in FLOAT16_UNSAFE:
            return torch.float32, f"no bf16 units, and {architecture!r} overflows float16"
        return torch.float16, f"{torch.cuda.get_device_name()} has no bf16 units"
    # PyTorch for Apple's processors is built without oneDNN, and has no such name.
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16, "this CPU has bf16 units"
    return torch.float32, "this CPU has no bf16 units"


def load_tokenizer(
    directory: str,
    prompt: Prompt,
    embedding_rows: int,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Tokenizer whose BOS, end, document-end and padding tokens are the prompt's; it adds none.

    A missing padding token is added only where the embedding has a spare row for it, so that no
    matrix changes its shape. Raises UserError otherwise, and where the tokenizer begins every text
    with a BOS that the prompt does not have: the model was trained with it.
    """
    from transformers import AutoTokenizer

    model_files.check_tokenizer(directory, trust_remote_code)
    with model_files.reading(directory, "holds no tokenizer that can be used"):
        tokenizer = AutoTokenizer.from_pretrained(
            directory, revision=revision, trust_remote_code=trust_remote_code
        )
    vocabulary = tokenizer.get_vocab()
    for role in ("bos_token", "end_token", "document_end_token"):
        token = getattr(prompt, role)
        if token and token not in vocabulary:
            raise UserError(f"prompt.{role} = {token!r} is not a token of {directory}.")
    _check_bos(tokenizer, prompt, directory)
    base_tokenizers.mend(tokenizer, prompt, embedding_rows, directory)
    base_tokenizers.begin_without_blank(tokenizer, prompt)
    if prompt.pad_token not in vocabulary and len(tokenizer) >= embedding_rows:
        special = ", ".join(sorted(set(tokenizer.all_special_tokens)))
        raise UserError(
            f"prompt.pad_token = {prompt.pad_token!r} is not a token of {directory}, and its "
            f"embedding has no spare row ({embedding_rows} rows, all used). "
            f"Name an existing token that no text contains, e.g. one of: {special}"
        )
    # With its own tokens, which the next lines replace: a stage says whether the prompt is that.
    tokenizer.base_chats = base_tokenizers.rendered_chats(tokenizer)
    named = {"pad_token": prompt.pad_token, "eos_token": prompt.end_token}
    if prompt.bos_token:
        named["bos_token"] = prompt.bos_token
    tokenizer.add_special_tokens(named)
    tokenizer.chat_template = prompt.chat_template()
    tokenizer.padding_side = "right"
    if len(tokenizer) > embedding_rows:
        raise UserError(
            f"The tokenizer of {directory} has {len(tokenizer)} tokens, the model only "
            f"{embedding_rows} embedding rows: they do not belong together."
        )
    if hasattr(tokenizer, "add_bos_token"):
        tokenizer.add_bos_token = False
    if encode(tokenizer, "a") != tokenizer("a")["input_ids"]:
        raise UserError(
            f"The tokenizer of {directory} adds special tokens by itself; the prompt must hold "
            "everything that the model sees, or training and device would differ."
        )
    return tokenizer


def _check_bos(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, directory: str) -> None:
    """Raise UserError for a BOS that the tokenizer adds and the prompt lacks or names otherwise."""
    bos = base_tokenizers.added_bos(tokenizer)
    if bos and bos != [prompt.bos_token]:
        has = f"is {prompt.bos_token!r}" if prompt.bos_token else "is empty"
        raise UserError(
            f"The tokenizer of {directory} begins every text with {' '.join(bos)}, and "
            f"prompt.bos_token {has}. A model that was trained with it is another one without (the "
            f"perplexity of Gemma-3 270M is 40 times as high). Set prompt.bos_token: {bos[0]!r}"
        )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that already contains its special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def model_config(config: Config) -> tuple[str, str | None, Any]:
    """(local directory, hub commit or None, transformers config) of the base model."""
    directory, revision = base_model(config)
    model_files.check_base(directory, config.model.trust_remote_code)
    from transformers import AutoConfig

    with model_files.reading(directory, "the base model's config.json cannot be used"):
        loaded = AutoConfig.from_pretrained(
            directory, revision=revision, trust_remote_code=config.model.trust_remote_code
        )
        longest = getattr(loaded.get_text_config(), "max_position_embeddings", None)
    if longest and config.model.context_length > longest:
        raise UserError(
            f"model.context_length {config.model.context_length} is more than this base model can "
            f"read: {longest} (max_position_embeddings of {directory}/config.json)."
        )
    return directory, revision, loaded


def count_parameters(architecture: Any) -> int:
    """Parameters of a transformers config's causal language model, tied ones once; no data."""
    return sum(parameter.numel() for parameter in meta_model(architecture).parameters())


def load_base_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with the configured prompt's tokens; no weights are loaded."""
    directory, revision, loaded = model_config(config)
    trusted = config.model.trust_remote_code
    rows = loaded.get_text_config().vocab_size
    return load_tokenizer(directory, config.prompt, rows, revision, trusted)


def with_base_prompt(config: Config) -> Config:
    """`config` with the prompt of the base model's chat template, where it says `from_base`.

    Keys that are set beside it (`--set prompt.system=...`) are laid on top.
    """
    if not config.prompt_from_base:
        return config
    from transformers import AutoTokenizer

    directory, revision, architecture = model_config(config)
    with model_files.reading(directory, "holds no tokenizer that can be used"):
        tokenizer = AutoTokenizer.from_pretrained(
            directory, revision=revision, trust_remote_code=config.model.trust_remote_code
        )
    rows = architecture.get_text_config().vocab_size
    prompt = base_tokenizers.prompt_of(tokenizer, config.model.name, rows)
    return config.with_prompt(prompt, "the base's chat template")


# Of a config.json: who wrote it, and what the project sets itself.
_SAY_NOTHING = {"transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}


def base_identity(directory: str, commit: str | None) -> str:
    """What tells two base models apart: the hub commit, or sha256 of the local weights + config.

    config.json counts less what says nothing of the numbers: rotation, norms and heads are in it.
    """
    if commit:
        return f"commit:{commit}"
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory} holds no .safetensors file (pickled weights are not loaded).")
    found = read_dict(Path(directory) / "config.json") or {}
    meaning = {k: v for k, v in found.items() if k not in _SAY_NOTHING and not k.startswith("_")}
    weights = sha256_json({file.name: sha256_file(file) for file in files})
    return f"sha256:{weights}+{sha256_json(meaning)[:16]}"


def load_weights(directory: str | Path, **options: Any) -> PreTrainedModel:
    """A causal language model from safetensors, every weight of it out of the file.

    transformers fills in random numbers for what is missing, and leaves out layers that config.json
    does not count. Raises UserError for both, and for files that cannot be read.
    """
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": False, **options}
    with model_files.reading(directory, "holds no weights that can be used"):
        model, found = AutoModelForCausalLM.from_pretrained(
            str(directory), use_safetensors=True, output_loading_info=True, **options
        )
    missing = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
    extra = sorted(n for n in found["unexpected_keys"] if re.search(r"\blayers\.\d+\.", n))
    if missing or extra:
        what = "lack or have in another shape" if missing else "have more layers:"
        names = ", ".join((missing or extra)[:3])
        raise UserError(
            f"{directory}: config.json and the weights do not belong together. The weights {what} "
            f"{names} ({len(missing or extra)} in all). Get the model again."
        )
    return model


def load_base(
    config: Config, directory: str, revision: str | None, dtype: torch.dtype, quantize: bool
) -> PreTrainedModel:
    """The frozen base model, in NF4 (double quantised, computing in `dtype`) or in `dtype`."""
    import torch
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {}
    if quantize:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # FSDP shards parameters of one float dtype only, so NF4 bytes are stored as such.
            bnb_4bit_quant_storage=dtype if distributed.uses_fsdp() else torch.uint8,
        )
    with machine.freed_blocks_given_back():
        model = load_weights(
            directory,
            revision=revision,
            dtype=dtype,
            attn_implementation=config.model.attention,
            # FSDP places and shards the model itself.
            device_map=None if distributed.uses_fsdp() else {"": distributed.local_device()},
            trust_remote_code=config.model.trust_remote_code,
            **options,
        )
    model.requires_grad_(False)
    model.config.use_cache = False
    keep_gradients_after_evaluation(model)
    fuse_gelu(model)
    return model


def keep_gradients_after_evaluation(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference in a model that trains.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a layer the first time it runs without
    gradients, and the product with repacked weights has no derivative: after the first evaluation
    no gradient passes through any layer any more, and the loss still falls a little, because each
    adapter sees the gradient of its own output. (Saving the state undoes it, which hides the fault
    whenever every evaluation is followed by a save.) The repacked product also computes in bfloat16
    where float32 was asked for.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def fuse_gelu(model: PreTrainedModel) -> int:
    """Replace Phi's stepwise GELU by torch's fused one, the same function; returns how many.

    transformers' `gelu_new` is eight element-wise operations, four of whose results autograd keeps,
    in float32 under CUDA's autocast: 16 of the 26 KB per token and layer of a Phi with an FFN of
    1,024 (tests/test_memory.py). The fused one keeps its input.
    """
    from transformers.activations import ACT2FN, NewGELUActivation

    found = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, NewGELUActivation)
    ]
    for module, name in found:
        setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    if found:
        model.config.hidden_act = "gelu_pytorch_tanh"
    return len(found)


def linear_layers(model: torch.nn.Module) -> Counter[str]:
    """Leaf name -> count of the linear layers inside the decoder layers (attention and FFN).

    The output head is not one of them: it lies outside the repeated layers.
    """
    import torch

    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        # bitsandbytes' Linear4bit is a subclass of Linear.
        if isinstance(module, torch.nn.Linear) and re.search(r"\.\d+\.", f".{name}."):
            found[name.rsplit(".", 1)[-1]] += 1
    return found


def lora_targets(model: torch.nn.Module, requested: list[str] | str) -> dict[str, int]:
    """Layer name -> how many modules it matches, for the loaded model.

    Raises UserError for a requested name that matches nothing: PEFT accepts a list in which only
    some names exist, and then silently trains less than was asked for.
    """
    available = linear_layers(model)
    if not available:
        raise UserError(
            f"The {model.config.model_type!r} architecture has no linear layers for an adapter in "
            "its attention and FFN (GPT-2 has convolutions there). Choose another base model."
        )
    if requested == "all":
        return dict(available)
    missing = [name for name in requested if name not in available]
    if missing:
        layers = ", ".join(f"{name} ({count})" for name, count in available.items())
        raise UserError(
            f"LoRA targets that match nothing in this model: {', '.join(missing)}.\n"
            f"Its attention and FFN layers: {layers}.\n"
            "Set domain.lora_targets to some of these, or to 'all'."
        )
    return {name: available[name] for name in requested}


def add_adapter(model: PreTrainedModel, config: Config) -> Any:
    """A fresh LoRA adapter on the base model, as the `domain` section says.

    Its random half comes from `domain.seed`: trainers set their seed later, so without this no two
    runs would start from the same adapter.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    section = config.domain
    torch.manual_seed(section.seed)
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=section.lora_rank,
            lora_alpha=section.lora_alpha,
            use_rslora=section.use_rslora,
            lora_dropout=section.lora_dropout,
            bias=section.lora_bias,
            target_modules=sorted(lora_targets(model, section.lora_targets)),
        ),
    )


def open_adapter(model: PreTrainedModel, directory: Path, **options: Any) -> Any:
    """The LoRA adapter in a directory, on its base model, with exactly the matrices it must have.

    PEFT only warns of an adapter that lacks some or names them otherwise: the model would be
    measured, or trained on, without them. Raises UserError for that and for files that cannot be
    read, WorkError for numbers that are not finite.
    """
    import peft
    from safetensors import safe_open

    model_files.check_adapter(directory)
    weights = directory / model_files.ADAPTER_WEIGHTS
    with model_files.reading(directory, "does not fit this base model, or cannot be read"):
        with safe_open(weights, framework="pt") as file:
            saved = {*file.keys()}  # noqa: SIM118 - safe_open is no mapping
        adapted = peft.PeftModel.from_pretrained(model, str(directory), **options)
    own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if differing := sorted(saved ^ {*own}):
        raise UserError(
            f"{weights} does not fit this base model: it has {len(saved)} matrices where "
            f"{len(own)} are needed; they differ in {', '.join(differing[:3])}."
        )
    for name, matrix in own.items():
        if not matrix.isfinite().all():
            raise WorkError(f"the adapter {directory} is broken: {name} is not finite")
    return adapted


def load_adapter(model: PreTrainedModel, directory: Path, trainable: bool) -> Any:
    """The adapter of a finished stage on its base model."""
    adapted = open_adapter(model, directory, is_trainable=trainable, autocast_adapter_dtype=True)
    # Whenever it saves, PEFT looks at the base's config.json: here, not on the hub.
    adapted.peft_config["default"].base_model_name_or_path = model.name_or_path
    return adapted


def pack_linear_layers(model: PreTrainedModel) -> int:
    """Let oneDNN compute the float32 linear layers of a frozen model on a CPU; returns how many.

    PyTorch gives float32 products to MKL, which rearranges the weights in every call and takes up
    to twice as long on AMD CPUs. Here they are kept in oneDNN's layout, as torch.compile's weight
    packing does: still float32 arithmetic, summed in another order.
    """
    import torch

    if not torch.backends.mkldnn.is_available():
        return 0

    class Packed(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            # The layout depends little on the number of rows; this is a middling one.
            rows = 64
            self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
            self.bias = linear.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear
        and child.weight.device.type == "cpu"
        and child.weight.dtype == torch.float32
    ]
    for parent, name, child in found:
        setattr(parent, name, Packed(child))
    return len(found)


def base_model(config: Config) -> tuple[str, str | None]:
    """(local directory of the base model, its hub commit or None), fetched when it is not here.

    Raises UserError with the ways on when the model cannot be reached.
    """
    model = config.model
    if model.path:
        directory = Path(model.path)
        if not (directory / "config.json").is_file():
            raise UserError(
                f"model.path = {directory}: not a model directory (no config.json there)."
            )
        return str(directory), None
    if model.name.startswith("embedded:"):
        if model.name not in registry.MODELS:
            raise UserError(
                f"Unknown embedded model {model.name!r}. Allowed: {', '.join(registry.MODELS)}"
            )
        return str(registry.MODELS[model.name](model.name, Path(config.data.cache_dir))), None
    repository = hub.Repository("model", model.name, model.revision)
    commit = hub.commit(repository)
    return str(hub.model_directory(repository, commit, model.trust_remote_code)), commit


def hub_model(config: Config) -> hub.Repository | None:
    """The repository that the base model comes from; None for a local or embedded one."""
    model = config.model
    if model.path or model.name.startswith("embedded:"):
        return None
    return hub.Repository("model", model.name, model.revision)
