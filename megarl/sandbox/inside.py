"""Builds the walls around a program, from within, and then becomes it.

Contract: run as a script of its own by `megarl.sandbox.run`, with the standard library alone; arguments are the file
descriptor to report on and the parent's process id. It reads a JSON job on standard input. It reports "started" when
the program is about to run, and "ended CODE"; anything else it reports is why there is no sandbox.

    this script ── unshares everything, builds the file system ── waits
      └─ process 1 of the new namespace: when it ends, the kernel ends all that are in there ── waits
           └─ the program, behind its limits
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable

NOBODY = 65534
# <linux/sched.h>: mounts, UTS, IPC, user, PID, network
NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (1 << bit for bit in (17, 26, 27, 28, 29, 30))
# <sys/mount.h>
NOSUID, NODEV, BIND, RECURSIVE, PRIVATE = 2, 4, 4096, 16384, 1 << 18
# <sys/prctl.h>
SET_PDEATHSIG, SET_NO_NEW_PRIVS = 1, 38
SYS_MOUNT_SETATTR = 442  # the same on every architecture
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
# Where the new root can be put together, hidden from all other processes.
SCAFFOLDS = ("/tmp", "/mnt", "/srv", "/var/tmp")
BOX = "/box"

libc = ctypes.CDLL(None, use_errno=True)


def main(report: int, parent: int) -> None:
    os.set_inheritable(report, False)
    job = json.loads(sys.stdin.buffer.read())
    python = os.path.realpath(sys.executable)
    die_with(parent)
    user = NOBODY if os.getuid() == 0 else os.getuid()
    apart = job["isolation"] == "namespaces"
    if apart:
        leave()
        box = new_root(python, f"size={job['disk_mb']}m,nr_inodes=4096,mode=700,uid={user}")
    else:
        box = job["folder"]
        os.chown(box, user, -1)
    os.chdir(box)
    for name, text in (("main.py", job["program"]), ("stdin", job["stdin"])):
        with open(name, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
    first = os.fork()
    if first == 0:
        die_with(os.getppid() if not apart else 0)  # a parent outside of the namespace has the number 0
        os._exit(first_process(python, job, report))
    _, status = os.waitpid(first, 0)
    os.write(report, b"" if status == 0 else f"process 1 ended with {status}\n".encode())


def first_process(python: str, job: dict, report: int) -> int:
    """Start the program, and take up what it leaves behind until it ends."""
    child = os.fork()
    if child == 0:
        try:
            become_program(python, job, report)
        except BaseException as error:
            os.write(report, f"cannot start the program: {type(error).__name__}: {error}\n".encode())
            os._exit(1)
    while True:
        ended, status = os.wait()
        if ended == child:
            os.write(report, f"ended {os.waitstatus_to_exitcode(status)}\n".encode())
            return 0


def become_program(python: str, job: dict, report: int) -> None:
    if os.getuid() == 0:  # whose processes no limit on their number binds, and who may do what a user may not
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    die_with(os.getppid())
    call("prctl", libc.prctl, SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    stdin = os.open("stdin", os.O_RDONLY)
    os.dup2(stdin, 0)
    os.close(stdin)
    os.unlink("stdin")
    memory, disk = job["memory_mb"] << 20, job["disk_mb"] << 20
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, job["cpu_s"])
    limit(resource.RLIMIT_FSIZE, disk)
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_NPROC, job["processes"])
    os.write(report, b"started\n")
    limit(resource.RLIMIT_AS, memory)
    os.execve(python, [python, "-I", "-S", "-B", "main.py"], {"PYTHONHASHSEED": "0"})


def limit(what: int, value: int) -> None:
    resource.setrlimit(what, (value, value))


def die_with(parent: int) -> None:
    call("prctl", libc.prctl, SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def leave() -> None:
    """Into namespaces of our own, where users keep their numbers: a user its own, root those of root and nobody."""
    uid, gid, me = os.getuid(), os.getgid(), os.getpid()
    unshared, tell = os.pipe()
    helper = os.fork() if uid == 0 else None  # two numbers can only be mapped by root, from outside
    if helper == 0:
        os.close(tell)
        if os.read(unshared, 1):
            for name in ("uid_map", "gid_map"):
                write(f"/proc/{me}/{name}", f"0 0 1\n{NOBODY} {NOBODY} 1")
        os._exit(0)
    call("unshare", libc.unshare, NEW_NS | NEW_UTS | NEW_IPC | NEW_USER | NEW_PID | NEW_NET)
    if helper is None:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{uid} {uid} 1")
        write("/proc/self/gid_map", f"{gid} {gid} 1")
    else:
        os.write(tell, b"x")
        _, status = os.waitpid(helper, 0)
        if status:
            raise OSError(errno.EPERM, "root may not map user numbers into a namespace here")
    os.close(unshared)
    os.close(tell)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def new_root(python: str, box: str) -> str:
    """Change to a root that has Python, the system's libraries, four devices and an empty folder, which is returned."""
    prefix = os.path.realpath(sys.base_prefix)
    sources = [path for path in dict.fromkeys((*SYSTEM, prefix, os.path.dirname(python))) if os.path.exists(path)]
    sources = [path for path in sources if not any(path.startswith(f"{other}/") for other in sources)]
    free = [at for at in SCAFFOLDS if os.path.isdir(at) and not any(path.startswith(f"{at}/") for path in sources)]
    root = free[0]
    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=64k,mode=755")
    for path in sources:
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        else:
            bind(path, root + path)
            read_only(root + path, AT_RECURSIVE)
    for path in DEVICES:
        bind(path, root + path)
    os.mkdir(root + BOX)
    mount("tmpfs", root + BOX, "tmpfs", NOSUID | NODEV, box)
    read_only(root, 0)
    os.chroot(root)
    return BOX


def bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(source, target, None, BIND | RECURSIVE)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    call(f"mount {source or ''} on {target}", libc.mount, *words, flags, None if data is None else data.encode())


def read_only(path: str, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY | ATTR_NOSUID | (ATTR_NODEV if flags else 0), 0, 0, 0)
    arguments = (ctypes.c_int(AT_FDCWD), path.encode(), ctypes.c_uint(flags), attributes, ctypes.c_size_t(32))
    call(f"making {path} read-only", libc.syscall, ctypes.c_long(SYS_MOUNT_SETATTR), *arguments)


def call(what: str, function: Callable[..., int], *arguments: object) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)} ({errno.errorcode.get(number, number)})")


if __name__ == "__main__":
    descriptor = int(sys.argv[1])
    try:
        main(descriptor, int(sys.argv[2]))
    except BaseException as error:
        os.write(descriptor, f"{type(error).__name__}: {error}\n".encode())
        sys.exit(1)
