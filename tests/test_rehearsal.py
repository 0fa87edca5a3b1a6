"The paper's experiment in full size with random weights: an hour or less on two cores, most of it waiting."
import json

import pandas as pd
import pytest

from nsnet.config import TABLE
from nsnet.study import run_study


@pytest.mark.slow
def test_dalle_preset_with_vit_l_14_and_blip_base(tmp_path):
    "All stages run without a network and within the memory of a free Colab machine; what cannot be used is named."
    run_study("rehearsal", scale="real", systems="all", data=tmp_path/"data", out=tmp_path/"out", progress=False)
    facts = json.loads((tmp_path/"out/run.json").read_text())
    assert facts["peak_memory_gb"] + facts["canvases_gb"] < 12
    table = pd.read_csv(tmp_path/"out/table1.csv")
    systems = TABLE.split(",")
    assert set(systems) <= set(table.system) and table[table.system.isin(systems)].accuracy.between(0, 1).all()
    rejected = pd.read_csv(tmp_path/"out/rejected.csv").set_index("path").reason
    assert "233 megapixels" in rejected["fakeV2/fake-v2/12479.jpg"] and "truncated" in rejected["real/1899.jpg"]
    expected = {"patches", "spectrum", "training", "generators", "scores", "curves", "errors", "removed", "tsne", "memory"}
    assert expected <= {file.stem for file in (tmp_path/"out/figures").glob("*.png")}
