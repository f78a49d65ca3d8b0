"""Questions to a language model behind an endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import time
from typing import Any

import httpx2
from pydantic import BaseModel, ValidationError

from cwpo.errors import APIError, ConnectionFailedError, CwpoError, UnauthorizedError, first_line
from cwpo.transport import Retries, error_of
from cwpo_trainer.settings.evaluation import LlmJudgeKey

# Rate limits are often by the minute.
_RETRIES = 8
# Of the first question, which tells whether address, key and model are right.
_RETRIES_OF_CHECK = 1
_TIMEOUT_SECONDS = 300.0
_TEMPORARY = frozenset({408, 409, 429, 500, 502, 503, 504})


class EndpointError(APIError):
    """The endpoint answered with an error."""

    @property
    def is_temporary(self) -> bool:
        """Whether the same may succeed later: for too many requests and failures of servers."""
        return self.status in _TEMPORARY


class Reply(BaseModel):
    """What the model replied, and the tokens that it cost; 0 where the endpoint does not say."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChatEndpoint:
    """Asks one model, at a temperature of 0; may be used by several threads.

    Args:
        url: of the endpoint, up to and without /chat/completions.
        model: its name there.
    The API key is that of CWPO_LLM_JUDGE_KEY; without, none is sent.
    """

    def __init__(self, url: str, model: str) -> None:
        self.url = url.rstrip("/")
        self.model = model
        key = LlmJudgeKey().key
        headers = {} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"}
        self._http = httpx2.Client(headers=headers, timeout=_TIMEOUT_SECONDS)

    def check(self) -> None:
        """Ask something short. Raises: CwpoError, soon, where no reply can be had."""
        self.ask("Reply with the letter A.", retries=_RETRIES_OF_CHECK)

    def ask(self, text: str, *, retries: int = _RETRIES) -> Reply:
        """The reply to one message, with retries after failures that may be temporary.

        Raises: CwpoError for a failure that lasts, and for an answer that is no chat completion.
        """
        trying = Retries(retries)
        while True:
            try:
                return self._reply(text)
            except CwpoError as error:
                seconds = trying.delay(error)
            time.sleep(seconds)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _reply(self, text: str) -> Reply:
        messages = [{"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "temperature": 0}
        try:
            response = self._http.post(f"{self.url}/chat/completions", json=body)
        except httpx2.TransportError as error:
            raise ConnectionFailedError(
                f"--llm-judge: no answer from {self.url} ({first_line(error)})"
            ) from error
        if not response.is_success:
            raise self._error(response)
        try:
            return _reply_in(response.json())
        except (ValueError, LookupError, TypeError, ValidationError) as error:
            raise CwpoError(
                f"--llm-judge: what {self.url} answers is no chat completion: name the URL up to, "
                "and without, /chat/completions"
            ) from error

    def _error(self, response: httpx2.Response) -> CwpoError:
        error = error_of(response)
        if isinstance(error, UnauthorizedError):
            return CwpoError(f"--llm-judge: {error}: set the key in CWPO_LLM_JUDGE_KEY")
        problem = error.problem.model_copy(
            update={"detail": f"{error.problem.detail} (--llm-judge {self.url})"}
        )
        return EndpointError(problem, error.request_id, error.retry_after)


def _reply_in(answer: Any) -> Reply:
    usage = answer.get("usage") or {}
    return Reply(
        text=answer["choices"][0]["message"]["content"] or "",
        prompt_tokens=usage.get("prompt_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
    )
