"""Title-based language models as baselines: TALLRec's and InstructRec's tasks (DESIGN section 8).

Both read the titles of what a user disliked and liked. TALLRec (Bao et al. 2023) is asked of one item
whether the user will dislike it, and its score is how much likelier yes is than no. InstructRec (Zhang et
al. 2023) is asked for the next title, and its score is the mean log-likelihood of the item's title. An
adapter is trained, by the stock trainer, on the users, anchors and dislikes that the generator learns from;
TALLRec's questions whose answer is no are about likes from the same past, which is then told without them.
Titles say nothing of IDs: there is a score for candidates, and no predicted set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from negrec_core.config import read_yaml
from negrec_core.errors import InputError
from negrec_core.items import load_items
from negrec_core.resources import resource
from train.samples import IGNORED, Samples, Written, padded
from train.steps import Student, Task
from train.supervised import fine_tune
from train.translation import TITLE_TOKENS, TitleTrainer
from train.warm_up import TABLE

Kind = Literal["tallrec", "instructrec"]
# Of each polarity in a prompt, the newest.
_TITLES_TOLD = 10
_RANK = 16


class _Text(BaseModel):
    """conf/prompts/titles.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    past: str
    judge: str
    next: str
    yes: str
    no: str


@dataclass(frozen=True)
class Budget:
    """How long an adapter is trained.

    Attributes:
        epochs: passes over the samples.
        max_steps: most updates; -1: no limit.
        batch_size: samples per update.
        learning_rate: at its highest.
    """

    epochs: int = 3
    max_steps: int = -1
    batch_size: int = 8
    learning_rate: float = 2e-4


class TitleModel:
    """A language model asked one of the two questions."""

    def __init__(self, task: Task, student: Student, kind: Kind) -> None:
        items = load_items(task.store, task.until, columns=["title"])
        pairs = zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True)
        self._titles = {item: title.strip() for item, title in pairs if title and title.strip()}
        if not self._titles:
            raise InputError(f"table item: nothing known on ds={task.until} has a title")
        self._text = _Text.model_validate(read_yaml(resource("conf", "prompts", "titles.yaml")))
        self._task, self._student, self._kind = task, student, kind

    def fit(self, work: Path, budget: Budget) -> dict[str, Any]:
        """Train an adapter and merge it; the figures of `fine_tune`.

        Raises:
            InputError: no sample has a title.
        """
        rows = self._samples()
        if not rows:
            raise InputError(f"table {TABLE}: ds={self._task.until} has no dislike of an item with a title")
        outcome = fine_tune(
            self._task,
            self._student,
            Samples(Dataset.from_list(rows), {}),
            self._batch,
            budget,
            work,
            trainer_class=TitleTrainer,
            adapter=LoraConfig(
                task_type=TaskType.CAUSAL_LM, r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear"
            ),
        )
        adapted: Any = outcome.model
        self._model = adapted.merge_and_unload().eval()
        return outcome.metrics

    @torch.inference_mode()
    def scores(self, pairs: pd.DataFrame) -> np.ndarray:
        """Scores [n] of (user_id, item_id), higher for likelier dislikes; -inf for items without a title."""
        task = self._task
        contexts = task.store.read("user_context", ["user_id", "negatives", "positives"], days=[task.until])
        past = {row["user_id"]: self._past(row) for row in contexts.to_pylist()}
        nothing = self._past({"negatives": [], "positives": []})
        asked = np.flatnonzero(pairs["item_id"].isin(self._titles.keys()))
        out = np.full(len(pairs), -np.inf)
        of_user = pairs.iloc[asked].groupby("user_id", sort=False).indices
        for n, (user, rows) in enumerate(of_user.items(), 1):
            told, items = past.get(str(user), nothing), pairs["item_id"].iloc[asked[rows]]
            found = self._mean_log_probs([answer for item in items for answer in self._ask(told, item)])
            each = found.reshape(len(rows), -1)
            out[asked[rows]] = each[:, 0] - each[:, 1] if self._kind == "tallrec" else each[:, 0]
            task.progress(n, len(of_user))
        return out

    def _samples(self) -> list[dict[str, Any]]:
        task = self._task
        task.store.require(TABLE, [task.until], f"run `negrec train generator --until {task.until}`")
        table = task.store.read(TABLE, days=[task.until])
        order = [(name, "ascending") for name in ("user_id", "anchor_time", "target")]
        rng = np.random.default_rng(task.seed)
        rows = []
        for row in table.sort_by(order).to_pylist():
            questions = [(row["target"], True, row)] if row["target"] in self._titles else []
            liked = [entry for entry in row["positives"] if entry["item_id"] in self._titles]
            if self._kind == "tallrec" and liked:
                drawn = liked[rng.integers(len(liked))]["item_id"]
                rest = [entry for entry in row["positives"] if entry["item_id"] != drawn]
                questions.append((drawn, False, {**row, "positives": rest}))
            for item, disliked, told in questions:
                answers = self._ask(self._past(told), item)
                prompt, answer = answers[0 if disliked else 1]
                rows.append({"prompt": prompt, "answer": answer, "length": len(prompt) + len(answer)})
        return rows

    def _past(self, row: dict[str, Any]) -> str:
        told = {}
        for name, column in (("disliked", "negatives"), ("liked", "positives")):
            entries = sorted(row[column], key=lambda entry: (entry["event_time"], entry["item_id"]))
            titles = [self._titles[e["item_id"]] for e in entries if e["item_id"] in self._titles]
            told[name] = "; ".join(titles[-_TITLES_TOLD:]) or "none"
        return self._text.past.format(**told)

    def _ask(self, past: str, item: str) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer as tokens: yes and no, or the title."""
        title = self._titles[item]
        if self._kind == "tallrec":
            prompt = self._encode(past + self._text.judge.format(title=title))
            return [(prompt, self._encode(answer, False)) for answer in (self._text.yes, self._text.no)]
        return [(self._encode(past + self._text.next), self._encode(f" {title}", False)[:TITLE_TOKENS])]

    def _encode(self, text: str, first: bool = True) -> list[int]:
        tokenizer = self._student.tokenizer
        start = [tokenizer.bos_token_id] if first and tokenizer.bos_token_id is not None else []
        return [*start, *tokenizer.encode(text, add_special_tokens=False)]

    def _batch(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return padded([_written(row["prompt"], row["answer"]) for row in samples], self._student.prompt.pad)

    def _mean_log_probs(self, rows: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
        """Of answers to prompts of one user: what they have in common, nearly all, is read once."""
        prompts = [prompt for prompt, _ in rows]
        # After its last token a prompt is answered, so that one is read with the answer.
        differs = (n for n, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
        shared = next(differs, min(map(len, prompts)) - 1)
        device = self._model.device
        first = torch.tensor([prompts[0][:shared]], device=device)
        read = self._model(input_ids=first, use_cache=True).past_key_values
        read.batch_repeat_interleave(len(rows))
        batch = padded(
            [_written(prompt[shared:], answer) for prompt, answer in rows], self._student.prompt.pad
        )
        logits = self._model(
            input_ids=batch["input_ids"].to(device),
            attention_mask=F.pad(batch["attention_mask"], (shared, 0), value=1).to(device),
            past_key_values=read,
        ).logits[:, :-1]
        labels = batch["labels"][:, 1:].to(device)
        losses = F.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return -(losses.sum(1) / (labels != IGNORED).sum(1)).double().cpu().numpy()


def _written(prompt: list[int], answer: list[int]) -> Written:
    return (
        [*prompt, *answer],
        [*[IGNORED] * len(prompt), *answer],
        [*[0.0] * len(prompt), *[1.0] * len(answer)],
    )
