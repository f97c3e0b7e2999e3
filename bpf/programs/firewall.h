/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Everything the firewall's programs and user space agree on. User space mirrors it in bpf/layout.py, and a test
 * compares the two through the object's BTF. Fixed-width types only; every structure is padded by hand.
 *
 * Addresses are two 64-bit numbers in host order, the upper half first (events carry them in network order); an IPv4 address
 * stands in its v4-mapped form (::ffff:a.b.c.d), and the family is kept beside it, so that an IPv6 packet with a v4-mapped
 * address is never taken for IPv4.
 */
#ifndef LOOPBACK_FIREWALL_H
#define LOOPBACK_FIREWALL_H

#define FW_LAYOUT 5 /* counts up with every change that an older program could not read */

#define FW_SLOTS 2
#define FW_TUPLES 64 /* of one classifier: a bit each */
#define FW_STEPS 20 /* of a binary search in a table: intervals of one block, as a power of two */
#define FW_SET_STEPS 22 /* of one in a set: changes at one place of the root */
#define FW_SLACK 4096 /* bytes behind the arena, so that a structure at its very end is whole */
#define FW_MAX_VLANS 2
#define FW_MAX_EXTENSIONS 8
#define FW_NO_RULE 0xffffffffu

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

/*
 * A slot: one policy, in half of the arena. Everything below is found by its offset in bytes from the beginning of that half;
 * user space writes it through a mapping, and programs mask every offset. See docs/adr/0019-classification.md.
 *
 * A classifier holds the rules of one direction and one family. Each rule of the policy is one entry or several, which lie in
 * chains sorted by order. With `tuples` 0 there is one chain, which begins at the first entry. Otherwise entries are grouped by
 * tuple, that is by which bits of the packet they are found by, and `heads` maps the hash of those bits to a chain. Five tables
 * tell which tuples can hold an entry for an address, a port or a protocol; the AND of the five leaves one or two of them.
 * Entries that no bits of an address lead to are found by the classes of both addresses instead.
 */
enum fw_entry_flag {
	FW_LAST = 1, /* of its chain */
	FW_ACCEPTS = 2,
	FW_MORE = 4, /* there are a set, or conditions of the rule beside those of the entry */
	FW_SAMPLES = 8, /* the rule reports */
	FW_CONDITIONS = 16, /* the rule has conditions beside the entry's and its sets */
};

struct fw_match {
	__u32 order; /* position of its rule in the policy, from 0 */
	__u32 identity; /* counter slot, stable over policies */
	__u16 ports[2]; /* from, to; for ICMP: type << 8 | code */
	__u16 source_ports[2];
	__u8 source_shift; /* IPv4: 32 - length; IPv6: length */
	__u8 destination_shift;
	__u8 protocol;
	__u8 protocol_mask; /* 0: any protocol */
	__u8 needs; /* packet flags that must be there: ports, or an ICMP type */
	__u8 flags; /* fw_entry_flag */
	__u8 source_set; /* number of a set, or 0 */
	__u8 destination_set;
};

struct fw_entry4 {
	__u32 source; /* host order, zero beyond the length */
	__u32 destination;
	struct fw_match match;
};

struct fw_entry6 {
	__u64 source[2]; /* host order, the upper half first */
	__u64 destination[2];
	struct fw_match match;
	__u64 pad;
};

enum fw_rule_flag {
	FW_INTERFACES = 1,
	FW_LIMIT_RULE = 2,
	FW_LIMIT_SOURCE = 4,
};

/* What a rule has beside what its entries say; by order. */
struct fw_rule {
	__u32 log_sample;
	__u8 states; /* fw_state bits; 0 is any */
	__u8 flags; /* fw_rule_flag */
	__u8 pad[2];
	__u64 interfaces; /* bits of the slot's interface patterns */
	__u64 limit_interval; /* ns between two packets */
	__u64 limit_tolerance; /* ns: (burst - 1) * interval */
};

struct fw_tuple4 {
	__u32 source_mask;
	__u32 destination_mask;
	__u64 transport_mask; /* over protocol << 32 | source port << 16 | destination port */
	__u32 best; /* the lowest order of its entries; tuples are sorted by it */
	__u32 seed;
	__u32 class_mask; /* over the classes of both addresses: all of them, or none */
	__u32 pad;
};

struct fw_tuple6 {
	__u64 source_mask[2];
	__u64 destination_mask[2];
	__u64 transport_mask;
	__u32 best;
	__u32 seed;
	__u32 class_mask;
	__u32 pad;
};

/*
 * From a number to the tuples that may hold an entry for it. The root is indexed by the number's upper bits: an entry with
 * FW_DIRECT is the class of all numbers there, any other names a block, 4-byte offset | steps << 26, of 2^steps interval
 * starts in ascending order (the first is left out; the rest is filled up with the last), then as many 16-bit classes.
 */
#define FW_ENTRY_MASK 0xffffffu /* of a head; it also keeps the range that the verifier sees the same on every round */
#define FW_DIRECT 0x80000000u
struct fw_table {
	__u32 root;
	__u32 shift;
	__u32 blocks; /* where the 4-byte offsets count from */
	__u32 classes; /* a u64 of tuples for each class */
	__u64 base; /* IPv6: where the root begins; the number is the upper half of the address */
	__u64 limit; /* IPv6: the last index of the root */
};

enum fw_field { FW_SOURCE = 0, FW_DESTINATION = 1, FW_PORT = 2, FW_SOURCE_PORT = 3, FW_FIELDS = 4 };

struct fw_classifier {
	__u32 tuples; /* how many */
	__u32 count; /* entries */
	__u32 entries; /* offset */
	__u32 tuple; /* offset */
	__u32 heads; /* offset of u32: tag << 24 | entry + 1; tag 0: of several keys, else the upper byte of the hash, made odd */
	__u32 heads_mask;
	__u32 protocols; /* offset of 256 u64 of tuples */
	__u32 first; /* without tuples: the chain's first entry + 1; else 0 */
	__u32 classes; /* offset of 256 bytes, the class of a source by its first byte, and as many for destinations */
	__u32 pad;
	struct fw_table fields[FW_FIELDS];
};

/*
 * A set of prefixes in one family: the ascending addresses at which "in the set" changes, so an address is in it when an odd number
 * of them is not above it. The root is indexed as in fw_table and holds the place of the first change there; one more entry ends it.
 *
 * In front of a large set of IPv4 stands a filter: a bit for each block of addresses, 0 where the set has none of them. Most
 * addresses are in no deny list, and half a megabyte stays in the cache where four do not.
 */
struct fw_set {
	__u32 root; /* offset */
	__u32 changes; /* offset of u32, or with `narrow` of the lower u16; for IPv6 of two u64 */
	__u32 shift;
	__u32 narrow; /* the root has all upper 16 bits, so that the lower ones are enough: half the cache lines */
	__u32 filter; /* with `narrow`: offset of u32, 32 blocks each */
	__u32 filter_shift; /* with `narrow`: an address >> this is its block */
	__u64 base; /* IPv6, as in fw_table */
	__u64 limit;
};

enum fw_slot_flag {
	FW_USES_INTERFACES = 1,
	FW_USES_LIMITS = 2,
};

struct fw_slot {
	__u32 epoch;
	__u16 flags;
	__u16 shadow; /* report one in N packets of each rule and reason, for the staged policy to judge too; 0 is none */
	__u32 rules; /* offset of struct fw_rule by order */
	__u32 sets; /* offset of struct fw_set by number, IPv4 and IPv6 of each side by side */
	__u32 default_sample; /* report one in N packets that the default dropped; 0 is none */
	__u8 defaults[2];
	__u8 mark[10]; /* of who wrote it: two processes may stage at once, and only the last one may commit */
	__u8 digest[32];
	struct fw_classifier classifiers[2][2]; /* direction; IPv4, IPv6 */
};

/* How large the halves of the arena are: set by user space when it loads the programs. */
struct fw_sizes {
	__u64 half; /* bytes, a power of two */
	__u32 buckets; /* of the connection table, a power of two */
	__u32 weak; /* whether this machine may reorder reads: then programs pay for barriers */
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
	FW_FLOW_OPENING = 0, /* TCP: before its handshake is done; others: only one side was seen */
	FW_FLOW_OPEN = 1,
	FW_FLOW_CLOSING = 2,
	FW_FLOW_RESET = 3, /* open, and somebody said that it is not; whoever goes on talking proves him wrong */
};

/* Who has spoken. Only a proven flow is never given up for a new one: nobody can make one with a forged address. */
enum fw_flow_proof {
	FW_ONE_SIDED = 0,
	FW_ANSWERED = 1,
	FW_PROVEN = 2, /* TCP: who began acknowledged the answer; others: this host began, was answered and went on */
};

/* What one hook direction said about the flow's original packet. */
struct fw_flow_side {
	__u32 allowed; /* epoch in which it was allowed last; 0: this hook has not seen it */
	__u32 denied; /* epoch in which it was found to be denied; kept, so that a revert lets it live on */
	__u32 identity; /* the rule that decided, or FW_NO_RULE */
	__u32 ifindex;
};

/* An entry of the connection table: two cache lines, the first of which decides. */
struct fw_flow {
	struct fw_flow_key key;
	__u64 seen; /* jiffies */
	__u32 sequence; /* odd while it is written; everything but `seen` is written only then */
	__u32 life; /* jiffies that it lives on without a packet */
	__u8 swapped; /* the original packet went from high to low */
	__u8 direction; /* of the hook that saw it first */
	__u8 stage; /* fw_flow_stage */
	__u8 proof; /* fw_flow_proof */
	__u32 number; /* TCP: what the one who began must acknowledge to prove the flow; 0: anything */
	struct fw_flow_side sides[2];
	__u64 born; /* jiffies */
	__u8 icmp_type; /* of the original packet */
	__u8 pad[23];
};

/* A bucket of the connection table: the tag of each way, 0 for a free one. A tag only says which ways are worth a look. Ways are
 * taken in their order, and never given back, but to another flow. */
#define FW_WAYS 16
struct fw_flow_tags {
	__u64 word[FW_WAYS / 4]; /* four tags each; way 4n + m is the m-th from below in word n */
};

/* What keys the table's hash: random, and as old as the table. */
struct fw_flow_seed {
	__u64 word[11];
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
	__u64 flows_failed; /* not remembered: there was no room */
	__u64 flows_evicted; /* given up unproven, to make room */
	__u64 revalidated;
	__u64 past_deadline; /* judged by the fallback because the deadline had passed */
	__u64 events_lost;
};

/* Why a packet is reported: its rule logs it, or the shadow samples it. */
enum fw_why { FW_LOGGED = 1, FW_SHADOWED = 2 };
/* Which side of a flow spoke for a packet, and that it is an answer to the flow's original one. */
enum fw_asked { FW_ASKED_EGRESS = 1, FW_ASKED_REPLY = 2 };

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
	__u8 why; /* fw_why */
	__u8 packet; /* flags of struct packet */
	__u8 asked; /* fw_asked: of whom a flow said what was done */
	__u8 pad;
	__u32 origin; /* by a flow: the device of the packet that began it */
	__u32 pad2;
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
