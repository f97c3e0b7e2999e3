"""Edits of the trust document: operators and their roles, services' keys, rules of workspaces. Signed by the targets keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

import msgspec
from packaging.version import InvalidVersion, Version
from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # re-exported without saying so

from loopback.cli import keychange
from loopback.cli.trustpublish import Present
from loopback.contracts import trustcheck, trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey
from loopback.contracts.trustdoc import (
    EVERY_WORKSPACE,
    Floor,
    Operator,
    Role,
    Trust,
    TrustDocument,
    WorkspaceRules,
)
from loopback.trust import manifest, signing
from loopback.trust.changes import Change

ACTIVATION = "activation"


def change(
    present: Present,
    document: TrustDocument,
    words: str,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Change:
    """A next trust document, in the next targets."""
    data = msgspec.json.encode(msgspec.structs.replace(document, version=present.trust.document.version + 1))
    targets = keychange.next_targets(present, now())
    targets.targets[trustdoc.TARGET] = signing.target(trustdoc.TARGET, data)
    found = keychange.unsigned(present, targets, words=words)
    return msgspec.structs.replace(found, blobs=(data,))


def put_back(present: Present, made: Change) -> Change:
    """The change with the trust document of `present`, which is an earlier one, as the newest."""
    return _with_document(made, present.trust.document, present.trust.document.version + 1)


def repin(present: Present, made: Change) -> Change:
    """The change, and where it replaces a family's keys, rules of workspaces that pin the new ones instead of the old.

    Otherwise regulated workspaces would refuse everything that the family signs from then on.
    """
    name = next((n for n in made.metadata if n.endswith(".targets.json")), None)
    if name is None:
        return made
    before = _family_keys(signing.parse(Targets, present.targets))
    after = _family_keys(signing.parse(Targets, made.metadata[name]))
    document = Trust.decode(made.blobs[0]).document if made.blobs else present.trust.document
    workspaces = dict(document.workspaces)
    for workspace, rules in workspaces.items():
        pins = {
            module: _repinned(keys, before.get(module, set()), after.get(module, set()))
            for module, keys in rules.publishers.items()
        }
        workspaces[workspace] = msgspec.structs.replace(rules, publishers=pins)
    if workspaces == document.workspaces:
        return made
    version = document.version if made.blobs else document.version + 1
    return _with_document(made, msgspec.structs.replace(document, workspaces=workspaces), version)


def amend(
    present: Present,
    made: Change,
    edit: Callable[[TrustDocument], TrustDocument],
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Change:
    """The change with its trust document, or a next one, edited as well. Raises Refused where nobody could live with it."""
    if not any(name.endswith(".targets.json") for name in made.metadata):
        targets = keychange.next_targets(present, now())
        name = signing.filename("targets", targets.version)
        made = msgspec.structs.replace(made, metadata={**made.metadata, name: signing.unsigned(targets)})
    newest = Trust.decode(made.blobs[0]).document if made.blobs else present.trust.document
    document = edit(newest)
    trustcheck.check(Trust(document))
    return _with_document(made, document, newest.version + (not made.blobs))


def _repinned(pinned: tuple[str, ...], before: set[str], after: set[str]) -> tuple[str, ...]:
    """Pins of keys that went, replaced by the keys that came; others stay."""
    if not set(pinned) & (before - after):
        return pinned
    return tuple(dict.fromkeys((*(k for k in pinned if k not in before - after), *sorted(after - before))))


def _family_keys(targets: Targets) -> dict[str, set[str]]:
    roles = (targets.delegations.roles if targets.delegations else None) or {}
    return {
        role.removeprefix("module-"): {key.keyid for key in signing.role_keys(targets, role).keys.values()}
        for role in roles
    }


def _with_document(made: Change, document: TrustDocument, version: int) -> Change:
    data = msgspec.json.encode(msgspec.structs.replace(document, version=version))
    (name,) = (name for name in made.metadata if name.endswith(".targets.json"))
    targets = signing.parse(Targets, made.metadata[name])
    targets.targets[trustdoc.TARGET] = signing.target(trustdoc.TARGET, data)
    return msgspec.structs.replace(
        made, metadata={**made.metadata, name: signing.unsigned(targets)}, blobs=(data,)
    )


def with_operator(
    document: TrustDocument,
    name: str,
    roles: Mapping[str, Iterable[Role]] | None,
    public_key: str | None = None,
    pools: Iterable[str] | None = None,
) -> TrustDocument:
    """An operator with these roles by workspace, or the earlier ones; with this key, or the earlier one; pools likewise.

    Raises Refused(NAME_INVALID) where a new operator lacks one of both, or the key is somebody else's, SIGNATURE_WEAK_KEY.
    """
    known = next((o for o in document.operators if o.name == name), None)
    key = public_key or (known.public_key if known else "")
    if not key:
        raise Refused(Code.NAME_INVALID, f"{name} is new and needs a key", "give --public-key")
    PublicKey.parse(key).sound()
    if roles is None and known is None:
        raise Refused(Code.NAME_INVALID, f"there is no operator {name!r}", "see 'loopback keys show'")
    same = next((o.name for o in document.operators if o.public_key == key and o.name != name), None)
    if same is not None:
        raise Refused(Code.NAME_INVALID, f"that key is {same}'s", "every person has a key of their own")
    granted = (
        {workspace: tuple(dict.fromkeys(given)) for workspace, given in roles.items()}
        if roles is not None
        else known.roles
        if known
        else {}
    )
    others = tuple(o for o in document.operators if o.name != name)
    limited = tuple(dict.fromkeys(pools)) if pools is not None else known.pools if known else ()
    made = Operator(name, key, granted, limited)
    if not limited and any(Role.BALANCER in given and Role.ADMIN not in given for given in granted.values()):
        raise Refused(Code.NAME_INVALID, f"{name} is a balancer of no pool", "name its pools with --pool")
    return msgspec.structs.replace(document, operators=(*others, made))


def without_operator(document: TrustDocument, name: str) -> TrustDocument:
    """The same without this operator. Raises Refused(NAME_INVALID) where there is none."""
    others = tuple(o for o in document.operators if o.name != name)
    if len(others) == len(document.operators):
        raise Refused(Code.NAME_INVALID, f"there is no operator {name!r}", "see 'loopback keys show'")
    return msgspec.structs.replace(document, operators=others)


def with_service_key(document: TrustDocument, service: str, public_key: str) -> TrustDocument:
    """A further key of a service; those that it has go on counting. Raises Refused(SIGNATURE_WEAK_KEY)."""
    PublicKey.parse(public_key).sound()
    keys = document.services.get(service, ())
    return msgspec.structs.replace(
        document, services={**document.services, service: tuple(dict.fromkeys((*keys, public_key)))}
    )


def without_key(document: TrustDocument, key: PublicKey) -> TrustDocument:
    """The same without this key, whether an operator's or a service's."""

    def stays(text: str) -> bool:
        return PublicKey.parse(text).keyid != key.keyid

    return msgspec.structs.replace(
        document,
        operators=tuple(o for o in document.operators if stays(o.public_key)),
        services={name: tuple(k for k in keys if stays(k)) for name, keys in document.services.items()},
    )


def with_rules(
    document: TrustDocument,
    workspace: str,
    *,
    regulated: bool | None = None,
    publishers: Mapping[str, tuple[str, ...]] | None = None,
    floors: Mapping[str, Floor | None] = {},
) -> TrustDocument:
    """A workspace's rules with these changed: a module's publishers replaced (none: no pin), a floor set or taken away."""
    rules = document.workspaces.get(workspace, WorkspaceRules())
    pinned = {**rules.publishers, **(publishers or {})}
    bounds: dict[str, Floor | None] = {**rules.floors, **floors}
    new = WorkspaceRules(
        regulated=rules.regulated if regulated is None else regulated,
        publishers={module: keys for module, keys in pinned.items() if keys},
        floors={module: floor for module, floor in bounds.items() if floor is not None},
    )
    workspaces = {**document.workspaces, workspace: new}
    if new == WorkspaceRules():
        del workspaces[workspace]
    return msgspec.structs.replace(document, workspaces=workspaces)


def parse_publisher(text: str, resolve: Callable[[str], str]) -> tuple[str, str]:
    """`MODULE=KEYID`; an empty key id takes the module's pins away. `resolve` completes the beginning of an id."""
    module, sign, keyid = text.partition("=")
    if not sign:
        raise Refused(
            Code.NAME_INVALID, f"--publisher {text!r} is not MODULE=KEYID", "see 'loopback keys show'"
        )
    manifest.check_module_name(module)
    return module, resolve(keyid) if keyid else ""


def parse_floor(text: str) -> tuple[str, Floor | None]:
    """`MODULE=VERSION`, `MODULE=VERSION@TIME` (ISO 8601 with a zone), or `MODULE=` to take the floor away."""
    module, sign, value = text.partition("=")
    version, at, time = value.partition("@")
    manifest.check_module_name(module)
    if not sign:
        raise Refused(
            Code.NAME_INVALID, f"--floor {text!r} is not MODULE=VERSION[@TIME]", "like firewall=1.2.0"
        )
    if not version and not at:
        return module, None
    try:
        Version(version)
        since = datetime.fromisoformat(time) if at else None
    except (InvalidVersion, ValueError) as error:
        raise Refused(
            Code.NAME_INVALID, f"--floor {text!r}: {error}", "like firewall=1.2.0@2027-01-31T00:00:00Z"
        ) from None
    if since is not None and since.tzinfo is None:
        raise Refused(Code.NAME_INVALID, f"--floor {text!r}: the time has no zone", "end it with Z for UTC")
    return module, Floor(version, since)


def both_roles(document: TrustDocument) -> list[str]:
    """A warning for each person who may both start and approve in a regulated workspace.

    The host refuses an approval by whoever signed the start, so one person alone still does nothing; but two such people can
    stand in for each other, which separation of roles is meant to prevent.
    """
    trust = Trust(document)
    found = []
    for workspace in trustcheck.regulated_workspaces(trust):
        for keyid, operator in trust.operators.items():
            roles = trust.roles(keyid, workspace)
            if Role.ADMIN not in roles and {Role.RELEASER, Role.APPROVER} <= roles:
                found.append(f"{operator.name} may both start rollouts and approve them in {workspace}")
            elif Role.ADMIN in roles and Role.APPROVER in roles:
                found.append(
                    f"{operator.name} is admin and approver in {workspace}, and so may start and approve"
                )
    return found


def everywhere(workspace: str) -> str:
    """A workspace's name for people."""
    return "every workspace" if workspace == EVERY_WORKSPACE else workspace
