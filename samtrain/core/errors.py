"""Errors that speak to users: each names the thing, the values that disagree, and the way out.

`InputError` and its children end the process with exit code 2 (bad recipe or input); every other
exception ends it with 1.
"""

EXIT_SUCCESS = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_TERMINATED = 143  # 128 + SIGTERM: a checkpoint was saved, the run can be resumed


class SamtrainError(Exception):
    """Base of the errors samtrain raises on purpose; its message is written for the user."""

    exit_code = EXIT_FAILURE


class InputError(SamtrainError):
    """Something the user gave is wrong: nothing was trained, nothing was overwritten."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(InputError):
    """A recipe, an override or a combination of settings is wrong."""


class DataError(InputError):
    """A shard, an index, a sample or an image is wrong; the message names its key."""


class CheckpointError(InputError):
    """A checkpoint or an exported folder is missing, incomplete or does not fit the model."""


class BatchError(SamtrainError):
    """A batch breaks the contract of `PackedBatch`; the message names the keys and both counts."""


class TrainingError(SamtrainError):
    """Training cannot go on (NaN, too many bad samples, a hang); the message names step and keys."""


class Terminated(SamtrainError):
    """SIGTERM arrived; a checkpoint of the last finished step was saved."""

    exit_code = EXIT_TERMINATED
