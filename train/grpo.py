"""Progressive GRPO on future feedback, with rollouts that are legal by construction (DESIGN section 7, 4).

Three stages of context: recent dislikes, all dislikes, dislikes and likes. The trainer is trl's; what is
ours is injected. Rollouts are drawn from the trie by the tree decoder of the beam search, rewards are
those of `train.rewards`, and the policy of the loss is the one that was drawn from and that beam search
ranks by: the softmax over legal codes alone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import trl.import_utils as trl_imports
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor

from negrec_core.beam.torch_engine import TorchBeamEngine
from negrec_core.config import GrpoStageConfig
from negrec_core.errors import InputError
from negrec_core.prompts import Event, context_events
from negrec_core.trie import Trie
from train.checkpoints import SafeCheckpoints
from train.likelihood import constrained_log_probs
from train.rewards import Reward, Targets
from train.samples import Samples
from train.steps import Outcome, Student, Task, common_arguments, processes, train

# Rollouts are not vLLM's here. Where it is installed trl would import all of it, a third of the time that a
# training takes to start.
trl_imports.is_vllm_available = lambda min_version=None: False
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

TABLE = "training_grpo"
_LOG = "log.json"
_MICROSECONDS_PER_DAY = 86_400_000_000
# Beams looked at when a stage's model says which samples the next one should see again.
_BEAMS_JUDGED = 10


def load(task: Task) -> Samples:
    """Samples of `training_grpo` that hold a rejected item with a semantic ID.

    Returns:
        Contexts with what came after them: `sids`, `disliked` and `time` (microseconds) of the past;
        `anchor` (microseconds); `negatives`, the semantic IDs that it is good to come near
        (`generator.grpo.rewarded`), and `positives`, those liked within the horizon.

    Raises:
        MissingError: the table has no partition for the log date.
        InputError: there is no sample to learn from.
    """
    task.store.require(TABLE, [task.until], f"run `negrec train grpo --until {task.until}`")
    version = task.store.version(TABLE)
    table = task.store.read(TABLE, days=[task.until], version=version)
    table = table.sort_by([("user_id", "ascending"), ("anchor_time", "ascending")])
    index = task.ids.index
    of_anchor = _dislikes_at_anchors(task) if task.config.generator.grpo.rewarded == "next" else {}
    rows = []
    for row in (row for batch in table.to_batches(max_chunksize=10_000) for row in batch.to_pylist()):
        negatives = [index[item] for item in _rewarded(task, row, of_anchor) if item in index]
        if negatives:
            events = sorted(context_events(row["negatives"], row["positives"], index))
            rows.append(
                {
                    "sids": [event.sid for event in events],
                    "disliked": [event.disliked for event in events],
                    "time": [event.time for event in events],
                    "anchor": int(row["anchor_time"].timestamp() * 1e6),
                    "negatives": negatives,
                    "positives": [index[item] for item in row["future_positives"] if item in index],
                }
            )
    if not rows:
        raise InputError(
            f"table {TABLE}: ds={task.until} has no context with a whole horizon after it that holds a"
            " dislike; import more days, or leave grpo out of generator.steps"
        )
    return Samples(Dataset.from_list(rows), {TABLE: version})


def _rewarded(task: Task, row: dict[str, Any], of_anchor: dict[tuple[str, Any], list[str]]) -> list[str]:
    rewarded = task.config.generator.grpo.rewarded
    if rewarded == "next":
        return of_anchor.get((row["user_id"], row["anchor_time"]), [])
    neighbours = row["expanded_negatives"] if rewarded == "expanded" else []
    return [*row["future_negatives"], *(entry["item_id"] for entry in neighbours)]


def _dislikes_at_anchors(task: Task) -> dict[tuple[str, Any], list[str]]:
    """(user, time) -> what the user disliked then: an anchor of training is the time of a dislike."""
    days = [day for day in task.store.days("feedback") if day <= task.until]
    rows = task.store.read("feedback", ["user_id", "item_id", "event_time", "polarity"], days=days)
    found: dict[tuple[str, Any], list[str]] = {}
    for row in rows.filter(pc.equal(rows["polarity"], -1)).to_pylist():
        found.setdefault((row["user_id"], row["event_time"]), []).append(row["item_id"])
    return found


def fit(task: Task, student: Student, samples: Samples, work: Path) -> Outcome:
    """Run the stages one after the other; a stage that was finished before a kill is not run again."""
    settings = task.config.generator.grpo
    rows = samples.rows
    reward = Reward(
        settings.scheme,
        settings.gamma,
        task.codebook,
        task.ids.codes,
        Targets.of(rows["negatives"]),
        Targets.of(rows["positives"]),
    )
    curve: list[dict[str, Any]] = []
    for number, stage in enumerate(settings.stages):
        finished = work / f"stage-{number}"
        if not finished.is_dir():
            # The reference of a stage is the model at its start, read from disk by the trainer.
            begin = Student.open(work / f"stage-{number - 1}", "") if number else student
            blocks = begin.prompt.blocks(task.ids.codes)
            prompts = [
                begin.prompt.write(
                    past(row, stage.context, settings.recent_days),
                    blocks,
                    task.config.generation.pad_prompts_to,
                )[0]
                for row in rows
            ]
            repeat = np.ones(len(rows), np.int64)
            if number:
                hard = [hard_samples(task, begin, rows, reward, stage, settings.augment_above)]
                # Of one mind, though processes may round differently.
                repeat += broadcast_object_list(hard)[0]
            trainer = _stage_trainer(task, begin, stage, prompts, repeat, reward, work / f"run-{number}")
            model, log = train(trainer, task, work / f"run-{number}")
            if processes().is_main_process:
                unfinished = work / f"stage-{number}.unfinished"
                Student(model, begin.tokenizer, begin.prompt, "").save(unfinished)
                (unfinished / _LOG).write_text(json.dumps(log), encoding="utf-8")
                unfinished.rename(finished)
            processes().wait_for_everyone()
        offset = curve[-1]["step"] if curve else 0
        log = json.loads((finished / _LOG).read_text(encoding="utf-8"))
        curve += [{**entry, "step": entry["step"] + offset} for entry in log]
    last = Student.open(work / f"stage-{len(settings.stages) - 1}", "")
    metrics = {
        "samples": len(rows),
        "reward_first": curve[0]["reward"] if curve else None,
        "reward_last": curve[-1]["reward"] if curve else None,
        "kl": curve[-1].get("kl") if curve else None,
    }
    return Outcome(last.model, curve, metrics)


def past(row: dict[str, Any], context: str, recent_days: int) -> list[Event]:
    """Events of a sample that a stage's prompt shows.

    Args:
        row: of `load`.
        context: `recent_negatives`, `negatives` or `both`.
        recent_days: dislikes of this many days before the anchor are recent.
    """
    since = row["anchor"] - recent_days * _MICROSECONDS_PER_DAY if context == "recent_negatives" else None
    return [
        Event(time, disliked, sid)
        for time, disliked, sid in zip(row["time"], row["disliked"], row["sids"], strict=True)
        if (disliked or context == "both") and (since is None or time >= since)
    ]


def hard_samples(
    task: Task, student: Student, rows: Dataset, reward: Reward, stage: GrpoStageConfig, above: float
) -> np.ndarray:
    """1 for the samples [n] whose best predictions come nearer than `above` to a future like, else 0."""
    engine = TorchBeamEngine(student.model, student.prompt.vocabulary)
    blocks = student.prompt.blocks(task.ids.codes)
    recent = task.config.generator.grpo.recent_days
    prompts = [student.prompt.write(past(row, stage.context, recent), blocks)[0] for row in rows]
    width = min(_BEAMS_JUDGED, task.trie.n_ids)
    found = engine.search(prompts, task.trie, width).codes.reshape(-1, task.trie.depth)
    samples = np.repeat(np.arange(len(rows)), width)
    near = reward.similarity(task.codebook.unit(found), samples, reward.positives)
    return (near.reshape(len(rows), width).max(1) > above).astype(np.int64)


def _stage_trainer(
    task: Task,
    student: Student,
    stage: GrpoStageConfig,
    prompts: list[list[int]],
    repeat: np.ndarray,
    reward: Reward,
    work: Path,
) -> "ConstrainedGRPOTrainer":
    settings = task.config.generator.grpo
    rng = np.random.default_rng([task.seed, len(prompts)])
    order = np.repeat(np.arange(len(prompts)), repeat)
    wanted = stage.steps * settings.prompts * processes().num_processes
    order = np.concatenate([rng.permutation(order) for _ in range(-(-wanted // len(order)))])[:wanted]
    return ConstrainedGRPOTrainer(
        model=student.model,
        reward_funcs=[_as_reward_function(reward, task.trie, student.prompt.vocabulary.first_token)],
        args=GRPOConfig(
            **common_arguments(task, work),
            num_train_epochs=1,
            per_device_train_batch_size=settings.prompts * settings.group_size,
            num_generations=settings.group_size,
            max_completion_length=task.trie.depth,
            learning_rate=settings.learning_rate,
            beta=stage.kl,
            loss_type="grpo",
            temperature=1.0,
            # The order of the samples is drawn above, so that a killed stage goes on where it was.
            shuffle_dataset=False,
        ),
        # Prompts are token ids; the trainer passes on their numbers.
        train_dataset=Dataset.from_dict({"prompt": [str(n) for n in order], "sample": order.tolist()}),
        processing_class=student.tokenizer,
        rollout_func=Rollouts(task, student, prompts),
        task=task,
        student=student,
    )


class Rollouts:
    """Draws one legal semantic ID for each prompt number that the trainer gives, in groups."""

    def __init__(self, task: Task, student: Student, prompts: list[list[int]]) -> None:
        self._settings = task.config.generator.grpo
        self._seed = task.seed
        self._trie = task.trie
        self._vocabulary = student.prompt.vocabulary
        self._prompts = prompts
        distinct = self._settings.rollouts == "distinct"
        if distinct and task.trie.n_ids < self._settings.group_size:
            raise InputError(
                f"generator.grpo.group_size: {self._settings.group_size} distinct IDs cannot be drawn from"
                f" {task.trie.n_ids}; set generator.grpo.rollouts=independent or a smaller group"
            )

    def __call__(self, numbers: list[str], trainer: Any) -> dict[str, list[list[Any]]]:
        """Completions in the order of `numbers`, which come repeated, a group in a row."""
        size = self._settings.group_size
        chosen = [self._prompts[int(number)] for number in numbers[::size]]
        model = trainer.accelerator.unwrap_model(trainer.model)
        engine = TorchBeamEngine(model, self._vocabulary)
        # By the step alone, so that a training that is taken up draws what it would have drawn.
        process = trainer.accelerator.process_index
        seed = np.random.SeedSequence([self._seed, trainer.state.global_step, process])
        generator = torch.Generator().manual_seed(int(seed.generate_state(1)[0]))
        drawn = engine.sample(
            chosen, self._trie, size, generator, distinct=self._settings.rollouts == "distinct"
        )
        tokens = drawn.codes.reshape(-1, self._trie.depth) + np.asarray(self._vocabulary.first_token)
        # The trainer wants a log-probability per token; only their sum is known here and nothing reads them.
        each = drawn.log_probs.reshape(-1, 1).repeat(self._trie.depth, 1) / self._trie.depth
        return {
            "prompt_ids": [self._prompts[int(number)] for number in numbers],
            "completion_ids": tokens.tolist(),
            "logprobs": each.tolist(),
        }


class ConstrainedGRPOTrainer(SafeCheckpoints, GRPOTrainer):
    """The stock trainer, whose policy is the softmax over legal codes alone."""

    def __init__(self, *args: Any, task: Task, student: Student, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trie = task.trie
        self._sid_vocabulary = student.prompt.vocabulary

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        log_probs, entropies = [], []
        step = batch_size or len(input_ids)
        for start in range(0, len(input_ids), step):
            rows = slice(start, start + step)
            mask = attention_mask[rows]
            logits = model(
                input_ids=input_ids[rows],
                attention_mask=mask,
                # Prompts are padded on the left; without padding they were drawn from.
                position_ids=(mask.cumsum(1) - 1).clamp_min(0),
                logits_to_keep=logits_to_keep + 1,
            ).logits[:, :-1]
            ids = input_ids[rows, -logits_to_keep:]
            of_ids = constrained_log_probs(logits, ids, self._trie, self._sid_vocabulary)
            log_probs.append(of_ids[0])
            entropies.append(of_ids[1])
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None


def _as_reward_function(reward: Reward, trie: Trie, first_token: tuple[int, ...]) -> Any:
    def future_feedback(
        completion_ids: list[list[int]], sample: list[int], log_metric: Any, **_: Any
    ) -> list[float]:
        codes = np.asarray(completion_ids) - np.asarray(first_token)
        log_metric("legal", float(trie.contains(codes).mean()))
        return list(map(float, reward(codes, np.asarray(sample))))

    return future_feedback
