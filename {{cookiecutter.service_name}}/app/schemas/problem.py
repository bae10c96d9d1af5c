"""The body of every error: RFC 9457 `application/problem+json`."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

MAX_ERRORS = 20


@dataclass(slots=True)
class FieldError:
    """One violation."""

    loc: Annotated[list[str | int], Field(description="Where, with the original column name.")]
    msg: Annotated[str, Field(description="What is wrong, for a person.")]
    type: Annotated[str, Field(description="What is wrong, for a program.")]


@dataclass(slots=True)
class Problem:
    """An error, without the input that caused it."""

    type: Annotated[str, Field(examples=["urn:problem:invalid_input"])]
    title: Annotated[str, Field(examples=["Invalid input"])]
    status: Annotated[int, Field(examples=[422])]
    detail: Annotated[str, Field(examples=["1 violation of the contract"])]
    code: Annotated[str, Field(examples=["invalid_input"])]
    request_id: Annotated[str, Field(examples=["6f1c1b0e8d5a4b1c9a3a0f6d2b7e4c55"])]
    errors: Annotated[list[FieldError] | list[dict[str, Any]], Field(max_length=MAX_ERRORS)]
    error: Annotated[str, Field(description="`title: detail`, for clients that look for a string here.")]
