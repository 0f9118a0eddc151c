"""What this process has in memory of files that it has mapped, as the system counts it."""

import re
from pathlib import Path


def resident(file: Path) -> int:
    """Bytes of a file's mappings, from /proc/self/smaps (proc(5))."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text("utf-8"), flags=re.MULTILINE)
    own = [text for text in mappings if text.partition("\n")[0].endswith(f" {file}")]
    return sum(int(size) << 10 for text in own for size in re.findall(r"^Rss: +(\d+) kB", text, re.MULTILINE))
