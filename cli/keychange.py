"""Changes of keys: renew, rotate, revoke. Each takes the verified present and returns a change that is still to be signed.

New keys are made on the way and stay opened, so that they can sign. The private halves of keys that lie elsewhere never come
here: their holder names the public half.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from tuf.api.metadata import Root, Targets  # type: ignore[attr-defined]  # re-exported without saying so

from loopback.cli import keyring
from loopback.cli.trustpublish import Present
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey
from loopback.trust import manifest, signing, standing
from loopback.trust.changes import Change

SHORTEST_ID: Final = 8  # hex digits of a key id that are enough to name it, if they name one

Clock = Callable[[], datetime]


def _utc() -> datetime:
    return datetime.now(UTC)


class Found(NamedTuple):
    """Where a key counts: in these roles of root and targets, or as an operator's or a service's of the trust document."""

    key: PublicKey
    roles: tuple[str, ...]
    operator: str = ""
    service: str = ""


def unsigned(
    present: Present, *signed: Root | Targets, families: Mapping[str, Targets] = {}, words: str
) -> Change:
    """A change of these files, without a signature yet."""
    metadata: dict[str, bytes] = {}
    for item in signed:
        metadata[signing.filename(item.type, item.version)] = signing.unsigned(item)
    for role, releases in families.items():
        metadata[signing.filename(role, releases.version)] = signing.sign(releases)
    return Change(metadata=metadata, base=present.base, words=(words,))


def family_role(module: str) -> str:
    """The role of a family, named `firewall` or `module-firewall`."""
    name = module.removeprefix("module-")
    manifest.check_module_name(name)
    return signing.delegated_role(name)


def next_targets(present: Present, now: datetime, role: str = "targets") -> Targets:
    """The next version of targets or of a family's releases, from what is published.

    After a fast-forward that is a version that stored files and honest counting lead to, not the thief's.
    """
    data = present.targets if role == "targets" else present.families.get(role)
    if data is None:
        raise Refused(
            Code.NAME_INVALID,
            f"there is no family {role.removeprefix('module-')!r}",
            "see 'loopback keys show'",
        )
    found = signing.renewed(signing.parse(Targets, data), now)
    found.version = present.versions.get(role, found.version - 1) + 1
    if found.version > standing.PLAUSIBLE:
        found.version = 1 + max(
            (v for v in _stored(present.files, role) if v < standing.PLAUSIBLE), default=0
        )
    return found


def renew(present: Present, roles: Iterable[str], now: Clock = _utc) -> Change:
    """The same metadata with a whole life before it, for root, targets and families."""
    signed: list[Root | Targets] = []
    families: dict[str, Targets] = {}
    for role in dict.fromkeys(roles):
        if role == "root":
            signed.append(signing.renewed(signing.parse(Root, present.root), now()))
        elif role == "targets":
            signed.append(next_targets(present, now()))
        elif role in signing.ONLINE:
            raise Refused(Code.NAME_INVALID, f"delivery renews {role} by itself", "look at its log")
        else:
            name = family_role(role)
            families[name] = next_targets(present, now(), name)
    return unsigned(present, *signed, families=families, words=f"renew {', '.join(roles)}")


def add_family(
    home: Path,
    present: Present,
    module: str,
    *,
    public: PublicKey | None = None,
    now: Clock = _utc,
) -> tuple[Change, list[Path]]:
    """Let a new key sign the releases of `module`. Raises Refused where it has one already."""
    role = family_role(module)
    if role in present.families:
        raise Refused(
            Code.NAME_INVALID, f"the module {module!r} has a key already", f"'loopback keys rotate {module}'"
        )
    targets = next_targets(present, now())
    new, made = _new(home, role, public, None)
    signing.delegate(targets, module, new)
    empty = signing.new_targets(now(), version=1, files={})
    return unsigned(present, targets, families={role: empty}, words=f"a key for {module}"), made


def rotate(
    home: Path,
    present: Present,
    role: str,
    *,
    old: str = "",
    public: PublicKey | None = None,
    folder: Path | None = None,
    now: Clock = _utc,
) -> tuple[Change, list[Path]]:
    """Another key for root, targets, snapshot, timestamp or a family; and the files of keys that were made.

    `old` names the key to replace by the beginning of its id, where the role has several; `public` is the new key where its
    private half lies elsewhere. Raises Refused.
    """
    root = signing.parse(Root, present.root)
    if role in signing.TOP_ROLES:
        known = signing.role_keys(root, role)
        going = _one(known.keys.values(), old, role)
        new, made = _new(home, role, public, folder)
        _replace(root, role, known, going, new)
        signing.renewed(root, now())
        targets = (next_targets(present, now()),) if role == "targets" else ()
        words = f"rotate {role}: {new.keyid[:16]} instead of {going.keyid[:16]}"
        return unsigned(present, root, *targets, words=words), made
    name = family_role(role)
    releases = next_targets(present, now(), name)
    targets_now = next_targets(present, now())
    going = _one(signing.role_keys(signing.parse(Targets, present.targets), name).keys.values(), old, name)
    new, made = _new(home, name, public, folder)
    signing.delegate(targets_now, name.removeprefix("module-"), new)
    words = f"rotate {name}: {new.keyid[:16]} instead of {going.keyid[:16]}"
    return unsigned(present, targets_now, families={name: releases}, words=words), made


def revoke(
    home: Path,
    present: Present,
    found: Found,
    *,
    replace: bool = True,
    reset: bool = False,
    drop: Iterable[str] = (),
    online: Mapping[str, PublicKey] = {},
    folder: Path | None = None,
    now: Clock = _utc,
) -> tuple[Change, list[Path]]:
    """Take a key out of every role of root and targets that it has; and the files of keys that were made instead.

    Online keys go together, since they lie together. `reset` replaces them as well, so that clients forget the versions that
    a thief may have run up. `drop` names releases (`module@version`) that are signed no longer; `online` brings the public
    halves of online keys made elsewhere. Without `replace` a role keeps its other keys. Raises Refused.
    """
    root = signing.parse(Root, present.root)
    targets = next_targets(present, now())
    roles, made, families = set(found.roles), [], {}
    if reset or roles & set(signing.ONLINE):
        roles |= set(signing.ONLINE)
    for role in sorted(roles & set(signing.TOP_ROLES)):
        known = signing.role_keys(root, role)
        going = [found.key] if role in found.roles else list(known.keys.values())
        if role in signing.ONLINE:
            going = list(known.keys.values())
        if not replace and role not in signing.ONLINE:
            _replace(root, role, known, found.key, None)
            continue
        new, files = _new(home, role, online.get(role), folder)
        made += files
        _replace(root, role, known, going[0], new, *going[1:])
    dropped = _dropped(present, drop)
    for role in sorted(role for role in roles if role.startswith("module-")):
        new, files = _new(home, role, None, folder)
        made += files
        signing.delegate(targets, role.removeprefix("module-"), new)
        families[role] = next_targets(present, now(), role)
    for role, paths in dropped.items():
        releases = families.setdefault(role, next_targets(present, now(), role))
        for path in paths:
            del releases.targets[path]
    signed: list[Root | Targets] = []
    if roles & set(signing.TOP_ROLES):
        signed.append(signing.renewed(root, now()))
    if any(role == "targets" or role.startswith("module-") for role in roles):
        signed.append(targets)
    words = f"revoke {found.key.keyid[:16]} ({', '.join(found.roles)})"
    return unsigned(present, *signed, families=families, words=words), made


def locate(present: Present, prefix: str) -> Found:
    """The key whose id begins like this. Raises Refused(NAME_INVALID) where there is none, or more than one."""
    if not re.fullmatch(rf"[0-9a-f]{{{SHORTEST_ID},64}}", prefix):
        raise Refused(
            Code.NAME_INVALID,
            f"{prefix!r} is no key id: at least {SHORTEST_ID} hex digits",
            "see 'loopback keys show'",
        )
    found: dict[str, Found] = {}

    def note(key: PublicKey, role: str = "", operator: str = "", service: str = "") -> None:
        if key.keyid.startswith(prefix):
            known = found.get(key.keyid) or Found(key, ())
            found[key.keyid] = known._replace(
                roles=(*known.roles, role) if role else known.roles,
                operator=known.operator or operator,
                service=known.service or service,
            )

    root, targets = signing.parse(Root, present.root), signing.parse(Targets, present.targets)
    for role in signing.TOP_ROLES:
        for key in signing.role_keys(root, role).keys.values():
            note(key, role)
    for role in (targets.delegations.roles if targets.delegations else None) or {}:
        for key in signing.role_keys(targets, role).keys.values():
            note(key, role)
    for operator in present.trust.document.operators:
        note(PublicKey.parse(operator.public_key), operator=operator.name)
    for service, keys in present.trust.service_keys.items():
        for key in keys.values():
            note(key, service=service)
    if len(found) != 1:
        said = (
            f"{len(found)} keys begin with {prefix}" if found else f"no key that counts begins with {prefix}"
        )
        raise Refused(Code.NAME_INVALID, said, "see 'loopback keys show'")
    return next(iter(found.values()))


def releases_of(present: Present, role: str) -> list[str]:
    """A family's published releases as `module@version`."""
    signed = signing.parse(Targets, present.families[role])
    return [f"{path.split('/')[1]}@{path.split('/')[2]}" for path in sorted(signed.targets)]


def _dropped(present: Present, drop: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in drop:
        module, _, version = entry.partition("@")
        role = family_role(module)
        releases = signing.parse(Targets, present.families[role]).targets if role in present.families else {}
        paths = [path for path in releases if path.startswith(f"modules/{module}/{version}/")]
        if not version or not paths:
            raise Refused(
                Code.PACKAGE_UNKNOWN, f"{entry!r} is no published release", "name it like firewall@1.2.0"
            )
        found.setdefault(role, []).extend(paths)
    return found


def _replace(
    root: Root, role: str, known: signing.RoleKeys, going: PublicKey, new: PublicKey | None, *also: PublicKey
) -> None:
    gone = {key.keyid for key in (going, *also)}
    staying = [key for key in known.keys.values() if key.keyid not in gone]
    chosen = [*staying, *([new] if new is not None else [])]
    if len(chosen) < known.threshold:
        raise Refused(
            Code.TUF_INVALID,
            f"{role} needs {known.threshold} signatures and would have {len(chosen)} keys",
            "let a new key take its place",
        )
    signing.set_keys(root, role, chosen, known.threshold)


def _one(keys: Iterable[PublicKey], prefix: str, role: str) -> PublicKey:
    found = [key for key in keys if key.keyid.startswith(prefix)]
    if len(found) != 1:
        listed = ", ".join(key.keyid[:16] for key in keys)
        raise Refused(
            Code.NAME_INVALID,
            f"{role} has {len(found)} keys whose id begins with {prefix!r}"
            if prefix
            else f"{role} has several keys",
            f"say which one to replace with --key: {listed}",
        )
    return found[0]


def _new(
    home: Path, role: str, public: PublicKey | None, folder: Path | None
) -> tuple[PublicKey, list[Path]]:
    if public is not None:
        return public, []
    if role in signing.ONLINE:
        key, path = keyring.new_key(home / "keys" / "online", role, keyring.unprotected)
    else:
        place = folder or next(iter(keyring.ring().offline), home / "keys" / "offline")
        key, path = keyring.new_key(place, role, keyring.protection(home))
    return key.public, [path]


def _stored(files: Iterable[str], role: str) -> list[int]:
    matches = (re.fullmatch(rf"([1-9][0-9]*)\.{re.escape(role)}\.json", name) for name in files)
    return [int(match[1]) for match in matches if match]
