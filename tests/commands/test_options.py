"""How the commands' options are typed."""

import pytest
from cnpp_trt.commands.options import read_bytes
from cnpp_trt.errors import UserError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("6GiB", 6 * 2**30), ("6G", 6 * 2**30), ("6000MB", 6_000_000_000), (" 1.5 gib", 3 * 2**29), ("512k", 2**19)],
)
def test_sizes_in_bytes(text, nbytes):
    assert read_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "6", "GiB", "-1G", "6 apples", "1e3G", "6GiBs", "٦G", "nan G"])
def test_sizes_that_cannot_be_read(text):
    with pytest.raises(UserError, match="as a size in bytes: give it as 6GiB or 6000MB"):
        read_bytes(text)
