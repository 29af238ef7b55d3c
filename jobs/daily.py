"""spark-submit jobs/daily.py --ds D --config NAME: the same as `negrec run`.

Under spark-submit the master and the resources are those of the cluster, not of the configuration.
"""

import argparse
import os
import sys

from jobs.console import reporting, set_up_process
from jobs.context import Warehouse
from jobs.pipeline import DAILY_STAGES, expected, parse_day, run_day
from negrec_core.config import load_config


def main(arguments: list[str] | None = None) -> int:
    """Run the pipeline for one day; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the negrec pipeline for one log date.")
    parser.add_argument("--ds", required=True, help="log date, ISO")
    parser.add_argument("--config", action="append", default=[], help="overlay; may be repeated")
    parser.add_argument("--set", action="append", default=[], help="a.b=value; may be repeated")
    parser.add_argument("--warehouse", default=os.environ.get("NEGREC_WAREHOUSE", "warehouse"))
    parser.add_argument("--stages", default=",".join(DAILY_STAGES))
    parser.add_argument("--force", action="store_true", help="new revision of what is there")
    parser.add_argument(
        "--accept", action="append", default=[], metavar="GATE", help="gate that may fail; may be repeated"
    )
    options = parser.parse_args(arguments)
    set_up_process(verbose=False)
    try:
        config = load_config(options.config, ["spark.master=null", *options.set])
        warehouse = Warehouse(options.warehouse, config)
        with reporting() as reporter:
            ds = parse_day(options.ds).isoformat()
            run_day(warehouse, ds, options.stages.split(","), options.force, reporter, options.accept)
    except Exception as error:
        known = expected(error)
        if known is None:
            raise
        print(f"negrec: {known}", file=sys.stderr)
        return known.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
