//! Runs nft: one call is one transaction of the kernel.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::firewall::{Firewall, TABLE};

/// Where distributions put nft, after the folders of `PATH`.
const FOLDERS: [&str; 5] =
    ["/usr/sbin", "/sbin", "/usr/bin", "/usr/local/sbin", "/run/current-system/sw/bin"];
/// Longest part of an error text of nft that is passed on, in characters.
const ERROR_TEXT_MAX: usize = 400;

/// Why the packet filter could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
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

/// Reads our tables.
///
/// # Errors
/// See [`NftError`].
pub fn read() -> Result<Firewall, NftError> {
    let bridge = list("bridge")?;
    let inet = list("inet")?;
    Ok(Firewall::read(bridge.as_ref(), inet.as_ref()))
}

/// Makes our tables equal to `wanted`, at once or not at all.
///
/// # Errors
/// See [`NftError`].
pub fn apply(wanted: &Firewall) -> Result<(), NftError> {
    let output = run(&["-f", "-"], wanted.ruleset().as_bytes())?;
    if output.status.success() { Ok(()) } else { Err(refused("change the packet filter", &output)) }
}

/// True when one of our tables exists.
///
/// # Errors
/// See [`NftError`].
pub fn exists() -> Result<bool, NftError> {
    Ok(list("bridge")?.is_some() || list("inet")?.is_some())
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
