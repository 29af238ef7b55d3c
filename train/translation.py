"""Translation: semantic ID to title, and title to semantic ID (DESIGN section 7, 1)."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from trl import SFTConfig

from negrec_core.errors import InputError
from negrec_core.items import load_items
from train.likelihood import ConstrainedTrainer
from train.models import load_prompt_text
from train.samples import IGNORED, Written, padded
from train.steps import Outcome, Student, Task, common_arguments, train

TABLE = "training_translation"
TO_TITLE, TO_SID = "sid_to_title", "title_to_sid"
# Longer titles are cut: their end says little.
_TITLE_TOKENS = 24


@dataclass(frozen=True)
class TitleSamples:
    """Rows `sid`, `title`, `to_title`, `length`."""

    rows: Dataset
    inputs: dict[str, int]

    @property
    def digest(self) -> str:
        found = hashlib.sha256()
        for row in self.rows:
            found.update(f"{row['sid']} {row['to_title']} {row['title']}\n".encode())
        return found.hexdigest()


def load(task: Task) -> TitleSamples:
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
    return TitleSamples(Dataset.from_list(rows), {TABLE: version, "item": items})


def fit(task: Task, student: Student, samples: TitleSamples, work: Path) -> Outcome:
    """Fine-tune the model on both directions."""
    settings = task.config.generator.translation
    trainer = _TranslationTrainer(
        model=student.model,
        args=SFTConfig(
            **common_arguments(task, work),
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=samples.rows,
        data_collator=TitleWriter(task, student),
        processing_class=student.tokenizer,
        trie=task.trie,
        vocabulary=student.prompt.vocabulary,
    )
    model, curve = train(trainer, task, work)
    return Outcome(
        model,
        curve,
        {"samples": len(samples.rows), "loss": curve[-1]["loss"] if curve else None},
    )


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
        block, title = self._blocks[sample["sid"]], self._encode(sample["title"])[:_TITLE_TOKENS]
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


class _TranslationTrainer(ConstrainedTrainer):
    """Titles by the plain likelihood, semantic IDs by the constrained one."""

    def total_loss(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        titles, labels = inputs["to_title"], inputs["labels"]
        of_sids = {name: value[~titles] for name, value in inputs.items()}
        of_titles = F.cross_entropy(
            logits[titles][:, :-1].flatten(0, 1).float(),
            labels[titles][:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        return of_titles + super().total_loss(logits[~titles], of_sids)
