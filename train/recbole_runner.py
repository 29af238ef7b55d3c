"""Fits one sequential recommender of RecBole; runs in RecBole's environment, so it imports no negrec.

    python -I recbole_runner.py      in a work directory that `train.sequential.export` has written

Reads `job.json` and the atomic files of the dataset `log`. Writes `log_probabilities.npy`, float32
[polarities, users, items]: how likely the user's next event is the dislike (0) or the like (1) of the item,
summing to one over both; and `report.json`: what was tried and chosen, and the seconds it took.

Nothing is pickled: no checkpoint, data set or data loader is saved or loaded.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataloader import FullSortEvalDataLoader, TrainDataLoader
from recbole.data.dataset import SequentialDataset
from recbole.utils import get_model, get_trainer, init_seed

# Caser has one convolution for each length, so RecBole asks for short sequences.
_CASER_LENGTH = 10
_BATCH = 256
# Of each polarity: bounds the time that a large log takes.
_MOST_TARGETS = 50_000
_MOST_VALID = 2000


class Log:
    """Every prefix of every user's events with the event after it, as RecBole cuts them.

    Attributes:
        data: RecBole's data set; its rows are (prefix, next token), in the order of users and times.
        tokens: token number of each item [polarities, items].
        target: token that each row predicts.
        user: the user of each row, as numbered by `export`; the first `job["users"]` are asked for.
        prediction: rows that end the log of a user who is asked for: nothing follows them.
    """

    def __init__(self, job: dict[str, Any], config: Config) -> None:
        self.data = SequentialDataset(config)
        self.data.build()
        signs = "-+"[: job["polarities"]]
        tokens = [[f"{sign}{item}" for item in range(job["items"])] for sign in signs]
        self.tokens = np.array([self.data.token2id("item_id", row) for row in tokens])
        # `build` has put the rows in the order of times.
        self.data.sort(by=["user_id", "timestamp"])
        rows = self.data.inter_feat
        self.target = rows["item_id"].numpy()
        # The first name is that of RecBole's padding.
        names = np.append(-1, self.data.field2id_token["user_id"][1:].astype(int))
        self.user: np.ndarray = names[rows["user_id"].numpy()]
        ends = self.target == self.data.token2id("item_id", "end")
        self.prediction = ends & (self.user < job["users"])
        self.bert = job["model"] == "BERT4Rec"

    def learnable(self, seed: int) -> np.ndarray:
        """Rows whose target is a dislike, and as many of those whose target is a like; drawn where many."""
        draw = np.random.default_rng(seed).permutation
        disliked = draw(np.flatnonzero(np.isin(self.target, self.tokens[0])))[:_MOST_TARGETS]
        liked = draw(np.flatnonzero(np.isin(self.target, self.tokens[1:])))[: len(disliked)]
        rows = np.zeros(len(self.target), bool)
        rows[disliked] = rows[liked] = True
        return rows

    def held_out(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows of users' last dislikes, rows that come before their user's)."""
        at = np.flatnonzero(np.isin(self.target, self.tokens[0]))
        last = at[np.append(self.user[at][1:] != self.user[at][:-1], True)]
        last_of_user = np.full(self.user.max() + 1, len(self.user))
        last_of_user[self.user[last]] = last
        before = np.arange(len(self.user)) < last_of_user[self.user]
        valid = np.zeros(len(self.user), bool)
        valid[np.random.default_rng(seed).permutation(last)[:_MOST_VALID]] = True
        return valid, before

    def part(self, rows: np.ndarray) -> SequentialDataset:
        return self.data.copy(self.data.inter_feat[np.flatnonzero(rows)])

    def training(self, config: Config, rows: np.ndarray) -> TrainDataLoader:
        """Loader of rows to learn from.

        BERT4Rec learns by masking what a sequence holds and never sees its target, so it gets the row after
        each, whose sequence ends with that target.
        """
        if self.bert:
            rows = np.append(False, rows[:-1])
        # A last batch of few rows may hold no mask, and RecBole would divide by zero.
        n = int(rows.sum())
        config["train_batch_size"] = max(range(_BATCH, 2 * _BATCH), key=lambda size: (n - 1) % size)
        return TrainDataLoader(config, self.part(rows), None, shuffle=True)

    def ranked(self, config: Config, rows: np.ndarray) -> FullSortEvalDataLoader:
        """Loader of rows to rank all tokens for.

        BERT4Rec puts the mask behind a sequence and then drops its first place, full or not, which would
        move all events off the positions they were learned at: so that place is left empty.
        """
        part = self.part(rows)
        if self.bert:
            sequences, length = part.inter_feat["item_id_list"], part.inter_feat["item_length"]
            short = length < sequences.shape[1]
            sequences[short] = sequences[short].roll(1, 1)
            length[short] += 1
        return FullSortEvalDataLoader(config, part, None)


def config_of(job: dict[str, Any], setting: dict[str, float], epochs: int) -> Config:
    """RecBole's defaults, but for what the job sets."""
    dropout = dict.fromkeys(("dropout_prob", "hidden_dropout_prob", "attn_dropout_prob"), setting["dropout"])
    return Config(
        model=job["model"],
        dataset="log",
        config_dict={
            "data_path": ".",
            "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "category"]},
            "eval_args": {
                "split": {"RS": [1, 0, 0]},
                "group_by": "none",
                "order": "TO",
                "mode": "full",
            },
            "MAX_ITEM_LIST_LENGTH": _CASER_LENGTH if job["model"] == "Caser" else job["length"],
            "train_neg_sample_args": None,
            "loss_type": "CE",
            "selected_features": ["category"],
            "item_attribute": "category",
            "train_stage": "pretrain",
            "pretrain_epochs": job["pretrain_epochs"],
            "save_step": job["pretrain_epochs"] + 1,
            "learning_rate": setting["learning_rate"],
            **dropout,
            "epochs": epochs,
            "stopping_step": job["patience"] - 1,
            "eval_batch_size": 1024,
            "metrics": ["NDCG"],
            "topk": [20],
            "valid_metric": "NDCG@20",
            "metric_decimal_place": 6,
            "seed": job["seed"],
            "state": "ERROR",
            "show_progress": False,
        },
    )


def fit(
    log: Log, config: Config, rows: np.ndarray, valid: np.ndarray | None = None
) -> tuple[Any, list[float]]:
    """(model, validation NDCG@20 after each epoch; empty without validation rows)."""
    init_seed(config["seed"], config["reproducibility"])
    training = log.training(config, rows)
    model = get_model(config["model"])(config, log.data).to(config["device"])
    # Importing RecBole's models switches this on for the whole process, and it slows all training.
    torch.autograd.set_detect_anomaly(False)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])
    if config["model"] == "S3Rec":
        trainer(config, model).fit(training, verbose=False)
        # What its constructor does in this stage, short of reading a checkpoint.
        model.train_stage, model.loss_fct = "finetune", torch.nn.CrossEntropyLoss()
    scores: list[float] = []
    predict = model.full_sort_predict
    wanted = torch.zeros(log.data.item_num, dtype=torch.bool, device=config["device"])
    wanted[log.tokens[0]] = True
    model.full_sort_predict = lambda rows: predict(rows).masked_fill(~wanted, -torch.inf)
    trainer(config, model).fit(
        training,
        log.ranked(config, valid) if valid is not None else None,
        verbose=False,
        saved=False,
        callback_fn=lambda _, score: scores.append(float(score)),
    )
    model.full_sort_predict = predict
    return model, scores


@torch.no_grad()
def log_probabilities(log: Log, config: Config, model: Any, job: dict[str, Any]) -> None:
    """Writes [polarities, users, items] for the users that are asked for."""
    out = np.lib.format.open_memmap(
        "log_probabilities.npy", "w+", np.float32, (job["polarities"], job["users"], job["items"])
    )
    users = iter(log.user[log.prediction])
    columns = torch.from_numpy(log.tokens.ravel()).to(config["device"])
    model.eval()
    for batch, *_rest in log.ranked(config, log.prediction):
        scores = model.full_sort_predict(batch.to(config["device"]))
        found = scores[:, columns].float().log_softmax(1).cpu().numpy()
        at = [next(users) for _ in found]
        out[:, at] = found.reshape(len(at), job["polarities"], -1).swapaxes(0, 1)
    out.flush()


def main() -> None:
    # RecBole would take arguments of the command line for settings.
    sys.argv = sys.argv[:1]
    job = json.loads(Path("job.json").read_text())
    # The models are small, and as many of them are fitted at once as there are cores.
    torch.set_num_threads(1)
    began = time.monotonic()
    log = Log(job, config_of(job, job["settings"][0], job["epochs"]))
    rows = log.learnable(job["seed"])
    valid, before = log.held_out(job["seed"])
    tried = []
    for setting in job["settings"]:
        scores = fit(log, config_of(job, setting, job["epochs"]), rows & before, valid)[1]
        tried.append({**setting, "epochs": int(np.argmax(scores)) + 1, "ndcg": max(scores), "curve": scores})
    best = max(tried, key=lambda run: run["ndcg"])
    config = config_of(job, best, best["epochs"])
    model, _ = fit(log, config, rows)
    log_probabilities(log, config, model, job)
    report = {
        "chosen": best,
        "tried": tried,
        "rows": int(rows.sum()),
        "valid": int(valid.sum()),
        "seconds": time.monotonic() - began,
    }
    Path("report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
