/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The maps. All but the private ones of a dry run are pinned, and outlive programs, module and agent. */
#ifndef LOOPBACK_MAPS_H
#define LOOPBACK_MAPS_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#include "firewall.h"

#define FW_HALF (1 << 20)
#define FW_BUCKETS 4096

struct inner_interfaces {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(key_size, sizeof(__u32)); /* ifindex */
	__uint(value_size, sizeof(__u64)); /* bits of the policy's interface patterns */
};

/* Both slots, one after the other. User space writes the idle one through a mapping, which no grace period guards: it waits for one
 * (see `fence`) before it touches a slot that packets may still read. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, FW_SLOTS * FW_HALF + FW_SLACK); /* user space sets its own when it loads */
} arena SEC(".maps");

/* Known to the verifier, which bounds every access to the arena by it. */
const volatile struct fw_sizes sizes SEC(".rodata.sizes") = {.half = FW_HALF, .buckets = FW_BUCKETS, .weak = 1};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, FW_SLOTS);
	__type(key, __u32);
	__array(values, struct inner_interfaces);
} interfaces SEC(".maps");

/* No packet reads it. User space updates it to wait for a grace period: an update of an outer map returns only when every
 * packet that was under way has finished. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct inner_interfaces);
} fence SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE); /* user space writes the word with one aligned store */
	__type(key, __u32);
	__type(value, __u64);
} active SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fw_config);
} config SEC(".maps");

/* The connection table, see table.h: user space sets its own sizes when it loads, and reads it through mappings. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FW_BUCKETS * FW_WAYS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32); /* bucket * FW_WAYS + way */
	__type(value, struct fw_flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FW_BUCKETS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct fw_flow_tags);
} flow_tags SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fw_flow_seed);
} flow_seed SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct fw_fragment_key);
	__type(value, struct fw_fragment);
} fragments SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct fw_bucket_key);
	__type(value, __u64); /* when the bucket is full again, boot ns */
} buckets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 8192); /* rule identities; user space sets its own when it loads */
	__type(key, __u32);
	__type(value, struct fw_counter);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fw_totals);
} totals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
} events SEC(".maps");

/* Holds `fw_core`, which every TC entry goes on to. User space puts it there before any entry is attached; as map and place are
 * constants, the kernel makes a plain jump of it. Each set has its own: the map is emptied when nobody holds it any more. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} core SEC(".maps");

/* Takes no room; it makes the compiler describe every shared structure in BTF, where user space checks its own views. */
const volatile struct {
	__u32 layout;
	struct fw_rule rule[0];
	struct fw_entry4 entry4[0];
	struct fw_entry6 entry6[0];
	struct fw_tuple4 tuple4[0];
	struct fw_tuple6 tuple6[0];
	struct fw_slot slot[0];
	struct fw_set set[0];
	struct fw_config config[0];
	struct fw_flow_key flow_key[0];
	struct fw_flow flow[0];
	struct fw_flow_tags flow_tags[0];
	struct fw_flow_seed flow_seed[0];
	struct fw_counter counter[0];
	struct fw_totals totals[0];
	struct fw_event event[0];
	struct fw_probe probe[0];
	struct fw_clock clock[0];
} fw_shapes SEC(".rodata") = {.layout = FW_LAYOUT};

#endif
