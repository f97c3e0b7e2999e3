/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* One program of each kind that the loader works with. `seen` counts what each XDP and TC program met. */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, __u64);
} seen SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u64);
} word SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __u64);
} table SEC(".maps");

struct inner {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u64));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct inner);
} outer SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} events SEC(".maps");

struct sum {
	__u64 one;
	__u64 two;
	__u64 answer;
};

static __always_inline void met(__u32 index)
{
	__u64 *count = bpf_map_lookup_elem(&seen, &index);

	if (count)
		*count += 1;
}

SEC("xdp")
int xdp_first(struct xdp_md *xdp)
{
	met(0);
	return XDP_DROP;
}

SEC("xdp")
int xdp_second(struct xdp_md *xdp)
{
	met(1);
	return XDP_DROP;
}

SEC("tc")
int tc_first(struct __sk_buff *skb)
{
	met(2);
	return TC_ACT_SHOT;
}

SEC("tc")
int tc_second(struct __sk_buff *skb)
{
	met(3);
	return TC_ACT_SHOT;
}

/* Writes the mapped word over the frame's first eight bytes, and reports the whole frame's length. */
SEC("xdp")
int stamp(struct xdp_md *xdp)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	__u32 zero = 0;
	__u64 *value = bpf_map_lookup_elem(&word, &zero), length = end - data;

	if (!value || data + 8 > end)
		return XDP_ABORTED;
	*(__u64 *)data = *(volatile __u64 *)value;
	bpf_ringbuf_output(&events, &length, sizeof(length), 0);
	return XDP_TX;
}

/* The value that the inner map at index 0 has under key 7, cut to 32 bits. */
SEC("xdp")
int look_inside(struct xdp_md *xdp)
{
	__u32 zero = 0, seven = 7;
	void *inside = bpf_map_lookup_elem(&outer, &zero);
	__u64 *value = inside ? bpf_map_lookup_elem(inside, &seven) : NULL;

	return value ? *value : -1;
}

SEC("syscall")
int add(struct sum *sum)
{
	sum->answer = sum->one + sum->two;
	return 5;
}

char LICENSE[] SEC("license") = "GPL";
