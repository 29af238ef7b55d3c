"""Run the benches and print one table: `make bench`, or one of them: `make bench ONLY=swing`.

    python tests/bench/run.py [--quick] [NAME...]

Every bench is a program of its own that prints rows of this table; `--quick` makes all of them small.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

BENCHES = ("swing", "delta", "trie", "engines", "grid", "reader", "training", "end_to_end")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    arguments.add_argument("--quick", action="store_true")
    options = arguments.parse_args()
    unknown = set(options.names) - set(BENCHES)
    if unknown:
        arguments.error(f"no bench {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    here = Path(__file__).parent
    # How threads wait, as the command line sets it.
    environment = {
        **os.environ,
        "PYTHONPATH": str(here.parents[1]),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "10000",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    busy = os.getloadavg()[0]
    beside = f", beside other work (load {busy:.1f})" if busy > 0.5 else ""
    print(f"{os.cpu_count()} cores, {_memory_gib():.0f} GiB, {_processor()}{beside}\n")
    print("| bench | workload | what | figure | note |\n|---|---|---|---|---|", flush=True)
    failed = []
    for name in options.names or BENCHES:
        begin = time.monotonic()
        command = [sys.executable, str(here / f"bench_{name}.py"), *["--quick"] * options.quick]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("|"):
                    print(line, end="", flush=True)
        print(f"bench {name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
        if child.returncode:
            failed.append(name)
    if failed:
        print(f"bench: {', '.join(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


def _memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
