"""Maps the folders at the root into the one namespace `tunesmith`; find_packages forgets no subpackage."""

from pathlib import Path

from setuptools import find_packages, setup

ROOTS = [
    name for name in ("orchestrator", "executors", "graph", "tui") if Path(__file__).parent.joinpath(name).is_dir()
]

setup(
    packages=[
        f"tunesmith.{name}" for root in ROOTS for name in (root, *(f"{root}.{sub}" for sub in find_packages(root)))
    ],
    package_dir={f"tunesmith.{root}": root for root in ROOTS},
)
