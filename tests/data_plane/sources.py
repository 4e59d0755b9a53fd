"""The three ways in which dirty pages become known, behind one face for tests: what the device writes, what fails."""

from contextlib import contextmanager

from tests.data_plane.device_log import DeviceLog
from tests.data_plane.rig import PAGE, rig
from tests.host.fake_function import fail
from vfu_server.host import ioctl
from vfu_server.session import SessionOptions

SOURCES = ("device", "iommu", "copied", "all")
"""`copied`: the device's own log behind a door that gives its bits in a reply, as a socket does."""
EXACT = ("device", "iommu", "copied")
"""Those that know which page it was."""


class Source:
    """The source of one rig's first function."""

    def __init__(self, kind, made, log):
        self.kind = kind
        self.rig = made
        self.log = log
        self.failures = []

    def write(self, *pages):
        """The device writes to these iovas. What is not mapped does not arrive."""
        space = self.rig.space
        arrived = {page for page in pages if (m := space.find(page)) is not None and m.prot & 2}
        if self.log is not None:
            self.log.write(*arrived)
        elif space.tracking:
            space.dirty |= arrived

    def fail_next(self, *errors):
        """The next questions to the source fail, and it has forgotten all the same."""
        (self.failures if self.log is None else self.log.failures).extend(errors)

    @property
    def running(self):
        """The source is at work, as far as it can be switched on."""
        if self.kind == "all":
            return self.rig.session._dirty.running
        return self.log.running if self.log is not None else self.rig.space.tracking


@contextmanager
def sourced(folder, kind, **more):
    """A rig whose first function's dirty pages are known by `kind`, and that source."""
    found = {}

    def prepare(kernel):
        if kind in ("device", "copied"):
            found["log"] = DeviceLog(next(iter(kernel.functions.values())))
        elif kind == "iommu":
            kernel.hw_capabilities = ioctl.HW_CAP_DIRTY_TRACKING
            read = kernel._dirty_bitmap

            def dirty_bitmap(file, view):
                done = read(file, view)
                if found["source"].failures:
                    raise fail(found["source"].failures.pop(0))
                return done

            kernel._dirty_bitmap = dirty_bitmap

    options = SessionOptions(dirty_tracking="all" if kind == "all" else "auto")
    way = "group" if kind == "all" else "cdev"
    with rig(folder, way, prepare=prepare, options=options, **more) as made:
        if kind == "copied":
            made.session._dirty._door = None
        found["source"] = Source(kind, made, found.get("log"))
        yield made, found["source"]


def pages_in(bitmap, iova, page_size=PAGE):
    """The iovas of pages that are set."""
    return {
        iova + (8 * n + bit) * page_size for n, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1
    }
