/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Everything the firewall's programs and user space agree on. User space mirrors it in bpf/layout.py, and a test
 * compares the two through the object's BTF. Fixed-width types only; every structure is padded by hand.
 *
 * Addresses are 16 bytes in network order; an IPv4 address stands in its v4-mapped form (::ffff:a.b.c.d), and the
 * family is kept beside it, so that an IPv6 packet with a v4-mapped address is never taken for IPv4.
 */
#ifndef LOOPBACK_FIREWALL_H
#define LOOPBACK_FIREWALL_H

#define FW_LAYOUT 1 /* counts up with every change that an older program could not read */

#define FW_SLOTS 2
#define FW_MAX_RULES 4096 /* entries of one slot, both directions together; a power of two */
#define FW_MAX_COUNTERS 8192 /* rule identities that keep a counter */
#define FW_SET_WORDS 4 /* 64 set numbers each; number 0 is never a set */
#define FW_RULE_PORTS 4
#define FW_RULE_SOURCE_PORTS 2
#define FW_RULE_PROTOCOLS 4
#define FW_RULE_ICMP 4
#define FW_MAX_VLANS 2
#define FW_MAX_EXTENSIONS 8
#define FW_NO_RULE 0xffffffffu
#define FW_ANY_CODE 0xff /* beside an ICMP type: any code */

/* The active word, one aligned u64: epoch << 32 | fallback << 48 | deadline. Epochs are the low 16 bits of the slot's own
 * counter; epoch 0 means that nothing is enforced. The deadline counts ticks of the boot clock; 0 is "confirmed". */
#define FW_TICK_SHIFT 26 /* a tick is 2^26 ns, about 67 ms; 32 bits of them are nine years */

enum fw_direction { FW_INGRESS = 0, FW_EGRESS = 1 };
enum fw_verdict { FW_DROP = 0, FW_ACCEPT = 1 };

enum fw_state {
	FW_NEW = 1,
	FW_ESTABLISHED = 2,
	FW_RELATED = 4,
	FW_INVALID = 8,
};

enum fw_family_bit { FW_IPV4 = 1, FW_IPV6 = 2 };

/* How a packet could be read. */
enum fw_parsed {
	FW_PARSED = 0,
	FW_ESSENTIAL = 1, /* ARP, neighbour discovery, multicast listener: always passes */
	FW_UNPARSED = 2, /* gets the default of its direction */
	FW_TRUNCATED = 3, /* dropped */
};

/* Why a packet got its verdict. */
enum fw_reason {
	FW_BY_RULE = 0,
	FW_BY_DEFAULT = 1,
	FW_BY_FLOW = 2,
	FW_BY_RELATED = 3,
	FW_BY_ESSENTIAL = 4,
	FW_BY_UNPARSED = 5,
	FW_BY_TRUNCATED = 6,
	FW_BY_REVOKED = 7, /* a flow that the new policy does not allow any more */
	FW_BY_FRAGMENT = 8, /* follows the first fragment of its datagram */
	FW_BY_ADOPTION = 9,
	FW_BY_BROKEN = 10, /* no slot where the active word points */
	FW_BY_OFF = 11,
};

enum fw_rule_flag {
	FW_SOURCE_PREFIX = 1,
	FW_SOURCE_SET = 2,
	FW_DESTINATION_PREFIX = 4,
	FW_DESTINATION_SET = 8,
	FW_INTERFACES = 16,
	FW_LIMIT_RULE = 32,
	FW_LIMIT_SOURCE = 64,
};

/* One entry of the rule scan. A rule of the policy is one or several of them, with the same identity and order. */
struct fw_rule {
	__u32 identity; /* counter slot, stable over policies */
	__u32 order; /* position in the policy, from 0 */
	__u8 action;
	__u8 families; /* fw_family_bit */
	__u8 states; /* fw_state bits; 0 is any */
	__u8 flags; /* fw_rule_flag */
	__u16 source_set;
	__u16 destination_set;
	__u8 protocols[FW_RULE_PROTOCOLS];
	__u8 protocol_count;
	__u8 port_count;
	__u8 source_port_count;
	__u8 icmp_count;
	__u16 ports[FW_RULE_PORTS][2];
	__u16 source_ports[FW_RULE_SOURCE_PORTS][2];
	__u8 icmp[FW_RULE_ICMP][2]; /* type, code */
	__u64 interfaces; /* bits of the slot's interface patterns */
	__u64 source[2];
	__u64 source_mask[2];
	__u64 destination[2];
	__u64 destination_mask[2];
	__u64 limit_interval; /* ns between two packets */
	__u64 limit_tolerance; /* ns: (burst - 1) * interval */
	__u32 log_sample;
	__u32 pad;
};

enum fw_slot_flag {
	FW_USES_SETS4 = 1,
	FW_USES_SETS6 = 2,
	FW_USES_INTERFACES = 4,
};

/* A whole policy but for its sets and interfaces, which are maps beside it. */
struct fw_slot {
	__u32 epoch;
	__u32 flags;
	__u32 first[2]; /* per direction: where its entries begin, and how many there are */
	__u32 count[2];
	__u8 defaults[2];
	__u8 pad[2];
	__u32 default_sample; /* report one in N packets that the default dropped; 0 is none */
	__u8 digest[32];
	struct fw_rule rules[FW_MAX_RULES];
};

struct fw_set_key4 {
	__u32 length;
	__u8 address[4];
};

struct fw_set_key6 {
	__u32 length;
	__u8 address[16];
};

/* Which sets an address is in: one bit per set number, those of covering prefixes included. */
struct fw_set_value {
	__u64 sets[FW_SET_WORDS];
};

/* Times are in jiffies, filled in by user space, which knows their rate. */
struct fw_config {
	__u32 timeout_syn;
	__u32 timeout_established;
	__u32 timeout_closing;
	__u32 timeout_udp;
	__u32 timeout_udp_replied;
	__u32 timeout_icmp;
	__u32 timeout_other;
	__u32 timeout_fragment;
	__u32 touch; /* a flow's last-seen is written at most this often */
	__u32 adopt_until; /* tick: TCP flows that were there before are taken over until then */
};

/* Both directions of a flow have one key: the lower (address, port) comes first. */
struct fw_flow_key {
	__u64 low[2];
	__u64 high[2];
	__u16 low_port;
	__u16 high_port;
	__u8 protocol;
	__u8 family;
	__u8 pad[2];
};

enum fw_flow_stage {
	FW_FLOW_OPENING = 0, /* only one side was seen */
	FW_FLOW_OPEN = 1,
	FW_FLOW_CLOSING = 2,
	FW_FLOW_RESET = 3, /* open, and somebody said that it is not; whoever goes on talking proves him wrong */
};

/* What one hook direction said about the flow's original packet. */
struct fw_flow_side {
	__u32 allowed; /* epoch in which it was allowed last; 0: this hook has not seen it */
	__u32 denied; /* epoch in which it was found to be denied; kept, so that a revert lets it live on */
	__u32 identity; /* the rule that decided, or FW_NO_RULE */
	__u32 ifindex;
};

struct fw_flow {
	__u32 seen; /* jiffies, low 32 bits */
	__u8 swapped; /* the original packet went from high to low */
	__u8 direction; /* of the hook that saw it first */
	__u8 stage; /* fw_flow_stage */
	__u8 icmp_type; /* of the original packet */
	struct fw_flow_side sides[2];
};

struct fw_fragment_key {
	__u64 source[2];
	__u64 destination[2];
	__u32 id;
	__u8 protocol;
	__u8 family;
	__u8 direction;
	__u8 pad;
};

struct fw_fragment {
	__u32 epoch;
	__u32 seen;
};

struct fw_bucket_key {
	__u64 source[2]; /* zero for a bucket of the whole rule */
	__u32 identity;
	__u32 pad;
};

struct fw_counter {
	__u64 packets;
	__u64 bytes;
};

/* One per CPU. Indices are fw_reason; the second index is the verdict. */
#define FW_REASONS 12
struct fw_totals {
	__u64 packets[2][FW_REASONS][2]; /* direction, reason, verdict */
	__u64 by_slot[FW_SLOTS][2]; /* packets judged by each slot, by verdict: which generation judged */
	__u64 flows_created;
	__u64 flows_failed;
	__u64 revalidated;
	__u64 past_deadline; /* judged by the fallback because the deadline had passed */
	__u64 events_lost;
};

/* A sampled packet, as the ring buffer carries it. */
struct fw_event {
	__u64 boot_ns;
	__u64 source[2];
	__u64 destination[2];
	__u32 epoch;
	__u32 identity; /* FW_NO_RULE for the default */
	__u32 order;
	__u32 ifindex;
	__u32 length;
	__u32 sample;
	__u16 source_port;
	__u16 destination_port;
	__u8 family;
	__u8 protocol;
	__u8 direction;
	__u8 verdict;
	__u8 reason;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 tcp_flags;
	__u32 pad;
};

/* In front of a frame given to fw_probe by TEST_RUN: the question, and after the run the answer. */
#define FW_PROBE_ACTIVE 0xff
struct fw_probe {
	__u64 interfaces;
	__u32 epoch; /* answer */
	__u32 identity; /* answer */
	__u32 order; /* answer */
	__u8 slot; /* 0, 1, or FW_PROBE_ACTIVE */
	__u8 direction;
	__u8 state; /* fw_state */
	__u8 network; /* the frame has no Ethernet header */
	__u8 verdict; /* answer */
	__u8 reason; /* answer */
	__u8 parsed; /* answer */
	__u8 done; /* answer: 1 */
};

/* What fw_clock tells, so that user space learns the rate of jiffies. */
struct fw_clock {
	__u64 jiffies;
	__u64 monotonic_ns;
};

#endif
