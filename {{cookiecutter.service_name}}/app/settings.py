"""Every `APP_` variable: name, type, default, and the rules between them; and the installed capabilities.

    init arguments > environment > .env, read only by `load_settings` > slo.toml > the defaults here

`docs/configuration.md` is the table for people. No other module of the service reads `APP_` variables. A
capability is a folder that the template adds, named in `[tool.service]` of pyproject.toml: `app/<name>/` with
`install(app, service)`, more variables in a subclass of `Settings` in its settings.py, and optionally
`local_folder(settings, version)` for artifacts in remote storage.
"""

import os
import re
import tomllib
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from functools import cache
from hashlib import sha256
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, Self

from dotenv.parser import parse_stream
from dotenv.variables import Variable, parse_variables
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict, TomlConfigSettingsSource

PREFIX = "APP_"
ENV_FILE = Path(".env")
SLO_FILE = Path(__file__).resolve().parents[1] / "slo.toml"
PROJECT_FILE = Path(__file__).resolve().parents[1] / "pyproject.toml"
GRACE_SECONDS = 5  # an outer timeout exceeds the next inner one by this, so that the inner one acts first
# The variables of all capabilities, so that an error can name the missing capability.
VARIABLES = {
    "object-store": ("APP_ARTIFACTS_ALLOW_PRIVATE",),
    "tracing": ("APP_TRACING_ENDPOINT",),
}

_NO_KEYS = {sha256(nothing).hexdigest() for nothing in (b"", b"\n", b"\r\n")}
# Kubernetes sets these in every pod for a Service named app or app-something: `APP_REDIS_PORT=tcp://...` etc.
_INJECTED = re.compile(
    r"APP_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)=.*|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*"
    r"|PORT=(tcp|udp|sctp)://.*)"
)
# Characters that end a line or the text in some programs only.
_NOT_TEXT = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029]")


class SettingsError(Exception):
    """A configuration that prevents the start; the message is one line without values."""


def form(pattern: str, wanted: str) -> AfterValidator:
    """A validator for text of this form; its message says what to write, instead of showing the pattern."""

    def check(value: Any) -> Any:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if not re.fullmatch(pattern, text):
            raise ValueError(f"must be {wanted}")
        return value

    return AfterValidator(check)


def _split(value: Any) -> Any:
    """The parts between commas. `","` has none and is refused: it must not disable authentication."""
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not parts:
        raise ValueError("is set, but lists nothing: leave it out, or list what is meant")
    return parts


_UPPER, _LOWER = BeforeValidator(str.upper), BeforeValidator(str.lower)  # case does not matter
_LIST = BeforeValidator(_split)
Version = Annotated[str, form("v[0-9]{1,9}", "a version such as v1")]
HeaderName = Annotated[str, form("[A-Za-z0-9_-]{1,64}", "the name of a header, such as X-Session-ID")]
# As browsers write it: an origin with a path, a capital letter or no scheme would never match.
Origin = Annotated[
    str, form(r"\*|[a-z][a-z0-9+.-]*://[^\s/A-Z]+", "origins as browsers send them: https://shop.example")
]
PublicKey = Annotated[str, form("[A-Za-z0-9+/]{43}=", "Ed25519 public keys, the base64 of 32 bytes each")]
KeyHash = Annotated[
    SecretStr,
    form(
        f"(?i)(?!{'|'.join(_NO_KEYS)})[0-9a-f]{{64}}",
        "the sha256 of each key as 64 hex digits, and not that of nothing: was the variable empty?",
    ),
]
# Colons only as in IPv6: the port is APP_PORT. The start shows whether the address exists.
Host = Annotated[
    str,
    form(r"[A-Za-z0-9.-]+|(?=.*:.*:)[0-9A-Fa-f:.]+(%\w+)?", "an address or a name, such as 0.0.0.0 or ::"),
]
Storage = Annotated[
    SecretStr,
    form(
        r"memory://|rediss?://([^@/\s]*@)?([^@:/?#\s]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}([/?]\S*)?",
        "memory:// or redis://host:port",
    ),
]
Rate = Annotated[str, form("[1-9][0-9]{0,5}/(second|minute|hour|day)", "such as 600/minute, at most 999999")]


class Settings(BaseSettings):
    """Typed configuration. Durations are seconds, sizes bytes, unless the name says otherwise."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True)

    addresses: ClassVar[str | None] = None  # pattern of addresses that APP_ARTIFACTS_DIR accepts

    env: Annotated[Literal["local", "staging", "production"], _LOWER] = "local"
    host: Host = "0.0.0.0"  # containers listen on every interface
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    workers: Annotated[int | None, Field(ge=1, le=128)] = None
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], _UPPER] = "INFO"
    log_format: Annotated[Literal["json", "console"], _LOWER] = "json"
    artifacts_dir: Path | str = Path("artifacts")  # str: an address
    model_version: Version | None = None
    fallback_version: Version | None = None
    trusted_keys: Annotated[tuple[PublicKey, ...], _LIST] = ()
    canary_header: HeaderName | None = None
    lookup_on_miss: Annotated[Literal["fail", "degrade"], _LOWER] = "fail"
    request_deadline_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    header_timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    max_concurrency: Annotated[int, Field(ge=1, le=100_000)] = 64
    max_queue: Annotated[int | None, Field(ge=0, le=100_000)] = None
    max_body_bytes: Annotated[int, Field(ge=1)] = 1_048_576
    max_batch_items: Annotated[int, Field(ge=1)] = 256
    batch_max_rows: Annotated[int, Field(ge=1)] = 64
    batch_max_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 0.0
    api_keys: Annotated[tuple[KeyHash, ...], _LIST] = ()
    auth_disabled: bool = False
    rate_limit: Rate | None = None
    rate_limit_storage: Storage = SecretStr("memory://")
    review_threshold: Annotated[float | None, Field(ge=0, le=1)] = None
    out_of_range: Annotated[Literal["accept", "review", "reject"], _LOWER] = "review"
    docs_enabled: bool | None = None
    metrics_enabled: bool = True
    cors_origins: Annotated[tuple[Origin, ...], _LIST] = ()
    cors_headers: Annotated[tuple[HeaderName, ...], _LIST] = ()
    root_path: Annotated[str, form(r"(/[A-Za-z0-9._~-]+)*", "a path with / only before it: /iris")] = ""
    keep_alive_seconds: Annotated[int, Field(ge=1, le=86_400)] = 75  # more than the balancer's usual 60
    drain_seconds: Annotated[int, Field(ge=1, le=3600)] = 25
    trusted_proxies: Annotated[tuple[IPvAnyNetwork, ...], _LIST] = ()

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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.request_deadline_seconds + GRACE_SECONDS >= self.drain_seconds:
            raise ValueError(f"APP_DRAIN_SECONDS must exceed APP_REQUEST_DEADLINE_SECONDS + {GRACE_SECONDS}")
        if self.batch_max_wait_ms / 1000 >= self.request_deadline_seconds:
            raise ValueError("APP_BATCH_MAX_WAIT_MS must be less than APP_REQUEST_DEADLINE_SECONDS")
        if self.env == "production" and not self.api_keys and not self.auth_disabled:
            raise ValueError("APP_API_KEYS is empty: production needs keys, or APP_AUTH_DISABLED=true")
        in_memory = self.rate_limit_storage.get_secret_value() == "memory://"
        if self.rate_limit and in_memory and self.workers != 1:
            raise ValueError("APP_RATE_LIMIT_STORAGE=memory:// counts per worker: use redis or APP_WORKERS=1")
        return self

    @property
    def docs(self) -> bool:
        """Whether /docs and /openapi.json are served; in production only if APP_DOCS_ENABLED is true."""
        return self.env != "production" if self.docs_enabled is None else self.docs_enabled

    @property
    def address(self) -> str:
        """The address of the documentation on this machine."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/docs"

    @classmethod
    def settings_customise_sources(cls, *args: Any, **sources: Any) -> tuple[Any, ...]:
        """Sources: arguments, then slo.toml; `load_settings` passes the environment as arguments."""
        return sources["init_settings"], TomlConfigSettingsSource(cls, SLO_FILE)


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment and `.env`; raises `SettingsError` with one line naming the variable."""
    complete = _complete()
    known = {PREFIX + name.upper() for name in complete.model_fields}
    environment = {
        name: text for name, text in os.environ.items() if not _INJECTED.fullmatch(f"{name}={text}")
    }
    given = {
        name.upper(): value
        for source in (read_env_file(known), environment)
        for name, value in source.items()
        if name.upper().startswith(PREFIX) and (value or name.upper() not in known)  # empty: unset
    }
    if unknown := sorted(given.keys() - known):
        where = "docs/configuration.md lists the names"
        for capability, variables in VARIABLES.items():
            if unknown[0] in variables:
                where = f"it belongs to the capability {capability}, which this service does not have"
        raise SettingsError(f"unknown setting {unknown[0][:100]}; {where}")
    values = {name.removeprefix(PREFIX).lower(): value for name, value in given.items()}
    try:
        return complete(**values | overrides)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = f"{PREFIX}{str(first['loc'][0]).upper()}: " if first["loc"] else ""
        raise SettingsError(name + first["msg"].removeprefix("Value error, ")) from None


def read_env_file(known: set[str]) -> dict[str, str]:
    """The variables in `.env`; raises `SettingsError` for an unreadable line: it may hold the API keys."""
    if not os.path.lexists(ENV_FILE):
        return {}
    try:
        text = ENV_FILE.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SettingsError(f"{ENV_FILE} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{ENV_FILE} is not UTF-8 text: save it as UTF-8") from None
    if strange := _NOT_TEXT.search(text):
        line = text.count("\n", 0, strange.start()) + 1
        raise SettingsError(f"{ENV_FILE}, line {line}: has a control character; save it as plain UTF-8 text")
    found: dict[str, str] = {}
    for binding in parse_stream(StringIO(text, newline="")):
        name, value, original = binding.key, binding.value, binding.original
        indent, word = re.findall(r"^(\s*)(?:export\s+)?(\w*)", original.string)[0]
        line = original.line + indent.count("\n")
        # The message shows only a known name of an unreadable line: the rest may be a secret.
        where = f"{ENV_FILE}, line {line}" + (f" ({word})" if word.upper() in known else "")
        if name is None and not binding.error:  # a comment, or the end
            continue
        if name is None or value is None or not re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII):
            raise SettingsError(f"{where}: cannot be read; write NAME=value, and close every quote")
        own = name.upper().startswith(PREFIX)
        if own and not value and "#" in original.string:
            raise SettingsError(f"{where}: a comment stands where the value should; leave the line out")
        if "\n" in value and (own or PREFIX in value):
            raise SettingsError(f"{where}: a quote is not closed on its line")
        bare = PREFIX + name.upper() in known and not name.upper().endswith("_KEYS")  # of another program
        if not own and not bare and (near := get_close_matches(name.upper(), known, 1, 0.8)):
            raise SettingsError(f"{where}: unknown name {name[:100]}; is {near[0]} meant?")
        parts, variables = list(parse_variables(value)), {**os.environ, **found}
        for part in parts:
            if own and isinstance(part, Variable) and part.default is None and not variables.get(part.name):
                raise SettingsError(f"{where}: refers to a variable that is not set")
        value = "".join(part.resolve(variables) for part in parts)
        key = name.upper() if own else name
        if own and found.get(key, value) != value:
            raise SettingsError(f"{where}: {key[:100]} is set twice, to different values")
        found[key] = value
    return found


@cache
def _complete() -> type[Settings]:
    """The settings of the base and of every installed capability in one class."""
    added = [part(name, "settings").Settings for name in installed()]
    return create_model("Settings", __base__=(*added, Settings)) if added else Settings


def redacted(settings: Settings) -> dict[str, Any]:
    """The effective configuration by `APP_` name, secrets as asterisks."""
    return {PREFIX + name.upper(): value for name, value in settings.model_dump(mode="json").items()}


@cache
def project() -> dict[str, Any]:
    """The content of pyproject.toml."""
    return tomllib.loads(PROJECT_FILE.read_text("utf-8"))


@cache
def installed() -> tuple[str, ...]:
    """The capabilities that this service was rendered with; none in the unrendered template."""
    named = project().get("tool", {}).get("service", {}).get("capabilities", "").split()
    return tuple(name for name in named if re.fullmatch("[a-z][a-z0-9-]*", name) and name != "none")


def part(capability: str, name: str = "") -> ModuleType:
    """The package of a capability, or one of its modules."""
    return import_module(f"app.{capability.replace('-', '_')}{name and f'.{name}'}")


def local_folder(settings: Settings, version: str | None) -> AbstractContextManager[Path]:
    """A context with the folder of artifacts: APP_ARTIFACTS_DIR, or a temporary copy of the served version.

    `version` is the version to copy, None for the version in release.json. Raises ArtifactError.
    """
    place = settings.artifacts_dir
    if isinstance(place, Path):
        return nullcontext(place)
    opener = next(one for one in map(part, installed()) if hasattr(one, "local_folder"))
    folder: AbstractContextManager[Path] = opener.local_folder(settings, version)
    return folder


def install(app: Any, service: Any) -> None:
    """Let each installed capability add its part to the application."""
    for name in installed():
        part(name).install(app, service)
