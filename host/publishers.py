"""Whose releases may run here: the owner's own list of publishers, and those that a workspace pins. Pure.

A publisher is a key that signs releases, by our key id (SHA-256 of the raw public key, in hex). TUF says who is entitled
to sign at all; both lists only ever take away from that.
"""

from __future__ import annotations

from collections.abc import Collection

from loopback.contracts.codes import Code, Refused

_SHOWN = 16  # hex digits of a key id that people compare


def check_publishers(
    signers: Collection[str],
    allowed_local: Collection[str],
    pinned: Collection[str] | None,
    regulated: bool,
    *,
    what: str = "the package",
) -> None:
    """Whether one key that signed a release is a publisher for the owner and for the workspace at once.

    `signers` are the key ids whose signatures TUF counted; `allowed_local` is `[allow] publishers` of host.toml, where
    empty means everybody whom TUF entitles; `pinned` is the workspace's list for this module, None where it has none.
    Raises Refused naming the key ids and what has to change: HOST_NOT_ALLOWED where the owner says no, else HOST_PUBLISHER.
    """
    named = ", ".join(sorted(signers)) or "nobody known here"
    if regulated and pinned is None:
        raise Refused(
            Code.HOST_PUBLISHER,
            f"{what} is for a regulated workspace, which pins no publisher of this module",
            "have an admin pin one in the trust document",
        )
    if pinned is not None and not set(signers) & set(pinned):
        raise Refused(
            Code.HOST_PUBLISHER,
            f"{what} was signed by {named}; this workspace pins {_short(pinned)}",
            "have a pinned publisher sign it, or have the trust document changed",
        )
    if allowed_local and not set(signers) & set(allowed_local):
        raise Refused(
            Code.HOST_NOT_ALLOWED,
            f"{what} was signed by {named}, whom this host's owner does not allow",
            "if that key is right, add it to [allow] publishers in host.toml there",
        )
    if allowed_local and pinned is not None and not set(signers) & set(allowed_local) & set(pinned):
        raise Refused(
            Code.HOST_PUBLISHER,
            f"{what} was signed by {named}: none of these keys is both pinned by the workspace and allowed by the owner",
            "have one key that is on both lists sign it",
        )


def _short(keyids: Collection[str]) -> str:
    return ", ".join(keyid[:_SHOWN] for keyid in sorted(keyids)) or "nobody"
