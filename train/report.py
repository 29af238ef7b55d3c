"""`train/RESULTS.md` from the cells that `train.tables` worked out."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from negrec_core.metrics import FIGURES, LONG_TAIL, Estimate
from train.ours import GENERATION, OURS, SIMILARITY
from train.plots import plot_methods

_PARTS = (OURS, SIMILARITY, GENERATION)
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
are 95 % bootstrap intervals over users, their ends averaged over seeds; those of a difference are paired:
both methods are judged on the same resampled users. `similarity alone` is the cosine to the nearest
predicted ID, the rule of the paper; `generation alone` is the generator's log-likelihood of the item's
semantic ID. Both are parts of negrec, not baselines. Likes lost: the share of the likes that is blocked
together with that share of the dislikes; less is better.
"""

_ABLATION = """## What each part of the curriculum adds

Made by `python -m train.ablation`. Each row is a generator alone, without the block score and without
choosing its set anew among what is disliked most: the first 20 IDs of its beam search, the candidate
accuracy by its likelihood of the candidates (generation) and by the cosine to the nearest of the 20
(similarity), and the within-user AUC of both. Differences are to the row named, paired over users, from the
mean over seeds on each resample; ± is the standard deviation of the difference over seeds, which the
intervals do not hold. All rows of a data set have the same vocabulary, starting weights per seed, samples
and settings but for what the row says. TIGER's task is next-item generation from scratch over semantic IDs;
here it is a decoder that also learns from each event of the past, knows likes from dislikes, and has a
likelihood over legal IDs alone. LC-Rec's tasks add semantic ID to title and back. P5-CID's IDs come from
who reacted to what; items alike share one there (KuaiRand: 13 % of the items, up to 39 in an ID), which is
hit more easily, while IDs from text are one for each item. TALLRec's and InstructRec's models read titles
and have a score of candidates only, their likelihood of a yes or of the title; for times disliked it is the
count. `@` is GRPO's learning rate. Alignment: share of held-out questions answered with the rejected item
of four, after each step.
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
        results: folder of the cells; plots are written there too. Its folder `ablation` holds what
            `train.ablation` found.
        order: names of the data sets.
        out: file of the report, in the folder above `results`.
    """
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    by_dataset = {name: [cell for cell in cells if cell["dataset"] == name] for name in order}
    judged = {name: own for name, all_ in by_dataset.items() if (own := [c for c in all_ if not c["error"]])}
    parts = [_HEAD, _summary(judged.values())]
    for name, own in judged.items():
        parts.append(_dataset(own, results, name))
    ablations = sorted((results / "ablation").glob("*.json"))
    if ablations:
        parts.append(_ABLATION)
    for path in ablations:
        found = json.loads(path.read_text(encoding="utf-8"))
        plot = path.with_suffix(".png")
        parts.append(_ablation(found, plot, plot.relative_to(out.parent)))
    parts.append(_costs(cell for all_ in by_dataset.values() for cell in all_))
    out.write_text("\n".join(parts), encoding="utf-8")


def _summary(datasets: Iterable[list[dict[str, Any]]]) -> str:
    rows = []
    for cells in datasets:
        methods = _rows(cells, "figures")
        differences = _rows(cells, "difference")
        seeds = _seeds(cells)
        for figure in _CLAIMS:
            others = {
                name: figures[figure].value
                for name, figures in methods.items()
                if name not in _PARTS and figure in figures and not math.isnan(figures[figure].value)
            }
            if others:
                best = (min if figure in _LOST else max)(others, key=others.__getitem__)
                # With its seeds, so that the difference is that of what stands beside it.
                ours = _rows([c for c in cells if c["seed"] in seeds[best]], "figures")[OURS][figure]
                ratio = f"{ours.value / others[best]:.2f}" if others[best] else "-"
                difference = _show(differences[best][figure], "+")
                named = _named(best, seeds)
                rows.append(
                    [cells[0]["title"], figure, _show(ours), named, f"{others[best]:.3f}", ratio, difference]
                )
    head = ["data", "figure", OURS, "best other", "of that", "ratio", "difference"]
    return "## Beside the best other method\n\n" + _table(head, rows)


def _dataset(cells: list[dict[str, Any]], results: Path, name: str) -> str:
    found = cells[0]["evaluation"]
    seeds = ", ".join(str(cell["seed"]) for cell in cells)
    drawn = found["candidates"]
    lines = [
        f"## {cells[0]['title']}\n",
        f"{found['users']:,} users, {found['dislikes']:,} dislikes, {found['likes']:,} likes; seeds {seeds}."
        f" Candidate accuracy: {drawn['users']:,} users, {drawn['whole']:,} of them with all 20 candidates,"
        f" {drawn['other_days']:,} with some of other days; {drawn['alone']:,} users were shown nothing else"
        " and are left out.\n",
    ]
    of = _seeds(cells)
    methods, differences = (
        {_named(method, of): row for method, row in _rows(cells, kind).items()}
        for kind in ("figures", "difference")
    )
    for about, names in {**FIGURES, "the long tail": LONG_TAIL}.items():
        lines += [f"### {about.capitalize()}\n", _methods(methods, names, "")]
        lines += [f"{OURS} minus:\n", _methods({m: r for m, r in differences.items() if r}, names, "+")]
    lines += ["### Main negative interests covered\n", _coverage(cells)]
    plot = results / f"{name}.png"
    shown = ("blocked at 1 %", "blocked at 5 %", *FIGURES["likes lost at equal recall"])
    plot_methods({f: {m: row[f] for m, row in methods.items()} for f in shown}, plot, cells[0]["title"])
    return "\n".join([*lines, f"![{cells[0]['title']}]({results.name}/{plot.name})\n"])


def _coverage(cells: list[dict[str, Any]]) -> str:
    shares = [cell["evaluation"]["coverage"] for cell in cells]
    head = ["", *next(iter(shares[0].values()))]
    rows = [
        [top, *(_show(_mean([share[top][column] for share in shares])) for column in head[1:])]
        for top in shares[0]
    ]
    return _table(head, rows)


def _ablation(found: dict[str, Any], plot: Path, link: Path) -> str:
    rows = found["rows"]
    titles = {row["variant"]: row["title"] for row in rows}
    judged = {row["variant"]: row for row in rows if row["figures"]}
    if not judged:
        return ""
    seeds: list[int] = max((row["seeds"] for row in rows), key=len)
    users = next(iter(judged.values()))["users"]
    sample = f"; {users:,} judged users drawn at random" if users else ""
    how = _how(found["generator"])
    about = f"### {found['title']}, {found['preset']}\n\nSeeds {', '.join(map(str, seeds))}{sample}. {how}\n"
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


def _how(settings: dict[str, Any]) -> str:
    """The budget of each step."""
    parts = []
    for name in ("translation", "alignment", "warm_up"):
        own = settings[name]
        most = f"{own['max_steps']} updates" if own["max_steps"] > 0 else f"{own['epochs']:g} epochs"
        parts.append(f"{name} {most} of {own['batch_size']} at {own['learning_rate']:g}")
    grpo = settings["grpo"]
    stages = " + ".join(f"{stage['steps']} ({stage['context']})" for stage in grpo["stages"])
    parts.append(f"GRPO {stages} updates of {grpo['prompts']} prompts, {grpo['group_size']} IDs each")
    return f"Budget: {'; '.join(parts)}."


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
                f"{sum(step['measured'].get('seconds', 0) for step in row['steps']):,.0f}",
            ]
        )
    return _table(["row", "alignment after", "forgotten", "reward", "training, s"], body)


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


def _rows(cells: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Estimate]]:
    """Method -> figure -> mean over the cells that have it."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for cell in cells:
        for row in cell["evaluation"]["rows"]:
            own = found.setdefault(row["method"], {})
            for figure, estimate in row[kind].items():
                own.setdefault(figure, []).append(estimate)
    return {m: {figure: _mean(all_) for figure, all_ in own.items()} for m, own in found.items()}


def _seeds(cells: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Method -> seeds of the cells that have it."""
    found: dict[str, list[int]] = {}
    for cell in cells:
        for row in cell["evaluation"]["rows"]:
            found.setdefault(row["method"], []).append(cell["seed"])
    return found


def _named(method: str, seeds: dict[str, list[int]]) -> str:
    """A method, with its seeds where others have more."""
    own = seeds[method]
    return method if own == seeds[OURS] else f"{method} (seed {', '.join(map(str, own))})"


def _mean(estimates: list[dict[str, float]]) -> Estimate:
    return Estimate(*(float(np.mean([e[end] for e in estimates])) for end in ("value", "low", "high")))


def _methods(rows: dict[str, dict[str, Estimate]], names: Sequence[str], sign: str) -> str:
    body = [[method, *(_show(own.get(name), sign) for name in names)] for method, own in rows.items()]
    return _table(["method", *names], body)


def _show(figure: Estimate | None, sign: str = "") -> str:
    if figure is None or math.isnan(figure.value):
        return "-"
    return f"{figure.value:{sign}.3f} [{figure.low:{sign}.3f} {figure.high:{sign}.3f}]"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
