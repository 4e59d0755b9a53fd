"""From a file to a profile: which tables there are, and what they must say about each other.

ConfigError names file, line and field. No device is touched.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from plugins.generic_dmaq import tables
from plugins.generic_dmaq.form import Plan, Profile
from plugins.generic_dmaq.registers import PROFILES
from plugins.generic_dmaq.toml_reader import Table, read_toml
from plugins.generic_dmaq.transforms import ByHook, Through
from vfu_server.errors import ConfigError
from vfu_server.regmap import WRITABLE, Register, Save

LONGEST_DRAIN = 3.9
"""Seconds: a client waits 5 s for a change of state, and a drain is not all of it."""
_HOOKS = re.compile(r"([A-Za-z_][\w.]*|[\w-]+\.py):([A-Za-z_]\w*)")


def shipped() -> list[Path]:
    """The files of the profiles that come with the plugin."""
    return sorted(PROFILES.glob("*.toml"))


def find_profile(wanted: str) -> Path:
    """The file for what an operator said: a shipped profile's name, or a path (anything with a slash or `.toml`)."""
    if "/" in wanted or wanted.endswith(".toml"):
        return Path(wanted)
    known = {path.stem: path for path in shipped()}
    if wanted not in known:
        raise ConfigError(f"there is no profile {wanted!r}; known are {', '.join(known)}, or give the path of a file")
    return known[wanted]


def load_profile(path: Path) -> Profile:
    """Read and check a profile. ConfigError names file, line and field of the first thing that is wrong."""
    top = read_toml(path)
    about = top.table("profile")
    bars = tables.Bars(top)
    names = tables.Names(bars.bars)
    drain = top.table("drain")
    profile = Profile(
        file=str(path),
        name=tables.name_from(about),
        summary=about.text("summary"),
        match=tables.match_from(top.table("match")),
        bars=tuple(bars.bars),
        plans=bars.plans,
        counts_from=bars.counts_from,
        areas=tuple(bars.areas),
        queues=tuple(tables.queue_from(table, names) for table in top.tables("queue")),
        identity=tables.identity_from(top.table("identity"), names),
        interrupts=tables.interrupts_from(top.table("interrupts"), names),
        dma_bits=tables.dma_bits_from(top.table("dma")),
        drain_seconds=drain.seconds("seconds", 0.001, LONGEST_DRAIN, 3.0),
        settle_seconds=drain.seconds("settle", 0.0, 1.0, 0.0005),
        reset=tables.reset_from(top.table("reset")),
        p2p_reason=tables.p2p_reason_from(top.table("policy")),
        not_carried=about.texts("not_carried"),
        hooks=_hooks(about, bars.plans),
        hook_options=_flags(top.table("hook_options")),
    )
    for table in (about, drain, top):
        table.finish()
    _check_whole(top, profile, names)
    return profile


def _hooks(table: Table, plans: Mapping[str, Plan]) -> str:
    said = table.text("hooks", "")
    if said and not _HOOKS.fullmatch(said):
        raise table.error("hooks", f"must be 'package.module:Class' or 'file.py:Class', not {said!r}")
    needing = [name for name, plan in plans.items() if isinstance(plan.restore, ByHook)]
    if needing and not said:
        raise table.error("", f"hooks is missing: {', '.join(needing)} must be restored by one")
    return said


def _flags(table: Table) -> dict[str, bool]:
    return {name: table.flag(name, False) for name in table}


def _registers(profile: Profile) -> Iterator[tuple[str, str, Register]]:
    """All registers as declared: name in `plans`, array or an empty string, register."""
    for bar in profile.bars:
        for register in bar.registers:
            yield register.name, "", register
        for array in bar.arrays:
            for register in array.registers:
                yield f"{array.name}.{register.name}", array.name, register


def _read_at_any_time(profile: Profile) -> Iterator[str]:
    """The registers, by their names in `plans`, that are read whatever the device does."""
    yield from profile.identity
    yield from (path.rpartition(".")[0] for path in profile.counts_from.values())
    for table in profile.queues:
        queue, within = table.queue, f"{table.array}." if table.array else ""
        fields = (*queue.busy, *([queue.idle] if queue.idle else []))
        whole = (*filter(None, (queue.head, queue.tail)), *queue.show)
        yield from (within + name for name in (*(path.rpartition(".")[0] for path in fields), *whole))


def _check_whole(top: Table, profile: Profile, names: tables.Names) -> None:
    """What can only be said once all tables are there."""
    if not profile.queues:
        raise top.error("", "there is no [[queue]]: nothing would be waited for")
    for array, path in profile.counts_from.items():
        names.readable_field(top, "bar", path, f"count_from of {array!r}: ")
    for name in _read_at_any_time(profile):
        if profile.plans[name].reads_act:
            raise top.error("bar", f"reads of {name!r} act, so it can be no part of a queue, an identity or a count")
    for name, array, register in _registers(profile):
        if profile.reset == "registers" and register.save is not Save.NONE and register.reset is None:
            raise top.error("reset", f"register {name!r} has no reset value, so registers cannot reset it")
        restore = profile.plans[name].restore
        if isinstance(restore, Through):
            scope = array if restore.target in names.arrays.get(array, ()) else ""
            if names.register(top, "bar", restore.target, scope).access not in WRITABLE:
                raise top.error("bar", f"register {restore.target!r}, through which {name!r} goes, cannot be written")
