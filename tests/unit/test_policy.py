"""What a policy may say: overlap, gaps, widths, alignment, config space."""

import pytest

from vfu_server.errors import PluginError
from vfu_server.policy import (
    STATE_CLASS,
    WIDTH_4,
    WIDTH_ANY,
    WIDTHS_REGISTER,
    Answer,
    Answers,
    Policy,
    Rule,
    StateClass,
)
from vfu_server.uapi import MigState, RegionIndex

SIZES = {0: 0x4000, 2: 0x1000, 7: 0x100}
PASS, MMAP = Answers.always(Answer.PASS), Answers.always(Answer.MMAP)


def rule(region, start, length, read=PASS, write=PASS, name="a rule", **kwargs):
    return Rule(region, start, length, read, write, name, **kwargs)


def test_every_state_has_a_class_and_every_class_a_state():
    assert set(STATE_CLASS) == set(MigState)
    assert set(STATE_CLASS.values()) == set(StateClass)
    by_class = {
        each: {state.name for state, state_class in STATE_CLASS.items() if state_class is each} for each in StateClass
    }
    assert by_class == {
        StateClass.RUNNING: {"RUNNING", "PRE_COPY"},
        StateClass.P2P: {"RUNNING_P2P", "PRE_COPY_P2P"},
        StateClass.STOPPED: {"STOP", "STOP_COPY"},
        StateClass.RESUMING: {"RESUMING"},
        StateClass.ERROR: {"ERROR"},
    }


def test_answers_by_class():
    answers = Answers.while_running(Answer.PASS, Answer.REFUSE)
    assert [answers[each] for each in StateClass] == [Answer.PASS, Answer.PASS] + [Answer.REFUSE] * 3
    assert answers.as_tuple() == tuple(answers[each] for each in StateClass)
    mixed = Answers(Answer.MMAP, Answer.PASS, Answer.SHADOW, Answer.DISCARD, Answer.REFUSE)
    assert [mixed[each] for each in StateClass] == list(mixed.as_tuple())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (rule(0, 0x3FFC, 8), "outside"),
        (rule(0, 0x4000, 4), "outside"),
        (rule(0, -4, 8), "outside"),
        (rule(0, 0, 0), "outside"),
        (rule(1, 0, 4), "outside"),
        (rule(0, 0, 4, widths=0), "width"),
        (rule(0, 0, 4, widths=64 | WIDTH_4), "width"),
        (rule(0, 0, 4, errno=0), "errno"),
        (rule(0, 0, 4, errno=5000), "errno"),
        (rule(0, 0x10, 0x1000, MMAP, MMAP), "aligned"),
        (rule(0, 0, 0x800, MMAP, MMAP), "aligned"),
        (rule(0, 0, 0x1000, MMAP, PASS), "reads and writes"),
        (rule(0, 0, 0x1000, PASS, MMAP), "reads and writes"),
        (
            rule(
                0,
                0,
                0x1000,
                Answers(Answer.PASS, Answer.PASS, Answer.MMAP, Answer.PASS, Answer.PASS),
                PASS,
            ),
            "reads and writes",
        ),
    ],
)
def test_a_rule_that_cannot_be_meant(wrong, said):
    with pytest.raises(PluginError, match=said) as refused:
        Policy([wrong]).check(SIZES)
    assert "'a rule'" in str(refused.value)


@pytest.mark.parametrize("second", [(0, 0, 0x20), (0, 0xF, 1), (0, 0x8, 4), (0, 0, 0x10)])
def test_overlap_is_named(second):
    with pytest.raises(PluginError, match=r"'first'.*'second'|'second'.*'first'"):
        Policy([rule(*second, name="second"), rule(0, 0, 0x10, name="first")]).check(SIZES)


def test_neighbours_and_other_regions_do_not_overlap():
    Policy([rule(0, 0x10, 0x10), rule(0, 0, 0x10), rule(2, 0, 0x1000), rule(0, 0x3FF0, 0x10)]).check(SIZES)


def test_gaps():
    policy = Policy([rule(0, 0x100, 0x100), rule(0, 0x200, 0x100), rule(2, 0, 0x1000), rule(0, 0x1000, 0x3000)])
    assert list(policy.gaps(SIZES)) == [(0, 0, 0x100), (0, 0x300, 0xD00), (7, 0, 0x100)]
    assert list(Policy([]).gaps(SIZES)) == [(0, 0, 0x4000), (2, 0, 0x1000), (7, 0, 0x100)]
    assert list(Policy([]).gaps({})) == []


def test_config_space_works_in_every_state_unless_the_plugin_says_more():
    policy = Policy([rule(0, 0, 4)], p2p=True, p2p_reason="why", mmap_never="never").with_config_space(0x100)
    config = policy.rules[-1]
    assert (config.region, config.start, config.length) == (RegionIndex.CONFIG, 0, 0x100)
    assert config.read == config.write == PASS
    assert config.widths == WIDTHS_REGISTER | WIDTH_ANY
    assert (policy.p2p, policy.p2p_reason, policy.mmap_never) == (True, "why", "never")
    policy.check(SIZES)
    own = Policy([rule(RegionIndex.CONFIG, 0, 0x40)])
    assert own.with_config_space(0x100) is own
