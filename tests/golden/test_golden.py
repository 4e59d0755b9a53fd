"""States that were saved once are loaded for ever, and there is one of every plugin that can save.

How they were made and the rule for new ones: docs/design/stream-format.md, "Golden streams".
"""

import random
from importlib.metadata import entry_points

import pytest

from tests.golden import make
from tests.golden.registry import FOLDER, golden
from tests.golden.trial import into, run


@pytest.mark.parametrize("one", golden(), ids=str)
def test_it_is_loaded_and_the_hardware_has_it(one):
    async def body(place):
        for seed in range(3):
            found = await into(place, one, one.data(), random.Random(seed))
            assert found.refused is None, found.refused
            assert found.wrong == ()

    run(one, body)


@pytest.mark.parametrize("one", golden(), ids=str)
def test_it_is_what_its_name_says(one):
    header = one.parts().header
    assert (header.plugin, header.state.state_version) == (one.plugin, one.version)


def test_every_file_is_tried():
    assert {path.name for path in FOLDER.iterdir()} == {one.path.name for one in golden()}


def test_every_plugin_has_one_of_its_present_version():
    shipped = {point.name for point in entry_points(group="vfu_server") if point.value.startswith("plugins.")}
    assert shipped <= {one.plugin for one in golden()}

    async def body(place):
        device = await place.fresh()
        versions.setdefault((one.plugin, one.variant), set()).add(one.version)
        today[one.plugin, one.variant] = device.identity.state_version

    versions, today = {}, {}
    for one in golden():
        run(one, body)
    for kind, version in today.items():
        assert version in versions[kind], (
            f"{kind}: state version {version} has no golden stream: python -m tests.golden.make"
        )


def test_none_is_ever_made_anew(tmp_path, capsys):
    before = {one.name: one.path.stat().st_mtime_ns for one in golden()}
    assert make.main() == 0
    assert capsys.readouterr().out == f"0 made, {len(golden())} were there\n"
    assert {one.name: one.path.stat().st_mtime_ns for one in golden()} == before


@pytest.mark.parametrize("one", golden(), ids=str)
def test_one_that_is_saved_today_is_loaded_too(one, tmp_path):
    """What `make` gives now, by the real server, is a sound stream of the same device."""
    data = one.make(tmp_path)

    async def body(place):
        found = await into(place, one, data, random.Random(1))
        assert found.refused is None, found.refused
        assert found.wrong == ()

    run(one, body)
