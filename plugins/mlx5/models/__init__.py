"""A ConnectX card in software: a PF with its command interface, and VFs with a data path that can be migrated.

It shares the table of the initialization segment with the plugin and nothing else: commands, layouts and rules are
written a second time here, so that model and driver check each other. See README.md in this folder.
"""
