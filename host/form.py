"""The form of a desired state, before anything is learnt from it or made into a path: names, digests, generations."""

from __future__ import annotations

import re
from typing import Final

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import DesiredState

#: What every reader of JSON still counts exactly.
MAX_GENERATION: Final = 2**53
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def check_form(document: DesiredState) -> None:
    """Refuse a document with impossible or contradicting parts. Raises Refused(ENVELOPE_MALFORMED)."""

    def malformed(problem: str) -> Refused:
        return Refused(Code.ENVELOPE_MALFORMED, f"the desired state is malformed: {problem}")

    if not 0 <= document.generation < MAX_GENERATION:
        raise malformed(f"generation {document.generation} is out of bounds")
    seen: set[str] = set()
    for entry in document.modules:
        try:
            subjects.token(entry.module)
            subjects.token(entry.rollout)
        except Refused as refused:
            raise malformed(refused.reason) from None
        if entry.module in seen:
            raise malformed(f"it names the module {entry.module!r} twice")
        seen.add(entry.module)
        if not 0 <= entry.generation <= document.generation:
            raise malformed(
                f"generation {entry.generation} of {entry.module} is not one of 0 to {document.generation}"
            )
        for running in filter(None, (entry.running, entry.expected)):
            try:
                subjects.token(running.version)
            except Refused as refused:
                raise malformed(f"version: {refused.reason}") from None
            for digest in (running.package,) if running.policy is None else (running.package, running.policy):
                if not _DIGEST.fullmatch(digest):
                    raise malformed(f"{digest[:80]!r} is no SHA-256 in hex")
