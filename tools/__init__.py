"""The commands that run as python -m tools.NAME."""

import report.command  # noqa: F401 - first, see there
