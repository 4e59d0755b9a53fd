"""The control socket of a model: JSON lines, for tests and the demo. Not for clients of the device.

    {"op": "accesses"}                             -> {"total", "counts", "last"}, see AccessLog.report
    {"op": "clear"}                                -> {}
    {"op": "fault", "name": ..., "times": 1}       -> {}; times -1: always, 0: never
    {"op": "state"}                                -> {"registers", "config", "irq_mode", "intx", "dma_maps"}

What cannot be done is answered {"error": text}; the connection goes on.
"""

import json
import logging
from typing import Any

import trio

from vfu_server.model_server.function import Function

logger = logging.getLogger(__name__)

_MAX_LINE = 64 << 10


async def serve_control(listener: trio.SocketListener, function: Function) -> None:
    """Answer on every connection to `listener` until cancelled."""

    async def handle(stream: trio.SocketStream) -> None:
        try:
            await _converse(stream, function)
        except trio.BrokenResourceError:
            logger.debug("a control connection broke")

    await trio.serve_listeners(handle, [listener])


async def _converse(stream: trio.SocketStream, function: Function) -> None:
    pending = b""
    async for chunk in stream:
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            await stream.send_all(json.dumps(answer(function, line)).encode() + b"\n")
        if len(pending) > _MAX_LINE:
            return


def answer(function: Function, line: bytes) -> dict[str, Any]:
    """The answer to one line."""
    try:
        request = json.loads(line)
        operation = request["op"]
        match operation:
            case "accesses":
                with function.lock:
                    return function.accesses.report()
            case "clear":
                with function.lock:
                    function.accesses.clear()
                return {}
            case "fault":
                function.order_fault(str(request["name"]), int(request.get("times", 1)))
                return {}
            case "state":
                return function.state()
    except (ValueError, KeyError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": f"there is no operation {operation!r}"}
