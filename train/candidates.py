"""Candidate accuracy: a user's next dislike among 19 other items shown the same day (DESIGN section 8).

Only what was shown after the user's anchor and within the horizon can be a candidate: of what came
before, every method knows the outcome. Where fewer than 19 others were shown on the day of the dislike,
those shown on the nearest days are taken; where fewer were shown in the whole horizon, the user has fewer
candidates, and the random method shows what chance reaches.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

OTHERS = 19


@dataclass(frozen=True)
class Candidates:
    """One dislike per user among other items.

    Attributes:
        pairs: user_id, item_id, user (code from 0), target (bool; one per user).
        whole: users with all 19 others.
        other_days: users with a candidate that was not shown on the day of the dislike.
        alone: users left out, because nothing else was shown to them within the horizon.
    """

    pairs: pd.DataFrame
    whole: int
    other_days: int
    alone: int


def draw_candidates(future: pd.DataFrame, shown: pd.DataFrame, timezone: str, seed: int) -> Candidates:
    """Choose candidates for every user with a later dislike.

    Args:
        future: feedback of the horizon (user_id, item_id, event_time, polarity).
        shown: logged events of the horizon, whatever was done (user_id, item_id, event_time).
        timezone: in which a day is a day.
        seed: of the choice among dislikes of one instant, and among items shown equally near.
    """
    rng = np.random.default_rng(seed)
    dislikes = future.loc[future["polarity"] == -1, ["user_id", "item_id", "event_time"]]
    targets = _shuffled(dislikes, rng).sort_values("event_time", kind="stable").drop_duplicates("user_id")
    targets = targets.assign(day=_day(targets["event_time"], timezone))
    others = shown.assign(day=_day(shown["event_time"], timezone)).merge(
        targets[["user_id", "day"]], on="user_id", suffixes=("", "_of_target")
    )
    others["away"] = (others["day"] - others["day_of_target"]).abs()
    others = others.sort_values("away", kind="stable").drop_duplicates(["user_id", "item_id"])
    disliked = pd.MultiIndex.from_frame(dislikes[["user_id", "item_id"]])
    others = others[~pd.MultiIndex.from_frame(others[["user_id", "item_id"]]).isin(disliked)]
    others = _shuffled(others, rng).sort_values("away", kind="stable")
    others = others[others.groupby("user_id").cumcount() < OTHERS]
    count = others.groupby("user_id").size()
    pairs = pd.concat(
        [
            targets.loc[targets["user_id"].isin(count.index), ["user_id", "item_id"]].assign(target=True),
            others[["user_id", "item_id"]].assign(target=False),
        ]
    ).sort_values(["user_id", "target", "item_id"], ascending=[True, False, True], ignore_index=True)
    pairs["user"] = pd.factorize(pairs["user_id"])[0]
    return Candidates(
        pairs,
        whole=int((count == OTHERS).sum()),
        other_days=int(others.loc[others["away"] > pd.Timedelta(0), "user_id"].nunique()),
        alone=len(targets) - len(count),
    )


def chosen(pairs: pd.DataFrame, scores: np.ndarray) -> np.ndarray:
    """Whether each user's target scores highest, [users]; where k items share the first place, 1 / k.

    Args:
        pairs: of `Candidates`.
        scores: [n], higher for likelier dislikes.
    """
    target, user = pairs["target"].to_numpy(bool), pairs["user"].to_numpy()
    n = int(user.max()) + 1 if len(user) else 0
    own = np.empty(n)
    own[user[target]] = scores[target]
    above = np.bincount(user[scores > own[user]], minlength=n)
    level = np.bincount(user[scores == own[user]], minlength=n)
    return np.where(above > 0, 0.0, 1.0 / level)


def _day(times: pd.Series, timezone: str) -> pd.Series:
    return times.dt.tz_convert(timezone).dt.tz_localize(None).dt.normalize()


def _shuffled(rows: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """In an order that depends on the rows and the seed alone."""
    ordered = rows.sort_values(["user_id", "item_id", "event_time"], ignore_index=True)
    return ordered.iloc[rng.permutation(len(ordered))]
