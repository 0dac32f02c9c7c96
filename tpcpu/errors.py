"""The exceptions of tpcpu. Every message says what is wrong, where, what was found, and what would work.

    TpcpuError                 exit code 1: a failure
    ├── RankError              a rank died, stopped or raised
    ├── NoRoomError            a disk that became full; what is finished is safe
    └── UserError              exit code 2: something the user can mend
        ├── UsageError         flags and arguments that contradict each other or are impossible
        ├── CheckpointError    a folder, file or tensor that is not what it should be
        ├── ConfigError        a model configuration that is wrong, or that tpcpu does not support
        ├── PromptError        a prompt that cannot be answered
        ├── SamplingError      sampling values that are impossible
        ├── TextError          tokenizer files or chat templates that cannot be used
        ├── LaunchError        the launcher, the MPI library and the rank count do not fit together
        └── OutputError        a destination that exists, is locked, or has no room

This module knows nothing of the rest of tpcpu.
"""

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h, of a command that was asked to end before its end: run again, it goes on from there."""


class TpcpuError(Exception):
    """Anything tpcpu reports as one line instead of a traceback."""

    exit_code = 1


class RankError(TpcpuError):
    """A rank died, stopped answering, or raised; names rank, host and operation."""


class NoRoomError(TpcpuError):
    """A disk that became full, or the user's part of it; what was finished is safe."""


class UserError(TpcpuError):
    """Something the user can mend."""

    exit_code = 2


class UsageError(UserError):
    """Flags or arguments that contradict each other or are impossible."""


class CheckpointError(UserError):
    """A folder, file or tensor that is not what it should be."""


class ConfigError(UserError):
    """A model configuration that is wrong, or that tpcpu does not support."""


class PromptError(UserError):
    """A prompt that cannot be answered: empty, too long, not text."""


class SamplingError(UserError):
    """Sampling values that are impossible."""


class TextError(UserError):
    """Tokenizer files or chat templates that cannot be used."""


class LaunchError(UserError):
    """The launcher, the MPI library and the number of ranks do not fit together."""


class OutputError(UserError):
    """A destination that exists, is locked by another job, or has no room."""
