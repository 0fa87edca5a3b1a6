"Run a study as somebody outside of any checkout would."
import os
from pathlib import Path

import pytest

from nsnet.study import run_study

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def environment():
    "Kernels find this checkout and take one thread each."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def run_in(folder, name, out="out", data="data", **params):
    "Run a study with `folder` as current folder; what it wrote."
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_study(name, out=out, data=data, progress=False, **params)
    return folder/out
