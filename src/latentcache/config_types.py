"""The types of config fields: sections, sides in pixels, and texts that are checked when read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from latentcache.errors import ConfigError, redact
from latentcache.storage_options import StorageOptions
from latentcache.urls import check_endpoint, check_url, expand, shown

Side = Annotated[int, Field(ge=8, le=16384, multiple_of=8)]


class Section(BaseModel):
    """A section of a config. It is frozen and refuses unknown settings."""

    # Pydantic's own message, which tracebacks show, must not repeat the input: it may be a
    # credential.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _integers_are_of_64_bits(cls, value: Any) -> Any:
        if isinstance(value, int) and value.bit_length() > 63:
            raise PydanticCustomError("explained", "is too large")
        return value


def _explained(error: ConfigError) -> PydanticCustomError:
    # The message is a value and not the template, where braces would be placeholders.
    return PydanticCustomError("explained", "{why}", {"why": str(error)})


def _setting(check: Callable[[str], str]) -> AfterValidator:
    """Return a validator from a check that raises `ConfigError`; Pydantic adds the path."""

    def validate(value: str) -> str:
        try:
            return check(value)
        except ConfigError as error:
            raise _explained(error) from None

    return AfterValidator(validate)


def _checked_url(url: str) -> str:
    url = expand(url)
    check_url(url)
    return url


def _writable_url(url: str) -> str:
    url = expand(url)
    if check_url(url) in ("http", "https"):
        raise ConfigError(f"{shown(url)}: cannot write to http(s); use a folder or a bucket")
    return url


def _public_text(text: str) -> str:
    if redact(text) != text:
        raise ConfigError(
            "holds a credential: remove it, because this text is written to the output"
        )
    return text


def _storage(value: Any, handler: ValidatorFunctionWrapHandler) -> StorageOptions:
    options: StorageOptions = handler(value)
    if options.endpoint_url is None:
        return options
    try:
        url = expand(options.endpoint_url)
        check_endpoint(url)
    except ConfigError as error:
        mistake = InitErrorDetails(
            type=_explained(error), loc=("endpoint_url",), input=options.endpoint_url
        )
        raise ValidationError.from_exception_data("storage", [mistake]) from None
    return replace(options, endpoint_url=url)


# URLs: `$NAME`, `${NAME}` and a leading `~` are expanded here, and nowhere else.
Url = Annotated[str, _setting(_checked_url)]
OutputUrl = Annotated[str, _setting(_writable_url)]
PublicText = Annotated[str, _setting(_public_text)]
Storage = Annotated[StorageOptions, WrapValidator(_storage)]
