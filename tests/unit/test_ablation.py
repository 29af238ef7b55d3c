"""The ablation: what its cells hold, that they share what they can, and how they are put together."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from test_curriculum import ANCHOR, DAY, DS, ITEMS, SETTINGS, make_tables, student_of, task_of
from warehouses import publish, save_codebook, small_codebook, write_rows

from jobs.generation import GenerationTask, _Loaded, predict_batch
from negrec_core.artefacts import list_versions
from negrec_core.beam.torch_engine import TorchBeamEngine
from negrec_core.config import load_config
from negrec_core.metrics import Estimate
from train.ablation.cells import cells, run
from train.ablation.grid import Grid, Link
from train.ablation.links import run_link
from train.ablation.summary import summarise
from train.ablation.variants import VARIANTS
from train.collaborative import collaborative_embeddings
from train.generator import TRAINING
from train.ours import Generation
from train.report import write_report
from train.titles import Budget, TitleModel

USERS = [f"u{n}" for n in range(24)]


@pytest.fixture
def store(tmp_path):
    """Users of a group disliked two of its items before their anchor and dislike a third after it."""
    root = tmp_path / "warehouse"
    manifest = save_codebook(root, small_codebook())
    store = publish(root, manifest.version, ITEMS, {})
    make_tables(store)
    contexts = store.read("training_next_negative", days=[DS]).to_pylist()
    write_rows(store, "anchor", [{"user_id": user, "anchor_time": ANCHOR} for user in USERS], DS)
    keep = ("user_id", "anchor_time", "negatives", "positives")
    write_rows(
        store, "user_context", [{name: row[name] for name in keep} for row in contexts], DS, revision=2
    )
    events = []
    for row in contexts:
        past = [(entry, -1) for entry in row["negatives"]] + [(entry, 1) for entry in row["positives"]]
        group = int(row["user_id"][1:]) % 4
        liked = next(f"i{(group + 1) % 4}{n}" for n in range(4))
        events += [
            {"user_id": row["user_id"], "item_id": item, "event_time": time, "polarity": polarity}
            for item, time, polarity in [
                *((entry["item_id"], entry["event_time"], polarity) for entry, polarity in past),
                (row["target"], ANCHOR + DAY, -1),
                (liked, ANCHOR + DAY, 1),
            ]
        ]
    write_rows(store, "feedback", [{**e, "source": "explicit", "weight": 1.0} for e in events], DS)
    shown = [{**{n: e[n] for n in ("user_id", "item_id", "event_time")}, "action": "like"} for e in events]
    write_rows(store, "behavior_log", shown, DS)
    return store


@pytest.fixture
def grid(tmp_path):
    return Grid(tmp_path / "work", "tiny", SETTINGS, 0)


def link_of(store, name, seed=1):
    variant = next(variant for variant in VARIANTS if variant.name == name)
    return Link("movielens", store.root, seed, variant.settings, variant.steps)


def cell_of(grid, name, seed=1):
    return json.loads((grid.work / "cells" / f"movielens-tiny-{name}-{seed}.json").read_text())


def test_cells_share_steps_are_kept_and_failures_are_tried_again(store, grid):
    samples = store.read("training_grpo", days=[DS]).to_pylist()
    write_rows(store, "training_grpo", [], DS, revision=2)
    names = ["times-disliked", "translation", "alignment", "grpo-a"]
    wanted = cells(grid, {"movielens": store.root}, names, [], [1])
    assert run(grid, wanted, 2, 0) == 1
    trained = sorted(path.name.split("-")[0] for path in (grid.work / "movielens" / TRAINING).iterdir())
    assert trained == ["alignment", "translation", "warm_up", "warm_up"]
    assert "training_grpo" in cell_of(grid, "grpo-a")["error"]
    cell = cell_of(grid, "alignment")
    assert [step["step"] for step in cell["measured"]] == ["translation", "alignment", "warm_up"]
    assert all(0 <= step["alignment_accuracy"] <= 1 for step in cell["measured"])
    assert {"FHR@20", "candidate accuracy, similarity", "AUC within user, generation"} <= set(cell["figures"])
    before = {
        name: (grid.work / "cells" / f"movielens-tiny-{name}-1.json").stat().st_mtime_ns for name in names
    }
    write_rows(store, "training_grpo", samples, DS, revision=3)
    assert run(grid, wanted, 1, 0) == 0
    after = {
        name: (grid.work / "cells" / f"movielens-tiny-{name}-1.json").stat().st_mtime_ns for name in names
    }
    assert [name for name in names if before[name] != after[name]] == ["grpo-a"]


def test_the_end_of_the_time_stops_what_is_unfinished(store, grid):
    wanted = cells(grid, {"movielens": store.root}, ["warm-up"], [], [1, 2])
    assert run(grid, wanted, 1, 1e-6) == 2


def test_what_is_disliked_most_is_judged_like_anything_else(store, grid):
    found = run_link(grid, link_of(store, "times-disliked"), None, True)
    # Sixteen IDs are legal, and all but the user's own two are in the set.
    assert found.error == ""
    assert found.figures["FHR@20"][0] == found.figures["HR@20"][0] == 1.0
    assert len(found.figures["FHR@20"]) == 1001


def test_models_of_titles_learn_from_the_same_dislikes_and_score_candidates_alone(store, grid):
    task = task_of(store)
    for kind in ("tallrec", "instructrec"):
        model = TitleModel(task, student_of(task), kind)
        samples = model._samples()
        assert len(samples) == 24 * (2 if kind == "tallrec" else 1)
        found = run_link(grid, link_of(store, kind), None, True)
        assert found.error == ""
        assert set(found.figures) == {"candidate accuracy, generation"}


def test_a_score_of_titles_is_the_mean_log_likelihood_of_the_answer(store, tmp_path):
    task = task_of(store)
    for kind in ("tallrec", "instructrec"):
        model = TitleModel(task, student_of(task), kind)
        model.fit(tmp_path / kind, Budget(max_steps=2))
        pairs = pd.DataFrame(
            {"user_id": ["u0", "u1", "nobody", "u0"], "item_id": ["i00", "i23", "i31", "new"]}
        )
        scores = model.scores(pairs)
        assert scores[3] == -np.inf
        contexts = {row["user_id"]: row for row in store.read("user_context", days=[DS]).to_pylist()}
        for user, item, score in zip(pairs["user_id"][:3], pairs["item_id"][:3], scores[:3], strict=True):
            past = model._past(contexts.get(user, {"negatives": [], "positives": []}))
            each = []
            for prompt, answer in model._ask(past, item):
                tokens = torch.tensor([[*prompt, *answer]])
                with torch.inference_mode():
                    logs = model._model(input_ids=tokens).logits[0].log_softmax(-1)
                own = [float(logs[len(prompt) + n - 1, token]) for n, token in enumerate(answer)]
                each.append(np.mean(own))
            expected = each[0] - each[1] if kind == "tallrec" else each[0]
            assert score == pytest.approx(expected, abs=1e-4)


def test_sets_are_the_first_of_the_beams_that_the_daily_job_keeps(store):
    task = task_of(store, "generation.beam_width=6", "generation.set_size=6")
    student = student_of(task)
    engine = TorchBeamEngine(student.model, student.prompt.vocabulary)
    settings = task.config.generation
    ours = Generation(engine, student.prompt, task.ids, settings, store, DS).sets(USERS)
    rows = store.read("user_context", ["user_id", "negatives", "positives"], days=[DS])
    job = GenerationTask(str(store.root), DS, 0, "", "model", "codebook", settings)
    leaf = task.trie.find(task.ids.codes)
    blocks = student.prompt.blocks(task.ids.codes)
    loaded = _Loaded(engine, student.prompt, task.trie, blocks, task.ids.index, leaf)
    theirs = predict_batch(rows.to_batches()[0], loaded, job).to_pylist()
    for user in USERS:
        codes = [row["codes"] for row in theirs if row["user_id"] == user]
        assert ours[user].tolist() == task.trie.find(np.array(codes)).tolist()


def test_ids_from_co_occurrence_are_made_once_and_learnt(store, grid):
    settings = (*SETTINGS, "codebook.codes_per_level=4", "codebook.levels=2")
    grid = Grid(grid.work, "tiny", settings, 0)
    for seed in (1, 2):
        assert run_link(grid, link_of(store, "collaborative", seed), None, True).error == ""
    assert len(list_versions(store.root / "models", "collaborative")) == 1
    assert len(list_versions(store.root / "models", "codebook")) == 1


def test_items_disliked_by_the_same_users_are_near():
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{user % 3}{item}", -1)
        for user in range(60)
        for item in rng.choice(6, 4, replace=False)
    ]
    rows += [("u0", "i10", 1), ("alone", "odd", 1)]
    items, vectors = collaborative_embeddings(
        pd.DataFrame(rows, columns=["user_id", "item_id", "polarity"]), 0
    )
    group = np.array([item[:2] for item in items])
    cosine = vectors @ vectors.T
    same = group[:, None] == group
    assert np.allclose(np.diag(cosine), 1, atol=1e-5)
    assert cosine[same].min() > cosine[~same].max()


def test_a_learning_rate_of_grpo_makes_rows_of_its_own(grid, tmp_path):
    made = cells(grid, {"movielens": tmp_path}, ["alignment", "grpo-next", "grpo-a"], ["3e-4", "1e-3"], [1])
    above = {cell.variant.name: cell.variant.above for cell in made}
    assert above == {
        "alignment": "translation",
        "grpo-next@3e-4": "alignment",
        "grpo-a@3e-4": "grpo-next@3e-4",
        "grpo-next@1e-3": "alignment",
        "grpo-a@1e-3": "grpo-next@1e-3",
    }
    for cell in made[1:]:
        rate = cell.variant.name.split("@")[1]
        config = grid.config("movielens", cell.link.steps[-1].settings)
        assert config.generator.grpo.learning_rate == float(rate)


def test_without_a_step_rows_that_become_the_same_are_one(grid, tmp_path):
    made = cells(grid, {"steam": tmp_path}, [], [], [1], ["alignment"])
    above = {cell.variant.name: cell.variant.above for cell in made}
    assert above["grpo-next"] == above["more-warm-up"] == "translation"
    assert not above.keys() & {"alignment", "aligned-last", "forget-warm-up", "forget-plain", "forget-grpo"}
    assert {"grpo-a", "grpo-c", "grpo-plain", "collaborative"} <= above.keys()
    assert all(step.name != "alignment" for cell in made for step in cell.link.steps)


def test_plain_grpo_and_more_warm_up_make_as_many_updates_as_the_stages(grid):
    by_name = {variant.name: variant for variant in VARIANTS}
    plain = grid.config("movielens", by_name["grpo-plain"].steps[-1].settings).generator.grpo.stages
    assert [(stage.context, stage.steps) for stage in plain] == [("both", 6)]
    assert (
        grid.config("movielens", by_name["more-warm-up"].steps[-1].settings).generator.warm_up.max_steps == 6
    )


def test_rows_are_means_over_seeds_with_paired_differences(tmp_path):
    rng = np.random.default_rng(0)
    draws = {name: rng.random((3, 201)) for name in ("warm-up", "translation")}
    folder = tmp_path / "cells"
    folder.mkdir()
    for name, above in (("warm-up", ""), ("translation", "warm-up")):
        for seed in range(3):
            failed = name == "translation" and seed == 2
            cell = {
                "dataset": "movielens",
                "preset": "tiny",
                "variant": name,
                "title": name,
                "above": above,
                "seed": seed,
                "users": 0,
                "generator": load_config([], [], {}).generator.model_dump(),
                "figures": {} if failed else {"FHR@20": draws[name][seed].tolist()},
                "measured": [{"step": "warm_up", "loss": float(seed), "legal": None}],
                "seconds": 1.0,
                "error": "it broke" if failed else "",
            }
            (folder / f"{name}-{seed}.json").write_text(json.dumps(cell))
    summarise(folder, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "movielens-tiny.json").read_text())
    first, second = found["rows"]
    assert [first["variant"], second["variant"]] == ["warm-up", "translation"]
    assert second["errors"] == {"2": "it broke"}
    assert first["steps"] == [{"step": "warm_up", "measured": {"loss": 1.0}}]
    expected = Estimate.of((draws["translation"][:2] - draws["warm-up"][:2]).mean(0))
    difference = second["difference"]["FHR@20"]
    shown = [difference[name] for name in ("value", "low", "high")]
    assert shown == pytest.approx([expected.value, expected.low, expected.high], abs=1e-5)
    spread = (draws["translation"][:2, 0] - draws["warm-up"][:2, 0]).std(ddof=1)
    assert difference["spread"] == pytest.approx(spread, abs=1e-5)

    results = tmp_path / "results"
    summarise(folder, results / "ablation")
    write_report(results, [], tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    interval = f"{expected.value:+.3f} [{expected.low:+.3f} {expected.high:+.3f}] ±{spread:.3f}"
    assert f"| translation | warm-up | - | {interval} | - | - |" in text
    assert "| translation | 2 | it broke |" in text


def test_the_report_says_what_a_later_step_forgets_and_plots_the_hits(tmp_path):
    def step(name, accuracy, **more):
        return {"step": name, "measured": {"alignment_accuracy": accuracy, "seconds": 60.0, **more}}

    names = ("HR@20", "FHR@20", "LUF@20", "LIF@20", "candidate accuracy, generation")
    row = {
        "variant": "forget-grpo",
        "title": "then progressive GRPO",
        "above": "aligned-last",
        "users": 100,
        "seeds": [7],
        "figures": {n: {"value": 0.2, "low": 0.1, "high": 0.3, "spread": float("nan")} for n in names},
        "difference": {},
        "steps": [
            step("warm_up", 0.25, steps=330.0),
            step("alignment", 0.8, steps=9.0),
            step("grpo", 0.6, reward_first=0.1, reward_last=0.4),
        ],
        "judging_seconds": 1.0,
        "errors": {},
    }
    settings = load_config([], ["generator.alignment.max_steps=9"], {}).generator.model_dump()
    about = {"dataset": "movielens", "title": "MovieLens", "preset": "tiny", "generator": settings}
    found = {**about, "rows": [row]}
    folder = tmp_path / "results" / "ablation"
    folder.mkdir(parents=True)
    (folder / "movielens-tiny.json").write_text(json.dumps(found))
    write_report(tmp_path / "results", [], tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    measured = "warm_up 0.250, alignment 0.800, grpo 0.600 | 25.0% | 0.100 to 0.400"
    measured += " | warm_up 330, alignment 9 | 180"
    assert f"| then progressive GRPO | {measured} |" in text
    assert "100 judged users drawn at random" in text
    assert "alignment 9 updates of 64 at 0.001; warm_up 3 epochs of 64 at 0.001; GRPO 50 (recent_neg" in text
    assert "](results/ablation/movielens-tiny.png)" in text
    assert (folder / "movielens-tiny.png").stat().st_size > 1000
