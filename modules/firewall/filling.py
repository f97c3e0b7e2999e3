"""Sets that others fill: what came for them, held to the bounds that the policy itself states. Pure.

The agent hands over addresses that operators signed for. That they lie inside `within`, and are no more than `max`, is asked
here, whoever signed them: a record that is wrong opens no more than the policy's author meant to.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from loopback.contracts.abi import Filled
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import policy_fields as fields
from loopback.modules.firewall.model import FilledSet, FirewallPolicy, Prefix, PrefixTable
from loopback.modules.firewall.policy_fields import Wrong


def filled(policy: FirewallPolicy, fills: Mapping[str, Filled]) -> FirewallPolicy:
    """The policy with its sets filled, each with its own prefixes and what came for it; taken whole or not at all.

    Raises Refused SET_UNFILLED, SET_OUTSIDE, SET_TOO_LARGE, naming the set.
    """
    if not policy.filled:
        return policy
    found = {name: _table(name, bounds, fills.get(name)) for name, bounds in policy.filled.items()}
    before = policy.sets
    same = {name: before[name] for name, table in found.items() if name in before and before[name] == table}
    return msgspec.structs.replace(policy, sets={**before, **found, **same})


def lent(policy: FirewallPolicy, kept: FirewallPolicy | None) -> FirewallPolicy:
    """The policy with its sets as full as those of the same source are in `kept`, for whoever compares the two on a host.

    Bounds are not asked: what a host would refuse to take is said when it takes it.
    """
    if kept is None:
        return policy
    sets = dict(policy.sets)
    for name, one in policy.filled.items():
        for other, its in kept.filled.items():
            if (its.labels, its.pool) == (one.labels, one.pool):
                sets[name] = PrefixTable.of({*one.prefixes, *kept.sets[other]})
    return msgspec.structs.replace(policy, sets=sets)


def _table(name: str, bounds: FilledSet, given: Filled | None) -> PrefixTable:
    if given is None:
        if len(bounds.prefixes):
            return (
                bounds.prefixes
            )  # signed when nothing filled sets: its own prefixes are what its author meant
        raise Refused(
            Code.SET_UNFILLED,
            f"set {name!r}: nothing came for it",
            "start the rollout with a newer 'loopback', which signs what fills its sets",
        )
    if (given.labels, given.pool) != (bounds.labels, bounds.pool):
        raise Refused(
            Code.SET_UNFILLED,
            f"set {name!r}: what came for it is of another source",
            "sign the policy again",
        )
    prefixes = set(bounds.prefixes)
    for text in given.addresses:
        prefix = _prefix(name, text)
        _check_within(name, prefix, bounds)
        prefixes.add(prefix)
    _check_max(name, len(prefixes), bounds)
    return PrefixTable.of(prefixes)


def _check_within(name: str, prefix: Prefix, bounds: FilledSet) -> None:
    if not any(inside(prefix, outer) for outer in bounds.within):
        raise Refused(
            Code.SET_OUTSIDE,
            f"set {name!r}: {fields.show(prefix)} lies outside its 'within'",
            "correct that host's record or the pool, or roll out a policy with wider bounds",
        )


def _check_max(name: str, count: int, bounds: FilledSet) -> None:
    if count > bounds.max:
        raise Refused(
            Code.SET_TOO_LARGE,
            f"set {name!r}: {count} prefixes are more than its 'max' of {bounds.max}",
            "see whether so many hosts are meant to be in it; roll out a policy with a higher max if they are",
        )


def _prefix(name: str, text: str) -> Prefix:
    try:
        return fields.prefix(text)
    except Wrong as error:
        raise Refused(Code.SET_OUTSIDE, f"set {name!r}: {error.message}", error.hint) from None


def inside(prefix: Prefix, outer: Prefix) -> bool:
    """Whether every address of a prefix is one of `outer`'s."""
    bits = 32 if prefix.family == 4 else 128
    return (
        prefix.family == outer.family
        and prefix.length >= outer.length
        and prefix.address >> (bits - outer.length) == outer.address >> (bits - outer.length)
    )
