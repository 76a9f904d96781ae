"""Programs that try to get out of the sandbox, or to wear it out. They print what they got."""

SURVEY = r"""
import ctypes, fcntl, os, resource, signal, socket, struct, sys

def tries(name, attempt):
    try:
        print(name, "got", repr(attempt()))
    except BaseException as error:
        print(name, "refused", type(error).__name__)

def system_call(number, *args):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, args)) < 0:
        raise OSError(ctypes.get_errno(), "refused")

secret, outside, port, number = sys.stdin.read().split()
pid = int(number)
def connect(): socket.create_connection(("127.0.0.1", int(port)), 1)
def unix(): socket.socket(socket.AF_UNIX).connect(secret)
def vsock(): socket.socket(40, socket.SOCK_STREAM)
def pair(kind): return [end.detach() for end in socket.socketpair(socket.AF_UNIX, kind)]
def own(command, value): return fcntl.fcntl(pair(socket.SOCK_STREAM)[0], command, value)
def own_by_ioctl(command): return fcntl.ioctl(pair(socket.SOCK_STREAM)[0], command, struct.pack("i", pid))
def link(): os.symlink(secret, "link"); return open("link").read()
def link_to_write(): os.symlink(outside, "out"); open("out", "w").write("written")
def hard_link(): os.link(secret, "hard")

tries("connect", connect)
tries("unix", unix)
tries("vsock", vsock)
tries("packets", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
tries("datagrams", lambda: pair(socket.SOCK_DGRAM))
tries("packet_pair", lambda: pair(socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC))
tries("read", lambda: open(secret).read())
tries("link", link)
tries("hard_link", hard_link)
tries("write", lambda: open(outside, "w").write("written"))
tries("link_to_write", link_to_write)
tries("library", lambda: open(os.__file__, "a"))
tries("root", lambda: open("/new", "w"))
tries("devices", lambda: os.mknod("disk", 0o60600, os.makedev(254, 0)))
tries("proc", lambda: open(f"/proc/{number}/environ").read())
tries("proc_parent", lambda: open(f"/proc/{os.getppid()}/environ").read())
tries("kill_parent", lambda: os.kill(os.getppid(), signal.SIGKILL))
tries("kill_host", lambda: os.kill(int(number), signal.SIGKILL))
tries("owner", lambda: own(8, pid))
tries("owner_ex", lambda: own(15, struct.pack("ii", 1, pid)))
tries("owner_ioctl", lambda: own_by_ioctl(0x8901))
tries("group_ioctl", lambda: own_by_ioctl(0x8902))
tries("affinity", lambda: os.sched_setaffinity(pid, {min(os.sched_getaffinity(0))}))
tries("scheduler", lambda: os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0)))
tries("parameters", lambda: os.sched_setparam(pid, os.sched_param(0)))
tries("priority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
tries("io_priority", lambda: system_call(251, 1, pid, 0x6000))
tries("move_pages", lambda: system_call(279, pid, 0, 0, 0, 0, 0))
tries("migrate_pages", lambda: system_call(256, pid, 0, 0, 0))
tries("other_limits", lambda: resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0)))
tries("become_root", lambda: os.setuid(0))
tries("change_root", lambda: os.chroot("/tmp"))
tries("unshare", lambda: system_call(272, 0x10000000))
tries("clone", lambda: system_call(56, 0x10000011, 0, 0, 0, 0))
tries("clone3", lambda: system_call(435, 0, 0))
tries("ptrace", lambda: system_call(101, 16, os.getppid(), 0, 0))
tries("io_uring", lambda: system_call(425, 1, 0))
tries("memfd", lambda: os.memfd_create("m"))
tries("bpf", lambda: system_call(321, 0, 0, 0))
tries("keyring", lambda: system_call(250, 0, -3, 0))
tries("limits", lambda: __import__("resource").setrlimit(7, (1000, 1000)))
print("environment", sorted(os.environ))
print("still", "alive")
"""

# Memory, a queue and semaphores of another process, by their numbers; it prints the errors.
SYSTEM_V = r"""
import ctypes, os
memory, queue, semaphores = map(int, input().split())
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
unlink = 241 if os.uname().machine == "x86_64" else 181
space = ctypes.create_string_buffer(1024)
attempts = {
    "shmget": lambda: libc.shmget(1, 64, 0o1600),
    "shmat": lambda: libc.shmat(memory, None, 0),
    "shmctl": lambda: libc.shmctl(memory, 2, space),
    "shmdt": lambda: libc.shmdt(space),
    "msgget": lambda: libc.msgget(1, 0o1600),
    "msgsnd": lambda: libc.msgsnd(queue, b"\1" + bytes(15), 1, 0o4000),
    "msgrcv": lambda: libc.msgrcv(queue, space, 1, 0, 0o4000),
    "msgctl": lambda: libc.msgctl(queue, 2, space),
    "semget": lambda: libc.semget(1, 1, 0o1600),
    "semop": lambda: libc.semop(semaphores, b"\0\0\1\0\0\0", 1),
    "semtimedop": lambda: libc.semtimedop(semaphores, b"\0\0\1\0\0\0", 1, None),
    "semctl": lambda: libc.semctl(semaphores, 0, 12),
    "mq_unlink": lambda: libc.syscall(ctypes.c_long(unlink), b"name"),
}
for name, attempt in attempts.items():
    ctypes.set_errno(0)
    attempt()
    print(name, ctypes.get_errno())
"""

# Each leaves processes behind that carry MARK in their command line.
SURVIVORS = r"""
import os, sys, time
mark, how = sys.stdin.read().split()
sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(600)", mark]
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for descriptor in range(3):
            os.close(descriptor)
        os.execv(sleeper[0], sleeper)
    os._exit(0)
if os.fork() == 0:
    os.execv(sleeper[0], sleeper)
time.sleep(0.3)
print("started", flush=True)
if how == "stay":
    time.sleep(600)
os._exit(0)
"""

FORK_BOMB = r"""
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""

FORGERY = r"""
import os
for descriptor in range(3, 64):
    try:
        os.write(descriptor, b"exit 0 0.0\n")
    except OSError:
        pass
os._exit(7)
"""

LEFTOVERS = r"""
import os
os.symlink("/", "root")
os.makedirs("a/b/c")
open("a/b/c/file", "w").write("text")
os.chmod("a/b/c", 0)
os.chmod("a/b", 0)
"""
