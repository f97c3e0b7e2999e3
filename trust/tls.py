"""Whom a connection may be with: TLS to the installation's own certificate authority, from the first byte or not at all.

A NATS server usually speaks first, in the clear, and says there whether it wants TLS. A client that believes this can be
talked out of TLS by whoever sits between. So ours begin with the handshake, and a server that does not answer it is none of
ours; our servers are configured to allow that (`handshake_first`).
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from loopback.contracts.codes import Code, Refused


def wanted(url: str, ca: Path | None) -> bool:
    """Whether a connection to this address has to be TLS: it says so, or there is a certificate authority to hold it to."""
    return ca is not None or url.startswith(("tls:", "wss:"))


def context(ca: Path | None, data: str = "") -> ssl.SSLContext:
    """What a client verifies a server with: the authority `ca` (or in `data`) alone, or the system's; names and TLS 1.3 count.

    Raises Refused(CONFIG_INVALID) where the file is no certificate authority's.
    """
    try:
        found = ssl.create_default_context(cafile=str(ca) if ca else None, cadata=data or None)
    except (OSError, ssl.SSLError) as error:
        said = f"the certificate authority {ca} cannot be read: {error.strerror or error}"
        raise Refused(
            Code.CONFIG_INVALID, said, "see ca in the configuration; 'loopback tls init' makes one"
        ) from None
    found.minimum_version = ssl.TLSVersion.TLSv1_3
    return found


def options(url: str, ca: Path | None) -> dict[str, Any]:
    """What a NATS client is given for this address (several with commas); empty where it is to be plain. Raises Refused."""
    return {"tls": context(ca), "tls_handshake_first": True} if wanted(url, ca) else {}
