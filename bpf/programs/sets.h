/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Whether an address is in a set: a filter first, then a binary search among the addresses where membership changes. */
#ifndef LOOPBACK_SETS_H
#define LOOPBACK_SETS_H

#include "slot.h"

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

#endif
