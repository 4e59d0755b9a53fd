"""Moving a VF: what is allowed when, images whole and in parts, what changed since, and images that are not right."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugins.mlx5.models.traffic import Traffic
from tests.plugins.mlx5_model.bench import Card
from tests.plugins.mlx5_model.raw import Buffer, Raw, StatusError

BAD_PARAM, BAD_RES, BUSY, LIMIT, BAD_STATE, NO_RES = 3, 5, 6, 8, 9, 0xF
MB = 1 << 20
NO_CHUNKS = {"migration_in_chunks": 0}


def status(call, *args, **kwargs) -> int:
    with pytest.raises(StatusError) as caught:
        call(*args, **kwargs)
    return caught.value.status


class Side:
    """A card with a driver, VF 0 enabled, and a buffer."""

    def __init__(self, seed: str = "source", size: int = 2 * MB, big: bool = True, **options) -> None:
        self.card = Card(seed=seed, **options)
        self.raw = Raw(self.card.pf).boot()
        self.vhca = self.raw.enable_vf()
        self.buffer = Buffer(self.raw, size, big=big)
        self.chunk = options.get("caps", {}).get("migration_in_chunks", 1) == 1

    def save_all(self, *, inc: bool = False) -> list[bytes]:
        return self.raw.save_all(self.vhca, self.buffer, inc=inc, chunk=self.chunk)

    def query(self, *, inc: bool = False) -> tuple[int, int, int]:
        return self.raw.query(self.vhca, inc=inc, chunk=self.chunk)

    def save(self, **how) -> bytes:
        return self.raw.save(self.vhca, self.buffer, **how)[0]

    def load(self, *images: bytes) -> None:
        for image in images:
            self.raw.load(self.vhca, self.buffer, image)

    def stop(self) -> None:
        self.raw.stop(self.vhca)

    def go(self) -> None:
        self.raw.go(self.vhca)


def move(source: Side, target: Side, images: list[bytes], traffic: Traffic | None = None) -> None:
    target.card.vfs[0].bus.memory[:] = source.card.vfs[0].bus.memory
    target.stop()
    target.load(*images)
    target.go()
    if traffic is not None:
        traffic.moved(target.card.vfs[0])


# --- states -----------------------------------------------------------------------------------------------------------


def test_suspend_and_resume_have_one_order():
    side = Side()
    raw, vhca = side.raw, side.vhca
    assert status(raw.suspend, vhca, 1) == BAD_STATE
    assert status(raw.resume, vhca, 0) == BAD_STATE
    assert status(raw.resume, vhca, 1) == BAD_STATE
    raw.suspend(vhca, 0)
    assert status(raw.suspend, vhca, 0) == BAD_STATE
    assert status(raw.resume, vhca, 0) == BAD_STATE
    raw.suspend(vhca, 1)
    assert status(raw.suspend, vhca, 1) == BAD_STATE
    assert status(raw.resume, vhca, 1) == BAD_STATE
    raw.resume(vhca, 0)
    raw.resume(vhca, 1)
    assert side.card.violations == 7


def test_who_cannot_be_migrated():
    card = Card(vfs=2)
    raw = Raw(card.pf).boot()
    assert status(raw.suspend, 0x21, 0) == BAD_STATE
    raw.enable_vf(0, migratable=False)
    assert status(raw.suspend, 0x21, 0) == BAD_STATE
    assert status(raw.suspend, 0x1F, 0) == BAD_RES
    assert status(raw.suspend, 1, 0) == BAD_RES
    raw.suspend(raw.enable_vf(1), 0)


def test_a_stopped_function_does_what_hardware_does():
    """Initiator stopped: nothing is started, registers and doorbells work. Responder: writes lost, garbage read."""
    side = Side()
    port = side.card.vfs[0]
    traffic = Traffic(port)
    traffic.start()
    traffic.run(5)
    side.raw.suspend(side.vhca, 0)
    traffic.post(5)
    side.card.clock.advance(1.0)
    assert traffic.poll() == 0
    assert traffic.register(0x100 + 0x34) == 10
    side.raw.suspend(side.vhca, 1)
    assert traffic.register(0) != traffic.register(0)
    memory = bytes(port.bus.memory)
    traffic.set_register(0x100 + 0x30, 0)
    port.write(0, 0x20800, 4, 0xFFFF)
    side.go()
    assert bytes(port.bus.memory) == memory
    traffic.finish()
    traffic.run(20)
    assert side.card.violations == 0


@pytest.mark.parametrize(
    ("inc", "track", "stopped"),
    [(1, 0, 0), (1, 1, 0), (0, 0, 0), (0, 1, 2), (1, 1, 2), (1, 0, 2), (1, 1, 1)],
)
def test_saves_that_are_not_allowed(inc, track, stopped):
    """Without tracking before; `stopped` 1: initiator, 2: both."""
    side = Side()
    for op_mod in range(stopped):
        side.raw.suspend(side.vhca, op_mod)
    assert status(side.save, inc=bool(inc), track=bool(track)) == BAD_STATE


def test_tracking_on_a_suspended_function_starts_but_does_not_go_on():
    side = Side()
    side.raw.suspend(side.vhca, 0)
    side.save(track=True)
    assert status(side.save, inc=True, track=True) == BAD_STATE
    assert side.card.state()["vf[0].tracking"] == 1


def test_query_of_changes_needs_tracking():
    side = Side()
    assert status(side.query, inc=True) == BAD_STATE
    assert side.query()[0] == 1
    side.save(track=True)
    side.query(inc=True)
    side.save()
    assert status(side.query, inc=True) == BAD_STATE


def test_migration_states_are_told():
    side = Side(caps=NO_CHUNKS)
    assert side.query()[0] == 1
    side.save(track=True)
    assert side.query(inc=True) == (2, 0, 0)
    traffic = Traffic(side.card.vfs[0])
    traffic.start()
    traffic.run(3)
    state, required, _ = side.query(inc=True)
    assert (state, required) == (3, 32768 + 3 * 4096)
    chunked = Side()
    chunked.raw.save(chunked.vhca, chunked.buffer, track=True, size=MB // 2 + MB // 2)
    assert chunked.query(inc=True)[0] in (2, 4)
    side.query(inc=True)
    side.save(inc=True, track=True)
    side.card.order("initial")
    assert side.query(inc=True)[0] == 4
    assert side.query(inc=True)[0] == 2
    without = Side(caps={"migration_state": 0})
    assert without.query()[0] == 0


def test_chunk_has_to_be_said_and_has_to_be_there():
    side = Side()
    side.raw.query(side.vhca, chunk=False)
    assert side.card.state()["violation.chunk"] == 1
    other = Side(caps=NO_CHUNKS)
    assert status(other.raw.query, other.vhca, chunk=True) == BAD_PARAM


def test_flr_forgets_suspension_and_tracking():
    side = Side()
    side.save(track=True)
    side.stop()
    side.card.models["vf0"].reset()
    state = side.card.state()
    assert [state[f"vf[0].{name}"] for name in ("initiator_stopped", "responder_stopped", "tracking")] == [0, 0, 0]
    assert state["vf[0].enabled"] == 1
    side.raw.suspend(side.vhca, 0)


def test_flr_ends_a_save_that_is_at_work():
    side = Side(save_pages=0)
    side.stop()
    side.card.order("slow-save")
    data = struct.pack(">8I", 0x118 << 16, 0, side.vhca, 0, 0, 0, side.buffer.mkey, side.buffer.size)
    side.raw.post(data)
    side.card.clock.advance(1.0)
    side.card.models["vf0"].reset()
    side.raw.finish()
    assert status(side.raw.output) == BAD_STATE
    side.raw.suspend(side.vhca, 0)


def test_one_save_at_a_time():
    side = Side(save_pages=0)
    side.stop()
    side.card.order("slow-save")
    side.raw.post(struct.pack(">8I", 0x118 << 16, 0, side.vhca, 0, 0, 0, side.buffer.mkey, side.buffer.size))
    side.card.clock.advance(1.0)
    query = struct.pack(">4I", 0x117 << 16, 0, 1 << 31 | 1 << 30 | side.vhca, 0)
    assert status(side.raw.side, query, 0x40) == BUSY
    query = struct.pack(">4I", 0x117 << 16, 0, 1 << 30 | side.vhca, 0)
    side.raw.side(query, 0x40)
    side.raw.finish()


# --- sizes and memory -------------------------------------------------------------------------------------------------


def test_buffers_have_to_be_large_enough_and_right():
    side = Side(caps=NO_CHUNKS)
    side.stop()
    raw, vhca, buffer = side.raw, side.vhca, side.buffer
    assert status(raw.save, vhca, buffer, size=MB - 1) == BAD_PARAM
    assert status(raw.save, vhca, buffer, size=2 * MB + 1) == BAD_RES
    buffer.mkey += 1
    assert status(raw.save, vhca, buffer) == BAD_RES
    buffer.mkey += 0x9FF
    assert status(raw.save, vhca, buffer) == BAD_RES
    side.buffer = Buffer(raw, 2 * MB)
    assert len(side.save()) == MB


def test_memory_that_goes_away_fails_the_save():
    side = Side()
    side.stop()
    side.card.pf.bus.holes.append((side.buffer.iova, side.buffer.iova + 4096))
    assert status(side.save) == BAD_RES
    side.card.pf.bus.holes.clear()
    assert len(side.save_all()[0]) == MB


def test_a_state_too_large_for_one_image():
    side = Side(caps=NO_CHUNKS, image_size=5 << 30)
    assert status(side.query) == LIMIT
    chunked = Side(image_size=5 << 30)
    state, required, remaining = chunked.query()
    assert (state, required) == (1, MB)
    assert 5 << 30 < remaining < (5 << 30) + MB


@pytest.mark.parametrize("size", [64 << 10, 68 << 10, MB, 3 * MB + 4096])
@pytest.mark.parametrize("caps", [NO_CHUNKS, {}], ids=["whole", "chunks"])
def test_all_sizes_move(size, caps):
    source = Side(caps=caps, image_size=size, size=4 * MB, chunk_size=64 << 10, big=False)
    target = Side("target", caps=caps, image_size=size, size=4 * MB, chunk_size=64 << 10)
    traffic = Traffic(source.card.vfs[0])
    traffic.start()
    traffic.run(10)
    source.stop()
    images = source.save_all()
    move(source, target, images, traffic)
    traffic.run(10)
    assert (source.card.violations, target.card.violations) == (0, 0)


def test_chunks_are_as_large_as_the_buffer_and_not_smaller_than_required():
    source = Side(size=256 << 10, chunk_size=128 << 10, image_size=MB)
    target = Side("target", chunk_size=128 << 10, image_size=MB)
    source.stop()
    _, required, remaining = source.query()
    assert required == 128 << 10
    assert status(source.raw.save, source.vhca, source.buffer, size=(128 << 10) - 1) == BAD_PARAM
    images = source.save_all()
    assert [len(image) for image in images[:-1]] == [256 << 10] * (len(images) - 1)
    assert sum(map(len, images)) <= remaining
    move(source, target, images)


@pytest.mark.slow
@pytest.mark.deadline(300)
def test_a_gibibyte_in_chunks_needs_no_memory():
    source = Side(size=8 * MB, image_size=1 << 30)
    target = Side("target", size=8 * MB, image_size=1 << 30)
    source.stop()
    target.stop()
    _, required, remaining = source.query()
    total, first = 0, True
    while required:
        image, required = source.raw.save(source.vhca, source.buffer, inc=not first)
        target.load(image)
        total, first = total + len(image), False
    target.go()
    assert (1 << 30) - 65536 < total <= remaining


# --- what changed since -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caps", [NO_CHUNKS, {}], ids=["whole", "chunks"])
def test_changes_follow_the_first_image(caps):
    source, target = Side(caps=caps), Side("target", caps=caps)
    traffic = Traffic(source.card.vfs[0], pairs=(0, 1))
    traffic.start()
    traffic.run(40)
    images = [source.save(track=True)]
    for _ in range(3):
        traffic.run(20)
        while source.query(inc=True)[1]:
            images.append(source.save(inc=True, track=True))
    traffic.post(30)
    source.raw.suspend(source.vhca, 0)
    source.raw.suspend(source.vhca, 1)
    last = source.save_all(inc=True)
    move(source, target, images + last, traffic)
    traffic.finish()
    traffic.run(40)
    assert (source.card.violations, target.card.violations) == (0, 0)
    assert max(len(image) for image in images[1:] + last) < MB
    assert source.card.state()["vf[0].tracking"] == 0


def test_a_first_image_in_parts_goes_on_in_the_next_saves():
    """With a small buffer the first SAVE gives a part; the rest shows as changes."""
    source = Side(size=256 << 10, chunk_size=128 << 10)
    target = Side("target", chunk_size=128 << 10)
    images = [source.save(track=True)]
    assert source.query(inc=True)[0] == 4
    while len(images) < 3:
        images.append(source.save(inc=True, track=True))
    source.stop()
    images += source.save_all(inc=True)
    move(source, target, images)


def test_a_lost_change_is_found():
    source, target = Side(caps=NO_CHUNKS), Side("target", caps=NO_CHUNKS)
    traffic = Traffic(source.card.vfs[0])
    traffic.start()
    images = [source.save(track=True)]
    traffic.run(20)
    images.append(source.save(inc=True, track=True))
    source.stop()
    images += source.save_all(inc=True)
    target.stop()
    target.load(images[0])
    assert status(target.load, images[2]) == BAD_PARAM


def test_abandoned_tracking_goes_on_as_if_nothing_had_been():
    source = Side()
    traffic = Traffic(source.card.vfs[0])
    traffic.start()
    source.save(track=True)
    traffic.run(10)
    required = source.query(inc=True)[1]
    source.raw.save(source.vhca, source.buffer, size=max(required, 4096))
    traffic.run(10)
    source.raw.settle()
    assert source.card.state()["vf[0].tracking"] == 0
    source.stop()
    move(source, Side("target"), source.save_all(), traffic)
    traffic.run(10)
    assert source.card.violations == 0


def test_after_an_error_a_full_image_still_moves():
    source, target = Side(caps=NO_CHUNKS), Side("target", caps=NO_CHUNKS)
    source.save(track=True)
    source.card.order("status:0x118:0x9:0x1")
    assert status(source.save, inc=True, track=True) == BAD_STATE
    source.stop()
    move(source, target, source.save_all())
    assert source.card.violations == 0


# --- loading ----------------------------------------------------------------------------------------------------------


def test_loads_are_for_stopped_functions():
    source, target = Side(), Side("target")
    source.stop()
    images = source.save_all()
    assert status(target.load, *images) == BAD_STATE
    target.raw.suspend(target.vhca, 0)
    assert status(target.load, *images) == BAD_STATE
    target.raw.suspend(target.vhca, 1)
    target.load(*images)
    target.go()


def test_a_state_that_is_not_whole_does_not_run():
    source, target = Side(chunk_size=128 << 10, size=256 << 10), Side("target")
    source.stop()
    images = source.save_all()
    target.stop()
    target.load(*images[:-1])
    assert status(target.raw.resume, target.vhca, 0) == BAD_STATE
    assert status(target.save) == BAD_STATE
    target.load(images[-1])
    target.go()


def test_a_first_image_alone_is_not_the_state():
    source, target = Side(caps=NO_CHUNKS), Side("target", caps=NO_CHUNKS)
    image = source.save(track=True)
    target.stop()
    target.load(image)
    assert status(target.raw.resume, target.vhca, 0) == BAD_STATE
    target.card.models["vf0"].reset()
    target.raw.suspend(target.vhca, 0)


def test_images_of_other_cards_are_refused():
    source, target = Side(image_size=MB), Side("target", image_size=2 * MB)
    source.stop()
    target.stop()
    images = source.save_all()
    assert status(target.load, images[0]) == BAD_PARAM


def test_order_and_repetition_are_found():
    source = Side(chunk_size=128 << 10, size=256 << 10)
    source.stop()
    images = source.save_all()
    for wrong in ([images[1]], [images[0], images[0]], [images[0], images[2]], [*images, images[-1]]):
        target = Side("target")
        target.stop()
        target.load(*wrong[:-1])
        assert status(target.load, wrong[-1]) == BAD_PARAM
        assert status(target.load, images[0]) == BAD_STATE
        assert status(target.raw.resume, target.vhca, 0) == BAD_STATE


def test_images_of_two_saves_do_not_mix():
    source = Side(chunk_size=128 << 10, size=256 << 10)
    source.stop()
    first = source.save_all()
    second = source.save_all()
    target = Side("target")
    target.stop()
    target.load(first[0])
    assert status(target.load, second[1]) == BAD_PARAM


@pytest.fixture(scope="module")
def image_and_target():
    source, target = Side(image_size=128 << 10), Side("target", image_size=128 << 10)
    traffic = Traffic(source.card.vfs[0])
    traffic.start()
    traffic.run(30)
    source.stop()
    (image,) = source.save_all()
    return image, target


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_wrong_byte_is_found(image_and_target, data):
    image, target = image_and_target
    at = data.draw(st.integers(0, len(image) - 1))
    change = data.draw(st.integers(1, 255))
    target.card.models["vf0"].reset()
    target.card.clock.advance(1.0)
    target.stop()
    wrong = image[:at] + bytes([image[at] ^ change]) + image[at + 1 :]
    assert status(target.load, wrong) == BAD_PARAM


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_wrong_length_is_found(image_and_target, data):
    image, target = image_and_target
    length = data.draw(st.integers(64, len(image) - 1))
    target.card.models["vf0"].reset()
    target.card.clock.advance(1.0)
    target.stop()
    assert status(target.load, image[:length]) == BAD_PARAM


def test_the_image_that_was_changed_in_these_tests_is_good(image_and_target):
    image, target = image_and_target
    target.card.models["vf0"].reset()
    target.card.clock.advance(1.0)
    target.stop()
    target.load(image)
    target.go()


def test_a_bit_that_the_card_got_wrong():
    source, target = Side(), Side("target")
    source.stop()
    source.card.order("bit-flip")
    images = source.save_all()
    target.stop()
    assert status(target.load, *images) == BAD_PARAM


# --- pages of a save --------------------------------------------------------------------------------------------------


def test_a_save_asks_for_pages_and_gives_them_back():
    side = Side()
    side.raw.serve_pages = False
    side.stop()
    commands = side.card.state()["command[0x108]"]
    side.raw.post(struct.pack(">8I", 0x118 << 16, 0, side.vhca, 0, 0, 0, side.buffer.mkey, side.buffer.size))
    side.card.clock.advance(1.0)
    assert side.raw.owned()
    side.raw.serve_pages = True
    side.raw.finish()
    assert side.raw.output()[0] == 0
    side.raw.settle()
    assert side.card.state()["command[0x108]"] == commands + 2
    assert side.card.state()["pages[1]"] == 8
    assert side.card.violations == 0


def test_a_save_without_pages_fails_and_can_be_tried_again():
    side = Side()
    side.stop()
    side.card.order("page-starvation")
    assert status(side.save) == NO_RES
    side.raw.serve_pages = False
    side.raw.post(struct.pack(">8I", 0x118 << 16, 0, side.vhca, 0, 0, 0, side.buffer.mkey, side.buffer.size))
    side.card.clock.advance(1.0)
    side.raw.side(struct.pack(">4I", 0x108 << 16, 0, 1, 0))
    side.raw.finish()
    assert status(side.raw.output) == NO_RES
    side.raw.eq.read()
    side.raw.serve_pages = True
    assert side.save_all()


def test_several_vfs_save_at_the_same_time():
    card = Card(vfs=3, save_pages=0)
    raw = Raw(card.pf).boot()
    vhcas = [raw.enable_vf(index) for index in range(3)]
    buffers = [Buffer(raw, 2 * MB) for _ in vhcas]
    for vhca in vhcas:
        raw.stop(vhca)
    card.order("slow-save")
    data = [
        struct.pack(">8I", 0x118 << 16, 0, vhca, 0, 0, 0, buffer.mkey, buffer.size)
        for vhca, buffer in zip(vhcas, buffers, strict=True)
    ]
    raw.post(data[0])
    card.clock.advance(0.5)
    raw.poll()
    raw.side(data[1])
    raw.side(data[2])
    assert raw.owned()
    raw.finish()
    assert buffers[1].get(MB) != buffers[2].get(MB)
    assert card.violations == 0
