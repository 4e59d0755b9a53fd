"""Policies made ready: the compiled table against a look-up byte by byte, the areas for mapping, the print-outs."""

import errno
import io
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vfu_server.errors import PluginError, UsageError
from vfu_server.host_device import MmapArea, RegionInfo
from vfu_server.policy import WIDTH_4, WIDTH_8, WIDTH_ANY, WIDTHS_REGISTER, Answer, Answers, Policy, Rule, StateClass
from vfu_server.region import (
    MmapMode,
    compile_rules,
    may_map,
    mmap_areas,
    policy_json,
    policy_markdown,
    policy_rows,
    policy_table,
    shown_regions,
)
from vfu_server.uapi import REGION_INFO_FLAG_MMAP

PAGE = 4096
PASS, REFUSE, MMAP = (Answers.always(answer) for answer in (Answer.PASS, Answer.REFUSE, Answer.MMAP))
WHILE_RUNNING = Answers.while_running(Answer.MMAP, Answer.DISCARD)


def rule(start, length, read, write=None, region=0, name="", **kwargs):
    return Rule(region, start, length, read, read if write is None else write, name or f"at {start:#x}", **kwargs)


def bar(*areas, index=0, size=8 * PAGE, flags=REGION_INFO_FLAG_MMAP, fd=5):
    return RegionInfo(index, size, flags, tuple(MmapArea(*area) for area in areas), fd)


# --- regions that are shown shorter


def test_a_region_is_shown_shorter_with_its_areas_cut():
    regions = [RegionInfo(0, 0x1000), bar((0, PAGE), (2 * PAGE, 4 * PAGE), (7 * PAGE, PAGE), index=1)]
    shown = shown_regions(regions, {1: 4 * PAGE})
    assert shown[0] is regions[0]
    assert (shown[1].size, shown[1].areas) == (4 * PAGE, (MmapArea(0, PAGE), MmapArea(2 * PAGE, 2 * PAGE)))
    (hidden,) = shown_regions([bar((4 * PAGE, PAGE))], {0: 4 * PAGE})
    assert not hidden.flags & REGION_INFO_FLAG_MMAP  # no areas would mean that all of it may be mapped
    assert hidden.areas == ()
    (whole,) = shown_regions([bar()], {0: 4 * PAGE})
    rule_of_it = rule(0, 4 * PAGE, MMAP)
    assert mmap_areas(Policy([rule_of_it]), [whole], MmapMode.ALL) == {0: (MmapArea(0, 4 * PAGE),)}


@pytest.mark.parametrize(
    ("index", "size"), [(0, 0), (0, -1), (0, 16 * PAGE), (0, 3 * PAGE), (1, PAGE), (-1, PAGE), (9, PAGE), (7, 0x1000)]
)
def test_a_region_is_not_shown_longer_or_odd(index, size):
    regions = [bar(), *(RegionInfo(i, 0x1000 if i == 7 else 0) for i in range(1, 9))]
    with pytest.raises(PluginError, match="cannot be shown"):
        shown_regions(regions, {index: size})


# --- the table


@st.composite
def policies(draw):
    """Rules over two small regions, page granules for MMAP, with and without gaps."""
    plain = st.sampled_from([a for a in Answer if a is not Answer.MMAP])
    answers = st.builds(Answers, plain, plain, plain, plain, plain)
    mappable = st.builds(Answers, st.just(Answer.MMAP), *[st.sampled_from(Answer)] * 4)
    rules = []
    for region in (0, 2):
        at = draw(st.integers(0, 40))
        for _ in range(draw(st.integers(0, 5))):
            if draw(st.booleans()):
                start = -(-at // PAGE) * PAGE
                length = PAGE * draw(st.integers(1, 2))
                read, write = draw(mappable), draw(mappable)
            else:
                start, length = at + draw(st.integers(0, 20)), draw(st.integers(1, 600))
                read, write = draw(answers), draw(answers)
            if start + length > 8 * PAGE:
                break
            widths = draw(st.integers(1, 31))
            rules.append(rule(start, length, read, write, region, widths=widths, errno=draw(st.integers(1, 100))))
            at = start + length
    draw(st.randoms()).shuffle(rules)
    return Policy(tuple(rules), mmap_never=draw(st.sampled_from(["", "", "", "hidden registers share the BAR"])))


def regions(draw_areas):
    return [bar(*draw_areas, index=0), bar(*draw_areas, index=2)]


AREAS = st.lists(st.tuples(st.integers(0, 9 * PAGE), st.integers(0, 4 * PAGE)), max_size=3)


def allowed_by_hand(policy, found, mode):
    if mode is MmapMode.NEVER or policy.mmap_never:
        return False
    everywhere = [StateClass.RUNNING]
    if mode is MmapMode.PLUGIN:
        everywhere += [StateClass.P2P, StateClass.STOPPED, StateClass.RESUMING]
    return all(found.read[c] is Answer.MMAP and found.write[c] is Answer.MMAP for c in everywhere)


@given(policies(), st.sampled_from(MmapMode), AREAS)
def test_every_byte_is_answered_as_the_policy_says(policy, mode, areas):
    infos = regions(areas)
    mapped = mmap_areas(policy, infos, mode)
    table = compile_rules(policy, mode, {info.index: info.size for info in infos}, mapped)
    assert list(table) == sorted(table, key=lambda line: (line.region, line.start))
    assert all(line.start < line.end for line in table)
    for info in infos:
        lines = [line for line in table if line.region == info.index]
        assert all(a.end <= b.start for a, b in itertools.pairwise(lines))
        edges = {0, info.size} | {edge + d for line in lines for edge in (line.start, line.end) for d in (-1, 0, 1)}
        edges |= {edge + d for r in policy.rules for edge in (r.start, r.end) for d in (-1, 0, 1)}
        edges |= {page * PAGE + d for page in range(8) for d in (-1, 0)}
        for byte in sorted(edge for edge in edges if 0 <= edge < info.size):
            found = [line for line in lines if line.start <= byte < line.end]
            declared = [r for r in policy.rules if r.region == info.index and r.start <= byte < r.end]
            assert len(found) == len(declared) <= 1
            if not declared:
                continue
            page = byte // PAGE * PAGE
            offered = any(start <= page and page + PAGE <= min(start + size, info.size) for start, size in union(areas))
            keeps = allowed_by_hand(policy, declared[0], mode) and (offered or not areas)
            in_area = any(a.offset <= byte < a.offset + a.size for a in mapped.get(info.index, ()))
            assert in_area == keeps
            for direction in ("read", "write"):
                for state_class in StateClass:
                    expected = getattr(declared[0], direction)[state_class]
                    if expected is Answer.MMAP and not keeps:
                        expected = Answer.PASS
                    assert getattr(found[0], direction)[state_class] == expected
            assert (found[0].widths, found[0].errno) == (declared[0].widths, declared[0].errno)


def union(areas):
    """Overlapping and touching areas as one, so that a page across two of them counts."""
    ends = []
    for start, size in sorted(areas):
        if size and ends and start <= ends[-1][1]:
            ends[-1][1] = max(ends[-1][1], start + size)
        elif size:
            ends.append([start, start + size])
    return [(start, end - start) for start, end in ends]


@given(policies(), AREAS)
def test_modes_only_ever_hand_out_less(policy, areas):
    def pages(mode):
        given_out = mmap_areas(policy, regions(areas), mode)
        for spans in given_out.values():
            assert all(a.offset % PAGE == a.size % PAGE == 0 < a.size for a in spans)
            assert all(a.offset + a.size < b.offset for a, b in itertools.pairwise(spans))
            assert all(a.offset + a.size <= 8 * PAGE for a in spans)
        return {
            (i, page) for i, spans in given_out.items() for a in spans for page in range(a.offset, a.offset + a.size)
        }

    assert pages(MmapMode.NEVER) == set()
    assert pages(MmapMode.PLUGIN) <= pages(MmapMode.ALL)
    if policy.mmap_never:
        assert pages(MmapMode.ALL) == set()


def test_modes():
    harmless, running_only, never = rule(0, PAGE, MMAP), rule(PAGE, PAGE, WHILE_RUNNING), rule(2 * PAGE, PAGE, PASS)
    policy = Policy([harmless, running_only, never])
    assert mmap_areas(policy, [bar()], MmapMode.NEVER) == {}
    assert mmap_areas(policy, [bar()], MmapMode.PLUGIN) == {0: (MmapArea(0, PAGE),)}
    assert mmap_areas(policy, [bar()], MmapMode.ALL) == {0: (MmapArea(0, 2 * PAGE),)}
    hidden = Policy([harmless], mmap_never="hidden registers share the BAR")
    assert [mmap_areas(hidden, [bar()], mode) for mode in MmapMode] == [{}, {}, {}]


@pytest.mark.parametrize("missing", [StateClass.RUNNING, StateClass.P2P, StateClass.STOPPED, StateClass.RESUMING])
@pytest.mark.parametrize("direction", ["read", "write"])
def test_harmless_at_rest_means_in_every_state_and_direction(missing, direction):
    answers = Answers(*(Answer.PASS if each is missing else Answer.MMAP for each in StateClass))
    doubtful = rule(0, PAGE, *((answers, MMAP) if direction == "read" else (MMAP, answers)))
    assert not may_map(doubtful, Policy([doubtful]), MmapMode.PLUGIN)
    assert may_map(doubtful, Policy([doubtful]), MmapMode.ALL) == (missing is not StateClass.RUNNING)
    in_error = Answers(*(Answer.REFUSE if each is StateClass.ERROR else Answer.MMAP for each in StateClass))
    assert may_map(rule(0, PAGE, in_error), Policy([]), MmapMode.PLUGIN)


@pytest.mark.parametrize(
    ("offered", "handed_out"),
    [
        ([], [(PAGE, 4 * PAGE)]),
        ([(0, 8 * PAGE)], [(PAGE, 4 * PAGE)]),
        ([(2 * PAGE, PAGE)], [(2 * PAGE, PAGE)]),
        ([(0, 2 * PAGE), (4 * PAGE, 4 * PAGE)], [(PAGE, PAGE), (4 * PAGE, PAGE)]),
        ([(0, 2 * PAGE), (2 * PAGE, PAGE)], [(PAGE, 2 * PAGE)]),
        ([(2 * PAGE + 1, 2 * PAGE)], [(3 * PAGE, PAGE)]),
        ([(2 * PAGE + 1, PAGE)], []),
        ([(6 * PAGE, 2 * PAGE)], []),
        ([(4 * PAGE, 100 * PAGE)], [(4 * PAGE, PAGE)]),
    ],
)
def test_areas_are_the_common_part_with_what_the_device_offers(offered, handed_out):
    policy = Policy([rule(PAGE, 4 * PAGE, MMAP)])
    expected = {0: tuple(MmapArea(*area) for area in handed_out)} if handed_out else {}
    assert mmap_areas(policy, [bar(*offered)], MmapMode.PLUGIN) == expected


def test_a_region_that_cannot_be_mapped_gives_nothing():
    policy = Policy([rule(0, PAGE, MMAP)])
    assert mmap_areas(policy, [bar(fd=0)], MmapMode.ALL) == {0: (MmapArea(0, PAGE),)}
    assert mmap_areas(policy, [bar(flags=0)], MmapMode.ALL) == {}
    assert mmap_areas(policy, [bar(fd=-1)], MmapMode.ALL) == {}
    assert mmap_areas(policy, [bar(index=1)], MmapMode.ALL) == {}


def test_a_rule_that_is_mapped_in_parts_is_cut():
    policy = Policy([rule(0, 4 * PAGE, WHILE_RUNNING, widths=WIDTH_4, errno=errno.EBUSY)])
    areas = mmap_areas(policy, [bar((PAGE, PAGE))], MmapMode.ALL)
    table = compile_rules(policy, MmapMode.ALL, {0: 8 * PAGE}, areas)
    assert [(line.start, line.end, Answer(line.read[0]), Answer(line.read[2])) for line in table] == [
        (0, PAGE, Answer.PASS, Answer.DISCARD),
        (PAGE, 2 * PAGE, Answer.MMAP, Answer.DISCARD),
        (2 * PAGE, 4 * PAGE, Answer.PASS, Answer.DISCARD),
    ]
    assert {(line.widths, line.errno) for line in table} == {(WIDTH_4, errno.EBUSY)}
    beside = mmap_areas(policy, [bar((4 * PAGE, PAGE))], MmapMode.ALL)
    assert len(compile_rules(policy, MmapMode.ALL, {0: 8 * PAGE}, {0: (MmapArea(4 * PAGE, PAGE),)})) == 1
    assert beside == {}


def test_without_areas_the_mode_decides():
    policy = Policy([rule(0, PAGE, MMAP), rule(PAGE, PAGE, WHILE_RUNNING)])
    first = {
        mode: [Answer(line.read[0]).name for line in compile_rules(policy, mode, {0: 8 * PAGE})] for mode in MmapMode
    }
    assert first == {"never": ["PASS", "PASS"], "plugin": ["MMAP", "PASS"], "all": ["MMAP", "MMAP"]}


def test_config_space_comes_by_itself_and_wrong_policies_do_not_pass():
    table = compile_rules(Policy([]), MmapMode.PLUGIN, {0: PAGE, 7: 256})
    assert [(line.region, line.start, line.end, line.widths) for line in table] == [
        (7, 0, 256, WIDTHS_REGISTER | WIDTH_ANY)
    ]
    assert table[0].read == table[0].write == bytes([Answer.PASS] * 5)
    with pytest.raises(PluginError):
        compile_rules(Policy([rule(0, 8, PASS), rule(4, 8, PASS)]), MmapMode.PLUGIN, {0: PAGE})
    with pytest.raises(PluginError):
        compile_rules(Policy([rule(0, 8, PASS, region=4)]), MmapMode.PLUGIN, {0: PAGE})


def test_modes_by_name():
    assert MmapMode.parse("plugin") is MmapMode.PLUGIN
    with pytest.raises(UsageError, match=r"--mmap maybe: it is one of never, plugin, all"):
        MmapMode.parse("maybe")


# --- for people

SHOWN = Policy(
    [
        rule(0x100, 0x10, Answers.while_running(Answer.PASS, Answer.REFUSE), name="doorbell [x]", errno=errno.EBUSY),
        rule(0, 8, PASS, Answers.while_running(Answer.TRAP, Answer.SHADOW), name="control", widths=WIDTH_4 | WIDTH_8),
        rule(PAGE, PAGE, MMAP, name="pages", reason="reads | writes are harmless"),
    ],
    p2p_reason="the queue cannot be told apart",
)
SIZES = {0: 2 * PAGE, 1: 0, 7: 256}


def test_rows_cover_every_byte_once():
    at = dict.fromkeys(SIZES, 0)
    for row in policy_rows(SHOWN, SIZES, MmapMode.PLUGIN):
        assert row.rule.start == at[row.rule.region]
        at[row.rule.region] = row.rule.end
    assert at == SIZES


def test_table_for_a_terminal():
    out = io.StringIO()
    Console(file=out, width=200).print(policy_table(SHOWN, SIZES, MmapMode.PLUGIN, title="a device"))
    text = out.getvalue()
    lines = {line.split("│")[3].strip(): line for line in text.splitlines() if line.count("│") == 10}
    assert list(lines) == ["control", "(not declared)", "doorbell [x]", "pages", "config space"]
    assert "r pass, w trap" in lines["control"]
    assert "r pass, w shadow" in lines["control"]
    assert "4 8" in lines["control"]
    assert "refuse EBUSY" in lines["doorbell [x]"]
    assert "refuse EPERM" in lines["(not declared)"]
    assert "mmap" in lines["pages"]
    assert "any" in lines["config space"]
    assert "p2p" not in [head.strip() for head in text.splitlines()[2].split("┃")]
    assert "P2P: not offered: the queue cannot be told apart" in text
    assert text.splitlines()[0].strip() == "a device"
    never = io.StringIO()
    Console(file=never, width=200).print(policy_table(SHOWN, SIZES, MmapMode.NEVER))
    assert "mmap" not in never.getvalue()


def test_markdown_is_one_table_and_its_notes():
    text = policy_markdown(Policy(SHOWN.rules, p2p=True, mmap_never="secret"), SIZES, MmapMode.PLUGIN)
    table, notes = text.rstrip("\n").split("\n\n")
    rows = table.splitlines()
    assert rows[0] == "| region | bytes | name | widths | running | p2p | stopped | resuming | error | why |"
    assert {row.replace("\\|", "").count("|") for row in rows} == {11}
    assert len(rows) == 2 + 6
    assert "| BAR0 | 0x1000-0x1fff | pages | 1 2 4 8 | pass |" in table
    assert "reads \\| writes" in table
    assert notes.splitlines() == ["P2P: offered.", "No part of this device may be mapped by a client: secret"]


def test_json_says_the_same_to_programs():
    data = json.loads(json.dumps(policy_json(SHOWN, SIZES, MmapMode.PLUGIN)))
    assert (data["mmap"], data["p2p"], data["p2p_reason"]) == ("plugin", False, "the queue cannot be told apart")
    assert [(region["index"], region["name"], region["size"]) for region in data["regions"]] == [
        (0, "BAR0", 2 * PAGE),
        (7, "CONFIG", 256),
    ]
    for region in data["regions"]:
        assert sum(entry["length"] for entry in region["rules"]) == region["size"]
    control, gap, doorbell, gap2, pages = data["regions"][0]["rules"]
    assert control["write"] == {
        "running": "trap",
        "p2p": "trap",
        "stopped": "shadow",
        "resuming": "shadow",
        "error": "shadow",
    }
    assert control["widths"] == [4, 8]
    assert (doorbell["errno"], doorbell["read"]["stopped"]) == ("EBUSY", "refuse")
    assert (pages["mapped"], pages["declared"], gap["declared"], gap2["length"]) == (True, True, False, PAGE - 0x110)
    assert set(gap["read"].values()) == {"refuse"}
