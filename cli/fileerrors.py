"""A file that a person named and that cannot be read, as a refusal with a code and a next step."""

from __future__ import annotations

import errno
from typing import Final

from loopback.contracts.codes import Code, Refused

_NEXT: Final = {
    errno.ENOENT: "see that its name is right, and from which folder you ask",
    errno.ENOTDIR: "see that its name is right, and from which folder you ask",
    errno.EISDIR: "name a file in it",
    errno.EACCES: "ask as root, or let yourself read it",
    errno.EPERM: "ask as root, or let yourself read it",
}


def refusal(error: OSError) -> Refused | None:
    """What to tell of it: CONFIG_INVALID where the named file is the mistake, None where it is not (a full disk, a network)."""
    step = _NEXT.get(error.errno or 0)
    if step is None or error.filename is None:
        return None
    return Refused(Code.CONFIG_INVALID, f"{error.strerror}: {error.filename}", step)
