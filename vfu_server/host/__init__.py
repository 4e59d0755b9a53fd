"""The device's side: doors to the hardware behind one protocol (`host_device.HostDevice`).

A door hides one outside interface (kernel VFIO, another vfio-user server) and knows nothing of clients, policy or
migration.
"""
