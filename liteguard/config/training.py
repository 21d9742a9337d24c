"""What may be set of the three training stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    field_validator,
)

from liteguard.config.data import Section

# Of transformers' `optim` names, those that need nothing but torch and bitsandbytes.
OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("adafactor", "sgd", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit"),
    *("rmsprop_bnb_32bit", "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit"),
)

# Losses of TRL's DPOTrainer whose value for a pair depends on that pair alone and needs no setting
# of its own.
PREFERENCE_LOSSES = (
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "apo_zero", "apo_down"),
    *("nca_pair", "bco_pair", "sppo_hard"),
)
_SORTS = (
    "it compares a pair with the others of its micro-batch, so that another batch_size would be "
    "another loss"
)
_NOISE = "it needs a share of wrongly labelled pairs, which nobody knows of prepared data"
_NO_REFERENCE = "it has no reference model, and TRL's DPOTrainer does not compute it"
# What users of TRL ask for by name, and why it is not offered.
REFUSED_LOSSES = {
    **dict.fromkeys(("aot", "aot_unpaired", "aot_pair"), _SORTS),
    **dict.fromkeys(("robust", "exo_pair"), _NOISE),
    **dict.fromkeys(("orpo", "simpo", "cpo"), _NO_REFERENCE),
    "apo": "there are two: apo_zero, where chosen answers are better than the model's own, and "
    "apo_down, where they are worse",
    "dpo": "its name in TRL is sigmoid",
    "sft": "set safety.sft_weight, which adds it to the loss of pairs",
    "discopop": "it has a temperature of its own, for which there is no setting here",
}
# Keys of TRL, PEFT and transformers that are refused where they are not a section's own, and why.
REFUSED_KEYS = {
    "use_dora": "DoRA keeps the length of every row of a weight matrix. Stages measure it on the "
    "NF4 copy of the base and ship the 16-bit one, whose rows have other lengths: an adapter that "
    "learned nothing would change the model. Use domain.use_rslora or a larger domain.lora_rank",
    "torch_compile": "packed micro-batches have other lengths every time, and compiled code would "
    "be made again for each of them. Leave packing on, which saves more",
    "use_liger_kernel": "TRL has deprecated it, it has no kernels for Phi, and the part that saves "
    "memory, a loss without a matrix of all logits, is in every stage already. Leave it out",
    "neftune_noise_alpha": "the noise is for learning answers: set "
    "instruction.neftune_noise_alpha. In stage 3 policy and reference would see other noise, and "
    "no longer be compared",
}


class TrainSection(Section):
    """What the three training stages have in common."""

    learning_rate: float = Field(2e-4, gt=0, description="Peak, after the warm-up.")
    max_steps: int = Field(1000, ge=1, description="Optimizer steps.")
    batch_size: int = Field(4, ge=1, description="Sequences (or pairs) per device and micro-batch.")
    gradient_accumulation: int = Field(
        4, ge=1, description="Micro-batches per optimizer step, shared out over processes."
    )
    max_length: int = Field(2048, ge=8, description="Tokens per sequence.")
    packing: bool = Field(
        True,
        description="Train on the examples' tokens only, without padding (same steps, same loss); "
        "refused where the attention would let one example see another.",
    )
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="How the learning rate falls, by its name in transformers."
    )
    warmup_steps: int = Field(30, ge=0, description="Steps over which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="Of the adapter's weights.")
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer: Literal[*OPTIMIZERS] = Field(  # type: ignore[valid-type]
        "adamw_torch_fused", description="By its name in transformers (`optim`)."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    eval_steps: int = Field(
        100, ge=1, description="Validate, and save a checkpoint, every so many steps."
    )
    save_steps: int = Field(100, ge=1, description="Save a checkpoint every so many steps as well.")
    save_total_limit: int = Field(2, ge=1, description="Trainer checkpoints kept while training.")
    early_stopping_patience: int = Field(
        3, ge=0, description="Evaluations without improvement before stopping; 0 turns it off."
    )
    max_eval_rows: int = Field(256, ge=1, description="Validation rows used while training.")
    logging_steps: int = Field(10, ge=1, description="Print the loss every so many steps.")
    quantization: Literal["nf4", "none"] | None = Field(
        None, description="Storage of the frozen base in this stage; default: model.quantization."
    )
    report_to: list[Literal["wandb", "tensorboard", "trackio"]] = Field(
        default_factory=list,
        description="Where metrics go beside screen and log_history.json.",
    )
    seed: int = Field(0, description="Of a new adapter, dropout and the order of further passes.")


class DomainSection(TrainSection):
    lora_rank: int = Field(32, ge=1, description="Rank of the adapter that all stages train.")
    lora_alpha: int = Field(32, ge=1, description="Scales the adapter by lora_alpha / lora_rank.")
    use_rslora: bool = Field(
        False,
        description="Scale it by lora_alpha / sqrt(lora_rank) instead, so that a large rank is not "
        "scaled down (Kalajdzievski 2023); lower lora_alpha with it.",
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter.")
    lora_bias: Literal["none"] = Field(
        "none", description="Stage 3 holds two adapters, which PEFT allows without biases only."
    )
    lora_targets: Annotated[list[str], Field(min_length=1)] | Literal["all"] = Field(
        "all", description="'all' attention and FFN layers of the loaded model, or layer names."
    )


class InstructionSection(TrainSection):
    learning_rate: float = Field(1e-5, gt=0, description="Peak, after the warm-up.")
    loss_reduction: Literal["token", "square", "sample"] = Field(
        "token",
        description="What the loss of a step is the mean of: of all tokens, so that long answers "
        "count more; of whole answers (sample); or between the two (square). The validation loss "
        "stays the mean of all tokens.",
    )
    neftune_noise_alpha: float | None = Field(
        None,
        gt=0,
        description="Noise on the embeddings of training rows, alpha / sqrt(tokens of the row x "
        "hidden size) at most (NEFTune, Jain et al. 2023; 5 is usual). null turns it off.",
    )


class SafetySection(TrainSection):
    learning_rate: float = Field(5e-6, gt=0, description="Peak, after the warm-up.")
    max_steps: int = Field(200, ge=1, description="Optimizer steps.")
    batch_size: int = Field(2, ge=1, description="Pairs per device and micro-batch.")
    beta: float = Field(0.1, gt=0, description="DPO's beta: larger stays nearer to the reference.")
    preference_loss: Literal[*PREFERENCE_LOSSES] = Field(  # type: ignore[valid-type]
        "sigmoid",
        description="What is learned from a pair, by its name in TRL; sigmoid is DPO. ipo and "
        "sigmoid_norm take means over tokens, so that beta means something else.",
    )
    sft_weight: float = Field(
        0.0, ge=0, description="Weight of a likelihood term on the chosen answer (0: plain DPO)."
    )
    chosen_drop_limit: float | None = Field(
        30.0,
        gt=0,
        description="Stop when the chosen answers have lost so many nats of log-probability on "
        "validation rows: DPO may lower both answers of a pair. null turns it off.",
    )
    kind_weights: dict[str, PositiveFloat] | Literal["prepared"] = Field(
        default_factory=dict,
        description="Relative share of harmful, ordinary, ... pairs; 1 for a kind not named (pairs "
        "that name none are unknown). Fewer harmful ones make the model refuse less. prepared: "
        "every kind's share of the prepared pairs.",
    )
    precompute_reference: bool = Field(
        False, description="Compute the reference's log-probabilities once, before training."
    )

    @field_validator("preference_loss", mode="before")
    @classmethod
    def _why_not(cls, value: Any) -> Any:
        if isinstance(value, str) and value in REFUSED_LOSSES:
            raise ValueError(
                f"{value} is not offered: {REFUSED_LOSSES[value]}. "
                f"Allowed: {', '.join(PREFERENCE_LOSSES)}"
            )
        return value
