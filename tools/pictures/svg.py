"""SVG elements as text: a rectangle, a text, a path, and the document around them."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape, quoteattr

FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
INK, SOFT, LINE = "#1f2933", "#64707d", "#98a1ab"
TIERS = {"easy": "#3f9b74", "mid": "#e3a32f", "hard": "#c9504f"}


def element(name: str, text: str | None = None, **attributes: object) -> str:
    """Return one element; ``stroke_width`` is written ``stroke-width``, numbers with at most one decimal."""
    shown = "".join(f" {key.replace('_', '-')}={quoteattr(_number(value))}" for key, value in attributes.items())
    return f"<{name}{shown}/>" if text is None else f"<{name}{shown}>{escape(text)}</{name}>"


def label(x: float, y: float, text: str, **attributes: object) -> str:
    """Return a text element whose middle is at x, unless ``text_anchor`` says otherwise."""
    return element("text", text, **{"x": x, "y": y, "text_anchor": "middle", "fill": INK, **attributes})


def document(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """Return a whole SVG file with a white background, and a title for readers who cannot see the picture."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_number(width)} {_number(height)}" '
        f'width="{_number(width)}" role="img" font-family={quoteattr(FONT)} font-size="13">'
    )
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{SOFT}"/></marker></defs>'
    )
    ground = element("rect", x=0, y=0, width=width, height=height, rx=8, fill="#ffffff")
    return "\n".join([head, element("title", title), arrow, ground, *parts, "</svg>", ""])


def _number(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
