"""Configuration: what may be set; defaults < YAML (or the parent's stage.json) < flags.

Every section forbids unknown keys; all problems are reported at once, each with the nearest valid
name. `Config.sources` remembers where every value that is not a default came from.
"""

from liteguard.config.config import Config
from liteguard.config.data import LARGEST, DataSection, ModelSection, Section, SourceSection
from liteguard.config.deploying import AUTO, RECIPES, CompressSection, VerifySection
from liteguard.config.layers import (
    CONFIG_DIR,
    MOST_PROBLEMS,
    OTHER_NAMES,
    OWN,
    available_configs,
    build,
    deep_merge,
    find_config,
    flatten,
    of_a_record,
    parse_setting,
    read_yaml,
    valid_names,
    validate,
)
from liteguard.config.measuring import (
    OWN_SETS,
    SET_KINDS,
    EvaluateSection,
    LlmJudgeSection,
    SetSection,
    VerdictSection,
)
from liteguard.config.training import (
    OPTIMIZERS,
    PREFERENCE_LOSSES,
    DomainSection,
    InstructionSection,
    SafetySection,
    TrainSection,
)

__all__ = [
    "AUTO",
    "CONFIG_DIR",
    "CompressSection",
    "Config",
    "DataSection",
    "DomainSection",
    "EvaluateSection",
    "InstructionSection",
    "LARGEST",
    "LlmJudgeSection",
    "MOST_PROBLEMS",
    "ModelSection",
    "OPTIMIZERS",
    "OTHER_NAMES",
    "OWN",
    "OWN_SETS",
    "PREFERENCE_LOSSES",
    "RECIPES",
    "SET_KINDS",
    "SafetySection",
    "Section",
    "SetSection",
    "SourceSection",
    "TrainSection",
    "VerdictSection",
    "VerifySection",
    "available_configs",
    "build",
    "deep_merge",
    "find_config",
    "flatten",
    "of_a_record",
    "parse_setting",
    "read_yaml",
    "valid_names",
    "validate",
]
