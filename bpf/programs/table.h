/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The connection table: buckets of 16 ways, of which each flow has four to be in. `flow_tags` holds 15 bits of hash for each
 * way, so that a flow that is not there is found out by reading two lines of a small array and no entry.
 *
 * Nothing is locked for reading, and nobody ever waits. An entry's `sequence` is odd while somebody writes it: a writer gets it
 * by compare-and-swap from the very number that it read the entry under, and a reader takes nothing that it did not read
 * under one even number. So what is written to a flow never lands in another that took its place, and no flow passes by another's
 * verdict; tags may be older or younger than their entries, and cost a look at most. Only `seen` is written without: what can
 * happen is that the flow which has just taken the place counts as seen just now.
 *
 * A way is never freed, only taken over. A new flow goes to the emptier of its first two buckets; it stands in the third only if
 * these were full, and in the fourth only if that was too. What was full remains it: so a search reads the others only then. A
 * table of 65,536 is filled to nine tenths before a flow finds no room.
 */
#ifndef LOOPBACK_TABLE_H
#define LOOPBACK_TABLE_H

#include "classify.h"

#define LANES 0x0001000100010001ull /* a word of tags: the lowest bit of each */
#define TOPS 0x8000800080008000ull /* the highest, which no tag has */
#define LOOKS 16 /* at entries, in one search: enough for an entry that somebody writes to become whole again */
#define AT_ORIGIN 2 /* instead of a direction: of the hook that saw the flow first */

/* A flow as it was at one moment. */
struct flow_view {
	__u64 found; /* ways still to be looked at; kept here, where the verifier cannot tell them apart */
	__u32 sequence;
	__u32 allowed; /* these four: of the side that is asked */
	__u32 denied;
	__u32 identity;
	__u32 ifindex;
	__u8 stage;
	__u8 proof;
	__u8 alive;
	__u8 reply; /* the packet goes against the original one */
	__u8 direction;
	__u8 icmp_type;
	__u8 pad[2];
};

/* What was read before is read before what is read after. x86 promises that by itself. */
static __always_inline void read_barrier(void)
{
	asm volatile("" ::: "memory");
	if (sizes.weak) {
		__u64 own = 0;

		__sync_lock_test_and_set(&own, 1); /* a fetching atomic is a full barrier */
	}
	asm volatile("" ::: "memory");
}

static __always_inline struct fw_flow *flow_at(__u32 place)
{
	return bpf_map_lookup_elem(&flows, &place);
}

static __always_inline bool flow_lock(struct fw_flow *flow, __u32 sequence)
{
	return !(sequence & 1) && __sync_val_compare_and_swap(&flow->sequence, sequence, sequence + 1) == sequence;
}

static __always_inline void flow_unlock(struct fw_flow *flow, __u32 sequence)
{
	__sync_lock_test_and_set(&flow->sequence, sequence + 2);
}

/* The key of a packet; whether it goes from high to low. Without branches, which would be guessed wrong half of the time. */
static __always_inline bool packet_key(struct packet *packet, struct fw_flow_key *key)
{
	const __u64 *source = packet->source, *destination = packet->destination;
	__u64 source_port = packet->source_port, destination_port = packet->destination_port, swap, turn;

	if (packet->family == 4) {
		swap = ((destination[1] & 0xffffffff) << 16 | destination_port) -
		       ((source[1] & 0xffffffff) << 16 | source_port);
		asm volatile("" : "+r"(swap)); /* the compiler would see through it, and make a branch */
		swap >>= 63;
		turn = 0;
	} else {
		swap = less(destination[0], source[0]) |
		       (~less(source[0], destination[0]) &
			(less(destination[1], source[1]) |
			 (~less(source[1], destination[1]) & less(destination_port, source_port))));
		swap &= 1;
		turn = (source[0] ^ destination[0]) & -swap;
	}
	key->low[0] = source[0] ^ turn;
	key->high[0] = destination[0] ^ turn;
	turn = (source[1] ^ destination[1]) & -swap;
	key->low[1] = source[1] ^ turn;
	key->high[1] = destination[1] ^ turn;
	turn = (source_port ^ destination_port) & -swap;
	key->low_port = source_port ^ turn;
	key->high_port = destination_port ^ turn;
	key->protocol = packet->protocol;
	key->family = packet->family;
	key->pad[0] = 0;
	key->pad[1] = 0;
	return swap;
}

/* The same in a frame of its own, for who is short of stack. */
static __noinline int packet_key_apart(struct packet *packet, struct fw_flow_key *key)
{
	return packet_key(packet, key);
}

/* Ports, protocol and family of a key, as one number. */
static __always_inline __u64 key_rest(struct fw_flow_key *key)
{
	return *(__u64 *)&key->low_port;
}

/*
 * Pair-multiply-shift (Thorup, High Speed Hashing for Integers and Strings, 2015): of any two keys, chosen without knowing the
 * seed, the upper 32 bits of the sum are equal with a chance of 2^-32. So nobody can aim at a bucket: what he sends spreads as
 * chance would have it. The rest only carries these bits to where the buckets and the tag are taken from, and loses none.
 */
static __always_inline __u64 key_hash(struct fw_flow_key *key)
{
	__u32 zero = 0;
	struct fw_flow_seed *seed = bpf_map_lookup_elem(&flow_seed, &zero);
	__u64 hash, rest = key_rest(key);

	if (!seed)
		return 0;
	hash = seed->word[10] + (seed->word[0] + (__u32)key->low[1]) * (seed->word[1] + (__u32)key->high[1]) +
	       (seed->word[2] + (__u32)rest) * (seed->word[3] + (rest >> 32));
	if (key->family != 4)
		hash += (seed->word[4] + (__u32)key->low[0]) * (seed->word[5] + (key->low[0] >> 32)) +
			(seed->word[6] + (__u32)key->high[0]) * (seed->word[7] + (key->high[0] >> 32)) +
			(seed->word[8] + (key->low[1] >> 32)) * (seed->word[9] + (key->high[1] >> 32));
	hash = (hash ^ hash >> 32) * 0xff51afd7ed558ccdull;
	hash = (hash ^ hash >> 29) * 0x9e3779b97f4a7c15ull;
	return hash ^ hash >> 32;
}

/* The bucket of a hash that is its n-th choice: 16 bits each, the last from between. */
static __always_inline __u32 bucket_of(__u64 hash, __u32 choice)
{
	return (hash >> (0x08201000 >> (choice << 3) & 0xff)) & (sizes.buckets - 1);
}

/* The tag, in every lane: 15 bits, never 0. */
static __always_inline __u64 tag_of(__u64 hash)
{
	__u64 tag = hash >> 49;

	return (tag ? tag : 1) * LANES;
}

/* The lanes of a word that hold a tag, by their highest bit, which no tag has: taking 1 from nothing borrows it. A lane above an
 * equal one may be named as well: whoever looks there sees. */
static __always_inline __u64 equal_lanes(__u64 word, __u64 tag)
{
	return (word ^ tag) - LANES;
}

static __always_inline __u64 any_equal(struct fw_flow_tags *tags, __u64 tag)
{
	return equal_lanes(tags->word[0], tag) | equal_lanes(tags->word[1], tag) | equal_lanes(tags->word[2], tag) |
	       equal_lanes(tags->word[3], tag);
}

/* A bit for each way: word n's top bits moved n down. There is room below for three more buckets. */
static __always_inline __u64 equal_ways(struct fw_flow_tags *tags, __u64 tag)
{
	return (equal_lanes(tags->word[0], tag) & TOPS) | (equal_lanes(tags->word[1], tag) & TOPS) >> 1 |
	       (equal_lanes(tags->word[2], tag) & TOPS) >> 2 | (equal_lanes(tags->word[3], tag) & TOPS) >> 3;
}

/* Ways are taken in their order, so the last one tells. */
static __always_inline bool full(struct fw_flow_tags *tags)
{
	return tags->word[FW_WAYS / 4 - 1] >> 48;
}

/* How many ways of a bucket are taken, which is also the first that is free. */
static __always_inline __u32 ways_taken(struct fw_flow_tags *tags)
{
	__u64 lanes = ((tags->word[0] + ~TOPS) >> 15 & LANES) + ((tags->word[1] + ~TOPS) >> 15 & LANES) +
		      ((tags->word[2] + ~TOPS) >> 15 & LANES) + ((tags->word[3] + ~TOPS) >> 15 & LANES);

	return lanes * LANES >> 48;
}

/* The flow of a packet, dead or alive, as `direction` sees it: its place + 1, or 0. Global, as all that looks for places: the
 * verifier walks it once, and sees nothing of what it writes. */
__noinline int flow_find(struct packet *packet, __u32 direction, struct flow_view *view)
{
	struct fw_flow_tags *one, *two;
	__u64 hash, tag, found;
	struct fw_flow_key key;
	__u32 first, second, i;
	bool swapped;

	if (!packet || !view)
		return 0;
	swapped = packet_key(packet, &key);
	hash = key_hash(&key);
	tag = tag_of(hash);
	direction &= 3;
	first = bucket_of(hash, 0);
	second = bucket_of(hash, 1);
	one = bpf_map_lookup_elem(&flow_tags, &first);
	two = bpf_map_lookup_elem(&flow_tags, &second);
	if (!one || !two)
		return 0;
	found = any_equal(one, tag) | any_equal(two, tag);
	if (!(found & TOPS) && !(full(one) && full(two)))
		return 0;
	found = equal_ways(one, tag) | equal_ways(two, tag) >> 4;
	if (full(one) && full(two)) {
		first = bucket_of(hash, 2);
		one = bpf_map_lookup_elem(&flow_tags, &first);
		if (!one)
			return 0;
		found |= equal_ways(one, tag) >> 8;
		if (full(one)) {
			second = bucket_of(hash, 3);
			two = bpf_map_lookup_elem(&flow_tags, &second);
			if (!two)
				return 0;
			found |= equal_ways(two, tag) >> 12;
		}
	}
	view->found = found;
	for (i = 0; i < LOOKS && (found = *(volatile __u64 *)&view->found); i++) {
		__u32 bit = lowest_bit(found), below = 15 - (bit & 15), sequence, side, reply;
		__u32 index = bucket_of(hash, below >> 2) * FW_WAYS + ((below & 3) << 2) + (bit >> 4);
		struct fw_flow *flow = bpf_map_lookup_elem(&flows, &index);
		__u64 other, left;

		if (!flow)
			return 0;
		sequence = *(volatile __u32 *)&flow->sequence;
		if (sequence & 1)
			continue;
		read_barrier();
		other = (flow->key.low[0] ^ key.low[0]) | (flow->key.low[1] ^ key.low[1]) |
			(flow->key.high[0] ^ key.high[0]) | (flow->key.high[1] ^ key.high[1]) |
			(key_rest(&flow->key) ^ key_rest(&key));
		if (other) {
			view->found = found & (found - 1);
			continue;
		}
		view->sequence = sequence;
		/* without branches: each would double what the verifier walks from here on */
		left = flow->life - (bpf_jiffies64() - *(volatile __u64 *)&flow->seen);
		asm volatile("" : "+r"(left));
		view->alive = ~left >> 63;
		view->stage = flow->stage;
		view->proof = flow->proof;
		view->direction = flow->direction & 1;
		view->icmp_type = flow->icmp_type;
		reply = (swapped ^ flow->swapped) & 1;
		view->reply = reply;
		side = direction ^ ((direction ^ flow->direction) & -(reply | direction >> 1));
		view->allowed = flow->sides[side & 1].allowed;
		view->denied = flow->sides[side & 1].denied;
		view->identity = flow->sides[side & 1].identity;
		view->ifindex = flow->sides[side & 1].ifindex;
		read_barrier();
		if (*(volatile __u32 *)&flow->sequence == sequence)
			return index + 1;
	}
	return 0;
}

#define EXPIRED 58 /* the bit of a worth that no time reaches */

/* A way of a bucket for a new flow, locked: its place + 1, or 0. It is a free one, one whose flow has expired, or else the one whose
 * flow is the least proven, and of these the longest quiet; that one is counted as given up. */
__noinline int bucket_claim(__u32 bucket)
{
	struct fw_flow_tags *tags = bpf_map_lookup_elem(&flow_tags, &bucket);
	__u64 best = 0;
	__u32 index, sequence = 1, way;
	struct fw_flow *flow;

	if (!tags)
		return 0;
	way = ways_taken(tags);
	if (way < FW_WAYS) {
		index = bucket * FW_WAYS + way;
		flow = bpf_map_lookup_elem(&flows, &index);
		if (!flow)
			return 0;
		sequence = *(volatile __u32 *)&flow->sequence;
		read_barrier();
		if (((volatile __u16 *)tags)[way] || !flow_lock(flow, sequence))
			return 0; /* somebody was quicker */
		return index + 1;
	}
	for (way = 0; way < FW_WAYS; way++) {
		__u64 quiet, worth, one_sided, larger;
		__u32 read;

		index = bucket * FW_WAYS + way;
		flow = bpf_map_lookup_elem(&flows, &index);
		if (!flow)
			return 0;
		read = *(volatile __u32 *)&flow->sequence;
		read_barrier();
		/* A number that is larger the less the flow is worth, 0 for one that is not given up, above the way that it is in.
		 * Without branches, as each would double what the verifier walks. */
		quiet = bpf_jiffies64() - *(volatile __u64 *)&flow->seen;
		quiet &= ~((__s64)quiet >> 63); /* seen by another CPU since we looked at the clock */
		one_sided = nothing(flow->proof ^ FW_ONE_SIDED);
		worth = ((quiet + 1) & -(one_sided | nothing(flow->proof ^ FW_ANSWERED))) + (one_sided << 32) +
			((flow->life - quiet) >> 63 << EXPIRED);
		worth = (worth << 4 | (FW_WAYS - 1 - way)) & (nothing(worth) - 1);
		larger = -less(best, worth);
		asm volatile("" : "+r"(larger));
		best ^= (best ^ worth) & larger;
		sequence ^= (sequence ^ read) & larger;
	}
	index = bucket * FW_WAYS + FW_WAYS - 1 - (best & (FW_WAYS - 1));
	flow = bpf_map_lookup_elem(&flows, &index);
	if (!flow || !flow_lock(flow, sequence))
		return 0;
	if (!(best >> (EXPIRED + 4))) {
		struct fw_totals *count = totals_here();

		if (count)
			count->flows_evicted++;
	}
	return index + 1;
}

/* The hash of a packet's key, which needs its stack no longer than that. */
static __always_inline __u64 hash_apart(struct packet *packet)
{
	struct fw_flow_key key;

	packet_key_apart(packet, &key);
	return key_hash(&key);
}

/* A place + 1 for the flow of a packet, locked, in the emptier of its first two buckets, else in the other, the third or the
 * fourth; or 0. It has the flow's tag already: who looks there waits for the rest. */
__noinline int flow_claim(struct packet *packet)
{
	struct fw_flow_tags *one, *two, *tags;
	__u32 bucket, other;
	__u64 hash;
	int place;

	if (!packet)
		return 0;
	hash = hash_apart(packet);
	bucket = bucket_of(hash, 0);
	one = bpf_map_lookup_elem(&flow_tags, &bucket);
	bucket = bucket_of(hash, 1);
	two = bpf_map_lookup_elem(&flow_tags, &bucket);
	if (!one || !two)
		return 0;
	other = ways_taken(two) < ways_taken(one);
	place = bucket_claim(bucket_of(hash, other));
	if (!place)
		place = bucket_claim(bucket_of(hash, other ^ 1));
	if (!place && full(one) && full(two)) { /* not if somebody was quicker: nobody would look there */
		bucket = bucket_of(hash, 2);
		one = bpf_map_lookup_elem(&flow_tags, &bucket);
		place = bucket_claim(bucket);
		if (!place && one && full(one))
			place = bucket_claim(bucket_of(hash, 3));
	}
	if (!place)
		return 0;
	bucket = (__u32)(place - 1) / FW_WAYS;
	tags = bpf_map_lookup_elem(&flow_tags, &bucket);
	if (tags)
		((volatile __u16 *)tags)[(place - 1) & (FW_WAYS - 1)] = tag_of(hash);
	return place;
}

#endif
