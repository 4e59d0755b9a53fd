"""The card's command line: what is said is built, and what cannot be is refused with the option's name."""

import pytest

from plugins.mlx5.models.__main__ import parse
from plugins.mlx5.models.functions import functions
from plugins.mlx5.models.options import Options
from tests.model_process import run_model
from tests.plugins.mlx5_model.bench import Card
from tests.plugins.mlx5_model.raw import Raw


def test_plain():
    options, seed, rest = parse(["connectx", "--socket-path", "/x", "--time-scale", "0.5"])
    assert options == Options()
    assert seed
    assert rest == ["--socket-path", "/x", "--time-scale", "0.5"]


def test_everything():
    options, seed, _ = parse(
        [
            "connectx",
            "--vfs",
            "16",
            "--image-size",
            "5G",
            "--chunk-size",
            "2M",
            "--no-chunks",
            "--save-rate",
            "1e6",
            "--boot-pages",
            "1",
            "--init-pages",
            "2",
            "--vf-pages",
            "3",
            "--save-pages",
            "4",
            "--migratable",
            "--device-id",
            "0xa2dc",
            "--psid",
            "BOARD",
            "--firmware",
            "32.41.1000",
            "--seed",
            "s",
            "--cap",
            "pg_track_max_num_range=2",
            "--cap",
            "migration=0",
        ]
    )
    assert seed == "s"
    assert options == Options(
        vfs=16,
        image_size=5 << 30,
        chunk_size=2 << 20,
        save_rate=1e6,
        boot_pages=1,
        init_pages=2,
        vf_pages=3,
        save_pages=4,
        migratable=True,
        device_id=0xA2DC,
        psid="BOARD",
        firmware=(32, 41, 1000),
        caps={"pg_track_max_num_range": 2, "migration": 0, "migration_in_chunks": 0},
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vfs", "17"], "--vfs"),
        (["--vfs", "many"], "--vfs"),
        (["--image-size", "60K"], "--image-size"),
        (["--image-size", "65537"], "--image-size"),
        (["--cap", "flying=1"], "--cap"),
        (["--cap", "migration=2"], "--cap"),
        (["--firmware", "1.2"], "--firmware"),
        (["--save-rate", "0"], "--save-rate"),
    ],
)
def test_what_cannot_be(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["connectx", *arguments])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_card_without_name():
    done = run_model("--socket-path", "/nowhere/x", module="plugins.mlx5.models")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_sockets_are_named_after_functions():
    assert list(functions(Options(vfs=3), "s")) == ["vf0", "pf", "vf1", "vf2"]


def test_what_the_card_calls_itself():
    card = Card(device_id=0xA2DC, firmware=(32, 41, 1000), psid="BOARD")
    config = card.models["pf"].config
    assert (config.get(0, 2), config.get(2, 2)) == (0x15B3, 0xA2DC)
    assert (card.models["vf0"].config.get(0, 2), card.models["vf0"].config.get(2, 2)) == (0x15B3, 0x101E)
    raw = Raw(card.pf)
    assert (raw.read32(0), raw.read32(4)) == (41 << 16 | 32, 5 << 16 | 1000)


def test_the_largest_state_in_one_image():
    card = Card(image_size=(4 << 30) - 4096, caps={"migration_in_chunks": 0})
    raw = Raw(card.pf).boot()
    assert raw.query(raw.enable_vf(), chunk=False) == (1, 0xFFFFF000, 0)


def test_the_same_seed_is_the_same_state():
    images = []
    for seed in ("a", "a", "b"):
        card = Card(seed=seed, image_size=64 << 10)
        vhca = card.models["pf"]._card.vhcas[0]
        images.append(vhca.pattern.block(3, 1))
    assert images[0] == images[1] != images[2]
