"""Bits of COMMAND are lent, and only what was changed is put back."""

import pytest
from trio.testing import trio_test

from tests.plugins.fake_host import FakeEdu
from vfu_server.errors import HostError
from vfu_server.pci_command import lent_command, memory_space
from vfu_server.uapi import PCI_COMMAND_INTX_DISABLE, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY

OTHER = 0x100


@trio_test
async def test_bits_that_others_change_meanwhile_are_kept():
    host = FakeEdu()
    host.command = PCI_COMMAND_MEMORY
    with lent_command(host, PCI_COMMAND_MASTER):
        assert host.command == PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER
        host.command |= OTHER
    assert host.command == PCI_COMMAND_MEMORY | OTHER
    with lent_command(host, PCI_COMMAND_MASTER, off=PCI_COMMAND_MEMORY):
        assert host.command == PCI_COMMAND_MASTER | OTHER
    assert host.command == PCI_COMMAND_MEMORY | OTHER


@trio_test
async def test_a_bar_is_reached_whatever_the_guest_has_set():
    host = FakeEdu()
    for before in (0, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY):
        host.command = before
        with memory_space(host):
            host.read(0, 0, 4)
            host.command |= PCI_COMMAND_INTX_DISABLE
        assert host.command == before | PCI_COMMAND_INTX_DISABLE
    assert host.strays == []


@trio_test
async def test_it_is_put_back_when_what_is_done_fails():
    host = FakeEdu()
    host.command = 0
    with pytest.raises(HostError, match="as it happens"), memory_space(host):
        raise HostError("as it happens")
    assert host.command == 0


@trio_test
async def test_nothing_is_written_where_all_is_as_wanted():
    host = FakeEdu()
    written = []
    host.config_write = lambda *arguments: written.append(arguments)
    with lent_command(host, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER):
        pass
    assert written == []
    with lent_command(host, PCI_COMMAND_INTX_DISABLE):
        pass
    assert len(written) == 2
