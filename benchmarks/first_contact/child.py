"""One stage in a process of its own: `python -m cnpp_trt.benchmarks.first_contact.child STAGE SETUP FINDING`.

What a library does to the process (a crash, a hang, memory that stays) ends with it. SETUP is JSON, FINDING the file
that the finding is written to; what the stage says besides goes to standard error.
"""

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import BackendError, UserError
from ...messages import one_line
from .stage import Finding, Setup
from .stages import BY_NAME


def find(name: str, setup: Setup) -> Finding:
    """What a stage finds, whatever it raises."""
    try:
        return BY_NAME[name].run(setup)
    except (BackendError, UserError) as e:
        return Finding("refused", one_line(e, 600))
    except Exception as e:
        traceback.print_exc()
        return Finding("failed", one_line(e, 600))


def main(name: str, setup: str, file: str) -> None:
    """Runs a stage and writes its finding."""
    fields: dict[str, Any] = json.loads(setup)
    places = {key: Path(fields[key]) for key in ("work", "bundle") if fields.get(key)}
    found = find(name, Setup(**{**fields, **places}))
    Path(file).write_text(json.dumps(asdict(found)), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
