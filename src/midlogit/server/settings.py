"""The settings of a server; knows no request."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from midlogit.errors import InvalidRequest
from midlogit.messages import TemplateVariables
from midlogit.params import DEFAULT_PRESET, PRESETS

GRACE_S = 30.0  # seconds that running requests get to finish when the server stops
LEAST = {
    "max_queued": 0,
    "max_num_seqs": 1,
    "max_completions": 1,
    "max_body_bytes": 1,
    "max_connections": 1,
}


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds after which a connection that keeps the server waiting is closed.

    Attributes:
        head_s: for the whole head of a first request. body_s: for the whole body of a request.
        answer_s: while a client reads nothing of its answer. idle_s: from an answer to the next request's head.
    """

    head_s: float = 10.0
    body_s: float = 60.0
    answer_s: float = 60.0
    idle_s: float = 75.0  # longer than most proxies and clients keep an idle connection


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of one server.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        api_keys: keys that clients may use; without any, no key is needed.
        max_num_seqs: rows that the engine runs at once. max_queued: most further rows, which wait; None for no limit.
        max_connections: most that are open, fewer where descriptors are short. patience: with slow clients.
        max_completions: most of one request. max_body_bytes: largest body of a request.
        allow_origins: other sites whose pages may call the server. allowed_hosts: further names by which requests may
            call the server; "*" for any.
        preset: for requests that name none.
        chat_template_kwargs: variables of the chat templates of (base, teacher), for requests that do not set them.
        json_logs: log lines as JSON. grace_s: seconds that running requests get to finish when the server stops.
        train: a trainer may change the base's weights; prompt ids of answers are the base's.
        weights_root: the folder below which a trainer leaves the base's weights; None for weights by NCCL.

    Raises:
        InvalidRequest: a value out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_num_seqs: int = 16
    max_queued: int | None = 256
    max_connections: int = 1000
    patience: Patience = Patience()
    max_completions: int = 16_384
    max_body_bytes: int = 8 * 2**20
    allow_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    preset: str = DEFAULT_PRESET
    chat_template_kwargs: tuple[TemplateVariables, TemplateVariables] = ({}, {})
    json_logs: bool = False
    grace_s: float = GRACE_S
    train: bool = False
    weights_root: Path | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise InvalidRequest(f"Unknown preset {self.preset!r}.", f"Use {', '.join(PRESETS)}.")
        if not all(self.api_keys):
            raise InvalidRequest("An API key is empty.", "Leave it out, or give one.")
        if not 0 <= self.port < 2**16:
            raise InvalidRequest(f"port is {self.port}.", "It must lie in 0 to 65535.")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidRequest(f"{name} is {value}.", f"It must be at least {least}.")
        self._check_training()

    def _check_training(self) -> None:
        if self.train and not self.is_local and not self.api_keys:
            raise InvalidRequest(
                f"Whoever reaches {self.host} could change the base's weights.",
                "Give --train an --api-key, or listen on 127.0.0.1.",
            )
        if self.weights_root is not None and not self.train:
            raise InvalidRequest("--weights-root is of use with --train alone.", "Give both.")
        if self.weights_root is not None and not self.weights_root.is_dir():
            raise InvalidRequest(
                f"--weights-root {self.weights_root} is not a folder.", "Make it first."
            )

    def is_called(self, host: str) -> bool:
        """Whether a request may call the server by this name.

        Without keys, whoever can open a page in a browser on this machine could reach the server: a name of the page's
        own site can be given the server's address. So on a local address only names of this machine are right.

        Args:
            host: of a request's Host header, without the port.
        """
        if "*" in self.allowed_hosts or not (self.allowed_hosts or self._needs_only_reach):
            return True
        name = host.lower().removesuffix(".")
        known = {
            self.host.lower(),
            "localhost",
            *(allowed.lower() for allowed in self.allowed_hosts),
        }
        return name in known or _is_loopback(name)

    @property
    def _needs_only_reach(self) -> bool:
        return self.is_local and not self.api_keys

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
