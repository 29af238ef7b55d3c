"""The report of a day: every section with its plot, figures counted one by one, no markup from the log."""

import datetime as dt
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from typer.testing import CliRunner
from warehouses import (
    PLAIN_SCORE,
    Context,
    Entry,
    publish,
    save_codebook,
    score_row,
    small_codebook,
    write_rows,
)

from jobs.cli import app
from jobs.context import JobContext, Warehouse
from jobs.gates import ACCEPTABLE, ILLEGAL
from jobs.report import figures, render
from jobs.report.coverage import label_coverage
from jobs.report.sections import SECTIONS
from negrec_core.blocklist import BlockList
from negrec_core.config import load_config
from negrec_core.delta import DeltaStore, Provenance
from negrec_core.generator import CODEBOOK
from train.coverage import coverage

DS, LABELLED = "2026-03-10", "2026-03-03"
DAYS = [f"2026-03-{day:02d}" for day in (1, 2, 3, 5, 8, 10)]
AFTER = ["2026-03-11", "2026-03-14"]
EVIL = "<script>alert('t')</script>\"><img src=x onerror=alert(1)>"
USERS = [EVIL, *(f"user {n}" for n in range(11))]
IDS = [(a, b, c) for a in range(4) for b in range(4) for c in range(3)]
ITEMS = {f"item {n}": codes for n, codes in enumerate(IDS)}
CATEGORIES = {item: (f"{EVIL}/x", "Toys/Games", "Toys/Old", "Food")[n % 4] for n, item in enumerate(ITEMS)}
PLOTS = {
    *("gates", "funnel", "coverage-1", "coverage-4", "codes-1", "codes-2", "codes-3", "collisions"),
    *("scores", "threshold", "entries", "categories"),
    *(f"daily-{name}" for name in ("events", "feedback", "dislike-share", "users")),
}
Rows = list[dict[str, Any]]


def end_of(day: str) -> dt.datetime:
    return dt.datetime.fromisoformat(f"{day}T23:59:59.999999+00:00")


def feedback_of(rng: np.random.Generator, day: str) -> Rows:
    rows = {}
    for user in USERS:
        for item in rng.choice(list(ITEMS), 4, replace=False).tolist():
            when = dt.datetime.fromisoformat(f"{day}T{rng.integers(24):02d}:{rng.integers(60):02d}:00+00:00")
            polarity = 1 if rng.random() < 0.5 else -1
            rows[user, item] = {"user_id": user, "item_id": item, "event_time": when, "polarity": polarity}
    return list(rows.values())


def build(root: Path) -> DeltaStore:
    rng = np.random.default_rng(5)
    codebook = save_codebook(root, small_codebook(), DS).version
    names = list(ITEMS)
    DeltaStore(root).create_tables()
    feedback = {day: feedback_of(rng, day) for day in DAYS + AFTER}
    sets = {
        user: [
            Entry(ITEMS[names[k]], float(-rank), names[k - 1], EVIL)
            for rank, k in enumerate(rng.choice(len(names), 3 + n % 3, replace=False))
        ]
        for n, user in enumerate(USERS[:-1])
    }
    past = {user: Context(names[n : n + 3], names[n + 4 : n + 9], 3, 5) for n, user in enumerate(USERS)}
    # Items 0 and 1 share their ID.
    items = ITEMS | {"item 1": ITEMS["item 0"]}
    store = publish(root, codebook, items, sets, ds=DS, contexts=past, categories=CATEGORIES)

    def add(table: str, rows: Rows, ds: str = DS) -> None:
        models = Provenance(models={CODEBOOK: codebook})
        write_rows(store, table, rows, ds, store.revision(table, ds) + 1, models)

    for day, rows in feedback.items():
        add("feedback", rows, day)
        shown = [{**row, "action": "exposure"} for row in rows]
        add("behavior_log", [{k: v for k, v in row.items() if k != "polarity"} for row in shown], day)
    add("item", [{"item_id": i, "category": CATEGORIES[i], "title": f"{EVIL} {i}"} for i in ITEMS])
    rows = [
        {"user_id": user, "rank": rank, "codes": entry.codes, "log_prob": entry.log_prob}
        for user, entries in sets.items()
        for rank, entry in enumerate(entries, 1)
    ]
    add("negative_item_set", rows)
    contexts = store.read("user_context", days=[DS]).drop(["ds"]).to_pylist()
    for row in contexts:
        row["anchor_time"] = end_of(DS)
        for event in (*row["negatives"], *row["positives"]):
            event["event_time"] = end_of(DAYS[0])
    add("user_context", contexts)
    curve = [
        {"threshold": 1 - share, "likes_blocked": share, "dislikes_blocked": share**0.5}
        for share in (0, 0.01, 0.05, 0.2)
    ]
    score = {**score_row(PLAIN_SCORE), "curve": curve, "likes_blocked": 0.01, "dislikes_blocked": 0.1}
    add("block_score", [{**score, "n_users": 9, "n_likes": 100, "n_dislikes": 50}])
    # The list names the versions that it was made from.
    version = store.version
    of_items = ("item_semantic_id", "item_rate", "item_taste", "item")
    of_users = ("user_context", "user_taste", "negative_item_set")
    inputs = {table: version(table) for table in (*of_items, *of_users, "block_score")}
    listed = store.read("block_list", days=[DS]).drop(["ds"]).to_pylist()
    for row in listed:
        row["score"] = float(rng.random())
    write_rows(store, "block_list", listed, DS, 2, Provenance(inputs, {CODEBOOK: codebook}))
    gates = [
        {"revision": revision, "name": name, "value": 0.1, "bound": "at most", "limit": 0.2, "note": EVIL}
        | {"passed": True, "accepted": False}
        for revision in (1, 2)
        for name in (*ACCEPTABLE, ILLEGAL)
    ]
    gates[-1] |= {"value": 3.0, "limit": 0.0, "passed": False}
    gates[-2] |= {"value": None, "limit": 0.25}
    add("gate", gates)
    labels = []
    later = pd.DataFrame([row for day in DAYS[3:] for row in feedback[day]])
    for user, own in later.groupby("user_id"):
        liked, disliked = (sorted(set(own.loc[own["polarity"] == p, "item_id"])) for p in (1, -1))
        near = [{"item_id": i, "via": v, "score": 1.0} for v, i in zip(disliked, names, strict=False)]
        labels.append(
            {
                "user_id": user,
                "anchor_time": end_of(LABELLED),
                "future_negatives": disliked,
                "expanded_negatives": [one for one in near if one["item_id"] not in disliked],
                "future_positives": liked,
            }
        )
    add("future_feedback", labels)
    return store


class Page(HTMLParser):
    """A page as a browser's parser sees it."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.texts: dict[str, str] = {}
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        for name in self.ids():
            self.inside.setdefault(name, []).append(tag)
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        for name in self.ids():
            self.texts[name] = self.texts.get(name, "") + data

    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.open if "id" in attributes]


class Site:
    def __init__(self, root: Path, spark: SparkSession) -> None:
        self.root, self.spark = root, spark
        self.store = DeltaStore(root)

    def warehouse(self) -> Warehouse:
        settings = ["generation.set_size=6", "gates.min_category_exposures=2", "labels.horizon_days=7"]
        warehouse = Warehouse(self.root, load_config([], settings, {}))
        warehouse.spark = self.spark
        return warehouse

    def ctx(self) -> JobContext:
        return JobContext(self.warehouse(), DS)

    def page(self, ds: str = DS) -> Page:
        return Page(render(self.warehouse(), ds))

    def feedback(self, days: list[str]) -> pd.DataFrame:
        return self.store.read("feedback", days=days).to_pandas()


@pytest.fixture(scope="module")
def base(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("report") / "warehouse"
    build(root)
    return Site(root, spark)


@pytest.fixture(scope="module")
def whole(base: Site) -> Page:
    """The page as the command writes it."""
    out = base.root.parent / "new" / "report.html"
    arguments = ["--warehouse", str(base.root), "report", "--ds", DS, "--out", str(out)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert str(out) in result.stdout.replace("\n", "")
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture
def site(base: Site, tmp_path: Path) -> Site:
    shutil.copytree(base.root, tmp_path / "warehouse")
    return Site(tmp_path / "warehouse", base.spark)


def test_every_section_and_plot_is_there_with_words_and_figures(whole: Page) -> None:
    sections = {attributes["id"] for tag, attributes in whole.tags if tag == "section"}
    assert sections == {section.name for section in SECTIONS}
    links = {attributes["href"] for tag, attributes in whole.tags if tag == "a"}
    assert links == {f"#{section.name}" for section in SECTIONS}
    plots = {attributes["id"] for tag, attributes in whole.tags if tag == "figure"}
    assert plots == {f"plot-{name}" for name in PLOTS}
    for name in plots:
        inside = whole.inside[name or ""]
        assert {"svg", "figcaption", "table", "caption", "th"} <= set(inside), name
        assert {"rect", "circle"} & set(inside), name
    for tag, attributes in whole.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"] or "") > 20
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert "Not there" not in whole.text


def test_nothing_is_fetched_and_no_script_can_run(whole: Page) -> None:
    tags = {tag for tag, _ in whole.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image"}
    for _, attributes in whole.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")]
        assert (attributes.get("href") or "#").startswith("#")
    (policy,) = [a["content"] for t, a in whole.tags if t == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in (policy or "")
    assert "script-src" not in (policy or "")


def test_strings_of_the_log_are_shown_as_they_are(whole: Page) -> None:
    assert f"{EVIL} item " in whole.texts["users"]  # titles
    assert f"{EVIL}/x" in whole.texts["users"]  # category paths
    assert EVIL.split("/")[0] in whole.texts["plot-categories"]  # top categories
    assert EVIL in whole.texts["gates"]


def test_the_sample_can_hold_an_odd_user(site: Site) -> None:
    """All users fit into the sample when the others have no list."""
    rows = site.store.read("block_list", days=[DS]).drop(["ds"]).to_pylist()
    made = site.store.commit_of("block_list", DS).provenance
    write_rows(site.store, "block_list", [r for r in rows if r["user_id"] == EVIL], DS, 3, made)
    page = site.page()
    assert f"User {EVIL}" in page.texts["users"]
    assert "script" not in {tag for tag, _ in page.tags}


def test_the_funnel_counts_what_is_there(base: Site, whole: Page) -> None:
    log = figures.log_figures(base.ctx())
    given = base.feedback(DAYS)
    assert (log.first, log.last) == (DAYS[0], DS)
    assert log.events == len(given)
    assert log.dislikes == (given["polarity"] == -1).sum()
    assert log.likes == (given["polarity"] == 1).sum()
    assert log.active == log.judged == len(USERS)
    entries = figures.entries_per_user(base.ctx())
    held = base.store.read("block_list", days=[DS]).to_pandas().groupby("user_id").size().value_counts()
    assert entries == held.to_dict()
    assert f"{log.dislikes:,}" in whole.texts["plot-funnel"]


def test_coverage_is_that_of_evaluation(base: Site) -> None:
    labels = base.store.read("future_feedback", days=[DS]).to_pandas()
    graph = pd.DataFrame(
        [
            {"item_id": one["via"], "neighbor_id": one["item_id"], "rank": 1, "user": user}
            for user, near in zip(labels["user_id"], labels["expanded_negatives"], strict=True)
            for one in near
        ]
    )
    category = pd.Series(CATEGORIES)
    found = label_coverage(base.ctx())
    past, future = base.feedback(DAYS[:3]), base.feedback(DAYS[3:])
    users = set(future.loc[future["polarity"] == -1, "user_id"])
    assert (found.ds, found.users) == (DS, len(users))
    # Neighbours differ from user to user here, so users are looked at one by one.
    each = [
        coverage(
            past[past["user_id"] == user],
            future[future["user_id"] == user],
            category,
            graph[graph["user"] == user].drop_duplicates(["item_id", "neighbor_id"]),
            1,
        )
        for user in users
    ]
    for top, shares in zip(("top-1", "top-4"), found.covered, strict=True):
        names = ("next", "horizon", "horizon + Swing")
        assert shares == pytest.approx([np.mean([one[top][name].value for one in each]) for name in names])


def test_scores_codes_and_categories_are_counted(base: Site) -> None:
    scores = base.store.read("block_list", ["score"], days=[DS])["score"].to_numpy()
    counts = np.histogram(scores, figures.SCORE_BINS, (0, 1))[0]
    assert figures.score_counts(base.ctx(), DS) == counts.tolist()
    codes = figures.code_figures(base.ctx())
    assert codes.shared == {1: len(ITEMS) - 2, 2: 1}
    assert codes.health.collision_rate == pytest.approx(2 / len(ITEMS))
    assert [int(usage.sum()) for usage in codes.usage] == [len(ITEMS)] * 3
    blocks = BlockList.open(base.root, today=dt.date.fromisoformat(DS))
    shown = base.store.read("behavior_log", days=[DS]).to_pandas()[["user_id", "item_id"]].drop_duplicates()
    shown["blocked"] = [blocks.why(*pair).blocked for pair in shown.itertuples(index=False)]
    shown["top"] = shown["item_id"].map(CATEGORIES).str.split("/").str[0]
    want = shown.groupby("top")["blocked"].agg(["size", "sum"])
    rows = {row["category"]: row for row in figures.category_figures(base.ctx(), len(USERS))}
    assert set(rows) == set(want.index)
    assert 0 < sum(row["blocked"] for row in rows.values()) < len(shown)
    for top, row in rows.items():
        assert (row["n"], row["blocked"]) == tuple(want.loc[top])


def test_what_followed_is_judged_as_the_reader_does(base: Site, whole: Page) -> None:
    blocks = BlockList.open(base.root, today=dt.date.fromisoformat(DS))
    after = base.feedback(AFTER)
    after = after[after["user_id"].isin(USERS[:-1])].drop_duplicates(["user_id", "item_id", "polarity"])
    blocked = np.array([blocks.why(row.user_id, row.item_id).blocked for row in after.itertuples()])
    liked = (after["polarity"] == 1).to_numpy()
    found = figures.outcome(base.ctx(), len(USERS) - 1)
    assert (found.likes, found.dislikes) == (liked.sum(), (~liked).sum())
    assert (found.likes_blocked, found.dislikes_blocked) == (
        (liked & blocked).sum(),
        (~liked & blocked).sum(),
    )
    assert 0 < blocked.sum() < len(blocked)
    assert "What happened next" in whole.texts["users"]
    assert "not logged yet" not in whole.texts["summary"]


def empty(site: Site, *tables: str, days: list[str] | None = None) -> None:
    for table in tables:
        for ds in days or [DS]:
            write_rows(site.store, table, [], ds, site.store.revision(table, ds) + 1)


def test_a_day_whose_future_is_not_there_yet_says_so(site: Site) -> None:
    for table in ("feedback", "behavior_log"):
        empty(site, table, days=AFTER)
    empty(site, "future_feedback")
    page = site.page()
    assert "not logged yet" in page.texts["summary"]
    assert "nothing is labelled up to ds=2026-03-10" in page.texts["funnel"]
    assert "no feedback after this day yet" in page.texts["users"]
    assert {"plot-gates", "plot-funnel", "plot-scores", "plot-categories"} <= set(page.inside)


def test_a_day_without_a_list_says_so_and_shows_the_rest(site: Site) -> None:
    empty(site, "block_list", "block_score", "gate")
    page = site.page()
    assert "The list of this day was withdrawn or is empty." in page.text
    for name, n in {"summary": 1, "gates": 2, "scores": 3, "drift": 1, "users": 1}.items():
        assert page.texts[name].count("Not there:") == n, name
    assert {"plot-funnel", "plot-coverage-1", "plot-codes-1", "plot-daily-events"} <= set(page.inside)
    assert "plot-scores" not in page.inside


def test_a_warehouse_of_an_earlier_release_without_gates(site: Site) -> None:
    shutil.rmtree(site.store.path("gate"))
    page = site.page()
    assert "Not there: table gate" in page.texts["gates"]
    assert "plot-categories" in page.inside


def test_a_day_of_which_nothing_is_known_is_one_line(base: Site, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = CliRunner().invoke(
        app, ["--warehouse", str(base.root), "report", "--ds", "2027-01-01", "--out", str(out)]
    )
    assert "nothing is known of ds=2027-01-01" in str(result.exception)
    assert not out.exists()


def test_lists_of_several_days_are_compared(site: Site) -> None:
    earlier = DAYS[-2]
    for table in ("block_list", "gate"):
        rows = site.store.read(table, days=[DS]).drop(["ds"]).to_pylist()
        write_rows(site.store, table, rows, earlier, 1, site.store.commit_of(table, DS).provenance)
    page = site.page()
    drift = {f"plot-daily-gate-{name.replace('_', '-')}" for name in (*ACCEPTABLE, ILLEGAL)}
    assert {"plot-daily-list-users", "plot-daily-list-score"} | drift <= set(page.inside)
    assert f"The dashed outline is the list of {earlier}" in page.texts["plot-scores"]
