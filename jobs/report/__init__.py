"""The report of a day: one page that shows what the log holds, what was published, and how it did."""

from pathlib import Path

from jobs.context import JobContext, Warehouse
from jobs.pipeline import expected
from jobs.report import figures
from jobs.report.markup import Element, el, page
from jobs.report.sections import SECTIONS, Parts, Report, Section, absent
from negrec_core.delta import Commit
from negrec_core.errors import MissingError
from negrec_core.generator import CODEBOOK, GENERATOR
from negrec_core.progress import Progress, silent

_KNOWN_BY = ("feedback", "user_context", "block_list", "gate")


def write_report(warehouse: Warehouse, ds: str, out: Path, progress: Progress = silent) -> None:
    """Write the page of a log date to a file.

    What a day lacks is said where it would stand. All aggregation per event or user is Spark's.

    Raises:
        MissingError: the warehouse has no tables, or nothing of that day.
    """
    held = {name: warehouse.store.days(name) for name in _KNOWN_BY if warehouse.store.exists(name)}
    if not any(ds in days for days in held.values()):
        warehouse.store.handle("feedback")
        raise MissingError(
            f"table feedback: nothing is known of ds={ds}; `negrec status` shows the days that there are"
        )
    text = render(warehouse, ds, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def render(warehouse: Warehouse, ds: str, progress: Progress = silent) -> str:
    """The page of a log date, as HTML."""
    report = Report(JobContext(warehouse, ds))
    if warehouse.store.exists("block_list") and ds in warehouse.store.days("block_list"):
        report.entries = figures.entries_per_user(report.ctx)
    parts = []
    for done, section in enumerate(SECTIONS):
        progress(done, len(SECTIONS))
        parts.append(_section(report, section))
    progress(len(SECTIONS), len(SECTIONS))
    links = [el("li", el("a", section.title, href=f"#{section.name}")) for section in SECTIONS]
    return page(
        f"negrec, {ds}",
        el(
            "header",
            el("h1", f"Block list of {ds}"),
            _made_by(report),
            el("nav", el("ul", *links), aria_label="Sections"),
        ),
        el("main", *parts),
    )


def _section(report: Report, section: Section) -> Element:
    parts = [part for make in section.makes for part in _or_why(make(report))]
    about = el("p", section.about, class_="soft")
    return el("section", el("h2", section.title), about, el("div", *parts, class_="parts"), id=section.name)


def _or_why(made: Parts) -> list[Element]:
    """What is made, up to where something is missing, and then why it is."""
    found: list[Element] = []
    try:
        found.extend(made)
    except Exception as error:
        known = expected(error)
        if known is None:
            raise
        found.append(absent(str(known)))
    return found


def _made_by(report: Report) -> Element:
    """The list's revision and models in a line."""
    store = report.ctx.store
    if not report.entries:
        text = "No list of this day is published."
        if store.exists("block_list") and store.revision("block_list", report.ds):
            text = "The list of this day was withdrawn or is empty."
        return el("p", el("span", text, class_="bad"))
    made: Commit = store.commit_of("block_list", report.ds)
    used = [f"revision {made.days[report.ds]}"]
    used += [f"codebook {made.provenance.models[CODEBOOK]}"] if CODEBOOK in made.provenance.models else []
    if store.revision("negative_item_set", report.ds):
        predicted = store.commit_of("negative_item_set", report.ds).provenance.models
        used += [f"generator {predicted[GENERATOR]}"] if GENERATOR in predicted else []
    used.append(f"negrec {made.provenance.code_version}" if made.provenance.code_version else "negrec")
    return el("p", "Published: " + ", ".join(used) + ".", class_="soft")
