"""The sections of the page, each a figure or more, made one after another."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs.context import JobContext
from jobs.report import charts, figures
from jobs.report.charts import Bar, count, figure_of, percent
from jobs.report.coverage import TOP, label_coverage
from jobs.report.markup import Element, el, figure, named, table
from jobs.report.users import sample_of_users, user_card
from negrec_core.errors import MissingError

Parts = Iterator[Element]
_SAMPLE = 6
_CATEGORIES = 20


@dataclass
class Report:
    """A day, and what several sections of its page show."""

    ctx: JobContext
    entries: dict[int, int] = field(default_factory=dict)

    @property
    def ds(self) -> str:
        return self.ctx.ds

    @property
    def n_listed(self) -> int:
        return sum(self.entries.values())

    @property
    def n_entries(self) -> int:
        return sum(n * users for n, users in self.entries.items())

    def require_list(self) -> None:
        """Raise MissingError where no list of the day is published."""
        figures.require(self.ctx, "block_list")


@dataclass(frozen=True)
class Section:
    """A part of the page: its id, heading, what it is about, and what makes its contents, each on its own."""

    name: str
    title: str
    about: str
    makes: tuple[Callable[[Report], Parts], ...]


def absent(why: str) -> Element:
    """What stands where something is missing."""
    return el("p", f"Not there: {why}.", class_="absent")


def _summary(report: Report) -> Parts:
    tiles: list[tuple[str, str, str]] = []
    if report.entries:
        tiles.append(("Users with a list", count(report.n_listed), f"{report.n_entries:,} entries"))
    try:
        score = figures.score_row(report.ctx)
    except MissingError:
        pass
    else:
        tiles.append(("Blocked from score", f"{score['threshold']:.3f}", "the published threshold"))
        if score["likes_blocked"] is not None:
            of = f"of {count(score['n_dislikes'] or 0)} held-back"
            tiles.append(("Dislikes blocked", percent(score["dislikes_blocked"]), of))
            of = f"of {count(score['n_likes'] or 0)} held-back"
            tiles.append(("Likes blocked", percent(score["likes_blocked"]), of))
    if report.entries:
        try:
            real = figures.outcome(report.ctx, report.n_listed)
        except MissingError:
            tiles.append(("What followed", "–", "not logged yet"))
        else:
            for name, blocked, n in (
                ("Dislikes blocked since", real.dislikes_blocked, real.dislikes),
                ("Likes blocked since", real.likes_blocked, real.likes),
            ):
                share = percent(blocked / n) if n else "–"
                tiles.append((name, share, f"{blocked:,} of {n:,} that followed"))
    if not tiles:
        raise MissingError(f"table block_list: no rows of ds={report.ds}")
    yield el(
        "dl",
        *(el("div", el("dt", name), el("dd", value, el("small", note))) for name, value, note in tiles),
        class_="tiles",
    )


def _gates(report: Report) -> Parts:
    rows = figures.gate_rows(report.ctx)[report.ds]
    verdicts = [_verdict(row) for row in rows]
    plotted = []
    for row, verdict in zip(rows, verdicts, strict=True):
        value, limit, above = row["value"], row["limit"], row["bound"] == "at most"
        sign = "≤" if above else "≥"
        text = "not measured" if value is None else f"{figure_of(value)}, limit {sign} {figure_of(limit)}"
        most = max(2 * limit, value or 0) or 1
        kind = "failed" if verdict in ("failed", "accepted") else "one"
        plotted.append(Bar(f"{row['name']}: {verdict}", value or 0, text, most, kind, limit))
    whole = table(
        "Gates, their values and limits",
        ["gate", "value", "limit", "result", "of"],
        [
            [
                row["name"],
                "–" if row["value"] is None else figure_of(row["value"]),
                f"{row['bound']} {figure_of(row['limit'])}",
                el("span", verdict, class_="bad" if verdict in ("failed", "accepted") else "good"),
                named(row["note"] or ""),
            ]
            for row, verdict in zip(rows, verdicts, strict=True)
        ],
        "tnttt",
    )
    failed = sum(verdict == "failed" for verdict in verdicts)
    said = f"{failed} of {len(rows)} failed" if failed else f"all {len(rows)} passed or were accepted"
    caption = (
        f"Each gate's value against its limit, the dashed line, for revision {rows[0]['revision']} of the"
        f" list; {said}. Every gate has a scale of its own."
    )
    yield figure("plot-gates", "Gates against their limits", caption, charts.bars(plotted), whole)


def _verdict(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "passed"
    return "passed" if row["passed"] else "accepted" if row["accepted"] else "failed"


def _funnel(report: Report) -> Parts:
    log = figures.log_figures(report.ctx)
    given = log.dislikes + log.likes
    counted = [
        ("events", log.events, log.events, f"logged from {log.first} to {log.last}"),
        ("feedback", given, log.events, "events that are a like or a dislike"),
        ("likes", log.likes, log.events, ""),
        ("dislikes", log.dislikes, log.events, ""),
        ("users in the log", log.active, log.active, ""),
        ("users with feedback", log.judged, log.active, ""),
    ]
    try:
        users, disliked = figures.contexts(report.ctx)
        counted += [
            ("users with a context", users, log.active, f"as of {report.ds}"),
            ("users with a dislike in it", disliked, log.active, ""),
        ]
    except MissingError as error:
        yield absent(str(error))
    if report.entries:
        most = report.ctx.config.generation.set_size * report.n_listed
        counted += [
            ("users with a list", report.n_listed, log.active, ""),
            ("entries in the lists", report.n_entries, max(most, report.n_entries), "of the size asked for"),
        ]
    rows = [
        Bar(
            name,
            n,
            f"{n:,} ({percent(n / of)})" if of else "0",
            of or 1,
            "two" if name == "dislikes" else "one",
        )
        for name, n, of, _ in counted
    ]
    caption = (
        f"From the log of {log.first} to {log.last} to the list of {report.ds}. Feedback is a share of the"
        " events, users of the users in the log, entries of the set size asked for;"
        f" {log.refused:,} rows of the log were refused and are in quarantine."
    )
    held = table(
        "The funnel",
        ["step", "number", "share", "what"],
        [[name, f"{n:,}", percent(n / of) if of else "–", what] for name, n, of, what in counted],
        "tnnt",
    )
    yield figure("plot-funnel", "Funnel of the log", caption, charts.bars(rows), held)


def _coverage(report: Report) -> Parts:
    found = label_coverage(report.ctx)
    days = report.ctx.config.labels.horizon_days
    names = ["next dislike", f"{days} days", f"{days} days + Swing neighbours"]
    plots = []
    for top, shares in zip(TOP, found.covered, strict=True):
        of = "the main negative interest" if top == 1 else f"the {top} main negative interests"
        caption = (
            f"Mean share of {of} of a user that shows in what was disliked next, over"
            f" {found.users:,} users with a dislike in the {days} days before {found.ds}'s end; interests are"
            " categories."
        )
        rows = [Bar(name, share, percent(share), 1.0) for name, share in zip(names, shares, strict=True)]
        held = table(caption, ["labels", "covered"], [[bar.label, bar.text] for bar in rows], "tn")
        title = "Main interest covered" if top == 1 else f"{top} main interests covered"
        plots.append(figure(f"plot-coverage-{top}", title, caption, charts.bars(rows), held))
    yield from plots


def _codes(report: Report) -> Parts:
    found = figures.code_figures(report.ctx)
    health, plots = found.health, []
    for level, usage in enumerate(found.usage):
        ordered = np.sort(usage)[::-1]
        k, dead = health.code_counts[level], health.dead_codes[level]
        caption = (
            f"Items per code, most used first: {k:,} codes, {dead:,} without an item, perplexity"
            f" {health.perplexity[level]:.4g}, Gini {health.usage_gini[level]:.3f}."
        )
        quantiles = [
            (f"{share:.0%}", int(ordered[round(share * (k - 1))])) for share in (0, 0.25, 0.5, 0.75, 1)
        ]
        held = table(
            caption, ["codes passed", "items per code"], [[name, f"{n:,}"] for name, n in quantiles], "nn"
        )
        plot = charts.histogram(range(k + 1), ordered.tolist(), "codes, most used first", "items")
        plots.append(figure(f"plot-codes-{level + 1}", f"Code usage, level {level + 1}", caption, plot, held))
    sizes = [(f"{n}", found.shared.get(n, 0) * n) for n in (1, 2, 3, 4)]
    sizes.append(("5 or more", sum(n * ids for n, ids in found.shared.items() if n >= 5)))
    caption = (
        f"{health.items:,} items have {health.unique_ids:,} IDs; {percent(health.collision_rate)} share"
        f" theirs with another item, the largest ID holds {health.largest_bucket:,}."
    )
    rows = [
        Bar(
            f"{name} item{'' if name == '1' else 's'} under one ID",
            n,
            f"{n:,} items ({percent(n / health.items)})",
            health.items,
        )
        for name, n in sizes
    ]
    held = table(caption, ["items under one ID", "items"], [[name, f"{n:,}"] for name, n in sizes], "tn")
    plots.append(figure("plot-collisions", "Collisions", caption, charts.bars(rows), held))
    yield from plots


def _score_distribution(report: Report) -> Parts:
    report.require_list()
    threshold = figures.score_row(report.ctx)["threshold"]
    counts = figures.score_counts(report.ctx, report.ds)
    before = figures.list_before(report.ctx)
    earlier = figures.score_counts(report.ctx, before) if before else None
    edges = [n / figures.SCORE_BINS for n in range(figures.SCORE_BINS + 1)]
    caption = (
        f"Published entries by their block score; items are blocked from {threshold:.3f}, the dashed line."
    )
    if before:
        caption += f" The dashed outline is the list of {before}."
    plot = charts.histogram(
        edges, counts, "block score", "entries", (threshold, f"threshold {threshold:.3f}"), earlier
    )
    header = ["score from", "entries"] + ([f"on {before}"] if before else [])
    rows = []
    for n in range(0, figures.SCORE_BINS, 4):
        both = [counts] + ([earlier] if earlier else [])
        rows.append([f"{edges[n]:.1f}", *(f"{sum(part[n : n + 4]):,}" for part in both)])
    held = table(caption, header, rows, "nnn")
    yield figure("plot-scores", "Score distribution", caption, plot, held)


def _threshold_curve(report: Report) -> Parts:
    score = figures.score_row(report.ctx)
    if not score["curve"]:
        raise MissingError(f"table block_score: ds={report.ds} has no curve")
    curve = sorted(score["curve"], key=lambda point: point["likes_blocked"])
    at = (score["likes_blocked"], score["dislikes_blocked"])
    line = [(point["likes_blocked"], point["dislikes_blocked"]) for point in curve]
    caption = (
        "What every threshold blocks of the held-back feedback: likes lost against dislikes caught. The"
        f" published one, {score['threshold']:.3f}, blocks {percent(at[1])} of the dislikes and"
        f" {percent(at[0])} of the likes, of {score['n_users'] or 0:,} users."
    )
    points = [(*at, f"published: {percent(at[1])} at {percent(at[0])}")]
    plot = charts.lines(
        [("held-back", line)], "likes blocked", "dislikes blocked", percent, percent, points=points
    )
    rows = [
        [f"{p['threshold']:.3f}", percent(p["likes_blocked"]), percent(p["dislikes_blocked"])] for p in curve
    ]
    held = table(caption, ["threshold", "likes blocked", "dislikes blocked"], rows, "nnn")
    yield figure("plot-threshold", "Threshold curve", caption, plot, held)


def _entries(report: Report) -> Parts:
    report.require_list()
    most = max(max(report.entries), report.ctx.config.generation.set_size)
    heights = [report.entries.get(n, 0) for n in range(1, most + 1)]
    mean = report.n_entries / report.n_listed
    caption = f"Users by the length of their list: {mean:.3g} entries on average, {most} at most."
    ticks = [1, *(tick for tick in charts.round_ticks(1, most, 5) if tick > 1)]
    plot = charts.histogram([n + 0.5 for n in range(most + 1)], heights, "entries", "users", ticks=ticks)
    held = table(
        caption, ["entries", "users"], [[f"{n}", f"{users:,}"] for n, users in report.entries.items()], "nn"
    )
    yield figure("plot-entries", "Entries per user", caption, plot, held)


def _categories(report: Report) -> Parts:
    report.require_list()
    rows = figures.category_figures(report.ctx, report.n_listed)
    limits = report.ctx.config.gates
    shown = rows[:_CATEGORIES]
    blocked = sum(row["blocked"] for row in rows) / sum(row["n"] for row in rows)
    scale = max(limits.max_category_blocked * 1.1, *(row["blocked"] / row["n"] for row in shown))
    bars = [
        Bar(
            row["category"] or "(no category)",
            row["blocked"] / row["n"],
            f"{percent(row['blocked'] / row['n'])} of {row['n']:,}",
            scale,
            limit=limits.max_category_blocked,
        )
        for row in shown
    ]
    bars.sort(key=lambda bar: -bar.value)
    left_out = f" The {len(shown)} categories shown most, of {len(rows)}." if len(rows) > len(shown) else ""
    caption = (
        f"Share of the exposures of {report.ds} that the list would block, by top category;"
        f" {percent(blocked)} over all. The dashed line is the gate's limit, for categories of"
        f" {limits.min_category_exposures:,} exposures or more.{left_out}"
    )
    held = table(
        caption,
        ["category", "exposures", "blocked", "likes", "likes blocked"],
        [
            [
                named(row["category"] or "(no category)"),
                *(f"{row[name]:,}" for name in ("n", "blocked", "likes", "likes_blocked")),
            ]
            for row in rows[: 5 * _CATEGORIES]
        ],
        "tnnnn",
    )
    title = "Blocked share per category"
    yield figure("plot-categories", title, caption, charts.bars(bars), held)


def _daily_log(report: Report) -> Parts:
    log = figures.daily_log(report.ctx)
    days = [row["day"] for row in log]
    plots = [
        _daily("events", "Events", days, "events", [("events", [row["events"] for row in log])], count),
        _daily(
            "feedback",
            "Likes and dislikes",
            days,
            "events",
            [(name, [row[name] for row in log]) for name in ("likes", "dislikes")],
            count,
        ),
        _daily(
            "dislike-share",
            "Dislikes among the feedback",
            days,
            "share",
            [("dislikes", [row["dislikes"] / max(row["dislikes"] + row["likes"], 1) for row in log])],
            percent,
        ),
        _daily(
            "users", "Users who gave feedback", days, "users", [("users", [r["users"] for r in log])], count
        ),
    ]
    yield from plots


def _daily_lists(report: Report) -> Parts:
    lists = figures.daily_lists(report.ctx)
    if len(lists) < 2:
        yield el("p", "How lists change shows from the second list of these days on.", class_="absent")
        return
    days = [row["day"] for row in lists]
    users, scores = ([row[name] for row in lists] for name in ("users", "score"))
    yield _daily("list-users", "Users with a list", days, "users", [("users", users)], count)
    yield _daily("list-score", "Mean score", days, "score", [("score", scores)], figure_of)


def _daily_gates(report: Report) -> Parts:
    judged = figures.gate_rows(report.ctx)
    for row in judged[report.ds] if len(judged) > 1 else ():
        history = {
            day: next((r["value"] for r in rows if r["name"] == row["name"]), None)
            for day, rows in judged.items()
        }
        name, values = row["name"], [("value", list(history.values()))]
        plot = f"gate-{name.replace('_', '-')}"
        yield _daily(plot, f"Gate {name}", list(history), "value", values, figure_of, row["limit"])


def _daily(
    name: str,
    title: str,
    days: Sequence[str],
    y_label: str,
    series: Sequence[tuple[str, Sequence[float | None]]],
    form: charts.Format,
    limit: float | None = None,
) -> Element:
    """A figure of values per day."""
    every = -(-len(days) // 5)
    plot = charts.lines(
        [(label, list(enumerate(values))) for label, values in series],
        "log date",
        y_label if len(series) == 1 else "",
        form,
        lambda at: days[round(at)][5:],
        range(0, len(days), every or 1),
        limit=limit,
    )
    caption = f"{title} per log date, {days[0]} to {days[-1]}." if days else f"{title}: none."
    if limit is not None:
        caption += f" Limit {figure_of(limit)}."
    rows = [
        [day, *("–" if (value := values[n]) is None else form(value) for _, values in series)]
        for n, day in enumerate(days)
    ]
    held = table(caption, ["log date", *(label for label, _ in series)], rows, "tnn")
    return figure(f"plot-daily-{name}", title, caption, plot, held)


def _users(report: Report) -> Parts:
    report.require_list()
    yield from map(user_card, sample_of_users(report.ctx, _SAMPLE))


SECTIONS = (
    Section("summary", "In short", "What the list reaches on held-back feedback, and since.", (_summary,)),
    Section(
        "gates",
        "Gates",
        "What the list had to keep to before it was published, and what it would have blocked of the day's"
        " exposures.",
        (_gates, _categories),
    ),
    Section(
        "funnel",
        "From the log to the list",
        "How many are left at each step; and how much of what users mainly dislike shows in the labels: the"
        " next dislike alone, all of the horizon, and those with their neighbours in the Swing graph, by the"
        " newest labels that the day knows.",
        (_funnel, _coverage),
    ),
    Section(
        "scores",
        "Scores and lists",
        "What is published, and what a threshold costs.",
        (_score_distribution, _threshold_curve, _entries),
    ),
    Section(
        "codes", "Semantic IDs", "How evenly the codebook's codes are used, and who shares an ID.", (_codes,)
    ),
    Section(
        "drift",
        "The last days",
        "Up to 28 days of log and lists, to see a change coming.",
        (_daily_log, _daily_lists, _daily_gates),
    ),
    Section(
        "users",
        "Some users",
        "Chosen by a hash of their id among those with a list and later feedback, not by how well it did.",
        (_users,),
    ),
)
