"""Making JWTs for hosts' own keys, and for the keys of invitations' tokens. Pure.

These are the only identities that this service can make: each of the two keys signs for one role, whose permissions are in the
account's JWT and hold no more than one host's subjects, or one claim's (ADR 0014).
"""

from __future__ import annotations

import binascii
from datetime import datetime, timedelta

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey, SigningKey
from loopback.contracts.messages import HostInvite
from loopback.services._runtime.settings import Issuer
from loopback.trust import natsjwt


class Issuing:
    """The keys, ready for use. Raises Refused(SIGNATURE_INVALID) where they are none."""

    def __init__(self, issuer: Issuer) -> None:
        self._account = issuer.account
        self.valid = timedelta(days=issuer.host_days)
        try:
            self._host = SigningKey.from_nkey(issuer.host)
            self._enrol = SigningKey.from_nkey(issuer.enrol)
        except (ValueError, binascii.Error):
            raise Refused(
                Code.SIGNATURE_INVALID, "the issuer file holds no nkey seeds", "copy it from creds/ again"
            ) from None

    def host(self, workspace: str, host: str, key: PublicKey, now: datetime) -> str:
        """A JWT for a host's key: by its name and its tag `ws:` the server fills in what it may do."""
        tags = (f"ws:{subjects.token(workspace)}",)
        return natsjwt.user(self._host, self._account, key, subjects.token(host), tags, now, now + self.valid)

    def guest(self, invite: HostInvite, now: datetime) -> str:
        """A JWT for the key of an invitation's token, as long as the invitation is open."""
        key = PublicKey.parse(invite.claim_key)
        return natsjwt.user(self._enrol, self._account, key, key.keyid, (), now, invite.claim_before)
