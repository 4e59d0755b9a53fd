"""Numbers and layouts of the kernel's structs: against a table of facts, and against the installed headers."""

import shutil
import struct
import subprocess

import pytest

from vfu_server import uapi
from vfu_server.host import ioctl, kernel_feature

# name, bytes, offsets of the fields in order; computed from linux/vfio.h and linux/iommufd.h of 7.2
LAYOUTS = [
    ("GROUP_STATUS", 8, (0, 4)),
    ("IOMMU_INFO", 24, (0, 4, 8, 16, 20)),
    ("DMA_MAP", 32, (0, 4, 8, 16, 24)),
    ("DMA_UNMAP", 24, (0, 4, 8, 16)),
    ("DEVICE_INFO", 24, (0, 4, 8, 12, 16, 20)),
    ("REGION_INFO", 32, (0, 4, 8, 12, 16, 24)),
    ("IRQ_INFO", 16, (0, 4, 8, 12)),
    ("IRQ_SET", 20, (0, 4, 8, 12, 16)),
    ("HOT_RESET_INFO", 12, (0, 4, 8)),
    ("DEPENDENT_DEVICE", 8, (0, 4, 6, 7)),
    ("HOT_RESET", 12, (0, 4, 8)),
    ("FEATURE", 8, (0, 4)),
    ("PRECOPY_INFO", 24, (0, 4, 8, 16)),
    ("BIND_IOMMUFD", 16, (0, 4, 8, 12)),
    ("BIND_IOMMUFD_TOKEN", 24, (0, 4, 8, 12, 16)),
    ("ATTACH_PT", 12, (0, 4, 8)),
    ("CAP_HEADER", 8, (0, 2, 4)),
    ("DESTROY", 8, (0, 4)),
    ("IOAS_ALLOC", 12, (0, 4, 8)),
    ("IOAS_IOVA_RANGES", 32, (0, 4, 8, 12, 16, 24)),
    ("IOVA_RANGE", 16, (0, 8)),
    ("IOAS_MAP", 40, (0, 4, 8, 12, 16, 24, 32)),
    ("IOAS_MAP_FILE", 40, (0, 4, 8, 12, 16, 24, 32)),
    ("IOAS_UNMAP", 24, (0, 4, 8, 16)),
    ("HWPT_ALLOC", 48, (0, 4, 8, 12, 16, 20, 24, 28, 32, 40, 44)),
    ("HWPT_SET_DIRTY_TRACKING", 16, (0, 4, 8, 12)),
    ("HWPT_GET_DIRTY_BITMAP", 48, (0, 4, 8, 12, 16, 24, 32, 40)),
    ("HW_INFO", 40, (0, 4, 8, 12, 16, 24, 28, 32)),
]

# what the C compiler is asked, with the header's names; {} is our struct's name
HEADER_STRUCTS = {
    "vfio": {
        "GROUP_STATUS": ("vfio_group_status", "argsz flags"),
        "IOMMU_INFO": ("vfio_iommu_type1_info", "argsz flags iova_pgsizes cap_offset"),
        "DMA_MAP": ("vfio_iommu_type1_dma_map", "argsz flags vaddr iova size"),
        "DMA_UNMAP": ("vfio_iommu_type1_dma_unmap", "argsz flags iova size"),
        "REGION_INFO": ("vfio_region_info", "argsz flags index cap_offset size offset"),
        "IRQ_INFO": ("vfio_irq_info", "argsz flags index count"),
        "IRQ_SET": ("vfio_irq_set", "argsz flags index start count"),
        "HOT_RESET_INFO": ("vfio_pci_hot_reset_info", "argsz flags count"),
        "HOT_RESET": ("vfio_pci_hot_reset", "argsz flags count"),
        "FEATURE": ("vfio_device_feature", "argsz flags"),
        "CAP_HEADER": ("vfio_info_cap_header", "id version next"),
    },
    "iommufd": {
        "DESTROY": ("iommu_destroy", "size id"),
        "IOAS_ALLOC": ("iommu_ioas_alloc", "size flags out_ioas_id"),
        "IOAS_IOVA_RANGES": (
            "iommu_ioas_iova_ranges",
            "size ioas_id num_iovas __reserved allowed_iovas out_iova_alignment",
        ),
        "IOVA_RANGE": ("iommu_iova_range", "start last"),
        "IOAS_MAP": ("iommu_ioas_map", "size flags ioas_id __reserved user_va length iova"),
        "IOAS_UNMAP": ("iommu_ioas_unmap", "size ioas_id iova length"),
        "HWPT_ALLOC": (
            "iommu_hwpt_alloc",
            "size flags dev_id pt_id out_hwpt_id __reserved data_type data_len data_uptr",
        ),
    },
}
NUMBERS = {
    "vfio": {
        "GET_API_VERSION": "VFIO_GET_API_VERSION",
        "CHECK_EXTENSION": "VFIO_CHECK_EXTENSION",
        "SET_IOMMU": "VFIO_SET_IOMMU",
        "IOMMU_GET_INFO": "VFIO_IOMMU_GET_INFO",
        "IOMMU_MAP_DMA": "VFIO_IOMMU_MAP_DMA",
        "IOMMU_UNMAP_DMA": "VFIO_IOMMU_UNMAP_DMA",
        "GROUP_GET_STATUS": "VFIO_GROUP_GET_STATUS",
        "GROUP_SET_CONTAINER": "VFIO_GROUP_SET_CONTAINER",
        "GROUP_GET_DEVICE_FD": "VFIO_GROUP_GET_DEVICE_FD",
        "DEVICE_GET_INFO": "VFIO_DEVICE_GET_INFO",
        "DEVICE_GET_REGION_INFO": "VFIO_DEVICE_GET_REGION_INFO",
        "DEVICE_GET_IRQ_INFO": "VFIO_DEVICE_GET_IRQ_INFO",
        "DEVICE_SET_IRQS": "VFIO_DEVICE_SET_IRQS",
        "DEVICE_RESET": "VFIO_DEVICE_RESET",
        "DEVICE_GET_PCI_HOT_RESET_INFO": "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO",
        "DEVICE_PCI_HOT_RESET": "VFIO_DEVICE_PCI_HOT_RESET",
        "DEVICE_FEATURE": "VFIO_DEVICE_FEATURE",
        "TYPE1V2_IOMMU": "VFIO_TYPE1v2_IOMMU",
    },
    "iommufd": {
        "IOMMU_DESTROY": "IOMMU_DESTROY",
        "IOMMU_IOAS_ALLOC": "IOMMU_IOAS_ALLOC",
        "IOMMU_IOAS_IOVA_RANGES": "IOMMU_IOAS_IOVA_RANGES",
        "IOMMU_IOAS_MAP": "IOMMU_IOAS_MAP",
        "IOMMU_IOAS_UNMAP": "IOMMU_IOAS_UNMAP",
        "IOMMU_HWPT_ALLOC": "IOMMU_HWPT_ALLOC",
        "IOAS_MAP_FIXED_IOVA": "IOMMU_IOAS_MAP_FIXED_IOVA",
        "IOAS_MAP_WRITEABLE": "IOMMU_IOAS_MAP_WRITEABLE",
        "IOAS_MAP_READABLE": "IOMMU_IOAS_MAP_READABLE",
    },
}


def offsets(layout: struct.Struct) -> tuple[int, ...]:
    """Where each field begins."""
    codes = layout.format[1:]
    return tuple(struct.calcsize("=" + codes[:at]) for at in range(len(codes)))


@pytest.mark.parametrize(("name", "size", "fields"), LAYOUTS)
def test_layout_is_the_kernels(name, size, fields):
    layout = getattr(ioctl, name)
    assert layout.format[0] == "="
    assert (layout.size, offsets(layout)) == (size, fields)


def test_every_layout_is_in_the_table():
    ours = {name for name, value in vars(ioctl).items() if isinstance(value, struct.Struct)}
    assert ours == {name for name, _, _ in LAYOUTS}


def test_features_with_pointers():
    assert kernel_feature.LOGGING_CONTROL.size == 24
    assert offsets(kernel_feature.LOGGING_CONTROL) == (0, 8, 12, 16)
    assert kernel_feature.LOGGING_REPORT.size == 32
    assert (uapi.FEATURE_STATE.size, uapi.FEATURE_MIGRATION.size, uapi.FEATURE_DATA_SIZE.size) == (8, 8, 8)


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0x3B76, "DEVICE_BIND_IOMMUFD"),
        (0x3B77, "DEVICE_ATTACH_IOMMUFD_PT"),
        (0x3B8A, "IOMMU_GET_HW_INFO"),
        (0x3B8B, "IOMMU_HWPT_SET_DIRTY_TRACKING"),
        (0x3B8C, "IOMMU_HWPT_GET_DIRTY_BITMAP"),
        (0x3B8F, "IOMMU_IOAS_MAP_FILE"),
    ],
)
def test_numbers_that_older_headers_lack(number, name):
    assert getattr(ioctl, name) == number


@pytest.mark.parametrize("header", ["vfio", "iommufd"])
def test_against_the_installed_headers(tmp_path, header):
    """The compiler says what the headers of this machine say; a header that is too old for a struct is not asked."""
    lines = ["#include <stddef.h>", "#include <stdio.h>", f'#if __has_include("linux/{header}.h")']
    lines += [f"#include <linux/{header}.h>", "int main(void) {", 'puts("there");']
    for ours, (theirs, fields) in HEADER_STRUCTS[header].items():
        for field in fields.split():
            lines.append(f'printf("{ours} %zu\\n", offsetof(struct {theirs}, {field}));')
    for ours, theirs in NUMBERS[header].items():
        lines.append(f'printf("{ours} %lu\\n", (unsigned long){theirs});')
    lines += ["return 0; }", "#else", "int main(void) { return 0; }", "#endif"]
    source = tmp_path / "ask.c"
    source.write_text("\n".join(lines))
    compiler = shutil.which("cc")
    assert compiler, "the native extension needs a C compiler, and so does this test"
    subprocess.run([compiler, "-o", tmp_path / "ask", source], check=True)
    said = subprocess.run([tmp_path / "ask"], capture_output=True, text=True, check=True).stdout.split("\n")
    told: dict[str, list[int]] = {}
    for line in said[1:-1]:
        name, value = line.split()
        told.setdefault(name, []).append(int(value))
    expected = {}
    if said[0] == "there":
        for name, (_, fields) in HEADER_STRUCTS[header].items():
            expected[name] = list(offsets(getattr(ioctl, name)))[: len(fields.split())]
        expected |= {name: [getattr(ioctl, name)] for name in NUMBERS[header]}
    assert told == expected
    assert header == "iommufd" or told
