"""The process that puts programs into their sandboxes: `python -I -S sandbox_launcher.py SOCKET`.

`rljax.rewards.sandbox` starts one for a process and sends it, for each program, five descriptors: of a file with the
marshalled settings, of a pipe for one line of report, and the program's stdin, stdout and stderr. The report is "exit
CODE SECONDS", "signal NUMBER SECONDS", "timeout 0 SECONDS", or "error MESSAGE" where the sandbox could not be set up;
then the program was not run.

    server  ->  launcher  ->  init  ->  the program
           fork          fork     fork, exec

With namespaces init is process 1 of a process namespace: when it ends, the kernel ends whatever the program has
started. It sees a read-only file system of Python and the shared libraries, with one writable folder that is gone with
it. Without them init and launcher are subreapers, which orphans cannot leave, and the launcher kills their descendants.

The server ends with the process that started it, whose end closes the socket, and all others end with the server. This
file imports nothing of rljax. What it does between fork and exec is all that stands between a program and the machine,
so nothing in it fails silently.
"""

import ctypes
import marshal
import os
import resource
import select
import socket
import struct
import sys
import time

NOBODY = 65534  # user and group that a program gets where root starts it
INSIDE = 1000  # its user and group in the namespace
SIGKILL = 9

# Flags of unshare(2): user, mount, process, network, System V, host name, cgroup.
NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38

SHARED_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
PACKAGES = ("site-packages", "dist-packages")
DEVICES = ("null", "zero", "full", "random", "urandom")

# System calls by number on x86_64 and on aarch64 (None: it has none of that name). A program gets EPERM for these.
REFUSED = {
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    **{"pidfd_getfd": (438, 438), "process_madvise": (440, 440), "perf_event_open": (298, 241), "bpf": (321, 280)},
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97)},
    **{"setns": (308, 268), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433)},
    **{"move_mount": (429, 429), "open_tree": (428, 428), "mount_setattr": (442, 442), "swapon": (167, 224)},
    **{"swapoff": (168, 225), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264)},
    **{"keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "userfaultfd": (323, 282)},
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    **{"kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273)},
    **{"delete_module": (176, 106), "reboot": (169, 142), "sethostname": (170, 161), "setdomainname": (171, 162)},
    **{"acct": (163, 89), "quotactl": (179, 60), "settimeofday": (164, 170), "clock_settime": (227, 112)},
    **{"adjtimex": (159, 171), "clock_adjtime": (305, 266), "syslog": (103, 116), "personality": (135, 92)},
    **{"fanotify_init": (300, 262), "lookup_dcookie": (212, 18), "iopl": (172, None), "ioperm": (173, None)},
    **{"modify_ldt": (154, None), "uselib": (134, None), "mknod": (133, None), "mknodat": (259, 33)},
    # a network, and sockets of other programs in the file system; pairs stay legal
    "socket": (41, 198),
    # memory that no limit of a process counts
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447)},
    # System V's memory, queues and semaphores, open to all who know their number; queues by name
    **{"shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "shmdt": (67, 197)},
    **{"semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192)},
    **{"msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187)},
    **{"mq_open": (240, 180), "mq_unlink": (241, 181), "mq_timedsend": (242, 182), "mq_timedreceive": (243, 183)},
    **{"mq_notify": (244, 184), "mq_getsetattr": (245, 185)},
}
SIGNALS = {  # refused besides where the program shares process numbers with others; tgkill: see `seccomp_filter`
    **{"kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)},
    **{"pidfd_send_signal": (424, 424), "setpriority": (141, 140), "sched_setparam": (142, 118)},
    **{"sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274)},
    **{"ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239)},
}
CLONE, CLONE3, TGKILL, PRLIMIT64, SOCKETPAIR = (56, 220), (435, 435), (234, 131), (302, 261), (53, 199)
# A descriptor sends its owner a signal: (call, the values of its second argument that choose owner or signal).
OWNERS = [
    ((72, 25), (8, 10, 15)),  # fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX
    ((16, 29), (0x8901, 0x8902)),  # ioctl: FIOSETOWN, SIOCSPGRP
]
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args) -> int:
    """A function of the C library. Raises OSError where it returns -1."""
    result = getattr(libc, name)(*args)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


# --------------------------------------------------------------------------------------------------------- system calls


def seccomp_filter(own_signals_only: bool) -> bytes:
    """The filter as a classic BPF program: it refuses with EPERM, and ends a program of another architecture."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(f"no table of system calls for {machine}; there is one for {' and '.join(ARCHITECTURES)}")
    column, audit = ARCHITECTURES[machine]
    refused = REFUSED | SIGNALS if own_signals_only else REFUSED
    numbers = [numbers[column] for numbers in refused.values() if numbers[column] is not None]
    load, equal, at_least, any_bit, mask, end = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    allow, refuse, no_such_call, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    nr, arch, first, second = 0, 4, 16, 24  # offsets in seccomp_data: number, architecture, arguments
    program = [(load, 0, 0, arch), (equal, 1, 0, audit), (end, 0, 0, kill), (load, 0, 0, nr)]
    if machine == "x86_64":
        program += [(at_least, 0, 1, 0x40000000), (end, 0, 0, kill)]  # the x32 calls
    for number in numbers:
        program += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    # glibc tries clone3, whose flags a filter cannot read, and takes clone where there is none
    program += [(equal, 0, 1, CLONE3[column]), (end, 0, 0, no_such_call)]
    program += [(equal, 0, 4, CLONE[column]), (load, 0, 0, first), (any_bit, 0, 1, 0x7E020000), (end, 0, 0, refuse)]
    program += [(end, 0, 0, allow)]
    # limits of other processes; process 0 is the caller itself
    program += [(equal, 0, 4, PRLIMIT64[column]), (load, 0, 0, first), (equal, 1, 0, 0), (end, 0, 0, refuse)]
    program += [(end, 0, 0, allow)]
    # pairs of AF_UNIX streams alone: one of datagrams can still send to any path
    program += [(equal, 0, 7, SOCKETPAIR[column]), (load, 0, 0, first), (equal, 0, 3, 1), (load, 0, 0, second)]
    program += [(mask, 0, 0, 0xF), (equal, 1, 0, 1), (end, 0, 0, refuse), (end, 0, 0, allow)]
    for numbers, values in OWNERS if own_signals_only else ():
        program += [(equal, 0, 2 * len(values) + 2, numbers[column]), (load, 0, 0, second)]
        for value in values:
            program += [(equal, 0, 1, value), (end, 0, 0, refuse)]
        program += [(end, 0, 0, allow)]
    if own_signals_only:  # abort() and raise() of the program itself
        program += [(equal, 0, 4, TGKILL[column]), (load, 0, 0, first), (equal, 1, 0, os.getpid())]
        program += [(end, 0, 0, refuse), (end, 0, 0, allow)]
    program += [(end, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def filter_system_calls(own_signals_only: bool) -> None:
    """From now on this process and its children cannot make the refused calls."""
    code = seccomp_filter(own_signals_only)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)))
    call("prctl", PR_SET_SECCOMP, 2, program, 0, 0)


# ----------------------------------------------------------------------------------------------------------- namespaces


def enter_namespaces() -> None:
    """New namespaces for this process; its next child is process 1 of a process namespace.

    The ids are mapped by a child that stays outside. Where root starts the sandbox, the program becomes another user:
    limits of processes do not hold for root.
    """
    outside, inside = os.getuid(), os.getgid()
    maps = [f"{INSIDE} {outside} 1", f"{INSIDE} {inside} 1"]
    if outside == 0:
        maps = [f"0 0 1\n{INSIDE} {NOBODY} 1", f"0 {inside} 1\n{INSIDE} {NOBODY} 1"]
    launcher = os.getpid()
    wait_read, wait_write = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(wait_write)
        if os.read(wait_read, 1):
            if outside != 0:
                write(f"/proc/{launcher}/setgroups", "deny")
            write(f"/proc/{launcher}/uid_map", maps[0])
            write(f"/proc/{launcher}/gid_map", maps[1])
            os._exit(0)
        os._exit(1)
    os.close(wait_read)
    call("unshare", NAMESPACES)
    os.write(wait_write, b"1")
    os.close(wait_write)
    _, status = os.waitpid(helper, 0)
    if status != 0:
        raise OSError("the ids of the user namespace could not be mapped")
    call("sethostname", b"sandbox", ctypes.c_size_t(len("sandbox")))  # it begins with the machine's name
    call("setdomainname", b"", ctypes.c_size_t(0))


def write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    os.write(descriptor, text.encode())
    os.close(descriptor)


def set_mount_flags(path: str, flags: int, recursive: int) -> None:
    """mount_setattr(2) adds the flags."""
    attributes = ctypes.create_string_buffer(struct.pack("QQQQ", flags, 0, 0, 0))
    arguments = (ctypes.c_long(AT_FDCWD), path.encode(), ctypes.c_long(recursive), attributes, ctypes.c_size_t(32))
    call("syscall", ctypes.c_long(MOUNT_SETATTR), *arguments)


def build_file_system(root: str, megabytes: int) -> None:
    """Mount at `root` what the program is to see: Python and shared libraries, devices without content, /tmp."""
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    mount_memory(root, "size=1m,nr_inodes=1k,mode=755")
    for path in (*SHARED_LIBRARIES, *python_folders()):
        if os.path.islink(path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path) and not os.path.exists(root + path):
            bind(path, root + path)
            set_mount_flags(root + path, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, AT_RECURSIVE)
    for path in INSTALLED:
        if os.path.isdir(root + path):
            mount_memory(root + path, "size=4k,nr_inodes=1,mode=555")  # nothing in it, and no room for anything
    os.makedirs(root + "/dev")
    for name in DEVICES:
        bind(f"/dev/{name}", f"{root}/dev/{name}")
    os.mkdir(root + "/tmp")
    mount_memory(root + "/tmp", f"size={megabytes}m,nr_inodes=4k,mode=1777")
    set_mount_flags(root, ATTR_RDONLY, 0)
    os.chdir(root)
    call("syscall", ctypes.c_long(155 if os.uname().machine == "x86_64" else 41), b".", b".")  # pivot_root
    call("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def mount_memory(path: str, options: str) -> None:
    call("mount", b"sandbox", path.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options.encode())


def bind(source: str, target: str) -> None:
    """Make `target`, which does not exist, another name of `source`."""
    if os.path.isdir(source):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    call("mount", source.encode(), target.encode(), None, MS_BIND | MS_REC, None)


def python_folders() -> list[str]:
    """The interpreter's file and its standard library, parents before children."""
    return sorted({sys.executable, os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib")})


def installed_packages() -> list[str]:
    """The folders of packages beside the standard libraries, of all Pythons that a program would see."""
    found = []
    for folder in (*SHARED_LIBRARIES, *python_folders()):
        if os.path.islink(folder) or not os.path.isdir(folder):
            continue
        pythons = [os.path.join(folder, name) for name in os.listdir(folder) if name.startswith("python")]
        found += [os.path.join(python, kind) for python in (folder, *pythons) for kind in PACKAGES]
    return sorted({path for path in found if os.path.isdir(path) and not os.path.islink(path)})


INSTALLED = installed_packages()  # once in the server, not for each program


# ---------------------------------------------------------------------------------------------------------- the program


def run_program(spec: dict, own_user: tuple[int, int] | None) -> None:
    """Become the program. own_user: user and group to become before that; None: those that there are."""
    for name, value in spec["limits"].items():
        if name == "RLIMIT_NPROC" and spec["isolation"] != "namespaces":
            value += count_tasks(os.getuid() if own_user is None else own_user[0])
        if hasattr(resource, name):
            lower_limit(getattr(resource, name), value)
    if own_user is not None:
        os.setgroups([])
        os.setresgid(own_user[1], own_user[1], own_user[1])
        os.setresuid(own_user[0], own_user[0], own_user[0])
    if sys.platform == "linux":
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if spec["isolation"] != "rlimits":
        filter_system_calls(own_signals_only=spec["isolation"] == "seccomp")
    os.execve(sys.executable, [sys.executable, "-s", "-S", "-B", *spec["arguments"]], spec["environment"])


def lower_limit(kind: int, value: int) -> None:
    """Set both limits to the value, or to the hard limit that there is, if that is lower."""
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    more = kind == resource.RLIMIT_CPU and hard == resource.RLIM_INFINITY  # a second between SIGXCPU and SIGKILL
    resource.setrlimit(kind, (value, value + more))


def count_tasks(user: int) -> int:
    """Threads of all processes of the user: RLIMIT_NPROC counts them, too, where there is no namespace."""
    count = 0
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue  # it has ended
    return count


def write_files(spec: dict, owner: int | None) -> None:
    """The program's files in the present folder."""
    for name, content in spec["files"].items():
        if os.path.dirname(name):
            os.makedirs(os.path.dirname(name), exist_ok=True)
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with open(descriptor, "wb") as file:
            file.write(content)
        if owner is not None:
            os.chown(name, owner, owner)


def run_init(spec: dict, status: int, alive: int) -> None:
    """The program's parent: set up what it will see, start it, write how it ended to `status`, and end.

    alive: a pipe that closes when the launcher ends.
    """
    os.setsid()
    in_namespaces = spec["isolation"] == "namespaces"
    is_root = os.geteuid() == 0
    if sys.platform == "linux":
        call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    if select.select([alive], [], [], 0)[0]:
        return  # the launcher ended before the signal of its end was asked for
    if in_namespaces:
        build_file_system(spec["folder"], spec["disk_megabytes"])
    else:
        os.chdir(spec["folder"])
    inside = INSIDE if in_namespaces else NOBODY
    write_files(spec, inside if is_root else None)
    start = time.monotonic()
    program = os.fork()
    if program == 0:
        try:
            run_program(spec, (inside, inside) if is_root else None)
        except BaseException as error:
            report_error(status, error)
        os._exit(1)
    while True:
        ended, code = os.wait()
        if ended == program:
            break
    found = f"exit {os.WEXITSTATUS(code)}" if os.WIFEXITED(code) else f"signal {os.WTERMSIG(code)}"
    os.write(status, f"{found} {time.monotonic() - start:.6f}\n".encode())


def report_error(descriptor: int, error: BaseException) -> None:
    os.write(descriptor, f"error {type(error).__name__}: {error}"[:1000].replace("\n", " ").encode() + b"\n")


# --------------------------------------------------------------------------------------------------------- the launcher


def launch(spec: dict) -> str:
    """Run the program to its end or its deadline, end whatever it has left, and return the report."""
    if spec["isolation"] == "namespaces":
        enter_namespaces()
    status, init_status = os.pipe()
    alive, keep_alive = os.pipe()
    init = os.fork()
    if init == 0:
        os.close(status)
        os.close(keep_alive)
        try:
            run_init(spec, init_status, alive)
        except BaseException as error:
            report_error(init_status, error)
        os._exit(0)
    os.close(init_status)
    seconds = spec["seconds"]
    has_ended = select.select([status], [], [], seconds)[0]
    found = os.read(status, 2000).decode(errors="replace") if has_ended else f"timeout 0 {seconds}"
    kill_children(init)
    return found.partition("\n")[0] or f"signal {SIGKILL} {seconds}"  # nothing: init itself was killed


def kill_children(init: int) -> None:
    """End init, its group and all that descend from it; orphans become children of this process."""
    try:
        os.killpg(init, SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(init, SIGKILL)
    os.waitpid(init, 0)
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if ended == 0:
            for child in children_of(os.getpid()):
                os.kill(child, SIGKILL)
            time.sleep(0.001)


def children_of(parent: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/stat") as file:
                if name.isdigit() and int(file.read().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(name))
        except (OSError, ValueError):
            continue  # it has ended, or is no process
    return found


def serve_one(descriptors: list[int], server: int) -> None:
    """The launcher's whole life: read the settings, launch, report."""
    spec_descriptor, report, *standard = descriptors
    if sys.platform == "linux":
        call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        if os.getppid() != server:
            return  # it ended before the signal of its end was asked for
    try:
        for number, descriptor in enumerate(standard):
            os.dup2(descriptor, number)
            os.close(descriptor)
        with open(spec_descriptor, "rb") as file:
            spec = marshal.load(file)
        line = launch(spec)
    except BaseException as error:
        report_error(report, error)
        return
    os.write(report, line.encode())


def serve(descriptor: int) -> None:
    """Fork a launcher for each request, until the socket closes."""
    os.umask(0o022)
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1, 5)
        if not message:
            return
        for received in descriptors:
            os.set_inheritable(received, False)  # the report is not the program's to write
        server = os.getpid()
        if os.fork() == 0:
            connection.close()
            try:
                serve_one(descriptors, server)
            finally:
                os._exit(0)
        for received in descriptors:
            os.close(received)
        while reap():
            pass


def reap() -> bool:
    """Whether a launcher that has ended was waited for."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


if __name__ == "__main__":
    serve(int(sys.argv[1]))
