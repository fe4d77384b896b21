//! Runs simulations of the control plane: `simulate --seeds 0..1000`, or one seed again with all that happens: `simulate --seed 7
//! --print`. A seed that fails is printed, and fails again in the same way. See the README here.
#![expect(clippy::print_stdout, reason = "a program for the terminal")]

mod census;
mod checks;
mod clients;
mod clock;
mod dice;
mod disk;
mod faults;
mod history;
mod host;
mod linear;
mod network;
mod node;
mod operator;
mod run;
mod takeover;
mod trace;
mod world;

use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;

/// As in the node: with musl's own it takes half as long again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What to run.
#[derive(Debug, Parser)]
struct Options {
    /// One seed.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// All seeds from the first to before the second: 0..1000.
    #[arg(long, default_value = "0..100")]
    seeds: String,
    /// Nodes at the beginning.
    #[arg(long)]
    nodes: Option<usize>,
    /// Steps in which things go wrong.
    #[arg(long, default_value_t = 60)]
    steps: u64,
    /// Only this: a host dies, and its VMs are awaited elsewhere.
    #[arg(long)]
    takeover: bool,
    /// Print what happens.
    #[arg(long)]
    print: bool,
    /// Print what the nodes log, too: a filter as in BLIXARD_LOG.
    #[arg(long)]
    log: Option<String>,
}

fn range(text: &str) -> anyhow::Result<std::ops::Range<u64>> {
    let (from, to) = text.split_once("..").context("seeds are given as FROM..TO")?;
    Ok(from.parse()?..to.parse()?)
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if let Some(filter) = &options.log {
        let filter = tracing_subscriber::EnvFilter::new(filter);
        tracing_subscriber::fmt().with_env_filter(filter).without_time().with_writer(std::io::stderr).init();
    }
    let seeds = match options.seed {
        Some(seed) => seed..seed + 1,
        None => range(&options.seeds)?,
    };
    if options.takeover {
        return take_over(seeds, options.nodes.unwrap_or(3));
    }
    let begin = Instant::now();
    let (mut failed, mut answered, mut begun, mut simulated) = (Vec::new(), 0, 0, 0.0);
    for seed in seeds.clone() {
        let settings =
            run::Settings { seed, nodes: options.nodes, steps: options.steps, print: options.print };
        let outcome = run::run(settings)?;
        answered += outcome.answered;
        begun += outcome.begun;
        simulated += outcome.time.as_secs_f64();
        if let Some(wrong) = &outcome.wrong {
            println!("seed {seed}: {wrong}");
            failed.push(seed);
        }
        if options.seed.is_some() {
            println!("{outcome:?}");
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    let count = seeds.end - seeds.start;
    println!(
        "{count} seeds in {seconds:.1} s: {simulated:.0} s of clusters, {answered} answered requests, VMs begun {begun} times, \
         {} failed",
        failed.len()
    );
    ensure!(failed.is_empty(), "failed: {failed:?}");
    Ok(())
}

/// Prints how long the VMs of dead hosts were missed.
fn take_over(seeds: std::ops::Range<u64>, nodes: usize) -> anyhow::Result<()> {
    for (who, leader) in [("a host", false), ("the leader's host", true)] {
        let times: Result<Vec<_>, String> =
            seeds.clone().map(|seed| takeover::run(seed, nodes, leader)).collect();
        let mut times = times.map_err(anyhow::Error::msg)?;
        times.sort();
        let (half, most) = (times.get(times.len() / 2), times.last());
        let (half, most) = half.zip(most).context("no seed")?;
        println!(
            "{nodes} nodes, {who} dies, {} runs: VMs elsewhere after p50 {half:?}, max {most:?}",
            times.len()
        );
    }
    Ok(())
}
