"""What untrusted programs try: each a statement that raises where it is refused. {names} are what the test prepared."""

# Refused by raising; a bare interpreter lets those of CONTROL through.
CONTROL = {
    "read a file": "open({secret!r}).read()",
    "read a file by a link": "os.symlink({secret!r}, {folder!r} + '/s'); open({folder!r} + '/s').read()",
    "list a folder": "os.listdir({folder!r})",
    "list the temporary files": "os.listdir('/tmp')",
    "append to a file": "open({secret!r}, 'a').write('x')",
    "make a file": "open({folder!r} + '/made', 'w')",
    "make a folder": "os.mkdir({folder!r} + '/dir')",
    "link a file": "os.link({secret!r}, {folder!r} + '/hard')",
    "rename a file": "os.rename({secret!r}, {secret!r} + '2'); os.rename({secret!r} + '2', {secret!r})",
    "change rights": "os.chmod({secret!r}, 0o600)",
    "change times": "os.utime({secret!r})",
    "truncate": "os.truncate({secret!r}, 100)",
    "go up": "os.open('..', os.O_RDONLY)",
    "read users": "open('/etc/passwd').read()",
    "read a process": "open('/proc/{pid}/cmdline').read()",
    "read itself": "open('/proc/self/maps').read()",
    "share memory by a file": "open('/dev/shm/' + str({pid}), 'w').write('x'); os.unlink('/dev/shm/' + str({pid}))",
    "read an installed package": "open({package!r}).read()",
    "fork": "os.fork() or os._exit(0)",
    "start a program": "subprocess.run([sys.executable, '-c', ''], check=True)",
    "spawn": "os.posix_spawn(sys.executable, [sys.executable, '-c', ''], {{}})",
    "start a process": "multiprocessing.get_context('fork').Process(target=os.getpid).start()",
    "see a process": "os.kill({pid}, 0)",
    "see its parent's group": "os.killpg(os.getpgid(0), 0)",
    "limit another process": "resource.prlimit({pid}, resource.RLIMIT_CORE)",
    "connect": "socket.create_connection(('127.0.0.1', {port})).close()",
    "send a datagram": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "listen": "socket.create_server(('127.0.0.1', 0))",
    "connect to an abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0slingshot-{pid}')",
    "send to a socket's path": "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', {datagrams!r})",
    "be sent signals": "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "run memory as a file": "os.memfd_create('x')",
    "leave the session": "os.fork() or os.setsid() or os._exit(0)",
}

REFUSED = CONTROL | {
    "run a shell": "os.execv('/bin/sh', ['sh', '-c', 'echo run a shell'])",
    "run python": "os.execv(sys.executable, [sys.executable, '-c', 'print(\"run python\")'])",
    "kill all": "os.kill(-1, 9)",
    "kill its group": "os.kill(0, 15)",
    "kill its parent": "os.kill(os.getppid(), 15)",
    "change owner": "os.chown({secret!r}, os.getuid(), os.getgid())",
    "set an attribute": "os.setxattr({secret!r}, 'user.x', b'1')",
    "remove a file": "os.remove({secret!r})",
    "raise a limit": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "change root": "os.chroot('.')",
    "write into its folder": "open('made', 'w').write('x')",
    "be another user": "os.setuid(12345)",
    "trace": "call(101, 16, {pid}, 0, 0)",
    "read memory": "call(310, {pid}, 0, 0, 0, 0, 0)",
    "mount": "call(165, b'none', b'/tmp', b'tmpfs', 0, 0)",
    "namespaces": "call(272, 0x10000000)",
    "fork by number": "call(57)",
    "vfork by number": "call(58)",
    "clone by number": "call(56, 17, 0, 0, 0, 0)",
    "clone3": "call(435, bytes(88), 88)",
    "socket by number": "call(41, 2, 1, 0)",
    "io_uring": "call(425, 8, bytes(120))",
    "bpf": "call(321, 0, bytes(120), 120)",
    "performance counters": "call(298, bytes(120), 0, -1, -1, 0)",
    "keys": "call(250, 0, -3, 1)",
    "page faults": "call(323, 0)",
    "shared memory": "call(29, 0, 4096, 0o1600)",
    "message queue": "call(68, 0, 0o1600)",
    "the other numbers": "call(0x40000000 | 41, 2, 1, 0)",
    "a handle of a process": "call(434, {pid}, 0)",
}

PRELUDE = """
import ctypes, fcntl, multiprocessing, os, resource, socket, subprocess, sys
def call(number, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)) < 0:
        raise OSError(ctypes.get_errno(), "refused")
"""
# Quietly: what an attempt prints is its own name, and only where it got through.
ATTEMPT = """
try:
    {code}
    print({name!r}, flush=True)
except (OSError, ValueError) as error:
    if not isinstance(error, OSError):
        assert "exceeds" in str(error) or "not allowed" in str(error), repr(error)
"""


def attempts(codes: dict[str, str], **names: object) -> str:
    """A program that tries them all, and prints the names of those that get through."""
    tried = (ATTEMPT.format(code=code.format(**names), name=name) for name, code in codes.items())
    return PRELUDE + "".join(tried) + "\nprint('all tried')\n"
