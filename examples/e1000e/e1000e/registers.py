"""The registers of Intel's 82574L: facts only, from its datasheet (chapter 10). All else reads it.

Names are the datasheet's. `SAVE`: written back as read. `DERIVED`: `state.py` knows the way back. Big tables are arrays
of one register each.
"""

from vfu_server.regmap import Access, Array, Block, Field, Register, Save

VENDOR, DEVICE = 0x8086, 0x10D3
BAR_MAC, BAR_FLASH, BAR_IO, BAR_MSIX = 0, 1, 2, 3
MAC_SIZE, FLASH_SIZE, IO_SIZE, MSIX_SIZE = 0x20000, 0x20000, 0x20, 0x4000
BAR_SIZES = {BAR_MAC: MAC_SIZE, BAR_FLASH: FLASH_SIZE, BAR_IO: IO_SIZE, BAR_MSIX: MSIX_SIZE}
QUEUES = 2
VECTORS = 5

RO, RW, RC, WO = Access.RO, Access.RW, Access.RC, Access.WO
SAVE, DERIVED = Save.SAVE, Save.DERIVED


def _rw(name: str, offset: int, doc: str = "", *, reset: int | None = None, order: int = 0) -> Register:
    return Register(name, offset, 4, RW, SAVE, reset=reset, order=order, doc=doc)


def _table(name: str, first: int, count: int, stride: int = 4) -> Array:
    return Array(name, first, stride, count, [Register("word", 0, 4, RW, SAVE, reset=0)])


CONTROL = [
    Register(
        *("CTRL", 0x0000, 4, RW, SAVE),
        order=1,
        fields=[
            *(Field("FD", 0, 0), Field("GIO_MASTER_DISABLE", 2, 2), Field("ASDE", 5, 5), Field("SLU", 6, 6)),
            *(Field("SPEED", 9, 8), Field("RST", 26, 26), Field("RFCE", 27, 27), Field("TFCE", 28, 28)),
            *(Field("VME", 30, 30), Field("PHY_RST", 31, 31)),
        ],
    ),
    Register("CTRL_DUP", 0x0004, 4, RW, doc="CTRL once more"),
    Register(
        *("STATUS", 0x0008, 4, RO),
        fields=[
            *(Field("FD", 0, 0), Field("LU", 1, 1), Field("TXOFF", 4, 4), Field("SPEED", 7, 6), Field("PHYRA", 10, 10)),
            Field("GIO_MASTER_ENABLED", 19, 19),
        ],
    ),
    Register("EEC", 0x0010, 4, RW, doc="lines of the NVM", fields=[Field("AUTO_RD", 9, 9)]),
    Register("EERD", 0x0014, 4, RW, DERIVED, doc="reads a word of the NVM", fields=[Field("DONE", 1, 1)]),
    _rw("CTRL_EXT", 0x0018, "IAME, EIAME, PBA support, driver loaded"),
    Register("FLA", 0x001C, 4, RW, doc="flash access"),
    Register(
        *("MDIC", 0x0020, 4, RW, DERIVED),
        doc="reads or writes a register of the PHY",
        fields=[Field("READY", 28, 28), Field("INTERRUPT", 29, 29), Field("ERROR", 30, 30)],
    ),
    _rw("FCAL", 0x0028, reset=0x00C28001),
    _rw("FCAH", 0x002C, reset=0x0100),
    _rw("FCT", 0x0030, reset=0x8808),
    _rw("VET", 0x0038, reset=0x8100),
    _rw("FCTTV", 0x0170, reset=0),
    _rw("LEDCTL", 0x0E00),
    Register(
        *("EXTCNF_CTRL", 0x0F00, 4, RW, DERIVED),
        doc="who owns the PHY's bus",
        fields=[Field("MDIO_SW_OWNERSHIP", 5, 5), Field("MDIO_HW_OWNERSHIP", 6, 6)],
    ),
    Register("EXTCNF_SIZE", 0x0F08, 4, RO),
    _rw("POEMB", 0x0F10, "power down by OEM bits"),
    _rw("PBA", 0x1000, "how the packet buffer is cut"),
    _rw("PBS", 0x1008),
    Register("EEWR", 0x102C, 4, RW, doc="writes a word of the NVM"),
    Register("FLSWCTL", 0x1030, 4, RW, doc="writes the flash"),
    Register("FLSWDATA", 0x1034, 4, RW, doc="writes the flash"),
    Register("FLSWCNT", 0x1038, 4, RW, doc="writes the flash"),
    Register("FLOP", 0x103C, 4, RW, doc="writes the flash"),
]

INTERRUPTS = [
    Register("ICR", 0x00C0, 4, RC, doc="causes; reading takes them, or masks them, as CTRL_EXT says"),
    _rw("ITR", 0x00C4, "shortest time between two interrupts", reset=0),
    Register("ICS", 0x00C8, 4, WO, doc="raises causes"),
    Register("IMS", 0x00D0, 4, RW, DERIVED, reset=0, doc="reads the mask, written ones are set in it"),
    Register("IMC", 0x00D8, 4, WO, doc="written ones leave the mask"),
    _rw("EIAC", 0x00DC, "causes that a message clears", reset=0),
    _rw("IAM", 0x00E0, "causes that are masked by themselves", reset=0),
    _rw("IVAR", 0x00E4, "cause to message", reset=0),
]

RECEIVE = [
    Register(
        *("RCTL", 0x0100, 4, RW, DERIVED),
        reset=0,
        fields=[Field("EN", 1, 1), Field("UPE", 3, 3), Field("MPE", 4, 4), Field("LBM", 7, 6), Field("BAM", 15, 15)],
    ),
    _rw("ERT", 0x2008, reset=0),
    _rw("FCRTL", 0x2160, reset=0),
    _rw("FCRTH", 0x2168, reset=0),
    _rw("PSRCTL", 0x2170),
    Register("RDFH", 0x2410, 4, RW),
    Register("RDFT", 0x2418, 4, RW),
    Register("RDFHS", 0x2420, 4, RW),
    Register("RDFTS", 0x2428, 4, RW),
    Register("RDFPC", 0x2430, 4, RO, doc="frames in the receive buffer"),
    Register("RDTR", 0x2820, 4, RW, SAVE, reset=0, fields=[Field("FPD", 31, 31)], doc="delay; FPD writes back"),
    _rw("RADV", 0x282C, reset=0),
    _rw("RSRPD", 0x2C00, reset=0),
    _rw("RAID", 0x2C08, reset=0),
    _rw("RXCSUM", 0x5000),
    _rw("RFCTL", 0x5008, reset=0),
    _rw("MRQC", 0x5818, reset=0),
    _rw("RSSIM", 0x5864, reset=0),
    _rw("FCRTV", 0x5F40, reset=0),
]

TRANSMIT = [
    Register("TCTL", 0x0400, 4, RW, DERIVED, fields=[Field("EN", 1, 1)]),
    _rw("TIPG", 0x0410),
    _rw("AIT", 0x0458),
    Register("TDFH", 0x3410, 4, RW),
    Register("TDFT", 0x3418, 4, RW),
    Register("TDFHS", 0x3420, 4, RW),
    Register("TDFTS", 0x3428, 4, RW),
    Register("TDFPC", 0x3430, 4, RO, doc="frames in the transmit buffer"),
    Register("TIDV", 0x3820, 4, RW, SAVE, reset=0, fields=[Field("FPD", 31, 31)], doc="delay; FPD writes back"),
    _rw("TADV", 0x382C, reset=0),
]

WAKE_UP = [
    _rw("WUC", 0x5800),
    _rw("WUFC", 0x5808, reset=0),
    Register("WUS", 0x5810, 4, Access.W1C, doc="what woke it"),
    _rw("IPAV", 0x5838, reset=0),
    Register("MANC", 0x5820, 4, RW, doc="management, which is firmware's"),
    Register("MANC2H", 0x5860, 4, RW, doc="management, which is firmware's"),
]

BUS = [
    _rw("GCR", 0x5B00, "PCI Express"),
    *(Register(f"GSCL_{n + 1}", 0x5B10 + 4 * n, 4, RW, doc="counts transactions") for n in range(4)),
    *(Register(f"GSCN_{n}", 0x5B20 + 4 * n, 4, RO, doc="counts transactions") for n in range(4)),
    Register("FACTPS", 0x5B30, 4, RO),
    Register("SWSM", 0x5B50, 4, RC, doc="a semaphore: who reads 0 in bit 0 has taken it"),
    Register("FWSM", 0x5B54, 4, RO),
    Register("SWSM2", 0x5B58, 4, RW, doc="a semaphore"),
]

TIME = [
    Register("SYSTIML", 0xB600, 4, RW, doc="a clock"),
    Register("SYSTIMH", 0xB604, 4, RW, doc="a clock"),
    _rw("TIMINCA", 0xB608, reset=0),
    Register("TIMADJL", 0xB60C, 4, RW, doc="is added to the clock"),
    Register("TIMADJH", 0xB610, 4, RW, doc="is added to the clock"),
    _rw("TSYNCTXCTL", 0xB614, reset=0),
    Register("TXSTMPL", 0xB618, 4, RO),
    Register("TXSTMPH", 0xB61C, 4, RO),
    _rw("TSYNCRXCTL", 0xB620, reset=0),
    Register("RXSTMPL", 0xB624, 4, RO),
    Register("RXSTMPH", 0xB628, 4, RO),
    Register("RXSATRL", 0xB62C, 4, RO),
    Register("RXSATRH", 0xB630, 4, RO),
    _rw("RXCFGL", 0xB634),
    _rw("RXUDP", 0xB638),
]

COUNTERS: dict[str, int] = {
    "CRCERRS": 0x4000,
    "ALGNERRC": 0x4004,
    "SYMERRS": 0x4008,
    "RXERRC": 0x400C,
    "MPC": 0x4010,
    "SCC": 0x4014,
    "ECOL": 0x4018,
    "MCC": 0x401C,
    "LATECOL": 0x4020,
    "COLC": 0x4028,
    "DC": 0x4030,
    "TNCRS": 0x4034,
    "SEC": 0x4038,
    "CEXTERR": 0x403C,
    "RLEC": 0x4040,
    "XONRXC": 0x4048,
    "XONTXC": 0x404C,
    "XOFFRXC": 0x4050,
    "XOFFTXC": 0x4054,
    "FCRUC": 0x4058,
    "PRC64": 0x405C,
    "PRC127": 0x4060,
    "PRC255": 0x4064,
    "PRC511": 0x4068,
    "PRC1023": 0x406C,
    "PRC1522": 0x4070,
    "GPRC": 0x4074,
    "BPRC": 0x4078,
    "MPRC": 0x407C,
    "GPTC": 0x4080,
    "GORCL": 0x4088,
    "GORCH": 0x408C,
    "GOTCL": 0x4090,
    "GOTCH": 0x4094,
    "RNBC": 0x40A0,
    "RUC": 0x40A4,
    "RFC": 0x40A8,
    "ROC": 0x40AC,
    "RJC": 0x40B0,
    "MNGPRC": 0x40B4,
    "MNGPDC": 0x40B8,
    "MNGPTC": 0x40BC,
    "TORL": 0x40C0,
    "TORH": 0x40C4,
    "TOTL": 0x40C8,
    "TOTH": 0x40CC,
    "TPR": 0x40D0,
    "TPT": 0x40D4,
    "PTC64": 0x40D8,
    "PTC127": 0x40DC,
    "PTC255": 0x40E0,
    "PTC511": 0x40E4,
    "PTC1023": 0x40E8,
    "PTC1522": 0x40EC,
    "MPTC": 0x40F0,
    "BPTC": 0x40F4,
    "TSCTC": 0x40F8,
    "TSCTFC": 0x40FC,
    "IAC": 0x4100,
    "ICRXPTC": 0x4104,
    "ICRXATC": 0x4108,
    "ICTXPTC": 0x410C,
    "ICTXATC": 0x4110,
    "ICTXQEC": 0x4118,
    "ICTXQMTC": 0x411C,
    "ICRXDMTC": 0x4120,
    "ICRXOC": 0x4124,
}
"""Statistics (10.2.10): a read clears them, and at their end they stay there."""
WIDE_COUNTERS = ("GORC", "GOTC", "TOR", "TOT")
"""Of 64 bits, in two registers; reading the high one clears both."""

QUEUE_ARRAYS = [
    Array(
        *("RX", 0x2800, 0x100, QUEUES),
        registers=[
            Register("RDBAL", 0x00, 4, RW, SAVE, reset=0),
            Register("RDBAH", 0x04, 4, RW, SAVE, reset=0),
            Register("RDLEN", 0x08, 4, RW, SAVE, reset=0),
            Register("RDH", 0x10, 4, RW, SAVE, reset=0, order=2, doc="written only while RCTL.EN is 0"),
            Register("RDT", 0x18, 4, RW, SAVE, reset=0, order=3, doc="a write gives descriptors to the device"),
            Register("RXDCTL", 0x28, 4, RW, SAVE, order=1),
        ],
    ),
    Array(
        *("TX", 0x3800, 0x100, QUEUES),
        registers=[
            Register("TDBAL", 0x00, 4, RW, SAVE, reset=0),
            Register("TDBAH", 0x04, 4, RW, SAVE, reset=0),
            Register("TDLEN", 0x08, 4, RW, SAVE, reset=0),
            Register("TDH", 0x10, 4, RW, SAVE, reset=0, order=2, doc="written only while TCTL.EN is 0"),
            Register("TDT", 0x18, 4, RW, SAVE, reset=0, order=3, doc="a write starts DMA"),
            Register("TXDCTL", 0x28, 4, RW, SAVE, order=1),
            Register("TARC", 0x40, 4, RW, SAVE, fields=[Field("ENABLE", 10, 10)]),
        ],
    ),
]

TABLES = [
    _table("MTA", 0x5200, 128),
    _table("VFTA", 0x5600, 128),
    _table("IP4AT", 0x5840, 4, 8),
    _table("IP6AT", 0x5880, 4),
    _table("RETA", 0x5C00, 32),
    _table("RSSRK", 0x5C80, 10),
    _table("FFLT", 0x5F00, 4, 8),
    _table("FFMT", 0x9000, 128, 8),
    _table("FFVT", 0x9800, 128, 8),
    Array(
        *("RA", 0x5400, 8, 16),
        registers=[Register("RAL", 0, 4, RW, SAVE), Register("RAH", 4, 4, RW, SAVE, fields=[Field("AV", 31, 31)])],
    ),
]
"""Filters: nobody needs to read them while it is stopped."""

MAC = Block(
    "82574",
    MAC_SIZE,
    [
        *(*CONTROL, *INTERRUPTS, *RECEIVE, *TRANSMIT, *WAKE_UP, *BUS, *TIME),
        *(Register(name, offset, 4, RC, doc="statistics") for name, offset in COUNTERS.items()),
    ],
    [*QUEUE_ARRAYS, *TABLES, Array("EITR", 0x00E8, 4, VECTORS, [Register("word", 0, 4, RW, SAVE, reset=0)])],
)

IO = Block(
    "82574 I/O",
    IO_SIZE,
    [
        Register("IOADDR", 0, 4, RW, doc="which register of BAR 0"),
        Register("IODATA", 4, 4, RW, doc="that register"),
    ],
)
