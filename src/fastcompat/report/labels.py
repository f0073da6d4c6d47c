"""Where the names of points go so that they lie neither on each other nor on a point. Greedy, best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastcompat.report.headline import named

# Of a label at the charts' size, in pixels.
CHARACTER_WIDTH, LINE_HEIGHT = 7.2, 14.0
POINT_RADIUS, GAP = 6.0, 7.0


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def placed_labels(
    points: Sequence[Mapping[str, Any]],
    x_domain: Sequence[float],
    y_domain: Sequence[float],
    *,
    size: tuple[float, float],
    length: int,
) -> list[dict[str, Any]]:
    """Labels for those points whose name finds a free place to the right or left of it, in the order of `points`.

    points: with loss, reward and their intervals where there are any, told. size: of the plot in pixels. length: in
    characters, longer names are cut. Each label has loss, reward, label and align.
    """
    width, height = size

    def across(loss: float) -> float:
        return (loss - x_domain[0]) / (x_domain[1] - x_domain[0]) * width

    def down(reward: float) -> float:
        return (y_domain[1] - reward) / (y_domain[1] - y_domain[0]) * height

    taken = []
    for point in points:
        x, y = across(point["loss"]), down(point["reward"])
        taken.append(_Box(x - POINT_RADIUS, y - POINT_RADIUS, x + POINT_RADIUS, y + POINT_RADIUS))
        if "loss_low" in point:
            taken.append(_Box(across(point["loss_low"]), y - 2, across(point["loss_high"]), y + 2))
        if "reward_low" in point:
            taken.append(_Box(x - 2, down(point["reward_high"]), x + 2, down(point["reward_low"])))
    labels = []
    for point in points:
        y = down(point["reward"])
        text = named(point["told"], length)
        extent = CHARACTER_WIDTH * len(text)
        # Beyond the interval's ends, so that its line does not go through the name.
        ends = {"left": point.get("loss_high", point["loss"]), "right": point.get("loss_low", point["loss"])}
        for align, loss in ends.items():
            left = across(loss) + (GAP if align == "left" else -GAP - extent)
            box = _Box(left, y - LINE_HEIGHT / 2, left + extent, y + LINE_HEIGHT / 2)
            if left >= 0 and box.right <= width and not any(box.meets(other) for other in taken):
                taken.append(box)
                labels.append({"loss": loss, "reward": point["reward"], "label": text, "align": align})
                break
    return labels
