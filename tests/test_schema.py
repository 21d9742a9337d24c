"""configs/schema.json, which editors check a YAML by, says what the code accepts."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from conftest import ROOT

from benchmarks import reference
from liteguard import config

SCHEMA = json.loads((ROOT / "configs/schema.json").read_text(encoding="utf-8"))
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def unknown(value: Any, schema: dict[str, Any], place: str = "") -> list[str]:
    """Keys of `value` that the schema forbids (references, sections and lists are followed)."""
    schema = next((each for each in schema.get("anyOf", ()) if "$ref" in each), schema)
    if name := schema.get("$ref"):
        schema = SCHEMA["$defs"][name.rsplit("/", 1)[1]]
    found = []
    if isinstance(value, dict) and "properties" in schema:
        assert schema["additionalProperties"] is False, place
        for key, inside in value.items():
            if key not in schema["properties"]:
                found.append(f"{place}{key}")
            else:
                found += unknown(inside, schema["properties"][key], f"{place}{key}.")
    for entry in value if isinstance(value, list) else ():
        found += unknown(entry, schema.get("items", {}), f"{place}[].")
    return found


def test_the_schema_is_what_the_models_say():
    """After a change of a setting: python benchmarks/readme.py."""
    assert (ROOT / "configs/schema.json").read_text(encoding="utf-8") == reference.schema()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_name_the_schema_and_follow_it(path):
    text = path.read_text(encoding="utf-8")
    line, name = text.splitlines()[0].split("$schema=")
    assert line == "# yaml-language-server: " and (path.parent / name).is_file()
    assert unknown(yaml.safe_load(text), SCHEMA) == []


def test_the_bases_own_prompt_is_no_mistake():
    """Neither `prompt: from_base` nor what is changed of it."""
    kinds = SCHEMA["properties"]["prompt"]["anyOf"]
    assert kinds == [{"$ref": "#/$defs/Prompt"}, {"const": "from_base"}]
    assert unknown({"prompt": {"from_base": True, "system": "Be brief."}}, SCHEMA) == []
    assert unknown({"prompt": {"sytem": "Be brief."}}, SCHEMA) == ["prompt.sytem"]


def test_a_wrong_key_is_seen_and_every_key_is_there():
    wrong = {"domain": {"learning_rat": 1}, "data": {"domain": [{"datset": "auto"}]}, "modle": {}}
    assert unknown(wrong, SCHEMA) == ["domain.learning_rat", "data.domain.[].datset", "modle"]
    defaults = config.Config().model_dump(mode="json")
    assert unknown(defaults, SCHEMA) == []
    recipes = SCHEMA["$defs"]["CompressSection"]["properties"]["quantize"]
    assert set(config.RECIPES) < set(recipes["examples"])
    for right in (*recipes["examples"], "int8, mixed", "int8_mixed,int8_weight_only,fp16"):
        assert re.fullmatch(recipes["pattern"], right)
        assert config.CompressSection(quantize=right).quantize == right
    for wrong in ("intt8", "auto, int8", "int8,", "", "int8 mixed"):
        assert not re.fullmatch(recipes["pattern"], wrong)
        with pytest.raises(ValueError, match="unknown recipe"):
            config.CompressSection(quantize=wrong)
