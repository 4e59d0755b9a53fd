"""vfu-server: VFIO variant drivers in userspace, presented to a VMM over vfio-user.

Layout, high to low; a module imports only from rows below its own:

    cli                                            options, exit codes, log set-up
    server, plugins, config, notify, sockets       trio: a nursery for each device, signals, shutdown order
    session, model_server, testing                 one device with one client; a model with one client; fakes
    migration, dma, irq, region                    engines: decisions only
    libvfio_user, host                             doors: the client's side (C) and the device's side
    hookspecs, device, host_device, policy, regmap, stream, model    the plugin author's kit
    uapi, errors                                   numbers, packed structs, faults with errno
"""

__version__ = "0.1.0"
