/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Which rule a packet meets first. Reads one slot and nothing that lives longer than it, but for the token buckets.
 * `classify` is the whole interface. The structure is a pruned tuple space; docs/adr/0019-classification.md says why.
 */
#ifndef LOOPBACK_CLASSIFY_H
#define LOOPBACK_CLASSIFY_H

#include "fields.h"
#include "sets.h"
#include "slot.h"

#define MAX_STEPS (1 << 22) /* of one search; none comes near, as every entry and tuple is met once */
#define SCAN 4 /* entries per step; the verifier walks each, and few chains are longer */
#define LOOK_UP_INTERFACE (1ull << 63) /* a pattern bit that no policy uses */

struct answer {
	__u32 identity;
	__u32 order;
	__u32 sample;
	__u8 verdict;
	__u8 reason;
	__u8 asked; /* fw_asked, by a flow */
	__u8 past; /* a deadline has passed; here, so that no register is kept for it */
	__u32 origin; /* by a flow: the device of its original packet */
};

/* A search on its way through one classifier: along a chain, or on to the next tuple that can hold an entry. */
struct search {
	struct packet *packet;
	__u8 *half; /* the slot's half of the arena */
	struct fw_classifier *classifier;
	__u64 transport; /* protocol << 32 | source port << 16 | destination port, or ICMP type and code */
	__u64 interfaces;
	__u64 candidates; /* tuples still to be asked, best first from bit 0 */
	__u32 entry; /* of the chain, + 1; 0: none */
	__u32 best; /* order of the best match so far */
	__u32 identity;
	__u32 ask;
	__u32 classes; /* of the source, and << 8 of the destination */
	__u8 accepts;
};

/* The generic cell rate algorithm: one word per bucket says when it would be full again, so a compare-and-swap keeps it
 * exact over CPUs without a lock. A bucket that cannot be made (the table is full of younger ones) counts as full. */
static __always_inline bool within_limit(struct fw_rule *rule, __u32 identity, struct packet *packet)
{
	struct fw_bucket_key key = {.identity = identity};
	__u64 now = bpf_ktime_get_boot_ns(), first, *bucket;
	int i;

	if (rule->flags & FW_LIMIT_SOURCE) {
		/* in IPv6 a host has a /64 to itself, and takes another address of it whenever it likes */
		key.source[0] = packet->source[0];
		key.source[1] = packet->family == 4 ? packet->source[1] : 0;
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

/* Whether a rule's conditions hold. The bucket is asked last: only a packet that would match pays. */
__noinline int conditions_hold(struct packet *packet, __u32 ask, __u64 patterns, __u32 order, __u32 identity)
{
	struct fw_slot *slot;
	struct fw_rule *rule;
	__u8 *half;

	if (!packet)
		return 0;
	half = arena_of(ASK_INDEX(ask));
	if (!half)
		return 0;
	slot = (struct fw_slot *)half;
	rule = at(half, slot->rules + order * (__u64)sizeof(*rule), HALF_MASK);
	if (rule->states && !(rule->states & ASK_STATE(ask)))
		return 0;
	if (rule->flags & FW_INTERFACES && !(rule->interfaces & patterns))
		return 0;
	if (rule->flags & (FW_LIMIT_RULE | FW_LIMIT_SOURCE) && !ASK_DRY(ask) && !within_limit(rule, identity, packet))
		return 0;
	return 1;
}

/* What an entry says of the transport header: 0 when it holds. Without branches, as each would double the paths that the
 * verifier walks; a 64-bit difference of two small numbers is negative when its top bit is set. */
static __always_inline __u64 other_transport(struct fw_match *match, __u64 transport, __u64 flags)
{
	__u64 port = transport & 0xffff, source_port = transport >> 16 & 0xffff;
	__u64 below = (port - match->ports[0]) | (match->ports[1] - port) | (source_port - match->source_ports[0]) |
		      (match->source_ports[1] - source_port);

	return below >> 63 | (match->needs & ~flags);
}

/* The sets and other conditions of an entry: no call for what it has not, as each costs. */
static __always_inline bool more_holds(struct search *search, struct fw_match *match, bool four)
{
	struct packet *packet = search->packet;
	__u32 index = ASK_INDEX(search->ask);

	if (match->source_set && !(four ? in_set4(index, match->source_set, packet->source[1]) :
					  in_set6(index, match->source_set, packet, 0)))
		return false;
	if (match->destination_set && !(four ? in_set4(index, match->destination_set, packet->destination[1]) :
					       in_set6(index, match->destination_set, packet, 1)))
		return false;
	return !(match->flags & FW_CONDITIONS) ||
	       conditions_hold(packet, search->ask, search->interfaces, match->order, match->identity);
}

static __always_inline __u64 spread(__u64 a)
{
	a *= 0xff51afd7ed558ccdull;
	return a ^ a >> 32;
}

static __always_inline __u64 scramble(__u64 a, __u64 b)
{
	a = (a ^ b >> 29 ^ b) * 0x9e3779b97f4a7c15ull;
	return a ^ a >> 32;
}

/* The chain that a hash leads to, as its first entry + 1; 0 is none. */
static __always_inline __u32 chain_of(__u8 *half, struct fw_classifier *classifier, __u64 hash, __u64 mask)
{
	__u32 head = *(__u32 *)at(half, classifier->heads + ((hash & classifier->heads_mask) << 2), mask);

	return !(head >> 24) || head >> 24 == (hash >> 56 | 1) ? head & FW_ENTRY_MASK : 0;
}

/* Whether a search has nowhere to go on to. */
static __always_inline long is_over(struct search *search)
{
	return nothing(search->candidates | search->entry);
}

/* A step's end at an entry, the last that it looked at: take what matches, else go on behind it. `other` is 0 for a match. */
static __always_inline long met(struct search *search, struct fw_match *match, __u32 entry, __u64 other, bool four)
{
	search->entry = (entry + 1) & FW_ENTRY_MASK & ((match->flags & FW_LAST) - 1);
	if (!other && match->order < search->best &&
	    (!(match->flags & FW_MORE) || more_holds(search, match, four))) {
		search->best = match->order;
		search->identity = match->identity;
		search->accepts = match->flags;
		search->entry = 0;
	}
	/* a call less: each costs 10 ns where returns are not predicted (AMD's "Safe RET") */
	return is_over(search);
}

/*
 * One step of a search: enter the next tuple's chain, unless one is under way, and go along it for up to SCAN entries. The loop
 * in here is what the verifier walks entry by entry; bpf_loop around it may go on for as long as there is something left.
 */
static long step4(__u32 i, struct search *search)
{
	struct fw_classifier *classifier = search->classifier;
	struct packet *packet = search->packet;
	__u64 transport = search->transport, mask = HALF_MASK;
	struct fw_entry4 *one;
	struct fw_match *match;
	__u32 source = packet->source[1], destination = packet->destination[1], entry = search->entry;
	__u8 *half = search->half;
	__u64 other = 1;
	int j;

	if (!entry) {
		__u64 candidates = search->candidates;
		struct fw_tuple4 *tuple;

		if (!candidates)
			return 1;
		tuple = at(half, classifier->tuple + lowest_bit(candidates) * sizeof(*tuple), mask);
		if (tuple->best >= search->best)
			return 1; /* they are sorted: no later one is better */
		search->candidates = candidates & (candidates - 1);
		entry = chain_of(half, classifier,
				 scramble(spread((__u64)(source & tuple->source_mask) << 32 |
						 (destination & tuple->destination_mask) |
						 (search->classes & tuple->class_mask)),
					  (transport & tuple->transport_mask) + ((__u64)tuple->seed << 40)),
				 mask);
		if (!entry)
			return is_over(search); /* `search->entry` is 0 here */
	}
	entry &= FW_ENTRY_MASK; /* one range, whichever way it came, for the verifier to walk once */
	one = at(half, classifier->entries + (entry - 1) * sizeof(*one), mask);
	if (one->match.order >= search->best) {
		search->entry = 0;
		return is_over(search);
	}
	/* up to the first that matches or the last of the chain; beyond the end of the half there is room for so many */
#pragma clang loop unroll(disable)
	for (j = 0; j < SCAN; j++, one++) {
		match = &one->match;
		other = (__u64)(source ^ one->source) >> (match->source_shift & 63) |
			(__u64)(destination ^ one->destination) >> (match->destination_shift & 63) |
			(((transport >> 32) ^ match->protocol) & match->protocol_mask);
		if (!other)
			other = other_transport(match, transport, packet->flags);
		if (!other || match->flags & FW_LAST)
			break;
	}
	if (j == SCAN) {
		search->entry = (entry + SCAN) & FW_ENTRY_MASK;
		return 0;
	}
	/* found anew by its number, so that the verifier sees one way on from here and not SCAN of them */
	entry = (entry + j) & FW_ENTRY_MASK;
	one = at(half, classifier->entries + (entry - 1) * sizeof(*one), mask);
	match = &one->match;
	return met(search, match, entry, other, true);
}

/* The bits of two addresses that differ within the first `length`. A shift by 64 is none: two halves of it make it one. */
static __always_inline __u64 differ6(const __u64 *a, const __u64 *b, __u64 length)
{
	__s64 over = length - 64, under = over >> 63; /* all bits when it is less than 64: no branch, as in `other_transport` */
	__u64 upper = -over & under, lower = 64 - (over & ~under);

	return (a[0] ^ b[0]) >> upper / 2 >> (upper + 1) / 2 | (a[1] ^ b[1]) >> lower / 2 >> (lower + 1) / 2;
}

static long step6(__u32 i, struct search *search)
{
	struct fw_classifier *classifier = search->classifier;
	struct packet *packet = search->packet;
	__u64 transport = search->transport, mask = HALF_MASK;
	struct fw_entry6 *one;
	struct fw_match *match;
	__u32 entry = search->entry;
	__u8 *half = search->half;
	__u64 other = 1;
	int j;

	if (!entry) {
		__u64 candidates = search->candidates, hash;
		struct fw_tuple6 *tuple;

		if (!candidates)
			return 1;
		tuple = at(half, classifier->tuple + lowest_bit(candidates) * sizeof(*tuple), mask);
		if (tuple->best >= search->best)
			return 1;
		search->candidates = candidates & (candidates - 1);
		hash = scramble(spread(packet->source[0] & tuple->source_mask[0]),
				packet->source[1] & tuple->source_mask[1]);
		hash = scramble(hash, packet->destination[0] & tuple->destination_mask[0]);
		hash = scramble(hash, (packet->destination[1] & tuple->destination_mask[1]) |
					      (search->classes & tuple->class_mask));
		hash = scramble(hash, (transport & tuple->transport_mask) + ((__u64)tuple->seed << 40));
		entry = chain_of(half, classifier, hash, mask);
		if (!entry)
			return is_over(search); /* `search->entry` is 0 here */
	}
	entry &= FW_ENTRY_MASK; /* one range, whichever way it came, for the verifier to walk once */
	search->entry = entry;
	one = at(half, classifier->entries + (entry - 1) * sizeof(*one), mask);
	if (one->match.order >= search->best) {
		search->entry = 0;
		return is_over(search);
	}
	/* up to the first that matches or the last of the chain; beyond the end of the half there is room for so many */
#pragma clang loop unroll(disable)
	for (j = 0; j < SCAN; j++, one++) {
		asm volatile("" ::: "memory"); /* read the packet anew: there is no stack to keep it */
		match = &one->match;
		other = differ6(search->packet->source, one->source, match->source_shift) |
			differ6(search->packet->destination, one->destination, match->destination_shift) |
			(((search->transport >> 32) ^ match->protocol) & match->protocol_mask);
		if (!other)
			other = other_transport(match, search->transport, search->packet->flags);
		if (!other || match->flags & FW_LAST)
			break;
	}
	entry = search->entry;
	if (j == SCAN) {
		search->entry = (entry + SCAN) & FW_ENTRY_MASK;
		return 0;
	}
	/* found anew by its number, so that the verifier sees one way on from here and not SCAN of them */
	entry = (entry + j) & FW_ENTRY_MASK;
	one = at(search->half, search->classifier->entries + (entry - 1) * sizeof(*one), HALF_MASK);
	match = &one->match;
	return met(search, match, entry, other, false);
}

/* The class of an address by its first byte. Masked as a whole: beyond the largest half the verifier lets nothing be added. */
static __always_inline __u32 class_at(__u8 *half, __u64 classes, __u64 first)
{
	return *(__u8 *)at(half, classes + (first & 0xff), HALF_MASK);
}

/* `ask` is built by ASK; `patterns` are the interface's pattern bits, or LOOK_UP_INTERFACE. Returns 0. */
__noinline int classify(struct packet *packet, __u32 ask, __u64 patterns, struct answer *answer)
{
	__u32 index = ASK_INDEX(ask), direction = ASK_DIRECTION(ask);
	struct search search = {
		.ask = ask,
		.interfaces = patterns,
		.best = FW_NO_RULE,
	};
	struct fw_slot *slot;
	bool four;

	if (!packet || !answer)
		return 0;
	answer->identity = FW_NO_RULE;
	answer->order = FW_NO_RULE;
	answer->sample = 0;
	answer->verdict = FW_DROP;
	answer->reason = FW_BY_BROKEN;
	search.half = arena_of(index);
	if (!search.half)
		return 0;
	slot = (struct fw_slot *)search.half;
	if (patterns == LOOK_UP_INTERFACE) {
		search.interfaces = 0;
		if (slot->flags & FW_USES_INTERFACES) {
			void *known = bpf_map_lookup_elem(&interfaces, &index);
			__u32 ifindex = packet->ifindex;
			__u64 *bits = known ? bpf_map_lookup_elem(known, &ifindex) : NULL;

			if (bits)
				search.interfaces = *bits;
		}
	}
	four = packet->family == 4;
	search.packet = packet;
	search.transport = transport_of(packet);
	search.classifier = &slot->classifiers[direction][four ? 0 : 1];
	search.entry = search.classifier->first; /* from memory: the verifier would count on from a constant */
	if (search.classifier->tuples) {
		__u64 classes = search.classifier->classes;

		if (four) {
			search.classes = class_at(search.half, classes, packet->source[1] >> 24) |
					 class_at(search.half, classes + 256, packet->destination[1] >> 24) << 8;
			search.candidates = candidates4(packet, search.transport, ask);
		} else {
			search.classes = class_at(search.half, classes, packet->source[0] >> 56) |
					 class_at(search.half, classes + 256, packet->destination[0] >> 56) << 8;
			search.candidates = candidates6(packet, search.transport, ask);
		}
	}
	/* Two calls that the compiler must not make one: the kernel inlines a loop only where it knows its body (5.19). What keeps
	 * them apart is an instruction, as some clangs give an empty one line information that the kernel refuses. */
	if (four) {
		bpf_loop(MAX_STEPS, step4, &search, 0);
		asm volatile("r0 = 4" ::: "memory", "r0");
	} else {
		bpf_loop(MAX_STEPS, step6, &search, 0);
		asm volatile("r0 = 6" ::: "memory", "r0");
	}
	if (search.best != FW_NO_RULE) {
		answer->identity = search.identity;
		answer->order = search.best;
		if (search.accepts & FW_SAMPLES) {
			struct fw_rule *rule =
				at(search.half, slot->rules + search.best * (__u64)sizeof(*rule), HALF_MASK);

			answer->sample = rule->log_sample;
		}
		answer->verdict = search.accepts & FW_ACCEPTS ? FW_ACCEPT : FW_DROP;
		answer->reason = FW_BY_RULE;
		return 0;
	}
	answer->verdict = slot->defaults[direction] & 1;
	answer->sample = answer->verdict == FW_DROP ? slot->default_sample : 0;
	answer->reason = FW_BY_DEFAULT;
	return 0;
}

#endif
