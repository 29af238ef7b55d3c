import datetime as dt
import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from jobs.world import WorldSettings, generate
from jobs.world.day import (
    DISLIKE_BASE,
    DISLIKE_SLOPE,
    OTHER_REASONS,
    REASONS,
    SURFACES,
    TASTE_REASONS,
)
from jobs.world.log import EVENTS
from jobs.world.tastes import KINDS
from negrec_core.errors import ConfigError

DAY_MS = 86_400_000
SMALL = WorldSettings(users=200, items=150, days=10)
MIDDLE = WorldSettings(users=1200, items=600)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("small")
    return out, generate(SMALL, out)


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    out = tmp_path_factory.mktemp("middle")
    return out, generate(MIDDLE, out)


def read_events(out):
    """All events, in the order of their files, with the day of the file they are in."""
    parts = []
    for path in sorted((out / "events").glob("day=*/part-*.parquet")):
        table = pq.read_table(path, partitioning=None)
        assert table.schema.equals(EVENTS)
        parts.append(table.to_pandas().assign(day=path.parent.name.removeprefix("day=")))
    return pd.concat(parts, ignore_index=True)


def read_exposures(out):
    """One row per exposure, with what the user did and the true utility behind it."""
    events = read_events(out)
    key = ["session", "position"]
    rows = events[events.event == "show"].set_index(key)
    for event in ("click", "buy"):
        rows[event] = rows.index.isin(events[events.event == event].set_index(key).index)
    rows["reason"] = events[events.event == "not_interested"].set_index(key)["reason"]
    items = pq.read_table(out / "truth" / "items.parquet").to_pandas()
    users = pq.read_table(out / "truth" / "users.parquet").to_pandas()
    weights = pq.read_table(out / "truth" / "preferences.parquet").to_pandas()
    weights = weights.set_index(["user", "kind", "value"])["weight"]
    rows = rows.merge(items, on="item").merge(users, on="user")
    rows["utility"] = rows["quality"]
    for kind in KINDS:
        index = pd.MultiIndex.from_arrays([rows.user, np.full(len(rows), kind), rows[kind]])
        rows["utility"] += weights.reindex(index).fillna(0.0).to_numpy()
    rows["taste"] = rows.reason.isin(TASTE_REASONS)
    rows["other"] = rows.reason.isin(OTHER_REASONS)
    return rows


@pytest.fixture(scope="module")
def exposures(middle):
    return read_exposures(middle[0])


def digests(out):
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*.parquet"))
    }


def check_invariants(out, world):
    """What holds in every world, whatever its settings."""
    events = read_events(out)
    users = pq.read_table(out / "users.parquet").to_pandas().set_index("user")
    items = pq.read_table(out / "items.parquet").to_pandas().set_index("item")
    assert len(users) == users.index.nunique() == world.users
    assert len(items) == items.index.nunique() == world.items
    days = [(world.start + dt.timedelta(days=d)).isoformat() for d in range(world.days)]
    assert sorted(path.name for path in (out / "events").iterdir()) == [f"day={d}" for d in days]

    # An event lies in the day of its file, after its user joined and its item appeared.
    assert (pd.to_datetime(events.time_ms, unit="ms").dt.strftime("%Y-%m-%d") == events.day).all()
    assert (events.time_ms.to_numpy() >= users.joined_ms.loc[events.user].to_numpy()).all()
    assert (events.time_ms.to_numpy() >= items.created_ms.loc[events.item].to_numpy()).all()

    assert set(events.event) <= {"show", "click", "buy", "not_interested"}
    assert set(events.surface) <= set(SURFACES)
    rejected, show = events.event == "not_interested", events.event == "show"
    assert (events.reason.notna() == rejected).all()
    assert set(events.reason.dropna()) <= set(REASONS)
    assert (events.dwell_ms.notna() == show).all()
    assert (events.length_ms.notna() == show).all()
    shows = events[show]
    assert ((shows.dwell_ms >= 0) & (shows.dwell_ms <= shows.length_ms)).all()

    # A session is one user's, on one surface of one day, and counts its exposures from 0 in time.
    session = events.groupby("session")
    assert (session[["user", "surface", "day"]].nunique() == 1).all(axis=None)
    ordered = shows.sort_values(["session", "position"])
    assert (ordered.position == ordered.groupby("session").cumcount()).all()
    assert (ordered.groupby("session").time_ms.diff().dropna() > 0).all()

    # A reaction follows its exposure, is the only one of its kind and precedes the next exposure.
    key = ["session", "position"]
    assert not events.duplicated([*key, "event"]).any()
    pairs = events[~show].merge(shows, on=key, suffixes=("", "_shown"))
    assert len(pairs) == (~show).sum()
    assert (pairs.item == pairs.item_shown).all()
    assert (pairs.time_ms > pairs.time_ms_shown).all()
    following = shows.assign(position=shows.position - 1)
    pairs = events[~show].merge(following, on=key, suffixes=("", "_next"))
    assert (pairs.time_ms < pairs.time_ms_next).all()
    bought = events[events.event == "buy"].merge(
        events[events.event == "click"], on=key, suffixes=("", "_click")
    )
    assert len(bought) == (events.event == "buy").sum()
    assert (bought.time_ms > bought.time_ms_click).all()

    # A user rests at least 20 minutes between sessions.
    spans = session.agg(user=("user", "first"), low=("time_ms", "min"), high=("time_ms", "max"))
    spans = spans.sort_values(["user", "low"])
    rest = spans.low - spans.groupby("user").high.shift()
    assert (rest.dropna() > 20 * 60_000).all()

    # No item comes back after it was rejected, or twice a day.
    first = events[rejected].groupby(["user", "item"]).time_ms.min().rename("rejected_ms")
    again = shows.merge(first.reset_index(), on=["user", "item"])
    assert (again.time_ms < again.rejected_ms).all()
    assert not shows.duplicated(["user", "item", "day"]).any()

    # "Already bought or viewed" is said of what was clicked or bought on an earlier day.
    seen = events[events.event.isin(["click", "buy"])].groupby(["user", "item"]).day.min()
    already = events[events.reason == "Already bought or viewed"]
    if len(already):
        days_seen = seen.reindex(pd.MultiIndex.from_frame(already[["user", "item"]]))
        assert (days_seen.to_numpy() < already.day.to_numpy()).all()


def test_invariants(small):
    out, summary = small
    check_invariants(out, SMALL)
    events = read_events(out)
    counts = events.event.value_counts()
    assert counts["show"] == summary.shows
    assert counts["click"] == summary.clicks
    assert counts["buy"] == summary.buys
    assert counts["not_interested"] == summary.rejections
    assert events.reason.isin(OTHER_REASONS).sum() == summary.other_reasons


@settings(max_examples=20, deadline=None)
@given(
    st.builds(
        WorldSettings,
        users=st.integers(1, 30),
        items=st.integers(50, 90),
        start=st.dates(dt.date(1971, 1, 1), dt.date(2090, 1, 1)),
        days=st.integers(2, 4),
        slate=st.integers(2, 30),
        seed=st.integers(0, 2**40),
    )
)
def test_invariants_hold_for_any_settings(world):
    with tempfile.TemporaryDirectory() as folder:
        generate(world, Path(folder))
        check_invariants(Path(folder), world)


def test_each_file_is_sorted_by_time(small):
    for path in (small[0] / "events").glob("day=*/*.parquet"):
        time = pq.read_table(path, columns=["time_ms"], partitioning=None)["time_ms"].to_numpy()
        assert (np.diff(time) >= 0).all()


def test_equal_seeds_make_equal_bytes_and_others_do_not(small, tmp_path):
    generate(SMALL, tmp_path / "same")
    assert digests(tmp_path / "same") == digests(small[0])
    generate(replace(SMALL, seed=8), tmp_path / "other")
    theirs, ours = digests(tmp_path / "other"), digests(small[0])
    assert theirs.keys() == ours.keys()
    assert not set(theirs.values()) & set(ours.values())


def test_a_chunk_of_users_does_not_depend_on_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.world.users.CHUNK", 40)
    steps = []
    both = replace(SMALL, users=70)
    generate(both, tmp_path / "both", progress=lambda done, total: steps.append((done, total)))
    assert steps == [(step, 2 * SMALL.days) for step in range(1, 2 * SMALL.days + 1)]
    check_invariants(tmp_path / "both", both)
    generate(replace(SMALL, users=40), tmp_path / "first")
    ours, theirs = digests(tmp_path / "both"), digests(tmp_path / "first")
    shared = [name for name in theirs if name.startswith("events/")]
    assert len(shared) == SMALL.days
    assert all(ours[name] == theirs[name] for name in shared)


def test_chunks_are_independent_draws(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.world.users.CHUNK", 100)
    generate(replace(SMALL, days=12), tmp_path)
    events = read_events(tmp_path)
    active = pd.crosstab(events.user, events.day).reindex(
        [f"u{number:06d}" for number in range(200)], fill_value=0
    )
    active = active.to_numpy() > 0
    assert abs(np.corrcoef(active[:100].ravel(), active[100:].ravel())[0, 1]) < 0.15
    strictness = pq.read_table(tmp_path / "truth" / "users.parquet")["strictness"].to_numpy()
    assert abs(np.corrcoef(strictness[:100], strictness[100:])[0, 1]) < 0.4


def test_public_files_hold_no_truth(small):
    out, _ = small
    truth = {"top", "style", "material", "price", "quality"}
    truth |= {"archetype", "strictness", "haste", "utility", "weight"}
    public = [path for path in out.rglob("*.parquet") if "truth" not in path.parts]
    for path in public:
        assert not truth & set(pq.read_schema(path).names)
    assert pq.read_schema(out / "items.parquet").names == [
        "item",
        "title",
        "description",
        "category",
        "brand",
        "created_ms",
    ]
    assert pq.read_schema(out / "users.parquet").names == [
        "user",
        "age_band",
        "gender",
        "joined_ms",
    ]


def test_titles_say_what_the_item_is(small):
    public = pq.read_table(small[0] / "items.parquet").to_pandas()
    truth = pq.read_table(small[0] / "truth" / "items.parquet").to_pandas()
    assert (public.item == truth.item).all()
    for title, text, *words, category in zip(
        public.title,
        public.description,
        truth["style"],
        truth["material"],
        truth["brand"],
        truth["category"],
        strict=True,
    ):
        assert all(word.lower() in title.lower() for word in words), title
        assert all(word.lower() in text.lower() for word in words), text
        assert "{" not in title + text
        assert category.count("/") == 2
    assert (public.category.str.split("/").str[0] == truth.top).all()


def test_preferences_name_attributes_of_items(middle):
    weights = pq.read_table(middle[0] / "truth" / "preferences.parquet").to_pandas()
    items = pq.read_table(middle[0] / "truth" / "items.parquet").to_pandas()
    assert set(weights.kind) == set(KINDS)
    for kind, rows in weights.groupby("kind"):
        assert set(items[kind]) <= set(rows.value)
    assert (weights.weight != 0).all()
    assert not weights.duplicated(["user", "kind", "value"]).any()
    dislikes = (weights.weight < 0).groupby(weights.user).sum()
    assert 3 < dislikes.mean() < 12


def test_items_and_users_arrive_while_the_log_runs(middle):
    start = pd.Timestamp(MIDDLE.start).value // 10**6
    items = pq.read_table(middle[0] / "items.parquet").to_pandas()
    users = pq.read_table(middle[0] / "users.parquet").to_pandas()
    new = set(items[items.created_ms >= start].item)
    late = set(users[users.joined_ms >= start].user)
    assert len(new) == round(0.15 * MIDDLE.items)
    assert 0.06 < len(late) / MIDDLE.users < 0.14
    shows = read_events(middle[0]).query("event == 'show'")
    last = shows[shows.time_ms >= start + (MIDDLE.days - 1) * DAY_MS]
    assert len(new & set(last.item)) > 0.8 * len(new)
    assert len(late & set(last.user)) > 0.3 * len(late)


def test_shares_are_those_of_a_real_log(exposures):
    rows = exposures
    rejected = rows.taste | rows.other
    active = rows.groupby("user").day.nunique().sum()
    assert 0.04 < rejected.mean() < 0.06
    assert 0.15 < rows.other.sum() / rejected.sum() < 0.23
    assert 0.12 < rows.click.mean() < 0.18
    assert 0.02 < rows.buy.mean() < 0.04
    assert 8 < len(rows) / active < 10
    assert 0.3 < rejected.sum() / active < 0.55
    assert 0.5 < active / MIDDLE.users / MIDDLE.days < 0.65
    assert set(rows.reason.dropna()) == set(REASONS)
    # Evenings are busier than nights.
    hour = rows.time_ms // 3_600_000 % 24
    assert hour.between(18, 21).mean() > 3 * hour.between(2, 5).mean()


def test_skips_come_from_dislike_and_from_haste(exposures):
    rows = exposures
    feed = rows[rows.surface == "feed"]
    skip = feed.dwell_ms < 0.3 * feed.length_ms
    assert skip[feed.utility < -1].mean() > 0.5
    assert 0.1 < skip[feed.utility > 0].mean() < 0.3
    assert skip[feed.haste > 0.3].mean() > skip[feed.haste < 0.1].mean() + 0.1
    # A result that was never opened was not played either.
    search = rows[rows.surface == "search"]
    assert ((search.dwell_ms == 0) == ~search.click).all()


def test_rejections_follow_the_written_truth(exposures):
    rows = exposures
    rows = rows[~rows.other]
    odds = DISLIKE_BASE + rows.strictness - DISLIKE_SLOPE * rows.utility
    chance = 1 / (1 + np.exp(-odds))
    for _, group in rows.assign(chance=chance).groupby(pd.qcut(chance, 10), observed=True):
        expected, n = group.chance.mean(), len(group)
        assert abs(group.taste.mean() - expected) < 5 * np.sqrt(expected / n)


def test_reasons_name_what_is_disliked(middle, exposures):
    rows = exposures
    weights = pq.read_table(middle[0] / "truth" / "preferences.parquet").to_pandas()
    weights = weights.set_index(["user", "kind", "value"])["weight"]

    def mean_weight(reason, kind):
        some = rows[rows.reason == reason]
        index = pd.MultiIndex.from_arrays([some.user, np.full(len(some), kind), some[kind]])
        return weights.reindex(index).fillna(0.0).mean()

    assert mean_weight("Not this store", "brand") < -1
    assert mean_weight("Uncomfortable image", "style") < -1
    assert mean_weight("Not this category", "category") < -0.5
    assert mean_weight("Not this category", "brand") > -0.5


def test_reasons_to_be_dropped_say_nothing_of_taste(exposures):
    rows = exposures
    for reason in ("Looks AI-made", "Bait price", "Counterfeit"):
        some = rows[rows.reason == reason].utility
        error = rows.utility.std() / np.sqrt(len(some))
        assert abs(some.mean() - rows.utility.mean()) < 4 * error
    # What was clicked before is if anything liked.
    assert rows[rows.reason == "Already bought or viewed"].utility.mean() > rows.utility.mean()


def test_the_recommender_stops_showing_what_was_rejected(exposures):
    rows = exposures.copy()
    rows["day"] = pd.to_datetime(rows.day)
    # Pairs of user and category: share of the user's exposures in the week before and after.
    first = rows[rows.taste].groupby(["user", "category"]).day.min()
    middle_days = first[(first >= "2026-01-15") & (first <= "2026-01-30")]
    shown = rows.merge(middle_days.rename("when").reset_index(), on=["user", "category"])
    delta = (shown.day - shown.when).dt.days
    before, after = delta.between(-7, -1).sum(), delta.between(1, 7).sum()
    assert after < 0.7 * before
    # And yet there is something left to reject in the last week.
    assert rows[rows.day >= "2026-02-02"].taste.mean() > 0.6 * rows.taste.mean()


def test_dislike_can_be_learnt_but_not_from_rates_alone(exposures):
    """A simple personal model beats item and user rates, and the truth beats it by far."""
    rows = exposures.copy()
    rows["liked"] = (rows.click | rows.buy) & rows.reason.isna()
    rows = rows[rows.taste | rows.liked]
    past, future = rows[rows.day < "2026-02-02"], rows[rows.day >= "2026-02-02"]

    def log_odds(keys, prior):
        """Smoothed log odds of dislike in the past, for the rows of `future`."""
        counts = (
            past.groupby(keys)
            .taste.agg(["sum", "size"])
            .reindex(pd.MultiIndex.from_frame(future[keys]) if len(keys) > 1 else future[keys[0]])
        )
        counts = counts.fillna(0.0)
        rate = past.taste.mean()
        dislikes, likes = counts["sum"].to_numpy(), (counts["size"] - counts["sum"]).to_numpy()
        return np.log((dislikes + prior * rate) / (likes + prior * (1 - rate)))

    scores = {
        "oracle": -future.utility.to_numpy(),
        "rates": log_odds(["item"], 5) + log_odds(["user"], 5),
        "personal": sum(log_odds(["user", kind], 2) - log_odds([kind], 2) for kind in KINDS),
    }
    taste = future.taste.to_numpy()
    auc = {name: roc_auc_score(taste, score) for name, score in scores.items()}
    blocked = {
        name: np.mean(score[taste] > np.quantile(score[~taste], 0.99)) for name, score in scores.items()
    }
    assert 0.94 < auc["oracle"] < 0.98
    assert 0.62 < auc["rates"] < 0.77
    assert auc["rates"] + 0.05 < auc["personal"] < auc["oracle"] - 0.05
    assert blocked["personal"] > 1.5 * blocked["rates"]
    assert blocked["oracle"] > 2 * blocked["personal"]


def test_a_directory_in_use_is_refused(tmp_path):
    (tmp_path / "something").touch()
    with pytest.raises(ConfigError, match="not an empty directory"):
        generate(SMALL, tmp_path)
    with pytest.raises(ConfigError, match="not an empty directory"):
        generate(SMALL, tmp_path / "something")


@pytest.mark.parametrize(
    ("name", "value"),
    [("users", 0), ("items", 49), ("days", 1), ("slate", 1), ("slate", 31), ("seed", -1)],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"world: {name} is {value}; choose"):
        replace(SMALL, **{name: value})
