"""The JSON that a measurement leaves: one file for one run, with its environment; what `cnpp-trt report` reads."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec

from ..errors import UserError
from ..files import replace_file
from ..messages import printable
from ..places import results
from ..schema import Meta, SchemaError, convert, convert_closed, decode, read_bounded, to_json
from . import check_records, records, tuning_records
from .environment import environment
from .records import Text

FORMAT = 1
Kind = Literal[
    "bench",
    "waterfall",
    "sweep",
    "parity",
    "consistency",
    "plans",
    "end_to_end",
    "first_contact",
    "reliability",
    "tuning",
]
RECORDS: dict[str, Any] = {
    "bench": records.Bench,
    "waterfall": records.Waterfall,
    "sweep": records.Sweep,
    "parity": records.Parity,
    "consistency": records.Consistency,
    "plans": records.Plans,
    "end_to_end": records.EndToEnd,
    "first_contact": check_records.FirstContact,
    "reliability": check_records.Reliability,
    "tuning": tuning_records.Tuning,
}
"""What `data` is, by kind."""

Fact = Text | Annotated[int, Meta(ge=-(2**53), le=2**53)] | float | bool | None
Environment = Annotated[
    Mapping[Text, Fact | Annotated[Mapping[Text, Fact], Meta(max_length=200)]], Meta(max_length=200)
]


class BenchmarkResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measurement with where and when it was taken.

    Attributes:
        kind: which class of `records` `data` is.
        title: what was measured, in a few words, as in `miniature, seg, cpu`.
        command: what would measure it again.
        data: the record of `kind`.
        environment: what is known of the machine, by name.
        created: ISO 8601, UTC.
    """

    kind: Kind
    title: Text
    command: Annotated[str, Meta(max_length=500_000)]
    data: Mapping[str, Any]
    environment: Environment
    created: Text
    format: int = FORMAT

    @classmethod
    def of(
        cls, kind: Kind, title: str, command: str, data: Mapping[str, Any], threads: int | None = None
    ) -> "BenchmarkResult":
        """A result of this moment, on this machine."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(kind, title, command, data, environment(threads), now)

    def write(self, path: Path) -> None:
        """Replaces the file whole, or leaves it as it was.

        Raises:
            UserError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, to_json(self))
        except OSError as e:
            raise UserError(f"cannot write {printable(path)}: {e.strerror or e}") from None


def read_result(path: Path) -> BenchmarkResult:
    """A result whose keys, types, ranges and sizes are those of `records`, and whose text is printable.

    Raises:
        UserError: one line with file and key, where the file is no whole result of this format.
    """
    shown = printable(path)
    try:
        content = decode(read_bounded(path), object)
    except FileNotFoundError:
        raise UserError(f"there is no {shown}: measure with `cnpp-trt bench`, `parity` or `consistency`") from None
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {shown}: {printable(e)}") from None
    if not isinstance(content, dict) or not {"format", "kind", "data"} <= content.keys():
        raise UserError(f"{shown} is no result of cnpp-trt")
    if content["format"] != FORMAT:
        raise UserError(
            f"{shown} is a result of format {printable(content['format'], 20)}, not {FORMAT}: measure again"
        )
    if content["kind"] not in get_args(Kind):
        raise UserError(f"{shown} is a result of unknown kind {printable(repr(content['kind']), 40)}")
    try:
        result = convert(content, BenchmarkResult)
    except SchemaError as e:
        raise UserError(f"{shown} is no whole result: {e}: measure again with this version") from None
    try:
        data = convert_closed(content["data"], RECORDS[result.kind])
    except SchemaError as e:
        text = str(e).replace("`$", "`data", 1)
        raise UserError(f"{shown} is no whole result: {text}: measure again with this version") from None
    return msgspec.structs.replace(
        result,
        title=_plain(result.title),
        command=_plain(result.command),
        created=_plain(result.created),
        data=_plain(data),
        environment=_plain(result.environment),
    )


def _plain(value: Any) -> Any:
    """The same with every text on one line and printable: results come from anywhere, and a page shows all of them."""
    if isinstance(value, str):
        return printable(value, 12 * len(value) + 1)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def default_path(kind: Kind, name: str) -> Path:
    """Where a run's result goes when nothing else is said: one file for each kind and name, the newest."""
    return results() / f"{kind}-{name}.json"
