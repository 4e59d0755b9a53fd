"""The PHY of the model (`PhyRegisters`): registers in pages, behind MDIC's commands. Must not know the MAC."""

PAGE, CONTROL, ADDRESS = 22, 0, 1
RESET_VALUES = {
    (0, 0): 0x1140,
    (0, 1): 0x796D,
    (0, 2): 0x0141,
    (0, 3): 0x0CB1,
    (0, 4): 0x0DE1,
    (0, 5): 0x45E1,
    (0, 7): 0x2001,
    (0, 9): 0x0F00,
    (0, 10): 0x3C00,
    (0, 15): 0x3000,
    (0, 16): 0x3360,
    (0, 17): 0xAC08,
    (0, 20): 0x0E00,
    (2, 16): 0x0088,
    (2, 21): 0x1046,
    (3, 16): 0x021E,
    (3, 17): 0x4415,
    (3, 18): 0x4905,
}
WRITABLE = {
    *((0, number) for number in (0, 4, 7, 9, 16, 18, 20, 26)),
    *((2, number) for number in (16, 18, 21)),
    *((3, number) for number in (16, 17, 18)),
}
ACTS = 1 << 15 | 1 << 9
"""Of the control register: reset and a new negotiation, which are over at once here."""
WRITE, ERROR = 1, 1 << 30


class PhyRegisters:
    """Values by (page, number)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As after power up."""
        self._values = dict(RESET_VALUES)
        self._page = 0

    def state(self) -> dict[str, int]:
        """All of it, for tests."""
        return {f"PHY {page}.{number}": value for (page, number), value in self._values.items()}

    def command(self, mdic: int, *, keeps: bool = False) -> int:
        """What a command of MDIC answers: its data, and maybe the error bit. `keeps`: a write does not arrive."""
        number, data = mdic >> 16 & 31, mdic & 0xFFFF
        if mdic >> 21 & 31 != ADDRESS:
            return ERROR
        if mdic >> 26 & 3 != WRITE:
            return self._page if number == PAGE else self._values.get((self._page, number), 0)
        if number == PAGE:
            self._page = data & 0xFF
        elif (self._page, number) in WRITABLE and not keeps:
            self._write(number, data)
        return data

    def _write(self, number: int, data: int) -> None:
        if (self._page, number) == (0, CONTROL):
            if data & 1 << 15:
                self.reset()
                return
            data &= ~ACTS & 0xFFFF
        self._values[self._page, number] = data
