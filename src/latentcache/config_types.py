"""Texts of a config that are checked as they are read: URLs, and what is written to a dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from latentcache.errors import ConfigError, redact
from latentcache.urls import check_endpoint, check_url, expand, shown


def _setting(check: Callable[[str], str]) -> AfterValidator:
    """Make a check that raises `ConfigError` one of a setting, whose path the message then has."""

    def validate(value: str) -> str:
        try:
            return check(value)
        except ConfigError as error:
            # The message as a value, because braces in a template are placeholders.
            raise PydanticCustomError("explained", "{why}", {"why": str(error)}) from None

    return AfterValidator(validate)


def _checked_url(url: str) -> str:
    url = expand(url)
    check_url(url)
    return url


def _writable_url(url: str) -> str:
    url = expand(url)
    if check_url(url) in ("http", "https"):
        raise ConfigError(f"{shown(url)}: nothing is written by http(s); name a folder or a bucket")
    return url


def _public_text(text: str) -> str:
    if redact(text) != text:
        raise ConfigError("holds a credential: remove it, because it would be in what is written")
    return text


def _endpoint(url: str) -> str:
    url = expand(url)
    check_endpoint(url)
    return url


# URLs: `$NAME`, `${NAME}` and a leading `~` are expanded here, and nowhere else.
Url = Annotated[str, _setting(_checked_url)]
OutputUrl = Annotated[str, _setting(_writable_url)]
PublicText = Annotated[str, _setting(_public_text)]
EndpointUrl = Annotated[str, _setting(_endpoint)]
