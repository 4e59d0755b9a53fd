"""The doctor: one report of a function, before and behind its opening, and two reports side by side."""

import json
import struct

import pytest
import trio
from trio.testing import trio_test

from tests.host.conftest import BDF
from tests.host.fake_function import FakeFunction
from tests.host.fake_kernel import FakeKernel
from tests.server.programs import install, run
from vfu_server import cli_doctor, doctor, uapi
from vfu_server.doctor import Report
from vfu_server.errors import ConfigError
from vfu_server.host.checks import Finding, Status
from vfu_server.host.kernel import open_bdf
from vfu_server.plugins import Plugins

PLUGIN = """
from vfu_server.device import Capabilities, Device, StateIdentity
from vfu_server.errors import HostError
from vfu_server.hookspecs import hookimpl
from vfu_server.policy import Policy

VFU_SERVER_API = 1

class Plain(Device):
    closed = 0
    capabilities = Capabilities()
    identity = StateIdentity("plain", 3, "fw 1.2", 5)
    policy = Policy([], p2p_reason="its queue cannot be told from its registers")
    async def stop(self, kind): ...
    async def start(self, kind): ...
    async def save(self, phase, sink): ...
    async def load(self, section): ...
    async def load_done(self): ...
    async def aclose(self):
        Plain.closed += 1

@hookimpl
def vfu_server_probe(host, options):
    if "broken" in options:
        raise HostError("its firmware does not answer")
    if host.identity().vendor != 0x1234:
        return None
    device = Plain(host)
    if "never" in options:
        device.capabilities = Capabilities(migratable=False, reason="its memory cannot be read")
    return device
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(install(tmp_path / "site", "plain_plugin", {"plain": PLUGIN})))
    return Plugins()


def by_name(report: Report) -> dict[str, Finding]:
    found = {finding.name: finding for finding in report.findings}
    assert len(found) == len(report.findings)
    return found


def worse_than_ok(report: Report) -> set[str]:
    return {finding.name for finding in report.findings if finding.status is not Status.OK}


@trio_test
async def test_a_function_that_can_all(by_cdev, function, plugins):
    by_cdev.hw_capabilities = 1
    report = await doctor.diagnose(BDF, plugins, "plain", {}, kernel=by_cdev.kernel)
    assert [finding.name for finding in report.findings] == [
        "function",
        "driver",
        "iommu",
        "group",
        "vf-token",
        "permission",
        "memlock",
        "map-limit",
        "interrupts",
        "kernel",
        "memory-node",
        "open",
        "reset",
        "vectors",
        "kernel-migration",
        "dirty-pages",
        "plugin",
        "migration",
    ]
    assert worse_than_ok(report) - {"memlock"} == set()
    found = by_name(report)
    assert found["dirty-pages"].text == "a log of its DMA is kept (the IOMMU)"
    assert found["vectors"].text == (
        "interrupts: INTX 1, MSI 16, MSIX 8, ERR 1, REQ 1; vectors of MSI are all set up at once"
    )
    assert "its queue cannot be told from its registers" in found["migration"].text
    assert report.facts == {
        "vendor": "1234",
        "device": "11e8",
        "subsystem": "1af4:1100",
        "revision": "10",
        "class": "00ff00",
        "driver": "vfio-pci",
        "kernel": "6.12.0-test",
        "kernel_migration": [],
        "dirty_pages": True,
        "plugin": "plain",
        "plugin_version": "1.0",
        "variant": "plain",
        "state_version": 3,
        "firmware": "fw 1.2",
        "features": 5,
        "migratable": True,
    }
    assert function.calls[-1] != "released"
    assert by_cdev.opened("cdev") == []  # given back
    assert function.calls[-1] == "released"
    assert plugins.load("plain").module.Plain.closed == 1


@trio_test
async def test_a_function_by_group_without_reset_or_log(by_group, function, plugins):
    function.resets = False
    report = await doctor.diagnose(BDF, plugins, "auto", {"never": ""}, kernel=by_group.kernel)
    found = by_name(report)
    assert worse_than_ok(report) - {"memlock"} == {"kernel", "reset", "dirty-pages", "migration"}
    assert report.status is Status.WARN
    assert "its memory cannot be read" in found["migration"].text
    assert found["dirty-pages"].cure[0].startswith("--dirty-tracking all")


@trio_test
async def test_a_driver_that_migrates_by_itself(by_cdev, function, plugins):
    ways = uapi.MIGRATION_STOP_COPY | uapi.MIGRATION_PRE_COPY
    function.features = {
        1: (0x10000, 16, lambda _flags, data: struct.pack_into("=Q", data, 0, ways) or 0),
        6: (0x20000, 32, lambda *_: 0),
    }
    report = await doctor.diagnose(BDF, plugins, "plain", {}, kernel=by_cdev.kernel)
    found = by_name(report)
    assert found["kernel-migration"].text == "the driver vfio-pci migrates it by itself: stop-copy, pre-copy"
    assert found["dirty-pages"].text == "a log of its DMA is kept (the device's driver)"
    assert report.facts["kernel_migration"] == ["stop-copy", "pre-copy"]


@trio_test
async def test_what_cannot_be_opened_is_not(by_cdev, machine, plugins):
    machine.function("0000:00:05.0", driver="nvme")
    report = await doctor.diagnose(BDF, plugins, "plain", {}, kernel=by_cdev.kernel)
    assert worse_than_ok(report) - {"memlock"} == {"group"}
    assert report.status is Status.FAIL
    assert "open" not in by_name(report)
    assert by_cdev.requests == []


@trio_test
async def test_a_function_that_is_in_use_is_not_disturbed(by_cdev, function, plugins):
    host = await open_bdf(BDF, kernel=by_cdev.kernel)
    function.calls.clear()
    report = await doctor.diagnose(BDF, plugins, "plain", {}, kernel=by_cdev.kernel)
    found = by_name(report)["open"]
    assert (found.status, "in use already" in found.text) == (Status.FAIL, True)
    assert found.cure == ("fuser -v /dev/vfio/devices/vfio0",)
    assert function.calls == []
    await host.aclose()


@trio_test
async def test_a_function_that_is_not_there(by_cdev, plugins):
    report = await doctor.diagnose("0000:00:1f.7", plugins, "plain", {}, kernel=by_cdev.kernel)
    assert [(each.name, each.status) for each in report.findings] == [("function", Status.FAIL)]
    assert report.findings[0].cure[0].startswith("lspci -D")


@pytest.mark.parametrize(
    ("plugin", "options", "ids", "words"),
    [
        ("plain", {"broken": ""}, b"\x34\x12", "its firmware does not answer"),
        ("plain", {}, b"\x35\x12", "plugin 'plain' does not take 0000:00:04.0 (1235:11e8 revision 10)"),
        ("unheard", {}, b"\x34\x12", "there is no plugin 'unheard'"),
    ],
)
def test_a_plugin_that_does_not_take_it(by_cdev, function, plugins, plugin, options, ids, words):
    function.memory[7][0:2] = ids

    async def diagnose():
        return await doctor.diagnose(BDF, plugins, plugin, options, kernel=by_cdev.kernel)

    found = by_name(trio.run(diagnose))
    assert (found["plugin"].status, words in found["plugin"].text) == (Status.FAIL, True)
    assert "migration" not in found


# --- two hosts

FACTS = {
    "vendor": "1234",
    "device": "11e8",
    "subsystem": "1af4:1100",
    "revision": "10",
    "driver": "vfio-pci",
    "kernel": "6.12.0",
    "kernel_migration": [],
    "dirty_pages": True,
    "plugin": "plain",
    "plugin_version": "1.0",
    "variant": "plain",
    "state_version": 3,
    "firmware": "fw 1.2",
    "features": 5,
    "migratable": True,
}


def report(*findings: Finding, **facts) -> Report:
    return Report(BDF, findings or (Finding("function", Status.OK, "there"),), FACTS | facts)


def told(mine: Report, peers: Report) -> dict[str, Status]:
    return {each.name: each.status for each in doctor.compare(mine, peers)}


def test_two_that_agree():
    assert told(report(), report()) == {"peer-here": Status.OK, "peer-there": Status.OK, "peer": Status.OK}


@pytest.mark.parametrize("name", sorted(doctor.MUST_AGREE))
def test_what_must_agree(name):
    assert told(report(), report(**{name: "else"})) == {
        "peer-here": Status.OK,
        "peer-there": Status.OK,
        f"peer-{name.replace('_', '-')}": Status.FAIL,
    }


@pytest.mark.parametrize("name", sorted(doctor.MAY_DIFFER))
def test_what_may_differ(name):
    assert told(report(), report(**{name: "else"}))[f"peer-{name.replace('_', '-')}"] is Status.WARN


def test_a_peer_that_is_not_ready():
    broken = report(Finding("group", Status.FAIL, "not viable"))
    assert told(report(), broken) == {"peer-here": Status.OK, "peer-there": Status.FAIL}
    assert told(broken, report())["peer-here"] is Status.FAIL
    assert told(report(migratable=False), report())["peer-here"] is Status.FAIL


def test_facts_that_one_side_could_not_find_out():
    facts = {name: value for name, value in FACTS.items() if name not in ("plugin", "variant")}
    found = doctor.compare(Report(BDF, (Finding("plugin", Status.FAIL, "none"),), facts), report())
    assert {each.name: each.status for each in found}["peer-unknown"] is Status.WARN
    assert found[-1].text == "not known on both sides: plugin, variant"


def test_a_report_survives_json():
    before = report(
        Finding("group", Status.FAIL, "not viable", ("one", "two"), 1), Finding("memlock", Status.WARN, "w")
    )
    assert doctor.read_report(before.as_json(), "peer.json") == before
    assert json.loads(before.as_json())["status"] == "fail"


FINE = '{"name": "x", "status": "fine", "text": "", "cure": [], "errno": 0}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": 1, "bdf": "x", "facts": {}, "checks": [{"name": "x"}]}',
        f'{{"format": 1, "bdf": "x", "facts": {{}}, "checks": [{FINE}]}}',
        '{"format": 1, "bdf": "x", "facts": 3, "checks": []}',
        '"format"',
        "\x00",
    ],
)
def test_what_is_no_report(text):
    with pytest.raises(ConfigError, match=r"peer\.json is no report of `vfu-server doctor --json`"):
        doctor.read_report(text, "peer.json")


def test_a_report_of_another_format():
    with pytest.raises(ConfigError, match="a report of format 2, this server reads 1"):
        doctor.read_report('{"format": 2}', "peer.json")


# --- the program

NOWHERE = "0000:ff:1f.7"


def test_the_program_prints_and_answers_by_its_exit_code():
    done = run("doctor", "--bdf", NOWHERE)
    assert done.returncode == 4
    assert done.stdout.startswith(f"fail  function: there is no PCI function {NOWHERE}\n        lspci -D")
    assert done.stderr == ""


def test_the_program_prints_json_and_reads_it_back(tmp_path):
    done = run("doctor", "--bdf", NOWHERE, "--json")
    assert done.returncode == 4
    (tmp_path / "peer.json").write_text(done.stdout)
    again = run("doctor", "--bdf", NOWHERE, "--peer", tmp_path / "peer.json")
    assert again.returncode == 4
    assert f"fail  peer-there: {NOWHERE} on the peer fails at: function" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "one of the arguments --bdf --mdev is required"),
        (("--bdf", "nonsense"), 2, "'nonsense' is no PCI address"),
        (("--bdf", NOWHERE, "--peer", "/nowhere.json"), 3, "--peer /nowhere.json: No such file or directory"),
        (("--bdf", NOWHERE, "--peer", "/dev/null"), 3, "/dev/null is no report"),
        (("--bdf", NOWHERE, "--peer", "x", "--json"), 2, "--peer compares for people"),
        (("--bdf", NOWHERE, "--option", "x"), 2, "--option x: give it as KEY=VALUE"),
    ],
)
def test_the_program_refuses_in_one_line(arguments, code, words):
    done = run("doctor", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        cli_doctor.build().parse_args(["--help"])
    text = capsys.readouterr().out
    for option in ("--bdf", "--plugin", "--option", "--peer", "--json"):
        assert option in text


def test_control_characters_do_not_reach_the_terminal(capsys):
    cli_doctor.print_findings([Finding("x", Status.FAIL, "a\x1b[2Jb", ("c\nd",))])
    assert capsys.readouterr().out == "fail  x: a\\x1b[2Jb\n        c\\x0ad\n"


@trio_test
async def test_a_mediated_device(machine, no_leaks, plugins):
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    machine.mdev(uuid, "mtty-2", driver="mtty")
    machine.nodes("/dev/vfio/vfio", "/dev/vfio/7")
    fake = FakeKernel(machine.root, FakeFunction(uuid))
    report = await doctor.diagnose(uuid, plugins, "plain", {}, kernel=fake.kernel, mediated=True)
    found = by_name(report)
    assert found["function"].text == f"{uuid} is a mediated device of the type mtty-2"
    assert (found["open"].status, found["open"].text[:19]) == (Status.OK, "opened by its group")
    assert (found["plugin"].status, found["migration"].status, report.bdf) == (Status.OK, Status.OK, uuid)
    missing = await doctor.diagnose(uuid[:-1] + "f", plugins, "plain", {}, kernel=fake.kernel, mediated=True)
    (finding,) = missing.findings
    assert (finding.status, "no mediated device" in finding.text) == (Status.FAIL, True)
    fake.close()
