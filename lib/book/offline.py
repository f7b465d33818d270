"""Refuse every connection that leaves this machine, so that a page or a test cannot come to need the network."""
import ipaddress
import sys

_blocked = False


class NetworkBlocked(RuntimeError):
    """A page or a test tried to reach another machine."""


def _is_local(host) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


def _hook(event, args):
    if not _blocked:
        return
    if event == "socket.connect" and isinstance(args[1], tuple) and not _is_local(args[1][0]):
        raise NetworkBlocked(f"connection to {args[1][0]!r} refused: pages and tests run without a network")
    if event == "socket.getaddrinfo" and not _is_local(args[0]):
        raise NetworkBlocked(f"look-up of {args[0]!r} refused: pages and tests run without a network")


_installed = False


def block_network():
    """From now on this process reaches only localhost (an audit hook: it also sees sockets opened by libraries)."""
    global _blocked, _installed
    _blocked = True
    if not _installed:
        sys.addaudithook(_hook)        # audit hooks cannot be removed, hence the flag
        _installed = True


def allow_network():
    """Undo `block_network`."""
    global _blocked
    _blocked = False
