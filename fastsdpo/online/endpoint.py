"""A client of an OpenAI-compatible server that sends many requests at once and counts failures."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastsdpo.data.interactions import is_blank
from fastsdpo.lazy import needed

logger = logging.getLogger("fastsdpo.online")


def connect(url: str, *, timeout: float = 60.0, max_retries: int = 3, api_key: str | None = None) -> Any:
    """Makes an `openai.OpenAI` client. It retries timeouts, connection errors, 408, 409, 429 and 5xx with backoff.

    Args:
        url: the server's address, such as ``http://host:8000/v1``.
        timeout: seconds per request.
        max_retries: how often a failed request is sent again.
        api_key: the key; None: the environment's ``OPENAI_API_KEY``, or no key if that is not set.

    Raises:
        ImportError: the package openai is missing.
    """
    with needed("openai", "an OpenAI-compatible endpoint", "'fastsdpo[online]'"):
        import openai
    if "://" not in url:
        raise ValueError(f"the endpoint's url must be like http://host:8000/v1, got {url!r}")
    key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
    return openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=max_retries)


class ChatEndpoint:
    """Asks a server for chat completions, several at a time.

    Args:
        url, timeout, max_retries, api_key: as in `connect`.
        model: the model's name on the server.
        concurrency: the most requests at once.
        max_tokens, temperature: length limit in tokens and sampling temperature of the replies.

    Attributes:
        failures: how many requests failed even after their retries, by kind of error.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 3,
        max_tokens: int = 256,
        temperature: float = 0.7,
        api_key: str | None = None,
    ):
        if concurrency < 1:
            raise ValueError(f"ChatEndpoint: concurrency must be at least 1, got {concurrency}")
        if timeout <= 0:
            raise ValueError(f"ChatEndpoint: timeout must be > 0 seconds, got {timeout}")
        self.client = connect(url, timeout=timeout, max_retries=max_retries, api_key=api_key)
        self.url, self.model, self.concurrency = url, model, concurrency
        self.max_tokens, self.temperature = max_tokens, temperature
        self.failures: Counter[str] = Counter()
        self._lock = threading.Lock()

    def reply(self, messages: Sequence[dict]) -> str | None:
        """Returns the reply's text, or None if there is none. Failures are counted; the first logs a warning."""
        try:
            answer = self.client.chat.completions.create(
                model=self.model, messages=list(messages), max_tokens=self.max_tokens, temperature=self.temperature
            )
            text = answer.choices[0].message.content
        except Exception as error:  # whatever a server can send must not end the run
            self._failed(type(error).__name__, str(error))
            return None
        if not isinstance(text, str) or is_blank(text):
            self._failed("EmptyReply", "the reply has no text")
            return None
        return text.strip()

    def replies(self, conversations: Sequence[Sequence[dict]]) -> list[str | None]:
        """Returns the `reply` to each conversation, in order."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self.reply, conversations))

    def _failed(self, kind: str, text: str) -> None:
        with self._lock:
            self.failures[kind] += 1
            first = self.failures[kind] == 1
        if first:
            logger.warning("%s: %s: %s (further ones are counted, not shown)", self.url, kind, text[:300])
