"""The server's language: OpenAI's completions, https://platform.openai.com/docs/api-reference/completions."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, WrapValidator
from starlette.responses import JSONResponse

from nanogpt.engine import Likelihood
from nanogpt.tokenizer import Tokenizer, well_formed

_Text = Annotated[str, Field(min_length=1)]
_Id = Annotated[int, Field(ge=0)]


def _checked(prompt: Any, _: object) -> Any:
    """A prompt of one of its four forms; a long list is looked at once, where pydantic would try them all."""

    def are_ids(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    is_list = isinstance(prompt, list)
    if prompt is None or isinstance(prompt, str) or are_ids(prompt):
        return prompt
    if is_list and (all(isinstance(each, str) for each in prompt) or all(are_ids(each) for each in prompt)):
        return prompt
    raise ValueError("expected a text, a list of texts, a list of token ids, or a list of such lists")


class StreamOptions(BaseModel):
    """What else a stream tells."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = False  # a last event counts the tokens
    include_obfuscation: bool | None = Field(None, description="ignored")


class CompletionRequest(BaseModel):
    """What to continue, and how. A value of null means the default."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str | None = Field(None, description="the name that /v1/models gives, or nothing")
    prompt: Annotated[str | list[_Id] | list[str] | list[list[_Id]] | None, WrapValidator(_checked)] = Field(
        None, description="text or token ids, or a list"
    )
    max_tokens: int | None = Field(16, ge=0)
    n: int | None = Field(1, ge=1, description="continuations of each prompt")
    temperature: float | None = Field(1.0, ge=0, le=2, description="0: always the likeliest token")
    top_k: int | None = Field(0, ge=-1, description="draw from the k likeliest tokens; 0 or -1: from all")
    top_p: float | None = Field(
        1.0, gt=0, le=1, description="draw from the likeliest that have this probability together"
    )
    min_p: float | None = Field(
        0.0, ge=0, le=1, description="leave out what has less than this share of the likeliest's"
    )
    stop: _Text | Annotated[list[_Text], Field(max_length=16)] | None = Field(None, description="text that ends it")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(None, description="the same draws every time")
    logprobs: int | None = Field(None, ge=0, le=20, description="tell log-probabilities, and those of so many others")
    echo: bool | None = Field(False, description="begin with the prompt")
    stream: bool | None = Field(False, description="send it while it grows, as server-sent events")
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="keep the prompt's last so many; -1: as many as fit"
    )
    user: str | None = Field(None, description="ignored")
    # parts of the standard that this server does not have: only what changes nothing is taken
    best_of: int | None = Field(None, ge=1, description="like n, or nothing")
    suffix: Literal[""] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class Logprobs(BaseModel):
    """How likely the tokens of a continuation are; lists of one length."""

    tokens: list[str]  # a token that is no whole character reads "bytes:\\xe2\\x80"
    token_logprobs: list[float | None]  # null for a prompt's first
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # in characters from the beginning of the prompt


class Choice(BaseModel):
    """A continuation, or a piece of one."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The answer; a stream consists of such, each with what is new."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Error(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The answer to a request that can't be met."""

    error: Error


class RefusedError(Exception):
    """An answer other than what was asked for."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, well_formed(message), code

    @property
    def content(self) -> dict[str, object]:
        """The body, in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {429: {"retry-after": "1"}, 401: {"www-authenticate": "Bearer"}}.get(self.status)
        return JSONResponse(self.content, self.status, headers)


def mistakes(error: RequestValidationError) -> Iterator[str]:
    """What is wrong with a body, a sentence for each."""
    for each in error.errors():
        path = [str(part) for part in each["loc"][1:]]
        where = "".join(path[:1])[:100]
        if each["type"] == "extra_forbidden":
            yield f"{'.'.join(path)[:100]}: unknown; /openapi.json lists what there is"
        elif each["type"] in ("missing", "model_attributes_type") and not where:
            yield "expected a JSON object, with the header content-type: application/json"
        else:
            message = each["msg"].removeprefix("Value error, ")
            yield f"{where}: {message}" if where else message


def logprobs(told: Sequence[tuple[int, int, Likelihood | None]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokens by offset, id and likelihood, in OpenAI's form."""

    def name(token: int) -> str:
        content = tokenizer.decode_bytes([token])
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def rounded(log_p: float) -> float:
        return round(max(log_p, -9999.0), 6)  # JSON knows no infinity

    top: list[dict[str, float] | None] = []
    for _, token, likelihood in told:
        if likelihood is None:
            top.append(None)
        else:
            likeliest = {name(other): rounded(log_p) for other, log_p in likelihood[1]}
            top.append(likeliest | {name(token): rounded(likelihood[0])})
    return {
        "tokens": [name(token) for _, token, _ in told],
        "token_logprobs": [None if each is None else rounded(each[0]) for _, _, each in told],
        "top_logprobs": top,
        "text_offset": [offset for offset, _, _ in told],
    }


def pieces_of(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token as far as it is certain: a character whose end is missing is not."""
    return [text for _, text in zip(ids, tokenizer.decode_stream(ids), strict=False)]
