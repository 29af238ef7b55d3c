"""HTML as a tree of elements: text and attributes are escaped by the serialiser, never by hand."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from negrec_core.resources import resource

Element = ET.Element

# No script, no request to anywhere, whatever a log's strings hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def el(tag: str, *children: Element | str | None, **attributes: object) -> Element:
    """One element; a child that is None is left out.

    Attribute names are written with `_` for `-`, and with one at the end where Python has the word for
    itself (`class_`).
    """
    element = Element(tag, {name.strip("_").replace("_", "-"): str(v) for name, v in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child is not None and len(element):
            element[-1].tail = (element[-1].tail or "") + child
        elif child is not None:
            element.text = (element.text or "") + child
    return element


def named(text: str) -> Element:
    """A string of the log (an id, a title, a category), kept apart from the direction of the text around."""
    return el("bdi", text)


Cell = Element | str | None


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], numeric: str = "") -> Element:
    """A table whose first column names its rows.

    Args:
        caption: what it shows.
        columns: headers.
        rows: cells, as many as headers.
        numeric: one letter per column, `n` for figures, which are set to the right.
    """
    kinds = ["number" if kind == "n" else "text" for kind in numeric.ljust(len(columns))[: len(columns)]]
    head = [el("th", name, scope="col", class_=kind) for name, kind in zip(columns, kinds, strict=True)]
    body = []
    for first, *rest in rows:
        cells = [el("td", cell, class_=kind) for cell, kind in zip(rest, kinds[1:], strict=True)]
        body.append(el("tr", el("th", first, scope="row", class_=kinds[0]), *cells))
    whole = el(
        "table", el("caption", caption), el("thead", el("tr", *head)), el("tbody", *body), class_="data"
    )
    # Wide tables scroll by themselves; reachable by keyboard.
    return el("div", whole, class_="scroll", tabindex="0", role="group", aria_label=caption)


def figure(name: str, title: str, caption: str, plot: Element, figures: Element) -> Element:
    """A plot with its title, what it says in words, and its figures as a table to unfold.

    Args:
        name: id of the figure in the page.
        title: heading.
        caption: what it shows, units included; it is the plot's text alternative too.
        plot: an SVG element.
        figures: what was plotted, as a table.
    """
    plot.set("role", "img")
    plot.set("aria-label", f"{title}. {caption}")
    return el(
        "figure",
        el("h3", title),
        plot,
        el("figcaption", caption),
        el("details", el("summary", "Figures"), figures),
        id=name,
    )


def page(title: str, *children: Element) -> str:
    """A whole page that needs nothing from elsewhere."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", resource("conf", "report.css").read_text(encoding="utf-8")),
    )
    whole = el("html", head, el("body", *children), lang="en")
    return "<!DOCTYPE html>\n" + ET.tostring(whole, encoding="unicode", method="html") + "\n"
