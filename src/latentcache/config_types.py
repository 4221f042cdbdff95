"""The types of config fields: sections, sides in pixels, and texts that are checked when read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from latentcache.errors import ConfigError, redact
from latentcache.storage_options import StorageOptions
from latentcache.urls import check_endpoint, check_url, expand, shown

T = TypeVar("T")

Side = Annotated[int, Field(ge=8, le=16384, multiple_of=8)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section of a config. It is frozen and refuses unknown settings."""

    # Pydantic's own message, which tracebacks show, must not repeat the input: it may be a
    # credential.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _check_integer(cls, value: Any) -> Any:
        if isinstance(value, int) and value.bit_length() > 63:
            raise ValueError("is too large")
        return value


def _setting(check: Callable[[str], str]) -> AfterValidator:
    """Return a validator from a check that raises `ConfigError`; Pydantic adds the path."""

    def validate(value: str) -> str:
        try:
            return check(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    return AfterValidator(validate)


def _check_url(url: str) -> str:
    url = expand(url)
    check_url(url)
    return url


def _check_output_url(url: str) -> str:
    url = expand(url)
    if check_url(url) in ("http", "https"):
        raise ConfigError(f"{shown(url)}: cannot write to http(s); use a folder or a bucket")
    return url


def _check_endpoint(url: str) -> str:
    url = expand(url)
    check_endpoint(url)
    return url


def _check_public(text: str) -> str:
    if redact(text) != text:
        raise ConfigError(
            "holds a credential: remove it, because this text is written to the output"
        )
    return text


def check_distinct(values: list[T]) -> list[T]:
    """Return a list of a config, after checking that no entry is in it twice."""
    if len(set(values)) < len(values):
        raise ValueError("names an entry twice")
    return values


# URLs: `$NAME`, `${NAME}` and a leading `~` are expanded here, and nowhere else.
Url = Annotated[str, _setting(_check_url)]
OutputUrl = Annotated[str, _setting(_check_output_url)]
PublicText = Annotated[str, _setting(_check_public)]


class _Endpoint(Section):
    endpoint_url: Annotated[str, _setting(_check_endpoint)] | None


def _expand_endpoint(options: StorageOptions) -> StorageOptions:
    # `StorageOptions` itself does not need Pydantic, so a section checks its URL.
    return replace(options, endpoint_url=_Endpoint(endpoint_url=options.endpoint_url).endpoint_url)


Storage = Annotated[StorageOptions, AfterValidator(_expand_endpoint)]
