"""What clients send and get: OpenAI's image generation, its errors, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
MAX_SEED = 2**63 - 1


class Refused(Exception):
    """A request that gets an error.

    Attributes:
        status: of HTTP.
        param: what is wrong; ``code``: for programs; both may be None.
        retry_after: seconds after which it may be worth another try, or None.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's format."""
        kind = ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class ImageRequest(BaseModel):
    """The body of ``POST /v1/images/generations``.

    Parameters of OpenAI's that mean nothing here are taken with the values that ask for nothing. ``seed`` and what
    follows is not OpenAI's.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    prompt: str
    model: str | None = None
    n: int | None = Field(None, ge=1)
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0)
    user: str | None = None
    safety_identifier: str | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    output_format: Literal["png"] | None = None
    output_compression: Literal[100] | None = None
    quality: Literal["auto", "standard"] | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    guidance_scale: float | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    policy: str | None = None
    budget: float | None = Field(None, gt=0, le=1)


def parse(body: bytes) -> ImageRequest:
    """
    Raises:
        Refused: it is no such request; the error names the parameter.
    """
    try:
        return ImageRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    if not first["loc"]:
        raise Refused(400, f"the body must be a JSON object with a prompt: {first['msg']}", code="invalid_json")
    name = str(first["loc"][0])[:60]
    if first["type"] == "extra_forbidden":
        raise Refused(400, f"unknown parameter: {name!r}", name, "unknown_parameter")
    if first["type"] == "missing":
        raise Refused(400, f"missing required parameter: {name!r}", name, "missing_required_parameter")
    raise Refused(400, f"{name}: {first['msg']}, got {str(first['input'])[:60]!r}", name, "invalid_value")


def usage(prompt_tokens: int, image_tokens: int) -> Mapping[str, Any]:
    """Tokens of a request as OpenAI counts them: the prompts' and the pictures'."""
    return {"input_tokens": prompt_tokens, "output_tokens": image_tokens, "total_tokens": prompt_tokens + image_tokens,
            "input_tokens_details": {"text_tokens": prompt_tokens, "image_tokens": 0},
            "output_tokens_details": {"text_tokens": 0, "image_tokens": image_tokens}}
