//! The durable log of what was created: one line per record, appended before and after a deed.
//!
//! A line is 16 hexadecimal digits (the first 8 bytes of the SHA-256 of the rest), a space, the record as JSON and a line
//! feed. What was appended survives the agent's own death at once; [`Ledger::sync_to`] waits until it also survives a loss
//! of power. Waiters share one flush. A last line that is torn is cut off; damage before a valid line is an error, because
//! what followed it may be about things that exist.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use blixard_vmm_api::VmId;
use sha2::{Digest as _, Sha256};

use crate::durable;
use crate::record::{Known, Record, fold};

/// Largest ledger that is read, in bytes: 10,000 VMs with all their records need about 10 MiB.
const BYTES_MAX: usize = 256 << 20;
/// Size in bytes at which a running agent writes it anew.
const REWRITE_BYTES: u64 = 32 << 20;

/// Why the ledger cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It is damaged before its end.
    #[error("{path} is damaged at line {line}, and valid records follow")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The first line that is no record, from 1.
        line: usize,
    },
    /// It cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A record cannot be written as JSON.
    #[error("cannot encode a record")]
    Encode(#[source] serde_json::Error),
}

/// A position in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position(u64);

/// The open log.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    log: Mutex<Log>,
    flushed: Condvar,
}

#[derive(Debug)]
struct Log {
    file: Arc<File>,
    /// Bytes in the file.
    length: u64,
    appended: u64,
    durable: u64,
    flushing: bool,
}

fn line(record: &Record) -> Result<Vec<u8>, LedgerError> {
    let json = serde_json::to_vec(record).map_err(LedgerError::Encode)?;
    let mut line = seal(&json).into_bytes();
    line.push(b' ');
    line.extend_from_slice(&json);
    line.push(b'\n');
    Ok(line)
}

fn seal(json: &[u8]) -> String {
    Sha256::digest(json).iter().take(8).map(|b| format!("{b:02x}")).collect()
}

fn parse(line: &[u8]) -> Option<Record> {
    let (sum, json) = line.split_at_checked(17)?;
    (sum.strip_suffix(b" ")? == seal(json).as_bytes()).then(|| serde_json::from_slice(json).ok())?
}

/// The records of a log. The text after its last line feed was never finished; it is no record.
///
/// # Errors
/// The number of the first damaged line, when a valid one follows it.
pub fn read(text: &[u8]) -> Result<Vec<Record>, usize> {
    let mut records = Vec::new();
    let mut damaged = None;
    let mut lines: Vec<&[u8]> = text.split(|b| *b == b'\n').collect();
    lines.pop();
    for (i, text) in lines.into_iter().enumerate() {
        match (parse(text), damaged) {
            (Some(record), None) => records.push(record),
            (Some(_), Some(line)) => return Err(line),
            (None, None) => damaged = Some(i + 1),
            (None, Some(_)) => {}
        }
    }
    Ok(records)
}

impl Ledger {
    /// Reads the log at `path` and writes it anew with the fewest records. A log that does not exist is empty.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub fn open(path: &Path) -> Result<(Self, BTreeMap<VmId, Known>), LedgerError> {
        let wrong = |source| LedgerError::Read { path: path.into(), source };
        let text = durable::read_bounded(path, BYTES_MAX).map_err(wrong)?.unwrap_or_default();
        let records = read(&text).map_err(|line| LedgerError::Damaged { path: path.into(), line })?;
        let known = fold(records);
        let log = fresh(path, &known)?;
        Ok((Self { path: path.into(), log: Mutex::new(log), flushed: Condvar::new() }, known))
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a record. It survives the death of this process when this returns.
    ///
    /// # Errors
    /// See [`LedgerError`]; nothing was appended.
    pub fn append(&self, record: &Record) -> Result<Position, LedgerError> {
        let line = line(record)?;
        let mut log = self.lock();
        let written = log.file.as_ref().write_all(&line);
        if let Err(source) = written {
            // A torn line in the middle would make the whole log damaged.
            let _ = log.file.set_len(log.length);
            return Err(LedgerError::Write { path: self.path.clone(), source });
        }
        log.length = log.length.saturating_add(u64::try_from(line.len()).unwrap_or(0));
        log.appended += 1;
        Ok(Position(log.appended))
    }

    /// Waits until all records up to `position` survive a loss of power.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub fn sync_to(&self, position: Position) -> Result<(), LedgerError> {
        let mut log = self.lock();
        while log.durable < position.0 {
            if log.flushing {
                log = self.flushed.wait(log).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            log.flushing = true;
            let (file, upto) = (Arc::clone(&log.file), log.appended);
            drop(log);
            let result = file.sync_data();
            log = self.lock();
            log.flushing = false;
            if result.is_ok() {
                log.durable = log.durable.max(upto);
            }
            self.flushed.notify_all();
            result.map_err(|source| LedgerError::Write { path: self.path.clone(), source })?;
        }
        Ok(())
    }

    /// True when it has grown so much that [`Self::rewrite`] is worth it.
    pub fn is_long(&self) -> bool {
        self.lock().length > REWRITE_BYTES
    }

    /// Writes the log anew with the fewest records. The caller holds back all appends meanwhile.
    ///
    /// # Errors
    /// See [`LedgerError`]; the log is as before.
    pub fn rewrite(&self, known: &BTreeMap<VmId, Known>) -> Result<(), LedgerError> {
        let mut log = self.lock();
        let appended = log.appended;
        *log = Log { appended, durable: appended, flushing: log.flushing, ..fresh(&self.path, known)? };
        Ok(())
    }
}

fn fresh(path: &Path, known: &BTreeMap<VmId, Known>) -> Result<Log, LedgerError> {
    let mut text = Vec::new();
    for (vm, known) in known {
        for record in Record::of(*vm, known) {
            text.extend(line(&record)?);
        }
    }
    let wrong = |source| LedgerError::Write { path: path.into(), source };
    durable::replace(path, &text).map_err(wrong)?;
    let file = OpenOptions::new().append(true).mode(0o600).open(path).map_err(wrong)?;
    let length = u64::try_from(text.len()).unwrap_or(0);
    Ok(Log { file: Arc::new(file), length, appended: 0, durable: 0, flushing: false })
}

#[cfg(test)]
mod tests {
    use blixard_agent_api::{Epoch, Start};
    use proptest::prelude::*;

    use super::*;

    fn records(count: u32) -> Vec<Record> {
        let vm = |n| VmId::from_u128(u128::from(n));
        let admit = |slot| Record::Admit { vm: vm(slot), epoch: Epoch(1), slot };
        let begin = |slot| Record::Begin { vm: vm(slot), start: Start(1), at_ms: 5 };
        (0..count).flat_map(|slot| [admit(slot), begin(slot)]).collect()
    }

    fn text(records: &[Record]) -> Vec<u8> {
        records.iter().flat_map(|record| line(record).unwrap()).collect()
    }

    proptest! {
        #[test]
        fn a_torn_tail_loses_nothing_but_the_last_record(count in 1u32..6, cut in 1usize..4000) {
            let records = records(count);
            let whole = text(&records);
            let kept = whole.len().saturating_sub(cut);
            let lines = whole[..kept].iter().filter(|b| **b == b'\n').count();
            prop_assert_eq!(read(&whole[..kept]).unwrap(), &records[..lines]);
        }

        #[test]
        fn damage_is_seen_wherever_it_is(at in 0usize..10_000, bit in 0u8..8) {
            let records = records(4);
            let mut damaged = text(&records);
            let at = at % damaged.len();
            damaged[at] ^= 1 << bit;
            // Either an error, or the records before the damage: never a changed or missing one in the middle.
            if let Ok(found) = read(&damaged) {
                prop_assert!(records.starts_with(&found) && found.len() < records.len());
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes);
        }
    }

    #[test]
    fn what_was_appended_is_there_at_the_next_opening_also_behind_a_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let (ledger, known) = Ledger::open(&path).unwrap();
        assert!(known.is_empty());
        let mut last = None;
        for record in records(3) {
            last = Some(ledger.append(&record).unwrap());
        }
        ledger.sync_to(last.unwrap()).unwrap();
        drop(ledger);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"0123 half a rec").unwrap();
        let (ledger, known) = Ledger::open(&path).unwrap();
        assert_eq!(known, fold(records(3)));
        // And the torn line is gone: what is appended now is not lost behind it.
        ledger.append(&Record::Gone { vm: VmId::from_u128(0) }).unwrap();
        assert_eq!(Ledger::open(&path).unwrap().1.len(), 2);
    }

    #[test]
    fn damage_before_valid_records_is_an_error_with_its_line() {
        let mut damaged = text(&records(3));
        damaged[20] ^= 1;
        assert_eq!(read(&damaged), Err(1));
    }
}
