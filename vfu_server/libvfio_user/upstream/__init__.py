"""Owns where libvfio-user's C source comes from: found or fetched, checked, kept outside the tree.

Runs while the extension is built, also inside pip's isolated build: standard library only, and nothing of the server.
"""
