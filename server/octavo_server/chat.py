"""`octavo chat`: a conversation in the terminal with a server of OpenAI's API."""

import argparse
import contextlib
import http.client
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from octavo.errors import ConfigError, OctavoError

_TIMEOUT_SECONDS = 600.0
_HELP = "Type a message; /clear begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer."
_SAMPLING = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}


class ChatError(OctavoError):
    """The server cannot be reached, or refuses."""


class ChatCommand:
    """The command `octavo chat`."""

    help = "Talk to a model that a server serves, Octavo's or another one with OpenAI's API."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags."""
        parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
        parser.add_argument("--api-key", default=None, help="its key (environment: OCTAVO_API_KEY)")
        parser.add_argument("--model", "--model-name", help="the model to ask (default: the server's)")
        parser.add_argument("--system", "--system-prompt", help="the system message")
        parser.add_argument("-q", "--quick", metavar="MESSAGE", help="ask this, print the answer and end")
        for name, kind in _SAMPLING.items():
            parser.add_argument("--" + name.replace("_", "-"), type=kind, help="sent with each message, if given")

    def run(self, args: argparse.Namespace) -> int:
        """Talk until the user ends it. Raises ConfigError for a bad --url, ChatError when a --quick message fails."""
        sampling = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
        body = sampling | ({"model": args.model} if args.model else {})
        talk = Conversation(Server(args.url, args.api_key or os.environ.get("OCTAVO_API_KEY")), body, args.system)
        if args.quick is None:
            return _converse(talk)
        _print_all(talk.say(args.quick))
        return 0


class Server:
    """A server's chat route. Raises ConfigError for a URL that is none."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url is {url!r}, but must be like http://127.0.0.1:8000.")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        try:
            self._place = (parts.hostname, parts.port)
        except ValueError as error:
            raise ConfigError(f"--url is {url!r}: {error}.") from error
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def stream(self, body: dict[str, Any]) -> Iterator[str]:
        """The pieces of the answer; closing the iterator ends the request. Raises ChatError."""
        connection = self._kind(*self._place, timeout=_TIMEOUT_SECONDS)
        with contextlib.closing(connection):
            try:
                connection.request("POST", self._path, json.dumps(body | {"stream": True}), self._headers)
                response = connection.getresponse()
                if response.status != 200:
                    raise ChatError(f"The server answered {response.status}: {_reason(response.read())}")
                yield from _pieces(response)
            except (OSError, http.client.HTTPException) as error:
                host, port = self._place
                where = host if port is None else f"{host}:{port}"
                reason = str(error) or type(error).__name__
                raise ChatError(f"The server at {where} cannot be asked: {reason}. Is it running?") from error


def _pieces(response: http.client.HTTPResponse) -> Iterator[str]:
    for line in response:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise ChatError(f"The answer ended early: {_reason(data)}")
        for choice in event.get("choices", []):
            if text := choice["delta"].get("content"):
                yield text


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:500].decode("utf-8", "replace") or "no reason given"


@dataclass
class Conversation:
    """What was said so far. `body` goes with each request."""

    server: Server
    body: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> Iterator[str]:
        """The pieces of the answer. An answer that breaks off is kept as far as it came; a failed one is forgotten."""
        asked = [*self.messages, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        answer = ""
        try:
            for piece in self.server.stream(self.body | {"messages": [*system, *asked]}):
                answer += piece
                yield piece
        finally:
            if answer:
                self.messages = [*asked, {"role": "assistant", "content": answer}]


def _converse(talk: Conversation) -> int:
    print(_HELP, file=sys.stderr)
    while (text := _read()) is not None:
        if text == "/clear":
            talk.messages.clear()
        elif text == "/exit":
            break
        elif text:
            _answer(talk, text)
    return 0


def _answer(talk: Conversation, text: str) -> None:
    try:
        with contextlib.closing(talk.say(text)) as pieces:  # type: ignore[type-var]
            _print_all(pieces)
    except KeyboardInterrupt:
        print("\n[stopped]", file=sys.stderr)
    except ChatError as error:
        print(f"[{error}]", file=sys.stderr)


def _print_all(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _read() -> str | None:
    """The next message; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return None
