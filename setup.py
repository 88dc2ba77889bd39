"""The parts of the build that pyproject.toml cannot express: where the .pth file and the task files go."""

from setuptools import find_packages, setup  # first, for it provides distutils

from distutils.command.install_headers import install_headers  # isort: skip


class InstallBesidePackage(install_headers):
    """Puts "headers" into site-packages, where Python reads .pth files.

    Of the kinds of file beside packages, only headers and scripts take part in both sorts of install: an editable one
    leaves data files out. There are no real headers here.
    """

    def finalize_options(self) -> None:
        self.set_undefined_options("install", ("install_lib", "install_dir"), ("force", "force"))


setup(
    cmdclass={"install_headers": InstallBesidePackage},
    headers=["comlora_lm_eval_hook.pth"],
    # lm_eval_tasks is a name that others use too, so no top-level module may have it
    packages=[*find_packages(include=["comlora_trl*"]), "comlora_trl.lm_eval_tasks"],
    package_dir={"comlora_trl.lm_eval_tasks": "lm_eval_tasks"},
)
