"""Builds, tests and measures fused_losses on the GPU at hand, in stages that each end within nine minutes.

    benchmarks/gpu_check.sh [a b ...] [--resume] [--minutes M] [--wheels DIR] [--out DIR] [--dry-run]

What matters first comes first; all stages by default:

    a  compiles in place for this GPU, or takes binaries from a wheel; a few losses against float64
    b  the copy, then cross entropy at the main shapes and every other loss
    c  right or wrong, all side by side: the tests that reach the GPU; every regime, dtype and loss against float64;
       compute-sanitizer's four tools
    d  profiles of main cases and of the rows that miss their targets most
    e  plain PyTorch, other libraries, accuracy, a training step, linear_loss
    f  torch.compile

With a wheel of ours they take a quarter of an hour, where compilers and tests have 16 cores. State is kept in
build/gpu, which git ignores. With ``--resume`` what has passed for the same sources is left out, and tests and
measurements go on where they were cut off. ``--minutes`` ends everything by then: where a command may take ten minutes,
repeat ``benchmarks/gpu_check.sh --resume --minutes 9.5``. After every step --out ($OUT, else build/gpu/out) has
results.json, linear.json, report.md and logs.tar.gz. Of ``--wheels`` all files are installed beside the tree (peers,
test tools); one of fused_losses saves the compilation. ``--dry-run`` prints stages, commands and time budgets, and
needs no GPU. PYTHON chooses the interpreter; its torch must see the GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "build" / "gpu"
LOGS, SITE, REPORT = STATE / "logs", STATE / "site", STATE / "report"
RESULTS, LINEAR, PASSED_TESTS = STATE / "results.json", STATE / "linear.json", STATE / "passed-tests.txt"
STAGE_SECONDS = 540
CHECK_SECONDS, SMOKE_PARTS = 240, 3
ONE_THREAD = (("OMP_NUM_THREADS", "1"),)
SPARE_SECONDS = 15  # a step that ends by itself is told to end so much before its limit
LARGEST_LOG = 2 << 20
UNFINISHED = b"UNFINISHED: "  # printed by a step that has stopped by itself; with --resume it goes on
CODE = {".py", ".sh", ".h", ".cpp", ".cu", ".cuh", ".txt"}


@dataclass(frozen=True)
class Step:
    """A command and the seconds after which it is killed. "{minutes}" in it stands for the time that it has."""

    name: str
    seconds: int
    command: tuple[str, ...]
    needs: str = ""  # a program without which the step is left out
    environment: tuple[tuple[str, str], ...] = ()
    essential: bool = False  # nothing works without it

    def arguments(self, seconds: float) -> list[str]:
        """The command for so many seconds."""
        minutes = f"{max(0.0, seconds - SPARE_SECONDS) / 60:.2f}"
        return [argument.replace("{minutes}", minutes) for argument in self.command]


@dataclass(frozen=True)
class Stage:
    """Steps, one after the other or ``beside`` each other, within STAGE_SECONDS."""

    key: str
    about: str
    steps: tuple[Step, ...]
    beside: bool = False  # all at once: nothing is timed

    @property
    def seconds(self) -> int:
        budgets = [step.seconds for step in self.steps]
        return max(budgets) if self.beside else sum(budgets)


def stages(python: str, architecture: str, wheels: Path | None) -> list[Stage]:
    """What there is to do, with this interpreter, for such a GPU ("90")."""

    def measured(name: str, seconds: int, suite: str, parts: str) -> Step:
        command = (python, "-m", "benchmarks", "--suite", suite, "--resume", "--parts", parts)
        # Compilers may run beside each other, as only the GPU is timed here.
        threads = (("TORCHINDUCTOR_COMPILE_THREADS", "8"),)
        return Step(name, seconds, (*command, "--minutes", "{minutes}", "--out", str(RESULTS)), environment=threads)

    def smoke(name: str, seconds: int, *options: str) -> Step:
        command = (python, "benchmarks/gpu_smoke.py", *options, "--minutes", "{minutes}")
        return Step(name, seconds, command, environment=ONE_THREAD)

    def sanitized(tool: str) -> Step:
        plain = smoke(tool, CHECK_SECONDS, "--quick")
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *plain.command)
        # The caching allocator would hide overruns between its blocks.
        environment = (*plain.environment, ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"))
        return replace(plain, command=command, needs="compute-sanitizer", environment=environment)

    def report(name: str) -> Step:
        return Step(name, 20, (python, "-m", "benchmarks.report", str(RESULTS), "--out", str(REPORT)))

    tests = ("-q", "-n", "8", "--dist", "loadgroup", "-p", "benchmarks.resume_tests", "-p", "no:cacheprovider")
    firsts = [f"tests/test_{name}.py" for name in ("cuda", "wrapped_cuda", "layouts")]
    begins = [word for file in firsts for word in ("--first", file)]
    goes_on = ("--passed-file", str(PASSED_TESTS), "--stop-after-minutes", "{minutes}", *begins)
    chosen = ("-m", "not long", "-k", "cuda and not cpp and not build and not sources", "tests")
    tested = Step("tests", CHECK_SECONDS, (python, "-m", "pytest", *tests, *goes_on, *chosen), environment=ONE_THREAD)
    parts = [smoke(f"smoke{i}", CHECK_SECONDS, "--part", f"{i}/{SMOKE_PARTS}") for i in range(SMOKE_PARTS)]
    tools = [sanitized(tool) for tool in ("memcheck", "racecheck", "initcheck", "synccheck")]
    linear = (python, "-m", "benchmarks.linear")
    first = replace(smoke("first", 60, "--quick"), environment=())  # with nothing beside it
    return [
        Stage("a", "build and a first look", (*_build(python, architecture, wheels), first)),
        Stage(
            "b",
            "main figures: a copy, cross entropy, every loss",
            (
                Step("copy", 40, (python, "-m", "benchmarks.bandwidth")),
                measured("main", 150, "cuda_main", "losses"),
                report("main.report"),
            ),
        ),
        Stage("c", "right or wrong", (tested, *parts, *tools), beside=True),
        Stage(
            "d",
            "profiles",
            (Step("profiles", 120, (python, "-m", "benchmarks.gpu_profile", str(RESULTS), "--out", str(LOGS)), "ncu"),),
        ),
        Stage(
            "e",
            "what we compete with, accuracy",
            (
                measured("accuracy", 60, "cuda", "accuracy"),
                measured("peers", 200, "cuda", "losses"),
                measured("steps", 80, "cuda", "end_to_end"),
                Step("linear", 60, (*linear, "time", "--device", "cuda", "--out", str(LINEAR))),
                Step("memory", 60, (*linear, "memory", "--device", "cuda", "--out", str(LINEAR))),
                report("peers.report"),
            ),
        ),
        Stage("f", "torch.compile", (measured("compiled", 300, "cuda_compile", "losses"), report("report"))),
    ]


def _build(python: str, architecture: str, wheels: Path | None) -> tuple[Step, ...]:
    found = sorted(wheels.glob("*.whl")) if wheels else []
    own = [wheel for wheel in found if wheel.name.startswith("fused_losses-")]
    others = [str(wheel) for wheel in found if wheel not in own]
    steps = []
    if others:
        install = (python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir")
        steps.append(Step("wheels", 60, (*install, "--upgrade", "--target", str(SITE), *others)))
    if own:
        steps.append(Step("unpack", 20, (python, "benchmarks/gpu_check.py", "--unpack", str(own[-1])), essential=True))
    else:
        folder = str(STATE / "cmake")
        generator = ("-G", "Ninja") if shutil.which("ninja") else ()
        definitions = (f"-DPython_EXECUTABLE={python}", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real")
        configure = ("cmake", "-S", ".", "-B", folder, *generator, *definitions, "-DFUSED_LOSSES_PTXAS_REPORT=ON")
        insist = (("FUSED_LOSSES_CUDA", "1"),)
        steps.append(Step("configure", 40, configure, environment=insist, essential=True))
        steps.append(Step("compile", 260, ("cmake", "--build", folder, "--parallel"), essential=True))
    steps.append(Step("info", 20, (python, "-m", "fused_losses", "info"), essential=True))
    return tuple(steps)


def unpack(wheel: Path) -> None:
    """Puts the binaries of a wheel where a build in place would."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("fused_losses/") and name.endswith(".so")]
        for name in names:
            (ROOT / "fused_losses" / Path(name).name).write_bytes(archive.read(name))
    print(f"{len(names)} binaries from {wheel.name}")
    if not names:
        raise SystemExit(f"{wheel} has no binaries of fused_losses")


def digest() -> str:
    """Of everything that a result depends on."""
    found = hashlib.sha256()
    paths = [ROOT / "CMakeLists.txt"]
    for folder in ("csrc", "fused_losses", "tests", "benchmarks"):
        paths += [path for path in (ROOT / folder).rglob("*") if path.suffix in CODE and path.is_file()]
    for path in sorted(paths):
        found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


class Record:
    """What happened so far: build/gpu/state.json, and what goes out."""

    def __init__(self, out: Path, again: Collection[str] = ()) -> None:
        """Of other sources, or of steps that are done ``again``, nothing is kept."""
        self.out, self.sources, self.lock = out, digest(), threading.Lock()
        path = STATE / "state.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        same = found.get("sources") == self.sources
        steps: dict[str, dict[str, object]] = found["steps"] if same else {}
        self.steps = {name: about for name, about in steps.items() if name not in again}
        for name, kept in (("main", RESULTS), ("linear", LINEAR), ("tests", PASSED_TESTS)):
            if not same or name in again:
                kept.unlink(missing_ok=True)
        for folder in (LOGS, REPORT, out):
            folder.mkdir(parents=True, exist_ok=True)

    def has_passed(self, name: str) -> bool:
        return self.steps.get(name, {}).get("status") == "passed"

    def note(self, name: str, status: str, seconds: float) -> None:
        with self.lock:
            self.steps[name] = {"status": status, "seconds": round(seconds, 1)}
            state = {"sources": self.sources, "steps": self.steps}
            (STATE / "state.json").write_text(json.dumps(state, indent=1) + "\n")
            self.hand_out()

    def table(self) -> str:
        lines = [f"| {name} | {step['status']} | {step['seconds']} |\n" for name, step in self.steps.items()]
        return "| step | | seconds |\n|---|---|--:|\n" + "".join(lines)

    def hand_out(self) -> None:
        """A few files, whatever is cut off later."""
        for path in (RESULTS, LINEAR):
            if path.exists():
                shutil.copyfile(path, self.out / path.name)
        report = REPORT / "report.md"
        text = report.read_text() if report.exists() else "No measurements yet.\n"
        (self.out / "report.md").write_text(f"# Steps\n\n{self.table()}\n{text}")
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
            for path in sorted([*LOGS.iterdir(), *REPORT.glob("*.png"), STATE / "state.json"]):
                archive.add(path, f"logs/{path.name}")


def shorten(log: Path) -> None:
    """Keeps the beginning and the end of what would not fit into the archive."""
    if log.stat().st_size > LARGEST_LOG:
        text = log.read_bytes()
        log.write_bytes(text[: LARGEST_LOG // 2] + b"\n[...]\n" + text[-LARGEST_LOG // 2 :])


def run(step: Step, seconds: float, environment: dict[str, str]) -> str:
    """Runs it, shown here and kept in a log; returns how it ended."""
    log = LOGS / f"{step.name}.log"
    command = step.arguments(seconds)
    began = time.monotonic()
    with log.open("wb") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
            ended = f"FAILED ({status})"
            if status == 0:
                ended = "unfinished" if UNFINISHED in log.read_bytes() else "passed"
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, KeyboardInterrupt):
                raise
            ended = f"CUT OFF after {time.monotonic() - began:.0f} s"
    shorten(log)
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(f"   {line}" for line in lines[-30 if "FAILED" in ended else -12 :]), flush=True)
    return ended


def environment_of(step: Step, out: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OUT": str(out)}
    return {**os.environ, **own, **dict(step.environment)}


def show(chosen: list[Stage]) -> None:
    """What would be run."""
    for stage in chosen:
        beside = ", all at once" if stage.beside else ""
        print(f"stage {stage.key}: {stage.about}, {stage.seconds} s of {STAGE_SECONDS} s at most{beside}")
        for step in stage.steps:
            variables = [f"{name}={value}" for name, value in step.environment]
            command = shlex.join([*variables, *step.arguments(step.seconds)]).replace(f"{ROOT}/", "")
            needs = f"   (if there is {step.needs})" if step.needs else ""
            print(f"  {step.name:<13}{step.seconds:4} s   {command}{needs}")


def architecture_of(python: str) -> str:
    """That of the GPU which this interpreter's torch sees."""
    code = "import torch; print(*torch.cuda.get_device_capability(), sep='')"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"gpu_check: {python} sees no CUDA device:\n{result.stderr.strip()}")
    return result.stdout.strip()


def attempt(stage: Stage, step: Step, record: Record, resume: bool, ends: float) -> None:
    """Runs a step unless it has passed or cannot be run, and notes how it ended."""
    left = ends - time.monotonic()
    if resume and record.has_passed(step.name):
        print(f"== {stage.key} {step.name}: passed before")
    elif step.needs and shutil.which(step.needs) is None:
        record.note(step.name, f"left out: no {step.needs} on PATH", 0)
        print(f"== {stage.key} {step.name}: left out, {step.needs} is not on PATH")
    elif left < 2 * SPARE_SECONDS:
        record.note(step.name, "FAILED: no time left", 0)
        print(f"== {stage.key} {step.name}: no time left")
    else:
        print(f"== {stage.key} {step.name}", flush=True)
        began = time.monotonic()
        ended = run(step, min(left, step.seconds), environment_of(step, record.out))
        record.note(step.name, ended, time.monotonic() - began)
        print(f"== {stage.key} {step.name}: {ended}", flush=True)


def check(chosen: list[Stage], record: Record, resume: bool, stop_at: float) -> bool:
    """Runs the stages; whether all that could be run has passed."""
    for stage in chosen:
        ends = min(stop_at, time.monotonic() + STAGE_SECONDS)
        if stage.beside:
            with ThreadPoolExecutor(len(stage.steps)) as pool:
                begun = [pool.submit(attempt, stage, step, record, resume, ends) for step in stage.steps]
            for attempted in begun:
                attempted.result()
            continue
        for step in stage.steps:
            attempt(stage, step, record, resume, ends)
            if step.essential and not record.has_passed(step.name):
                return False
    names = [step.name for stage in chosen for step in stage.steps]
    return not any(str(record.steps[name]["status"]).startswith(("FAILED", "CUT OFF")) for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="letters (default: all)")
    parser.add_argument("--resume", action="store_true", help="leave out what has passed for the same sources")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end by then")
    parser.add_argument("--wheels", type=Path, help="folder of wheels")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or STATE / "out"), help="see above")
    parser.add_argument("--dry-run", action="store_true", help="print stages, commands and time budgets")
    parser.add_argument("--unpack", type=Path, metavar="WHEEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.unpack:
        unpack(options.unpack)
        return 0
    if not options.minutes >= 0.0:
        parser.error(f"--minutes must be at least 0, got {options.minutes}")
    if options.wheels and not list(options.wheels.glob("*.whl")):
        parser.error(f"--wheels: {options.wheels} has no wheels")
    stop_at = time.monotonic() + 60 * options.minutes
    python = sys.executable
    all_stages = stages(python, "90" if options.dry_run else architecture_of(python), options.wheels)
    unknown = set(options.stages) - {stage.key for stage in all_stages}
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(s.key for s in all_stages)}")
    chosen = [stage for stage in all_stages if not options.stages or stage.key in options.stages]
    if options.dry_run:
        show(chosen)
        return 0
    names = [step.name for stage in chosen for step in stage.steps]
    record = Record(options.out.resolve(), again=() if options.resume else names)
    passed = check(chosen, record, options.resume, stop_at)
    print(record.table() + f"results in {record.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
