"""The types of config fields: sections, sides in pixels, and texts that are checked when read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from latentcache.errors import ConfigError, redact
from latentcache.storage_options import StorageOptions
from latentcache.urls import check_endpoint, check_url, expand, shown

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


def _expanded(check: Callable[[str], object]) -> AfterValidator:
    """Return a validator that expands the variables of a URL, only here, and checks it."""

    def validate(url: str) -> str:
        try:
            check(url := expand(url))
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return url

    return AfterValidator(validate)


def _check_writable(url: str) -> None:
    if check_url(url) in ("http", "https"):
        raise ConfigError(f"{shown(url)}: cannot write to http(s); use a folder or a bucket")


def _check_public(text: str) -> str:
    if redact(text) != text:
        raise ValueError(
            "holds a credential: remove it, because this text is written to the output"
        )
    return text


def check_distinct(values: list[Any]) -> list[Any]:
    """Return a list of a config, after checking that its entries differ."""
    if len(set(values)) < len(values):
        raise ValueError("names an entry twice")
    return values


class _Endpoint(Section):
    endpoint_url: Annotated[str, _expanded(check_endpoint)] | None


def _expand_endpoint(options: StorageOptions) -> StorageOptions:
    # `StorageOptions` itself does not need Pydantic, so a section checks its URL.
    return replace(options, endpoint_url=_Endpoint(endpoint_url=options.endpoint_url).endpoint_url)


Url = Annotated[str, _expanded(check_url)]
OutputUrl = Annotated[str, _expanded(_check_writable)]
PublicText = Annotated[str, AfterValidator(_check_public)]
Storage = Annotated[StorageOptions, AfterValidator(_expand_endpoint)]
