"""The system-call filter of a module and of the agent: a list of what may be called, everything else is refused.

Named and allowed: what programs in any language need. Named and refused with EPERM: what no module needs, so that a library
that tries it gets an answer that it understands. Any other call, also one that is newer than this list, gets ENOSYS, for
which C libraries have a way around. Calls of another architecture end the process. Nothing else does: a module that
probes for something must not die of it.

The filter is made by libseccomp (part of every Debian with systemd), which knows the numbers of each architecture. Where it
is missing there is no filter, and the host says so.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import functools
import os
import socket
from typing import Final

#: Which capability opens which calls.
GIVEN: Final[dict[str, tuple[str, ...]]] = {
    "CAP_BPF": ("bpf",),
    "CAP_PERFMON": ("perf_event_open", "bpf"),
    "CAP_SYS_CHROOT": ("chroot",),
    "CAP_SYS_TIME": ("clock_settime", "settimeofday", "adjtimex", "clock_adjtime"),
    "CAP_SYSLOG": ("syslog",),
    "CAP_SYS_PTRACE": ("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd"),
    "CAP_SYS_ADMIN": ("mount", "umount2", "setns", "unshare", "pivot_root", "open_tree", "move_mount", "fsopen",
                      "fsconfig", "fsmount", "quotactl", "bpf", "perf_event_open"),
    "CAP_DAC_READ_SEARCH": ("open_by_handle_at",),
    "CAP_MKNOD": ("mknod", "mknodat"),
}  # fmt: skip

#: What no module needs. Refused by name, unless a capability opens it.
_REFUSED_NAMES: Final = """
    acct add_key adjtimex afs_syscall bpf chroot clock_adjtime clock_settime delete_module fanotify_init finit_module
    fsconfig fsmount fsopen fspick getpmsg init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp
    kexec_file_load kexec_load keyctl lookup_dcookie mbind migrate_pages mknod mknodat modify_ldt mount mount_setattr
    move_mount move_pages name_to_handle_at nfsservctl open_by_handle_at open_tree pciconfig_iobase pciconfig_read
    pciconfig_write perf_event_open personality pidfd_getfd pivot_root process_madvise process_vm_readv
    process_vm_writev ptrace quotactl quotactl_fd reboot request_key set_mempolicy setdomainname sethostname setns
    settimeofday swapoff swapon sysfs syslog umount umount2 unshare uselib userfaultfd ustat vhangup vm86 vm86old vserver
"""
REFUSED: Final = tuple(_REFUSED_NAMES.split())

_ALLOWED_NAMES: Final = """
    _llseek _newselect accept accept4 access alarm arch_prctl arm_fadvise64_64 bind brk cacheflush capget capset chdir
    clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
    clock_nanosleep_time64 close close_range connect copy_file_range dup dup2 dup3 epoll_create epoll_create1
    epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2
    fadvise64 fadvise64_64 fallocate fchdir fcntl fcntl64 fdatasync
    fgetxattr flistxattr flock fork fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex
    futex_time64 futex_waitv futimesat get_mempolicy get_robust_list get_thread_area getcpu getcwd getdents getdents64
    getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp
    getpid getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid
    getsockname getsockopt gettid gettimeofday getuid getuid32 getxattr inotify_add_watch inotify_init inotify_init1
    inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioctl ioprio_get
    ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lgetxattr link
    linkat listen listxattr llistxattr lseek lstat lstat64 madvise membarrier memfd_create mincore mkdir mkdirat mlock
    mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64
    mq_timedsend mq_timedsend_time64 mq_unlink mremap msgctl msgget msgrcv msgsnd msync munlock munlockall munmap
    nanosleep newfstatat nice pause pidfd_open pidfd_send_signal pipe pipe2 poll ppoll ppoll_time64
    prctl pread64 preadv preadv2 pselect6 pselect6_time64 pwrite64 pwritev pwritev2 read readahead readlink
    readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages rename renameat renameat2
    restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
    rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
    sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
    sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp
    select semctl semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto
    set_robust_list set_thread_area set_tid_address set_tls setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32
    setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid
    setresuid32 setreuid setreuid32 setrlimit setsid setsockopt setuid setuid32 shmat shmctl shmdt shmget shutdown
    sigaction sigaltstack signal signalfd signalfd4 sigpending sigprocmask sigreturn sigsuspend socketpair splice stat
    stat64 statfs statfs64 statx swapcontext symlink symlinkat sync sync_file_range sync_file_range2 syncfs sysinfo tee
    tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64
    timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate truncate64
    ugetrlimit umask uname unlink unlinkat utime utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid
    write writev
"""
_ALLOWED: Final = tuple(_ALLOWED_NAMES.split())

#: CLONE_NEW* (linux/sched.h): cgroup, uts, ipc, user, pid, net and mount namespaces. That of time lies where clone(2) has the
#: exit signal, so only unshare and clone3 can ask for it.
_NAMESPACES: Final = 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000

#: Set-user-ID and set-group-ID: who is root's without capabilities could make any of root's files a way for others to be root
#: with all of them. A file's owner may set them, and Landlock does not look at modes. Where an argument is compared, by its
#: index: modes, and for the calls that open a file the flags as well, since without O_CREAT and O_TMPFILE the mode is noise.
_SET_ID: Final = 0o6000
_CREATES: Final = 0o100 | 0o20000000  # the same on both architectures
_MODES: Final = {"creat": 1, "open": 2, "openat": 3}
_FLAGS: Final = {"open": 1, "openat": 2}

#: Root's files are a module's own to the kernel: it could make any of them everybody's, and Landlock looks neither at modes nor
#: at owners. They succeed and change nothing, by name or by descriptor, as on a file system without modes:
#: an error would end shutil.copy and much else, and what is the module's own is nobody else's anyway (umask 077, in a folder
#: with mode 0700). Modes by the index of that argument; a capability whose very meaning it is makes them work.
_CHANGE_MODE: Final = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2}
_CHANGE_OWNER: Final = ("chown", "chown32", "fchown", "fchown32", "fchownat", "lchown", "lchown32")
_BY_OWNERSHIP: Final = frozenset({"CAP_FOWNER", "CAP_DAC_OVERRIDE"})

#: Unix sockets are not among them: what root may ask of other programs over theirs is more than any module needs.
FAMILIES: Final = (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
_AF_PACKET: Final = 17

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO(n)
_NO_EFFECT: Final = _ERRNO | 0  # SCMP_ACT_ERRNO(0): the call is not made, and says that it succeeded
_EQUAL, _MASKED = 4, 7  # SCMP_CMP_EQ, _MASKED_EQ
_UNKNOWN: Final = -1  # __NR_SCMP_ERROR
ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*


class _Comparison(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError:
        return None
    found.seccomp_init.restype = ctypes.c_void_p
    found.seccomp_init.argtypes = [ctypes.c_uint32]
    found.seccomp_release.argtypes = [ctypes.c_void_p]
    found.seccomp_arch_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    found.seccomp_arch_remove.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    found.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p
    ]  # fmt: skip
    found.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    found.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    found.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    return found


@functools.lru_cache(maxsize=16)
def program(
    capabilities: frozenset[str], *, unix: bool = False, modes: bool = False, architecture: str = ""
) -> bytes | None:
    """The filter, as classic BPF, for a process with these capabilities; None where libseccomp is missing.

    `unix` also allows Unix sockets, `modes` to change modes and owners of files. `architecture` names another one than the
    running (for tests). Raises OSError.
    """
    library = _library()
    if library is None:
        return None
    context = library.seccomp_init(_ERRNO | errno.ENOSYS)
    if not context:
        raise OSError(errno.ENOMEM, "seccomp_init")
    try:
        if architecture:
            _checked(library.seccomp_arch_remove(context, 0), "arch_remove")  # SCMP_ARCH_NATIVE
            _checked(library.seccomp_arch_add(context, ARCHITECTURES[architecture]), "arch_add")
        _checked(
            library.seccomp_attr_set(context, 8, 2), "attr_set"
        )  # SCMP_FLTATR_CTL_OPTIMIZE: a binary tree
        given = {call for name in capabilities for call in GIVEN.get(name, ())}
        _rules(library, context, given, capabilities, unix=unix, modes=modes)
        return _exported(library, context)
    finally:
        library.seccomp_release(context)


def _rules(
    library: ctypes.CDLL,
    context: int,
    given: set[str],
    capabilities: frozenset[str],
    *,
    unix: bool,
    modes: bool,
) -> None:
    def add(action: int, name: str, *comparisons: tuple[int, int, int, int]) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == _UNKNOWN:
            return  # newer than this libseccomp, or of an architecture that it does not serve
        rows = (_Comparison * len(comparisons))(*(_Comparison(*row) for row in comparisons))
        status = library.seccomp_rule_add_array(context, action, number, len(comparisons), rows)
        # What an architecture does not have gets a number that is none, and EDOM where arguments are compared.
        if status not in (0, -errno.EDOM, -errno.EEXIST):
            raise OSError(-status, f"seccomp_rule_add {name}")

    for name in sorted({*_ALLOWED, *given}):
        add(_ALLOW, name)
    for name in sorted(set(REFUSED) - given):
        add(_ERRNO | errno.EPERM, name)
    if "unshare" in given:
        add(_ALLOW, "clone")
        add(_ALLOW, "clone3")
    else:
        # clone3 hides its flags in memory, where no filter looks: it gets ENOSYS, and C libraries take clone.
        add(_ALLOW, "clone", (0, _MASKED, _NAMESPACES, 0))
    # openat2 hides its mode in memory: it gets ENOSYS as well.
    for name, index in _MODES.items():
        add(_ALLOW, name, (index, _MASKED, _SET_ID, 0))
        if name in _FLAGS:
            add(_ALLOW, name, (_FLAGS[name], _MASKED, _CREATES, 0))
    changing = _ALLOW if modes or capabilities & _BY_OWNERSHIP else _NO_EFFECT
    for name, index in _CHANGE_MODE.items():
        add(changing, name, (index, _MASKED, _SET_ID, 0))
    for name in _CHANGE_OWNER:
        add(_ALLOW if modes or "CAP_CHOWN" in capabilities else _NO_EFFECT, name)
    # Root's processes may set each other's limits without any capability: one second of processor time ends whichever it is.
    add(_ALLOW, "prlimit64", (0, _EQUAL, 0, 0))
    families = [int(family) for family in FAMILIES]
    if "CAP_NET_RAW" in capabilities:
        families.append(_AF_PACKET)
    if unix:
        families.append(int(socket.AF_UNIX))
    for family in families:
        add(_ALLOW, "socket", (0, _EQUAL, family, 0))


def _exported(library: ctypes.CDLL, context: int) -> bytes:
    descriptor = os.memfd_create("filter", os.MFD_CLOEXEC)
    try:
        _checked(library.seccomp_export_bpf(context, descriptor), "export_bpf")
        os.lseek(descriptor, 0, os.SEEK_SET)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read()
    finally:
        os.close(descriptor)


def _checked(status: int, what: str) -> None:
    if status < 0:
        raise OSError(-status, f"seccomp_{what}")
