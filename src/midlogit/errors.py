"""The errors that users meet: what went wrong, what to do about it, whether trying again can help.

MidlogitError
├── InvalidRequest (ValueError)       a parameter or prompt that cannot be honoured
│   ├── InvalidField                  a field inside a message that cannot be honoured
│   └── PromptTooLong                 a prompt beyond a context window
├── WeightMismatch (ValueError)       new weights that do not fit the model; the old ones stay
├── PairMismatch (ValueError)         two models that cannot be mixed
├── ModelUnavailable (OSError)        a model that is not there or is not a causal LM
│   ├── ServerUnavailable             a server that cannot be reached or lacks what is needed
│   └── DoesNotFit                    two models that are larger than the device
├── MissingExtra (ImportError)        a dependency that was not installed
│   └── UnsupportedVersion            a dependency of a version that is not known
└── EngineFailure (RuntimeError)      an engine that broke while running

Interrupted (KeyboardInterrupt)       Ctrl-C during a batch; carries what was finished
"""

from __future__ import annotations

from typing import Any


class MidlogitError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        hint: what the user can do, one sentence; empty when the message says it all.
        retryable: whether the same call may succeed later.
    """

    retryable = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.args[0]} {self.hint}".rstrip()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.hint), self.__dict__


class InvalidRequest(MidlogitError, ValueError):
    """A parameter or prompt that cannot be honoured; raised before anything runs."""


class InvalidField(InvalidRequest):
    """A field inside a chat message or of its template variables that is wrong or cannot be honoured.

    Attributes:
        field: where in the message, such as "content.1.type"; empty for the message itself.
        unsupported: whether it asks for what midlogit does not do, rather than being of no known form.
    """

    def __init__(
        self, message: str, hint: str = "", field: str = "", *, unsupported: bool = False
    ) -> None:
        super().__init__(message, hint)
        self.field, self.unsupported = field, unsupported


class PromptTooLong(InvalidRequest):
    """A prompt that leaves no room for a token in a model's context window."""


class WeightMismatch(MidlogitError, ValueError):
    """New weights that do not fit the model: a file, name, shape or value; the old ones stay, and requests run on."""


class PairMismatch(MidlogitError, ValueError):
    """Two models that cannot be mixed: their tokenizers disagree."""


class ModelUnavailable(MidlogitError, OSError):
    """A model folder that is not there, cannot be read, or is not a causal language model."""


class ServerUnavailable(ModelUnavailable):
    """A server that cannot be reached, refuses us, or lacks what mixing needs; names side and URL."""

    retryable = True


class DoesNotFit(ModelUnavailable):
    """Two models that together are larger than the device; says how much each needs and what is free."""


class MissingExtra(MidlogitError, ImportError):
    """A dependency that was not installed; the message is the pip line that installs it."""


class UnsupportedVersion(MissingExtra):
    """A dependency of a version whose internals are not known; the message names those that are."""


class EngineFailure(MidlogitError, RuntimeError):
    """An engine that broke while running; completions begun before it are returned with what they had."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a batch ran.

    Attributes:
        completions: every completion of the batch in input order: the finished ones, and the others
            with finish_reason "abort" and what they had.
    """

    def __init__(self, completions: list[Any]) -> None:
        super().__init__("interrupted")
        self.completions = completions


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, with the second where the first only announces it."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])
