"""Thousands of damaged and forged streams for each golden one: no crash, none taken that is not what it says.

Damage on the way is always refused. A forger's stream, whose sums fit, is refused with a named error or restored in
such a way that the hardware itself tells what the stream says. Another seed: VFU_SEED=NUMBER.
"""

import os
import random
from collections import Counter

import pytest

from tests.golden.mutations import FORGED, ON_THE_WAY, damaged
from tests.golden.registry import golden
from tests.golden.trial import into, run
from vfu_server.errors import StreamFormatError, StreamMismatchError

QUICK, ALL = 1000, 10_000


@pytest.mark.parametrize(
    ("one", "count"),
    [
        pytest.param(
            one, count, id=f"{one}-{count}", marks=[pytest.mark.slow, pytest.mark.deadline(900)] if count == ALL else []
        )
        for one in golden()
        for count in (QUICK, ALL)
    ],
)
def test_damaged_streams(one, count):
    seed = int(os.environ.get("VFU_SEED", "20261122"))
    print(f"{one}: {count} streams of seed {seed}")
    others = [other.data() for other in golden() if other is not one]
    outcomes: Counter[str] = Counter()
    chance = random.Random(seed)

    async def body(place):
        for number, stream in enumerate(damaged(seed, count, one.data(), others)):
            where = f"VFU_SEED={seed}, stream {number}, {stream.what}"
            try:
                found = await into(place, one, stream.data, chance)
            except Exception as error:
                error.add_note(f"{where}: {stream.data.hex()}")
                raise
            assert not found.wrong, f"{where}: {found.wrong}"
            if not stream.sound:
                assert isinstance(found.refused, StreamFormatError | StreamMismatchError), f"{where}: {found.refused!r}"
            outcomes[f"{stream.what}: {type(found.refused).__name__ if found.refused else 'restored'}"] += 1

    run(one, body)
    for what, times in sorted(outcomes.items()):
        print(f"{times:6} {what}")
    assert {what.partition(":")[0] for what in outcomes} == {how.__name__ for how in (*ON_THE_WAY, *FORGED)}
    assert any(what.endswith("restored") for what in outcomes), "not all that is forged is wrong"
