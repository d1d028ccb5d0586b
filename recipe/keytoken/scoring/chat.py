"""A small client of OpenAI-compatible chat completions: time limits, retries, nothing but the standard
library.

A request is tried again after a time-out, a broken connection and the statuses that may pass (429, 500,
...), with waits that double, or as long as the server asks in ``Retry-After``. The key is taken from an
environment variable; it appears in no message and goes to no other host, as redirects are refused.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keytoken.block import require
from keytoken.errors import ConfigurationError
from keytoken.secret import HIDDEN, is_secret

Messages = Sequence[Mapping[str, str]]

_PATH = "/chat/completions"
_MAX_BYTES = 4_000_000
_MAX_WAIT = 60.0
_MAY_PASS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where a model is and how it is asked.

    Attributes:
        url: Base of the API, with or without ``/chat/completions``.
        model: Its name there.
        key_variable: Environment variable that holds the key; where it has no value no key is sent.
        timeout: Seconds that one request may take in all.
        attempts: Requests for one question, before it stays without a reply.
        wait: Seconds before the second attempt; each further wait is twice as long, 60 at most.
        temperature: 0 for the most repeatable replies.
        max_tokens: Length of a reply.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    attempts: int = 5
    wait: float = 1.0
    temperature: float = 0.0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        require(
            not is_secret("", self.url),
            "judge url holds a password (not shown here), and would be kept and printed; give it by the "
            "environment variable that the judge's key names.",
        )
        require(
            self.url.startswith(("http://", "https://")),
            f"judge url {self.url!r} must begin with http:// or https://, such as http://localhost:8000/v1.",
        )
        require(
            self.key_variable == "" or self.key_variable.isidentifier(),
            "judge key is no name of an environment variable (not shown here: it may be the key itself); "
            "export the key, and give the variable's name, such as OPENAI_API_KEY.",
        )
        require(bool(self.model), "judge model is empty; name the model as the endpoint does.")
        for name in ("timeout", "attempts", "max_tokens"):
            value = getattr(self, name)
            require(value > 0, f"judge {name} is {value}; use a number above 0.")
        require(self.wait >= 0, f"judge wait is {self.wait}; use 0 or more seconds.")

    @property
    def address(self) -> str:
        """The URL that requests go to."""
        base = self.url.rstrip("/")
        return base if base.endswith(_PATH) else base + _PATH

    def body(self, messages: Messages) -> dict[str, Any]:
        """What is sent."""
        return {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }


class NoReplyError(Exception):
    """A question that stays without a reply, with the reason; never leaves the package."""


def complete(endpoint: Endpoint, messages: Messages) -> str:
    """The model's reply.

    Raises:
        ConfigurationError: If the server refuses requests of this kind: no such address or model, no right.
        NoReplyError: If all attempts ended without a reply, or this very question is refused.
    """
    headers = _headers(endpoint)
    reason = ""
    for attempt in range(endpoint.attempts):
        try:
            return _content(_post(endpoint, messages, headers))
        except urllib.error.HTTPError as problem:
            reason = f"status {problem.code}: {_without_key(_said(problem), headers)}"
            if problem.code not in _MAY_PASS:
                _refused(endpoint, problem.code, reason)
            asked = problem.headers.get("Retry-After", "")
            wait = float(asked) if asked.isdecimal() else endpoint.wait * 2**attempt
        except (OSError, http.client.HTTPException, ValueError) as problem:
            reason = f"{type(problem).__name__}: {_without_key(str(problem), headers)}"
            wait = endpoint.wait * 2**attempt
        if attempt + 1 < endpoint.attempts:
            time.sleep(min(wait, _MAX_WAIT))
    raise NoReplyError(f"{endpoint.attempts} attempts, the last one: {reason}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None  # becomes an HTTPError, instead of a second request that carries the key


_OPENER = urllib.request.build_opener(_NoRedirects)


def _headers(endpoint: Endpoint) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    key = os.environ.get(endpoint.key_variable, "").strip() if endpoint.key_variable else ""
    if key:
        if not (key.isascii() and key.isprintable()):
            raise ConfigurationError(f"The key in {endpoint.key_variable} holds characters that no key has.")
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _post(endpoint: Endpoint, messages: Messages, headers: Mapping[str, str]) -> Any:
    data = json.dumps(endpoint.body(messages)).encode()
    request = urllib.request.Request(endpoint.address, data=data, headers=dict(headers), method="POST")
    deadline = time.monotonic() + endpoint.timeout
    read = b""
    with _OPENER.open(request, timeout=endpoint.timeout) as response:
        # The time-out of a socket begins anew with every byte; a server that drips must not outlast it.
        while part := response.read1(65536):
            read += part
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole reply in {endpoint.timeout:g} s")
            if len(read) > _MAX_BYTES:
                raise ValueError(f"a reply of more than {_MAX_BYTES} bytes")
    return json.loads(read)


def _content(reply: Any) -> str:
    """The text of a reply; ValueError if it has none, which a further attempt may change."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise ValueError(f"a reply without choices[0].message.content: {str(reply)[:200]}")
    return content


def _said(problem: urllib.error.HTTPError) -> str:
    try:
        return " ".join(problem.read(2000).decode("utf-8", errors="replace").split())[:200]
    except (OSError, http.client.HTTPException):
        return str(problem.reason)


def _without_key(text: str, headers: Mapping[str, str]) -> str:
    """Some servers repeat in their answer what they were sent."""
    key = headers.get("Authorization", "").removeprefix("Bearer ")
    return text.replace(key, HIDDEN) if key else text


def _refused(endpoint: Endpoint, status: int, reason: str) -> None:
    """Raise for a status that no further attempt changes."""
    if status in (400, 413, 422):  # this question: too long, or filtered
        raise NoReplyError(reason)
    hint = {
        401: f"put a valid key into the environment variable {endpoint.key_variable or 'key_variable names'}",
        403: f"the key in {endpoint.key_variable} lacks the right",
        404: "check judge url and judge model",
    }.get(status, "check judge url")
    raise ConfigurationError(f"{endpoint.address} refuses the judge's request ({reason}); {hint}.")
