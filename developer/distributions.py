"""Whether an sdist and a wheel hold what they should: all of the project, and of it what a user of the package needs.

    python developer/distributions.py FOLDER

FOLDER has one of each, as `make package` leaves them. Needs the standard library alone.
"""

import sys
import tarfile
import zipfile
from pathlib import Path

NOT_IN_WHEEL = (".ci/", ".github/", "benchmarks/results/", "developer/", "docs/", "examples/", "tests/")
# Of the files beside the folders; further ones are modules of the package.
NOT_MODULES = ("hatch_build.py",)
NEEDED = (
    ".github/workflows/tests.yml",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "developer/distributions.py",
    "docs/design.md",
    "examples/miniature_on_cpu.py",
    "miniature/model/unet/diffusion_pytorch_model.safetensors",
    "py.typed",
    "pyproject.toml",
    "tests/conftest.py",
)
"""Some files of every kind that the sdist must have: what it lacks, the wheel is not compared with."""


def find_errors(sdist: Path, wheel: Path) -> list[str]:
    """What is missing and what does not belong there, one line each."""
    sources, packaged = sdist_files(sdist), wheel_files(wheel)
    expected = {name for name in sources if belongs_in_wheel(name)}
    return [
        *(f"{sdist.name} lacks {name}" for name in NEEDED if name not in sources),
        *(f"{wheel.name} lacks {name}" for name in sorted(expected - packaged)),
        *(f"{wheel.name} has {name}, which does not belong there" for name in sorted(packaged - expected)),
    ]


def belongs_in_wheel(name: str) -> bool:
    """Whether a file of the project is for users of the package: modules, and the data that they read."""
    if "/" not in name:
        return (name.endswith(".py") and name not in NOT_MODULES) or name == "py.typed"
    return not name.startswith(NOT_IN_WHEEL) and not name.endswith(".md")


def sdist_files(sdist: Path) -> set[str]:
    """Names below the sdist's one folder."""
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def wheel_files(wheel: Path) -> set[str]:
    """Names below `cnpp_trt`, and whatever lies beside it but for the wheel's own records."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    return {name.removeprefix("cnpp_trt/") for name in names}


def _main(folder: Path) -> int:
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    errors = find_errors(sdist, wheel)
    for error in errors:
        print(error, file=sys.stderr)
    if not errors:
        print(f"{sdist.name}: {len(sdist_files(sdist))} files; {wheel.name}: {len(wheel_files(wheel))} files")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
