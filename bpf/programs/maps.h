/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The maps. All but the private ones of a dry run are pinned, and outlive programs, module and agent. */
#ifndef LOOPBACK_MAPS_H
#define LOOPBACK_MAPS_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#include "firewall.h"

struct inner_slot {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32)); /* sizes, not types: clang leaves types that only inner maps name undefined */
	__uint(value_size, sizeof(struct fw_slot));
};

struct inner_sets4 {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(key_size, sizeof(struct fw_set_key4));
	__uint(value_size, sizeof(struct fw_set_value));
};

struct inner_sets6 {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(key_size, sizeof(struct fw_set_key6));
	__uint(value_size, sizeof(struct fw_set_value));
};

struct inner_interfaces {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(key_size, sizeof(__u32)); /* ifindex */
	__uint(value_size, sizeof(__u64)); /* bits of the policy's interface patterns */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, FW_SLOTS);
	__type(key, __u32);
	__array(values, struct inner_slot);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, FW_SLOTS);
	__type(key, __u32);
	__array(values, struct inner_sets4);
} sets4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, FW_SLOTS);
	__type(key, __u32);
	__array(values, struct inner_sets6);
} sets6 SEC(".maps");

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

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct fw_flow_key);
	__type(value, struct fw_flow);
} flows SEC(".maps");

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
	__uint(max_entries, FW_MAX_COUNTERS);
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

/* Takes no room; it makes the compiler describe every shared structure in BTF, where user space checks its own views. */
const volatile struct {
	__u32 layout;
	struct fw_rule rule[0];
	struct fw_slot slot[0];
	struct fw_set_key4 set_key4[0];
	struct fw_set_key6 set_key6[0];
	struct fw_set_value set_value[0];
	struct fw_config config[0];
	struct fw_flow_key flow_key[0];
	struct fw_flow flow[0];
	struct fw_counter counter[0];
	struct fw_totals totals[0];
	struct fw_event event[0];
	struct fw_probe probe[0];
	struct fw_clock clock[0];
} fw_shapes SEC(".rodata") = {.layout = FW_LAYOUT};

#endif
