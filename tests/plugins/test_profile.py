"""Profiles: what the shipped ones say, what is wrong with others (file, line, field), finding the one for a device."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plugins.generic_dmaq as plugin
from plugins.generic_dmaq import options, transforms
from plugins.generic_dmaq.layout import layout_of
from plugins.generic_dmaq.probe import probe
from plugins.generic_dmaq.profile import find_profile, load_profile, shipped
from plugins.generic_dmaq.registers import load_blocks
from plugins.generic_dmaq.transforms import Inverted, Masked, Through, Without
from tests.plugins.carry import take
from tests.plugins.fake_host import FakeEdu, FakeHost, FakeIoat
from vfu_server.errors import ConfigError, HostError, UsageError
from vfu_server.policy import Answer, Policy, StateClass
from vfu_server.toml_lines import line_numbers
from vfu_server.uapi import PCI_COMMAND

SMALL = """\
[profile]
name = "small"
summary = "one queue"

[match]
vendor = 0x1234
device = [0x5678]

[dma]
bits = 32

[reset]
kind = "function"

[[queue]]
name = "work"
doorbells = ["tail"]
head = "head"
tail = "tail"
show = ["head"]

[[bar]]
index = 0
size = 0x1000

[[bar.register]]
name = "head"
offset = 0x10
width = 4
access = "RO"
save = "DERIVED"
restore = { how = "through", register = "tail" }

[[bar.register]]
name = "tail"
offset = 0x14
width = 4
access = "RW"
save = "SAVE"
restore = { how = "without", mask = 0x8000_0000 }
stopped = "discard"

[[bar.area]]
name = "ring"
offset = 0x800
length = 0x100
reason = "data only"
"""


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    """Puts text into a profile file."""

    def write(text: str) -> Path:
        path = tmp_path / "small.toml"
        path.write_text(text)
        return path

    return write


def test_a_small_profile_is_read(written: Callable[[str], Path]) -> None:
    profile = load_profile(written(SMALL))
    assert profile.plans["head"].restore == Through("tail")
    assert profile.plans["tail"].restore == Without(0x80000000)
    assert profile.plans["tail"].verify == 0x7FFFFFFF
    layout = layout_of(profile, {})
    assert [r.name for r in layout.saved] == ["head", "tail"]
    names = [(rule.start, rule.length, rule.name) for rule in layout.policy.rules]
    assert names == [
        (0x0, 0x10, "no register 0x0+0x10"),
        (0x10, 4, "head"),
        (0x14, 4, "tail"),
        (0x18, 0x7E8, "no register 0x18+0x7e8"),
        (0x800, 0x100, "ring"),
        (0x900, 0x700, "no register 0x900+0x700"),
    ]
    assert layout.policy.rules[1].read[StateClass.STOPPED] is Answer.SHADOW
    assert layout.policy.rules[2].read[StateClass.STOPPED] is Answer.DISCARD


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ('name = "small"', 'name = "Not a name"', 2, "profile.name: must be 1 to 32"),
        ('summary = "one queue"', "summary = 5", 3, "profile.summary: must be a line of text"),
        ('summary = "one queue"', "", 1, "profile: summary is missing"),
        ('summary = "one queue"', 'summary = "x"\nsumary = "y"', 4, "profile.sumary: is not known here; known are"),
        ("vendor = 0x1234", "vendor = 0x12345", 6, "match.vendor: must be a whole number from 0x0 to 0xffff"),
        ("vendor = 0x1234", "vendor = true", 6, "match.vendor: must be a whole number"),
        ("device = [0x5678]", "device = 0x5678", 7, "match.device: must be a list"),
        ("device = [0x5678]", "device = []", 7, "match.device: must be a list"),
        ("device = [0x5678]", "", 5, "match: device is missing"),
        ("bits = 32", "bits = 65", 10, "dma.bits: must be a whole number from 0xc to 0x40"),
        ('kind = "function"', 'kind = "magic"', 13, "reset.kind: must be one of function, registers"),
        ('kind = "function"', 'kind = "registers"', 12, "register 'head' has no reset value"),
        ('doorbells = ["tail"]', 'doorbells = ["nose"]', 17, "queue[0].doorbells: there is no register 'nose'"),
        ('doorbells = ["tail"]', 'doorbells = ["head"]', 17, "queue[0].doorbells: register 'head' cannot be written"),
        ('doorbells = ["tail"]', "", 15, "queue[0]: doorbells is missing"),
        ('tail = "tail"', "", 15, "head with tail"),
        ('head = "head"\ntail = "tail"', "", 15, "nothing says when the queue is empty"),
        ('head = "head"', 'busy = ["head.on"]\nhead = "head"', 18, "queue[0].busy: register 'head' has no field 'on'"),
        ('head = "head"', 'array = "rings"\nhead = "head"', 18, "queue[0].array: there is no array 'rings'"),
        ('show = ["head"]', "show = [1]", 20, "queue[0].show: must be a list of names"),
        ("index = 0", "index = 6", 23, "bar[0].index: must be a whole number"),
        ("size = 0x1000", "size = 0x1001", 24, "bar[0].size: 0x1001 is no power of two"),
        ("offset = 0x10", "offset = 0x12", 22, "bar[0]: block 'profile.bar0': register 'head' at 0x12 is not aligned"),
        ("offset = 0x14", "offset = 0x10", 22, "registers 'head' and 'tail' overlap at 0x10"),
        ("width = 4", "width = 3", 22, "is 3 bytes wide"),
        ('access = "RO"', 'access = "RX"', 30, "bar[0].register[0].access: must be one of RO, RW, W1C"),
        ('save = "DERIVED"', 'save = "SAVE"', 31, "register[0].save: 'head' cannot be written"),
        ('save = "DERIVED"', 'save = "NONE"', 32, "register[0].restore: 'head' is not saved"),
        ('register = "tail"', 'register = "nose"', 22, "bar: there is no register 'nose'"),
        ('{ how = "without", mask = 0x8000_0000 }', '"without"', 40, 'restore: needs mask: { how = "without"'),
        ('{ how = "without", mask = 0x8000_0000 }', '"twice"', 40, "restore: must be one of plain, inverted"),
        ("mask = 0x8000_0000", "mask = 0", 40, "restore.mask: must be a whole number from 0x1"),
        ('{ how = "without", mask = 0x8000_0000 }', '"hook"', 1, "hooks is missing: tail must be restored by one"),
        ('stopped = "discard"', 'stopped = "open"', 41, "register[1].stopped: must be one of shadow, discard"),
        ('stopped = "discard"', 'stopped = "shadow"\nreads_act = true', 41, "'tail' cannot be shown: its reads act"),
        ('stopped = "discard"', "reads_act = 1", 41, "register[1].reads_act: must be true or false"),
        ('stopped = "discard"', "reads_act = true", 22, "reads of 'tail' act, so it can be no part of a queue"),
        (
            '{ how = "without", mask = 0x8000_0000 }\nstopped = "discard"',
            '"hook"\nreads_act = true',
            41,
            "reads_act: 'tail' is restored by a hook",
        ),
        ('stopped = "discard"', "verify = 0xffff_ffff", 41, "verify: bits 0x80000000 are not restored"),
        ('name = "tail"', 'name = "head"', 22, "two registers are named 'head'"),
        ("offset = 0x800", "offset = 0x10", 45, "area[0].offset: there are registers in the area"),
        ("length = 0x100", "length = 0x10000", 46, "area[0].length: the area ends behind the BAR"),
        ("length = 0x100", "length = 0x100\nmap = true", 47, "area[0].map: an area can be mapped in whole pages"),
        (
            'reason = "data only"',
            'reason = "x"\n[[bar.area]]\nname="b"\noffset=0x8ff\nlength=1\nreason=""',
            50,
            "overlaps",
        ),
        ("[[queue]]", "[queue]", 15, "queue: must be tables in double brackets, [[queue]]"),
        ("[dma]", "[[dma]]", 9, "dma: must be a table"),
        ("[dma]", "[odd]\nx = 1\n[dma]", 9, "odd: is not known here"),
        ("[dma]", '[drain]\nseconds = "soon"\n[dma]', 10, "drain.seconds: must be a number of seconds"),
        ("[dma]", "[interrupts.mask]\nhead = 0\n[dma]", 10, "interrupts.mask.head: register 'head' cannot be written"),
        ("[dma]", '[identity]\nregisters = ["nose"]\n[dma]', 10, "identity.registers: there is no register 'nose'"),
        ('summary = "one queue"', 'summary = ""\nhooks = "x y"', 4, "profile.hooks: must be 'package.module:Class'"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_field(
    written: Callable[[str], Path], old: str, new: str, line: int, said: str
) -> None:
    assert old in SMALL
    path = written(SMALL.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[profile\n", "line 1"),
        (b"\xff\xfe", "decode"),
        (b"", "summary is missing|name is missing|no \\[\\[bar\\]\\]"),
        (b"x = " + b"[" * 100000, "nested too deeply"),
        (b"#" * (1 << 20) + b"#", "longer than 1048576"),
    ],
)
def test_what_is_no_profile_at_all_is_told(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=said):
        load_profile(path)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_profile(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_profile(tmp_path)


EDU = find_profile("edu").read_text()
IOAT = find_profile("ioat").read_text()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_text_gives_anything_but_a_profile_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lines = data.draw(st.sampled_from((EDU, IOAT))).split("\n")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(lines) - 1))
        key, equals, _ = lines[at].partition("=")
        value = data.draw(
            st.sampled_from(('"x"', "-1", "0", "3", "[]", "{}", "true", "1e9", '["a"]', "[[1]]", '"9:1"', "nan"))
        )
        change = data.draw(st.sampled_from(("drop", "twice", "value", "swap")))
        if change == "drop":
            lines[at] = ""
        elif change == "twice":
            lines.insert(at, lines[at])
        elif change == "value" and equals:
            lines[at] = f"{key}= {value}"
        else:
            other = data.draw(st.integers(0, len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
    path = tmp_path_factory.mktemp("fuzz") / "p.toml"
    path.write_text("\n".join(lines))
    try:
        profile = load_profile(path)
    except ConfigError as error:
        told = str(error)
    else:
        told = ""
    if told:
        assert told.startswith(str(path))
        return
    layout = layout_of(profile, {})
    layout.policy.check(layout.sizes)
    assert not list(layout.policy.gaps(layout.sizes))


def test_every_line_of_the_shipped_profiles_is_found_where_it_is() -> None:
    for text in (EDU, IOAT):
        rows = text.split("\n")
        found = line_numbers(text)
        for path, line in found.items():
            if path and isinstance(path[-1], str):
                assert path[-1] in rows[line - 1], path
        names = [line for path, line in found.items() if path[-1:] == ("name",)]
        assert len(names) == sum(row.startswith("name =") for row in rows)


def test_the_shipped_profiles_carry_every_register_that_a_guest_can_write() -> None:
    for path in shipped():
        profile = load_profile(path)
        assert profile.name == path.stem
        assert profile.not_carried
        for bar in profile.bars:
            for register in bar.block(profile.name, {}):
                doorbell = register.name.rpartition(".")[2] == "chancmd"
                if register.access.value == "RW" and not doorbell:
                    assert register.save.value != "NONE", register.name


def test_edu_and_ioat_are_restored_as_their_hardware_needs() -> None:
    edu, ioat = load_profile(find_profile("edu")), load_profile(find_profile("ioat"))
    assert edu.plans["liveness"].restore == Inverted()
    assert edu.plans["status"].restore == Masked(0x80)
    assert [r.name for r in layout_of(edu, {}).saved][-1] == "irq_status"
    assert [r.name for r in layout_of(ioat, {"channel": 1}).saved][-1] == "intrctrl"
    assert edu.dma_bits == 28
    for queue in layout_of(ioat, {"channel": 2}).queues:
        assert {name.rpartition(".")[2] for name in queue.doorbells} == {"dmacount", "chancmd"}


def test_the_models_get_the_same_table() -> None:
    blocks = load_blocks("ioat", {"channel": 3})
    assert "channel[2].chansts" in blocks[0]
    assert "channel[3].chansts" not in blocks[0]
    assert len(load_blocks("ioat")[0]) == 9 + 31 * 10


def test_probe_takes_what_a_profile_is_for_and_nothing_else() -> None:
    assert probe(FakeHost(), {}) is None
    assert probe(FakeHost(), {"other-plugins-option": "1"}) is None
    assert take(FakeEdu()).identity.variant == "edu"
    ioat = take(FakeIoat())
    assert (ioat.identity.variant, ioat.identity.features) == ("ioat", 2)
    assert "channel[2].chansts" not in ioat.layout.blocks[0]


def test_probe_changes_nothing() -> None:
    for host in (FakeEdu(), FakeIoat()):
        host.command = 0
        config = bytes(host.config)
        take(host)
        assert (host.writes, host.strays, bytes(host.config), host.config[PCI_COMMAND]) == ([], [], config, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drain": "1"}, "knows no option 'drain'; known are: profile .*; drain-timeout"),
        ({"drain-timeout": "soon"}, "drain-timeout must be seconds above 0 and up to 3.9, not 'soon'"),
        ({"drain-timeout": "nan"}, "drain-timeout must be"),
        ({"drain-timeout": "0"}, "drain-timeout must be"),
        ({"drain-timeout": "4"}, "drain-timeout must be"),
        ({"profile": ""}, "profile is empty"),
        ({"profile": "edo"}, "no profile 'edo'; known are edu, ioat"),
        ({"profile": "./none.toml"}, "none.toml: No such file"),
        ({"profile": "ioat"}, "profile 'ioat' .* is not for 0000:00:04.0, which is 1234:11e8 revision 0x10"),
    ],
)
def test_a_wrong_option_is_the_operators_mistake(options: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        probe(FakeEdu(), options)


def test_options_reach_the_device(written: Callable[[str], Path]) -> None:
    assert take(FakeEdu()).drain_seconds == 3.0
    assert take(FakeEdu(), drain_timeout="0.5", profile="edu").drain_seconds == 0.5
    host = FakeHost()
    assert take(host, profile=str(written(SMALL))).identity.variant == "small"


def test_a_device_that_is_not_what_its_profile_says_is_told() -> None:
    host = FakeEdu()
    host.regions = [*FakeHost().regions]
    with pytest.raises(HostError, match="BAR0 has 0x1000 bytes, profile 'edu' says 0x100000"):
        take(host)
    ioat = FakeIoat()
    for count in (0, 0x1F + 0x20):
        ioat.global_regs[0] = count
        if count & 0x1F:
            assert len(take(ioat).layout.queues) == 31
        else:
            with pytest.raises(HostError, match="tells 0 of channel, possible are 1 to 31"):
                take(ioat)


HOOK = """\
from plugins.generic_dmaq.hooks import Hooks
class Mine(Hooks):
    pass
class Other:
    pass
"""


@pytest.mark.parametrize(
    ("hooks", "said"),
    [
        ("mine.py:Mine", ""),
        ("mine.py:Other", "mine.py has no class Other derived from"),
        ("mine.py:None_", "mine.py has no class None_"),
        ("gone.py:Mine", "gone.py cannot be loaded"),
        ("broken.py:Mine", "broken.py cannot be loaded"),
        ("no.such.module:Mine", "no.such.module cannot be loaded"),
    ],
)
def test_the_hook_beside_a_profile_is_found(written: Callable[[str], Path], hooks: str, said: str) -> None:
    path = written(SMALL.replace("\n\n", f'\nhooks = "{hooks}"\n\n', 1))
    path.with_name("mine.py").write_text(HOOK)
    path.with_name("broken.py").write_text("def (")
    if not said:
        assert type(take(FakeHost(), profile=str(path)).hooks).__name__ == "Mine"
        return
    with pytest.raises(ConfigError, match=said):
        take(FakeHost(), profile=str(path))


def test_an_area_may_be_mapped(written: Callable[[str], Path]) -> None:
    text = SMALL.replace("size = 0x1000", "size = 0x4000").replace("offset = 0x800", "offset = 0x2000")
    layout = layout_of(load_profile(written(text.replace("length = 0x100", "length = 0x1000\nmap = true"))), {})
    layout.policy.check(layout.sizes)
    assert [r.name for r in layout.policy.rules if r.read[StateClass.RUNNING] is Answer.MMAP] == ["ring"]


def test_the_plugin_describes_itself_without_a_device(written: Callable[[str], Path]) -> None:
    assert plugin.VFU_SERVER_API == 1
    assert sorted(plugin.vfu_server_models()) == ["edu", "ioat"]
    described = plugin.vfu_server_describe({})
    policies = described["policies"]
    assert isinstance(policies, dict)
    assert sorted(policies) == ["edu", "ioat"]
    for policy, sizes in policies.values():
        assert isinstance(policy, Policy)
        policy.check(sizes)
        assert not list(policy.gaps(sizes))
    small = plugin.vfu_server_describe({"profile": str(written(SMALL))})["policies"]
    assert isinstance(small, dict)
    assert list(small) == ["small"]


README = Path(plugin.__file__).with_name("README.md").read_text()


def test_the_form_that_the_readme_shows_is_a_profile(written: Callable[[str], Path]) -> None:
    start, end = README.index("    [profile]\n"), README.index("| `restore` | what happens |")
    profile = load_profile(written(textwrap.dedent(README[start:end])))
    layout = layout_of(profile, {"ring": 2})
    assert [queue.name for queue in layout.queues] == ["work of ring[0]", "work of ring[1]"]
    assert [r.name for r in layout.saved][-1] == "control"
    assert profile.counts_from == {"ring": "info.rings"}
    assert profile.hook_options == {"careful": True}


def test_the_readme_names_all_transforms_options_and_what_is_not_carried() -> None:
    for name in transforms.NAMES:
        assert f'"{name}"' in README
    for option in options.KNOWN:
        assert f"`{option}=" in README
