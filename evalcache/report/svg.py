"""A chart's specification → SVG that stands in a page: Vega-Lite, drawn by vl-convert. The only import of it.

Colours are the page's own (``var(--…)``, ``currentColor``, hatching by ``url(#…)``), so that one drawing serves light, dark and
paper. What Vega writes for screen readers is taken out: the drawing is one image with a name, and its numbers are in a table
beneath it; what it says of a mark becomes the mark's title, which a pointer shows.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

from evalcache.errors import ReportError

_LONG = re.compile(r"(\d+\.\d\d)\d+")
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_MEASURED, _SHOWN = 13.5, 12  # pixels: texts are laid out for a larger size, since the reader's fonts may be wider than ours
_CONFIG = {
    "background": None,
    "font": _FONT,
    "padding": 2,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--ink)", "titleColor": "var(--ink)", "titleFontWeight": "normal", "labelFontSize": _MEASURED,
        "titleFontSize": _MEASURED, "gridColor": "var(--line)", "domain": False, "tickColor": "var(--line)", "titlePadding": 8,
        "labelPadding": 6,
    },
    "legend": {
        "labelColor": "var(--ink)", "titleColor": "var(--ink)", "labelFontSize": _MEASURED, "titleFontSize": _MEASURED,
        "orient": "top", "titleFontWeight": "normal", "symbolStrokeWidth": 1.5, "labelLimit": 320, "columnPadding": 16,
    },
    "text": {"color": "var(--ink)", "fontSize": _MEASURED},
    "title": {"color": "var(--ink)", "fontSize": 13, "fontWeight": 600, "anchor": "start", "frame": "group"},
}  # fmt: skip


def draw(spec: Mapping[str, Any], name: str) -> str:
    """A Vega-Lite specification as an ``<svg>`` element that is called ``name``.

    Cost: 30 ms; half a second for the first.

    Raises:
        ReportError: vl-convert is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise ReportError(f"the charts cannot be drawn: {error}", hint="pip install 'llm-evalcache[report]'") from error
    whole = {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", **spec, "config": _CONFIG}
    drawn = vl_convert.vegalite_to_svg(whole, vl_version="6.4", allowed_base_urls=[])
    root = ET.fromstring(drawn)
    seen = {name: root.get(name, "") for name in ("viewBox", "width")}
    _tidy(root)
    root.attrib = {**seen, "role": "img", "aria-label": name}
    return ET.tostring(root, encoding="unicode").replace(f'font-size="{_MEASURED}px"', f'font-size="{_SHOWN}px"')


def _tidy(element: ET.Element) -> None:
    """Bring the drawing down to what is seen."""
    element.tag = element.tag.rpartition("}")[2]
    told = element.attrib.pop("aria-label", None) if element.get("aria-roledescription") not in ("axis", "legend") else None
    element.attrib = {
        name: _LONG.sub(r"\1", value)  # places, which need no more; what is written stays as it is
        for name, value in element.attrib.items()
        if not name.startswith(("aria-", "{")) and name not in ("role", "class", "pointer-events", "font-family")
        and (name, value) not in (("opacity", "1"), ("stroke-width", "1"))
    }  # fmt: skip
    for child in list(element):
        unseen = child.get("opacity") == "0" or child.get("display") == "none"
        if unseen or (child.get("class") in ("background", "foreground") and not child.get("fill") and not child.get("stroke")):
            element.remove(child)
        else:
            _tidy(child)
            if child.tag == "g" and not len(child):
                element.remove(child)
    if told and element.tag != "g":
        title = ET.Element("title")
        title.text = told
        element.insert(0, title)
