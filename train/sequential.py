"""Sequential recommenders as baselines: what RecBole's models make of the same events (DESIGN section 8).

They run in an environment of their own (`make recbole`), since RecBole needs an older numpy. A log is
exported as RecBole's atomic files, `train/recbole_runner.py` fits one model on it, and the probabilities
that it writes are read back.

A user's sequence is what the user did before the anchor, oldest first, behind a token `start`, so that a
user without feedback has one too. Each model exists twice: on dislikes alone, and on dislikes and likes,
where "disliked item 3" and "liked item 3" are two tokens. The first scores an item by the log-probability
that the user dislikes it next; the second by how much likelier its dislike is than its like, and learns as
many likes, drawn from all, as dislikes. FDSA and S3-Rec know the items' categories.

Budget of each: three settings of learning rate and dropout, at most 20 epochs, ended by 3 without gain. The
one that ranks each user's last known dislike best (NDCG@20; that event and later ones held out) is fitted
again on all that is known. A log of more than 50,000 dislikes is sampled.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from negrec_core.embedding_cache import file_digest
from negrec_core.errors import MissingError
from train.baselines import Known, Method, first_new, own_dislikes

log = logging.getLogger("negrec")

MODELS = ("Caser", "SASRec", "BERT4Rec", "FDSA", "S3Rec")
DISLIKES, BOTH = "dislikes", "both"
_SETTINGS = (
    {"learning_rate": 1e-3, "dropout": 0.2},
    {"learning_rate": 1e-3, "dropout": 0.5},
    {"learning_rate": 3e-3, "dropout": 0.5},
)
_EPOCHS, _PATIENCE, _PRETRAIN_EPOCHS = 20, 3, 5
# The generator sees as many of each polarity.
_LENGTH = 15
_RUNNER = Path(__file__).with_name("recbole_runner.py")


@dataclass(frozen=True)
class Probabilities:
    """What a model expects each user to do next.

    Attributes:
        users: whom it was asked for.
        items: what it can tell apart: items with feedback.
        logs: float32 [polarities, users, items]; log-probabilities of disliking (0) and of liking (1) the
            item, which sum to one for each user.
    """

    users: pd.Index
    items: pd.Index
    logs: np.ndarray

    def scores(self, pairs: pd.DataFrame) -> np.ndarray:
        """Scores [n] of (user_id, item_id), higher for likelier dislikes.

        An item without feedback gets the mean of the user's scores: nothing tells it from the others.

        Raises:
            KeyError: a user that the model was not asked for.
        """
        row, column = (
            index.get_indexer(pd.Index(pairs[key]))
            for index, key in ((self.users, "user_id"), (self.items, "item_id"))
        )
        if (row < 0).any():
            raise KeyError(str(pairs["user_id"].to_numpy()[row < 0][0]))
        out = self._score(row, column)
        new = column < 0
        who, place = np.unique(row[new], return_inverse=True)
        out[new] = np.array([self._score(user, slice(None)).mean() for user in who])[place]
        return out

    def _score(self, row: np.ndarray | int, column: np.ndarray | slice) -> np.ndarray:
        score = self.logs[0, row, column].astype(float)
        return score - self.logs[1, row, column] if len(self.logs) > 1 else score

    def sets(self, leaf: dict[str, int], own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """User -> the 20 likeliest leaves, without those of `own` dislikes."""
        leaves = np.array([leaf.get(item, -1) for item in self.items], np.int64)
        out = {}
        for user, values in zip(self.users, self.logs[0], strict=True):
            ranked = leaves[np.argsort(-values, kind="stable")]
            ranked = ranked[ranked >= 0]
            # First places only, in their order: a leaf of several items counts once.
            ranked = ranked[np.sort(np.unique(ranked, return_index=True)[1])]
            out[str(user)] = first_new(ranked, own.get(user))
        return out


def sequential_baselines(
    known: Known, users: list[str], seed: int, python: Path, unfinished: Path
) -> dict[str, Method]:
    """RecBole's models on dislikes and on both polarities, by name.

    Args:
        known: what they may use.
        users: whom they are asked for.
        seed: of their weights, their batches and the likes drawn.
        python: the Python of RecBole's environment.
        unfinished: where each model is kept until all are done, so that whoever was stopped goes on there.

    Raises:
        MissingError: no dislikes, or RecBole does not run there.
    """
    asked = pd.Index(users, dtype=object)
    own = own_dislikes(known)

    def method(polarities: str, model: str) -> Method:
        chances = fit(known, asked, model, polarities == BOTH, seed, python, unfinished)
        return Method(chances.scores, chances.sets(known.leaf, own))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        methods = {
            f"{model}, {polarities}": pool.submit(method, polarities, model)
            for polarities in (DISLIKES, BOTH)
            for model in MODELS
        }
        try:
            found = {name: task.result() for name, task in methods.items()}
        finally:
            # After a failure the rest must not start.
            pool.shutdown(cancel_futures=True)
    # A mapped file stays until nothing maps it.
    shutil.rmtree(unfinished)
    return found


def fit(
    known: Known,
    users: pd.Index,
    model: str,
    both: bool,
    seed: int,
    python: Path,
    kept: Path,
    **budget: object,
) -> Probabilities:
    """Fit one model in RecBole's environment and ask it for `users`; `budget` overrides the job's entries.

    What is made is kept in the folder `kept`, by the digest of all that it is made of, and not made again.

    Raises:
        MissingError: as `sequential_baselines`.
    """
    began = time.monotonic()
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fit-", dir=kept) as folder:
        work = Path(folder)
        items = export(known, users, both, work)
        job = {
            "model": model,
            "polarities": 1 + both,
            "users": len(users),
            "items": len(items),
            "length": _LENGTH * (1 + both),
            "settings": _SETTINGS,
            "epochs": _EPOCHS,
            "patience": _PATIENCE,
            "pretrain_epochs": _PRETRAIN_EPOCHS,
            "seed": seed,
        }
        (work / "job.json").write_text(json.dumps(job | budget))
        made_of = [work / "job.json", work / "log" / "log.inter", work / "log" / "log.item", _RUNNER]
        done = kept / hashlib.sha256(b"".join(map(file_digest, made_of))).hexdigest()[:16]
        if not done.exists():
            _run(python, work, model)
            work.rename(done)
    report = json.loads((done / "report.json").read_text())
    logs = np.load(done / "log_probabilities.npy", mmap_mode="r", allow_pickle=False)
    best = report["chosen"]
    log.info(
        "%s, %s: %d targets; learning rate %g, dropout %g, %d epochs by NDCG@20 %.4f of %d users; %.0f s",
        model,
        BOTH if both else DISLIKES,
        report["rows"],
        best["learning_rate"],
        best["dropout"],
        best["epochs"],
        best["ndcg"],
        report["valid"],
        time.monotonic() - began,
    )
    return Probabilities(users, items, logs)


def export(known: Known, users: pd.Index, both: bool, work: Path) -> pd.Index:
    """Write what is known as RecBole's atomic files `log/log.inter` and `log/log.item` under `work`.

    Users and items go by their numbers: `users` come first, then those of the log; items are those of the
    index that comes back. Tokens are `-N` (disliked) and `+N` (liked); every user's events stand between
    `start` and `end`, timed by their place. An item's categories are the names on its category path.

    Raises:
        MissingError: no dislikes are known.
    """
    past = known.past if both else known.past[known.past["polarity"] == -1]
    if not (past["polarity"] == -1).any():
        raise MissingError(
            "table feedback: no dislikes before the anchors for the sequential recommenders to learn from;"
            " import more days and backfill `feedback`"
        )
    items = pd.Index(np.sort(known.past["item_id"].unique()))
    everyone = users.append(pd.Index(past["user_id"].unique()).difference(users))
    past = past.sort_values(["event_time", "item_id"], kind="stable")
    sign = np.where(past["polarity"] == -1, "-", "+")
    number = pd.Series(items.get_indexer(pd.Index(past["item_id"])), past.index).astype(str)
    events = pd.DataFrame({"user": everyone.get_indexer(pd.Index(past["user_id"])), "token": sign + number})
    starts, ends = (pd.DataFrame({"user": np.arange(len(everyone)), "token": t}) for t in ("start", "end"))
    rows = pd.concat([starts, events, ends]).sort_values("user", kind="stable")
    rows["place"] = rows.groupby("user").cumcount()
    levels = pd.Series(items).map(known.category).fillna("").str.split("/")
    # Names may hold the separators of the format, so each goes by a number too.
    codes = {name: str(code) for code, name in enumerate(dict.fromkeys(levels.explode()))}
    category = levels.map(lambda path: " ".join(codes[name] for name in path))
    tokens = [f"{sign}{item}" for sign in "-+"[: 1 + both] for item in range(len(items))]
    folder = work / "log"
    folder.mkdir()
    _atomic(
        folder / "log.inter",
        {"user_id:token": rows["user"], "item_id:token": rows["token"], "timestamp:float": rows["place"]},
    )
    _atomic(
        folder / "log.item",
        {
            "item_id:token": [*tokens, "start", "end"],
            "category:token_seq": [*category.tolist() * (1 + both), "none", "none"],
        },
    )
    return items


def _atomic(path: Path, columns: dict[str, object]) -> None:
    pd.DataFrame(columns).to_csv(path, sep="\t", index=False)


def _run(python: Path, work: Path, model: str) -> None:
    """Run the runner in `work`, isolated from this environment's paths."""
    # It runs elsewhere, so the path must not be relative; resolved, it would leave its environment.
    command = [str(python.absolute()), "-I", "-W", "ignore", str(_RUNNER)]
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    except OSError as error:
        raise MissingError(
            f"{python}: {error.strerror}; `make recbole` sets up the sequential recommenders' environment"
        ) from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise MissingError(
            f"{python}: RecBole did not fit {model}: {said[-1] if said else f'exit code {done.returncode}'};"
            " `make recbole` sets up its environment"
        )
