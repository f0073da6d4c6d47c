"""What the figures of an H100 should be, written down before any was measured; the summary shows it beside each.

Bandwidths are predicted as shares of the card's own copy, so that they hold for other memory too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of a step whose name matches, in a case that does: a call's figure in this unit lies between these two."""

    step: str
    case: str = ""
    call: str
    unit: str
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == 0:
            return f"up to {self.high:g}"
        return f"{self.low:g} to {self.high:g}" if self.high < LARGE else f"over {self.low:g}"

    def verdict(self, value: float) -> str:
        """=, or on which side of it."""
        return "=" if self.low <= value <= self.high else "<" if value < self.low else ">"


LARGE = 1e12
PRODUCT_SHARE = "of the product's rate"
COPY_SHARE = "of the copy's bandwidth"


def _rate(step: str, case: str, call: str, low: float, high: float) -> Prediction:
    return Prediction(step=step, case=case, call=call, unit="TFLOP/s", low=low, high=high)


def _share(step: str, case: str, call: str, low: float, high: float) -> Prediction:
    return Prediction(step=step, case=case, call=call, unit=COPY_SHARE, low=low, high=high)


def _figure(step: str, case: str, call: str, unit: str, low: float, high: float) -> Prediction:
    return Prediction(step=step, case=case, call=call, unit=unit, low=low, high=high)


# The first that matches counts.
PREDICTIONS = (
    _rate("hardware", "", "product", 770, 800),
    # 3.0 on an H100, 4.3 on an H200.
    _figure("hardware", "", "device copy", "TB/s", 2.9, 4.4),
    _rate("linear_nll|head_tiles", " 1536 ->", "linear_nll", 420, 480),
    _rate("linear_nll|head_tiles", " 1536 ->", "linear_nll, all five", 357, 408),
    _rate("linear_nll", "soft cap", "linear_nll", 350, 420),
    _rate("linear_nll", "soft cap", "linear_nll, all five", 297, 357),
    _rate("linear_nll", " 4096 ->", "linear_nll", 500, 560),
    _rate("linear_nll", " 4096 ->", "linear_nll, all five", 425, 476),
    _rate("linear_nll", " 4096 ->", "cublas|cublas_rows", 600, 690),
    _rate("linear_nll", " 4096 ->", "cuBLAS product alone", 700, 800),
    _share("packed_nll", "", "packed_nll", 0.87, 0.97),
    _share("packed_nll", "", "packed_nll, all five", 0.73, 0.87),
    _share("elementwise", "rms_norm of .* with a residual", "rms_norm", 0.87, 0.93),
    _share("elementwise", "rotate_", "rotate_", 0.77, 0.87),
    _share("elementwise", "gated", "gated", 0.87, 0.93),
    _rate("attention", "1 x 2048.* of 128", "forest_attention", 200, 300),
    _rate("attention", "3 prompts x 16", "forest_attention", 80, 150),
    _rate("attention", "4 contexts x 8", "forest_attention", 200, 280),
    _figure("engine_0_5b|profile_0_5b", "", "fastcompat", "packed tokens/s", 330e3, 420e3),
    _figure("engine_8b|profile_8b", "", "fastcompat", "packed tokens/s", 33e3, 39e3),
    _figure("engine_8b", "", "fastcompat", "MFU", 0.52, 0.60),
    _figure("engine_", "", "fastcompat", "times length-sorted", 2, 3),
    _figure("engine_", "", "fastcompat", "times padded", 8, LARGE),
    _figure("profile_0_5b", "", "one pack", "no kernel runs", 0.02, 0.06),
    _figure("profile_8b", "", "one pack", "no kernel runs", 0, 0.01),
    _figure("profile_0_5b", "", "one pack", "share of _range_kernel", 0.27, 0.33),
    _figure("profile_0_5b", "", "one pack", "share of _attention_kernel", 0, 0.10),
    _figure("profile_8b", "", "one pack", "peak GiB beside the weights", 6, 8),
    _figure("profile_", "", "one pack", "host reads", 0, 1.5),
    _figure("profile_0_5b", "", "300 tokens", "ms", 8, 20),
    _figure("pipeline", "", "score", "waiting for units", 0, 0.05),
    _figure("tests", "", "pytest", "seconds", 85, 110),
)


def predicted(step: str, case: str, call: str, unit: str) -> Prediction | None:
    for prediction in PREDICTIONS:
        if (
            prediction.unit == unit
            and re.match(prediction.step, step)
            and re.search(prediction.case, case)
            and re.fullmatch(prediction.call, call)
        ):
            return prediction
    return None
