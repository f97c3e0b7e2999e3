/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The firewall with programs beside it that use its connection table as no packet could: a million times a second, and racing. */
#include "../../bpf/programs/firewall.bpf.c"

struct control {
	__u64 turn; /* the next packet's number */
	__u64 count;
	__u64 wrong;
	__u64 careless; /* write to flows as if nobody else did */
	__u64 epoch;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control);
} control SEC(".maps");

static __always_inline struct control *controls(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

/* A packet of its own for each number: UDP to port 53. */
static __always_inline void make(struct packet *packet, __u64 number)
{
	number *= 0x9e3779b97f4a7c15ull;
	packet->source[1] = 0xffffull << 32 | (__u32)(number >> 16);
	packet->destination[1] = 0xffffull << 32 | 0x0a4d0001;
	packet->source_port = number >> 48;
	packet->destination_port = 53;
	packet->protocol = PROTO_UDP;
	packet->family = 4;
	packet->flags = HAS_PORTS;
	packet->length = 60;
}

/* The frame that is given, from another sender each time, through the whole XDP program. */
SEC("xdp.frags")
int flood(struct xdp_md *xdp)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	struct control *mine = controls();
	__u64 number;

	if (!mine || data + 42 > end)
		return XDP_ABORTED;
	number = __sync_fetch_and_add(&mine->turn, 1) * 0x9e3779b97f4a7c15ull;
	*(__u32 *)(data + 26) = number >> 16;
	*(__u16 *)(data + 34) = number >> 48;
	return filter(xdp, true, data, end, end - data, false, xdp->ingress_ifindex, FW_INGRESS) ? XDP_PASS : XDP_DROP;
}

/* Begin a flow, and have it proven. */
SEC("xdp")
int fill(struct xdp_md *xdp)
{
	struct control *mine = controls();
	struct flow_view view = {};
	struct packet packet = {};
	struct fw_flow *flow;
	__u32 place;

	if (!mine)
		return XDP_ABORTED;
	make(&packet, mine->turn++);
	flow_remember(&packet, mine->epoch, FW_INGRESS, FW_NO_RULE, false);
	place = flow_find(&packet, FW_INGRESS, &view);
	flow = place ? flow_at(place - 1) : NULL;
	if (flow && flow_lock(flow, view.sequence)) {
		flow->proof = FW_PROVEN;
		flow_unlock(flow, view.sequence);
		mine->count++;
	}
	return XDP_PASS;
}

/* Count the flows that are found alive. */
SEC("xdp")
int recount(struct xdp_md *xdp)
{
	struct control *mine = controls();
	struct flow_view view = {};
	struct packet packet = {};

	if (!mine)
		return XDP_ABORTED;
	make(&packet, mine->turn++);
	if (flow_find(&packet, FW_INGRESS, &view) && view.alive)
		mine->count++;
	return XDP_PASS;
}

/*
 * One of 256 packets, at random. Those to port 53 the policy allows, those to port 9 not; of both there are flows from an older
 * policy. Either a flow is remembered, which pushes out others, or a packet is judged, or a flow is found, another one remembered,
 * and the first one allowed by the policy in force.
 */
SEC("xdp")
int race(struct xdp_md *xdp)
{
	__u32 dice = bpf_get_prandom_u32(), place;
	struct control *mine = controls();
	struct flow_view view = {};
	struct packet packet = {};
	struct answer answer = {};
	bool allowed = dice & 1;
	struct fw_flow *flow;

	if (!mine)
		return XDP_ABORTED;
	make(&packet, dice & 0xff);
	packet.destination_port = allowed ? 53 : 9;
	if (dice & 0x300) {
		if (dice & 0x100) {
			judge(&packet, mine->epoch & 1, FW_INGRESS, &answer);
			if (answer.verdict != allowed)
				__sync_fetch_and_add(&mine->wrong, 1);
			__sync_fetch_and_add(&mine->count, 1);
		} else {
			flow_remember(&packet, mine->epoch - 2, FW_INGRESS, FW_NO_RULE, false);
		}
		return XDP_PASS;
	}
	place = flow_find(&packet, FW_INGRESS, &view);
	flow = place && allowed ? flow_at(place - 1) : NULL;
	make(&packet, dice >> 16 & 0xfe);
	packet.destination_port = 9;
	flow_remember(&packet, mine->epoch - 2, FW_INGRESS, FW_NO_RULE, false);
	if (flow && (mine->careless || flow_lock(flow, view.sequence))) {
		flow->sides[FW_INGRESS].allowed = mine->epoch;
		if (!mine->careless)
			flow_unlock(flow, view.sequence);
	}
	return XDP_PASS;
}
