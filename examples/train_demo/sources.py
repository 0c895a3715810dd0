"""Where the training text comes from: PyPI wheels, Debian documentation packages and the interpreter's own library.

Every name here is a candidate. `corpus.py` reads the licence a package declares and drops the package unless the licence is permissive.
"""

from __future__ import annotations

import re
from pathlib import Path

PYPI: tuple[str, ...] = tuple((Path(__file__).parent / "packages.txt").read_text().split())

# Debian packages that ship documentation sources of permissively licensed projects.
DEBIAN: dict[str, str] = {
    "python3.11-doc": "PSF-2.0",
    "python-numpy-doc": "BSD-3-Clause",
    "python-scipy-doc": "BSD-3-Clause",
    "python-pandas-doc": "BSD-3-Clause",
    "python-django-doc": "BSD-3-Clause",
    "python-flask-doc": "BSD-3-Clause",
    "python-sqlalchemy-doc": "MIT",
    "python-networkx-doc": "BSD-3-Clause",
    "python-sklearn-doc": "BSD-3-Clause",
    "python-matplotlib-doc": "PSF-like (matplotlib)",
    "python-sympy-doc": "BSD-3-Clause",
    "python-celery-doc": "BSD-3-Clause",
    "python-astropy-doc": "BSD-3-Clause",
    "python-dask-doc": "BSD-3-Clause",
    "python-tornado-doc": "Apache-2.0",
    "python-pyramid-doc": "BSD-like (Repoze)",
    "python-werkzeug-doc": "BSD-3-Clause",
    "python-jinja2-doc": "BSD-3-Clause",
    "python-click-doc": "BSD-3-Clause",
    "python-attr-doc": "MIT",
    "python-requests-doc": "Apache-2.0",
    "python-urllib3-doc": "MIT",
    "python-aiohttp-doc": "Apache-2.0",
    "python-setuptools-doc": "MIT",
    "python-xarray-doc": "Apache-2.0",
    "python-statsmodels-doc": "BSD-3-Clause",
    "python-pytest-doc": "MIT",
    "python-ipython-doc": "BSD-3-Clause",
    "python-skimage-doc": "BSD-3-Clause",
    "sphinx-doc": "BSD-2-Clause",
    "cython-doc": "Apache-2.0",
    "python-cryptography-doc": "Apache-2.0 or BSD-3-Clause",
    "python-twisted-doc": "MIT",
    "twisted-doc": "MIT",
}

_PERMISSIVE = re.compile(
    r"\b(mit|mit-cmu|bsd|0bsd|[23]-clause|apache|psf|python software foundation|isc|hpnd|zpl|zope|public domain|unlicense|cc0|biopython)\b",
    re.I,
)
_RESTRICTED = re.compile(
    r"\b(a?gpl|lgpl|gnu|mpl|mozilla|epl|eupl|proprietary|non-?commercial|commercial|sspl|busl|cc-by-nc|cc-by-sa)", re.I
)


def is_permissive(licence: str) -> bool:
    """True if the declared licence names a permissive licence and no copyleft or restricted one."""
    return bool(_PERMISSIVE.search(licence)) and not _RESTRICTED.search(licence)
