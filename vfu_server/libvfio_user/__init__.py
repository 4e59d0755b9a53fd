"""The client's side: libvfio-user behind cffi, with our own transport.

Nothing is imported here: the build imports this package before the extension and its dependencies exist.
"""
