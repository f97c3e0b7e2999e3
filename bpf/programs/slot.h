/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The way into a slot: its half of the arena, places in it, and arithmetic without branches for whoever reads there. */
#ifndef LOOPBACK_SLOT_H
#define LOOPBACK_SLOT_H

#include "maps.h"
#include "parse.h"

/* What is asked of a slot, in one argument: the slot's index, the direction, the state, and whether no bucket may pay. */
#define ASK(index, direction, state, dry) ((index) & 1) | ((direction) & 1) << 1 | (dry) << 2 | (state) << 8
#define ASK_INDEX(ask) ((ask) & 1)
#define ASK_DIRECTION(ask) ((ask) >> 1 & 1)
#define ASK_DRY(ask) ((ask) >> 2 & 1)
#define ASK_STATE(ask) ((ask) >> 8 & 15)

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

/* 1 when a < b, as numbers without sign and without a branch, which each step of a search would multiply. */
static __always_inline __u64 less(__u64 a, __u64 b)
{
	return ((~a & b) | ((~a | b) & (a - b))) >> 63;
}

/* 1 when no bit is set, without a branch. */
static __always_inline __u64 nothing(__u64 bits)
{
	asm volatile("" : "+r"(bits)); /* or the compiler makes a branch of it */
	return (bits | -bits) >> 63 ^ 1;
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

#endif
