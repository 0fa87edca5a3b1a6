"Metadata from settings.ini; a wheel also carries the study notebooks, so that `run_study` works without a checkout."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

config = ConfigParser()
config.read("settings.ini")
settings = config["DEFAULT"]
extras = {key.removesuffix("_requirements"): settings[key].split() for key in settings if key.endswith("_requirements")}
extras["dev"] = sorted({name for names in extras.values() for name in names})


class BuildWithStudies(build_py):
    "Copy nbs/studies into the package."
    def run(self):
        super().run()
        if self.editable_mode: return
        target = Path(self.build_lib, "nsnet/studies")
        target.mkdir(parents=True, exist_ok=True)
        for notebook in Path("nbs/studies").glob("*.ipynb"): shutil.copy(notebook, target)


setup(
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license=settings["license"],
    author=settings["author"],
    keywords=settings["keywords"].split(", "),
    classifiers=["Programming Language :: Python :: 3 :: Only", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=["nsnet"],
    package_data={"nsnet": ["assets/**/*"]},
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    cmdclass={"build_py": BuildWithStudies},
)
