"""Procedural landscapes: an image with its exact segmentation, exact depth and caption, all from one seed.

A scene is sky, perhaps mountains, a ground of grass or sand, perhaps a lake, a sea or a road, and objects (a house,
trees) that stand on the ground. It is painted at twice its size and reduced, far things first, so whatever is painted
last is what the camera sees. Shapes are large and textures faint on purpose: the model that learns these scenes has
4x16x16 numbers for each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Color = tuple[float, float, float]

SIZE = 128
_S = 2 * SIZE  # painted at this size

# ADE20K label ids (0 = wall … 149 = flag), in the order in which the miniature's networks number their outputs.
LABELS: dict[str, int] = {
    "sky": 2,
    "mountain": 16,
    "grass": 9,
    "sand": 46,
    "water": 21,
    "road": 6,
    "house": 25,
    "tree": 4,
}

# time of day -> sky at the zenith, sky at the horizon, light that every surface is multiplied with
_TIMES: dict[str, tuple[Color, Color, Color]] = {
    "at dawn": ((0.55, 0.62, 0.86), (0.98, 0.80, 0.74), (0.95, 0.86, 0.88)),
    "at noon": ((0.25, 0.52, 0.90), (0.72, 0.88, 0.98), (1.00, 1.00, 0.98)),
    "at dusk": ((0.36, 0.26, 0.52), (0.99, 0.58, 0.28), (0.90, 0.68, 0.58)),
    "at night": ((0.04, 0.06, 0.18), (0.14, 0.20, 0.40), (0.36, 0.42, 0.62)),
    "on a cloudy day": ((0.60, 0.63, 0.67), (0.82, 0.84, 0.86), (0.80, 0.82, 0.84)),
}
_MOUNTAINS: dict[str, Color] = {
    "snowy mountains": (0.44, 0.48, 0.58),
    "brown mountains": (0.52, 0.38, 0.28),
    "blue mountains": (0.34, 0.42, 0.62),
}
_GROUNDS: dict[str, tuple[str, Color]] = {
    "in a green meadow": ("grass", (0.40, 0.66, 0.24)),
    "in a golden field": ("grass", (0.78, 0.68, 0.26)),
    "in the desert": ("sand", (0.90, 0.76, 0.52)),
}
_HOUSES: dict[str, Color] = {
    "red": (0.80, 0.18, 0.16),
    "white": (0.95, 0.94, 0.90),
    "blue": (0.24, 0.42, 0.78),
    "yellow": (0.96, 0.80, 0.28),
}
_ROOFS: tuple[Color, ...] = ((0.40, 0.20, 0.16), (0.30, 0.30, 0.36), (0.62, 0.32, 0.20))
_TREES: dict[str, Color] = {"pine": (0.10, 0.36, 0.22), "oak": (0.18, 0.48, 0.14), "autumn": (0.88, 0.42, 0.10)}
_ROADS: tuple[Color, ...] = ((0.46, 0.46, 0.48), (0.58, 0.46, 0.36))


@dataclass(frozen=True)
class Scene:
    """One drawn scene.

    Attributes:
        image: uint8 [128, 128, 3].
        labels: ADE20K label ids, uint8 [128, 128].
        depth: inverse depth as MiDaS and DPT give it, near = 1, sky = 0, float32 [128, 128] in [0, 1].
        caption: what is there and when, e.g. "a red house in a green meadow by a lake, snowy mountains, at dusk".
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    depth: Array
    caption: str


class _Canvas:
    """Image, labels and depth that are painted together, so they cannot disagree."""

    def __init__(self, light: Color) -> None:
        self.image: Array = np.zeros((_S, _S, 3), np.float32)
        self.labels: NDArray[np.uint8] = np.zeros((_S, _S), np.uint8)
        self.depth: Array = np.zeros((_S, _S), np.float32)
        self.light = np.asarray(light, np.float32)

    def fill(self, mask: Mask, label: str, color: Color | Array, depth: float | Array, lit: bool = True) -> None:
        """Paint where mask [S, S] is set; color is one RGB or a field [S, S, 3], depth one value or a field [S, S]."""
        field = np.asarray(color, np.float32)
        values = field[mask] if field.ndim == 3 else field
        self.image[mask] = values * self.light if lit else values
        self.labels[mask] = LABELS[label]
        self.depth[mask] = depth[mask] if isinstance(depth, np.ndarray) else depth


def _polygon(points: list[tuple[float, float]]) -> Mask:
    """Mask [S, S] of a polygon whose corners (x, y) are in painted pixels, with 1/16 pixel precision."""
    mask = np.zeros((_S, _S), np.uint8)
    corners = np.round(np.asarray(points, np.float64) * 16).astype(np.int32)
    cv2.fillPoly(mask, [corners], 1, shift=4)
    return mask.astype(bool)


def _ellipse(x: float, y: float, rx: float, ry: float) -> Mask:
    mask = np.zeros((_S, _S), np.uint8)
    center, axes = (round(x * 16), round(y * 16)), (round(rx * 16), round(ry * 16))
    cv2.ellipse(mask, center, axes, 0, 0, 360, 1, -1, shift=4)
    return mask.astype(bool)


def _blobs(rng: np.random.Generator, cells: int) -> Array:
    """Smooth noise [S, S] in about [-1, 1] with `cells` bumps across."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    bumps: Array = cv2.resize(coarse, (_S, _S), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    return bumps


def _ridge(rng: np.random.Generator, height: float, peaks: int) -> Array:
    """Heights [S] of a mountain ridge: straight slopes between random peaks and saddles, slightly rough."""
    xs = np.linspace(-0.15, 1.15, 2 * peaks + 1) + rng.uniform(-0.05, 0.05, 2 * peaks + 1)
    ys = np.where(np.arange(2 * peaks + 1) % 2 == 1, rng.uniform(0.7, 1.0, 2 * peaks + 1), rng.uniform(0.25, 0.5))
    ridge = np.interp(np.linspace(0, 1, _S), np.sort(xs), ys)
    rough = np.interp(np.linspace(0, 1, _S), np.linspace(0, 1, 20), rng.uniform(-0.04, 0.04, 20))
    return ((ridge + rough) * height).astype(np.float32)


def _paint_sky(canvas: _Canvas, rng: np.random.Generator, time: str, horizon: float) -> None:
    zenith, low, _ = _TIMES[time]
    rows = np.arange(_S, dtype=np.float32)[:, None, None]
    t = np.clip(rows / horizon, 0, 1) ** 1.3
    sky = np.broadcast_to((1 - t) * np.asarray(zenith, np.float32) + t * np.asarray(low, np.float32), (_S, _S, 3))
    if time == "on a cloudy day":
        sky = sky * (1 + 0.10 * _blobs(rng, 5))[..., None]
    canvas.fill(np.ones((_S, _S), bool), "sky", sky.astype(np.float32), 0.0, lit=False)
    x = rng.uniform(0.15, 0.85) * _S
    if time in ("at dusk", "at dawn"):
        disc, color = _ellipse(x, horizon * rng.uniform(0.5, 0.8), 17, 17), (1.0, 0.90, 0.55)
    elif time == "at noon":
        disc, color = _ellipse(x, horizon * rng.uniform(0.15, 0.45), 14, 14), (1.0, 0.97, 0.75)
    elif time == "at night":
        disc, color = _ellipse(x, horizon * rng.uniform(0.15, 0.5), 13, 13), (0.93, 0.94, 0.86)
    else:
        return
    canvas.fill(disc, "sky", color, 0.0, lit=False)


def _paint_mountains(canvas: _Canvas, rng: np.random.Generator, kind: str, horizon: float) -> None:
    base = np.asarray(_MOUNTAINS[kind], np.float32)
    rows = np.arange(_S, dtype=np.float32)[:, None]
    haze = np.asarray([0.74, 0.78, 0.86], np.float32)
    layers = [(0.06, 0.40, 1.0), (0.12, 0.0, 0.6)] if rng.random() < 0.5 else [(0.10, 0.1, 0.9)]
    for depth, distance, height in layers:
        top = horizon - _ridge(rng, height * rng.uniform(0.45, 0.72) * horizon, int(rng.integers(2, 4)))
        mask = rows >= top[None, :]
        color = (1 - distance) * base + distance * haze
        shade = 1.06 - 0.22 * np.clip((rows - top[None, :]) / (0.5 * horizon), 0, 1)
        canvas.fill(mask, "mountain", (shade[..., None] * color).astype(np.float32), depth)
        if kind == "snowy mountains":
            # snow lies above a line that wavers with the slope
            line = horizon - 0.55 * (horizon - top.min()) + 7 * np.sin(np.arange(_S) / rng.uniform(7, 11))
            canvas.fill(mask & (rows < line[None, :]), "mountain", (0.95, 0.96, 1.0), depth)


def _paint_ground(canvas: _Canvas, rng: np.random.Generator, kind: str, horizon: float, depth: Array) -> None:
    label, color = _GROUNDS[kind]
    rows = np.arange(_S, dtype=np.float32)[:, None]
    shade = 1.05 - 0.15 * np.clip((rows - horizon) / (_S - horizon), 0, 1) + 0.04 * _blobs(rng, 6)
    field = shade[..., None] * np.asarray(color, np.float32)
    canvas.fill(np.broadcast_to(rows >= horizon, (_S, _S)), label, field.astype(np.float32), depth)


def _paint_water(canvas: _Canvas, rng: np.random.Generator, kind: str, time: str, horizon: float, depth: Array) -> None:
    rows = np.arange(_S, dtype=np.float32)[:, None]
    if kind == "by the sea":
        shore = (
            horizon
            + rng.uniform(0.25, 0.5) * (_S - horizon)
            + rng.uniform(4, 12) * np.sin(np.linspace(0, rng.uniform(2, 6), _S) + rng.uniform(0, 6))
        )
        mask = (rows >= horizon) & (rows < shore[None, :])
    else:
        ry = rng.uniform(0.13, 0.22) * (_S - horizon)
        y = horizon + rng.uniform(0.22, 0.62) * (_S - horizon)
        x, rx = rng.uniform(0.2, 0.8) * _S, rng.uniform(0.28, 0.5) * _S
        angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        wobble = 1 + 0.12 * np.sin(2 * angles + rng.uniform(0, 6)) + 0.08 * np.sin(3 * angles + rng.uniform(0, 6))
        mask = _polygon([(x + rx * w * np.cos(a), y + ry * w * np.sin(a)) for a, w in zip(angles, wobble, strict=True)])
        mask &= rows >= horizon + 3
    zenith, low, _ = _TIMES[time]
    t = np.clip((rows - horizon) / (_S - horizon), 0, 1)[..., None]
    # water mirrors the sky, upside down, and adds its own blue
    sky = (1 - t) * np.asarray(low, np.float32) + t * np.asarray(zenith, np.float32)
    own = np.asarray([0.16, 0.42, 0.62], np.float32) * canvas.light
    field = np.broadcast_to(0.45 * sky + 0.55 * own, (_S, _S, 3)).astype(np.float32)
    canvas.fill(mask, "water", field, depth, lit=False)


def _paint_road(canvas: _Canvas, rng: np.random.Generator, horizon: float, depth: Array) -> None:
    color = _ROADS[int(rng.integers(len(_ROADS)))]
    start, end = rng.uniform(0.3, 0.7) * _S, rng.uniform(0.2, 0.8) * _S
    wide, bend, turns = rng.uniform(0.30, 0.46) * _S, rng.uniform(-0.16, 0.16) * _S, rng.uniform(0.6, 1.2)
    s = np.linspace(0, 1, 30)  # 0 at the horizon, 1 at the feet of the viewer
    y = horizon + 1 + s * (_S - horizon)
    x = end + (start - end) * s + bend * np.sin(np.pi * turns * s) * (0.4 + 0.6 * s)
    half = 0.5 * (0.05 * _S + (wide - 0.05 * _S) * s)
    left, right = list(zip(x - half, y, strict=True)), list(zip(x + half, y, strict=True))
    canvas.fill(_polygon(left + right[::-1]), "road", color, depth)


def _paint_house(canvas: _Canvas, rng: np.random.Generator, color: str, x: float, y: float, size: float) -> None:
    """A gabled house seen from a corner: its front is centered at x, stands at y and is `size` wide."""
    depth = float(canvas.depth[min(int(y), _S - 1), int(np.clip(x, 0, _S - 1))])
    wall = np.asarray(_HOUSES[color], np.float32)
    roof = np.asarray(_ROOFS[int(rng.integers(len(_ROOFS)))], np.float32)
    side = rng.choice([-1.0, 1.0])
    w, h, long = size / 2, size * rng.uniform(0.62, 0.8), size * rng.uniform(0.7, 1.1)
    gable = h + size * rng.uniform(0.42, 0.55)
    near, far = x + side * w, x + side * (w + long)

    def paint(points: list[tuple[float, float]], rgb: Array) -> None:
        canvas.fill(_polygon(points), "house", rgb, depth)

    paint([(near, y), (far, y), (far, y - h), (near, y - h)], 0.72 * wall)
    paint([(x - w, y), (x + w, y), (x + w, y - h), (x, y - gable), (x - w, y - h)], wall)
    eave = side * 0.12 * w
    paint([(x, y - gable), (x + side * long, y - gable), (far + eave, y - 0.93 * h), (near + eave, y - 0.93 * h)], roof)
    dark = np.asarray([0.30, 0.20, 0.14], np.float32)
    # at night somebody is at home
    glass = np.asarray([1.9, 1.5, 0.7] if canvas.light[0] < 0.5 else [0.62, 0.78, 0.88], np.float32)
    d = 0.17 * size
    paint([(x - d, y), (x + d, y), (x + d, y - 0.68 * h), (x - d, y - 0.68 * h)], dark)
    c, k = (near + far) / 2, 0.16 * size
    paint([(c - k, y - 0.30 * h), (c + k, y - 0.30 * h), (c + k, y - 0.74 * h), (c - k, y - 0.74 * h)], glass)


def _paint_tree(canvas: _Canvas, rng: np.random.Generator, kind: str, x: float, y: float, size: float) -> None:
    """A tree that stands at (x, y), `size` high."""
    depth = float(canvas.depth[min(int(y), _S - 1), int(np.clip(x, 0, _S - 1))])
    color = np.asarray(_TREES[kind], np.float32) * rng.uniform(0.9, 1.15)
    trunk = 0.055 * size
    corners = [(x - trunk, y), (x + trunk, y), (x + trunk, y - 0.45 * size), (x - trunk, y - 0.45 * size)]
    canvas.fill(_polygon(corners), "tree", (0.36, 0.24, 0.15), depth)
    if kind == "pine":
        for low, high, half in ((0.16, 0.62, 0.27), (0.40, 0.82, 0.21), (0.62, 1.0, 0.14)):
            tier = [(x - half * size, y - low * size), (x + half * size, y - low * size), (x, y - high * size)]
            canvas.fill(_polygon(tier), "tree", color * (0.85 + 0.35 * low), depth)
    else:
        r = 0.33 * size
        canvas.fill(_ellipse(x, y - 0.64 * size, r * rng.uniform(0.9, 1.15), r), "tree", color, depth)
        canvas.fill(_ellipse(x - 0.28 * r, y - 0.72 * size, 0.52 * r, 0.5 * r), "tree", 1.22 * color, depth)


def _place(
    rng: np.random.Generator, canvas: _Canvas, taken: list[tuple[float, float]], rows: tuple[float, float], half: float
) -> tuple[float, float] | None:
    """A spot (x, y) on dry ground whose neighborhood x ± half is still free, or None after a few attempts."""
    for _ in range(12):
        x, y = rng.uniform(0.08, 0.92) * _S, rng.uniform(*rows)
        label = canvas.labels[int(y), int(x)]
        if label not in (LABELS["grass"], LABELS["sand"]):
            continue
        if all(abs(x - other) > 0.9 * (half + other_half) for other, other_half in taken):
            taken.append((x, half))
            return float(x), float(y)
    return None


def _choice(rng: np.random.Generator, names: Mapping[str, object]) -> str:
    return str(list(names)[int(rng.integers(len(names)))])


def draw_scene(seed: int) -> Scene:
    """The scene of a seed; the same seed gives the same scene."""
    rng = np.random.default_rng([seed, 2404_07987])
    time = _choice(rng, _TIMES)
    ground = _choice(rng, _GROUNDS)
    mountains = _choice(rng, _MOUNTAINS) if rng.random() < 0.7 else ""
    surface = str(rng.choice(["by a lake", "by the sea", "by a road", ""], p=[0.27, 0.16, 0.32, 0.25]))
    house = _choice(rng, _HOUSES) if rng.random() < 0.62 else ""
    tree = _choice(rng, _TREES) if rng.random() < 0.72 or not house else ""

    canvas = _Canvas(_TIMES[time][2])
    horizon = rng.uniform(0.36, 0.56) * _S
    rows = np.arange(_S, dtype=np.float32)[:, None]
    # A flat ground: inverse depth grows linearly below the horizon. It starts beyond the nearest mountain's.
    plane = np.broadcast_to(0.15 + 0.85 * (rows - horizon) / (_S - horizon), (_S, _S)).astype(np.float32)
    _paint_sky(canvas, rng, time, horizon)
    if mountains:
        _paint_mountains(canvas, rng, mountains, horizon)
    _paint_ground(canvas, rng, ground, horizon, plane)
    if surface in ("by a lake", "by the sea"):
        _paint_water(canvas, rng, surface, time, horizon, plane)
    elif surface == "by a road":
        _paint_road(canvas, rng, horizon, plane)

    taken: list[tuple[float, float]] = []
    objects: list[tuple[float, Callable[[], None]]] = []
    below = _S - horizon
    if house:
        size = rng.uniform(0.17, 0.25) * _S
        spot = _place(rng, canvas, taken, (horizon + 0.15 * below, horizon + 0.72 * below), 1.1 * size)
        if spot is None:
            house = ""
        else:
            x, y = spot
            size *= 0.75 + 0.5 * (y - horizon) / below
            objects.append((y, lambda x=x, y=y, size=size: _paint_house(canvas, rng, house, x, y, size)))  # type: ignore[misc]
    trees = 0
    for _ in range(int(rng.integers(1, 5)) if tree else 0):
        size = rng.uniform(0.24, 0.36) * _S
        spot = _place(rng, canvas, taken, (horizon + 0.08 * below, horizon + 0.88 * below), 0.3 * size)
        if spot is not None:
            x, y = spot
            size *= 0.7 + 0.6 * (y - horizon) / below
            objects.append((y, lambda x=x, y=y, size=size: _paint_tree(canvas, rng, tree, x, y, size)))  # type: ignore[misc]
            trees += 1
    for _, paint in sorted(objects, key=lambda item: item[0]):
        paint()

    things = [f"a {house} house"] if house else []
    if trees:
        article = "an" if tree in ("oak", "autumn") else "a"
        things.append(f"{article} {tree} tree" if trees == 1 else f"{tree} trees")
    subject = " and ".join(things) or "an empty landscape"
    caption = ", ".join(part for part in (f"{subject} {ground} {surface}".strip(), mountains, time) if part)

    small = cv2.resize(np.clip(canvas.image, 0, 1), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    image = np.round(small * 255).astype(np.uint8)
    return Scene(image, canvas.labels[::2, ::2].copy(), canvas.depth[::2, ::2].copy(), caption)
