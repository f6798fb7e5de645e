"""Everything here comes from settings.ini; the project's static part (pyproject.toml) is written
by nbdev_export.
"""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

pkg = cfg["lib_path"]
statuses = [
    "1 - Planning",
    "2 - Pre-Alpha",
    "3 - Alpha",
    "4 - Beta",
    "5 - Production/Stable",
    "6 - Mature",
    "7 - Inactive",
]
licenses = {"apache2": "Apache-2.0"}
pythons = ["3.10", "3.11", "3.12", "3.13"]
oldest = pythons.index(cfg["min_python"])
tail = "_requirements"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"] or None,
    license=licenses[cfg["license"]],
    keywords=cfg["keywords"].split(),
    url=cfg["git_url"],
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"] + "/",
        "Source": cfg["git_url"],
        "Issues": cfg["git_url"] + "/issues",
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
    },
    classifiers=[
        "Development Status :: " + statuses[int(cfg["status"]) - 1],
        "Intended Audience :: " + cfg["audience"],
        "Natural Language :: " + cfg["language"],
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {v}" for v in pythons[oldest:]),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={
        key[: -len(tail)]: value.split() for key, value in cfg.items() if key.endswith(tail)
    },
    packages=find_packages(include=[pkg, pkg + ".*"]),
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{pkg}={pkg}._modidx:d"],
    },
    package_data={pkg: ["py.typed"]},
    zip_safe=False,
)
