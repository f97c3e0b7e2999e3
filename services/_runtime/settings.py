"""Where one process of a service finds the bus, its credentials and its files."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Annotated, Final

import msgspec

from loopback.contracts.codes import Code, Refused

_BLOCK: Final = re.compile(r"-----BEGIN (?P<kind>[A-Z ]+)-----\s+(?P<body>\S+)\s+-+END [A-Z ]+-+")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that differs between two installations or two replicas.

    `http_port` 0 takes any free port. `otlp_endpoint` is the base address of an OTLP/HTTP receiver (`http://host:4318`);
    empty means that nothing is exported. `instance` tells replicas of one service on one home apart.
    `root` is the pinned TUF root, `ca` the certificate authority of the broker: by default those in the home.
    """

    url: str
    creds: Path
    home: Path
    root: Path | None = None
    ca: Path | None = None
    otlp_endpoint: str = ""
    http_host: str = "127.0.0.1"
    http_port: int = 0
    instance: str = "1"

    @property
    def issuer(self) -> Path:
        """The keys that eligibility issues hosts' identities with: beside its credentials, as units and containers are given
        them, or in its home. Where services run apart, nobody else has them.
        """
        beside = self.creds.with_suffix(".issuer")
        return beside if beside.exists() else self.home / "creds" / "eligibility.issuer"

    @property
    def pinned_root(self) -> Path:
        """The TUF root that is trusted from the start."""
        return self.root or self.home / "tuf" / "root.json"

    @property
    def authority(self) -> Path | None:
        """Who signed the broker's certificate; None where the installation has none."""
        return self.ca or authority(self.home)

    def state(self, name: str) -> Path:
        """The folder of this replica of the service `name`; not made by this call."""
        return self.home / "state" / f"{name}-{self.instance}"


class Issuer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What hosts' identities are issued with: `account` is the account's nkey, `host` and `enrol` the seeds of the two
    roles' signing keys, `host_days` how many days a host's credentials count.

    It lies in the home of the service that issues, in a file that no other service may read.
    """

    account: str
    host: str
    enrol: str
    host_days: Annotated[float, msgspec.Meta(gt=0, le=3650)] = 30.0

    @classmethod
    def load(cls, path: Path) -> Issuer:
        """Read the file. Raises Refused(SIGNATURE_INVALID) naming what is wrong with it."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError:
            reason = "there is no such file"
        except OSError as error:
            reason = f"it cannot be read: {error.strerror}"
        except msgspec.MsgspecError as error:
            reason = str(error)
        raise Refused(
            Code.SIGNATURE_INVALID,
            f"{path}: {reason}",
            "copy it from creds/ of the installation that 'loopback up' made",
        )


def authority(home: Path) -> Path | None:
    """An installation's own certificate authority, where it has one; then its broker speaks TLS alone."""
    path = home / "tls" / "ca.pem"
    return path if path.exists() else None


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
    except (IndexError, KeyError, TypeError, ValueError, msgspec.MsgspecError, RecursionError):
        # ValueError: no base64, or text in it that is not ASCII or not UTF-8
        raise Refused(Code.SIGNATURE_INVALID, f"{path} holds no user JWT with a name") from None
    if not seed.startswith("SU"):
        raise Refused(Code.SIGNATURE_INVALID, f"{path} holds no user's nkey seed")
    return Identity(str(name), jwt, seed)
