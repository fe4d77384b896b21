//! Rows about starting: process start → first serial byte, → boot signal, whole life, VMs per second.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};

use super::guest::Guest;
use super::program::{Program, Running};
use super::{Bench, VmmError, ms};
use crate::compare::{Better, Comparison};

/// Starts and lives, one after the other, alternating between the programs.
pub fn lives(bench: &Bench, table: &mut Comparison) -> Result<(), VmmError> {
    let shape = bench.shape(Guest::Resets)?;
    // The first round warms caches and is not counted.
    for round in 0..=bench.options.runs {
        for (column, program) in bench.programs.iter().enumerate() {
            let before = children_ran()?;
            let mut vm = Running::start(program.command(&shape, bench.folder())?)?;
            let (byte, signal) = (vm.hears("A")?, vm.hears("B")?);
            let life = vm.ends()?;
            let ran = children_ran()? - before;
            if round > 0 {
                let mut add = |row, value| table.add(row, "ms", Better::Less(0.3), column, value);
                add("process start → first serial byte", ms(byte));
                add("process start → boot signal", ms(signal));
                add("whole life: start, boot signal, reset, exit", ms(life));
                add("  processor time of it", ran);
            }
        }
    }
    Ok(())
}

/// Milliseconds of processor time of all children that have ended and were waited for.
fn children_ran() -> Result<f64, VmmError> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).map_err(VmmError::Usage)?;
    let ms = |time: TimeVal| {
        let micros = u64::try_from(time.num_microseconds()).unwrap_or(0);
        Duration::from_micros(micros).as_secs_f64() * 1000.0
    };
    Ok(ms(usage.user_time()) + ms(usage.system_time()))
}

/// System calls of a life, where strace is installed.
pub fn system_calls(bench: &Bench, table: &mut Comparison) -> Result<(), VmmError> {
    if Command::new("strace").arg("-V").output().is_err() {
        return Ok(());
    }
    let shape = bench.shape(Guest::Resets)?;
    let counts = bench.folder().join("strace");
    for (column, program) in bench.programs.iter().enumerate() {
        let command = program.command(&shape, bench.folder())?;
        let mut strace = Command::new("strace");
        strace.args(["-f", "-c", "-o"]).arg(&counts).arg(command.get_program()).args(command.get_args());
        strace.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        Running::start(strace)?.ends()?;
        let text = fs::read_to_string(&counts).map_err(|e| VmmError::file(&counts, e))?;
        // The last line: percent, seconds, microseconds per call, calls, errors if any, "total".
        let total = text.lines().last().and_then(|line| line.split_ascii_whitespace().nth(3));
        let calls = total.and_then(|word| word.parse().ok()).unwrap_or(f64::NAN);
        table.add("system calls of a life", "", Better::Less(1.0), column, calls);
    }
    Ok(())
}

/// VMs per second: `starters` threads start VMs until there are `options.vms`; all of them stay.
pub fn rates(bench: &Bench, table: &mut Comparison) -> Result<(), VmmError> {
    let shape = bench.shape(Guest::Idles)?;
    for starters in [1u32, 2] {
        let row = format!("VMs started per second, {starters} starter(s), {} VMs", bench.options.vms);
        for _ in 0..bench.options.rounds {
            for (column, program) in bench.programs.iter().enumerate() {
                let begun = Instant::now();
                let share = bench.options.vms / starters;
                let start = || start_many(program, bench, &shape, share);
                let all: Result<Vec<Vec<Running>>, VmmError> = thread::scope(|scope| {
                    let threads: Vec<_> = (0..starters).map(|_| scope.spawn(start)).collect();
                    threads.into_iter().map(|t| t.join().unwrap_or(Err(VmmError::Thread))).collect()
                });
                let all = all?;
                let rate = f64::from(share * starters) / begun.elapsed().as_secs_f64();
                drop(all);
                table.add(&row, "/s", Better::More(3.0), column, rate);
            }
        }
    }
    Ok(())
}

/// Starts `count` VMs one after the other, each when the one before has given its boot signal.
pub fn start_many(
    program: &Program,
    bench: &Bench,
    shape: &super::program::Shape,
    count: u32,
) -> Result<Vec<Running>, VmmError> {
    let folder: &Path = bench.folder();
    let mut all = vec![];
    for _ in 0..count {
        let mut vm = Running::start(program.command(shape, folder)?)?;
        vm.hears("B")?;
        all.push(vm);
    }
    Ok(all)
}
