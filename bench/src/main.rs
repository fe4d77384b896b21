//! blixard-bench: benchmarks; each prints a table and writes JSON.
//!
//! * [`boot`]: request → guest ready, split by step
//! * [`table`]: samples, medians, tables, JSON
#![forbid(unsafe_code)]

mod boot;
mod table;

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
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.bench {
        Bench::Boot(options) => {
            boot::run(options).and_then(|t| Ok(t.show_and_write(&arguments.out, "boot")?))
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            table::complain(&error);
            ExitCode::FAILURE
        }
    }
}
