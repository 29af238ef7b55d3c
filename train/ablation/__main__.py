"""The command line of the ablation."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import train.ablation
from train.ablation.cells import cells, run
from train.ablation.grid import Grid
from train.ablation.summary import summarise
from train.ablation.variants import VARIANTS
from train.report import write_report
from train.tables import DATASETS

SEEDS = (7, 8, 9)
_HERE = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m train.ablation`."""
    parser = argparse.ArgumentParser(prog="python -m train.ablation", description=train.ablation.__doc__)
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=WAREHOUSE", help="a data set of `make tables`"
    )
    parser.add_argument("--work", type=Path, default=Path("warehouse/ablation"), help="trained steps, cells")
    parser.add_argument("--preset", default="tiny", help="of conf/models")
    parser.add_argument("--variant", action="append", default=[], choices=[v.name for v in VARIANTS])
    parser.add_argument("--seed", action="append", type=int, help=f"default: {SEEDS}")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="STEP",
        help="chains without it, where there is nothing to learn it from",
    )
    parser.add_argument(
        "--grpo-rate", action="append", default=[], metavar="RATE", help="GRPO once with each learning rate"
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="of all variants")
    parser.add_argument("--users", type=int, default=0, help="judge a sample of so many users")
    parser.add_argument("--title-updates", type=int, default=-1, help="most of title-based models")
    parser.add_argument("--jobs", type=int, default=1, help="processes, all on one GPU if there is one")
    parser.add_argument("--minutes", type=float, default=0, help="stop then; what is finished is kept")
    parser.add_argument("--report", action="store_true", help="only put the cells into train/RESULTS.md")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    warehouses = {}
    for pair in given.data:
        name, _, path = pair.partition("=")
        if name not in {dataset.name for dataset in DATASETS} or not path:
            parser.error(f"--data {pair}: give NAME=WAREHOUSE, NAME one of {[d.name for d in DATASETS]}")
        warehouses[name] = Path(path).absolute()
    grid = Grid(given.work.absolute(), given.preset, tuple(given.set), given.users, given.title_updates)
    wanted = cells(grid, warehouses, given.variant, given.grpo_rate, given.seed or SEEDS, given.without)
    if given.report:
        summarise(grid.work / "cells", _HERE / "results" / "ablation")
        write_report(_HERE / "results", [dataset.name for dataset in DATASETS], _HERE / "RESULTS.md")
        return
    missing = run(grid, wanted, given.jobs, given.minutes) if wanted else 0
    if missing:
        sys.exit(f"{missing} of {len(wanted)} cells are not finished or failed: see {grid.work / 'cells'}")


if __name__ == "__main__":
    main()
