"""What pyproject.toml cannot say: where the packages are, and how an editable install finds `hf_paged.kernels`.

`kernels/` and `integrations/` stand at the top of the repository and are installed inside `hf_paged`. `kernels/` has no
`__init__.py`: transformers imports the package named `kernels` that Hugging Face publishes, and a regular package of
that name in the working directory would shadow it. So `hf_paged.kernels` is a namespace package inside a regular one,
which a wheel holds without ado, and which setuptools' editable finder does not find. An editable install therefore
carries a finder for that one name.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ROOMS = {"hf_paged": "hf_paged", "hf_paged.kernels": "kernels", "hf_paged.integrations": "integrations"}

EDITABLE_FINDER = '''\
"""Finds hf_paged.kernels in the checkout that hf_paged is installed from, in editable mode."""

import sys
from importlib.machinery import ModuleSpec


class KernelsFinder:
    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname != "hf_paged.kernels":
            return None
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = [{kernels!r}]
        return spec


sys.meta_path.append(KernelsFinder)
'''


def packages() -> list[str]:
    """The dotted name of every folder with a Python file, so that a new one needs no line here."""
    return sorted(
        {
            ".".join((package, *file.parent.relative_to(ROOT / folder).parts))
            for package, folder in ROOMS.items()
            for file in (ROOT / folder).rglob("*.py")
        }
    )


class BuildPy(build_py):
    """build_py that adds the finder for `hf_paged.kernels` to an editable install; a wheel is built as ever."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            site = Path(self.get_finalized_command("install").install_lib)
            finder = EDITABLE_FINDER.format(kernels=str(ROOT / ROOMS["hf_paged.kernels"]))
            (site / "_hf_paged_kernels_finder.py").write_text(finder, encoding="utf-8")
            (site / "_hf_paged_kernels_finder.pth").write_text("import _hf_paged_kernels_finder\n", encoding="utf-8")


setup(
    packages=packages(),
    package_dir=ROOMS,
    package_data={"hf_paged": ["py.typed"], "hf_paged.integrations.openai_server.live": ["*.html", "*.css", "*.js"]},
    cmdclass={"build_py": BuildPy},
)
