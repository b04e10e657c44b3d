"""Numbers and names as text, for people."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

MINUS = "−"
NONE = "–"
"""What stands for a missing value."""


_WRITTEN = {"w_o": "W_O", "qk": "QK", "rmsnorm": "RMSNorm", "mlp": "MLP", "rope": "RoPE"}


def pretty(name: object) -> str:
    """A name as people write it: ``moment_match`` as ``moment match``, ``w_o_alignment`` as ``W_O alignment``."""
    parts = re.split(r"(?<![^\W_])(w_o|qk|rmsnorm|mlp|rope)(?![^\W_])", str(name))
    return "".join(_WRITTEN.get(part, part.replace("_", " ")) for part in parts)


def heading(name: object) -> str:
    """A name as it begins a line: the first letter in upper case."""
    text = pretty(name)
    return text[:1].upper() + text[1:]


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with so many significant digits, without exponents where people would not write them."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size >= 9 or size < -4:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    rounded = round(value, digits - 1 - size)
    decimals = 0 if float(value).is_integer() else max(0, digits - 1 - size)
    return f"{rounded:,.{decimals}f}".replace("-", MINUS)


def effect_text(value: float) -> str:
    """An effect with two or three digits: effects are read against 0 and 1, so tiny ones are 0.000."""
    if not math.isfinite(value):
        return NONE
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"
    return "0.000" if text == "-0.000" else text.replace("-", MINUS)


def interval_text(low: float, high: float) -> str:
    """``[low, high]``; empty where there is none."""
    return "" if math.isnan(low) or math.isnan(high) else f"[{effect_text(low)}, {effect_text(high)}]"


def change_text(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """``+0.123 [0.100, 0.150]``: a change, with its sign, and its interval where there is one."""
    sign = "+" if value > 0 and effect_text(value) != "0.000" else ""
    return f"{sign}{effect_text(value)} {interval_text(low, high)}".strip()


def join(items: Sequence[str], separator: str = ", ") -> str:
    """``a, b and c``."""
    if len(items) < 2 or separator != ", ":
        return separator.join(items)
    return f"{separator.join(items[:-1])} and {items[-1]}"


def bytes_text(size: float | None) -> str:
    """``size`` in GiB or MiB."""
    if size is None:
        return "not measured"
    return f"{number(size / 2**30)} GiB" if size >= 2**30 else f"{number(size / 2**20)} MiB"


def seconds_text(seconds: float) -> str:
    """``seconds``, in minutes and hours where that reads better."""
    if not math.isfinite(seconds):
        return NONE
    if seconds < 120:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
