"""How much of what a user mainly dislikes shows in what is disliked next (DESIGN section 8).

A user's main negative interests are the categories of most of the items that the user disliked, before the
anchor and within the horizon; equal counts stand in the order of their names.
"""

import numpy as np
import pandas as pd

from negrec_core.metrics import Estimate, mean_over_users

TOP = (1, 4)


def coverage(
    past: pd.DataFrame,
    future: pd.DataFrame,
    category: pd.Series,
    graph: pd.DataFrame,
    expansion: int,
) -> dict[str, dict[str, Estimate]]:
    """Mean share of a user's main negative interests that is covered, over users with a later dislike.

    Args:
        past: feedback before the anchors.
        future: feedback of the horizon.
        category: item -> category path; items without one are left out.
        graph: rows of `item_graph`.
        expansion: Swing neighbours added per dislike.

    Returns:
        "top-1" and "top-4" -> covered by the next dislike, by all of the horizon, and by those and their
        Swing neighbours, in this order.
    """
    later = future.loc[future["polarity"] == -1, ["user_id", "item_id", "event_time"]]
    first = later.groupby("user_id")["event_time"].transform("min")
    near = graph[graph["rank"] <= expansion].merge(later, on="item_id")
    neighbours = near[["user_id", "neighbor_id"]].rename(columns={"neighbor_id": "item_id"})
    covers = {
        "next": later[later["event_time"] == first],
        "horizon": later,
        "horizon + Swing": pd.concat([later, neighbours]),
    }
    before = past[(past["polarity"] == -1) & past["user_id"].isin(later["user_id"])]
    interests = main_interests(pd.concat([before, later]), category)
    found = {}
    for top in TOP:
        main = interests[interests["place"] < top]
        found[f"top-{top}"] = {
            name: Estimate.of(mean_over_users(_share_covered(main, items, category)))
            for name, items in covers.items()
        }
    return found


def main_interests(dislikes: pd.DataFrame, category: pd.Series) -> pd.DataFrame:
    """The categories of each user's dislikes: user_id, category, place (from 0, most items first)."""
    distinct = dislikes[["user_id", "item_id"]].drop_duplicates()
    counts = distinct.assign(category=distinct["item_id"].map(category)).groupby(["user_id", "category"])
    ranked = counts.size().reset_index(name="items")
    ranked = ranked.sort_values(["user_id", "items", "category"], ascending=[True, False, True])
    return ranked.assign(place=ranked.groupby("user_id").cumcount())


def _share_covered(main: pd.DataFrame, items: pd.DataFrame, category: pd.Series) -> np.ndarray:
    """Share of each user's main interests that are categories of that user's items, [users]."""
    held = pd.MultiIndex.from_arrays([items["user_id"], items["item_id"].map(category)])
    covered = pd.MultiIndex.from_frame(main[["user_id", "category"]]).isin(held)
    return pd.Series(covered).groupby(main["user_id"].to_numpy()).mean().to_numpy(float)
