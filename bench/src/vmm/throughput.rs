//! Disk and network of a stock kernel: fio and iperf3 in the same guest, with the same disk and the same tap, for each program
//! and for each way in which a program can do them, one after the other. `bench/io-guest.sh` makes the guest.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::program::{Devices, Kind, Program, Running, Shape};
use super::{Contest, VmmError};
use crate::compare::{Better, Comparison};

/// What to boot, what to measure, how often.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    contest: Contest,
    /// The kernel: a bzImage or an ELF vmlinux.
    #[arg(long)]
    kernel: PathBuf,
    /// Folder with `io-initramfs` and `io-root`.
    #[arg(long)]
    guest: PathBuf,
    /// What to measure.
    #[arg(long, value_enum, default_values_t = [Part::Block, Part::Net])]
    part: Vec<Part>,
    /// The disk: a file, which is written to.
    #[arg(long)]
    disk: PathBuf,
    /// The tap.
    #[arg(long, default_value = "bench0")]
    tap: String,
    /// The host's address at the tap, where an iperf3 server listens; the guest's ends in 2.
    #[arg(long, default_value = "10.98.0.1")]
    host: String,
    /// Time of each job in seconds.
    #[arg(long, default_value_t = 3)]
    seconds: u32,
    /// VMs of each way.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// The disk.
    Block,
    /// The network.
    Net,
}

/// What the guest calls its results, what they are, and their unit.
const NAMES: [(&str, &str, &str); 11] = [
    ("read-4k-1", "random read, 4 KiB, depth 1", "/s"),
    ("write-4k-1", "random write, 4 KiB, depth 1", "/s"),
    ("read-4k-32", "random read, 4 KiB, depth 32", "/s"),
    ("write-4k-32", "random write, 4 KiB, depth 32", "/s"),
    ("read-128k", "sequential read, 128 KiB, depth 8", "/s"),
    ("write-128k", "sequential write, 128 KiB, depth 8", "/s"),
    ("tcp-128K", "TCP to the host, writes of 128 KiB", "Mbit/s"),
    ("tcp-R-128K", "TCP to the guest, writes of 128 KiB", "Mbit/s"),
    ("tcp-64", "TCP to the host, writes of 64 B", "Mbit/s"),
    ("tcp-R-64", "TCP to the guest, writes of 64 B", "Mbit/s"),
    ("ping", "round trip", "us"),
];
/// What a row shall reach.
const REACH: f64 = 1.2;

/// A way to do devices: a program, and what is set.
struct Way {
    name: &'static str,
    program: Program,
    devices: Devices,
    results: Vec<(String, f64)>,
}

/// Measures all ways, alternating.
///
/// # Errors
/// A program cannot be started, or its guest does not tell a result.
pub fn run(options: &Options, out: &Path) -> Result<Comparison, VmmError> {
    let folder = out.join("vmm-guests");
    fs::create_dir_all(&folder).map_err(|e| VmmError::file(&folder, e))?;
    let mut table =
        Comparison::new("io: a stock kernel's disk and network, 1 vCPU", options.contest.has_peer());
    for part in &options.part {
        let mut ways = ways(options, *part);
        for _ in 0..options.rounds {
            for way in &mut ways {
                way.results = measure(options, *part, way, &folder)?;
            }
            compare(&ways, &mut table);
        }
    }
    Ok(table)
}

fn ways(options: &Options, part: Part) -> Vec<Way> {
    let root = (options.guest.join("io-root"), true);
    let devices = match part {
        Part::Block => Devices { disks: vec![root, (options.disk.clone(), false)], ..Devices::default() },
        Part::Net => Devices { disks: vec![root], tap: Some(options.tap.clone()), ..Devices::default() },
    };
    let mut ways = vec![];
    for program in options.contest.programs() {
        let mut way =
            |name, devices| ways.push(Way { name, program: program.clone(), devices, results: vec![] });
        let base = || devices.clone();
        way("", base());
        match (program.kind, part) {
            (Kind::Blixard, Part::Block) => {}
            (Kind::Blixard, Part::Net) => way("vhost-net", Devices { vhost: true, ..base() }),
            (Kind::Firecracker, Part::Block) => {
                way("peer with PCI", Devices { pci: true, ..base() });
                way("peer with io_uring", Devices { async_disks: true, ..base() });
            }
            (Kind::Firecracker, Part::Net) => way("peer with PCI", Devices { pci: true, ..base() }),
        }
    }
    ways
}

/// Runs a guest; its results.
fn measure(options: &Options, part: Part, way: &Way, folder: &Path) -> Result<Vec<(String, f64)>, VmmError> {
    let (seconds, host) = (options.seconds, &options.host);
    let bench = if part == Part::Block { "block" } else { "net" };
    let shape = Shape {
        kernel: options.kernel.clone(),
        initramfs: Some(options.guest.join("io-initramfs")),
        cmdline: format!(
            "console=ttyS0 quiet reboot=k panic=-1 mitigations=off bench={bench} seconds={seconds} host={host}"
        ),
        memory_mib: 512,
        fork_ready: false,
        devices: way.devices.clone(),
    };
    let mut vm = Running::start(way.program.command(&shape, folder)?)?;
    let mut results = vec![];
    loop {
        let line = vm.hears_line("RESULT ")?;
        let mut words = line.split_whitespace();
        let (name, value) =
            (words.next().unwrap_or_default(), words.next().and_then(|word| word.parse().ok()));
        if name == "done" {
            return Ok(results);
        }
        let value = value.ok_or(VmmError::Line { line: line.clone() })?;
        results.push((name.to_owned(), value));
    }
}

/// Adds the results of a round: ours beside the peer's, and once more for each other way of either.
fn compare(ways: &[Way], table: &mut Comparison) {
    let first = |kind| ways.iter().find(|way| way.program.kind == kind);
    let value = |way: Option<&Way>, name: &str| {
        way?.results.iter().find(|(found, _)| found == name).map(|(_, value)| *value)
    };
    for (name, title, unit) in NAMES {
        let better = if unit == "us" { Better::Less(1.0 / REACH) } else { Better::More(REACH) };
        let mut row = |title: &str, pair: [Option<&Way>; 2]| {
            for (column, way) in pair.into_iter().enumerate() {
                if let Some(value) = value(way, name) {
                    table.add(title, unit, better, column, value);
                }
            }
        };
        let (ours, peer) = (first(Kind::Blixard), first(Kind::Firecracker));
        row(title, [ours, peer]);
        for way in ways.iter().filter(|way| !way.name.is_empty()) {
            let pair = if way.program.kind == Kind::Blixard { [Some(way), peer] } else { [ours, Some(way)] };
            row(&format!("{title}; {}", way.name), pair);
        }
    }
}
