/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Which rule a tuple meets first. Reads one slot and nothing that lives longer than it, but for the token buckets.
 * `classify` is the whole interface: another structure than this scan can take its place without its callers noticing.
 */
#ifndef LOOPBACK_CLASSIFY_H
#define LOOPBACK_CLASSIFY_H

#include "maps.h"
#include "parse.h"

/* What is asked of a slot, in one argument: the slot's index, the direction, the state, and whether no bucket may pay. */
#define ASK(index, direction, state, dry) ((index) & 1) | ((direction) & 1) << 1 | (dry) << 2 | (state) << 8
#define ASK_INDEX(ask) ((ask) & 1)
#define ASK_DIRECTION(ask) ((ask) >> 1 & 1)
#define ASK_DRY(ask) ((ask) >> 2 & 1)
#define ASK_STATE(ask) ((ask) >> 8 & 15)
#define LOOK_UP_INTERFACE (1ull << 63) /* a pattern bit that no policy uses */

struct answer {
	__u32 identity;
	__u32 order;
	__u32 sample;
	__u8 verdict;
	__u8 reason;
	__u8 pad[2];
};

struct scan {
	struct packet *packet;
	struct fw_slot *slot;
	struct fw_set_value *source_sets;
	struct fw_set_value *destination_sets;
	__u64 interfaces;
	__u32 first;
	__u32 found;
	__u8 state;
	__u8 family;
	__u8 dry;
};

/* The generic cell rate algorithm: one word per bucket says when it would be full again, so a compare-and-swap keeps it
 * exact over CPUs without a lock. A bucket that cannot be made (the table is full of younger ones) counts as full. */
static __always_inline bool within_limit(struct fw_rule *rule, struct packet *packet)
{
	struct fw_bucket_key key = {.identity = rule->identity};
	__u64 now = bpf_ktime_get_boot_ns(), first, *bucket;
	int i;

	if (rule->flags & FW_LIMIT_SOURCE) {
		key.source[0] = packet->source[0];
		key.source[1] = packet->source[1];
	}
	bucket = bpf_map_lookup_elem(&buckets, &key);
	if (!bucket) {
		first = now + rule->limit_interval;
		if (!bpf_map_update_elem(&buckets, &key, &first, BPF_NOEXIST))
			return true;
		bucket = bpf_map_lookup_elem(&buckets, &key);
		if (!bucket)
			return true;
	}
#pragma unroll
	for (i = 0; i < 4; i++) {
		__u64 was = *(volatile __u64 *)bucket;
		__u64 due = was > now ? was : now;

		if (due - now > rule->limit_tolerance)
			return false;
		if (__sync_val_compare_and_swap(bucket, was, due + rule->limit_interval) == was)
			return true;
	}
	return false;
}

static __always_inline bool in_set(struct fw_set_value *sets, __u16 number)
{
	return sets && sets->sets[(number >> 6) & (FW_SET_WORDS - 1)] >> (number & 63) & 1;
}

/* 1 when equal, and 1 when low <= value <= high: without a branch, as branches in every field of every rule would multiply into
 * more paths than the verifier walks. */
static __always_inline __u64 equal(__u64 a, __u64 b)
{
	return ((a ^ b) - 1) >> 63;
}

static __always_inline __u64 within(__u64 value, __u64 low, __u64 high)
{
	return ~(((value - low) | (high - value)) >> 63) & 1;
}

/* Short lists are filled up with copies of their first entry. */
static __always_inline bool matches(struct fw_rule *rule, struct scan *scan)
{
	struct packet *packet = scan->packet;
	__u64 hit, miss, i;

	if (!(rule->families & scan->family))
		return false;
	if (rule->protocol_count) {
		hit = 0;
#pragma unroll
		for (i = 0; i < FW_RULE_PROTOCOLS; i++)
			hit |= equal(rule->protocols[i], packet->protocol);
		if (!hit)
			return false;
	}
	if (rule->port_count) {
		hit = 0;
#pragma unroll
		for (i = 0; i < FW_RULE_PORTS; i++)
			hit |= within(packet->destination_port, rule->ports[i][0], rule->ports[i][1]);
		if (!(packet->flags & HAS_PORTS & hit))
			return false;
	}
	if (rule->source_port_count) {
		hit = 0;
#pragma unroll
		for (i = 0; i < FW_RULE_SOURCE_PORTS; i++)
			hit |= within(packet->source_port, rule->source_ports[i][0], rule->source_ports[i][1]);
		if (!(packet->flags & HAS_PORTS & hit))
			return false;
	}
	if (rule->icmp_count) {
		hit = 0;
#pragma unroll
		for (i = 0; i < FW_RULE_ICMP; i++)
			hit |= equal(rule->icmp[i][0], packet->icmp_type) &
			       (equal(rule->icmp[i][1], FW_ANY_CODE) | equal(rule->icmp[i][1], packet->icmp_code));
		if (!(packet->flags & HAS_ICMP && hit))
			return false;
	}
	miss = 0;
	if (rule->flags & FW_SOURCE_PREFIX)
		miss |= ((packet->source[0] ^ rule->source[0]) & rule->source_mask[0]) |
			((packet->source[1] ^ rule->source[1]) & rule->source_mask[1]);
	if (rule->flags & FW_DESTINATION_PREFIX)
		miss |= ((packet->destination[0] ^ rule->destination[0]) & rule->destination_mask[0]) |
			((packet->destination[1] ^ rule->destination[1]) & rule->destination_mask[1]);
	if (miss)
		return false;
	if (rule->states && !(rule->states & scan->state))
		return false;
	if (rule->flags & FW_INTERFACES && !(rule->interfaces & scan->interfaces))
		return false;
	if (rule->flags & FW_SOURCE_SET && !in_set(scan->source_sets, rule->source_set))
		return false;
	if (rule->flags & FW_DESTINATION_SET && !in_set(scan->destination_sets, rule->destination_set))
		return false;
	if (rule->flags & (FW_LIMIT_RULE | FW_LIMIT_SOURCE) && !scan->dry && !within_limit(rule, packet))
		return false;
	return true;
}

static long scan_step(__u32 i, struct scan *scan)
{
	__u32 index = (scan->first + i) & (FW_MAX_RULES - 1);

	if (!matches(&scan->slot->rules[index], scan))
		return 0;
	scan->found = index;
	return 1;
}

static __always_inline struct fw_slot *slot_of(__u32 index)
{
	__u32 zero = 0;
	void *inner = bpf_map_lookup_elem(&slots, &index);

	return inner ? bpf_map_lookup_elem(inner, &zero) : NULL;
}

/* A function of its own, so that its stack is given back before the scan. */
static __noinline int look_up_sets(struct packet *packet, __u32 index, struct scan *scan)
{
	void *trie;

	if (packet->family == 4) {
		struct fw_set_key4 key = {.length = 32};

		if (!(scan->slot->flags & FW_USES_SETS4))
			return 0;
		trie = bpf_map_lookup_elem(&sets4, &index);
		if (!trie)
			return 0;
		*(__u32 *)key.address = packet->source[1] >> 32;
		scan->source_sets = bpf_map_lookup_elem(trie, &key);
		*(__u32 *)key.address = packet->destination[1] >> 32;
		scan->destination_sets = bpf_map_lookup_elem(trie, &key);
	} else {
		struct fw_set_key6 key = {.length = 128};

		if (!(scan->slot->flags & FW_USES_SETS6))
			return 0;
		trie = bpf_map_lookup_elem(&sets6, &index);
		if (!trie)
			return 0;
		__builtin_memcpy(key.address, packet->source, 16);
		scan->source_sets = bpf_map_lookup_elem(trie, &key);
		__builtin_memcpy(key.address, packet->destination, 16);
		scan->destination_sets = bpf_map_lookup_elem(trie, &key);
	}
	return 0;
}

/* Not static: the verifier walks a global function once, whatever its callers know, and so it stays affordable. `ask` is
 * built by ASK; `patterns` are the interface's pattern bits, or LOOK_UP_INTERFACE. Returns 0. */
__noinline int classify(struct packet *packet, __u32 ask, __u64 patterns, struct answer *answer)
{
	__u32 index = ASK_INDEX(ask), direction = ASK_DIRECTION(ask);
	struct scan scan = {
		.interfaces = patterns,
		.found = FW_NO_RULE,
		.state = ASK_STATE(ask),
		.dry = ASK_DRY(ask),
	};
	struct fw_slot *slot;

	if (!packet || !answer)
		return 0;
	answer->identity = FW_NO_RULE;
	answer->order = FW_NO_RULE;
	answer->sample = 0;
	answer->verdict = FW_DROP;
	answer->reason = FW_BY_BROKEN;
	slot = slot_of(index);
	if (!slot)
		return 0;
	scan.packet = packet;
	scan.slot = slot;
	scan.first = slot->first[direction];
	scan.family = packet->family == 4 ? FW_IPV4 : FW_IPV6;
	if (patterns == LOOK_UP_INTERFACE) {
		scan.interfaces = 0;
		if (slot->flags & FW_USES_INTERFACES) {
			void *known = bpf_map_lookup_elem(&interfaces, &index);
			__u32 ifindex = packet->ifindex;
			__u64 *bits = known ? bpf_map_lookup_elem(known, &ifindex) : NULL;

			if (bits)
				scan.interfaces = *bits;
		}
	}
	look_up_sets(packet, index, &scan);
	bpf_loop(slot->count[direction], scan_step, &scan, 0);
	if (scan.found != FW_NO_RULE) {
		struct fw_rule *rule = &slot->rules[scan.found & (FW_MAX_RULES - 1)];

		answer->identity = rule->identity;
		answer->order = rule->order;
		answer->sample = rule->log_sample;
		answer->verdict = rule->action & 1;
		answer->reason = FW_BY_RULE;
		return 0;
	}
	answer->verdict = slot->defaults[direction] & 1;
	answer->sample = answer->verdict == FW_DROP ? slot->default_sample : 0;
	answer->reason = FW_BY_DEFAULT;
	return 0;
}

#endif
