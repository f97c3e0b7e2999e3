"""The form of a desired state, before anything is learnt from it or made into a path: names, digests, generations."""

from __future__ import annotations

import math
import re
from typing import Final

from loopback.contracts import subjects
from loopback.contracts.approvals import MAX_APPROVALS
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import MAX_GENERATION, DesiredState
from loopback.contracts.reports import MAX_INCARNATION
from loopback.trust.package import MAX_PACKAGE

MAX_MODULES: Final = 64  # of one host; each costs signatures to verify and a state on disk
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def check_form(document: DesiredState) -> None:
    """Refuse a document with impossible or contradicting parts. Raises Refused(ENVELOPE_MALFORMED)."""

    def malformed(problem: str) -> Refused:
        return Refused(Code.ENVELOPE_MALFORMED, f"the desired state is malformed: {problem}")

    if not 0 <= document.generation < MAX_GENERATION:
        raise malformed(f"generation {document.generation} is out of bounds")
    if not 0 <= document.journal_links < MAX_GENERATION:
        raise malformed(f"a journal of {document.journal_links} links is out of bounds")
    if document.journal_links and not _DIGEST.fullmatch(document.journal_head):
        raise malformed(f"{document.journal_head[:80]!r} is no head of a journal")
    if len(document.incarnation) > MAX_INCARNATION:
        raise malformed(f"an incarnation has at most {MAX_INCARNATION} characters")
    if len(document.modules) > MAX_MODULES:
        raise malformed(f"it names {len(document.modules)} modules; {MAX_MODULES} are allowed")
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
        if not 0 <= entry.size <= MAX_PACKAGE:
            raise malformed(f"a package of {entry.size} bytes is out of bounds")
        if not math.isfinite(entry.trial_s):
            raise malformed(f"a trial of {entry.trial_s} s is none")
        if len(entry.approvals) > MAX_APPROVALS:
            raise malformed(f"it carries {len(entry.approvals)} approvals; {MAX_APPROVALS} are allowed")
        for running in filter(None, (entry.running, entry.expected)):
            try:
                subjects.token(running.version)
            except Refused as refused:
                raise malformed(f"version: {refused.reason}") from None
            if not 0 <= running.policy_serial < MAX_GENERATION:
                raise malformed(f"policy serial {running.policy_serial} is out of bounds")
            for digest in (running.package,) if running.policy is None else (running.package, running.policy):
                if not _DIGEST.fullmatch(digest):
                    raise malformed(f"{digest[:80]!r} is no SHA-256 in hex")
