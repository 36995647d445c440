"""The errors users meet: one clear message each, with the offending value and the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZooError(Exception):
    """Base of every error caused by input. The command line prints it as one line and exits with code 2."""


class ConfigError(ZooError, ValueError):
    """A configuration with an unknown key, a wrong type or an impossible combination."""


class UnknownNameError(ZooError, KeyError):
    """A name that is not registered. The message carries the nearest valid names."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class TraitError(ZooError, TypeError):
    """A mixer was asked for something that its traits exclude, such as causal use of a two-sided mixer."""


class DataError(ZooError, ValueError):
    """Training or scoring data that is missing, empty or not readable."""


class ConversionError(ZooError, ValueError):
    """A teacher that cannot be imported exactly, or a conversion that makes no sense."""


class CheckpointError(ZooError, RuntimeError):
    """A checkpoint that is incomplete, truncated or belongs to another run."""


class ExportError(ZooError, ValueError):
    """A model that a layout cannot express; the message carries the reason and the layouts that can."""


class TrainingError(ZooError, RuntimeError):
    """Training that stopped: a NaN, a diverging loss, a full disk."""


class HubError(ZooError, RuntimeError):
    """The Hub refused a request, lacks what was asked for, or cannot be reached."""


def did_you_mean(name: str, choices: Iterable[str], limit: int = 3) -> str:
    """A hint such as ``; did you mean 'retention'?`` or, with nothing near, the list of what exists."""
    choices = list(choices)
    near = difflib.get_close_matches(str(name), choices, n=limit, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    if choices and len(choices) <= 20:
        return "; choose from " + ", ".join(sorted(choices))
    return ""


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> UnknownNameError:
    """The error for a misspelt `name` of a `kind` of thing ("model", "mixer", ...)."""
    return UnknownNameError(f"unknown {kind} {name!r}{did_you_mean(name, choices)}")
