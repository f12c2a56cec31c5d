# The front door. Everything is set up on first use, in ~/.cache/lmcache-sdk (LMCACHE_SDK_VENVS puts it elsewhere).
# PYTHON is only what the environments are made from: 3.11 or newer.

PYTHON ?= python3
TOOLS = $(PYTHON) tools/environments.py run tools --
NOX = $(TOOLS) nox

# make test ENGINE=hf: that engine's suite only, beside those without an engine.
ENGINES = hf vllm sglang cross
SUITES = lint bare core daemon backends kernels $(or $(ENGINE),$(ENGINES))

.PHONY: help demo test test-fast test-full soak lint bench nox clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo:  ## a real model answers from a stored cache, in a new process; writes demo.json (PLOT=demo.png: a plot too)
	$(NOX) -s demo -- $(if $(PLOT),--plot $(PLOT))

test:  ## lint and all suites, with a budget line for each (ENGINE=hf: one engine)
	$(TOOLS) python tools/suites.py $(SUITES)

test-fast:  ## what needs no engine, no server and no daemon; under two minutes
	$(TOOLS) python tools/suites.py bare core

test-full:  ## all suites with their slow tests, and the oldest dependencies
	$(TOOLS) python tools/suites.py --full $(SUITES) oldest

soak:  ## daemon and engines killed at random for minutes, all bytes compared (ARGS="--cycles 1000 --seed 7")
	$(NOX) -s soak -- $(ARGS)

lint:  ## format, style, types, floors
	$(NOX) -s lint

bench:  ## ratios to references measured in the same run; writes bench.json (ENGINE=hf, PART=backends or kernels: their rows)
	$(NOX) -s bench -- $(if $(ENGINE),--engine $(ENGINE)) $(if $(PART),--part $(PART))

nox:  ## any session with any arguments: make nox ARGS="-s core -- -k chain"
	$(NOX) $(ARGS)

clean:  ## what runs leave in the checkout (environments and the model stay in the cache)
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .nox dist demo.json demo.png bench.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
