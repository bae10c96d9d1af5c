"""Every `APP_` variable: name, type, default, and the rules between them.

    init arguments > environment > .env > slo.toml > the defaults here

A capability adds variables with a subclass of `Settings` in its settings.py. `docs/configuration.md` is the
table for people. Nothing else in the service reads the environment.
"""

import os
import re
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from dotenv import dotenv_values
from pydantic import (
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, TomlConfigSettingsSource

from app import capabilities

PREFIX = "APP_"
SLO_FILE = Path(__file__).resolve().parents[1] / "slo.toml"
GRACE_SECONDS = 5  # each outer timeout exceeds the next inner one by this, so that the inner one can act
_NO_KEYS = {sha256(nothing).hexdigest() for nothing in (b"", b"\n", b"\r\n")}

_STORAGES = r"memory://|rediss?://([^@/\s]*@)?([^@:/?#\s]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}([/?]\S*)?"

Version = Annotated[str, Field(pattern=r"^v[0-9]{1,9}$")]
# As browsers write it; with a path, a capital or no scheme it would never match.
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^\s/A-Z]+)$")]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class SettingsError(Exception):
    """A configuration the service must not start with; one line, never a value."""


class Settings(BaseSettings):
    """Typed configuration. Durations are seconds, sizes bytes, unless the name says otherwise."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    addresses: ClassVar[str | None] = None  # a pattern: what APP_ARTIFACTS_DIR may be besides a folder

    env: Literal["local", "staging", "production"] = "local"
    host: str = "0.0.0.0"  # a container's service listens on every interface
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    workers: Annotated[int | None, Field(ge=1, le=128)] = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "console"] = "json"
    artifacts_dir: Path | str = Path("artifacts")  # a text: an address
    model_version: Version | None = None
    fallback_version: Version | None = None
    trusted_keys: Annotated[tuple[str, ...], NoDecode] = ()
    canary_header: HeaderName | None = None
    lookup_on_miss: Literal["fail", "degrade"] = "fail"
    request_deadline_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    header_timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    max_concurrency: Annotated[int, Field(ge=1, le=100_000)] = 64
    max_queue: Annotated[int, Field(ge=0, le=100_000)] = 256
    max_body_bytes: Annotated[int, Field(ge=1)] = 1_048_576
    max_batch_items: Annotated[int, Field(ge=1)] = 256
    batch_max_rows: Annotated[int, Field(ge=1)] = 64
    batch_max_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 0.0
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    auth_disabled: bool = False
    rate_limit: Annotated[str | None, Field(pattern=r"^[1-9][0-9]{0,5}/(second|minute|hour|day)$")] = None
    rate_limit_storage: SecretStr = SecretStr("memory://")
    review_threshold: Annotated[float | None, Field(ge=0, le=1)] = None
    out_of_range: Literal["accept", "review", "reject"] = "review"
    docs_enabled: bool | None = None
    metrics_enabled: bool = True
    cors_origins: Annotated[tuple[Origin, ...], NoDecode] = ()
    cors_headers: Annotated[tuple[HeaderName, ...], NoDecode] = ()
    root_path: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._~-]+)*$")] = ""
    keep_alive_seconds: Annotated[int, Field(ge=1, le=86_400)] = 75  # more than the balancer's usual 60
    drain_seconds: Annotated[int, Field(ge=1, le=3600)] = 25
    trusted_proxies: Annotated[tuple[IPvAnyNetwork, ...], NoDecode] = ()

    @field_validator(
        "api_keys", "cors_headers", "cors_origins", "trusted_keys", "trusted_proxies", mode="before"
    )
    @classmethod
    def _split(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        # No key of signatures may be empty: "," must not mean that nothing has to be signed.
        parts = [part.strip() for part in value.split(",")]
        return [part for part in parts if part or info.field_name == "trusted_keys"]

    @field_validator("trusted_keys")
    @classmethod
    def _public(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if not all(re.fullmatch("[A-Za-z0-9+/]{43}=", key) for key in keys):
            raise ValueError("each key must be an Ed25519 public key: the base64 of its 32 bytes")
        return keys

    @field_validator("artifacts_dir", mode="before")
    @classmethod
    def _known_place(cls, value: Any) -> Any:
        if not re.match(r"\w{2,}:/", str(value)):
            return Path(value)
        if cls.addresses is None:
            raise ValueError("must be a folder; addresses need the capability object-store")
        if not re.fullmatch(cls.addresses, str(value)):
            raise ValueError("must be a folder, or s3://, gs://, az:// or https:// with host and path alone")
        return str(value)

    @field_validator("rate_limit_storage")
    @classmethod
    def _known_storage(cls, value: SecretStr) -> SecretStr:
        if not re.fullmatch(_STORAGES, value.get_secret_value()):
            raise ValueError("must be memory:// or redis://host:port")
        return value

    @field_validator("api_keys")
    @classmethod
    def _hashed(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not all(re.fullmatch(r"[0-9a-fA-F]{64}", key.get_secret_value()) for key in keys):
            raise ValueError("each key must be the sha256 of the key as 64 hex digits")
        if _NO_KEYS & {key.get_secret_value().lower() for key in keys}:
            raise ValueError("one of the keys is the sha256 of nothing: was the variable with the key empty?")
        return keys

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.request_deadline_seconds + GRACE_SECONDS >= self.drain_seconds:
            raise ValueError(
                f"APP_REQUEST_DEADLINE_SECONDS plus {GRACE_SECONDS} must be less than APP_DRAIN_SECONDS, "
                "or draining would cut off requests that are still allowed to run"
            )
        if self.batch_max_wait_ms / 1000 >= self.request_deadline_seconds:
            raise ValueError(
                "APP_BATCH_MAX_WAIT_MS must be less than APP_REQUEST_DEADLINE_SECONDS, "
                "or every request would be too late before it is run"
            )
        if self.env == "production" and not self.api_keys and not self.auth_disabled:
            raise ValueError("APP_API_KEYS is empty: production needs keys, or APP_AUTH_DISABLED=true")
        in_memory = self.rate_limit_storage.get_secret_value() == "memory://"
        if self.rate_limit and in_memory and self.workers != 1:
            raise ValueError("APP_RATE_LIMIT_STORAGE=memory:// counts per worker: use redis or APP_WORKERS=1")
        return self

    @property
    def docs(self) -> bool:
        """Whether /docs and /openapi.json are served: on, but off in production unless asked for."""
        return self.env != "production" if self.docs_enabled is None else self.docs_enabled

    @classmethod
    def settings_customise_sources(cls, *args: Any, **sources: Any) -> tuple[Any, ...]:
        """The service level objectives are a source of their own, below everything a person sets."""
        return (*sources.values(), TomlConfigSettingsSource(cls, SLO_FILE))


@cache
def _complete() -> type[Settings]:
    """The settings of the base and of every installed capability in one class."""
    added = [capabilities.part(name, "settings").Settings for name in capabilities.installed()]
    return create_model("Settings", __base__=(*added, Settings)) if added else Settings


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment; raises `SettingsError` with one line that names the variable."""
    complete = _complete()
    known = {PREFIX + name.upper() for name in complete.model_fields}
    named = {name.upper() for name in (*os.environ, *dotenv_values(".env"))}
    if unknown := sorted(name for name in named - known if name.startswith(PREFIX)):
        where = "docs/configuration.md lists the names"
        for capability, variables in capabilities.VARIABLES.items():
            if unknown[0] in variables:
                where = f"it belongs to the capability {capability}, which this service does not have"
        raise SettingsError(f"unknown setting {unknown[0]}; {where}")
    try:
        return complete(**overrides)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = f"{PREFIX}{str(first['loc'][0]).upper()}: " if first["loc"] else ""
        raise SettingsError(name + first["msg"].removeprefix("Value error, ")) from None


def redacted(settings: Settings) -> dict[str, Any]:
    """The effective configuration as `APP_` names, secrets as asterisks."""
    return {PREFIX + name.upper(): value for name, value in settings.model_dump(mode="json").items()}
