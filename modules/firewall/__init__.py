"""The firewall: a policy language, a compiler to slots of the kernel, and the module that moves policies into it.

`datapath.Datapath` is the whole kernel side; `policy.parse` reads a policy. Imports bpf, contracts and the SDK, nothing above.
"""
