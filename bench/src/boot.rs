//! Request → guest ready, split by step.
//!
//! Each run types `blixard run -d --wait ready` and reads the moments that node, agent and VMM recorded of it, all of them
//! in the host's CLOCK_MONOTONIC. A step that nobody recorded has no row: nothing is derived from nothing.

use std::path::PathBuf;
use std::process::{Command, Output};

use clap::Args;
use nix::time::{ClockId, clock_gettime};
use serde_json::Value;

use crate::table::{Table, TableError};

/// What to boot, how often.
#[derive(Debug, Args)]
pub struct Options {
    /// Number of VMs started one after the other; the first is not counted (it warms caches).
    #[arg(long, default_value_t = 10)]
    runs: u32,
    /// Image of the cluster.
    #[arg(long, default_value = "busybox")]
    image: String,
    /// Memory of each VM.
    #[arg(long, default_value = "128M")]
    memory: String,
    /// The command line program.
    #[arg(long, default_value = "blixard")]
    blixard: PathBuf,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The command line program cannot be started.
    #[error("cannot start {program}")]
    Start {
        /// Which.
        program: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A command failed.
    #[error("blixard {command} failed: {output}")]
    Command {
        /// Its first word.
        command: String,
        /// What it said.
        output: String,
    },
    /// What it answered is not as expected.
    #[error("blixard inspect answered something unexpected")]
    Decode(#[source] serde_json::Error),
    /// The clock cannot be read.
    #[error("cannot read CLOCK_MONOTONIC")]
    Clock(#[source] nix::Error),
    /// The results cannot be stored.
    #[error("cannot store the results")]
    Results(#[from] TableError),
}

/// Boots VMs and measures.
///
/// # Errors
/// The node or a VM did not do what it should.
pub fn run(options: &Options) -> Result<Table, BootError> {
    let mut table = Table::new(&format!("boot: image {}, {}, 1 vCPU", options.image, options.memory));
    for i in 0..=options.runs {
        let name = format!("bench-boot-{i}");
        let begin = now_us()?;
        let arguments = ["run", "-d", "--wait", "ready", "--name", &name, "--memory", &options.memory];
        blixard(options, &[&arguments[..], &[&options.image, "sleep", "100000"]].concat())?;
        let end = now_us()?;
        let inspected = blixard(options, &["inspect", &name])?;
        blixard(options, &["rm", "-f", "--wait", &name])?;
        if i == 0 {
            continue;
        }
        let views: Value = serde_json::from_slice(&inspected.stdout).map_err(BootError::Decode)?;
        add(&mut table, begin, end, views.pointer("/0/timing").unwrap_or(&Value::Null));
    }
    Ok(table)
}

fn add(table: &mut Table, begin: u64, end: u64, timing: &Value) {
    let at = |path: &str| timing.pointer(path).and_then(Value::as_u64);
    let mut row = |name: &str, from: Option<u64>, to: Option<u64>| {
        if let (Some(from), Some(to)) = (from, to) {
            let us = u32::try_from(to.saturating_sub(from)).unwrap_or(u32::MAX);
            table.add(name, f64::from(us) / 1000.0);
        }
    };
    row("API (CLI start, connect, read)", Some(begin), at("/request_us"));
    row("raft (propose, log, apply)", at("/request_us"), at("/applied_us"));
    row("plan (derive, hand to agent)", at("/applied_us"), at("/planned_us"));
    let steps: Vec<&Value> =
        timing.pointer("/steps").and_then(Value::as_array).into_iter().flatten().collect();
    for step in &steps {
        let name = step.get(0).and_then(Value::as_str).unwrap_or_default();
        row(
            &format!("agent: {name}"),
            step.get(1).and_then(Value::as_u64),
            step.get(2).and_then(Value::as_u64),
        );
    }
    row("VMM (process start → first vCPU run)", at("/boot/process_start_us"), at("/boot/vcpu_start_us"));
    row("kernel (first instruction → init)", at("/boot/vcpu_start_us"), at("/boot/init_start_us"));
    row("init (→ ready)", at("/boot/init_start_us"), at("/boot/guest_ready_us"));
    row("report (ready → CLI knows)", at("/boot/guest_ready_us"), Some(end));
    row("whole", Some(begin), Some(end));
}

fn blixard(options: &Options, arguments: &[&str]) -> Result<Output, BootError> {
    let output = Command::new(&options.blixard)
        .args(arguments)
        .output()
        .map_err(|source| BootError::Start { program: options.blixard.clone(), source })?;
    if output.status.success() {
        return Ok(output);
    }
    let output = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(BootError::Command { command: arguments.first().copied().unwrap_or_default().into(), output })
}

fn now_us() -> Result<u64, BootError> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(BootError::Clock)?;
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    Ok(seconds.saturating_mul(1_000_000).saturating_add(u64::try_from(now.tv_nsec()).unwrap_or(0) / 1000))
}
