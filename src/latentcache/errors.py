"""The exceptions that latentcache raises on purpose, and the redaction of their messages.

    LatentCacheError                exit code 1
     ├── ConfigError                2   the config, an option or an argument is wrong
     │    └── CheckpointError       2   a VAE checkpoint cannot be used
     ├── ContractMismatch           2   the output holds latents of another contract
     ├── StorageError               1   a store cannot be reached, read or written
     │    ├── ObjectNotFound        1   no object exists at that URL
     │    ├── AccessDenied          1   credentials or file permissions do not allow it
     │    └── DiskFull              1   the disk or bucket is full: the whole run stops
     ├── DeadlinePassed             1   a put came so late that gc may have deleted the files
     ├── SourceError                1   a source shard cannot be listed or read
     │    ├── FieldMissing          1   a file has no column for a field of `source.keep`
     │    └── SourceChanged         1   a source shard was overwritten: its unit is planned again
     ├── DatasetError               1   the files at the URL are not a readable latent dataset
     ├── ClusterError               1   Ray cannot provide what the config requests
     ├── IncompleteRun              1   a run ended before all of its units were done
     └── CheckFailed                3   a verification, the reject budget or a gate failed

A message is one line that says what is wrong, where, and how to fix it. `cli/` prints it and exits
with `exit_code`. A sample that cannot become a latent is a `Reject`, a row of the rejects file.
"""

from __future__ import annotations

import re

# Replaces a secret in a message.
REDACTED = "***"

# `scheme://user:password@`. It does not match a port after a host, or Azure's `container@account`.
_USERINFO = re.compile(r"([a-z][a-z0-9+.-]*:/{1,2})(?!/)(?![^\s/@:]*:\d*/)[^\s/@]*:[^\s@]*@", re.I)
_HTTP_USER = re.compile(r"(https?:/{1,2})(?!/)[^\s/@]+@", re.I)

# The parameters of signed URLs, and the headers and tokens that clients repeat in their messages.
CREDENTIAL_WORDS = "sig|token|secret|pass|pwd|cred|key|auth|policy|jwt|session|sas"
_PARAMETER = re.compile(
    rf"((?:[?&;#]|, ?)[\w.%~-]{{0,60}}(?:{CREDENTIAL_WORDS})[\w.%~-]{{0,60}}=)[^&;\s\"'<>]+", re.I
)
_BEARER = re.compile(r"\b((?:bearer|basic) )[\w.~+/=-]{8,}", re.I)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def one_line(text: str) -> str:
    """Return `text` as one redacted line, with escapes for characters that are not printable."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in redact(text)
    )


def redact(text: str) -> str:
    """Return `text` with `***` in place of every credential of a URL or a client's message."""
    text = _HTTP_USER.sub(rf"\1{REDACTED}@", _USERINFO.sub(rf"\1{REDACTED}@", text))
    text = _PARAMETER.sub(rf"\1{REDACTED}", text)
    return _HUB_TOKEN.sub(REDACTED, _BEARER.sub(rf"\1{REDACTED}", text))


class LatentCacheError(Exception):
    """The base class of every error that latentcache raises on purpose.

    `one_line` cleans each of its lines, usually one, so that a file name in a message can neither
    control a terminal nor look like a second message.
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
    """A VAE checkpoint is missing, damaged, or has an unsupported architecture."""


class ContractMismatch(LatentCacheError):
    """The output already holds latents made under another contract."""

    exit_code = 2


class StorageError(LatentCacheError):
    """A store cannot be reached, read or written, after all retries."""


class ObjectNotFound(StorageError):
    """No object exists at that URL."""


class AccessDenied(StorageError):
    """Credentials are missing, or the credentials or file permissions forbid the operation."""


class DiskFull(StorageError):
    """The local disk or the output store is full. A retry cannot succeed."""


class DeadlinePassed(LatentCacheError):
    """A put was not tried, because gc may have deleted the files that the object names."""


class SourceError(LatentCacheError):
    """A source shard cannot be listed or read."""


class FieldMissing(SourceError):
    """A file of a source has no column for a field that `source.keep` names."""


class SourceChanged(SourceError):
    """A source shard is no longer the listed version. Data that was read from it is discarded."""


class DatasetError(LatentCacheError):
    """The files at the URL are not a readable latent dataset, or they are damaged."""


class ClusterError(LatentCacheError):
    """Ray cannot be started or cannot provide what the config requests."""


class IncompleteRun(LatentCacheError):
    """A run ended before all of its units were done. The same command resumes it."""


class CheckFailed(LatentCacheError):
    """A verification, the reject budget or a quality gate failed."""

    exit_code = 3


class Reject(Exception):
    """The reason why one sample has no latent: not an error of the program.

    `stage` is `read`, `decode`, `transform` or `encode`. `reason` is a stable snake_case identifier
    that tools may count by, such as `truncated_image`. `message` is one line for a person.
    """

    def __init__(self, stage: str, reason: str, message: str) -> None:
        super().__init__(stage, reason, message)
        self.stage, self.reason, self.message = stage, reason, message


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, redacted; its type name if it has none."""
    text = redact(str(error).strip())
    return text.splitlines()[0] if text else type(error).__name__
