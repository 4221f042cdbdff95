"""Every error that latentcache raises on purpose.

    LatentCacheError                exit code 1
     ├── ConfigError                2   the config, an option or an argument is wrong
     │    └── CheckpointError       2   a VAE checkpoint cannot be used
     ├── ContractMismatch           2   the output holds latents made another way
     ├── StorageError               1   a store cannot be reached, read or written
     │    ├── ObjectNotFound        1   nothing lies at that URL
     │    ├── AccessDenied          1   credentials or file permissions do not allow it
     │    └── DiskFull              1   the disk or bucket has no room left: the whole run stops
     ├── DeadlinePassed             1   a put came so late that gc may have deleted the files
     ├── SourceError                1   a source shard cannot be listed or read
     │    ├── FieldMissing          1   a file has no column for a field that is to be kept
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

import re

# What stands for a secret in a message.
REDACTED = "***"

# `scheme://user:password@`; a port after a host is none, nor is `container@account` of Azure.
_USERINFO = re.compile(r"([a-z][a-z0-9+.-]*:/{1,2})(?!/)(?![^\s/@:]*:\d*/)[^\s/@]*:[^\s@]*@", re.I)
_HTTP_USER = re.compile(r"(https?:/{1,2})(?!/)[^\s/@]+@", re.I)

# Parameters of signed URLs, and headers and tokens as clients repeat them in their messages.
CREDENTIAL_WORDS = "sig|token|secret|pass|pwd|cred|key|auth|policy|jwt|session|sas"
_PARAMETER = re.compile(
    rf"((?:[?&;#]|, ?)[\w.%~-]{{0,60}}(?:{CREDENTIAL_WORDS})[\w.%~-]{{0,60}}=)[^&;\s\"'<>]+", re.I
)
_BEARER = re.compile(r"\b((?:bearer|basic) )[\w.~+/=-]{8,}", re.I)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def one_line(text: str) -> str:
    """Return `text` fit for one line of a terminal or a log: redacted, visible characters only.

    White space becomes spaces. What a terminal would act on (escapes, C1 controls, marks that turn
    the direction of writing) and what is not UTF-8 is written as a Python escape.
    """
    return "".join(
        c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in redact(text)
    )


def redact(text: str) -> str:
    """Return `text` with every credential that a URL or a client's message holds as `***`."""
    text = _HTTP_USER.sub(rf"\1{REDACTED}@", _USERINFO.sub(rf"\1{REDACTED}@", text))
    text = _PARAMETER.sub(rf"\1{REDACTED}", text)
    return _HUB_TOKEN.sub(REDACTED, _BEARER.sub(rf"\1{REDACTED}", text))


class LatentCacheError(Exception):
    """The root: catch this to catch every error that latentcache raises on purpose.

    Messages go to terminals, logs and failure records. So each line of one is what `one_line` makes
    of it: whatever a file is called, it neither steers a terminal nor looks like a further message.

    Args:
        lines: of the message, one as a rule.
    """

    exit_code = 1

    def __init__(self, *lines: str) -> None:
        super().__init__(*map(one_line, lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


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


class DeadlinePassed(LatentCacheError):
    """A put was not tried, because what it would name may be deleted by now."""


class SourceError(LatentCacheError):
    """A source shard cannot be listed or read."""


class FieldMissing(SourceError):
    """A file of a source has no column for a field that `source.keep` names."""


class SourceChanged(SourceError):
    """A source shard is no longer the version that was listed; what was read of it is discarded."""


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
    """Give what an exception says, in one line, redacted; of one that says nothing, its kind."""
    text = redact(str(error).strip())
    return text.splitlines()[0] if text else type(error).__name__
