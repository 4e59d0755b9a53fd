"""HiSilicon's ZIP, SEC2 and HPRE accelerators in software: a PF and its VFs, for the plugin's tests and for load.

They share the register table with the plugin and nothing more; how the hardware behaves is written here a second time,
so that plugin and model check each other. README.md beside this file says what a guest can do with them, which rules
are the model's own, and which faults can be ordered.
"""
