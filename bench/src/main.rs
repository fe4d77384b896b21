//! blixard-bench: benchmarks; each prints a table and writes JSON.
//!
//! * [`boot`]: request → guest ready, split by step
//! * [`vmm`]: the VMM beside Firecracker
//! * [`place`]: placements per second
//! * [`node`]: memory and start of a node with many VMs, and whether it ages
//! * [`raft`]: writes and reads of three voters, leader killed
//! * [`table`], [`compare`]: samples, medians, tables, JSON
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod boot;
mod compare;
mod node;
mod place;
mod raft;
mod table;
mod vmm;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Benchmarks of Blixard.
#[derive(Debug, Parser)]
#[command(name = "blixard-bench", version)]
struct Arguments {
    /// Folder for JSON results.
    #[arg(long, global = true, default_value = "target/bench")]
    out: PathBuf,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Request → guest ready, split by step. Needs a running node with the image.
    Boot(boot::Options),
    /// The VMM, beside Firecracker when it is given: start, life, rate, memory. Needs /dev/kvm.
    Vmm(vmm::Options),
    /// A stock kernel up to its init, beside Firecracker when it is given. Needs a /dev/kvm that runs Linux.
    Kernel(vmm::kernel::Options),
    /// Disk and network of a stock kernel, beside Firecracker when it is given. Needs a /dev/kvm that runs Linux.
    Io(vmm::throughput::Options),
    /// Placements per second, and how long one takes. No node is needed.
    Place(place::Options),
    /// Three voters on this machine: durable writes, linearizable reads, leader killed. Starts them itself.
    Raft(raft::Options),
    /// One node with 10,000 VMs: memory, start; a million VMs made and forgotten. Starts it itself.
    Node(node::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let out = &arguments.out;
    let result: Result<(), Box<dyn Error>> = match &arguments.bench {
        Bench::Boot(options) => {
            boot::run(options).and_then(|t| Ok(t.show_and_write(out, "boot")?)).map_err(Into::into)
        }
        Bench::Vmm(options) => {
            vmm::run(options, out).and_then(|t| Ok(t.show_and_write(out, "vmm")?)).map_err(Into::into)
        }
        Bench::Kernel(options) => vmm::kernel::run(options, out)
            .and_then(|t| Ok(t.show_and_write(out, "kernel")?))
            .map_err(Into::into),
        Bench::Io(options) => vmm::throughput::run(options, out)
            .and_then(|t| Ok(t.show_and_write(out, "io")?))
            .map_err(Into::into),
        Bench::Place(options) => {
            place::run(options).and_then(|t| Ok(t.show_and_write(out, "place")?)).map_err(Into::into)
        }
        Bench::Raft(options) => raft::run(options, out).map_err(Into::into),
        Bench::Node(options) => node::run(options, out).map_err(Into::into),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            table::complain(error.as_ref());
            ExitCode::FAILURE
        }
    }
}
