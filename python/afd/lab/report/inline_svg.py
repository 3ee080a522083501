"""Render matplotlib drawings as inline SVG; the page's CSS sets their colours and fonts."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# CSS custom properties of page.css; each replaces a placeholder colour in the drawing.
_NAMES = ["soft", "line", "card", "teacher", "base", "afd", "sft", "gan", "dmd"]
_NAMES += [f"phase{index}" for index in range(6)]
COLORS = {name: f"#0000{number:02x}" for number, name in enumerate(_NAMES, 1)}
_CSS = {"#000000": "currentColor"} | {color: f"var(--{name})" for name, color in COLORS.items()}

WIDTH, HEIGHT = 540, 264
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    # A $ in text is a literal dollar sign.
    "text.parse_math": False,
    "font.size": 12,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": COLORS["soft"],
    "axes.formatter.useoffset": False,
    "grid.color": COLORS["line"],
    "axes.formatter.limits": (-3, 5),
    "lines.linewidth": 2.2,
    "lines.markersize": 6.5,
    "lines.markerfacecolor": COLORS["card"],
    "lines.markeredgewidth": 1.8,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}
_STYLE |= {f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")}
for _axis in ("xtick", "ytick"):
    _STYLE |= {f"{_axis}.color": COLORS["soft"], f"{_axis}.major.size": 0, f"{_axis}.major.pad": 9}


def inline_svg(
    draw: Callable[[Axes], None], title: str, description: str, height: int = HEIGHT
) -> Markup:
    """Render what `draw` draws into an Axes as an accessible SVG, WIDTH x `height` pixels.

    The output is deterministic and independent of the process's matplotlib settings.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # The salt keeps element ids unique among the charts of a page.
        with matplotlib.rc_context(_STYLE | {"svg.hashsalt": f"{title}\n{description}"}):
            figure = Figure(figsize=(WIDTH / 72, height / 72))
            draw(figure.add_axes((0, 0, 1, 1)))
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style", "}clipPath")):
                element.remove(child)
        kept = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        kept.pop("clip-path", None)
        if element.tag == "g":
            kept.pop("id", None)
        if "d" in kept:
            kept["d"] = re.sub(r"(\.\d)\d+", r"\1", kept["d"])
        if "style" in kept:
            style = re.sub(r"#0000[0-9a-f]{2}", lambda m: _CSS[m[0]], kept["style"])
            kept["style"] = re.sub(r"font(-size|-family)?: [^;]*;? ?", "", style)
        element.attrib = kept
    root.attrib = {"viewBox": f"0 0 {WIDTH} {height}", "role": "img"}
    for index, (tag, text) in enumerate((("title", title), ("desc", description))):
        root.insert(index, ElementTree.Element(tag))
        root[index].text = text
    return Markup(ElementTree.tostring(root, encoding="unicode"))
