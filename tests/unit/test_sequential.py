"""Sequential recommenders: what is exported, how scores are read, and RecBole itself where it is set up."""

import datetime as dt
import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from warehouses import DS, Entry, publish, save_codebook, small_codebook, write_rows

from negrec_core.config import load_config
from negrec_core.errors import MissingError
from train.baselines import Known
from train.evaluate import evaluate
from train.sequential import MODELS, Probabilities, export, fit, sequential_baselines

START = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
REPO = Path(__file__).resolve().parents[2]
RECBOLE = Path(os.environ.get("NEGREC_RECBOLE", REPO / ".venv-recbole" / "bin" / "python"))
needs_recbole = pytest.mark.skipif(
    not RECBOLE.exists(), reason=f"{RECBOLE}: not there; `make recbole` makes it, or NEGREC_RECBOLE names one"
)


def known_of(events, category=None):
    """What (user, item, hour, polarity) events make known; leaf n is the n-th item."""
    past = pd.DataFrame(events, columns=["user_id", "item_id", "hour", "polarity"])
    past["event_time"] = [START + dt.timedelta(hours=hour) for hour in past.pop("hour")]
    items = sorted(set(past["item_id"]))
    graph = pd.DataFrame(columns=["item_id", "neighbor_id", "score"])
    leaf = {item: n for n, item in enumerate(items)}
    return Known(past, pd.Series(category or {}, dtype=object), graph, leaf, len(items), 5)


EVENTS = [("u", "b", 1, -1), ("u", "a", 3, -1), ("u", "c", 2, 1), ("v", "a", 1, -1), ("w", "c", 1, 1)]


# ---------------------------------------------------------------------------------- the export


def read_log(work):
    """User number -> tokens by place, and token -> category tokens, of the atomic files."""
    (_, *events), (_, *items) = (
        [line.split("\t") for line in (work / "log" / name).read_text().splitlines()]
        for name in ("log.inter", "log.item")
    )
    users = {}
    for user, token, place in sorted(events, key=lambda row: (int(row[0]), int(row[2]))):
        users.setdefault(int(user), []).append(token)
        assert int(place) == len(users[int(user)]) - 1
    return users, {token: category.split(" ") for token, category in items}


def test_export_by_hand(tmp_path):
    known = known_of(EVENTS, {"a": "x/y", "b": "x", "c": "z/y"})
    items = export(known, pd.Index(["v", "new"]), True, tmp_path)
    assert items.tolist() == ["a", "b", "c"]
    users, categories = read_log(tmp_path)
    assert users == {
        0: ["start", "-0", "end"],
        1: ["start", "end"],
        2: ["start", "-1", "+2", "-0", "end"],
        3: ["start", "+2", "end"],
    }
    assert categories.keys() == {"-0", "-1", "-2", "+0", "+1", "+2", "start", "end"}
    (x, y), (z, _) = categories["-0"], categories["-2"]
    assert len({x, y, z}) == 3
    assert [categories[token] for token in ("+0", "-1", "+1", "-2", "+2")] == [
        [x, y],
        [x],
        [x],
        [z, y],
        [z, y],
    ]
    assert categories["start"] == ["none"]


def test_the_header_names_the_types_that_recbole_reads(tmp_path):
    export(known_of(EVENTS), pd.Index(["u"]), False, tmp_path)
    heads = [(tmp_path / "log" / f"log.{kind}").read_text().splitlines()[0] for kind in ("inter", "item")]
    assert heads == ["user_id:token\titem_id:token\ttimestamp:float", "item_id:token\tcategory:token_seq"]


NAMES = st.sampled_from(["a", "b c", "tab\there", "-1", "nan", "é"])


@given(
    events=st.lists(st.tuples(NAMES, NAMES, st.integers(0, 5), st.sampled_from([-1, 1])), min_size=1),
    asked=st.lists(NAMES, unique=True, min_size=1),
    both=st.booleans(),
)
def test_export_holds_every_event_in_order(tmp_path_factory, events, asked, both):
    events.append(("a", "a", 3, -1))
    work = tmp_path_factory.mktemp("log")
    items = export(known_of(events, {"b c": "odd name/with\ttab"}), pd.Index(asked), both, work).tolist()
    wanted = {}
    for user, item, hour, polarity in sorted(events, key=lambda event: (event[2], event[1])):
        if both or polarity == -1:
            wanted.setdefault(user, []).append(
                (hour, item, f"{'-' if polarity < 0 else '+'}{items.index(item)}")
            )
    found, _ = read_log(work)
    order = [*asked, *sorted(wanted.keys() - set(asked))]
    assert found.keys() == set(range(len(order)))
    for number, user in enumerate(order):
        first, *tokens, last = found[number]
        assert (first, last) == ("start", "end")
        events_of_user = wanted.get(user, [])
        assert sorted(tokens) == sorted(token for *_, token in events_of_user)
        places = [items[int(token[1:])] for token in tokens]
        assert places == [item for _, item, _ in events_of_user]


def test_dislikes_are_needed(tmp_path):
    with pytest.raises(MissingError, match="no dislikes before the anchors"):
        export(known_of([("u", "a", 1, 1)]), pd.Index(["u"]), True, tmp_path)


# ------------------------------------------------------------------------ what is made of scores


PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=30)


def random_probabilities(polarities, seed):
    """For four users and five of the seven items `0` to `6`."""
    logs = np.random.default_rng(seed).normal(size=(polarities, 4, 5)).astype(np.float32)
    return Probabilities(pd.Index(list("ptqs")), pd.Index([f"{n}" for n in range(5)]), logs)


@given(pairs=PAIRS, polarities=st.integers(1, 2), seed=st.integers(0, 9))
def test_scores_are_looked_up(pairs, polarities, seed):
    model = random_probabilities(polarities, seed)
    rows = pd.DataFrame([(model.users[u], f"{i}") for u, i in pairs], columns=["user_id", "item_id"])
    wanted = []
    for user, item in pairs:
        logs = model.logs[:, user].astype(float)
        values = logs[0] - logs[1] if polarities == 2 else logs[0]
        wanted.append(values[item] if item < 5 else values.mean())
    np.testing.assert_allclose(model.scores(rows), wanted, atol=1e-6)


def test_a_user_not_asked_for_has_no_scores():
    rows = pd.DataFrame([("p", "0"), ("nobody", "0")], columns=["user_id", "item_id"])
    with pytest.raises(KeyError, match="nobody"):
        random_probabilities(1, 0).scores(rows)


@given(seed=st.integers(0, 50))
def test_sets_are_the_likeliest_distinct_new_ids(seed):
    rng = np.random.default_rng(seed)
    items = pd.Index([f"i{n}" for n in range(40)])
    model = Probabilities(pd.Index(["u", "v"]), items, rng.normal(size=(2, 2, 40)).astype(np.float32))
    leaf = {f"i{n}": int(rng.integers(28)) for n in range(40) if n % 10}
    own = {"v": np.unique(rng.integers(28, size=5))}
    found = model.sets(leaf, own)
    for row, user in enumerate("uv"):
        wanted = []
        for n in sorted(range(40), key=lambda n: -model.logs[0, row, n]):
            at = leaf.get(f"i{n}")
            if at is not None and at not in wanted and at not in own.get(user, ()):
                wanted.append(at)
        assert found[user].tolist() == wanted[:20]


# ---------------------------------------------------------------------------- around the runner


def stand_in(path, body):
    """A program in RecBole's place, which runs Python code in the work directory."""
    path.write_text(f"#!{sys.executable}\nimport json, os, shutil, sys\nimport numpy as np\n{body}")
    path.chmod(0o755)
    return path


UNIFORM = """
job = json.load(open("job.json"))
shape = job["polarities"], job["users"], job["items"]
logs = np.broadcast_to(np.log(1 / shape[0] / (1 + np.arange(shape[2]))), shape).astype(np.float32)
np.save("log_probabilities.npy", logs)
best = {"learning_rate": 1e-3, "dropout": 0.2, "epochs": 1, "ndcg": 0.5}
json.dump({"chosen": best, "rows": 3, "valid": 2}, open("report.json", "w"))
"""


def test_every_model_is_fitted_on_dislikes_and_on_both(tmp_path):
    python = stand_in(tmp_path / "python", UNIFORM)
    known = known_of(EVENTS)
    pairs = pd.DataFrame({"user_id": ["u", "v"], "item_id": ["c", "a"]})
    found = sequential_baselines(known, ["u", "v"], 1, python, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    assert list(found) == [f"{m}, {p}" for p in ("dislikes", "both") for m in MODELS]
    for name, method in found.items():
        wanted = [0, 0] if "both" in name else -np.log([3, 1])
        np.testing.assert_allclose(method.score(pairs), wanted, atol=1e-6)
        # u has disliked a and b already, v only a.
        assert {user: leaves.tolist() for user, leaves in method.sets.items()} == {"u": [2], "v": [1, 2]}


def test_a_failure_is_one_line_with_what_was_said(tmp_path):
    python = stand_in(tmp_path / "python", 'sys.exit("noise\\nno module named recbole")')
    with pytest.raises(MissingError) as failure:
        fit(known_of(EVENTS), pd.Index(["u"]), "SASRec", True, 1, python, tmp_path / "kept")
    said = "RecBole did not fit SASRec: no module named recbole"
    assert str(failure.value) == f"{python}: {said}; `make recbole` sets up its environment"
    with pytest.raises(MissingError, match="No such file or directory; `make recbole`"):
        fit(known_of(EVENTS), pd.Index(["u"]), "SASRec", True, 1, tmp_path / "absent", tmp_path / "kept")


def test_models_that_were_fitted_before_a_failure_are_not_fitted_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    fault = tmp_path / "fault"
    python = stand_in(
        tmp_path / "python",
        UNIFORM
        + f"""
if job["model"] == "FDSA" and os.path.exists({str(fault)!r}):
    sys.exit("cut")
with open(os.environ["SEEN"], "a") as seen:
    seen.write(f"{{job['polarities']}} {{job['model']}}\\n")
""",
    )

    def fitted(work):
        (tmp_path / "seen").write_text("")
        work()
        return (tmp_path / "seen").read_text().splitlines()

    def all_models():
        sequential_baselines(known_of(EVENTS), ["u", "v"], 1, python, tmp_path / "kept")

    def failing():
        with pytest.raises(MissingError, match="did not fit FDSA: cut"):
            all_models()

    fault.touch()
    before = fitted(failing)
    fault.unlink()
    assert {"1 Caser", "1 SASRec", "1 BERT4Rec"} <= {*before}
    every = [f"{polarities} {model}" for polarities in (1, 2) for model in MODELS]
    assert sorted(before + fitted(all_models)) == sorted(every)

    def one_model(events):
        fit(known_of(events), pd.Index(["u"]), "SASRec", False, 1, python, tmp_path / "kept")

    assert fitted(lambda: one_model(EVENTS)) == ["1 SASRec"]
    assert fitted(lambda: one_model(EVENTS)) == []
    assert fitted(lambda: one_model([*EVENTS, ("v", "b", 9, -1)])) == ["1 SASRec"]


def test_nothing_at_or_after_the_anchor_is_exported(tmp_path):
    """The whole way from the warehouse: other events after the anchor change no byte of what RecBole gets."""
    keep = """shutil.copytree(".", f"{os.environ['KEPT']}/{job['polarities']} {job['model']}")\n"""
    python = stand_in(tmp_path / "python", UNIFORM + keep)
    end = load_config([], [], {}).end_of_day(DS)
    hour = dt.timedelta(hours=1)
    past = [("u", "a", -hour, -1), ("u", "b", -2 * hour, 1), ("v", "b", -3 * hour, -1)]
    judgement = [("u", "b", hour, -1), ("v", "a", hour, 1)]
    poison = [
        ("u", "c", 2 * hour, -1),
        ("v", "c", 24 * hour, -1),
        ("u", "a", 48 * hour, 1),
        ("v", "c", 0 * hour, 1),
    ]
    for name, events in (("clean", past + judgement), ("poisoned", past + judgement + poison)):
        root = tmp_path / name
        version = save_codebook(root, small_codebook((4, 4))).version
        codes = {"a": (0, 0), "b": (1, 1), "c": (2, 2)}
        store = publish(
            root, version, codes, {"u": [Entry((2, 2))]}, categories={"a": "x", "b": "x", "c": "y"}
        )
        by_day = {(dt.date.fromisoformat(DS) + dt.timedelta(days=n)).isoformat(): [] for n in range(-5, 9)}
        for user, item, after, polarity in events:
            row = {"user_id": user, "item_id": item, "event_time": end + after, "polarity": polarity}
            by_day[(end + after).date().isoformat()].append(row)
        for day, rows in by_day.items():
            write_rows(store, "feedback", rows, day)
        write_rows(store, "negative_item_set", [], DS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KEPT", str(tmp_path / f"{name} export"))
            evaluate(root, load_config([], [], {}), DS, seed=1, sequential=python)
    left, right = tmp_path / "clean export", tmp_path / "poisoned export"
    folders = [f"{polarities} {model}" for polarities in (1, 2) for model in MODELS]
    names = [
        f"{folder}/{file}" for folder in folders for file in ("job.json", "log/log.inter", "log/log.item")
    ]
    assert filecmp.cmpfiles(left, right, names, shallow=False) == (names, [], [])
    assert read_log(left / "1 SASRec")[0] == {0: ["start", "-0", "end"], 1: ["start", "-1", "end"]}
    assert read_log(left / "2 FDSA")[0][0] == ["start", "+1", "-0", "end"]


# ----------------------------------------------------------------------------------- RecBole


def alternating(users=60, length=12):
    """Users of three kinds: kind k dislikes items of class k and likes items of class k + 1, modulo 3."""
    rng = np.random.default_rng(0)
    for user in range(users):
        for hour in range(length):
            disliked = rng.random() < 0.5
            item = int(rng.integers(10)) * 3 + (user if disliked else user + 1) % 3
            yield f"u{user}", f"i{item}", hour, -1 if disliked else 1


@needs_recbole
@pytest.mark.parametrize("both", [False, True])
def test_sasrec_learns_who_dislikes_what(both, tmp_path):
    setting = {"learning_rate": 3e-3, "dropout": 0.2}
    known = known_of(list(alternating()), {f"i{n}": f"c{n % 3}" for n in range(30)})
    asked = pd.Index(["u0", "u1", "u2", "new"])
    kept = tmp_path / "kept"
    model = fit(known, asked, "SASRec", both, 7, RECBOLE, kept, settings=[setting], epochs=8)
    np.testing.assert_allclose(np.exp(model.logs).sum((0, 2)), 1, rtol=1e-5)
    kinds = np.array([int(item[1:]) % 3 for item in model.items])
    pairs = pd.DataFrame(
        [(user, item) for user in asked for item in model.items], columns=["user_id", "item_id"]
    )
    scores = model.scores(pairs).reshape(len(asked), -1)
    assert np.isfinite(scores).all()
    for user in range(3):
        means = [scores[user, kinds == kind].mean() for kind in range(3)]
        assert np.argmax(means) == user


@needs_recbole
@pytest.mark.parametrize("model", ["SASRec", "BERT4Rec"])
def test_rows_to_learn_from_and_to_choose_by(tmp_path, model):
    """RecBole's rows against a loop: targets, prefixes, each user's last dislike and what comes before."""
    events = list(alternating(users=8, length=9))
    items = export(known_of(events), pd.Index(["u3", "new"]), True, tmp_path)
    job = {"model": model, "polarities": 2, "users": 2, "items": len(items), "length": 6, "seed": 1}
    job |= {"epochs": 1, "patience": 1, "pretrain_epochs": 1}
    (tmp_path / "job.json").write_text(json.dumps(job))
    program = f"""
import json, sys
sys.path.insert(0, {str(REPO / "train")!r})
sys.argv = sys.argv[:1]
import numpy as np
import recbole_runner as runner
job = json.load(open("job.json"))
config = runner.config_of(job, {{"learning_rate": 1e-3, "dropout": 0.2}}, 1)
log = runner.Log(job, config)
valid, before = log.held_out(1)
names = log.data.field2id_token["item_id"]
def rows(part):
    found = part.inter_feat
    return [
        [str(names[item]) for item in sequence[:length] if item] + [str(names[target])]
        for sequence, length, target in zip(found["item_id_list"], found["item_length"], found["item_id"])
    ]
learnt = log.learnable(1)
json.dump({{
    "learnt": rows(log.training(config, learnt)._dataset),
    "before": rows(log.part(learnt & before)),
    "valid": rows(log.ranked(config, valid)._dataset),
    "asked": rows(log.ranked(config, log.prediction)._dataset),
}}, open("rows.json", "w"))
"""
    subprocess.run(
        [RECBOLE, "-I", "-W", "ignore", "-c", program], cwd=tmp_path, check=True, capture_output=True
    )
    found = json.loads((tmp_path / "rows.json").read_text())
    users, _ = read_log(tmp_path)
    dislikes, likes, before, valid, asked = [], [], [], [], []
    for user, tokens in users.items():
        last = max((n for n, token in enumerate(tokens) if token[0] == "-"), default=len(tokens))
        for n in range(1, len(tokens)):
            row = tokens[max(0, n - 6) : n + 1]
            if n == last:
                valid.append(row)
            if tokens[n] == "end" and user < 2:
                asked.append(row)
            if tokens[n] != "end":
                # BERT4Rec learns the row's target as the last of a sequence.
                learnt = [*row[-6:], tokens[n + 1]] if model == "BERT4Rec" else row
                (dislikes if tokens[n][0] == "-" else likes).append(learnt)
                if n < last:
                    before.append(row)
    assert sorted(found["valid"]) == sorted(valid)
    assert sorted(found["asked"]) == sorted(asked)
    learnt = sorted(map(tuple, found["learnt"]))
    assert len(learnt) == 2 * len(dislikes) or len(likes) < len(dislikes)
    assert {*map(tuple, dislikes)} <= {*learnt} <= {*map(tuple, dislikes + likes)}
    assert {*map(tuple, found["before"])} <= {*map(tuple, before)}
