"""The hardware that the generic DMA queue profiles are for, in software: QEMU's edu device and Intel's I/OAT engine.

They share nothing with the plugin but the register tables of the profiles; how the hardware behaves is written here
from its own description, so that plugin and model check each other.
"""
