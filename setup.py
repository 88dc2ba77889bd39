"""Puts the .pth file beside the package, in wheels and editable installs; all else is in pyproject.toml."""

from setuptools import setup  # first, for it provides distutils

from distutils.command.install_headers import install_headers  # isort: skip


class InstallBesidePackage(install_headers):
    """Puts "headers" into site-packages, where Python reads .pth files.

    Of the kinds of file beside packages, only headers and scripts take part in both sorts of install: an editable one
    leaves data files out. There are no real headers here.
    """

    def finalize_options(self) -> None:
        self.set_undefined_options("install", ("install_lib", "install_dir"), ("force", "force"))


setup(cmdclass={"install_headers": InstallBesidePackage}, headers=["comlora_lm_eval_hook.pth"])
