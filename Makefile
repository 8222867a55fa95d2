# make demo: set up and render a first picture. make test: set up and run every test.
PYTHON ?= python3
VENV := .venv/bin/python

.PHONY: demo test
demo: .venv/installed
	$(VENV) scripts/txt2img.py --prompt "a red cube on top of a blue sphere" --plms --outdir outputs/demo
	@echo "images: outputs/demo/samples    grids: outputs/demo/grid-*.png"

test: .venv/installed-test
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	# one thread to a process: two of torch's pools on two cores wait for each other; one process more than
	# there are cores, as some tests wait
	OMP_NUM_THREADS=1 $(VENV) -m pytest --numprocesses $$($(VENV) -c "import os; print(min(4, os.cpu_count() + 1))") \
		--dist worksteal --durations 25

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --constraint constraints.txt --editable .
	# over the files of opencv-python, for which a machine needs libGL and glib, those of the build without windows
	$(VENV) -m pip install --quiet --no-deps --constraint constraints.txt opencv-python-headless
	touch $@

.venv/installed-test: .venv/installed
	$(VENV) -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	# k-diffusion's other requirements are for its training scripts
	$(VENV) -m pip install --quiet --no-deps --constraint constraints.txt k-diffusion torchdiffeq torchsde trampoline
	touch $@
