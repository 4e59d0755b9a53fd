"""What a device declares, and how its source is written: read, not tried."""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from vfu_server.device import Device
from vfu_server.errors import PluginError
from vfu_server.policy import Answer
from vfu_server.region import MmapMode, compile_rules
from vfu_server.testing.conformance.bench import Bench
from vfu_server.testing.conformance.records import Failed, check
from vfu_server.uapi import RegionIndex

BLOCKING = {
    "time": {"sleep"},
    "os": {"system", "popen", "wait", "waitpid"},
    "subprocess": {"run", "call", "check_call", "check_output", "Popen"},
    "socket": {"create_connection", "getaddrinfo", "gethostbyname"},
    "": {"open", "input"},
}


@check("declarations", "identity, capabilities and statistics can be meant, and do not change", migrates=False)
def declarations(bench: Bench) -> str:
    """Identity, capabilities and statistics can be meant, and do not change."""
    device = bench.device
    identity, can = device.identity, device.capabilities
    if not identity.variant or not identity.variant.isascii() or identity.state_version < 1:
        raise Failed(f"identity {identity}: it needs an ASCII variant and a state version from 1 on")
    if not can.migratable and not can.reason:
        raise Failed("capabilities: migratable=False without a reason for the operator")
    with bench.guest() as guest:
        bench.disturb(guest.client, bench.chance(), 10)
        if (device.identity, device.capabilities) != (identity, can):
            raise Failed("identity or capabilities are others after use: they are read at any time and must not change")
    numbers = device.statistics()
    wrong = [name for name, value in numbers.items() if (type(name), type(value)) != (str, int)]
    if wrong:
        raise Failed(f"statistics: {wrong} are no names with numbers")
    size = bench.loop.wait(device.estimate)
    if size < 0:
        raise Failed(f"estimate() is {size}")
    return f"{identity.variant}, state version {identity.state_version}, about {size} bytes"


@check("policy", "every byte of every BAR has an answer, and the policy can be meant", migrates=False)
def policy(bench: Bench) -> str:
    """Every byte of every BAR has an answer, and the policy can be meant."""
    device, sizes = bench.device, bench.sizes()
    found = device.policy
    whole = {**sizes, RegionIndex.CONFIG: bench.served("source").host.regions[RegionIndex.CONFIG].size}
    try:
        for mode in MmapMode:
            compile_rules(found, mode, whole)
    except PluginError as error:
        raise Failed(str(error)) from error
    gaps = [f"region {region} {start:#x}+{length:#x}" for region, start, length in found.gaps(sizes) if length]
    if gaps:
        raise Failed(f"no rule says what is answered at {', '.join(gaps)}: it is refused, but nobody has thought of it")
    if found.p2p != device.capabilities.p2p:
        raise Failed(f"the policy says p2p={found.p2p}, the capabilities p2p={device.capabilities.p2p}")
    for name, kind in (("trap_read", "read"), ("trap_write", "write")):
        traps = [rule.name for rule in found.rules if Answer.TRAP in getattr(rule, kind).as_tuple()]
        if traps and getattr(type(device), name) is getattr(Device, name):
            raise Failed(f"{traps} answer TRAP to a {kind}, and there is no {name}")
    unshown = _unshown(bench)
    unexplained = [rule.name for rule in found.rules if not rule.reason]
    return f"{len(found.rules)} rules, {len(unexplained)} without a reason, {unshown} not shown by --show-policy"


def _unshown(bench: Bench) -> int:
    """How many rules are enforced that --show-policy does not have. Failed if it shows others in their places."""
    described = bench.plugins.describe(bench.plugins.load(bench.plugin), bench.options).policies
    enforced = bench.device.policy.rules
    variant = described.get(bench.device.identity.variant)
    # A plugin may name its policies by something else than variants: the one with the most rules in common is meant.
    tables = [
        {(rule.region, rule.start, rule.name): rule for rule in shown.rules}
        for shown, _ in ([variant] if variant is not None else described.values())
    ]
    places = {(rule.region, rule.start, rule.name) for rule in enforced}
    by_place = max(tables, key=lambda table: len(places & table.keys()), default={})
    for rule in enforced:
        other = by_place.get((rule.region, rule.start, rule.name), rule)
        if (other.read, other.write) != (rule.read, rule.write):
            raise Failed(f"--show-policy shows other answers for {rule.name!r} than those that are enforced")
    return sum((rule.region, rule.start, rule.name) not in by_place for rule in enforced)


@check("coroutines", "no coroutine blocks the loop, and no lock is held over an await", migrates=False)
def coroutines(bench: Bench) -> str:
    """No coroutine blocks the loop, and no lock is held over an await."""
    files = sources(type(bench.device).__module__)
    wrong, seen = [], 0
    for path in files:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.AsyncFunctionDef):
                seen += 1
                wrong += [f"{path}:{line}: {what}" for line, what in blocking(function)]
    if wrong:
        raise Failed("; ".join(wrong))
    return f"{seen} coroutines in {len(files)} files"


def sources(module: str) -> list[Path]:
    """The files of the package that `module` is in."""
    package = sys.modules[module].__package__ or module
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin)
    return sorted(folder.parent.glob("*.py")) if folder.name == "__init__.py" else [folder]


def blocking(function: ast.AsyncFunctionDef) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of calls that block, and of locks that are held over an await."""
    for node in _own(function):
        if isinstance(node, ast.Call):
            owner, name = _name(node.func)
            if name in BLOCKING.get(owner, ()):
                called = f"{owner}.{name}" if owner else name
                yield node.lineno, f"{function.name} calls {called}, which blocks all devices' clients"
        elif isinstance(node, ast.With):
            held = [item for item in node.items if ast.unparse(item.context_expr).endswith("lock")]
            if held and any(isinstance(inner, ast.Await | ast.AsyncFor | ast.AsyncWith) for inner in ast.walk(node)):
                yield node.lineno, f"{function.name} holds {ast.unparse(held[0].context_expr)} over an await"


def _own(function: ast.AsyncFunctionDef) -> Iterator[ast.AST]:
    """The nodes of a coroutine, without those of functions within it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def _name(function: ast.expr) -> tuple[str, str]:
    if isinstance(function, ast.Name):
        return "", function.id
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return function.value.id, function.attr
    return "?", ""
