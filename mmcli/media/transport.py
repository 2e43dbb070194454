"""Messages between the supervisor and a decode worker: pickles on a socket, pixels in shared memory.

A message above INLINE_LIMIT travels as an anonymous memory file whose descriptor goes over the socket
(SCM_RIGHTS), with the arrays out of band (pickle protocol 5, PEP 574): the receiver maps it and sees the
pixels without a copy, and the pages go away with the last array. Since what is left on the socket stays
below its buffer, a send never blocks, so that supervisor and worker cannot wait for each other.
"""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import socket
import struct
import sys
import tempfile
from typing import Any

INLINE_LIMIT = 16 * 1024
_HEADER = struct.Struct("<IB")
_ALIGN = 64
# Where it can, Python keeps no descriptor of its own for each mapping.
_UNTRACKED: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


def send(sock: socket.socket, message: Any) -> None:
    """Send one picklable message. Raises OSError when the other side is gone."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    views = [b.raw() for b in buffers]
    total = len(data) + sum(v.nbytes for v in views)
    if total <= INLINE_LIMIT:
        body = pickle.dumps((data, [bytes(v) for v in views]), protocol=5)
        sock.sendall(_HEADER.pack(len(body), 0) + body)
        return
    descriptor = _shared([memoryview(data), *views])
    try:
        sizes = struct.pack(f"<{1 + len(views)}Q", len(data), *(v.nbytes for v in views))
        header = _HEADER.pack(len(sizes), 1)
        sent = socket.send_fds(sock, [header], [descriptor])
        sock.sendall(header[sent:] + sizes)
    finally:
        os.close(descriptor)


def receive(sock: socket.socket) -> Any:
    """The next message. Raises EOFError when the other side has closed, OSError when it was reset, or no room."""
    header, descriptors, _, _ = socket.recv_fds(sock, _HEADER.size, 1)
    try:
        if len(header) < _HEADER.size:
            header += _exactly(sock, _HEADER.size - len(header))
        length, shared = _HEADER.unpack(header)
        body = _exactly(sock, length)
        if not shared:
            data, inline = pickle.loads(body)
            return pickle.loads(data, buffers=[bytearray(b) for b in inline])
        if not descriptors:
            # The kernel drops them without a word when this process has as many as it may.
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return _load(descriptors[0], struct.unpack(f"<{length // 8}Q", body))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def send_descriptors(sock: socket.socket, descriptors: list[int]) -> None:
    """Hand open files to the other side."""
    socket.send_fds(sock, [b"f"], descriptors)


def receive_descriptors(sock: socket.socket, count: int) -> list[int]:
    """Take over `count` open files. Raises EOFError when the other side has closed."""
    data, descriptors, _, _ = socket.recv_fds(sock, 1, count)
    if not data:
        raise EOFError
    return list(descriptors)


def _shared(views: list[memoryview]) -> int:
    """A descriptor of anonymous memory that holds `views`, each at a multiple of 64 bytes."""
    descriptor = anonymous_file()
    for view in views:
        while view.nbytes:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, _padding(os.lseek(descriptor, 0, os.SEEK_CUR)), os.SEEK_CUR)
    os.ftruncate(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR))
    return descriptor


def anonymous_file() -> int:
    """A descriptor of an empty file without a name, in memory where the system offers that."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mmcli")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _load(descriptor: int, sizes: tuple[int, ...]) -> Any:
    # A private writable mapping: torch.from_numpy warns about read-only arrays.
    mapped = memoryview(mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, **_UNTRACKED))
    views, offset = [], 0
    for size in sizes:
        views.append(mapped[offset : offset + size])
        offset += size + _padding(size)
    return pickle.loads(views[0], buffers=views[1:])


def _padding(size: int) -> int:
    return -size % _ALIGN


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
