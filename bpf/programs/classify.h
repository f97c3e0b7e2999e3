/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Which rule a packet meets first. Reads one slot and nothing that lives longer than it, but for the token buckets.
 * `classify` is the whole interface. The structure is a pruned tuple space; docs/adr/0019-classification.md says why.
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

static __always_inline __u8 *arena_of(__u32 index)
{
	__u32 zero = 0;
	__u8 *whole = bpf_map_lookup_elem(&arena, &zero);

	return whole ? whole + (sizes.half & -(__u64)(index & 1)) : NULL; /* Linux 6.1 knows no bounds of a product */
}

static __always_inline struct fw_slot *slot_of(__u32 index)
{
	return (struct fw_slot *)arena_of(index);
}

/* The mask of offsets into a half. A constant to the verifier, so each function reads it for itself instead of being told. */
#define HALF_MASK (sizes.half - 1)

/* The place of an offset, for structures of up to FW_SLACK bytes. */
static __always_inline void *at(__u8 *half, __u64 offset, __u64 mask)
{
	return half + (offset & mask);
}

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

/* 1 when a < b, as numbers without sign and without a branch, which each step of a search would multiply. */
static __always_inline __u64 less(__u64 a, __u64 b)
{
	return ((~a & b) | ((~a | b) & (a - b))) >> 63;
}

static __always_inline struct fw_set *set_of(__u8 *half, __u64 number, __u64 six)
{
	return at(half, ((struct fw_slot *)half)->sets + (number * 2 + six) * sizeof(struct fw_set), HALF_MASK);
}

/* Whether an address is in a set. Global functions, here and below: the verifier walks each once, with all that a caller could
 * pass. The search keeps what is not above the address before `place`. */
__noinline int in_set4(__u32 index, __u32 number, __u32 address)
{
	__u8 *half = arena_of(index);
	__u64 place, count;
	struct fw_set *set;
	__u32 *root;
	int i;

	if (!half)
		return 0;
	set = set_of(half, number, 0);
	if (set->narrow) {
		__u32 block = address >> (set->filter_shift & 31);
		__u32 *word = at(half, set->filter + ((__u64)block >> 5 << 2), HALF_MASK);

		if (!(*word >> (block & 31) & 1))
			return 0;
	}
	root = at(half, set->root + ((__u64)address >> (set->shift & 63) << 2), HALF_MASK);
	place = root[0];
	count = root[1] - place;
	/* what is left of the changes there is narrowed down by half, without a branch that could be predicted wrongly */
#pragma clang loop unroll(disable)
	for (i = 0; i < FW_SET_STEPS && count & 0xffffffff; i++) {
		__u64 middle = (count + 1) >> 1, nth = place + middle - 1, after;

		if (set->narrow)
			after = less(address & 0xffff, *(__u16 *)at(half, set->changes + (nth << 1), HALF_MASK));
		else
			after = less(address, *(__u32 *)at(half, set->changes + (nth << 2), HALF_MASK));
		place += middle & (after - 1);
		count = middle - 1 + ((count + 1 - 2 * middle) & (after - 1));
	}
	return place & 1;
}

__noinline int in_set6(__u32 index, __u32 number, struct packet *packet, __u32 destination)
{
	__u8 *half = arena_of(index);
	__u64 place, count, upper, lower, start;
	struct fw_set *set;
	__u32 *root;
	int i;

	if (!packet || !half)
		return 0;
	set = set_of(half, number, 1);
	upper = destination ? packet->destination[0] : packet->source[0];
	lower = destination ? packet->destination[1] : packet->source[1];
	start = upper < set->base ? 0 : ((upper - set->base) >> (set->shift & 63)) + 1;
	if (start > set->limit)
		start = set->limit;
	root = at(half, set->root + (start << 2), HALF_MASK);
	place = root[0];
	count = root[1] - place;
#pragma clang loop unroll(disable)
	for (i = 0; i < FW_SET_STEPS && count & 0xffffffff; i++) {
		__u64 middle = (count + 1) >> 1;
		__u64 *change = at(half, set->changes + ((place + middle - 1) << 4), HALF_MASK);
		__u64 after = less(upper, change[0]) | (~less(change[0], upper) & less(lower, change[1]) & 1);

		place += middle & (after - 1);
		count = middle - 1 + ((count + 1 - 2 * middle) & (after - 1));
	}
	return place & 1;
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

/* The lowest bit that is set: there is no instruction for it. A de Bruijn sequence puts each power of two at its own place. */
static const __u8 bit_of[64] = {
	0,  1,	2,  53, 3,  7,	54, 27, 4,  38, 41, 8,	34, 55, 48, 28, 62, 5,	39, 46, 44, 42,
	22, 9,	24, 35, 59, 56, 49, 18, 29, 11, 63, 52, 6,  26, 37, 40, 33, 47, 61, 45, 43, 21,
	23, 58, 17, 10, 51, 25, 36, 32, 60, 20, 57, 16, 50, 31, 19, 15, 30, 14, 13, 12,
};

static __always_inline __u32 lowest_bit(__u64 word)
{
	return bit_of[(word & -word) * 0x022fdd63cc95386dull >> 58];
}

/* The chain that a hash leads to, as its first entry + 1; 0 is none. */
static __always_inline __u32 chain_of(__u8 *half, struct fw_classifier *classifier, __u64 hash, __u64 mask)
{
	__u32 head = *(__u32 *)at(half, classifier->heads + ((hash & classifier->heads_mask) << 2), mask);

	return !(head >> 24) || head >> 24 == (hash >> 56 | 1) ? head & FW_ENTRY_MASK : 0;
}

/* 1 when no bit is set, without a branch. */
static __always_inline __u64 nothing(__u64 bits)
{
	asm volatile("" : "+r"(bits)); /* or the compiler makes a branch of it */
	return (bits | -bits) >> 63 ^ 1;
}

/* Whether a search has nowhere to go on to. */
static __always_inline long is_over(struct search *search)
{
	return nothing(search->candidates | search->entry);
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
	search->entry = (entry + 1) & FW_ENTRY_MASK & ((match->flags & FW_LAST) - 1);
	if (!other && match->order < search->best &&
	    (!(match->flags & FW_MORE) || more_holds(search, match, true))) {
		search->best = match->order;
		search->identity = match->identity;
		search->accepts = match->flags;
		search->entry = 0;
	}
	/* a call less: each costs 10 ns where returns are not predicted (AMD's "Safe RET") */
	return is_over(search);
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
	search->entry = (entry + 1) & FW_ENTRY_MASK & ((match->flags & FW_LAST) - 1);
	if (!other && match->order < search->best &&
	    (!(match->flags & FW_MORE) || more_holds(search, match, false))) {
		search->best = match->order;
		search->identity = match->identity;
		search->accepts = match->flags;
		search->entry = 0;
	}
	/* a call less: each costs 10 ns where returns are not predicted (AMD's "Safe RET") */
	return is_over(search);
}

/* The tuples of a class. */
static __always_inline __u64 tuples_of(__u8 *half, struct fw_table *table, __u32 class, __u64 mask)
{
	return *(__u64 *)at(half, table->classes + (__u64)class * 8, mask);
}

/* The tuples that may hold an entry for an IPv4 address or a port. */
static __always_inline __u64 tuples4(__u8 *half, struct fw_table *table, __u64 number, __u64 mask)
{
	__u32 root = *(__u32 *)at(half, table->root + ((number >> (table->shift & 63)) << 2), mask);
	__u64 block, place = 0, step, whole;
	int i;

	if (root & FW_DIRECT)
		return tuples_of(half, table, root & 0xffff, mask);
	block = table->blocks + ((__u64)(root & 0x3ffffff) << 2);
	step = whole = 1ull << (root >> 26);
#pragma clang loop unroll(disable)
	for (i = 0; i < FW_STEPS; i++) {
		step >>= 1;
		if (!step)
			break;
		/* a negative difference: it starts at the number or before */
		place += step & -((*(__u32 *)at(half, block + ((place + step - 1) << 2), mask) - number - 1) >> 63);
	}
	return tuples_of(half, table, *(__u16 *)at(half, block + (whole << 2) + (place << 1), mask), mask);
}

/* The same for an IPv6 address. A function of its own: two of them in one need more stack than is left. */
static __noinline __u64 tuples6(__u8 *half, struct fw_table *table, const __u64 *number)
{
	__u64 mask = HALF_MASK;
	__u64 index = number[0] < table->base ? 0 : ((number[0] - table->base) >> (table->shift & 63)) + 1;
	__u64 block, place = 0, step, whole;
	__u32 root;
	int i;

	if (index > table->limit)
		index = table->limit;
	root = *(__u32 *)at(half, table->root + (index << 2), mask);
	if (root & FW_DIRECT)
		return tuples_of(half, table, root & 0xffff, mask);
	block = table->blocks + ((__u64)(root & 0x3ffffff) << 2);
	step = whole = 1ull << (root >> 26);
#pragma clang loop unroll(disable)
	for (i = 0; i < FW_STEPS; i++) {
		__u64 *start, after;

		step >>= 1;
		if (!step)
			break;
		start = at(half, block + ((place + step - 1) << 4), mask);
		after = less(number[0], start[0]) | (~less(start[0], number[0]) & less(number[1], start[1]));
		place += step & ((after & 1) - 1);
	}
	return tuples_of(half, table, *(__u16 *)at(half, block + (whole << 4) + (place << 1), mask), mask);
}

/* What rules ask about the transport header; ICMP's type and code stand where the destination port does. */
static __always_inline __u64 transport_of(struct packet *packet)
{
	__u32 ports = (__u32)packet->source_port << 16 | packet->destination_port;

	if (packet->flags & HAS_ICMP)
		ports = (__u32)packet->icmp_type << 8 | packet->icmp_code;
	return (__u64)packet->protocol << 32 | ports;
}

/* The tuples that can hold an entry for a packet. */
__noinline __u64 candidates4(struct packet *packet, __u64 transport, __u32 ask)
{
	__u8 *half = arena_of(ASK_INDEX(ask));
	struct fw_classifier *classifier;
	__u64 tuples, mask = HALF_MASK;

	if (!packet || !half)
		return 0;
	classifier = &((struct fw_slot *)half)->classifiers[ASK_DIRECTION(ask)][0];
	tuples = *(__u64 *)at(half, classifier->protocols + ((transport >> 32 & 0xff) << 3), mask);
	tuples &= tuples4(half, &classifier->fields[FW_SOURCE], (__u32)packet->source[1], mask);
	tuples &= tuples4(half, &classifier->fields[FW_DESTINATION], (__u32)packet->destination[1], mask);
	if (tuples & (tuples - 1)) { /* one tuple is asked in less time than the tables of ports are */
		tuples &= tuples4(half, &classifier->fields[FW_PORT], transport & 0xffff, mask);
		tuples &= tuples4(half, &classifier->fields[FW_SOURCE_PORT], transport >> 16 & 0xffff, mask);
	}
	return tuples;
}

__noinline __u64 candidates6(struct packet *packet, __u64 transport, __u32 ask)
{
	__u8 *half = arena_of(ASK_INDEX(ask));
	struct fw_classifier *classifier;
	__u64 tuples, mask = HALF_MASK;

	if (!packet || !half)
		return 0;
	classifier = &((struct fw_slot *)half)->classifiers[ASK_DIRECTION(ask)][1];
	tuples = *(__u64 *)at(half, classifier->protocols + ((transport >> 32 & 0xff) << 3), mask);
	tuples &= tuples4(half, &classifier->fields[FW_PORT], transport & 0xffff, mask);
	tuples &= tuples4(half, &classifier->fields[FW_SOURCE_PORT], transport >> 16 & 0xffff, mask);
	tuples &= tuples6(half, &classifier->fields[FW_SOURCE], packet->source);
	tuples &= tuples6(half, &classifier->fields[FW_DESTINATION], packet->destination);
	return tuples;
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
		__u8 *class = at(search.half, search.classifier->classes, HALF_MASK);

		if (four) {
			search.classes = class[packet->source[1] >> 24 & 0xff] |
					 class[256 + (packet->destination[1] >> 24 & 0xff)] << 8;
			search.candidates = candidates4(packet, search.transport, ask);
		} else {
			search.classes = class[packet->source[0] >> 56] | class[256 + (packet->destination[0] >> 56)] << 8;
			search.candidates = candidates6(packet, search.transport, ask);
		}
	}
	/* Two calls that the compiler must not make one: the kernel inlines a loop only where it knows its body (5.19). */
	if (four) {
		bpf_loop(MAX_STEPS, step4, &search, 0);
		asm volatile("# IPv4" ::: "memory");
	} else {
		bpf_loop(MAX_STEPS, step6, &search, 0);
		asm volatile("# IPv6" ::: "memory");
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
