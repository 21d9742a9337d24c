"""YAML as a configuration needs it: plain values, and never more work than the text is long.

A file from somebody else is read before anything is known about it. Full YAML has dates that are
none, tags that make objects, values that hold themselves, and aliases by which 200 bytes mean
gigabytes; none of them has a meaning here.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

import yaml

LONGEST = 100_000  # bytes of a file; the largest shipped one has 6,000
DEEPEST, MOST = 20, 10_000  # levels, and values with every alias written out
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


class BadYaml(ValueError):
    """A text that cannot be read; the message says why and where, in a line."""


class _Loader(yaml.SafeLoader):
    """Dates stay text, and numbers are decimal: YAML 1.1 reads 1:30 as 90 and 010 as 8.

    No key may stand twice: of two `data:` sections the first would be lost.
    """

    yaml_implicit_resolvers = {
        first: [
            pair for pair in known if pair[0].rsplit(":")[-1] not in ("timestamp", "int", "float")
        ]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            lines = [key.start_mark.line + 1 for key, _ in node.value if key.value == twice[0]]
            raise BadYaml(
                f"the key {twice[0][:40]!r} is there {len(lines)} times, in lines "
                f"{', '.join(map(str, lines[:5]))}; put what belongs to it into one"
            )
        return super().construct_mapping(node, deep)


# More digits than that stay text, which no setting takes for a number.
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,17})$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load(text: str) -> Any:
    """The value that a YAML text stands for. Raises BadYaml."""
    try:
        _look_over(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise BadYaml(f"{error.problem or error.context}{_place(error.problem_mark)}") from None
    except yaml.reader.ReaderError as error:
        raise BadYaml(f"character {error.position} is no text ({error.reason})") from None
    except RecursionError:
        raise BadYaml("it is nested too deeply") from None


def _look_over(text: str) -> None:
    """Refuse by its events, before anything is built, what no configuration holds."""
    # PyYAML looks ahead for the end of every bracket: minutes where there are thousands.
    steps = (1 if c in "[{" else -1 for c in text if c in "[]{}")
    if max(itertools.accumulate(steps), default=0) > 5 * DEEPEST:
        raise BadYaml(f"more than {DEEPEST} levels of brackets")
    depth = values = 0
    for event in yaml.parse(text, _Loader):
        values += isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        place = _place(event.start_mark)
        if depth > DEEPEST:
            raise BadYaml(f"more than {DEEPEST} levels{place}")
        if values > MOST:
            raise BadYaml(f"more than {MOST:,} values{place}")
        if tag := getattr(event, "tag", None):
            shown = tag.replace("tag:yaml.org,2002:", "!!")[:40]
            raise BadYaml(f"the tag {shown!r} is not read here; write the plain value{place}")
        if isinstance(event, yaml.ScalarEvent) and _NO_TEXT.search(event.value):
            raise BadYaml(f"a character that is no text (NUL, or half of a pair){place}")


def _measure(
    node: yaml.Node, known: dict[int, tuple[int, int]], above: set[int]
) -> tuple[int, int]:
    """(values, levels) of a node with its aliases written out, refused where they are too many."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 0
    if id(node) in above:
        raise BadYaml(f"an alias stands inside what it names{_place(node.start_mark)}")
    if id(node) not in known:
        above.add(id(node))
        parts = (
            node.value
            if isinstance(node, yaml.SequenceNode)
            else [part for pair in node.value for part in pair]
        )
        found = [_measure(part, known, above) for part in parts]
        above.discard(id(node))
        size = 1 + sum(values for values, _ in found)
        depth = 1 + max((levels for _, levels in found), default=0)
        if size > MOST or depth > DEEPEST:
            place = _place(node.start_mark)
            raise BadYaml(
                f"its aliases stand for more than {MOST:,} values or {DEEPEST} levels{place}"
            )
        known[id(node)] = size, depth
    return known[id(node)]


def _place(mark: Any) -> str:
    """Where a `yaml.Mark` is, for the end of a message."""
    return f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
