# The front door. `make` alone tells what there is.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The first of these that is at least Python 3.11; or say `make PYTHON=... venv`.
IS_NEW_ENOUGH := 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON = $(shell for python in python3.11 python3.12 python3.13 python3; do \
    $$python -c $(IS_NEW_ENOUGH) 2>/dev/null && echo $$python && break; done)

PYTEST := $(BIN)/python -m pytest --numprocesses auto

SSH_PROGRAMS := sshd:openssh-server ssh:openssh-client sftp:openssh-client
PEERS := rsync:rsync rclone:rclone lftp:lftp
FILE_SYSTEMS := mkfs.ext4:e2fsprogs mkfs.btrfs:btrfs-progs mkfs.exfat:exfatprogs mount.exfat-fuse:exfat-fuse \
    lowntfs-3g:ntfs-3g
MTREE_PROGRAMS := mtree:mtree-netbsd bsdtar:libarchive-tools
OTHER_SSH_SERVERS := dropbear:dropbear-bin dropbearconvert:dropbear-bin proftpd:proftpd-core proftpd:proftpd-mod-crypto
AIRFLOW_SERVERS := redis-server:redis-server initdb:postgresql
TEST_PROGRAMS := $(SSH_PROGRAMS) $(MTREE_PROGRAMS) $(OTHER_SSH_SERVERS) $(AIRFLOW_SERVERS) $(FILE_SYSTEMS) rsync:rsync strace:strace busybox:busybox dash:dash bash:bash csh:csh fish:fish

.PHONY: help
help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: venv ## See the main job: a real SSH server, a real Airflow, three runs; KEEP=1 leaves Airflow up
	@sh demo/system-packages.sh $(SSH_PROGRAMS)
	@KEEP=$(KEEP) $(BIN)/python -m demo.run

.PHONY: test
test: venv system-packages ## Run all tests, or a part: ARGS="tests/unit/history/test_clock.py -k kill"
	$(PYTEST) $(ARGS)

.PHONY: test-unit
test-unit: venv system-packages ## Run the tests that need no server
	$(PYTEST) tests/unit tests/guarantees $(ARGS)

.PHONY: test-integration
test-integration: venv system-packages ## Run the tests against a real SSH server
	$(PYTEST) tests/integration $(ARGS)

.PHONY: test-system
test-system: venv system-packages ## Run the tests with a real Airflow scheduler
	$(PYTEST) tests/system $(ARGS)

.PHONY: test-distributed
test-distributed: venv system-packages ## Run the tests with Celery workers, Redis and PostgreSQL (root)
	$(PYTEST) tests/distributed $(ARGS)

.PHONY: torture
torture: venv system-packages ## Run the long forms of the tests of docs/guarantees.md, and count what they tried
	MDBACKUP_TORTURE=long $(PYTEST) -m guarantee $(ARGS)

.PHONY: coverage
coverage: venv system-packages ## Run all tests, or ARGS, and report which lines and branches they reach
	rm -rf build/coverage
	$(BIN)/coverage run -m pytest --numprocesses auto $(ARGS); status=$$?; \
	    $(BIN)/coverage combine --quiet && $(BIN)/coverage report && exit $$status

.PHONY: fuzz
fuzz: build/fuzz/.installed ## Fuzz the index reader and the SFTP parser with atheris, each for SECONDS=60
	@for target in index sftp; do \
	    echo "Fuzzing $$target for $(or $(SECONDS),60) s"; \
	    build/fuzz/venv/bin/python -m tests.fuzz $$target $(or $(SECONDS),60) || exit 1; done

build/fuzz/.installed: setup.cfg constraints.txt
	@$(call make_venv,build/fuzz/venv)
	build/fuzz/venv/bin/python -m pip install --quiet --constraint constraints.txt msgspec pathspec
	@build/fuzz/venv/bin/python -m pip install --quiet --only-binary :all: atheris || { echo "There is no" \
	    "atheris for $$(build/fuzz/venv/bin/python --version) on this machine. Try another: make" \
	    "PYTHON=python3.11 fuzz. Without it, the tests fuzz the same with hypothesis: make torture." >&2; false; }
	@touch $@

.PHONY: lint
lint: venv ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: venv ## Reformat the code and correct what can be corrected
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: venv ## Generate the reference pages and the sample configuration again
	$(BIN)/python -m demo.generate_docs

.PHONY: screenshots
screenshots: venv ## Take the pictures of the UI in docs/images again, in a real Airflow (root, Debian)
	@sh demo/system-packages.sh $(SSH_PROGRAMS) chromium:chromium chromium:fonts-inter
	$(BIN)/python -m pip install --quiet --constraint constraints.txt playwright
	$(BIN)/python -m demo.screenshot

.PHONY: bench
bench: venv ## Measure speed, also of sftp, rsync, rclone, lftp: WORK="small large" ROUNDS=3 RTT=ms SCALE=1 DEST=dir
	@sh demo/system-packages.sh $(SSH_PROGRAMS)
	@sh demo/system-packages.sh $(PEERS) || echo "Going on without those"
	$(BIN)/python -m benchmarks.run $(WORK) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(RTT),--rtt $(RTT)) \
	    $(if $(SCALE),--scale $(SCALE)) $(if $(DEST),--dest $(DEST))

.PHONY: bench-many
bench-many: venv ## Measure what many providers and runs cost Airflow: time to parse, rows, time of a run
	@sh demo/system-packages.sh $(SSH_PROGRAMS)
	$(BIN)/python -m benchmarks.many

.PHONY: bench-plots
bench-plots: venv ## Draw the pictures of what `make bench` measured into docs/images
	$(BIN)/python -m pip install --quiet --constraint constraints.txt matplotlib
	$(BIN)/python -m benchmarks.plot

.PHONY: wheel
wheel: venv ## Build the source archive and the wheel into dist/
	$(BIN)/python -m build --outdir dist

.PHONY: venv
venv: $(INSTALLED) ## Make .venv with the project, Airflow and the development tools

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo "Making $(VENV) with Airflow: some 500 MB, a minute or two"
	@$(call make_venv,$(VENV))
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

.PHONY: system-packages
system-packages: ## Install the servers and programs that tests need, where missing (root, Debian)
	@sh demo/system-packages.sh $(TEST_PROGRAMS)

.PHONY: constraints
constraints: ## Renew constraints.txt: the newest versions that fit together
	rm -rf build/constraints
	@$(call make_venv,build/constraints)
	build/constraints/bin/python -m pip install --quiet --editable '.[dev]'
	{ echo "# The versions that the tests ran with. Made by \`make constraints\`, with" \
	    "$$(build/constraints/bin/python --version)."; \
	  build/constraints/bin/python -m pip freeze --exclude-editable; } > build/constraints.txt
	@! grep -n ' @ ' build/constraints.txt || { echo "constraints.txt must not name addresses." >&2; false; }
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints

.PHONY: clean
clean: ## Remove everything that make has made here
	rm -rf $(VENV) .demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find airflow_mdbackup dags demo tests -name __pycache__ -prune -exec rm -rf {} +

# $(call make_venv,DIRECTORY): Debian's Python comes without the means to make one.
define make_venv
set -e; \
test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found. Install it, or: make PYTHON=... venv" >&2; exit 1; }; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || sh demo/system-packages.sh \
    ":python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"; \
$(PYTHON) -m venv --clear $(1)
endef
