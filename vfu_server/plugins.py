"""Loading plugins, and asking them: who takes this device, which models are there, what is there to print.

A plugin is loaded when it is wanted, never at import. One that is broken is told as such and keeps no other from
working. It must not know what becomes of a Device.
"""

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy

from vfu_server import hookspecs, plugins_installed
from vfu_server.companion import Companions
from vfu_server.device import Device, ModelCommand, Section, StateIdentity
from vfu_server.errors import HostError, PluginError, UsageError, VfuServerError
from vfu_server.host_device import HostDevice
from vfu_server.plugins_installed import Entry
from vfu_server.policy import Policy
from vfu_server.regmap import Block
from vfu_server.server_stage import one_cause

logger = logging.getLogger(__name__)
trace_logger = logging.getLogger(f"{__name__}.trace")

AUTO = "auto"
"""The name that stands for all plugins: their probes decide."""

BY_NAME_ONLY = "VFU_SERVER_BY_NAME_ONLY"
"""A plugin module says with this (True) that it takes devices which others know better: `auto` does not ask it."""

TRACE_VARIABLE = "VFU_SERVER_TRACE_PLUGINS"


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin that is loaded and speaks our version of the contract."""

    name: str
    version: str
    distribution: str
    module: object


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """A plugin that is installed and cannot be used, and why, for a person."""

    name: str
    version: str
    distribution: str
    reason: str


@dataclass(frozen=True, slots=True)
class Taken:
    """A device and the plugin that took it."""

    plugin: Plugin
    device: Device


@dataclass(frozen=True, slots=True)
class Description:
    """What a plugin says without a device. `policies`: variant -> (policy, size in bytes by region index).

    `registers`: variant -> the register table of each region that has one. `unrepeatable`: tags of sections whose bytes
    differ from save to save of the same state. `work`: "module:function" that brings a started guest's model to use.
    """

    summary: str
    policies: Mapping[str, tuple[Policy, Mapping[int, int]]]
    registers: Mapping[str, Mapping[int, Block]]
    unrepeatable: frozenset[str] = frozenset()
    work: str = ""


class PluginCrashError(PluginError):
    """A plugin's hook raised what it must not raise; the cause is chained. A bug, so its traceback is worth showing."""


class Plugins:
    """The plugins of one process, by name."""

    def __init__(self, *, trace: bool | None = None) -> None:
        self._loaded: dict[str, Plugin] = {}
        self._pluggy = pluggy.PluginManager(hookspecs.PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        if bool(os.environ.get(TRACE_VARIABLE, "").strip("0")) if trace is None else trace:
            trace_logger.setLevel(logging.DEBUG)
            self._pluggy.add_hookcall_monitoring(_trace_call, _trace_result)

    def load(self, name: str) -> Plugin:
        """The plugin `name`. PluginError: none, two of them, one that cannot be imported or has another contract."""
        if name in self._loaded:
            return self._loaded[name]
        entries = plugins_installed.find(name)
        if not entries:
            known = ", ".join(entry.name for entry in plugins_installed.find_all()) or "none"
            raise PluginError(f"there is no plugin {name!r}; installed: {known}")
        if len(entries) > 1:
            owners = " and ".join(f"{entry.distribution} {entry.version}" for entry in entries)
            raise PluginError(f"two plugins are called {name!r}, from {owners}: uninstall one")
        return self._load(entries[0])

    def load_all(self) -> list[Plugin | BrokenPlugin]:
        """All that are installed, by name, the broken ones with their reason."""
        found: list[Plugin | BrokenPlugin] = []
        for entry in plugins_installed.find_all():
            try:
                found.append(self.load(entry.name))
            except PluginError as error:
                found.append(BrokenPlugin(entry.name, entry.version, entry.distribution, str(error)))
        return found

    def select(self, name: str) -> list[Plugin]:
        """The plugins that `--plugin NAME` means: one, or for `auto` all but those that want to be named.

        The broken ones are left out with a warning.
        """
        if name != AUTO:
            return [self.load(name)]
        found = self.load_all()
        for broken in found:
            if isinstance(broken, BrokenPlugin):
                logger.warning("%s", broken.reason)
        sound = [plugin for plugin in found if isinstance(plugin, Plugin)]
        return [plugin for plugin in sound if not getattr(plugin.module, BY_NAME_ONLY, False)]

    def _load(self, entry: Entry) -> Plugin:
        module = _import(entry)
        _check_contract(entry, module)
        try:
            self._pluggy.register(module, name=entry.name)
        except Exception as error:
            self._pluggy.unregister(name=entry.name)
            raise PluginError(f"{_title(entry)} does not fit the plugin contract: {_one_line(error)}") from error
        self._check_hooks(entry, module)
        plugin = Plugin(entry.name, entry.version, entry.distribution, module)
        self._loaded[entry.name] = plugin
        return plugin

    def _check_hooks(self, entry: Entry, module: object) -> None:
        """A hook that is misspelt would never be called and nobody would know."""
        callers = self._pluggy.get_hookcallers(module) or []
        names = {caller.name for caller in callers}
        unknown = sorted(caller.name for caller in callers if not caller.has_spec())
        problem = ""
        if unknown:
            problem = f"implements {', '.join(unknown)}, which is no hook of this server"
        elif "vfu_server_probe" not in names:
            problem = "does not implement vfu_server_probe"
        if problem:
            self._pluggy.unregister(name=entry.name)
            raise PluginError(f"{_title(entry)} {problem}")

    def _ask(self, plugin: Plugin, hook: str, **arguments: object) -> list[Any]:
        """Call one hook of one plugin. Faults of ours pass; anything else is a bug of the plugin and says so."""
        others = [other.module for other in self._loaded.values() if other is not plugin]
        try:
            answers: list[Any] = self._pluggy.subset_hook_caller(hook, remove_plugins=others)(**arguments)
        except VfuServerError:
            raise
        except Exception as error:
            raise PluginCrashError(f"plugin {plugin.name!r} failed in {hook}: {_one_line(error)}") from error
        return answers

    def probe(self, name: str, host: HostDevice, options: Mapping[str, str]) -> list[Taken]:
        """Everyone of `name` who takes the device behind `host`; the caller closes what it does not use.

        Raises what a probe raised if nobody takes the device.
        """
        taken: list[Taken] = []
        refusals: list[VfuServerError] = []
        for plugin in self.select(name):
            try:
                taken += [Taken(plugin, device) for device in self._devices(plugin, host, options)]
            except VfuServerError as error:
                refusals.append(error)
        if taken or not refusals:
            for refusal in refusals:
                level = logging.WARNING if isinstance(refusal, PluginError) else logging.DEBUG
                logger.log(level, "asked whether it takes the device: %s", refusal)
            return taken
        for other in refusals[1:]:
            refusals[0].add_note(f"also: {other}")
        raise refusals[0]

    def _devices(self, plugin: Plugin, host: HostDevice, options: Mapping[str, str]) -> list[Device]:
        devices = self._ask(plugin, "vfu_server_probe", host=host, options=options)
        for device in devices:
            if not isinstance(device, Device):
                raise PluginError(
                    f"plugin {plugin.name!r}: vfu_server_probe returned {type(device).__name__} instead of a Device"
                )
        return devices

    def companions(self, name: str, where: str, options: Mapping[str, str]) -> list[str]:
        """What the plugin `name` must have open before the device at `where`. With `auto` nobody is asked: a function
        that is opened is reset, and that only for a plugin that the operator has named.
        """
        if name == AUTO:
            return []
        wanted: list[str] = []
        for answer in self._ask(self.load(name), "vfu_server_companions", where=where, options=options):
            if isinstance(answer, str) or not all(isinstance(each, str) for each in answer):
                raise PluginError(f"plugin {name!r}: vfu_server_companions returned {answer!r}, no list of addresses")
            wanted += [each for each in answer if each not in wanted]
        return wanted

    async def open(self, taken: Taken, companions: Companions) -> None:
        """Let the plugin's device open what it needs. Faults of ours pass; anything else is a bug of the plugin."""
        try:
            await taken.device.open(companions)
        except VfuServerError:
            raise
        except Exception as error:
            fault = one_cause(error)
            if isinstance(fault, VfuServerError):
                raise fault from error
            raise PluginCrashError(f"plugin {taken.plugin.name!r} failed in open: {_one_line(fault)}") from error

    def models(self, name: str) -> dict[str, list[tuple[Plugin, ModelCommand]]]:
        """The software models that the plugins of `name` ship."""
        found: dict[str, list[tuple[Plugin, ModelCommand]]] = {}
        for plugin in self.select(name):
            for models in self._ask(plugin, "vfu_server_models"):
                for model, command in _checked_models(plugin, models):
                    found.setdefault(model, []).append((plugin, command))
        return found

    def model(self, name: str, model: str) -> ModelCommand:
        """The one model called `model`. UsageError: there is none, or more than one."""
        found = self.models(name)
        owners = found.get(model, [])
        if not owners:
            known = ", ".join(sorted(found)) or "none"
            raise UsageError(f"--model {model}: plugin {name!r} has no such model; it has: {known}")
        if len(owners) > 1:
            names = " and ".join(repr(plugin.name) for plugin, _ in owners)
            raise UsageError(f"--model {model}: plugins {names} both have one: choose with --plugin")
        return owners[0][1]

    def decode(self, plugin: Plugin, identity: StateIdentity, section: Section) -> list[str] | None:
        """What `plugin` says of a section of its own, in lines; None if it says nothing. Raises what it raises."""
        answers = self._ask(plugin, "vfu_server_decode", identity=identity, section=section)
        try:
            return [str(line) for answer in answers for line in answer] if answers else None
        except VfuServerError:
            raise
        except Exception as error:
            raise PluginCrashError(f"plugin {plugin.name!r} failed in vfu_server_decode: {_one_line(error)}") from error

    def describe(self, plugin: Plugin, options: Mapping[str, str]) -> Description:
        """What `plugin` says of itself."""
        summary, policies, registers, unrepeatable, work = "", {}, {}, frozenset[str](), ""
        for answer in self._ask(plugin, "vfu_server_describe", options=options):
            try:
                summary = str(answer.get("summary", summary))
                policies.update(answer.get("policies", {}))
                registers.update(answer.get("registers", {}))
                unrepeatable |= {str(tag) for tag in answer.get("unrepeatable", ())}
                work = str(answer.get("work", work))
            except Exception as error:
                raise PluginError(
                    f"plugin {plugin.name!r}: vfu_server_describe returned {type(answer).__name__}, "
                    f"which is no description: {_one_line(error)}"
                ) from error
        return Description(summary, policies, registers, unrepeatable, work)


def exactly_one(taken: Sequence[Taken], plugin: str, host: HostDevice) -> Taken:
    """The one taker. HostError: nobody; PluginError: several, all named."""
    if len(taken) == 1:
        return taken[0]
    identity = host.identity()
    ids = f"{host.name} ({identity.vendor:04x}:{identity.device:04x} revision {identity.revision:02x})"
    if taken:
        names = " and ".join(repr(one.plugin.name) for one in taken)
        raise PluginError(f"plugins {names} both take {ids}: choose one with --plugin")
    if plugin == AUTO:
        raise HostError(f"no installed plugin takes {ids}: see --list-plugins")
    raise HostError(f"plugin {plugin!r} does not take {ids}: choose another with --plugin, or --plugin auto")


def _checked_models(plugin: Plugin, models: object) -> list[tuple[str, ModelCommand]]:
    """What vfu_server_models returned. PluginError if it is no mapping of names to commands."""
    if not isinstance(models, Mapping) or not all(isinstance(each, ModelCommand) for each in models.values()):
        raise PluginError(f"plugin {plugin.name!r}: vfu_server_models returned {models!r}, no names with ModelCommands")
    return [(str(name), command) for name, command in models.items()]


def _title(entry: Entry) -> str:
    return f"plugin {entry.name!r} ({entry.distribution} {entry.version})"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _import(entry: Entry) -> object:
    module_name, _, attribute = entry.target.partition(":")
    try:
        found: object = importlib.import_module(module_name)
        for part in filter(None, attribute.split(".")):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # whatever a foreign module does when it is imported
        trace_logger.debug("importing %s", entry.target, exc_info=error)
        where = _innermost_frame(error)
        hint = f"{TRACE_VARIABLE}=1 shows the traceback"
        raise PluginError(f"{_title(entry)} cannot be imported: {_one_line(error)}{where}; {hint}") from error
    return found


def _innermost_frame(error: BaseException) -> str:
    """` (file:line)` of where it happened, if it happened in a file."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or traceback.tb_frame.f_code.co_filename.startswith("<"):
        return ""
    return f" ({traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno})"


def _check_contract(entry: Entry, module: object) -> None:
    """The version of the contract comes before anything else: with another one, no other message would be true."""
    version = getattr(module, "VFU_SERVER_API", None)
    mine = hookspecs.API_VERSION
    if version is None:
        raise PluginError(
            f"{_title(entry)} does not say which version of the plugin contract it was written for: "
            f"it needs VFU_SERVER_API = {mine} at its top level"
        )
    if version != mine:
        newer = isinstance(version, int) and version > mine
        cure = "update vfu-server" if newer else "update the plugin"
        raise PluginError(
            f"{_title(entry)} was written for version {version!r} of the plugin contract, "
            f"this server has {mine}: {cure}"
        )


def _trace_call(hook_name: str, hook_impls: Sequence[pluggy.HookImpl], kwargs: Mapping[str, Any]) -> None:
    arguments = ", ".join(f"{key}={getattr(value, 'name', None) or value!r}" for key, value in kwargs.items())
    names = ", ".join(impl.plugin_name for impl in hook_impls)
    trace_logger.debug("%s(%s) asked of: %s", hook_name, arguments, names)


def _trace_result(
    outcome: pluggy.Result[Any], hook_name: str, hook_impls: Sequence[pluggy.HookImpl], kwargs: Mapping[str, Any]
) -> None:
    del hook_impls, kwargs
    if outcome.exception is not None:
        trace_logger.debug("%s raised %s", hook_name, _one_line(outcome.exception))
    else:
        trace_logger.debug("%s returned %r", hook_name, outcome.get_result())
