"""The three system calls that Python 3.11 has no name for: unshare, setns and prctl.

Namespaces here have no name in the file system. They live as long as a process is in them or holds a
descriptor of them, so however the processes end, the kernel removes the whole network.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distcomp.errors import DistcompError

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

REMEDY = (  # where the kernel forbids namespaces, or what is done inside them
    "run as root, or allow user namespaces (sysctl user.max_user_namespaces above 0; on Ubuntu also "
    "kernel.apparmor_restrict_unprivileged_userns=0), or start the container with --privileged"
)

_libc = ctypes.CDLL(None, use_errno=True)


def _check(status: int, call: str) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


class Refused(DistcompError):
    """This machine lacks or forbids a part that emulation needs; the message says which, and the remedy."""


def isolate(force_rootless: bool) -> bool:
    """Move this process, which must have one thread, into an empty network of its own; True if not as root.

    Root needs nothing else. Everybody else does it through a user namespace, where users keep their own id:
    programs run there see themselves as usual and hold no privilege, while this process may build networks.
    Raises Refused where neither is allowed.
    """
    if not force_rootless:
        try:
            _check(_libc.unshare(_CLONE_NEWNET), "unshare(network)")
            return False
        except OSError:
            pass  # not root, or a container's root: the kernel may still grant a user namespace
    uid, gid = os.geteuid(), os.getegid()
    try:
        _check(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET), "unshare(user, network)")
        Path("/proc/self/setgroups").write_text("deny")  # else the kernel forbids an unprivileged gid_map
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError as error:
        raise Refused(f"network namespaces are refused here ({error}); {REMEDY}") from error
    return True


def current() -> int:
    """A descriptor of the network namespace this process is in."""
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def enter(namespace: int) -> None:
    """Move the calling thread into the network namespace behind a descriptor."""
    _check(_libc.setns(namespace, _CLONE_NEWNET), "setns(network)")


def create_namespace() -> int:
    """A descriptor of a new network namespace; the caller stays where it is."""
    home = current()
    try:
        _check(_libc.unshare(_CLONE_NEWNET), "unshare(network)")
        created = current()
        enter(home)
        return created
    finally:
        os.close(home)


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Run the body in another network namespace, then come back."""
    home = current()
    enter(namespace)
    try:
        yield
    finally:
        enter(home)
        os.close(home)


def die_with_parent(signal: int) -> None:
    """Ask the kernel for `signal` when the parent thread dies; survives exec, is not inherited by fork."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0), "prctl(PDEATHSIG)")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(CHILD_SUBREAPER)")
