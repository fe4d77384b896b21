//! The VMM beside Firecracker: small guests on this machine's `/dev/kvm`, the programs alternating in one run.
//!
//! * [`guest`]: the guests
//! * [`program`]: how the programs are started
//! * [`start`], [`footprint`], [`snapshot`]: the rows
//! * [`talk`]: what running VMs are asked
//! * [`kernel`]: a stock kernel instead of a small guest
//! * [`throughput`]: disk and network of a stock kernel

pub mod guest;
pub mod kernel;
pub mod program;
pub mod throughput;

mod footprint;
mod snapshot;
mod start;
mod talk;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use crate::compare::{CompareError, Comparison};
use guest::Guest;
use program::{Devices, Kind, Peer, Program, Shape};

/// What is compared.
#[derive(Debug, Args)]
pub struct Contest {
    /// Our program.
    #[arg(long, default_value = "blixard-vmm")]
    vmm: PathBuf,
    /// The other program: firecracker=PATH. Without it only ours is measured.
    #[arg(long)]
    peer: Option<Peer>,
}

impl Contest {
    /// Ours, and the other one if there is one.
    pub fn programs(&self) -> Vec<Program> {
        let ours = Program { kind: Kind::Blixard, path: self.vmm.clone() };
        let peer = self.peer.as_ref().map(|peer| Program { kind: Kind::Firecracker, path: peer.0.clone() });
        [ours].into_iter().chain(peer).collect()
    }

    /// Whether there is another one.
    pub fn has_peer(&self) -> bool {
        self.peer.is_some()
    }
}

/// What to compare, how often.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    contest: Contest,
    /// Lives of each program; one more warms caches.
    #[arg(long, default_value_t = 40)]
    runs: u32,
    /// Rounds of the rows that take seconds.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// VMs of a round that measures the rate.
    #[arg(long, default_value_t = 200)]
    vms: u32,
    /// Idle VMs at once; 0 leaves these rows out.
    #[arg(long, default_value_t = 1000)]
    idle: u32,
    /// Restores from a snapshot; 0 leaves out snapshots, restores and forks.
    #[arg(long, default_value_t = 30)]
    restores: u32,
    /// A folder on a file system in memory, for snapshots.
    #[arg(long, default_value = "/dev/shm")]
    memory_folder: PathBuf,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// A program cannot be started.
    #[error("cannot start {program}")]
    Start {
        /// Which.
        program: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A program has no standard output.
    #[error("a program has no standard output")]
    NoOutput,
    /// A guest did not print what it should.
    #[error("a guest of {program:?} did not print {text:?}; it printed {heard:?}; the program {ended}")]
    Silent {
        /// The program.
        program: PathBuf,
        /// What it should print.
        text: String,
        /// What it printed since.
        heard: String,
        /// What became of the program.
        ended: String,
    },
    /// A line of a program is not what it should be.
    #[error("a program answered {line:?}")]
    Line {
        /// The line.
        line: String,
    },
    /// Output cannot be waited for.
    #[error("cannot wait for output")]
    Poll(#[source] nix::Error),
    /// Output or the end of a program cannot be read.
    #[error("cannot read from a program")]
    Read(#[source] io::Error),
    /// The processor time of programs that have ended is not known.
    #[error("cannot read the usage of processor time")]
    Usage(#[source] nix::Error),
    /// A thread of the benchmark failed.
    #[error("a starter failed")]
    Thread,
    /// A file cannot be read or written.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The results cannot be stored.
    #[error("cannot store the results")]
    Results(#[from] CompareError),
}

impl VmmError {
    fn file(path: &Path, source: io::Error) -> Self {
        Self::File { path: path.into(), source }
    }
}

/// What all rows need.
pub struct Bench<'a> {
    options: &'a Options,
    programs: Vec<Program>,
    folder: PathBuf,
    memory_folder: Scratch,
}

/// A folder that is gone afterwards.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed stays, under a name that says whose it was.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Bench<'_> {
    fn folder(&self) -> &Path {
        &self.folder
    }

    fn memory_folder(&self) -> &Path {
        &self.memory_folder.0
    }

    /// A VM of 128 MiB with this guest.
    fn shape(&self, guest: Guest) -> Result<Shape, VmmError> {
        let kernel = self.folder.join(format!("{guest:?}.elf"));
        fs::write(&kernel, guest.elf()).map_err(|e| VmmError::file(&kernel, e))?;
        let cmdline = "reboot=k panic=-1".into();
        Ok(Shape {
            kernel,
            initramfs: None,
            cmdline,
            memory_mib: 128,
            fork_ready: false,
            devices: Devices::default(),
        })
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Measures all rows.
///
/// # Errors
/// A program cannot be started or does not do what it should.
pub fn run(options: &Options, out: &Path) -> Result<Comparison, VmmError> {
    let folder = out.join("vmm-guests");
    fs::create_dir_all(&folder).map_err(|e| VmmError::file(&folder, e))?;
    let scratch = options.memory_folder.join(format!("blixard-bench-{}", std::process::id()));
    fs::create_dir_all(&scratch).map_err(|e| VmmError::file(&scratch, e))?;
    let memory_folder = Scratch(scratch);
    let programs = options.contest.programs();
    let bench = Bench { options, programs, folder, memory_folder };
    let mut table = Comparison::new("vmm: small guest, 1 vCPU, 128 MiB", options.contest.has_peer());
    start::lives(&bench, &mut table)?;
    start::system_calls(&bench, &mut table)?;
    start::rates(&bench, &mut table)?;
    footprint::alone(&bench, &mut table)?;
    footprint::among_many(&bench, &mut table)?;
    if options.restores > 0 {
        snapshot::snapshots(&bench, &mut table)?;
        snapshot::forks(&bench, &mut table)?;
    }
    Ok(table)
}
