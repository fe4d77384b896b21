//! What a disk may give back of the journal of the Raft log: records with any content, and damage anywhere.
#![no_main]

use std::io;
use std::sync::Arc;

use blixard_node::raft::journal::{Journal, Op};
use libfuzzer_sys::fuzz_target;
use redb::StorageBackend;
use redb::backends::InMemoryBackend;
use sha2::{Digest, Sha256};

const CAPACITY: usize = 16 << 10;
const SECTOR: usize = 512;

/// A record as the journal writes it: a good one but for what its content says.
fn record(generation: u64, number: u64, content: &[u8]) -> Vec<u8> {
    let mut bytes = b"BLXJ".to_vec();
    bytes.extend((content.len() as u32).to_le_bytes());
    bytes.extend(generation.to_le_bytes());
    bytes.extend(number.to_le_bytes());
    let sum = Sha256::new().chain_update(&bytes).chain_update(content).finalize();
    bytes.extend(&sum[..8]);
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
    bytes
}

/// A file that stays when the journal is closed.
#[derive(Debug, Clone)]
struct Disk(Arc<InMemoryBackend>);

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(at, out)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write(at, bytes)
    }
}

fuzz_target!(|input: (Vec<(bool, Vec<u8>)>, Vec<(u16, u8)>)| {
    let (contents, flips) = input;
    let mut bytes = Vec::new();
    for (number, (old, content)) in contents.iter().enumerate() {
        bytes.extend(record(if *old { 6 } else { 7 }, number as u64, content));
    }
    bytes.resize(CAPACITY, 0);
    for (at, flip) in flips {
        bytes[usize::from(at) % CAPACITY] ^= flip;
    }
    let disk = Disk(Arc::new(InMemoryBackend::new()));
    disk.set_len(CAPACITY as u64).unwrap();
    disk.write(0, &bytes).unwrap();
    let open = || Journal::open(Box::new(disk.clone()), CAPACITY, 6, false);
    let Ok((mut journal, ops)) = open() else { return };
    // What was read is read again, with what comes behind it, unless that leaves a gap before an old record of the generation.
    let more = Op::TruncateFrom(3);
    if journal.append([&more].into_iter()).unwrap()
        && let Ok((_, again)) = open()
    {
        assert!(again.starts_with(&ops) && again.get(ops.len()) == Some(&more));
    }
});
