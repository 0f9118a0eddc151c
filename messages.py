"""Text from outside (files, programs, the network) as messages show it: one line, nothing that a terminal obeys."""

from collections.abc import Collection, Iterable

from .errors import UserError

LIMIT = 200


def printable(value: object, limit: int = LIMIT) -> str:
    r"""`value` as one line of printable characters, at most `limit` of them.

    Runs of white space become one space. Control and format characters (terminal escapes, bidirectional overrides),
    halves of surrogate pairs and unassigned characters are written as Python escapes, `\\x1b`.
    """
    text = str(value)
    cut = len(text) > 4 * limit  # longer than any message: what is beyond is not looked at
    line = " ".join(text[: 4 * limit].split())
    shown = "".join(c if c.isprintable() else _escape(c) for c in line)
    return shown if len(shown) <= limit and not cut else shown[: limit - 1].rstrip() + "…"


def escaped(text: str) -> str:
    """`text` whole, with its line ends; everything else that is not printable as Python escapes."""
    return "".join(c if c.isprintable() or c == "\n" else _escape(c) for c in text)


def one_line(error: BaseException, limit: int = LIMIT) -> str:
    """What an exception says, as `printable`; its class's name where it says nothing."""
    return printable(error, limit) or type(error).__name__


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def some(names: Iterable[str], count: int = 2) -> str:
    """The first `count` of `names` in order, and an ellipsis where there are more."""
    ordered = sorted(names)
    return ", ".join(map(printable, ordered[:count])) + (", …" if len(ordered) > count else "")


def did_you_mean(word: str, choices: Collection[str]) -> str:
    """`did you mean 'canny'? ` where one of `choices` is close to `word`, else nothing."""
    import difflib

    close = difflib.get_close_matches(word[:100].lower(), choices, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def unknown_choice(what: str, word: object, choices: Collection[str]) -> UserError:
    """The error of a word that is none of `choices`; `what` says of what kind they are, as in `scheduler`."""
    shown = printable(repr(word), 80)
    hint = did_you_mean(word, choices) if isinstance(word, str) else ""
    return UserError(f"unknown {what} {shown}: {hint}choose from {', '.join(choices)}")
