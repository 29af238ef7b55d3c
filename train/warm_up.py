"""Next-negative warm-up (DESIGN section 7, 3).

A warm-up sample is a user's past before an anchor and the item disliked at it. The loss covers the
target's codes and, since each is the next event of its kind after its own prefix, those of the past.
"""

from pathlib import Path

from negrec_core.errors import InputError
from train.samples import Samples, SampleWriter, load_samples
from train.steps import Outcome, Student, Task
from train.supervised import fine_tune

TABLE = "training_next_negative"


def load(task: Task) -> Samples:
    """Samples of `training_next_negative`.

    Raises:
        MissingError: the table has no partition for the log date.
        InputError: there is no sample to learn from.
    """
    task.store.require(TABLE, [task.until], f"run `negrec train generator --until {task.until}`")
    version = task.store.version(TABLE)
    rows = load_samples(task.store.read(TABLE, days=[task.until], version=version), task.ids.index)
    if not len(rows):
        raise InputError(
            f"table {TABLE}: ds={task.until} has no sample whose item has a semantic ID;"
            " import feedback with dislikes, and run the stage item_semantic_id"
        )
    return Samples(rows, {TABLE: version})


def fit(task: Task, student: Student, samples: Samples, work: Path) -> Outcome:
    """Fine-tune the model on the samples."""
    settings = task.config.generator.warm_up
    writer = SampleWriter(
        student.prompt,
        student.prompt.blocks(task.ids.codes),
        settings.like_weight,
        1.0,
        task.config.generation.pad_prompts_to,
        settings.event_dropout,
        settings.shuffle_share,
        task.seed,
    )
    return fine_tune(task, student, samples, writer, settings, work)
