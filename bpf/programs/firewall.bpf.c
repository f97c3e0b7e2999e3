/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The firewall: XDP and TC ingress, TC egress, the same for devices without an Ethernet header, and the probe that judges a
 * packet on request. Every hook reads the active word once, and everything else from the slot that it names.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "firewall.h"
#include "maps.h"
#include "parse.h"
#include "classify.h"
#include "flows.h"

#define HEADERS 256 /* bytes made linear before a TC program reads headers */

/* The epoch in force: one read of the word, and of the clock only while a commit waits for its confirmation. */
static __always_inline __u32 epoch_in_force(bool *past)
{
	__u32 zero = 0, deadline, epoch;
	__u64 *at = bpf_map_lookup_elem(&active, &zero), word;

	*past = false;
	if (!at)
		return 0;
	word = *(volatile __u64 *)at;
	deadline = (__u32)word;
	epoch = (word >> 32) & 0xffff;
	if (deadline && tick_now() >= deadline) {
		*past = true;
		epoch = word >> 48;
	}
	return epoch;
}

static __always_inline void say(enum fw_verdict verdict, enum fw_reason reason, struct answer *answer)
{
	answer->identity = FW_NO_RULE;
	answer->order = FW_NO_RULE;
	answer->sample = 0;
	answer->verdict = verdict;
	answer->reason = reason;
}

static __noinline int report(struct packet *packet, struct answer *answer, __u32 epoch, __u32 direction)
{
	struct fw_event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);

	if (!event) {
		struct fw_totals *count = totals_here();

		if (count)
			count->events_lost++;
		return 0;
	}
	event->boot_ns = bpf_ktime_get_boot_ns();
	event->source[0] = packet->source[0];
	event->source[1] = packet->source[1];
	event->destination[0] = packet->destination[0];
	event->destination[1] = packet->destination[1];
	event->epoch = epoch;
	event->identity = answer->identity;
	event->order = answer->order;
	event->ifindex = packet->ifindex;
	event->length = packet->length;
	event->sample = answer->sample;
	event->source_port = packet->source_port;
	event->destination_port = packet->destination_port;
	event->family = packet->family;
	event->protocol = packet->protocol;
	event->direction = direction;
	event->verdict = answer->verdict;
	event->reason = answer->reason;
	event->icmp_type = packet->icmp_type;
	event->icmp_code = packet->icmp_code;
	event->tcp_flags = packet->tcp_flags;
	event->pad = 0;
	bpf_ringbuf_submit(event, 0);
	return 0;
}

/* Count the packet for its rule or reason, and report one in `sample`: the first, then every N-th of this CPU. */
static __always_inline void account(struct packet *packet, struct answer *answer, struct fw_slot *slot, __u32 direction)
{
	struct fw_totals *count = totals_here();
	__u64 seen = 0;

	if (!count)
		return;
	if (answer->reason < FW_REASONS) {
		seen = count->packets[direction & 1][answer->reason][answer->verdict & 1]++;
		count->by_slot[slot->epoch & 1][answer->verdict & 1]++;
	}
	if (answer->identity != FW_NO_RULE) {
		struct fw_counter *rule = bpf_map_lookup_elem(&counters, &answer->identity);

		if (rule) {
			seen = rule->packets++;
			rule->bytes += packet->length;
		}
	}
	if (answer->sample && seen % answer->sample == 0)
		report(packet, answer, slot->epoch, direction);
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

/* A packet that no flow speaks for. */
static __noinline int judge_new(struct packet *packet, struct fw_slot *slot, __u32 direction, __u32 state,
				struct answer *answer)
{
	struct fw_config *times = settings();
	bool adopting = false, flow = true;

	if (packet->protocol == PROTO_TCP && state == FW_INVALID && times && times->adopt_until) {
		adopting = tick_now() < times->adopt_until;
		if (adopting)
			state = FW_NEW;
	}
	classify(packet, ASK(slot->epoch, direction, state, 0), LOOK_UP_INTERFACE, answer);
	if (packet->flags & LATER_FRAGMENT)
		return 0;
	if (packet->flags & HAS_ICMP)
		flow = packet->flags & ECHO && !(packet->flags & ECHO_REPLY);
	if (answer->verdict == FW_ACCEPT) {
		if (flow)
			flow_remember(packet, slot, direction, answer->identity, 0);
		return 0;
	}
	if (adopting) {
		/* A TCP connection that was there before the firewall: it may be the answer to one that we began. */
		struct answer other = {};

		turn_round(packet);
		classify(packet, ASK(slot->epoch, direction ^ 1, FW_NEW, 1), LOOK_UP_INTERFACE, &other);
		turn_round(packet);
		if (other.verdict == FW_ACCEPT) {
			*answer = other;
			answer->sample = 0;
			answer->reason = FW_BY_ADOPTION;
			flow_remember(packet, slot, direction ^ 1, answer->identity, 1);
		}
	}
	return 0;
}

/* The verdict on a packet that could be read, by slot `index`. Global for the verifier's sake, like classify. Returns 0. */
__noinline int judge(struct packet *packet, __u32 index, __u32 direction, struct answer *answer)
{
	struct fw_config *times = settings();
	__u32 now = bpf_jiffies64(), state = FW_NEW;
	bool swapped, reply, opening;
	struct fw_flow_key key;
	struct fw_flow *flow;
	struct fw_slot *slot;

	if (!packet || !answer)
		return 0;
	say(FW_DROP, FW_BY_BROKEN, answer);
	direction &= 1;
	slot = slot_of(index & 1);
	if (!times || !slot)
		return 0;
	if (packet->flags & LATER_FRAGMENT) {
		if (fragment_follows(packet, direction, slot, times))
			say(FW_ACCEPT, FW_BY_FRAGMENT, answer);
		else
			judge_new(packet, slot, direction, FW_NEW, answer);
		return 0;
	}
	if (packet->flags & HAS_ICMP && !(packet->flags & ECHO)) {
		/* an error that no flow speaks for, or a message that has no answer */
		judge_new(packet, slot, direction, packet->inner ? FW_INVALID : FW_NEW, answer);
		return 0;
	}
	/* with FIN beside it too: some stacks open a connection by that */
	opening = packet->protocol == PROTO_TCP && (packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
	swapped = packet_key(packet, &key);
	flow = bpf_map_lookup_elem(&flows, &key);
	if (flow && !flow_alive(flow, &key, times, now))
		flow = NULL;
	if (flow && !opening) {
		reply = swapped != flow->swapped;
		/* the identifier of an echo is in both directions: only its type says who asks */
		if (packet->flags & ECHO && reply != !!(packet->flags & ECHO_REPLY))
			flow = NULL;
	}
	if (flow && !opening) {
		__u32 side = reply ? flow->direction : direction;

		if (flow->sides[side & 1].allowed) {
			if (!reply && slot->flags & FW_USES_INTERFACES &&
			    flow->sides[side & 1].ifindex != packet->ifindex) {
				/* Rules name devices, and what was allowed on one is not on another: a bridge above its
				 * port, or somebody who uses a neighbour's address elsewhere. */
				classify(packet, ASK(slot->epoch, direction, FW_NEW, 1), LOOK_UP_INTERFACE, answer);
				if (answer->verdict == FW_DROP)
					return 0;
			}
			if (flow_allowed(flow, &key, slot, side, answer))
				flow_touch(flow, packet, reply, times, now);
			return 0;
		}
		/* forwarded, or looped back: this hook sees the original for the first time */
		judge_new(packet, slot, direction, FW_NEW, answer);
		return 0;
	}
	if ((packet->protocol == PROTO_TCP && !opening) || packet->flags & ECHO_REPLY)
		state = FW_INVALID;
	judge_new(packet, slot, direction, state, answer);
	return 0;
}

static __always_inline bool filter(void *context, bool xdp, void *data, void *end, __u32 wire, bool network, __u32 ifindex,
				   __u32 direction)
{
	struct packet packet = {};
	struct answer answer = {};
	struct fw_slot *slot;
	__u32 epoch;
	bool past;

	epoch = epoch_in_force(&past);
	if (!epoch)
		return true;
	slot = slot_of(epoch & 1);
	if (!slot || (slot->epoch & 0xffff) != epoch) {
		/* Never seen, as staging waits for packets under way; if it were, nothing may pass by it. */
		struct fw_totals *count = totals_here();

		if (count)
			count->packets[direction][FW_BY_BROKEN][FW_DROP]++;
		return false;
	}
	packet.ifindex = ifindex;
	switch (parse(context, xdp, data, end, 0, wire, network, &packet)) {
	case FW_PARSED:
		if (packet.inner && (xdp ? related_xdp(context, &packet, slot, &answer) :
					   related_skb(context, &packet, slot, &answer)))
			break;
		judge(&packet, epoch, direction, &answer);
		if (answer.verdict == FW_ACCEPT && packet.flags & FIRST_FRAGMENT)
			fragment_remember(&packet, direction, slot);
		break;
	case FW_ESSENTIAL:
		say(FW_ACCEPT, FW_BY_ESSENTIAL, &answer);
		break;
	case FW_TRUNCATED:
		say(FW_DROP, FW_BY_TRUNCATED, &answer);
		answer.sample = slot->default_sample;
		break;
	default:
		say(slot->defaults[direction] & 1, FW_BY_UNPARSED, &answer);
		answer.sample = answer.verdict == FW_DROP ? slot->default_sample : 0;
	}
	if (past) {
		struct fw_totals *count = totals_here();

		if (count)
			count->past_deadline++;
	}
	account(&packet, &answer, slot, direction);
	return answer.verdict == FW_ACCEPT;
}

static __always_inline int filter_skb(struct __sk_buff *skb, bool network, __u32 direction)
{
	__u32 wanted = skb->len < HEADERS ? skb->len : HEADERS;

	if ((void *)(long)skb->data + wanted > (void *)(long)skb->data_end && bpf_skb_pull_data(skb, wanted))
		return TC_ACT_SHOT;
	return filter(skb, false, (void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, network, skb->ifindex,
		      direction) ?
		       TC_ACT_UNSPEC :
		       TC_ACT_SHOT;
}

SEC("xdp.frags")
int fw_xdp(struct xdp_md *xdp)
{
	return filter(xdp, true, (void *)(long)xdp->data, (void *)(long)xdp->data_end, bpf_xdp_get_buff_len(xdp), false,
		      xdp->ingress_ifindex, FW_INGRESS) ?
		       XDP_PASS :
		       XDP_DROP;
}

SEC("tc")
int fw_tc_ingress(struct __sk_buff *skb)
{
	return filter_skb(skb, false, FW_INGRESS);
}

SEC("tc")
int fw_tc_egress(struct __sk_buff *skb)
{
	return filter_skb(skb, false, FW_EGRESS);
}

SEC("tc")
int fw_l3_ingress(struct __sk_buff *skb)
{
	return filter_skb(skb, true, FW_INGRESS);
}

SEC("tc")
int fw_l3_egress(struct __sk_buff *skb)
{
	return filter_skb(skb, true, FW_EGRESS);
}

/* Judge a packet by a slot, without touching flows, counters, buckets or events. The frame follows a struct fw_probe, which
 * carries the question in and the answer out. */
SEC("xdp")
int fw_probe(struct xdp_md *xdp)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	struct fw_probe *probe = data;
	struct packet packet = {};
	struct answer answer = {};
	struct fw_slot *slot;
	__u32 epoch, wire, index, direction;
	bool past;

	if ((void *)(probe + 1) > end)
		return XDP_ABORTED;
	wire = end - (void *)(probe + 1);
	probe->done = 1;
	probe->parsed = probe->network ? parse(xdp, true, probe + 1, end, sizeof(*probe), wire, true, &packet) :
					 parse(xdp, true, probe + 1, end, sizeof(*probe), wire, false, &packet);
	if (probe->slot == FW_PROBE_ACTIVE) {
		epoch = epoch_in_force(&past);
		if (!epoch) {
			probe->verdict = FW_ACCEPT;
			probe->reason = FW_BY_OFF;
			probe->identity = FW_NO_RULE;
			probe->order = FW_NO_RULE;
			return XDP_PASS;
		}
		index = epoch & 1;
	} else {
		index = probe->slot & 1;
	}
	slot = slot_of(index);
	if (!slot)
		return XDP_ABORTED;
	direction = probe->direction & 1;
	switch (probe->parsed) {
	case FW_PARSED:
		classify(&packet, ASK(index, direction, probe->state, 1), probe->interfaces, &answer);
		break;
	case FW_ESSENTIAL:
		say(FW_ACCEPT, FW_BY_ESSENTIAL, &answer);
		break;
	case FW_TRUNCATED:
		say(FW_DROP, FW_BY_TRUNCATED, &answer);
		break;
	default:
		say(slot->defaults[direction] & 1, FW_BY_UNPARSED, &answer);
	}
	data = (void *)(long)xdp->data;
	end = (void *)(long)xdp->data_end;
	probe = data;
	if ((void *)(probe + 1) > end)
		return XDP_ABORTED;
	probe->epoch = slot->epoch;
	probe->identity = answer.identity;
	probe->order = answer.order;
	probe->verdict = answer.verdict;
	probe->reason = answer.reason;
	return XDP_PASS;
}

SEC("syscall")
int fw_clock(struct fw_clock *clock)
{
	clock->jiffies = bpf_jiffies64();
	clock->monotonic_ns = bpf_ktime_get_ns();
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
