"""A seccomp filter: the system calls that a Python program of one process needs, and no others.

A list of what is allowed, not of what is refused: chmod, ptrace, io_uring and the calls of kernels to come are refused
alike, with ENOSYS, which libraries know how to take. Standard library alone. man 2 seccomp
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

# name:number on x86-64:number on 64-bit ARM, as Linux's unistd.h has them
_ALLOWED = """
read:0:63 write:1:64 open:2:- close:3:57 stat:4:- fstat:5:80 lstat:6:- poll:7:- lseek:8:62 mmap:9:222
mprotect:10:226 munmap:11:215 brk:12:214 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139
rt_sigpending:127:136 rt_sigsuspend:130:133 rt_sigtimedwait:128:137 sigaltstack:131:132 pread64:17:67 pwrite64:18:68
readv:19:65 writev:20:66 access:21:- pipe:22:- pipe2:293:59 select:23:- sched_yield:24:124 mremap:25:216
msync:26:227 mincore:27:232 madvise:28:233 dup:32:23 dup2:33:- dup3:292:24 nanosleep:35:101 clock_nanosleep:230:115
getitimer:36:102 setitimer:38:103 alarm:37:- timer_create:222:107 timer_settime:223:110 timer_gettime:224:108
timer_delete:226:111 getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176
getegid:108:177 getgroups:115:158 getresuid:118:148 getresgid:120:150 getpgid:121:155 getpgrp:111:- getsid:124:156
uname:63:160 fcntl:72:25 flock:73:32 fsync:74:82 fdatasync:75:83 ftruncate:77:46 getdents:78:- getdents64:217:61
getcwd:79:17 chdir:80:49 fchdir:81:50 rename:82:- renameat:264:38 renameat2:316:276 mkdir:83:- mkdirat:258:34
rmdir:84:- unlink:87:- unlinkat:263:35 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36 readlink:89:-
readlinkat:267:78 umask:95:166 gettimeofday:96:169 getrlimit:97:163 getrusage:98:165 sysinfo:99:179 times:100:153
arch_prctl:158:- futex:202:98 futex_waitv:449:449 sched_getaffinity:204:123 sched_getparam:143:121
sched_getscheduler:145:120 sched_get_priority_max:146:125 sched_get_priority_min:147:126 set_tid_address:218:96
set_robust_list:273:99 get_robust_list:274:100 rseq:334:293 clock_gettime:228:113 clock_getres:229:114 time:201:-
exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21
epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441 openat:257:56 newfstatat:262:79 statx:332:291
faccessat:269:48 faccessat2:439:439 pselect6:270:72 ppoll:271:73 eventfd2:290:19 timerfd_create:283:85
timerfd_settime:286:86 timerfd_gettime:287:87 getrandom:318:278 statfs:137:43 fstatfs:138:44 close_range:436:436
copy_file_range:326:285 sendfile:40:71 fadvise64:221:223 fallocate:285:47 socketpair:53:199 recvfrom:45:207
shutdown:48:210 getsockopt:55:209 setsockopt:54:208 getsockname:51:204 getpeername:52:205 membarrier:324:283
getcpu:309:168 restart_syscall:219:128 clone:56:220 kill:62:129 tgkill:234:131 ioctl:16:29 prctl:157:167
prlimit64:302:261 sendto:44:206 capget:125:90
"""
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, AUDIT_ARCH
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: ld [k], jeq k, jset k, ret k
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_SET_SECCOMP, _FILTER = 22, 2  # prctl's option and mode
_SYSCALL = {"x86_64": 317, "aarch64": 277}  # seccomp itself, to ask what the kernel knows

_CLONE_THREAD = 0x00010000
_SET_NAME = 15  # prctl
_TERMINAL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # ioctl: terminal? its size, bytes waiting, blocking, exec
_OWNERS = (8, 10, 15)  # fcntl: who is sent a signal when a file is ready

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def available() -> bool:
    """Whether this kernel takes filters, on a processor whose system calls are known here."""
    system = os.uname()
    if system.sysname != "Linux" or system.machine not in _ARCHITECTURES:
        return False
    action = ctypes.c_uint32(_REFUSE)
    return _libc.syscall(_SYSCALL[system.machine], ctypes.c_uint(2), ctypes.c_uint(0), ctypes.byref(action)) == 0


def restrict() -> None:
    """Put the filter on this process, for good; `no_new_privileges` must have been called. Raises OSError."""
    instructions = _filter(os.uname().machine, os.getpid())
    program = _Program(len(instructions) // 8, instructions)
    if _libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl(PR_SET_SECCOMP): {os.strerror(ctypes.get_errno())}")


def _filter(machine: str, pid: int) -> bytes:
    column, architecture = _ARCHITECTURES[machine]
    allow, refuse = [_op(_RETURN, _ALLOW)], [_op(_RETURN, _REFUSE | errno.EPERM)]

    def argument(index: int, *values: int) -> list[bytes]:
        """Allow a call whose argument, 32 bits of it, is one of `values`; refuse it with others."""
        checks = [op for value in values for op in (_op(_EQUAL, value, 0, 1), *allow)]
        return [_op(_LOAD, _ARGUMENTS + 8 * index), *checks, *refuse]

    rules = {
        "clone": [_op(_LOAD, _ARGUMENTS), _op(_ANY_BIT, _CLONE_THREAD, 0, 1), *allow, *refuse],  # threads, no processes
        "kill": argument(0, pid),
        "tgkill": argument(0, pid),
        "prlimit64": argument(0, 0, pid),
        "prctl": argument(0, _SET_NAME),
        "ioctl": argument(1, *_TERMINAL),
        "fcntl": [
            _op(_LOAD, _ARGUMENTS + 8),
            *(op for command in _OWNERS for op in (_op(_EQUAL, command, 0, 1), *refuse)),
            *allow,
        ],
        # To a connected peer alone: with an address it would reach the sockets of others. A pointer has two halves.
        "sendto": [
            _op(_LOAD, _ARGUMENTS + 32), _op(_EQUAL, 0, 1, 0), *refuse,
            _op(_LOAD, _ARGUMENTS + 36), _op(_EQUAL, 0, 1, 0), *refuse, *allow,
        ],
    }  # fmt: skip
    program = [_op(_LOAD, _ARCHITECTURE), _op(_EQUAL, architecture, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    for entry in _ALLOWED.split():
        name, *numbers = entry.split(":")
        if numbers[column] != "-":
            body = rules.get(name, allow)
            program += [_op(_EQUAL, int(numbers[column]), 0, len(body)), *body]
    return b"".join([*program, _op(_RETURN, _REFUSE | errno.ENOSYS)])


def _op(code: int, value: int, when_true: int = 0, when_false: int = 0) -> bytes:
    """One instruction: struct sock_filter."""
    return struct.pack("HBBI", code, when_true, when_false, value)
