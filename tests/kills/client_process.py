"""`python -m tests.kills.client_process SOCKET`: a VMM's process, told line by line what to do: one that can be killed.

A line is a JSON object with `op` and its arguments; so is the answer: `value`, or `error` and `errno`. With `death` the
process kills itself at the next message that it sends: "half" in the middle of it, "whole" behind it. With `kill` it
kills process number `kill` behind the message instead, and goes on to wait for the answer.
"""

import base64
import json
import os
import signal
import sys

from tests.plugins_synthetic.device import REG_CHANGE, REG_DIGEST
from vfu_server.errors import VfuServerError
from vfu_server.testing import Client
from vfu_server.uapi import MigState

SIZE = 1 << 20
NAME = "kills-guest"


class Doomed(Client):
    """A client at whose next message somebody dies."""

    death = ""
    kill = 0

    def send_raw(self, data, fds=()):
        death, victim = self.death, self.kill
        self.death, self.kill = "", 0
        super().send_raw(data[: len(data) // 2] if death == "half" else data, fds)
        if death:
            os.kill(os.getpid(), signal.SIGKILL)
        if victim:
            os.kill(victim, signal.SIGKILL)


def do(client: Doomed, op: str, arguments: dict) -> object:
    match op:
        case "state":
            return client.set_mig_state(MigState(arguments["state"]))
        case "what state":
            return int(client.mig_state())
        case "read":
            return base64.b64encode(client.mig_data_read(arguments["size"])).decode()
        case "write":
            return client.mig_data_write(base64.b64decode(arguments["data"]))
        case "change":
            return client.write(0, REG_CHANGE, 4, arguments["page"])
        case "digest":
            return client.read(0, REG_DIGEST, 8)
        case "reset":
            return client.reset()
        case "size":
            return client.mig_data_size()
    raise ValueError(op)


def main() -> None:
    client = Doomed.connect(sys.argv[1], timeout=60)
    client.negotiate()
    memory = os.memfd_create(NAME)
    os.ftruncate(memory, SIZE)
    client.dma_map(0, SIZE, fd=memory)
    print("{}", flush=True)
    for line in sys.stdin:
        arguments = json.loads(line)
        client.death, client.kill = arguments.pop("death", ""), arguments.pop("kill", 0)
        try:
            answer = {"value": do(client, arguments.pop("op"), arguments)}
        except VfuServerError as error:
            answer = {"error": f"{type(error).__name__}: {error}", "errno": error.errno}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
