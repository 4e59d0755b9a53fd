"""A vfio-user server in plain Python for the kit's own tests: a thread, one client, a little PCI device that migrates.

It shares only numbers and layouts with the kit, and none of the server's code.
"""

import errno
import os
import socket
import struct
import threading

from vfu_server import uapi
from vfu_server.uapi import Command, Feature, HeaderFlag, MigState

BAR0_SIZE, MAPPED = 0x2000, 0x1000
BAR2_SIZE = 0x10000
BAR4_SIZE = 0x20
REG_SIGNAL = 0x20
"""Write of a vector number: its eventfd is signalled."""
REG_KEPT = 0x24
"""A register that a migration moves."""


class PeerDevice(threading.Thread):
    """Serves `sock` to its end. `log` has (command, detail) of all messages, `refuse` maps a pair to an errno."""

    def __init__(self, sock, *, migration=7, data=b"", resets=True):
        super().__init__(daemon=True)
        self.sock = sock
        self.log = []
        self.refuse = {}
        self.resets = resets
        self.migration = migration
        self.state = MigState.RUNNING
        self.saved = data
        self.sent = 0
        self.loaded = b""
        self.dirty = set()
        self.pre_copy_left = None
        """What it tells of its pre-copy, one (initial, dirty) after the other, the last again and again."""
        self.maps = {}
        self.eventfds = {}
        self.kept = 0
        self.memory = os.memfd_create("peer-bar0")
        os.ftruncate(self.memory, BAR0_SIZE)
        self.config = bytearray(256)
        self.bar_masks = {0x10: ~(BAR0_SIZE - 1), 0x18: ~(BAR2_SIZE - 1), 0x1C: ~0, 0x20: ~(BAR4_SIZE - 1)}
        self.bar_types = {0x18: 0xC, 0x20: 1}
        self._fill_config()
        self.start()

    def _fill_config(self):
        struct.pack_into("<HHHH", self.config, 0, 0x1234, 0x5678, 0, uapi.PCI_STATUS_CAP_LIST)
        for offset, kind in self.bar_types.items():
            self.config[offset] = kind
        self.config[uapi.PCI_INTERRUPT_PIN] = 1
        self.config[uapi.PCI_CAPABILITY_LIST] = 0x50
        struct.pack_into("<BBH", self.config, 0x50, uapi.PCI_CAP_ID_MSI, 0x70, 0x80)
        struct.pack_into("<BBH", self.config, 0x70, uapi.PCI_CAP_ID_MSIX, 0, 3)

    def run(self):
        while header := self.sock.recv(16, socket.MSG_PEEK | socket.MSG_WAITALL):
            if len(header) < 16:
                break
            msg_id, command, size, flags, _ = uapi.HEADER.unpack(header)
            _, fds, _, _ = socket.recv_fds(self.sock, 16, 16)
            payload = self.sock.recv(size - 16, socket.MSG_WAITALL) if size > 16 else b""
            reply, reply_fds, error = b"", [], 0
            try:
                reply, reply_fds = self._serve_one(Command(command), payload, fds)
            except OSError as failure:
                error = failure.errno
            if flags & HeaderFlag.NO_REPLY:
                continue
            flags = HeaderFlag.REPLY | (HeaderFlag.ERROR if error else 0)
            head = uapi.HEADER.pack(msg_id, command, 16 + len(reply), flags, error)
            try:
                socket.send_fds(self.sock, [head + reply], reply_fds)
            except BrokenPipeError:  # the client has not waited
                break

    def close(self):
        self.sock.shutdown(socket.SHUT_RDWR)
        self.join(5)
        self.sock.close()
        os.close(self.memory)
        for fd in (*self.maps.values(), *self.eventfds.values()):
            if fd >= 0:
                os.close(fd)

    def _note(self, command, detail=0):
        self.log.append((command, detail))
        if error := self.refuse.get((command, detail)):
            raise OSError(error, "as ordered")

    def _serve_one(self, command, payload, fds):
        handler = getattr(self, f"_{command.name.lower()}")
        answer = handler(payload, fds)
        return answer if isinstance(answer, tuple) else (answer or b"", [])

    def _version(self, payload, _fds):
        self._note(Command.VERSION)
        assert payload.endswith(b"\0")
        return struct.pack("<HH", 0, 0) + b'{"capabilities":{"max_msg_fds":8}}\0'

    def _dma_map(self, payload, fds):
        _, prot, offset, iova, size = uapi.DMA_MAP.unpack(payload)
        self._note(Command.DMA_MAP, (iova, size, prot, offset, len(fds)))
        self.maps[iova] = fds[0] if fds else -1

    def _dma_unmap(self, payload, _fds):
        _, _, iova, size = uapi.DMA_UNMAP.unpack(payload)
        self._note(Command.DMA_UNMAP, (iova, size))
        if (fd := self.maps.pop(iova)) >= 0:
            os.close(fd)
        return payload

    def _device_get_info(self, _payload, _fds):
        self._note(Command.DEVICE_GET_INFO)
        return uapi.DEVICE_INFO.pack(16, uapi.DEVICE_FLAGS_PCI | int(self.resets), 9, 5)

    def _device_get_region_info(self, payload, _fds):
        room, _, index, _, _, _ = uapi.REGION_INFO.unpack(payload)
        self._note(Command.DEVICE_GET_REGION_INFO, index)
        sizes = {0: BAR0_SIZE, 2: BAR2_SIZE, 4: BAR4_SIZE, 7: 256}
        if index != 0:
            return uapi.REGION_INFO.pack(32, 3 if index in sizes else 0, index, 0, sizes.get(index, 0), 0)
        caps = uapi.CAP_HEADER.pack(1, 1, 0) + uapi.SPARSE_HEADER.pack(1, 0) + uapi.SPARSE_AREA.pack(MAPPED, 0x1000)
        info = uapi.REGION_INFO.pack(32 + len(caps), 0xF, 0, 32, BAR0_SIZE, 0)
        return (info + caps)[:room], [self.memory]

    def _device_get_irq_info(self, payload, _fds):
        index = uapi.IRQ_INFO.unpack(payload)[2]
        self._note(Command.DEVICE_GET_IRQ_INFO, index)
        return uapi.IRQ_INFO.pack(16, 1, index, {0: 1, 1: 4, 2: 4, 3: 1}.get(index, 0))

    def _device_set_irqs(self, payload, fds):
        _, flags, index, start, count = uapi.IRQ_SET.unpack_from(payload)
        self._note(Command.DEVICE_SET_IRQS, (index, flags, start, count, len(fds)))
        if flags == 0x21 and count == 0:
            for key in [key for key in self.eventfds if key[0] == index]:
                os.close(self.eventfds.pop(key))
        if flags == 0x24:
            for vector in range(start, start + count):
                if (index, vector) in self.eventfds:
                    os.close(self.eventfds.pop((index, vector)))
            self.eventfds.update({(index, start + n): fd for n, fd in enumerate(fds)})

    def _region_read(self, payload, _fds):
        offset, region, count = uapi.REGION_ACCESS.unpack(payload)
        self._note(Command.REGION_READ, (region, offset, count))
        if region == 7:
            return payload + bytes(self.config[offset : offset + count])
        if region == 0 and offset == REG_KEPT:
            return payload + self.kept.to_bytes(count, "little")
        return payload + os.pread(self.memory, count, offset)

    def _region_write(self, payload, _fds):
        offset, region, count = uapi.REGION_ACCESS.unpack_from(payload)
        data = payload[16:]
        self._note(Command.REGION_WRITE, (region, offset, count))
        if region == 7:
            if offset in self.bar_masks:
                value = int.from_bytes(data, "little") & self.bar_masks[offset] | self.bar_types.get(offset, 0)
                data = (value & 0xFFFFFFFF).to_bytes(4, "little")
            elif offset == 0x14 or offset == 0x24:
                data = bytes(4)
            self.config[offset : offset + count] = data
        elif offset == REG_SIGNAL:
            vector = int.from_bytes(data, "little")
            for index in (0, 1, 2):
                if (index, vector) in self.eventfds:
                    os.eventfd_write(self.eventfds[index, vector], 1)
        elif offset == REG_KEPT:
            self.kept = int.from_bytes(data, "little")
        else:
            os.pwrite(self.memory, data, offset)
        return payload[:16]

    def _device_reset(self, _payload, _fds):
        self._note(Command.DEVICE_RESET)

    def _device_feature(self, payload, _fds):
        _, flags = uapi.DEVICE_FEATURE.unpack_from(payload)
        feature, data = flags & 0xFFFF, payload[8:]
        if not self.migration:
            raise OSError(errno.ENOTTY, "no such feature")
        if feature == Feature.MIG_DEVICE_STATE and flags & uapi.FEATURE_SET:
            state = uapi.FEATURE_STATE.unpack(data)[0]
            self._note(Command.DEVICE_FEATURE, MigState(state))
            self._enter(MigState(state))
            return payload
        self._note(Command.DEVICE_FEATURE, Feature(feature).name)
        if feature == Feature.MIGRATION:
            return payload[:8] + uapi.FEATURE_MIGRATION.pack(self.migration)
        if feature == Feature.MIG_DEVICE_STATE:
            return payload[:8] + uapi.FEATURE_STATE.pack(self.state, -1)
        if feature == Feature.MIG_PRECOPY_INFO:
            if self.pre_copy_left is None:
                raise OSError(errno.EINVAL, "it does not tell")
            left = self.pre_copy_left.pop(0) if len(self.pre_copy_left) > 1 else self.pre_copy_left[0]
            return payload[:8] + uapi.FEATURE_PRECOPY_INFO.pack(24, 0, *left)
        if feature == Feature.DMA_LOGGING_REPORT:
            iova, length, page = uapi.FEATURE_LOGGING_REPORT.unpack(data)
            bits = sum(1 << (at - iova) // page for at in self.dirty if iova <= at < iova + length)
            return payload + bits.to_bytes((length // page + 63) // 64 * 8, "little")
        return payload

    def _enter(self, state):
        if state == MigState.STOP_COPY:
            self.saved += struct.pack("<I", self.kept)
        if self.state == MigState.RESUMING and state == MigState.RUNNING:
            self.kept = struct.unpack("<I", self.loaded[-4:])[0]
        self.state = state

    def _mig_data_read(self, payload, _fds):
        size = uapi.MIG_DATA.unpack(payload)[1]
        self._note(Command.MIG_DATA_READ, size)
        data = self.saved[self.sent : self.sent + size]
        self.sent += len(data)
        if not data and self.state == MigState.PRE_COPY:
            raise OSError(errno.ENOMSG, "nothing yet")
        return uapi.MIG_DATA.pack(8 + len(data), len(data)) + data

    def _mig_data_write(self, payload, _fds):
        self._note(Command.MIG_DATA_WRITE, len(payload) - 8)
        self.loaded += payload[8:]
