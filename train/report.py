"""`train/RESULTS.md` from what `train.tables` and `train.ablation` found."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from negrec_core.metrics import FIGURES, LONG_TAIL, Estimate
from train.ours import GENERATION, OURS, SIMILARITY
from train.plots import plot_methods

_PARTS = (OURS, SIMILARITY, GENERATION)
_NONE = {"value": math.nan}
# The figures of which less is better.
_LOST = FIGURES["likes lost at equal recall"]
_CLAIMS = (
    "blocked at 1 %",
    "blocked at 5 %",
    "AUC within user",
    "FHR@20",
    "LUF@20",
    "LIF@20",
    "candidate accuracy",
    *_LOST,
)
_HEAD = """# Results

Made by `make tables` from the files in `results/`; not to be edited. Figures are means over seeds. Intervals
are 95 % bootstrap intervals over users, of the mean over seeds in each of 1,000 resamples; those of a
difference are paired: both methods are judged on the same resampled users. ± is the standard deviation of
the difference over seeds, which the intervals do not hold. `similarity alone` is the cosine to the nearest
predicted ID, the rule of the paper; `generation alone` is the generator's log-likelihood of the item's
semantic ID. Both are parts of negrec, not baselines. Likes lost: the share of the likes that is blocked
together with that share of the dislikes; less is better. How many were judged and the coverage of main
negative interests are those of the first seed: of a log all seeds have the same; in the demo world each
seed is a world of its own.
"""

_ABLATION = """## What each part of the curriculum adds

Made by `python -m train.ablation`. Each row is a generator alone, without the block score and without
choosing its set anew among what is disliked most: the first 20 IDs of its beam search, the candidate
accuracy by its likelihood of the candidates (generation) and by the cosine to the nearest of the 20
(similarity), and the within-user AUC of both. Differences are to the row named, with intervals and ± as
above, with `tiny` of 200 resamples. All rows of a data set have the same vocabulary, starting weights per
seed, samples and settings but for what the row says. TIGER's task is next-item generation from scratch over
semantic IDs; here it is a decoder that also learns from each event of the past, knows likes from dislikes,
and has a likelihood over legal IDs alone. LC-Rec's tasks add semantic ID to title and back. P5-CID's IDs
come from who reacted to what; items alike share one there (KuaiRand: 13 % of the items, up to 39 in an ID),
which is hit more easily, while IDs from text are one for each item. TALLRec's and InstructRec's models read
titles and have a score of candidates only, their likelihood of a yes or of the title, after updates of 8
samples each; for times disliked it is the count. `@` is GRPO's learning rate. Alignment: share of held-out
questions answered with the rejected item of four, after each step.
"""
_HITS = ("HR@20", "FHR@20", "LUF@20", "LIF@20")
_SCORED = tuple(
    f"{figure}, {by}"
    for figure in ("candidate accuracy", "AUC within user")
    for by in ("generation", "similarity")
)


def write_report(results: Path, order: Sequence[str], out: Path) -> None:
    """Write the report and its plots.

    Args:
        results: folder of the files that `train.summary` makes; plots are written there too. Its folder
            `ablation` holds what `train.ablation` found.
        order: names of the data sets.
        out: file of the report, in the folder above `results`.
    """
    paths = [path for name in order if (path := results / f"{name}.json").exists()]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    judged = [dataset for dataset in found if dataset["rows"]]
    parts = [_HEAD, _summary(judged), *(_dataset(dataset, results) for dataset in judged)]
    ablations = sorted((results / "ablation").glob("*.json"))
    if ablations:
        parts.append(_ABLATION)
    for path in ablations:
        plot = path.with_suffix(".png")
        content = json.loads(path.read_text(encoding="utf-8"))
        parts.append(_ablation(content, plot, plot.relative_to(out.parent)))
    parts.append(_costs(cell for dataset in found for cell in dataset["cells"]))
    out.write_text("\n".join(parts), encoding="utf-8")


def _summary(datasets: Sequence[dict[str, Any]]) -> str:
    rows = []
    for dataset in datasets:
        ours, *others = dataset["rows"]
        for figure in _CLAIMS:
            known = [
                row
                for row in others
                if row["method"] not in _PARTS and not math.isnan(row["figures"].get(figure, _NONE)["value"])
            ]
            if known:
                best = (min if figure in _LOST else max)(
                    known, key=lambda row: row["figures"][figure]["value"]
                )
                of_best, difference = best["figures"][figure]["value"], best["difference"][figure]
                # Over the seeds of both, as the difference is, so that the three agree.
                value = of_best + difference["value"]
                alike = best["seeds"] == ours["seeds"]
                rows.append(
                    [
                        dataset["title"],
                        figure,
                        _show(_of(ours["figures"][figure])) if alike else f"{value:.3f}",
                        _named(best, ours),
                        f"{of_best:.3f}",
                        f"{value / of_best:.2f}" if of_best else "-",
                        _shift(difference),
                    ]
                )
    head = ["data", "figure", OURS, "best other", "of that", "ratio", "difference"]
    return "## Beside the best other method\n\n" + _table(head, rows)


def _dataset(found: dict[str, Any], results: Path) -> str:
    judged = next(cell["evaluation"] for cell in found["cells"] if not cell["error"])
    ours = found["rows"][0]
    drawn = judged["candidates"]
    lines = [
        f"## {found['title']}\n",
        f"{judged['users']:,} users, {judged['dislikes']:,} dislikes, {judged['likes']:,} likes; seeds"
        f" {', '.join(map(str, ours['seeds']))}. Candidate accuracy: {drawn['users']:,} users,"
        f" {drawn['whole']:,} of them with all 20 candidates, {drawn['other_days']:,} with some of other"
        f" days; {drawn['alone']:,} users were shown nothing else and are left out.\n",
    ]
    for about, names in {**FIGURES, "the long tail": LONG_TAIL}.items():
        head = ["method", *names]
        body = [
            [
                _named(row, ours),
                *(_show(_of(row["figures"][n]) if n in row["figures"] else None) for n in names),
            ]
            for row in found["rows"]
        ]
        lines += [f"### {about.capitalize()}\n", _table(head, body)]
        body = [
            [_named(row, ours), *(_shift(row["difference"].get(n)) for n in names)]
            for row in found["rows"]
            if row["difference"]
        ]
        lines += [f"{OURS} minus:\n", _table(head, body)]
    lines += ["### Main negative interests covered\n", _coverage(judged["coverage"])]
    plot = results / f"{found['dataset']}.png"
    shown = ("blocked at 1 %", "blocked at 5 %", *FIGURES["likes lost at equal recall"])
    bars = {f: {_named(row, ours): _of(row["figures"][f]) for row in found["rows"]} for f in shown}
    plot_methods(bars, plot, found["title"])
    return "\n".join([*lines, f"![{found['title']}]({results.name}/{plot.name})\n"])


def _coverage(shares: dict[str, dict[str, dict[str, float]]]) -> str:
    head = ["", *next(iter(shares.values()))]
    return _table(
        head, [[top, *(_show(_of(own[column])) for column in head[1:])] for top, own in shares.items()]
    )


def _ablation(found: dict[str, Any], plot: Path, link: Path) -> str:
    rows = found["rows"]
    titles = {row["variant"]: row["title"] for row in rows}
    judged = {row["variant"]: row for row in rows if row["figures"]}
    if not judged:
        return ""
    seeds: list[int] = max((row["seeds"] for row in rows), key=len)
    users = next(iter(judged.values()))["users"]
    sample = f"; {users:,} judged users drawn at random" if users else ""
    made = {step["step"] for row in rows for step in row["steps"]}
    how = _how(found["generator"], made)
    about = f"### {found['title']}, {found['preset']}\n\nSeeds {', '.join(map(str, seeds))}{sample}.{how}\n"
    lines = [about]
    for names in (_HITS, _SCORED):
        body = [
            [
                row["title"],
                str(len(row["seeds"])),
                *(_show(_of(row["figures"][n]) if n in row["figures"] else None) for n in names),
            ]
            for row in judged.values()
        ]
        lines.append(_table(["row", "seeds", *names], body))
        body = [
            [
                row["title"],
                titles.get(row["above"], row["above"]),
                *(_shift(row["difference"].get(n)) for n in names),
            ]
            for row in judged.values()
            if row["difference"]
        ]
        if body:
            lines.append(_table(["row", "minus", *names], body))
    lines.append(_steps(judged.values()))
    failed = [
        [row["title"], seed, error.replace("|", "/")] for row in rows for seed, error in row["errors"].items()
    ]
    if failed:
        lines.append(_table(["row", "seed", "failed with"], failed))
    shown = (*_HITS, *_SCORED[:1])
    known = {
        row["title"]: row["figures"]
        for row in judged.values()
        if all(name in row["figures"] for name in shown)
    }
    if known:
        title = f"{found['title']}, {found['preset']}"
        plot_methods(
            {name: {row: _of(own[name]) for row, own in known.items()} for name in shown}, plot, title
        )
        lines.append(f"![{title}]({link})\n")
    return "\n".join(lines)


def _how(settings: dict[str, Any], steps: set[str]) -> str:
    """The budget of each of the generator's steps that was made."""
    parts = []
    for name in ("translation", "alignment", "warm_up"):
        if name not in steps:
            continue
        own = settings[name]
        most = f"{own['max_steps']} updates" if own["max_steps"] > 0 else f"{own['epochs']:g} epochs"
        parts.append(f"{name} {most} of {own['batch_size']} at {own['learning_rate']:g}")
    if "grpo" in steps:
        grpo = settings["grpo"]
        stages = " + ".join(f"{stage['steps']} ({stage['context']})" for stage in grpo["stages"])
        parts.append(f"GRPO {stages} updates of {grpo['prompts']} prompts, {grpo['group_size']} IDs each")
    return f" Budget: {'; '.join(parts)}." if parts else ""


def _of(figure: dict[str, float]) -> Estimate:
    return Estimate(figure["value"], figure["low"], figure["high"])


def _shift(figure: dict[str, float] | None) -> str:
    if figure is None or math.isnan(figure["value"]):
        return "-"
    spread = "" if math.isnan(figure["spread"]) else f" ±{figure['spread']:.3f}"
    return _show(_of(figure), "+") + spread


def _steps(rows: Iterable[dict[str, Any]]) -> str:
    """What was measured in training: alignment after each step, what later steps forget, reward, cost."""
    body = []
    for row in rows:
        accuracy = [(step["step"], step["measured"].get("alignment_accuracy")) for step in row["steps"]]
        at = [n for n, (name, value) in enumerate(accuracy) if name == "alignment" and value]
        lost = "-"
        if at and at[-1] + 1 < len(accuracy):
            before, after = accuracy[at[-1]][1], accuracy[-1][1]
            lost = f"{(before - after) / before:.1%}"
        last = row["steps"][-1]["measured"] if row["steps"] else {}
        reward = f"{last['reward_first']:.3f} to {last['reward_last']:.3f}" if "reward_last" in last else "-"
        body.append(
            [
                row["title"],
                ", ".join(f"{name} {value:.3f}" for name, value in accuracy if value is not None) or "-",
                lost,
                reward,
                ", ".join(
                    f"{s['step']} {s['measured']['steps']:,.0f}"
                    for s in row["steps"]
                    if "steps" in s["measured"]
                )
                or "-",
                f"{sum(step['measured'].get('seconds', 0) for step in row['steps']):,.0f}",
            ]
        )
    return _table(["row", "alignment after", "forgotten", "reward", "updates", "training, s"], body)


def _costs(cells: Iterable[dict[str, Any]]) -> str:
    rows = []
    for cell in cells:
        longest = max(cell["steps"], key=lambda step: step["seconds"], default=None)
        rows.append(
            [
                cell["title"],
                str(cell["seed"]),
                f"{sum(step['seconds'] for step in cell['steps']):,.0f}",
                f"{longest['command'].split()[1]} {longest['seconds']:,.0f}" if longest else "-",
                str(cell["cores"]),
                (cell["error"] or "").replace("|", "/"),
            ]
        )
    head = ["data", "seed", "seconds in all", "longest command", "cores", "failed with"]
    note = (
        "Seconds of the clock: other work on the machine lengthens them, and a cache of the warehouse that"
        " holds the embeddings of the texts shortens `train codebook`.\n\n"
    )
    return "## Cost, and cells that failed\n\n" + note + _table(head, rows)


def _named(row: dict[str, Any], ours: dict[str, Any]) -> str:
    """A method, with its seeds where others have more."""
    alike = row["seeds"] == ours["seeds"]
    return row["method"] if alike else f"{row['method']} (seed {', '.join(map(str, row['seeds']))})"


def _show(figure: Estimate | None, sign: str = "") -> str:
    if figure is None or math.isnan(figure.value):
        return "-"
    return f"{figure.value:{sign}.3f} [{figure.low:{sign}.3f} {figure.high:{sign}.3f}]"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
