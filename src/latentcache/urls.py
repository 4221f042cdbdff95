"""Validation of URLs, and the variables that a URL in a config may have.

URLs are recorded in datasets and printed in logs. A URL that holds a credential is therefore
refused, and no message here repeats the credential.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from latentcache.errors import CREDENTIAL_WORDS, REDACTED, ConfigError, one_line, redact

# fsspec has many more schemes. Some of them run commands, read archives inside archives, or return
# data that the URL itself holds.
SCHEMES = frozenset(
    {"file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "http", "https"}
)

_SCHEME = re.compile(r"([^/:]+)://")
_ALMOST_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+._-]+):")
# Words that are a scheme even without '//'. Any other word before a colon is part of a file name.
_SCHEME_WORDS = SCHEMES | {"data", "ftp", "github", "local", "memory", "pipe", "sftp", "zip"}
_CHAIN = re.compile(r"^[a-z][a-z0-9+.-]*::|::[a-z][a-z0-9+.-]*://", re.I)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SIGNED = re.compile(rf"\?(?:[^/]*[&;])?(versionid|[^=/&;]*(?:{CREDENTIAL_WORDS})[^=/&;]*)=", re.I)
_VARIABLE = re.compile(r"\$(?:\$|\{(\w*)(\}?)|([A-Za-z_]\w*))", re.ASCII)
_SECRET_NAME = re.compile("secret|token|passw|credential|_key", re.I)
# A host or an IPv6 address in brackets, with an optional port.
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:]+)(:\d*)?", re.ASCII)
# The hosts that botocore accepts in an endpoint.
_LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
_HOST = re.compile(rf"({_LABEL}\.)*{_LABEL}\.?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")

_USE_PROFILE = (
    "credentials come from the environment or from a profile that `storage.profile` names, and "
    "`storage.anon: true` reads public data"
)


def check_url(url: str) -> str:
    """Return the scheme of a URL, `file` for a local path.

    Raises:
        ConfigError: the URL is malformed, has a scheme that is not in `SCHEMES`, is a chain (`::`),
            names no bucket or host, or holds a credential or a query.
    """
    if not url.strip():
        raise ConfigError("the URL is empty: give a path or a URL")
    if _CONTROL.search(url):
        raise ConfigError(f"{shown(url)} has a control character: rename it, or correct the URL")
    try:
        url.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{shown(url)} is not UTF-8: rename it") from None
    scheme = _scheme_of(url)
    if _CHAIN.search(url):
        raise ConfigError(f"{shown(url)} is a chain of URLs ('::'): name the file itself")
    if scheme is None:
        _check_path(url)
    elif scheme == "file":
        _check_path(url.removeprefix("file://"), is_url=True)
    else:
        _check_remote(url, scheme)
    return scheme or "file"


def _scheme_of(url: str) -> str | None:
    """Return the scheme, after checking that it is allowed; None for a local path."""
    match = _SCHEME.match(url)
    almost = None if match else _ALMOST_SCHEME.match(url)
    if almost and not url[almost.end() :].startswith("/"):
        almost = almost if almost[1].lower() in _SCHEME_WORDS else None
    written = match or almost
    if written is None:
        if url.startswith("://"):
            raise ConfigError(f"{shown(url)} has no scheme before '://'")
        return None
    scheme = written[1].lower()
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{shown(url)}: {scheme}:// URLs are not supported; use file, s3, gs, az, abfs, hf, "
            "http and https"
        )
    if almost:
        raise ConfigError(
            f"{shown(url)} has one slash or none after '{almost[1]}:': a URL begins with "
            f"'{scheme}://', and a local path of that name with './'"
        )
    if written[1] != scheme:
        raise ConfigError(f"{shown(url)}: write the scheme in lower case, {scheme}://")
    return scheme


def _check_path(path: str, *, is_url: bool = False) -> None:
    if is_url and not path.startswith(("/", "~")):
        raise ConfigError(f"file://{shown(path)}: a file URL has an absolute path, file:///…")
    if path.startswith("~") and os.path.expanduser(path) == path:
        user = path.partition("/")[0]
        raise ConfigError(
            f"{shown(path)}: there is no user {shown(user[1:])!r}; begin the path with './' where "
            "a folder has that name"
        )


def _check_remote(url: str, scheme: str) -> None:
    authority, slash, path = url[len(scheme) + 3 :].partition("/")
    is_http = scheme in ("http", "https")
    user, at, host = authority.rpartition("@")
    # Azure writes a host as `container@account`; the Hub writes `repository@revision`.
    may_have_at = scheme in ("abfs", "abfss", "az", "hf")
    if at and (":" in user or not may_have_at):
        raise ConfigError(f"{shown(url)} holds a user name or password: {_USE_PROFILE}")
    if not (host if is_http else authority).strip() or authority in (".", ".."):
        kind = "host" if is_http else "repository" if scheme == "hf" else "bucket"
        raise ConfigError(f"{shown(url)} names no {kind}: write {scheme}://{kind.upper()}/…")
    if any(c.isspace() for c in authority):
        raise ConfigError(f"{shown(url)} has a space before its first '/'")
    if is_http:
        try:
            is_valid = _HOST_AND_PORT.fullmatch(authority) and (urlsplit(url).port or 1) > 0
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ConfigError(f"{shown(url)} has no valid host and port")
        if "?" in url or "#" in url:
            raise ConfigError(
                f"{shown(url)} has a query or a fragment, as signed URLs do: a URL is recorded in "
                "the dataset and must not hold a credential; use the store's own URL (s3://, gs://,"
                f" az://, hf://): {_USE_PROFILE}"
            )
    if signed := _SIGNED.search(slash + path):
        if signed[1].lower() == "versionid":
            raise ConfigError(
                f"{shown(url)} asks for a version (versionId): only current objects are read; copy "
                "that version to a key of its own"
            )
        raise ConfigError(
            f"{shown(url)} is signed (it has {redact(signed[1].lower())}=…): {_USE_PROFILE}"
        )


def check_endpoint(url: str) -> None:
    """Raise `ConfigError` for an `endpoint_url` that the S3 client does not accept."""
    if not re.match(r"https?://", url):
        example = "https://minio.example.com" if ":" not in url else "http://localhost:9000"
        raise ConfigError(
            f"{shown(url)!r} is not an endpoint: begin it with http:// or https://, such as "
            f"{example}; leave it out for AWS itself"
        )
    check_url(url)
    if not _HOST.fullmatch(host := urlsplit(url).hostname or ""):
        raise ConfigError(
            f"{shown(url)}: {host!r} is not a host name, which has only letters, digits, '-' and "
            "'.': use another name of the server, or its address"
        )


def expand(url: str, environment: Mapping[str, str] = os.environ) -> str:
    """Replace `$NAME` and `${NAME}` by environment variables, and a leading `~` by the home folder.

    `$$` stands for a dollar sign. A `$` without a name after it is kept.

    Args:
        url, environment: a variable that is not set or names a secret raises `ConfigError`.
    """

    def value_of(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name = match[1] or match[3] or ""
        if match[1] is not None and (not name or not match[2]):
            raise ConfigError(
                f"{shown(url)}: write a variable as ${{NAME}}, and '$' itself as '$$'"
            )
        if _SECRET_NAME.search(name):
            raise ConfigError(f"{shown(url)}: ${name} is the name of a secret: {_USE_PROFILE}")
        if name not in environment:
            raise ConfigError(
                f"{shown(url)}: the environment variable {name} is not set: set it, or write '$$' "
                "for a dollar sign"
            )
        return environment[name]

    expanded = _VARIABLE.sub(value_of, url)
    return os.path.expanduser(expanded) if expanded.startswith("~") else expanded


def shown(url: str) -> str:
    """Return a URL for a message: one line without credentials, of at most 200 characters.

    It removes more than `errors.redact`, because a refused URL may break the syntax of URLs.
    """
    text = redact(url)
    scheme, mark, rest = text.partition("://")
    kind = scheme.lower() if mark else ""
    if "@" in rest and kind not in ("hf", "file"):
        text = f"{scheme}://{REDACTED}"
    elif "@" in text and ":" in text and not mark:
        text = REDACTED
    elif kind in ("http", "https") and (end := re.search("[?#]", text)):
        text = f"{text[: end.end()]}{REDACTED}"
    text = one_line(text)
    return text if len(text) <= 200 else f"{text[:200]}…"
