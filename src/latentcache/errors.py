"""Every error that latentcache raises on purpose.

    LatentCacheError                exit code 1
     ├── ConfigError                2   the config, an option or an argument is wrong
     │    └── CheckpointError       2   a VAE checkpoint cannot be used
     ├── ContractMismatch           2   the output holds latents made another way
     ├── StorageError               1   a store cannot be reached, read or written
     │    ├── ObjectNotFound        1   nothing lies at that URL
     │    ├── AccessDenied          1   credentials or file permissions do not allow it
     │    └── DiskFull              1   the disk or bucket has no room left: the whole run stops
     ├── SourceError                1   a source shard cannot be listed or read
     │    └── SourceChanged         1   a source shard was overwritten: its unit is planned anew
     ├── DatasetError               1   what lies on disk is not a readable latent dataset
     ├── ClusterError               1   Ray cannot give what the config asks for
     ├── IncompleteRun              1   a run ended with units left to do
     └── CheckFailed                3   a verification, the reject budget or a gate failed

The message is one line that names the thing and says the mend; `cli/` prints it and exits with
`exit_code`. A sample that cannot become a latent is not an error: it is a `Reject`, which the unit
turns into a row of the rejects file.
"""

from __future__ import annotations


class LatentCacheError(Exception):
    """The root: catch this to catch every error that latentcache raises on purpose."""

    exit_code = 1


class ConfigError(LatentCacheError):
    """The config, a command-line option or an argument is wrong."""

    exit_code = 2


class CheckpointError(ConfigError):
    """A VAE checkpoint is missing, damaged, or of an architecture this package does not know."""


class ContractMismatch(LatentCacheError):
    """The output already holds latents made under another contract."""

    exit_code = 2


class StorageError(LatentCacheError):
    """A store cannot be reached, read or written, after all retries."""


class ObjectNotFound(StorageError):
    """Nothing lies at that URL."""


class AccessDenied(StorageError):
    """Credentials are missing, or they or a file's permissions do not allow what was asked."""


class DiskFull(StorageError):
    """The local disk or the output store has no room left; no retry can help."""


class SourceError(LatentCacheError):
    """A source shard cannot be listed or read."""


class FieldMissing(SourceError):
    """A file of a source has no column for a field that `source.keep` names."""


class SourceChanged(SourceError):
    """A source shard is no longer the version that was listed; what was read of it is void."""


class DatasetError(LatentCacheError):
    """What lies at the URL is not a readable latent dataset, or has been damaged."""


class ClusterError(LatentCacheError):
    """Ray cannot be started or cannot give what the config asks for."""


class IncompleteRun(LatentCacheError):
    """A run ended with units left to do; the same command takes it up again."""


class CheckFailed(LatentCacheError):
    """A verification, the reject budget or a quality gate failed."""

    exit_code = 3


class Reject(Exception):
    """Why one sample is left out: raised by the stage that finds it, recorded by the unit.

    An outcome of that sample, not an error of the program, so it stands outside the tree.

    Args:
        stage: where it was found: `read`, `decode`, `transform` or `encode`.
        reason: a stable snake_case word that tools may count by, such as `truncated_image`.
        message: one line for a person.
    """

    def __init__(self, stage: str, reason: str, message: str) -> None:
        super().__init__(stage, reason, message)
        self.stage = stage
        self.reason = reason
        self.message = message


def first_line(error: BaseException) -> str:
    """Give what an exception says, in one line; of one that says nothing, its kind."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
