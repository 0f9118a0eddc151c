"""`cnpp-trt bench`, `parity`, `consistency` and `report`: parse, call one function, print."""

import typer


def register(app: typer.Typer) -> None:
    """Adds the commands to `cnpp-trt`. Nothing heavy is imported until one of them runs."""
