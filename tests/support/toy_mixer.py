"""The mixer of another package in `toy_package`, installed as far as Python can tell: found through its entry point."""

import importlib
import sys
from pathlib import Path

from sambalm.model import registry

PACKAGE = Path(__file__).parent / "toy_package"


def install() -> None:
    """Puts the package where imports and entry points are found. Processes started from this one find it too."""
    if str(PACKAGE) not in sys.path:
        sys.path.append(str(PACKAGE))
    importlib.invalidate_caches()
    registry.external_mixers.cache_clear()


def uninstall() -> None:
    sys.path.remove(str(PACKAGE))
    registry.external_mixers.cache_clear()
