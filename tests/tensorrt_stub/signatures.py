"""The signatures that pybind11 writes into docstrings, such as `f(self: Builder, flags: int = 0) -> Network`."""

import re
from dataclasses import dataclass

# What a docstring calls by its name in C++, as the class of that name in Python had not been made yet.
_CPP = {"IParserError": "ParserError"}


@dataclass(frozen=True)
class Parameter:
    """One parameter. Without a name of its own it is `arg0` and cannot be passed by name."""

    name: str
    type: str
    optional: bool


@dataclass(frozen=True)
class Signature:
    """One overload, without `self`."""

    parameters: tuple[Parameter, ...]
    returns: str

    def takes(self, positional: int, keywords: tuple[str, ...] = ()) -> bool:
        """Whether it can be called with so many arguments, and these by name."""
        rest = self.parameters[positional:]
        by_name = {p.name for p in rest if not re.fullmatch(r"arg\d+", p.name)}
        needed = {p.name for p in rest if not p.optional}
        return positional <= len(self.parameters) and needed <= set(keywords) <= by_name


def signatures(name: str, text: str | None) -> list[Signature]:
    """The overloads of a method, by its docstring."""
    lines = [re.fullmatch(rf"(?:\d+\. )?{name}\((.*)\) -> (.+)", line) for line in (text or "").splitlines()]
    return [Signature(tuple(_parameters(line[1])), short(line[2])) for line in lines if line]


def short(kind: str) -> str:
    """A type's name without its module: the bindings of every version and flavor give the same."""
    kind = kind.strip().replace("typing.SupportsInt", "int").rpartition("::")[2]
    kind = re.sub(r"\btensorrt(_rtx)?_bindings\.tensorrt(_rtx)?\.", "", kind)
    return _CPP.get(kind, kind)


def _parameters(text: str) -> list[Parameter]:
    """A comma in a default, as in `<Strategy.STATIC: 0>`, or in brackets separates nothing."""
    found = []
    for part in filter(None, re.split(r",\s*(?![^\[<(]*[\]>)])", text)):
        head, _, default = part.partition(" = ")
        name, _, kind = head.partition(":")
        if name.strip() != "self":
            found.append(Parameter(name.strip(), short(kind), bool(default)))
    return found
