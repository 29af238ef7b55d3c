"""How results are printed."""

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel
from rich.table import Table

from jobs.console import console
from jobs.context import Warehouse
from jobs.doctor import Finding
from jobs.pipeline import StageResult, stale
from negrec_core.artefacts import Manifest, list_versions
from negrec_core.blocklist import BlockList, newest_list
from negrec_core.config import Config
from negrec_core.errors import MissingError
from negrec_core.generator import CODEBOOK, GENERATOR
from negrec_core.items import load_items
from negrec_core.metrics import FIGURES, Estimate
from negrec_core.schemas import TABLES
from negrec_core.vacuum import Vacuumed

if TYPE_CHECKING:
    from jobs.import_log import ImportSummary
    from train.evaluate import Evaluation

_SHOWN = 8
_SHOWN_STALE = 20
# Its seven digits are more than a resample tells.
_DRAWS = pa.schema([("method", pa.string()), ("figure", pa.string()), ("draws", pa.list_(pa.float32()))])


def show_import(summary: "ImportSummary") -> None:
    """Rows in, rows left out, rows quarantined and why."""
    view = Table("", "imported", "left out", "quarantined", title=_span(summary.days))
    for entity, rows in summary.rows.items():
        problems = summary.quarantined.get(entity, {})
        why = ", ".join(f"{problem} {n}" for problem, n in sorted(problems.items()))
        view.add_row(entity, f"{rows:,}", f"{summary.left_out.get(entity, 0):,}", why or "0")
    console.print(view)
    console.print(f"{summary.events:,} events in behavior_log")


def show_results(results: Sequence[StageResult]) -> None:
    """What ran and what was there already."""
    ran = [result for result in results if result.ran]
    if not ran:
        console.print("nothing to do: every stage is committed (--force makes a new revision)")
        return
    view = Table("stage", "days", "seconds")
    for stage in dict.fromkeys(result.stage for result in ran):
        own = [result for result in ran if result.stage == stage]
        view.add_row(stage, _span([r.ds for r in own]), f"{sum(r.seconds for r in own):.1f}")
    console.print(view)
    if len(results) > len(ran):
        console.print(f"{len(results) - len(ran)} were committed before")


def show_manifest(manifest: Manifest) -> None:
    """A model that was just completed."""
    view = Table("figure", "value", title=f"{manifest.name} {manifest.version}")
    for name, value in manifest.metrics.items():
        view.add_row(name, _figure(value))
    console.print(view)


def show_status(warehouse: Warehouse) -> None:
    """Tables by day and revision, models by version."""
    outdated = stale(warehouse)
    columns = ("table", "days", "partitions", "revisions", "version", "stale")
    tables = Table(*columns, title=str(warehouse.root))
    for name in TABLES:
        days = warehouse.store.days(name)
        revisions = sorted({warehouse.store.revision(name, day) for day in days})
        tables.add_row(
            name,
            _span(days),
            str(len(days)),
            ", ".join(map(str, revisions)),
            str(warehouse.store.version(name)),
            str(sum(one.table == name for one in outdated) or ""),
        )
    console.print(tables)
    for one in outdated[:_SHOWN_STALE]:
        console.print(
            f"stale: {one.table} {one.ds}, made before {one.source} {one.source_ds}"
            f" (now revision {one.revision}, or stale too)"
        )
    if outdated:
        more = f"{len(outdated) - _SHOWN_STALE} more; " if len(outdated) > _SHOWN_STALE else ""
        first, last = (pick(one.ds for one in outdated) for pick in (min, max))
        console.print(
            f"{more}mend with `negrec backfill --stale --start {first} --end {last}`", soft_wrap=True
        )
    models = Table("model", "version", "learned until", "codebook", "figures")
    for name in (CODEBOOK, GENERATOR):
        for manifest in list_versions(warehouse.models, name):
            figures = ", ".join(f"{k} {_figure(v)}" for k, v in list(manifest.metrics.items())[:4])
            models.add_row(
                name,
                manifest.version,
                manifest.parameters["until"],
                manifest.parameters.get("codebook_version", ""),
                figures,
            )
    console.print(models)


def users_to_show(warehouse: Warehouse, n: int = 2) -> list[str]:
    """Users with the most predictions that came true in the days after the newest list."""
    blocks = _open(warehouse, None)
    held = set(warehouse.store.days("feedback"))
    days = [day for day in _week_after(blocks.snapshot.ds) if day in held]
    rows = warehouse.store.read("feedback", ["user_id", "item_id", "polarity"], days=days)
    later: dict[str, list[str]] = {}
    for row in rows.filter(pc.equal(rows["polarity"], -1)).to_pylist():
        later.setdefault(row["user_id"], []).append(row["item_id"])
    caught = {user: len(items) - len(blocks.allowed(user, items)) for user, items in later.items()}
    return sorted(caught, key=lambda user: (-caught[user], user))[:n]


def show_user(warehouse: Warehouse, user: str, on: str | None) -> None:
    """What one user disliked and liked, what is predicted and why, what happened next."""
    blocks = _open(warehouse, on)
    snapshot = blocks.snapshot
    titles = _titles(warehouse, snapshot.ds)
    context = _user_rows(warehouse, "user_context", user, [snapshot.ds])
    entries = sorted(_user_rows(warehouse, "block_list", user, [snapshot.ds]), key=lambda row: row["rank"])
    if not context and not entries:
        raise MissingError(
            f"user {user}: no feedback and no list on ds={snapshot.ds}; check the id, or choose a day"
            " with --on"
        )
    past = context[0] if context else {"negatives": [], "positives": []}
    console.rule(f"user {user}, list of {snapshot.ds}")
    for label, column in (("disliked", "negatives"), ("liked", "positives")):
        view = Table(f"{label}, most recent first", "when", "reason", expand=True)
        for event in past[column][:_SHOWN]:
            when = f"{event['event_time']:%Y-%m-%d %H:%M}"
            view.add_row(titles.get(event["item_id"], event["item_id"]), when, event["reason_class"])
        console.print(view)
    by_codes = _items_by_codes(warehouse, snapshot.ds, blocks)
    view = Table("#", "predicted to be rejected", "score", "because of", "similar", "reason", expand=True)
    for row in entries[:_SHOWN]:
        items = [titles.get(item, item) for item in by_codes.get(tuple(row["codes"]), [])]
        because = row["because_item_id"]
        view.add_row(
            str(row["rank"]),
            "; ".join(items[:2]) + (f" (+{len(items) - 2})" if len(items) > 2 else ""),
            f"{row['score']:.2f}",
            titles.get(because, because) if because else "",
            f"{row['because_similarity']:.2f}" if because else "",
            row["reason_class"],
        )
    console.print(view)
    _show_next(warehouse, blocks, user, titles)


def _show_next(warehouse: Warehouse, blocks: BlockList, user: str, titles: dict[str, str]) -> None:
    held = set(warehouse.store.days("feedback"))
    days = [day for day in _week_after(blocks.snapshot.ds) if day in held]
    later = _user_rows(warehouse, "feedback", user, days)
    if not later:
        return
    view = Table("what happened next", "", "score", "blocked", expand=True)
    for row in sorted(later, key=lambda r: r["event_time"])[: 2 * _SHOWN]:
        why = blocks.why(user, row["item_id"])
        view.add_row(
            titles.get(row["item_id"], row["item_id"]),
            "disliked" if row["polarity"] == -1 else "liked",
            f"{why.score:.2f}",
            "yes" if why.blocked else "",
        )
    console.print(view)


def show_filter(warehouse: Warehouse, user: str, items: Sequence[str], on: str | None) -> None:
    """A page as the ranking service would show it, and why."""
    blocks = _open(warehouse, on)
    titles = _titles(warehouse, blocks.snapshot.ds)
    allowed = set(blocks.allowed(user, items))
    view = Table("item", "title", "shown", "score", "similarity", "because of", "reason", "exempt")
    for item in items:
        why = blocks.why(user, item)
        because = why.because_item_id
        view.add_row(
            item,
            titles.get(item, ""),
            "yes" if item in allowed else "no",
            f"{why.score:.2f}",
            f"{why.similarity:.2f}",
            titles.get(because, because) if because else "",
            why.reason_class,
            why.exempt,
        )
    console.print(view)
    console.print(f"list of {blocks.snapshot.ds}; blocked from {blocks.threshold:.3f}")


def show_finding(finding: Finding) -> int:
    """One line of `negrec doctor`, as soon as it is known; its exit code."""
    mark = "ok" if finding.ok else "NOT OK"
    line = f"{mark:6}  {finding.check}: {finding.text}"
    style = None if finding.ok else "bold red"
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    return finding.exit_code


def show_vacuumed(found: Sequence[Vacuumed], deleted: bool) -> None:
    """What went, or would go."""
    if not found:
        console.print("nothing to delete")
        return
    view = Table("table", "left by failed writers", "replaced", "size", "staging days")
    for one in found:
        cells = (f"{one.orphans:,} files", f"{one.replaced:,} files", f"{one.size / 1e6:,.1f} MB")
        view.add_row(one.table or "temporary", *cells, _span(one.staging))
    console.print(view)
    total = f"{sum(one.size for one in found) / 1e6:,.1f} MB"
    console.print(f"{total} deleted" if deleted else f"{total} would be deleted; --delete does it")


def show_exemptions(rows: pa.Table) -> None:
    """Who and what is exempt, since when and why."""
    view = Table("", "id", "since", "why")
    for row in rows.sort_by([("kind", "descending"), ("id", "ascending")]).to_pylist():
        view.add_row(row["kind"], row["id"], row["ds"], row["note"])
    console.print(view if rows.num_rows else "nobody and nothing is exempt")


def show_withdrawn(warehouse: Warehouse, ds: str, withdrawn: bool) -> None:
    """What readers have instead of a list that was withdrawn."""
    done = "withdrawn" if withdrawn else "withdrawn before"
    try:
        found = newest_list(warehouse.store, dt.date.fromisoformat(ds))
    except MissingError:
        left = "no earlier list holds, so nothing is blocked"
    else:
        left = f"readers fall back to that of {found.ds}, which holds until {found.expires_on}"
    console.print(f"list of {ds}: {done}; {left} (`negrec run --ds {ds} --force` publishes again)")


def show_evaluation(evaluation: "Evaluation", out: Path | None) -> None:
    """The figures, and if asked for a file of them with their draws beside it."""
    head = (
        f"list of {evaluation.ds} against the days after: {evaluation.users:,} users,"
        f" {evaluation.dislikes:,} dislikes, {evaluation.likes:,} likes; seed {evaluation.seed},"
        " 95 % intervals over users"
    )
    console.print(head)
    ours, *others = evaluation.rows
    for about, names in FIGURES.items():
        view = Table(about, *names)
        for row in evaluation.rows:
            view.add_row(row.method, *(_estimate(row.figures.get(name)) for name in names))
        console.print(view)
        view = Table(f"{ours.method} minus", *names, caption="with the interval of the paired difference")
        for row in others:
            view.add_row(row.method, *(_estimate(row.difference.get(name), "+") for name in names))
        console.print(view)
    drawn = evaluation.candidates
    console.print(
        f"candidate accuracy: {drawn.users:,} users, {drawn.whole:,} with all 20 candidates,"
        f" {drawn.other_days:,} with some of other days; {drawn.alone:,} were shown nothing else. Likes lost:"
        " share of the likes blocked together with that share of the dislikes"
    )
    held = next(iter(evaluation.coverage.values()))
    view = Table("main negative interests covered by", *held)
    for top, shares in evaluation.coverage.items():
        view.add_row(top, *(_estimate(share) for share in shares.values()))
    console.print(view)
    parts = ", ".join(f"{name} {value:.3f}" for name, value in evaluation.without.items())
    console.print(f"blocked at 1 % with one part of the score held at its mean: {parts}")
    console.print(
        f"published threshold {evaluation.threshold:.3f}: blocks {evaluation.dislikes_over:.1%} of"
        f" the dislikes and {evaluation.likes_over:.1%} of the likes; lists for"
        f" {evaluation.listed:,} users; {evaluation.illegal} illegal IDs"
    )
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(evaluation)
        rows = [
            {"method": method, "figure": figure, "draws": draws}
            for method, own in content.pop("draws").items()
            for figure, draws in own.items()
        ]
        pq.write_table(pa.Table.from_pylist(rows, _DRAWS), out.with_suffix(".parquet"))
        out.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _estimate(figure: Estimate | None, sign: str = "") -> str:
    if figure is None:
        return "-"
    return f"{figure.value:{sign}.3f} [{figure.low:{sign}.3f} {figure.high:{sign}.3f}]"


def show_config(config: Config) -> None:
    """Every setting, its value and its meaning."""
    view = Table("setting", "value", "meaning")
    for name, value, meaning in config_rows(config):
        view.add_row(name, value, meaning)
    console.print(view)


def config_rows(config: BaseModel, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted name, value, meaning) of all settings."""
    rows = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            rows += config_rows(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", str(value), field.description or ""))
    return rows


def _open(warehouse: Warehouse, on: str | None) -> BlockList:
    days = warehouse.store.days("block_list")
    if not days:
        raise MissingError(f"table block_list: nothing was published in {warehouse.root}; run `negrec run`")
    return BlockList.open(
        warehouse.root,
        today=dt.date.fromisoformat(on or days[-1]),
        min_page_share=warehouse.config.block_list.min_page_share,
    )


def _user_rows(warehouse: Warehouse, table: str, user: str, days: Sequence[str]) -> list[dict[str, Any]]:
    rows = warehouse.store.read(table, days=list(days))
    return rows.filter(pc.equal(rows["user_id"], user)).to_pylist() if rows.num_rows else []


def _titles(warehouse: Warehouse, ds: str) -> dict[str, str]:
    items = load_items(warehouse.store, ds)
    return {
        item: title or item
        for item, title in zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True)
    }


def _items_by_codes(warehouse: Warehouse, ds: str, blocks: BlockList) -> dict[tuple[int, ...], list[str]]:
    from negrec_core.semantic_ids import load_semantic_ids

    version = warehouse.store.commit_of("block_list", ds).provenance.models[CODEBOOK]
    ids = load_semantic_ids(warehouse.store, version, ds)
    found: dict[tuple[int, ...], list[str]] = {}
    for item, codes in zip(ids.items, ids.codes.tolist(), strict=True):
        found.setdefault(tuple(codes), []).append(item)
    return found


def _week_after(ds: str) -> list[str]:
    day = dt.date.fromisoformat(ds)
    return [(day + dt.timedelta(days=n)).isoformat() for n in range(1, 8)]


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_figure(v) for v in value)
    return str(value)


def _span(days: Sequence[str]) -> str:
    if not days:
        return "-"
    return days[0] if days[0] == days[-1] else f"{min(days)} .. {max(days)}"
