//! Rows about what a VM that does nothing costs: memory alone and among many, threads, processor time, size of the program.

use std::fs;
use std::thread;
use std::time::Duration;

use super::guest::Guest;
use super::program::Running;
use super::start::start_many;
use super::{Bench, VmmError};
use crate::compare::{Better, Comparison};

/// How long an idle VM is watched for processor time.
const WATCH: Duration = Duration::from_secs(5);

/// KiB of one process, guest memory left out: resident, and its share of what is shared.
fn memory_kib(process: u32, guest_mib: u32) -> Result<(f64, f64), VmmError> {
    let text = read(&format!("/proc/{process}/smaps"))?;
    let (mut rss, mut pss, mut counted) = (0, 0, true);
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (name, value) =
            (words.next().unwrap_or_default(), words.next().and_then(|w| w.parse::<u32>().ok()));
        match (name, value) {
            // The first line of a mapping that has this size or more is the guest's memory.
            ("Size:", Some(kib)) => counted = kib < guest_mib * 1024,
            ("Rss:", Some(kib)) if counted => rss += kib,
            ("Pss:", Some(kib)) if counted => pss += kib,
            _ => {}
        }
    }
    Ok((rss.into(), pss.into()))
}

/// KiB of a process with its share of guest memory.
pub fn pss_kib(process: u32) -> Result<f64, VmmError> {
    let text = read(&format!("/proc/{process}/smaps_rollup"))?;
    let line = text.lines().find(|l| l.starts_with("Pss:")).unwrap_or_default();
    Ok(line.split_ascii_whitespace().nth(1).and_then(|w| w.parse().ok()).unwrap_or(f64::NAN))
}

fn read(path: &str) -> Result<String, VmmError> {
    fs::read_to_string(path).map_err(|e| VmmError::file(path.as_ref(), e))
}

/// A number of KiB in /proc/meminfo.
fn meminfo(field: &str) -> Result<f64, VmmError> {
    let text = read("/proc/meminfo")?;
    let line = text.lines().find(|l| l.starts_with(field)).unwrap_or_default();
    Ok(line.split_ascii_whitespace().nth(1).and_then(|w| w.parse().ok()).unwrap_or(f64::NAN))
}

/// Nanoseconds that all threads of a process have run.
fn ran(process: u32) -> Result<f64, VmmError> {
    let folder = format!("/proc/{process}/task");
    let mut sum = 0.0;
    for thread in fs::read_dir(&folder).map_err(|e| VmmError::file(folder.as_ref(), e))?.flatten() {
        let text = read(&thread.path().join("schedstat").to_string_lossy())?;
        sum += text.split_ascii_whitespace().next().and_then(|w| w.parse::<f64>().ok()).unwrap_or(0.0);
    }
    Ok(sum)
}

/// Names of the threads of a process, without KVM's own worker, which the kernel adds to every VM.
fn threads(process: u32) -> Result<f64, VmmError> {
    let folder = format!("/proc/{process}/task");
    let mut count = 0.0;
    for thread in fs::read_dir(&folder).map_err(|e| VmmError::file(folder.as_ref(), e))?.flatten() {
        let name = read(&thread.path().join("comm").to_string_lossy())?;
        if !name.starts_with("kvm-") {
            count += 1.0;
        }
    }
    Ok(count)
}

/// One idle VM.
pub fn alone(bench: &Bench, table: &mut Comparison) -> Result<(), VmmError> {
    let shape = bench.shape(Guest::Idles)?;
    for (column, program) in bench.programs.iter().enumerate() {
        let size = fs::metadata(&program.path).map_err(|e| VmmError::file(&program.path, e))?.len();
        let kib = f64::from(u32::try_from(size / 1024).unwrap_or(u32::MAX));
        table.add("size of the program, as given", "KiB", Better::Less(1.0), column, kib);
    }
    for _ in 0..bench.options.rounds {
        for (column, program) in bench.programs.iter().enumerate() {
            let mut vm = Running::start(program.command(&shape, bench.folder())?)?;
            vm.hears("B")?;
            let before = ran(vm.process())?;
            thread::sleep(WATCH);
            let share = (ran(vm.process())? - before) / WATCH.as_secs_f64() / 1e7;
            let (rss, pss) = memory_kib(vm.process(), shape.memory_mib)?;
            table.add("RSS of one VMM without guest memory", "KiB", Better::Less(0.5), column, rss);
            table.add("PSS of one VMM without guest memory", "KiB", Better::Less(0.5), column, pss);
            table.add("threads of an idle VM", "", Better::Less(1.0), column, threads(vm.process())?);
            table.add("processor time of an idle VM", "%", Better::Less(1.0), column, share);
        }
    }
    Ok(())
}

/// Many idle VMs at once.
pub fn among_many(bench: &Bench, table: &mut Comparison) -> Result<(), VmmError> {
    let shape = bench.shape(Guest::Idles)?;
    let count = bench.options.idle;
    if count == 0 {
        return Ok(());
    }
    for (column, program) in bench.programs.iter().enumerate() {
        let fields = ["MemAvailable:", "Slab:", "KernelStack:", "PageTables:", "VmallocUsed:"];
        let before = fields.map(meminfo);
        let all = start_many(program, bench, &shape, count)?;
        // What the last starts left to be freed is freed meanwhile.
        thread::sleep(Duration::from_secs(2));
        let after = fields.map(meminfo);
        let mut pss = 0.0;
        for vm in &all {
            pss += memory_kib(vm.process(), shape.memory_mib)?.1;
        }
        let each = f64::from(count);
        table.add(&format!("PSS among {count} idle VMs"), "KiB", Better::Less(0.5), column, pss / each);
        for ((field, before), after) in fields.into_iter().zip(before).zip(after) {
            let (before, after) = (before?, after?);
            let change = if field == "MemAvailable:" { before - after } else { after - before };
            let name = match field {
                "MemAvailable:" => format!("memory of the host per VM among {count}"),
                part => format!("  of it {}", part.trim_end_matches(':')),
            };
            table.add(&name, "KiB", Better::Less(0.5), column, change / each);
        }
    }
    Ok(())
}
