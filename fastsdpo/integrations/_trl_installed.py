"""TRL as it is installed: its modules, and whether it is the TRL that a replacement was written for."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, NamedTuple

NEEDED = "1.16.0"

try:
    import trl  # noqa: F401
    from packaging.version import Version
except ImportError as error:
    raise ImportError(
        f"fastsdpo.integrations.trl needs TRL >= {NEEDED}: pip install 'trl>={NEEDED}' ({error})"
    ) from error

if Version(version("trl")) < Version(NEEDED):
    raise ImportError(
        f"fastsdpo.integrations.trl needs TRL >= {NEEDED}, got {version('trl')}; pip install -U 'trl>={NEEDED}'"
    )


def trl_module(name: str) -> Any:
    """A module of TRL, without its warning that trl.experimental may change: `check_arguments` notices that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        return importlib.import_module(f"trl.{name}")


class Replacement(NamedTuple):
    """``owner.name``, a class's method or a module's function, becomes ``ours``, which takes the same arguments."""

    owner: Any
    name: str
    ours: Any


def check_arguments(replacements: Iterable[Replacement]) -> None:
    """Raises an ImportError where a function of TRL is missing or takes other arguments than ours."""

    def arguments(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    problems = []
    for owner, name, ours in replacements:
        theirs, place = getattr(owner, name, None), f"{owner.__name__}.{name}"
        if theirs is None:
            problems.append(f"{place} is missing")
        elif arguments(theirs) != arguments(getattr(ours, "__func__", ours)):
            problems.append(f"{place}({', '.join(arguments(theirs))})")
    if problems:
        raise differs("; ".join(problems))


def differs(problem: str) -> ImportError:
    return ImportError(
        f"fastsdpo.integrations.trl: TRL {version('trl')} differs from {NEEDED}, for which this was written, in what "
        f"is replaced: {problem}. Install TRL {NEEDED} or a newer fastsdpo."
    )
