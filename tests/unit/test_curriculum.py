"""The curriculum: what each step learns, that steps follow on each other, and that a kill costs little."""

import datetime as dt
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from warehouses import DS, publish, save_codebook, small_codebook, write_rows

from negrec_core.beam.torch_engine import TorchBeamEngine
from negrec_core.config import load_config
from negrec_core.delta import DeltaStore
from negrec_core.errors import ArtefactError, InputError, MissingError
from negrec_core.generator import open_codebook, open_generator
from negrec_core.progress import silent
from negrec_core.semantic_ids import load_semantic_ids
from train import alignment, grpo, translation, warm_up
from train.generator import TRAINING, train_generator
from train.models import build_model, load_prompt_text
from train.steps import Student, Task

ANCHOR = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
# Sixteen items in four groups by their first code; a user of a group rejects its items and likes the next's.
ITEMS = {f"i{g}{n}": (g, n, (g + n) % 4) for g in range(4) for n in range(4)}
SETTINGS = (
    "generator.preset=tiny",
    "generator.steps=[translation, alignment, warm_up, grpo]",
    "generator.checkpoint_steps=2",
    *(
        f"generator.{step}.{name}"
        for step in ("translation", "alignment", "warm_up")
        for name in ("max_steps=5", "batch_size=8", "learning_rate=0.01")
    ),
    "generator.grpo.stages=[{context: recent_negatives, kl: 0.1, steps: 3},"
    " {context: both, kl: 0.0, steps: 3}]",
    "generator.grpo.prompts=4",
    "generator.grpo.group_size=4",
)

RARE_CHECKPOINTS = "generator.checkpoint_steps=1000"


def events(items, days_ago):
    return [
        {"item_id": item, "event_time": ANCHOR - n * DAY, "reason_class": None}
        for item, n in zip(items, days_ago, strict=True)
    ]


def make_tables(store: DeltaStore, n: int = 24) -> None:
    rng = np.random.default_rng(0)
    samples = []
    for user in range(n):
        group = user % 4
        own, other = (
            [f"i{group}{k}" for k in rng.permutation(4)],
            [f"i{(group + 1) % 4}{k}" for k in rng.permutation(4)],
        )
        samples.append(
            {
                "user_id": f"u{user}",
                "anchor_time": ANCHOR,
                "negatives": events(own[:2], (1, 5)),
                "positives": events(other[:3], (2, 3, 4)),
                "own": own,
                "other": other,
            }
        )
    context = ("user_id", "anchor_time", "negatives", "positives")
    past = [{name: sample[name] for name in context} for sample in samples]
    titles = [{"item_id": item, "title": f"kind{item[1]} thing{item[2]}"} for item in ITEMS]
    write_rows(store, "item", titles, DS, revision=2)
    pairs = [
        {"item_id": item, "task": task}
        for item in ITEMS
        for task in (translation.TO_TITLE, translation.TO_SID)
    ]
    write_rows(store, "training_translation", pairs, DS)
    rows = [{**row, "target": sample["own"][2]} for row, sample in zip(past, samples, strict=True)]
    write_rows(store, "training_next_negative", rows, DS)
    choices = [
        {**row, "distractors": sorted(sample["other"][:3]), "held_out": n % 3 == 0}
        for n, (row, sample) in enumerate(zip(rows, samples, strict=True))
    ]
    write_rows(store, "training_alignment", choices, DS)
    futures = [
        {
            **row,
            "future_negatives": sample["own"][2:],
            "expanded_negatives": [{"item_id": sample["own"][0], "via": sample["own"][2], "score": 1.0}],
            "future_positives": sample["other"][3:],
        }
        for row, sample in zip(past, samples, strict=True)
    ]
    write_rows(store, "training_grpo", futures, DS)


def make_store(root):
    manifest = save_codebook(root, small_codebook())
    store = publish(root, manifest.version, ITEMS, {})
    make_tables(store)
    return store


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


def config_of(*settings):
    return load_config([], (*SETTINGS, *settings), {})


def trained(store, *settings, seed=1, progress=silent, last_step=None):
    config = config_of(*settings)
    return train_generator(
        store, store.root / "models", config, DS, seed=seed, progress=progress, last_step=last_step
    )


def task_of(store, *settings):
    models = store.root / "models"
    codebook, manifest = open_codebook(models, next((models / "codebook").iterdir()).name)
    ids = load_semantic_ids(store, manifest.version, DS)
    return Task(store, config_of(*settings), DS, 1, codebook, manifest, ids, silent)


def student_of(task):
    text = load_prompt_text("plain")
    titles = ["kind0 thing0", "kind0 thing1", "kind1 thing0", "kind1 thing1"]
    return Student(*build_model("tiny", text, task.codebook, 128, 1, titles), "")


def weights_of(store, manifest):
    return load_file(store.root / "models" / "generator" / manifest.version / "model.safetensors")


def test_all_steps_make_a_generator_that_opens_and_says_how_it_was_made(store):
    manifest = trained(store)
    opened = open_generator(store.root / "models", DS)
    assert opened.manifest.version == manifest.version
    assert [name.rsplit("-", 1)[0] for name in manifest.parameters["training"]] == [
        "translation",
        "alignment",
        "warm_up",
        "grpo",
    ]
    assert set(manifest.inputs) == {
        "item",
        "training_translation",
        "training_alignment",
        "training_next_negative",
        "training_grpo",
    }
    for step in ("alignment", "warm_up", "grpo"):
        assert 0 <= manifest.metrics[f"{step}.alignment_accuracy"] <= 1
    held = {file.suffix for file in (store.root / "models" / "generator" / manifest.version).iterdir()}
    assert held <= {".json", ".jinja", ".png", ".safetensors"}


def test_a_finished_step_is_not_trained_again(store, monkeypatch):
    trained(store, last_step="warm_up")
    assert not (store.root / "models" / "generator").exists()
    for step in (translation, alignment, warm_up):
        monkeypatch.setattr(step, "fit", None)
    trained(store)
    assert len(list((store.root / "models" / TRAINING).iterdir())) == 4


def test_other_settings_samples_or_seeds_train_anew(store):
    only = "generator.steps=[warm_up]"
    made = {trained(store, only, last_step="warm_up").version}
    made.add(trained(store, only, "generator.warm_up.like_weight=1", last_step="warm_up").version)
    made.add(trained(store, only, seed=2, last_step="warm_up").version)
    row = {
        "codebook_version": task_of(store).codebook_manifest.version,
        "item_id": "last",
        "codes": (3, 3, 0),
    }
    known = store.read("item_semantic_id", days=[DS]).to_pylist()
    write_rows(store, "item_semantic_id", [*known, row], DS, revision=2)
    made.add(trained(store, only, last_step="warm_up").version)
    assert len(made) == 4, "one more legal ID"
    make_tables_with_another_past(store)
    made.add(trained(store, only, last_step="warm_up").version)
    assert len(made) == 5
    # The same rows again, as another revision of the table, are no reason to.
    make_tables_with_another_past(store, revision=3)
    made.add(trained(store, only, last_step="warm_up").version)
    assert len(made) == 5


def make_tables_with_another_past(store, revision=2):
    rows = [{"user_id": "u", "anchor_time": ANCHOR, "target": "i00", "negatives": [], "positives": []}]
    write_rows(store, "training_next_negative", rows * 1, DS, revision=revision)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import test_curriculum as here
from negrec_core.delta import DeltaStore
# What is imported takes longer than the training, so processes share it.
for root, left in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    child = os.fork()
    if not child:
        def progress(done, total):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        here.trained(DeltaStore(Path(root)), progress=progress)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# In the middle of translation, of warm-up (in its second epoch), and of GRPO's second stage.
KILLED_AFTER = (4, 14, 18)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Warehouses whose training was killed after so many steps, and the weights of one where it was not."""
    folder = tmp_path_factory.mktemp("killed")
    undisturbed = make_store(folder / "undisturbed")
    roots = {after: shutil.copytree(undisturbed.root, folder / f"after {after}") for after in KILLED_AFTER}
    script = KILLED.format(paths=[str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    arguments = [str(part) for after, root in roots.items() for part in (root, after)]
    ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert ended.stdout.split() == [str(-signal.SIGKILL)] * len(roots), ended.stderr
    return roots, weights_of(undisturbed, trained(undisturbed))


@pytest.mark.parametrize("after", KILLED_AFTER)
def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(killed, after):
    roots, expected = killed
    store = DeltaStore(roots[after])
    assert not (store.root / "models" / "generator").exists()
    steps = []
    resumed = weights_of(store, trained(store, progress=lambda done, total: steps.append(done)))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in resumed)
    assert len(steps) < 21, "what was done before the kill was not done again"


def test_curves_can_go_to_mlflow(store, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: the lock has no tracker")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "negrec")
    trained(store, "generator.steps=[warm_up, grpo]", "generator.tracking=mlflow")
    runs = mlflow.search_runs(experiment_names=["negrec"], output_format="list")
    assert sorted(run.info.run_name.split("-")[0] for run in runs) == ["grpo", "grpo", "warm_up"]
    assert all("reward" in run.data.metrics for run in runs if run.info.run_name.startswith("grpo"))
    assert all(run.info.status == "FINISHED" for run in runs)


def test_a_tracker_that_is_not_installed_is_asked_for_in_one_line(store, monkeypatch):
    monkeypatch.setattr("train.steps.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"generator\.tracking: Python package mlflow is not installed"):
        trained(store, "generator.steps=[warm_up]", "generator.tracking=mlflow")


PROCESS = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import torch.distributed
import test_curriculum as here
from negrec_core.delta import DeltaStore
from train.steps import processes
manifest = here.trained(DeltaStore(Path(sys.argv[1])), here.RARE_CHECKPOINTS)
assert "vllm" not in sys.modules
state = processes()
said = (state.process_index, state.num_processes, torch.distributed.get_backend(), manifest.version)
# In one write, or what two processes print is mixed up.
sys.stdout.write(" ".join(map(str, ("PROCESS", *said))) + "\\n")
"""


def test_two_processes_train_one_generator_and_one_of_them_writes_it(store, tmp_path):
    """As `accelerate launch --multi_gpu` starts them, but over gloo on the CPU."""
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(paths=[str(Path(__file__).parent), str(Path(__file__).parent.parent)]))
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command = [sys.executable, *launch.split(), str(script), str(store.root)]
    ended = subprocess.run(command, env=os.environ, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    said = sorted(line.split() for line in ended.stdout.splitlines() if line.startswith("PROCESS"))
    assert [words[1:4] for words in said] == [["0", "2", "gloo"], ["1", "2", "gloo"]]
    assert said[0][4] == said[1][4], "both know the one generator"
    assert [path.name for path in (store.root / "models" / "generator").iterdir()] == [said[0][4]]
    kept = sorted(path.name.split("-")[0] for path in (store.root / "models" / TRAINING).iterdir())
    assert kept == ["alignment", "grpo", "translation", "warm_up"]
    assert open_generator(store.root / "models", DS).manifest.metrics["grpo.samples"] == 24


def test_a_checkpoint_that_was_cut_is_passed_over(tmp_path):
    from train.checkpoints import latest_checkpoint

    for step, state in ((2, "{}"), (10, '{"global_step": 1'), (4, "{}")):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        (path / "trainer_state.json").write_text(state, encoding="utf-8")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert latest_checkpoint(tmp_path / "none") is None


def test_grpo_learns_what_earns_rewards(store):
    stage = "[{context: both, kl: 0.0, steps: 60}]"
    manifest = trained(
        store,
        "generator.steps=[warm_up, grpo]",
        f"generator.grpo.stages={stage}",
        "generator.warm_up.max_steps=15",
        "generator.grpo.learning_rate=0.001",
        "generator.grpo.prompts=8",
        "generator.grpo.group_size=8",
        RARE_CHECKPOINTS,
    )
    assert manifest.metrics["grpo.reward_last"] > manifest.metrics["grpo.reward_first"] + 0.15


def test_what_is_rewarded_can_be_the_next_dislike_the_horizon_or_its_neighbours_too(store):
    later = [
        {"user_id": f"u{user}", "item_id": item, "event_time": ANCHOR + n * DAY, "polarity": polarity}
        for user in range(24)
        for n, (item, polarity) in enumerate([(f"i{user % 4}3", -1), ("i00", -1), ("i01", 1)])
    ]
    later += [{**row, "item_id": "i02", "polarity": 1} for row in later[::3]]
    rows = [{**row, "source": "explicit", "weight": 1.0} for row in later]
    write_rows(store, "feedback", rows, DS)
    found = {
        name: grpo.load(task_of(store, f"generator.grpo.rewarded={name}")).rows["negatives"]
        for name in ("next", "horizon", "expanded")
    }
    index = task_of(store).ids.index
    table = store.read("training_grpo", days=[DS]).sort_by("user_id").to_pylist()
    assert list(found["next"]) == [[index[f"i{int(row['user_id'][1:]) % 4}3"]] for row in table]
    assert list(found["horizon"]) == [[index[item] for item in row["future_negatives"]] for row in table]
    assert list(found["expanded"]) == [
        [*ids, index[row["expanded_negatives"][0]["item_id"]]]
        for ids, row in zip(found["horizon"], table, strict=True)
    ]


@pytest.mark.parametrize("rollouts", ["distinct", "independent"])
def test_rollouts_are_legal_and_the_policy_is_what_they_were_drawn_from(store, rollouts, tmp_path):
    task = task_of(store, f"generator.grpo.rollouts={rollouts}")
    student = student_of(task)
    samples = grpo.load(task)
    blocks = student.prompt.blocks(task.ids.codes)
    rows = samples.rows
    # Of different lengths, so that the trainer pads them on the left.
    prompts = [
        student.prompt.write(grpo.past(row, ("both", "negatives", "recent_negatives")[n % 3], 3), blocks)[0]
        for n, row in enumerate(rows)
    ]
    reward = grpo.Reward(
        "a",
        0.0,
        task.codebook,
        task.ids.codes,
        grpo.Targets.of(rows["negatives"]),
        grpo.Targets.of(rows["positives"]),
    )
    trainer = grpo._stage_trainer(
        task,
        student,
        task.config.generator.grpo.stages[1],
        prompts,
        np.ones(len(rows), int),
        reward,
        tmp_path,
    )
    numbers = [str(n) for n in range(4) for _ in range(4)]
    drawn = trainer.rollout_func(numbers, trainer)
    first = np.array(student.prompt.vocabulary.first_token)
    codes = np.array(drawn["completion_ids"]) - first
    assert task.trie.contains(codes).all()
    if rollouts == "distinct":
        assert all(len({tuple(c) for c in codes[n : n + 4].tolist()}) == 4 for n in range(0, 16, 4))
    width = max(map(len, drawn["prompt_ids"]))
    pad = student.prompt.pad
    padded = [[pad] * (width - len(p)) + p for p in drawn["prompt_ids"]]
    ids = torch.tensor([p + c for p, c in zip(padded, drawn["completion_ids"], strict=True)])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * (len(p) + 3) for p in drawn["prompt_ids"]])
    assert (mask == 0).any()
    with torch.no_grad():
        found, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, 3, batch_size=5, compute_entropy=True
        )
    np.testing.assert_allclose(found.sum(1), np.array(drawn["logprobs"]).sum(1), atol=1e-4)
    assert (entropies >= 0).all()
    whole = TorchBeamEngine(student.model, student.prompt.vocabulary).search([prompts[0]], task.trie, 16)
    # The entropy of the first code is that of the searched probabilities, summed over what follows.
    chance = np.zeros(4)
    np.add.at(chance, whole.codes[0, :, 0], np.exp(whole.log_probs[0]))
    assert float(entropies[0, 0]) == pytest.approx(-(chance * np.log(chance)).sum(), abs=1e-3)


def test_contexts_of_the_stages_show_what_they_should(store):
    row = grpo.load(task_of(store)).rows[0]
    shown = {name: grpo.past(row, name, 3) for name in ("recent_negatives", "negatives", "both")}
    assert [event.disliked for event in shown["negatives"]] == [True, True]
    assert len(shown["recent_negatives"]) == 1
    assert shown["recent_negatives"][0].time == max(event.time for event in shown["negatives"])
    assert len(shown["both"]) == 5


def test_samples_whose_predictions_are_liked_next_are_found(store):
    task = task_of(store)
    student, rows = student_of(task), grpo.load(task).rows
    targets = grpo.Targets.of(rows["negatives"]), grpo.Targets.of(rows["positives"])
    reward = grpo.Reward("c", 0.5, task.codebook, task.ids.codes, *targets)
    stage = task.config.generator.grpo.stages[1]
    assert grpo.hard_samples(task, student, rows, reward, stage, 1.1).sum() == 0
    engine = TorchBeamEngine(student.model, student.prompt.vocabulary)
    blocks = student.prompt.blocks(task.ids.codes)
    expected = []
    for row in rows:
        prompt = student.prompt.write(grpo.past(row, stage.context, 3), blocks)[0]
        codes = engine.search([prompt], task.trie, 10).codes[0]
        liked = task.codebook.unit(task.ids.codes[row["positives"]])
        expected.append(int((task.codebook.unit(codes) @ liked.T).max() > 0.97))
    assert grpo.hard_samples(task, student, rows, reward, stage, 0.97).tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_alignment_learns_which_of_four_is_rejected(store):
    steps = "generator.steps=[alignment]"
    before = alignment.accuracy(task_of(store), student_of(task_of(store)))
    manifest = trained(
        store,
        steps,
        "generator.alignment.max_steps=100",
        RARE_CHECKPOINTS,
        last_step="alignment",
    )
    assert before < 0.7
    assert manifest.metrics["alignment_accuracy"] > 0.9


def test_options_stand_before_the_past_in_random_order(store):
    task = task_of(store)
    student = student_of(task)
    rows = alignment.load(task).rows
    writer = warm_up.SampleWriter(
        student.prompt, student.prompt.blocks(task.ids.codes), 0.0, 0.0, 1, 0.0, 0.0, 1
    )
    blocks, head = student.prompt.blocks(task.ids.codes), [*student.prompt.head, *student.prompt.one_of]
    orders = set()
    for seed in range(40):
        tokens, labels, weights = writer.write(rows[0], np.random.default_rng(seed))
        assert tokens[: len(head)] == head
        named = [tuple(tokens[at : at + 3]) for at in range(len(head), len(head) + 12, 3)]
        assert sorted(named) == sorted(blocks[sid] for sid in rows[0]["options"])
        assert tuple(tokens[-3:]) == blocks[rows[0]["target"]] == tuple(labels[-3:])
        assert sum(weights) == 3, "only the answer is learnt"
        orders.add(tuple(named))
    assert len(orders) > 12


def test_merging_keeps_what_the_adapter_says_and_refuses_what_it_does_not(store):
    student = student_of(task_of(store))
    adapter = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear", trainable_token_indices=[5, 6]
    )
    adapted = get_peft_model(student.model, adapter)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora" in name or "trainable_tokens" in name:
                weight += 0.1 * torch.randn_like(weight)
    probe = torch.tensor([[1, 5, 6, 7]])
    expected = adapted(input_ids=probe).logits
    merged = alignment.merge(adapted, probe)
    torch.testing.assert_close(merged(input_ids=probe).logits, expected, atol=1e-4, rtol=1e-4)

    class Broken(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids):
            return adapted_output(merged(input_ids=input_ids).logits + 1)

        def merge_and_unload(self):
            return merged

    with pytest.raises(ArtefactError, match="merging the adapter moved the logits"):
        alignment.merge(Broken(), probe)


def adapted_output(logits):
    return type("Output", (), {"logits": logits})()


def test_translation_asks_both_ways(store):
    task = task_of(store)
    student = student_of(task)
    rows = translation.load(task).rows
    assert len(rows) == 2 * len(ITEMS)
    writer = translation.TitleWriter(task, student)
    blocks = student.prompt.blocks(task.ids.codes)
    end = student.tokenizer.eos_token_id
    for row in rows:
        tokens, labels, weights = writer.write(row)
        words = student.tokenizer.encode(row["title"], add_special_tokens=False)
        answer = [*words, end] if row["to_title"] else [*blocks[row["sid"]]]
        asked = [*blocks[row["sid"]]] if row["to_title"] else words
        assert tokens[-len(answer) :] == labels[-len(answer) :] == answer
        assert "".join(map(chr, asked)) in "".join(map(chr, tokens[: -len(answer)]))
        assert weights == [0.0] * (len(tokens) - len(answer)) + [1.0] * len(answer)


def test_translation_learns_the_titles(store):
    one = trained(store, "generator.translation.max_steps=20", last_step="translation")
    many = trained(
        store,
        "generator.translation.max_steps=80",
        RARE_CHECKPOINTS,
        last_step="translation",
    )
    assert many.metrics["loss"] < 0.5 * one.metrics["loss"]


@pytest.mark.parametrize(
    ("step", "table", "reason"),
    [
        ("alignment", "training_alignment", "min_rejections"),
        ("grpo", "training_grpo", "leave grpo out"),
        ("translation", "training_translation", "no item with a title"),
    ],
)
def test_a_step_without_samples_is_one_line(store, step, table, reason):
    write_rows(store, table, [], DS, revision=2)
    with pytest.raises(InputError, match=reason):
        trained(store, f"generator.steps=[{step}]")


def test_more_distinct_rollouts_than_ids_are_refused(store):
    settings = ("generator.grpo.rollouts=distinct", "generator.grpo.group_size=17")
    with pytest.raises(InputError, match="17 distinct IDs cannot be drawn from 16"):
        trained(store, "generator.steps=[grpo]", *settings)
