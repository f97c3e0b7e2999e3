/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Which tuples can hold an entry for a packet: a table for each of its fields, and the AND of what they say. */
#ifndef LOOPBACK_FIELDS_H
#define LOOPBACK_FIELDS_H

#include "slot.h"

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

#endif
