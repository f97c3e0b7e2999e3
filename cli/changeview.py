"""What a change of trust does, in words for whoever is about to sign it.

It is read from what will be signed. A change also brings the root and the targets on which it builds, so that differences can
be marked; whoever carries it may have made these up. So they are compared with what this machine knows, and everything that
a signature would say is shown whether or not it seems to be new.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Root, Targets  # type: ignore[attr-defined]  # re-exported without saying so

from loopback.cli import trustpublish
from loopback.cli.printing import printable
from loopback.contracts import trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey
from loopback.contracts.trustdoc import Trust
from loopback.trust import changes, signing, standing
from loopback.trust.changes import Change

_NEXT = "do not sign it; have it made again from what is published, and ask who gave you this one"


def describe(change: Change, home: Path) -> list[str]:
    """Everything that signatures on this change would say, a line each. Raises Refused(TUF_INVALID) where it hides some."""
    try:
        return [printable(line) for line in _lines(change, home)]
    except (RepositoryError, ValueError) as error:
        raise Refused(Code.TUF_INVALID, f"the change does not read: {printable(str(error))}") from None


def _lines(change: Change, home: Path) -> Iterator[str]:
    yield from _compared(change, home)
    by_role = {changes.role_of(name): data for name, data in change.metadata.items()}
    if len(by_role) != len(change.metadata):
        raise _hides("it brings two versions of one file")
    if "root" in by_role:
        new = signing.parse(Root, by_role["root"])
        old = signing.parse(Root, change.base["root"]) if "root" in change.base else None
        yield f"root      version {new.version}, until {new.expires:%Y-%m-%d}"
        for role in signing.TOP_ROLES:
            yield from _keys(
                role, signing.role_keys(new, role), signing.role_keys(old, role) if old else None
            )
    if "targets" in by_role:
        yield from _targets(by_role["targets"], change)
    for role, data in sorted(by_role.items()):
        if role.startswith("module-"):
            signed = signing.parse(Targets, data)
            yield f"{role}  version {signed.version}, {len(signed.targets)} releases, until {signed.expires:%Y-%m-%d}"
            yield from _content(signed)
            yield from _delegations(signed, None)


def _compared(change: Change, home: Path) -> Iterator[str]:
    """Refuse to compare with a root or targets that this machine knows to be none; say where it cannot know."""
    known = _known_roots(home)
    if "root" not in change.base:
        if known and "root" in {changes.role_of(name) for name in change.metadata}:
            raise _hides("it brings a root and does not say which one it follows")
        yield "it does not say what it builds on: everything counts as new"
        return
    base = signing.parse(Root, change.base["root"])
    if base.version in known and known[base.version] != change.base["root"]:
        raise _hides(f"the root version {base.version} that it builds on is not the one that is known here")
    if known and base.version < min(known):
        raise _hides(f"it builds on root version {base.version}, which is older than the one pinned here")
    if base.version not in known and not any(
        standing.verifies(signing.parse(Root, data), "root", change.base["root"], base.version)
        for data in known.values()
    ):
        yield (
            f"no root that is known here vouches for version {base.version}, which it builds on"
            if known
            else "this machine knows no root (tuf/root.json): what is marked as new or gone is only the file's own word"
        )
        yield "  compare every key below with 'loopback keys show' where the installation runs"
    if "targets" in change.base:
        targets = change.base["targets"]
        version = signing.parse(Targets, targets).version
        if not standing.verifies(base, "targets", targets, version):
            raise _hides(
                f"the targets version {version} that it builds on were not signed by the targets keys"
            )


def _known_roots(home: Path) -> dict[int, bytes]:
    """By version: the one that is pinned here, and those that this home's client verified after it."""
    pinned = home / "tuf" / "root.json"
    if not pinned.is_file():
        return {}
    data = pinned.read_bytes()
    found = {signing.parse(Root, data).version: data}
    files = trustpublish.remembered(home)
    for version in standing.versions(files, "root"):
        if version > min(found):
            found.setdefault(version, files[signing.filename("root", version)])
    return found


def _targets(data: bytes, change: Change) -> Iterator[str]:
    new = signing.parse(Targets, data)
    old = signing.parse(Targets, change.base["targets"]) if "targets" in change.base else None
    yield f"targets   version {new.version}, until {new.expires:%Y-%m-%d}"
    yield from _delegations(new, old)
    yield from _content(new)
    target = new.targets.get(trustdoc.TARGET)
    if target is None:
        return
    digest = target.hashes.get("sha256", "")
    before = old.targets.get(trustdoc.TARGET) if old is not None else None
    content = changes.content(change).get(digest)
    if content is not None:
        yield from _document(content)
    elif before is not None and before.hashes == target.hashes:
        yield f"trust     the document stays as it is, SHA-256 {digest}"
    else:
        raise _hides(f"it names another {trustdoc.TARGET} and does not bring it")


def _document(content: bytes) -> Iterator[str]:
    document = Trust.decode(content).document
    yield f"trust     document version {document.version}"
    for operator in document.operators:
        roles = "; ".join(f"{w}: {', '.join(r)}" for w, r in operator.roles.items())
        pools = f"; pools {', '.join(operator.pools)}" if operator.pools else ""
        yield f"  {operator.name} ({PublicKey.parse(operator.public_key).keyid[:16]}): {roles}{pools}"
    for name, keys in document.services.items():
        for text in keys:
            yield f"  {name} signs with {PublicKey.parse(text).keyid}"
    for workspace, rules in document.workspaces.items():
        yield f"  workspace {workspace}: {msgspec.json.encode(rules).decode()}"


def _content(signed: Targets) -> Iterator[str]:
    """Releases, and whatever else a file would vouch for."""
    for path, target in sorted(signed.targets.items()):
        if path != trustdoc.TARGET or signed.delegations is None:
            hashes = ", ".join(f"{kind} {value}" for kind, value in sorted(target.hashes.items()))
            yield f"  {path}  {target.length} bytes, {hashes}"


def _delegations(new: Targets, old: Targets | None) -> Iterator[str]:
    roles = (new.delegations.roles if new.delegations else None) or {}
    before = (old.delegations.roles if old is not None and old.delegations else None) or {}
    if new.delegations is not None and new.delegations.succinct_roles is not None:
        raise _hides("it delegates to hash bins, which no command of ours does")
    for role, found in roles.items():
        known = signing.role_keys(old, role) if old is not None and role in before else None
        yield from _keys(role, signing.role_keys(new, role), known)
        if (said := _reach(role, found)) != "":
            yield f"    ! {said}"
    for role in before.keys() - roles.keys():
        yield f"  - {role}"


def _reach(role: str, found: DelegatedRole) -> str:
    """What a family's keys may sign, where it is anything but its own module's releases."""
    module = role.removeprefix("module-")
    if found.paths == [f"modules/{module}/*/*"] and found.terminating and found.path_hash_prefixes is None:
        return ""
    reach = ", ".join(found.paths or [f"hashes {p}" for p in found.path_hash_prefixes or []])
    return f"may sign {reach or 'nothing'}{'' if found.terminating else ', and others after it'}"


def _keys(role: str, new: signing.RoleKeys, old: signing.RoleKeys | None) -> Iterator[str]:
    before = {key.keyid for key in old.keys.values()} if old else set()
    after = {key.keyid for key in new.keys.values()}
    was = f", before {old.threshold}" if old is not None and old.threshold != new.threshold else ""
    yield f"  {role}: {new.threshold} of {len(after)} keys{was}"
    yield from (f"    {' ' if keyid in before else '+'} {keyid}" for keyid in sorted(after))
    yield from (f"    - {keyid}" for keyid in sorted(before - after))


def _hides(said: str) -> Refused:
    return Refused(Code.TUF_INVALID, said, _NEXT)
