"""A pytest plugin, ``-p benchmarks.resume_tests``: a run that may be cut off, and the next one that goes on with it.

``--passed-file`` names what has passed, a line for each test, which the next run leaves out. ``--stop-after-minutes``
skips what there is no time for and says how much that is; ``--first`` names a file to begin with, and may be given more
than once. Works with pytest-xdist, whose workers stop by themselves.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

NO_TIME = "no time left"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed-file", help="leave out what is listed here, add what passes")
    parser.addoption("--first", action="append", default=[], help="tests of this file come before all others")
    parser.addoption("--stop-after-minutes", type=float, default=math.inf, help="skip what would begin later")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Resumed(config), "resumed tests")


class Resumed:
    """Workers select and skip; the process that hears of all results writes them down."""

    def __init__(self, config: pytest.Config) -> None:
        self.first = tuple(config.getoption("--first"))
        given = config.getoption("--passed-file")
        self.file = Path(given) if given else None
        self.stop_at = time.monotonic() + 60 * float(config.getoption("--stop-after-minutes"))
        self.writes = self.file is not None and not hasattr(config, "workerinput")
        self.skipped = 0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: not item.nodeid.startswith(self.first))
        if self.file is None or not self.file.exists():
            return
        passed = set(self.file.read_text().splitlines())
        done = [item for item in items if item.nodeid in passed]
        items[:] = [item for item in items if item.nodeid not in passed]
        config.hook.pytest_deselected(items=done)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self.stop_at:
            pytest.skip(NO_TIME)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and NO_TIME in str(report.longrepr):
            self.skipped += 1
        if self.writes and report.when == "call" and report.passed:
            assert self.file is not None
            with self.file.open("a") as file:
                file.write(f"{report.nodeid}\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped:
            terminalreporter.write_line(f"UNFINISHED: {self.skipped} tests are left")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.file is not None and self.file.exists():
            session.exitstatus = pytest.ExitCode.OK  # nothing is left to run: all have passed before
