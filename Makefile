# One command each: `make tour` runs the tour, `make test` the tests, `make help` lists all.
# Every target prints what to type without make. What is done is not done again; `make -B TARGET` insists.

PYTHON ?= python3
JOBS   ?= 2

PY      := .venv/bin/python
SOURCES := $(shell find realization bmojo_core -name '*.py' -o -name '*.cu' -o -name '*.html')
PLAIN    = @printf '%s\n' 'Without make:' '    $(PYTHON) -m venv .venv && . .venv/bin/activate'

.PHONY: help tour test lab docs lint clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '%s\n' '' 'PYTHON=python3.12 picks the interpreter (3.11 or 3.12), JOBS=4 the number of test processes.'

# ---------------------------------------------------------------- environment

.venv/.made:
	@$(PYTHON) -c '' 2>/dev/null || { echo >&2 \
	  "error: '$(PYTHON)' does not start. Install Python 3.11 or later, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 \
	  "error: '$(PYTHON)' is $$($(PYTHON) -V 2>&1); this project needs Python 3.11 or later. Name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo >&2 \
	  "error: '$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

# One stamp for each set of extras, newer than its inputs only after pip has succeeded; a larger set
# holds the smaller ones.
NOTEBOOKS := .venv/.ready-notebooks
DOCS      := .venv/.ready-docs
TEST      := .venv/.ready-test
$(NOTEBOOKS): EXTRAS = notebooks
$(DOCS):      EXTRAS = notebooks,docs
$(DOCS):      HELD   = $(NOTEBOOKS)
$(TEST):      EXTRAS = notebooks,docs,test
$(TEST):      HELD   = $(NOTEBOOKS) $(DOCS)
$(NOTEBOOKS) $(DOCS) $(TEST): pyproject.toml constraints.txt | .venv/.made
	@echo "Installing .[$(EXTRAS)] into .venv (the first time takes minutes: torch is large)"
	@$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]" || { echo >&2 \
	  "error: pip could not install the dependencies (its reason stands above). Without a network it cannot: connect, then run the same command again; what was fetched is kept."; exit 1; }
	@touch $(HELD) $@

# --------------------------------------------------------------------- targets

tour: out/tour/index.html ## train the paper's models on this machine and show what they remembered (4 minutes)
	@echo "The tour is in out/tour/index.html: open it in a browser. 'make -B tour' runs it again."

out/tour/index.html: $(NOTEBOOKS) notebooks/00_tour.ipynb $(SOURCES)
	$(PLAIN) '    pip install -c constraints.txt -e ".[notebooks]"' \
	  '    python -m bmojo_core.experiments.run_notebook notebooks/00_tour.ipynb --out out/tour --mathjax docs/_static/mathjax/tex-svg.js' ''
	@$(PY) -m bmojo_core.experiments.run_notebook notebooks/00_tour.ipynb --out out/tour \
	  --mathjax docs/_static/mathjax/tex-svg.js

# One thread a process: there are JOBS of them.
ONE   := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with notebooks/nbval_sanitize.cfg --nbval-cell-timeout 300 \
         --nbval-kernel-startup-timeout 300

test: $(TEST) ## run the whole suite: unit, property, notebooks (9 minutes)
	$(PLAIN) '    pip install -c constraints.txt -e ".[notebooks,docs,test]"' \
	  '    pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder tests' '    $(ONE) pytest -n $(JOBS) --dist loadscope $(NBVAL) notebooks/[0-9]*.ipynb notebooks/gpu/*.ipynb' ''
	@$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder tests
	@$(ONE) $(PY) -m pytest -n $(JOBS) --dist loadscope $(NBVAL) notebooks/[0-9]*.ipynb notebooks/gpu/*.ipynb

lab: $(NOTEBOOKS) ## open JupyterLab on notebooks/
	$(PLAIN) '    pip install -c constraints.txt -e ".[notebooks]"' '    jupyter lab notebooks' ''
	@$(PY) -m jupyter lab notebooks

docs: $(DOCS) ## build the site into out/site, offline
	$(PLAIN) '    pip install -c constraints.txt -e ".[notebooks,docs]"' \
	  '    python -m sphinx -W --keep-going -b html -d out/.site/doctrees docs out/.site/html' \
  '    rm -rf out/site && cp -R out/.site/html out/site' ''
	@$(PY) -m sphinx -q -W --keep-going -b html -d out/.site/doctrees docs out/.site/html
	@rm -rf out/site && cp -R out/.site/html out/site
	@echo "The site is in out/site/index.html."

lint: $(TEST) ## check style and format
	$(PLAIN) '    pip install -c constraints.txt -e ".[notebooks,docs,test]"' '    ruff check . && ruff format --check .' ''
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

clean: ## remove what tour, docs and test wrote; .venv stays
	rm -rf out docs/api docs/notebooks .pytest_cache .hypothesis .ruff_cache
