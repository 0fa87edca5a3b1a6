"Captioning that is killed with SIGKILL goes on where it was and ends with the same captions."
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from killing import finish, kill, lines, start
from nsnet.captions import Captioner, caption, load_captioner
from nsnet.index import index_folder, save_index

BATCH, IMAGES = 4, 40


class Logged(Captioner):
    "Notes every batch before it is described, and takes its time."
    def generate(self, images):
        with open("log", "a") as file: file.write("batch\n")
        time.sleep(0.05)
        return super().generate(images)


def run(work, out):
    "Caption everything and write the index: what the processes that are killed are busy with."
    os.chdir(out)
    captioner = Logged(**vars(load_captioner(work/"blip", device="cpu", max_new_tokens=8)))
    index = index_folder(work/"images", progress=False)
    save_index(caption(index, work/"images", captioner, "captions.jsonl", batch_size=BATCH, progress=False), "index.csv")


def make_blip(directory):
    "Save a very small BLIP with random weights."
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor
    words = "[PAD] [UNK] [CLS] [SEP] [DEC] a red blue ring disc on grass sand under dusk noon".split()
    layers = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=1.0)
    config = BlipConfig(
        vision_config=dict(**layers, image_size=32, patch_size=16),
        text_config=dict(**layers, encoder_hidden_size=16, vocab_size=len(words), max_position_embeddings=64,
                         bos_token_id=4, eos_token_id=3, sep_token_id=3, pad_token_id=0))
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(directory)
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(words)}, bos_token="[DEC]")
    BlipProcessor(BlipImageProcessor(size=dict(height=32, width=32)), tokenizer).save_pretrained(directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder of images, a captioner, and what an undisturbed run makes of them."
    work = tmp_path_factory.mktemp("captions")
    make_blip(work/"blip")
    for i in range(IMAGES):
        file = work/"images"/("real" if i % 2 else "fake")/f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(file)
    assert finish(start(run, work, work/"whole")) == 0
    return work


@pytest.mark.parametrize("batches", [1, 6])
def test_killed_run_goes_on(made, tmp_path, batches):
    kill(start(run, made, tmp_path), lambda: lines(tmp_path/"captions.jsonl") >= batches * BATCH)
    kept = lines(tmp_path/"captions.jsonl")
    assert batches * BATCH <= kept < IMAGES and not (tmp_path/"index.csv").exists()

    assert finish(start(run, made, tmp_path)) == 0
    for name in ("captions.jsonl", "index.csv"):
        assert (tmp_path/name).read_bytes() == (made/"whole"/name).read_bytes()
    assert lines(tmp_path/"log") <= IMAGES // BATCH + 1


def test_finished_run_describes_nothing(made):
    described = lines(made/"whole"/"log")
    assert finish(start(run, made, made/"whole")) == 0
    assert lines(made/"whole"/"log") == described == IMAGES // BATCH
