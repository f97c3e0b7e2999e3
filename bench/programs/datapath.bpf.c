/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What the datapath's bench runs beside the firewall. TEST_RUN gives one frame again and again, so `vary` first makes another
 * packet of it, in place, and then goes on into the program under test by a tail call: the firewall's own program, unchanged,
 * or one of the peers here. What `vary` costs is measured with `bare` behind it, and taken off every side.
 *
 * Frames are Ethernet and IPv4 or IPv6 without options, and long enough for a TCP header behind them. A varied IPv4 frame has
 * right checksums (UDP: none), since the stack behind nftables looks at them.
 */
#include <stdbool.h>

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#define TABLE 65536 /* tuples in a table; a power of two */
#define ETHERNET 14
#define TCP 6
#define UDP 17

enum mode {
	LEAVE = 0,
	RANDOM = 1, /* uniformly random addresses and ports, TCP or UDP */
	FROM_TABLE = 2, /* one tuple after the other */
};

struct plan {
	__u32 ifindex; /* where `out` sends */
	__u32 mode;
	__u32 family; /* 4 or 6 */
	__u32 mask; /* tuples in use, less one */
	__u32 ip_sum; /* of the IPv4 header without addresses, protocol and checksum */
	__u32 tcp_sum; /* of the pseudo header and the segment without addresses, ports and checksum */
};

struct tuple4 {
	__u32 source;
	__u32 destination;
	__u16 source_port;
	__u16 destination_port;
	__u8 protocol;
	__u8 pad[3];
};

struct tuple6 {
	__u64 source[2];
	__u64 destination[2];
	__u16 source_port;
	__u16 destination_port;
	__u8 protocol;
	__u8 pad[3];
};

struct place {
	__u64 random;
	__u64 next;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct plan);
} plan SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, TABLE);
	__type(key, __u32);
	__type(value, struct tuple4);
} table4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, TABLE);
	__type(key, __u32);
	__type(value, struct tuple6);
} table6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct place);
} place SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} under_test SEC(".maps");

struct key4 {
	__u32 length;
	__u32 address;
};

struct key6 {
	__u32 length;
	__u64 address[2];
} __attribute__((packed));

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct key4);
	__type(value, __u32);
} prefixes4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct key6);
	__type(value, __u32);
} prefixes6 SEC(".maps");

/* xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled", 2016) */
static __always_inline __u64 random64(struct place *here)
{
	__u64 x = here->random;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	here->random = x;
	return x * 0x2545f4914f6cdd1dull;
}

static __always_inline __u32 folded(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

static __always_inline __u32 halves(__u32 word)
{
	return (word & 0xffff) + (word >> 16);
}

static __always_inline void write4(void *data, void *end, struct plan *given, struct tuple4 *tuple)
{
	__u8 *ip = data + ETHERNET;
	__u32 addresses;

	if (data + ETHERNET + 40 > end)
		return;
	addresses = halves(tuple->source) + halves(tuple->destination);
	*(__u32 *)(ip + 12) = tuple->source;
	*(__u32 *)(ip + 16) = tuple->destination;
	ip[9] = tuple->protocol;
	*(__u16 *)(ip + 10) = ~folded(given->ip_sum + addresses + bpf_htons(tuple->protocol));
	*(__u16 *)(ip + 20) = tuple->source_port;
	*(__u16 *)(ip + 22) = tuple->destination_port;
	if (tuple->protocol == TCP)
		*(__u16 *)(ip + 36) = ~folded(given->tcp_sum + addresses + tuple->source_port + tuple->destination_port);
}

static __always_inline void write6(void *data, void *end, struct tuple6 *tuple)
{
	__u8 *ip = data + ETHERNET;

	if (data + ETHERNET + 60 > end)
		return;
	__builtin_memcpy(ip + 8, tuple->source, 16);
	__builtin_memcpy(ip + 24, tuple->destination, 16);
	ip[6] = tuple->protocol;
	*(__u16 *)(ip + 40) = tuple->source_port;
	*(__u16 *)(ip + 42) = tuple->destination_port;
}

/* Make the next packet of this frame. */
static __always_inline struct plan *next_packet(struct xdp_md *xdp)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	__u32 zero = 0, index;
	struct plan *given = bpf_map_lookup_elem(&plan, &zero);
	struct place *here = bpf_map_lookup_elem(&place, &zero);
	__u64 ports;

	if (!given || !here || given->mode == LEAVE)
		return given;
	if (given->mode == FROM_TABLE) {
		index = here->next++ & given->mask & (TABLE - 1);
		if (given->family == 4) {
			struct tuple4 *known = bpf_map_lookup_elem(&table4, &index);

			if (known)
				write4(data, end, given, known);
		} else {
			struct tuple6 *known = bpf_map_lookup_elem(&table6, &index);

			if (known)
				write6(data, end, known);
		}
		return given;
	}
	if (!here->random)
		here->random = 0x9e3779b97f4a7c15ull;
	ports = random64(here);
	if (given->family == 4) {
		__u64 addresses = random64(here);
		struct tuple4 fresh = {
			.source = addresses,
			.destination = addresses >> 32,
			.source_port = ports,
			.destination_port = ports >> 16,
			.protocol = ports >> 63 ? TCP : UDP,
		};

		write4(data, end, given, &fresh);
	} else {
		struct tuple6 fresh = {
			.source = {random64(here), random64(here)},
			.destination = {random64(here), random64(here)},
			.source_port = ports,
			.destination_port = ports >> 16,
			.protocol = ports >> 63 ? TCP : UDP,
		};

		/* global unicast (RFC 4291, 2.4): no packet that is let through as essential */
		*(__u8 *)fresh.source = 0x20 | (*(__u8 *)fresh.source & 0x1f);
		*(__u8 *)fresh.destination = 0x20 | (*(__u8 *)fresh.destination & 0x1f);
		write6(data, end, &fresh);
	}
	return given;
}

SEC("xdp.frags")
int vary(struct xdp_md *xdp)
{
	next_packet(xdp);
	bpf_tail_call(xdp, &under_test, 0);
	return XDP_ABORTED;
}

/* "bare": nothing but a verdict */
SEC("xdp.frags")
int bare(struct xdp_md *xdp)
{
	return XDP_DROP;
}

/* The peer: the kernel's own longest-prefix match, once for each address. */
SEC("xdp.frags")
int lookups4(struct xdp_md *xdp)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	struct key4 key = {.length = 32};
	__u32 *first, *second;

	if (data + ETHERNET + 20 > end)
		return XDP_ABORTED;
	key.address = *(__u32 *)(data + ETHERNET + 12);
	first = bpf_map_lookup_elem(&prefixes4, &key);
	key.address = *(__u32 *)(data + ETHERNET + 16);
	second = bpf_map_lookup_elem(&prefixes4, &key);
	return first && second && *first == *second ? XDP_DROP : XDP_PASS;
}

SEC("xdp.frags")
int lookups6(struct xdp_md *xdp)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	struct key6 key = {.length = 128};
	__u32 *first, *second;

	if (data + ETHERNET + 40 > end)
		return XDP_ABORTED;
	__builtin_memcpy(key.address, data + ETHERNET + 8, 16);
	first = bpf_map_lookup_elem(&prefixes6, &key);
	__builtin_memcpy(key.address, data + ETHERNET + 24, 16);
	second = bpf_map_lookup_elem(&prefixes6, &key);
	return first && second && *first == *second ? XDP_DROP : XDP_PASS;
}

/* The generator: with live frames, every packet leaves through a device. */
SEC("xdp")
int out(struct xdp_md *xdp)
{
	struct plan *given = next_packet(xdp);

	return given ? bpf_redirect(given->ifindex, 0) : XDP_ABORTED;
}

/* bare XDP_DROP on a device */
SEC("xdp")
int drop(struct xdp_md *xdp)
{
	return XDP_DROP;
}

char LICENSE[] SEC("license") = "GPL";
