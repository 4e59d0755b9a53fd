"""One stream into one device: what becomes of it. Knows no plugin and no damage."""

import random
from dataclasses import dataclass

import trio
from trio.testing import MockClock

from tests.end_to_end.streams import parts_of
from tests.golden.registry import Golden, Place
from vfu_server.errors import VfuServerError
from vfu_server.session_intake import Intake


@dataclass(frozen=True, slots=True)
class Verdict:
    """`refused`: the error that it was answered with, None if it was taken. `wrong`: what must not be."""

    refused: VfuServerError | None
    wrong: tuple[str, ...] = ()


async def into(place: Place, golden: Golden, data: bytes, chance: random.Random) -> Verdict:
    """Load it in pieces of any size, as a client does: RESUMING, the data, STOP. Whatever else it raises is a crash."""
    device = await place.fresh()
    intake = Intake(place.host, device, golden.plugin)
    writing = False
    try:
        await device.load_begin()
        at = 0
        while at < len(data):
            size = chance.choice((1, 100, intake.bulk or 4096, len(data)))
            taken, items = intake.push([data[at : at + size]])
            assert taken > 0
            at += taken
            for item in items:
                await intake.take(item)
        intake.finish()
        writing = True
        await intake.write()
    except VfuServerError as error:
        if not writing and place.written():
            return Verdict(error, ("the hardware was written to before all had been checked",))
        return Verdict(error, () if str(error) else ("the error says nothing",))
    return Verdict(None, tuple(await place.differences(parts_of(data))))


def run(golden: Golden, body) -> None:
    """Run `body(place)` for a device that the golden stream fits."""

    async def main() -> None:
        async with golden.place(golden.parts()) as place:
            await body(place)

    trio.run(main, clock=MockClock(autojump_threshold=0) if golden.jumps else None)
