"""Whom and what the cells of the ablation are judged by, and the figures of predicted sets and scores."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from negrec_core.delta import DeltaStore
from negrec_core.generator import CODEBOOK, newest
from negrec_core.metrics import mean_over_users
from train.ablation.grid import Grid
from train.baselines import judged
from train.candidates import chosen, draw_candidates
from train.evaluate import hit_table, load_shown, predicted_draws, split_feedback, within_user_draws

# The users drawn and the candidates are the same for all cells of a data set.
JUDGE_SEED = 7


def until_of(warehouse: Path) -> str:
    """The log date that the warehouse's newest codebook was made for."""
    return str(newest(warehouse / "models", CODEBOOK, "9999-12-31").parameters["until"])


@dataclass(frozen=True)
class Judged:
    """Feedback and candidates of the judged users of a data set; see `train.evaluate`."""

    past: pd.DataFrame
    future: pd.DataFrame
    exposures: pd.DataFrame
    candidates: pd.DataFrame

    @property
    def users(self) -> list[str]:
        return sorted(self.future["user_id"].unique())


@lru_cache(maxsize=1)
def judged_of(grid: Grid, dataset: str, warehouse: Path) -> Judged:
    """A data set's judged users; kept until the next data set is asked for."""
    store, config, ds = DeltaStore(warehouse), grid.config(dataset), until_of(warehouse)
    past, future = split_feedback(store, config, ds)
    shown = load_shown(store, config, ds)
    users = np.sort(future["user_id"].unique())
    if 0 < grid.users < len(users):
        users = np.random.default_rng(JUDGE_SEED).choice(users, grid.users, replace=False)
        future, shown = future[future["user_id"].isin(users)], shown[shown["user_id"].isin(users)]
    candidates = draw_candidates(future, shown, config.timezone, JUDGE_SEED)
    return Judged(past, future, judged(future), candidates.pairs)


def draws_of(
    judged: Judged,
    sets: dict[str, np.ndarray],
    leaf_of_item: dict[str, int],
    scores: dict[str, Callable[[pd.DataFrame], np.ndarray]],
) -> dict[str, list[float]]:
    """Figures with their resamples; those of scores by the name of the score."""
    found = predicted_draws(hit_table(judged.past, judged.future, sets, leaf_of_item))
    columns = ["user_id", "item_id"]
    pairs = pd.concat([judged.exposures[columns], judged.candidates[columns]], ignore_index=True)
    for name, score in scores.items():
        of_exposures, of_candidates = np.split(score(pairs), [len(judged.exposures)])
        found[f"candidate accuracy, {name}"] = mean_over_users(chosen(judged.candidates, of_candidates))
        found[f"AUC within user, {name}"] = within_user_draws(of_exposures, judged.exposures)
    return {name: np.round(draws, 5).tolist() for name, draws in found.items()}
