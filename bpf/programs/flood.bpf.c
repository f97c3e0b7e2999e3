/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * A packet generator: TEST_RUN with BPF_F_TEST_XDP_LIVE_FRAMES runs it once for every frame, and what it answers happens to the
 * frame. `out` sends the frame out of an interface, `into` hands it to the stack as if that interface had received it.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

struct flood_plan {
	__u32 ifindex; /* where `out` sends */
	__u32 vary_at; /* offset in the frame of a 32-bit word that differs from frame to frame */
	__u32 vary_mask; /* which of its bits, in the order of the wire; 0: every frame is the same */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct flood_plan);
} plan SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} sent SEC(".maps");

/* Frames are recycled as they were left, so bits are replaced, never added up. */
static __always_inline struct flood_plan *next_frame(struct xdp_md *xdp)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	__u32 zero = 0, *word;
	struct flood_plan *here = bpf_map_lookup_elem(&plan, &zero);
	__u64 *count = bpf_map_lookup_elem(&sent, &zero);

	if (!here || !count)
		return NULL;
	*count += 1;
	if (here->vary_mask && here->vary_at < 1024) {
		word = data + here->vary_at;
		if ((void *)(word + 1) <= end)
			*word = (*word & ~here->vary_mask) | (bpf_get_prandom_u32() & here->vary_mask);
	}
	return here;
}

SEC("xdp")
int out(struct xdp_md *xdp)
{
	struct flood_plan *here = next_frame(xdp);

	return here ? bpf_redirect(here->ifindex, 0) : XDP_ABORTED;
}

SEC("xdp")
int into(struct xdp_md *xdp)
{
	return next_frame(xdp) ? XDP_PASS : XDP_ABORTED;
}

char LICENSE[] SEC("license") = "GPL";
