"""DMA queue engines without migration hardware, told by profiles: QEMU's edu and Intel I/OAT come with it."""
