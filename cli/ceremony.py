"""The first keys of an installation and the repository that they found; and the new root where the old one's keys are lost.

Root and targets keys stay offline, a key per module family with them; snapshot and timestamp keys are delivery's. All but
those two are encrypted where a person makes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from tuf.api.metadata import Root  # type: ignore[attr-defined]  # re-exported without saying so

from loopback.cli import keyring
from loopback.cli.keyring import Protect
from loopback.contracts import trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import PublicKey, SigningKey
from loopback.contracts.trustdoc import EVERY_WORKSPACE, Operator, Role, TrustDocument
from loopback.trust import signing, standing
from loopback.trust.repository import write_durably

FIRST_FAMILY: Final = "firewall"
MOST_KEYS: Final = 16  # for one role; more people than ever meet for one signature


class Plan(NamedTuple):
    """How many keys root and targets get, and how many of them must sign."""

    root_keys: int = 1
    root_threshold: int = 1
    targets_keys: int = 1
    targets_threshold: int = 1

    def check(self) -> None:
        """Raises Refused(NAME_INVALID) for numbers that make no sense."""
        for role, keys, threshold in (
            ("root", self.root_keys, self.root_threshold),
            ("targets", self.targets_keys, self.targets_threshold),
        ):
            if not 1 <= threshold <= keys <= MOST_KEYS:
                raise Refused(
                    Code.NAME_INVALID,
                    f"--{role}-threshold {threshold} of --{role}-keys {keys}: it must be 1 ≤ threshold ≤ keys ≤ {MOST_KEYS}",
                    "two of three is a good choice: one key may be lost, and one stolen",
                )


ONE_EACH: Final = Plan()


def names(role: str, count: int) -> list[str]:
    """Names of the files of a role's first keys."""
    return [role] if count == 1 else [f"{role}-{number}" for number in range(1, count + 1)]


def init_keys(
    home: Path,
    activation_public_hex: str,
    operator: str = "admin",
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    plan: Plan = ONE_EACH,
    protect: Protect = keyring.unprotected,
    folders: Sequence[Path] = (),
) -> list[Path]:
    """Make every key and the first, signed repository below `home`; `operator` gets every role everywhere.

    The offline keys are dealt out to `folders` in turn (default: `<home>/keys/offline`). The pinned root is written last, so a
    run that was interrupted is simply done again, with the same passphrase; keys that lie there are used. Returns the files of
    the people's keys. Raises Refused where there is a root.
    """
    pinned = home / "tuf" / "root.json"
    if pinned.exists():
        raise Refused(
            Code.NAME_INVALID,
            f"{home} has keys already; they are never overwritten",
            "use them, or name another --home",
        )
    plan.check()
    PublicKey.parse(activation_public_hex).sound()
    files: list[Path] = []
    deal = _dealer(home, folders)

    def offline(role: str, count: int) -> list[SigningKey]:
        places = [next(deal) / f"{name}.pem" for name in names(role, count)]
        files.extend(places)
        return [keyring.keep(place, protect) for place in places]

    root_keys = offline("root", plan.root_keys)
    targets_keys = offline("targets", plan.targets_keys)
    role = signing.delegated_role(FIRST_FAMILY)
    (family,) = offline(role, 1)
    snapshot_key, timestamp_key = (
        keyring.keep(keyring.online_key(home, name), keyring.unprotected) for name in signing.ONLINE
    )
    files.append(keyring.operator_key(home, operator))
    person = keyring.keep(files[-1], protect)
    trust = msgspec.json.encode(
        TrustDocument(
            version=1,
            operators=(Operator(operator, person.public.text, {EVERY_WORKSPACE: tuple(Role)}),),
            services={"activation": (activation_public_hex,)},
        )
    )
    at = now()
    root = signing.new_root(
        at,
        root=root_keys,
        targets=targets_keys,
        snapshot=snapshot_key,
        timestamp=timestamp_key,
        thresholds={"root": plan.root_threshold, "targets": plan.targets_threshold},
    )
    targets = signing.new_targets(
        at, version=1, files={trustdoc.TARGET: signing.target(trustdoc.TARGET, trust)}
    )
    signing.delegate(targets, FIRST_FAMILY, family)
    signed = {
        "targets": signing.sign(targets, *targets_keys),
        role: signing.sign(signing.new_targets(at, version=1, files={}), family),
    }
    snapshot = signing.sign(signing.new_snapshot(at, version=1, files=signed), snapshot_key)
    timestamp = signing.sign(signing.new_timestamp(at, version=1, snapshot=snapshot), timestamp_key)
    seed = home / "tuf" / "seed"
    (seed / "blobs").mkdir(parents=True, exist_ok=True)
    first_root = signing.sign(root, *root_keys)
    for name, data in {"root": first_root, **signed, "snapshot": snapshot, "timestamp": timestamp}.items():
        write_durably(seed / signing.filename(name, 1), data)
    write_durably(seed / "blobs" / hashlib.sha256(trust).hexdigest(), trust)
    write_durably(pinned, first_root)
    return files


def root_to_replace(pinned: bytes, files: Mapping[str, bytes], as_of: int = 0) -> Root:
    """The newest root of these files; with the keys of version `as_of`, where a thief signed the later ones. Raises Refused.

    Its version is the highest that is stored, which delivery lets the new root follow: one that was pinned here by hand and
    never published counts for its keys alone.
    """
    stored = standing.versions(files, "root")
    upto = {signing.filename("root", v) for v in stored if not as_of or v <= as_of}
    found = signing.parse(Root, standing.newest_root(pinned, {n: d for n, d in files.items() if n in upto}))
    if as_of and found.version != as_of:
        raise Refused(Code.NAME_INVALID, f"there is no root version {as_of}", "see 'loopback keys show'")
    found.version = max(stored, default=found.version)
    return found


def replace_root(
    home: Path,
    current: Root,
    *,
    plan: Plan,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    protect: Protect = keyring.unprotected,
    folders: Sequence[Path] = (),
) -> list[Path]:
    """Pin a new root in `home` that nobody's old root vouches for: the way back from root keys lost below their threshold.

    It has new root keys and the other roles of `current`, the root that is published now. The pinned root before it is kept
    beside it. Everybody must pin the new one by hand. Returns the new keys' files.
    """
    plan.check()
    deal = _dealer(home, folders)
    made = [keyring.new_key(next(deal), name, protect) for name in names("root", plan.root_keys)]
    keys = [key for key, _ in made]
    root = signing.renewed(current, now())
    signing.set_keys(root, "root", keys, plan.root_threshold)
    pinned = home / "tuf" / "root.json"
    before = pinned.read_bytes()
    version = signing.parse(Root, before).version
    write_durably(pinned.with_name(f"root.{version}.replaced.json"), before)
    write_durably(pinned, signing.sign(root, *keys))
    return [path for _, path in made]


def _dealer(home: Path, folders: Sequence[Path]) -> Iterator[Path]:
    """The folders in turn, for ever: keys of one role come to lie apart."""
    chosen = list(folders) or [home / "keys" / "offline"]
    number = 0
    while True:
        yield chosen[number % len(chosen)]
        number += 1
