//! How many placements per second the scheduler answers, and how long one takes.
//!
//! The measuring program is an example of `blixard-node` (benchmarks link no code of the project); this runs it, and makes
//! a table and JSON of what it prints.

use std::path::PathBuf;
use std::process::Command;

use clap::Args;
use serde_json::Value;

use crate::table::{Table, TableError};

/// How large a cluster, how many placements.
#[derive(Debug, Args)]
pub struct Options {
    /// Nodes of the cluster.
    #[arg(long, default_value_t = 2_000)]
    nodes: u64,
    /// VMs that are there before.
    #[arg(long, default_value_t = 100_000)]
    vms: u64,
    /// Placements that are measured.
    #[arg(long, default_value_t = 50_000)]
    placements: u64,
    /// Rounds.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// The measuring program: `cargo build --release -p blixard-node --example place`.
    #[arg(long)]
    program: PathBuf,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The program cannot be started.
    #[error("cannot start {program}")]
    Start {
        /// Which.
        program: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// It failed.
    #[error("the measuring program failed: {0}")]
    Failed(String),
    /// What it printed is not as expected.
    #[error("the measuring program printed something unexpected")]
    Decode,
    /// The results cannot be stored.
    #[error("cannot store the results")]
    Results(#[from] TableError),
}

/// Runs it.
///
/// # Errors
/// See [`PlaceError`].
pub fn run(options: &Options) -> Result<Table, PlaceError> {
    let mut table = Table::new(&format!(
        "place: {} nodes, {} VMs, {} placements a round",
        options.nodes, options.vms, options.placements
    ));
    for _ in 0..options.rounds {
        let numbers = [options.nodes, options.vms, options.placements].map(|n| n.to_string());
        let output = Command::new(&options.program).args(numbers).output();
        let start = |source| PlaceError::Start { program: options.program.clone(), source };
        let output = output.map_err(start)?;
        if !output.status.success() {
            return Err(PlaceError::Failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        let said: Value = serde_json::from_slice(&output.stdout).map_err(|_| PlaceError::Decode)?;
        let mut times: Vec<f64> = said
            .get("times_ns")
            .and_then(Value::as_array)
            .ok_or(PlaceError::Decode)?
            .iter()
            .filter_map(|ns| Some(ns.as_f64()? / 1e6))
            .collect();
        times.sort_by(f64::total_cmp);
        let at =
            |per_mille: usize| times.get((times.len() * per_mille / 1000).min(times.len().saturating_sub(1)));
        let all: f64 = times.iter().sum();
        for (row, value) in [("p50", at(500)), ("p99", at(990)), ("p99.9", at(999)), ("max", times.last())] {
            table.add(row, *value.ok_or(PlaceError::Decode)?);
        }
        // In thousandths of a second like the rest: the mean of one placement, so 0.1 are 10,000 per second.
        let count = u32::try_from(times.len()).map_err(|_| PlaceError::Decode)?;
        table.add("mean (0.1 is 10,000/s)", all / f64::from(count));
        let snapshot = said.get("snapshot_ns").and_then(Value::as_f64).ok_or(PlaceError::Decode)?;
        table.add("snapshot of the view", snapshot / 1e6);
    }
    Ok(table)
}
