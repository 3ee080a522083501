"""Safe YAML parsing into plain data, with size limits checked before construction.

Scalars follow YAML 1.2 where 1.1 is surprising: dates, 12:30, 010, yes and no are text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from afd.errors import YamlError

# Large enough for a list of ten thousand prompts.
MAX_BYTES = 1 << 20
MAX_NODES = 50_000
MAX_DEPTH = 32
MAX_INTEGER = 2**63
_PREFIX = "tag:yaml.org,2002:"
_SCALARS = {_PREFIX + kind for kind in ("null", "bool", "int", "float", "str")}
_INTEGER = r"[-+]?(?:0b[01][01_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|0|[1-9][0-9_]*)\Z"
_FLOAT = r"""(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"""


def parse_yaml(text: str) -> Any:
    """Parse one YAML document: mappings with text keys, lists, text, numbers, booleans and None.
    Raises YamlError for anything else, and beyond the limits above."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise YamlError(f"it has more than {MAX_BYTES} bytes")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _Check(loader).expanded(node, 1)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(
            _at(mark, ", ".join(filter(None, (error.context, error.problem))))
        ) from None
    except yaml.reader.ReaderError as error:
        line = 1 + text.count("\n", 0, error.position)
        odd = error.character if isinstance(error.character, str) else chr(error.character)
        raise YamlError(f"line {line}: the character {odd!r} is not allowed") from None
    except (ValueError, RecursionError) as error:
        raise YamlError(str(error)) from None


def _at(mark: Any, problem: str) -> str:
    where = "" if mark is None else f"line {mark.line + 1}: "
    return where + " ".join(problem.split())


class _Loader(yaml.SafeLoader):
    """Counts nodes during parsing, so that parsing stops early at the size or depth limit."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES or self._depth > MAX_DEPTH:
            wrong = _too_large() if self._nodes > MAX_NODES else _too_deep()
            raise yaml.MarkedYAMLError(problem=wrong, problem_mark=self.peek_event().start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


# Drop YAML 1.1's implicit resolvers.
_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver(
    _PREFIX + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")
)
_Loader.add_implicit_resolver(_PREFIX + "int", re.compile(_INTEGER), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _PREFIX + "float", re.compile(_FLOAT, re.VERBOSE), list("-+0123456789.")
)
_Loader.add_implicit_resolver(
    _PREFIX + "null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(_PREFIX + "merge", re.compile(r"<<\Z"), ["<"])


def _too_large() -> str:
    return f"more than {MAX_NODES} values, each alias counted as its contents"


def _too_deep() -> str:
    return f"nested deeper than {MAX_DEPTH}"


class _Check:
    """Validates the nodes in one traversal before construction."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        # Node count and depth below each node, with aliases expanded; None during its traversal.
        self._known: dict[int, tuple[int, int] | None] = {}

    def expanded(self, node: Node, depth: int) -> tuple[int, int]:
        """Number of nodes below and including a node, aliases expanded, and their depth."""
        if id(node) in self._known:
            found = self._known[id(node)]
            if found is None:
                raise _wrong(node, "it contains itself")
        else:
            self._known[id(node)] = None
            parts = [self.expanded(below, depth + 1) for below in self._below(node)]
            sizes, depths = [size for size, _ in parts], [deep for _, deep in parts]
            found = self._known[id(node)] = (1 + sum(sizes), 1 + max(depths, default=0))
        if found[0] > MAX_NODES:
            raise _wrong(node, _too_large())
        if depth - 1 + found[1] > MAX_DEPTH:
            raise _wrong(node, _too_deep())
        return found

    def _below(self, node: Node) -> list[Node]:
        if isinstance(node, MappingNode):
            self._keys(node)
            _plain(node, {_PREFIX + "map"})
            return [value for _, value in node.value]
        if isinstance(node, SequenceNode):
            _plain(node, {_PREFIX + "seq"})
            return list(node.value)
        self._scalar(node)
        return []

    def _keys(self, node: MappingNode) -> None:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise _wrong(key, "a key is a list or mapping; needed: text")
            merge = key.tag == _PREFIX + "merge" and key.value == "<<"
            if not merge and key.tag != _PREFIX + "str":
                raise _wrong(key, f"key {_short(key.value)} is not text; needed: quotes around it")
            _text(key)
            # PyYAML would silently take the last of duplicate keys.
            if key.value in seen:
                raise _wrong(key, f"key {_short(key.value)} appears twice")
            seen.add(key.value)

    def _scalar(self, node: Node) -> None:
        if node.tag == _PREFIX + "merge":  # text if used as a value
            node.tag = _PREFIX + "str"
        _plain(node, _SCALARS)
        if node.tag == _PREFIX + "str":
            _text(node)
            return
        # An explicit tag may precede any value.
        if self._loader.resolve(ScalarNode, node.value, (True, False)) != node.tag:
            kind = node.tag.replace(_PREFIX, "!!")
            raise _wrong(node, f"{_short(node.value)} does not have the form of {kind}")
        digits = node.value.replace("_", "").lstrip("+-")
        if node.tag == _PREFIX + "int" and (len(digits) > 80 or abs(int(digits, 0)) >= MAX_INTEGER):
            raise _wrong(node, f"{_short(node.value)} is too large; needed: below 2**63")


def _text(node: Node) -> None:
    """Reject text that files, paths and tokenizers cannot hold; joins JSON's surrogate pairs."""
    node.value = node.value.encode("utf-16-le", "surrogatepass").decode(
        "utf-16-le", "surrogatepass"
    )
    try:
        # Encoded as for a path, whose non-UTF-8 bytes are lone surrogates too.
        node.value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise _wrong(node, f"{_short(node.value)} contains a lone surrogate") from None
    if "\0" in node.value:
        raise _wrong(node, f"{_short(node.value)} contains a zero byte")


def _plain(node: Node, tags: set[str]) -> None:
    if node.tag not in tags:
        tag = node.tag.replace(_PREFIX, "!!")
        raise _wrong(node, f"tag {_short(tag)} is not allowed; needed: plain values")


def _wrong(node: Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


class _Dumper(yaml.SafeDumper):
    """Quotes text with Unicode's own line breaks, which PyYAML otherwise folds into spaces."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        broken = any(letter in text for letter in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if broken else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def yaml_text(data: object) -> str:
    """Serialise plain data as YAML in key order; `parse_yaml` restores the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
