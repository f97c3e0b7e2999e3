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

static __always_inline struct fw_config *settings(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&config, &zero);
}

static __always_inline struct fw_totals *totals_here(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&totals, &zero);
}

static __always_inline __u32 tick_now(void)
{
	return bpf_ktime_get_boot_ns() >> FW_TICK_SHIFT;
}

/* Returns whether the packet goes from high to low. */
static __always_inline bool flow_key(const __u64 *source, const __u64 *destination, __u16 source_port,
				     __u16 destination_port, __u8 protocol, __u8 family, struct fw_flow_key *key)
{
	bool swap;

	if (source[0] != destination[0])
		swap = source[0] > destination[0];
	else if (source[1] != destination[1])
		swap = source[1] > destination[1];
	else
		swap = source_port > destination_port;
	key->low[0] = swap ? destination[0] : source[0];
	key->low[1] = swap ? destination[1] : source[1];
	key->high[0] = swap ? source[0] : destination[0];
	key->high[1] = swap ? source[1] : destination[1];
	key->low_port = swap ? destination_port : source_port;
	key->high_port = swap ? source_port : destination_port;
	key->protocol = protocol;
	key->family = family;
	key->pad[0] = 0;
	key->pad[1] = 0;
	return swap;
}

static __noinline int packet_key(struct packet *packet, struct fw_flow_key *key)
{
	return flow_key(packet->source, packet->destination, packet->source_port, packet->destination_port,
			packet->protocol, packet->family, key);
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

static __always_inline bool flow_alive(struct fw_flow *flow, struct fw_flow_key *key, struct fw_config *times,
				       __u32 now)
{
	return now - flow->seen <= flow_timeout(times, key->protocol, flow->stage);
}

/* The original packet of a flow, as far as rules can ask about it. */
static __always_inline void flow_original(struct fw_flow *flow, struct fw_flow_key *key, __u32 ifindex,
					  struct packet *original)
{
	bool swap = flow->swapped;

	original->source[0] = swap ? key->high[0] : key->low[0];
	original->source[1] = swap ? key->high[1] : key->low[1];
	original->destination[0] = swap ? key->low[0] : key->high[0];
	original->destination[1] = swap ? key->low[1] : key->high[1];
	original->source_port = swap ? key->high_port : key->low_port;
	original->destination_port = swap ? key->low_port : key->high_port;
	original->protocol = key->protocol;
	original->family = key->family;
	original->ifindex = ifindex;
	original->icmp_type = flow->icmp_type;
	original->flags = key->protocol == PROTO_ICMP || key->protocol == PROTO_ICMPV6 ? HAS_ICMP :
			  carries_ports(key->protocol)				       ? HAS_PORTS :
											 0;
}

/* Whether the policy of `slot` allows what hook `side` allowed before. Judges the original packet when the policy changed. */
static __noinline int flow_allowed(struct fw_flow *flow, struct fw_flow_key *key, struct fw_slot *slot, __u32 side,
				   struct answer *answer)
{
	struct fw_flow_side *mine = &flow->sides[side & 1];
	struct packet original = {};
	struct fw_totals *count;

	answer->identity = mine->identity;
	answer->order = FW_NO_RULE;
	answer->sample = 0;
	answer->reason = FW_BY_FLOW;
	answer->verdict = FW_ACCEPT;
	if (mine->allowed == slot->epoch)
		return 1;
	answer->reason = FW_BY_REVOKED;
	answer->verdict = FW_DROP;
	if (mine->denied == slot->epoch)
		return 0;
	flow_original(flow, key, mine->ifindex, &original);
	classify(&original, ASK(slot->epoch, side, FW_NEW, 1), LOOK_UP_INTERFACE, answer);
	count = totals_here();
	if (count)
		count->revalidated++;
	mine->identity = answer->identity;
	if (answer->verdict == FW_ACCEPT) {
		mine->allowed = slot->epoch;
		answer->reason = FW_BY_FLOW;
		return 1;
	}
	mine->denied = slot->epoch;
	answer->reason = FW_BY_REVOKED;
	return 0;
}

static __always_inline void flow_touch(struct fw_flow *flow, struct packet *packet, bool reply,
				       struct fw_config *times, __u32 now)
{
	if (now - flow->seen >= times->touch)
		flow->seen = now;
	if (packet->protocol == PROTO_TCP) {
		if (packet->tcp_flags & TCP_RST && (flow->stage == FW_FLOW_OPEN || flow->stage == FW_FLOW_RESET)) {
			/* sequence numbers are not followed: anybody who guesses the ports can forge it */
			flow->stage = FW_FLOW_RESET;
			flow->seen = now;
		} else if (packet->tcp_flags & (TCP_RST | TCP_FIN)) {
			flow->stage = FW_FLOW_CLOSING;
			flow->seen = now;
		} else if (flow->stage == FW_FLOW_RESET) {
			flow->stage = FW_FLOW_OPEN;
			flow->seen = now;
		} else if (reply && flow->stage == FW_FLOW_OPENING) {
			flow->stage = FW_FLOW_OPEN;
			flow->seen = now;
		}
	} else if (reply && flow->stage == FW_FLOW_OPENING) {
		flow->stage = FW_FLOW_OPEN;
		flow->seen = now;
	}
}

/* Remember that `packet` was allowed by hook `direction`. With `reversed`, the flow's original packet went the other way. */
static __noinline int flow_remember(struct packet *packet, struct fw_slot *slot, __u32 direction, __u32 identity,
				    __u32 reversed)
{
	struct fw_flow_key key;
	struct fw_flow fresh = {}, *flow;
	bool swapped = packet_key(packet, &key);
	struct fw_totals *count = totals_here();
	struct fw_config *times = settings();
	__u32 now = bpf_jiffies64();

	direction &= 1;
	flow = bpf_map_lookup_elem(&flows, &key);
	if (flow && times && flow_alive(flow, &key, times, now) && flow->swapped == (swapped ^ reversed)) {
		flow->sides[direction].allowed = slot->epoch;
		flow->sides[direction].identity = identity;
		flow->sides[direction].ifindex = packet->ifindex;
		if (flow->stage >= FW_FLOW_CLOSING && packet->tcp_flags & TCP_SYN)
			flow->stage = FW_FLOW_OPENING; /* the ports are used again */
		flow->seen = now;
		return 0;
	}
	fresh.seen = now;
	fresh.swapped = swapped ^ reversed;
	fresh.direction = direction;
	fresh.stage = reversed ? FW_FLOW_OPEN : FW_FLOW_OPENING;
	fresh.icmp_type = packet->icmp_type;
	fresh.sides[direction].allowed = slot->epoch;
	fresh.sides[direction].identity = identity;
	fresh.sides[direction].ifindex = packet->ifindex;
	if (!count)
		return 0;
	if (bpf_map_update_elem(&flows, &key, &fresh, BPF_ANY))
		count->flows_failed++;
	else
		count->flows_created++;
	return 0;
}

/* The key of the flow whose packet an ICMP error carries; only the first eight transport bytes are promised to be in there.
 * Returns whether there is one, sent by whom the error goes to. */
static __always_inline bool inner_key(void *context, bool xdp, struct packet *packet, struct fw_flow_key *key)
{
	__u32 at = packet->inner;
	__u64 source[2], destination[2];
	__u16 source_port = 0, destination_port = 0;
	__u8 protocol;

	if (packet->family == 4) {
		struct ipv4 ip;

		if (load(context, xdp, at, &ip, sizeof(ip)) || ip.version_length >> 4 != 4 ||
		    (ip.version_length & 15) < 5 || ip.fragment & bpf_htons(0x1fff))
			return false;
		map_ipv4(source, ip.source);
		map_ipv4(destination, ip.destination);
		protocol = ip.protocol;
		at += (ip.version_length & 15) * 4;
	} else {
		struct ipv6 ip;

		if (load(context, xdp, at, &ip, sizeof(ip)) || bpf_ntohl(ip.flow) >> 28 != 6)
			return false;
		source[0] = ip.source[0];
		source[1] = ip.source[1];
		destination[0] = ip.destination[0];
		destination[1] = ip.destination[1];
		protocol = ip.next;
		at += sizeof(ip);
	}
	if (carries_ports(protocol)) {
		struct transport ports;

		if (load(context, xdp, at, &ports, sizeof(ports)))
			return false;
		source_port = bpf_ntohs(ports.source);
		destination_port = bpf_ntohs(ports.destination);
	} else if (protocol == PROTO_ICMP || protocol == PROTO_ICMPV6) {
		struct icmp icmp;

		if (load(context, xdp, at, &icmp, sizeof(icmp)))
			return false;
		source_port = destination_port = bpf_ntohs(icmp.id);
	}
	flow_key(source, destination, source_port, destination_port, protocol, packet->family, key);
	return source[0] == packet->destination[0] && source[1] == packet->destination[1];
}

static __noinline int inner_key_xdp(void *context, struct packet *packet, struct fw_flow_key *key)
{
	return inner_key(context, true, packet, key);
}

static __noinline int inner_key_skb(void *context, struct packet *packet, struct fw_flow_key *key)
{
	return inner_key(context, false, packet, key);
}

/* Whether an ICMP error belongs to a flow that is allowed. */
static __always_inline bool related(void *context, bool xdp, struct packet *packet, struct fw_slot *slot,
				    struct answer *answer)
{
	struct fw_config *times = settings();
	struct fw_flow_key key = {};
	struct fw_flow *flow;

	if (!times || !(xdp ? inner_key_xdp(context, packet, &key) : inner_key_skb(context, packet, &key)))
		return false;
	flow = bpf_map_lookup_elem(&flows, &key);
	if (!flow || !flow_alive(flow, &key, times, bpf_jiffies64()))
		return false;
	if (!flow_allowed(flow, &key, slot, flow->direction, answer))
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
