"""The kernel at its doors, open(2) and ioctl(2), for the real code: VFIO group and container, device nodes, iommufd.

Every fd is a real one, so that what is closed, leaked or mixed up shows. Memory that is "pinned" is really read,
through /proc/self/mem, so that a file that is too short gives EFAULT as the kernel gives it.
"""

import contextlib
import errno
import mmap
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.host.fake_function import FakeFunction, fail, load, store
from vfu_server.host.ioctl import Kernel
from vfu_server.libvfio_user.native import ffi

PAGE = mmap.PAGESIZE
TYPE1_RANGES = ((0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1))
"""What an IOMMU of a PC takes: all but the window of interrupt messages."""


@dataclass
class Mapping:
    """One map in the IOMMU: `vaddr` of this process, or a file of `fd` (a duplicate) at `start`."""

    iova: int
    size: int
    prot: int
    vaddr: int = 0
    fd: int = -1
    start: int = 0

    def read(self, offset: int, count: int) -> bytes:
        """What the device reads there."""
        if self.fd >= 0:
            return os.pread(self.fd, count, self.start + offset)
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            return os.pread(memory.fileno(), count, self.vaddr + offset)

    def write(self, offset: int, data: bytes) -> None:
        """What the device writes there."""
        if self.fd >= 0:
            os.pwrite(self.fd, data, self.start + offset)
        else:
            with open("/proc/self/mem", "r+b", buffering=0) as memory:
                os.pwrite(memory.fileno(), data, self.vaddr + offset)


@dataclass
class Space:
    """An IOMMU address space: a type1 container's or an IOAS."""

    maps: list[Mapping] = field(default_factory=list)
    tracking: bool = False
    dirty: set[int] = field(default_factory=set)
    """Pages that the device wrote, as the IOMMU's page table has them."""

    def find(self, iova: int) -> Mapping | None:
        return next((m for m in self.maps if m.iova <= iova < m.iova + m.size), None)

    def clear(self) -> None:
        for mapping in self.maps:
            if mapping.fd >= 0:
                os.close(mapping.fd)
        self.maps.clear()


@dataclass
class File:
    """An open file of ours: which it is by inode, so that a number used again is not taken for it."""

    kind: str
    inode: int
    what: Any = None


class FakeKernel:
    """The kernel of a machine under `root`. What it cannot do is switched off by attributes."""

    def __init__(self, root: Path, *functions: FakeFunction):
        self.functions = {function.bdf: function for function in functions}
        self.cdevs: dict[str, FakeFunction] = {}
        self.has_map_file = True
        self.has_hwpt = True
        self.hw_capabilities = 0
        self.dma_limit = 65535
        self.pages_to_lock = 1 << 40
        self.unsafe = False
        """There is no interrupt remapping."""
        self.viable = True
        self.tokens: dict[str, str] = {}
        self.denied: set[str] = set()
        self.attach_busy = 0
        self.tracking_tables = False
        self.requests: list[int] = []
        self._files: dict[int, File] = {}
        self._lock = threading.RLock()
        self._objects: dict[int, tuple[str, Any]] = {}
        """Of iommufds: id -> kind and what it is."""
        self._next_id = 1
        self._callbacks = [
            ffi.callback("int(int, unsigned long, void *)", self._c_ioctl, error=-errno.EIO),
            ffi.callback("long(int, void *, size_t, uint64_t)", self._c_pread, error=-errno.EIO),
            ffi.callback("long(int, const void *, size_t, uint64_t)", self._c_pwrite, error=-errno.EIO),
        ]
        calls = ffi.new("struct vs_kernel_calls *", self._callbacks)
        self.kernel = Kernel(
            root=root,
            ioctl=self.ioctl,
            open=self.open,
            read=lambda fd, size: self._state_file(fd)[0].read(self._state_file(fd)[1], size),
            write=lambda fd, data: self._state_file(fd)[0].write(self._state_file(fd)[1], bytes(data)),
            may_use=lambda path: path.exists() and "/" + str(path.relative_to(root)) not in self.denied,
            door_calls=calls,
        )

    # files

    def _state_file(self, fd: int) -> Any:
        """Of a migration's data fd: its FakeMigration, and the file."""
        return self._file(fd, "state").what

    def _new_file(self, kind: str, what: Any = None) -> int:
        with self._lock:
            fd = os.memfd_create(kind, os.MFD_CLOEXEC)
            self._files[fd] = File(kind, os.fstat(fd).st_ino, what)
        return fd

    def _reap(self) -> None:
        """Notice what was closed since."""
        with self._lock:
            for fd, file in list(self._files.items()):
                try:
                    alive = os.fstat(fd).st_ino == file.inode
                except OSError:
                    alive = False
                if not alive:
                    del self._files[fd]
                    self._release(file)

    def _release(self, file: File) -> None:
        if file.kind in ("device", "cdev"):
            file.what.release()
        elif file.kind == "container":
            file.what.clear()
        elif file.kind == "iommufd":
            for known_as in file.what:
                kind, what = self._objects.pop(known_as, ("", None))
                if kind == "ioas":
                    what.clear()

    def _file(self, fd: int, *kinds: str) -> File:
        self._reap()
        file = self._files.get(fd)
        if file is None:
            raise fail(errno.EBADF)
        if kinds and file.kind not in kinds:
            raise fail(errno.ENOTTY)
        return file

    def opened(self, kind: str) -> list[File]:
        self._reap()
        return [file for file in self._files.values() if file.kind == kind]

    def open(self, path: str) -> int:
        self._reap()
        if path in self.denied:
            raise fail(errno.EACCES)
        if path == "/dev/vfio/vfio":
            return self._new_file("container", Space())
        if path == "/dev/iommu":
            return self._new_file("iommufd", [])
        if path.startswith("/dev/vfio/devices/"):
            function = self.cdevs.get(path.rsplit("/", 1)[1])
            if function is None:
                raise fail(errno.ENODEV)
            return self._new_file("unbound", function)
        group = int(path.rsplit("/", 1)[1])
        if any(file.what[0] == group for file in self.opened("group")):
            raise fail(errno.EBUSY)
        return self._new_file("group", [group, None])

    # ioctl

    def ioctl(self, fd: int, request: int, argument: "bytearray | int") -> int:
        return self._dispatch(fd, request, argument if isinstance(argument, int) else memoryview(argument))

    def _c_ioctl(self, fd: int, request: int, argument: Any) -> int:
        size = int(ffi.cast("uint32_t *", argument)[0])
        try:
            return self._dispatch(fd, request, memoryview(ffi.buffer(argument, size)).cast("B"))
        except OSError as error:
            return -(error.errno or errno.EIO)

    def _c_pread(self, fd: int, buffer: Any, count: int, offset: int) -> int:
        try:
            data = self._file(fd, "device", "cdev").what.pread(count, offset)
        except OSError as error:
            return -(error.errno or errno.EIO)
        ffi.memmove(buffer, data, len(data))
        return len(data)

    def _c_pwrite(self, fd: int, buffer: Any, count: int, offset: int) -> int:
        try:
            return int(self._file(fd, "device", "cdev").what.pwrite(bytes(ffi.buffer(buffer, count)), offset))
        except OSError as error:
            return -(error.errno or errno.EIO)

    def _dispatch(self, fd: int, request: int, argument: Any) -> int:
        file = self._file(fd)
        self.requests.append(request)
        tables: dict[str, dict[int, Callable[[File, Any], int]]] = {
            "container": {
                0x3B64: lambda _file, _argument: 0,
                0x3B65: lambda _file, extension: int(extension in (1, 3)),
                0x3B66: self._set_iommu,
                0x3B70: self._type1_info,
                0x3B71: self._type1_map,
                0x3B72: self._type1_unmap,
            },
            "group": {0x3B67: self._group_status, 0x3B68: self._set_container, 0x3B6A: self._device_fd},
            "unbound": {0x3B76: self._bind},
            "device": self._device_calls(),
            "cdev": self._device_calls() | {0x3B76: self._bind, 0x3B77: self._attach},
            "iommufd": self._iommufd_calls(),
            "state": {0x3B79: lambda file, view: file.what[0].precopy_info(file.what[1], view)},
        }
        call = tables[file.kind].get(request)
        if call is None:
            raise fail(errno.EINVAL if file.kind == "unbound" else errno.ENOTTY)
        return call(file, argument)

    def _device_calls(self) -> dict[int, Callable[[File, Any], int]]:
        return {
            0x3B6B: lambda file, view: file.what.get_info(view),
            0x3B6C: lambda file, view: file.what.get_region_info(view),
            0x3B6D: lambda file, view: file.what.get_irq_info(view),
            0x3B6E: lambda file, view: file.what.set_irqs(view),
            0x3B6F: lambda file, _: file.what.reset(),
            0x3B70: lambda file, view: file.what.hot_reset_info(view),
            0x3B71: self._hot_reset,
            0x3B75: lambda file, view: file.what.feature(view),
        }

    # group and type1

    def _group_status(self, file: File, view: memoryview) -> int:
        flags = (1 if self.viable else 0) | (2 if file.what[1] else 0)
        struct.pack_into("=II", view, 0, 8, flags)
        return 0

    def _set_container(self, file: File, view: memoryview) -> int:
        container = self._file(struct.unpack("=i", view)[0])
        if container.kind != "container":
            raise fail(errno.EBADFD)
        if file.what[1] is not None:
            raise fail(errno.EINVAL)
        if not self.viable:
            raise fail(errno.EPERM)
        file.what[1] = container
        return 0

    def _set_iommu(self, file: File, kind: int) -> int:
        if not any(group.what[1] is file for group in self.opened("group")) or kind != 3:
            raise fail(errno.EINVAL)
        if self.unsafe:
            raise fail(errno.EPERM)
        return 0

    def _device_fd(self, file: File, view: memoryview) -> int:
        name, _, given = bytes(view).rstrip(b"\0").decode().partition(" vf_token=")
        function = self.functions.get(name)
        if function is None or function.group != file.what[0]:
            raise fail(errno.ENODEV)
        if file.what[1] is None:
            raise fail(errno.EINVAL)
        wanted = self.tokens.get(name, "")
        if wanted != given:
            raise fail(errno.EACCES if wanted else errno.EINVAL)
        function.memory[7][4] &= ~4  # opening clears bus master
        function.calls.append("opened")
        return self._new_file("device", function)

    def _hot_reset(self, file: File, view: memoryview) -> int:
        _, _, count = struct.unpack_from("=III", view)
        fds = struct.unpack_from(f"={count}i", view, 12)
        groups = [self._file(fd, "group").what[0] for fd in fds]
        return int(file.what.do_hot_reset(view, groups, by_cdev=file.kind == "cdev"))

    def _type1_info(self, file: File, view: memoryview) -> int:
        body = struct.pack("=HHIII", 1, 1, 0, len(TYPE1_RANGES), 0)
        body += b"".join(struct.pack("=QQ", *each) for each in TYPE1_RANGES)
        body = body[:4] + struct.pack("=I", 24 + len(body)) + body[8:]
        body += struct.pack("=HHII", 3, 1, 0, self.dma_limit - len(file.what.maps))
        size, fits = 24 + len(body), struct.unpack_from("=I", view)[0] >= 24 + len(body)
        struct.pack_into("=IIQII", view, 0, size, 3, 0x40201000, 24 if fits else 0, 0)
        if fits:
            view[24:size] = body
        return 0

    def _type1_map(self, file: File, view: memoryview) -> int:
        argsz, flags, vaddr, iova, size = struct.unpack_from("=IIQQQ", view)
        if argsz < 32 or flags not in (1, 2, 3):
            raise fail(errno.EINVAL)
        mapping = Mapping(iova, size, flags, vaddr)
        self._enter(file.what, mapping)
        return 0

    def _enter(self, space: Space, mapping: Mapping) -> None:
        if not mapping.size or (mapping.size | mapping.iova | mapping.vaddr | mapping.start) % PAGE:
            raise fail(errno.EINVAL)
        last = mapping.iova + mapping.size - 1
        if any(m.iova <= last and mapping.iova < m.iova + m.size for m in space.maps):
            raise fail(errno.EEXIST)
        if not any(start <= mapping.iova and last <= end for start, end in TYPE1_RANGES):
            raise fail(errno.EINVAL)
        if len(space.maps) >= self.dma_limit:
            raise fail(errno.ENOSPC)
        if mapping.size // PAGE > self.pages_to_lock:
            raise fail(errno.ENOMEM)
        for offset in range(0, mapping.size, PAGE):
            try:
                readable = mapping.read(offset, 1)
            except OSError:
                readable = b""
            if not readable:
                raise fail(errno.EFAULT if mapping.fd < 0 else errno.EINVAL)
        self.pages_to_lock -= mapping.size // PAGE
        space.maps.append(mapping)

    def _type1_unmap(self, file: File, view: memoryview) -> int:
        argsz, flags, iova, size = struct.unpack_from("=IIQQ", view)
        if argsz < 24 or flags:
            raise fail(errno.EINVAL)
        struct.pack_into("=Q", view, 16, self._leave(file.what, iova, size, cut=errno.EINVAL))
        return 0

    def _leave(self, space: Space, iova: int, size: int, cut: int) -> int:
        inside = [m for m in space.maps if m.iova < iova + size and iova < m.iova + m.size]
        if any(m.iova < iova or m.iova + m.size > iova + size for m in inside):
            raise fail(cut)
        for mapping in inside:
            space.maps.remove(mapping)
            self.pages_to_lock += mapping.size // PAGE
            if mapping.fd >= 0:
                os.close(mapping.fd)
        return sum(m.size for m in inside)

    # device nodes and iommufd

    def _bind(self, file: File, view: memoryview) -> int:
        argsz, flags, iommufd, _ = struct.unpack_from("=IIiI", view)
        function: FakeFunction = file.what
        if argsz < 16 or flags & ~1 or file.kind == "cdev":
            raise fail(errno.EINVAL)
        if any(other.what is function for other in self.opened("cdev")):
            raise fail(errno.EINVAL)
        if any(other.what[0] == function.group for other in self.opened("group")):
            raise fail(errno.EBUSY)
        given = load(struct.unpack_from("=Q", view, 16)[0], 16).hex() if flags & 1 else ""
        wanted = self.tokens.get(function.bdf, "").replace("-", "")
        if given != wanted:
            raise fail(errno.EACCES if wanted else errno.EINVAL)
        objects = self._file(iommufd, "iommufd").what
        file.kind = "cdev"
        function.memory[7][4] &= ~4
        function.calls.append("opened")
        struct.pack_into("=I", view, 12, self._add(objects, "device", function))
        return 0

    def _add(self, objects: list[int], kind: str, what: Any) -> int:
        known_as, self._next_id = self._next_id, self._next_id + 1
        self._objects[known_as] = (kind, what)
        objects.append(known_as)
        return known_as

    def _attach(self, file: File, view: memoryview) -> int:
        argsz, flags, known_as = struct.unpack_from("=III", view)
        if argsz < 12 or flags:
            raise fail(errno.EINVAL)
        if self.attach_busy:
            self.attach_busy -= 1
            raise fail(errno.EBUSY)
        if self.unsafe:
            raise fail(errno.EPERM)
        kind, _ = self._objects.get(known_as, ("", None))
        if kind not in ("ioas", "hwpt"):
            raise fail(errno.ENOENT)
        file.what.attached = known_as
        file.what.calls.append(f"attached {kind}")
        return 0

    def space_of(self, function: FakeFunction) -> Space:
        """The address space in which the function's DMA goes."""
        if not self.cdevs:
            return next(file.what for file in self.opened("container"))
        kind, what = self._objects[function.attached]
        return what if kind == "ioas" else self._objects[what][1]

    def _iommufd_calls(self) -> dict[int, Callable[[File, Any], int]]:
        calls: dict[int, Callable[[File, Any], int]] = {
            0x3B80: self._destroy,
            0x3B81: self._ioas_alloc,
            0x3B84: self._ioas_ranges,
            0x3B85: self._ioas_map,
            0x3B86: self._ioas_unmap,
            0x3B8A: self._hw_info,
        }
        if self.has_hwpt:
            calls |= {0x3B89: self._hwpt_alloc, 0x3B8B: self._set_tracking, 0x3B8C: self._dirty_bitmap}
        if self.has_map_file:
            calls[0x3B8F] = self._ioas_map_file
        return calls

    def _destroy(self, file: File, view: memoryview) -> int:
        _, known_as = struct.unpack_from("=II", view)
        if known_as not in file.what:
            raise fail(errno.ENOENT)
        users = [what for kind, what in self._objects.values() if kind == "hwpt"]
        if known_as in users or any(f.attached == known_as for f in self.functions.values()):
            raise fail(errno.EBUSY)
        kind, what = self._objects.pop(known_as)
        file.what.remove(known_as)
        if kind == "ioas":
            what.clear()
        return 0

    def _ioas_alloc(self, file: File, view: memoryview) -> int:
        size, flags, _ = struct.unpack_from("=III", view)
        if size < 12 or flags:
            raise fail(errno.EOPNOTSUPP)
        struct.pack_into("=I", view, 8, self._add(file.what, "ioas", Space()))
        return 0

    def _ioas(self, file: File, known_as: int) -> Space:
        kind, what = self._objects.get(known_as, ("", None))
        if kind != "ioas" or known_as not in file.what:
            raise fail(errno.ENOENT)
        return what

    def _ioas_ranges(self, file: File, view: memoryview) -> int:
        _, known_as, count, reserved, pointer, _ = struct.unpack_from("=IIIIQQ", view)
        self._ioas(file, known_as)
        if reserved:
            raise fail(errno.EOPNOTSUPP)
        for i, each in enumerate(TYPE1_RANGES[:count]):
            store(pointer + 16 * i, struct.pack("=QQ", *each))
        struct.pack_into("=I", view, 8, len(TYPE1_RANGES))
        struct.pack_into("=Q", view, 24, PAGE)
        if count < len(TYPE1_RANGES):
            raise fail(errno.EMSGSIZE)
        return 0

    def _ioas_map(self, file: File, view: memoryview) -> int:
        _, flags, known_as, reserved, vaddr, size, iova = struct.unpack_from("=IIIIQQQ", view)
        if reserved or flags & ~7:
            raise fail(errno.EOPNOTSUPP)
        if not flags & 6 or not flags & 1:
            raise fail(errno.EINVAL)
        self._enter(self._ioas(file, known_as), Mapping(iova, size, flags >> 2 & 1 | flags & 2, vaddr))
        return 0

    def _ioas_map_file(self, file: File, view: memoryview) -> int:
        _, flags, known_as, fd, start, size, iova = struct.unpack_from("=IIIiQQQ", view)
        space = self._ioas(file, known_as)
        if flags & ~7:
            raise fail(errno.EOPNOTSUPP)
        if not flags & 6 or not os.readlink(f"/proc/self/fd/{fd}").startswith(("/memfd:", "/dev/shm/")):
            raise fail(errno.EINVAL)
        own = os.dup(fd)
        try:
            self._enter(space, Mapping(iova, size, flags >> 2 & 1 | flags & 2, fd=own, start=start))
        except OSError:
            os.close(own)
            raise
        return 0

    def _ioas_unmap(self, file: File, view: memoryview) -> int:
        _, known_as, iova, size = struct.unpack_from("=IIQQ", view)
        space = self._ioas(file, known_as)
        done = self._leave(space, iova, size, cut=errno.ENOENT)
        if not done and size != (1 << 64) - 1:
            raise fail(errno.ENOENT)
        struct.pack_into("=Q", view, 16, done)
        return 0

    def _hwpt_alloc(self, file: File, view: memoryview) -> int:
        size, flags, device, ioas = struct.unpack_from("=IIII", view)
        if flags & ~2 or (flags and not self.hw_capabilities) or any(bytes(view[20:size])):
            raise fail(errno.EOPNOTSUPP)
        self.tracking_tables = bool(flags)
        self._ioas(file, ioas)
        if self._objects.get(device, ("", None))[0] != "device":
            raise fail(errno.ENOENT)
        struct.pack_into("=I", view, 16, self._add(file.what, "hwpt", ioas))
        return 0

    def _set_tracking(self, file: File, view: memoryview) -> int:
        _, flags, table, reserved = struct.unpack_from("=IIII", view)
        kind, ioas = self._objects.get(table, ("", 0))
        if kind != "hwpt" or flags & ~1 or reserved or not self.tracking_tables:
            raise fail(errno.EOPNOTSUPP if kind == "hwpt" else errno.ENOENT)
        space = self._ioas(file, ioas)
        space.tracking = bool(flags)
        space.dirty.clear()
        return 0

    def _dirty_bitmap(self, file: File, view: memoryview) -> int:
        _, table, flags, reserved, iova, length, page_size, pointer = struct.unpack_from("=IIIIQQQQ", view)
        space = self._ioas(file, self._objects[table][1])
        if flags & ~1 or reserved:
            raise fail(errno.EOPNOTSUPP)
        holes = any(space.find(page) is None for page in range(iova, iova + length, PAGE))
        if (iova | length) % page_size or (iova | length) % PAGE or holes or not space.tracking:
            raise fail(errno.EINVAL)
        for page in sorted(space.dirty):
            if iova <= page < iova + length:
                for at in range((page - iova) // page_size, -(-(page + PAGE - iova) // page_size)):
                    byte, bit = divmod(at, 8)
                    store(pointer + byte, bytes([load(pointer + byte, 1)[0] | 1 << bit]))
                space.dirty -= set() if flags & 1 else {page}
        return 0

    def _hw_info(self, file: File, view: memoryview) -> int:
        _, flags, device = struct.unpack_from("=III", view)
        if flags or self._objects.get(device, ("", None))[0] != "device":
            raise fail(errno.ENOENT)
        struct.pack_into("=Q", view, 32, self.hw_capabilities)
        return 0

    def close(self) -> None:
        """Nothing may be left open; what is, is returned and closed."""
        self._reap()
        left = [file.kind for file in self._files.values()]
        for fd in list(self._files):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._reap()
        assert not left, f"left open: {left}"
