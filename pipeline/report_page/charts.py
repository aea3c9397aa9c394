"""Charts of a report page: Vega-Lite specifications, drawn as SVG by vl-convert when the page is written.

The page then needs no script and shows the same in a browser, in print and without a network. Colours are CSS
variables, so that one drawing serves light and dark; every series has a mark and a dash of its own, so that none needs
colour. What a mark stands for is its tooltip.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

from pipeline.visible_text import visible

SVG = "http://www.w3.org/2000/svg"
WIDTH, HEIGHT = 400, 230  # of the plot, without axes and legend
LONG_NAME = 22  # characters, beyond which names are listed under one another
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [10, 4], [1, 3])
COLOURS = len(SHAPES)  # --c0 to --c6 of page.css
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"  # vl-convert has the first, and the next is as wide
CONFIG = {
    "background": None,
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--ink)", "titleColor": "var(--ink)", "gridColor": "var(--line)",
        "domainColor": "var(--line)", "tickColor": "var(--line)", "labelFontSize": 12, "titleFontSize": 12,
        "titleFontWeight": "normal", "titlePadding": 8, "labelLimit": 220, "tickCount": 6,
    },
    "legend": {
        "labelColor": "var(--ink)", "titleColor": "var(--ink)", "orient": "top", "title": None, "labelFontSize": 12,
        "labelLimit": 380, "symbolSize": 90, "symbolStrokeWidth": 1, "symbolDash": [1, 0],
    },
    "text": {"fill": "var(--ink)"},
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A drawing for the template. svg: its markup. heads, rows: the same figures as a table. note: what is not seen."""

    title: str
    svg: str
    heads: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""


def palette(names: Sequence[str]) -> dict:
    """Return the encodings that tell series apart: colour and shape, in the order of `names`."""
    names = [*names]
    legend = {"columns": 1 if any(len(name) > LONG_NAME for name in names) else 3}

    def scale(values: Sequence) -> dict:
        return {"domain": names, "range": [values[at % len(values)] for at in range(len(names))]}

    colours = [f"var(--c{number})" for number in range(COLOURS)]
    shared = {"field": "series", "type": "nominal"}
    return {
        "color": shared | {"scale": scale(colours), "legend": legend},
        "shape": shared | {"scale": scale(SHAPES), "legend": legend},
    }


def dashes(names: Sequence[str]) -> dict:
    """Return the encoding of lines' dashes, in the order of `names`."""
    kinds = [DASHES[at % len(DASHES)] for at in range(len(names))]
    scale = {"domain": [*names], "range": kinds}
    return {"strokeDash": {"field": "series", "type": "nominal", "scale": scale, "legend": None}}


def axis(name: str, title: str, **scale) -> dict:
    """Return the encoding of a quantity. scale: of Vega-Lite, such as type="log" or zero=False."""
    return {"field": name, "type": "quantitative", "title": title, "scale": scale}


def line_layers(names: Sequence[str], x: dict, y: dict, points: bool) -> list[dict]:
    """Return lines of rows that have `series`, with a mark at each row where `points`."""
    common = {"x": x, "y": y, **palette(names)}
    colour = {"color": common["color"]}
    lines = {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"x": x, "y": y, **colour, **dashes(names)}}
    if not points:
        return [lines]
    marks = {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1}, "encoding": common}
    return [lines, marks]


def interval_layer(names: Sequence[str], horizontal: bool = False, **encoding) -> dict:
    """Return the bars of rows that have `low` and `high`; `encoding` places them."""
    along, across = ("x", "x2") if horizontal else ("y", "y2")
    colour = palette(names)["color"]
    place = {along: encoding.pop(along) | {"field": "low"}, across: {"field": "high"}}
    return {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": {**encoding, **place, "color": colour}}


def draw(name: str, title: str, layers: list[dict], rows: list[dict], height: int = HEIGHT, **more) -> str:
    """Return a chart as SVG markup, to be put into a page as it is.

    name: a word that no other chart of the page has. title: what a screen reader says. rows: the data.
    """
    import vl_convert

    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": WIDTH,
        "height": height,
        "data": {"values": rows},
        "layer": layers,
        "config": CONFIG,
        **more,
    }
    return _for_page(vl_convert.vegalite_to_svg(spec), name, title)


def _for_page(svg: str, name: str, title: str) -> str:
    """Return a drawing with a title, tooltips from its marks' descriptions, and ids that are its own on the page."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(svg)
    width, height = root.get("width"), root.get("height")
    for element in [*root.iter()]:
        for key, value in [*element.attrib.items()]:
            element.set(key, re.sub(r"url\(#(\w+)\)", rf"url(#{name}-\1)", value))
            if key == "id":
                element.set(key, f"{name}-{value}")
        described = element.attrib.pop("aria-label", None)
        for key in ("role", "aria-roledescription", "aria-hidden"):
            element.attrib.pop(key, None)
        if described and element.tag.endswith(("path", "text")):
            ElementTree.SubElement(element, f"{{{SVG}}}title").text = visible(described)
            element.attrib.pop("pointer-events", None)
    for key in ("width", "height", "version", "class"):
        root.attrib.pop(key, None)
    root.attrib |= {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": visible(title)}
    root.set("style", f"max-width:{float(width):.0f}px")
    return ElementTree.tostring(root, encoding="unicode")
