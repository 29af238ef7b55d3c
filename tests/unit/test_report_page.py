"""The report's page and plots: strings stay strings, scales hold what is drawn."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from jobs.report.charts import Bar, bars, histogram, lines, round_ticks
from jobs.report.markup import Element, el, figure, named, page, table


class Seen(HTMLParser):
    """What a browser's parser finds in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


# Carriage returns are line feeds to every parser; NUL is nothing to HTML.
STRINGS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00")) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        "</style><img src=x onerror=alert(1)>",
        "\"><svg onload='x'>",
        "&lt;b&gt;",
        "]]>",
    ]
)


@given(STRINGS)
def test_a_string_is_the_same_string_in_the_page_and_no_markup(text: str) -> None:
    def made(of: str) -> Element:
        plot = bars([Bar(of, 1, of)])
        return figure("plot", of, of, plot, table(of, [of, "n"], [[named(of), of]]))

    seen, plain = (Seen(page(of, made(of))) for of in (text, "x"))
    assert [tag for tag, _ in seen.tags] == [tag for tag, _ in plain.tags]
    assert [set(attributes) for _, attributes in seen.tags] == [
        set(attributes) for _, attributes in plain.tags
    ]
    for ours, theirs in zip(seen.tags, plain.tags, strict=True):
        if theirs[1].get("aria-label") == "x":
            assert ours[1]["aria-label"] == text
    if text.strip():
        assert "".join(seen.text).count(text) >= 4


def test_children_keep_their_order_and_none_is_left_out() -> None:
    text = page("t", el("p", "a", el("b", "c"), "d", None, el("i"), "e"))
    assert "<p>a<b>c</b>d<i></i>e</p>" in text


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e9), st.integers(1, 9))
def test_ticks_are_round_and_within(low: float, span: float, most: int) -> None:
    ticks = round_ticks(low, low + span, most)
    assert 1 <= len(ticks) <= most + 1
    assert ticks == sorted(set(ticks)) or span / max(abs(low), 1) < 1e-9
    slack = 1e-6 * max(abs(low), span)
    assert all(low - slack <= tick <= low + span + slack for tick in ticks)


def numbers(svg: Element, tag: str, *names: str) -> list[tuple[float, ...]]:
    return [tuple(float(one.get(name, "nan")) for name in names) for one in svg.iter(tag)]


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=400), st.floats(0, 1))
def test_columns_stay_in_their_frame_and_have_the_right_heights(heights: list[int], at: float) -> None:
    n = len(heights)
    edges = [k / n for k in range(n + 1)]
    svg = histogram(edges, heights, "x", "y", (at, "here"), outline=heights)
    _, _, width, height = map(float, svg.get("viewBox", "").split())
    boxes = numbers(svg, "rect", "x", "y", "width", "height")
    assert len(boxes) <= 150
    for x, y, w, h in boxes:
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    if n <= 150:
        tallest = max(heights)
        drawn = sorted(h for *_, h in boxes)
        want = sorted(value / tallest for value in heights if value) if tallest else []
        scale = drawn[-1] if drawn else 0
        visible = [share * scale for share in want if share * scale > 0.2]
        for ours, theirs in zip(drawn[::-1], visible[::-1], strict=False):
            assert abs(ours - theirs) < 0.2


@given(st.lists(st.none() | st.floats(0, 1e6), max_size=40), st.none() | st.floats(0, 10))
def test_a_line_has_a_point_per_value_and_gaps_where_there_is_none(
    values: list[float | None], limit: float | None
) -> None:
    svg = lines([("a", list(enumerate(values)))], "x", "y", limit=limit)
    (path,) = [one.get("d", "") for one in svg.iter("path") if one.get("class") == "line-one"]
    assert path.count("M") + path.count("L") == sum(value is not None for value in values)
    starts = sum(v is not None and (n == 0 or values[n - 1] is None) for n, v in enumerate(values))
    assert path.count("M") == starts
    if len(values) <= 31:
        assert len(list(svg.iter("circle"))) == sum(value is not None for value in values)
    assert sum(one.get("class") == "mark" for one in svg.iter("path")) == (limit is not None)


def test_a_bar_beyond_its_scale_is_cut_there_and_a_limit_is_drawn() -> None:
    svg = bars([Bar("a", 5, "5", most=2, limit=1, kind="failed"), Bar("b" * 99, 1, "1", most=2)])
    tracks = [one for one in svg.iter("rect") if one.get("class") == "track"]
    assert [one.get("width") for one in svg.iter("rect") if one.get("class") == "failed"] == ["360"]
    assert [one.get("width") for one in svg.iter("rect") if one.get("class") == "one"] == ["180"]
    assert len(tracks) == 2
    assert len([one for one in svg.iter("path") if one.get("class") == "mark"]) == 1
    assert all(len(one.text or "") <= 30 for one in svg.iter("text"))
