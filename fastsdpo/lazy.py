"""Names of a package that are imported when they are first used, and packages that may be missing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def lazy_names(package: str, module_of: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of ``package``; ``module_of``: full names of the modules that names are of."""
    module = sys.modules[package]

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(module_of[name]), name)
        setattr(module, name, value)
        return value

    return get, lambda: sorted(module.__all__)


@contextmanager
def needed(package: str, by: object, install: str | None = None) -> Iterator[None]:
    """Around an import of a package that may be missing.

    Args:
        by: what needs it, as a message begins.
        install: what pip installs; None: the package.

    Raises:
        ImportError: it is missing; the text says what to do.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{by} needs the package {package}; install it with: pip install {install or package}"
        ) from error
