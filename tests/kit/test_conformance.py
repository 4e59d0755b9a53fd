"""The conformance suite finds nothing in a sound plugin, and each check finds what it is for in a spoilt one."""

import re
import sys

import pytest

from tests.kit.conftest import NAME, installed
from vfu_server.device import ModelCommand
from vfu_server.plugins import Plugins
from vfu_server.testing.conformance import CHECKS, Bench, Target, Verdict, run

MODEL = ModelCommand(f"{NAME}.model", "")
BY_NAME = {each.name: each for each in CHECKS}

SPOILT = f"""
import struct, time
from dataclasses import replace
import {NAME}.device
from {NAME}.device import WrittenSumDevice, REGISTERS
from {NAME}.policy import POLICY
from {NAME}.registers import BLOCK
from vfu_server.device import Capabilities, PrecopyInfo, SavePhase, Section, StateIdentity
from vfu_server.errors import HostError
from vfu_server.hookspecs import hookimpl
from vfu_server.pci_command import memory_space
from vfu_server.policy import Answer, Answers, Policy, Rule

VFU_SERVER_API = 1

class Spoilt(WrittenSumDevice):
    count = 0
%s

@hookimpl
def vfu_server_probe(host, options):
    return Spoilt(host)

@hookimpl
def vfu_server_describe(options):
    return {{"summary": "", "policies": {{}}}}
"""

CASES = {
    "identity that changes": (
        "declarations",
        "must not change",
        """
    @property
    def identity(self):
        self.count += 1
        return StateIdentity("x", 1, features=self.count)
""",
    ),
    "no reason": (
        "declarations",
        "without a reason",
        """
    @property
    def capabilities(self):
        return Capabilities(migratable=False)
""",
    ),
    "statistics of words": (
        "declarations",
        "no names with numbers",
        """
    def statistics(self):
        return {"jobs": "many"}
""",
    ),
    "a gap": (
        "policy",
        "region 0 0x1c+0xfe4",
        """
    @property
    def policy(self):
        return Policy([rule for rule in POLICY.rules if rule.start < 0x1C])
""",
    ),
    "a trap that nobody answers": (
        "policy",
        "there is no trap_read",
        """
    @property
    def policy(self):
        first, *rest = POLICY.rules
        return Policy([replace(first, read=Answers.always(Answer.TRAP)), *rest])
""",
    ),
    "p2p said twice": (
        "policy",
        "p2p=False",
        """
    @property
    def capabilities(self):
        return Capabilities(p2p=True)
""",
    ),
    "a coroutine that sleeps": (
        "coroutines",
        "load_begin calls time.sleep, which blocks",
        """
    async def load_begin(self):
        await super().load_begin()
        time.sleep(0.001)
""",
    ),
    "a lock over an await": (
        "coroutines",
        "holds self.lock over an await",
        """
    async def load_begin(self):
        with self.lock:
            await super().load_begin()
""",
    ),
    "a stop that fails": (
        "states",
        "not today",
        """
    async def stop(self, kind):
        raise HostError("not today")
""",
    ),
    "a bug": (
        "states",
        "a bug of this test",
        """
    async def estimate(self):
        return 1
    async def start(self, kind):
        raise ValueError("a bug of this test")
""",
    ),
    "a reset that resets nothing": (
        "clients",
        "is not a new device's",
        """
    async def reset(self):
        pass
""",
    ),
    "saves that differ": (
        "save-twice",
        "section 'registers' differs from byte 12",
        """
    async def save(self, phase, sink):
        if phase is SavePhase.STOP_COPY:
            self.count += 1
            await sink.send(Section("registers", 1, REGISTERS.pack(0, 0, self.count, 0)))
""",
    ),
    "a load that forgets": (
        "load",
        "after a load the saved state is another",
        """
    async def load_done(self):
        self._loaded.pop("sum")
        await super().load_done()
""",
    ),
    "early bytes that never end": (
        "pre-copy",
        "initial_bytes is 1",
        """
    @property
    def capabilities(self):
        return Capabilities(pre_copy=True)
    async def precopy_info(self):
        return PrecopyInfo(1, 0)
    async def save(self, phase, sink):
        if phase is SavePhase.PRE_COPY:
            return
        await super().save(phase, sink)
""",
    ),
    "a restore that is not read back": (
        "verified",
        "load_done did not notice",
        """
    async def load_done(self):
        with memory_space(self.host):
            for name, value in self._loaded.items():
                self.host.write(0, BLOCK[name].offset, BLOCK[name].width, value)
""",
    ),
    "a stopped device that can be written": (
        "stopped",
        "have changed what is saved: section 'registers'",
        """
    @property
    def policy(self):
        return Policy([replace(rule, write=Answers.always(Answer.PASS)) for rule in POLICY.rules])
""",
    ),
    "any length is taken": (
        "hostile",
        "a stream section 'registers' empty was taken",
        """
    async def load(self, section):
        await super().load(replace(section, payload=(section.payload + bytes(20))[:20]))
""",
    ),
    "unpacked without a look": (
        "hostile",
        "made it raise",
        """
    async def load(self, section):
        if self._loaded:
            raise HostError("twice")
        self._loaded = dict(zip(("address", "length", "sum", "jobs"), REGISTERS.unpack(section.payload)))
""",
    ),
    "any section is known": (
        "hostile",
        "with an unknown section was taken",
        """
    def knows(self, tag, version):
        return True
    async def load(self, section):
        if section.tag == "registers":
            await super().load(section)
""",
    ),
    "a failed stop that is forgotten": (
        "plugin-faults",
        "the device runs at no side",
        """
    broken = False
    async def save_end(self):
        self.broken = self.count > 3
    async def save(self, phase, sink):
        self.count += 1
        await super().save(phase, sink)
    async def start(self, kind):
        if self.broken:
            raise HostError("it cannot start any more")
""",
    ),
    "a fault of the hardware that is a bug": (
        "door-faults",
        "RuntimeError",
        """
    async def stop(self, kind):
        try:
            await super().stop(kind)
        except HostError as error:
            raise RuntimeError("unexpected") from error
""",
    ),
}


@pytest.fixture
def judge(importable, tmp_path, monkeypatch):
    """Runs one check on the written device with some members changed."""

    def call(members: str, name: str):
        site = tmp_path / "site"
        site.mkdir()
        (site / "spoilt.py").write_text(SPOILT % members)
        installed(site, "spoilt", "spoilt")
        monkeypatch.syspath_prepend(str(site))
        with Bench("spoilt", Target("spoilt", MODEL), plugins=Plugins()) as bench:
            (result,) = run(bench, [BY_NAME[name]])
        return result

    return call


@pytest.mark.parametrize("case", CASES)
def test_a_breach_is_found(judge, case):
    name, said, members = CASES[case]
    result = judge(members, name)
    assert (result.verdict, said in result.text) == (Verdict.FAILED, True), result


def test_every_check_has_a_breach_that_it_finds():
    without = {"migrate", "accesses", "stop", "pace"}  # below
    assert {name for name, *_ in CASES.values()} | without == set(BY_NAME)


@pytest.mark.parametrize("name", ["migrate", "accesses"])
def test_a_breach_that_shows_in_use(judge, name):
    members = {
        "migrate": "    async def load_done(self):\n        raise HostError('it does not take it')\n",
        "accesses": """
    @property
    def policy(self):
        return Policy([replace(rule, read=Answers.always(Answer.TRAP)) for rule in POLICY.rules])
    def trap_read(self, region, offset, width):
        raise ZeroDivisionError("a bug of this test")
""",
    }
    result = judge(members[name], name)
    assert result.verdict is Verdict.FAILED
    assert {"migrate": "it does not take it", "accesses": "a bug of this test"}[name] in result.text


@pytest.mark.slow
def test_a_stop_without_a_deadline(judge):
    result = judge("    async def stop(self, kind):\n        import trio\n        await trio.sleep_forever()\n", "stop")
    assert (result.verdict, "no deadline of its own" in result.text) == (Verdict.FAILED, True), result


def test_computing_is_told_and_no_failure(importable, tmp_path, monkeypatch):
    members = "    async def load_begin(self):\n        self.count = sum(i * i for i in range(400000))\n"
    site = tmp_path / "site"
    site.mkdir()
    (site / "spoilt.py").write_text(SPOILT % members)
    installed(site, "spoilt", "spoilt")
    monkeypatch.syspath_prepend(str(site))
    with Bench("spoilt", Target("spoilt", MODEL), plugins=Plugins()) as bench:
        used, result = run(bench, [BY_NAME["states"], BY_NAME["pace"]])
    assert used.verdict is Verdict.PASSED, used
    assert (result.verdict, "load_begin" in result.text) == (Verdict.WARNED, True), result


def test_a_device_that_cannot_be_migrated_is_judged_by_what_is_left(judge):
    members = (
        "    @property\n    def capabilities(self):\n        return Capabilities(migratable=False, reason='because')\n"
    )
    assert judge(members, "save-twice").verdict is Verdict.NOT_JUDGED


@pytest.mark.parametrize("model", ["edu", pytest.param("ioat", marks=pytest.mark.slow)])
@pytest.mark.deadline(300)
def test_our_own_plugins_pass(model):
    plugins = Plugins()
    target = Target(model, plugins.model("generic_dmaq", model))
    chosen = [each for each in CHECKS if each.name not in ("hostile", "door-faults", "plugin-faults")]
    with Bench("generic_dmaq", target, plugins=plugins) as bench:
        results = run(bench, chosen)
    wrong = [result for result in results if result.verdict is Verdict.FAILED]
    assert not wrong
    assert {result.check.name for result in results if result.verdict is Verdict.NOT_JUDGED} <= {"pre-copy", "verified"}


def test_sections_that_differ_by_nature_are_not_compared(importable, tmp_path, monkeypatch):
    """Firmware's images: the plugin says which."""
    members = CASES["saves that differ"][2]
    site = tmp_path / "site"
    site.mkdir()
    source = (SPOILT % members).replace('"policies": {}}', '"policies": {}, "unrepeatable": ["registers"]}')
    assert "unrepeatable" in source
    (site / "spoilt.py").write_text(source)
    installed(site, "spoilt", "spoilt")
    monkeypatch.syspath_prepend(str(site))
    with Bench("spoilt", Target("spoilt", MODEL), plugins=Plugins()) as bench:
        results = run(bench, [BY_NAME["save-twice"], BY_NAME["load"], BY_NAME["clients"]])
    assert [result.verdict for result in results] == [Verdict.PASSED] * 3, results


WORK = """

CALLS = []

def work(guest):
    CALLS.append(guest.read(0, 0, 4))
"""


@pytest.mark.parametrize(
    ("named", "verdict", "said"),
    [
        ("spoilt:work", Verdict.PASSED, "bytes"),
        ("spoilt:nothing", Verdict.FAILED, "there is no work 'spoilt:nothing'"),
        ("nowhere_at_all:work", Verdict.FAILED, "there is no work 'nowhere_at_all:work'"),
    ],
)
def test_a_plugin_may_say_how_its_model_is_used(importable, tmp_path, monkeypatch, named, verdict, said):
    site = tmp_path / "site"
    site.mkdir()
    source = (SPOILT % "    pass").replace('"policies": {}}', f'"policies": {{}}, "work": "{named}"}}') + WORK
    assert named in source
    (site / "spoilt.py").write_text(source)
    installed(site, "spoilt", "spoilt")
    monkeypatch.syspath_prepend(str(site))
    with Bench("spoilt", Target("spoilt", MODEL), plugins=Plugins()) as bench:
        (result,) = run(bench, [BY_NAME["load"]])
    assert (result.verdict, said in result.text) == (verdict, True), result
    assert bool(sys.modules["spoilt"].CALLS) == (verdict is Verdict.PASSED)


@pytest.mark.slow
@pytest.mark.deadline(300)
def test_the_doors_of_companions_are_struck_too():
    """A plugin whose work goes by its physical function has no other accesses."""
    plugins = Plugins()
    with Bench("mlx5", Target("connectx", plugins.model("mlx5", "connectx")), plugins=plugins) as bench:
        (result,) = run(bench, [BY_NAME["door-faults"]])
        own, companion = bench.doors("source")
    assert result.verdict is Verdict.PASSED, result
    failures, struck = re.match(
        r"(\d+) failures, (\d+) of which struck, at 2 doors and 2 of companions", result.text
    ).groups()
    assert int(failures) >= int(struck) > 20
    assert len(companion.struck) > 10
    assert own.struck == []
