"""From a YAML file and `key=value` arguments to an instance of a nested dataclass, collecting every problem on the way.

Contract: `read(schema, [recipe.yaml, key=value, ...])` never stops at the first mistake. A refused value is named
with its path, where it was written (file:line or command line) and what was expected; its field keeps the default,
and its path goes into `refused`, so that later checks can keep quiet about what follows from it. Nothing here knows
megarl's own fields.

OmegaConf does the type checks and conversions, one value at a time: merging a whole tree would end at its first
error.
"""

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Tree = dict[str, Any]
RECIPE_ENDINGS = (".yaml", ".yml")
RESOLVER = re.compile(r"\$\{[^}]*:")  # ${oc.env:HOME}; plain references such as ${run.seed} have no colon


class ConfigError(Exception):
    """The config cannot be used; `problems` lists all that is wrong with it."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{count} in the config:", *(f"  - {problem}" for problem in self.problems)]))


@dataclass
class Reading:
    """What came of reading: the filled-in schema, what was wrong, and the dotted paths whose values were refused."""

    known: list[str]  # dotted path of every field of the schema
    config: Any = None
    problems: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    origins: dict[str, str] = field(default_factory=dict)  # dotted path -> "recipe.yaml:12" or "command line"

    def refuse(self, path: str, reason: str, blames: str = "") -> None:
        """Note a problem with the value at `path`; `blames` is the field that was meant, where it is another."""
        self.problems.append(f"{self._origin(path)}{reason}")
        self.refused.add(blames or path)

    def _origin(self, path: str) -> str:
        """Where the value was written: its own line, or that of the closest thing around it."""
        while path:
            if path in self.origins:
                return f"{self.origins[path]}: "
            path = re.sub(r"(^|\.|\[)[^.\[]*$", "", path)
        return ""


def read(schema: type, argv: Sequence[str]) -> Reading:
    """Fill `schema` from a recipe, more recipes and overrides; later ones win."""
    reading = Reading(known=list(_paths(schema)))
    tree: Tree = {}
    if not argv:
        reading.problems.append("no recipe given: the first argument is a YAML file")
    for i, argument in enumerate(argv):
        recipe = i == 0 or (argument.endswith(RECIPE_ENDINGS) and "=" not in argument)
        given, origins = _read_recipe(argument, reading) if recipe else _read_override(argument, reading)
        _merge(tree, given)
        reading.origins |= origins
    accepted = _fill(schema, tree, "", reading)
    _check_references(schema, accepted, reading)
    for path in sorted(OmegaConf.missing_keys(OmegaConf.merge(OmegaConf.structured(schema), accepted))):
        if path not in reading.refused:
            reading.problems.append(f"{path} is missing: set it in the recipe or as {path}=...")
            reading.refused.add(path)
        _merge(accepted, _branch(path, ""))  # a stand-in that lets the other checks go on
    reading.config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), accepted))
    return reading


def _paths(schema: type, prefix: str = "") -> Iterator[str]:
    for f in fields(schema):
        yield f"{prefix}{f.name}"
        if isinstance(f.type, type) and is_dataclass(f.type):
            yield from _paths(f.type, f"{prefix}{f.name}.")


def _read_recipe(name: str, reading: Reading) -> tuple[Tree, dict[str, str]]:
    """The tree of a YAML file, and the line of each of its keys."""
    try:
        text = Path(name).read_text(encoding="utf-8")
        loaded = OmegaConf.create(text) if text.strip() else OmegaConf.create()
        origins = {path: f"{name}:{line}" for path, line in _lines(yaml.compose(text, Loader=yaml.SafeLoader))}
    except (OSError, UnicodeDecodeError) as error:
        reading.problems.append(f"{name}: cannot read the recipe: {error}")
        return {}, {}
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reading.problems.append(f"{name}: not valid YAML: {_one_line(error)}")
        return {}, {}
    tree = OmegaConf.to_container(loaded)
    if not isinstance(tree, dict):
        reading.problems.append(f"{name}: a recipe is a mapping of sections, found {_one_line(text)[:60]!r}")
        return {}, {}
    return tree, origins


def _read_override(argument: str, reading: Reading) -> tuple[Tree, dict[str, str]]:
    """`a.b=value` as {"a": {"b": value}}; the value is YAML."""
    path, equals, _ = argument.partition("=")
    if not equals or not path:
        reading.problems.append(f"command line: {argument!r} is not key=value")
        return {}, {}
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={argument[len(path) + 1 :]}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reading.problems.append(f"command line: {argument!r} is not valid YAML: {_one_line(error)}")
        return {}, {}
    return _branch(path, value), {path: "command line"}


def _branch(path: str, value: Any) -> Tree:
    """{"a": {"b": value}} for "a.b"."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted path, line) of every key of a YAML document, as `_fill` spells paths."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}.{key.value}" if prefix else str(key.value)
            yield path, key.start_mark.line + 1
            yield from _lines(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield f"{prefix}[{i}]", value.start_mark.line + 1
            yield from _lines(value, f"{prefix}[{i}]")


def _merge(tree: Tree, over: Tree) -> None:
    """Lay `over` on `tree`: mappings key by key, everything else replaced."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _fill(schema: type, tree: Tree, prefix: str, reading: Reading) -> Tree:
    """What of `tree` fits `schema`; the rest becomes problems."""
    known = {f.name: f.type for f in fields(schema)}
    accepted: Tree = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        kind = known.get(key)
        if kind is None:
            near = _nearest(prefix, str(key), list(known), reading.known)
            hint = f"did you mean {near}?" if near else f"known here: {', '.join(known)}"
            reading.refuse(path, f"unknown key {path}; {hint}", blames=near)
        elif is_dataclass(kind):
            if isinstance(value, dict):
                accepted[key] = _fill(kind, value, f"{path}.", reading)
            elif value is not None:  # a section with all of its keys commented out is null
                reading.refuse(path, f"{path} = {value!r}: expected a section with {_names(kind)}")
        elif is_dataclass(element := (get_args(kind) or (None,))[0]) and isinstance(value, list):
            accepted[key] = _fill_list(element, value, path, reading)
        elif _fits(schema, key, value, kind):
            accepted[key] = value
        else:
            reading.refuse(path, f"{path} = {value!r}: expected {_expected(kind)}")
    return accepted


def _fill_list(element: type, values: list[Any], path: str, reading: Reading) -> list[Tree]:
    """Like `_fill`, for a list of dataclasses; every element is checked, mandatory fields included."""
    accepted = []
    for i, value in enumerate(values):
        where = f"{path}[{i}]"
        if not isinstance(value, dict):
            reading.refuse(where, f"{where} = {value!r}: expected a mapping with {_names(element)}", blames=path)
            continue
        before = len(reading.problems)
        filled = _fill(element, value, f"{where}.", reading)
        for f in fields(element):
            if f.default == MISSING and value.get(f.name, MISSING) == MISSING:
                reading.refuse(where, f"{where}.{f.name} is missing", blames=path)
        if len(reading.problems) == before:
            accepted.append(filled)
        else:
            reading.refused.add(path)
    return accepted


def _nearest(prefix: str, key: str, siblings: list[str], known: list[str]) -> str:
    """The path most likely meant: the same name in another section, else a like name in this one, else none."""
    close = [path for path in known if path.rpartition(".")[2] == key]
    close += [f"{prefix}{name}" for name in difflib.get_close_matches(key, siblings, n=1, cutoff=0.7)]
    return close[0] if close else ""


def _fits(schema: type, key: str, value: Any, kind: Any) -> bool:
    """Whether `value` is of the field's type: OmegaConf's rules, without its lenience for booleans and nested lists."""
    reference = isinstance(value, str) and "${" in value
    if isinstance(value, bool) != (kind is bool) and not reference:
        return False
    if get_origin(kind) is list and isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        return False
    try:
        OmegaConf.merge(OmegaConf.structured(schema), {key: value})
    except OmegaConfBaseException:
        return False
    return True


def _check_references(schema: type, accepted: Tree, reading: Reading) -> None:
    """Drop every `${...}` that leads nowhere, does not fit its field or would run a resolver."""
    references = list(_references(accepted))
    merged = OmegaConf.merge(OmegaConf.structured(schema), accepted) if references else None
    for holder, path, value in references:
        try:
            if RESOLVER.search(str(value)):
                raise ValueError("only plain references such as ${run.seed} are allowed")
            OmegaConf.to_container(OmegaConf.create({"value": _at(merged, path)}), resolve=True)
        except (OmegaConfBaseException, ValueError) as error:
            reading.refuse(path, f"{path} = {value!r}: {_one_line(error).partition(' full_key:')[0]}")
            del holder[path.rpartition(".")[2]]


def _references(tree: Tree, prefix: str = "") -> Iterator[tuple[Tree, str, Any]]:
    """(mapping, dotted path, value) of every value that holds a `${...}`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _references(value, f"{prefix}{key}.")
        elif isinstance(value, str | list) and "${" in str(value):
            yield tree, f"{prefix}{key}", value


def _at(node: Any, path: str) -> Any:
    for key in path.split("."):
        node = node[key]
    return node


def _expected(kind: Any) -> str:
    """A field's type in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _expected(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        return f"a list of {_names(args[0]) if is_dataclass(args[0]) else args[0].__name__}"
    if origin is dict:
        return "a mapping"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text"}[kind]


def _names(schema: type) -> str:
    return ", ".join(f.name for f in fields(schema))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
