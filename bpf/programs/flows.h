/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The connection table. A flow that a policy allowed passes without asking the rules again, in both directions, until it
 * goes quiet or the policy changes; then its original tuple is judged by the new policy once, as a new connection, and lives
 * on or ends. A denial is remembered beside the older allowance, so that a revert lets the flow live on.
 *
 * Each hook direction speaks for itself: a forwarded packet that ingress allowed is asked again at egress.
 */
#ifndef LOOPBACK_FLOWS_H
#define LOOPBACK_FLOWS_H

#include "classify.h"
#include "table.h"

#define PROOF_WINDOW 65536 /* what an acknowledgement may be beyond the first: a guess hits one in 65,536 */

static __always_inline __u32 tick_now(void)
{
	return bpf_ktime_get_boot_ns() >> FW_TICK_SHIFT;
}

static __always_inline __u32 flow_timeout(struct fw_config *times, __u8 protocol, __u8 stage)
{
	if (protocol == PROTO_TCP)
		return stage == FW_FLOW_OPEN	  ? times->timeout_established :
		       stage == FW_FLOW_OPENING ? times->timeout_syn :
						  times->timeout_closing;
	if (protocol == PROTO_UDP || protocol == PROTO_UDPLITE)
		return stage == FW_FLOW_OPEN ? times->timeout_udp_replied : times->timeout_udp;
	if (protocol == PROTO_ICMP || protocol == PROTO_ICMPV6)
		return times->timeout_icmp;
	return times->timeout_other;
}

static __always_inline void turn_round(struct packet *packet)
{
	__u64 first = packet->source[0], second = packet->source[1];
	__u16 port = packet->source_port;

	packet->source[0] = packet->destination[0];
	packet->source[1] = packet->destination[1];
	packet->source_port = packet->destination_port;
	packet->destination[0] = first;
	packet->destination[1] = second;
	packet->destination_port = port;
}

/* Judge a flow's original packet anew, after the policy changed. `packet` is that packet or its answer: there is no stack for
 * another one, so it is lent, and given back as it was where somebody still `needs` it. */
static __always_inline void revalidate(struct flow_view *view, struct packet *packet, __u32 ask, bool needs,
				       struct answer *answer)
{
	__u32 ifindex = packet->ifindex;
	__u8 type = packet->icmp_type, code = packet->icmp_code;

	packet->ifindex = view->ifindex;
	packet->icmp_type = view->icmp_type;
	packet->icmp_code = 0;
	if (view->reply)
		turn_round(packet);
	classify(packet, ask, LOOK_UP_INTERFACE, answer);
	if (!needs)
		return;
	if (view->reply)
		turn_round(packet);
	packet->ifindex = ifindex;
	packet->icmp_type = type;
	packet->icmp_code = code;
}

/* Whether the policy of `slot` allows what hook `side` allowed before. */
static __always_inline bool flow_allowed(struct fw_flow *flow, struct flow_view *view, struct packet *packet,
					 struct fw_slot *slot, __u32 side, bool needs, struct answer *answer)
{
	struct fw_totals *count;
	bool allowed;

	answer->origin = view->ifindex;
	answer->asked = (side & 1) | (view->reply ? FW_ASKED_REPLY : 0);
	answer->identity = view->identity;
	answer->order = FW_NO_RULE;
	answer->sample = 0;
	answer->reason = FW_BY_FLOW;
	answer->verdict = FW_ACCEPT;
	if (view->allowed == slot->epoch)
		return true;
	answer->reason = FW_BY_REVOKED;
	answer->verdict = FW_DROP;
	if (view->denied == slot->epoch)
		return false;
	revalidate(view, packet, ASK(slot->epoch, side, FW_NEW, 1), needs, answer);
	count = totals_here();
	if (count)
		count->revalidated++;
	allowed = answer->verdict == FW_ACCEPT;
	/* Whoever writes to the flow meanwhile may have found the same; if not, its next packet is judged again. */
	if (flow_lock(flow, view->sequence)) {
		struct fw_flow_side *mine = &flow->sides[side & 1];

		mine->identity = answer->identity;
		if (allowed)
			mine->allowed = slot->epoch;
		else
			mine->denied = slot->epoch;
		flow_unlock(flow, view->sequence);
		view->sequence += 2;
	}
	answer->reason = allowed ? FW_BY_FLOW : FW_BY_REVOKED;
	return allowed;
}

/* What a packet that passes does to its flow. */
static __always_inline void flow_touch(struct fw_flow *flow, struct flow_view *view, struct packet *packet,
				       struct fw_config *times)
{
	__u32 stage = view->stage, proof = view->proof, number = flow->number, awaited = number;
	bool tcp = packet->protocol == PROTO_TCP, syn = tcp && packet->tcp_flags & TCP_SYN;
	bool reset = tcp && packet->tcp_flags & TCP_RST, fin = tcp && packet->tcp_flags & TCP_FIN;
	__u64 now = bpf_jiffies64();

	/* A refusal is no answer and goes on with nothing. And without a handshake who began proves nothing by going on, unless it was this host: a forged
	 * request gets its answer, and can be sent twice. */
	if (view->reply && proof != FW_PROVEN && !reset) {
		proof = FW_ANSWERED;
		if (syn)
			number = packet->number;
	} else if (!view->reply && proof == FW_ANSWERED && !syn && !reset &&
		   (tcp ? !number || packet->number - number < PROOF_WINDOW : view->direction == FW_EGRESS)) {
		proof = FW_PROVEN;
	}
	/* Only the handshake's numbers are checked, so who guesses the ports can forge a reset, and an end where it comes in. The
	 * host answers a real one by its own. */
	if (reset && (stage == FW_FLOW_OPEN || stage == FW_FLOW_RESET))
		stage = FW_FLOW_RESET;
	else if (reset || (fin && packet->direction == FW_EGRESS))
		stage = FW_FLOW_CLOSING;
	else if (stage == FW_FLOW_RESET || (stage == FW_FLOW_OPENING && proof >= (tcp ? FW_PROVEN : FW_ANSWERED)))
		stage = FW_FLOW_OPEN;
	if (stage != view->stage || proof != view->proof || number != awaited) {
		if (!flow_lock(flow, view->sequence))
			return; /* the next packet tells the same */
		flow->stage = stage;
		flow->proof = proof;
		flow->number = number;
		flow->life = flow_timeout(times, packet->protocol, stage);
		flow->seen = now;
		flow_unlock(flow, view->sequence);
	} else if (now - *(volatile __u64 *)&flow->seen >= times->touch) {
		*(volatile __u64 *)&flow->seen = now;
	}
}

/* Remember that `packet` was allowed by hook `direction`. With `reversed`, the flow's original packet went the other way. */
__noinline int flow_remember(struct packet *packet, __u32 epoch, __u32 direction, __u32 identity, bool reversed)
{
	struct fw_totals *count;
	struct fw_config *times = settings();
	struct flow_view view = {};
	struct fw_flow *flow;
	__u32 sequence, place;
	bool known;

	direction &= 1;
	if (!packet || !times)
		return 0;
	place = flow_find(packet, direction, &view);
	known = place;
	if (!known) {
		place = flow_claim(packet);
		if (!place) {
			count = totals_here();
			if (count)
				count->flows_failed++;
			return 0;
		}
	}
	flow = flow_at(place - 1);
	if (!flow)
		return 0;
	if (known) {
		sequence = view.sequence;
		if (!flow_lock(flow, sequence))
			return 0; /* somebody remembers it just now; if he does not, its next packet is asked for again */
		if (view.alive && view.reply == reversed) {
			if (view.stage >= FW_FLOW_CLOSING && packet->tcp_flags & TCP_SYN) {
				/* the ports are used again */
				flow->stage = FW_FLOW_OPENING;
				flow->proof = FW_ONE_SIDED;
				flow->number = 0;
				flow->life = flow_timeout(times, packet->protocol, FW_FLOW_OPENING);
			}
			goto allow;
		}
	} else {
		sequence = flow->sequence - 1;
	}
	flow->swapped = packet_key_apart(packet, &flow->key) ^ reversed;
	flow->direction = direction;
	/* who did not begin now has long been open */
	flow->stage = packet->protocol == PROTO_TCP && !(packet->tcp_flags & TCP_SYN) ? FW_FLOW_OPEN : FW_FLOW_OPENING;
	flow->proof = reversed ? FW_ANSWERED : FW_ONE_SIDED;
	flow->number = 0;
	flow->life = flow_timeout(times, packet->protocol, flow->stage);
	flow->born = bpf_jiffies64();
	flow->icmp_type = packet->icmp_type;
	flow->sides[direction ^ 1].allowed = 0;
	flow->sides[direction ^ 1].denied = 0;
	flow->sides[direction].denied = 0;
	count = totals_here();
	if (count)
		count->flows_created++;
allow:
	flow->sides[direction].allowed = epoch;
	flow->sides[direction].identity = identity;
	flow->sides[direction].ifindex = packet->ifindex;
	flow->seen = bpf_jiffies64();
	flow_unlock(flow, sequence);
	return 0;
}

/* The packet that an ICMP error carries; only the first eight transport bytes are promised to be in there. Returns whether there is
 * one, sent by whom the error goes to. */
static __always_inline bool inner_packet(void *context, bool xdp, struct packet *packet, struct packet *inside)
{
	__u32 at = packet->inner;

	if (packet->family == 4) {
		struct ipv4 ip;

		if (load(context, xdp, at, &ip, sizeof(ip)) || ip.version_length >> 4 != 4 ||
		    (ip.version_length & 15) < 5 || ip.fragment & bpf_htons(0x1fff))
			return false;
		map_ipv4(inside->source, ip.source);
		map_ipv4(inside->destination, ip.destination);
		inside->protocol = ip.protocol;
		at += (ip.version_length & 15) * 4;
	} else {
		struct ipv6 ip;

		if (load(context, xdp, at, &ip, sizeof(ip)) || bpf_ntohl(ip.flow) >> 28 != 6)
			return false;
		read_ipv6(inside->source, ip.source);
		read_ipv6(inside->destination, ip.destination);
		inside->protocol = ip.next;
		at += sizeof(ip);
		if (is_extension(ip.next)) {
			struct walk walk = {.context = context, .offset = at, .next = ip.next};

			if (xdp)
				bpf_loop(FW_MAX_EXTENSIONS, walk_step_xdp, &walk, 0);
			else
				bpf_loop(FW_MAX_EXTENSIONS, walk_step_skb, &walk, 0);
			if (walk.failed || walk.flags & LATER_FRAGMENT || is_extension(walk.next))
				return false;
			inside->protocol = walk.next;
			at = walk.offset;
		}
	}
	inside->family = packet->family;
	if (carries_ports(inside->protocol)) {
		struct transport ports;

		if (load(context, xdp, at, &ports, sizeof(ports)))
			return false;
		inside->source_port = bpf_ntohs(ports.source);
		inside->destination_port = bpf_ntohs(ports.destination);
		inside->flags = HAS_PORTS;
	} else if (inside->protocol == PROTO_ICMP || inside->protocol == PROTO_ICMPV6) {
		struct icmp icmp;

		if (load(context, xdp, at, &icmp, sizeof(icmp)))
			return false;
		inside->source_port = inside->destination_port = bpf_ntohs(icmp.id);
		inside->flags = HAS_ICMP;
	}
	return inside->source[0] == packet->destination[0] && inside->source[1] == packet->destination[1];
}

static __noinline int inner_packet_xdp(void *context, struct packet *packet, struct packet *inside)
{
	return inner_packet(context, true, packet, inside);
}

static __noinline int inner_packet_skb(void *context, struct packet *packet, struct packet *inside)
{
	return inner_packet(context, false, packet, inside);
}

/* Whether an ICMP error belongs to a flow that is allowed. */
static __always_inline bool related(void *context, bool xdp, struct packet *packet, struct fw_slot *slot,
				    struct answer *answer)
{
	struct packet inside = {};
	struct flow_view view = {};
	struct fw_flow *flow;
	__u32 place;

	if (!(xdp ? inner_packet_xdp(context, packet, &inside) : inner_packet_skb(context, packet, &inside)))
		return false;
	place = flow_find(&inside, AT_ORIGIN, &view);
	flow = place ? flow_at(place - 1) : NULL;
	if (!flow || !view.alive || !flow_allowed(flow, &view, &inside, slot, view.direction, false, answer))
		return false;
	answer->identity = FW_NO_RULE; /* an error about a flow is no packet of its rule */
	answer->reason = FW_BY_RELATED;
	return true;
}

static __noinline int related_xdp(void *context, struct packet *packet, struct fw_slot *slot, struct answer *answer)
{
	return related(context, true, packet, slot, answer);
}

static __noinline int related_skb(void *context, struct packet *packet, struct fw_slot *slot, struct answer *answer)
{
	return related(context, false, packet, slot, answer);
}

static __always_inline void fragment_key(struct packet *packet, __u32 direction, struct fw_fragment_key *key)
{
	key->source[0] = packet->source[0];
	key->source[1] = packet->source[1];
	key->destination[0] = packet->destination[0];
	key->destination[1] = packet->destination[1];
	key->id = packet->fragment_id;
	/* IPv6: the first fragment's is behind its extension headers, and the later ones do not tell it (RFC 8200, 4.5) */
	key->protocol = packet->family == 4 ? packet->protocol : 0;
	key->family = packet->family;
	key->direction = direction;
	key->pad = 0;
}

static __noinline int fragment_follows(struct packet *packet, __u32 direction, struct fw_slot *slot,
					struct fw_config *times)
{
	struct fw_fragment_key key;
	struct fw_fragment *first;

	fragment_key(packet, direction, &key);
	first = bpf_map_lookup_elem(&fragments, &key);
	return first && first->epoch == slot->epoch && (__u32)bpf_jiffies64() - first->seen <= times->timeout_fragment;
}

static __noinline int fragment_remember(struct packet *packet, __u32 direction, struct fw_slot *slot)
{
	struct fw_fragment_key key;
	struct fw_fragment first = {.epoch = slot->epoch, .seen = bpf_jiffies64()};

	fragment_key(packet, direction, &key);
	bpf_map_update_elem(&fragments, &key, &first, BPF_ANY);
	return 0;
}

#endif
