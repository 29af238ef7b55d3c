"""The `negrec` command."""

import datetime as dt
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from jobs import views
from jobs.console import console, errors, reporting, set_up_process
from jobs.context import Warehouse
from jobs.gates import ACCEPTABLE
from jobs.pipeline import (
    DAILY_STAGES,
    DATA_STAGES,
    expected,
    parse_day,
    run_day,
    run_range,
    run_stale,
    run_training_stages,
)
from negrec_core import __version__
from negrec_core.config import load_config
from negrec_core.delta import DeltaStore
from negrec_core.errors import ConfigError
from negrec_core.exemptions import end_exemption, exempt
from negrec_core.mapping import load_mapping
from negrec_core.resources import resource

_EXIT_CODES = """
Exit codes: 0 done; 1 unexpected failure; 2 wrong setting or argument; 3 unusable input data;
4 something needed is missing; 5 another writer was first; 6 damaged or mismatched model;
7 a check before publishing failed.
"""

app = typer.Typer(
    name="negrec",
    help="Predict the items each user will reject, and publish them as a block list.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
imports = typer.Typer(help="Bring a site's log into the warehouse.", no_args_is_help=True)
train = typer.Typer(help="Train the models that the pipeline uses.", no_args_is_help=True)
app.add_typer(imports, name="import")
exemptions = typer.Typer(help="Users and items that are never blocked.", no_args_is_help=True)
app.add_typer(train, name="train")
app.add_typer(exemptions, name="exempt")


@dataclass
class _Settings:
    warehouse: str
    config: list[str]
    settings: list[str]

    def open(self, create: bool = False) -> Warehouse:
        warehouse = Warehouse(self.warehouse, load_config(self.config, self.settings))
        if create:
            warehouse.store.create_tables()
        return warehouse


@app.callback()
def main_options(
    ctx: typer.Context,
    warehouse: Annotated[
        str,
        typer.Option(
            envvar="NEGREC_WAREHOUSE", help="Folder or object-store URL of tables and models.", metavar="PATH"
        ),
    ] = "warehouse",
    config: Annotated[
        str,
        typer.Option(
            envvar="NEGREC_CONFIG",
            help="Overlays of conf/base.yaml: names in conf/ or files, by comma.",
        ),
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override one setting, as a.b=value; may be repeated."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False,
) -> None:
    """Options that every command takes."""
    set_up_process(verbose)
    overlays = [name for name in config.split(",") if name]
    ctx.obj = _Settings(warehouse, overlays, set_ or [])


Day = Annotated[str, typer.Option("--ds", help="Log date, as 2026-01-31.", metavar="DAY")]
Until = Annotated[str, typer.Option("--until", help="Last log date that may be learned from.", metavar="DAY")]
Start = Annotated[str | None, typer.Option("--start", help="First log date.", metavar="DAY")]
End = Annotated[str | None, typer.Option("--end", help="Last log date.", metavar="DAY")]
Seed = Annotated[int, typer.Option(help="Seed of all randomness.")]
Force = Annotated[bool, typer.Option("--force", help="Make a new revision of what is there already.")]


@imports.command("log")
def import_own_log(
    ctx: typer.Context,
    source: Annotated[Path, typer.Argument(help="Folder with the files.")],
    mapping: Annotated[Path, typer.Option(help="YAML file; see conf/datasets/demo.yaml.")],
    start: Start = None,
    end: End = None,
) -> None:
    """Import any log of CSV, JSON lines or Parquet files by a mapping.

    Whole days are replaced: importing a day again replaces that day. With --start and --end, events of
    other days are left alone.
    """
    _import(ctx, source, mapping, start, end)


def _named_import(name: str, about: str) -> None:
    @imports.command(name, help=f"{about} Its mapping is conf/datasets/{name}.yaml.")
    def command(
        ctx: typer.Context,
        source: Annotated[Path, typer.Argument(help="Folder with the published files.")],
        start: Start = None,
        end: End = None,
    ) -> None:
        _import(ctx, source, resource("conf", "datasets", f"{name}.yaml"), start, end)


_named_import("kuairand", "Import KuaiRand short-video logs.")
_named_import("movielens", "Import MovieLens ratings: latest-small, 1M or 100K.")
_named_import("steam", "Import Steam reviews.")
_named_import("demo", "Import the world that `negrec world` makes.")


def _import(ctx: typer.Context, source: Path, mapping: Path, start: str | None, end: str | None) -> None:
    from jobs.import_log import import_log

    read = load_mapping(mapping)
    first, last = (None if day is None else parse_day(day) for day in (start, end))
    summary = import_log(ctx.obj.open(create=True), source, read, first, last)
    views.show_import(summary)


@app.command()
def world(
    out: Annotated[Path, typer.Argument(help="New or empty folder for the files.")],
    users: Annotated[int, typer.Option(help="Number of users.")] = 5000,
    items: Annotated[int, typer.Option(help="Number of items.")] = 1500,
    days: Annotated[int, typer.Option(help="Days of log.")] = 35,
    slate: Annotated[int, typer.Option(help="Mean number of items shown in a session.")] = 6,
    seed: Seed = 7,
) -> None:
    """Generate a world to try negrec on: users with tastes, items, and a recommender's log."""
    from jobs.world import WorldSettings, generate

    with reporting() as reporter:
        settings = WorldSettings(users=users, items=items, days=days, slate=slate, seed=seed)
        summary = generate(settings, out, reporter.stage("world", ""))
    console.print(
        f"{summary.users} users, {summary.items} items, {summary.shows} exposures,"
        f" {summary.rejections} rejections over {summary.days} days in {out}"
    )


@app.command()
def anchors(ctx: typer.Context, ds: Day, force: Force = False) -> None:
    """Choose one anchor per user: just before the last week that holds a dislike.

    For logs whose users come in bursts years apart (set anchors=explicit). Runs `feedback` first.
    """
    warehouse = ctx.obj.open()
    with reporting() as reporter:
        results = run_day(warehouse, _iso(ds), ["feedback"], False, reporter)
        results += run_day(warehouse, _iso(ds), ["anchor"], force, reporter)
    views.show_results(results)


@train.command("codebook")
def train_codebook(ctx: typer.Context, until: Until, seed: Seed = 7) -> None:
    """Train the codebook of semantic IDs on the items known on a log date."""
    from train.codebook import train_codebook as fit

    warehouse = ctx.obj.open()
    with reporting() as reporter:
        manifest = fit(
            warehouse.store,
            warehouse.models,
            warehouse.media,
            warehouse.config,
            _iso(until),
            seed=seed,
            progress=reporter.stage("codebook", until),
        )
    views.show_manifest(manifest)


# Step of the curriculum -> the table it learns from.
_STEP_TABLES = {
    "translation": "training_translation",
    "alignment": "training_alignment",
    "warm_up": "training_next_negative",
    "grpo": "training_grpo",
}
Model = Annotated[str | None, typer.Option(help="Preset in conf/models, instead of the configured one.")]


@train.command("generator")
def train_generator(
    ctx: typer.Context,
    until: Until,
    model: Model = None,
    seed: Seed = 7,
    samples: Annotated[
        bool,
        typer.Option(
            "--samples/--no-samples",
            help="Make the samples first, or take those that are there, as several processes must.",
        ),
    ] = True,
) -> None:
    """Train a language model to write a user's next dislikes as semantic IDs, by all steps of the curriculum.

    The steps are those of the setting generator.steps. First the items' semantic IDs and the samples of
    each step are made. A step that is finished is not trained again; after a kill, training goes on.
    """
    _train(ctx, until, model, seed, None, samples)


def _step_command(step: str, about: str) -> None:
    @train.command(
        step.replace("_", "-"),
        help=f"{about} Trains the steps of generator.steps up to this one, and serves nothing;"
        " `negrec train generator` goes on from there.",
    )
    def command(ctx: typer.Context, until: Until, model: Model = None, seed: Seed = 7) -> None:
        _train(ctx, until, model, seed, step)


_step_command("translation", "Semantic ID to title and back.")
_step_command("alignment", "Which of four items a user rejected, by a LoRA adapter that is then merged.")
_step_command("warm_up", "Next-negative supervised fine-tuning.")
_step_command("grpo", "Progressive GRPO on what users rejected and liked next.")


def _train(
    ctx: typer.Context, until: str, model: str | None, seed: int, last_step: str | None, samples: bool = True
) -> None:
    from train.generator import train_generator as fit

    settings: _Settings = ctx.obj
    if model:
        settings = _Settings(
            settings.warehouse, settings.config, [*settings.settings, f"generator.preset={model}"]
        )
    warehouse, day = settings.open(), _iso(until)
    steps = list(warehouse.config.generator.steps)
    if last_step:
        if last_step not in steps:
            raise ConfigError(f"generator.steps has no {last_step}; it is {', '.join(steps)}")
        steps = steps[: steps.index(last_step) + 1]
    with reporting() as reporter:
        if samples:
            run_training_stages(warehouse, day, [_STEP_TABLES[step] for step in steps], reporter)
        manifest = fit(
            warehouse.store,
            warehouse.models,
            warehouse.config,
            day,
            seed=seed,
            progress=reporter.stage("generator", day),
            last_step=last_step,
        )
    views.show_manifest(manifest)


_DAILY, _DATA = ",".join(DAILY_STAGES), ",".join(DATA_STAGES)
Stages = Annotated[
    str,
    typer.Option(help=f"By comma, of: {', '.join(DAILY_STAGES)}.", metavar="STAGES", show_default=False),
]


@app.command()
def run(
    ctx: typer.Context,
    ds: Day,
    stages: Stages = _DAILY,
    force: Force = False,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            "--accept",
            help=f"Publish though this gate fails; may be repeated. One of: {', '.join(ACCEPTABLE)}.",
            metavar="GATE",
        ),
    ] = None,
) -> None:
    """Run the daily pipeline for one log date, up to a published block list. Default: all stages."""
    warehouse = ctx.obj.open()
    with reporting() as reporter:
        results = run_day(warehouse, _iso(ds), stages.split(","), force, reporter, accept or ())
    views.show_results(results)


@app.command()
def backfill(
    ctx: typer.Context,
    start: Annotated[str, typer.Option(help="First log date.", metavar="DAY")],
    end: Annotated[str, typer.Option(help="Last log date.", metavar="DAY")],
    stages: Annotated[
        str | None,
        typer.Option(help=f"By comma, of: {', '.join(DAILY_STAGES)}.", metavar="STAGES"),
    ] = None,
    force: Force = False,
    stale: Annotated[
        bool,
        typer.Option("--stale", help="Make again what `negrec status` shows as stale, and nothing else."),
    ] = False,
) -> None:
    """Run stages for a range of log dates, oldest first.

    Default: the stages that need no model; with --stale all stages.
    """
    from negrec_core.delta import day_range

    days = day_range(parse_day(start), parse_day(end))
    if not days:
        raise ConfigError(f"--start {start} is after --end {end}")
    warehouse = ctx.obj.open()
    with reporting() as reporter:
        if stale:
            results = run_stale(warehouse, days, stages.split(",") if stages else None, reporter)
        else:
            results = run_range(warehouse, days, (stages or _DATA).split(","), force, reporter)
    if stale and not results:
        console.print("nothing of these days is stale")
    else:
        views.show_results(results)


@app.command()
def unpublish(ctx: typer.Context, ds: Day) -> None:
    """Withdraw the list of a log date; readers fall back to the list before, or block nothing."""
    from jobs.block_list import unpublish as withdraw

    warehouse = ctx.obj.open()
    views.show_withdrawn(warehouse, _iso(ds), withdraw(warehouse, _iso(ds)))


Users = Annotated[list[str] | None, typer.Option("--user", help="User id; may be repeated.")]
Items = Annotated[list[str] | None, typer.Option("--item", help="Item id; may be repeated.")]


@exemptions.command("add")
def exempt_add(
    ctx: typer.Context,
    user: Users = None,
    item: Items = None,
    note: Annotated[str | None, typer.Option(help="Why, for those who come later.")] = None,
) -> None:
    """Never block anything for a user, or never an item; readers honour it at their next look."""
    users, items = _some(user, item)
    added = exempt(_with_exemptions(ctx), users, items, note, __version__)
    console.print(f"{added} added" + (", the others were exempt" if added < len(users + items) else ""))


@exemptions.command("remove")
def exempt_remove(ctx: typer.Context, user: Users = None, item: Items = None) -> None:
    """End exemptions."""
    users, items = _some(user, item)
    removed = end_exemption(_with_exemptions(ctx), users, items, __version__)
    console.print(f"{removed} removed")


def _with_exemptions(ctx: typer.Context) -> DeltaStore:
    """The tables, with that of exemptions where an earlier release made the others."""
    store: DeltaStore = ctx.obj.open().store
    store.handle("block_list")  # a mistyped --warehouse must not become one
    store.create_tables()
    return store


def _some(user: list[str] | None, item: list[str] | None) -> tuple[list[str], list[str]]:
    users, items = sorted(set(user or ())), sorted(set(item or ()))
    if not users + items:
        raise ConfigError("exempt whom or what? give --user or --item")
    return users, items


@exemptions.command("list")
def exempt_list(ctx: typer.Context) -> None:
    """Show who and what is exempt, since when and why."""
    views.show_exemptions(ctx.obj.open().store.read("exemption"))


@app.command()
def vacuum(
    ctx: typer.Context,
    days: Annotated[int, typer.Option(help="Retention: what a version of these days needs stays.")] = 30,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it this only looks.")] = False,
) -> None:
    """Delete files that no recent version of a table needs, and what killed writers left.

    Without --delete it says what would go. Safe beside running jobs and readers: nothing younger than
    the retention is touched, nor anything that a published list was made from.
    """
    from negrec_core.vacuum import vacuum as clean

    views.show_vacuumed(clean(ctx.obj.open().store, days, delete=delete), delete)


@app.command()
def evaluate(
    ctx: typer.Context,
    ds: Day,
    out: Annotated[
        Path | None,
        typer.Option(help="Also write the figures here, as JSON, and their resamples beside it, as Parquet."),
    ] = None,
    seed: Seed = 7,
    sequential: Annotated[
        Path | None,
        typer.Option(
            help="Compare with sequential recommenders too; the Python that `make recbole` made.",
            metavar="PYTHON",
        ),
    ] = None,
) -> None:
    """Compare the list of a log date with what users did in the days after, and with simple rules."""
    from train.evaluate import evaluate as figures

    warehouse = ctx.obj.open()
    views.show_evaluation(
        figures(warehouse.root, warehouse.config, _iso(ds), seed=seed, sequential=sequential), out
    )


@app.command()
def report(
    ctx: typer.Context,
    ds: Day,
    out: Annotated[Path, typer.Option(help="The page to write, as X.html.")],
) -> None:
    """Write a page with plots of a log date: log, labels, codebook, scores, gates, drift, some users.

    One file that needs no network and no script. What the day lacks is said in its place.
    """
    from jobs.report import write_report

    warehouse = ctx.obj.open()
    with reporting() as reporter:
        write_report(warehouse, _iso(ds), out, reporter.stage("report", ds))
    console.print(f"report of {_iso(ds)}: {out}", soft_wrap=True, markup=False)


@app.command()
def status(ctx: typer.Context) -> None:
    """Show which tables hold which days at which revision, and which models there are."""
    views.show_status(ctx.obj.open())


@app.command()
def doctor(ctx: typer.Context) -> None:
    """Check what a run needs, each line ok or how to mend it: Java, memory, packages, GPUs, models, tables.

    Ends with the exit code of the first thing that is not ok. Reads every file of every model.
    """
    from jobs.doctor import examine

    warehouse = ctx.obj.open()
    codes = [views.show_finding(finding) for finding in examine(warehouse)]
    raise typer.Exit(next(filter(None, codes), 0))


On = Annotated[
    str | None,
    typer.Option("--on", help="Day to ask for; default: that of the newest list.", metavar="DAY"),
]


@app.command()
def inspect(
    ctx: typer.Context,
    user: Annotated[str, typer.Argument(help="User id.")],
    on: On = None,
) -> None:
    """Show one user: what was disliked and liked, what is predicted and why, what happened next."""
    views.show_user(ctx.obj.open(), user, on if on is None else _iso(on))


@app.command("filter")
def filter_items(
    ctx: typer.Context,
    user: Annotated[str, typer.Argument(help="User id.")],
    items: Annotated[list[str], typer.Argument(help="Item ids, in page order.")],
    on: On = None,
) -> None:
    """Filter a page as the ranking service would, and say why."""
    views.show_filter(ctx.obj.open(), user, items, on if on is None else _iso(on))


@app.command("config")
def show_config(ctx: typer.Context) -> None:
    """Print every setting with its value and meaning."""
    views.show_config(load_config(ctx.obj.config, ctx.obj.settings))


@app.command()
def demo(
    ctx: typer.Context,
    users: Annotated[int, typer.Option(help="Number of users.")] = 5000,
    seed: Seed = 7,
) -> None:
    """Make a world, import it, train, run the pipeline, and compare with the week that follows.

    Works in the folder `demo` of the warehouse, anew each time, by the commands that it prints.
    """
    from jobs.world import WorldSettings

    given: _Settings = ctx.obj
    if "://" in given.warehouse:
        raise ConfigError(f"{given.warehouse}: the demo works in a folder; give another --warehouse")
    root = Path(given.warehouse) / "demo"
    marker = root / ".negrec-demo"
    if root.exists() and not marker.exists():
        raise ConfigError(f"{root} exists and is not a demo of negrec; give another --warehouse")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    marker.touch()
    ctx.obj = _Settings(str(root), ["demo", *given.config], given.settings)
    shown = WorldSettings(users=users, seed=seed)
    last = shown.start + dt.timedelta(days=shown.days - 1)
    ds = (last - dt.timedelta(days=7)).isoformat()
    week_before = (last - dt.timedelta(days=14)).isoformat()
    begin = time.monotonic()

    def step(line: str, command: Callable[..., None], *arguments: object, **options: object) -> None:
        console.print(f"\n[{time.monotonic() - begin:4.0f} s] $ negrec {line}", markup=False, style="bold")
        command(*arguments, **options)

    log = root / "log"
    step(f"world {log} --users {users} --seed {seed}", world, log, users=users, seed=seed)
    mapping = resource("conf", "datasets", "demo.yaml")
    step(f"import demo {log}", _import, ctx, log, mapping, None, None)
    span = {"start": shown.start.isoformat(), "end": last.isoformat()}
    step(
        f"backfill --start {span['start']} --end {span['end']} --stages feedback",
        backfill,
        ctx,
        **span,
        stages="feedback",
    )
    step(f"run --ds {week_before} --stages item_graph", run, ctx, week_before, "item_graph")
    step(f"train codebook --until {ds}", train_codebook, ctx, ds, seed)
    step(f"train generator --until {ds}", train_generator, ctx, ds, None, seed)
    step(f"run --ds {ds}", run, ctx, ds)
    step(f"evaluate --ds {ds}", evaluate, ctx, ds, root / "evaluation.json", seed)
    for user in views.users_to_show(ctx.obj.open()):
        step(f"inspect {user}", inspect, ctx, user)
    console.print(
        f"\nthe block list is the Delta table {root / 'tables' / 'block_list'}; look around with"
        f" `negrec --warehouse {root} --config demo status`, or at plots of the day with"
        f" `negrec --warehouse {root} --config demo report --ds {ds} --out report.html`",
        soft_wrap=True,
    )


def _iso(text: str) -> str:
    return parse_day(text).isoformat()


def main() -> None:
    """Entry point: expected failures end with one line and their exit code."""
    try:
        app()
    except Exception as error:
        known = expected(error)
        if known is None:
            raise
        # Soft: one line stays one line, for those who search the log of a scheduled run.
        line = f"negrec: {known}"
        errors.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(known.exit_code)


if __name__ == "__main__":
    main()
