"""What pyproject.toml cannot say: the native extension, with its own flags for libvfio-user's files."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))

from vfu_server.libvfio_user import build
from vfu_server.libvfio_user.upstream import locate


class BuildNative(build_ext):
    """Compiles libvfio-user's nine files into objects of the extension, then the extension itself."""

    def build_extension(self, ext: Extension) -> None:
        """Called once: the project has one extension. Compiler warnings in our own files are errors in a checkout."""
        source, json = locate.locate(), build.json_c()
        objects = self.compiler.compile(
            build.library_sources(source),
            output_dir=str(Path(self.build_temp) / "libvfio-user"),
            include_dirs=[*build.include_dirs(source, json)],
            extra_postargs=build.library_flags(source),
        )
        ext.extra_objects = [*objects, *ext.extra_objects]
        if os.environ.get("VFU_WERROR"):
            ext.extra_compile_args.append("-Werror")
        super().build_extension(ext)


setup(
    cffi_modules=["vfu_server/libvfio_user/build.py:ffibuilder"],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
