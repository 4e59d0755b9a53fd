"""Suspending, resuming, saving and loading VFs: which order is allowed, and the work that takes time.

Where no document says what firmware does, the rule is ours and is listed in this folder's README as (model). It must
not know the commands' forms.
"""

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from plugins.mlx5.models.image import FULL, HEADER_SIZE, META, Body, Reader, WrongImageError
from plugins.mlx5.models.keys import READ, WRITE, Keys
from plugins.mlx5.models.options import MOST_SINGLE_IMAGE, Options
from plugins.mlx5.models.orders import SLOW_SECONDS, Orders
from plugins.mlx5.models.status import RefusedError, Status
from plugins.mlx5.models.vhca import Series, Vhca
from vfu_server.model import Bus, BusError

logger = logging.getLogger(__name__)

IDLE, READY, DIRTY, INITIAL = 1, 2, 3, 4
QUIET_SECONDS = 50e-6
"""How often a suspend looks whether the engine has come to rest."""

Done = Callable[[tuple[int, int] | RefusedError], None]
"""Called with (bytes of the image, least size of the next buffer) or the refusal."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What QUERY answers."""

    state: int
    required: int
    remaining: int


class Migration:
    """Does what the commands ask of a `Vhca`. `need_pages(vhca, then)` gets pages for a SAVE; `drop_pages` lets go."""

    def __init__(
        self,
        options: Options,
        bus: Callable[[], Bus],
        keys: Keys,
        orders: Orders,
        *,
        chunks: Callable[[], bool],
        need_pages: Callable[[Vhca, Callable[[bool], None]], None],
        drop_pages: Callable[[Vhca], None],
    ) -> None:
        self._options = options
        self._bus = bus
        self._keys = keys
        self._orders = orders
        self._chunks = chunks
        self._need_pages = need_pages
        self._drop_pages = drop_pages
        self._series = itertools.count(1)

    # suspend and resume

    def suspend(self, vhca: Vhca, *, responder: bool, done: Callable[[], None]) -> None:
        """Initiator first, then responder; `done` when nothing is at work any more."""
        self._check_idle(vhca)
        if (vhca.responder_stopped if responder else vhca.initiator_stopped) or (
            responder and not vhca.initiator_stopped
        ):
            raise RefusedError(Status.BAD_RES_STATE, 0x501, f"SUSPEND of VHCA {vhca.vhca_id:#x}, which is {_how(vhca)}")
        if responder:
            vhca.responder_stopped = True
            vhca.reader = None
        else:
            vhca.initiator_stopped = True
            vhca.parts.engine.hold()
            vhca.parts.queue.held = True
        self._when_quiet(vhca, done)

    def resume(self, vhca: Vhca, *, initiator: bool) -> None:
        """Responder first, then initiator."""
        order = vhca.initiator_stopped and vhca.responder_stopped is not initiator
        if not order:
            raise RefusedError(Status.BAD_RES_STATE, 0x502, f"RESUME of VHCA {vhca.vhca_id:#x}, which is {_how(vhca)}")
        if vhca.spoiled or (vhca.reader is not None and not (vhca.reader.final and vhca.reader.is_whole)):
            raise RefusedError(Status.BAD_RES_STATE, 0x503, f"VHCA {vhca.vhca_id:#x} holds a state that is not whole")
        if not initiator:
            vhca.responder_stopped = False
            vhca.reader = None
            return
        vhca.initiator_stopped = False
        vhca.parts.queue.held = False
        vhca.parts.engine.release()
        vhca.parts.queue.go_on()

    # save

    def query(self, vhca: Vhca, *, incremental: bool, chunk: bool) -> Sizes:
        """How much there is to save. `chunk` is allowed where the card has chunks."""
        if chunk and not self._chunks():
            raise RefusedError(Status.BAD_PARAM, 0x504, "this card saves no chunks")
        if incremental:
            self._check_idle(vhca)
            total = self._left(vhca)
        else:
            total = vhca.geometry.size - HEADER_SIZE
        least = total + HEADER_SIZE if total else 0
        required = min(self._options.chunk_size, least) if self._chunks() else least
        if required > MOST_SINGLE_IMAGE:
            raise RefusedError(Status.LIMIT, 0x505, f"a state of {least} bytes needs chunks", mistake=False)
        headers = -(-total // (required - HEADER_SIZE)) * HEADER_SIZE if total else 0
        if not vhca.tracking:
            state = IDLE
        elif vhca.series is not None and vhca.series.body is not None and vhca.series.body.kind == FULL:
            state = INITIAL
        else:
            state = DIRTY if total else READY
        if vhca.tracking and self._orders.take("initial"):
            state = INITIAL
        return Sizes(state, required, total + headers if chunk else 0)

    def save(self, vhca: Vhca, *, incremental: bool, track: bool, mkey: int, at: int, size: int, done: Done) -> None:
        """One image into `size` bytes of memory. RefusedError at once, or `done` later."""
        self._check_idle(vhca)
        self._check_save(vhca, incremental=incremental, track=track)
        if size <= HEADER_SIZE or at % HEADER_SIZE:
            raise RefusedError(Status.BAD_PARAM, 0x506, f"a buffer of {size} bytes at {at:#x}")
        list(self._keys.get(mkey).pieces(at, size, WRITE))
        final = not track and vhca.responder_stopped
        abandoned = not track and not final
        fresh = not incremental or vhca.series is None
        body = None if fresh or vhca.series is None else vhca.series.body
        if not abandoned:
            self._check_room(vhca, size, fresh=fresh, final=final, body=body)
        if fresh:
            vhca.series = Series(next(self._series))
        assert vhca.series is not None
        if track:
            vhca.tracking = True
        if body is None:
            most = None if (self._chunks() or final) and not abandoned else size - HEADER_SIZE
            vhca.series.body = vhca.make_body(incremental=abandoned or not fresh, final=final, most=most)
        vhca.saving = True
        generation = vhca.generation
        self._need_pages(vhca, lambda given: self._begin_save(vhca, generation, given, track, mkey, at, size, done))

    def load(self, vhca: Vhca, *, mkey: int, at: int, size: int, done: Done) -> None:
        """One image out of `size` bytes of memory."""
        self._check_idle(vhca)
        if not vhca.responder_stopped or vhca.spoiled:
            raise RefusedError(Status.BAD_RES_STATE, 0x509, f"LOAD into VHCA {vhca.vhca_id:#x}, which is {_how(vhca)}")
        if size <= HEADER_SIZE or at % HEADER_SIZE:
            raise RefusedError(Status.BAD_PARAM, 0x50A, f"an image of {size} bytes at {at:#x}")
        pieces = list(self._keys.get(mkey).pieces(at, size, READ))
        if vhca.reader is None or (vhca.reader.final and vhca.reader.is_whole):
            vhca.reader = Reader(vhca.geometry)
            vhca.series = None
            vhca.tracking = False
        vhca.saving = True
        self._load_piece(vhca, vhca.generation, pieces, 0, size, done)

    # what is allowed

    def _check_idle(self, vhca: Vhca) -> None:
        if vhca.saving:
            raise RefusedError(Status.BUSY, 0x50B, f"a SAVE or LOAD of VHCA {vhca.vhca_id:#x} is at work")

    def _check_save(self, vhca: Vhca, *, incremental: bool, track: bool) -> None:
        how, stopped = _how(vhca), vhca.responder_stopped
        if vhca.reader is not None and not (vhca.reader.final and vhca.reader.is_whole):
            raise RefusedError(Status.BAD_RES_STATE, 0x50C, f"VHCA {vhca.vhca_id:#x} holds a state that is not whole")
        if track:
            allowed = not stopped and not (incremental and (vhca.initiator_stopped or not vhca.tracking))
        elif incremental:
            allowed = stopped and vhca.series is not None
        else:
            allowed = stopped or vhca.tracking
        if not allowed:
            raise RefusedError(
                Status.BAD_RES_STATE, 0x50D, f"SAVE incremental {incremental:d} track {track:d} of what is {how}"
            )

    def _check_room(self, vhca: Vhca, size: int, *, fresh: bool, final: bool, body: Body | None) -> None:
        if fresh:
            needed = vhca.geometry.size
        elif body is not None:
            needed = HEADER_SIZE + body.left
        elif final or self._chunks():
            needed = HEADER_SIZE + vhca.incremental_length()
        else:
            needed = HEADER_SIZE + META
        if self._chunks():
            needed = min(needed, self._options.chunk_size)
        if size < needed:
            raise RefusedError(Status.BAD_PARAM, 0x507, f"a buffer of {size} bytes where {needed} are needed")

    def _left(self, vhca: Vhca) -> int:
        """Bytes of bodies that an incremental SAVE would find."""
        if vhca.series is None or not (vhca.tracking or vhca.series.body is not None):
            raise RefusedError(Status.BAD_RES_STATE, 0x50E, f"changes of VHCA {vhca.vhca_id:#x} are not tracked")
        left = vhca.series.body.left if vhca.series.body is not None else 0
        more = vhca.tracking and (vhca.has_changed or vhca.responder_stopped)
        return left + (vhca.incremental_length() if more else 0)

    # the work itself

    def _when_quiet(self, vhca: Vhca, done: Callable[[], None]) -> None:
        if vhca.parts.engine.busy:
            self._bus().call_later(QUIET_SECONDS, lambda: self._when_quiet(vhca, done))
        else:
            done()

    def _begin_save(
        self, vhca: Vhca, generation: int, given: bool, track: bool, mkey: int, at: int, size: int, done: Done
    ) -> None:
        if generation != vhca.generation:
            done(RefusedError(Status.BAD_RES_STATE, 0x50F, "the function was reset meanwhile", mistake=False))
            return
        if not given:
            vhca.saving = False
            done(RefusedError(Status.NO_RES, 0x510, "the function has not enough pages", mistake=False))
            return
        assert vhca.series is not None
        body = vhca.series.body
        assert body is not None
        length = min(body.left, size - HEADER_SIZE)
        header = body.header(vhca.series.number, vhca.series.ordinal, length)
        try:
            pieces = list(self._keys.get(mkey).pieces(at, HEADER_SIZE + length, WRITE))
        except RefusedError as refusal:  # the key went while pages were waited for
            vhca.saving = False
            done(refusal)
            return
        delay = SLOW_SECONDS if self._orders.take("slow-save") else 0.0
        flip = self._orders.take("bit-flip")

        def step(number: int, place: int) -> None:
            """Write one piece; `place` counts the bytes of the image."""
            if generation != vhca.generation:
                done(RefusedError(Status.BAD_RES_STATE, 0x50F, "the function was reset meanwhile", mistake=False))
                return
            try:
                self._keys.get(mkey)
                iova, count = pieces[number]
                self._bus().dma_write(iova, _image_bytes(header, body, place, count, flip and number == 0))
            except (RefusedError, BusError) as error:
                vhca.saving = False
                done(_as_refusal(error))
                return
            if number + 1 < len(pieces):
                self._bus().call_later(count / self._options.save_rate, lambda: step(number + 1, place + count))
                return
            self._end_save(vhca, generation, length, track, done)

        self._bus().call_later(delay, lambda: step(0, 0))

    def _end_save(self, vhca: Vhca, generation: int, length: int, track: bool, done: Done) -> None:
        series = vhca.series
        if generation != vhca.generation or series is None or series.body is None:
            done(RefusedError(Status.BAD_RES_STATE, 0x50F, "the function was reset meanwhile", mistake=False))
            return
        series.body.position += length
        series.ordinal += 1
        vhca.saving = False
        if not series.body.left:
            complete = series.body.final
            series.body = None
            if not track and (complete or not vhca.responder_stopped):
                vhca.tracking = False
                vhca.changed.clear()
                vhca.series = None
                self._drop_pages(vhca)
        following = 0
        if not track and vhca.series is not None:
            left = self._left(vhca)
            least = left + HEADER_SIZE if left else 0
            following = min(self._options.chunk_size, least) if self._chunks() else least
        done((HEADER_SIZE + length, following))

    def _load_piece(
        self, vhca: Vhca, generation: int, pieces: list[tuple[int, int]], number: int, size: int, done: Done
    ) -> None:
        iova, count = pieces[number]
        reader = vhca.reader
        try:
            data = self._bus().dma_read(iova, count)
            if generation != vhca.generation or reader is None:
                done(RefusedError(Status.BAD_RES_STATE, 0x50F, "the function was reset meanwhile", mistake=False))
                return
            if number == 0:
                reader.begin(data[:HEADER_SIZE], size)
                data = data[HEADER_SIZE:]
            reader.feed(data)
            if number + 1 == len(pieces) and reader.is_whole:
                vhca.take_over(reader)
        except (WrongImageError, ValueError, KeyError, TypeError, BusError) as error:
            if generation == vhca.generation:
                vhca.saving = False
                vhca.spoiled = True
            done(_as_refusal(error))
            return
        if number + 1 < len(pieces):
            delay = count / self._options.save_rate
            self._bus().call_later(delay, lambda: self._load_piece(vhca, generation, pieces, number + 1, size, done))
            return
        vhca.saving = False
        done((size, 0))


def _image_bytes(header: bytes, body: Body, place: int, count: int, flip: bool) -> bytes:
    """`count` bytes of the image from byte `place`."""
    head = header[place : place + count]
    start = body.position + max(0, place - HEADER_SIZE)
    data = head + body.render(start, count - len(head))
    if flip:
        data = data[:-1] + bytes([data[-1] ^ 0x10])
    return data


def _how(vhca: Vhca) -> str:
    if vhca.spoiled:
        return "spoiled by a LOAD that failed"
    words = ["initiator stopped"] * vhca.initiator_stopped + ["responder stopped"] * vhca.responder_stopped
    return f"{', '.join(words) or 'running'}{', tracking' if vhca.tracking else ''}"


def _as_refusal(error: Exception) -> RefusedError:
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, BusError):
        return RefusedError(Status.BAD_RES, 0x511, str(error))
    return RefusedError(Status.BAD_PARAM, 0x512, f"this is not the image that is due: {error}")
