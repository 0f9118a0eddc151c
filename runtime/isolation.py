"""What runs together and fails is halved, until what fails is alone."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..errors import BundleError, Cancelled, CnppError

Item = TypeVar("Item")
Found = TypeVar("Found")


def isolated(items: Sequence[Item], compute: Callable[[Sequence[Item]], Sequence[Found]]) -> list[Found | CnppError]:
    """What `compute` gives for each item, or the error that the item alone raises.

    Args:
        items: any number; they are computed together as long as that works.
        compute: gives a value for each of the items that it is given.

    Raises:
        BundleError, Cancelled: errors of no single item.
    """
    if not items:
        return []
    try:
        return list(compute(items))
    except (BundleError, Cancelled):
        raise
    except CnppError as e:
        if len(items) == 1:
            return [e]
        middle = len(items) // 2
        return [*isolated(items[:middle], compute), *isolated(items[middle:], compute)]
