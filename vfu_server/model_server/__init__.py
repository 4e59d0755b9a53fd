"""Serves one software model over vfio-user, in a process of its own.

    main(factory, argv)                 the whole program around one model: what a plugin's models package calls
    main_functions(functions, argv)     the same around several functions of one piece of hardware
    python -m ... NAME                  the same, for a model that an installed plugin names

Threads: trio's (sockets, messages of the ordered kind, control), the pump's (register accesses of the client) and the
model's own (timers, DMA). What they share is behind the one lock of `Function`, which is never held while somebody
waits for the client.
"""

from vfu_server.model_server.program import main, main_functions

__all__ = ["main", "main_functions"]
