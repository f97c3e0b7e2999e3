"""`loopback keys operator | workspace | family | renew | rotate | revoke`: changes of trust, published or put into a file."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Final

import typer

from loopback.cli import changeview, context, creds, keychange, keyring, trustedit, trustpublish
from loopback.cli.keyring import use
from loopback.cli.trustpublish import Present
from loopback.contracts import subjects, trustcheck
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import KeyFile, PublicKey, SigningKey
from loopback.contracts.trustdoc import EVERY_WORKSPACE, Role, Trust, TrustDocument
from loopback.services._runtime.settings import read_identity
from loopback.trust import signing
from loopback.trust.changes import Change

Offline = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder (medium) with offline keys, beside the home's own; may be given several times. "
        f"Also {keyring.OFFLINE_VARIABLE}, folders with ':' between them."
    ),
]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        help="File whose first line is the passphrase, for use without a terminal. "
        f"Also {keyring.FILE_VARIABLE}."
    ),
]
Out = Annotated[Path | None, typer.Option(help="Write the change to this file instead of publishing it.")]
PublicHex = Annotated[
    str,
    typer.Option("--public-key", metavar="HEX", help="The new key, where its private half lies elsewhere."),
]

_DESTROY: Final = (
    "Next: destroy the key files of which 'loopback keys show' says that they count for nothing."
)

#: Makes a change of the present state; returns it with the files of keys that it made.
Make = Callable[[Path, Present], tuple[Change, list[Path]]]


def apply(make: Make, out: Path | None, as_of: Mapping[str, int] = {}) -> bool:
    """Fetch the present state, make the change, sign it with what is at hand, and publish it; whether that was done."""
    return asyncio.run(_apply(make, out, as_of))


async def _apply(make: Make, out: Path | None, as_of: Mapping[str, int]) -> bool:
    async with context.connect() as session:
        present = await trustpublish.as_of(session, await trustpublish.present(session), as_of)
        change, made = await asyncio.to_thread(make, session.context.home, present)
        for line in await asyncio.to_thread(changeview.describe, change, session.context.home):
            typer.echo(line, err=True)
        for path in made:
            typer.echo(f"made {path}", err=True)
        left = False

        def leaves() -> None:
            nonlocal left
            left = True

        try:
            published = await trustpublish.finish(session, change, out, leaves)
        except Refused:
            for path in made:
                if left:  # the refusal is unsigned: what it speaks of may have been published all the same
                    typer.echo(f"kept {path}: 'loopback keys show' says whether it counts", err=True)
                else:
                    path.unlink()
                    typer.echo(f"took {path} away again: it counts for nothing", err=True)
            raise
        if published:
            await asyncio.to_thread(settle, session.context.home, change)
        return published


def ended(published: bool, words: str) -> None:
    """Say so; or end with 1 where signatures are missing and nothing is published."""
    if not published:
        raise typer.Exit(1)
    typer.echo(f"published: {words}", err=True)


def settle(home: Path, change: Change) -> None:
    """After a publication: use the keys that now count for activation and for this operator."""
    if not change.blobs:
        return
    trust = Trust.decode(change.blobs[0])
    fresh, path = home / "creds" / "activation.creds.new", home / "creds" / "activation.creds"
    if fresh.exists():
        key = SigningKey.from_nkey(read_identity(fresh).seed)
        if key.keyid in trust.service_keys.get(trustedit.ACTIVATION, {}):
            old = SigningKey.from_nkey(read_identity(path).seed).keyid if path.exists() else ""
            fresh.replace(path)
            typer.echo(
                f"{path} has activation's new key {key.keyid[:16]}: restart activation ('loopback up'), then\n"
                f"  'loopback keys revoke {old[:16]}' once nobody needs the old one",
                err=True,
            )
    if (home / "context.toml").exists():
        _use_own_key(trust)


def _use_own_key(trust: Trust) -> None:
    known = context.load()
    file = KeyFile.read(known.operator_key) if known.operator_key.exists() else None
    if file is None or file.public is None or file.public.keyid in trust.operators:
        return
    for candidate in keyring.key_files([known.operator_key.parent]):
        operator = trust.operators.get(candidate.public.keyid) if candidate.public else None
        if operator is not None and known.operator_key.name.startswith(subjects.token(operator.name)):
            context.save(known.home, url=known.url, creds=str(known.creds), operator_key=str(candidate.path))
            typer.echo(f"your commands are signed with {candidate.path} from now on", err=True)


def edit(present: Present, document: TrustDocument, words: str) -> Change:
    """A checked change of the trust document; says what a person should think about. Raises Refused."""
    trust = Trust(document)
    trustcheck.check(trust)
    for warning in trustedit.both_roles(document):
        typer.echo(f"warning: {warning}; give one of the roles to somebody else", err=True)
    return trustedit.change(present, document, words)


def operator_command(
    name: Annotated[str, typer.Argument(help="The operator's name.")],
    role: Annotated[list[Role] | None, typer.Option(help="May be given several times.")] = None,
    workspace: Annotated[
        list[str] | None, typer.Option(help="Where; may be given several times. Everywhere without it.")
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the role balancer: a pool that it is about ('*': any). May be given several times."
        ),
    ] = None,
    public_key: PublicHex = "",
    remove: Annotated[bool, typer.Option("--remove", help="Take the operator out.")] = False,
    out: Out = None,
    offline: Offline = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Give an operator roles (in these workspaces, instead of earlier ones there); or a key of their own; or take them out.

    A new operator brings the public half of a key made with 'loopback keys new FILE'; without one, a key is made here.
    """
    use(passphrase_file, offline or ())
    if remove == bool(role or public_key or pool):
        raise Refused(
            Code.NAME_INVALID, "say what to do with the operator", "--role, --pool, --public-key, or --remove"
        )
    where = workspace or [EVERY_WORKSPACE]

    def make(home: Path, present: Present) -> tuple[Change, list[Path]]:
        document = present.trust.document
        if remove:
            return edit(present, trustedit.without_operator(document, name), f"remove operator {name}"), []
        known = next((o for o in document.operators if o.name == name), None)
        made: list[Path] = []
        text = PublicKey.parse(public_key).text if public_key else ""
        if known is None and not text:
            path = keyring.operator_key(home, name)
            made = [] if path.exists() else [path]
            text = keyring.keep(path, keyring.protection(home)).public.text
        roles = None
        if role:
            earlier = dict(known.roles) if known and workspace else {}
            roles = {**earlier, **dict.fromkeys(where, role)}
        document = trustedit.with_operator(document, name, roles, text or None, pool)
        return edit(present, document, f"operator {name}"), made

    places = ", ".join(map(trustedit.everywhere, where))
    said = (
        f"{name} is no operator any longer"
        if remove
        else f"{name} has {', '.join(role or (['other pools'] if pool else ['a new key']))} in {places}"
    )
    ended(apply(make, out), said)


def workspace_command(
    name: Annotated[str, typer.Argument(help="The workspace; '*' for every one.")],
    regulated: Annotated[
        bool | None,
        typer.Option(
            "--regulated/--no-regulated", help="Whether a rollout needs a second operator's signature."
        ),
    ] = None,
    publisher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE=KEYID",
            help="Only releases signed by this key are installed; several for several. 'MODULE=' takes the pins away.",
        ),
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE=VERSION[@TIME]",
            help="No older version is newly installed; from TIME on, older ones that run are reported. 'MODULE=': none.",
        ),
    ] = None,
    out: Out = None,
    offline: Offline = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Set the signed rules of a workspace, which hosts enforce whatever any service says."""
    use(passphrase_file, offline or ())
    if regulated is None and not publisher and not floor:
        raise Refused(Code.NAME_INVALID, "no rule was named", "give --regulated, --publisher or --floor")
    floors = dict(map(trustedit.parse_floor, floor or ()))

    def make(_home: Path, present: Present) -> tuple[Change, list[Path]]:
        def resolve(prefix: str) -> str:
            return keychange.locate(present, prefix).key.keyid if len(prefix) < 64 else prefix

        pins: dict[str, tuple[str, ...]] = {}
        for module, keyid in (trustedit.parse_publisher(text, resolve) for text in publisher or ()):
            pins[module] = (*pins.get(module, ()), *([keyid] if keyid else []))
        document = trustedit.with_rules(
            present.trust.document, name, regulated=regulated, publishers=pins, floors=floors
        )
        trust = Trust(document)
        rules = trust.rules(name)
        for module, keys in rules.publishers.items():
            if not keys:
                typer.echo(
                    f"warning: no release of {module} is signed by a key that all rules allow", err=True
                )
        if rules.regulated and not rules.publishers:
            typer.echo(
                "warning: no publisher is pinned here, so hosts install nothing: --publisher", err=True
            )
        return edit(present, document, f"rules of {trustedit.everywhere(name)}"), []

    ended(apply(make, out), f"rules of {trustedit.everywhere(name)}")


def family_command(
    module: Annotated[str, typer.Argument(help="The module's name.")],
    public_key: PublicHex = "",
    out: Out = None,
    offline: Offline = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Let a new key sign the releases of another module, so that they can be published."""
    use(passphrase_file, offline or ())

    def make(home: Path, present: Present) -> tuple[Change, list[Path]]:
        public = PublicKey.parse(public_key) if public_key else None
        return keychange.add_family(home, present, module, public=public)

    ended(apply(make, out), f"releases of {module} have a key")


def renew_command(
    role: Annotated[list[str], typer.Argument(help="root, targets, or a module's name.")],
    out: Out = None,
    offline: Offline = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Sign metadata anew before it expires. Snapshot and timestamp renew themselves."""
    use(passphrase_file, offline or ())
    ended(apply(lambda _home, present: (keychange.renew(present, role), []), out), ", ".join(role))


def rotate_command(
    role: Annotated[
        str,
        typer.Argument(help="root, targets, snapshot, timestamp, a module's name, operator, or activation."),
    ],
    name: Annotated[str, typer.Argument(help="The operator's name, after 'operator'.")] = "",
    key: Annotated[
        str, typer.Option(help="Which key to replace (its id, or the beginning), where there are several.")
    ] = "",
    public_key: PublicHex = "",
    out: Out = None,
    offline: Offline = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Replace a key by a new one, as planned. A key that somebody else may have is for 'loopback keys revoke'.

    Delivery takes up new snapshot and timestamp keys from keys/online of its home by itself, without a restart.
    """
    use(passphrase_file, offline or ())
    public = PublicKey.parse(public_key) if public_key else None

    def make(home: Path, present: Present) -> tuple[Change, list[Path]]:
        if role == "operator":
            return _rotate_operator(home, present, name, public)
        if role == trustedit.ACTIVATION:
            return _rotate_activation(home, present, public)
        change, made = keychange.rotate(home, present, role, old=key, public=public)
        return trustedit.repin(present, change), made

    ended(apply(make, out), f"{role} {name}".strip() + " has a new key")
    typer.echo(_DESTROY, err=True)


def _rotate_operator(
    home: Path, present: Present, name: str, public: PublicKey | None
) -> tuple[Change, list[Path]]:
    made: list[Path] = []
    if public is None:
        if not any(o.name == name for o in present.trust.document.operators):
            raise Refused(Code.NAME_INVALID, f"there is no operator {name!r}", "see 'loopback keys show'")
        folder = keyring.operator_key(home, name).parent
        new, path = keyring.new_key(folder, subjects.token(name), keyring.protection(home))
        public, made = new.public, [path]
    document = trustedit.with_operator(present.trust.document, name, None, public.text)
    return edit(present, document, f"rotate operator {name}"), made


def _rotate_activation(home: Path, present: Present, public: PublicKey | None) -> tuple[Change, list[Path]]:
    made: list[Path] = []
    if public is None:
        path = home / "creds" / "activation.creds.new"
        if not path.exists():
            context.write_secret(path, creds.service_creds(home, trustedit.ACTIVATION))
            made = [path]  # one that lies there belongs to an earlier attempt, which may still be published
        public = SigningKey.from_nkey(read_identity(path).seed).public
    document = trustedit.with_service_key(present.trust.document, trustedit.ACTIVATION, public.text)
    return edit(present, document, "rotate activation: both keys count until the old one is revoked"), made


def revoke_command(
    what: Annotated[
        str, typer.Argument(metavar="KEYID|operator", help="A key's id or its beginning; or 'operator'.")
    ],
    name: Annotated[str, typer.Argument(help="The operator's name, after 'operator'.")] = "",
    replacement: Annotated[
        bool,
        typer.Option(
            "--replacement/--no-replacement", help="Whether a new root or targets key takes its place."
        ),
    ] = True,
    reset_versions: Annotated[
        bool,
        typer.Option(
            "--reset-versions",
            help="Replace delivery's keys too, so that hosts forget versions that a thief may have run up.",
        ),
    ] = False,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE@VERSION", help="Sign this release no longer. May be given several times."
        ),
    ] = None,
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="Every published release of the family is known to be good.")
    ] = False,
    as_of: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=VERSION",
            help="Build on this earlier version of targets or of a module's releases: a thief signed the later ones.",
        ),
    ] = None,
    online_key: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=HEX", help="The new snapshot or timestamp key, made where delivery is."),
    ] = None,
    out: Out = None,
    offline: Offline = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Let a lost or stolen key count no longer, wherever it does. docs/keys.md says for each key what else to do."""
    use(passphrase_file, offline or ())
    online = dict(map(_online, online_key or ()))
    earlier = dict(map(_earlier, as_of or ()))

    def make(home: Path, present: Present) -> tuple[Change, list[Path]]:
        document = present.trust.document
        if what == "operator":
            return edit(present, trustedit.without_operator(document, name), f"revoke operator {name}"), []
        found = keychange.locate(present, what)
        without = trustedit.without_key(document, found.key)
        if not found.roles:
            return edit(present, without, f"revoke {what}"), []
        for role in found.roles:
            if role.startswith("module-") and not drop and not keep_all:
                listed = "\n    ".join(keychange.releases_of(present, role)) or "none"
                raise Refused(
                    Code.NAME_INVALID,
                    f"the new key signs what is published of {role}; say which releases are not yours:\n    {listed}",
                    "repeat it with --drop MODULE@VERSION, or with --keep-all",
                )
        change, made = keychange.revoke(
            home, present, found, replace=replacement, reset=reset_versions, drop=drop or (), online=online
        )
        # An earlier trust document comes back under a later version of its own.
        if "targets" in earlier:
            change = trustedit.put_back(present, change)
        change = trustedit.repin(present, change)
        if found.operator or found.service:
            change = trustedit.amend(present, change, lambda newest: trustedit.without_key(newest, found.key))
        return change, made

    ended(apply(make, out, earlier), f"{what} {name}".strip() + " counts no longer")
    typer.echo(_DESTROY, err=True)


def _online(text: str) -> tuple[str, PublicKey]:
    role, _, value = text.partition("=")
    if role not in signing.ONLINE:
        raise Refused(
            Code.NAME_INVALID, f"--online-key {text!r} is not ROLE=HEX", "snapshot=… or timestamp=…"
        )
    return role, PublicKey.parse(value)


def _earlier(text: str) -> tuple[str, int]:
    role, _, version = text.partition("=")
    if not version.isdecimal():
        raise Refused(
            Code.NAME_INVALID, f"--as-of {text!r} is not ROLE=VERSION", "like targets=7 or firewall=12"
        )
    return role if role == "targets" else keychange.family_role(role), int(version)
