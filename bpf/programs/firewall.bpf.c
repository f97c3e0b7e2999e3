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

#define ADOPTING 16 /* beside a state: a TCP connection that may have been there before the firewall */
#define LOOPBACK 1 /* the number of lo, in every namespace */
#define HEADERS 256 /* bytes made linear before a TC program reads headers */

/* The epoch in force: one read of the word, and of the clock only while a commit waits for its confirmation. */
static __always_inline __u32 epoch_in_force(__u8 *past)
{
	__u32 zero = 0, deadline, epoch;
	__u64 *at = bpf_map_lookup_elem(&active, &zero), word;

	*past = 0;
	if (!at)
		return 0;
	word = *(volatile __u64 *)at;
	deadline = (__u32)word;
	epoch = (word >> 32) & 0xffff;
	if (deadline && tick_now() >= deadline) {
		*past = 1;
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

static __noinline int report(struct packet *packet, struct answer *answer, __u32 epoch, __u32 direction, __u32 why)
{
	struct fw_event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);

	if (!event) {
		struct fw_totals *count = totals_here();

		if (count)
			count->events_lost++;
		return 0;
	}
	event->boot_ns = bpf_ktime_get_boot_ns();
	event->source[0] = bpf_cpu_to_be64(packet->source[0]);
	event->source[1] = bpf_cpu_to_be64(packet->source[1]);
	event->destination[0] = bpf_cpu_to_be64(packet->destination[0]);
	event->destination[1] = bpf_cpu_to_be64(packet->destination[1]);
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
	event->why = why;
	event->packet = packet->flags;
	event->asked = answer->asked;
	event->pad = 0;
	event->origin = answer->origin;
	event->pad2 = 0;
	bpf_ringbuf_submit(event, 0);
	return 0;
}

static __always_inline __u32 direction_of(struct packet *packet)
{
	return *(volatile __u32 *)&packet->direction & 1;
}

/* Count the packet for its rule or reason, and report one in `sample`: the first, then every N-th of this CPU. For the shadow, one
 * in N of those likewise; user space asks the staged slot about them, so that no packet is judged twice on its way. */
static __always_inline void account(struct packet *packet, struct answer *answer, struct fw_slot *slot)
{
	__u32 direction = direction_of(packet);
	struct fw_totals *count = totals_here();
	__u32 why = 0, shadow = *(volatile __u16 *)&slot->shadow;
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
		why = FW_LOGGED;
	if (shadow && seen % shadow == 0)
		why |= FW_SHADOWED;
	if (why)
		report(packet, answer, slot->epoch, direction, why);
}

/* A packet that no flow speaks for. */
static __noinline int judge_new(struct packet *packet, struct fw_slot *slot, __u32 direction, __u32 state,
				struct answer *answer)
{
	struct fw_config *times = settings();
	bool flow;

	if (packet->protocol == PROTO_TCP && state == FW_INVALID && times && times->adopt_until &&
	    tick_now() < times->adopt_until)
		state = FW_NEW | ADOPTING;
	/* who was there before began no flow now, and pays for none */
	classify(packet, ASK(slot->epoch, direction, state, state / ADOPTING), LOOK_UP_INTERFACE, answer);
	if (packet->flags & LATER_FRAGMENT)
		return 0;
	/* A connection begins with its SYN: else what was revoked came back by its other end's next segment. */
	flow = state != FW_INVALID;
	if (packet->flags & HAS_ICMP)
		flow = packet->flags & ECHO && !(packet->flags & ECHO_REPLY);
	if (answer->verdict == FW_ACCEPT) {
		if (flow)
			flow_remember(packet, slot->epoch, direction, answer->identity, false);
		return 0;
	}
	if (state & ADOPTING) {
		/* A TCP connection that was there before the firewall: it may be the answer to one that we began. There is
		 * no stack for a second answer, so the first one is asked for again where it is not. */
		turn_round(packet);
		classify(packet, ASK(slot->epoch, direction ^ 1, FW_NEW, 1), LOOK_UP_INTERFACE, answer);
		turn_round(packet);
		if (answer->verdict == FW_ACCEPT) {
			answer->sample = 0;
			answer->reason = FW_BY_ADOPTION;
			flow_remember(packet, slot->epoch, direction ^ 1, answer->identity, true);
		} else {
			classify(packet, ASK(slot->epoch, direction, state, 1), LOOK_UP_INTERFACE, answer);
		}
	}
	return 0;
}

/* The verdict on a packet that could be read, by slot `index`. Global for the verifier's sake, like classify. Returns 0. */
__noinline int judge(struct packet *packet, __u32 index, __u32 direction, struct answer *answer)
{
	struct fw_config *times = settings();
	__u32 state = FW_NEW;
	struct flow_view view = {};
	struct fw_flow *flow = NULL;
	struct fw_slot *slot;
	bool opening;

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
	if (!opening || slot->flags & FW_USES_LIMITS) {
		__u32 place = flow_find(packet, direction, &view);

		flow = place ? flow_at(place - 1) : NULL;
		/* each SYN is asked for, but not once more on the device above that on which it was let in just now, and paid */
		if (opening && (view.reply || view.ifindex == packet->ifindex || view.stage != FW_FLOW_OPENING ||
				view.allowed != slot->epoch))
			flow = NULL;
	}
	/* The identifier of an echo is in both directions: only its type says who asks. And what a host says to itself is answered
	 * on the loopback, never from a wire. */
	if (flow && view.alive && !(packet->flags & ECHO && view.reply != !!(packet->flags & ECHO_REPLY)) &&
	    !(view.reply && view.ifindex == LOOPBACK && packet->ifindex != LOOPBACK)) {
		if (!view.allowed) {
			/* forwarded, or looped back: this hook sees the original for the first time */
			judge_new(packet, slot, direction, FW_NEW, answer);
			return 0;
		}
		if (!view.reply && slot->flags & FW_USES_INTERFACES && view.ifindex != packet->ifindex) {
			/* Rules name devices, and what was allowed on one is not on another: a bridge above its
			 * port, or somebody who uses a neighbour's address elsewhere. */
			classify(packet, ASK(slot->epoch, direction, FW_NEW, 1), LOOK_UP_INTERFACE, answer);
			if (answer->verdict == FW_DROP)
				return 0;
		}
		if (flow_allowed(flow, &view, packet, slot, view.reply ? view.direction : direction, true, answer))
			flow_touch(flow, &view, packet, times);
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

	packet.direction = direction;
	epoch = epoch_in_force(&answer.past);
	if (!epoch)
		return true;
	slot = slot_of(epoch & 1);
	if (!slot || (slot->epoch & 0xffff) != epoch) {
		/* Never seen, as staging waits for packets under way; if it were, nothing may pass by it. */
		struct fw_totals *count = totals_here();

		if (count)
			count->packets[direction_of(&packet)][FW_BY_BROKEN][FW_DROP]++;
		return false;
	}
	packet.ifindex = ifindex;
	switch (parse(context, xdp, data, end, 0, wire, network, &packet)) {
	case FW_PARSED:
		if (packet.inner && (xdp ? related_xdp(context, &packet, slot, &answer) :
					   related_skb(context, &packet, slot, &answer)))
			break;
		judge(&packet, slot->epoch, direction_of(&packet), &answer); /* not `epoch`: no register is kept for it */
		if (answer.verdict == FW_ACCEPT && packet.flags & FIRST_FRAGMENT)
			fragment_remember(&packet, direction_of(&packet), slot);
		break;
	case FW_ESSENTIAL:
		say(FW_ACCEPT, FW_BY_ESSENTIAL, &answer);
		break;
	case FW_TRUNCATED:
		say(FW_DROP, FW_BY_TRUNCATED, &answer);
		answer.sample = slot->default_sample;
		break;
	default:
		say(slot->defaults[direction_of(&packet)] & 1, FW_BY_UNPARSED, &answer);
		answer.sample = answer.verdict == FW_DROP ? slot->default_sample : 0;
	}
	if (answer.past) {
		struct fw_totals *count = totals_here();

		if (count)
			count->past_deadline++;
	}
	account(&packet, &answer, slot);
	return answer.verdict == FW_ACCEPT;
}

SEC("xdp.frags")
int fw_xdp(struct xdp_md *xdp)
{
	return filter(xdp, true, (void *)(long)xdp->data, (void *)(long)xdp->data_end, bpf_xdp_get_buff_len(xdp), false,
		      xdp->ingress_ifindex, FW_INGRESS) ?
		       XDP_PASS :
		       XDP_DROP;
}

/* The entries for TC differ in two bits only, so the verifier walks what they share once: it is nearly all of a start. */
#define EGRESS 1
#define NO_ETHERNET 2

static __always_inline int enter(struct __sk_buff *skb, __u32 how)
{
	skb->cb[0] = how; /* what TC programs hand on to each other; nobody else reads it between here and there */
	bpf_tail_call(skb, &core, 0);
	return TC_ACT_SHOT; /* nobody is there to judge it: never seen, and nothing may pass by it */
}

SEC("tc")
int fw_core(struct __sk_buff *skb)
{
	__u32 wanted = skb->len < HEADERS ? skb->len : HEADERS, how = skb->cb[0];

	skb->cb[0] = 0;
	if ((void *)(long)skb->data + wanted > (void *)(long)skb->data_end && bpf_skb_pull_data(skb, wanted))
		return TC_ACT_SHOT;
	return filter(skb, false, (void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, how & NO_ETHERNET,
		      skb->ifindex, how & EGRESS ? FW_EGRESS : FW_INGRESS) ?
		       TC_ACT_UNSPEC :
		       TC_ACT_SHOT;
}

SEC("tc")
int fw_tc_ingress(struct __sk_buff *skb)
{
	return enter(skb, 0);
}

SEC("tc")
int fw_tc_egress(struct __sk_buff *skb)
{
	return enter(skb, EGRESS);
}

SEC("tc")
int fw_l3_ingress(struct __sk_buff *skb)
{
	return enter(skb, NO_ETHERNET);
}

SEC("tc")
int fw_l3_egress(struct __sk_buff *skb)
{
	return enter(skb, NO_ETHERNET | EGRESS);
}

/* Judge a packet by a slot, without touching flows, counters, buckets or events. The frame follows a struct fw_probe, which
 * carries the question in and the answer out. */
SEC("xdp.frags")
int fw_probe(struct xdp_md *xdp)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	struct fw_probe *probe = data;
	struct packet packet = {};
	struct answer answer = {};
	struct fw_slot *slot;
	__u32 epoch, wire, index, direction;
	__u8 past;

	if ((void *)(probe + 1) > end)
		return XDP_ABORTED;
	wire = bpf_xdp_get_buff_len(xdp) - sizeof(*probe); /* of a long frame only the beginning is at `data` */
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
