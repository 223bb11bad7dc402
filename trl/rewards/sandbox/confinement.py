"""
What a process can give up before it runs code that nobody has read: resources on every Unix, and on Linux also other
files (Landlock), the network, other processes and most of what administers a system (seccomp).

Everything here is irrevocable for the process that calls it, needs no privileges, and is a no-op that says so where the
platform does not have it. This module is imported by file, outside of the package, so it stands alone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable

# ---- Resources ----


def limit_resources(limits: dict[str, int], may_fork: bool) -> None:
    """
    Set hard limits on this process.

    Args:
        limits: `cpu_s` seconds of processor time, `memory_bytes` of address space, `file_bytes` a file may grow to,
            `open_files` at a time.
        may_fork: leave the number of processes alone, because something else takes care of it.
    """
    values = {
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    if not may_fork:
        values[resource.RLIMIT_NPROC] = 0
    for kind, value in values.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # macOS does not limit address space
            if kind != resource.RLIMIT_AS:
                raise


# ---- Linux: prctl and capabilities ----

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
SECCOMP_MODE_FILTER = 2
LAST_CAPABILITY = 63


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def drop_privileges() -> None:
    """Give up the capabilities of root and what a set-user-id program could bring back, and end with the parent."""
    libc = _libc()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)  # version 3, this process
    libc.capset(header, ctypes.create_string_buffer(24))  # none effective, permitted or inheritable
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


# ---- Linux: files, by Landlock ----

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
# Rights by bit: execute, write, read file, read directory; then removing, making, moving, truncating, device control.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
RIGHTS_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
READABLE = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
    "/sys/devices/system/cpu",
)


def landlock_version() -> int:
    """Version of the kernel's Landlock; 0 where there is none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(_libc().syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)), 0)


def python_folders() -> list[str]:
    """Where this Python and its packages live; a prefix that is the whole system says nothing."""
    folders = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    return sorted(folders - {"/"})


def restrict_files(readable: Iterable[str], writable: Iterable[str]) -> None:
    """
    From here on, this process opens nothing but what lies in these places.

    Args:
        readable: files and folders to be read; those that do not exist are left out.
        writable: folders for everything, and files to be written.

    Raises:
        OSError: the kernel refused.
    """
    version = landlock_version()
    handled = RIGHTS_BY_VERSION[max(known for known in RIGHTS_BY_VERSION if known <= version)]
    # Version 4 adds binding and connecting TCP sockets; 6 adds abstract Unix sockets and signals to outsiders.
    network = 0b11 if version >= 4 else 0
    scoped = 0b11 if version >= 6 else 0
    attributes = struct.pack("=QQQ", handled, network, scoped)[: 8 if version < 4 else 16 if version < 6 else 24]
    libc = _libc()
    ruleset = _checked(libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    reading = EXECUTE | READ_FILE | READ_DIR
    for paths, rights in ((readable, reading), (writable, handled)):
        for path in paths:
            try:
                folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EACCES):
                    continue
                raise
            allowed = rights & handled if os.path.isdir(path) else rights & handled & FILE_RIGHTS
            _checked(libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, folder), 0))
            os.close(folder)
    _checked(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


# ---- Linux: system calls, by seccomp ----

# Number of each refused call on x86-64 and on ARM64; `None` where it does not exist.
REFUSED_CALLS: dict[str, tuple[int | None, int | None]] = {
    # the network, and local sockets such as that of a container daemon
    "socket": (41, 198),
    # other programs and processes; threads are allowed, see `_filter`
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # limits and priorities, of this and other processes
    "setrlimit": (160, 164),
    "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    # what Landlock lets through: modes, owners, times and attributes of files
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "open_by_handle_at": (304, 265),
    # memory and messages shared by key
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # the system, and corners of the kernel that no exercise needs
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "swapon": (167, 224),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "settimeofday": (164, 170),
    "sethostname": (170, 161),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
# Column of `REFUSED_CALLS`, the kernel's name of the architecture, and the number of `clone`, by machine.
ARCHITECTURES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}
CLONE3 = 435
CLONE_THREAD = 0x00010000
X32_BIT = 0x40000000

# Instructions of the filter: load a word, jump if equal / not less / any bit set, return.
LOAD, JUMP_EQ, JUMP_GE, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
AT_CALL, AT_ARCHITECTURE, AT_FIRST_ARGUMENT = 0, 4, 16


def has_seccomp() -> bool:
    """Whether system calls can be filtered here."""
    if not sys.platform.startswith("linux") or platform.machine() not in ARCHITECTURES or sys.maxsize < 2**32:
        return False
    # Asked with a null pointer, a kernel that knows filters complains about the address.
    libc = _libc()
    return libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None, 0, 0) == -1 and ctypes.get_errno() == errno.EFAULT


def _filter() -> list[tuple[int, int, int, int]]:
    """The filter program: (code, jump if true, jump if false, value)."""
    column, architecture, clone = ARCHITECTURES[platform.machine()]
    program = [
        (LOAD, 0, 0, AT_ARCHITECTURE),
        (JUMP_EQ, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, AT_CALL),
    ]
    if column == 0:  # the calls of x86-64 again, under other numbers
        program += [(JUMP_GE, 0, 1, X32_BIT), (RETURN, 0, 0, KILL)]
    # "Not there" makes the C library fall back to `clone`, whose flags a filter can read.
    program += [(JUMP_EQ, 0, 1, CLONE3), (RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    for number in (numbers[column] for numbers in REFUSED_CALLS.values()):
        if number is not None:
            program += [(JUMP_EQ, 0, 1, number), (RETURN, 0, 0, REFUSE | errno.EPERM)]
    return [
        *program,
        (JUMP_EQ, 0, 3, clone),
        (LOAD, 0, 0, AT_FIRST_ARGUMENT),
        (JUMP_SET, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, REFUSE | errno.EPERM),
        (RETURN, 0, 0, ALLOW),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def restrict_system_calls() -> None:
    """
    From here on, this process has no sockets, starts no process, sends no signal, and leaves the system alone.

    Raises:
        OSError: the kernel refused.
    """
    instructions = b"".join(struct.pack("=HBBI", *instruction) for instruction in _filter())
    program = _Program(len(instructions) // 8, instructions)
    _checked(_libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(_libc().prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))


# ---- All of it ----


def available() -> dict[str, bool]:
    """Which protections this platform has, besides limits on resources: `files`, and `network_and_processes`."""
    return {"files": landlock_version() > 0, "network_and_processes": has_seccomp()}


def confine(limits: dict[str, int], protections: dict[str, bool], folder: str) -> None:
    """
    Give up everything that can be given up.

    Args:
        limits: see `limit_resources`.
        protections: what `available` said.
        folder: the one place where files may be written.
    """
    limit_resources(limits, may_fork=protections["network_and_processes"])
    if sys.platform.startswith("linux"):
        drop_privileges()
    if protections["files"]:
        restrict_files([*READABLE, *python_folders()], [folder, "/dev/null"])
    if protections["network_and_processes"]:
        restrict_system_calls()
