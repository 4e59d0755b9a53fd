"""Numbers and packed structs of the kernel's VFIO user API and of the vfio-user protocol.

Names are the kernel's (linux/vfio.h) with the prefix cut, or the protocol's (QEMU docs/interop/vfio-user.rst). All
structs are little-endian and packed, as both ends of a UNIX socket on our hosts have them; offsets are noted where a
struct has a variable tail.
"""

import enum
import mmap
import struct

PAGE_SIZE = 4096
"""The least page there is: of the protocol, and what offsets of a device's own are aligned to."""
HOST_PAGE_SIZE = mmap.PAGESIZE
"""What this machine's kernel maps, pins and keeps dirty bits by: 64 KiB on many an arm64 host."""


class Command(enum.IntEnum):
    """vfio-user message commands. DMA_READ and DMA_WRITE go from server to client, all others from client to server."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    DIRTY_PAGES = 14
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class HeaderFlag(enum.IntFlag):
    """Flags of a message header; the low four bits are the type."""

    COMMAND = 0x0
    REPLY = 0x1
    TYPE_MASK = 0xF
    NO_REPLY = 0x10
    ERROR = 0x20


# struct vfio_user_header: msg_id, command, size of the whole message, flags, errno
HEADER = struct.Struct("<HHIII")
# VERSION: major, minor; then JSON with its NUL
VERSION = struct.Struct("<HH")
# DMA_MAP: argsz, flags, offset in the fd, iova, size
DMA_MAP = struct.Struct("<IIQQQ")
# DMA_UNMAP: argsz, flags, iova, size
DMA_UNMAP = struct.Struct("<IIQQ")
# DMA_UNMAP with GET_DIRTY_BITMAP, behind the above: page size, bitmap bytes
DMA_BITMAP = struct.Struct("<QQ")
# DEVICE_GET_INFO: argsz, flags, num_regions, num_irqs
DEVICE_INFO = struct.Struct("<IIII")
# GET_REGION_INFO: argsz, flags, index, cap_offset, size, offset in the passed fd
REGION_INFO = struct.Struct("<IIIIQQ")
# capability header of a region: id, version, next
CAP_HEADER = struct.Struct("<HHI")
# sparse mmap capability behind its header: nr_areas, reserved; then areas
SPARSE_HEADER = struct.Struct("<II")
SPARSE_AREA = struct.Struct("<QQ")
# GET_IRQ_INFO: argsz, flags, index, count
IRQ_INFO = struct.Struct("<IIII")
# SET_IRQS: argsz, flags, index, start, count; then BOOL data
IRQ_SET = struct.Struct("<IIIII")
# REGION_READ, REGION_WRITE: offset, region, count; then data
REGION_ACCESS = struct.Struct("<QII")
# DMA_READ, DMA_WRITE: address, count; then data
DMA_ACCESS = struct.Struct("<QQ")
# DEVICE_FEATURE: argsz, flags; then data
DEVICE_FEATURE = struct.Struct("<II")
# MIG_DATA_READ, MIG_DATA_WRITE: argsz, size; then data
MIG_DATA = struct.Struct("<II")
# feature MIGRATION: flags
FEATURE_MIGRATION = struct.Struct("<Q")
# feature MIG_DEVICE_STATE: state, data_fd
FEATURE_STATE = struct.Struct("<Ii")
# feature MIG_DATA_SIZE: stop_copy_length in bytes
FEATURE_DATA_SIZE = struct.Struct("<Q")
# struct vfio_precopy_info, which vfio-user carries as the answer to GET of MIG_PRECOPY_INFO: argsz, flags,
# initial_bytes, dirty_bytes
FEATURE_PRECOPY_INFO = struct.Struct("<IIQQ")
# feature DMA_LOGGING_START: page_size, num_ranges, reserved; then ranges
FEATURE_LOGGING_START = struct.Struct("<QII")
LOGGING_RANGE = struct.Struct("<QQ")
# feature DMA_LOGGING_REPORT: iova, length, page_size; the reply carries the bitmap behind it
FEATURE_LOGGING_REPORT = struct.Struct("<QQQ")

NO_DATA_FD = -1

DMA_FLAG_READ = 1
DMA_FLAG_WRITE = 2
DMA_UNMAP_FLAG_GET_DIRTY_BITMAP = 1
DMA_UNMAP_FLAG_ALL = 2

DEVICE_FLAGS_RESET = 1
DEVICE_FLAGS_PCI = 2

REGION_INFO_FLAG_READ = 1
REGION_INFO_FLAG_WRITE = 2
REGION_INFO_FLAG_MMAP = 4
REGION_INFO_FLAG_CAPS = 8
REGION_INFO_CAP_SPARSE_MMAP = 1

IRQ_INFO_EVENTFD = 1
IRQ_INFO_MASKABLE = 2
IRQ_INFO_AUTOMASKED = 4
IRQ_INFO_NORESIZE = 8

IRQ_SET_DATA_NONE = 1
IRQ_SET_DATA_BOOL = 2
IRQ_SET_DATA_EVENTFD = 4
IRQ_SET_DATA_TYPE_MASK = 7
IRQ_SET_ACTION_MASK = 8
IRQ_SET_ACTION_UNMASK = 0x10
IRQ_SET_ACTION_TRIGGER = 0x20
IRQ_SET_ACTION_TYPE_MASK = 0x38

FEATURE_ID_MASK = 0xFFFF
FEATURE_GET = 0x10000
FEATURE_SET = 0x20000
FEATURE_PROBE = 0x40000


class RegionIndex(enum.IntEnum):
    """Region indexes of a vfio-pci device."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


NUM_REGIONS = 9


class IrqIndex(enum.IntEnum):
    """Interrupt indexes of a vfio-pci device."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


NUM_IRQS = 5


class Feature(enum.IntEnum):
    """VFIO_DEVICE_FEATURE ids."""

    PCI_VF_TOKEN = 0
    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    LOW_POWER_ENTRY = 3
    LOW_POWER_ENTRY_WITH_WAKEUP = 4
    LOW_POWER_EXIT = 5
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9
    BUS_MASTER = 10
    DMA_BUF = 11
    MIG_PRECOPY_INFO = 12


class MigState(enum.IntEnum):
    """enum vfio_device_mig_state."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


MIGRATION_STOP_COPY = 1
MIGRATION_P2P = 2
MIGRATION_PRE_COPY = 4

PRECOPY_INFO_REINIT = 1

# PCI config space, offsets and bits of the standard header (linux/pci_regs.h)
PCI_VENDOR_ID = 0x00
PCI_DEVICE_ID = 0x02
PCI_COMMAND = 0x04
PCI_COMMAND_IO = 0x1
PCI_COMMAND_MEMORY = 0x2
PCI_COMMAND_MASTER = 0x4
PCI_COMMAND_INTX_DISABLE = 0x400
PCI_STATUS = 0x06
PCI_STATUS_INTERRUPT = 0x08
PCI_STATUS_CAP_LIST = 0x10
PCI_REVISION_ID = 0x08
PCI_CLASS_PROG = 0x09
PCI_CACHE_LINE_SIZE = 0x0C
PCI_LATENCY_TIMER = 0x0D
PCI_HEADER_TYPE = 0x0E
PCI_BASE_ADDRESS_0 = 0x10
PCI_SUBSYSTEM_VENDOR_ID = 0x2C
PCI_SUBSYSTEM_ID = 0x2E
PCI_ROM_ADDRESS = 0x30
PCI_CAPABILITY_LIST = 0x34
PCI_INTERRUPT_LINE = 0x3C
PCI_INTERRUPT_PIN = 0x3D
PCI_CFG_SPACE_SIZE = 256
PCI_CFG_SPACE_EXP_SIZE = 4096
PCI_CAP_ID_PM = 0x01
PCI_CAP_ID_MSI = 0x05
PCI_CAP_ID_EXP = 0x10
PCI_CAP_ID_MSIX = 0x11
PCI_CAP_ID_AF = 0x13

MAX_DATA_XFER_SIZE = 1 << 20
MAX_MSG_FDS = 8
