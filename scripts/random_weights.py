"""Full-size models with random weights, for runs without a download: same layers, widths, activation and normalisation.

The studies `rehearsal` and `speed` and tests/test_backbones.py use them. What such a model says means nothing.
"""
import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from nsnet.images import atomic_write


def random_backbone(
    name: str,            # ARCHITECTURE/WEIGHTS as for `nsnet.load_backbone`, e.g. ViT-L-14/openai
    folder: str | Path,   # to write to; a model that is there already is kept
    seed: int = 0,
) -> str:                 # the name to load it by
    "Write the architecture that a name stands for, with random weights. Raises ValueError for an unknown name."
    arch, _, tag = name.partition("/")
    config, weights, folder = open_clip.get_model_config(arch), open_clip.get_pretrained_cfg(arch, tag), Path(folder)
    if not config or not weights:
        raise ValueError(f"open_clip knows no {name!r}: open_clip.list_pretrained() has the names")
    if (folder/"open_clip_config.json").exists(): return f"local-dir:{folder}"
    quick_gelu = weights.get("quick_gelu", False)
    torch.manual_seed(seed)
    model = open_clip.create_model(arch, force_quick_gelu=quick_gelu, device="cpu", precision="fp32")
    with atomic_write(folder/"open_clip_model.safetensors") as temporary:
        save_file({k: t.contiguous() for k, t in model.state_dict().items()}, temporary)
    if "hf_tokenizer_name" in config["text_cfg"]: byte_tokenizer(folder)
    preprocessing = {k: weights[k] for k in ("mean", "std", "interpolation")}
    described = dict(model_cfg=config | dict(quick_gelu=quick_gelu), preprocess_cfg=preprocessing)
    with atomic_write(folder/"open_clip_config.json") as temporary:
        temporary.write_text(json.dumps(described, indent=1))
    return f"local-dir:{folder}"


def byte_tokenizer(folder: str | Path) -> None:
    "Write a tokenizer with an id for every byte, in place of one that open_clip would fetch from the hub (SigLIP)."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = ["<unk>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    spell = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, merges=[], unk_token="<unk>"))
    spell.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=spell, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)


def random_captioner(
    folder: str | Path,   # to write to; a model that is there already is kept
    seed: int = 0,
) -> Path:                # the folder, for `nsnet.captions.load_captioner`
    "Write a BLIP-base (224 million parameters) with random weights and a tokenizer of numbered words."
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor
    folder = Path(folder)
    if (folder/"processor_config.json").exists(): return folder
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 30522: "[DEC]", 30523: "[ENC]"}
    tokenizer = BertTokenizer(vocab={special.get(i, f"word{i}"): i for i in range(30524)}, bos_token="[DEC]")
    torch.manual_seed(seed)
    config = BlipConfig(text_config=dict(num_attention_heads=12), vision_config=dict(initializer_range=.02))
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(), tokenizer).save_pretrained(folder)
    return folder
