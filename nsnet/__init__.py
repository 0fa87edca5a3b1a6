"Tells AI-generated images from photographs: Advanced NS-Net. The names below are loaded when they are first used."
from importlib import import_module

__version__ = "0.1.0"
_HOMES = dict(
    open_image="images", index_folder="index", split="index", index_any="benchmarks", caption="captions",
    spectral_entropy="patches", select_patches="patches", load_backbone="clip",
    global_projection="nullspace", project_per_sample="nullspace", NSNet="model", evaluate="metrics",
    recipe="config", preset="config", Detector="detector", train="training", run_study="study")
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f"module 'nsnet' has no attribute {name!r}")
    return getattr(import_module(f"nsnet.{_HOMES[name]}"), name)


def __dir__(): return sorted([*globals(), *_HOMES])
