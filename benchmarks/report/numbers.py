"""Figures as text: three significant digits, the unit that suits the size."""

from math import floor, log10

from ..records import NOT_FINITE

TIMES = "×"


def number(value: float) -> str:
    """Three significant digits, and whole numbers from 1000: 0.0123, 6.07, 131, 5766."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    if not 1e-3 <= abs(rounded) < 1e6:
        return exponent(value)
    return f"{value:.{max(0, 2 - floor(log10(abs(rounded))))}f}"


def exponent(value: float) -> str:
    """Two significant digits, 2.3e-6; from 0.1 to 1000 as `number`."""
    if value >= NOT_FINITE:
        return "not finite"
    if value == 0 or 0.1 <= abs(value) < 1000:
        return number(value)
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(power)}"


def signed(value: float, decimals: int) -> str:
    """+0.12 or −0.12, and what would round to nothing in powers of ten."""
    if value == 0:
        return "0"
    small = abs(value) < 0.5 * 10**-decimals
    text = exponent(value) if small else f"{value:.{decimals}f}"
    return text.replace("-", "−", 1) if value < 0 else f"+{text}"


def time_unit(seconds: float) -> tuple[float, str]:
    """(units in a second, unit) for durations of this size."""
    if seconds >= 1:
        return 1, "s"
    return (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")


def duration(seconds: float) -> str:
    """6.07 s, 123 ms, 45.6 µs."""
    scale, unit = time_unit(float(f"{seconds:.3g}"))
    return f"{number(seconds * scale)} {unit}"


def durations(low: float, high: float) -> str:
    """Both in the larger one's unit: 6.03–6.14 s."""
    scale, unit = time_unit(float(f"{high:.3g}"))
    return f"{number(low * scale)}–{number(high * scale)} {unit}"


def memory(count: float) -> str:
    """Bytes as 160 MiB, 7.20 GiB."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{number(count / 2**30)} GiB"


def ratio(value: float) -> str:
    """A factor as in 1.65x or 10.3x."""
    return f"{factor(value)}x"


def factor(value: float) -> str:
    """Two decimals below 10, then three significant digits."""
    return f"{value:.2f}" if value < 9.995 else number(value)


def percent(fraction: float) -> str:
    """62 %, and 3.1 % below 10 %."""
    return f"{100 * fraction:.{0 if abs(fraction) >= 0.0995 else 1}f} %"


def size(width: int, height: int) -> str:
    """A size in pixels, as in `512×512`."""
    return f"{width}{TIMES}{height}"


def plural(count: int, one: str, many: str = "") -> str:
    """3 images, 1 image."""
    return f"{count} {one if count == 1 else many or one + 's'}"
