//! The tables of system calls beside what the suite of small guests made: no row without use, no use without row.
//! `tests/syscalls.sh` traces the suite and runs this.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    missing_docs,
    reason = "tests"
)]

use std::collections::{BTreeMap, BTreeSet};

use blixard_vmm::sandbox::filters::{IO, Only, PAGER, Row, SETUP, VCPU};

/// Phases, as places in a list.
const NAMES: [&str; 4] = ["SETUP", "IO", "VCPU", "PAGER"];

/// A call: thread, number, arguments.
fn parse(line: &str) -> Option<(u32, i64, Vec<u64>)> {
    // 1234 [  16] ioctl(0x7, 0xae80, 0) = 0, or cut by `<unfinished ...>`; the rest of such a call has no parenthesis of its own.
    let (thread, rest) = line.split_once(' ')?;
    let (number, rest) = rest.trim_start().strip_prefix('[')?.split_once(']')?;
    let (_, rest) = rest.split_once('(')?;
    // A thread that was killed before strace asked what it called: the number is an old one.
    if line.contains(" resumed>") || line.contains("???(") {
        return None;
    }
    let end = rest.find([')', '<']).unwrap_or(rest.len());
    let value = |word: &str| {
        let word = word.trim();
        if word == "PR_SET_NAME" {
            return Some(15);
        }
        word.strip_prefix("0x").map_or_else(|| word.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok())
    };
    let arguments = rest.get(..end)?.split(',').map(|word| value(word).unwrap_or(0)).collect();
    Some((thread.parse().ok()?, number.trim().parse().ok()?, arguments))
}

/// Whether a line says that a call came back, and to which thread.
fn returned(line: &str) -> Option<u32> {
    let (_, result) = line.rsplit_once(") = ")?;
    if result.starts_with('?') { None } else { line.split_once(' ')?.0.parse().ok() }
}

fn allows(row: &Row, number: i64, arguments: &[u64]) -> bool {
    row.call == number
        && row.only.iter().all(|(argument, value, how)| {
            let given = arguments.get(usize::from(*argument)).copied().unwrap_or(0);
            match how {
                Only::Equal => given as u32 == *value as u32,
                Only::Without => given & value == 0,
            }
        })
}

#[test]
#[ignore = "needs traces of the suite: tests/syscalls.sh"]
fn every_row_is_used_by_the_suite_and_every_call_has_a_row() {
    let folder = std::env::var("BLIXARD_STRACE").expect("BLIXARD_STRACE: a folder with traces");
    let tables = [SETUP, IO, VCPU, PAGER];
    let mut used = BTreeSet::new();
    let mut problems = BTreeSet::new();
    let mut traces = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        let mut phases: BTreeMap<u32, usize> = BTreeMap::new();
        let mut main = None;
        let mut pagers = BTreeSet::new();
        // What a thread was last seen to call without a row. When it does not come back, it was not made: a filter kills the
        // process for it, which is a failure of the suite; and strace tells nonsense of threads that are being killed.
        let mut without: BTreeMap<u32, String> = BTreeMap::new();
        for line in text.lines() {
            let call = parse(line);
            if let Some((thread, ..)) = &call {
                without.remove(thread);
            }
            let Some((thread, number, arguments)) = call else {
                problems.extend(returned(line).and_then(|thread| without.remove(&thread)));
                continue;
            };
            if line.contains("PR_SET_NAME, \"pager") {
                pagers.insert(thread);
            }
            let main = *main.get_or_insert(thread);
            // Before its first filter the main thread is free; other threads begin in the phase of set-up.
            let phase = phases.get(&thread).copied().or((thread != main).then_some(0));
            if let Some(phase) = phase {
                let matching = |table: usize| -> Vec<(usize, usize)> {
                    let rows = tables[table].iter().enumerate();
                    rows.filter(|(_, row)| allows(row, number, &arguments)).map(|(i, _)| (table, i)).collect()
                };
                let mine = matching(phase);
                // Until a thread has its own filter, all rows hold for it.
                if mine.is_empty()
                    && (phase != 0 || [1, 2, 3].into_iter().all(|table| matching(table).is_empty()))
                {
                    let problem = format!("{}: call {number} has no row: {line}", NAMES[phase]);
                    match returned(line) {
                        Some(_) => drop(problems.insert(problem)),
                        None => drop(without.insert(thread, problem)),
                    }
                }
                used.extend(mine);
            }
            if number == libc::SYS_seccomp {
                let next = match (thread == main, phase) {
                    (true, None) => 0,
                    (true, Some(_)) => 1,
                    (false, _) if pagers.contains(&thread) => 3,
                    (false, _) => 2,
                };
                phases.insert(thread, next);
            }
        }
        traces += usize::from(phases.values().any(|phase| *phase >= 2));
    }
    assert!(traces > 0, "no trace of a VM that ran: /dev/kvm and strace are needed");
    for (table, rows) in tables.iter().enumerate() {
        for (index, row) in rows.iter().enumerate() {
            let seen = used.contains(&(table, index));
            if seen != row.unseen.is_none() && !row.by_chance {
                let what = if seen { "is used; its reason for not being is wrong" } else { "is not used" };
                problems.insert(format!("{}: call {} {:x?} {what}", NAMES[table], row.call, row.only));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.into_iter().collect::<Vec<_>>().join("\n"));
}
