"""YAML and JSON text to plain values, with the place of every key and item.

The text is composed to nodes and turned into values here rather than by a constructor: so each key keeps its
line, a duplicate key is seen, no tag can make an object, and `1e-4` is a number (text in YAML 1.1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from burnish.config.problems import KeyPath, Place, Problem

MAX_DEPTH = 40
MAX_VALUES = 50_000  # a few aliases of aliases would otherwise fill the memory

_TAG_PREFIX = "tag:yaml.org,2002:"
_PLAIN_TAGS = {"str", "int", "float", "bool", "null", "map", "seq", "merge", "timestamp", "value"}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}

Expand = Callable[[str], tuple[str, str]]
"""Text to (text with `${VAR}` replaced, what is wrong with it or "")."""


@dataclass
class Document:
    """Plain values (dict, list, str, int, float, bool, None) and where each stands."""

    values: Any = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    spoiled: set[KeyPath] = field(default_factory=set)  # their values are not to be judged further

    def place(self, path: KeyPath) -> Place:
        """The place of `path`, or of the nearest section around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.places[()]


def plain_value(text: str) -> Any:
    """The value of an unquoted scalar by the YAML 1.2 core schema; a number too large becomes infinity."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) <= 400 else math.inf
    if _BASED.fullmatch(text):
        return int(text, 0)
    return float(text) if _FLOAT.fullmatch(text) else text


def read_document(
    text: str, *, label: Callable[[int], Place], expand: Expand, is_json: bool = False
) -> Document:
    """Read `text`; what is wrong with it is in the result's `problems`.

    Args:
        label: place of a line, counted from 1.
        expand: replaces `${VAR}`.
        is_json: hold the text to JSON's rules.
    """
    document = Document(places={(): label(1)})
    node = _compose(text, document, label, is_json)
    if node is not None:
        _Builder(document, label, expand).build(node)
    return document


def _compose(text: str, document: Document, label: Callable[[int], Place], is_json: bool) -> Node | None:
    try:
        if is_json or text.lstrip().startswith("{"):
            text = _checked_json(text, must=is_json)
        composed: Node | None = YAML(typ="safe", pure=True).compose(text)
        return composed
    except json.JSONDecodeError as error:
        line, message = error.lineno, f"not valid JSON: {error.msg[:1].lower()}{error.msg[1:]}"
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"a character that YAML does not allow: {error.character!r}"
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        message = _syntax_message(error, text, line)
    except RecursionError:
        line, message = 1, f"nested deeper than {MAX_DEPTH} levels"
    except (
        YAMLError,
        ValueError,
        OverflowError,
        IndexError,
    ) as error:  # ruamel's own slips, such as "\Uffffffff"
        line, message = 1, f"not valid YAML: {error}"
    document.problems.append(Problem(label(line), (), message))
    return None


def _checked_json(text: str, must: bool) -> str:
    """`text` without tabs, which JSON allows between tokens and YAML does not.

    Raises:
        json.JSONDecodeError: it is no JSON although it `must` be.
    """
    try:
        json.loads(text)
    except json.JSONDecodeError:
        if must:
            raise
        return text
    return text.replace("\t", " ")


def _syntax_message(error: MarkedYAMLError, text: str, line: int) -> str:
    problem = str(error.problem or error.context or "not valid YAML")
    lines = text.splitlines()
    shown = lines[line - 1] if 0 < line <= len(lines) else ""
    if "'\\t'" in problem or shown.lstrip(" ").startswith("\t"):
        return "a tab; YAML indents with spaces only"
    if re.search(r"\$\{|\[(name|trigger)\]", shown):
        return (
            f"{problem}; put the text of this line in quotes (`[` and `{{` begin a list or a mapping in YAML)"
        )
    if "unexpected end of stream" in problem and error.context_mark:
        return f"the quote that opens in line {error.context_mark.line + 1} is not closed"
    if "mapping values are not allowed" in problem:
        return "the indentation does not fit the line above, or a text with `: ` in it needs quotes"
    if "expected <block end>" in problem or "could not find expected ':'" in problem:
        return "the indentation does not fit the lines above, or `key: value` lacks its `: `"
    if "another document" in problem:
        return "a second document (`---`); a config is one"
    if "cannot start any token" in problem:
        return f"{problem}; put the text in quotes"
    return problem


class _Builder:
    """Nodes to values; fills `document`."""

    def __init__(self, document: Document, label: Callable[[int], Place], expand: Expand) -> None:
        self._document = document
        self._label = label
        self._expand = expand
        self._open: list[Node] = []  # from the root to here, to see an alias of its own parent
        self._count = 0

    def build(self, root: Node) -> None:
        self._document.places[()] = self._place(root)
        self._document.values = self._value(root, ())

    def _place(self, node: Node) -> Place:
        place = self._label(node.start_mark.line + 1)
        return Place(place.label, place.line, node.start_mark.column, place.is_override)

    def _report(self, node: Node, path: KeyPath, text: str, *, spoils: bool = True) -> None:
        place = self._document.place(path) if path in self._document.places else self._place(node)
        self._document.problems.append(Problem(place, path, text))
        if spoils:
            self._document.spoiled.add(path)

    def _value(self, node: Node, path: KeyPath) -> Any:
        self._count += 1
        refusal = self._refusal(node)
        if refusal:
            self._report(node, path, refusal)
            return None
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        if not isinstance(node, MappingNode | SequenceNode):
            raise TypeError(f"YAML has no {type(node).__name__}")
        self._open.append(node)
        value = self._mapping(node, path) if isinstance(node, MappingNode) else self._sequence(node, path)
        self._open.pop()
        return value

    def _refusal(self, node: Node) -> str:
        tag = str(node.tag)
        if tag.removeprefix(_TAG_PREFIX) not in _PLAIN_TAGS:
            shown = f"!!{tag.removeprefix(_TAG_PREFIX)}" if tag.startswith(_TAG_PREFIX) else tag
            return f"the tag {shown} is refused: a config holds text, numbers, lists and mappings only"
        if len(self._open) > MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH} levels"
        if any(node is parent for parent in self._open):
            return "an alias (`*`) of the very section it stands in"
        if self._count > MAX_VALUES:
            return f"more than {MAX_VALUES} values; aliases (`*`) count each time"
        return ""

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        text, wrong = self._expand(_joined_surrogates(str(node.value)))
        if wrong:
            self._report(node, path, wrong)
            return None
        # ruamel's tag is `str` for `!!str 3`, and for the few numbers it does not know (`.5e3`), which pydantic reads.
        is_text = node.style is not None or (
            node.tag == _TAG_PREFIX + "str" and plain_value(node.value) != node.value
        )
        return text if is_text else plain_value(text)

    def _sequence(self, node: SequenceNode, path: KeyPath) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            self._document.places[(*path, index)] = self._place(item)
            values.append(self._value(item, (*path, index)))
            if self._count > MAX_VALUES:
                break
        return values

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        seen: dict[str, Place] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG_PREFIX + "merge":
                self._report(key_node, path, "`<<` is not read (YAML 1.2 dropped it); write the options out")
                continue
            if not isinstance(key_node, ScalarNode):
                self._report(key_node, path, "a key must be a word, not a list or a mapping", spoils=False)
                continue
            key, place = _joined_surrogates(str(key_node.value)), self._place(key_node)
            here = (*path, key)
            if key in seen:
                text = f"`{key}` is given twice: {seen[key].label} and {place.label}; keep one"
                self._document.problems.append(Problem(place, here, text))
            seen[key] = place
            self._document.places[here] = place
            values[key] = self._value(value_node, here)
        return values


def _joined_surrogates(text: str) -> str:
    """JSON writes a character beyond U+FFFF as an escaped pair of surrogates; YAML keeps the two apart."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
