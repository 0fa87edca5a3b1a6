# Two commands do everything: `make study` and `make test`. Both install on first use, into .venv.
PYTHON ?= python3
READY := .venv/.ready
STUDY := nsnet study
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: study study-full ablation audit generators robustness studies mini mini-detector processors rehearsal speed scoring versions test sync readme docs clean

# One thread: the number of threads decides the last digits of sums, and so of every score
study study-full ablation audit generators robustness mini-detector: export OMP_NUM_THREADS = 1

# The study on the mini world with one seed: reports/table1/
study: $(READY)
	$(STUDY) table1 -p preset mini -p seeds 0 -p out reports/table1

# The same with five seeds, which is what the README shows: reports/table1-full/
study-full: $(READY)
	$(STUDY) table1 -p preset mini -p seeds 0,1,2,3,4 -p out reports/table1-full

# Is it the caption, and what does each part earn: reports/ablation/ (about an hour)
ablation: $(READY)
	$(STUDY) ablation -p preset mini -p seeds 0,1,2,3,4 -p n_boot 2000 -p out reports/ablation

# What the released numbers measure, one switch of the protocol at a time: reports/audit/
audit: $(READY)
	$(STUDY) audit -p preset mini -p seeds 0,1,2,3,4 -p out reports/audit

# Every generator in training and in testing, one left out, five seeds: reports/generators/ (about half an hour)
generators: $(READY)
	$(STUDY) generators -p preset mini -p seeds 0,1,2,3,4 -p adapted False -p out reports/generators

# What is left of the detectors when pictures were compressed, scaled, cropped or sent on: reports/robustness/
robustness: $(READY)
	$(STUDY) robustness -p preset mini -p seeds 0,1,2,3,4 -p out reports/robustness

# All of them, which share detectors, canvases and features
studies: study-full ablation audit generators robustness

# Make the mini world itself from nothing (hours): nsnet/assets/mini/ and reports/make_mini/
mini: $(READY)
	$(STUDY) make_mini -p scale real -p out reports/make_mini -p assets nsnet/assets/mini -p cache data/make_mini -p before reports/make_mini/version1.csv

# Train the detector that ships, on the mini world as it is (minutes): nsnet/assets/mini/detector/ and reports/mini_detector/
mini-detector: $(READY)
	$(STUDY) mini_detector -p scale real -p out reports/mini_detector -p assets nsnet/assets/mini/detector

# The study under other instruction sets and with two threads: reports/processors/
processors: $(READY)
	python scripts/processors.py

# The dalle preset with ViT-L/14 and BLIP-base in full size, random weights and no network: reports/rehearsal/
rehearsal: $(READY)
	$(STUDY) rehearsal -p scale real -p per_class 24 -p n_train 20 -p systems all -p out reports/rehearsal

# Every stage against the limit of the machine, on the GPU where there is one: reports/speed/
speed: $(READY)
	$(STUDY) speed -p scale real -p out reports/speed

# 20,000 pictures scored from the command line, and killed on the way: reports/scoring/
scoring: export OMP_NUM_THREADS = 1
scoring: $(READY)
	python scripts/scoring.py 20000 reports/scoring

# The tests with the lowest versions of the libraries and with the newest: reports/versions/
versions: $(READY)
	python scripts/versions.py lowest
	python scripts/versions.py newest

# Generated files in step with the notebooks, every notebook, then the system tests
test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
test: $(READY)
	python scripts/sync.py --check
	nbdev-test --n-workers 2
	python -m pytest

# Write the modules and README.md anew from the notebooks
sync: $(READY)
	python scripts/sync.py

# Write README.md anew from nbs/index.ipynb
readme: $(READY)
	python scripts/readme.py

# The notebooks, the reports and the API as a site, as they are committed: _site/index.html
docs: $(READY)
	python scripts/pages.py

$(READY): pyproject.toml settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	python -m pip install --constraint constraints.txt --editable '.[dev]'
	python -m ipykernel install --sys-prefix
	touch $(READY)

clean:
	rm -rf .venv build dist _site *.egg-info
