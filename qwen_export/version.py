"""The version of this package, which bundles and journals of builds record. `pyproject.toml` has the same one."""

__version__ = "0.1.0"
