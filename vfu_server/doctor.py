"""What stands between a function and its migration: every check, before and after opening it, as one report.

A report can be compared with that of another host. Opening a function resets it, so it is only opened when nobody uses
it. How a report is printed is `cli_doctor`'s.
"""

import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import trio

from vfu_server import __version__, uapi
from vfu_server.device import Device
from vfu_server.errors import ConfigError, HostError, VfuServerError
from vfu_server.host import checks
from vfu_server.host.checks import Finding, Status
from vfu_server.host.ioctl import Kernel
from vfu_server.host.kernel import KernelHost, open_bdf, open_mdev
from vfu_server.host.sysfs import Function, Sysfs
from vfu_server.plugins import Plugins, Taken, exactly_one
from vfu_server.uapi import Feature

FORMAT = 1
"""Of a report in JSON: raised when an old reader would misunderstand a new one."""
CLOSE_DEADLINE = 3.0


@dataclass(frozen=True, slots=True)
class Report:
    """All findings about one function, and the `facts` that another host has to agree with."""

    bdf: str
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """The worst of the findings."""
        found = {finding.status for finding in self.findings}
        return next(
            status for status in (Status.FAIL, Status.WARN, Status.OK) if status in found or status is Status.OK
        )

    def as_json(self) -> str:
        """One object, for programs and for `--peer` on another host."""
        rows = [asdict(finding) for finding in self.findings]
        head = {"format": FORMAT, "server": __version__, "bdf": self.bdf, "status": self.status}
        return json.dumps({**head, "checks": rows, "facts": dict(self.facts)}, indent=2)


def read_report(text: str, where: str) -> Report:
    """A report that was printed with `--json`. ConfigError says what it is instead."""
    try:
        parsed = json.loads(text)
        if parsed["format"] != FORMAT:
            raise ConfigError(f"{where}: a report of format {parsed['format']!r}, this server reads {FORMAT}")
        findings = tuple(
            Finding(row["name"], Status(row["status"]), row["text"], tuple(row["cure"]), int(row["errno"]))
            for row in parsed["checks"]
        )
        return Report(str(parsed["bdf"]), findings, dict(parsed["facts"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where} is no report of `vfu-server doctor --json`: {error}") from None


async def diagnose(
    bdf: str,
    plugins: Plugins,
    plugin: str,
    options: Mapping[str, str],
    *,
    kernel: Kernel | None = None,
    mediated: bool = False,
) -> Report:
    """All checks of the function at `bdf`, or of the mediated device with that UUID if it is a `mediated` one.

    Raises nothing about the function: that is what a report is for.
    """
    kernel = kernel or Kernel()
    sysfs = Sysfs(kernel.root)
    try:
        function = sysfs.mdev(bdf) if mediated else sysfs.function(bdf)
    except HostError as error:
        return Report(bdf, (_refused("function", error),))
    facts: dict[str, Any] = _sysfs_facts(sysfs, function)
    findings = [check_function(function), *checks.before_opening(kernel, sysfs, function, "")]
    way = checks.usable_way(kernel, function)
    limit, privileged = checks.memlock_of_process(sysfs)
    findings += [
        checks.check_memlock(limit, privileged=privileged),
        checks.check_map_limit(sysfs, way),
        checks.check_interrupts(sysfs),
        checks.check_kernel(sysfs, way),
        check_memory_node(function),
    ]
    if all(finding.status is not Status.FAIL for finding in findings):
        findings += await _opened(kernel, function, plugins, plugin, options, facts)
    return Report(bdf, tuple(findings), facts)


def _refused(name: str, error: VfuServerError) -> Finding:
    return Finding(name, Status.FAIL, str(error), tuple(getattr(error, "__notes__", ())), error.errno)


def _sysfs_facts(sysfs: Sysfs, function: Function) -> dict[str, Any]:
    return {
        "vendor": f"{function.vendor:04x}",
        "device": f"{function.device:04x}",
        "subsystem": f"{function.subsystem_vendor:04x}:{function.subsystem:04x}",
        "revision": f"{function.revision:02x}",
        "class": f"{function.class_code:06x}",
        "driver": function.driver,
        "kernel": sysfs.kernel_release(),
    }


def check_function(function: Function) -> Finding:
    """The function is there."""
    if function.mdev_type:
        return Finding("function", Status.OK, f"{function.bdf} is a mediated device of the type {function.mdev_type}")
    ids = f"{function.vendor:04x}:{function.device:04x} revision {function.revision:02x}"
    of = f", a VF of {function.physical_function}" if function.physical_function else ""
    return Finding("function", Status.OK, f"{function.bdf} is {ids}, class {function.class_code:06x}{of}")


def check_memory_node(function: Function) -> Finding:
    """Where the function is attached, on machines with several memory nodes."""
    if function.numa_node < 0:
        return Finding("memory-node", Status.OK, "the function belongs to no memory node")
    return Finding("memory-node", Status.OK, f"memory node {function.numa_node}: guest memory is nearest there")


# --- with the function open


async def _opened(
    kernel: Kernel,
    function: Function,
    plugins: Plugins,
    plugin: str,
    options: Mapping[str, str],
    facts: dict[str, Any],
) -> list[Finding]:
    try:
        host = await (open_mdev if function.mdev_type else open_bdf)(function.bdf, kernel=kernel)
    except HostError as error:
        return [_refused("open", error)]
    try:
        findings = [
            check_open(host),
            check_reset(host),
            check_interrupt_indexes(host),
            await check_kernel_migration(host, facts),
            await check_dirty_pages(host, facts),
        ]
        findings += await check_plugin(host, plugins, plugin, options, facts)
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_DEADLINE):
            await host.aclose()
    return findings


def check_open(host: KernelHost) -> Finding:
    """It could be opened."""
    again = ", and reset by that" if host.can_reset else ""
    return Finding("open", Status.OK, f"opened by its {host.attachment.way.value}{again}")


def check_reset(host: KernelHost) -> Finding:
    """A client that goes leaves the device as it was found."""
    methods = ", ".join(host.function.reset_methods)
    if host.can_reset:
        return Finding("reset", Status.OK, f"the kernel can reset it ({methods or 'by its slot or bus'})")
    text = "the kernel cannot reset it: the plugin has to bring it back by its registers after each client"
    return Finding("reset", Status.WARN, text)


def check_interrupt_indexes(host: KernelHost) -> Finding:
    """What it can interrupt with."""
    names = [f"{uapi.IrqIndex(irq.index).name} {irq.count}" for irq in host.irqs if irq.count]
    fixed = [
        uapi.IrqIndex(irq.index).name for irq in host.irqs[1:3] if irq.flags & uapi.IRQ_INFO_NORESIZE and irq.count
    ]
    how = f"; vectors of {' and '.join(fixed)} are all set up at once" if fixed else ""
    return Finding("vectors", Status.OK, f"interrupts: {', '.join(names) or 'none'}{how}")


async def check_kernel_migration(host: KernelHost, facts: dict[str, Any]) -> Finding:
    """Whether the kernel's driver saves and restores the device by itself."""
    name = "kernel-migration"
    try:
        reply = await host.device_feature(uapi.FEATURE_GET | Feature.MIGRATION, b"", uapi.FEATURE_MIGRATION.size)
    except HostError as error:
        facts["kernel_migration"] = []
        why = "" if error.errno == errno.ENOTTY else f" ({error})"
        text = f"the driver {host.function.driver} does not migrate it{why}: the plugin has to know how"
        return Finding(name, Status.OK, text)
    flags = uapi.FEATURE_MIGRATION.unpack(reply)[0]
    known = {
        uapi.MIGRATION_STOP_COPY: "stop-copy",
        uapi.MIGRATION_P2P: "p2p",
        uapi.MIGRATION_PRE_COPY: "pre-copy",
    }
    facts["kernel_migration"] = ways = [word for bit, word in known.items() if flags & bit]
    return Finding(name, Status.OK, f"the driver {host.function.driver} migrates it by itself: {', '.join(ways)}")


async def check_dirty_pages(host: KernelHost, facts: dict[str, Any]) -> Finding:
    """Who tells which guest pages the device has written: without it, a migration is not live."""
    name = "dirty-pages"
    try:
        await host.device_feature(uapi.FEATURE_PROBE | uapi.FEATURE_SET | Feature.DMA_LOGGING_START)
    except HostError:
        pass
    else:
        facts["dirty_pages"] = True
        return Finding(name, Status.OK, f"a log of its DMA is kept ({host.dirty_source})")
    facts["dirty_pages"] = False
    text = "nobody can tell which pages it writes: the driver keeps no log, and the IOMMU cannot either"
    cure = ("--dirty-tracking all counts every page as written: right, and slow for large guests",)
    return Finding(name, Status.WARN, text, cure)


async def check_plugin(
    host: KernelHost, plugins: Plugins, plugin: str, options: Mapping[str, str], facts: dict[str, Any]
) -> list[Finding]:
    """Who knows the device, and what migration it can have with that."""
    try:
        taken = plugins.probe(plugin, host, options)
    except VfuServerError as error:
        return [_refused("plugin", error)]
    try:
        chosen = exactly_one(taken, plugin, host)
    except VfuServerError as error:
        return [_refused("plugin", error)]
    else:
        facts |= _plugin_facts(chosen)
        who = f"{chosen.plugin.name} {chosen.plugin.version}"
        variant = chosen.device.identity.variant
        found = Finding("plugin", Status.OK, f"plugin {who} takes it as {variant}")
        return [found, check_migration(chosen.device)]
    finally:
        for one in taken:
            await one.device.aclose()


def check_migration(device: Device) -> Finding:
    """What migration there is, and why not more."""
    name, can, policy = "migration", device.capabilities, device.policy
    if not can.migratable:
        return Finding(name, Status.WARN, f"it can be presented but not migrated: {can.reason}")
    pre_copy = "state goes ahead while it runs" if can.pre_copy else "all its state is copied while it stands"
    no_p2p = policy.p2p_reason or "the plugin does not say that it can stop its own DMA alone"
    p2p = "with peers" if can.p2p else f"not beside other passed-through devices in one guest ({no_p2p})"
    return Finding(name, Status.OK, f"it can be migrated: {pre_copy}; {p2p}")


def _plugin_facts(taken: Taken) -> dict[str, Any]:
    identity, can = taken.device.identity, taken.device.capabilities
    return {
        "plugin": taken.plugin.name,
        "plugin_version": taken.plugin.version,
        "variant": identity.variant,
        "state_version": identity.state_version,
        "firmware": identity.firmware,
        "features": identity.features,
        "migratable": can.migratable,
    }


# --- two hosts

# What must be equal for a state to be taken on the other side, and what a difference means.
MUST_AGREE = {
    "vendor": "another device",
    "device": "another device",
    "subsystem": "another card",
    "revision": "another revision of the hardware",
    "plugin": "another plugin: the state means nothing to it",
    "variant": "the plugin takes them for different devices",
    "state_version": "the plugins write and read different versions of the state: update the older",
    "firmware": "the plugin asks for the same firmware on both sides",
}
MAY_DIFFER = {
    "features": "the state may need what the other side has not",
    "kernel_migration": "the kernels' drivers do not migrate the same way",
    "plugin_version": "another release of the plugin, of the same state version",
    "kernel": "another kernel",
}


def compare(mine: Report, peers: Report) -> tuple[Finding, ...]:
    """Whether a state that is saved on one of two hosts can be loaded on the other, fact by fact."""
    findings = [_side("this host", mine), _side("the peer", peers)]
    for names, status in ((MUST_AGREE, Status.FAIL), (MAY_DIFFER, Status.WARN)):
        for name, meaning in names.items():
            known = name in mine.facts and name in peers.facts
            if known and mine.facts[name] != peers.facts[name]:
                text = f"{_words(name)}: {mine.facts[name]!r} here, {peers.facts[name]!r} there: {meaning}"
                findings.append(Finding(f"peer-{name.replace('_', '-')}", status, text))
    missing = [_words(name) for name in MUST_AGREE if name not in mine.facts or name not in peers.facts]
    if missing:
        text = f"not known on both sides: {', '.join(missing)}"
        findings.append(Finding("peer-unknown", Status.WARN, text, ("cure what fails above, then compare again",)))
    if all(finding.status is Status.OK for finding in findings):
        findings.append(
            Finding("peer", Status.OK, "all that decides agrees: the state of one can be loaded by the other")
        )
    return tuple(findings)


def _side(whose: str, report: Report) -> Finding:
    failing: Sequence[str] = [finding.name for finding in report.findings if finding.status is Status.FAIL]
    name = "peer-here" if whose == "this host" else "peer-there"
    if failing:
        return Finding(name, Status.FAIL, f"{report.bdf} on {whose} fails at: {', '.join(failing)}")
    if report.facts.get("migratable") is False:
        return Finding(name, Status.FAIL, f"{report.bdf} on {whose} cannot be migrated")
    return Finding(name, Status.OK, f"{report.bdf} on {whose} is ready")


def _words(name: str) -> str:
    return name.replace("_", " ")
