"""A posture document as Markdown: plain tables, in the order in which somebody reads who has to sign it off. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

from loopback.cli import printing
from loopback.cli.posturedoc import Blast, Host, Module, Posture, Release, Rollout, Use


def render(posture: Posture) -> str:
    """The whole document."""
    parts = (
        _head(posture),
        _summary(posture),
        _rules(posture),
        *(_module(module, posture) for module in posture.modules),
        _hosts(posture),
        _rollouts(posture),
        _people(posture),
        _keys(posture),
        _journal(posture),
        _questions(posture),
    )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _head(posture: Posture) -> Iterator[str]:
    yield f"# Security posture of workspace {_text(posture.workspace)}"
    yield ""
    yield f"As of {_time(posture.at)}, written by {posture.written_by} from the live state. Signatures were verified for this"
    yield "document from the pinned root on. Each section names its sources; what could not be answered is at the end."


def _summary(posture: Posture) -> Iterator[str]:
    hosts, journal = posture.hosts, posture.journal
    bad = [h for h in hosts if h.problems]
    yield "## Summary"
    yield ""
    rows = [
        (
            "Environment",
            f"{posture.environment.name}{', regulated' if posture.rules.regulated else ', not regulated'}",
        ),
        ("Hosts", f"{len(hosts)}: {_counts(h.state for h in hosts)}"),
    ]
    for module in posture.modules:
        on = {name for use in module.uses for name in use.hosts}
        enforcing = {name for use in module.uses for name in use.enforcing}
        versions = _text(", ".join(dict.fromkeys(u.version for u in module.uses))) or "on no host"
        rows.append(
            (
                f"Module {module.name}",
                f"{versions}; on {len(on)} of {len(hosts)} hosts, enforcing on {len(enforcing)}",
            )
        )
    unsigned = [(m.name, u.version) for m in posture.modules for u in m.uses if not u.as_signed]
    rows += [
        (
            "Running what was signed",
            "no package is promoted on any host"
            if not any(m.uses for m in posture.modules)
            else "yes, every promoted package has the digest that was signed"
            if not unsigned
            else "NO: " + _text(", ".join(f"{m} {v}" for m, v in unsigned)),
        ),
        (
            "Hosts that are not as they should be",
            f"{len(bad)}" + (f": {', '.join(h.name for h in bad[:10])}" if bad else ""),
        ),
        (
            "Journal",
            (f"intact, {journal.links} links" if journal.intact else "NOT INTACT, see below")
            + f"; {journal.confirming} of {journal.asked} hosts confirm it",
        ),
        ("Open questions", str(len(posture.questions))),
    ]
    yield from _table(("Question", "Answer"), rows)


def _rules(posture: Posture) -> Iterator[str]:
    environment, rules = posture.environment, posture.rules
    yield "## Environment and rules"
    yield ""
    since = f" since {_time(environment.since)}" if environment.since else ""
    by = (
        f", signed by {_list(environment.signed_by)}"
        if environment.signed_by
        else ", signed by nobody whose signature holds"
    )
    about = f" ({_text(environment.description)})" if environment.description else ""
    yield f"- The workspace is **{environment.name}**{about}{since}{by}."
    if rules.regulated:
        yield "- It is **regulated**: hosts demand a second operator's signature under each rollout and a pinned publisher for"
        yield "  each module."
    else:
        yield "- It is not regulated: one operator's signature is enough for a rollout."
    for module, keys in sorted(rules.publishers.items()):
        yield f"- Releases of {module} must be signed by one of: {_keyids(keys)}."
    for module, floor in sorted(rules.floors.items()):
        yield f"- {module} may not be older than {floor}."
    yield ""
    yield _source(environment.source, rules.source)


def _module(module: Module, posture: Posture) -> Iterator[str]:
    yield f"## Module {module.name}"
    yield ""
    if module.summary:
        yield _text(module.summary)
        yield ""
    yield "### Where it is on, since when and by whom"
    yield ""
    if module.uses:
        yield from _table(
            ("Version", "Policy", "Hosts", "Enforcing", "Since", "Rollout", "Started by", "Approved by"),
            [_use(use, posture) for use in module.uses],
        )
        yield ""
        for use in module.uses:
            yield f"- {_text(use.version)}{_policy(use)} on: {_list(use.hosts)}"
            silent = [h for h in use.hosts if h not in use.enforcing]
            if silent:
                yield f"  - not enforcing: {_list(silent)}"
            if not use.as_signed:
                yield f"  - **its digest {use.digest[:12]} is not the one that was signed**"
        yield ""
        yield _source(*(use.source for use in module.uses))
    else:
        yield "It is on no host."
    yield ""
    yield "### How it was signed, and by whom verified"
    yield ""
    if module.releases:
        yield from _table(
            ("Release", "Digest", "Published", "By", "Signed with", "Needed", "Holds"),
            [_release(r) for r in module.releases],
        )
        yield ""
        yield "Each host verifies these signatures itself before it unpacks anything; this document verified them once more."
        yield ""
        yield _source(*(r.source for r in module.releases))
    else:
        yield "There is no release of it."
    if module.requirement is not None:
        needs = module.requirement
        yield ""
        yield "### What it needs"
        yield ""
        kernels = sorted({h.kernel for h in _on(module, posture) if h.kernel})
        wanted = f"{needs.kernel} or newer" if needs.kernel else "of any version"
        yield f"- kernel {wanted}; in use: {_text(', '.join(kernels)) or 'not known'}"
        yield f"- kernel features: {', '.join(needs.features) or 'none'}"
        yield f"- architectures: {', '.join(needs.architectures) or 'any'}; agent: {needs.agent or 'any'}"
        for host, why in sorted(needs.unmet.items()):
            yield f"- **{host} does not have it**: {_text(why)}"
        yield ""
        yield _source(needs.source)
    if module.blast is not None:
        yield ""
        yield from _blast(module.blast)


def _use(use: Use, posture: Posture) -> Sequence[str]:
    brought = next((r for r in posture.rollouts if r.name == use.rollout), None)
    if use.approved_by or (brought is not None and brought.approvals_needed):
        approved = _list(use.approved_by)
    else:  # older rollouts than those that are listed may have needed one
        approved = "not known" if brought is None else "not needed"
    return (
        _text(use.version),
        _policy(use).strip() or "none",
        str(len(use.hosts)),
        str(len(use.enforcing)),
        _time(use.since) if use.since else "not known",
        _text(use.rollout or "not known"),
        _list(use.started_by),
        approved,
    )


def _policy(use: Use) -> str:
    if use.policy is None:
        return ""
    return f" policy #{use.policy_serial} ({use.policy[:12]}, signed by {_list(use.policy_signed_by)})"


def _release(release: Release) -> Sequence[str]:
    holds = "yes" if release.signed else "**NO**"
    if release.pinned is not None:
        holds += ", pinned publisher" if release.pinned else ", **not a pinned publisher**"
    return (
        release.version,
        release.digest[:12],
        _time(release.published_at),
        _list(release.published_by),
        _keyids(release.signers),
        f"{release.threshold} of role {release.role}",
        holds,
    )


def _blast(blast: Blast) -> Iterator[str]:
    yield "### What it can touch"
    yield ""
    if blast.powers:
        yield from (f"- {power.name}: it may {power.allows}" for power in blast.powers)
    else:
        yield "- no Linux capability at all"
    yield f"- at most {blast.memory_mib} MiB of memory and {blast.tasks} tasks; {blast.stop_s:g} s to stop"
    yield f"- one rollout changes at most {blast.hosts_at_once} of {blast.hosts_selected} hosts at once, by its own waves"
    yield from (f"- if it dies, {words}" for words in blast.if_it_dies)
    if blast.exposure:
        yield ""
        yield "Somebody with activation's key could do with the last rollout's signature, until its scope ends:"
        yield ""
        yield from (f"- {_text(words)}" for words in blast.exposure)
    yield ""
    yield _source(blast.source)


def _on(module: Module, posture: Posture) -> list[Host]:
    names = {name for use in module.uses for name in use.hosts}
    return [h for h in posture.hosts if h.name in names]


def _hosts(posture: Posture) -> Iterator[str]:
    yield "## Hosts"
    yield ""
    if not posture.hosts:
        yield "No host is recorded."
        return
    yield from _table(
        ("Host", "State", "Last seen", "Kernel", "Agent", "Modules", "Journal"),
        [
            (
                h.name,
                h.state,
                _time(h.last_seen) if h.last_seen else "never",
                _text(f"{h.kernel} {h.architecture}") or "not known",
                _text(h.agent) or "not known",
                _runs(h),
                _text(h.journal),
            )
            for h in posture.hosts
        ],
    )
    yield ""
    bad = [h for h in posture.hosts if h.problems]
    yield "### Not as they should be"
    yield ""
    if not bad:
        yield "None: every host reports, is well, and runs what was signed."
    for host in bad:
        yield f"- **{_text(host.name)}**"
        yield from (f"  - {_text(problem)}" for problem in host.problems)
    yield ""
    yield _source(*(h.source for h in posture.hosts))


def _runs(host: Host) -> str:
    return (
        "; ".join(
            _text(f"{m.name} {m.version or 'none'} {m.health}") + (", enforcing" if m.enforcing else "")
            for m in host.modules
        )
        or "none"
    )


def _rollouts(posture: Posture) -> Iterator[str]:
    yield "## How updates are staged"
    yield ""
    if not posture.rollouts:
        yield "There was no rollout yet."
        return
    yield from _table(
        ("Rollout", "What", "State", "Started", "By", "Approved by", "Waves", "Limits"),
        [_staged(r) for r in posture.rollouts],
    )
    broken = [r for r in posture.rollouts if r.broken]
    said = [r for r in posture.rollouts if r.reason]
    if broken or said:
        yield ""
    for one in said:
        yield f"- {one.name}: {_text(one.reason)}"
    for one in broken:
        yield f"- **{one.name}: its journal is broken**: {_text(one.broken)}"
    yield ""
    yield _source(*(r.source for r in posture.rollouts))


def _staged(one: Rollout) -> Sequence[str]:
    waves = "; ".join(
        f"{w.name}: {w.hosts} hosts, {w.state}" + (f", soaks {w.soak_s:g} s" if w.soak_s else "")
        for w in one.waves
    )
    limits = (
        f"fails above {one.max_failed:.0%} (of at least {one.min_sample}); at most {one.max_unavailable:.0%} at once; "
        f"{one.host_deadline_s:g} s per host; trial {one.trial_s:g} s; on failure {one.on_failure}"
    )
    approved = (
        _list(one.approved_by)
        if one.approved_by
        else ("**nobody yet**" if one.approvals_needed else "not needed")
    )
    return (
        one.name,
        f"{one.module} {one.version} to {one.selected} hosts",
        one.state,
        _time(one.created_at),
        _list(one.started_by),
        approved,
        waves or "none yet",
        limits,
    )


def _people(posture: Posture) -> Iterator[str]:
    yield "## Who may do what"
    yield ""
    if not posture.people:
        yield "Nobody has a role here."
        return
    yield from _table(
        ("Operator", "Key", "Roles here", "May"),
        [(p.name, p.keyid[:12], _list(p.roles), "; ".join(p.may) or "look") for p in posture.people],
    )
    yield ""
    yield _source(*(p.source for p in posture.people))


def _keys(posture: Posture) -> Iterator[str]:
    yield "## Keys that everything rests on"
    yield ""
    yield from _table(
        ("Role", "Version", "Needed", "Keys", "Signed by", "Expires"),
        [
            (
                k.name,
                str(k.version),
                f"{k.threshold} of {len(k.keyids)}",
                _keyids(k.keyids),
                _keyids(k.signers),
                _time(k.expires),
            )
            for k in posture.keys
        ],
    )
    yield ""
    yield _source(*(k.source for k in posture.keys))


def _journal(posture: Posture) -> Iterator[str]:
    journal = posture.journal
    yield "## Journal"
    yield ""
    yield f"**{'Intact' if journal.intact else 'Not intact'}**: {journal.links} links."
    yield ""
    yield from (f"- {_text(words)}" for words in (*journal.findings, *journal.verdict))
    yield ""
    yield _source(journal.source)


def _questions(posture: Posture) -> Iterator[str]:
    yield "## Open questions"
    yield ""
    if not posture.questions:
        yield "None."
    for question in posture.questions:
        yield f"- **{_text(question.about)}**: not known, because {_text(question.because)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(_cell(cell) for cell in row) + " |"


def _cell(text: str) -> str:
    return printing.printable(text.replace("|", "\\|").replace("\n", " "))


def _text(text: str) -> str:
    """Words of others inside ours: on one line, and never read as Markdown or HTML."""
    plain = printing.printable(" ".join(text.split()))
    for sign in "\\`*_<>[]":
        plain = plain.replace(sign, "\\" + sign)
    return plain


def _source(*sources: str) -> str:
    return "*Source: " + "; ".join(dict.fromkeys(_text(s) for s in sources)) + ".*"


def _list(words: Iterable[str]) -> str:
    return ", ".join(_text(w) for w in words) or "nobody"


def _keyids(keys: Iterable[str]) -> str:
    return ", ".join(f"`{k[:12]}`" for k in keys) or "nobody"


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M UTC")


def _counts(states: Iterable[str]) -> str:
    found: dict[str, int] = {}
    for state in states:
        found[state] = found.get(state, 0) + 1
    return ", ".join(f"{n} {state}" for state, n in sorted(found.items())) or "none"
