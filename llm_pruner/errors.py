"""Every error this package raises on purpose.

    LLMPrunerError
    |-- UnsupportedModelError (TypeError)    the model has no layer stack we can prune exactly
    |-- InvalidPlanError (ValueError)        layers, ratio, threshold or protection that cannot be
    |-- InvalidDataError (ValueError)        calibration or evaluation data that cannot be used
    |-- NonFiniteError (ArithmeticError)     a score or a loss came out NaN or infinite
    |-- UnknownNameError (LookupError)       no strategy, objective or dataset of that name
    |-- LoadError (OSError)                  a model or dataset could not be found or read
    |-- OutputError (OSError)                the output cannot be written where it was asked for
    |   `-- HubError                         it cannot be uploaded to the Hugging Face hub
    |-- VerificationError (RuntimeError)     a written checkpoint does not compute what it should
    |-- ProcessGroupError (RuntimeError)     of several processes one ended, or does not answer
    |-- ModelInUseError (RuntimeError)       another thread is using the model
    |-- OutOfMemoryError (MemoryError)       the memory does not suffice for what was asked
    `-- MissingDependencyError (ImportError) an optional package is needed

Each is also the builtin a Python programmer would expect, so ``except ValueError`` works.
``exit_code`` is what the command line returns for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LLMPrunerError(Exception):
    """Base of all errors of this package."""

    exit_code = 1


class UnsupportedModelError(LLMPrunerError, TypeError):
    """The model has no decoder stack that can be pruned exactly."""

    exit_code = 3


class InvalidPlanError(LLMPrunerError, ValueError):
    """Layers, ratio, threshold or protection that cannot be."""

    exit_code = 2


class InvalidDataError(LLMPrunerError, ValueError):
    """Calibration or evaluation data that cannot be used."""

    exit_code = 3


class NonFiniteError(LLMPrunerError, ArithmeticError):
    """A score or a loss came out NaN or infinite."""

    exit_code = 3


class UnknownNameError(LLMPrunerError, LookupError):
    """No strategy, objective or dataset of that name."""

    exit_code = 2

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """Build the message: the value, the nearest known name, all known names."""
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return cls(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")


class LoadError(LLMPrunerError, OSError):
    """A model or dataset could not be found or read."""

    exit_code = 3


class OutputError(LLMPrunerError, OSError):
    """The output cannot be written where it was asked for."""

    exit_code = 4


class HubError(OutputError):
    """Something could not be uploaded to the Hugging Face hub; on this machine nothing is lost."""

    exit_code = 5


class VerificationError(LLMPrunerError, RuntimeError):
    """A written checkpoint does not compute what it should."""

    exit_code = 6


class ProcessGroupError(LLMPrunerError, RuntimeError):
    """Of several processes one has ended, or does not answer."""

    exit_code = 4


class ModelInUseError(LLMPrunerError, RuntimeError):
    """Another thread is using the model, and waits for one that this thread uses."""

    exit_code = 4


class MissingDependencyError(LLMPrunerError, ImportError):
    """An optional package is needed for what was asked."""

    exit_code = 4


class OutOfMemoryError(LLMPrunerError, MemoryError):
    """The memory does not suffice for what was asked."""

    exit_code = 4
