"""Translation: semantic ID to title, and title to semantic ID (DESIGN section 7, 1)."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from negrec_core.errors import InputError
from negrec_core.items import load_items
from train.likelihood import ConstrainedTrainer
from train.models import load_prompt_text
from train.samples import IGNORED, Samples, Written, padded
from train.steps import Outcome, Student, Task
from train.supervised import fine_tune

TABLE = "training_translation"
TO_TITLE, TO_SID = "sid_to_title", "title_to_sid"
# Longer titles are cut: their end says little.
TITLE_TOKENS = 24


def load(task: Task) -> Samples:
    """Pairs of `training_translation`, with the titles of `item`.

    Raises:
        MissingError: the table has no partition for the log date.
        InputError: no item has a title and a semantic ID.
    """
    task.store.require(TABLE, [task.until], f"run `negrec train translation --until {task.until}`")
    version, items = task.store.version(TABLE), task.store.version("item")
    table = load_items(task.store, task.until, items, ["title"])
    titles = dict(zip(table["item_id"].to_pylist(), table["title"].to_pylist(), strict=True))
    pairs = task.store.read(TABLE, ["item_id", "task"], days=[task.until], version=version)
    pairs = pairs.sort_by([("item_id", "ascending"), ("task", "ascending")])
    rows: list[dict[str, Any]] = [
        {
            "sid": task.ids.index[pair["item_id"]],
            "title": titles[pair["item_id"]],
            "to_title": pair["task"] == TO_TITLE,
            "length": len(titles[pair["item_id"]].split()),
        }
        for pair in pairs.to_pylist()
        if pair["item_id"] in task.ids.index and titles.get(pair["item_id"])
    ]
    if not rows:
        raise InputError(f"table {TABLE}: ds={task.until} has no item with a title and a semantic ID")
    return Samples(Dataset.from_list(rows), {TABLE: version, "item": items})


def fit(task: Task, student: Student, samples: Samples, work: Path) -> Outcome:
    """Fine-tune the model on both directions."""
    settings = task.config.generator.translation
    writer = TitleWriter(task, student)
    return fine_tune(task, student, samples, writer, settings, work, trainer_class=_TranslationTrainer)


class TitleWriter:
    """Writes translation samples as a padded batch; see `train.samples.padded`.

    A title ends with the end-of-sequence token; a semantic ID needs no end.
    """

    def __init__(self, task: Task, student: Student) -> None:
        text = load_prompt_text(task.config.generator.prompt)
        tokenizer = student.tokenizer

        def ids(part: str) -> list[int]:
            return list(tokenizer.encode(part, add_special_tokens=False))

        self._encode = ids
        self._title_of, self._item_called, self._answer = map(
            ids, (text.title_of, text.item_called, text.answer)
        )
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._start = [] if start is None else [start]
        self._end = [] if end is None else [end]
        self._pad = student.prompt.pad
        self._blocks = [list(block) for block in student.prompt.blocks(task.ids.codes)]

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch, and `to_title` bool [batch]."""
        batch = padded([self.write(sample) for sample in samples], self._pad)
        return {**batch, "to_title": torch.tensor([sample["to_title"] for sample in samples])}

    def write(self, sample: dict[str, Any]) -> Written:
        """Tokens, labels and weights of a sample."""
        block, title = self._blocks[sample["sid"]], self._encode(sample["title"])[:TITLE_TOKENS]
        if sample["to_title"]:
            prompt, answer = [*self._title_of, *block, *self._answer], [*title, *self._end]
        else:
            prompt, answer = [*self._item_called, *title, *self._answer], block
        prompt = [*self._start, *prompt]
        return (
            [*prompt, *answer],
            [*[IGNORED] * len(prompt), *answer],
            [*[0.0] * len(prompt), *[1.0] * len(answer)],
        )


class TitleTrainer(ConstrainedTrainer):
    """Any tokens by the plain likelihood."""

    def total_loss(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            inputs["labels"][:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )


class _TranslationTrainer(TitleTrainer):
    """Titles by the plain likelihood, semantic IDs by the constrained one."""

    def total_loss(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        titles = inputs["to_title"]
        of_titles, of_sids = (
            {name: value[rows] for name, value in inputs.items()} for rows in (titles, ~titles)
        )
        return super().total_loss(logits[titles], of_titles) + ConstrainedTrainer.total_loss(
            self, logits[~titles], of_sids
        )
