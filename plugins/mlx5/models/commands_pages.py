"""The commands about pages that the driver lends. Books and pages themselves are `pages`'."""

from collections.abc import Iterable
from typing import Protocol

from plugins.mlx5.models import messages
from plugins.mlx5.models.firmware import Call, Command, Stage
from plugins.mlx5.models.messages import PLAIN_OUT
from plugins.mlx5.models.pages import PF, PageBank
from plugins.mlx5.models.status import RefusedError, Status

BOOT, INIT, REGULAR = 1, 2, 3
CANNOT_GIVE, GIVE, TAKE = 0, 1, 2


class Functions(Protocol):
    """What the commands need of the card."""

    pages: PageBank

    def function_named(self, number: int) -> int: ...
    def name_of(self, function: int) -> int: ...
    def is_over(self, function: int) -> bool: ...
    def ask_for_init(self) -> None: ...


class PageCommands:
    """QUERY_PAGES and MANAGE_PAGES."""

    def __init__(self, card: Functions) -> None:
        self._card = card

    def commands(self) -> Iterable[Command]:
        """All of them."""
        return (
            Command(0x107, messages.QUERY_PAGES, self._query, stage=Stage.ENABLED, op_mods=frozenset({1, 2, 3})),
            Command(
                0x108, messages.MANAGE_PAGES, self._manage, stage=Stage.ENABLED, op_mods=frozenset({0, 1, 2}), element=8
            ),
        )

    def _function(self, call: Call) -> int:
        if call.values["embedded_cpu_function"]:
            raise RefusedError(Status.BAD_PARAM, 0x111, "there is no embedded CPU")
        return self._card.function_named(call.values["function_id"])

    def _query(self, call: Call) -> bytes:
        function = self._function(call)
        if call.op_mod == INIT and function == PF:
            self._card.ask_for_init()
        count = 0 if call.op_mod == REGULAR or function != PF else self._card.pages.of(PF).asked
        return messages.QUERY_PAGES_OUT.pack(function_id=self._card.name_of(function), num_pages=count)

    def _manage(self, call: Call) -> bytes:
        function, count, bank = self._function(call), call.values["num_entries"], self._card.pages
        if call.op_mod == GIVE:
            if not count or len(call.tail) != 8 * count:
                raise RefusedError(Status.BAD_INPUT_LENGTH, 0x104, f"{count} pages in {len(call.tail)} bytes")
            pages = [int.from_bytes(call.tail[at : at + 8], "big") for at in range(0, 8 * count, 8)]
            bank.give(function, pages)
            return PLAIN_OUT.pack()
        if call.tail:
            raise RefusedError(Status.BAD_INPUT_LENGTH, 0x104, f"{len(call.tail)} bytes behind the command")
        if call.op_mod == CANNOT_GIVE:
            if count:
                raise RefusedError(Status.BAD_PARAM, 0x121, f"`cannot give` with a count of {count}")
            bank.cannot_give(function)
            return PLAIN_OUT.pack()
        if not count:
            raise RefusedError(Status.BAD_PARAM, 0x122, "no pages are taken back")
        call.want_room(0x10 + 8 * count)
        taken = bank.take(function, count, everything=self._card.is_over(function))
        head = messages.MANAGE_PAGES_OUT.pack(num_entries=len(taken))
        return head + b"".join(page.to_bytes(8, "big") for page in taken)
