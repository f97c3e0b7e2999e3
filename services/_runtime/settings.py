"""Where one process of a service finds the bus, its credentials and its files."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Final

import msgspec

from loopback.contracts.codes import Code, Refused

_BLOCK: Final = re.compile(r"-----BEGIN (?P<kind>[A-Z ]+)-----\s+(?P<body>\S+)\s+-+END [A-Z ]+-+")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that differs between two installations or two replicas.

    `http_port` 0 takes any free port. `otlp_endpoint` is the base address of an OTLP/HTTP receiver (`http://host:4318`);
    empty means that nothing is exported. `instance` tells replicas of one service on one home apart.
    `root` is the pinned TUF root, by default the one in the home.
    """

    url: str
    creds: Path
    home: Path
    root: Path | None = None
    otlp_endpoint: str = ""
    http_host: str = "127.0.0.1"
    http_port: int = 0
    instance: str = "1"

    @property
    def pinned_root(self) -> Path:
        """The TUF root that is trusted from the start."""
        return self.root or self.home / "tuf" / "root.json"

    def state(self, name: str) -> Path:
        """The folder of this replica of the service `name`; not made by this call."""
        return self.home / "state" / f"{name}-{self.instance}"


class Identity(msgspec.Struct, frozen=True):
    """A NATS user: `name` as its JWT says, `seed` its nkey (also its signing key), `jwt` for the broker."""

    name: str
    jwt: str
    seed: str


def read_identity(path: Path) -> Identity:
    """Read a `.creds` file. Raises Refused(SIGNATURE_INVALID) naming what is wrong with it."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise Refused(
            Code.SIGNATURE_INVALID,
            f"there is no credentials file {path}",
            "run 'loopback up' for services and operators, 'loopback host add' for hosts",
        ) from None
    except UnicodeDecodeError:
        raise Refused(Code.SIGNATURE_INVALID, f"{path} is not a credentials file") from None
    blocks = {match["kind"]: match["body"] for match in _BLOCK.finditer(text)}
    jwt, seed = blocks.get("NATS USER JWT", ""), blocks.get("USER NKEY SEED", "")
    try:
        claims = jwt.split(".")[1]
        name = msgspec.json.decode(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["name"]
    except (IndexError, KeyError, TypeError, binascii.Error, msgspec.MsgspecError):
        raise Refused(Code.SIGNATURE_INVALID, f"{path} holds no user JWT with a name") from None
    if not seed.startswith("SU"):
        raise Refused(Code.SIGNATURE_INVALID, f"{path} holds no user's nkey seed")
    return Identity(str(name), jwt, seed)
