"""The JSON that a measurement leaves: one file for one run, with its environment; what `cnpp-trt report` reads."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import UserError
from ..places import results
from .environment import environment

FORMAT = 1
Kind = Literal["bench", "waterfall", "parity", "consistency", "plans", "export", "whole"]


@dataclass(frozen=True)
class Result:
    """Attributes:
    kind: which class of `records` `data` is.
    title: what was measured, in a few words, as in `miniature, seg, cpu`.
    command: what would measure it again.
    created: ISO 8601, UTC.
    """

    kind: Kind
    title: str
    command: str
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    created: str
    format: int = FORMAT

    @classmethod
    def of(cls, kind: Kind, title: str, command: str, data: Mapping[str, Any], threads: int | None = None) -> "Result":
        """A result of this moment, on this machine."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(kind, title, command, data, environment(threads), now)

    def write(self, path: Path) -> None:
        """Replaces the file whole, or leaves it as it was. Raises: UserError where it cannot be written."""
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", "utf-8")
            partial.replace(path)
        except OSError as e:
            raise UserError(f"cannot write {path}: {e.strerror or e}") from None
        finally:
            partial.unlink(missing_ok=True)


def read_result(path: Path) -> Result:
    """Raises: UserError where the file is no result of this format."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}: measure with `cnpp-trt bench`, `parity` or `consistency`") from None
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {' '.join(str(e).split())[:200]}") from None
    if not isinstance(content, dict) or not {"format", "kind", "data"} <= content.keys():
        raise UserError(f"{path} is no result of cnpp-trt")
    if content["format"] != FORMAT:
        raise UserError(f"{path} is a result of format {content['format']}, not {FORMAT}: measure again")
    try:
        result = Result(**content)
    except TypeError:
        raise UserError(f"{path} is no result of cnpp-trt: its fields are not those of format {FORMAT}") from None
    if result.kind not in get_args(Kind):
        raise UserError(f"{path} is a result of unknown kind {result.kind!r}")
    return result


def default_path(kind: Kind, name: str) -> Path:
    """Where a run's result goes when nothing else is said: one file for each kind and name, the newest."""
    return results() / f"{kind}-{name}.json"
