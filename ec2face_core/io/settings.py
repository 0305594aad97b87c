"""How settings are written: in YAML files and after the `=` of a command line.

YAML 1.1 reads `no` as false, 042 as 34 and 1:30 as 90. Here a plain scalar stays what was written
until `typed` reads it as its setting's type: a text as it stands, a number in decimal digits alone.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..guards.errors import ConfigError

FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*)")
DECIMAL = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Written(str):
    """What was written without quotes, whose type its setting decides."""


class Loader(yaml.SafeLoader):
    """Reads mappings, lists, quoted texts and `Written`; a key occurs once in its mapping."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        "<": yaml.SafeLoader.yaml_implicit_resolvers["<"]  # the merge key, `<<`
    }
    yaml_constructors = {  # noqa: RUF012
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", None)
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping; ValueError names a key that it has twice, and its lines."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if first := lines.get(key.value):
                    raise ValueError(
                        f"{key.value!r} is given twice (lines {first} and {line}), keep one"
                    )
                lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """A quoted text, or `Written`."""
        return node.value if node.style else Written(node.value)


Loader.add_constructor("tag:yaml.org,2002:str", Loader.construct_text)


def read_yaml(text: str | bytes, where: str) -> Any:
    """The value that a YAML text holds; ConfigError, in one line that names `where`, if none."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where} is not valid YAML: {reason}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; ConfigError if it is another value, or nothing."""
    values = read_yaml(path.read_bytes(), str(path))
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__.replace("Written", "text")
        raise ConfigError(f"{path}: expected settings, got {found}; a line is `option: value`")
    return values


def read_environment(name: str) -> dict[str, Any]:
    """The JSON object that an environment variable holds, empty if it is unset or empty.

    Raises:
        ConfigError: it holds something else.
    """
    try:
        settings = json.loads(os.environ.get(name) or "{}")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(
            f"the environment variable {name} is no JSON object of settings, such as "
            '{"trainer.steps": 5}: unset it'
        )
    return settings


def flat(values: dict[str, Any], known: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Nested or dotted settings as dotted ones, `trainer.steps`.

    Args:
        values: the settings; what is `Written` becomes of its setting's type.
        known: the options that there are, with examples of their values.
        where: the group of the options, with a dot.

    Raises:
        ConfigError: an unknown option, one that is given twice, or a value of another type.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        head, _, rest = str(key).partition(".")
        name = f"{where}{head}"
        if head not in known:
            raise ConfigError(f"{name}: unknown option{hint(head, known)}")
        example = known[head]
        if rest or isinstance(value, dict):
            if not isinstance(example, dict):
                raise ConfigError(f"{name}: is a single value and has no options in it")
            settings = flat({rest: value} if rest else value, example, f"{name}.")
        elif isinstance(example, dict):
            raise ConfigError(
                f"{name}: expected options, got {reprlib.repr(value)}; name one of them, for "
                f"example {name}.{next(iter(example))}"
            )
        else:
            try:
                settings = {name: typed(value, example)}
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from error
        for twice in settings.keys() & found.keys():
            raise ConfigError(f"{twice}: is given twice, keep one")
        found |= settings
    return found


def typed(value: Any, example: Any) -> Any:
    """A setting's value: what is `Written` becomes of the type of the example, the rest stays.

    Raises:
        ValueError: it does not say a value of that type; the message has the remedy.
    """
    if not isinstance(value, Written):
        return value
    text = str(value)
    if isinstance(example, str):
        return text
    shown = reprlib.repr(text)
    if isinstance(example, bool):
        if text.lower() not in FLAGS:
            raise ValueError(f"expected a boolean, true or false, got {shown}")
        return FLAGS[text.lower()]
    if isinstance(example, int):
        if not WHOLE.fullmatch(text) or len(text) > 1000:
            raise ValueError(
                f"expected a valid integer in decimal digits, got {shown}{_decimal(text)}"
            )
        return int(text)
    number = DECIMAL.fullmatch(text)
    if not number:
        raise ValueError(
            f"expected a valid number in decimal digits, such as 0.5 or 1e-4, got {shown}"
            f"{_decimal(text)}"
        )
    if not float(text) and re.search("[1-9]", number[1]):
        raise ValueError(f"{shown} is too small, so that it would be taken as 0")
    return float(text)


def _decimal(text: str) -> str:
    """A hint for a whole number in another notation that has one meaning: 042, 1_000, 1e3."""
    try:
        number = float(text)
    except ValueError:
        return ""
    if not math.isfinite(number) or number != int(number) or abs(number) > 1e15:
        return ""
    return f"; write {int(number)}"


def hint(name: Any, known: Iterable[str]) -> str:
    """`, did you mean 'steps'?`, or nothing if no known name resembles this one."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def describe(problem: Any) -> str:
    """One of pydantic's errors as `trainer.steps: input should be a valid integer, got 'many'`."""
    where = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], (str, int, float, type(None))):
        return f"{where}: {message[0].lower()}{message[1:]}, got {reprlib.repr(problem['input'])}"
    return f"{where}: {message}" if where else message  # of several fields together
