/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * From bytes to a tuple. Reads Ethernet with up to two VLAN tags, IPv4 with options, IPv6 with up to eight extension
 * headers, fragments, TCP, UDP, UDP-Lite, SCTP, DCCP, ICMP, ICMPv6, and the packet inside an ICMP error.
 *
 * What is not IP gets FW_UNPARSED, what is shorter than its own headers say gets FW_TRUNCATED. A port is never read from
 * beyond the length that the IP header states (Ethernet padding is not payload).
 */
#ifndef LOOPBACK_PARSE_H
#define LOOPBACK_PARSE_H

#include <stdbool.h>
#include <stddef.h>

#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "firewall.h"

#define ETH_ARP 0x0806
#define ETH_IPV4 0x0800
#define ETH_IPV6 0x86dd
#define ETH_VLAN 0x8100
#define ETH_QINQ 0x88a8

#define PROTO_HOPOPTS 0
#define PROTO_ICMP 1
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_DCCP 33
#define PROTO_ROUTING 43
#define PROTO_FRAGMENT 44
#define PROTO_AH 51
#define PROTO_ICMPV6 58
#define PROTO_DSTOPTS 60
#define PROTO_SCTP 132
#define PROTO_UDPLITE 136

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

enum packet_flag {
	HAS_PORTS = 1,
	HAS_ICMP = 2,
	FIRST_FRAGMENT = 4,
	LATER_FRAGMENT = 8,
	ECHO = 16, /* ICMP echo: it can be a flow */
	HOP_LIMIT_255 = 32,
	HOP_LIMIT_1 = 64,
	ECHO_REPLY = 128,
};

struct packet {
	__u64 source[2]; /* host order, the upper half first */
	__u64 destination[2];
	__u16 source_port; /* the identifier, for ICMP echo */
	__u16 destination_port;
	__u8 protocol;
	__u8 family; /* 4 or 6; 0: not IP */
	__u8 flags;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u16 inner; /* where the packet inside an ICMP error begins; 0: none */
	__u32 fragment_id;
	__u32 length;
	__u32 ifindex;
	__u32 direction; /* here, so that no register is kept for it all the way */
	__u32 number; /* TCP: with SYN, the one that acknowledges it; else the one that it acknowledges */
};

struct ethernet {
	__u8 destination[6];
	__u8 source[6];
	__be16 type;
};

struct vlan {
	__be16 tag;
	__be16 type;
};

struct ipv4 {
	__u8 version_length;
	__u8 tos;
	__be16 total;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 protocol;
	__be16 checksum;
	__u8 source[4];
	__u8 destination[4];
};

struct ipv6 {
	__be32 flow;
	__be16 payload;
	__u8 next;
	__u8 hop_limit;
	__be64 source[2];
	__be64 destination[2];
};

struct extension {
	__u8 next;
	__u8 length;
};

struct extension_fragment {
	__u8 next;
	__u8 reserved;
	__be16 offset;
	__be32 id;
};

struct transport {
	__be16 source;
	__be16 destination;
	__be32 rest;
};

struct tcp {
	__be16 source;
	__be16 destination;
	__be32 sequence;
	__be32 acknowledgement;
	__u8 offset;
	__u8 flags;
	__be16 window;
	__be32 rest;
};

struct icmp {
	__u8 type;
	__u8 code;
	__be16 checksum;
	__be16 id;
	__be16 sequence;
};

static __always_inline void map_ipv4(__u64 *into, const __u8 *address)
{
	into[0] = 0;
	into[1] = 0xffffull << 32 | bpf_ntohl(*(const __be32 *)address);
}

static __always_inline void read_ipv6(__u64 *into, const __be64 *address)
{
	into[0] = bpf_be64_to_cpu(address[0]);
	into[1] = bpf_be64_to_cpu(address[1]);
}

static __always_inline bool carries_ports(__u8 protocol)
{
	return protocol == PROTO_TCP || protocol == PROTO_UDP || protocol == PROTO_SCTP ||
	       protocol == PROTO_UDPLITE || protocol == PROTO_DCCP;
}

static __always_inline bool is_icmp_error(__u8 family, __u8 type)
{
	if (family == 4)
		return type == 3 || type == 4 || type == 11 || type == 12;
	return type >= 1 && type <= 4;
}

static __always_inline enum fw_parsed parse_icmp(struct icmp *icmp, __u32 offset, struct packet *packet)
{
	__u8 type = icmp->type;

	packet->flags |= HAS_ICMP;
	packet->icmp_type = type;
	packet->icmp_code = icmp->code;
	if (packet->family == 4 ? type == 8 || type == 0 : type == 128 || type == 129) {
		packet->flags |= ECHO;
		packet->source_port = bpf_ntohs(icmp->id);
		packet->destination_port = packet->source_port;
		if (type == 0 || type == 129)
			packet->flags |= ECHO_REPLY;
	}
	if (is_icmp_error(packet->family, type))
		packet->inner = offset + sizeof(*icmp);
	/* Without these no IPv6 packet finds its next hop. A hop limit of 255 cannot come from beyond the link; listener messages
	 * never leave it, and are sent from an address of the link or from none (RFC 3810, 5). Neither comes in fragments. */
	if (packet->family == 6 && !(packet->flags & FIRST_FRAGMENT)) {
		if (type >= 133 && type <= 137 && icmp->code == 0 && packet->flags & HOP_LIMIT_255)
			return FW_ESSENTIAL;
		if (((type >= 130 && type <= 132) || type == 143) && packet->flags & HOP_LIMIT_1 &&
		    (packet->source[0] >> 54 == 0xfe80 >> 6 || !(packet->source[0] | packet->source[1])))
			return FW_ESSENTIAL;
	}
	return FW_PARSED;
}

static __always_inline void parse_tcp(struct tcp *tcp, struct packet *packet)
{
	packet->source_port = bpf_ntohs(tcp->source);
	packet->destination_port = bpf_ntohs(tcp->destination);
	packet->tcp_flags = tcp->flags;
	packet->number = tcp->flags & TCP_SYN ? bpf_ntohl(tcp->sequence) + 1 : bpf_ntohl(tcp->acknowledgement);
	packet->flags |= HAS_PORTS;
}

static __always_inline void parse_ports(struct transport *ports, struct packet *packet)
{
	packet->source_port = bpf_ntohs(ports->source);
	packet->destination_port = bpf_ntohs(ports->destination);
	packet->flags |= HAS_PORTS;
}

/* ICMP belongs to its own family; in the other one it is a protocol like any unknown one. */
static __always_inline bool is_icmp(struct packet *packet)
{
	return packet->protocol == (packet->family == 4 ? PROTO_ICMP : PROTO_ICMPV6);
}

/* `left` is how much the IP header leaves for the transport header and what follows. */
static __always_inline enum fw_parsed parse_transport(void *at, void *end, __u32 offset, __u32 left,
						      struct packet *packet)
{
	if (packet->protocol == PROTO_TCP) {
		if (left < sizeof(struct tcp) || at + sizeof(struct tcp) > end)
			return FW_TRUNCATED;
		parse_tcp(at, packet);
	} else if (carries_ports(packet->protocol)) {
		if (left < sizeof(struct transport) || at + sizeof(struct transport) > end)
			return FW_TRUNCATED;
		parse_ports(at, packet);
	} else if (is_icmp(packet)) {
		if (left < sizeof(struct icmp) || at + sizeof(struct icmp) > end)
			return FW_TRUNCATED;
		return parse_icmp(at, offset, packet);
	}
	return FW_PARSED;
}

/* `wire` is how many bytes there really are from `at` on, which can be more than lie before `end` (paged data). */
static __always_inline enum fw_parsed parse_ipv4(void *at, void *end, __u32 offset, __u32 wire,
						 struct packet *packet)
{
	struct ipv4 *ip = at;
	__u32 header, total;
	__u16 fragment;

	if ((void *)(ip + 1) > end)
		return FW_TRUNCATED;
	if (ip->version_length >> 4 != 4)
		return FW_TRUNCATED;
	header = (ip->version_length & 15) * 4;
	total = bpf_ntohs(ip->total);
	if (total == 0) /* a segmented packet above 64 KiB, on its way through our own stack */
		total = wire;
	if (header < sizeof(*ip) || total < header || total > wire)
		return FW_TRUNCATED;
	packet->family = 4;
	packet->protocol = ip->protocol;
	map_ipv4(packet->source, ip->source);
	map_ipv4(packet->destination, ip->destination);
	packet->fragment_id = ip->id;
	fragment = bpf_ntohs(ip->fragment);
	if (fragment & 0x1fff) {
		packet->flags |= LATER_FRAGMENT;
		/* it would overwrite the TCP flags of the first fragment (RFC 3128) */
		if (ip->protocol == PROTO_TCP && (fragment & 0x1fff) == 1)
			return FW_TRUNCATED;
		return FW_PARSED;
	}
	if (fragment & 0x2000)
		packet->flags |= FIRST_FRAGMENT;
	return parse_transport(at + header, end, offset + header, total - header, packet);
}

static __always_inline bool is_extension(__u8 next)
{
	return next == PROTO_HOPOPTS || next == PROTO_ROUTING || next == PROTO_FRAGMENT || next == PROTO_AH ||
	       next == PROTO_DSTOPTS;
}

struct walk {
	void *context;
	__u32 offset;
	__u32 fragment_id;
	__u8 next;
	__u8 flags;
	__u8 xdp;
	__u8 failed;
};

static __always_inline long load(void *context, bool xdp, __u32 offset, void *into, __u32 size)
{
	return xdp ? bpf_xdp_load_bytes(context, offset, into, size) : bpf_skb_load_bytes(context, offset, into, size);
}

static __always_inline long walk_step(struct walk *walk, bool xdp)
{
	struct extension_fragment header;

	if (!is_extension(walk->next) || walk->flags & LATER_FRAGMENT)
		return 1;
	/* the shortest of them has eight bytes */
	if (load(walk->context, xdp, walk->offset, &header, sizeof(header))) {
		walk->failed = 1;
		return 1;
	}
	if (walk->next == PROTO_FRAGMENT) {
		walk->fragment_id = header.id;
		walk->offset += sizeof(header);
		if (header.offset & bpf_htons(0xfff8))
			walk->flags |= LATER_FRAGMENT;
		else if (header.offset & bpf_htons(1))
			walk->flags |= FIRST_FRAGMENT;
	} else if (walk->next == PROTO_AH) {
		walk->offset += (header.reserved + 2) * 4;
	} else {
		walk->offset += (header.reserved + 1) * 8;
	}
	walk->next = header.next;
	return 0;
}

static long walk_step_xdp(__u32 i, struct walk *walk)
{
	return walk_step(walk, true);
}

static long walk_step_skb(__u32 i, struct walk *walk)
{
	return walk_step(walk, false);
}

/* Extension headers are rare: they are read by copy, so that packets without them pay nothing and the verifier little. */
static __always_inline enum fw_parsed parse_extensions(void *context, bool xdp, __u32 offset, __u32 left,
						       struct packet *packet)
{
	struct walk walk = {.context = context, .offset = offset, .next = packet->protocol};
	union {
		struct tcp tcp;
		struct transport ports;
		struct icmp icmp;
	} header = {};
	__u32 size;

	if (xdp)
		bpf_loop(FW_MAX_EXTENSIONS, walk_step_xdp, &walk, 0);
	else
		bpf_loop(FW_MAX_EXTENSIONS, walk_step_skb, &walk, 0);
	packet->protocol = walk.next;
	packet->fragment_id = walk.fragment_id;
	packet->flags |= walk.flags;
	if (walk.failed || walk.offset - offset > left)
		return FW_TRUNCATED;
	left -= walk.offset - offset;
	if (walk.flags & LATER_FRAGMENT)
		return FW_PARSED;
	if (is_extension(walk.next))
		return FW_UNPARSED;
	if (walk.next == PROTO_TCP) {
		if (left < sizeof(header.tcp) || load(context, xdp, walk.offset, &header.tcp, sizeof(header.tcp)))
			return FW_TRUNCATED;
		parse_tcp(&header.tcp, packet);
		return FW_PARSED;
	}
	if (!carries_ports(walk.next) && walk.next != PROTO_ICMPV6)
		return FW_PARSED;
	size = sizeof(header.ports);
	if (left < size || load(context, xdp, walk.offset, &header.ports, sizeof(header.ports)))
		return FW_TRUNCATED;
	if (walk.next == PROTO_ICMPV6)
		return parse_icmp(&header.icmp, walk.offset, packet);
	parse_ports(&header.ports, packet);
	return FW_PARSED;
}

/* Functions of their own, so that their stack is given back before the packet is judged. */
static __noinline int parse_extensions_xdp(void *context, __u32 offset, __u32 left, struct packet *packet)
{
	return parse_extensions(context, true, offset, left, packet);
}

static __noinline int parse_extensions_skb(void *context, __u32 offset, __u32 left, struct packet *packet)
{
	return parse_extensions(context, false, offset, left, packet);
}

static __always_inline enum fw_parsed parse_ipv6(void *context, bool xdp, void *at, void *end, __u32 offset,
						 __u32 wire, struct packet *packet)
{
	struct ipv6 *ip = at;
	__u32 left;

	if ((void *)(ip + 1) > end || wire < sizeof(*ip))
		return FW_TRUNCATED;
	if (bpf_ntohl(ip->flow) >> 28 != 6)
		return FW_TRUNCATED;
	left = bpf_ntohs(ip->payload);
	if (left == 0) /* a jumbogram; or nothing at all, which the transport's own check finds */
		left = wire - sizeof(*ip);
	if (left > wire - sizeof(*ip))
		return FW_TRUNCATED;
	packet->family = 6;
	packet->protocol = ip->next;
	read_ipv6(packet->source, ip->source);
	read_ipv6(packet->destination, ip->destination);
	if (ip->hop_limit == 255)
		packet->flags |= HOP_LIMIT_255;
	if (ip->hop_limit == 1)
		packet->flags |= HOP_LIMIT_1;
	if (is_extension(ip->next))
		return xdp ? parse_extensions_xdp(context, offset + sizeof(*ip), left, packet) :
			     parse_extensions_skb(context, offset + sizeof(*ip), left, packet);
	return parse_transport(ip + 1, end, offset + sizeof(*ip), left, packet);
}

/* Parse a frame that begins `offset` bytes into the data, or with `network` a bare IP packet. `wire` is its length. */
static __always_inline enum fw_parsed parse(void *context, bool xdp, void *data, void *end, __u32 offset, __u32 wire,
					    bool network, struct packet *packet)
{
	const __u32 first = offset; /* a constant */
	void *at = data;
	__be16 type;
	__u32 left;
	int i;

	packet->length = wire;
	if (network) {
		__u8 *version = at;

		if ((void *)(version + 1) > end)
			return FW_TRUNCATED;
		type = *version >> 4 == 4 ? bpf_htons(ETH_IPV4) : *version >> 4 == 6 ? bpf_htons(ETH_IPV6) : 0;
	} else {
		struct ethernet *ethernet = at;

		if ((void *)(ethernet + 1) > end)
			return FW_TRUNCATED;
		type = ethernet->type;
		at = ethernet + 1;
		offset += sizeof(*ethernet);
#pragma unroll
		for (i = 0; i < FW_MAX_VLANS; i++) {
			struct vlan *vlan = at;

			if (type != bpf_htons(ETH_VLAN) && type != bpf_htons(ETH_QINQ))
				break;
			if ((void *)(vlan + 1) > end)
				return FW_TRUNCATED;
			type = vlan->type;
			at = vlan + 1;
			offset += sizeof(*vlan);
		}
	}
	left = *(volatile __u32 *)&packet->length - (offset - first);
	if (type == bpf_htons(ETH_IPV4))
		return parse_ipv4(at, end, offset, left, packet);
	if (type == bpf_htons(ETH_IPV6))
		return parse_ipv6(context, xdp, at, end, offset, left, packet);
	if (type == bpf_htons(ETH_ARP))
		return FW_ESSENTIAL;
	return FW_UNPARSED;
}

#endif
