"""What a message's command to install an extra looks like, whatever Python and checkout it names."""


def hint(extra: str) -> str:
    """A regular expression."""
    return rf"`\S+ -m pip install (--editable )?'?[^`]*\[{extra}\]'?`"
