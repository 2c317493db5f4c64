"""Check that a TCP port is free, before models are loaded; otherwise the server would fail minutes later."""

import socket
from pathlib import Path


def port_fault(address: str, port: int) -> str:
    """Return why a TCP port cannot be listened on, with the process that uses it if known; "" if it is free."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((address, port))
            sock.listen(1)
            return ""
        except OSError as error:
            holder = _holder(port)
            return f"{error.strerror}{f' ({holder})' if holder else ''}"


def _holder(port: int) -> str:
    """Return the process that listens on a port, as "NAME, process ID"; "" if /proc does not show it."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
        except OSError:
            continue
        # proc(5): local address, state (0A is LISTEN), inode
        inodes |= {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
    for process in Path("/proc").glob("[0-9]*") if inodes else ():
        try:
            if any(str(handle.readlink()) in inodes for handle in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()}, process {process.name}"
        except OSError:
            continue
    return ""
