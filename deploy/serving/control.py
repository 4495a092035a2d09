"""The control sides of the serving engine and the gateway: HTTP over their unix sockets.

A socket's path outlives the process behind it, so a late call could reach an engine that was
restarted meanwhile. ``pinned`` gives the socket a second name that leads to one process only: once
that is gone, calls are refused. ``observe`` says what is really served: the choice on disk, the
engine's weights, the gateway's stamp.
"""

import secrets
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from agent.home import Home
from agent.population.schedule import Logprobs, Messages
from deploy.serving.served import Served, read_served

HOST = "http://engine"
QUICK_S = 5.0
POLL_S = 0.1


class UnixTransport(httpx.HTTPTransport):
    """httpx's transport on a unix socket, plain HTTP.

    It connects once on its own first: httpcore leaves a socket open whose connection was refused.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(uds=str(path), verify=False)
        self._path = path

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; ConnectError where no process listens."""
        try:
            with socket.socket(socket.AF_UNIX) as trial:
                trial.connect(str(self._path))
        except OSError as error:
            raise httpx.ConnectError(str(error), request=request) from error
        return super().handle_request(request)


def listener_of(path: Path) -> int | None:
    """The process that listens on a unix socket, as the kernel says; None where there is none."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return None
        credentials = client.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
        )
    pid, _uid, _gid = struct.unpack("3i", credentials)
    return int(pid)


class ControlError(Exception):
    """An engine or gateway refused, broke, or could not be reached; the message says which."""


class _Socket:
    """JSON requests to one transport; every failure is a ControlError of one line."""

    def __init__(self, transport: httpx.BaseTransport) -> None:
        self._client = httpx.Client(transport=transport, base_url=HOST, timeout=QUICK_S)

    @classmethod
    def at(cls, socket: Path) -> Self:
        """The control side of whichever process listens on this socket."""
        return cls(UnixTransport(socket))

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        timeout_s: float = QUICK_S,
    ) -> dict[str, Any]:
        try:
            reply = self._client.request(method, path, json=body, params=query, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise ControlError(f"{path}: {type(error).__name__} {error}".strip()) from error
        if reply.status_code != 200:
            raise ControlError(f"{path}: HTTP {reply.status_code} {_line(reply.text)}")
        document: dict[str, Any] = reply.json() if reply.content else {}
        return document


class EngineControl(_Socket):
    """What a controller may ask of vLLM's server in development mode."""

    def healthy(self) -> bool:
        """Whether it answers and its core lives."""
        try:
            self._ask("GET", "/health")
        except ControlError:
            return False
        return True

    def paused(self) -> bool:
        """Whether the scheduler is paused."""
        return bool(self._ask("GET", "/is_paused")["is_paused"])

    def pause(self, max_wait_s: float) -> None:
        """Finish running requests, start no others, drop cached prefixes."""
        query = {"mode": "wait", "clear_cache": "true"}
        self._ask("POST", "/pause", query=query, timeout_s=max_wait_s)

    def resume(self) -> None:
        """Resume the scheduler; does nothing to an engine that is not paused."""
        self._ask("POST", "/resume")

    def rpc(self, method: str, *args: Any, timeout_s: float = QUICK_S) -> list[Any]:
        """Call a worker method by name; what each worker returned."""
        body = {"method": method, "args": list(args)}
        results: list[Any] = self._ask("POST", "/collective_rpc", body, timeout_s=timeout_s)[
            "results"
        ]
        return results

    def load(self, directory: str, timeout_s: float) -> str:
        """Put a weights directory into the engine; the digest all workers say they have now."""
        digests = {
            reply["digest"] for reply in self.rpc("anchorage_load", directory, timeout_s=timeout_s)
        }
        if len(digests) != 1:
            raise ControlError(f"workers disagree on the weights: {sorted(digests)}")
        return str(digests.pop())

    def served(self) -> str:
        """What the first worker answers with: ``start``, a digest, or ``half loaded``."""
        return str(self.rpc("anchorage_state")[0]["served"])

    def started_on(self) -> str:
        """The directory the engine loaded when its process started."""
        return str(self._ask("GET", "/v1/models")["data"][0]["root"])

    def label(self, digest: str) -> None:
        """Set vLLM's own version label, which its metrics and token records carry."""
        self._ask("POST", "/update_weight_version", {"new_version": digest})

    def model(self) -> str:
        """The name the engine answers to."""
        return str(self._ask("GET", "/v1/models")["data"][0]["id"])

    def tokens(self, messages: Messages) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready to be answered."""
        continued = messages[-1]["role"] == "assistant"
        body = {
            "messages": list(messages),
            "add_generation_prompt": not continued,
            "continue_final_message": continued,
        }
        ids: list[int] = self._ask("POST", "/tokenize", body)["tokens"]
        return ids

    def top_logprobs(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        k: int,
        positions: int,
        timeout_s: float = 30.0,
    ) -> list[list[Logprobs]]:
        """For each prompt (token ids) and greedy position: the k likeliest ids and their log p."""
        body = {
            "model": model,
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": positions,
            "temperature": 0.0,
            # Not the penalties of the model's generation_config.json, which are the server's
            # defaults: a population's engine answers probes without them.
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": k,
            "ignore_eos": True,
            "return_tokens_as_token_ids": True,
            # Nothing that the engine keeps of other requests: a prompt read in two parts rounds
            # differently, and what was kept may be of other weights.
            "cache_salt": secrets.token_hex(16),
        }
        answer = self._ask("POST", "/v1/completions", body, timeout_s=timeout_s)
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        return [_by_id(choice["logprobs"]["top_logprobs"]) for choice in choices]


@dataclass(frozen=True, slots=True)
class Terms:
    """Of a trial: the share of requests, whether clients see its answers, and the secret that
    chooses them. It ends ``deadline_s`` after it was begun or renewed.
    """

    share: float = 0.1
    shadow: bool = False
    salt: str = ""
    deadline_s: float = 120.0


class GatewayControl(_Socket):
    """The gateway's admin side (agent/gateway/admin.py)."""

    def hold(self, max_wait_s: float, deadline_s: float, *, wait: bool = True) -> str:
        """Admit no request and, with ``wait``, wait until none is inside; the hold's id."""
        body = {"max_wait_s": max_wait_s, "deadline_s": deadline_s, "wait": wait}
        return str(self._ask("POST", "/hold", body, timeout_s=max_wait_s + QUICK_S)["lease"])

    def release(self, version: str, hold: str | None = None, socket: Path | None = None) -> None:
        """Stamp the version that answers from now on, and open."""
        body: dict[str, str] = {"version": version}
        body |= {"lease": hold} if hold else {}
        body |= {"socket": str(socket)} if socket else {}
        self._ask("POST", "/release", body)

    def flip(self, version: str, socket: Path) -> None:
        """Send new requests to another engine at once."""
        self._ask("POST", "/flip", {"version": version, "socket": str(socket)})

    def begin_trial(self, served: Served, home: Home, terms: Terms) -> None:
        """Let a candidate on another engine answer a share of the requests; again: renew it."""
        engine = {"version": served.digest, "socket": str(home.engine_socket(served.slot))}
        self._ask("POST", "/trial", engine | asdict(terms))

    def end_trial(self, version: str) -> None:
        """Send everything to the champion again."""
        self._ask("POST", "/trial/end", {"version": version})

    def drained(self, version: str, wait_s: float) -> bool:
        """Whether no request is inside a version's engine, after waiting for it."""
        query = {"version": version, "wait_s": str(wait_s)}
        state = self._ask("GET", "/drain", query=query, timeout_s=wait_s + QUICK_S)
        return bool(state["drained"])

    def state(self) -> dict[str, Any]:
        """Version, hold, requests inside and waiting."""
        return self._ask("GET", "/state")


@contextmanager
def pinned(socket: Path) -> Iterator[Path]:
    """A second name of a socket for a while: it leads to the process of now, or nowhere."""
    name = socket.with_name(f"{socket.stem}.{secrets.token_hex(2)}")  # as long as ".sock"
    try:
        name.hardlink_to(socket)
    except OSError as error:
        raise ControlError(f"{socket.name}: no engine listens ({error.strerror})") from error
    try:
        yield name
    finally:
        name.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Observed:
    """Three answers; None where a part does not answer, or (the gateway) is held just now."""

    chosen: str
    engine: str | None
    gateway: str | None

    def others(self, digest: str) -> list[str]:
        """What differs from a digest, in words."""
        digests = {"chosen": self.chosen, "engine": self.engine, "gateway": self.gateway}
        return [f"{part} {each[:12]}" for part, each in digests.items() if each and each != digest]


def observe(home: Home) -> Observed:
    """What is served at this moment. UserError in a home that never served."""
    chosen = read_served(home)
    return Observed(chosen.digest, _engine(home), _gateway(home))


def _engine(home: Home) -> str | None:
    """The digest the engine answers with; a word where its weights have none.

    One that was never reloaded has what its process was started on.
    """
    chosen = read_served(home)
    try:
        with EngineControl.at(home.engine_socket(chosen.slot)) as engine:
            served = engine.served()
            if served != "start":
                return served
            directory = engine.started_on()
    except ControlError:
        return None
    return chosen.digest if directory == chosen.directory else directory.rpartition("/")[2]


def _gateway(home: Home) -> str | None:
    try:
        with GatewayControl.at(home.admin_socket) as gateway:
            state = gateway.state()
    except ControlError:
        return None
    return None if state["held"] else str(state["version"])


def _by_id(positions: Sequence[Mapping[str, float]]) -> list[Logprobs]:
    """Keys such as "token_id:71" as numbers."""
    return [
        {int(key.rpartition(":")[2]): logprob for key, logprob in position.items()}
        for position in positions
    ]


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
