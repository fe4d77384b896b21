//! Rows about snapshots, restore and fork. Files are on a file system in memory, so that no disk is measured.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::footprint::pss_kib;
use super::guest::Guest;
use super::program::{Kind, Program, Running, Shape};
use super::talk::{ask, http};
use super::{Bench, VmmError, ms};
use crate::compare::{Better, Comparison};

/// Children of a fork.
const CHILDREN: u32 = 100;
/// Memory of their parent in MiB.
const PARENT_MIB: u32 = 512;

/// Where a snapshot of a program is kept, and the socket of the VM that it is made of.
struct Place {
    socket: PathBuf,
    state: PathBuf,
    memory: PathBuf,
}

impl Place {
    fn of(bench: &Bench, program: &Program) -> Self {
        let folder = bench.memory_folder();
        let name = |what: &str| folder.join(format!("{:?}-{what}", program.kind));
        Self { socket: name("socket"), state: name("state"), memory: name("memory") }
    }
}

/// Starts a VM that can be asked on the socket of `place`.
fn start(bench: &Bench, program: &Program, shape: &Shape, place: &Place) -> Result<Running, VmmError> {
    // What an earlier VM left; that there is nothing is as good.
    let _ = fs::remove_file(&place.socket);
    let mut vm = Running::start(program.command_with_socket(shape, bench.folder(), &place.socket)?)?;
    vm.hears("B")?;
    Ok(vm)
}

/// Writes a full snapshot; how long it took.
fn save(program: &Program, place: &Place) -> Result<Duration, VmmError> {
    let begun = Instant::now();
    match program.kind {
        Kind::Blixard => {
            let create = |path: &PathBuf| -> Result<OwnedFd, VmmError> {
                let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
                file.map(Into::into).map_err(|e| VmmError::file(path, e))
            };
            ask(
                &place.socket,
                &json!({"snapshot": "full"}),
                &[create(&place.state)?, create(&place.memory)?],
            )?;
        }
        Kind::Firecracker => {
            http(&place.socket, "PATCH", "/vm", &json!({"state": "Paused"}))?;
            let files = json!({
                "snapshot_type": "Full", "snapshot_path": place.state, "mem_file_path": place.memory,
            });
            http(&place.socket, "PUT", "/snapshot/create", &files)?;
        }
    }
    Ok(begun.elapsed())
}

/// A fresh process goes on from the snapshot; the time until the guest's first byte.
fn restore(program: &Program, place: &Place) -> Result<Duration, VmmError> {
    let mut command = Command::new(&program.path);
    match program.kind {
        Kind::Blixard => {
            let mut files = place.state.clone().into_os_string();
            files.push(",");
            files.push(&place.memory);
            command.args(["run", "--no-stdin", "--boot-timer", "--restore"]).arg(files);
        }
        Kind::Firecracker => {
            let _ = fs::remove_file(&place.socket);
            command.args(["--level", "Error", "--log-path", "/dev/null", "--boot-timer"]);
            command.arg("--api-sock").arg(&place.socket);
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut vm = Running::start(command)?;
    if program.kind == Kind::Firecracker {
        let load = json!({
            "snapshot_path": place.state,
            "mem_backend": {"backend_path": place.memory, "backend_type": "File"},
            "resume_vm": true,
        });
        http(&place.socket, "PUT", "/snapshot/load", &load)?;
    }
    vm.hears(".")
}

/// Snapshot and restore, alternating.
pub fn snapshots(bench: &Bench, table: &mut Comparison) -> Result<(), VmmError> {
    let idle = bench.shape(Guest::DirtiesAndIdles)?;
    let prints = bench.shape(Guest::Prints)?;
    for _ in 0..bench.options.restores.div_ceil(3) {
        for (column, program) in bench.programs.iter().enumerate() {
            let place = Place::of(bench, program);
            let vm = start(bench, program, &idle, &place)?;
            let took = ms(save(program, &place)?);
            drop(vm);
            let row = "full snapshot of an idle VM, 16 of 128 MiB written";
            table.add(row, "ms", Better::Less(0.2), column, took);
            let bytes = fs::metadata(&place.memory).map_err(|e| VmmError::file(&place.memory, e))?;
            let kib =
                f64::from(u32::try_from(std::os::unix::fs::MetadataExt::blocks(&bytes) / 2).unwrap_or(0));
            table.add("  room that its memory file takes", "KiB", Better::Less(0.2), column, kib);
        }
    }
    for program in &bench.programs {
        let place = Place::of(bench, program);
        let vm = start(bench, program, &prints, &place)?;
        save(program, &place)?;
        drop(vm);
    }
    for round in 0..=bench.options.restores {
        for (column, program) in bench.programs.iter().enumerate() {
            let took = restore(program, &Place::of(bench, program))?;
            if round > 0 {
                let row = "fresh process: start, load, resume → first byte";
                table.add(row, "ms", Better::Less(0.3), column, ms(took));
            }
        }
    }
    Ok(())
}

/// Children of a running VM, ours only: the peer has no fork. Once of a VM that is made to be forked, once of one that is not.
pub fn forks(bench: &Bench, table: &mut Comparison) -> Result<(), VmmError> {
    let Some(program) = bench.programs.first() else { return Ok(()) };
    for _ in 0..bench.options.rounds {
        for fork_ready in [true, false] {
            let forked = fork(bench, program, fork_ready)?;
            let row = if fork_ready {
                "fork of a 512 MiB VM"
            } else {
                "first fork of one that was not made for it"
            };
            let mut add = |row: &str, unit, most, value| table.add(row, unit, Better::AtMost(most), 0, value);
            add(&format!("{row}, each of 100 children until it runs"), "ms", 3.0, forked.child_ms);
            add(&format!("{row}, memory of a child (PSS)"), "KiB", 1024.0, forked.child_kib);
            add(&format!("{row}, pause of the parent"), "ms", 5.0, forked.pause_ms);
        }
    }
    Ok(())
}

/// What a fork took.
struct Forked {
    /// For each child until it runs.
    child_ms: f64,
    /// Memory of a child with what it wrote.
    child_kib: f64,
    /// How long the parent stood still.
    pause_ms: f64,
}

fn fork(bench: &Bench, program: &Program, fork_ready: bool) -> Result<Forked, VmmError> {
    let shape = Shape { memory_mib: PARENT_MIB, fork_ready, ..bench.shape(Guest::DirtiesAndIdles)? };
    let place = Place::of(bench, program);
    let parent = start(bench, program, &shape, &place)?;
    let sockets = bench.memory_folder().join("child");
    (0..CHILDREN).for_each(|number| drop(fs::remove_file(child_socket(&sockets, number))));
    let begun = Instant::now();
    let mut client = Command::new(&program.path);
    client.arg("fork").arg(&place.socket).arg(CHILDREN.to_string()).arg("--control").arg(&sockets);
    client.arg("--no-stdin").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut client =
        client.spawn().map_err(|source| VmmError::Start { program: program.path.clone(), source })?;
    let output = client.stdout.take().ok_or(VmmError::NoOutput)?;
    let mut lines = BufReader::new(output).lines();
    let mut line = || lines.next().and_then(Result::ok).unwrap_or_default();
    let made = line();
    let unclear = |line: &str| VmmError::Line { line: line.into() };
    let pause = serde_json::from_str(&made).ok().and_then(|made: Value| made.get("pause_us")?.as_u64());
    let pause = pause.and_then(|us| u32::try_from(us).ok()).ok_or_else(|| unclear(&made))?;
    let mut processes = vec![];
    for number in 0..CHILDREN {
        // `child 3: process 4711, started in 900 us`
        let text = line();
        let process = text.split_once("process ").and_then(|(_, rest)| rest.split(',').next());
        processes.push(process.and_then(|number| number.parse().ok()).ok_or_else(|| unclear(&text))?);
        ask(&child_socket(&sockets, number), &json!("status"), &[])?;
    }
    let child_ms = ms(begun.elapsed()) / f64::from(CHILDREN);
    let mut kib = 0.0;
    for process in &processes {
        kib += pss_kib(*process)?;
    }
    (0..CHILDREN).for_each(|number| drop(ask(&child_socket(&sockets, number), &json!("kill"), &[])));
    // The children are killed, so it ends too.
    let _ = client.wait();
    drop(parent);
    Ok(Forked { child_ms, child_kib: kib / f64::from(CHILDREN), pause_ms: f64::from(pause) / 1000.0 })
}

fn child_socket(path: &Path, number: u32) -> PathBuf {
    PathBuf::from(format!("{}.{number}", path.display()))
}
