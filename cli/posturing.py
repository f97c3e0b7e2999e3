"""What a workspace's security posture is: `build(examined, …)` from verified evidence. Pure.

A statement that the evidence does not carry becomes an open question, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final, NamedTuple

import msgspec

import loopback
from loopback.cli import auditing, evidence, posturedoc, witnessing
from loopback.cli.audit import Examined
from loopback.cli.posturedoc import Blast, Host, HostModule, Module, Posture, Question, Use
from loopback.cli.posturehosts import Judge, Seen, agreement, promoted, seen_hosts, unmet
from loopback.contracts import approvals, envelope, exposure, messages, rolloutplan, trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import Running
from loopback.contracts.messages import EntitlementPut, Record, Requirements, WorkspacePut, decode_command
from loopback.contracts.reports import ModuleStatus
from loopback.contracts.rolloutstate import FINAL, Rollout, Standing
from loopback.contracts.trustdoc import EVERY_WORKSPACE, Role, Trust, WorkspaceRules
from loopback.contracts.verbs import POLICY, VERBS
from loopback.trust.capabilities import POWERS
from loopback.trust.package import PackageInfo
from loopback.trust.signing import delegated_role

ROLLOUTS: Final = 10  # the newest that ended are told of; those that run all are
_STATUS: Final = "hosts' own signed statuses"
_VIEW: Final = "telemetry's view, no longer verifiable here"
_DIES: Final = (
    "only its own process ends: the agent stays up, says that the host is degraded, and starts it again",
    "other modules run in processes of their own and go on",
)
_ARCHITECTURE: Final = "docs/architecture.md, 'Host'"


class Contents(NamedTuple):
    """Content of the bus by digest, verified: packages, and policies as stored. What could not be had is not in here."""

    packages: Mapping[str, PackageInfo]
    policies: Mapping[str, bytes]


def build(examined: Examined, contents: Contents, now: datetime) -> Posture:
    """The whole document."""
    hosts = seen_hosts(examined)
    return _Builder(examined, contents, hosts, now).posture()


class _Builder:
    def __init__(self, examined: Examined, contents: Contents, hosts: dict[str, Seen], now: datetime) -> None:
        self.examined = examined
        self.workspace = examined.evidence.workspace
        self.trust: Trust = examined.trusted.trust
        self.trusts: Sequence[Trust] = (self.trust, *examined.trusted.earlier)
        self.rules: WorkspaceRules = self.trust.rules(self.workspace)
        self.contents = contents
        self.hosts = hosts
        self.now = now
        self.used = promoted(hosts)
        self.questions: list[Question] = []
        self.releases = {(r.module, r.digest): r for r in evidence.releases(examined.evidence)}
        self.document = f"trust document version {self.trust.document.version}, verified from the pinned root"
        self.witnesses = {h.host: h for h in examined.journal.hosts}
        self.judge = Judge(examined, now)

    def ask(self, about: str, because: str) -> None:
        self.questions.append(Question(about=about, because=because))

    def posture(self) -> Posture:
        environment = self._environment()
        modules = tuple(self._module(name) for name in self._names())
        hosts = tuple(self._host(name, seen) for name, seen in self.hosts.items())
        return Posture(
            version=1,
            workspace=self.workspace,
            at=self.examined.evidence.at,
            written_by=f"loopback {loopback.__version__}",
            environment=environment,
            rules=posturedoc.Rules(
                regulated=self.rules.regulated,
                publishers=dict(self.rules.publishers),
                floors={m: _floor(f) for m, f in self.rules.floors.items()},
                source=self.document,
            ),
            modules=modules,
            hosts=hosts,
            rollouts=tuple(self._rollout(r) for r in self._told()),
            people=tuple(self._people()),
            keys=tuple(
                posturedoc.KeyRole(
                    name=r.name,
                    version=r.version,
                    threshold=r.threshold,
                    keyids=r.keyids,
                    signers=r.signers,
                    expires=r.expires,
                    source="TUF metadata, verified from the pinned root",
                )
                for r in self.examined.trusted.roles
            ),
            journal=self._journal(),
            questions=tuple(self._asked()),
        )

    # The workspace

    def _records(self, kind: str) -> list[tuple[Record, messages.AnyCommand, auditing.Signed]]:
        """Records of a kind, the newest of each name, with what their signatures are worth."""
        newest: dict[str, tuple[Record, messages.AnyCommand, auditing.Signed]] = {}
        for stored in self.examined.evidence.records:
            try:
                record = evidence.RECORDS.decode(stored.data)
                command = decode_command(envelope.payload_of(record.envelope))
            except (msgspec.MsgspecError, RecursionError, Refused):
                continue
            if record.kind == kind:
                signed = auditing.signed(
                    record.envelope, self.trusts, VERBS[type(command)].role, command.workspace
                )
                newest[record.name] = (record, command, signed)
        return [newest[name] for name in sorted(newest)]

    def _environment(self) -> posturedoc.Environment:
        for record, command, signed in self._records("workspace"):
            if isinstance(command, WorkspacePut) and record.name == self.workspace:
                return posturedoc.Environment(
                    name=command.environment,
                    description=command.description,
                    since=record.at,
                    signed_by=signed.operators if signed.standing in ("ok", "past") else (),
                    source=f"the workspace's record: {auditing.STANDINGS[signed.standing]}",
                )
        self.ask("what this workspace is for", "the bus has no record of it")
        return posturedoc.Environment(
            name="unknown", description="", since=None, signed_by=(), source="no record"
        )

    # Modules

    def _names(self) -> list[str]:
        rolled = {r.created.module for r in self.examined.state.rollouts.values()}
        entitled = {
            c.module
            for _, c, _ in self._records("entitlement")
            if isinstance(c, EntitlementPut) and not c.absent
        }
        reported = {m.module for s in self.hosts.values() if s.status for m in s.status.modules}
        return sorted(rolled | entitled | reported)

    def _module(self, name: str) -> Module:
        uses = [
            self._use(name, running, hosts)
            for (module, running), hosts in self.used.items()
            if module == name
        ]
        uses.sort(key=lambda u: (-len(u.hosts), u.version, u.policy_serial))
        own = sorted((r for r in self.releases.values() if r.module == name), key=lambda r: r.published_at)
        if not own:
            self.ask(f"how {name} was published", "the catalog has no release of it")
        wanted = uses[0].digest if uses else (own[-1].digest if own else "")
        package = self.contents.packages.get(wanted)
        if package is None and wanted:
            self.ask(
                f"limits and summary of {name}",
                f"its package {wanted[:12]} could not be fetched from the bus and verified",
            )
        release = self.releases.get((name, wanted))
        return Module(
            name=name,
            summary=package.manifest.module.summary if package else "",
            uses=tuple(uses),
            releases=tuple(self._release(r) for r in own),
            requirement=self._requirement(name, release.requirements) if release else None,
            blast=self._blast(name, package),
        )

    def _release(self, release: messages.Release) -> posturedoc.Release:
        target = self.examined.trusted.targets.get(release.target)
        role = delegated_role(release.module)
        known = next((r for r in self.examined.trusted.roles if r.name == role), None)
        signers = target.signers if target else ()
        pins = self.rules.publishers.get(release.module)
        return posturedoc.Release(
            version=release.version,
            digest=release.digest,
            published_at=release.published_at,
            published_by=release.operators,
            signed=target is not None and target.sha256 == release.digest,
            role=role,
            threshold=known.threshold if known else 0,
            signers=signers,
            pinned=bool(set(pins) & set(signers)) if pins is not None else None,
            source="catalog, held against the verified TUF target",
        )

    def _use(self, module: str, running: Running, names: list[str]) -> Use:
        brought = self._brought(module, running, names)
        rollout, since = brought if brought else (None, None)
        if rollout is None:
            self.ask(
                f"who brought {module} {running.version} to {', '.join(names)}",
                "no rollout in the journal led there",
            )
        release = self.releases.get((module, running.package))
        target = self.examined.trusted.targets.get(release.target) if release else None
        said = [self._status(n, module) for n in names]
        return Use(
            version=running.version,
            digest=running.package,
            policy=running.policy,
            policy_serial=running.policy_serial,
            policy_signed_by=self._policy_signers(module, running),
            hosts=tuple(names),
            enforcing=tuple(n for n, s in zip(names, said, strict=True) if s is not None and s.enforcing),
            rollout=rollout.id if rollout else "",
            since=since,
            started_by=self._starters(rollout) if rollout else (),
            approved_by=self._approvers(rollout) if rollout else (),
            as_signed=target is not None and target.sha256 == running.package,
            source=f"{_STATUS if all(self.hosts[n].verified for n in names) else _VIEW}; journal of rollout "
            f"{rollout.id if rollout else '(none)'}",
        )

    def _brought(self, module: str, running: Running, names: list[str]) -> tuple[Rollout, datetime] | None:
        """The newest rollout that led one of these hosts there, and when the first of them was seen to have promoted it."""
        found = [
            (r, p.since)
            for r in self.examined.state.rollouts.values()
            if r.created.module == module and r.created.target == running
            for n in names
            if (p := r.hosts.get(n)) is not None and p.standing in (Standing.PROMOTED, Standing.RETURNED)
        ]
        if not found:
            return None
        newest = max(found, key=lambda one: one[0].created_at)[0]
        return newest, min(since for r, since in found if r is newest)

    def _status(self, host: str, module: str) -> ModuleStatus | None:
        status = self.hosts[host].status
        return next((m for m in status.modules if m.module == module), None) if status else None

    def _policy_signers(self, module: str, running: Running) -> tuple[str, ...]:
        if running.policy is None:
            return ()
        data = self.contents.policies.get(running.policy)
        try:
            if data is None:
                raise Refused(Code.BLOB_MISSING, "the bus does not have it any more")
            payload, keyids = envelope.open_envelope(
                envelope.parse(data), envelope.POLICY, self.trust.operator_keys
            )
            policy = messages.decode_policy(payload)
            if (policy.workspace, policy.module) != (self.workspace, module):
                raise Refused(Code.POLICY_MALFORMED, f"it is for {policy.module} in {policy.workspace}")
            return self.trust.authorise(keyids, POLICY.role, self.workspace)
        except (Refused, msgspec.MsgspecError, RecursionError) as error:
            why = error.reason if isinstance(error, Refused) else str(error)
            self.ask(f"who signed policy {running.policy[:12]} of {module}", why)
            return ()

    def _requirement(self, name: str, needs: Requirements) -> posturedoc.Requirement:
        lacking: dict[str, str] = {}
        for (module, running), hosts in self.used.items():
            release = self.releases.get((module, running.package))
            if module == name and release is not None:
                for host in hosts:
                    if why := unmet(release.requirements, self.hosts[host].inventory):
                        lacking[host] = why
        return posturedoc.Requirement(
            kernel=needs.kernel,
            features=needs.features,
            architectures=needs.architectures,
            agent=needs.agent,
            unmet=lacking,
            source="the package's manifest, by the catalog; hosts' signed inventories",
        )

    def _blast(self, name: str, package: PackageInfo | None) -> Blast | None:
        if package is None:
            return None
        last = max(
            (r for r in self.examined.state.rollouts.values() if r.created.module == name),
            key=lambda r: r.created_at,
            default=None,
        )
        self.ask(
            f"whether what {name} put into the kernel goes on when its process dies",
            "no manifest says it; the module's own documentation has to",
        )
        self.ask(
            f"which interfaces {name} works on",
            "that is set in host.toml by each host's owner and is not reported",
        )
        manifest = package.manifest
        return Blast(
            powers=tuple(
                posturedoc.Power(name=c, allows=POWERS.get(c, "unknown to this version"))
                for c in manifest.module.capabilities
            ),
            memory_mib=manifest.limits.memory_mib,
            tasks=manifest.limits.tasks,
            stop_s=manifest.limits.stop_s,
            hosts_at_once=_at_once(last) if last else 0,
            hosts_selected=len(last.hosts) if last else 0,
            exposure=tuple(e.says for e in exposure.exposure(last.start, self.rules, last.members) if e.can)
            if last
            else (),
            if_it_dies=_DIES,
            source=f"manifest in package {package.digest[:12]}, verified; "
            + (f"command of rollout {last.id}; " if last else "no rollout yet; ")
            + _ARCHITECTURE,
        )

    # Hosts

    def _host(self, name: str, seen: Seen) -> Host:
        state = seen.view.state if seen.view else ("ok" if seen.status else "never seen")
        if state == "never seen":
            self.ask(f"what {name} runs", "it was recorded, but has never reported")
        witness = self.witnesses.get(name)
        inventory = seen.inventory
        return Host(
            name=name,
            labels=seen.record.labels,
            state=state,
            verified=seen.verified,
            last_seen=seen.view.last_at if seen.view else None,
            kernel=inventory.kernel if inventory else "",
            architecture=inventory.architecture if inventory else "",
            agent=inventory.agent_version if inventory else "",
            modules=tuple(
                HostModule(
                    name=m.module,
                    version=m.promoted.version if m.promoted else None,
                    policy_serial=m.promoted.policy_serial if m.promoted else 0,
                    phase=str(m.phase),
                    health=m.health,
                    enforcing=m.enforcing,
                )
                for m in (seen.status.modules if seen.status else ())
            ),
            problems=tuple(self.judge.problems(name, seen, state)),
            journal=agreement(witness),
            source=_STATUS
            if seen.verified
            else (_VIEW if seen.status else "its signed record; it has said nothing"),
        )

    # Rollouts, people, journal

    def _told(self) -> list[Rollout]:
        known = sorted(self.examined.state.rollouts.values(), key=lambda r: r.created_at, reverse=True)
        running = [r for r in known if r.state not in FINAL]
        ended = [r for r in known if r.state in FINAL]
        if len(ended) > ROLLOUTS:
            self.ask(
                "how older rollouts were staged",
                f"{len(ended) - ROLLOUTS} of them are left out here; see 'loopback rollout list'",
            )
        return sorted([*running, *ended[:ROLLOUTS]], key=lambda r: r.created_at, reverse=True)

    def _rollout(self, rollout: Rollout) -> posturedoc.Rollout:
        start = rollout.start
        return posturedoc.Rollout(
            name=rollout.id,
            module=rollout.created.module,
            version=rollout.created.version or "absent",
            state=str(rollout.state),
            created_at=rollout.created_at,
            ended_at=rollout.ended_at,
            started_by=self._starters(rollout),
            approvals_needed=rollout.created.approvals_needed,
            approved_by=self._approvers(rollout),
            selected=len(rollout.members),
            waves=tuple(
                posturedoc.Wave(name=w.name, hosts=len(w.hosts), soak_s=w.soak_s, state=str(w.state))
                for w in rollout.waves
            ),
            max_failed=start.gates.max_failed,
            min_sample=start.gates.min_sample,
            max_unavailable=start.max_unavailable,
            host_deadline_s=start.host_deadline_s,
            trial_s=start.trial_s,
            on_failure=start.scope.on_failure,
            reason=rollout.reason,
            broken=rollout.broken,
            source="the signed rollout.start, verified again; its journal",
        )

    def _starters(self, rollout: Rollout) -> tuple[str, ...]:
        found = auditing.signed(rollout.created.envelope, self.trusts, Role.RELEASER, self.workspace)
        if found.standing not in ("ok", "past"):
            said = found.said or auditing.STANDINGS[found.standing]
            self.ask(f"who started rollout {rollout.id}", said)
            return ()
        return found.operators

    def _approvers(self, rollout: Rollout) -> tuple[str, ...]:
        """Operators whose approval counts by the trust document, as hosts would judge it."""
        found: list[str] = []
        try:
            start = approvals.start_of(rollout.created.envelope, self.workspace, rollout.id, self.trust)
        except Refused:
            return ()
        for one in rollout.approvals:
            try:
                found += approvals.check(one, start, self.trust)
            except Refused:
                continue
        return tuple(dict.fromkeys(found))

    def _people(self) -> Iterable[posturedoc.Person]:
        for keyid, operator in sorted(self.trust.operators.items(), key=lambda one: (one[1].name, one[0])):
            roles = self.trust.roles(keyid, self.workspace)
            everywhere = roles | self.trust.roles(keyid, EVERY_WORKSPACE)
            if not everywhere:
                continue
            may = [v.what for v in (*VERBS.values(), POLICY) if v.role in roles or Role.ADMIN in roles]
            yield posturedoc.Person(
                name=operator.name,
                keyid=keyid,
                roles=tuple(sorted(roles)),
                may=tuple(may),
                source=self.document,
            )

    def _journal(self) -> posturedoc.JournalPart:
        journal = self.examined.journal
        return posturedoc.JournalPart(
            intact=self.examined.good,
            links=journal.links,
            confirming=len(journal.confirming),
            asked=len(journal.hosts),
            verdict=tuple(witnessing.summary(journal)),
            findings=tuple(f"{f.what}: {f.words}" for f in self.examined.audit.findings),
            source="'loopback audit' over the same evidence",
        )

    def _asked(self) -> Iterable[Question]:
        if self.examined.trusted.expired:
            self.ask("whether the trust metadata still counts", self.examined.trusted.expired)
        known = set()
        for question in self.questions:
            if (question.about, question.because) not in known:
                known.add((question.about, question.because))
                yield question


def _floor(floor: trustdoc.Floor) -> str:
    return floor.version + (f" from {floor.not_before:%Y-%m-%d %H:%M} UTC on" if floor.not_before else "")


def _at_once(rollout: Rollout) -> int:
    """How many hosts it may change at one moment: its widest wave, within `max_unavailable`."""
    if not rollout.waves:
        return 0
    most = max(1, rolloutplan.share(rollout.start.max_unavailable, len(rollout.hosts)))
    return min(most, max(len(w.hosts) for w in rollout.waves))
