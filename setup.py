"""Puts the .pth file beside the package, in wheels and editable installs; all else is in pyproject.toml."""

from setuptools import setup  # first, for it provides distutils

from distutils.command.install_data import install_data  # isort: skip


class InstallDataBesidePackage(install_data):
    """Data files go to site-packages, where Python reads .pth files, not to the environment's root."""

    def finalize_options(self) -> None:
        self.set_undefined_options("install", ("install_lib", "install_dir"), ("root", "root"), ("force", "force"))


setup(cmdclass={"install_data": InstallDataBesidePackage}, data_files=[("", ["comlora_lm_eval_hook.pth"])])
