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
mod liar;
mod linear;
mod member;
mod network;
mod node;
mod operator;
mod run;
mod takeover;
mod trace;
mod world;

use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};
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
    /// Seeds at once [default: as many as there are processors].
    #[arg(long)]
    jobs: Option<usize>,
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
    let jobs = match options.jobs {
        _ if options.seed.is_some() => 1,
        Some(jobs) => jobs,
        None => std::thread::available_parallelism().map_or(1, NonZero::get),
    };
    let begin = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let sums = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs).map(|_| scope.spawn(|| some(&options, &next, seeds.end))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a run panicked"))))
            .collect::<anyhow::Result<Vec<Sum>>>()
    })?;
    let mut sum = Sum::default();
    for part in sums {
        sum.failed.extend(part.failed);
        sum.answered += part.answered;
        sum.begun += part.begun;
        sum.simulated += part.simulated;
    }
    let seconds = begin.elapsed().as_secs_f64();
    let count = seeds.end - seeds.start;
    println!(
        "{count} seeds in {seconds:.1} s: {:.0} s of clusters, {} answered requests, VMs begun {} times, {} failed",
        sum.simulated,
        sum.answered,
        sum.begun,
        sum.failed.len()
    );
    sum.failed.sort_unstable();
    ensure!(sum.failed.is_empty(), "failed: {:?}", sum.failed);
    Ok(())
}

/// What runs came to.
#[derive(Default)]
struct Sum {
    failed: Vec<u64>,
    answered: usize,
    begun: u64,
    simulated: f64,
}

/// Runs one seed after the other until all are taken. Nothing of a run depends on what else runs, or on which thread.
fn some(options: &Options, next: &AtomicU64, end: u64) -> anyhow::Result<Sum> {
    let mut sum = Sum::default();
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= end {
            return Ok(sum);
        }
        let settings =
            run::Settings { seed, nodes: options.nodes, steps: options.steps, print: options.print };
        let outcome = run::run(settings)?;
        sum.answered += outcome.answered;
        sum.begun += outcome.begun;
        sum.simulated += outcome.time.as_secs_f64();
        if let Some(wrong) = &outcome.wrong {
            println!("seed {seed}: {wrong}");
            sum.failed.push(seed);
        }
        if options.seed.is_some() {
            println!("{outcome:?}");
        }
    }
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
