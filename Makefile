# What one can do here. `make` alone explains.
.DEFAULT_GOAL := help
SHELL := /bin/sh
CARGO ?= cargo
TARGET := x86_64-unknown-linux-musl
DEBUG := target/$(TARGET)/debug
RELEASE := target/$(TARGET)/release
PROGRAMS := -p blixard-cli -p blixard-node -p blixard-agent -p blixard-netd -p blixard-init -p blixard-rig

.PHONY: help
help: ## this text
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

.PHONY: release
release: prerequisites-build ## all programs as they are installed, in target/x86_64-unknown-linux-musl/release
	$(CARGO) build --release $(PROGRAMS)
	$(CARGO) build --profile lean -p blixard-vmm
	install -m 755 target/$(TARGET)/lean/blixard-vmm $(RELEASE)/blixard-vmm

.PHONY: demo
demo: release ## a VM from nothing: boots, answers exec, fetches a page, is removed without trace
	sh tests/demo.sh $(RELEASE)

.PHONY: test
test: prerequisites-build ## all tests: unit, property, small guests on /dev/kvm, whole system in the rig
	sh tests/all.sh

.PHONY: test-unit
test-unit: prerequisites-build ## only what runs as an ordinary process, and small guests where /dev/kvm is
	sh tests/all.sh unit

.PHONY: test-rig
test-rig: prerequisites-build ## only the whole system in the rig; FILTER=name picks tests
	sh tests/all.sh rig $(FILTER)

.PHONY: test-hosts
test-hosts: prerequisites-build ## only three hosts as one cluster, in the rig
	sh tests/all.sh hosts

.PHONY: test-kernels
test-kernels: prerequisites-build ## stock kernels (Debian's cloud, generic, backports) under load through snapshot, restore and fork
	sh tests/kernels.sh cloud generic backports

.PHONY: check
check: ## format, lints, dependency rules, documentation; reads only
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet
	@if command -v cargo-deny >/dev/null; then cargo deny check licenses bans sources; \
	else echo "skipped: dependency rules (deny.toml): cargo-deny is not installed; cargo install cargo-deny"; fi

.PHONY: fix
fix: ## repair what `make check` finds, where a program can
	$(CARGO) fmt --all
	$(CARGO) clippy --workspace --all-targets --fix --allow-dirty --allow-staged

.PHONY: bench
bench: release ## benchmarks: tables, and JSON in target/bench; FIRECRACKER=PATH compares the VMM with it
	$(CARGO) build --release -p blixard-bench
	FIRECRACKER=$(FIRECRACKER) sh bench/all.sh $(RELEASE)

.PHONY: fuzz
fuzz: ## each fuzz target for SECONDS=60 (needs a nightly toolchain and cargo-fuzz)
	sh fuzz/all.sh $(or $(SECONDS),60)

.PHONY: loom
loom: ## all orders of what threads of the VMM do, where a lost wake-up would hang a VM
	RUSTFLAGS="--cfg loom" $(CARGO) test -p blixard-vmm --lib --target-dir target/loom loom_test

.PHONY: miri
miri: ## the VMM's tests that Miri can run, for undefined behaviour (needs a nightly toolchain with miri and rust-src)
	sh vmm/tests/miri.sh

.PHONY: prerequisites-build
prerequisites-build:
	@sh tests/prerequisites.sh build
