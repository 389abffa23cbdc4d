"""A plugin of pytest that prints why a test fails as soon as it does: a run that is cut off says it no more, and the
summary of one that is not leaves out what does not fit into a line.
"""

from __future__ import annotations

import pytest


class _Telling:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        said = str(crash.message if crash else report.longreprtext).strip().splitlines() or ["it said nothing"]
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"\n{report.longreprtext}\nFAILED {report.nodeid} - {said[0]}")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist has no terminal, and its reports come here
        config.pluginmanager.register(_Telling(config))
