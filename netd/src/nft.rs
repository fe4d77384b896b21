//! The packet filter in the kernel: read and changed by nft, one call being one transaction.
//!
//! What was changed last is remembered together with the kernel's generation number. As long as that number stays, nobody
//! has touched the filter, so it need not be read, and only the difference is written: the cost of a change does not
//! grow with the number of nics. When it has moved, everything is read and written anew, which repairs whatever was done.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::firewall::{Firewall, TABLE};
use crate::generation::Generations;

/// Where distributions put nft, after the folders of `PATH`.
const FOLDERS: [&str; 5] =
    ["/usr/sbin", "/sbin", "/usr/bin", "/usr/local/sbin", "/run/current-system/sw/bin"];
/// Longest part of an error text of nft that is passed on, in characters.
const ERROR_TEXT_MAX: usize = 400;

/// Why the packet filter could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// No connection to the kernel.
    #[error("cannot open a netlink connection to the packet filter")]
    Connect(#[source] io::Error),
    /// There is no nft on this host.
    #[error("the program nft is not installed; install the package nftables")]
    Missing,
    /// nft cannot be run.
    #[error("cannot run {program}")]
    Run {
        /// Path of nft.
        program: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// nft refused.
    #[error("nft cannot {operation}: {text}")]
    Refused {
        /// What was tried.
        operation: &'static str,
        /// What nft says.
        text: String,
    },
    /// nft printed something else than JSON.
    #[error("cannot understand what nft lists")]
    Listing(#[source] serde_json::Error),
}

/// The packet filter of the kernel.
#[derive(Debug)]
pub struct Filter {
    generations: Generations,
    known: RefCell<Option<Known>>,
}

/// What the filter was at a generation.
#[derive(Debug)]
struct Known {
    generation: u32,
    firewall: Firewall,
}

impl Filter {
    /// Connects, in the network namespace of the calling thread. Later calls must come from threads in the same one.
    ///
    /// # Errors
    /// [`NftError::Connect`].
    pub fn connect() -> Result<Self, NftError> {
        let generations = Generations::connect().map_err(NftError::Connect)?;
        Ok(Self { generations, known: RefCell::new(None) })
    }

    /// Our tables, if nobody has changed the filter since [`Self::apply`].
    pub fn known(&self) -> Option<Firewall> {
        let generation = self.generations.now()?;
        let known = self.known.borrow();
        known.as_ref().filter(|known| known.generation == generation).map(|known| known.firewall.clone())
    }

    /// Reads our tables from the kernel.
    ///
    /// # Errors
    /// See [`NftError`].
    pub fn read(&self) -> Result<Firewall, NftError> {
        let bridge = list("bridge")?;
        let inet = list("inet")?;
        Ok(Firewall::read(bridge.as_ref(), inet.as_ref()))
    }

    /// Makes our tables equal to `wanted`, at once or not at all.
    ///
    /// # Errors
    /// See [`NftError`].
    pub fn apply(&self, wanted: &Firewall) -> Result<(), NftError> {
        let before = self.generations.now();
        let known = self.known.borrow_mut().take().filter(|known| Some(known.generation) == before);
        let text = match &known {
            Some(known) if known.firewall == *wanted => {
                *self.known.borrow_mut() =
                    Some(Known { generation: known.generation, firewall: wanted.clone() });
                return Ok(());
            }
            Some(known) => wanted.ruleset_after(&known.firewall),
            None => wanted.ruleset(),
        };
        let output = run(&["-f", "-"], text.as_bytes())?;
        if !output.status.success() {
            return Err(refused("change the packet filter", &output));
        }
        // One step is ours; more means that somebody else was at work, and what is there now is not known. Zero is skipped.
        let after = self.generations.now();
        let ours = before.map(|generation| generation.checked_add(1).unwrap_or(1));
        if let Some(generation) = after.filter(|_| after == ours) {
            *self.known.borrow_mut() = Some(Known { generation, firewall: wanted.clone() });
        }
        Ok(())
    }
}

fn list(family: &str) -> Result<Option<Value>, NftError> {
    let output = run(&["-j", "list", "table", family, TABLE], &[])?;
    if output.status.success() {
        return serde_json::from_slice(&output.stdout).map(Some).map_err(NftError::Listing);
    }
    let absent = String::from_utf8_lossy(&output.stderr).contains("No such file or directory");
    if absent { Ok(None) } else { Err(refused("list the packet filter", &output)) }
}

fn refused(operation: &'static str, output: &Output) -> NftError {
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    NftError::Refused { operation, text: lines.join(" | ").chars().take(ERROR_TEXT_MAX).collect() }
}

fn run(arguments: &[&str], input: &[u8]) -> Result<Output, NftError> {
    let program = find(std::env::var_os("PATH").as_deref()).ok_or(NftError::Missing)?;
    let wrong = |source| NftError::Run { program: program.clone(), source };
    let mut child = Command::new(&program)
        .args(arguments)
        .env_clear()
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(wrong)?;
    let stdin = child.stdin.take();
    std::thread::scope(|scope| {
        // Written beside the reading: a full pipe on one side must not stop the other.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
        child.wait_with_output()
    })
    .map_err(wrong)
}

fn find(path: Option<&OsStr>) -> Option<PathBuf> {
    let searched = path.into_iter().flat_map(std::env::split_paths);
    let known = FOLDERS.iter().map(PathBuf::from);
    searched
        .chain(known)
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join("nft"))
        .find(|p| is_file(p))
}

fn is_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file())
}
